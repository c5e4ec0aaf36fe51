"""Checkpoints: `Manager` writes and finds them, `load` and `load_file` read one that may be damaged or a stranger's."""

from zeroadam.checkpoint.file import load_file as load_file
from zeroadam.checkpoint.loading import load as load
from zeroadam.checkpoint.manager import Manager as Manager
