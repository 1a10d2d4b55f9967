#!/usr/bin/env bash
# Brings what this machine lacks, and says so, one line each. A second run finds everything in place and does nothing.
#
#   host.sh packages GROUP...   Debian or Ubuntu packages: build, lab (network namespaces), bench, docker, base-image, vm, cluster
#   host.sh node DIR            Node 24 and npm in DIR/bin: links to the system's when that is new enough, else from the npm registry
#   host.sh debian-mirror       prints the mirror Debian packages come from, if this machine names one
#   host.sh unpack RELEASE DIR PACKAGE...   what Debian's packages of that release contain, in DIR; nothing is installed
#   host.sh source RELEASE DIR PACKAGE      the source package of that release, patched, in DIR, which must not exist
#   host.sh as-root COMMAND...  runs COMMAND, through sudo when that is needed
set -euo pipefail
shopt -s inherit_errexit
cd "$(dirname "$0")/../.."

# npm for machines whose own is missing or too old for Node 24. Integrity as published; the registry is npm's own setting.
npm_version=11.19.1
npm_integrity=sha512-ztsxKxt/kkIaAs+2i0GU6I+DRmUdrNasxTZKJe9TCdSjKxlhah/4r/hl5ygMD6XAg1qZ9c2TNomR4qgOydp10g==
node_major=24

say() { printf 'setup: %s\n' "$*" >&2; }
die() { printf 'setup: %s\n' "$*" >&2; exit 69; }
# sbin is not in everybody's path, but that is where nft, ip and dockerd live.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

sudo_if_needed() { # $1 why: prints `sudo` unless we are root already
  if [ "$(id -u)" = 0 ]; then return; fi
  command -v sudo >/dev/null || die "$1 needs root, and there is no sudo: run 'make' as root"
  say "$1 needs root: using sudo"
  echo sudo
}

# ---- packages

os_id=$(. /etc/os-release && echo "${ID:-}")
os_codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
wanted=()

need() { # $1 command, $2 package, $3 why
  command -v "$1" >/dev/null && return
  case " ${wanted[*]} " in *" $2 "*) return 0 ;; esac
  wanted+=("$2")
  say "installing $2: $3"
}

need_file() { # $1 file, $2 package, $3 why
  [ -f "$1" ] && return
  wanted+=("$2")
  say "installing $2: $3"
}

