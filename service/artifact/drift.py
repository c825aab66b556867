"""Whether the answers of a version still look like those that its contract describes."""

import threading
from collections import deque
from collections.abc import Mapping

from model.contract import Contract
from model.drift import MEASURES, Measure, compare, count, measure
from model.histogram import Histogram
from model.panoptic import Segmentation
from service.telemetry.metrics import Telemetry

KEPT = 500
"""Last answers that are compared."""
LEAST = 200
"""Answers before a comparison is told: of fewer, chance alone makes an index that looks like drift."""
_EVERY = 10
"""Answers between two comparisons."""


class DriftWatch:
    """Tells the telemetry how far the last answers of one version are from its reference; safe to share by threads."""

    def __init__(self, contract: Contract, telemetry: Telemetry) -> None:
        self._which = (contract.name, contract.version)
        self._references = {name: contract.reference[name] for name in MEASURES if name in contract.reference}
        self._gauge = telemetry.output_drift
        self._last: deque[Mapping[Measure, float]] = deque(maxlen=KEPT)
        self._seen = 0
        self._lock = threading.Lock()

    def observe(self, answer: Segmentation) -> None:
        """Take a panoptic answer that was made with the contract's thresholds, as the reference was."""
        if not self._references:
            return
        measured = measure(answer)
        with self._lock:
            self._last.append(measured)
            self._seen += 1
            if self._seen < LEAST or self._seen % _EVERY:
                return
            histograms = count(self._last)
        for name, reference in self._references.items():
            if sum(histograms[name].counts):
                self._gauge.labels(name, *self._which).set(compare(reference, histograms[name]))

    def count(self) -> Mapping[Measure, Histogram]:
        """How the last answers look; nothing of a version without a reference."""
        with self._lock:
            return count(self._last)

    def begin(self) -> None:
        """Forget the answers so far, as the version gets another role."""
        with self._lock:
            self._last.clear()
            self._seen = 0

    def forget(self) -> None:
        """Tell nothing of this version any more."""
        for name in self._references:
            self._gauge.remove(name, *self._which)
