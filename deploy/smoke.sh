#!/usr/bin/env bash
# Smoke test of a running service: waits until it is ready, then segments a photo with every task and format.
# Usage: deploy/smoke.sh PHOTO [URL]
set -euo pipefail
photo=${1:?usage: deploy/smoke.sh PHOTO [URL]}
url=${2:-http://127.0.0.1:8000}

curl --silent --fail --output /dev/null --retry 30 --retry-delay 1 --retry-all-errors "$url/readyz"
for task in panoptic instance semantic; do
  for accept in application/json image/png image/jpeg; do
    size=$(curl --silent --show-error --fail-with-body --header "Accept: $accept" --form "file=@$photo" \
      --output /dev/null --write-out '%{size_download}' "$url/v1/segment?task=$task")
    echo "$task as $accept: $size bytes"
  done
done
