#!/usr/bin/env bash
# Does a running service keep its own OpenAPI description, whatever it is asked? Needs the `dev` extra.
# Usage: deploy/fuzz.sh [URL] [EXAMPLES]; 110 examples an operation are 2,000 requests and more.
set -euo pipefail
url=${1:-http://127.0.0.1:8000}
examples=${2:-110}
schemathesis=$(realpath "$(dirname "${PYTHON:-.venv/bin/python}")/schemathesis")

cd "$(mktemp -d)"  # it keeps what it found in a folder
exec "$schemathesis" run "$url/openapi.json" --url "$url" --max-examples "$examples" \
  --phases examples,coverage,fuzzing --continue-on-failure --seed 1 --request-timeout 60 --warnings off \
  --checks not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,response_schema_conformance
