"""JSON log lines, and the measurement of the event loop's lag."""

import asyncio
import logging
from datetime import UTC, datetime

import orjson

from service.telemetry.metrics import Telemetry

_LAG_PERIOD_S = 0.05
TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object per line, with the fields of `extra={"fields": {...}}`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


async def record_event_loop_lag(telemetry: Telemetry) -> None:
    """Record the delay of the event loop until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _LAG_PERIOD_S
        await asyncio.sleep(_LAG_PERIOD_S)
        telemetry.event_loop_lag.observe(max(0.0, loop.time() - due))
