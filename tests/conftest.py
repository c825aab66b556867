"""Folders of reference data, which not every machine has."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def find_folder(variable: str, default: str) -> Path:
    """The folder that an environment variable names, or `default` beside the repository; skips where it is absent."""
    folder = Path(os.environ.get(variable, REPOSITORY.parent / default))
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: set {variable} to the folder of reference data")
    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    """Stored outputs of the reference implementations."""
    return find_folder("USEG_GOLDEN", "shared/golden")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Photos, annotations and encoder weights for development."""
    return find_folder("USEG_DATA", "shared/data")
