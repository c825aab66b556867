"""Settings come from `USEG_*` variables and flags, are checked, and are never guessed."""

from pathlib import Path

import pytest

from model.errors import ConfigError
from service.settings import Settings, find_bundled_artifact, read_settings


def test_nothing_set_gives_the_defaults_and_the_bundled_artifact() -> None:
    settings = read_settings({"PATH": "/bin"})
    assert settings == Settings()
    assert settings.artifact == find_bundled_artifact()
    assert settings.artifact.parts[-2:] == ("model", "default")
    assert (settings.host, settings.port, settings.limit_bytes) == ("127.0.0.1", 8000, 33_554_432)


def test_variables_become_values_of_their_types() -> None:
    settings = read_settings({"USEG_ARTIFACT": "/models/a", "USEG_MAX_BATCH": "8", "USEG_MAX_WAIT_MS": "0.5"})
    assert settings == Settings(artifact=Path("/models/a"), max_batch=8, max_wait_ms=0.5)


def test_a_backend_is_one_of_the_words() -> None:
    assert read_settings({}).backend == "cpu"
    assert read_settings({"USEG_BACKEND": "cuda"}).backend == "cuda"
    assert read_settings({"USEG_BACKEND": "cuda"}, flags={"backend": "torch"}).backend == "torch"
    with pytest.raises(ConfigError, match="backend must be one of cpu, openvino, cuda, tensorrt, torch, got 'cdua'"):
        read_settings({"USEG_BACKEND": "cdua"})


def test_flags_go_before_variables() -> None:
    assert read_settings({"USEG_PORT": "1", "USEG_QUEUE": "2"}, flags={"port": "3"}) == Settings(port=3, queue=2)


@pytest.mark.parametrize(
    ("name", "words"), [("USEG_MAX_BACH", "did you mean USEG_MAX_BATCH"), ("USEG_X", "known are USEG_ARTIFACT")]
)
def test_an_unknown_variable_is_refused_with_what_was_meant(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_settings({name: "4"})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("PORT", "http"),
        ("PORT", "65536"),
        ("PORT", "-1"),
        ("MAX_BATCH", "0"),
        ("MAX_BATCH", "1.5"),
        ("MAX_WAIT_MS", "-1"),
        ("MAX_WAIT_MS", "nan"),
        ("QUEUE", "0"),
        ("LIMIT_BYTES", "0"),
        ("LIMIT_PIXELS", "0"),
        ("THREADS", "0"),
        ("DEADLINE_S", "0"),
        ("DEADLINE_S", "inf"),
        ("HOST", ""),
        ("BACKEND", "gpu"),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_name(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"(?i){name}"):
        read_settings({f"USEG_{name}": text})
