"""launch/node.py on several hosts, which are network namespaces of this machine joined by a bridge."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from agent import workers_of
from commands import ROOT, SMALL, environment, final, newest_step, on_one_host, torchrun, until
from forked import Node
from hosts import Hosts, can_make_hosts
from patience import at_most
from train import GPT, batch, loss_of, read_text

pytestmark = pytest.mark.skipif(not can_make_hosts(), reason="needs root, ip and tc for network namespaces")


def start(
    hosts: Hosts,
    index: int,
    nodes: str,
    log: Path,
    *arguments: str,
    options: Sequence[str] = (),
    anew: bool = False,
) -> "Node | subprocess.Popen[str]":
    """A node on a host; appends to the log. anew: whether each of its processes imports torch itself."""
    arguments = ("--head", hosts.addresses[0], "--nodes", nodes, *options, f"{ROOT}/launch/train.py", *arguments)
    if not anew:
        return Node(hosts, index, log, arguments, environment(log.parent))
    with log.open("a") as file:
        command = [sys.executable, f"{ROOT}/launch/node.py", *arguments]
        return hosts.start(index, command, stdout=file, stderr=file, env=environment(log.parent))


@pytest.mark.parametrize("count", [2, 4])
def test_several_hosts_train_as_one_does(make_hosts: Callable[[int], Hosts], count: int, tmp_path: Path) -> None:
    """The same losses, to the bit, as of so many ranks on one host."""
    hosts = make_hosts(count)
    arguments = [*SMALL, "--steps", "20", "--hook", "reduce_scatter", "--gather-in-forward"]
    nodes = [
        start(
            hosts, i, str(count), tmp_path / f"log{i}", *arguments, "--json", f"{tmp_path}/hosts.json", anew=count == 2
        )
        for i in reversed(range(count))
    ]
    for node in nodes:
        assert node.wait(timeout=at_most(60)) == 0, (tmp_path / "log0").read_text()
    found, expected = json.loads((tmp_path / "hosts.json").read_text()), on_one_host(count, tmp_path, *arguments)
    assert found["losses"] == expected["losses"]
    assert found["held_out"] == expected["held_out"]


def test_two_ranks_on_each_of_two_hosts(make_hosts: Callable[[int], Hosts], tmp_path: Path) -> None:
    """They train as four on one host do, but for the order of sums; when the link is cut all of them end in time."""
    hosts = make_hosts(2)
    arguments = [*SMALL, "--steps", "20", "--hook", "reduce_scatter", "--gather-in-forward", "--timeout", "5"]
    options, file = ["--per-node", "2", "--max-restarts", "0"], tmp_path / "hosts.json"

    def start_both(*more: str) -> list[Any]:
        return [start(hosts, i, "2", tmp_path / f"log{i}", *arguments, *more, options=options) for i in range(2)]

    for node in start_both("--json", str(file)):
        assert node.wait(timeout=at_most(60)) == 0, (tmp_path / "log0").read_text()
    found, expected = json.loads(file.read_text()), on_one_host(4, tmp_path, *arguments)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)

    checkpoints = tmp_path / "checkpoints"
    nodes = start_both("--steps", "100000", "--checkpoint-dir", str(checkpoints), "--checkpoint-every", "10")
    until(lambda: newest_step(checkpoints) >= 10, 60)
    hosts.set_link(1, "down")
    begin = time.monotonic()
    until(lambda: not any(workers_of(node.pid) for node in nodes), 30)
    print(f"all ended {time.monotonic() - begin:.1f} s after the link was cut")


def test_a_killed_worker_and_a_killed_head_cost_the_steps_since_the_last_checkpoint(
    make_hosts: Callable[[int], Hosts], tmp_path: Path
) -> None:
    """Both nodes start their workers again; without the head the run ends, and goes on when it is started again. It
    ends with the losses of a run in which nothing happened, to the bit."""
    hosts = make_hosts(2)
    arguments = [*SMALL, "--steps", "400", "--hook", "reduce_scatter", "--checkpoint-every", "10", "--timeout", "20"]
    arguments += ["--eval-every", "400"]
    checkpoints, log = tmp_path / "checkpoints", tmp_path / "log0"
    own = ["--checkpoint-dir", str(checkpoints), "--json", f"{tmp_path}/hosts.json"]

    def start_both() -> list[Any]:
        return [start(hosts, i, "2", tmp_path / f"log{i}", *arguments, *own) for i in range(2)]

    nodes = start_both()
    until(lambda: newest_step(checkpoints) >= 10, 60)
    os.kill(workers_of(nodes[1].pid)[0], signal.SIGKILL)
    until(lambda: log.read_text().count("resumed after step") == 1, 60)
    hosts.kill(0)
    assert all(node.wait(timeout=at_most(30)) != 0 for node in nodes)
    nodes = start_both()
    for index, node in enumerate(nodes):
        assert node.wait(timeout=at_most(60)) == 0, (tmp_path / f"log{index}").read_text()
    assert log.read_text().count("resumed after step") == 2
    found = json.loads((tmp_path / "hosts.json").read_text())
    assert found["losses"] == on_one_host(2, tmp_path, *arguments)["losses"]


def test_a_host_that_is_cut_off_or_dies_comes_back(make_hosts: Callable[[int], Hosts], tmp_path: Path) -> None:
    """The other goes on alone from the newest checkpoint; then both do, twice, and end with a loss in line."""
    hosts = make_hosts(2)
    size = {"width": 128, "layers": 2, "heads": 2, "context": 64}
    arguments = [part for name, number in size.items() for part in (f"--{name}", str(number))]
    arguments += ["--batch-size", "12", "--data", str(ROOT / "zeroadam"), "--sample", "20", "--eval-every", "5000"]
    arguments += ["--steps", "400", "--hook", "reduce_scatter", "--checkpoint-every", "20"]
    checkpoints, log = tmp_path / "hosts", tmp_path / "log0"
    own = ["--checkpoint-dir", str(checkpoints), "--timeout", "5"]

    def worlds() -> list[str]:
        return re.findall(r"(\d) ranks, ", log.read_text())

    nodes = [start(hosts, i, "1:2", tmp_path / f"log{i}", *arguments, *own) for i in range(2)]
    until(lambda: newest_step(checkpoints) >= 40, 60)
    hosts.set_link(1, "down")
    until(lambda: worlds() == ["2", "1"], 90)
    hosts.set_link(1, "up")
    until(lambda: worlds() == ["2", "1", "2"], 60)
    hosts.kill(1)
    nodes[1].wait()
    until(lambda: worlds() == ["2", "1", "2", "1"], 90)
    nodes[1] = start(hosts, 1, "1:2", tmp_path / "log1", *arguments, *own)
    until(lambda: worlds() == ["2", "1", "2", "1", "2"], 60)
    for index, node in enumerate(nodes):
        assert node.wait(timeout=at_most(60)) == 0, (tmp_path / f"log{index}").read_text()
    assert newest_step(checkpoints) == 400
    found = [loss_after(checkpoints, size)]
    for world_size in (2, 1):
        folder = tmp_path / f"undisturbed{world_size}"
        command = [f"{ROOT}/launch/train.py", *arguments, "--checkpoint-dir", str(folder)]
        done = torchrun(world_size, *command)
        assert done.returncode == 0, done.stderr
        found.append(loss_after(folder, size))
    assert 0.95 * found[1] < found[0] < 1.05 * found[2], found  # with batches of two ranks, and of one


def loss_after(folder: Path, size: dict[str, int]) -> float:
    """Of the newest checkpoint, on windows of the text it was trained on."""
    windows = batch(read_text(ROOT / "zeroadam"), range(200), size["context"], seed=1, device=torch.device("cpu"))
    gpt = GPT(**size)
    gpt.load_state_dict(final(folder)["model"])
    with torch.no_grad():
        return loss_of(gpt, windows).item()
