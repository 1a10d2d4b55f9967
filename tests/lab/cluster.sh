#!/usr/bin/env bash
# The programs of a real Kubernetes cluster, where no registry has them: Kubernetes 1.20.2, built once from Debian 12's source
# package, and Debian 12's etcd. tests/k8s/cluster.ts makes clusters of them.
#
#   cluster.sh build    brings them into the cache, and does nothing when they are there; prints the folder
#   cluster.sh folder   prints the folder
#
# Compiler, etcd and source come from Debian's signed lists of bookworm, whatever release this machine has, and are unpacked
# rather than installed: golang 1.19 builds this old source where newer ones do not, and an installed etcd-server would be a
# service of the machine. A build that was interrupted goes on where it was.
set -euo pipefail
shopt -s inherit_errexit
cd "$(dirname "$0")/../.."

release=bookworm
version=1.20.2
programs=(kube-apiserver kube-controller-manager kube-scheduler kubelet kubectl)
cache="${XDG_CACHE_HOME:-$HOME/.cache}/detour"
folder=$cache/kubernetes

say() { printf 'cluster: %s\n' "$*" >&2; }
die() { printf 'cluster: %s\n' "$*" >&2; exit 69; }

build() {
  local log=$folder/build.log tree=$folder/build
  SECONDS=0
  say "building Kubernetes $version of Debian's $release in $folder, once: 5 to 10 minutes on two cores, and 3 GB of disk meanwhile"
  tests/lab/host.sh packages cluster
  # What is left of a build by another recipe is of no use.
  if [ "$(cat "$tree/recipe" 2>/dev/null)" != "$(recipe)" ]; then remove_tree "$tree"; fi
  mkdir -p "$tree"
  recipe >"$tree/recipe"
  : >"$log"

  step "$tree" tools "unpacking golang and etcd" bring_tools
  step "$tree" source "unpacking the source of Kubernetes" bring_source
  step "$tree" generated "generating code" generate
  step "$tree" programs "compiling ${programs[*]}" compile

  rm -rf "$folder/bin"
  mv "$tree/bin" "$folder/bin"
  recipe >"$folder/recipe"
  remove_tree "$tree"
  rm -f "$log"
  say "built in $SECONDS s; $(du -sh "$folder/bin" | cut -f1) of programs are kept, the build tree is removed"
}

remove_tree() { # $1 tree
  # Go makes folders that nobody may write to.
  if [ -d "$1" ]; then chmod -R u+w "$1"; fi
  rm -rf "$1"
}

step() { # $1 tree, $2 name, $3 what it does, $4 function: once, and again only when it did not come to its end
  local tree=$1 name=$2 before=$SECONDS
  if [ -f "$tree/$name.done" ]; then say "$3: done before"; return; fi
  say "$3"
  # A process of its own: inside of `if !` bash would not stop a function at its first error.
  tests/lab/cluster.sh step "$4" "$tree" >>"$log" 2>&1 </dev/null || { tail -n 30 "$log" >&2; die "$3 failed, see above; all of it is in $log"; }
  touch "$tree/$name.done"
  say "$3: $((SECONDS - before)) s"
}

bring_tools() { # $1 tree
  rm -rf "$1/tools" "$1/bin"
  mkdir -p "$1/bin"
  tests/lab/host.sh unpack "$release" "$1/tools" golang-1.19-go golang-1.19-src etcd-server
  "$1/tools/usr/bin/etcd" --version || { echo "etcd-server of Debian's $release does not run on this machine"; exit 1; }
  mv "$1/tools/usr/bin/etcd" "$1/bin/etcd"
}

bring_source() { # $1 tree
  local source=$1/go/src/k8s.io/kubernetes
  rm -rf "$source"
  tests/lab/host.sh source "$release" "$source" kubernetes
  # Its scripts ask git for the version, and must not find that of a tree around this one.
  git -C "$source" init --quiet
}

go_environment() { # $1 tree: nothing of the caller's Go, and no download
  export GOROOT=$1/tools/usr/lib/go-1.19 GOPATH=$1/go GOCACHE=$1/go-cache GO111MODULE=off GOPROXY=off GOFLAGS= CGO_ENABLED=0
  export PATH=$GOROOT/bin:$PATH
  cd "$1/go/src/k8s.io/kubernetes"
}

generate() { # $1 tree
  go_environment "$1"
  make generated_files
}

compile() { # $1 tree
  go_environment "$1"
  local stamp=k8s.io/kubernetes/vendor/k8s.io/component-base/version
  # Clouds of others are left out, which is a third of the code. -s and -w: no symbols, no debug information.
  go build -tags providerless -o "$1/bin/" \
    -ldflags "-s -w -X $stamp.gitVersion=v$version -X $stamp.gitMajor=1 -X $stamp.gitMinor=20 -X $stamp.gitTreeState=clean" \
    "${programs[@]/#/./cmd/}"
}

recipe() { # what the programs depend on: a change of it makes new ones
  { declare -f bring_tools bring_source go_environment generate compile; echo "$release $version ${programs[*]} $(uname -m)"; } | cksum
}

built() { [ "$(cat "$folder/recipe" 2>/dev/null)" = "$(recipe)" ]; }

case ${1:-} in
  build)
    mkdir -p "$folder"
    exec 9>"$folder/lock"
    flock --nonblock 9 || { say 'another build is running: waiting for it'; flock 9; }
    built || build
    echo "$folder/bin"
    ;;
  folder) echo "$folder/bin" ;;
  step) "$2" "$3" ;;
  *) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"; [ -z "${1:-}" ] || exit 64 ;;
esac
