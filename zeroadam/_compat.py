"""Every private name of torch that is used here, each with why. A test asks whether all of them are there."""

import torch
from torch import Tensor

# The number of the backward that is running, -1 outside of one: a hook has to tell one backward from the next, and
# forward hooks the forward from its repetition by activation checkpointing. There is no public way to ask.
current_graph_task_id = torch._C._current_graph_task_id

# Calls a function at the end of the backward that is running; DDP and FSDP do the same.
queue_callback = torch.autograd.Variable._execution_engine.queue_callback

# Lists of tensors in one call. They are what torch's own optimizers and clipping are made of.
FOREACH = ("_foreach_add_", "_foreach_copy_", "_foreach_div_", "_foreach_mul_", "_foreach_norm", "_foreach_zero_")


def version_of(tensor: Tensor) -> int:
    """The number of in-place changes of a tensor and all that share its counter."""
    return tensor._version
