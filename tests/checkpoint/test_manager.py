"""`zeroadam.checkpoint.Manager`: what it saves, what it finds again, and what it refuses."""

import os
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from state_checks import equal
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from zeroadam import ZeroAdamW, checkpoint, reduce_scatter_hook
from zeroadam.checkpoint import Manager
from zeroadam.checkpoint.writing import share_out

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Loader:
    """A loader of data that has another position on each rank, and numbers for keys."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[int, ...]] = {}

    def state_dict(self) -> dict[Any, Any]:
        return dict(self.seen)

    def load_state_dict(self, state_dict: dict[Any, Any]) -> None:
        self.seen = dict(state_dict)


class Training:
    """Everything that a run has, with dropout and buffers that differ from rank to rank."""

    def __init__(self, folder: Any, seed: int = 0, kind: Any = ZeroAdamW, **options: Any) -> None:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(6, 33), nn.BatchNorm1d(33), nn.Dropout(0.3), nn.Linear(33, 5))
        self.model = DistributedDataParallel(net, gradient_as_bucket_view=True) if dist.is_initialized() else net
        self.optimizer = kind(self.model.parameters(), lr=1e-2, foreach=True)
        if kind is ZeroAdamW and dist.is_initialized():
            self.model.register_comm_hook(None, reduce_scatter_hook)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        self.loader = Loader()
        self.manager = Manager(
            folder,
            model=self.model,
            optimizer=self.optimizer,
            schedule=self.schedule,
            per_rank={"loader": self.loader},
            **options,
        )

    def train(self, first: int, last: int) -> None:
        rank = dist.get_rank() if dist.is_initialized() else 0
        for step in range(first, last + 1):
            generator = torch.Generator().manual_seed(100 * step + rank)
            self.model(torch.randn(4, 6, generator=generator)).square().sum().backward()
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.loader.seen[step] = (rank, step)

    def values(self) -> list[Any]:
        """All that it holds; of the moments this rank's part. The buffers of the first rank count, as in DDP."""
        net = self.model.module if dist.is_initialized() else self.model
        if dist.is_initialized():
            for buffer in net.buffers():
                dist.broadcast(buffer, 0)
        state = (
            [entry[key].to_local() for entry in self.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
            if dist.is_initialized() and isinstance(self.optimizer, ZeroAdamW)
            else []
        )
        held: list[Tensor] = [*net.state_dict().values(), *state, torch.get_rng_state()]
        return [*(value.clone() for value in held), self.schedule.state_dict(), dict(self.loader.seen)]


def same(one: list[Any], other: list[Any]) -> bool:
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(one, other, strict=True))


def goes_on(folder: str, in_background: bool) -> None:
    """Saved after step 3 while step 4 changes everything; another that resumes ends where this one does."""
    first = Training(folder, in_background=in_background)
    first.train(1, 3)
    at_three = first.values()
    first.manager.save(3)
    first.train(4, 6)
    first.manager.save(6)
    at_six = first.values()
    first.manager.close()
    other = Training(folder, seed=1)
    assert other.manager.steps() == [6, 3]
    assert other.manager.load() == 6
    assert same(other.values(), at_six)
    assert other.manager.load(3) == 3
    assert same(other.values(), at_three)
    other.train(4, 6)
    assert same(other.values(), at_six)
    with (
        pytest.warns(UserWarning, match="now step-00000006.set-aside-0")
        if other.manager.rank == 0
        else warnings.catch_warnings()
    ):
        other.manager.save(5)
    assert other.manager.steps() == [5, 3]
    other.manager.close()


@pytest.mark.parametrize(("world_size", "in_background"), [(1, True), (2, True), (2, False), (3, True)])
def test_it_goes_on_to_the_bit(run_ranks: Any, tmp_path: Path, world_size: int, in_background: bool) -> None:
    run_ranks(goes_on, world_size, str(tmp_path), in_background)


def write(folder: str) -> list[Any]:
    training = Training(folder)
    training.train(1, 4)
    training.manager.save(4)
    training.manager.close()
    return [value.clone() for value in training.model.module.state_dict().values()]


def read(folder: str, expected: list[Tensor]) -> None:
    training = Training(folder, seed=2)
    assert training.manager.load() == 4
    assert same(list(training.model.module.state_dict().values()), expected)
    mine = {step: (training.manager.rank, step) for step in range(1, 5)}
    assert training.loader.seen == (mine if training.manager.rank < 2 else {}), "a rank that is new begins anew"
    training.manager.close()


