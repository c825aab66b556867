"""What was probably meant by a word that is not known."""

from collections.abc import Callable, Iterable
from difflib import get_close_matches


def did_you_mean(given: str, known: Iterable[str], otherwise: str, form: Callable[[str], str] = repr) -> str:
    """The end of a message about `given`: what was probably meant, in that form; `otherwise`, if nothing is near."""
    near = get_close_matches(given, known, n=1)
    return f", did you mean {form(near[0])}?" if near else otherwise
