"""Train a small GPT on text, byte by byte, under DistributedDataParallel: the whole job in one file.

    torchrun --standalone --nproc_per_node=2 launch/train.py
    torchrun --standalone --nproc_per_node=2 launch/train.py --optimizer adamw --data ~/books --plot loss.png
    torchrun --standalone --nproc_per_node=2 launch/train.py --checkpoint-dir checkpoints

With --checkpoint-dir the same command goes on where the last one stopped, on any number of ranks. By default the text
is the source of Python's standard library on this machine, so nothing is downloaded.
"""

import argparse
import ctypes
import io
import json
import math
import os
import random
import resource
import signal
import statistics
import sys
import sysconfig
import time
from contextlib import ExitStack, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR

from zeroadam import StepReport, ZeroAdamW, bf16_reduce_scatter_hook, reduce_scatter_hook
from zeroadam.checkpoint import Manager

HOOKS = {"reduce_scatter": reduce_scatter_hook, "bf16_reduce_scatter": bf16_reduce_scatter_hook}
STATE_DTYPES = {"none": None, "bfloat16": torch.bfloat16, "8bit": torch.uint8}
RANK = int(os.environ.get("RANK", 0))
MAX_TEXT_BYTES = 16 * 2**20


@dataclass
class Progress:
    """How far the run is: what a checkpoint holds besides model, optimizer and schedule."""

    step: int = 0
    sequences: int = 0  # that all ranks together have trained on
    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)  # (after step, loss)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.__dict__.update(state_dict)


class Block(nn.Module):
    """Pre-norm attention and MLP: [batch, context, width] -> the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.project(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class GPT(nn.Module):
    """A byte-level language model: [batch, context] of bytes -> [batch, context, 256] logits of the next."""

    def __init__(self, width: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.context = context
        self.token, self.position = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        self.head.weight = self.token.weight
        for name, param in self.named_parameters():
            if param.dim() > 1:
                out_of_block = name.endswith(("project.weight", "mlp.2.weight"))
                nn.init.normal_(param, std=0.02 / math.sqrt(2 * layers) if out_of_block else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits

    @torch.no_grad()
    def sample(self, prompt: bytes, length: int, generator: torch.Generator) -> str:
        tokens = torch.frombuffer(bytearray(prompt), dtype=torch.uint8).long()[None]
        for _ in range(length):
            logits = self(tokens[:, -self.context :].to(self.position.weight.device))[0, -1].cpu()
            tokens = torch.cat([tokens, torch.multinomial((logits / 0.8).softmax(-1), 1, generator=generator)[None]], 1)
        return bytes(tokens[0].tolist()).decode(errors="replace")


def read_text(path: Path) -> Tensor:
    """All bytes of a file, or of a folder's text files in the order of their names: [n] uint8."""
    if path.is_dir():
        suffixes = {".py", ".txt", ".md", ".rst", ".c", ".h", ".html", ".json"}
        files = sorted(f for f in path.rglob("*") if f.suffix in suffixes and "site-packages" not in f.parts)
    else:
        files = [path]
    text = bytearray()
    for file in files:
        text += file.read_bytes()
        if len(text) >= MAX_TEXT_BYTES:
            break
    return torch.frombuffer(text[:MAX_TEXT_BYTES], dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)


def batch(text: Tensor, numbers: range, context: int, seed: int, device: torch.device) -> Tensor:
    """Windows of the text, each at a random place that its number and the seed decide: [len(numbers), context + 1]."""
    starts = [random.Random(f"{seed} {number}").randrange(len(text) - context) for number in numbers]
    return torch.stack([text[start : start + context + 1] for start in starts]).long().to(device)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy in nats per byte: [size, context + 1] -> []."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: GPT, text: Tensor, args: argparse.Namespace, device: torch.device) -> float:
    """Over the same windows every time, for every seed and for every number of ranks, which share them."""
    total = torch.zeros((), device=device)
    numbers = range(RANK, args.eval_batches * args.batch_size, dist.get_world_size())
    for first in range(0, len(numbers), args.batch_size):
        part = numbers[first : first + args.batch_size]
        total += loss_of(model, batch(text, part, args.context, 0, device)) * len(part)
    dist.all_reduce(total)
    return float(total / (args.eval_batches * args.batch_size))


