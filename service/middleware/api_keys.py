"""API keys: who may ask, known by the SHA-256 of a secret that the service never holds."""

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
    """One caller; keys are random and long, so that a plain hash keeps them."""

    name: str
    """What logs and metrics may say."""
    digest: bytes
    """SHA-256 of the key."""
    rate_limit_rps: float | None = None
    """Requests a second on average, 0 for no limit; None takes the service's own."""
    burst: int | None = None
    """Requests at once; None takes the service's own."""


class ApiKeyStore:
    """The keys that open the service; an empty one opens it to everybody."""

    def __init__(self, keys: Sequence[ApiKey] = ()) -> None:
        names = [key.name for key in keys]
        if len(set(names)) < len(names):
            raise ConfigError(f"two API keys have one name, among {', '.join(sorted(names))}: give each its own")
        self._keys = tuple(keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def join(self, other: "ApiKeyStore") -> "ApiKeyStore":
        """The keys of both. Raises ConfigError if two have one name."""
        return ApiKeyStore((*self._keys, *other._keys))

    def require(self, given: str) -> ApiKey:
        """The key that was given. Raises Unauthorized if it is none of ours, in a time that does not depend on it."""
        digest = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
        found = None
        for key in self._keys:  # all of them, always
            found = key if hmac.compare_digest(key.digest, digest) else found
        if found is None:
            raise Unauthorized("no API key, or an unknown one: send 'Authorization: Bearer KEY'")
        return found


def load_api_keys(file: Path | None, listed: str) -> ApiKeyStore:
    """The keys in a file, one a line, and those in `listed`, separated by commas.

    Empty lines and those that begin with # are skipped. Raises ConfigError, with the line's number and not its text.
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
            raise ConfigError(f"{file} holds no API key: give lines of {_LINE_FORMAT}")
    keys += [
        _parse(part.strip(), f"API key {place}") for place, part in enumerate(listed.split(","), 1) if part.strip()
    ]
    return ApiKeyStore(keys)


def generate_api_key(name: str) -> tuple[str, str]:
    """A new random key, and the line to keep of it. Raises ConfigError for a name that is none."""
    key = secrets.token_urlsafe(32)
    line = f"{name}:{hashlib.sha256(key.encode()).hexdigest()}"
    _parse(line, "the new API key")
    return key, line


def _parse(line: str, place: str) -> ApiKey:
    """The key in a line; what the line holds is not told, because it may be a key in the clear."""
    match = _LINE.fullmatch(line)
    if not match:
        raise ConfigError(f"{place} is not {_LINE_FORMAT}")
    name, digest, rate, burst = match.groups()
    return ApiKey(
        name=name,
        digest=bytes.fromhex(digest),
        rate_limit_rps=float(rate) if rate else None,
        burst=int(burst) if burst else None,
    )
