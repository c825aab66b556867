"""What a request's headers say of its hurry, and of whom it is for."""

import asyncio
import re

from starlette.requests import Request

from model.errors import OptionInvalid
from service.engine.queue import LEAST_URGENT, MOST_URGENT, NORMAL, Claim

TIMEOUT_HEADER, PRIORITY_HEADER = "X-Request-Timeout-Ms", "X-Request-Priority"
ROUTING_HEADER = "X-Routing-Key"
_WHOLE = re.compile(r"[1-9]\d{0,8}", re.ASCII)


def read_claim(request: Request, limit_s: float) -> Claim:
    """Whose request it is and how it hurries; its time ends with `limit_s` from now on, or sooner if it asks for that.

    Raises OptionInvalid for a time limit or a priority that is none.
    """
    timeout_ms = _read_whole(request, TIMEOUT_HEADER, "milliseconds, 1 or more")
    priority = _read_whole(request, PRIORITY_HEADER, f"{MOST_URGENT} (first) to {LEAST_URGENT}") or NORMAL
    if not MOST_URGENT <= priority <= LEAST_URGENT:
        raise OptionInvalid(f"{PRIORITY_HEADER} must be {MOST_URGENT} (first) to {LEAST_URGENT}, got {priority}")
    timeout_s = min(limit_s, timeout_ms / 1000) if timeout_ms else limit_s
    owner = getattr(request.state, "owner", "")
    return Claim(deadline=asyncio.get_running_loop().time() + timeout_s, owner=owner, priority=priority)


def read_routing_key(request: Request) -> str:
    """What decides who among the callers is answered by a canary: the same for the same key, owner or address."""
    return request.headers.get(ROUTING_HEADER) or str(getattr(request.state, "owner", ""))


def _read_whole(request: Request, name: str, expected: str) -> int | None:
    given = request.headers.get(name)
    if given is None:
        return None
    if not _WHOLE.fullmatch(given.strip()):
        raise OptionInvalid(f"{name} must be a whole number, {expected}, got {given!r}")
    return int(given)
