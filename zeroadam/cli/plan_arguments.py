"""The arguments of `zeroadam plan`, which have the names of those of `zeroadam.plan`; read without torch."""

import argparse
from pathlib import Path

from zeroadam.cli.quantities import count, positive, ranks, size, world_sizes

# As torch names them, and shorter. The values of a name are the same.
DTYPES = {"float64": "float64", "float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
DTYPES |= {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
STATE_DTYPES = {"none": None, "bfloat16": "bfloat16", "uint8": "uint8", "8bit": "uint8"}
HOOKS = {
    "none": None,
    "reduce_scatter_hook": "reduce_scatter_hook",
    "bf16_reduce_scatter_hook": "bf16_reduce_scatter_hook",
    "reduce_scatter": "reduce_scatter_hook",
    "bf16_reduce_scatter": "bf16_reduce_scatter_hook",
}


def add(command: argparse.ArgumentParser) -> None:
    """Add them to a parser."""

    def choose(option: str, names: dict[str, str] | dict[str, str | None], default: str | None, what: str) -> None:
        once = {names[name]: name for name in reversed(names)}  # of several names the first
        metavar = "{" + ",".join(reversed(once.values())) + "}"
        command.add_argument(option, choices=names, default=default, metavar=metavar, help=what)

    what = command.add_argument_group("of which parameters").add_mutually_exclusive_group(required=True)
    what.add_argument("--params", type=count, metavar="N", help="how many there are, such as 7B, 124M or 7e9")
    what.add_argument(
        "--model", metavar="MODULE:FACTORY", help="what makes the model, called without arguments on the meta device"
    )
    what.add_argument("--state-dict", type=Path, metavar="FILE", help="a .safetensors file, or one of torch.save")
    command.add_argument(
        "--world-size", type=world_sizes, default="1,2,4,8", metavar="W,W,...", help="ranks; default 1,2,4,8"
    )
    command.add_argument(
        "--shard-size", type=ranks, metavar="S", help="for hybrid sharding, the ranks over which state is sharded"
    )
    choose("--dtype", DTYPES, None, "of the parameters, if not as they are; with --params float32")
    command.add_argument(
        "--master-dtype", choices=["none", "float32"], default="none", help="copies of bfloat16 and float16 parameters"
    )
    command.add_argument(
        "--store-param-remainders",
        action="store_true",
        help="store of the copies only the 16 bits that bfloat16 parameters do not hold",
    )
    command.add_argument(
        "--master-weights",
        choices=["none", "float32", "remainder"],
        help="short for --master-dtype float32 without or with --store-param-remainders",
    )
    choose("--state-dtype", STATE_DTYPES, "none", "of Adam's moments, if not that in which Adam runs")
    command.add_argument("--amsgrad", action="store_true", help="keep a third moment")
    choose("--hook", HOOKS, "none", "DDP's communication hook, in place of its all-reduce")
    command.add_argument(
        "--backend", choices=["nccl", "gloo"], default="nccl", help="of torch.distributed; default nccl"
    )
    command.add_argument("--bucket-cap-mb", type=positive, default=25.0, metavar="MB", help="see ZeroAdamW; default 25")
    command.add_argument("--hbm", type=size, metavar="80GB", help="memory of a device: marks what fits")
    command.add_argument("--json", action="store_true", help="print every rank's bytes, in place of the table")
    command.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it as well; needs matplotlib")
