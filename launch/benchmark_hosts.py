"""launch/benchmark.py on several hosts with a slow network: network namespaces of this machine, with ranks in each.

    sudo .venv/bin/python launch/benchmark_hosts.py 2 1gbit [arguments of launch/benchmark.py]
    sudo .venv/bin/python launch/benchmark_hosts.py 2x2 1gbit

Needs ip and tc, and the right to make namespaces. What it has made goes when it ends, however it ends.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

from hosts import Hosts, can_make_hosts

HERE = Path(__file__).parent


def hosts_and_ranks(text: str) -> tuple[int, int]:
    hosts, _, ranks = text.partition("x")
    return int(hosts), int(ranks or 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hosts", type=hosts_and_ranks, metavar="HOSTS[xRANKS]", help="how many, and ranks on each")
    parser.add_argument("rate", help="that each may send, as tc has it: 1gbit, 100mbit")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of launch/benchmark.py")
    args = parser.parse_args()
    if not can_make_hosts():
        parser.error("needs ip and tc, and root's right to make network namespaces: start it with sudo")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    count, ranks = args.hosts
    hosts = Hosts(f"za{os.getpid()}", count, args.rate)
    try:
        command = [sys.executable, f"{HERE}/node.py", "--head", hosts.addresses[0], "--nodes", str(count)]
        command += ["--max-restarts", "0", "--per-node", str(ranks), f"{HERE}/benchmark.py", *args.arguments]
        nodes = [hosts.start(index, command) for index in range(count)]
        return max(node.wait() for node in nodes)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        hosts.remove()


if __name__ == "__main__":
    sys.exit(main())
