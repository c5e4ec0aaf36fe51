"""The training run and the README's code, started as a user starts them: by torchrun."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT, SMALL, TORCHRUN, environment, torchrun
from hosts import can_make_hosts
from patience import at_most


def train(*options: str, world_size: int = 2) -> tuple[list[float], list[int]]:
    """(loss, held-out loss before, after) and the state bytes of each rank, as the closing table shows them."""
    done = torchrun(world_size, f"{ROOT}/launch/train.py", *SMALL, *options)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    if "--optimizer" not in options or "zeroadam" in options:  # a second table: what the last step cost each rank
        rows, costs = rows[:world_size], rows[world_size:]
        assert [row[0] for row in costs] == [str(rank) for rank in range(world_size)]
        assert all(float(cell) >= 0 for row in costs for cell in row)
    assert len(rows) == world_size
    return [float(cell) for cell in rows[0][:3]], [int(row[4].replace(",", "")) for row in rows]


def test_the_three_optimizers_give_the_same_loss() -> None:
    """All eight digits, which tell any two float32 apart, for adamw and zeroadam; state bytes are AdamW's / W."""
    results = {name: train("--steps", "20", "--optimizer", name) for name in ("adamw", "zero_redundancy", "zeroadam")}
    (plain, plain_bytes), (zero, zero_bytes) = results["adamw"], results["zeroadam"]
    assert zero == plain
    assert results["zero_redundancy"][0] == pytest.approx(plain, rel=1e-5)
    assert zero_bytes == [plain_bytes[0] // 2] * 2
    assert zero[2] < zero[1] - 0.5


def test_the_hook_trains_as_well() -> None:
    """Equal to 1e-5 with float32 gradients on the wire (the norm is summed in another order), 1 % with bfloat16."""
    (plain, _), (hook, _), (bf16, _) = (
        train("--steps", "20", "--hook", hook) for hook in ("none", "reduce_scatter", "bf16_reduce_scatter")
    )
    assert hook == pytest.approx(plain, rel=1e-5)
    assert bf16 == pytest.approx(plain, rel=1e-2)


def test_gradients_are_summed_in_float32() -> None:
    """Of 8 backwards per step, each reduced; equal to 1 % to those that add up in bfloat16."""
    low = ["--steps", "10", "--grad-accum", "8", "--dtype", "bfloat16", "--master-weights", "float32"]
    low += ["--hook", "reduce_scatter"]
    (plain, plain_bytes), (wide, wide_bytes) = train(*low), train(*low, "--grad-dtype", "float32")
    assert wide == pytest.approx(plain, rel=1e-2)
    assert wide != plain
    assert wide_bytes == plain_bytes  # sums of gradients are no state


def test_every_number_of_ranks_is_evaluated_on_the_same_text() -> None:
    one, three = (train("--steps", "1", world_size=world_size)[0] for world_size in (1, 3))
    assert one[1] == pytest.approx(three[1], rel=1e-6)


def test_plot_tensorboard_and_accumulation(tmp_path: Path) -> None:
    options = ["--steps", "4", "--grad-accum", "2", "--kernel", "foreach", "--json", f"{tmp_path}/run.json"]
    train(*options, "--plot", f"{tmp_path}/loss.png", "--tensorboard", f"{tmp_path}/log", world_size=1)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "log").glob("events.out.tfevents.*"))
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["name"], len(run["losses"]), len(run["held_out"])) == ("zeroadam, float32", 4, 2)


