#!/usr/bin/env bash
# Retrains a model on photos and adds it to a registry: pseudo-labels, training, category names, evaluation, gate.
#
#   deploy/retrain.sh PHOTOS [REGISTRY] [OPTION]...
#
# --out DIR          one folder per attempt: config, log, training curves, visualizations, result of each stage (runs)
# --encoder FILE     DINO or DINOv2 weights, path or URL (the official DINOv2 ViT-S/14, downloaded once), or "bundled",
#                    the encoder of the bundled model, which needs no internet
# --model NAME       name in the registry (useg)
# --version V        version of this attempt (that of an attempt that was stopped, else the next number)
# --dataset DIR      labeled dataset that names segments and evaluates the version; without it, the names of the active
#                    version, or of the bundled model if --encoder is "bundled", are taken over
# --drift-photos DIR at least 200 photos outside PHOTOS, for the gate's check against the drift reference
# --rounds N         rounds of self-training after the first training (0); they end when a round is not better
# --activate         serve the version once it passes the gate; --canary FRACTION: to that fraction of the clients;
#                    without either it is only added
#
# REGISTRY is "registry" by default. LABEL_OPTIONS, TRAIN_OPTIONS, SELF_TRAIN_OPTIONS, EXPORT_OPTIONS, DATASET_OPTIONS
# (--format, ...), TRANSFER_OPTIONS and GATE_OPTIONS hold more options of those commands; quote arguments with spaces.
# After an interruption (Ctrl-C or kill), the same command continues. Exit status: 0 done, 4 rejected by the gate, else
# that of the command that failed.
set -euo pipefail

usage() { sed -n '4,23p' "$0" >&2; exit 2; }
fail() { echo "retrain: $1" >&2; exit 1; }

photos="" registry="" out=runs model=useg version="" dataset="" drift_photos="" role=add fraction="" rounds=0 encoder=""
while (($#)); do
    case $1 in
        --out | --encoder | --model | --version | --dataset | --rounds)
            declare "${1#--}=${2:?$1 needs a value}" && shift ;;
        --drift-photos) drift_photos=${2:?--drift-photos needs a folder} && shift ;;
        --activate) role=activate ;;
        --canary) role=canary fraction=${2:?--canary needs a fraction} && shift ;;
        -*) usage ;;
        *) if [[ -z $photos ]]; then photos=$1; elif [[ -z $registry ]]; then registry=$1; else usage; fi ;;
    esac
    shift
done
[[ -n $photos ]] || usage
[[ -d $photos ]] || fail "$photos is not a folder of photos"
[[ ! $drift_photos -ef $photos ]] || fail "--drift-photos must be other photos than $photos, which agree by themselves"
registry=${registry:-registry}

split() { # NAME TEXT: the words of TEXT, as a shell would split them, to the array NAME
    mapfile -d '' -t "$1" < <(xargs -r printf '%s\0' <<<"$2")
}
split label_options "${LABEL_OPTIONS:-}"
split train_options "${TRAIN_OPTIONS:-}"
split self_train_options "${SELF_TRAIN_OPTIONS:-}"
split export_options "${EXPORT_OPTIONS:-}"
split dataset_options "${DATASET_OPTIONS:-}"
split transfer_options "${TRANSFER_OPTIONS:-}"
split gate_options "${GATE_OPTIONS:-}"

find_active() { # the active version, if any
    [[ -d $registry ]] || return 0
    useg registry list "$registry" | python3 -c '
import json, sys
active = {model["name"]: model["active"] for model in json.load(sys.stdin)["models"]}
print(active.get(sys.argv[1]) or "")' "$model"
}

choose_version() { # that of an unfinished attempt, else the highest number + 1
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
flock --nonblock 9 || fail "another retraining is running in $out: wait for it, or give another --out"
active=$(find_active)
version=${version:-$(choose_version)}
run=$out/$model/$version artifact=$out/$model/$version/artifact served=$registry/$model/$active
mkdir -p "$run"

log() { echo "retrain: $1: $2" | tee -a "$run/log.txt" >&2; } # STAGE TEXT

stage() { # NAME TEXT COMMAND...: run it and store its result as NAME.json, unless that exists
    local name=$1 text=$2 status=0
    shift 2
    if [[ -s $run/$name.json ]]; then
        log "$name" "skipped: done before, see $run/$name.json"
        return
    fi
    log "$name" "$text"
    "$@" >"$run/.$name.json" 2> >(tee -ia "$run/log.txt" >&2) || status=$?
    case $status in
        0 | 3) mv "$run/.$name.json" "$run/$name.json" ;; # 3: done without broken photos, which the result lists
        130) log "$name" "interrupted; the same command continues" && exit 130 ;;
        *) log "$name" "failed with status $status; the same command tries again" && exit "$status" ;;
    esac
}