def test_on_another_number_of_ranks(run_ranks: Any, tmp_path: Path) -> None:
    expected = run_ranks(write, 2, str(tmp_path))[0]
    for world_size in (1, 3):
        run_ranks(read, world_size, str(tmp_path), expected)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, ZeroAdamW])
def test_without_a_process_group(tmp_path: Path, kind: Any) -> None:
    first = Training(tmp_path / "a", kind=kind)
    first.train(1, 3)
    with first.manager:
        first.manager.save(3)
    second = Training(tmp_path / "a", seed=5, kind=kind)
    assert second.manager.load() == 3
    assert same(second.values(), first.values())
    second.manager.close()


def staged_bytes(folder: str) -> tuple[int, int, int]:
    """Bytes that are copied for a save on this rank, the shards it holds, and the whole of what all share."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(24)))
    optimizer = ZeroAdamW(model.parameters())
    with Manager(folder, model=model, optimizer=optimizer) as manager:
        manager.save(1)
        copies = sum(tensor.nbytes for tensor in manager._staging.memory.values())
    with Manager(folder, model=model, optimizer=optimizer, in_background=False) as manager:
        manager.save(2)
        assert not manager._staging.memory
    shards = sum(v.to_local().nbytes for s in optimizer.state.values() for k, v in s.items() if k != "step")
    return copies, shards, sum(param.nbytes for param in model.parameters())


@pytest.mark.parametrize("world_size", [2, 3])
def test_each_rank_copies_and_writes_its_part(run_ranks: Any, tmp_path: Path, world_size: int) -> None:
    for copies, shards, whole in run_ranks(staged_bytes, world_size, str(tmp_path)):
        assert copies <= shards + whole / world_size * 1.05 + 5056 + 1000  # the state of random numbers, and steps


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1),
    "nadam": lambda params: torch.optim.NAdam(params, lr=0.1),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.5),
    "adafactor": lambda params: torch.optim.Adafactor(params, lr=0.1),
    "lbfgs": lambda params: torch.optim.LBFGS(params, lr=0.1, max_iter=3),
    "zeroadam": lambda params: ZeroAdamW(params, lr=0.1),
}


def steps_of(optimizer: torch.optim.Optimizer, model: nn.Module, first: int, last: int) -> None:
    for step in range(first, last + 1):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = model(torch.linspace(step, 2, 8).view(2, 4)).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]


class Unused(nn.Module):
    """A parameter of it never gets a gradient, so that optimizers of torch have no state of it."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("module", [lambda: nn.Linear(4, 3), Unused], ids=["used", "unused"])
def test_saving_changes_nothing_and_resuming_is_to_the_bit(tmp_path: Path, kind: str, module: Any) -> None:
    """Also before the first step, from which torch's own function would make one; no step hooks run."""
    torch.manual_seed(0)
    plain, saved, resumed = (module() for _ in range(3))
    saved.load_state_dict(plain.state_dict())
    optimizers = [OPTIMIZERS[kind](model.parameters()) for model in (plain, saved, resumed)]
    counted: list[int] = []
    optimizers[1].register_step_post_hook(lambda *_: counted.append(1))
    with Manager(tmp_path, model=saved, optimizer=optimizers[1], keep=9) as manager:
        manager.save(0)
        for step in (1, 2, 3):
            steps_of(optimizers[0], plain, step, step)
            steps_of(optimizers[1], saved, step, step)
            manager.save(step)
    assert counted == [1, 1, 1]
    assert equal(saved.state_dict(), plain.state_dict())
    assert equal(optimizers[1].state_dict()["state"], optimizers[0].state_dict()["state"])
    with Manager(tmp_path, model=resumed, optimizer=optimizers[2]) as manager:
        for start in (2, 0):
            assert manager.load(start) == start
            steps_of(optimizers[2], resumed, start + 1, 3)
            assert equal(resumed.state_dict(), plain.state_dict()), start
            assert equal(optimizers[2].state_dict()["state"], optimizers[0].state_dict()["state"])


def test_what_all_have_is_shared_out_evenly() -> None:
    sizes = {f"p{index}": size for index, size in enumerate([100, 1, 1, 50, 49, 99, 0])}
    writers = share_out(sizes, 3)
    loads = [sum(size for name, size in sizes.items() if writers[name] == rank) for rank in range(3)]
    assert writers.keys() == sizes.keys()
    assert loads == [100, 100, 100]


