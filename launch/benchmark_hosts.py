"""launch/benchmark.py on several hosts with a slow network: network namespaces of this machine, one rank in each.

    sudo .venv/bin/python launch/benchmark_hosts.py 2 1gbit [arguments of launch/benchmark.py]

Needs ip and tc, and the right to make namespaces. What it has made goes when it ends, however it ends.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

from hosts import Hosts, can_make_hosts

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hosts", type=int, help="how many")
    parser.add_argument("rate", help="that each may send, as tc has it: 1gbit, 100mbit")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of launch/benchmark.py")
    args = parser.parse_args()
    if not can_make_hosts():
        parser.error("needs ip and tc, and root's right to make network namespaces: start it with sudo")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    hosts = Hosts(f"za{os.getpid()}", args.hosts, args.rate)
    try:
        command = [sys.executable, f"{HERE}/node.py", "--head", hosts.addresses[0], "--nodes", str(args.hosts)]
        command += ["--max-restarts", "0", f"{HERE}/benchmark.py", *args.arguments]
        nodes = [hosts.start(index, command) for index in range(args.hosts)]
        return max(node.wait() for node in nodes)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        hosts.remove()


if __name__ == "__main__":
    sys.exit(main())
