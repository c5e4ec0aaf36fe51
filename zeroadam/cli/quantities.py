"""Numbers as people write them: 7B parameters, 80GB, 1,2,4,8 ranks; and back."""

import argparse
import re

COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
SIZES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SIZES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
MOST_PARAMETERS = 10**15
MOST_RANKS = 10**5
NUMBER = r"(\d+(?:[\d,_]*\d)?(?:\.\d+)?(?:e\+?\d{1,2})?)\s*"


def count(text: str) -> int:
    """A number of parameters: 7b, 7B, 7e9, 124M, 7,000,000,000. Raises ArgumentTypeError for what is none."""
    number = _parse(text, COUNTS)
    if number is None or number != int(number) or not 1 <= number <= MOST_PARAMETERS:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of parameters: give it as 7B, 124M or 7e9")
    return int(number)


def size(text: str) -> float:
    """Bytes: 80GB, 80GiB, 640 MB. Raises ArgumentTypeError for what is none, also for a number without a unit."""
    number = _parse(text, SIZES)
    if not number:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give it with its unit, as 80GB, 80GiB or 640MB")
    return number


def positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return number


def ranks(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,5}", text) or int(text) > MOST_RANKS:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of ranks: give one from 1 to {MOST_RANKS:,}")
    return int(text)


def world_sizes(text: str) -> list[int]:
    try:
        return [ranks(number) for number in text.split(",")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers of ranks: give it as 1,2,4,8") from None


def in_words(number: int) -> str:
    """A number of parameters: 7 B, 124.4 M, 512."""
    for unit, factor in sorted(COUNTS.items(), key=lambda item: -item[1]):
        if number >= factor:
            return f"{number / factor:.4g} {unit}".strip()
    return str(number)


def _parse(text: str, units: dict[str, int]) -> float | None:
    match = re.fullmatch(rf"{NUMBER}([a-z]*)", text.strip(), re.IGNORECASE)
    if match is None or match[2].upper() not in units:
        return None
    return float(re.sub("[,_]", "", match[1])) * units[match[2].upper()]
