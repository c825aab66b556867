#!/usr/bin/env bash
# The systems that the U2Seg paper compares with, made from the same photos and encoder as a model, and evaluated alike.
#
#   deploy/baselines.sh maskcut|cutler|stego|cutler-stego PHOTOS ENCODER DATASET OUT [OPTION OF eval]...
#
# maskcut       MaskCut's masks, clustered, over stuff by k-means; nothing is trained
# cutler        a class-agnostic detector trained on MaskCut's masks; its masks are clustered afterwards ("CutLER+")
# stego         the same masks over STEGO's stuff: see its semantic metrics
# cutler-stego  the detector's masks over STEGO's stuff, without a universal network
#
# DATASET is a labeled dataset with its photos in DATASET/images. Finished parts in OUT are reused: systems share them.
# LABEL_OPTIONS and TRAIN_OPTIONS hold more options of `useg label` and `useg train`; quote arguments with spaces.
set -euo pipefail

usage() { sed -n '2,4p' "$0" >&2; exit 2; }
[[ $# -ge 5 ]] || usage
system=$1 photos=$2 encoder=$3 dataset=$4 out=$5
shift 5
mapfile -d '' -t label_options < <(xargs -r printf '%s\0' <<<"${LABEL_OPTIONS:-}")
mapfile -d '' -t train_options < <(xargs -r printf '%s\0' <<<"${TRAIN_OPTIONS:-}")

label() { # LABELS PHOTOS OPTION...
    local labels=$1 folder=$2
    shift 2
    [[ -f $out/$labels/panoptic.json ]] ||
        useg label "$folder" --out "$out/$labels" --encoder "$encoder" --features "$out/features" \
            --proposals maskcut "${label_options[@]}" "$@" >&2
}

label_dataset() { # LABELS: label the dataset's photos with the codebook of other labels
    label "$1-dataset" "$dataset/images" --codebook "$out/$1/codebook.npz"
}

detect() { # LABELS: replace the masks of LABELS-dataset with those of the detector
    label one "$photos" --stuff kmeans --thing-clusters 1
    useg train "$out/one" --out "$out/detector" --features "$out/features" --preset panoptic-targets \
        "${train_options[@]}" >&2
    useg labels-from-detector "$out/detector" "$out/$1-dataset" --out "$out/$1-detected" --features "$out/features" >&2
}

case $system in
    maskcut) label maskcut "$photos" --stuff kmeans && label_dataset maskcut && evaluated=maskcut-dataset ;;
    cutler) label maskcut "$photos" --stuff kmeans && label_dataset maskcut && detect maskcut && evaluated=maskcut-detected ;;
    stego) label stego "$photos" --stuff stego && label_dataset stego && evaluated=stego-dataset ;;
    cutler-stego) label stego "$photos" --stuff stego && label_dataset stego && detect stego && evaluated=stego-detected ;;
    *) usage ;;
esac
useg eval "$out/$evaluated" --dataset "$dataset" --out "$out/report-$system" "$@"
