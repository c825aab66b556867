import pytest

from model.errors import ConfigError
from model.histogram import Histogram


@pytest.mark.parametrize(("edges", "counts"), [((1.0, 2.0), (1, 1)), ((2.0, 1.0), (1, 1, 1)), ((1.0,), (1, -1))])
def test_a_histogram_that_is_none_is_refused(edges: tuple[float, ...], counts: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="histogram"):
        Histogram(edges=edges, counts=counts)
