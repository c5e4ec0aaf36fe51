"""Parameters of every kind, and the same steps by our optimizer and by torch's."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from zeroadam import ZeroAdam, ZeroAdamW
from zeroadam.transport.backend import Backend
from zeroadam.transport.gloo import Gloo
from zeroadam.transport.shared_memory import SharedMemory

STEPS = 6


PLAIN = {ZeroAdam: torch.optim.Adam, ZeroAdamW: torch.optim.AdamW}


def parameters() -> list[nn.Parameter]:
    """Every shape, order and kind; the same on every rank, which from here on packs pieces below 32 KiB only.

    With the 256 KiB of the transports what travels directly would take most of a test's time.
    """
    for transport in (Backend, Gloo, SharedMemory):
        transport.rules = transport.rules._replace(direct_bytes=2**15)
    torch.manual_seed(0)
    tensors = [
        torch.randn(()),
        torch.randn(7),
        torch.randn(1),
        torch.randn(2, 6),  # dimension 0 is shorter than W = 3 and 4
        torch.randn(0, 5),
        torch.randn(200, 192),  # travels directly
        torch.randn(201, 192),  # and cannot be cut evenly
        torch.randn(3, 4096),  # cut along dimension 1 at W = 2 and 4
        torch.randn(8, 3, 5, 5).to(memory_format=torch.channels_last),
        torch.randn(64, 64, 3, 3).to(memory_format=torch.channels_last),
        torch.randn(9, 4).t(),
        torch.randn(9, 8)[:, ::2],
        torch.randn(33, 5).to(torch.bfloat16),
        torch.randn(330, 120).to(torch.bfloat16),  # at W = 2 only
        torch.randn(17, 3).to(torch.float16),
        torch.randn(5, 5).to(torch.float64),
    ]
    return [nn.Parameter(tensor) for tensor in tensors]


def dense(params: list[nn.Parameter]) -> list[nn.Parameter]:
    """Copies without gaps in memory: torch's fused CPU kernel computes nonsense for a parameter that has gaps."""
    return [nn.Parameter(torch.empty_like(param).copy_(param)) for param in params]


def set_gradients(step: int, *lists: list[nn.Parameter]) -> None:
    """The same gradients for every list, as if averaged over the ranks already."""
    generator = torch.Generator().manual_seed(step)
    for params in zip(*lists, strict=True):
        grad = torch.randn(params[0].shape, generator=generator)
        for param in params:
            param.grad = torch.empty_like(param).copy_(grad)


def full(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def mine(value: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's piece of a tensor of state, and what is to be there of a whole one, where DTensor says that it lies.

    As each rank looks at its own, all of it is looked at, and nothing travels.
    """
    if not isinstance(value, DTensor):
        return value, whole
    assert value.shape == whole.shape
    shape, offset = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
    cut = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
    return value.to_local(), whole[cut]


def assert_same(
    ours: torch.optim.Optimizer, plain: torch.optim.Optimizer, rtol: float = 0.0, atol: float = 0.0
) -> None:
    for group, plain_group in zip(ours.param_groups, plain.param_groups, strict=True):
        for p, q in zip(group["params"], plain_group["params"], strict=True):
            torch.testing.assert_close(p, q, rtol=rtol, atol=atol)
            for key, value in plain.state[q].items():
                torch.testing.assert_close(
                    *mine(ours.state[p][key], value), rtol=rtol, atol=atol, msg=lambda m, k=key: f"{k}: {m}"
                )


def assert_same_on_all_ranks(params: list[Any]) -> None:
    for param in params:
        others = [torch.empty_like(param).contiguous() for _ in range(dist.get_world_size())]
        dist.all_gather(others, param.detach().contiguous())
        assert all(torch.equal(other, param) for other in others)


def train_both(cls: type[ZeroAdam], options: dict[str, Any], rtol: float = 0.0, atol: float = 0.0) -> None:
    params, theirs = parameters(), parameters()

    if options.get("fused"):
        theirs = dense(theirs)

    def groups(some: list[nn.Parameter]) -> list[dict[str, Any]]:
        decayed = [p for p in some[::2] if p.itemsize >= 4 or cls is ZeroAdamW]
        others = [p for p in some if not any(p is q for q in decayed)]
        return [{"params": decayed, "weight_decay": 0.1}, {"params": others, "lr": 3e-3, "weight_decay": 0.0}]

    ours = cls(groups(params), lr=1e-2, eps=1e-6, bucket_cap_mb=0.125, **options)
    plain = PLAIN[cls](groups(theirs), lr=1e-2, eps=1e-6, **options)
    for step in range(STEPS):
        set_gradients(step, params, theirs)
        ours.step()
        plain.step()
    assert_same(ours, plain, rtol, atol)
    gathered, expected = full(ours.state[params[6]]["exp_avg"]), plain.state[theirs[6]]["exp_avg"]
    torch.testing.assert_close(gathered, expected, rtol=rtol, atol=atol)
    assert_same_on_all_ranks(params)
