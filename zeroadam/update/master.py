"""Master weights: Adam runs on float32 copies of bfloat16 and float16 parameters, which get the rounded result.

A copy is stored whole, as "master", or for bfloat16 as "remainder": the 16 bits that the parameter itself does not
hold. Both follow the parameter, whoever changes it. Where an element is no longer the rounded master, the master takes
its value. A remainder cannot tell, and stays: the copy of an element that was set is at most half a unit in the last
place of bfloat16 away from it, and that of a zero less than 1e-40.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

MASTERS = ("master", "remainder")

Views = list[Tensor]


def follow(masters: Views, params: Views, rounded: tuple[Tensor, Views], current: tuple[Tensor, Views]) -> None:
    """Set masters, float32 [c, ...] each, to the value of the parameter wherever that is not the rounded master.

    rounded, current: scratch memory in the dtype of the parameters, [n] for all of them and its views [c, ...].
    """
    if rounded[0].device.type == "cpu":  # elsewhere, looking would mean waiting
        torch._foreach_copy_(rounded[1], masters)
        torch._foreach_copy_(current[1], params)
        if torch.equal(rounded[0].view(torch.int16), current[0].view(torch.int16)):
            return
    for master, param in zip(masters, params, strict=True):
        master.copy_(torch.where(master.to(param.dtype) == param, master, param.float()))


def split(master: Tensor, param: Tensor, remainder: Tensor, scratch: Tensor) -> None:
    """Store float32 [c, ...] as the nearest bfloat16, in `param`, and 16 more bits, in `remainder`, to the last bit.

    These are an integer, but called bfloat16 too, since neither gloo nor NCCL knows a 16-bit integer.

    Halves are rounded away from zero. With any rule that rounds some of them up and some down, such as to even, there
    would be 2^16 + 1 numbers that round to the same even bfloat16, one too many for the remainder. A number that rounds
    to infinity keeps its remainder and comes back; of a NaN only that it is one is kept.

    scratch: an int32 [c, ...].
    """
    bits = quiet(master).view(torch.int32)
    remainder.view(torch.int16).copy_(bits)  # the lower half, which is a negative number where it rounds up
    param.view(torch.int16).copy_(torch.add(bits, 0x8000, out=scratch).bitwise_right_shift_(16))


def quiet(number: Tensor) -> Tensor:
    """float32 [n] in which every NaN is one to whose bits 2^16 can be added."""
    if number.device.type == "cpu" and math.isfinite(number.sum()):
        return number
    return torch.where(number.isnan(), torch.nan, number)


def join(param: Tensor, remainder: Tensor, scratch: Tensor) -> Tensor:
    """What was split: twice bfloat16 [c, ...] -> float32 [c, ...], in the memory of `scratch`, int32 [c, ...].

    A negative remainder of a zero is what is left of another number, as the parameter has been set to zero since. With
    it the zero would be NaN, so it does not count.
    """
    low = remainder.view(torch.int16)
    number = scratch.copy_(param.view(torch.int16)).bitwise_left_shift_(16).add_(low).view(torch.float32)
    if number.device.type == "cpu" and math.isfinite(number.sum()):
        return number
    return number.copy_(torch.where((param == 0) & (low < 0), param.float(), number))


def convert(given: Mapping[str, Tensor], key: str, param: Tensor) -> Tensor:
    """The master under the name `key`, from that under the other name or from the parameter alone: [c, ...] each."""
    if key in given:
        return given[key]
    if key == "master":
        scratch = torch.empty_like(param, dtype=torch.int32)
        return join(param, given["remainder"], scratch) if "remainder" in given else param.float()
    remainder, rounded = torch.zeros_like(param), torch.empty_like(param)
    if "master" in given:
        split(given["master"], rounded, remainder, torch.empty_like(param, dtype=torch.int32))
        remainder.masked_fill_(rounded != param, 0)
    return remainder
