"""A model with its optimizer as an application has them, to be saved and loaded."""

from typing import Any

import torch
import torch.distributed as dist
from adam_reference import full
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from zeroadam import ZeroAdamW


def application(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optim": optimizer_state}


class Net(nn.Module):
    """Layers that FSDP2 shards unevenly, a tied weight, a buffer, a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.first, self.second = nn.Embedding(13, 6), nn.Linear(6, 7), nn.Linear(7, 6)
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 13, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(6, 6)
        self.frozen.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.second(self.first(self.embed(tokens)).relu())
        return self.head(self.norm(self.frozen(x)))


def build(kind: str, lr: float = 1e-2) -> tuple[nn.Module, torch.optim.Optimizer]:
    net = Net()
    if kind == "fsdp2":
        for layer in (net.first, net.second):
            fully_shard(layer)
        fully_shard(net)
    model = net if kind == "fsdp2" else DistributedDataParallel(net, find_unused_parameters=True)
    decayed = [p for p in model.parameters() if p.dim() > 1 and p.requires_grad]
    others = [p for p in model.parameters() if p.dim() == 1 and p.requires_grad]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0, "lr": lr / 2}]
    cls = ZeroAdamW if kind == "zeroadam" else torch.optim.AdamW
    return model, cls(groups, lr=lr, foreach=True)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int) -> dict[str, Any]:
    """Three steps on the same gradients for every kind; then everything in full."""
    for step in range(first, first + 3):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            grad = torch.randn(p.shape, generator=generator)
            if isinstance(p, DTensor):
                chunk = -(-p.shape[0] // dist.get_world_size())
                piece = grad[dist.get_rank() * chunk : (dist.get_rank() + 1) * chunk]
                grad = torch.zeros_like(p)
                grad.to_local().copy_(piece)
            p.grad = grad if p.requires_grad else None
        optimizer.step()
    app = application(model, optimizer)
    return {
        "model": {k: full(v).clone() for k, v in app["model"].items()},
        "state": {k: {n: full(v).clone() for n, v in s.items()} for k, s in app["optim"]["state"].items()},
        "groups": app["optim"]["param_groups"],
    }
