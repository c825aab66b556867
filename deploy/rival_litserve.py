"""Our artifact behind LitServe, as its documentation builds a server: python deploy/rival_litserve.py PORT WORKERS."""

import sys

import litserve
from fastapi import Response, UploadFile
from rival import Chain, Prepared

from model.network_io import RawOutputs


class Segment(litserve.LitAPI):
    """One photo a request."""

    def setup(self, device: str) -> None:
        self.chain = Chain(threads=max(1, 2 // int(sys.argv[2])))

    def decode_request(self, request: UploadFile) -> Prepared:
        return self.chain.prepare(request.file.read())

    def predict(self, prepared: Prepared) -> tuple[Prepared, RawOutputs]:
        return prepared, self.chain.run([prepared])[0]

    def encode_response(self, output: tuple[Prepared, RawOutputs]) -> Response:
        return Response(self.chain.finish(*output), media_type="application/json")


if __name__ == "__main__":
    server = litserve.LitServer(Segment(), accelerator="cpu", workers_per_device=int(sys.argv[2]), timeout=30)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