packages() {
  local group plugins=no vm=no
  for group in "$@"; do
    case $group in
      build)
        need git git 'the revision that a build names'
        need clang clang 'compiles the BPF program that makes plain TCP sockets Multipath TCP (DETOUR_MPTCPIFY)'
        need_file /usr/include/bpf/bpf_helpers.h libbpf-dev 'what BPF programs include, and the library that loads them'
        ;;
      lab)
        need ip iproute2 'test networks out of namespaces, links and rates'
        need nft nftables 'the kernel rules under test'
        need iptables iptables 'rules in chains that Docker owns'
        need conntrack conntrack 'looks at relayed flows'
        need tcpdump tcpdump 'proves what is on the wire'
        need iperf3 iperf3 'throughput for make bench'
        need mptcpize mptcpize 'makes unmodified programs open Multipath TCP sockets'
        need unshare util-linux 'namespaces'
        need nsenter util-linux 'namespaces'
        need flock util-linux 'one engine at a time'
        need mount mount 'namespaces'
        need wireguard-go wireguard-go 'tunnels where the kernel has no WireGuard'
        need wg wireguard-tools 'a hostile end of a tunnel'
        need_file /usr/bin/python3 python3 'sends the raw packets of hostile clients in tests'
        need ping iputils-ping 'tells that a test network is up'
        need sysctl procps 'kernel settings of the test namespaces'
        ;;
      bench)
        need socat socat 'a user-space relay to compare with'
        need openvpn openvpn 'a tunnel to compare with'
        ;;
      docker)
        need docker docker.io 'containers: the images, the demo, tests'
        need dockerd docker.io 'containers: the images, the demo, tests'
        plugins=yes
        ;;
      base-image)
        need mmdebstrap mmdebstrap 'makes the base image where no container registry answers'
        need_file /usr/share/keyrings/debian-archive-keyring.gpg debian-archive-keyring 'checks the packages of the base image'
        ;;
      vm)
        [ "$(uname -m)" = x86_64 ] || { say "no VM on $(uname -m): its tests are skipped"; continue; }
        need qemu-system-x86_64 qemu-system-x86 'a machine with a kernel of its own'
        need modprobe kmod 'loads modules in the VM'
        need zstd zstd 'unpacks the kernel of the VM'
        need xz xz-utils 'unpacks its modules'
        need setpriv util-linux 'ends the VM with what started it'
        need curl curl 'a client that knows nothing of Multipath TCP'
        vm=yes
        ;;
      cluster)
        need git git 'the Kubernetes build asks it for a version'
        need make make 'drives the generators of the Kubernetes build'
        need rsync rsync 'the Kubernetes build copies what it generates with it'
        need dpkg-source dpkg-dev 'unpacks the source package of Kubernetes'
        need xz xz-utils 'unpacks packages'
        need dnsmasq dnsmasq-base 'resolves the names of Services in test clusters'
        ;;
      *) die "unknown package group '$group'" ;;
    esac
  done
  install_wanted
  if [ $vm = yes ]; then vm_system; vm_nginx; fi
  if [ $plugins = yes ]; then
    # Debian 13 keeps the command line in a package of its own.
    if ! command -v docker >/dev/null; then wanted+=(docker-cli); say 'installing docker-cli: the docker command'; install_wanted; fi
    docker_plugins
  fi
}