def test_runs_in_fewer_bits_are_drawn_beside_each_other(tmp_path: Path) -> None:
    low = ["--dtype", "bfloat16", "--master-weights", "remainder", "--state-dtype"]
    (whole, _), *others = (
        train("--steps", "20", *options, "--json", f"{tmp_path}/{index}.json")
        for index, options in enumerate([[], [*low, "bfloat16"], ["--state-dtype", "8bit"]])
    )
    for loss, _ in others:
        assert loss == pytest.approx(whole, rel=2e-2)
    compare = ["--compare", f"{tmp_path}/0.json", f"{tmp_path}/2.json"]
    train("--steps", "2", *low, "none", *compare, "--plot", f"{tmp_path}/all.svg")
    drawn = (tmp_path / "all.svg").read_text()
    names = ("float32", "float32, state 8bit", "bfloat16, master remainder")
    assert all(f"<!-- {name} -->" in drawn for name in names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--width", "30", "--heads", "4"], "--width 30 is not a multiple of --heads 4"),
        (["--data", "/nowhere"], "--data /nowhere does not exist"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--optimizer", "adamw", "--hook", "reduce_scatter"], "--hook reduce_scatter works with --optimizer zeroadam"),
        (["--optimizer", "adamw", "--state-dtype", "8bit"], "--state-dtype 8bit works with --optimizer zeroadam"),
        (["--optimizer", "adamw", "--grad-dtype", "float32"], "--grad-dtype float32 works with --optimizer zeroadam"),
        (["--grad-dtype", "float32"], "--grad-dtype float32 works with --hook reduce_scatter"),
        (["--plot", "a.png", "--compare", "/nowhere"], "--compare /nowhere does not exist"),
        (["--json", "/nowhere/a.json"], "--json /nowhere/a.json: there is no such folder"),
    ],
)
def test_wrong_arguments_give_one_message(options: list[str], message: str) -> None:
    done = torchrun(2, f"{ROOT}/launch/train.py", *options, anew="--width" in options)
    assert done.returncode != 0
    assert done.stderr.count(f"train.py: error: {message}") == 1
    assert 'launch/train.py", line' not in done.stderr  # no traceback of a worker; torchrun reports in its own way


def test_ctrl_c_ends_it_with_one_message(tmp_path: Path) -> None:
    """torchrun gets the terminal's SIGINT and passes it on to the workers, in the middle of training."""
    log = tmp_path / "log"
    command = [*TORCHRUN, "--nproc-per-node=2", f"{ROOT}/launch/train.py", *SMALL, "--steps", "100000"]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment(tmp_path))
    try:
        deadline = time.monotonic() + at_most(30)
        while "step/s" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=at_most(40)) != 0
    finally:
        process.terminate()
        process.wait(timeout=at_most(40))
    text = log.read_text()
    assert text.count("interrupted") == 1, text
    assert 'launch/train.py", line' not in text, text


TINY = ["--width", "64", "--layers", "1", "--context", "16", "--warmup", "1"]
SHARDED = ["zero_redundancy", "zero_redundancy, bucket view", "zeroadam", "zeroadam + hook", "zeroadam + bf16 hook"]


def test_the_benchmark_runs_and_finds_equal_parameters(tmp_path: Path) -> None:
    """On two ranks DDP with AdamW and zeroadam with the hook agree to the bit; all others below, on two hosts."""
    files = ["--json", f"{tmp_path}/numbers.json", "--plot", f"{tmp_path}/bars.png"]
    only = ["zeroadam + hook", "zeroadam + bf16 hook"]
    done = torchrun(2, f"{ROOT}/launch/benchmark.py", *TINY, "--steps", "4", "--only", *only, *files)
    assert done.returncode == 0, done.stderr
    rows = {row["implementation"]: row for row in json.loads((tmp_path / "numbers.json").read_text())["rows"]}
    assert list(rows) == ["ddp + adamw", *only]
    assert [name for name, row in rows.items() if not row["bitwise"]] == ["zeroadam + bf16 hook"]
    assert rows["zeroadam + hook"]["state, MB"] == pytest.approx(rows["ddp + adamw"]["state, MB"] / 2, rel=1e-3)
    assert all(row["peak, MB"] > 0 for row in rows.values())
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


ALONE = ["ddp + adamw, foreach", "no communication", "fsdp1, SHARD_GRAD_OP", "fsdp2"]
ALONE += ["zeroadam + hook, bfloat16", "zeroadam + hook, bfloat16, float32 sums"]


@pytest.mark.parametrize("name", ALONE)
def test_each_implementation_runs_alone(name: str) -> None:
    done = torchrun(2, f"{ROOT}/launch/benchmark.py", *TINY, "--steps", "2", "--alone", name)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ranks"] == 2
    assert found["wall"] > 0


