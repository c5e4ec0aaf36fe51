"""The command line: `zeroadam export`, `inspect` and `plan`.

The arguments are read without torch, so that `--help` and mistakes are answered at once.
"""

import argparse
import signal
import sys
from pathlib import Path
from typing import NoReturn

from zeroadam import __version__
from zeroadam.cli import plan_arguments


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main() -> None:
    args = _parser().parse_args()
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `zeroadam inspect ... | head` ends without a word
    try:
        if args.command == "plan":
            from zeroadam.cli import plan

            plan.run(args)
        else:
            from zeroadam.cli import checkpoint_commands

            if args.command == "export":
                checkpoint_commands.export(args.checkpoint, args.file)
            else:
                checkpoint_commands.inspect(args.checkpoint)
    except ModuleNotFoundError as error:
        sys.exit(f"zeroadam {args.command}: {error}: pip install matplotlib rich")
    except (ValueError, OSError, RuntimeError) as error:  # torch says RuntimeError where a disk is full
        sys.exit(f"zeroadam {args.command}: {' '.join(str(error).split())}")


def _parser() -> Parser:
    parser = Parser(
        prog="zeroadam", description="Plan the memory of a training; look into its checkpoints, and export them."
    )
    parser.add_argument("--version", action="version", version=f"zeroadam {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, what in (
        ("export", "write the model and a torch.optim.AdamW state dict to one plain file"),
        ("inspect", "show the parameters, steps and bytes in a checkpoint"),
    ):
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument(
            "checkpoint",
            type=Path,
            metavar="CHECKPOINT_DIR",
            help="written by zeroadam.checkpoint.Manager, or by torch.distributed.checkpoint",
        )
        if name == "export":
            command.add_argument("file", type=Path, metavar="FILE.pt", help="replaced if it exists")
    what = "how many bytes each rank will hold and send, before anything is built"
    left_out = "It leaves out activations, and what torch itself needs."
    plan_arguments.add(commands.add_parser("plan", help=what, description=f"{what}. {left_out}"))
    return parser
