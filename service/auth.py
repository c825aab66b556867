"""API keys, stored as SHA-256 hashes, and rate limits."""

import hashlib
import hmac
import math
import re
import secrets
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers

from model.errors import ConfigError, RateLimited, Unauthorized

_LINE_FORMAT = "NAME:SHA256[:REQUESTS_PER_SECOND[:BURST]]"
_LINE = re.compile(r"([A-Za-z0-9._-]{1,64}):([0-9a-f]{64})(?::(\d{1,9}(?:\.\d{1,9})?)(?::([1-9]\d{0,8}))?)?", re.ASCII)
_MAX_BUCKETS = 10_000
"""The number of addresses is not bounded: the bucket that was idle longest is dropped, as it is full again."""


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """A client. Keys are long and random, so an unsalted hash is safe."""

    name: str
    """Name in logs and metrics."""
    digest: bytes
    """SHA-256 of the key."""
    rate_limit_rps: float | None = None
    """Average requests per second, 0 for no limit; None uses the limit in the settings."""
    burst: int | None = None
    """Maximum burst of requests; None uses the limit in the settings."""


def authenticate(keys: Sequence[ApiKey], headers: Headers) -> ApiKey:
    """Return the key that a request sends, in constant time. Raises Unauthorized if it is missing or unknown."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    secret = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    digest = hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
    found = [key for key in keys if hmac.compare_digest(key.digest, digest)]
    if not found:
        raise Unauthorized("missing or unknown API key: send 'Authorization: Bearer KEY'")
    return found[0]


def require_unique_names(keys: Sequence[ApiKey]) -> None:
    """Raise ConfigError if two keys have the same name."""
    names = [key.name for key in keys]
    if len(set(names)) < len(names):
        raise ConfigError(f"two API keys have the same name, among {', '.join(sorted(names))}: names must be unique")


def load_api_keys(file: Path | None, listed: str) -> tuple[ApiKey, ...]:
    """Load the keys in a file, one per line, and those in `listed`, separated by commas.

    Empty lines and lines that start with # are skipped. Raises ConfigError with the line's number, but not its text.
    """
    keys = []
    if file:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the API keys in {file} cannot be read: {error}") from error
        lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
        keys += [_parse(line, f"{file}, line {number}") for number, line in lines if line and line[0] != "#"]
        if not keys:
            raise ConfigError(f"{file} contains no API key: expected lines of {_LINE_FORMAT}")
    keys += [
        _parse(part.strip(), f"API key {number}") for number, part in enumerate(listed.split(","), 1) if part.strip()
    ]
    return tuple(keys)


def generate_api_key(name: str) -> tuple[str, str]:
    """Return a new random key and its line for a key file. Raises ConfigError for an invalid name."""
    key = secrets.token_urlsafe(32)
    line = f"{name}:{hashlib.sha256(key.encode()).hexdigest()}"
    _parse(line, "the new API key")
    return key, line


class TokenBucketLimiter:
    """A token bucket for each client; `now` is the time of any clock in seconds."""

    def __init__(self) -> None:
        self._full_at: OrderedDict[str, float] = OrderedDict()
        """When the bucket of a client is full again; the client that was idle longest is the first."""

    def acquire(self, owner: str, rate_limit_rps: float, burst: int, now: float) -> None:
        """Take one token of `owner`, whose bucket holds `burst` and gains `rate_limit_rps`, above 0.

        Raises RateLimited with the time until the next token.
        """
        full_at = max(now, self._full_at.pop(owner, now))
        wait_s = full_at - now - (burst - 1) / rate_limit_rps
        is_limited = wait_s > 1e-6  # not for an error of rounding
        self._full_at[owner] = full_at if is_limited else full_at + 1.0 / rate_limit_rps
        if len(self._full_at) > _MAX_BUCKETS:
            self._full_at.popitem(last=False)
        if is_limited:
            raise RateLimited(
                f"rate limit exceeded: {rate_limit_rps:g} requests per second, bursts of {burst}",
                retry_after_s=math.ceil(wait_s),
            )


def _parse(line: str, source: str) -> ApiKey:
    """Parse a line. Errors do not contain the line, since it may be a secret in plain text."""
    match = _LINE.fullmatch(line)
    if not match:
        raise ConfigError(f"{source} is not of the form {_LINE_FORMAT}")
    name, digest, rate, burst = match.groups()
    return ApiKey(
        name=name,
        digest=bytes.fromhex(digest),
        rate_limit_rps=float(rate) if rate else None,
        burst=int(burst) if burst else None,
    )
