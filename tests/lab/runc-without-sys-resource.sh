#!/bin/bash
# runc for hosts without CAP_SYS_RESOURCE, which refuse whole containers for what only that would allow. Here those containers go
# without: they keep the OOM score that they inherit (Kubernetes asks for a lower one), and privileged ones have one capability less.
set -eu
previous=
for argument in "$@"; do
  if [ "$previous" = --bundle ]; then
    # Docker writes it in one line, and neither is ever the first of its list.
    sed -E -i 's/,"oomScoreAdj":-?[0-9]+//; s/,"CAP_SYS_RESOURCE"//g' "$argument/config.json"
  fi
  previous=$argument
done
exec runc "$@"
