"""The clusters of a checkpoint tell its family."""

import pytest

from model.weights.families import FAMILIES, guess_family


@pytest.mark.parametrize(
    ("things", "stuff", "fits", "guess"),
    [
        (300, 27, {"u2seg", "cups"}, "u2seg"),
        (1, 0, {"cutler"}, "cutler"),
        (15, 12, {"cups"}, "cups"),
        (80, 0, set(), None),
    ],
)
def test_a_checkpoint_fits_the_families_that_have_such_clusters(
    things: int, stuff: int, fits: set[str], guess: str | None
) -> None:
    assert {word for word, family in FAMILIES.items() if family.has(things, stuff)} == fits
    assert guess_family(things, stuff) == guess
