#!/usr/bin/env bash
# Adds the bundled model to a registry and activates it, unless a version of that model is active already.
# Usage: deploy/seed.sh REGISTRY [MODEL]
set -euo pipefail
registry=${1:?usage: deploy/seed.sh REGISTRY [MODEL]}
model=${2:-useg}

mkdir -p "$registry"
active=$(useg registry list "$registry" | python3 -c '
import json, sys
print({each["name"]: each["active"] or "" for each in json.load(sys.stdin)["models"]}.get(sys.argv[1], ""))' "$model")
if [[ -n $active ]]; then
  echo "$model $active is active in $registry" >&2
  exit 0
fi
bundled=$(python3 -c 'from importlib.resources import files; print(files("model") / "default")')
[[ -d $registry/$model/1 ]] || useg registry add "$registry" "$bundled" --model "$model" --version 1
useg registry activate "$registry" 1 --model "$model" --reason "the bundled model"
