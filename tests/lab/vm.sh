#!/usr/bin/env bash
# A virtual machine with the kernel of Debian 13 for a command that needs what this machine's kernel lacks.
#
#   vm.sh run [--cpus N] [--memory MB] [--timeout S] -- COMMAND...
#       runs COMMAND as root inside, in the same folder of the same tree, and ends with its exit status; 124 when the time (default
#       900 s) ran out, 69 when this machine lacks what it takes (tests/lab/host.sh packages vm)
#
# Its root is the host's root, read only, under a layer of memory: nothing that the command writes stays, except in out/ of this tree.
# It has no network but loopback. /tmp and /run are its own. Of the environment it gets PATH, HOME, CI, TEST_*, DETOUR_*, NODE_OPTIONS and
# what concerns language and colours; LAB_VM=1 tells that it is inside.
set -euo pipefail
shopt -s inherit_errexit

tree=$(cd "$(dirname "$0")/../.." && pwd -P)
vm=${XDG_CACHE_HOME:-$HOME/.cache}/detour/vm
system=$vm/system
passed='^(PATH|HOME|CI|LANG|LC_[A-Z]+|TERM|NO_COLOR|FORCE_COLOR|NODE_OPTIONS|TEST_[A-Z_]+|DETOUR_[A-Z0-9_]+)$'

say() { printf 'vm: %s\n' "$*" >&2; }
lacking() { say "$*"; exit 69; }

need_all() {
  [ "$(uname -m)" = x86_64 ] || lacking "there is a VM for x86_64 only, not for $(uname -m)"
  command -v qemu-system-x86_64 >/dev/null || lacking 'qemu-system-x86_64 is missing: run tests/lab/host.sh packages vm'
  [ -e "$system" ] || lacking "there is no kernel in $system: run tests/lab/host.sh packages vm"
}

# Prints the archive that the kernel starts from: vm-init.sh, and what that needs to reach the host's files.
initramfs() {
  local archive
  archive=$vm/initramfs-$(cat <(declare -f make_initramfs) "$tree/tests/lab/vm-init.sh" <(ls "$system/usr/lib/modules") | cksum | cut -d' ' -f1)
  [ -e "$archive" ] || make_initramfs "$archive"
  echo "$archive"
}

make_initramfs() { # $1 file
  local root name
  root=$(mktemp -d)
  mkdir "$root"/{modules,proc,host,job,writes,root}
  cp "$system/usr/bin/busybox" "$root/busybox"
  cp "$tree/tests/lab/vm-init.sh" "$root/init"
  for name in netfs 9pnet 9pnet_virtio 9p overlay; do
    xz -dc "$(find "$system/usr/lib/modules" -name "$name.ko.xz")" >"$root/modules/$name.ko"
    echo "$name" >>"$root/modules/order"
  done
  # Not packed: the emulated processor would have to unpack it.
  (cd "$root" && find . | "$system/usr/bin/busybox" cpio -o -H newc) >"$1.$$" 2>/dev/null
  mv "$1.$$" "$1"
  rm -rf "$root"
}

run() { # $1 cpus, $2 memory in MB, $3 seconds, then the command
  local cpus=$1 memory=$2 timeout=$3 archive accel=tcg,thread=multi status=0 tails=()
  shift 3
  need_all
  archive=$(initramfs)
  mkdir -p "$tree/out"
  job=$(mktemp -d)
  trap 'rm -rf "$job"' EXIT
  : >"$job/stdout"
  : >"$job/stderr"
  echo "$tree" >"$job/tree"
  echo "$system/usr/lib/modules" >"$job/modules"
  {
    printf 'cd %q || exit\n' "$PWD"
    local name
    for name in $(compgen -e); do
      [[ $name =~ $passed ]] && printf 'export %s=%q\n' "$name" "${!name}"
    done
    # Shims are scripts that look for the program: an emulated processor takes fifteen seconds over pyenv's.
    printf 'export PATH=%q\n' "$(tr : '\n' <<<"$PATH" | grep -v '/shims$' | paste -sd:)"
    # Types are stripped once for each file: it takes an emulated processor seconds.
    printf 'export LAB_VM=1 NODE_COMPILE_CACHE=/tmp/node-compile-cache\nexec'
    printf ' %q' "$@"
    echo
  } >"$job/command"
  # A processor without these may still have the device, which then does nothing.
  if [ -w /dev/kvm ] && grep -qwE 'vmx|svm' /proc/cpuinfo; then accel=kvm; fi

  # Ends with this shell, however that ends. q35, because microvm has no timer to measure a busy host's processor by, and hangs.
  # Its own marks of trouble (a panic, an oops) end the machine; mitigations and self-tests only cost time here.
  setpriv --pdeathsig TERM timeout --kill-after 5 "$timeout" setpriv --pdeathsig KILL \
    qemu-system-x86_64 -accel "$accel" -machine q35 -cpu max -smp "$cpus" -m "$memory" \
    -nodefaults -no-user-config -display none -no-reboot -serial "file:$job/console" \
    -kernel "$system/vmlinux" -initrd "$archive" \
    -append 'console=ttyS0 quiet panic=-1 oops=panic mitigations=off cryptomgr.notests tsc=reliable audit=0 apparmor=0' \
    -fsdev local,id=host,path=/,security_model=none,readonly=on,multidevs=remap -device virtio-9p-pci,fsdev=host,mount_tag=host \
    -fsdev "local,id=out,path=${tree//,/,,}/out,security_model=none,multidevs=remap" -device virtio-9p-pci,fsdev=out,mount_tag=out \
    -fsdev "local,id=job,path=${job//,/,,},security_model=none" -device virtio-9p-pci,fsdev=job,mount_tag=job \
    </dev/null >"$job/qemu" 2>&1 &
  machine=$!
  trap 'stopped 130' INT
  trap 'stopped 143' TERM HUP
  # They end once the machine has, with all that it wrote.
  tail -q -n +1 -s 0.1 -f --pid="$machine" "$job/stdout" &
  tails+=($!)
  tail -q -n +1 -s 0.1 -f --pid="$machine" "$job/stderr" >&2 &
  tails+=($!)
  wait "$machine" || status=$?
  # One whose reader has gone ends earlier.
  wait "${tails[@]}" || true
  if [ -s "$job/status" ]; then exit "$(cat "$job/status")"; fi
  tail -q -n 40 "$job/console" "$job/qemu" >&2 || true
  if [ "$status" = 124 ]; then say "the command took longer than $timeout s"; exit 124; fi
  say "the machine ended (status $status) before the command did; its console is above"
  exit 1
}

stopped() { # $1 exit status
  trap '' INT TERM HUP
  kill -TERM "$machine" 2>/dev/null || true
  wait
  exit "$1"
}

command=${1:-}
[ $# -gt 0 ] && shift
cpus=2 memory=3072 timeout=900
while [ $# -gt 0 ]; do
  case $1 in
    --cpus) cpus=$2; shift 2 ;;
    --memory) memory=$2; shift 2 ;;
    --timeout) timeout=$2; shift 2 ;;
    --) shift; break ;;
    *) break ;;
  esac
done
case $command in
  run)
    [ $# -gt 0 ] || { echo 'usage: vm.sh run [--cpus N] [--memory MB] [--timeout S] -- COMMAND...' >&2; exit 64; }
    run "$cpus" "$memory" "$timeout" "$@"
    ;;
  *) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"; [ -z "$command" ] || exit 64 ;;
esac
