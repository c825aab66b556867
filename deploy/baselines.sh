#!/usr/bin/env bash
# The systems that the paper compares with, made from the same photos and encoder as a model of ours, and scored alike.
#
#   deploy/baselines.sh maskcut|cutler|stego|cutler-stego PHOTOS ENCODER SET OUT [OPTION OF eval]...
#
# maskcut       MaskCut's masks, clustered, over stuff by k-means; nothing is trained
# cutler        a detector of one class trained on MaskCut's masks; its masks clustered afterwards ("CutLER+")
# stego         the same masks over STEGO's stuff: look at its semantic figures
# cutler-stego  the detector's masks over STEGO's stuff, no universal network
#
# SET is a labelled set whose photos lie in SET/images. What is there of OUT is taken as it is: systems share their parts.
# LABEL_OPTIONS and FIT_OPTIONS may hold options of `useg-train label` and `fit`.
set -euo pipefail

usage() { sed -n '2,4p' "$0" >&2; exit 2; }
[[ $# -ge 5 ]] || usage
system=$1 photos=$2 encoder=$3 set=$4 out=$5
shift 5
read -ra label_options <<<"${LABEL_OPTIONS:-}"
read -ra fit_options <<<"${FIT_OPTIONS:-}"

label() { # STORE PHOTOS OPTION...
    local store=$1 folder=$2
    shift 2
    [[ -f $out/$store/panoptic.json ]] ||
        useg-train label "$folder" --out "$out/$store" --encoder "$encoder" --features "$out/features" \
            --proposals maskcut "${label_options[@]}" "$@" >&2
}

label_set() { # STORE: the set's photos by the codebook of another store
    label "$1-set" "$set/images" --codebook "$out/$1/codebook.npz"
}

detect() { # STORE: the detector's masks in the place of those of STORE-set
    label one "$photos" --stuff kmeans --thing-clusters 1
    useg-train fit "$out/one" --out "$out/detector" --features "$out/features" --preset plain "${fit_options[@]}" >&2
    useg-train compose "$out/detector" "$out/$1-set" --out "$out/$1-detected" --features "$out/features" >&2
}

case $system in
    maskcut) label maskcut "$photos" --stuff kmeans && label_set maskcut && scored=maskcut-set ;;
    cutler) label maskcut "$photos" --stuff kmeans && label_set maskcut && detect maskcut && scored=maskcut-detected ;;
    stego) label stego "$photos" --stuff stego && label_set stego && scored=stego-set ;;
    cutler-stego) label stego "$photos" --stuff stego && label_set stego && detect stego && scored=stego-detected ;;
    *) usage ;;
esac
useg-train eval "$out/$scored" --truth "$set" --out "$out/report-$system" "$@"
