#!/usr/bin/env bash
# Builds detour-router:dev and detour-client:dev for this machine's architecture. Needs dist/image/ (make build) and an engine
# (tests/lab/engine.sh run -- images/build.sh, which is what `make images` does).
#
#   images/build.sh                  both images
#   images/build.sh base PKG,PKG     only prints a base image that has these packages, or can install them
#
# BASE_IMAGE   base to build on. Default: debian:trixie-slim, pulled by the engine; where no registry answers, a stand-in made
#              once of Debian's own packages and kept in the cache.
set -euo pipefail
shopt -s inherit_errexit
cd "$(dirname "$0")/.."

registry_timeout_s=90
release=trixie
packages=nftables,iptables,conntrack,ca-certificates,libstdc++6,libbpf1
cache="${XDG_CACHE_HOME:-$HOME/.cache}/detour"
export DOCKER_BUILDKIT=1

say() { printf 'images: %s\n' "$*" >&2; }

case $(uname -m) in
  x86_64) arch=amd64 ;;
  aarch64) arch=arm64 ;;
  *) say "no image for $(uname -m): there are amd64 and arm64"; exit 69 ;;
esac

stand_in() { # $1 packages: prints the tag of a base made without a registry
  # The recipe is part of the name: a change of it makes a new base.
  local recipe tar tag
  recipe=$(cat <(declare -f make_stand_in) <(echo "$release $1 $arch") | cksum | cut -d' ' -f1)
  tag=detour-stand-in:$release-$recipe
  tar=$cache/base-$release-$arch-$recipe.tar
  if ! docker image inspect "$tag" >/dev/null 2>&1; then
    if [ ! -f "$tar" ]; then make_stand_in "$tar" "$1"; fi
    docker import --message "Debian $release, by mmdebstrap" "$tar" "$tag" >/dev/null
  fi
  echo "$tag"
}

make_stand_in() { # $1 tar, $2 packages: a small Debian
  say "no registry answers: making a Debian $release base of Debian's packages ($2), once; takes about 20 s"
  tests/lab/host.sh packages base-image
  mkdir -p "$cache"
  local mirror part=${1%.tar}.$$.tar
  mirror=$(tests/lab/host.sh debian-mirror)
  # As debian:trixie-slim does: no manual pages, locales and documentation but the copyright notices. The mirror this machine
  # uses is nobody else's business, and builds on this base have no network to reach one. None found: mmdebstrap knows Debian's.
  if ! mmdebstrap --quiet --variant=essential --architectures="$arch" --include="$2" \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/info/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
    --dpkgopt='path-include=/usr/share/doc/*/copyright' \
    --customize-hook='rm -f "$1/etc/apt/sources.list"' \
    "$release" "$part" ${mirror:+"$mirror"} >"$1.log" 2>&1 </dev/null; then
    cat "$1.log" >&2
    rm -f "$part"
    say "mmdebstrap failed, see above. With a registry in reach: make images BASE_IMAGE=debian:trixie-slim"
    exit 69
  fi
  mv "$part" "$1"
  rm -f "$1.log"
}

base_image() { # $1 packages: prints the base to build on
  if [ -n "${BASE_IMAGE:-}" ]; then echo "$BASE_IMAGE"
  elif docker image inspect "debian:$release-slim" >/dev/null 2>&1; then echo "debian:$release-slim"
  # An engine in namespaces of our own has no way out, so asking a registry would only wait for the time-out.
  elif [ "${LAB_ENGINE_INIT:-1}" = 1 ] && timeout "$registry_timeout_s" docker pull --quiet "debian:$release-slim" >/dev/null 2>&1; then
    echo "debian:$release-slim"
  else stand_in "$1"; fi
}

build() {
  local log
  log=$(mktemp)
  if ! docker build "$@" >"$log" 2>&1; then
    cat "$log" >&2
    rm -f "$log"
    say "docker build failed, see above"
    exit 1
  fi
  rm -f "$log"
}

if [ "${1:-}" = base ]; then
  base_image "${2:?usage: images/build.sh base PKG,PKG}"
  exit
fi

[ -d "dist/image/$arch" ] || { say "dist/image/$arch is missing: run make build first"; exit 1; }
base=$(base_image "$packages")
digest=$(docker image inspect --format '{{range .RepoDigests}}{{.}} {{end}}' "$base" 2>/dev/null | sed -n 's/^[^@ ]*@\([^ ]*\).*/\1/p' || true)
version=$(node -p "require('./package.json').version")
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
epoch=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 0)}
created=$(date --utc --date="@$epoch" +%Y-%m-%dT%H:%M:%SZ)

build --file images/Dockerfile.base --tag detour-base:dev \
  --build-arg "BASE_IMAGE=$base" --build-arg "BASE_NAME=$base" --build-arg "BASE_DIGEST=$digest" --build-arg "TARGETARCH=$arch" \
  --build-arg "VERSION=$version" --build-arg "REVISION=$revision" --build-arg "CREATED=$created" --build-arg "SOURCE=${SOURCE:-}" \
  dist/image
for image in router client; do
  build --file "images/Dockerfile.$image" --tag "detour-$image:dev" --build-arg SHARED=detour-base:dev images
done
say "detour-router:dev and detour-client:dev are built on $base"
