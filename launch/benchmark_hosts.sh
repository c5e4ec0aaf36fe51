#!/usr/bin/env bash
# launch/benchmark.py on several hosts with a slow network: network namespaces of this machine, one rank in each.
#
#     sudo launch/benchmark_hosts.sh 2 1gbit [arguments of launch/benchmark.py]
#
# Needs ip and tc, and the right to make namespaces. What it has made goes when it ends, however it ends.
set -euo pipefail

usage="usage: $0 HOSTS RATE [arguments of launch/benchmark.py], for example: $0 2 1gbit --steps 10"
hosts=${1:?$usage}
rate=${2:?$usage}
shift 2
here=$(cd "$(dirname "$0")" && pwd)
name=za$$
port=29500
processes=()

clean() {
  for process in "${processes[@]}"; do kill "$process" 2>/dev/null || true; done
  wait
  for ((i = 0; i < hosts; i++)); do ip netns del "$name-$i" 2>/dev/null || true; done
  ip netns del "$name-switch" 2>/dev/null || true
}
trap clean EXIT
trap 'exit 130' INT TERM

ip netns add "$name-switch"
ip -n "$name-switch" link add bridge0 type bridge
ip -n "$name-switch" link set bridge0 up
for ((i = 0; i < hosts; i++)); do
  ip netns add "$name-$i"
  ip -n "$name-$i" link set lo up
  ip link add eth0 netns "$name-$i" type veth peer name "port$i" netns "$name-switch"
  ip -n "$name-switch" link set "port$i" master bridge0 up
  ip -n "$name-$i" addr add "10.77.0.$((10 + i))/24" dev eth0
  ip -n "$name-$i" link set eth0 up
  tc -n "$name-$i" qdisc add dev eth0 root tbf rate "$rate" burst 256kb latency 20ms
done

export OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=eth0 ZEROADAM_SHARED_MEMORY=0 # the namespaces do have memory in common
for ((i = 0; i < hosts; i++)); do
  ip netns exec "$name-$i" "${TORCHRUN:-torchrun}" --nnodes="$hosts" --nproc-per-node=1 --rdzv-id=benchmark \
    --rdzv-backend=c10d --rdzv-endpoint="10.77.0.10:$port" --rdzv-conf="is_host=$([ "$i" = 0 ] && echo true || echo false)" \
    --local-addr="10.77.0.$((10 + i))" "$here/benchmark.py" "$@" &
  processes+=($!)
done
for process in "${processes[@]}"; do wait "$process"; done