def test_files_of_two_checkpoints_do_not_mix(tmp_path: Path) -> None:
    """They have names of their own; of torch's, which have not, the steps tell."""
    training = Training(tmp_path)
    training.train(1, 3)
    training.manager.save(3)
    at_three = training.values()
    training.train(4, 6)
    training.manager.save(6)
    training.manager.close()
    for file in (tmp_path / "step-00000006").glob("*.distcp"):
        shutil.copy(file, tmp_path / "step-00000003")
    other = Training(tmp_path, seed=3)
    other.manager.load(3)
    assert same(other.values(), at_three)
    other.manager.close()


def two_saves(folder: str) -> None:
    params = [nn.Parameter(torch.ones(40)) for _ in range(8)]
    optimizer = ZeroAdamW(params)
    for name in ("a", "b"):
        for _ in range(3):
            for param in params:
                param.grad = torch.ones(40)
            optimizer.step()
        dcp.save({"optimizer": optimizer.state_dict(sharded=True)}, checkpoint_id=f"{folder}/{name}")
    if dist.get_rank() == 0:
        shutil.copy(f"{folder}/b/__1_0.distcp", f"{folder}/a")
    dist.barrier()
    state = {"optimizer": optimizer.state_dict(sharded=True)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint.load(state, checkpoint_id=f"{folder}/b")
    context = pytest.warns(UserWarning, match=r"files of different steps \(3 in __0_0.distcp, 6 in __1_0.distcp\)")
    with context if dist.get_rank() == 0 else warnings.catch_warnings():
        checkpoint.load(state, checkpoint_id=f"{folder}/a")


def test_files_of_two_saves_of_torch(run_ranks: Any, tmp_path: Path) -> None:
    run_ranks(two_saves, 2, str(tmp_path))


def refused(call: Callable[[], Any], match: str, kind: Any = (ValueError, RuntimeError)) -> None:
    with pytest.raises(kind, match=match):
        call()


class Closure:
    def state_dict(self) -> dict[str, Any]:
        return {"a path": Path("/")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise KeyError(f"no {state_dict}")


def refusals(folder: str) -> None:
    rank = dist.get_rank()
    model = nn.Linear(3, 2)
    optimizer = ZeroAdamW(model.parameters())
    refused(lambda: Manager(folder, optimizer=optimizer), "optimizer holds parameters of no model")
    refused(lambda: Manager(folder, model=model, step=3), "step is a int, without state_dict")
    refused(lambda: Manager(folder, keep=0, model=model), "keep is how many")
    refused(lambda: Manager(folder, random_state=model), "random_state cannot be the name")
    refused(lambda: Manager(f"{folder}/{rank}", model=model), "disagree on the folder")
    manager = Manager(folder, model=model, optimizer=optimizer)
    refused(lambda: Manager(folder, model=model), "writes checkpoints to")
    refused(lambda: manager.save(rank), "disagree on the step: 0 on rank 0; 1 on rank 1")
    refused(lambda: manager.save(1.0), "a step is a whole number, not 1.0")  # type: ignore[arg-type]
    refused(lambda: manager.load(rank), "disagree on what to load: 0 on rank 0; 1 on rank 1")
    refused(lambda: manager.load(7), "has no checkpoint of step 7, but of none")
    assert manager.load() == 0
    manager.save(2)
    refused(lambda: manager.save(2), "step 2 is not behind step 2")
    manager.save(3)
    assert manager.steps() == [3, 2]
    manager.close()
    manager.close()
    refused(lambda: manager.save(4), "this Manager is closed")
    warned = pytest.warns(UserWarning, match="optimizer of the checkpoint is not loaded")
    with Manager(folder, model=model) as other, warned if rank == 0 else warnings.catch_warnings():
        assert other.load() == 3
    ignoring = nn.Linear(3, 2)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(ignoring, ["bias"])
    refused(lambda: Manager(folder, model=DistributedDataParallel(ignoring)), "bias of model is left out by")
    with Manager(folder, model=nn.Linear(3, 2, bias=False)) as other:
        refused(other.load, "bias is in the checkpoint, and not in the model")
    with Manager(folder, model=nn.Linear(3, 5)) as other:
        refused(other.load, "weight")
    wrong = Manager(None, model=model, closure=Closure())
    refused(lambda: wrong.save(1), "has no folder to save to")
    wrong.close()
    wrong = Manager(f"{folder}/closure", model=model, closure=Closure())
    refused(lambda: wrong.save(1), "the state of closure holds a pathlib")
    torch.serialization.add_safe_globals([Path, type(Path("/"))])
    wrong.save(1)
    refused(wrong.load, "is half loaded, as closure refuses its state")
    wrong.close()


def test_refusals(run_ranks: Any, tmp_path: Path) -> None:
    """On every rank, with what to do, and the folder is as it was."""
    run_ranks(refusals, 2, str(tmp_path / "folder"))
    assert sorted(path.name for path in (tmp_path / "folder").glob("step-*")) == ["step-00000002", "step-00000003"]


def not_shared(folder: str) -> None:
    if dist.get_rank() == 1:
        import zeroadam.checkpoint.manager as module

        module.is_seen = lambda *_: False  # as on a host with a folder of its own
    refused(lambda: Manager(folder, model=nn.Linear(1, 1)), "all hosts must share it")


def test_a_folder_that_another_host_does_not_see(run_ranks: Any, tmp_path: Path) -> None:
    run_ranks(not_shared, 2, str(tmp_path))


def test_a_write_that_fails_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training goes on, the next one is written, and what was there is there."""
    training = Training(tmp_path)
    training.manager.save(1)
    training.manager.finish()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        training.manager.save(2)
        with pytest.warns(UserWarning, match="no checkpoint of step 2: .*No space left on device"):
            training.manager.finish()
    assert training.manager.error
    assert training.manager.steps() == [1]
    assert [path.name for path in tmp_path.glob("*.tmp")] == []
    training.manager.save(2)  # again
    training.manager.save(3)
    assert training.manager.steps() == [3, 2]
    assert training.manager.error is None
    monkeypatch.setattr(os, "fsync", full)
    training.manager.save(4)
    with (
        pytest.warns(UserWarning, match="no checkpoint of step 4"),
        pytest.raises(RuntimeError, match="no checkpoint of step 4"),
    ):
        training.manager.close()


def one_rank_alone(folder: str) -> None:
    from datetime import timedelta

    import zeroadam.checkpoint.ranks as module

    module.PATIENCE = timedelta(seconds=2)
    manager = Manager(folder, model=nn.Linear(1, 1))
    if dist.get_rank() == 0:
        refused(lambda: manager.save(1), "all ranks have to call what a Manager does, and not all have: .*1")


def test_a_save_on_one_rank_alone(run_ranks: Any, tmp_path: Path) -> None:
    run_ranks(one_rank_alone, 2, str(tmp_path))


def test_a_folder_that_moves_away_and_one_that_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(1, 1)
    manager = Manager("relative", model=model)
    (tmp_path / "relative" / "step-5").mkdir()  # somebody's own
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    manager.save(10)
    assert manager.steps() == [10]
    shutil.rmtree(tmp_path / "relative")
    manager.save(11)
    assert manager.steps() == [11]
    with pytest.raises(RuntimeError, match="another Manager of this process"):
        Manager(tmp_path / "relative", model=model)
    manager.close()


def test_a_damaged_one_is_passed_over(tmp_path: Path) -> None:
    training = Training(tmp_path)
    for step in (1, 2, 3):
        training.train(step, step)
        training.manager.save(step)
    training.manager.finish()
    training.manager.close()
    file = next((tmp_path / "step-00000003").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-100])
    other = Training(tmp_path, seed=4)
    with pytest.warns(UserWarning, match="a checkpoint is passed over: .*step-00000003 is damaged"):
        assert other.manager.load() == 2
    shutil.rmtree(tmp_path / "step-00000002")
    with pytest.raises(ValueError, match="step-00000003 is damaged"):  # not a start from nothing
        other.manager.load()
    other.manager.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_does_not_keep_the_folder(tmp_path: Path) -> None:
    manager = Manager(tmp_path, model=nn.Linear(1, 1))
    (tmp_path / ".lock").read_text()  # which would release a lock of fcntl.lockf
    with pytest.raises(RuntimeError, match="another Manager of this process writes checkpoints to"):
        Manager(tmp_path, model=nn.Linear(1, 1))
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    try:
        manager.close()
        Manager(tmp_path, model=nn.Linear(1, 1)).close()
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
