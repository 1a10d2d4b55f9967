#!/usr/bin/env bash
# Builds detour-lab:dev, the image of the demo's client, server and gateway, unless it is there already. Needs an engine
# (tests/lab/engine.sh run -- ...) and runs under the Node that goes into the image.
set -euo pipefail
cd "$(dirname "$0")/../.."

node=$(node -p process.execPath)
contents=(tests/lab/traffic.ts compose/demo/gateway.sh compose/demo/Dockerfile)
recipe=$(cat "${contents[@]}" <(node --version) | cksum | cut -d' ' -f1)
if [ "$(docker image inspect --format '{{index .Config.Labels "detour.recipe"}}' detour-lab:dev 2>/dev/null)" = "$recipe" ]; then exit; fi

base=$(images/build.sh base iproute2,nftables,mptcpize,libstdc++6)
context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
cp "$node" "$context/node"
cp "${contents[@]}" "$context"
if ! DOCKER_BUILDKIT=1 docker build --tag detour-lab:dev --label "detour.recipe=$recipe" --build-arg "BASE_IMAGE=$base" \
  "$context" >"$context/log" 2>&1; then
  cat "$context/log" >&2
  echo 'demo: docker build of detour-lab:dev failed, see above' >&2
  exit 1
fi
