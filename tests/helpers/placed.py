"""A model, its batches on each rank, and what comes of it if the sums over the ranks are taken in the stated order."""

from typing import Any

import torch
from torch import Tensor, nn

from zeroadam import bf16_reduce_scatter_hook, reduce_scatter_hook

HOOKS = {"none": None, "same": reduce_scatter_hook, "bfloat16": bf16_reduce_scatter_hook}
ADAMW: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "fused": False}


class Net(nn.Module):
    """Large and small layers, an odd one, a 0-d parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(300, 521), nn.ReLU(), nn.Linear(521, 7), nn.Linear(7, 3))
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * self.scale


def batch_of(rank: int, step: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(5, 300, generator=torch.Generator().manual_seed(100 * step + rank)).to(dtype)


def hosts_of(placement: str) -> list[list[int]]:
    return [[r for r, name in enumerate(placement) if name == host] for host in dict.fromkeys(placement)]


def sum_over(placement: str, rows: list[Tensor], exact: bool = False) -> Tensor:
    """The ranks of a host in rank order, hosts in the order of their first rank, all in float32 at least."""
    partials = []
    for ranks in hosts_of(placement):
        partial = rows[ranks[0]].to(torch.promote_types(rows[0].dtype, torch.float32))
        for r in ranks[1:]:
            partial = partial + rows[r]
        partials.append(partial if exact else partial.to(rows[0].dtype).to(partial.dtype))
    total = partials[0]
    for partial in partials[1:]:
        total = total + partial
    return total


def expected_after(placement: str, hook: str, dtype: torch.dtype, exact: bool = False) -> list[list[Tensor]]:
    """The gradients, [d0, ...] summed over all ranks, in each step, and the parameters at the end; one process."""
    net = Net().to(dtype)
    optimizer = torch.optim.AdamW(net.parameters(), **ADAMW)
    found = []
    for step in range(5):
        of_ranks: list[list[Tensor]] = []
        for rank in range(len(placement)):
            optimizer.zero_grad()
            net(batch_of(rank, step, dtype)).square().sum().backward()
            of_ranks.append([param.grad for param in net.parameters()])
        sums = []
        for param, grads in zip(net.parameters(), zip(*of_ranks, strict=True), strict=True):
            sent = [grad.to(torch.bfloat16 if hook == "bfloat16" else dtype) for grad in grads]
            sums.append(sum_over(placement, sent, exact).to(dtype))
            param.grad = sums[-1] / len(placement)
        found.append(sums)
        optimizer.step()
    return [*found, [param.detach() for param in net.parameters()]]
