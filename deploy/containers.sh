#!/usr/bin/env bash
# Builds and tests the images without a daemon: with buildah in a chroot, its storage in a separate folder.
# Usage: deploy/containers.sh base                     makes a replacement of the base image with debootstrap, if none can be pulled
#        deploy/containers.sh build TARGET             builds the image useg/TARGET: service, service-gpu or train
#        deploy/containers.sh run TARGET [ARGUMENT...] runs the image as its user on a read-only root; VOLUMES are writable
#        deploy/containers.sh try PHOTO                starts the service, runs the smoke test, stops it with SIGTERM; expects exit status 0
#        deploy/containers.sh sizes                    megabytes of each image
# STORAGE     folder of the images (/var/tmp/useg-containers)
# VOLUMES     folders that a run may write to, HOST:INSIDE, separated by spaces; USEG_* and *_OPTIONS are passed on
# ENTRYPOINT  command to run instead of the image's own
# BUILD_ARGS  flags for the build, such as --build-arg=TORCH_INDEX=
# MIRROR      Debian mirror for debootstrap
# Needs root, buildah and util-linux; `base` also needs debootstrap. pip uses the configuration of the host's pip.
set -euo pipefail
cd "$(dirname "$0")/.."

base=python:3.11-slim-bookworm
port=${PORT:-8765}
storage=${STORAGE:-/var/tmp/useg-containers}
export BUILDAH_ISOLATION=chroot BUILDAH_FORMAT=docker
mkdir -p "$storage"
work=$(mktemp --directory "$storage/work.XXXXXX")

fail() {
  echo "containers.sh: $1" >&2
  exit 1
}

buildah_here() { # buildah with its own storage
  buildah --root "$storage/images" --runroot "$storage/run" "$@"
}

clean() {
  [[ ! -s $work/container ]] || buildah_here rm "$(<"$work/container")" >/dev/null
  rm -rf "$work"
}
trap clean EXIT

# Links Debian's Python to the path of the official image, so that the same Dockerfile builds.
make_base() {
  debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$work/base" \
    "${MIRROR:-http://deb.debian.org/debian}" >&2
  rm -rf "$work"/base/var/cache/apt/archives/*.deb "$work"/base/var/lib/apt/lists/* "$work"/base/usr/share/{doc,man,locale}
  ln -s /usr/bin/python3 "$work/base/usr/local/bin/python3"
  ln -s /usr/bin/python3 "$work/base/usr/local/bin/python"
  local container
  container=$(buildah_here from scratch)
  buildah_here add --quiet "$container" "$work/base" / >/dev/null
  buildah_here config --cmd python3 --env PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
  buildah_here commit --quiet --rm "$container" "docker.io/library/$base" >/dev/null
}

# Passes pip's configuration as one file; the folders that it names are mounted during the build.
build() {
  local target=$1 folder
  local flags=() arguments=()
  read -ra arguments <<<"${BUILD_ARGS:-}"
  python3 -m pip config list | sed --quiet "s/^global\.\([a-z-]*\)='\(.*\)'$/\1 = \2/p" | sed '1i [global]' >"$work/pip.conf"
  while read -r folder; do
    [[ -e $folder ]] && flags+=(--volume "$folder:$folder:ro")
  done < <(grep --only-matching --extended-regexp '(file://|= )/[^ ]+' "$work/pip.conf" | sed 's|^file://||; s|^= ||' | sed 's|/simple$||')
  buildah_here bud --layers --pull=false --network host --secret "id=pip,src=$work/pip.conf" ${flags[@]+"${flags[@]}"} \
    "${arguments[@]}" --target "$target" --tag "useg/$target" . >&2
}

# Uses the image's user, environment and entrypoint, a read-only root, a PID namespace, and the host's network.
run() {
  local target=$1 image=localhost/useg/$1 root volume
  shift
  buildah_here from --quiet --pull=false "$image" >"$work/container"
  root=$(buildah_here mount "$(<"$work/container")")
  for volume in ${VOLUMES:-}; do
    mkdir -p "$root${volume#*:}"
  done
  local user workdir environment entrypoint
  user=$(inspect "$image" '{{.OCIv1.Config.User}}')
  workdir=$(inspect "$image" '{{.OCIv1.Config.WorkingDir}}')
  mapfile -t environment < <(inspect "$image" '{{range .OCIv1.Config.Env}}{{println .}}{{end}}' | grep .)
  mapfile -t -O "${#environment[@]}" environment < <(env | grep --extended-regexp '^(USEG_|[A-Z]+_OPTIONS=)')
  mapfile -t entrypoint < <(inspect "$image" '{{range .OCIv1.Config.Entrypoint}}{{println .}}{{end}}' | grep .)
  [[ -z ${ENTRYPOINT:-} ]] || entrypoint=("$ENTRYPOINT")
  # shellcheck disable=SC2016
  unshare --mount --propagation private bash -euc '
    root=$1 volumes=$2 && shift 2
    mount --bind "$root" "$root" && mount -o remount,bind,ro "$root"
    mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$root/tmp" && mount --rbind /dev "$root/dev"
    for volume in $volumes; do mount --bind "${volume%%:*}" "$root${volume#*:}"; done
    exec unshare "$@"' bash "$root" "${VOLUMES:-}" \
    --pid --fork --kill-child --mount-proc --root="$root" --wd="${workdir:-/}" --setgid="${user#*:}" --setuid="${user%%:*}" \
    env --ignore-environment "${environment[@]}" "${entrypoint[@]}" "$@"
}

inspect() { # an image and a Go template
  buildah_here inspect --type image --format "$2" "$1"
}

smoke_test() {
  local photo=$1 server process child status=0
  USEG_PORT=$port USEG_ALLOW_UNAUTHENTICATED=true run service >"$work/served" 2>&1 &
  server=$!
  deploy/smoke.sh "$photo" "http://127.0.0.1:$port" || { cat "$work/served" >&2; fail "the smoke test failed"; }
  process=$server
  while child=$(pgrep --parent "$process" | head --lines=1) && [[ -n $child ]]; do process=$child; done
  echo "as user $(stat --format %u "/proc/$process"), process $(awk '/^NSpid/ {print $3}' "/proc/$process/status")" \
    "of its container, whose root is mounted $(awk '$5 == "/" {print $6}' "/proc/$process/mountinfo")"
  kill -TERM "$process"
  wait "$server" || status=$?
  echo "exit status after SIGTERM: $status"
  return "$status"
}

show_sizes() {
  local target
  for target in service service-gpu train; do
    buildah_here images --format '{{.Size}}' "localhost/useg/$target" 2>/dev/null | sed "s|^|useg/$target: |" || true
  done
}

case ${1:-} in
  base) make_base ;;
  build) build "${2:?no target given}" ;;
  run) shift && run "$@" ;;
  try) smoke_test "$(realpath "${2:?no photo given}")" ;;
  sizes) show_sizes ;;
  *) sed --quiet '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2 && exit 2 ;;
esac
