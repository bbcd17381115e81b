"""Trains a dense GPT whose feed-forward layers fire sparsely: the first half of D2DMoE.

    python train.py                                     on the Python standard library's sources, minutes on a laptop
    python train.py --data book.txt --out book          on your own text: a file or a folder
    python train.py --init resume                       go on after Ctrl-C or a crash
    python train.py --preset gpt2 --init gpt2 --data openwebtext/       make GPT-2 sparse
    torchrun --nproc_per_node=8 train.py ...            the same global batch, on eight GPUs

Data flow: text -> out/train.bin and out/val.bin (tokens, uint16) -> batches -> out/ckpt.pt, which convert.py reads.
The recipe is training_loss, cross entropy + alpha * the mean of the layers' sparsity penalties, and the loop in main.

What differs from nanoGPT's train.py: batches depend on seed and step alone, so that a resumed run sees what it would
have seen; a step's sequences are the same for any number of processes; val loss is always over the same windows; every
evaluation saves; --final_lr is a share of --lr. By default there are ReLUs, and a token is a byte.
"""

import argparse
import contextlib
import filecmp
import io
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import sys
import sysconfig
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from d2dmoe import (
    GPT, GPT2_SIZES, PENALTIES, Gate, GPTConfig, atomic_write, load_checkpoint, save_checkpoint, square_hoyer,
)  # fmt: skip
from kernels import ACTIVATIONS

# On Linux, glibc returns large freed tensors to the system, and the next tensor's memory comes back page fault by page
# fault. Freeing one block just below its limit of 32 MB raises the size from which it does so: training is 7% faster.
torch.empty(31 << 20, dtype=torch.uint8, device="cpu")

# ---------------------------------------------------------------------------------------------------------------------
# Settings

PRESETS = {
    "default": {},
    # The sizes of GPT-2 124M and the settings of the authors' script, but for its dropout of 0.1 (there is none here)
    # and its bfloat16 (add --dtype bfloat16).
    "gpt2": dict(
        n_layer=12, n_head=12, n_embd=768, block_size=1024, tokenizer="gpt2", activation="relu",
        penalty="l1", alpha=5e-4, alpha_ramp=0.0,
        steps=1000, batch_size=8, grad_accum=120, lr=6e-4, final_lr=0.0, warmup=100, eval_every=50, eval_windows=64,
    ),
}  # fmt: skip
SIZES = ("n_layer", "n_head", "n_embd", "block_size")
# None if not given: then the checkpoint's or GPTConfig's default (the penalty is the checkpoint's only on resuming).
MODEL = (*SIZES, "bias", "activation", "penalty")
NOT_STORED = ("data", "tokenizer", "init", "out", "preset", "device", *MODEL)  # belong to one call or to the config


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, over the settings of the preset or of the run that it resumes, which its checkpoint tells.
    Raises ValueError."""
    parser = Parser(
        "train.py", "Train a dense GPT with sparse activations.",
        "--data book.txt --out book", "--init resume --out book --steps 3000",
    )  # fmt: skip
    count, non_negative = number(int, 1, 2**40), number(float, 0)
    add = parser.add_argument_group("what to run").add_argument
    add("--data", help="stdlib (Python's own sources), a UTF-8 text file, a folder of text, or one with nanoGPT's"
        " train.bin and val.bin (default: stdlib; on resuming, the tokens in --out)")  # fmt: skip
    add("--tokenizer", choices=("bytes", "gpt2"), help="(default: the checkpoint's, the .bin files' own, or bytes)")
    add("--init", default="scratch", help="scratch, resume, or weights to start from: a checkpoint of ours or"
        f" nanoGPT's, a folder of Hugging Face's GPT-2, or, downloaded, {', '.join(GPT2_SIZES)}")  # fmt: skip
    add("--out", type=as_path, default=Path("out"), help="folder for train.bin, val.bin and ckpt.pt")
    add("--preset", choices=PRESETS, default="default", help="gpt2: as the authors fine-tune it, but for dropout")
    add = parser.add_argument_group("model (decided by the checkpoint where there is one)").add_argument
    add("--n_layer", type=count, help="blocks (default: 4)")
    add("--n_head", type=count, help="attention heads (default: 4)")
    add("--n_embd", type=count, help="width d (default: 128)")
    add("--block_size", type=count, help="context in tokens; with --init it may be shorter (default: 128)")
    add("--no_bias", dest="bias", action="store_const", const=False, help="no biases in linear layers and layer norms")
    add("--activation", choices=ACTIVATIONS, help="with --init another one: ReLUfication (default: relu, or its own)")
    add = parser.add_argument_group("sparsity").add_argument
    add("--penalty", choices=PENALTIES, help="on feed-forward activations (default: hoyer; on resuming, the run's)")
    add("--alpha", type=non_negative, default=1e-3, help="weight of the penalty; for L1 a smaller one (see the preset)")
    add("--alpha_ramp", type=number(float, 0, 1), default=0.5, help="share of the steps in which alpha grows; 0: none")
    add = parser.add_argument_group("optimization").add_argument
    add("--steps", type=count, default=1500, help="optimizer steps")
    add("--batch_size", type=count, default=16, help="sequences that a process computes at once, at most")
    add("--grad_accum", type=count, default=1, help="a step has this many --batch_size, over all processes")
    add("--lr", type=non_negative, default=2e-3, help="peak learning rate")
    add("--final_lr", type=number(float, 0, 1), default=0.1, help="final learning rate as a share of --lr")
    add("--warmup", type=number(int, 0, 2**40), default=100, help="steps of linear warm-up")
    add("--weight_decay", type=non_negative, default=0.1, help="of matrices and embeddings")
    add("--beta2", type=number(float, 0, 0.999999), default=0.95, help="AdamW's; beta1 is 0.9")
    add("--grad_clip", type=non_negative, default=1.0, help="largest norm of the gradient; 0: no clipping")
    add = add_system_options(parser).add_argument
    add("--eval_every", type=count, default=100, help="steps between evaluations; each one saves")
    add("--eval_windows", type=count, default=128, help="windows of held-out text per evaluation")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the matrix multiplies")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the model")
    args = parser.parse_args(argv)
    settings = PRESETS[args.preset]
    if args.init == "resume":
        if settings:
            raise ValueError("--init resume goes on with the run's own settings: leave --preset out")
        words = load_checkpoint(args.out / "ckpt.pt")[1].get("arguments")
        if not isinstance(words, list) or not all(isinstance(w, str) and re.match("--(?!help)", w) for w in words):
            where = f"{args.out}/ckpt.pt"
            raise ValueError(f"{where} was not left by a run that can be resumed: use --init {where}")
        # A checkpoint is input: it is checked as the command line is, and no path is taken from it.
        settings = {k: v for k, v in vars(parser.parse_args(words)).items() if k not in NOT_STORED}
    elif args.init != "scratch":  # a checkpoint has its own sizes and tokens
        settings = {k: v for k, v in settings.items() if k not in (*SIZES, "tokenizer")}
    parser.set_defaults(**settings)
    return parser.parse_args(argv)  # once more: the command line comes before these


def as_words(args: argparse.Namespace) -> list[str]:
    """The options as a command line, for the checkpoint."""
    options = {k: v for k, v in vars(args).items() if k not in NOT_STORED}
    return [f"--{k}" if v is True else f"--{k}={v}" for k, v in options.items() if v is not False]


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def draw_offsets(length: int, sequences: int, block_size: int, seed: int, step: int) -> Tensor:
    """Where a step's sequences start, [sequences]: a function of seed and step alone, so that a resumed run sees the
    batches it would have seen, and any number of processes share out the same ones."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)  # further apart than any run has steps
    return torch.randint(length - block_size, (sequences,), generator=generator)


