#!/usr/bin/env bash
# What the make targets run once an engine answers (DOCKER_HOST is set by engine.sh run).
set -euo pipefail
cd "$(dirname "$0")/../.."
# Its reaper image cannot be pulled everywhere; our tests remove what they make.
export TESTCONTAINERS_RYUK_DISABLED=true

case ${1:-} in
  images) images/build.sh ;;
  demo)
    images/build.sh
    compose/demo/image.sh
    node compose/demo/run.ts
    ;;
  test) node tests/lab/suite.ts lint types unit loop netns vm images containers k8s ;;
  test-containers) node tests/lab/suite.ts images containers ;;
  test-k8s) node tests/lab/suite.ts images k8s ;;
  *) echo 'usage: all.sh images|demo|test|test-containers|test-k8s' >&2; exit 64 ;;
esac
