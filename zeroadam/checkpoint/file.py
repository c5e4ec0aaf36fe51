"""Plain files of torch.save, read with their checksums."""

import os
import zipfile
from pathlib import Path
from typing import Any

from zeroadam.untrusted import UnsafeError, load_object


def load_file(file: str | os.PathLike[str], *, mmap: bool = False) -> Any:
    """`torch.load` of a file of `torch.save` or `zeroadam.save`, which runs no code and refuses a damaged file.

    torch writes a checksum of every tensor into the file and does not look at it. Here the whole file is read and
    compared first. On the CPU, as tensors [d0, ...] of which `load_state_dict` takes this rank's share.

    Args:
        mmap: whether to map the file, so that only what is used is read into memory. It must stay as it is then.

    Raises:
        ValueError: it is damaged, no such file, or holds an object of a class that nobody has allowed by
            `torch.serialization.add_safe_globals`.
        OSError: it is not there, or cannot be read.
    """
    path = Path(file)
    with path.open("rb") as stream:
        try:
            if not zipfile.is_zipfile(stream):
                raise ValueError("it is no zip file, as torch.save writes since version 1.6")
            with zipfile.ZipFile(stream) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise ValueError(f"the checksum of {damaged} is wrong")
            return load_object(path, str(path), mmap=mmap)
        except UnsafeError:
            raise
        except Exception as error:  # whatever damaged headers may lead to
            raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from None
