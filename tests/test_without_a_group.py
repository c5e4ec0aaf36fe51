"""Without torchrun, in one process and with no process group, ZeroAdamW is AdamW."""

import copy
import io
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from patience import at_most
from state_checks import equal
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import zeroadam
from zeroadam import GradScaler, ZeroAdamW, checkpoint

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "fused": {"fused": True},
    "amsgrad": {"amsgrad": True},
    "master": {"master_dtype": torch.float32},
    "bfloat16 moments": {"state_dtype": torch.bfloat16},
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(20, 7)).to(memory_format=torch.channels_last)


def train(net: nn.Module, optimizer: Any, steps: int) -> None:
    for step in range(steps):
        torch.manual_seed(step)
        net(torch.randn(2, 3, 4, 4)).square().sum().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("case", CASES)
def test_it_is_adamw(case: str, tmp_path: Path) -> None:
    assert not dist.is_initialized()
    nets = [network() for _ in range(2)]
    options = {"lr": 1e-2, "fused": False, **CASES[case]}
    ours = ZeroAdamW(nets[0].parameters(), **options)
    theirs = {key: value for key, value in options.items() if "dtype" not in key}
    plain = torch.optim.AdamW(nets[1].parameters(), **theirs)
    for net, optimizer in zip(nets, (ours, plain), strict=True):
        train(net, optimizer, 3)
    if case != "bfloat16 moments":
        assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))
        assert equal(ours.state_dict(), plain.state_dict())
        ours.load_state_dict(plain.state_dict())
    # Saved and loaded in every way, and copied, it goes on alike.
    again = ZeroAdamW(nets[0].parameters(), **options)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file))
    assert equal(again.state_dict(), ours.state_dict())
    zeroadam.save({"optimizer": ours}, tmp_path / "file.pt")
    again.load_state_dict(torch.load(tmp_path / "file.pt")["optimizer"])
    model_state, state = get_state_dict(nets[0], ours)
    dcp.save({"model": model_state, "optim": state}, checkpoint_id=tmp_path / "folder", no_dist=True)
    loaded = dict(zip(("model", "optim"), get_state_dict(nets[0], again), strict=True))
    checkpoint.load(loaded, checkpoint_id=tmp_path / "folder")
    set_state_dict(nets[0], again, model_state_dict=loaded["model"], optim_state_dict=loaded["optim"])
    assert equal(again.state_dict(), ours.state_dict())
    net, copied = copy.deepcopy((nets[0], again))
    train(net, copied, 2)
    train(nets[0], again, 2)
    assert all(map(torch.equal, net.parameters(), nets[0].parameters()))
    assert again.grads_are_finite()
    assert again.clip_grad_norm_(1.0) == 0


def test_a_scaler_skips_what_is_infinite() -> None:
    net = network()
    optimizer, scaler = ZeroAdamW(net.parameters()), GradScaler("cpu", init_scale=2.0)
    before = copy.deepcopy(list(net.parameters()))
    scaler.scale(net(torch.full((1, 3, 4, 4), torch.inf)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1.0
    assert all(map(torch.equal, before, net.parameters()))


def test_several_processes_without_a_group_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would train a model of its own."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="there is no process group: call"):
        ZeroAdamW(network().parameters())


@pytest.mark.slow
def test_one_script_runs_both_ways(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
            import torch
            from zeroadam import ZeroAdamW
            torch.manual_seed(0)
            net = torch.nn.Linear(5, 4)
            optimizer = ZeroAdamW(net, lr=0.1)
            for step in range(3):
                net(torch.ones(2, 5)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            print(net.weight.sum().item(), type(optimizer.state[net.weight]["exp_avg"]).__name__)
        """)
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=at_most(60))
    assert done.stdout.endswith(" Tensor\n"), done.stderr
