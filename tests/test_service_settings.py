"""Settings come from `USEG_*` variables and are validated."""

from pathlib import Path

import pytest
from pydantic import ValidationError
from serve_fake import read_settings

from model.contract import find_bundled_artifact
from service.settings import Settings


def test_without_variables_the_bundled_artifact_is_served_with_defaults() -> None:
    settings = read_settings({"PATH": "/bin"})
    assert settings == Settings()
    assert settings.artifact == find_bundled_artifact()
    assert settings.artifact.parts[-2:] == ("model", "default")
    assert (settings.host, settings.port, settings.max_body_bytes) == ("127.0.0.1", 8000, 33_554_432)


def test_variables_are_converted_to_the_types_of_their_settings() -> None:
    variables = {"USEG_ARTIFACT": "/models/a", "USEG_MAX_BATCH_SIZE": "8", "USEG_MAX_QUEUE_DELAY_MS": "0.5"}
    assert read_settings(variables) == Settings(artifact=Path("/models/a"), max_batch_size=8, max_queue_delay_ms=0.5)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("PORT", "http"),
        ("PORT", "65536"),
        ("ADMIN_PORT", "-2"),
        ("MAX_BATCH_SIZE", "0"),
        ("MAX_QUEUE_DELAY_MS", "nan"),
        ("MAX_IMAGE_PIXELS", "89000001"),
        ("REQUEST_TIMEOUT_S", "inf"),
        ("HOST", ""),
        ("BACKEND", "gpu"),
        ("CANARY_MAX_LATENCY_RATIO", "0.5"),
        ("ALLOW_UNAUTHENTICATED", "perhaps"),
        ("OTLP_ENDPOINT", "localhost:4318"),
    ],
)
def test_an_invalid_value_is_rejected_by_the_name_of_its_setting(name: str, text: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate({name.lower(): text})
    assert [each["loc"] for each in caught.value.errors()] == [(name.lower(),)]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org"])
def test_other_hosts_than_localhost_need_keys_or_an_explicit_permission(host: str) -> None:
    with pytest.raises(ValidationError, match="set api_key_file, or allow_unauthenticated"):
        Settings(host=host)
    for permission in ({"api_key_file": "/keys"}, {"api_keys": "a:b"}, {"allow_unauthenticated": "True"}):
        assert Settings.model_validate({"host": host, **permission}).host == host


@pytest.mark.parametrize("origin", ["example.org", "https://example.org/", "https://a.org b.org", "https://a.org,*/x"])
def test_what_is_no_origin_is_rejected(origin: str) -> None:
    with pytest.raises(ValidationError, match="an origin is SCHEME://HOST"):
        Settings(cors_origins=origin)


def test_any_origin_is_allowed_without_api_keys_only() -> None:
    assert Settings(cors_origins="*").allowed_origins == ["*"]
    with pytest.raises(ValidationError, match="list the origins"):
        Settings(cors_origins="*", api_keys="a:b")
    listed = Settings(cors_origins="https://a.org, http://localhost:3000", api_keys="a:b")
    assert listed.allowed_origins == ["https://a.org", "http://localhost:3000"]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.7", "::1", "localhost"])
def test_localhost_needs_no_keys(host: str) -> None:
    assert Settings(host=host).host == host