def take_windows(tokens: np.ndarray, offsets: Tensor, config: GPTConfig, device="cpu") -> tuple[Tensor, Tensor]:
    """Inputs and targets [B, T] int64, on a device, of the windows that start at offsets [B]. Raises ValueError for a
    token outside of the vocabulary."""
    windows = np.stack([tokens[o : o + config.block_size + 1] for o in offsets.tolist()])  # [B, T+1]
    check_vocabulary(windows, config)
    windows = torch.from_numpy(windows.astype(np.int64))
    if torch.device(device).type == "cuda":  # from page-locked memory the copy is only queued: the host goes on
        windows = windows.pin_memory().to(device, non_blocking=True)
    windows = windows.to(device)
    return windows[:, :-1], windows[:, 1:]


def check_vocabulary(tokens: np.ndarray, config: GPTConfig, source: str | Path = "the text") -> None:
    """Raises ValueError, where PyTorch would fail on a GPU without a word of the cause."""
    if tokens.max() >= config.vocab_size:
        outside = f"token {tokens.max()} lies outside the vocabulary of {config.vocab_size}"
        raise ValueError(f"{source}: {outside}: are --data and --tokenizer right?")


def draw_batch(
    tokens: np.ndarray, sequences: int, config: GPTConfig, seed: int, step: int, device="cpu", micro_batch: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """A step's (x, y), each [B, T]: this process's share of the sequences, in micro-batches of at most `micro_batch`
    (0: in one). Raises ValueError if the sequences do not divide among the processes of torchrun."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if sequences % world:
        raise ValueError(f"{sequences} sequences per step do not divide among {world} processes")
    offsets = draw_offsets(len(tokens), sequences, config.block_size, seed, step).chunk(world)[rank]
    return [take_windows(tokens, o, config, device) for o in offsets.split(micro_batch or sequences)]


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def held_out(model: GPT, tokens: np.ndarray, windows: int, batch_size: int = 16) -> Iterator[tuple[Tensor, Tensor]]:
    """Evenly spaced windows: inputs and targets [B, T], B such that logits take 256 MB at most. Raises ValueError, when
    the first are asked for, if windows or batch_size is below 1 or there are fewer than block_size + 1 tokens."""
    T, V = model.config.block_size, model.config.vocab_size
    last = len(tokens) - T - 1
    if windows < 1 or batch_size < 1 or last < 0:
        raise ValueError(f"evaluation needs windows and batch_size of 1 or more, and {T + 1} tokens")
    offsets = torch.linspace(0, last, min(windows, last + 1), dtype=torch.float64).long()  # float32 is exact to 2^24
    for some in offsets.split(max(1, min(batch_size, 2**26 // (T * V)))):
        yield take_windows(tokens, some, model.config, model.lm_head.weight.device)


@torch.no_grad()
def evaluate(
    model: GPT, tokens: np.ndarray, windows: int, batch_size: int = 16, gate: Gate = None
) -> tuple[float, list[Tensor]]:
    """Mean loss in nats per token over evenly spaced windows of held-out text; and for each of model.layers() the
    number of experts that every token executed, [windows * T] (no entries for a dense model). Raises ValueError."""
    training, total, num_tokens, counts = model.training, 0.0, 0, []
    model.eval()
    for x, y in held_out(model, tokens, windows, batch_size):
        logits, aux = model(x, gate)  # [B, T, V]
        total += F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="sum").item()
        num_tokens += y.numel()
        if model.config.num_experts:
            counts.append([executed.sum(-1).flatten().cpu() for executed in aux])  # [B, T, E] -> [B*T]
    model.train(training)
    return total / num_tokens, [torch.cat(parts) for parts in zip(*counts)]


@torch.no_grad()
def activation_sparsity(model: GPT, x: Tensor) -> tuple[float, float]:
    """Of a dense model's feed-forward activations on x [B, T]: the share that is zero (for a GELU: not positive), and
    the effective number of active neurons per layer (square Hoyer)."""
    zeros, active, inputs = [], [], []
    model.hidden(x, inputs=inputs)
    for mlp, read in zip(model.layers(), inputs, strict=True):
        z = mlp.c_fc(read)  # [B, T, d_ff]
        zeros.append((z <= 0).float().mean())
        active.append(square_hoyer(ACTIVATIONS[mlp.activation](z).abs()).mean())
    return torch.stack(zeros).mean().item(), torch.stack(active).mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# The recipe


def training_loss(model: Callable, x: Tensor, y: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Cross entropy + alpha * mean over layers of the sparsity penalty (section 3.1 of the paper), for a model in
    training mode, tokens x and the tokens y that follow them, [B, T] each; and the cross entropy alone, in nats per
    token. Two scalars."""
    logits, penalties = model(x)  # [B, T, V], one scalar a layer
    cross_entropy = F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
    return cross_entropy + alpha * torch.stack(penalties).mean(), cross_entropy


def penalty_weight(step: int, steps: int, alpha: float, ramp: float = 0.5) -> float:
    """Linear from 0 to alpha over the first `ramp` of training, then constant; ramp 0: constant from the start."""
    return alpha * min(1.0, step / (ramp * steps)) if ramp else alpha


def learning_rate(step: int, steps: int, peak: float, warmup: int, final: float = 0.1) -> float:
    """Linear warm-up to `peak`, then a cosine down to `final` of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def check_finite(step: int, *values: float) -> None:
    """Raises ValueError if a loss, a gradient's norm or a weight's norm is not finite."""
    if not all(map(math.isfinite, values)):
        advice = "try a lower --lr, a longer --warmup or --dtype float32, from the start or with --init resume"
        raise ValueError(f"step {step}: loss, gradient or weights are not finite; the last save is untouched: {advice}")


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    device = pick_device(args.device)
    rank, world = start_processes(device)
    torch.manual_seed(args.seed)
    if args.compile and device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise ValueError("--compile needs a C++ compiler (g++) on a CPU: install one, or give --no-compile")
    resuming = args.init == "resume"
    source = args.out / "ckpt.pt" if resuming else args.init
    data = args.data or (f"{args.out}/" if resuming else "stdlib")  # the slash: even if the folder is named stdlib
    with rank_zero_first():
        lock = claim(args.out) if rank == 0 else None  # noqa: F841  it keeps --out to this run
        base, checkpoint = (None, {}) if args.init == "scratch" else load_checkpoint(source, ("ckpt.pt",))
        folder, tokenizer = find_tokens(data, args.tokenizer, checkpoint.get("tokenizer"), base)
        model = initial_model(args, base, tokenizer)  # before text is encoded: wrong sizes are told at once
        config = model.config
        if rank == 0:
            put_tokens(folder, data, tokenizer, args.out, config)
        train_tokens, val_tokens = open_tokens(args.out, config)
    text = fingerprint(train_tokens, val_tokens, checkpoint)
    facts = dict(tokenizer=tokenizer, text=text, arguments=as_words(args))
    sequences = args.batch_size * args.grad_accum  # of a step
    draw = partial(draw_batch, train_tokens, sequences, config, args.seed, device=device, micro_batch=args.batch_size)

    model.to(device).train()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, args.beta2), fused=True)
    first = load_moments(optimizer, checkpoint, args) if resuming else 0
    # Whether a ckpt.pt in --out is this run's, to write over. (With other --steps it is another run.)
    owns = resuming and f"--steps={args.steps}" in checkpoint["arguments"]
    del checkpoint, base  # frees their weights and moments, which have been copied
    step_model = torch.compile(model) if args.compile else model
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")

    def save(step: int) -> None:
        nonlocal owns
        check_finite(step, *(p.detach().norm().item() for p in model.parameters()))
        if not owns:
            keep_previous(args.out / "ckpt.pt")
        # No random state: batches depend on seed and step alone, and the model has no dropout.
        save_checkpoint(args.out / "ckpt.pt", model, step=step, optimizer=optimizer.state_dict(), **facts)
        put_aside(*(args.out / name for name in ("d2dmoe.pt", "cost_vs_loss.csv", "cost_vs_loss.png")))
        owns = True

    millions, quoted = sum(p.numel() for p in model.parameters()) / 1e6, shlex.quote(str(args.out))
    sizes = f"{len(train_tokens):,} training and {len(val_tokens):,} held-out tokens of {data}"
    say(f"{millions:.2f}M parameters, {sizes}, {device}, {world} process(es)")
    say("losses: cross entropy in nats per token; zeros: share of activations that are zero;")
    say("active: effective number of active neurons per layer (square Hoyer)")
    say(f"{'step':>6} {'loss':>7} {'val loss':>8} {'zeros':>6} {'active':>7} {'tokens/s':>9} {'left':>7}")
    probe, _ = next(held_out(model, val_tokens, windows=16))  # [B, T]
    losses, clock = [], time.perf_counter()  # since the last evaluation
    with noted_signals() as stop:
        upcoming = draw(first)
        for step in range(first, args.steps):
            done = step + 1
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps, args.lr, args.warmup, args.final_lr)
            alpha = penalty_weight(step, args.steps, args.alpha, args.alpha_ramp)
            total = torch.zeros((), device=device)
            for x, y in upcoming:
                weight = len(x) / sequences  # the micro-batch's part in the mean over the step's sequences
                with autocast:
                    loss, cross_entropy = training_loss(step_model, x, y, alpha)
                    (weight * loss).backward()
                total += weight * cross_entropy.detach()
            upcoming = draw(done)  # the next step's, read and queued while a GPU computes
            signals = torch.tensor(float(len(stop)), device=device)
            if world > 1:  # sums over the processes, so that all go on, or stop, alike
                for t in (total, signals, *(p.grad for p in model.parameters())):
                    dist.all_reduce(t)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
            total, norm, stopping = torch.stack([total, norm, signals]).tolist()
            check_finite(done, total, norm)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)

            if rank == 0 and (done % args.eval_every == 0 or done == args.steps):
                seconds = time.perf_counter() - clock
                with autocast:
                    val_loss, _ = evaluate(model, val_tokens, args.eval_windows, args.batch_size)
                check_finite(done, val_loss)
                zeros, active = activation_sparsity(model, probe)
                save(done)
                rate = len(losses) * sequences * config.block_size / seconds
                left = int((time.perf_counter() - clock) / len(losses) * (args.steps - done))
                train_loss = sum(losses) / len(losses)
                say(f"{done:6d} {train_loss:7.4f} {val_loss:8.4f} {zeros:6.1%} {active:7.1f} {rate:9,.0f} "
                    f"{left // 60:3d}m{left % 60:02d}s")  # fmt: skip
                losses, clock = [], time.perf_counter()
            if stopping and done < args.steps:
                if rank == 0 and not owns and not resuming and (args.out / "ckpt.pt").exists():
                    say(f"stopped at step {done}, before an evaluation: {args.out}/ckpt.pt stays the earlier run's")
                elif rank == 0:
                    save(done)
                    say(f"stopped at step {done} and saved; go on with: python train.py --init resume --out {quoted}")
                return 128 + (stop[0][0] if stop else signal.SIGTERM)
    say(f"\nwrote {args.out}/ckpt.pt; now: python convert.py --ckpt {quoted}")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Starting and resuming


def initial_model(args: argparse.Namespace, base: GPT | None, tokenizer: str | None) -> GPT:
    """The model to train: new, or the checkpoint's, perhaps with another activation, penalty or a shorter context."""
    given = {name: value for name, value in vars(args).items() if name in MODEL and value is not None}
    if base is None:
        return GPT(GPTConfig(vocab_size=vocabulary(tokenizer), **given))
    if base.config.num_experts or base.config.projections != "linear":
        raise ValueError(f"--init {args.init} is a converted model: training starts from a dense one")
    own = vars(base.config)
    free = () if args.init == "resume" else ("block_size", "activation", "penalty")
    for name, value in given.items():
        if name not in free and value != own[name]:
            option = "no_bias" if name == "bias" else name
            raise ValueError(f"--{option} cannot differ from the checkpoint, whose {name} is {own[name]}")
    if args.init == "resume":
        return base
    changed = replace(base.config, **{"penalty": GPTConfig.penalty} | given)
    if changed.block_size > own["block_size"]:
        raise ValueError(f"--block_size {changed.block_size} is longer than the checkpoint's {own['block_size']}")
    model, weights = GPT(changed), base.state_dict()
    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][: changed.block_size]
    model.load_state_dict(weights)
    return model


