"""No code runs that somebody has put into a checkpoint."""

import contextlib
import copyreg
import enum
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from zeroadam import ZeroAdamW, checkpoint
from zeroadam.checkpoint.metadata import read_metadata
from zeroadam.cli.checkpoint_commands import export, inspect
from zeroadam.untrusted import UnsafeError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Hostile:
    """Makes a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


class Eval(Hostile):
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"__import__('os').mkdir({str(self.file)!r})",)


class Note:
    """Somebody's own class, which does no harm."""

    text = "as it was"


def training(extra: Any = "something") -> dict[str, Any]:
    torch.manual_seed(0)
    net = nn.Linear(3, 4)
    optimizer = ZeroAdamW(net.named_parameters(), lr=torch.tensor(1e-2), fused=False)
    for _ in range(2):
        net(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    return {"model": net, "optimizer": optimizer, "extra": extra}


def save(folder: Path, extra: Any = "something") -> None:
    state = training(extra)
    plain = {"model": state["model"].state_dict(), "optim": state["optimizer"].state_dict(), "extra": state["extra"]}
    plain["optim"]["param_groups"][0]["params"] = ["weight", "bias"]
    plain["optim"]["state"] = dict(zip(["weight", "bias"], plain["optim"]["state"].values(), strict=True))
    dcp.save(plain, checkpoint_id=folder)


def target(**more: Any) -> dict[str, Any]:
    """What to load into; none of it may change."""
    zeros = {name: torch.zeros(shape) for name, shape in (("weight", (4, 3)), ("bias", (4,)))}
    groups = [{"lr": torch.tensor(5.0), "betas": (0.5, 0.5), "params": ["weight", "bias"]}]
    state = {name: {"exp_avg": torch.zeros_like(value)} for name, value in zeros.items()}
    return {"model": zeros, "optim": {"state": state, "param_groups": groups}, **more}


def ways(folder: Path, out: Path, state: dict[str, Any] | None = None) -> dict[str, Callable[[], Any]]:
    return {
        "load": lambda: checkpoint.load(state or target(), checkpoint_id=folder),
        "inspect": lambda: inspect(folder),
        "export": lambda: export(folder, out),
    }


def replace_entry(folder: Path, fqn: str, value: Any) -> None:
    """Put another object in the place of one that was saved, at the end of its file."""
    with (folder / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    index = next(index for index in metadata.storage_data if index.fqn == fqn)
    info = metadata.storage_data[index]
    written = io.BytesIO()
    torch.save(value, written)
    with (folder / info.relative_path).open("ab") as file:
        info.offset, info.length = file.tell(), len(written.getvalue())
        file.write(written.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


OBJECTS = ["optim.param_groups.0.betas", "optim.param_groups.0.params", "optim.param_groups.0.eps", "extra"]


@pytest.mark.parametrize("hostile", [Hostile, Eval])
@pytest.mark.parametrize("fqn", [*OBJECTS, "model.weight", "optim.state.bias.exp_avg", "optim.param_groups.0.lr"])
def test_no_entry_runs_code(tmp_path: Path, fqn: str, hostile: Any) -> None:
    """Neither in what is loaded nor in what nobody asks for; nothing has changed then."""
    folder, made = tmp_path / "checkpoint", tmp_path / "made"
    save(folder)
    replace_entry(folder, fqn, hostile(made))
    state = target()
    target_group = state["optim"]["param_groups"][0]
    for name, way in ways(folder, tmp_path / "out.pt", state).items():
        asked_for = fqn != "extra" and (name != "inspect" or fqn.endswith("params"))
        if name == "load":
            asked_for = fqn in ("model.weight", "optim.state.bias.exp_avg") or fqn.split(".")[-1] in target_group
        with pytest.raises((ValueError, RuntimeError), match=r"\A[^\n]*\Z") if asked_for else contextlib.nullcontext():
            way()
        assert not made.exists(), name
        assert not (name == "load" and asked_for and state["model"]["bias"].any()), "nothing has changed"
    pickle.loads(pickle.dumps(hostile(made)))
    assert made.exists()  # so it would


def hostile_metadata(made: Path) -> dict[str, Callable[[Any], Any]]:
    def state(metadata: Any) -> Any:
        metadata.planner_data = Hostile(made)
        return metadata

    def index(metadata: Any) -> Any:
        metadata.storage_data = {**metadata.storage_data, "more": Eval(made)}
        return metadata

    return {"all of it": lambda _: Hostile(made), "planner_data": state, "storage_data": index}


@pytest.mark.parametrize("where", ["all of it", "planner_data", "storage_data"])
def test_metadata_runs_no_code(tmp_path: Path, where: str) -> None:
    folder, made = tmp_path / "checkpoint", tmp_path / "made"
    save(folder)
    file = folder / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    file.write_bytes(pickle.dumps(hostile_metadata(made)[where](metadata)))
    for name, way in ways(folder, tmp_path / "out.pt").items():
        with pytest.raises(UnsafeError, match=r"\.metadata holds a (posix\.mkdir|builtins\.eval), which is not loaded"):
            way()
        assert not made.exists(), name


@pytest.mark.parametrize(
    "code",
    [
        b"cposix\nsystem\n(S'mkdir MADE'\ntR.",
        b"\x80\x04\x8c\x05torch\x8c\x15serialization.os.mkdir\x93\x8c\x04MADE\x85R.",  # a name with dots
        b"\x80\x04\x8c\x13torch.serialization\x8c\x04load\x93\x8c\x04MADE\x85R.",
        b"ctorch\nhub\n.",
        b"\x80\x02\x82\xf0.",  # a class of the registry of extensions
        b"Pno such object\n.",
    ],
)
def test_what_a_pickle_can_be_made_of_by_hand(tmp_path: Path, code: bytes) -> None:
    made = tmp_path / "made"
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / ".metadata").write_bytes(code.replace(b"MADE", str(made).encode()))
    copyreg.add_extension("os", "mkdir", 0xF0)
    try:
        with pytest.raises(ValueError, match=r"checkpoint"):
            read_metadata(tmp_path / "checkpoint")
    finally:
        copyreg.remove_extension("os", "mkdir", 0xF0)
    assert not made.exists()


def test_files_elsewhere_are_not_read(tmp_path: Path) -> None:
    save(tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / ".metadata"
    for place in ("/etc/hostname", "../secret"):
        metadata = pickle.loads(file.read_bytes())
        next(iter(metadata.storage_data.values())).relative_path = place
        file.write_bytes(pickle.dumps(metadata))
        with pytest.raises(ValueError, match="it names a file elsewhere"):
            read_metadata(tmp_path / "checkpoint")


def test_a_class_can_be_allowed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    save(folder, Note())
    checkpoint.load(target(), checkpoint_id=folder)  # which does not ask for it
    wanted = target(extra=None)
    with pytest.raises(UnsafeError, match=r"the entry extra holds a test_untrusted\.Note, which is not loaded"):
        checkpoint.load(wanted, checkpoint_id=folder)
    assert not wanted["model"]["weight"].any()
    with torch.serialization.safe_globals([Note]):
        checkpoint.load(wanted, checkpoint_id=folder)
    assert wanted["extra"].text == "as it was"
    assert wanted["model"]["weight"].any()


def test_what_is_harmless_is_read_as_before(tmp_path: Path) -> None:
    """Also what only the names of a checkpoint of another Python version look like."""
    folder = tmp_path / "checkpoint"
    save(folder)
    file = folder / ".metadata"
    written = pickle.dumps(pickle.loads(file.read_bytes()), protocol=2)
    assert b"cpathlib\n" in written
    file.write_bytes(written.replace(b"cpathlib\n", b"cpathlib._local\n"))
    if sys.version_info < (3, 13):
        sys.modules["pathlib._local"] = sys.modules["pathlib"]
    state = target()
    try:
        checkpoint.load(state, checkpoint_id=folder)
    finally:
        if sys.version_info < (3, 13):
            del sys.modules["pathlib._local"]
    assert state["optim"]["param_groups"][0]["betas"] == (0.9, 0.999)
    assert state["optim"]["param_groups"][0]["lr"] == torch.tensor(1e-2)


class OldPickler(pickle.Pickler):
    """Pickles members of an Enum as Python 3.11.2 does."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented


def test_metadata_written_by_an_older_python(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    save(folder)
    written = io.BytesIO()
    OldPickler(written).dump(pickle.loads((folder / ".metadata").read_bytes()))
    assert b"getattr" in written.getvalue()
    (folder / ".metadata").write_bytes(written.getvalue())
    state = target()
    checkpoint.load(state, checkpoint_id=folder)
    assert state["model"]["weight"].any()
    for attributes in ((torch.Size, "__base__"), (torch.Size([1]), "numel")):
        (folder / ".metadata").write_bytes(pickle.dumps(Attribute(*attributes)))
        with pytest.raises(UnsafeError, match=r"holds a builtins\.getattr"):
            read_metadata(folder)


class Attribute:
    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self.arguments


def test_the_command_says_it_in_one_line(tmp_path: Path) -> None:
    folder, made = tmp_path / "checkpoint", tmp_path / "made"
    save(folder)
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile(made)))
    done = subprocess.run([sys.executable, "-m", "zeroadam", "inspect", folder], capture_output=True, text=True)
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) == 1
    assert "add_safe_globals([posix.mkdir])" in done.stderr
    assert not made.exists()
