#!/usr/bin/env bash
# Builds the TensorRT engine of an artifact for this machine's GPU, in the folder where `useg serve --backend tensorrt`
# looks for it.
# Usage: deploy/engine.sh [--fp16] [--engines DIR] [--tensorrt VERSION] ARTIFACT
#   --fp16      required for an artifact exported with --precision fp16: layers keep the types in its graph
#   --engines   folder of all engines (default: ~/.cache/useg/engines)
#   --tensorrt  version of TensorRT, for example 101303 (default: read from its library)
# Requires trtexec, nvidia-smi, and a Python with useg[service-gpu] and onnx ($PYTHON, default: python3).
set -euo pipefail

fail() {
  echo "engine.sh: $1" >&2
  exit 1
}

usage="usage: deploy/engine.sh [--fp16] [--engines DIR] [--tensorrt VERSION] ARTIFACT"
precision=fp32 engines="" version="" artifact=""
while (($#)); do
  case $1 in
    --fp16) precision=fp16 ;;
    --engines) engines=${2:?$usage} && shift ;;
    --tensorrt) version=${2:?$usage} && shift ;;
    -*) echo "$usage" >&2 && exit 2 ;;
    *) artifact=$1 ;;
  esac
  shift
done
[[ -n $artifact ]] || { echo "$usage" >&2 && exit 2; }
python=${PYTHON:-python3}
command -v trtexec >/dev/null || fail "trtexec was not found: install TensorRT 10, or run this in NVIDIA's TensorRT image"

# The service computes the folder and the shapes with the same functions.
plan=$("$python" - "$artifact" "$precision" "$engines" "$version" <<'PYTHON'
import sys
from pathlib import Path

from model.contract import read_contract
from model.backends.tensorrt import default_engine_cache, detect_engine_key, engine_folder
from model.errors import UsegError
from model.backends.onnx_runtime import make_optimization_profile

artifact, requested, engines, version = sys.argv[1:]
try:
    contract = read_contract(Path(artifact))
    precision = contract.precision
    if (precision == "fp16") != (requested == "fp16"):
        sys.exit(f"engine.sh: {artifact} computes in {precision}: give --fp16 only for an artifact of precision fp16")
    cache = Path(engines) if engines else default_engine_cache()
    folder = engine_folder(cache, contract, detect_engine_key(version), precision)
except UsegError as error:
    sys.exit(f"engine.sh: {error}")
print(folder, *make_optimization_profile(contract).values(), sep="\n")
PYTHON
)
{ read -r folder && read -r min && read -r opt && read -r max; } <<<"$plan"

mkdir -p "$folder"
types=--noTF32
[[ $precision == fp32 ]] || types=--stronglyTyped
trtexec --onnx="$artifact/network.onnx" --saveEngine="$folder/network.engine.part" "$types" --skipInference \
  --minShapes="$min" --optShapes="$opt" --maxShapes="$max" --timingCacheFile="$folder/timing.cache" >&2 ||
  fail "trtexec failed: see above"
mv "$folder/network.engine.part" "$folder/network.engine"
"$python" -c 'import sys; from pathlib import Path; from model.backends.tensorrt import make_ep_context_model
make_ep_context_model(Path(sys.argv[1]) / "network.onnx", Path(sys.argv[2]))' "$artifact" "$folder"
echo "$folder/network.engine"
