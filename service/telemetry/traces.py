"""W3C Trace Context: which distributed trace a request belongs to."""

import re
import secrets
from dataclasses import dataclass

_HEADER = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?", re.ASCII
)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Our span in a trace; all ids are lower-case hexadecimal."""

    trace_id: str
    span_id: str
    parent_id: str | None
    """The caller's span; None where the trace begins here."""
    flags: str

    @property
    def is_sampled(self) -> bool:
        """Whether its spans are to be kept."""
        return bool(int(self.flags, 16) & 1)

    def render(self) -> str:
        """The value of a `traceparent` header whose span is ours."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"


def begin_trace(given: str | None, share: float = 0.0) -> Trace:
    """A span of ours in the caller's trace, or in a new one if its `traceparent` is absent or broken.

    A caller says whether its trace is sampled; of new ones, a `share` is.
    """
    span_id = secrets.token_hex(8)
    if given and (match := _HEADER.fullmatch(given.strip())):
        trace_id, parent_id, flags = match.groups()
        return Trace(trace_id=trace_id, span_id=span_id, parent_id=parent_id, flags=flags)
    trace_id = secrets.token_hex(16)
    flags = "01" if int(trace_id[16:], 16) < share * 2**64 else "00"
    return Trace(trace_id=trace_id, span_id=span_id, parent_id=None, flags=flags)
