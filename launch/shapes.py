"""The parameters of well-known models on the meta device, where they need no memory. Sizes are those of their papers
and configuration files: GPT-2 of nanoGPT, Llama 3.2 1B and Llama 3 8B (arXiv:2407.21783).
"""

from collections.abc import Iterator

import torch
from torch import nn

Shape = tuple[int, ...]


def gpt2(width: int = 768, layers: int = 12, vocabulary: int = 50257, context: int = 1024) -> Iterator[Shape]:
    """The output layer shares the weights of the embedding."""
    yield from ((vocabulary, width), (context, width))
    for _ in range(layers):
        yield from ((width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,))
        yield from ((width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,))
    yield from ((width,), (width,))


def llama(width: int, layers: int, keys: int, hidden: int, *, tied: bool, vocabulary: int = 128256) -> Iterator[Shape]:
    """keys: the width of keys and values. hidden: of the feed-forward network."""
    yield (vocabulary, width)
    for _ in range(layers):
        yield from ((width, width), (keys, width), (keys, width), (width, width))
        yield from ((hidden, width), (hidden, width), (width, hidden), (width,), (width,))
    yield (width,)
    if not tied:
        yield (vocabulary, width)


MODELS: dict[str, tuple[list[Shape], torch.dtype]] = {
    "gpt2-124m": (list(gpt2()), torch.float32),
    "llama-3.2-1b": (list(llama(2048, 16, 512, 8192, tied=True)), torch.bfloat16),
    "llama-3-8b": (list(llama(4096, 32, 1024, 14336, tied=False)), torch.bfloat16),
}


def parameters(name: str) -> list[nn.Parameter]:
    """Of one of MODELS, in the order of its forward."""
    shapes, dtype = MODELS[name]
    return [nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for shape in shapes]