def load_moments(optimizer: torch.optim.Optimizer, checkpoint: dict, args: argparse.Namespace) -> int:
    """Loads AdamW's moments; returns the step to go on with. Raises ValueError if they are not this model's."""
    where = f"{args.out}/ckpt.pt"
    try:
        state = checkpoint["optimizer"]["state"]
        for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            own = [(m.shape, m.stride(), m.dtype) for m in (state[i]["exp_avg"], state[i]["exp_avg_sq"])]
            if state[i]["step"].shape or own != 2 * [(p.shape, p.stride(), p.dtype)]:  # or it is written past their end
                raise ValueError(f"the moments of parameter {i} have another shape")
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        step, last_lr = int(checkpoint["step"]), float(checkpoint["optimizer"]["param_groups"][0]["lr"])
    except Exception as error:  # what it raises depends on what another program has put there
        raise ValueError(f"{where} cannot be resumed ({error!r:.200}): use it with --init {where}") from None
    if not 0 <= step < args.steps:
        raise ValueError(f"{where} has its {step} steps: give a larger --steps to train on, or run convert.py")
    lr = learning_rate(step, args.steps, args.lr, args.warmup, args.final_lr)
    alpha = penalty_weight(step, args.steps, args.alpha, args.alpha_ramp)
    say(f"resuming at step {step}, with learning rate {lr:.2e} (last {last_lr:.2e}) and penalty weight {alpha:.2e}")
    return step