def build_optimizer(model: nn.Module, args: argparse.Namespace) -> Any:  # an optimizer with methods of its own
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    options = {"lr": args.lr, "betas": (0.9, 0.95), args.kernel: True}
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options)
    if args.optimizer == "zero_redundancy":
        return ZeroRedundancyOptimizer(groups, optimizer_class=torch.optim.AdamW, **options)
    if args.master_weights != "none":
        options |= {"master_dtype": torch.float32, "store_param_remainders": args.master_weights == "remainder"}
    if args.grad_dtype != "none":
        options["grad_dtype"] = torch.float32
    return ZeroAdamW(groups, **options, state_dtype=STATE_DTYPES[args.state_dtype])


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of Adam's moments on this rank."""
    state = optimizer.optim.state if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer.state
    moments = [v for s in state.values() for k, v in s.items() if k != "step"]
    return sum((v.to_local() if isinstance(v, DTensor) else v).nbytes for v in moments)


def peak_bytes(device: torch.device) -> int:
    """The most memory that this rank has held: on the GPU, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--optimizer", choices=["zeroadam", "adamw", "zero_redundancy"], default="zeroadam")
    add("--kernel", choices=["fused", "foreach"], default="fused", help="which of torch's Adam kernels to use")
    add("--hook", choices=["none", *HOOKS], default="none", help="how zeroadam gets its gradients, if not from DDP")
    add("--gather-in-forward", action="store_true", help="let the all-gather go on during the next forward")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the parameters, and of all computation")
    add(
        "--master-weights",
        choices=["none", "float32", "remainder"],
        default="none",
        help="what zeroadam keeps of a float32 copy",
    )
    add(
        "--state-dtype",
        choices=STATE_DTYPES,
        default="none",
        help="in what zeroadam keeps moments, if not as it computes",
    )
    add(
        "--grad-dtype",
        choices=["none", "float32"],
        default="none",
        help="in what zeroadam sums bfloat16 gradients, if not in bfloat16; every backward is reduced then",
    )
    add("--data", type=Path, default=Path(sysconfig.get_path("stdlib")), metavar="PATH", help="a text file or a folder")
    add("--steps", type=int, default=200)
    add("--batch-size", type=int, default=8, help="sequences per rank and backward pass")
    add("--grad-accum", type=int, default=1, help="backward passes per step")
    add("--context", type=int, default=128, help="bytes per sequence")
    add("--width", type=int, default=192)
    add("--layers", type=int, default=4)
    add("--heads", type=int, default=6)
    add("--lr", type=float, default=2e-3, help="at its peak: linear warm-up, then a cosine to a tenth of it")
    add("--warmup", type=int, default=20, help="steps")
    add("--weight-decay", type=float, default=0.1)
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--eval-every", type=int, default=50, help="steps")
    add("--eval-batches", type=int, default=16, help="shared by the ranks")
    add("--sample", type=int, default=200, help="bytes of text to generate at the end")
    add("--seed", type=int, default=0)
    add("--timeout", type=float, default=1800, metavar="SECONDS", help="how long a rank waits for another")
    add("--checkpoint-dir", type=Path, metavar="DIR", help="save and resume here; shared by all hosts")
    add("--checkpoint-every", type=int, default=100, help="steps; and at the end")
    add("--checkpoint-keep", type=int, default=2, help="how many of the newest stay")
    add(
        "--resume",
        default="newest",
        metavar="newest|none|DIR",
        help="the newest in --checkpoint-dir, if any, or this one",
    )
    add("--plot", type=Path, metavar="FILE.png", help="draw the loss and the optimizer's bytes")
    add("--json", type=Path, metavar="FILE", help="write the losses to this file")
    add("--compare", type=Path, nargs="+", default=[], metavar="FILE", help="in --plot: runs that --json has written")
    add("--tensorboard", type=Path, metavar="DIR", help="log to TensorBoard")
    args = parser.parse_args()
    for name in (
        "steps",
        "batch_size",
        "grad_accum",
        "context",
        "width",
        "layers",
        "heads",
        "eval_every",
        "eval_batches",
        "checkpoint_every",
        "checkpoint_keep",
    ):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.width % args.heads:
        parser.error(f"--width {args.width} is not a multiple of --heads {args.heads}")
    for name in ("hook", "master_weights", "state_dtype", "grad_dtype"):
        if (value := getattr(args, name)) != "none" and args.optimizer != "zeroadam":
            parser.error(f"--{name.replace('_', '-')} {value} works with --optimizer zeroadam only")
    if args.grad_dtype != "none" and args.hook == "none":
        parser.error("--grad-dtype float32 works with --hook reduce_scatter or bf16_reduce_scatter only")
    if args.gather_in_forward and args.optimizer != "zeroadam":
        parser.error("--gather-in-forward works with --optimizer zeroadam only")
    if args.optimizer == "zero_redundancy" and (args.checkpoint_dir or args.resume not in ("newest", "none")):
        parser.error("torch.distributed.checkpoint cannot save the state of --optimizer zero_redundancy")
    if not args.data.exists():
        parser.error(f"--data {args.data} does not exist")
    for name in ("plot", "json"):
        if (file := getattr(args, name)) and not file.resolve().parent.is_dir():
            parser.error(f"--{name} {file}: there is no such folder")
    for file in args.compare:
        if not file.is_file():
            parser.error(f"--compare {file} does not exist")
    if args.plot and args.plot.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--plot {args.plot}: give it the suffix .png, .svg or .pdf")
    if "RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --standalone --nproc_per_node=2 launch/train.py")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("TORCHELASTIC_MAX_RESTARTS") != "0":
        parser.error(  # pytorch#135712
            "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun --max-restarts, or restarted workers look for the "
            "addresses of the ones before them"
        )
    args.text = read_text(args.data)
    if len(args.text) < 20 * (args.context + 1):
        parser.error(f"--data {args.data} holds {len(args.text)} bytes of text, too few for --context {args.context}")
    return args


def name_of(args: argparse.Namespace) -> str:
    """What this run trains with, as plots call it."""
    given = {"master": args.master_weights, "state": args.state_dtype, "gradients": args.grad_dtype}
    return ", ".join(
        [args.optimizer, args.dtype, *(f"{key} {value}" for key, value in given.items() if value != "none")]
    )


def lay_out_buckets(model: nn.Module, text: Tensor, args: argparse.Namespace, device: torch.device) -> None:
    """One backward before training. DDP lays out its buckets anew after its first one, and sums in their order.

    Without it the first step after a resume would sum in another order than the same step of a run that went on: from
    three ranks on the last bits differ. The sums of zeroadam's hooks do not depend on buckets.
    """
    loss_of(model, batch(text, range(1), args.context, args.seed, device)).backward()
    model.zero_grad()


def open_checkpoints(args: argparse.Namespace, **objects: Any) -> Manager:
    """With everything as it was in the checkpoint that the arguments ask for, if there is one."""
    try:
        checkpoints = Manager(args.checkpoint_dir, keep=args.checkpoint_keep, **objects)
        if args.resume != "none":
            checkpoints.load(None if args.resume == "newest" else args.resume)
    except (OSError, ValueError, RuntimeError) as error:
        raise SystemExit(f"train.py: error: cannot resume: {error}" if RANK == 0 else 1) from None
    if RANK == 0 and objects["progress"].step:
        print(f"resumed after step {objects['progress'].step}", flush=True)
    return checkpoints


def end_with_parent() -> None:
    """Or workers would go on training when torchrun is killed, beside those of the next start. On Linux."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of linux/prctl.h
        if os.getppid() != parent:
            os._exit(1)


