"""The command line: `zeroadam export`, `inspect` and `plan`."""

import argparse
import signal
import sys
from pathlib import Path

from zeroadam.cli import plan
from zeroadam.cli.checkpoint_commands import export, inspect


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="zeroadam", description="Plan the memory of a training; look into its checkpoints, and export them."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (
        ("export", "write the model and a torch.optim.AdamW state dict to one plain file"),
        ("inspect", "show the parameters, steps and bytes in a checkpoint"),
    ):
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument("checkpoint", type=Path, metavar="CHECKPOINT_DIR", help="written by torch's dcp.save")
        if name == "export":
            command.add_argument("file", type=Path, metavar="FILE.pt", help="replaced if it exists")
    what = "how many bytes each rank will hold and send, before anything is built"
    plan.add_arguments(commands.add_parser("plan", help=what, description=what))
    args = parser.parse_args()
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `zeroadam inspect ... | head` ends without a word
    try:
        if args.command == "export":
            export(args.checkpoint, args.file)
        elif args.command == "inspect":
            inspect(args.checkpoint)
        else:
            plan.run(args)
    except ModuleNotFoundError as error:
        sys.exit(f"zeroadam {args.command}: {error}: pip install 'zeroadam[plan]'")
    except (ValueError, OSError, RuntimeError) as error:  # torch says RuntimeError where a disk is full
        sys.exit(f"zeroadam {args.command}: {error}")