# ---------------------------------------------------------------------------------------------------------------------
# Text -> tokens


def load_tokenizer(name: str) -> tiktoken.Encoding:
    """"bytes" (256 bytes and <|endoftext|>; nothing to download), "gpt2" (tiktoken's), or "characters:" and an
    alphabet, a nanoGPT character model's. Raises ValueError for another name, OSError if GPT-2's cannot be had."""
    if name == "bytes":
        ranks, end = {bytes([i]): i for i in range(256)}, {"<|endoftext|>": 256}
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens=end)
    if re.match("characters:.", name, re.DOTALL):
        ranks = {c.encode(): i for i, c in enumerate(name.removeprefix("characters:"))}
        return tiktoken.Encoding("characters", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={})
    if name != "gpt2":
        raise ValueError(f"the tokenizer {name!r} is unknown: it must be bytes or gpt2")
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever the network, a proxy or a full disk raise
        cache = "TIKTOKEN_CACHE_DIR to a folder with tiktoken's cache, whose files are named by the sha1 of their URL"
        why = type(error).__name__
        raise OSError(f"no GPT-2 tokenizer ({why}): connect to the internet once, or set {cache}") from None


def vocabulary(name: str) -> int:
    """Tokens of a tokenizer, without loading it."""
    return {"bytes": 257, "gpt2": 50257}.get(name) or len(name.removeprefix("characters:"))


