#!/usr/bin/env bash
# Everything that can only be measured on a GPU, in order of importance, and one table of the results.
#
#   deploy/gpu_check.sh [PHOTOS [ENCODER]]
#
# PHOTOS is a folder of photos for the load, labelling and training; ENCODER the .safetensors file for the latter two.
# Each step has a limit (STEP_S, default 600 s); one that fails does not stop the others. DEVICE=cpu is a dry run on
# small images, with few proposals, photos and clusters.
# Requires a Python with useg[service-gpu,train,dev] ($PYTHON, default: python3). Logs are left in $LOGS.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3} device=${DEVICE:-cuda} limit=${STEP_S:-600}
photos=${1:-} encoder=${2:-}
logs=${LOGS:-$(mktemp -d)}
batches=(1 8 32) rounds=20 side=448 proposals=1000 seconds=20 steps=50 preset=gpu
test_options=() label_options=(--max-photos 2000)
if [[ $device == cpu ]]; then
  batches=(1) rounds=1 side=112 proposals=8 seconds=3 steps=2 preset=tiny
  test_options=(--collect-only) label_options=(--max-photos 8 --thing-clusters 4 --stuff-clusters 4)
fi
mkdir -p "$logs"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} OPENBLAS_NUM_THREADS=1
rows=()

step() { # NAME COMMAND...: run it; the result in the table is its last line of output, or the rates in its JSON
  local name=$1 started=$SECONDS status=0
  shift
  timeout "$limit" "$@" >"$logs/$name.log" 2>&1 || status=$?
  local result
  result=$(grep -v '^[[:space:]]*$' "$logs/$name.log" | tail -n 1 | cut -c 1-90)
  [[ $result == "}" ]] &&
    result=$(grep -E '"(backend|images_per_s|median|goodput_per_s|p50_ms|photos|total)":' "$logs/$name.log" | tr -d ' \n' | cut -c 1-90)
  rows+=("$name|$([[ $status == 0 ]] && echo ok || echo "failed ($status)")|$((SECONDS - started)) s|$result")
  printf '%-24s %-12s %s\n' "$name" "$status" "$result" >&2
}

skip() { # NAME REASON
  rows+=("$1|skipped||$2")
  printf '%-24s %-12s %s\n' "$1" skipped "$2" >&2
}

bench() { # NETWORK PRECISION BATCH: photos a second of the torch session, with CUDA graphs on a GPU
  "$python" - "$device" "$rounds" "$side" "$proposals" "$@" <<'PYTHON'
import sys, time
from pathlib import Path
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from model.backends.torch_session import TorchSession, load_torch_network
from model.contract import read_contract
from model.networks.panoptic_cascade import CascadeConfig, CascadeInferenceConfig, PanopticCascade
from model.networks.roi_heads import DetectionConfig
from model.networks.rpn import ProposalConfig

device, name, precision = sys.argv[1], *sys.argv[5:7]
rounds, side, proposals, batch = (int(sys.argv[index]) for index in (2, 3, 4, 7))
artifact = Path("model/default")
if name == "default":
    network = load_torch_network(read_contract(artifact), artifact)
else:  # the paper's network with random weights: 800 thing and 27 stuff clusters
    side = side // 32 * 32
    kept = CascadeInferenceConfig(
        proposals=ProposalConfig(pre_nms_topk=proposals, post_nms_topk=proposals),
        detections=DetectionConfig(max_detections=min(100, proposals)),
    )
    network = PanopticCascade(CascadeConfig(thing_clusters=800, stuff_clusters=27), kept)
    network = network.eval().requires_grad_(False)
counter = FlopCounterMode(display=False)
with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:  # the counter does not know fused attention on the CPU
    network(torch.zeros(1, 3, side, side, dtype=torch.uint8), torch.tensor([[side, side]]))
flops = counter.get_total_flops()
session = TorchSession(network, device=torch.device(device), precision=precision)
pixels = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8).numpy()
sizes = torch.tensor([[side, side]] * batch).numpy()
times = []
for _ in range(rounds + 2):
    started = time.perf_counter()
    session.run(pixels, sizes)
    times.append(time.perf_counter() - started)
median = sorted(times[2:])[rounds // 2]
print(f"{batch / median:.1f} photos/s, {1e3 * median:.1f} ms a batch, {batch * flops / median / 1e12:.2f} TFLOP/s")
PYTHON
}

if command -v nvidia-smi >/dev/null; then
  step gpu nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
else
  skip gpu "no nvidia-smi"
fi
step tests "$python" -m pytest -q -p no:cacheprovider "${test_options[@]}" \
  tests/test_model_backends_torch.py tests/test_model_backends_tensorrt.py
for network in default paper; do
  for batch in "${batches[@]}"; do
    export -f bench
    export python device rounds side proposals
    step "$network-fp16-$batch" bash -c 'bench "$@"' bench "$network" fp16 "$batch"
  done
done
for backend in cuda tensorrt torch; do
  if [[ $device == cpu && $backend != torch ]]; then
    skip "golden-$backend" "needs a GPU"
  else
    step "golden-$backend" "$python" -m model check model/default --backend "$backend"
  fi
done
step "bench-auto" "$python" -m model bench model/default --batch-sizes "${batches[@]}" --rounds "$rounds" --baseline cpu
if [[ -n $photos ]]; then
  step "service" "$python" deploy/bench.py "$photos" --seconds "$seconds" --overload-s 0 -- --max-batch-size 8
else
  skip "service" "no PHOTOS given"
fi
if [[ -n $photos && -n $encoder ]]; then
  step "label" "$python" -m model label "$photos" --out "$logs/labels" --encoder "$encoder" --features "$logs/features" \
    "${label_options[@]}"
  step "train" "$python" -m model train "$logs/labels" --out "$logs/run" --features "$logs/features" \
    --preset "$preset" --device "$device" --max-steps "$steps"
else
  skip "label, train" "no PHOTOS and ENCODER given"
fi

printf '\n%-22s %-12s %8s  %s\n' step status time result
for row in "${rows[@]}"; do
  IFS='|' read -r name status took result <<<"$row"
  printf '%-22s %-12s %8s  %s\n' "$name" "$status" "$took" "$result"
done
printf '\nlogs: %s; goals: 400 and 1,500 photos/s at 448 px, labelling 100 photos/s\n' "$logs"
