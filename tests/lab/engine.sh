#!/usr/bin/env bash
# A Docker engine for the commands that need one, without leaving anything on the host.
#
#   engine.sh run -- COMMAND...            run COMMAND with DOCKER_HOST set; start an engine if none answers, stop what was started
#   engine.sh enter -- COMMAND...          the same, and COMMAND runs inside the engine's network, mount and pid namespaces
#   engine.sh start --netns NAME --state DIR [--iptables nft|legacy] [-- DOCKERD-FLAG...]
#                                          a second engine inside network namespace NAME: `--network host` there is that namespace.
#                                          Prints its DOCKER_HOST. ip_forward is 0 before the start, so Docker sets FORWARD to DROP.
#   engine.sh stop --state DIR [--purge]   stop it (and with --purge delete everything it stored)
#   engine.sh stop [--purge]               stop our own engine even if another command still uses it
#   engine.sh status                       say which engine would be used
#
# Our own engine lives in network, mount and pid namespaces of its own. docker0, iptables rules, ip_forward, FORWARD DROP,
# mounts, containerd and every container die with them by construction, even when dockerd is killed: the host is left as
# found without any bookkeeping. Only its store (images) survives, in the cache. /run is a private tmpfs in there, so a
# killed engine leaves no stale pid file or socket that the next one could stumble over. The engine's socket is also where every
# other has it, /run/docker.sock in there.
#
# Pids in `docker inspect` are those of the engine's pid namespace. From outside, LAB_ENGINE_INIT (set by `run`) is the
# engine's first process: the namespaces of container pid P are /proc/$LAB_ENGINE_INIT/root/proc/P/ns/*.
set -euo pipefail

cache="${XDG_CACHE_HOME:-$HOME/.cache}/detour"
main_state="$cache/engine"
lab=$(realpath "$(dirname "$0")")
start_timeout_s=60
stop_timeout_s=30

say() { printf 'engine: %s\n' "$*" >&2; }
die() { printf 'engine: %s\n' "$*" >&2; exit 1; }

alive() { # is the engine of state directory $1 answering?
  [ -S "$1/docker.sock" ] && DOCKER_HOST="unix://$1/docker.sock" timeout 10 docker info >/dev/null 2>&1
}

