"""Training goes on: resumed, with damaged checkpoints, with workers killed again and again, with a host less."""

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from agent import Agent, kill
from commands import ROOT, RUN_SECONDS, SMALL, TORCHRUN, environment, final, torchrun, until, whole, zeroadam
from patience import at_most
from soak import newest_step
from state_checks import equal
from train import GPT, batch, loss_of, read_text

TRAIN = [f"{ROOT}/launch/train.py", *SMALL]


def losses(text: str) -> list[str]:
    """At the end, and held out before and after, as the closing table prints them."""
    return [cell.strip() for cell in next(line for line in text.splitlines() if line.startswith("│ ")).split("│")[1:4]]


@pytest.mark.parametrize(
    ("options", "world_sizes"),
    [
        (["--optimizer", "adamw"], [2]),
        (["--hook", "reduce_scatter"], [2, 3, 1]),
        (["--hook", "none"], [3]),  # from three ranks on the order of DDP's sums depends on its buckets
        (["--hook", "none"], [4]),
    ],
    ids=str,
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, options: list[str], world_sizes: list[int]) -> None:
    """To the bit at the same number of ranks, in the report as well; at another it goes on and ends in line."""
    folder = tmp_path / "run"
    saving = ["--checkpoint-dir", str(folder), "--checkpoint-every", "10", "--checkpoint-keep", "9"]
    command = [*TRAIN, *options, *saving, "--steps", "30"]
    straight = torchrun(world_sizes[0], *command)
    assert straight.returncode == 0, straight.stderr
    expected = final(folder)
    assert [path.name for path in whole(folder)] == ["step-00000010", "step-00000020", "step-00000030"]
    for world_size in world_sizes:
        for newer in whole(folder)[1:]:
            shutil.rmtree(newer)
        resumed = torchrun(world_size, *command)
        assert resumed.returncode == 0, resumed.stderr
        assert "resumed after step 10" in resumed.stdout
        found = final(folder)
        if world_size == world_sizes[0]:
            assert losses(resumed.stdout) == losses(straight.stdout)
            assert equal(found, expected)
        assert text_loss(found["model"]) == pytest.approx(text_loss(expected["model"]), rel=0.05)


def test_another_optimizer_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    """zeroadam, then AdamW, then zeroadam again: as if there had been one all the time, to the bit."""
    command = [*TRAIN, "--checkpoint-dir", str(tmp_path / "run"), "--checkpoint-every", "5", "--steps", "20"]
    command += ["--checkpoint-keep", "3"]
    straight = torchrun(2, *command)
    expected = final(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "step-00000015")
    for optimizer, start in (("adamw", 10), ("zeroadam", 15)):
        shutil.rmtree(tmp_path / "run" / "step-00000020")
        other = torchrun(2, *command, "--optimizer", optimizer)
        assert other.returncode == 0, other.stderr
        assert f"resumed after step {start}" in other.stdout
        assert losses(other.stdout) == losses(straight.stdout)
        found = final(tmp_path / "run")
        assert equal(found["optimizer"]["state"], expected["optimizer"]["state"])
        assert equal(found["model"], expected["model"])


def test_a_damaged_checkpoint_is_passed_over_and_set_aside(tmp_path: Path) -> None:
    command = [*TRAIN, "--checkpoint-dir", str(tmp_path), "--checkpoint-every", "5", "--steps", "15"]
    assert torchrun(2, *command).returncode == 0
    (tmp_path / "step-00000003.tmp").mkdir()  # as if cut off while writing
    file = next((tmp_path / "step-00000015").glob("__1_*.distcp"))
    file.write_bytes(file.read_bytes()[:-1000])
    again = torchrun(2, *command)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count(f"a checkpoint is passed over: {tmp_path}/step-00000015 is damaged: {file.name} has") == 1
    assert "resumed after step 10" in again.stdout
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".lock", "step-00000010", "step-00000015", "step-00000015.set-aside-0"]

    fresh = torchrun(2, *command, "--resume", "none")
    assert fresh.returncode == 0, fresh.stderr
    assert "resumed" not in fresh.stdout
    assert len(list(tmp_path.glob("*.set-aside-?"))) == 3

    other = torchrun(2, *command, "--width", "64")
    assert other.returncode != 0
    assert other.stderr.count("train.py: error: cannot resume: ") == 1
    assert len(whole(tmp_path)) == 2
    nowhere = torchrun(2, *command, "--resume", f"{tmp_path}/nowhere")
    assert nowhere.returncode != 0
    assert nowhere.stderr.count("nowhere holds no checkpoint") == 1