def train(args: argparse.Namespace) -> None:
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=args.timeout))
    world_size = dist.get_world_size()

    split = len(args.text) * 9 // 10
    train_text, held_out_text = args.text[:split], args.text[split:]
    torch.manual_seed(args.seed)
    gpt = GPT(args.width, args.layers, args.heads, args.context).to(device, getattr(torch, args.dtype))
    model = DistributedDataParallel(gpt, gradient_as_bucket_view=True)
    optimizer = build_optimizer(model, args)
    if args.hook != "none":
        model.register_comm_hook(optimizer, HOOKS[args.hook])
    if args.gather_in_forward:
        optimizer.gather_in_forward(model)

    def factor(step: int) -> float:
        if step < args.warmup:
            return float((step + 1) / args.warmup)
        progress = (step - args.warmup) / max(1, args.steps - args.warmup)
        return float(0.1 + 0.45 * (1 + math.cos(math.pi * progress)))

    schedule, done = LambdaLR(optimizer, factor), Progress()
    if args.hook == "none":
        lay_out_buckets(model, train_text, args, device)
    checkpoints = None
    if args.checkpoint_dir or args.resume not in ("newest", "none"):
        checkpoints = open_checkpoints(args, model=model, optimizer=optimizer, schedule=schedule, progress=done)
    writer = None
    if args.tensorboard and RANK == 0:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(args.tensorboard)
    progress = None
    if RANK == 0:
        from tqdm import tqdm

        numel = sum(p.numel() for p in gpt.parameters())
        print(f"{numel / 1e6:.1f} M parameters, {world_size} ranks, {len(args.text) / 1e6:.1f} MB of {args.data}")
        interval = 0.1 if sys.stderr.isatty() else 10  # a log file should not get a line per step
        progress = tqdm(initial=done.step, total=args.steps, unit="step", dynamic_ncols=True, mininterval=interval)

    seconds = []
    if done.step == 0:
        done.held_out.append((0, held_out_loss(gpt, held_out_text, args, device)))
    sequences_per_step = args.batch_size * args.grad_accum * world_size
    for step in range(done.step + 1, args.steps + 1):
        start = time.perf_counter()
        loss = torch.zeros((), device=device)
        for micro in range(args.grad_accum):
            reduced = args.grad_dtype != "none" or micro == args.grad_accum - 1
            with nullcontext() if reduced else model.no_sync():
                first = done.sequences + (micro * world_size + RANK) * args.batch_size
                numbers = range(first, first + args.batch_size)
                part = loss_of(model, batch(train_text, numbers, args.context, args.seed, device)) / args.grad_accum
                part.backward()
            loss += part.detach()
        if args.hook == "none":
            clip_grad_norm_(model.parameters(), args.clip)
        else:
            optimizer.clip_grad_norm_(args.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        dist.all_reduce(loss)
        done.step, done.sequences = step, done.sequences + sequences_per_step
        done.losses.append(loss.item() / world_size)
        seconds.append(time.perf_counter() - start)
        if step % args.eval_every == 0 or step == args.steps:
            done.held_out.append((step, held_out_loss(gpt, held_out_text, args, device)))
        if (
            checkpoints is not None
            and args.checkpoint_dir
            and (step % args.checkpoint_every == 0 or step == args.steps)
        ):
            checkpoints.save(step)
        if progress is not None:
            rate = sequences_per_step * args.context / seconds[-1]
            state = f"loss {done.losses[-1]:.3f}, {rate:,.0f} tokens/s, {1000 * seconds[-1]:.0f} ms/step"
            progress.set_postfix_str(state, refresh=False)
            progress.update()
        if writer is not None:
            writer.add_scalar("loss/training", done.losses[-1], step)
            writer.add_scalar("seconds per step", seconds[-1], step)
            if done.held_out[-1][0] == step:
                writer.add_scalar("loss/held out", done.held_out[-1][1], step)
            if isinstance(optimizer, ZeroAdamW):
                for name, value in asdict(optimizer.report()).items():
                    writer.add_scalar(f"step of rank 0/{name}", value, step)

    written = True
    if checkpoints is not None:
        try:
            checkpoints.close()
        except RuntimeError:  # which was a warning already
            written = False
    if args.gather_in_forward:
        optimizer.finish_gather()
    per_rank: list[tuple[int, int]] = [(0, 0)] * world_size
    dist.all_gather_object(per_rank, (state_bytes(optimizer), peak_bytes(device)))
    costs: list[StepReport | None] = [None] * world_size
    dist.all_gather_object(costs, optimizer.report() if isinstance(optimizer, ZeroAdamW) else None)
    if progress is not None:
        progress.close()
        report(args, done, seconds, per_rank, costs)
        prompt = b"def "
        print(f"\n{gpt.sample(prompt, args.sample, torch.Generator().manual_seed(args.seed))}")
        if writer is not None:
            writer.close()
        this_run = {
            "name": name_of(args),
            "seed": args.seed,
            "losses": done.losses,
            "held_out": done.held_out,
            "state": per_rank,
        }
        if args.json:
            args.json.write_text(json.dumps(this_run))
        if args.plot:
            import draw_training

            if args.compare:
                draw_training.several(args.plot, [this_run, *(json.loads(file.read_text()) for file in args.compare)])
            else:
                draw_training.one(args.plot, this_run, sum(2 * p.nbytes for p in gpt.parameters()))
            print(f"\nwrote {args.plot}")
    # torch can deadlock (pytorch#56297) when a gloo group goes away while one of its threads, just done with a
    # collective, waits for the interpreter's lock to free its tensors. Sleeping lets them finish.
    time.sleep(0.2)
    dist.destroy_process_group()
    if not written:
        sys.exit(1)


def report(
    args: argparse.Namespace,
    done: Progress,
    seconds: list[float],
    per_rank: list[tuple[int, int]],
    costs: list[StepReport | None],
) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{args.optimizer}, {done.step} steps on {len(per_rank)} ranks", caption="a line for each rank")
    for column in ("loss", "held out,\nbefore", "held out,\nafter", "s/step,\nmedian", "state,\nbytes", "peak\nmemory"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_row(
        f"{done.losses[-1]:.8f}",
        f"{done.held_out[0][1]:.8f}",
        f"{done.held_out[-1][1]:.8f}",
        f"{statistics.median(seconds):.3f}" if seconds else "-",
        "\n".join(f"{state:,}" for state, _ in per_rank),
        "\n".join(f"{peak / 2**20:.0f} MiB" for _, peak in per_rank),
    )
    Console().print(table)
    if not seconds or costs[0] is None:
        return
    table = Table(title="of the last step", caption=f"the fullest rank updates {costs[0].imbalance:.3f} of the mean")
    for column in ("rank", "update, ms", "communication, ms", "sent, MB", "received, MB"):
        table.add_column(column, justify="right")
    for rank, cost in enumerate(cost for cost in costs if cost is not None):
        times = [f"{1000 * cost.update:.1f}", f"{1000 * cost.communication:.1f}"]
        table.add_row(str(rank), *times, f"{cost.sent / 1e6:.2f}", f"{cost.received / 1e6:.2f}")
    Console().print(table)


def leave(_signal: int, _frame: FrameType | None) -> None:
    """End at once: another rank may be waiting in a collective for one that has gone already."""
    if RANK == 0:
        print("\ninterrupted", file=sys.stderr, flush=True)
    os._exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, leave)
    with ExitStack() as silence:
        if RANK != 0:  # one message about wrong arguments, not W
            silence.enter_context(redirect_stdout(io.StringIO()))
            silence.enter_context(redirect_stderr(io.StringIO()))
        try:
            arguments = parse_arguments()
        except SystemExit as error:
            if RANK != 0 and error.code:
                time.sleep(5)  # the first to end ends the others, which should be the one that says why
            raise
    end_with_parent()
    train(arguments)
