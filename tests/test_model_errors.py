"""The tree of errors matches its docstring."""

import re

from model import errors
from model.errors import UsegError


def list_tree(root: type[UsegError], depth: int = 0) -> list[tuple[int, str]]:
    """Return depth and name of `root` and of all its subclasses in `model.errors`, in order."""
    children = [child for child in root.__subclasses__() if child.__module__ == errors.__name__]
    return [(depth, root.__name__), *(entry for child in children for entry in list_tree(child, depth + 1))]


def test_the_docstring_draws_the_tree_of_the_module() -> None:
    _, drawing = (errors.__doc__ or "").split("\n\n", maxsplit=1)
    drawn = [re.findall(r"^([│├└─ ]*)(\w+)", line)[0] for line in drawing.strip().splitlines()]
    assert [(len(branch) // 3, name) for branch, name in drawn] == list_tree(UsegError)


def test_every_error_has_a_docstring() -> None:
    undocumented = [name for _, name in list_tree(UsegError) if not getattr(errors, name).__doc__]
    assert undocumented == []
