#!/usr/bin/env bash
# Photos to a version in a registry: labels, a fit, names, scores, a gate against the active version, and in it goes.
#
#   deploy/retrain.sh PHOTOS [REGISTRY] [OPTION]...
#
# --out RUNS        a folder for each try: config, log, curves, contact sheets before and after, each stage's result (runs)
# --encoder FILE    DINO or DINOv2 weights, path or URL (the official DINOv2 ViT-S/14)
# --model NAME      in the registry (useg)
# --version V       of this try (that of the last one if it was stopped, else the next number)
# --truth SET       labelled pictures, to name clusters by and to score; without, names are carried over by agreement
# --rounds N        of self-training after the first fit (0); they end where one is no better than the last
# --activate        serve it once it has passed; --canary SHARE: to that share of the callers; else it is only added
#
# REGISTRY is "registry" unless given. LABEL_OPTIONS, FIT_OPTIONS, RELABEL_OPTIONS (--zoom, …), EXPORT_OPTIONS,
# TRUTH_OPTIONS (--layout, …), CARRY_OPTIONS and GATE_OPTIONS may hold options of those commands. Stopped at any
# moment (Ctrl-C, or killed), the same command goes on. Exit status: 0 done, 4 refused by the gate, else that of the
# command that failed.
set -euo pipefail

usage() { sed -n '4,17p' "$0" >&2; exit 2; }
fail() { echo "retrain: $1" >&2; exit 1; }

photos="" registry="" out=runs model=useg version="" truth="" role=add share="" rounds=0
encoder=https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth
while (($#)); do
    case $1 in
        --out | --encoder | --model | --version | --truth | --rounds) declare "${1#--}=${2:?$1 needs a value}" && shift ;;
        --activate) role=activate ;;
        --canary) role=canary share=${2:?--canary needs a share} && shift ;;
        -*) usage ;;
        *) if [[ -z $photos ]]; then photos=$1; elif [[ -z $registry ]]; then registry=$1; else usage; fi ;;
    esac
    shift
done
[[ -n $photos ]] || usage
[[ -d $photos ]] || fail "$photos is no folder of photos"
registry=${registry:-registry}
read -ra label_options <<<"${LABEL_OPTIONS:-}"
read -ra fit_options <<<"${FIT_OPTIONS:-}"
read -ra relabel_options <<<"${RELABEL_OPTIONS:-}"
read -ra export_options <<<"${EXPORT_OPTIONS:-}"
read -ra truth_options <<<"${TRUTH_OPTIONS:-}"
read -ra carry_options <<<"${CARRY_OPTIONS:-}"
read -ra gate_options <<<"${GATE_OPTIONS:-}"

find_active() { # the version that is served, if any
    [[ -d $registry ]] || return 0
    useg registry list "$registry" | python3 -c '
import json, sys
found = {each["name"]: each["active"] for each in json.load(sys.stdin)["models"]}
print(found.get(sys.argv[1]) or "")' "$model"
}

