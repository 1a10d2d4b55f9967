#!/busybox sh
# First process of the VM (see vm.sh): makes a root file system of the host's, runs the command that waits in the job share, says
# how it ended, and turns the machine off.
set -eu

b=/busybox
for name in $($b cat /modules/order); do $b insmod "/modules/$name.ko"; done

$b mount -t proc proc /proc
# msize: the most that virtio carries in one request. The host's files hardly change under a test, so what was read once may be kept.
share() { $b mount -t 9p -o "trans=virtio,version=9p2000.L,msize=507904,$3" "$1" "$2"; }
share host /host ro,cache=loose
$b mount -t tmpfs -o size=75% tmpfs /writes
$b mkdir /writes/upper /writes/work
$b mount -t overlay -o lowerdir=/host,upperdir=/writes/upper,workdir=/writes/work overlay /root

r=/root
$b mount -t proc proc $r/proc
$b mount -t sysfs sysfs $r/sys
$b mount -t cgroup2 cgroup2 $r/sys/fs/cgroup
$b mount -t bpf -o mode=700 bpf $r/sys/fs/bpf
$b mount -t debugfs debugfs $r/sys/kernel/debug
$b mount -t tracefs tracefs $r/sys/kernel/tracing
$b mount -t devtmpfs devtmpfs $r/dev
$b mkdir -p $r/dev/pts $r/dev/shm $r/dev/net
$b mount -t devpts -o mode=620,ptmxmode=666 devpts $r/dev/pts
$b mount -t tmpfs -o mode=1777 tmpfs $r/dev/shm
$b ln -s /proc/self/fd $r/dev/fd
# Opening it loads the module.
[ -e $r/dev/net/tun ] || $b mknod $r/dev/net/tun c 10 200

# Not the host's: what a test finds there must not depend on what else runs on the host. But the tree may be in one of them.
share job /job cache=none
tree=$($b cat /job/tree)
$b mkdir -p /tree
$b mount --bind "$r$tree" /tree
$b mount -t tmpfs -o mode=1777 tmpfs $r/tmp
$b mount -t tmpfs -o mode=755 tmpfs $r/run
$b mkdir -p "$r$tree" $r/run/job $r/run/lock
$b mount --move /tree "$r$tree"
$b mount --move /job $r/run/job
# What tests leave for whoever reads it afterwards.
share out "$r$tree/out" cache=none

release=$($b uname -r)
$b mkdir -p "$r/lib/modules/$release"
$b mount --bind "/host$($b cat $r/run/job/modules)/$release" "$r/lib/modules/$release"

$b hostname vm
$b ip link set lo up
ulimit -n 65536

# The kernel's own calls of modprobe follow the first process to its new root.
exec $b switch_root $r /bin/bash -c '
  bash /run/job/command </dev/null >>/run/job/stdout 2>>/run/job/stderr
  echo $? >/run/job/status
  sync
  echo o >/proc/sysrq-trigger
  # The first process must not end before the machine is off.
  exec sleep infinity'