finish() { # TEXT STATUS
    echo "$1" >"$run/done"
    log end "$1"
    exit "$2"
}

keep_config() { # store the options and the active version, or require the stored ones once there are labels
    local given
    given=$(printf '%s\n' "photos=$(realpath "$photos")" "encoder=$encoder" "dataset=$dataset" \
        "rounds=$rounds" "label=${LABEL_OPTIONS:-}" "train=${TRAIN_OPTIONS:-}" "export=${EXPORT_OPTIONS:-}")
    [[ -s $run/label.json && -e $run/config.txt ]] || printf '%s\nstart=%s\n' "$given" "$active" >"$run/config.txt"
    [[ $(sed '$d' "$run/config.txt") == "$given" ]] ||
        fail "$run was started with other options, see its config.txt: give those, or another --version"
    start=$(sed -n 's/^start=//p' "$run/config.txt")
}

train() { # from the version that was active at the start, or from the encoder if that version does not fit
    local from=() status=0
    [[ -z $start || -e $run/from-encoder ]] || from=(--init-weights "$registry/$model/$start")
    useg train "$run/labels" --out "$run/run" --features "$out/features" "${from[@]}" "${train_options[@]}" || status=$?
    if [[ $status == 1 && ${#from[@]} -gt 0 && ! -e $run/run/checkpoint.safetensors ]]; then
        touch "$run/from-encoder"
        echo "cannot start from version $start: starting from the encoder" >&2
        train
    else
        return "$status"
    fi
}

score() { # ROUND: evaluate a run on the dataset, else by the consistency of its predictions
    if [[ -n $dataset ]]; then
        stage "score-$1" "evaluate round $1" useg eval "$weights" --dataset "$dataset" "${dataset_options[@]}"
    else
        stage "score-$1" "consistency of round $1" useg self-train "$weights" "$labels" --features "$out/features"
    fi
}

is_better() { # ROUND: whether it is better than the round before
    python3 -c '
import json, sys
before, after = (json.load(open(path)) for path in sys.argv[1:])
def score(result):
    metrics = result["panoptic"] or result["instance"]["agnostic_mask"]["headline"]
    return metrics["pq" if result["panoptic"] else "ap"]["value"]
is_accepted = after.get("is_accepted")
sys.exit(not (score(after) > score(before) if is_accepted is None else is_accepted))' \
        "$run/score-$(($1 - 1)).json" "$run/score-$1.json"
}

self_train() { # the rounds, each with labels that the network of the round before predicts
    local round before
    score 0
    for ((round = 1; round <= rounds; round++)); do
        stage "self-train-$round" "predictions of the network become the labels of round $round" useg self-train \
            "$weights" "$labels" --out "$run/labels-$round" --features "$out/features" ${dataset:+--force} \
            "${self_train_options[@]}"
        before=$weights labels=$run/labels-$round
        stage "train-$round" "train round $round from the weights of the round before" \
            useg train "$labels" --out "$run/run-$round" --init-weights "$weights" --features "$out/features" \
            "${train_options[@]}"
        weights=$run/run-$round
        score "$round"
        if ! is_better "$round"; then
            log rounds "round $round is not better than the round before, which is used"
            weights=$before
            break
        fi
    done
}

quantize() { # add int8 for CPUs with VNNI or AMX; where that fails, the version is served in fp32
    local status=0
    useg quantize "$artifact" --photos "$photos" || status=$?
    ((status == 1 || status == 4)) || return "$status"
    echo "version $version has no int8 network: CPUs compute in fp32" >&2
    echo '{"files": null}'
}

check_gate() {
    useg gate "$artifact" "$served" --photos "$photos" ${dataset:+--dataset "$dataset" "${dataset_options[@]}"} \
        ${drift_photos:+--drift-photos "$drift_photos"} --out "$run/gate.json" "${gate_options[@]}"
}

has_examples() { # "yes" if segments of the artifact get the categories of examples
    python3 -c '
import json, sys
print("yes" if json.load(open(sys.argv[1]))["examples"] else "")' "$artifact/contract.json"
}

describe_transfer() { # FILE: one line
    python3 -c '
import json, sys
result = json.load(open(sys.argv[1]))
lost = ", ".join(result["lost"]) or "none"
print(result["transferred"], "of", len(result["clusters"]), "clusters get a name; names without a cluster:", lost)' "$1"
}

keep_config
origin=${start:+version $start} origin=${origin:-the encoder}
criterion=${dataset:+metrics on $dataset} criterion=${criterion:-similarity on the photos}
log start "version $version of $model in $run, ${active:+to replace version $active, }from $photos"

stage label "make pseudo-labels" \
    useg label "$photos" --out "$run/labels" ${encoder:+--encoder "$encoder"} --features "$out/features" \
    "${label_options[@]}"
stage visualize "draw some pseudo-labels, $run/labels.jpg" useg visualize "$run/labels" --out "$run/labels.jpg"
stage train "train, starting from $origin; losses in $run/run" train
weights=$run/run labels=$run/labels
((rounds == 0)) || self_train
examples=()
if [[ -n $active ]]; then
    examples=(--examples-from "$served")
elif [[ $encoder == bundled ]]; then
    examples=(--examples-from bundled)
fi
stage export "export an artifact and check that it predicts the same" \
    useg export "$weights" --out "$artifact" --name "$model" --version "$version" --photos "$photos" \
    "${examples[@]}" "${export_options[@]}"
stage quantize "add an int8 network, which CPUs with VNNI or AMX run at least twice as fast" quantize
stage drift-reference "store statistics of its predictions, to detect drift later" \
    useg drift-reference "$artifact" --photos "$photos"
if [[ -n $dataset ]]; then
    stage match "match clusters to the categories of $dataset" \
        useg match "$artifact" --dataset "$dataset" "${dataset_options[@]}" --out "$run/mapping.json"
    stage eval "evaluate with cross-fitted categories, $run/report/report.html" \
        useg eval "$artifact" --dataset "$dataset" "${dataset_options[@]}" --out "$run/report"
fi
if [[ -n $active ]]; then
    named=$dataset$(has_examples) # of clusters that users named, else of all
    what=${named:+names that users gave} what=${what:-all names}
    stage transfer "transfer $what from version $active, by overlap on the photos" \
        useg names transfer "$served" "$artifact" --photos "$photos" --out "$run/names.json" \
        ${named:+--user-names-only} "${transfer_options[@]}"
    log transfer "$(describe_transfer "$run/transfer.json"); see $run/transfer.json"
    stage before "draw predictions of version $active, $run/before.jpg" \
        useg visualize "$served" --photos "$photos" --out "$run/before.jpg"
fi
stage after "draw predictions of version $version, $run/after.jpg" \
    useg visualize "$artifact" --photos "$photos" --out "$run/after.jpg"

if [[ -z $active ]]; then
    log gate "passed: there is no active version to compare with"
else
    log gate "compare with version $active: $criterion${drift_photos:+, and drift on $drift_photos}"
    status=0
    check_gate >/dev/null 2> >(tee -ia "$run/log.txt" >&2) || status=$?
    case $status in
        0 | 3) log gate "passed, see $run/gate.json" ;; # 3: without invalid annotations, which it lists
        4) finish "rejected, version $active stays; try again with --version $version and other GATE_OPTIONS" 4 ;;
        130) log gate "interrupted; the same command continues" && exit 130 ;;
        *) log gate "failed with status $status" && exit "$status" ;;
    esac
fi

[[ -d $registry/$model/$version ]] ||
    stage add "add it to the registry" useg registry add "$registry" "$artifact" --model "$model" --version "$version"
[[ -z $dataset ]] ||
    stage category-names "name the clusters" useg names apply "$registry/$model/$version" "$run/mapping.json"
[[ -z $active ]] ||
    stage user-names "add the names from version $active" \
        useg names apply "$registry/$model/$version" "$run/names.json" ${dataset:+--merge}
why=(--model "$model" --reason "retrained from $(basename "$photos")")
case $role in
    activate) stage activate "activate it" useg registry activate "$registry" "$version" "${why[@]}" ;;
    canary) stage canary "route a fraction of $fraction of the clients to it" \
        useg registry canary "$registry" "$version" --traffic-fraction "$fraction" "${why[@]}" ;;
esac
finish "version $version is in the registry; \`useg registry\` activates it, or the version before" 0
