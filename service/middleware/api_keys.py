"""API keys, stored as SHA-256 hashes."""

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from model.errors import ConfigError, Unauthorized

_LINE_FORMAT = "NAME:SHA256[:REQUESTS_PER_SECOND[:BURST]]"
_LINE = re.compile(r"([A-Za-z0-9._-]{1,64}):([0-9a-f]{64})(?::(\d{1,9}(?:\.\d{1,9})?)(?::([1-9]\d{0,8}))?)?", re.ASCII)


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


class ApiKeyStore:
    """The accepted keys; without keys the service is open."""

    def __init__(self, keys: Sequence[ApiKey] = ()) -> None:
        names = [key.name for key in keys]
        if len(set(names)) < len(names):
            raise ConfigError(
                f"two API keys have the same name, among {', '.join(sorted(names))}: names must be unique"
            )
        self._keys = tuple(keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def join(self, other: "ApiKeyStore") -> "ApiKeyStore":
        """Return a store with the keys of both. Raises ConfigError if two have the same name."""
        return ApiKeyStore((*self._keys, *other._keys))

    def authenticate(self, secret: str) -> ApiKey:
        """Return the key of a secret, in constant time. Raises Unauthorized if it is missing or unknown."""
        digest = hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
        found = None
        for key in self._keys:  # always all of them, for constant time
            found = key if hmac.compare_digest(key.digest, digest) else found
        if found is None:
            raise Unauthorized("missing or unknown API key: send 'Authorization: Bearer KEY'")
        return found


def load_api_keys(file: Path | None, listed: str) -> ApiKeyStore:
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
    return ApiKeyStore(keys)


def generate_api_key(name: str) -> tuple[str, str]:
    """Return a new random key and its line for a key file. Raises ConfigError for an invalid name."""
    key = secrets.token_urlsafe(32)
    line = f"{name}:{hashlib.sha256(key.encode()).hexdigest()}"
    _parse(line, "the new API key")
    return key, line


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