start_time() { # when process $1 started, in clock ticks: with the pid it names a process for good
  local stat
  stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
  # Field 22 counted from the start; the command name in field 2 may hold spaces, so count after its bracket.
  stat=${stat##*) }
  # shellcheck disable=SC2086
  set -- $stat
  echo "${20}"
}

same_process() { # does file $1 ("pid starttime") name a process that still runs?
  local pid started
  [ -f "$1" ] || return 1
  read -r pid started <"$1" || return 1
  [ -n "$pid" ] && [ "$(start_time "$pid" || true)" = "$started" ]
}

kill_engine() { # $1 state: end the engine that was started there, politely first
  local state=$1 holder child deadline
  if same_process "$state/holder"; then
    read -r holder _ <"$state/holder"
    child=$(cat "$state/init" 2>/dev/null || true)
    # TERM goes to the shell that is pid 1 inside; it ends dockerd, which stops containers and containerd in order.
    [ -n "$child" ] && kill -TERM "$child" 2>/dev/null || true
    deadline=$((SECONDS + stop_timeout_s))
    while same_process "$state/holder" && [ $SECONDS -lt $deadline ]; do sleep 0.1; done
    # unshare --kill-child: when the holder goes, the kernel kills the whole pid namespace.
    if same_process "$state/holder"; then
      say "the engine did not stop in ${stop_timeout_s} s, killing it"
      kill -KILL "$holder" 2>/dev/null || true
      [ -n "$child" ] && kill -KILL "$child" 2>/dev/null || true
    fi
  fi
  # Its cgroups are in the host's tree, and stay when containers were killed rather than stopped.
  local group=/detour-engine-$(basename "$state")-$(cksum <<<"$state" | cut -d' ' -f1)
  local root
  for root in /sys/fs/cgroup /sys/fs/cgroup/*; do
    [ -d "$root$group" ] && find "$root$group" -depth -type d -exec rmdir {} + 2>/dev/null || true
  done
  rm -f "$state/holder" "$state/init" "$state/docker.sock"
}

start_engine() { # $1 state, $2 network namespace or empty, $3 iptables flavour or empty, further flags of dockerd
  local state=$1 netns=$2 flavour=$3 enter=() net=(--net)
  shift 3
  [ "$(id -u)" = 0 ] || die "starting an engine needs root: run this under sudo, or start Docker yourself"
  command -v dockerd >/dev/null || die "dockerd is not installed: run tests/lab/host.sh packages docker"
  mkdir -p "$state/data"
  kill_engine "$state"
  if [ -n "$netns" ]; then
    [ -e "/run/netns/$netns" ] || die "network namespace $netns does not exist: ip netns add $netns"
    enter=(nsenter "--net=/run/netns/$netns")
    net=()
  fi
  : >"$state/dockerd.log"
  # shellcheck disable=SC2016  # expanded by the inner shell
  DETOUR_STATE=$state DETOUR_FLAVOUR=$flavour DETOUR_RUNTIME=$lab/runc-without-sys-resource.sh \
    DETOUR_CGROUP=/detour-engine-$(basename "$state")-$(cksum <<<"$state" | cut -d' ' -f1) \
    setsid "${enter[@]}" unshare "${net[@]}" --mount --propagation private --pid --fork --kill-child=KILL --mount-proc \
    bash -c '
      set -e
      # A fresh sysfs shows the devices of this network namespace; the cgroup mounts under the old one are carried over.
      mkdir -p "$DETOUR_STATE/cgroup"
      mount --rbind /sys/fs/cgroup "$DETOUR_STATE/cgroup"
      mount -t sysfs sysfs /sys
      mount --rbind "$DETOUR_STATE/cgroup" /sys/fs/cgroup
      umount -l "$DETOUR_STATE/cgroup"
      mount -t tmpfs -o mode=755 tmpfs /run
      # As systemd leaves it: what the engine mounts in there later, such as the namespaces of containers, reaches containers that
      # have a slave of it.
      mount --make-shared /run
      mkdir -p /run/lock
      ip link set lo up
      echo 0 >/proc/sys/net/ipv4/ip_forward
      if [ -n "$DETOUR_FLAVOUR" ]; then
        mkdir /run/flavour
        for name in iptables iptables-save iptables-restore ip6tables ip6tables-save ip6tables-restore; do
          ln -s "$(command -v "${name%%-*}-$DETOUR_FLAVOUR${name#"${name%%-*}"}")" "/run/flavour/$name"
        done
        PATH=/run/flavour:$PATH
      fi
      # Not the configuration of an engine this host may have, and no service manager that runc could ask. Engines before 24
      # lower their own OOM score, which a host without CAP_SYS_RESOURCE refuses.
      score=
      if dockerd --help | grep -q -e --oom-score-adjust; then score="--oom-score-adjust 0"; fi
      echo "{}" >/run/daemon.json
      # capabilities(7): CAP_SYS_RESOURCE is bit 24.
      if ! (( 0x$(sed -n "s/^CapEff:[[:space:]]*//p" /proc/self/status) >> 24 & 1 )); then
        cp "$DETOUR_RUNTIME" /run/runc-lab
        echo "{\"runtimes\": {\"lab\": {\"path\": \"/run/runc-lab\"}}, \"default-runtime\": \"lab\"}" >/run/daemon.json
      fi
      dockerd --host "unix://$DETOUR_STATE/docker.sock" --host unix:///run/docker.sock --data-root "$DETOUR_STATE/data" \
        --exec-root /run/docker --pidfile /run/docker.pid --exec-opt native.cgroupdriver=cgroupfs --cgroup-parent "$DETOUR_CGROUP" \
        $score --config-file /run/daemon.json "$@" &
      trap "kill -TERM $!" TERM INT
      # The first wait ends at the signal, the second when dockerd is gone. As pid 1 this shell also reaps orphaned shims.
      wait $! || wait $! || true
    ' engine "$@" >"$state/dockerd.log" 2>&1 </dev/null 9>&- &
  local holder=$!
  echo "$holder $(start_time "$holder")" >"$state/holder"
  local deadline=$((SECONDS + start_timeout_s))
  until alive "$state"; do
    if ! same_process "$state/holder" || [ $SECONDS -ge $deadline ]; then
      tail -n 20 "$state/dockerd.log" >&2
      kill_engine "$state"
      die "the engine in $state did not start; its last lines are above, all of them in $state/dockerd.log"
    fi
    sleep 0.1
  done
  local child
  child=$(cat "/proc/$holder/task/$holder/children" 2>/dev/null || pgrep -P "$holder")
  echo "${child%% *}" >"$state/init"
}

users() { # prints how many running commands use our engine, forgetting those that died
  local count=0 file
  for file in "$main_state"/users/*; do
    [ -e "$file" ] || continue
    if same_process "$file"; then count=$((count + 1)); else rm -f "$file"; fi
  done
  echo "$count"
}

system_engine() { # an engine that was there before us: whatever DOCKER_HOST or the default socket says
  [ "${DOCKER_HOST:-}" != "unix://$main_state/docker.sock" ] && command -v docker >/dev/null && timeout 10 docker info >/dev/null 2>&1
}

with_lock() { # two `make` at once must not start two engines on one store
  mkdir -p "$main_state/users"
  exec 9>"$main_state/lock"
  flock 9
  "$@"
  exec 9>&-
}

join_engine() {
  if ! alive "$main_state"; then
    say "no Docker engine answers: starting one in namespaces of its own ($main_state)"
    start_engine "$main_state" '' ''
  fi
  echo "$$ $(start_time $$)" >"$main_state/users/$$"
}

leave_engine() {
  rm -f "$main_state/users/$$"
  if [ "$(users)" = 0 ] && [ -f "$main_state/holder" ]; then
    kill_engine "$main_state"
    say "stopped"
  fi
}

stop_engine() { # $1 state, $2 purge
  kill_engine "$1"
  if [ "$2" = yes ]; then rm -rf --one-file-system "$1"; fi
}

run() { # $1 yes: inside the namespaces
  local inside=$1 status=0
  shift
  [ $# -gt 0 ] || die "usage: engine.sh run -- COMMAND..."
  if system_engine; then
    LAB_ENGINE_INIT=1 "$@" || status=$?
    exit "$status"
  fi
  with_lock join_engine
  trap 'with_lock leave_engine' EXIT
  # The command gets the terminal's Ctrl-C itself; this shell has to outlive it to stop the engine.
  trap : INT
  trap 'kill -TERM $child 2>/dev/null || true' TERM HUP
  local init child
  init=$(cat "$main_state/init")
  export DOCKER_HOST="unix://$main_state/docker.sock" LAB_ENGINE_INIT=$init
  if [ "$inside" = yes ]; then set -- nsenter --target "$init" --net --mount --pid --wd="$PWD" "$@"; fi
  if [ -t 0 ]; then
    # In the foreground, so that the command may read the terminal.
    child=; "$@" || status=$?
  else
    # Without a terminal in the background, so that a signal to this shell reaches it; a background command would otherwise
    # ignore Ctrl-C and lose its input.
    (trap - INT; exec "$@") <&0 &
    child=$!
    wait "$child" || status=$?
    # A trapped signal ends the wait early; the command's own status comes from a second one.
    while kill -0 "$child" 2>/dev/null; do status=0; wait "$child" || status=$?; done
  fi
  exit "$status"
}

command=${1:-}
[ $# -gt 0 ] && shift
netns='' state='' flavour='' purge=no
while [ $# -gt 0 ]; do
  case $1 in
    --netns) netns=$2; shift 2 ;;
    --state) state=$2; shift 2 ;;
    --iptables) flavour=$2; shift 2 ;;
    --purge) purge=yes; shift ;;
    --) shift; break ;;
    *) break ;;
  esac
done

case $command in
  run) run no "$@" ;;
  enter) run yes "$@" ;;
  start)
    { [ -n "$netns" ] && [ -n "$state" ]; } || die "usage: engine.sh start --netns NAME --state DIR [--iptables nft|legacy] [-- DOCKERD-FLAG...]"
    case $flavour in '' | nft | legacy) ;; *) die "--iptables must be nft or legacy, not '$flavour'" ;; esac
    start_engine "$state" "$netns" "$flavour" "$@"
    echo "unix://$state/docker.sock"
    ;;
  stop)
    if [ -n "$state" ]; then stop_engine "$state" "$purge"; else with_lock stop_engine "$main_state" "$purge"; fi
    ;;
  status)
    if system_engine; then say "the engine that docker info answers from: ${DOCKER_HOST:-the default socket}"
    elif alive "$main_state"; then say "our own, running: unix://$main_state/docker.sock, used by $(users)"
    else say "our own, not running: it will be started when needed"; fi
    ;;
  *) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"; [ -z "$command" ] || exit 64 ;;
esac