install_wanted() {
  [ ${#wanted[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null || die "missing: ${wanted[*]}. There is no apt-get here; install what provides them and run again"
  local log sudo
  sudo=$(sudo_if_needed "installing ${wanted[*]}")
  log=$(mktemp)
  mapfile -t wanted < <(printf '%s\n' "${wanted[@]}" | sort -u)
  # A fresh machine has no package lists, an old one stale ones.
  { $sudo apt-get update -qq &&
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${wanted[@]}"; } >"$log" 2>&1 </dev/null ||
    { tail -n 20 "$log" >&2; rm -f "$log"; die "apt-get could not install ${wanted[*]}, see above"; }
  rm -f "$log"
  wanted=()
  hash -r
}

apt_has() { apt-cache show "$1" 2>/dev/null | grep -q '^Package:'; }

docker_plugins() {
  local missing=()
  docker compose version >/dev/null 2>&1 || missing+=(compose)
  docker buildx version >/dev/null 2>&1 || missing+=(buildx)
  [ ${#missing[@]} -gt 0 ] || return 0
  if [ "$os_id" = debian ] && [ "$os_codename" = bookworm ]; then
    plugins_from_trixie "${missing[@]}"
    return
  fi
  local plugin
  for plugin in "${missing[@]}"; do
    case $os_id-$plugin in
      ubuntu-compose) wanted+=(docker-compose-v2); say 'installing docker-compose-v2: starts the demo' ;;
      *-compose) wanted+=(docker-compose); say 'installing docker-compose: starts the demo' ;;
      *-buildx) wanted+=(docker-buildx); say 'installing docker-buildx: builds the images' ;;
    esac
  done
  install_wanted
}

# Debian 12 has neither plugin. Debian 13's packages hold one static binary each, which is unpacked for this user.
plugins_from_trixie() {
  local unpacked=.cache/apt-trixie plugin target=${DOCKER_CONFIG:-$HOME/.docker}/cli-plugins
  say "unpacking ${*/#/docker-} of Debian 13 into $target: Debian 12 has no such package"
  # In a shell of its own, because it ends in `die` when there is no such mirror.
  (unpack trixie "$unpacked" "${@/#/docker-}") || die 'install the Docker compose and buildx plugins yourself, and run again'
  mkdir -p "$target"
  for plugin in "$@"; do install -m 755 "$unpacked/usr/libexec/docker/cli-plugins/docker-$plugin" "$target/docker-$plugin"; done
  rm -rf "$unpacked"
}

# What the VM boots: Debian 13's kernel with its modules, and a static busybox to start it with, unpacked into the cache.
vm_nginx() { # a server that knows nothing of Multipath TCP, for this machine's libraries
  local nginx=${XDG_CACHE_HOME:-$HOME/.cache}/detour/nginx scratch sudo
  [ ! -e "$nginx" ] || return 0
  say "unpacking nginx into $nginx: a server for tests; installed, it would start here"
  scratch=$(mktemp -d)
  if ! (cd "$scratch" && apt-get download -qq nginx >/dev/null 2>&1); then
    sudo=$(sudo_if_needed 'reading the package lists')
    $sudo apt-get update -qq >&2
    (cd "$scratch" && apt-get download -qq nginx >&2) || { rm -rf "$scratch"; die 'nginx could not be downloaded'; }
  fi
  dpkg-deb -x "$scratch"/nginx_*.deb "$scratch/unpacked"
  mkdir -p "$(dirname "$nginx")"
  mv "$scratch/unpacked" "$nginx"
  rm -rf "$scratch"
}

vm_system() {
  local vm=${XDG_CACHE_HOME:-$HOME/.cache}/detour/vm
  [ ! -e "$vm/system" ] || return 0
  mkdir -p "$vm"
  # Two trees of this project may come here at once.
  exec 9>"$vm/lock"
  flock 9
  if [ ! -e "$vm/system" ]; then
    say "unpacking the kernel of Debian 13 into $vm (110 MB to fetch): tests in a VM"
    rm -rf "$vm/part"
    unpack trixie "$vm/part" "linux-image-$(dpkg --print-architecture)" busybox-static
    # Some builds of kmod look for lib/modules, others for usr/lib/modules.
    ln -s usr/lib "$vm/part/lib"
    depmod -b "$vm/part" "$(ls "$vm/part/lib/modules")"
    unpack_kernel "$vm"/part/boot/vmlinuz-* >"$vm/part/vmlinux"
    mv "$vm/part" "$vm/system"
  fi
  exec 9>&-
}

# Prints what bzImage $1 would unpack at every boot. The places of numbers in it are those of Documentation/arch/x86/boot.rst:
# setup_sects, payload_offset, payload_length.
unpack_kernel() {
  local sectors offset length
  read -r sectors < <(od -An -j $((0x1f1)) -N 1 -t u1 "$1")
  read -r offset length < <(od -An -j $((0x248)) -N 8 -t u4 "$1")
  # The last four bytes are the unpacked size, which zstd does not know.
  dd if="$1" iflag=skip_bytes,count_bytes skip=$(((sectors + 1) * 512 + offset)) count=$((length - 4)) bs=1M status=none | zstd -q -dc
}

# ---- packages of a Debian that this machine need not be

# Sets `other` to apt-get for that release alone, its lists read. They and what is downloaded stay in $2, and out of the system's
# own; signatures are checked all the same. What is installed here does not count, or a newer one of the same name would be asked for.
other_release() { # $1 release, $2 scratch folder, absolute
  local mirror keys=/usr/share/keyrings/debian-archive-keyring.gpg
  mirror=$(debian_mirror)
  [ -f "$keys" ] || { wanted+=(debian-archive-keyring); say "installing debian-archive-keyring: checks the packages of Debian's $1"; install_wanted; }
  mkdir -p "$2/lists/partial" "$2/archives/partial"
  printf "%s [signed-by=$keys] ${mirror:-http://deb.debian.org/debian} $1 main\n" deb deb-src >"$2/sources.list"
  other=(apt-get -o "Dir::Etc::SourceList=$2/sources.list" -o Dir::Etc::SourceParts=- -o "Dir::State::Lists=$2/lists"
    -o Dir::State::status=/dev/null -o "Dir::Cache=$2" -o APT::Sandbox::User= -o APT::Get::List-Cleanup=0 -qq)
  "${other[@]}" update >&2 || die "the package lists of Debian's $1 cannot be read: is a Debian mirror in reach?"
}

unpack() { # $1 release, $2 folder, packages
  local release=$1 target scratch package names=()
  mkdir -p "$2"
  target=$(realpath "$2")
  scratch=$(mktemp -d)
  shift 2
  other_release "$release" "$scratch"
  for package in "$@"; do
    # linux-image-amd64 is empty, and depends on the newest.
    case $package in linux-image-*) package=$(apt-cache "${other[@]:1}" depends "$package" | sed -n 's/^ *Depends: \(linux-image-.*\)/\1/p') ;; esac
    names+=("$package")
  done
  (cd "$scratch/archives" && "${other[@]}" download "${names[@]}" >&2) || { rm -rf "$scratch"; die "${names[*]} of Debian's $release could not be downloaded"; }
  for package in "$scratch/archives"/*.deb; do dpkg-deb -x "$package" "$target"; done
  rm -rf "$scratch"
}

unpack_source() { # $1 release, $2 folder, $3 package
  local target scratch
  mkdir -p "$(dirname "$2")"
  target=$(realpath "$2")
  scratch=$(mktemp -d)
  other_release "$1" "$scratch"
  # apt has checked the hashes against the signed list; whoever made the package has no key here.
  (cd "$scratch" && "${other[@]}" source --download-only --only-source "$3" >&2 &&
    dpkg-source --no-check --extract ./*.dsc "$target") >"$scratch/log" 2>&1 ||
    { tail -n 20 "$scratch/log" >&2; rm -rf "$scratch"; die "the source of $3 of Debian's $1 could not be unpacked, see above"; }
  rm -rf "$scratch"
}

debian_mirror() { # the one this machine uses already, when it is a Debian; nothing otherwise
  local found=
  if [ "$os_id" = debian ]; then
    found=$(cat /etc/apt/sources.list.d/*.sources 2>/dev/null | sed -n 's/^URIs:[[:space:]]*\([^[:space:]]*\).*/\1/p' | grep -E '/debian/?$' | head -n 1 || true)
    [ -n "$found" ] || found=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null |
      sed -n 's/^deb[[:space:]]\+\(\[[^]]*\][[:space:]]*\)\?\([^[:space:]]*\).*/\2/p' | grep -E '/debian/?$' | head -n 1 || true)
  fi
  echo "$found"
}