choose_version() { # that of a try which was stopped, else one above all there are
    local folder last=0
    for folder in "$out/$model"/*/; do
        [[ ! -d $folder || -e $folder/done ]] || { basename "$folder"; return; }
    done
    for folder in "$out/$model"/*/ "$registry/$model"/*/; do
        folder=$(basename "$folder")
        [[ ! $folder =~ ^[1-9][0-9]{0,8}$ ]] || last=$((folder > last ? folder : last))
    done
    echo $((last + 1))
}

mkdir -p "$out/$model"
exec 9>"$out/.lock"
flock --nonblock 9 || fail "another one is at work in $out: wait for it, or give another --out"
active=$(find_active)
version=${version:-$(choose_version)}
run=$out/$model/$version artifact=$out/$model/$version/artifact served=$registry/$model/$active
mkdir -p "$run"

tell() { echo "retrain: $1: $2" | tee -a "$run/log.txt" >&2; } # STAGE TEXT

stage() { # NAME REASON COMMAND...: its result to NAME.json, unless that is there
    local name=$1 reason=$2 status=0
    shift 2
    if [[ -s $run/$name.json ]]; then
        tell "$name" "skipped because done, see $run/$name.json"
        return
    fi
    tell "$name" "$reason"
    "$@" >"$run/.$name.json" 2> >(tee -ia "$run/log.txt" >&2) || status=$?
    case $status in
        0 | 3) mv "$run/.$name.json" "$run/$name.json" ;; # 3: done, but photos were broken; the result lists them
        130) tell "$name" "interrupted; the same command goes on" && exit 130 ;;
        *) tell "$name" "failed with status $status; the same command tries again" && exit "$status" ;;
    esac
}

finish() { # TEXT STATUS
    echo "$1" >"$run/done"
    tell end "$1"
    exit "$2"
}

keep_config() { # what a try was begun with, and what it starts from, are the same when it goes on
    local given
    given=$(printf '%s\n' "photos=$(realpath "$photos")" "encoder=$encoder" "truth=$truth" \
        "rounds=$rounds" "label=${LABEL_OPTIONS:-}" "fit=${FIT_OPTIONS:-}" "export=${EXPORT_OPTIONS:-}")
    [[ -e $run/config.txt ]] || printf '%s\nstart=%s\n' "$given" "$active" >"$run/config.txt"
    [[ $(sed '$d' "$run/config.txt") == "$given" ]] ||
        fail "$run was begun with other options, see its config.txt: give those, or another --version"
    start=$(sed -n 's/^start=//p' "$run/config.txt")
}

fit() { # from the version that was active at the beginning, or from the encoder where that one does not fit
    local from=() status=0
    [[ -z $start || -e $run/from-encoder ]] || from=(--start "$registry/$model/$start")
    useg-train fit "$run/store" --out "$run/run" --features "$out/features" "${from[@]}" "${fit_options[@]}" || status=$?
    if [[ $status == 1 && ${#from[@]} -gt 0 && ! -e $run/run/checkpoint.safetensors ]]; then
        touch "$run/from-encoder"
        echo "version $start is no start for it: it begins from the encoder" >&2
        fit
    else
        return "$status"
    fi
}

score() { # ROUND: how good a run is, by truth or by how steady it is
    if [[ -n $truth ]]; then
        stage "score-$1" "how good round $1 is" useg-train eval "$weights" --truth "$truth" "${truth_options[@]}"
    else
        stage "score-$1" "how steady round $1 is" useg-train relabel "$weights" "$labels" --features "$out/features"
    fi
    scores+=("$run/score-$1.json")
}

is_better() { # ROUND: than the one before
    python3 -c '
import json, sys
before, after = (json.load(open(path)) for path in sys.argv[1:])
def read(told): return told["panoptic"]["pq"] if told["panoptic"] else told["instance"]["agnostic_mask"]["headline"]["ap"]
is_accepted = after.get("is_accepted")
sys.exit(not (read(after)["value"] > read(before)["value"] if is_accepted is None else is_accepted))' \
        "$run/score-$(($1 - 1)).json" "$run/score-$1.json"
}

train_self() { # the rounds, each from the labels that the last one found
    local round before scores=()
    score 0
    for ((round = 1; round <= rounds; round++)); do
        stage "relabel-$round" "what the network finds, as labels of round $round" useg-train relabel "$weights" \
            "$labels" --out "$run/store-$round" --features "$out/features" ${truth:+--force} \
            "${relabel_options[@]}"
        before=$weights labels=$run/store-$round
        stage "fit-$round" "labels to weights, from those of the last round" \
            useg-train fit "$labels" --out "$run/run-$round" --start "$weights" --features "$out/features" \
            "${fit_options[@]}"
        weights=$run/run-$round
        score "$round"
        if ! is_better "$round"; then
            tell rounds "round $round is no better than the one before, which is taken"
            weights=$before
            break
        fi
    done
    stage rounds "the score of each round, $run/rounds.png" useg-train rounds "${scores[@]}" --out "$run"
}

examine() { # the gate; a refusal is a result, too
    useg-train gate "$artifact" "$served" --photos "$photos" ${truth:+--truth "$truth" "${truth_options[@]}"} \
        --out "$run/gate.json" "${gate_options[@]}"
}

describe_carried() { # in one line
    python3 -c '
import json, sys
told = json.load(open(sys.argv[1]))
lost = ", ".join(told["lost"]) or "none"
print(told["transferred"], "of", len(told["clusters"]), "clusters seen get a name; names that find no cluster:", lost)' "$1"
}

keep_config
origin=${start:+version $start} origin=${origin:-the encoder}
yardstick=${truth:+scores on $truth} yardstick=${yardstick:-agreement and drift on the photos}
tell begin "version $version of $model in $run, ${active:+against version $active, }from $photos"

stage label "photos to pseudo-labels" \
    useg-train label "$photos" --out "$run/store" --encoder "$encoder" --features "$out/features" "${label_options[@]}"
stage sheet "a contact sheet of labels, $run/labels.jpg" useg-train show "$run/store" --out "$run/labels.jpg"
stage fit "labels to weights, from $origin; losses in $run/run/curves.png" fit
weights=$run/run labels=$run/store
((rounds == 0)) || train_self
stage export "weights to an artifact, which must answer as they do" \
    useg export "$weights" --out "$artifact" --name "$model" --version "$version" --photos "$photos" \
    "${export_options[@]}"
stage reference "what its answers look like, to tell drift by" useg drift-reference "$artifact" --photos "$photos"
if [[ -n $truth ]]; then
    stage match "labelled pictures to names for clusters" \
        useg-train match "$artifact" --truth "$truth" "${truth_options[@]}" --out "$run/names.json"
    stage name "those names into the artifact" useg names apply "$artifact" "$run/names.json"
    stage eval "scores, each half of the set naming the other's clusters; $run/report/report.html" \
        useg-train eval "$artifact" --truth "$truth" "${truth_options[@]}" --out "$run/report"
fi
if [[ -n $active ]]; then
    what=${truth:+names that people gave} what=${what:-all names, there being no labelled set}
    stage carry "$what, from version $active by agreement on the photos" \
        useg names transfer "$served" "$artifact" --photos "$photos" --out "$run/carried.json" ${truth:+--user-names-only} \
        "${carry_options[@]}"
    tell carry "$(describe_carried "$run/carry.json"); each in $run/carry.json"
    stage before "version $active on some photos, $run/before.jpg" \
        useg-train show "$served" --photos "$photos" --out "$run/before.jpg"
fi
stage after "version $version on the same, $run/after.jpg" \
    useg-train show "$artifact" --photos "$photos" --out "$run/after.jpg"

if [[ -z $active ]]; then
    tell gate "passed: there is no active version to compare with"
else
    tell gate "held against version $active by $yardstick"
    status=0
    examine >/dev/null 2> >(tee -ia "$run/log.txt" >&2) || status=$?
    case $status in
        0) tell gate "passed, see $run/gate.json" ;;
        4) finish "refused, version $active stays; --version $version and other GATE_OPTIONS ask again" 4 ;;
        130) tell gate "interrupted; the same command goes on" && exit 130 ;;
        *) tell gate "failed with status $status" && exit "$status" ;;
    esac
fi

[[ -d $registry/$model/$version ]] ||
    stage add "into the registry" useg registry add "$registry" "$artifact" --model "$model" --version "$version"
[[ -z $active ]] ||
    stage import "the carried names beside it" \
        useg names apply "$registry/$model/$version" "$run/carried.json"
why=(--model "$model" --reason "retrained from $(basename "$photos")")
case $role in
    activate) stage activate "served from now on" useg registry activate "$registry" "$version" "${why[@]}" ;;
    canary) stage canary "served to $share of the callers" \
        useg registry canary "$registry" "$version" --traffic-fraction "$share" "${why[@]}" ;;
esac
finish "version $version is in the registry; \`useg registry\` can activate it, or what was there before" 0
