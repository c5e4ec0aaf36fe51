"""The code path of NCCL, as a mark: gloo under another name, and the same with results that appear at `wait()` only."""

import itertools

import pytest

BACKENDS = ("backend", "late backend")  # see `TRANSPORTS` in tests/helpers/ranks.py


def on_a_backend(*world_sizes: int) -> pytest.MarkDecorator:
    """Runs a test on both, with each number of ranks."""
    return pytest.mark.parametrize(("transport", "world_size"), list(itertools.product(BACKENDS, world_sizes)))
