#!/usr/bin/env bash
# Build the image with buildah, which needs no daemon, and train a few steps inside it.
#
#   cluster/build_image.sh [TAG] [options of buildah bud, such as --secret or --volume]
#
# BASE_IMAGE names the base, best by digest; without it, one is made by debootstrap. STORAGE is
# where images are kept (default: beside root's others). Needs root.
set -euo pipefail
cd "$(dirname "$0")/.."
tag=${1:-t2v}
shift || true

need() {
  command -v "$1" >/dev/null || { echo "$1: not found; apt install $1." >&2; exit 66; }
}
need buildah
[ -n "${BASE_IMAGE:-}" ] || need debootstrap
if [ "$(id -u)" != 0 ]; then
  echo "build_image.sh: must be root because debootstrap and chroot must; use sudo." >&2
  exit 78
fi

store=()
if [ -n "${STORAGE:-}" ]; then
  store=(--root "$STORAGE/images" --runroot "$STORAGE/run")
fi
# Layers are mounted where the kernel can, and else copied whole.
driver=overlay
build() { buildah --storage-driver "$driver" "${store[@]}" "$@"; }
build info >/dev/null 2>&1 || driver=vfs

tree='' trial='' base=''
clean() {
  local rc=$?
  [ -z "$trial" ] || build rm "$trial" >/dev/null || true
  [ -z "$base" ] || build rm "$base" >/dev/null || true
  [ -z "$tree" ] || rm -rf -- "$tree"
  exit "$rc"
}
trap clean EXIT

if [ -z "${BASE_IMAGE:-}" ]; then
  tree=$(mktemp -d)
  debootstrap --variant=minbase bookworm "$tree" >&2
  rm -rf -- "$tree"/var/cache/apt/archives/*.deb "$tree"/var/lib/apt/lists/*
  base=$(build from scratch)
  build add --quiet "$base" "$tree" / >/dev/null
  rm -rf -- "$tree" && tree=''
  build commit --quiet --rm "$base" t2v-base >/dev/null
  base='' BASE_IMAGE=localhost/t2v-base
fi

build bud --isolation chroot --network host --layers=false \
  --build-arg "BASE_IMAGE=$BASE_IMAGE" --tag "$tag" "$@" .

trial=$(build from "$tag")
build run --isolation chroot --network host "$trial" -- bash -euc '
  test "$(id -u)" = 1000
  cd "$(mktemp -d)"
  t2v data toy media --videos 8 --images 4
  t2v data build media/videos shards --size 4x12x12 --fps 4
  tini -s -g -- t2v train /app/configs/quickstart_base.yaml run_dir=run total_steps=3 \
    "conditioning={kind: none}" "data.sources=[{path: shards}]" \
    data.held_out_share=0 held_out=null samples=null
  test "$(t2v status run --decide)" = done
'
echo "$tag: built, and trained in: $(build images --quiet --no-trunc "$tag")"