def encode(tokenizer: tiktoken.Encoding, text: str) -> list[int]:
    """Raises ValueError for a character that a character model does not know."""
    if tokenizer.name == "characters":
        if unknown := set(text) - {t.decode() for t in tokenizer.token_byte_values()}:
            raise ValueError(f"the model's alphabet has no {min(unknown)!r}")
    return tokenizer.encode_ordinary(text)


class PlainUnpickler(pickle.Unpickler):
    """Reads dicts, strings and numbers. A pickle can run any code, but only through what it names here."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"{module}.{name}")


def own_tokenizer(folder: Path) -> str | None:
    """The tokenizer of .bin files, from the meta.pkl beside them, ours or nanoGPT's, if any. Raises ValueError."""
    path = folder / "meta.pkl"
    if not path.is_file():
        return None
    try:
        meta = PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        if re.fullmatch("bytes|gpt2|characters:.+", name := str(meta.get("tokenizer")), re.DOTALL):  # ours
            return name
        letters = [meta["itos"][i] for i in range(len(meta["itos"]))]
        if set(map(len, letters)) != {1} or len(set(letters)) < len(letters):
            raise ValueError("not one character a token")
        return "characters:" + "".join(letters)
    except Exception as error:  # a foreign or damaged pickle can raise nearly anything
        known = "a tokenizer known here, or nanoGPT's character table"
        raise ValueError(f"{path} does not name {known} ({error}): move it away, and add --tokenizer") from None


def place_of(data: str) -> Path:
    """What --data names: a file or a folder; "stdlib" is Python's own library, wherever that lies."""
    return Path(sysconfig.get_path("stdlib")) if data == "stdlib" else as_path(data)


