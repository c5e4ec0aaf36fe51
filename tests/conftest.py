"""Which tests are the fast ones, and what tests ask for: ranks, and hosts."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hosts import Hosts

TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests: dict[object, list[pytest.Function]] = {}
    for item in items:
        if {"launch", "test_frameworks.py"} & set(item.path.relative_to(TESTS).parts):
            item.add_marker("slow")
        elif isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            tests.setdefault(item.function, []).append(item)
    for cases in tests.values():
        for marker, together in (("slow", 1), ("exhaustive", 2)):
            for item in set(cases) - set(covering(cases, together)):
                item.add_marker(marker)


def covering(cases: list[pytest.Function], together: int) -> Iterator[pytest.Function]:
    """A few cases of a test that have among them all values of each parameter, or of each two of them together."""
    values = {}
    for case in cases:
        params = [(name, repr(value)) for name, value in case.callspec.params.items()]
        values[case] = set(combinations(params, min(together, len(params))))
    left = set().union(*values.values())
    while left:
        case = max(cases, key=lambda case: len(values[case] & left))
        yield case
        left -= values[case]


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list[Any]]:
    """`run_ranks` of tests/helpers/ranks.py."""
    # Not at the top: pytest's own process, which only hands tests out, would import torch before the others begin.
    from ranks import run_ranks

    return run_ranks


@pytest.fixture
def make_hosts() -> Iterator[Callable[[int], Hosts]]:
    """Hosts that are removed after the test, with all that runs on them."""
    made: list[Hosts] = []

    def make(count: int) -> Hosts:
        made.append(Hosts(f"zah{os.getpid()}", count))
        return made[-1]

    yield make
    for hosts in made:
        hosts.remove()
