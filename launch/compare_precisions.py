"""Train the GPT of launch/train.py in every precision and with several seeds, and draw their held-out losses.

    python launch/compare_precisions.py docs/measured --plot docs/precision.png

Each run leaves a file in the folder, and one whose file is there is not run again: start it anew after an interruption.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import draw_training

KINDS = {
    "float32": [],
    "master": ["--dtype", "bfloat16", "--master-weights", "float32"],
    "remainder": ["--dtype", "bfloat16", "--master-weights", "remainder"],
    "bfloat16": ["--dtype", "bfloat16"],
    "moments": ["--state-dtype", "bfloat16"],
    "remainder-moments": ["--dtype", "bfloat16", "--master-weights", "remainder", "--state-dtype", "bfloat16"],
    "8bit": ["--state-dtype", "8bit"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for the numbers of each run")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--width", type=int, default=256, help="of the model, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    files = {
        (kind, seed): args.folder / f"precision-{kind}-{seed}.json" for seed in range(args.seeds) for kind in KINDS
    }
    for (kind, seed), file in files.items():
        if kind in args.only and not file.exists():
            run(kind, seed, file, args)
    if args.plot:
        whole = [kind for kind in KINDS if all(files[kind, seed].exists() for seed in range(args.seeds))]
        if whole != list(KINDS):
            print(f"drawn: {', '.join(whole) or 'nothing'}, of which there are all seeds")
        if whole:
            runs = [files[kind, seed] for kind in whole for seed in range(args.seeds)]
            draw_training.several(args.plot, [json.loads(file.read_text()) for file in runs])


def run(kind: str, seed: int, file: Path, args: argparse.Namespace) -> None:
    print(f"{file.name}", flush=True)
    partial = file.with_suffix(".tmp")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
    command += [str(Path(__file__).with_name("train.py")), "--hook", "reduce_scatter", "--batch-size", "4"]
    command += ["--width", str(args.width), "--heads", str(args.width // 64), "--layers", str(args.layers)]
    command += ["--steps", str(args.steps), "--eval-every", str(max(1, args.steps // 12)), "--eval-batches", "32"]
    command += ["--sample", "1", "--seed", str(seed), "--json", str(partial), *KINDS[kind]]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    done = json.loads(partial.read_text())
    del done["losses"]  # of each step, which are not drawn
    file.write_text(json.dumps(done) + "\n")
    partial.unlink()


if __name__ == "__main__":
    main()
