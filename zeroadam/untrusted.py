"""Reading checkpoints without running code that somebody has put into them.

torch.distributed.checkpoint unpickles `.metadata` and every entry that is no tensor, and a pickle may call anything.
Here only the classes are known that such files are made of, and for entries those that `torch.load` takes with
`weights_only=True`. `torch.serialization.add_safe_globals` allows more of them.
"""

import contextlib
import enum
import io
import os
import pathlib
import pickle
import pickletools
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from zeroadam._compat import set_element

MODULES: dict[str, tuple[str, ...]] = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"),
    "collections": ("OrderedDict",),
}


_OPCODE_NAMES = """
    PROTO FRAME STOP MARK POP POP_MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET PUT GET
    NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT INT LONG FLOAT
    SHORT_BINUNICODE BINUNICODE BINUNICODE8 UNICODE SHORT_BINSTRING SHORT_BINBYTES BINBYTES
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS
    EMPTY_SET ADDITEMS FROZENSET GLOBAL STACK_GLOBAL REDUCE BUILD NEWOBJ NEWOBJ_EX
"""
OPCODES = frozenset(_OPCODE_NAMES.split())


class UnsafeError(ValueError):
    """A checkpoint holds something that could run code."""

    def __init__(self, where: str, name: str) -> None:
        super().__init__(
            f"{where} holds a {name}, which is not loaded, as it could run code: if you trust the checkpoint, call "
            f"torch.serialization.add_safe_globals([{name}])"
        )


class Reader(dcp.FileSystemReader):
    """`torch.distributed.checkpoint.FileSystemReader` that knows no other classes, and stays in its folder.

    Args:
        metadata: of the checkpoint, where they have been read before: with many pieces that takes seconds.
    """

    def __init__(self, folder: str | os.PathLike[str], metadata: Metadata | None = None) -> None:
        super().__init__(folder)
        self.metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: ARG002
        """Raises UnsafeError, or whatever a damaged pickle leads to."""
        metadata = self.metadata or self._read_metadata()
        metadata.storage_meta = getattr(metadata, "storage_meta", None) or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def _read_metadata(self) -> Metadata:
        file = pathlib.Path(self.path) / ".metadata"
        data = file.read_bytes()
        _check_opcodes(data)
        metadata = _MetadataUnpickler(io.BytesIO(data), str(file)).load()
        if not isinstance(metadata, Metadata):
            raise ValueError(f"it holds a {type(metadata).__name__}, not Metadata")
        for info in metadata.storage_data.values():
            place = PurePosixPath(info.relative_path)
            if place.is_absolute() or ".." in place.parts:
                raise ValueError(f"it names a file elsewhere: {place}")
            if getattr(info, "transform_descriptors", None):
                raise ValueError(f"{place} is stored with {info.transform_descriptors}, which is not supported")
        return metadata


class Planner(dcp.DefaultLoadPlanner):
    """`torch.distributed.checkpoint.DefaultLoadPlanner` that loads objects as `load_object` does."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        fqn = read_item.dest_index.fqn
        set_element(self.original_state_dict, self.mappings[fqn], load_object(value, f"the entry {fqn}"))


def load_object(entry: io.BytesIO | pathlib.Path, name: str, **options: Any) -> Any:
    """What torch.save has written; raises UnsafeError where that is made of classes that nobody has allowed."""
    try:
        return torch.load(entry, map_location="cpu", weights_only=True, **options)
    except pickle.UnpicklingError:
        if isinstance(entry, io.BytesIO):
            entry.seek(0)
        if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(entry):
            raise UnsafeError(name, unsafe[0]) from None
        raise


@contextlib.contextmanager
def one_kind_of_error(folder: Any) -> Iterator[None]:
    """Whatever damaged metadata may lead to is a ValueError of one line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (ValueError, RuntimeError, OSError)) and "\n" not in str(error):
            raise
        text = " ".join(str(error).split())
        raise ValueError(f"{folder} is damaged: {type(error).__name__}: {text}") from None


def _check_opcodes(data: bytes) -> None:
    """Raise ValueError for a pickle that no metadata are written as, or that would take all memory there is."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in OPCODES or (opcode.name == "LONG_BINPUT" and int(argument or 0) > len(data)):
            raise ValueError(f"it holds {opcode.name} {argument}")


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, where: str) -> None:
        super().__init__(file)
        self.where = where

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if name in MODULES.get("pathlib" if module == "pathlib._local" else module, ()):  # as Python 3.13 has it
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):  # as Python 3.11.2 pickles members of an Enum
            return self._member
        return _allowed(f"{module}.{name}", self.where)

    def _member(self, kind: Any, name: str) -> Any:
        if not isinstance(kind, enum.EnumMeta) or name not in kind.__members__:
            raise UnsafeError(self.where, "builtins.getattr")
        return kind[name]


def _allowed(name: str, where: str) -> Callable[..., Any]:
    for item in torch.serialization.get_safe_globals():
        found, given = item if isinstance(item, tuple) else (item, f"{item.__module__}.{item.__qualname__}")
        if given == name:
            return found
    raise UnsafeError(where, name)