def text_files(data: str) -> list[Path]:
    """The files in place_of(data), or that file, sorted; of "stdlib" Python's sources without its tests and without
    what is installed. Raises FileNotFoundError or ValueError."""
    root, skip, ending = place_of(data), set(), ""
    if data == "stdlib":
        skip, ending = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}, ".py"
    if not root.exists():
        raise FileNotFoundError(f"--data {data}: no such file or folder")
    if [path.name for path in root.glob("*.py")] == ["prepare.py"]:  # a data folder of nanoGPT's
        raise ValueError(f"--data {data}: no train.bin there yet: run its prepare.py first")
    files, seen = [] if root.is_dir() else [root], set(map(str, root.resolve().parents))
    for folder, subfolders, names in os.walk(root, followlinks=True):
        # Not a run's own folder; and none a second time or from above, as links can lead there.
        if {"ckpt.pt", "d2dmoe.pt"} & set(names) or os.path.realpath(folder) in seen:
            subfolders[:], names = [], []
        seen.add(os.path.realpath(folder))
        subfolders[:] = sorted(s for s in subfolders if s not in skip and not s.startswith("."))
        files += [Path(folder, n) for n in names if n.endswith(ending) and not n.startswith(".")]
    return sorted(path for path in files if path.is_file())  # no pipes, no dangling links


def as_text(content: bytes) -> str | None:
    """UTF-8 text, or None for anything else. (NUL is valid UTF-8, but where it occurs, it is no text.)"""
    try:
        return None if b"\0" in content else content.decode()
    except UnicodeDecodeError:
        return None


def pieces(text: str, size: int = 1 << 16) -> Iterator[str]:
    """Cut between a word and the space or newline after it, where GPT-2 splits anyway: the tokens do not change. (If
    there is none for long, it is cut all the same.)"""
    pattern = rf"(?s).{{1,{size}}}(?:.{{0,{size}}}?\S(?=[ \n])|.{{0,{size}}})"
    return (piece[0] for piece in re.finditer(pattern, text))


