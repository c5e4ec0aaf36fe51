"""What goes on beside the program of a rank, in a thread of its own: jobs, one after the other."""

import weakref
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Condition, Thread

import torch


class Job:
    """Steps that a thread takes, in order; others wait for the first ones of them.

    Args:
        give_up: called with the first error; no later step is taken.
    """

    def __init__(self, steps: Sequence[Callable[[], None]], give_up: Callable[[Exception], None]) -> None:
        self.steps, self.give_up, self.taken = steps, give_up, 0
        self.error: Exception | None = None
        self.changed = Condition()

    @torch.no_grad()
    def run(self) -> None:
        for step in self.steps:
            try:
                step()
            except Exception as error:  # raised where the job is waited for
                self.end(error)
                self.give_up(error)
                raise
            with self.changed:
                self.taken += 1
                self.changed.notify_all()

    def end(self, error: Exception) -> None:
        with self.changed:
            self.error = error
            self.changed.notify_all()

    def wait(self, steps: int) -> None:
        """Wait for so many steps; raises RuntimeError if there was an error before."""
        with self.changed:
            self.changed.wait_for(lambda: self.taken >= steps or self.error is not None)
            if self.taken < steps:
                raise RuntimeError(str(self.error)) from self.error


Jobs = SimpleQueue[Job | None]


def start_thread(owner: object) -> Jobs:
    """A thread that lives as long as its owner; gives the queue of its jobs. After an error in one all others end."""
    jobs: Jobs = SimpleQueue()
    # A daemon, as it may be waiting for another rank when this one ends.
    Thread(target=_work, args=(jobs,), name="zeroadam", daemon=True).start()
    weakref.finalize(owner, jobs.put, None)
    return jobs


def _work(jobs: Jobs) -> None:
    failed: Exception | None = None
    while (job := jobs.get()) is not None:
        try:
            if failed is None:
                job.run()
            else:
                job.end(failed)
        except Exception as error:
            failed = RuntimeError(str(error))  # without its frames, which hold the owner
        del job  # or what it holds would be held until there is another
