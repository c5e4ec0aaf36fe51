"""What every rank says with its messages about itself, so that ranks out of step raise instead of mixing numbers up.

All ranks make the same calls of `step()` and `backward()` in the same order. A rank that leaves one out would have its
rows of one call added up with the others' rows of another. So a header goes with the messages: which call this is, how
many there were before, and a digest of what has to be the same on all ranks.

Ranks meet, by a header alone, before a call changes anything: if one of them refuses it, or they disagree, nothing has
changed on any, and training can go on. Who fails later, half-way, tells the others too, but then nothing can go on.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol
from zlib import crc32

from zeroadam.layout.rows import Rows

Header = tuple[int, int, int, int]  # kind of call, its number, digest, how many headers were sent before

NOTHING, STEP, BACKWARD, LOOK, REFUSED, FAILED = range(6)
NAMES = {NOTHING: "nothing yet", STEP: "step()", BACKWARD: "backward()", LOOK: "clip_grad_norm_() or the like"}
# 0 leaves out what ranks on other devices than the CPU tell each other through gloo, beside their rows.
CHECK_CALLS = "ZEROADAM_CHECK_CALLS"
# A rank that refuses this many calls in a row waits for the headers of the others.
MAX_REFUSALS = 1000

LIKELY_CAUSE = (
    "One rank has left out or repeated a step() or a backward(): by a condition on its own loss or gradients, an "
    "exception that it caught, or Ctrl-C. With reduce_scatter_hook only its owner sees a nan in p.grad: ask "
    "optimizer.grads_are_finite(), or decide on a number that was all-reduced. The parameters are no longer alike: "
    "start again from a checkpoint"
)


class RefusedError(RuntimeError):
    """Another rank has refused this call, before anything was changed."""


class DisagreementError(RuntimeError):
    """All ranks are in the same call, but what must be the same in it differs."""


class Headings(Protocol):
    """What headers say, and what is made of those of other ranks."""

    def header(self, digest: int, count: int) -> Header:
        """digest: of the layout of the rows, 32 bits. count: of headers before this one."""

    def check(self, mine: Header, theirs: Mapping[int, Header], rank: int) -> None:
        """Raise RuntimeError where they do not fit together."""

    def last_words(self, kind: int, count: int) -> Header:
        """The header of a rank that has refused or failed in a call."""


class Calls:
    """The calls that this rank has made, shared by the transports of an optimizer."""

    def __init__(self) -> None:
        self.kind, self.digest = NOTHING, 0
        self.numbers = dict.fromkeys(NAMES, 0)
        self.broken: str | None = None  # why no further call can be made

    def raise_if_broken(self) -> None:
        """Raise RuntimeError if an earlier call has failed half-way."""
        if self.broken is not None:
            raise RuntimeError(
                f"an earlier call has failed half-way, so nothing can go on: start again from a checkpoint. It was: "
                f"{self.broken}"
            )

    def begin(self, kind: int) -> None:
        """Raises as `raise_if_broken`."""
        self.raise_if_broken()
        self.kind, self.digest = kind, 0
        self.numbers[kind] += 1

    def header(self, digest: int, count: int) -> Header:
        """digest: of the layout of the rows, 32 bits. count: of headers before this one."""
        return self.kind, self.numbers[self.kind], digest ^ self.digest, count % 2**31

    def check(self, mine: Header, theirs: Mapping[int, Header], rank: int) -> None:
        """Raise if another rank has sent another header than this one; where they are out of step, from now on.

        Raises:
            RefusedError, DisagreementError: see there.
            RuntimeError: the ranks are out of step, or one has failed.
        """
        try:
            _compare(mine, theirs, rank)
        except (RefusedError, DisagreementError):
            raise
        except RuntimeError as error:
            self.broken = self.broken or str(error)
            raise

    def last_words(self, kind: int, count: int) -> Header:
        """The header of a rank that has refused or failed in a call, which the others then are in as well."""
        return kind, self.numbers[self.kind], self.kind, count % 2**31


def digest_of(what: object) -> int:
    """31 bits that are the same on all ranks for what has the same text."""
    return crc32(repr(what).encode()) >> 1


def layout_digest(exchanges: Sequence[Rows]) -> int:
    return digest_of([(list(rows.numels), rows.memory.dtype) for rows in exchanges])


def _compare(mine: Header, theirs: Mapping[int, Header], rank: int) -> None:
    """Raise as `Calls.check`."""
    others = {other: header for other, header in theirs.items() if header != mine}
    if mine[0] == REFUSED:  # which has ended the same call of the others
        others = {other: header for other, header in others.items() if (header[1], header[0]) != mine[1:3]}
    if not others:
        return
    for other, (kind, number, call, _) in others.items():
        if kind == FAILED or (kind == REFUSED and (call, number) == mine[:2]):
            failed = f"{'refused' if kind == REFUSED else 'failed in'} {NAMES[call]} {number}"
            error = RefusedError if kind == REFUSED else RuntimeError
            raise error(f"rank {other} of the process group {failed}: its own error says why")
    every = {rank: mine, **theirs}
    if all((kind, number, count) == (mine[0], mine[1], mine[3]) for kind, number, _, count in every.values()):
        raise DisagreementError(
            f"the ranks of the process group disagree in {NAMES[mine[0]]} {mine[1]}, rank {rank} with "
            f"{name_ranks(others)}: on param_groups, on which parameters are trained or have gradients, or on their "
            "buckets"
        )
    calls: dict[str, list[int]] = {}
    for other, (kind, number, call, _) in sorted(every.items()):
        name = f"{NAMES[kind]} {number}" if kind in NAMES else f"{NAMES[call]} {number}, which it refused"
        calls.setdefault(name, []).append(other)
    where = "; ".join(f"{name_ranks(ranks)} in {call}" for call, ranks in calls.items())
    raise RuntimeError(f"the ranks of the process group are out of step: {where}. {LIKELY_CAUSE}")


def name_ranks(ranks: Collection[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