def test_a_full_disk_is_reported_and_does_not_end_the_training(tmp_path: Path) -> None:
    """A limit on the size of files stands in for it. The exit status tells that the last checkpoint is not there."""
    command = [*TORCHRUN, "--nproc-per-node=2", *TRAIN, "--steps", "20", "--checkpoint-dir", f"{tmp_path}/run"]
    limited = ["bash", "-c", 'ulimit -f 40; trap "" XFSZ; exec "$@"', "bash", *command, "--checkpoint-every", "10"]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=at_most(40), env=environment(tmp_path))
    assert done.returncode != 0
    assert done.stderr.count("no checkpoint of step ") == 2, done.stderr
    assert len(losses(done.stdout)) == 3
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="workers are found by Linux's /proc")
def test_one_run_in_a_folder(tmp_path: Path) -> None:
    """A second start is refused beside the first, and not any more when that is killed: its workers end with it."""
    options = ["--standalone", "--nproc-per-node=2", *TRAIN, "--steps", "100000", "--checkpoint-every", "5"]
    options += ["--checkpoint-dir", f"{tmp_path}/run"]
    with Agent(tmp_path / "log", *options) as first:
        first.wait_for(lambda: newest_step(tmp_path / "run") > 5)
        refused = torchrun(2, *options[2:])
        assert refused.returncode != 0
        assert refused.stderr.count("writes checkpoints to ") == 1, refused.stderr
        assert first.process.poll() is None
        workers = first.workers()
        kill(first.process.pid)
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 20)
    step = newest_step(tmp_path / "run")
    options[options.index("--steps") + 1] = str(step + 5)
    again = torchrun(2, *options[2:])
    assert again.returncode == 0, again.stderr
    assert newest_step(tmp_path / "run") == step + 5


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="workers are found by Linux's /proc")
def test_with_a_host_less_it_goes_on(tmp_path: Path) -> None:
    """Two agents with a worker each; one is killed with its worker: the other restarts alone and ends in line.

    Both models are compared on the same windows of the text; from half of the run on, one had batches half as large.
    """
    command = [*TRAIN, "--steps", "200", "--hook", "reduce_scatter", "--checkpoint-every", "5", "--checkpoint-dir"]
    steady = torchrun(2, *command, str(tmp_path / "steady"))
    assert steady.returncode == 0, steady.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        *("--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=hosts"),
        *(f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-conf=last_call_timeout=2,keep_alive_interval=1"),
        *(*command, str(tmp_path / "elastic")),
    ]
    with Agent(tmp_path / "first", *options) as first:
        first.wait_for(lambda: is_listening(port))
        with Agent(tmp_path / "second", *options) as second:
            first.wait_for(lambda: newest_step(tmp_path / "elastic") >= 100)
            for pid in (second.process.pid, *second.workers()):
                kill(pid)
        assert first.process.wait(timeout=at_most(40)) == 0, first.log.read_text()[-5000:]
    text = first.log.read_text()
    assert "resumed after step" in text
    assert "written by 1 ranks" in zeroadam("inspect", str(whole(tmp_path / "elastic")[-1])).stdout
    loss, expected = (text_loss(final(tmp_path / name)["model"]) for name in ("elastic", "steady"))
    print(f"loss {loss:.3f}, of the undisturbed run {expected:.3f}")
    assert loss == pytest.approx(expected, rel=0.05)


def test_kills_lose_nothing(tmp_path: Path) -> None:
    """By launch/soak.py: killed at random moments and while checkpoints are written, on a full disk, and so on."""
    command = [sys.executable, f"{ROOT}/launch/soak.py", "--fork", "--kills", "12", "--steps", "200"]
    command += ["--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * RUN_SECONDS, env=environment(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "1 rounds bit-equal" in done.stdout
    assert not list(tmp_path.glob("soak-*"))


def text_loss(weights: dict[str, torch.Tensor]) -> float:
    """Of the small model of these tests, on random windows of the text it was trained on."""
    gpt = GPT(width=32, layers=1, heads=2, context=32)
    gpt.load_state_dict(weights)
    windows = batch(read_text(ROOT / "zeroadam"), range(500), 32, seed=1, device=torch.device("cpu"))
    with torch.no_grad():
        return loss_of(gpt, windows).item()


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
