"""The names of one artifact's clusters while it is served: what people change is in every later answer."""

import asyncio
import logging
import threading
from collections.abc import Callable
from pathlib import Path

from model.contract import Contract
from model.errors import InvalidCategoryNames
from model.registry.category_names import CategoryNames, NameChange, edit_names, empty_names, read_names

logger = logging.getLogger(__name__)

_POLL_INTERVAL_S = 1.0
"""Between two looks at the file, which other processes may change, too."""


class LiveCategoryNames:
    """A glossary and the contract under its names. Safe to share by threads."""

    def __init__(self, contract: Contract, file: Path | None = None) -> None:
        """Without a file, the contract's names are all there are."""
        self.contract = contract
        """With the names; its own where none is given."""
        self.glossary = empty_names(contract)
        self._own = contract
        self._file = file
        self._stamp: tuple[int, int, int] | None = None
        self._had_home = file is not None and file.parent.is_dir()
        self._lock = threading.Lock()

    def refresh(self) -> None:
        """Take up the file if it is another one than at the last look.

        One that is broken changes nothing, nor does one whose folder is gone: that disk will be back.
        """
        with self._lock:
            stamp = self._read_stamp()
            if self._file is None or stamp == self._stamp or self._is_away():
                return
            self._stamp = stamp
            try:
                self.glossary = read_names(self._file, self._own)
            except InvalidCategoryNames as error:
                logger.error("the names of clusters stay as they were: %s", error)
            else:
                self.contract = self.glossary.apply(self._own)

    def change(self, change: Callable[[CategoryNames], CategoryNames]) -> tuple[CategoryNames, NameChange | None]:
        """The glossary after a change that was written, and the edit, if the change was one.

        Raises InvalidCategoryNames, and what `change` raises.
        """
        if self._file is None:
            raise InvalidCategoryNames(
                "this service has no place for names of clusters: serve an artifact from a folder"
            )
        if self._is_away():
            raise InvalidCategoryNames(f"{self._file.parent} is gone: put it back, and name again")
        edit: NameChange | None = None

        def note(old: CategoryNames) -> CategoryNames:
            nonlocal edit
            new = change(old)
            edit = new.history[-1] if new.revision != old.revision else None
            return new

        changed = edit_names(self._file, self._own, note)
        self.refresh()
        if edit:
            template = "names of %s %s: revision %d by %s, clusters %s"
            clusters = ", ".join(map(str, edit.after))
            logger.info(template, self._own.name, self._own.version, edit.revision, edit.author, clusters)
        return changed, edit

    def apply(self, glossary: CategoryNames) -> Contract:
        """The artifact's contract under these names."""
        return glossary.apply(self._own)

    async def follow(self) -> None:
        """Take up every change of the file, without end."""
        while True:
            await asyncio.sleep(_POLL_INTERVAL_S)
            await asyncio.to_thread(self.refresh)

    def _is_away(self) -> bool:
        """Whether the folder of the names was there at first, and is not any more."""
        return self._had_home and self._file is not None and not self._file.parent.is_dir()

    def _read_stamp(self) -> tuple[int, int, int] | None:
        """What changes whenever the file does; None without one."""
        try:
            facts = self._file.stat() if self._file else None
        except OSError:
            return None
        return (facts.st_mtime_ns, facts.st_size, facts.st_ino) if facts else None
