"""Our artifact behind BentoML: bentoml serve rival_bentoml:Segment --port PORT (in this folder)."""

from pathlib import Path

import bentoml
from rival import Chain


@bentoml.service(workers=1, threads=2, traffic={"timeout": 30})
class Segment:
    """One photo a request."""

    def __init__(self) -> None:
        self.chain = Chain()

    @bentoml.api
    def segment(self, photo: Path) -> str:
        prepared = self.chain.prepare(photo.read_bytes())
        (raw,) = self.chain.run([prepared])
        return self.chain.finish(prepared, raw).decode()
