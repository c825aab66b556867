"""A registry of fake versions: the content of the network file selects how a version behaves."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from fake_service import CONTRACT, RedSession

from model.backends.session import Session
from model.contract import GOLDEN_FILE, NETWORK_FILE, Contract, Histogram, RawOutputs, read_contract
from model.drift import BIN_EDGES
from model.errors import ParityError
from model.files import hash_file
from model.registry.versions import Registry

NAME = CONTRACT.name
SLEEP_S = 0.04
SEGMENTS = Histogram(edges=BIN_EDGES["segments"], counts=(0, 0, 1000, *[0] * 9))
"""Two segments per image, as in the half-red images of the tests."""


class FakeSession(RedSession):
    """A session that behaves well, or fails in one of several ways."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.images = 0

    def run(self, pixels: np.ndarray, sizes: np.ndarray) -> list[RawOutputs]:
        self.images += int(pixels.any())
        if self.kind == "slow":
            time.sleep(SLEEP_S)
        if self.kind == "deadly" and pixels.any():
            raise SystemExit
        if self.kind == "broken" and pixels.any():
            raise RuntimeError("this version fails on every real image")
        raws = super().run(pixels, sizes)
        if self.kind == "nan":
            return [replace(raw, scores=raw.scores * np.nan) for raw in raws]
        if self.kind == "blind":
            return [
                replace(raw, scores=raw.scores * 0, semantic=raw.semantic[:, ::1] * [[[1]], [[-1]]]) for raw in raws
            ]
        return raws


def write_artifact(folder: Path, version: str, kind: str = "good", **changes: Any) -> Path:
    """Write an artifact of the fake model."""
    folder.mkdir(parents=True)
    (folder / NETWORK_FILE).write_text(kind)
    (folder / GOLDEN_FILE).write_bytes(b"golden")
    files = {name: hash_file(folder / name) for name in (NETWORK_FILE, GOLDEN_FILE)}
    replace(CONTRACT, version=version, files=files, **changes).write(folder)
    return folder


def open_artifact(folder: Path) -> tuple[Contract, Session]:
    """What `open_session` would give; a wrong one fails its golden answers."""
    contract = read_contract(folder)
    kind = (folder / NETWORK_FILE).read_text()
    if kind == "wrong":
        raise ParityError("golden answers differ")
    return contract, FakeSession(kind)


def make_registry(folder: Path, kinds: dict[str, str], **changes: Any) -> Registry:
    """Make a registry of these versions, none of them active."""
    registry = Registry(folder / "registry")
    for version, kind in kinds.items():
        registry.add(write_artifact(folder / f"artifact-{version}", version, kind, **changes), author="test")
    return registry
