"""One factor for every limit of the tests on time: a loaded machine takes long, and only a hang takes for ever."""

import os

FACTOR = float(os.environ.get("ZEROADAM_TEST_PATIENCE", "4"))


def at_most(seconds: float) -> float:
    """A limit for what takes `seconds` where it is slow on an idle machine."""
    return FACTOR * seconds
