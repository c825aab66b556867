"""Log lines for machines are one JSON object each, with what the request was."""

import logging
import sys

import orjson

from service.telemetry.logging import JsonFormatter


def test_a_line_holds_the_message_and_the_fields() -> None:
    record = logging.LogRecord(
        "service.middleware.request_context", logging.INFO, "", 0, "%s done\nwell", ("all",), None
    )
    record.fields = {"status": 200, "request_id": "a"}
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert orjson.loads(line) | {"time": ""} == {
        "time": "",
        "level": "info",
        "logger": "service.middleware.request_context",
        "message": "all done\nwell",
        "status": 200,
        "request_id": "a",
    }


def test_an_exception_is_told_with_its_traceback() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        record = logging.LogRecord("a", logging.ERROR, "", 0, "failed", (), sys.exc_info())
    assert "ValueError: why" in orjson.loads(JsonFormatter().format(record))["exception"]
