"""Clocks and counters of this process, for the benchmarks."""

import time
from pathlib import Path

import torch


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def memory(key: str) -> int:
    """Bytes: VmRSS now, or VmHWM, the most since the last `start_peak`."""
    return 1024 * _count("/proc/self/status", key)


def start_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def io_bytes(key: str) -> int:
    """That this process has read (rchar) or written (wchar) so far."""
    return _count("/proc/self/io", key)


def _count(file: str, key: str) -> int:
    return int(next(line for line in Path(file).read_text().splitlines() if line.startswith(key)).split()[1])


def sent_bytes() -> int:
    """By all that use the network interfaces which this process sees, headers included."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()[2:]
    return sum(int(line.split()[9]) for line in lines)
