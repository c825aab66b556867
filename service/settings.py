"""What an operator may choose, from `USEG_*` variables: the only file that reads the environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.resources import files
from ipaddress import ip_address
from math import inf
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin

from model.backends.session import BACKENDS, Backend
from model.errors import ConfigError
from model.images import MAX_IMAGE_PIXELS
from model.validation import did_you_mean

PREFIX = "USEG_"
_MAX_PORT = 65_535
_MOST_PIXELS = 89_000_000
_TRUTHS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
LogFormat = Literal["text", "json"]
LOG_FORMATS: tuple[LogFormat, ...] = get_args(LogFormat)
_NO_FLAGS: Mapping[str, str] = MappingProxyType({})


def find_bundled_artifact() -> Path:
    """The artifact that comes with the `model` package."""
    return Path(str(files("model"))) / "default"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How one process serves one artifact; the variable of a field is its name in capitals after `USEG_`."""

    artifact: Path = field(default_factory=find_bundled_artifact)
    """Directory of the artifact."""
    category_names_file: Path | None = None
    """Where the names that people give to its clusters are kept; None for ARTIFACT.names.json, beside it."""
    registry: Path | None = None
    """Directory of a registry, whose models are served in the place of the artifact; None for the artifact."""
    default_model: str | None = None
    """The registry's model that answers where none is named; needed where there are several."""
    trusted_keys_file: Path | None = None
    """File of the public keys of those whose artifacts are served, NAME:KEY a line; None asks for no signature."""
    registry_poll_interval_s: float = 1.0
    """Time between two looks at the registry, in seconds, above 0."""
    rollback_window_s: float = 120.0
    """How long a version that is no longer active is kept warm and its successor watched, in seconds, 0 or more."""
    canary_max_latency_ratio: float = 3.0
    """How many times as long as the active version a new one may take, alone and under load (p95); 1 or more."""
    canary_max_psi: float = 0.35
    """How much further than the active version's, as a stability index, a new one's answers may be from its reference;
    above 0."""
    canary_max_error_rate: float = 0.05
    """Largest share of pictures, 0..1, on which a new version may fail where another does not."""
    backend: Backend = "cpu"
    """What runs the network; one that this machine does not have is refused, not replaced."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every IPv4 interface."""
    port: int = 8000
    """TCP port, 0..65535; 0 takes a free one."""
    max_batch_size: int = 1
    """Most pictures in one run of the network, 1 or more; on a CPU more than 1 only adds waiting (docs/experiments)."""
    max_queue_delay_ms: float = 2.0
    """Longest wait for a batch to fill, in milliseconds, 0 or more."""
    queue: int = 64
    """Most pictures that wait for the network, 1 or more; beyond it requests are turned away."""
    max_queue_wait_s: float = 5.0
    """Longest wait for the network that is expected when a picture comes, in seconds, above 0; beyond it, too."""
    max_body_bytes: int = 32 * 1024 * 1024
    """Largest request body, in bytes, 1 or more."""
    limit_pixels: int = MAX_IMAGE_PIXELS
    """Largest picture, in pixels, 1 to 89,000,000 (Pillow's own guard); read from its header, before any decoding."""
    threads: int = 2
    """Threads that ONNX Runtime computes with, 1 or more; as many decode and encode pictures."""
    request_timeout_s: float = 30.0
    """Longest time from a request's first byte to its answer, in seconds, above 0; a request may shorten it."""
    max_batch_pixels: int = 16_777_216
    """Most pixels of canvas in one run of the network, 1 or more; one picture always runs."""
    client_timeout_s: float = 10.0
    """Longest pause in sending a request or taking in an answer, in seconds, above 0."""
    inference_timeout_s: float = 60.0
    """Longest run of the network, in seconds, above 0; after it the network is started again."""
    shutdown_delay_s: float = 1.0
    """Time between not being ready and taking no more connections, once SIGTERM came, in seconds, 0 or more."""
    graceful_shutdown_timeout_s: float = 30.0
    """Longest time to finish what was taken before that, in seconds, above 0."""
    api_key_file: Path | None = None
    """File of API keys, NAME:SHA256[:REQUESTS_PER_SECOND[:BURST]] a line; `useg-serve --new-key NAME` makes one."""
    keys: str = ""
    """The same, separated by commas."""
    admin_api_key_file: Path | None = None
    """File of the API keys, in the same form, of those who may change what is served; such a key is also a caller's."""
    admin_api_keys: str = ""
    """The same, separated by commas."""
    allow_unauthenticated: bool = False
    """Whether a service without keys may listen on other addresses than this machine's own."""
    rate_limit_rps: float = 0.0
    """Requests a second on average of one key, or of one address where there are no keys; 0 is no limit."""
    burst: int = 20
    """Requests at once within that rate, 1 or more."""
    admin_port: int = -1
    """TCP port on which health and metrics are answered, too, without a key; 0 takes a free one, -1 has none."""
    otlp_endpoint: str = ""
    """OpenTelemetry collector that spans go to, such as http://localhost:4318; empty for none. Needs extra `otel`."""
    trace_sample_ratio: float = 1.0
    """Share of the requests outside a caller's trace whose spans are sent, 0..1."""
    log_format: LogFormat = "text"
    """Log lines for people, or in JSON."""

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ConfigError(f"backend must be one of {', '.join(BACKENDS)}, got {self.backend!r}")
        for name in (
            "max_batch_size",
            "queue",
            "max_body_bytes",
            "limit_pixels",
            "max_batch_pixels",
            "threads",
            "burst",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in (
            "request_timeout_s",
            "max_queue_wait_s",
            "client_timeout_s",
            "inference_timeout_s",
            "graceful_shutdown_timeout_s",
            "registry_poll_interval_s",
            "canary_max_psi",
        ):
            if not 0.0 < getattr(self, name) < inf:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("max_queue_delay_ms", "shutdown_delay_s", "rate_limit_rps", "rollback_window_s"):
            if not 0.0 <= getattr(self, name) < inf:
                raise ConfigError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.limit_pixels > _MOST_PIXELS:
            raise ConfigError(f"limit_pixels must be at most {_MOST_PIXELS}, got {self.limit_pixels}")
        for name in ("trace_sample_ratio", "canary_max_error_rate"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} must lie in 0..1, got {getattr(self, name)}")
        if not 1.0 <= self.canary_max_latency_ratio < inf:
            raise ConfigError(f"candidate_slowest must be 1 or more, got {self.canary_max_latency_ratio}")
        if self.otlp_endpoint and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"otlp_endpoint must begin with http:// or https://, got {self.otlp_endpoint!r}")
        if self.log_format not in LOG_FORMATS:
            raise ConfigError(f"log_format must be one of {', '.join(LOG_FORMATS)}, got {self.log_format!r}")
        self._check_addresses()

    def _check_addresses(self) -> None:
        if not 0 <= self.port <= _MAX_PORT:
            raise ConfigError(f"port must lie in 0..{_MAX_PORT}, got {self.port}")
        if not -1 <= self.admin_port <= _MAX_PORT:
            raise ConfigError(f"admin_port must lie in -1..{_MAX_PORT}, got {self.admin_port}")
        if not self.host:
            raise ConfigError("host must be an address to listen on, got an empty one")
        if not (self.api_key_file or self.keys or self.allow_unauthenticated or is_loopback(self.host)):
            raise ConfigError(
                f"refusing to listen on {self.host} without authentication: set api_key_file, or allow_unauthenticated to run open"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_settings(environment: Mapping[str, str] = os.environ, *, flags: Mapping[str, str] = _NO_FLAGS) -> Settings:
    """The settings of `environment`, those in `flags` (field name to text) before them.

    Raises ConfigError for a `USEG_*` variable that does not exist, with a near match, and for a value that is no good.
    """
    known = {PREFIX + entry.name.upper(): entry for entry in fields(Settings)}
    given = {name: text for name, text in environment.items() if name.startswith(PREFIX)}
    given |= {PREFIX + name.upper(): text for name, text in flags.items()}
    for name in given:
        if name not in known:
            words = [each.removeprefix(PREFIX) for each in known]
            hint = did_you_mean(name.removeprefix(PREFIX), words, f"; known are {', '.join(known)}", PREFIX.__add__)
            raise ConfigError(f"unknown setting {name}{hint}")
    return Settings(**{known[name].name: _parse(name, text, known[name].type) for name, text in given.items()})


def _parse(name: str, text: str, kind: Any) -> Any:
    """The value of a setting: `kind` is a field's type, which text turns into by calling it; words stay words."""
    if get_origin(kind) is Literal:
        return text
    if kind is bool:
        if text.lower() not in _TRUTHS:
            raise ConfigError(f"{name} must be one of {', '.join(_TRUTHS)}, got {text!r}")
        return _TRUTHS[text.lower()]
    kind = next(iter(get_args(kind)), kind)  # what may be None is given by its first type
    try:
        return kind(text)
    except ValueError as error:
        raise ConfigError(f"{name} must be of type {kind.__name__}, got {text!r}") from error
