"""The category names of a loaded artifact; changes by users apply to all later results."""

import asyncio
import logging
import threading
from collections.abc import Callable
from pathlib import Path

from model.contract import Contract
from model.errors import InvalidCategoryNames, PreconditionFailed
from model.registry.category_names import CategoryNames, edit_names, empty_names, read_names

logger = logging.getLogger(__name__)

_POLL_INTERVAL_S = 1.0
"""Between two checks of the file, which other processes may change, too."""


class LiveCategoryNames:
    """The names in a file, and the contract with them applied; thread-safe."""

    def __init__(self, contract: Contract, file: Path) -> None:
        self.contract = contract
        """With the users' names applied."""
        self.names = empty_names(contract)
        self._original = contract
        self._file = file
        self._fingerprint: tuple[int, int, int] | None = None
        """What changes whenever the file does; None while it does not exist."""
        self._had_folder = file.parent.is_dir()
        self._lock = threading.Lock()

    def refresh(self) -> None:
        """Read the file if it has changed; if it is invalid or its folder is unmounted, the names stay as they are."""
        with self._lock:
            try:
                stat = self._file.stat()
                fingerprint = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            except OSError:
                fingerprint = None
            if fingerprint == self._fingerprint or self._is_folder_missing():
                return
            self._fingerprint = fingerprint
            try:
                self.names = read_names(self._file, self._original)
            except InvalidCategoryNames as error:
                logger.error("could not reload category names, keeping the previous ones: %s", error)
            else:
                self.contract = self.names.apply(self._original)

    def edit(
        self, change: Callable[[CategoryNames], CategoryNames], expected: int | None = None
    ) -> tuple[CategoryNames, bool]:
        """Write the names that `change` returns; return them, and whether they are other ones.

        Raises PreconditionFailed unless the names have the `expected` revision, InvalidCategoryNames if the file cannot
        be written, and what `change` raises.
        """
        if self._is_folder_missing():
            raise InvalidCategoryNames(f"{self._file.parent} is missing: restore it, then try again")
        revision = 0

        def change_expected(old: CategoryNames) -> CategoryNames:
            nonlocal revision
            revision = old.revision
            if expected not in (None, revision):
                raise PreconditionFailed(f"the names are at revision {revision}, not {expected}: load them again")
            return change(old)

        names = edit_names(self._file, self._original, change_expected)
        self.refresh()
        if names.revision != revision:
            event, contract = names.history[-1], self._original
            template = "category names of %s %s: revision %d by %s, clusters %s"
            clusters = ", ".join(map(str, event.after))
            logger.info(template, contract.name, contract.version, event.revision, event.author, clusters)
        return names, names.revision != revision

    def apply(self, names: CategoryNames) -> Contract:
        """Return the artifact's contract with these names."""
        return names.apply(self._original)

    async def poll(self) -> None:
        """Read the file whenever it changes, until cancelled."""
        while True:
            await asyncio.sleep(_POLL_INTERVAL_S)
            await asyncio.to_thread(self.refresh)

    def _is_folder_missing(self) -> bool:
        """Whether the file's folder existed at the start and does not any more, such as an unmounted volume."""
        return self._had_folder and not self._file.parent.is_dir()
