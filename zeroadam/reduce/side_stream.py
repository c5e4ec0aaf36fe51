"""A stream beside that of backward, so that backward's kernels never wait for a reduction."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


class SideStreams:
    """One for each device. Those of a CPU do nothing.

    What runs in `beside` may read and write what the stream of backward has written until then. What it writes is there
    for a stream that calls `join`. Memory that is allocated in `beside` is used in there only.
    """

    def __init__(self) -> None:
        self.streams: dict[torch.device, Any] = {}

    @contextlib.contextmanager
    def beside(self, device: torch.device) -> Iterator[None]:
        module = torch.get_device_module(device)
        if device not in self.streams:
            self.streams[device] = module.Stream(device)
        stream = self.streams[device]
        stream.wait_stream(module.current_stream(device))
        with module.stream(stream):
            yield

    def join(self) -> None:
        """Let the current streams wait for all that was started in `beside`."""
        for device, stream in self.streams.items():
            torch.get_device_module(device).current_stream(device).wait_stream(stream)
