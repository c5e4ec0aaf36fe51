"""One node of a run on several hosts: start this on each of them, with the same --head, in any order.

    python launch/node.py --head 10.0.0.1 --nodes 2 launch/train.py --checkpoint-dir /shared/checkpoints

It finds this host's address and network interface on the way to the head and becomes torchrun, with the flags and
variables without which a run on several hosts hangs, or does not come back after a fault. IPv4.
"""

import argparse
import fcntl
import os
import socket
import struct
import sys
import time
from collections.abc import Sequence

SIOCGIFADDR = 0x8915  # linux/sockios.h


def address_of(host: str, seconds: float) -> str:
    """Of a host whose name may become known only when it is up."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return socket.gethostbyname(host)
        except socket.gaierror as error:
            if time.monotonic() > deadline:
                sys.exit(f"{host} has no address after {seconds:.0f} s: {error}")
            time.sleep(1)


def own_address(head: str) -> str:
    """The address from which this host reaches the head; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((head, 1))
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                answer = fcntl.ioctl(any_socket, SIOCGIFADDR, request)
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    sys.exit(f"no network interface of this host has the address {address}")


def torchrun_options(arguments: Sequence[str]) -> list[str]:
    """What torchrun needs for the node that these arguments describe; sets the variables that its workers need."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--head", required=True, metavar="HOST", help="the host that the others meet at, one of them")
    parser.add_argument("--nodes", required=True, metavar="N|MIN:MAX", help="how many hosts; a range may lose some")
    parser.add_argument("--port", type=int, default=29500, help="on the head")
    parser.add_argument("--per-node", default="auto", help="processes on this host; auto: one per GPU, or one")
    parser.add_argument("--id", default="zeroadam", help="of the run; another for each that goes on at a time")
    parser.add_argument("--max-restarts", type=int, default=3, help="after faults, from the newest checkpoint")
    parser.add_argument("--wait", type=float, default=300, metavar="SECONDS", help="for the name of the head")
    parser.add_argument("script", help="what all processes run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    args = parser.parse_args(arguments)

    head = address_of(args.head, args.wait)
    if head.startswith("127.") and args.nodes != "1":
        sys.exit(f"--head {args.head} is {head} here: give the address under which other hosts reach it")
    own = own_address(head)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):  # or gloo takes what the hostname is, often loopback
        os.environ.setdefault(variable, interface_of(own))
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # or no node can come back: pytorch#135712
    is_host = "true" if own == head else "false"  # or nobody may open the store
    per_node = args.per_node
    if per_node == "auto":
        import torch

        per_node = str(max(1, torch.cuda.device_count()))
    return [
        f"--nnodes={args.nodes}",
        f"--nproc-per-node={per_node}",
        f"--max-restarts={args.max_restarts}",
        "--rdzv-backend=c10d",
        f"--rdzv-id={args.id}",
        f"--rdzv-endpoint={head}:{args.port}",
        f"--rdzv-conf=is_host={is_host},last_call_timeout=5,keep_alive_interval=3",
        f"--local-addr={own}",
        args.script,
        *args.arguments,
    ]


if __name__ == "__main__":
    command = [sys.executable, "-m", "torch.distributed.run", *torchrun_options(sys.argv[1:])]
    os.execv(sys.executable, command)
