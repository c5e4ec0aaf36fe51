"""Under DistributedDataParallel the numbers are those of DDP + torch.optim.AdamW, to the bit."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from on_a_backend import on_a_backend
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from zeroadam import ZeroAdamW


class Net(nn.Module):
    """Convolution in channels_last, tied weights, a 0-d parameter, one that is used now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.embedding = nn.Embedding(11, 37)
        self.hidden = nn.Linear(37, 37)
        self.sometimes = nn.Linear(37, 37)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.head = nn.Linear(37, 11)
        self.head.weight = self.embedding.weight
        self.to(memory_format=torch.channels_last)

    def forward(self, image: Tensor, token: Tensor, *, sometimes: bool) -> Tensor:
        x = self.hidden(self.embedding(token)) + self.conv(image).mean() * self.scale
        if sometimes:
            x = x + self.sometimes(x)
        return nn.functional.cross_entropy(self.head(torch.tanh(x)), token.roll(1))


def train(zero: bool, options: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(0)
    model = DistributedDataParallel(Net(), find_unused_parameters=True, gradient_as_bucket_view=True)
    decay = [p for p in model.parameters() if p.dim() > 1]
    groups = [{"params": decay}, {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0}]
    optimizer = (ZeroAdamW if zero else torch.optim.AdamW)(groups, lr=1e-2, weight_decay=0.1, **options)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=20)
    data = torch.Generator().manual_seed(dist.get_rank())
    for step in range(20):
        for micro in range(2):
            image = torch.randn(2, 3, 6, 6, generator=data).to(memory_format=torch.channels_last)
            token = torch.randint(0, 11, (5,), generator=data)
            with model.no_sync() if micro == 0 else nullcontext():
                model(image, token, sometimes=step % 3 == 0).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return [param.detach() for param in model.parameters()]


def train_both(options: dict[str, Any], atol: float) -> None:
    for param, expected in zip(train(True, options), train(False, options), strict=True):
        torch.testing.assert_close(param, expected, rtol=0, atol=atol)
        first = param.clone(memory_format=torch.contiguous_format)
        dist.broadcast(first, 0)
        assert torch.equal(first, param)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("options", [{"fused": False}, {"foreach": True}], ids=str)
def test_bitwise_equal_to_ddp_with_adamw(run_ranks, options: dict[str, Any], world_size: int) -> None:
    run_ranks(train_both, world_size, options, 0.0)


@on_a_backend(1, 2, 3, 4)
def test_bitwise_equal_to_ddp_with_adamw_on_the_code_path_of_nccl(run_ranks, transport: str, world_size: int) -> None:
    run_ranks(train_both, world_size, {"foreach": True}, 0.0, transport=transport)


@pytest.mark.parametrize("world_size", [2, 3])
def test_fused_is_equal_up_to_rounding(run_ranks, world_size: int) -> None:
    """Differences of one unit in the last place (1e-7) that 20 steps of training carry on."""
    run_ranks(train_both, world_size, {"fused": True}, 1e-5)
