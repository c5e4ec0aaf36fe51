"""Several hosts on one machine, for slow networks and faults: network namespaces, joined by a bridge.

Needs root, ip and tc.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from typing import Any


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


def can_make_hosts() -> bool:
    return os.geteuid() == 0 and shutil.which("ip") is not None and shutil.which("tc") is not None


class Hosts:
    """NAME-0, NAME-1, ... with the addresses 10.77.0.10, .11, ...; those of other names are on another network.

    Args:
        name: short, and of no other namespaces.
        rate: that each may send, as tc has it, such as 1gbit.
    """

    def __init__(self, name: str, count: int, rate: str | None = None) -> None:
        self.switch = f"{name}-switch"
        self.names = [f"{name}-{index}" for index in range(count)]
        self.addresses = [f"10.77.0.{10 + index}" for index in range(count)]
        try:
            ip("netns", "add", self.switch)
            ip("-n", self.switch, "link", "add", "bridge0", "type", "bridge")
            ip("-n", self.switch, "link", "set", "bridge0", "up")
            for host, address in zip(self.names, self.addresses, strict=True):
                port = f"port{address.rpartition('.')[2]}"
                ip("netns", "add", host)
                ip("-n", host, "link", "set", "lo", "up")
                ip("link", "add", "eth0", "netns", host, "type", "veth", "peer", "name", port, "netns", self.switch)
                ip("-n", self.switch, "link", "set", port, "master", "bridge0", "up")
                ip("-n", host, "addr", "add", f"{address}/24", "dev", "eth0")
                ip("-n", host, "link", "set", "eth0", "up")
                if rate:
                    limit = ["rate", rate, "burst", "256kb", "latency", "20ms"]
                    subprocess.run(["tc", "-n", host, "qdisc", "add", "dev", "eth0", "root", "tbf", *limit], check=True)
        except BaseException:
            self.remove()
            raise

    def start(self, index: int, command: Sequence[str], **options: Any) -> "subprocess.Popen[str]":
        """A process on a host, in a session of its own."""
        environment = {**options.pop("env", os.environ), **self.variables(index)}
        command = ["ip", "netns", "exec", self.names[index], *command]
        return subprocess.Popen(command, text=True, env=environment, start_new_session=True, **options)

    def variables(self, index: int) -> dict[str, str]:
        """The namespaces have memory in common, which hosts have not, so zeroadam gets a name of the host."""
        return {"ZEROADAM_SHARED_MEMORY": self.names[index]}

    def set_link(self, index: int, state: str) -> None:
        """Join a host to the others ("up"), or cut it off ("down")."""
        ip("-n", self.names[index], "link", "set", "eth0", state)

    def kill(self, index: int) -> None:
        """All processes of a host, as when its power fails."""
        for pid in ip("netns", "pids", self.names[index]).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def remove(self) -> None:
        existing = {line.split()[0] for line in ip("netns", "list").splitlines()}
        for index, host in enumerate(self.names):
            if host in existing:
                self.kill(index)
                ip("netns", "del", host)
        if self.switch in existing:
            ip("netns", "del", self.switch)
