#!/usr/bin/env bash
# Does a running service keep its own OpenAPI description, whatever it is asked? Needs the `dev` extra.
# Usage: deploy/fuzz.sh [URL] [EXAMPLES] [OPTION...]; 35 examples an operation are 2,900 requests.
set -euo pipefail
url=${1:-http://127.0.0.1:8000}
examples=${2:-35}
schemathesis=$(realpath "$(dirname "${PYTHON:-.venv/bin/python}")/schemathesis")

cd "$(mktemp -d)"  # it keeps what it found in a folder
# Its own timeouts are 1 ms long, which end in 504 as documented.
exec "$schemathesis" run "$url/openapi.json" --url "$url" --max-examples "$examples" \
  --phases examples,coverage,fuzzing --continue-on-failure --seed 1 --request-timeout 60 --warnings off \
  -H 'X-Request-Timeout-Ms: 30000' "${@:3}" \
  --checks not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,response_schema_conformance
