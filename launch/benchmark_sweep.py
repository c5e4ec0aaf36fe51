"""How time and memory grow with the size of a model and with the ranks. See `launch/benchmark.py --sweep`."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from train import GPT

HERE = Path(__file__).parent
# Width and layers of some 1, 3, 11, 26, 71 and 202 million parameters.
SIZES = [(128, 4), (256, 4), (384, 6), (512, 8), (768, 10), (1024, 16)]


def sweep(args: argparse.Namespace) -> None:
    """Train with the hook alone at W = 1, 2, 4 and 8 for every size that this machine has memory for."""
    rows = []
    for world_size in (1, 2, 4, 8):
        for width, layers in SIZES:
            numel = numel_of(width, layers, args.context)
            # Parameters, gradients and moments, and what a process has anyway.
            needed = world_size * (300e6 + 4 * numel * (2 + 3 / world_size) * 1.5)
            available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line)
            if needed > 1024 * int(available.split()[1]):
                print(f"{numel / 1e6:.1f} M parameters on {world_size} ranks need {needed / 1e9:.0f} GB: left out")
                continue
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
            command += [
                f"{HERE}/benchmark.py",
                "--alone",
                "zeroadam + hook",
                "--width",
                str(width),
                "--layers",
                str(layers),
            ]
            command += ["--context", str(args.context), "--steps", str(args.steps)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    if args.plot:
        from draw_benchmark import growth

        growth(args.plot, rows)


def numel_of(width: int, layers: int, context: int) -> int:
    """Parameters of the model, without building it."""
    with torch.device("meta"):
        return sum(param.numel() for param in GPT(width, layers, 1, context).parameters())