def encode_text(data: str, tokenizer: tiktoken.Encoding, folder: Path) -> None:
    """Writes train.bin and val.bin (uint16), <|endoftext|> after each file. Every tenth file is held out, of fewer than
    ten the last tenth of the tokens. Raises ValueError, OSError."""
    files, texts, clock = text_files(data), 0, time.perf_counter()
    end = [tokenizer.eot_token] if tokenizer.special_tokens_set else []
    with atomic_write(folder / "train.bin") as train, atomic_write(folder / "val.bin") as val:
        for i, file in enumerate(files, 1):
            try:
                text = as_text(file.read_bytes())
            except OSError as error:
                raise ValueError(f"cannot read {file}: {error.strerror}") from None
            if text is None:
                continue
            texts += 1
            part = train if texts % 10 else val
            for piece in pieces(text):
                part.write(np.array(encode(tokenizer, piece), dtype=np.uint16).tobytes())
                if time.perf_counter() - clock > 5:
                    clock = time.perf_counter()
                    say(f"encoding file {i} of {len(files)}, {(train.tell() + val.tell()) // 2:,} tokens so far")
            part.write(np.array(end, dtype=np.uint16).tobytes())
        if texts == 0:
            raise ValueError(f"{data} is not UTF-8 text, nor a folder with train.bin and val.bin: give one as --data")
        if texts < 10:
            length = train.tell() // 2
            cut = train.seek(2 * (length - length // 10))
            val.write(train.read())
            train.truncate(cut)
    if texts < len(files):
        say(f"{len(files) - texts} of {len(files)} files are not UTF-8 text and were left out")


def find_tokens(data: str, asked: str | None, stated: str | None, model: GPT | None) -> tuple[Path | None, str | None]:
    """The folder with the tokens of `data`, None if it is text that must be encoded; and their tokenizer's name, None
    if nothing tells it: --tokenizer (asked), the checkpoint of `model` (stated) or the tokens' meta.pkl, which must
    agree. Raises ValueError."""
    folder = place_of(data)
    encoded = (folder / "train.bin").exists() or (folder / "val.bin").exists()
    told = {asked, stated, own_tokenizer(folder) if encoded else None} - {None}
    if len(told) > 1:
        raise ValueError(f"--tokenizer, checkpoint and meta.pkl name different tokenizers: {sorted(told)!r:.99}")
    if not told:
        told = {None if encoded or model else "bytes"}  # a new model reads text as bytes
    [tokenizer] = told
    if tokenizer is None and not (encoded and model):
        raise ValueError(f"nothing names the tokenizer of --data {data}: add --tokenizer gpt2 or bytes")
    if tokenizer and model and vocabulary(tokenizer) > (V := model.config.vocab_size):
        raise ValueError(f"the model's vocabulary of {V} is too small for the tokenizer {tokenizer[:20]!r}")
    return folder if encoded else None, tokenizer


def put_tokens(folder: Path | None, data: str, tokenizer: str | None, out: Path, config: GPTConfig) -> None:
    """Puts tokens into `out`, those of `folder` or, if it is None, the text of `data` encoded; and, in meta.pkl, their
    tokenizer's name. One folder, one text: once there, tokens never change, so that they are those of every model
    beside them. Raises ValueError if `out` has others, or if these are none for this config, OSError."""
    new = folder or out / ".new"
    try:
        if folder is None:
            if out.exists() and place_of(data).exists() and place_of(data).samefile(out):
                raise ValueError(f"{out} has no train.bin and val.bin: give their folder, or text elsewhere, as --data")
            shutil.rmtree(new, ignore_errors=True)  # of a run that was killed
            encode_text(data, load_tokenizer(tokenizer), new)
        open_tokens(new, config)  # what is no good is not kept
        pairs, named = [(new / name, out / name) for name in ("train.bin", "val.bin")], own_tokenizer(out)
        held = [pair for pair in pairs if pair[1].exists() and not pair[1].samefile(pair[0])]
        if named not in (None, tokenizer) or not all(filecmp.cmp(*pair, shallow=False) for pair in held):
            other = f"{out} has tokens of another text or tokenizer"
            raise ValueError(f"{other}: choose another --out, or delete its train.bin, val.bin and meta.pkl")
        for source, path in pairs:
            if path.exists():
                continue
            path.unlink(missing_ok=True)  # a link to nowhere
            if folder is None:
                os.replace(source, path)
                continue
            try:
                os.link(source.resolve(), path)  # a second name of the same file
            except OSError:  # another file system
                path.symlink_to(source.resolve())
    finally:
        shutil.rmtree(out / ".new", ignore_errors=True)
    if tokenizer is not None and named is None:
        with atomic_write(out / "meta.pkl") as f:  # vocab_size: what nanoGPT's train.py reads there
            pickle.dump({"vocab_size": vocabulary(tokenizer), "tokenizer": tokenizer}, f)


def open_tokens(folder: Path, config: GPTConfig) -> list[np.ndarray]:
    """Training and held-out tokens, mapped from disk. Raises ValueError if they are something else or too few,
    FileNotFoundError."""
    opened, T = [], config.block_size
    for path in (folder / "train.bin", folder / "val.bin"):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: tokens are a train.bin and a val.bin (uint16) in one folder")
        length, odd = divmod(path.stat().st_size, 2)
        if length <= T:
            few = f"{length} tokens are too few for a context of {T}"
            raise ValueError(f"{path.name}: {few}: give more text (of fewer than ten files a tenth is held out)")
        tokens = np.memmap(path, dtype=np.uint16, mode="r", shape=(length,))
        start = tokens[: 1 << 24]
        header = start[:2].tobytes() in (b"\x93NUM", (20240520).to_bytes(4, "little"))  # numpy's, llm.c's
        if odd or header or not start[1::2].any():
            raise ValueError(f"{path} is not a plain file of uint16 tokens: a header, an odd size or wider tokens")
        if as_text(start.tobytes()) is not None:
            raise ValueError(f"{path} holds text, not tokens: rename it, and give it as --data")
        check_vocabulary(start, config, path)  # the rest is checked as it is read
        opened.append(tokens)
    return opened


def fingerprint(train: np.ndarray, val: np.ndarray, checkpoint: dict) -> dict[str, int]:
    """Identifies a corpus; warns if it is not the one that the checkpoint was trained on."""
    text = {"train_tokens": len(train), "val_tokens": len(val), "val_crc32": zlib.crc32(val[: 1 << 24].tobytes())}
    if checkpoint.get("text") not in (None, text):
        say("warning: the model was trained on another text than this, perhaps on some that is held out now")
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Plumbing that the three scripts share


class Help(argparse.RawDescriptionHelpFormatter):
    """Adds to each option's help its default."""

    def _get_help_string(self, action):
        told = "(default" in action.help or action.default in (None, []) or action.nargs == 0
        return action.help if told else f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """argparse, with examples, and one line for a wrong option."""

    def __init__(self, prog: str, description: str, *examples: str):
        epilog = "\n  ".join(("examples:", *(f"python {prog} {example}" for example in examples)))
        super().__init__(prog, description=description, epilog=epilog, formatter_class=Help, allow_abbrev=False)

    def error(self, message):
        raise ValueError(f"{message} (see python {self.prog} --help)")


def number(kind: type, low: float, high: float = sys.float_info.max) -> Callable:
    """An option's type: an int or float from low to high."""

    def parse(text):
        if not low <= kind(text) <= high:
            bounds = f"at least {low:g}" if high >= 2**40 else f"between {low:g} and {high:g}"
            raise argparse.ArgumentTypeError(f"{text} is not {bounds}")
        return kind(text)

    parse.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return parse


def as_path(text: str) -> Path:
    """An option's type: a shell leaves the ~ of --out=~/run to us."""
    return Path(os.path.expanduser(text))


def add_system_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The options that the three scripts have in common."""
    group = parser.add_argument_group("system")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto takes the best there is")
    group.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of everything drawn at random")
    return group


def printable(text: str) -> str:
    """Control characters, which could drive a terminal, as escapes; newlines and tabs pass."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def say(text: str = "", error: bool = False) -> None:
    """Writes a line to stdout, from rank 0, or an error to stderr. A closed pipe or full disk behind > ends no run."""
    if error or not dist.is_initialized() or dist.get_rank() == 0:
        try:
            print(printable(text) + "\n", end="", file=sys.stderr if error else sys.stdout, flush=True)
        except (OSError, ValueError):  # to nowhere, or Python fails again as it flushes at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2 if error else 1)


def run(main: Callable[[], int | None]) -> None:
    """Runs a script. A user's mistake ends in one line on stderr and status 1, a signal in 128 + its number; anything
    else is a bug, whose traceback is shown."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # None after >&-
            stream.reconfigure(errors="backslashreplace")  # what a terminal cannot show
    status = 1
    try:
        status = main() or 0
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
        say("\ninterrupted; files are complete or as they were", error=True)
    except BrokenPipeError:  # who read our output has left, as head does
        status = 128 + 13  # SIGPIPE's
    except (ValueError, OSError) as error:
        say(f"error: {' '.join(str(error).split())}", error=True)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):
            say("error: out of memory: lower --batch_size or the sizes of the model", error=True)
        elif not dist.is_initialized() or dist.get_rank() == 0 or "onnection" not in str(error):
            raise  # (else rank 0 has ended, and said why)
    if dist.is_initialized():
        if status == 0:
            dist.destroy_process_group()
        os._exit(status)  # gloo's threads can abort in Python's own shutdown
    sys.exit(status)


@contextlib.contextmanager
def noted_signals() -> Iterator[list[tuple[int, float]]]:
    """Inside, Ctrl-C, SIGTERM and SIGHUP are noted in the list that it yields, which the loop reads after each step.
    Only a second Ctrl-C interrupts at once (not the copy of the first one that torchrun passes on within a second)."""
    stop, before = [], {}

    def note(signum, frame):
        if signum == signal.SIGINT and stop and time.monotonic() - stop[0][1] > 1:
            raise KeyboardInterrupt
        stop.append((signum, time.monotonic()))

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        with contextlib.suppress(AttributeError, ValueError):  # no SIGHUP on Windows; only the main thread may ask
            if signal.getsignal(signum := getattr(signal, name)) != signal.SIG_IGN:  # nohup's, or a script's &
                before[signum] = signal.signal(signum, note)
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def claim(folder: Path) -> BinaryIO:
    """Makes the folder and locks it against a second run for as long as the result is kept. Raises OSError where it
    cannot be written, ValueError where another run has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "wb")
    except OSError as error:
        raise OSError(f"cannot write into {folder} ({error.strerror}): choose another --out") from None
    with contextlib.suppress(ImportError, OSError):  # Windows has no fcntl, some file systems no locks
        import fcntl

        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"another run is writing into {folder}: wait for it or choose another --out") from None
    return lock


