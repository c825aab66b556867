"""How late the event loop is: whoever blocks it shows here."""

import asyncio

from service.telemetry.metrics import Telemetry

_PERIOD_S = 0.05


async def watch_lag(telemetry: Telemetry) -> None:
    """Measure until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _PERIOD_S
        await asyncio.sleep(_PERIOD_S)
        telemetry.loop_lag.observe(max(0.0, loop.time() - due))
