"""Settings of the service, from `USEG_*` environment variables and the flags of `useg serve`."""

import os
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

from model.backends.session import Backend
from model.contract import find_bundled_artifact
from model.errors import ConfigError
from model.images import MAX_IMAGE_PIXELS
from model.validation import did_you_mean

PREFIX = "USEG_"
_MAX_PORT = 65_535
_PILLOW_MAX_PIXELS = 89_000_000

LogFormat = Literal["text", "json"]
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Settings(BaseModel):
    """Settings of one server process; the variable of a field is `USEG_` and its name in capitals."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    artifact: Path = Field(default_factory=find_bundled_artifact)
    """Directory of the artifact to serve."""
    category_names_file: Path | None = None
    """File of the category names that users set; default: ARTIFACT.names.json, next to the artifact."""
    registry: Path | None = None
    """Directory of a model registry; its models are served instead of `artifact`."""
    default_model: str | None = None
    """Model of the registry that answers requests which name none; required if there are several models."""
    trusted_keys_file: Path | None = None
    """File of public keys, NAME:KEY per line; artifacts that none of them signed are rejected."""
    registry_poll_interval_s: Seconds = 1.0
    """Seconds between two reads of the registry."""
    rollback_window_s: NonNegative = 120.0
    """Seconds for which a replaced version stays loaded and its successor is compared with it."""
    canary_max_latency_ratio: Annotated[float, Field(ge=1.0, allow_inf_nan=False)] = 3.0
    """Maximum latency of a new version relative to the active one, before rollout and under load (p95)."""
    canary_max_psi: Seconds = 0.35
    """Maximum output drift (population stability index) of a new version beyond that of the active one."""
    canary_max_error_rate: Fraction = 0.05
    """Maximum fraction of images, 0..1, on which a new version fails and another version does not."""
    backend: Backend = "auto"
    """Backend of the network; `auto` is the fastest one that works. If another one is unavailable, the start fails."""
    compile_cache: Path | None = None
    """Folder of networks compiled by OpenVINO and TensorRT, for faster starts; default: ~/.cache/useg/compiled."""
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every IPv4 interface."""
    port: Annotated[int, Field(ge=0, le=_MAX_PORT)] = 8000
    """TCP port; 0 selects a free one."""
    admin_port: Annotated[int, Field(ge=-1, le=_MAX_PORT)] = -1
    """TCP port that serves health and metrics without authentication; 0 selects a free one, -1 disables it."""
    grpc_port: Annotated[int, Field(ge=-1, le=_MAX_PORT)] = -1
    """TCP port of the Open Inference Protocol over gRPC (extra `grpc`); 0 selects a free one, -1 disables it."""
    api_key_file: Path | None = None
    """File of API keys, NAME:SHA256[:REQUESTS_PER_SECOND[:BURST]] per line; see `useg create-api-key`."""
    api_keys: str = ""
    """API keys in the same format, separated by commas."""
    admin_api_key_file: Path | None = None
    """File of API keys that may also change what is served, in the same format."""
    admin_api_keys: str = ""
    """API keys that may also change what is served, separated by commas."""
    allow_unauthenticated: bool = False
    """Listen on other addresses than localhost without API keys."""
    cors_origins: str = ""
    """Origins of web pages that may call the service, separated by commas; `*` is any, only without API keys (CORS)."""
    rate_limit_rps: NonNegative = 0.0
    """Requests per second of one API key, or of one address if there are no keys; 0 is unlimited."""
    rate_limit_burst: Count = 20
    """Requests at once within that rate."""
    max_batch_size: Count = 1
    """Maximum images in one run of the network; on a CPU more than 1 only adds waiting."""
    max_queue_delay_ms: NonNegative = 2.0
    """Maximum milliseconds that a batch waits to fill."""
    max_batch_pixels: Count = 16_777_216
    """Maximum input pixels in one run of the network; a single image always runs."""
    max_queue_size: Count = 64
    """Maximum images that wait for the network; further requests are rejected with 503."""
    max_queue_wait_s: Seconds = 5.0
    """Maximum expected wait for the network in seconds; a request that would wait longer is rejected with 503."""
    max_body_bytes: Count = 32 * 1024 * 1024
    """Maximum size of a request body in bytes."""
    max_image_pixels: Annotated[int, Field(ge=1, le=_PILLOW_MAX_PIXELS)] = MAX_IMAGE_PIXELS
    """Maximum pixels of an image, at most 89,000,000; checked in its header, before it is decoded."""
    intra_op_threads: Count = 2
    """Threads of one run of the network on a CPU; as many threads decode and encode images."""
    streams: Count = 1
    """Runs of the network at once on a CPU, each on threads of its own; for machines with many cores."""
    request_timeout_s: Seconds = 30.0
    """Maximum seconds from the start of a request to its response; a request may ask for less."""
    client_timeout_s: Seconds = 10.0
    """Maximum seconds that a client may pause while it sends a request or reads a response."""
    inference_timeout_s: Seconds = 60.0
    """Maximum seconds of one run of the network; then its thread and session are replaced."""
    shutdown_delay_s: NonNegative = 1.0
    """Seconds after SIGTERM during which readiness fails and connections are still accepted."""
    graceful_shutdown_timeout_s: Seconds = 30.0
    """Maximum seconds after that to finish in-flight requests."""
    otlp_endpoint: Annotated[str, Field(pattern="^(https?://.+)?$")] = ""
    """OpenTelemetry collector (OTLP over HTTP), such as http://localhost:4318; needs the extra `otel`."""
    trace_sample_ratio: Fraction = 1.0
    """Fraction of requests that are traced, 0..1; a request with a `traceparent` header follows its caller."""
    log_format: LogFormat = "text"
    """Format of log lines on stderr."""

    @model_validator(mode="after")
    def _require_authentication(self) -> "Settings":
        if not (self.api_key_file or self.api_keys or self.allow_unauthenticated or is_loopback(self.host)):
            raise ValueError(
                f"refusing to listen on {self.host} without authentication: "
                "set api_key_file, or allow_unauthenticated to run without"
            )
        return self

    @model_validator(mode="after")
    def _check_origins(self) -> "Settings":
        for origin in self.allowed_origins:
            if origin == "*" and (self.api_key_file or self.api_keys):
                raise ValueError("cors_origins is `*`, but there are API keys: list the origins that may use them")
            parts = urlsplit(origin)
            if origin != "*" and (origin != f"{parts.scheme}://{parts.netloc}" or " " in origin):
                raise ValueError(f"cors_origins has {origin!r}: an origin is SCHEME://HOST or SCHEME://HOST:PORT")
        return self

    @property
    def allowed_origins(self) -> list[str]:
        """The entries of `cors_origins`."""
        return [origin.strip() for origin in self.cors_origins.split(",") if origin.strip()]


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches the address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_variable_names(*_arguments: object) -> None:
    """Raise ConfigError, with a near match, for a `USEG_*` variable that is not a setting; a cyclopts configuration."""
    known = [name.upper() for name in Settings.model_fields]
    for variable in os.environ:
        name = variable.removeprefix(PREFIX)
        if variable.startswith(PREFIX) and name not in known:
            hint = did_you_mean(name, known, f"; known are {', '.join(map(PREFIX.__add__, known))}", PREFIX.__add__)
            raise ConfigError(f"unknown setting {variable}{hint}")
