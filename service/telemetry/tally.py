"""What one version did since it was opened: it goes when the version does, and costs the metrics no label."""

import threading
from dataclasses import dataclass

from service.telemetry.metrics import STAGES, Outcome, Stage


@dataclass(frozen=True, kw_only=True)
class Sum:
    """How often something took place, and how long it took in all."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> "Sum":
        return Sum(count=self.count + 1, seconds=self.seconds + seconds)


class Tally:
    """The sums of one version of a model. Safe to share by threads."""

    def __init__(self, model: str, version: str) -> None:
        self.model = model
        self.version = version
        self.last_answer_s = 0.0
        """When a picture was last answered, in seconds since 1970; 0 for never."""
        self.stages = dict.fromkeys(STAGES, Sum())
        """Pictures in each stage."""
        self.answered = Sum()
        """Requests that got what they asked for, from the first byte to the end."""
        self.failed = Sum()
        """Requests that ended in any other way."""
        self._lock = threading.Lock()

    def take_stage(self, stage: Stage, seconds: float) -> None:
        """Take what a picture needed for a stage."""
        with self._lock:
            self.stages[stage] = self.stages[stage].add(seconds)

    def take_request(self, outcome: Outcome, seconds: float) -> None:
        """Take a request that came to this version."""
        with self._lock:
            if outcome == "ok":
                self.answered = self.answered.add(seconds)
            else:
                self.failed = self.failed.add(seconds)
