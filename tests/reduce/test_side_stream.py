"""On which stream gradients are packed, sent and unpacked, and who waits for whom."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from zeroadam import ZeroAdamW
from zeroadam.reduce.grad_bucket import GradBucket
from zeroadam.reduce.hook import Reduction

events: list[str] = []


class Stream:
    """A stream that says what it is asked to do."""

    def __init__(self, _device: Any = None, name: str = "side") -> None:
        self.name = name

    def wait_stream(self, other: "Stream") -> None:
        if other is not self:
            events.append(f"{self.name} waits for {other.name}")


class Device:
    """Stands in for torch.cuda."""

    Stream = Stream

    def __init__(self) -> None:
        self.streams = [Stream(name="backward")]

    def current_stream(self, _device: Any) -> Stream:
        return self.streams[-1]

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.streams.append(stream)
        yield
        self.streams.pop()


def one_backward(bucket_cap_mb: float) -> None:
    device = Device()
    torch.get_device_module = lambda *_: device
    net = nn.Sequential(*(nn.Linear(101, 101) for _ in range(12)))  # no piece of it is sent from where it lies
    model = DistributedDataParallel(net, gradient_as_bucket_view=True, bucket_cap_mb=bucket_cap_mb)
    optimizer = ZeroAdamW(model)

    def noted(cls: Any, name: str) -> None:
        method = getattr(cls, name)

        def call(self: Any, *args: Any) -> Any:
            events.append(f"{name} on {device.streams[-1].name}")
            return method(self, *args)

        setattr(cls, name, call)

    for cls, name in ((GradBucket, "start"), (GradBucket, "finish"), (Reduction, "finish")):
        noted(cls, name)
    for _ in range(3):
        events.clear()
        model(torch.ones(1, 101)).sum().backward()
        ended = events.index("finish on backward")  # of the whole reduction
        during, after = events[:ended], events[ended + 1 :]
        assert "backward waits for side" not in during
        assert "start on backward" not in events
        for index, event in enumerate(during):
            if event.startswith("start"):  # what backward has written is there
                assert "side waits for backward" in during[:index]
        assert after[-1] == "backward waits for side"
        assert [event for event in events if event.startswith("finish")].count("finish on backward") == 1
        optimizer.step()
        optimizer.zero_grad()
    assert sum(event.startswith("start") for event in events) > 3, "staging memory was used again"
    assert "finish on side" in during


def test_the_stream_of_backward_waits_at_its_end_only(run_ranks: Any) -> None:
    for transport in ("backend", "shared memory"):
        run_ranks(one_backward, 2, 0.1, transport=transport)
