#!/usr/bin/env bash
# Builds the TensorRT engine of an artifact for this machine's GPU, where useg-serve --backend tensorrt looks for it.
# Usage: deploy/engine.sh [--fp16] [--engines DIR] [--tensorrt VERSION] ARTIFACT
#   --fp16      the artifact was exported with --precision fp16: layers keep the types that it gives them
#   --engines   the folder of all engines (~/.cache/useg/engines)
#   --tensorrt  TensorRT's version, instead of what its library says
# Needs trtexec, nvidia-smi, and a python with useg[service-gpu] and onnx (PYTHON, or python3).
set -euo pipefail

fail() {
  echo "engine.sh: $1" >&2
  exit 1
}

usage="usage: deploy/engine.sh [--fp16] [--engines DIR] [--tensorrt VERSION] ARTIFACT"
asked=fp32 engines="" version="" artifact=""
while (($#)); do
  case $1 in
    --fp16) asked=fp16 ;;
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

# The service computes folder and shapes with the same functions.
plan=$("$python" - "$artifact" "$asked" "$engines" "$version" <<'PYTHON'
import sys
from pathlib import Path

from model.contract import read_contract
from model.backends.tensorrt import find_engines, inspect_machine, name_folder
from model.errors import UsegError
from model.backends.providers import make_profile, render_shapes

artifact, asked, engines, version = sys.argv[1:]
try:
    contract = read_contract(Path(artifact))
    precision = contract.precision
    if (precision == "fp16") != (asked == "fp16"):
        sys.exit(f"engine.sh: {artifact} computes in {precision}: --fp16 goes with export's --precision fp16 alone")
    folder = name_folder(Path(engines) if engines else find_engines(), contract, inspect_machine(version), precision)
except UsegError as error:
    sys.exit(f"engine.sh: {error}")
profile = make_profile(contract)
print(folder, *(render_shapes(shapes) for shapes in (profile.least, profile.best, profile.most)), sep="\n")
PYTHON
)
{ read -r folder && read -r least && read -r best && read -r most; } <<<"$plan"

mkdir -p "$folder"
types=--noTF32
[[ $asked == fp32 ]] || types=--stronglyTyped
trtexec --onnx="$artifact/network.onnx" --saveEngine="$folder/network.engine.part" "$types" --skipInference \
  --minShapes="$least" --optShapes="$best" --maxShapes="$most" --timingCacheFile="$folder/timing.cache" >&2 ||
  fail "trtexec failed: see above"
mv "$folder/network.engine.part" "$folder/network.engine"
"$python" -c 'import sys; from pathlib import Path; from model.backends.tensorrt import wrap_engine
wrap_engine(Path(sys.argv[1]) / "network.onnx", Path(sys.argv[2]))' "$artifact" "$folder"
echo "$folder/network.engine"