def keep_previous(path: Path) -> None:
    """Gives an existing file a second name that no file has yet, NAME-previous.pt, else NAME-previous-2.pt and so on,
    so that writing over it loses nothing, and says so. Raises OSError."""
    if not path.exists():
        return
    kept, n = path.with_stem(f"{path.stem}-previous"), 2
    while os.path.lexists(kept):
        kept, n = path.with_stem(f"{path.stem}-previous-{n}"), n + 1
    try:
        os.link(path.resolve(), kept)
    except OSError:  # a file system without hard links, or a link to another one
        shutil.copyfile(path, kept)
    say(f"the {path.name} that was in {path.parent} stays as {kept}")


def put_aside(*paths: Path) -> None:
    """What no longer belongs to the folder's newest model keeps only another name, as keep_previous gives it."""
    for path in paths:
        keep_previous(path)
        path.unlink(missing_ok=True)


def pick_device(name: str) -> torch.device:
    """auto: CUDA, else Apple's MPS, else the CPU; under torchrun this process's GPU. Raises ValueError if not there."""
    local_rank = os.environ.get("LOCAL_RANK")
    if name == "auto":
        mps = torch.backends.mps.is_available() and local_rank is None  # gloo knows no MPS
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda" and local_rank is not None:
        name = f"cuda:{local_rank}"
    try:
        return torch.zeros(1, device=name).device
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).partition(chr(10))[0]}") from None


def start_processes(device: torch.device) -> tuple[int, int]:
    """rank and world size; under torchrun joins the group, by nccl on GPUs and gloo elsewhere."""
    if "LOCAL_RANK" not in os.environ:
        return 0, 1
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Rank 0 may encode a large corpus while the others wait.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))
    dist.barrier()  # all have come this far before one writes a file (nccl does not wait for the others by itself)
    return dist.get_rank(), dist.get_world_size()


@contextlib.contextmanager
def rank_zero_first() -> Iterator[None]:
    """Rank 0 goes through the block, downloading and encoding; then the others, which use its results."""
    if dist.is_initialized() and dist.get_rank() > 0:
        dist.barrier()
    yield
    if dist.is_initialized() and dist.get_rank() == 0:
        dist.barrier()


if __name__ == "__main__":
    run(main)
