"""What was meant is told where something is near, and nothing is made up where nothing is."""

from model.suggestion import suggest


def test_the_nearest_of_what_is_known_is_told() -> None:
    assert suggest("panoptik", ("panoptic", "instance"), ": ask") == ", did you mean 'panoptic'?"


def test_where_nothing_is_near_the_other_end_is_told() -> None:
    assert suggest("red", ("panoptic", "instance"), "; known are two") == "; known are two"


def test_a_form_writes_the_word() -> None:
    assert suggest("PROT", ["PORT", "HOST"], "", "--{}".format) == ", did you mean --PORT?"
