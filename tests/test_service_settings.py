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
    assert (settings.host, settings.port, settings.max_body_bytes) == ("127.0.0.1", 8000, 33_554_432)


def test_variables_become_values_of_their_types() -> None:
    settings = read_settings(
        {"USEG_ARTIFACT": "/models/a", "USEG_MAX_BATCH_SIZE": "8", "USEG_MAX_QUEUE_DELAY_MS": "0.5"}
    )
    assert settings == Settings(artifact=Path("/models/a"), max_batch_size=8, max_queue_delay_ms=0.5)


def test_a_backend_is_one_of_the_words() -> None:
    assert read_settings({}).backend == "cpu"
    assert read_settings({"USEG_BACKEND": "cuda"}).backend == "cuda"
    assert read_settings({"USEG_BACKEND": "cuda"}, flags={"backend": "torch"}).backend == "torch"
    with pytest.raises(ConfigError, match="backend must be one of cpu, openvino, cuda, tensorrt, torch, got 'cdua'"):
        read_settings({"USEG_BACKEND": "cdua"})


def test_flags_go_before_variables() -> None:
    assert read_settings({"USEG_PORT": "1", "USEG_QUEUE": "2"}, flags={"port": "3"}) == Settings(port=3, queue=2)


@pytest.mark.parametrize(
    ("name", "words"), [("USEG_MAX_BACH", "did you mean USEG_MAX_BATCH_SIZE"), ("USEG_X", "known are USEG_ARTIFACT")]
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
        ("STALL_S", "0"),
        ("MAX_QUEUE_S", "0"),
        ("STUCK_S", "nan"),
        ("DRAIN_DELAY_S", "-1"),
        ("DRAIN_LIMIT_S", "0"),
        ("RATE_PER_S", "-1"),
        ("BURST", "0"),
        ("LIMIT_BATCH_PIXELS", "0"),
        ("ADMIN_PORT", "-2"),
        ("REGISTRY_POLL_S", "0"),
        ("ROLLBACK_S", "-1"),
        ("CANDIDATE_SLOWEST", "0.5"),
        ("DRIFT_LIMIT", "0"),
        ("ERROR_LIMIT", "1.1"),
        ("LOG_FORMAT", "xml"),
        ("ALLOW_UNAUTHENTICATED", "perhaps"),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_name(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"(?i){name}"):
        read_settings({f"USEG_{name}": text})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org"])
def test_other_machines_are_served_with_keys_or_where_anyone_is_meant(host: str) -> None:
    with pytest.raises(ConfigError, match="set api_key_file, or allow_unauthenticated"):
        read_settings({"USEG_HOST": host})
    assert read_settings({"USEG_HOST": host, "USEG_API_KEY_FILE": "/keys"}).api_key_file == Path("/keys")
    assert read_settings({"USEG_HOST": host, "USEG_KEYS": "a:b"}).keys == "a:b"
    assert read_settings({"USEG_HOST": host, "USEG_ALLOW_UNAUTHENTICATED": "True"}).allow_unauthenticated


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.7", "::1", "localhost"])
def test_this_machine_is_served_without_keys(host: str) -> None:
    assert read_settings({"USEG_HOST": host}).host == host
