"""Which state of the code ran."""

import shutil
import subprocess
from pathlib import Path

_TIMEOUT_S = 10.0


def read_commit(file: Path = Path(__file__)) -> str | None:
    """The git commit of the checkout that holds a file, `-dirty` behind it if anything there was changed since.

    None if git is absent, or does not know the file: it may be installed inside a checkout of something else.
    """
    git = shutil.which("git")
    if git is None or _ask(git, file, "ls-files", "--error-unmatch", file.name) is None:
        return None
    return _ask(git, file, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _ask(git: str, file: Path, *words: str) -> str | None:
    try:
        asked = subprocess.run(
            [git, "-C", file.parent, *words], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return asked.stdout.strip()