# ---- Node

node_is_new() { # $1: a node binary
  local version
  version=$("$1" --version 2>/dev/null) || return 1
  version=${version#v}
  [ "${version%%.*}" -ge $node_major ]
}

fetch() { # $1 name@version, $2 integrity, $3 target folder: an npm package through npm, held to its hash
  local scratch tarball want got
  scratch=$(mktemp -d)
  (cd "$scratch" && npm pack --silent "$1" >/dev/null) || { rm -rf "$scratch"; die "npm could not fetch $1: is the npm registry in reach? (npm config get registry)"; }
  tarball=$(echo "$scratch"/*.tgz)
  want=$(printf %s "${2#sha512-}" | base64 -d | od -An -tx1 | tr -d ' \n')
  got=$(sha512sum "$tarball" | cut -d' ' -f1)
  [ "$want" = "$got" ] || { rm -rf "$scratch"; die "$1 does not have the integrity hash it should have: not using it"; }
  mkdir -p "$3"
  tar -xzf "$tarball" -C "$3" --strip-components=1 --no-same-owner
  rm -rf "$scratch"
}

locked() { # $1 package, $2 field: from the lock file, without a JSON parser because there is no Node yet
  sed -n "/\"node_modules\/$1\": {/,/^    }/s/.*\"$2\": \"\([^\"]*\)\".*/\1/p" package-lock.json | head -n 1
}

link() { # $1 target, $2 name: a link that a running make never sees missing
  ln -sf "$1" "$2.new" && mv -f "$2.new" "$2"
}

bring_node() {
  local dir=$1 system cpu version integrity
  mkdir -p "$dir/bin"
  # What npm put into this tree, or we into DIR, is no Node of the system.
  PATH=$(tr : '\n' <<<"$PATH" | grep -v -F "$PWD/" | paste -sd :)
  system=$(command -v node || true)
  if [ -n "$system" ] && node_is_new "$system" && command -v npm >/dev/null; then
    link "$system" "$dir/bin/node"
    link "$(command -v npm)" "$dir/bin/npm"
    link "$(command -v npx)" "$dir/bin/npx"
    return
  fi
  case $(uname -m) in
    x86_64) cpu=x64 ;;
    aarch64) cpu=arm64 ;;
    *) die "there is no Node package for $(uname -m): install Node $node_major and npm, then run again" ;;
  esac
  version=$(locked "node-linux-$cpu" version)
  integrity=$(locked "node-linux-$cpu" integrity)
  { [ -n "$version" ] && [ -n "$integrity" ]; } || die "package-lock.json does not name node-linux-$cpu"
  if [ "$("$dir/node-$version/bin/node" --version 2>/dev/null)" != "v$version" ] || [ ! -f "$dir/npm-$npm_version/bin/npm-cli.js" ]; then
    if ! command -v npm >/dev/null; then need npm npm 'fetches Node from the npm registry, and is not used again'; install_wanted; fi
    say "bringing Node $version and npm $npm_version from the npm registry into $dir: this machine's Node is ${system:+$("$system" --version), }${system:-missing}"
    rm -rf "$dir"/node-* "$dir"/npm-*
    fetch "node-linux-$cpu@$version" "$integrity" "$dir/node-$version"
    fetch "npm@$npm_version" "$npm_integrity" "$dir/npm-$npm_version"
  fi
  link "../node-$version/bin/node" "$dir/bin/node"
  # npm runs under this Node: under an older one it would quietly choose older packages.
  local name
  for name in npm npx; do
    printf '#!/bin/sh\nhere=$(dirname "$(readlink -f "$0")")\nPATH=$here:$PATH exec "$here/node" "$here/../npm-%s/bin/%s-cli.js" "$@"\n' "$npm_version" "$name" >"$dir/bin/$name.new"
    chmod 755 "$dir/bin/$name.new"
    mv -f "$dir/bin/$name.new" "$dir/bin/$name"
  done
}

