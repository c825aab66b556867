import pytest

from model.errors import ConfigError
from training.labels.masks.discovery_recipe import DiscoveryConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cuts": 0}, "cuts"),
        ({"objects": 0}, "objects"),
        ({"objects": 13}, "objects must be at most 12"),
        ({"threshold": 1.0}, "threshold"),
        ({"proposals": "sam"}, "maskcut, vote"),
        ({"tokens": "values"}, "patches, keys"),
        ({"refinement": "none"}, "guided, crf"),
        ({"proposals": "vote", "tokens": "keys"}, "not with a vote"),
        ({"proposals": "vote", "centred": True}, "not with a vote"),
        ({"proposals": "vote", "faithful": True}, "not with a vote"),
    ],
)
def test_options_out_of_range_or_at_odds_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DiscoveryConfig(**options)  # type: ignore[arg-type]