def test_growth_is_drawn(tmp_path: Path) -> None:
    from draw_benchmark import growth

    rows = [
        {"ranks": ranks, "parameters": numel, "wall": 1e-9 * numel, "CPU of step": 1e-9 * numel / ranks, "peak": numel}
        for ranks in (1, 2)
        for numel in (10**6, 10**7)
    ]
    growth(tmp_path / "growth.svg", rows)
    assert "<!-- W = 2 -->" in (tmp_path / "growth.svg").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [([], "start it with torchrun"), (["--no-peaks", "--plot", "a.png"], "--plot draws memory as well")],
)
def test_wrong_arguments_of_the_benchmark_are_told_in_a_line(options: list[str], message: str) -> None:
    command = [sys.executable, f"{ROOT}/launch/benchmark.py", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=at_most(30), check=False)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]


@pytest.mark.skipif(not can_make_hosts(), reason="needs root, ip and tc for network namespaces")
@pytest.mark.parametrize(("hosts", "ranks"), [pytest.param(2, 2, marks=pytest.mark.exhaustive), (3, 2)])
def test_a_host_sends_every_row_once(hosts: int, ranks: int, tmp_path: Path) -> None:
    """2 (H-1)/H elements per parameter and step, counted on its interface, to 1 %, however many ranks it has."""
    command = [sys.executable, f"{ROOT}/launch/benchmark_hosts.py", f"{hosts}x{ranks}", "5gbit", "--layers", "2"]
    command += ["--no-peaks", "--width", "256", "--context", "16", "--steps", "3"]
    command += ["--json", f"{tmp_path}/numbers.json", "--only", *SHARDED[3:]]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=at_most(60), env=environment(tmp_path), check=False
    )
    assert done.returncode == 0, done.stderr
    rows = {row["implementation"]: row for row in json.loads((tmp_path / "numbers.json").read_text())["rows"]}
    sent = [ranks * rows[name]["sent, bytes/param"] for name in SHARDED[3:]]
    elements = 2 * (hosts - 1) / hosts
    assert sent == pytest.approx([4 * elements, 3 * elements], rel=0.01)


@pytest.mark.skipif(not can_make_hosts(), reason="needs root, ip and tc for network namespaces")
def test_hosts_with_a_slow_network(tmp_path: Path) -> None:
    """Each namespace counts what its one rank sends: what the README says, on a real interface; and nothing is left."""
    command = [sys.executable, f"{ROOT}/launch/benchmark_hosts.py", "2", "1gbit", "--width", "256", "--layers", "2"]
    command += ["--no-peaks", "--context", "16", "--steps", "5", "--warmup", "2"]
    command += ["--json", f"{tmp_path}/numbers.json", "--only", *SHARDED]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment(tmp_path))
    _, errors = process.communicate(timeout=at_most(60))
    assert process.returncode == 0, errors
    rows = {row["implementation"]: row for row in json.loads((tmp_path / "numbers.json").read_text())["rows"]}
    sent = {name: row["sent, bytes/param"] for name, row in rows.items()}
    wanted = dict(zip(["ddp + adamw", *SHARDED], [4, 6, 6, 6, 4, 3], strict=True))
    assert sent == pytest.approx(wanted, rel=0.03)
    assert [name for name, row in rows.items() if not row["bitwise"]] == ["zeroadam + bf16 hook"]
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert f"za{process.pid}-" not in listed


def test_the_update_is_measured_beside_a_copy(tmp_path: Path) -> None:
    numbers = ["--kernel", "--params", "0.2", "--steps", "3", "--json", f"{tmp_path}/numbers.json"]
    done = torchrun(1, f"{ROOT}/launch/benchmark.py", *numbers)
    assert done.returncode == 0, done.stderr
    rows = {row["update"]: row for row in json.loads((tmp_path / "numbers.json").read_text())["rows"]}
    assert len(rows) == 8
    assert rows["zeroadam, bfloat16 + master"]["bytes per parameter"] == pytest.approx(30, rel=0.05)
    assert all(row["of a copy's"] > 0 for row in rows.values())