as_root_with_environment() { # keeps the caller's home, path and settings, and gives files it makes in the tree back to the caller
  if [ "$(id -u)" = 0 ]; then exec "$@"; fi
  sudo_if_needed 'what makes network namespaces and containers' >/dev/null
  # Made by this user first: what runs as root would make them for root alone.
  mkdir -p "${DOCKER_CONFIG:-$HOME/.docker}" "${XDG_CACHE_HOME:-$HOME/.cache}"
  local status=0
  sudo --preserve-env env "PATH=$PATH" "HOME=$HOME" "$@" || status=$?
  sudo chown -R "$(id -u):$(id -g)" out dist node_modules/.vite* 2>/dev/null || true
  exit "$status"
}

command=${1:-}
[ $# -gt 0 ] && shift
case $command in
  packages) packages "$@" ;;
  node) bring_node "${1:?usage: host.sh node DIR}" ;;
  debian-mirror) debian_mirror ;;
  unpack) unpack "${1:?usage: host.sh unpack RELEASE DIR PACKAGE...}" "${2:?}" "${@:3}" ;;
  source) unpack_source "${1:?usage: host.sh source RELEASE DIR PACKAGE}" "${2:?}" "${3:?}" ;;
  as-root) as_root_with_environment "$@" ;;
  *) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"; [ -z "$command" ] || exit 64 ;;
esac
