#!/bin/sh
# The gateway of the demo's client: forwards, translates addresses, and sends 20 Mbit/s on each of its three uplinks.
set -eu
rate=20mbit

home=
for device in /sys/class/net/*; do
  device=${device##*/}
  case $(ip -o -4 address show dev "$device") in
    *' 127.0.0.1/'*) ;;
    *' 10.90.0.2/'*) home=$device ;;
    # 50 ms of queue: enough for full throughput, short enough for a modem of today.
    *) tc qdisc replace dev "$device" root tbf rate "$rate" burst 32kb latency 50ms ;;
  esac
done

nft -f - <<RULES
table inet gateway {
  chain forward {
    type filter hook forward priority filter; policy accept;
    # compose/demo/run.ts cuts the direct way by filling this chain.
    jump cut
  }
  chain cut {
  }
  chain leave {
    type nat hook postrouting priority srcnat; policy accept;
    iifname "$home" masquerade
  }
}
RULES
exec sleep infinity
