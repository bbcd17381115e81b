"""Trains a dense GPT whose feed-forward layers fire sparsely: the first half of D2DMoE.

    python train.py                                     from scratch, on the Python standard library's sources, on a laptop
    python train.py --init resume                       go on after Ctrl-C or a crash
    python train.py --preset gpt2 --init gpt2 --data FOLDER            fine-tune GPT-2 as the paper does
    torchrun --nproc_per_node=8 train.py ...            the same tokens a step, on eight GPUs

loss = cross entropy + alpha * mean over feed-forward layers of penalty(activations)         equation (1) of the README

The file follows the data: text -> tokens -> batches -> evaluation -> checkpoints -> settings -> the loop.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import math
import os
import shutil
import signal
import sys
import sysconfig
import time
import warnings
import zipfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from d2dmoe import GPT, Gate, GPTConfig, flops_per_token, from_gpt2, square_hoyer
from kernels import ACTIVATIONS

# ---------------------------------------------------------------------------------------------------------------------
# Text -> tokens


N_VOCAB = {"bytes": 257, "gpt2": 50257}  # known without loading a tokenizer, which GPT-2's may need a network for


def load_tokenizer(name: str) -> tiktoken.Encoding:
    """"bytes" (256 bytes and <|endoftext|>, nothing to download) or "gpt2" (tiktoken's). Exits if that cannot be had."""
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever the network, a proxy or a full disk raise
        sys.exit(
            f"cannot load GPT-2's tokenizer ({type(error).__name__}): connect to the internet once, "
            "or set TIKTOKEN_CACHE_DIR to a folder that holds tiktoken's cache"
        )


def text_files(data: str) -> list[Path]:
    """The files of a corpus, sorted: "stdlib", a file or a folder. Links to folders are not followed. Exits if missing."""
    if data == "stdlib":
        root, suffix = Path(sysconfig.get_path("stdlib")), ".py"
        skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    else:
        root, suffix, skip = Path(data), "", set()
    if root.is_file():
        return [root]
    if not root.is_dir():
        sys.exit(f"--data {data}: no such file or folder; if the name came from a checkpoint, say by --data where the text is now")
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in skip and not s.startswith(".")]
        files += [Path(folder, name) for name in names if name.endswith(suffix) and not name.startswith(".")]
    return sorted(f for f in files if is_text(f))


def is_text(path: Path) -> bool:
    """Readable and without a NUL byte at its start: pictures and archives in a folder of text are passed over."""
    try:
        if not path.is_file():  # a pipe would be waited for
            return False
        with open(path, "rb") as f:
            return b"\0" not in f.read(8192)
    except OSError:
        return False


CONTROLS = "\x1c\x1d\x1e\x1f"  # white space to Python, but not to the pattern of GPT-2's tokenizer


def read_chunks(path: Path, size: int = 1 << 22) -> Iterator[str]:
    """A text file in pieces of about `size` characters, so that a large one is never in memory whole.

    Cut before a white space that follows none: no token of GPT-2 spans such a place, so the pieces' tokens are the
    text's. Bytes that are not UTF-8 become U+FFFD; line ends stay as they are. Exits if the file cannot be read.
    """
    try:
        with open(path, encoding="utf-8", errors="replace", newline="") as f:
            rest = ""
            while block := f.read(size):
                rest += block
                cut = max(rest.rfind("\n"), rest.rfind(" "))
                while cut > 0 and rest[cut - 1].isspace() and rest[cut - 1] not in CONTROLS:
                    cut -= 1
                if cut > 0:
                    yield rest[:cut]
                    rest = rest[cut:]
                elif len(rest) > 16 * size:  # not one white space in 64 MB
                    yield rest
                    rest = ""
            yield rest
    except OSError as error:
        sys.exit(f"cannot read {path}: {error.strerror}")


def encode_files(files: list[Path], tokenizer: tiktoken.Encoding, target: Path) -> None:
    """Writes the files' tokens to `target` as uint16, a <|endoftext|> after each; the pieces of a large file on all cores."""
    cores = os.cpu_count() or 1

    def flush(pieces):
        for tokens in tokenizer.encode_ordinary_batch(pieces, num_threads=cores):
            out.write(np.array(tokens, dtype=np.uint16).tobytes())

    with atomic_write(target) as out:
        for file in files:
            pieces = []
            for piece in read_chunks(file):
                pieces.append(piece)
                if len(pieces) == cores:
                    flush(pieces)
                    pieces = []
            flush(pieces)
            out.write(np.array([tokenizer.eot_token], dtype=np.uint16).tobytes())


def map_tokens(path: Path) -> np.ndarray:
    """A file of uint16 tokens, mapped from disk. Exits if it is empty, cut off or unreadable."""
    try:
        return np.memmap(path, dtype=np.uint16, mode="r")
    except (OSError, ValueError) as error:
        sys.exit(f"cannot read tokens from {path}: {error}")


def is_encoded(data: str) -> bool:
    """Whether a folder holds nanoGPT's train.bin and val.bin"""
    return Path(data, "train.bin").is_file() and Path(data, "val.bin").is_file()


def load_corpus(data: str, tokenizer_name: str, out: Path, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out tokens, uint16, mapped from disk.

    A folder with nanoGPT's train.bin and val.bin is taken as it is. Of other folders every tenth file is held out, of fewer
    than ten files the last tenth of their tokens; these are kept under `out` and encoded again only when a file changes.
    Exits if there is less text than one context.
    """
    if is_encoded(data):
        train, val = map_tokens(Path(data, "train.bin")), map_tokens(Path(data, "val.bin"))
    else:
        files = text_files(data)
        if not files:
            sys.exit(f"--data {data}: no text in this folder")
        stamp = [tokenizer_name, *((str(f.absolute()), f.stat().st_size, f.stat().st_mtime_ns) for f in files)]
        key = hashlib.sha256(repr(stamp).encode()).hexdigest()[:12]
        held_out = files[9::10]
        parts = []
        for part, members in (("train", [f for i, f in enumerate(files) if i % 10 != 9]), ("val", held_out)):
            path = out / f"tokens-{key}-{part}.bin"
            if members and not path.exists():
                encode_files(members, load_tokenizer(tokenizer_name), path)
            parts.append(map_tokens(path) if members else np.zeros(0, np.uint16))
        train, val = parts
        if not held_out:
            cut = len(train) - len(train) // 10
            train, val = train[:cut], train[cut:]
    for part, tokens in (("training", train), ("held-out", val)):
        if len(tokens) < block_size + 1:
            sys.exit(f"--data {data}: {len(tokens)} {part} tokens are too few for a context of {block_size}")
    return train, val


# ---------------------------------------------------------------------------------------------------------------------
# Tokens -> batches


def take_windows(
    tokens: np.ndarray, offsets: Tensor, block_size: int, vocab_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Inputs and targets [B, T] int64, the windows that start at offsets [B]. Exits on a token outside the vocabulary."""
    windows = np.stack([tokens[o : o + block_size + 1] for o in offsets.tolist()]).astype(np.int64)  # [B, T+1]
    if windows.max() >= vocab_size:
        sys.exit(f"token {windows.max()} lies outside the model's vocabulary of {vocab_size}: are --data and --tokenizer right?")
    windows = torch.from_numpy(windows)
    if device.type == "cuda":  # from page-locked memory the copy is only queued: the host goes on
        windows = windows.pin_memory().to(device, non_blocking=True)
    else:
        windows = windows.to(device)
    return windows[:, :-1], windows[:, 1:]


def draw_offsets(length: int, rows: int, block_size: int, seed: int, step: int) -> Tensor:
    """Where the windows of a step start, [rows]: a function of seed and step alone.

    So a resumed run sees the batches it would have seen, and any number of processes share out the same ones.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)  # far apart: two seeds share no step
    return torch.randint(length - block_size, (rows,), generator=generator)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(
    model: GPT, tokens: np.ndarray, windows: int, batch_size: int, gate: Gate = Gate(),
    autocast: contextlib.AbstractContextManager = contextlib.nullcontext(),
) -> tuple[float, list[dict[str, Tensor]]]:
    """Mean loss in nats a token over evenly spaced windows, and the experts that each token executed in every block.

    -> loss, [{layer name: [windows * T] experts executed}]; the dicts are empty for a dense model.
    """
    config = model.config
    device = model.lm_head.weight.device
    last = len(tokens) - config.block_size - 1
    offsets = torch.linspace(0, last, min(windows, last + 1), dtype=torch.float64).long()
    total, counts = 0.0, [{} for _ in range(config.n_layer)]
    batch_size = max(1, min(batch_size, 2**26 // (config.block_size * config.vocab_size)))  # logits of 256 MB at most
    for chunk in offsets.split(batch_size):
        x, y = take_windows(tokens, chunk, config.block_size, config.vocab_size, device)
        with autocast:
            logits, measured = model(x, gate)
        total += F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="sum").item() / config.block_size
        for layer, m in enumerate(measured):
            for name in m.keys() - {"penalty"}:
                counts[layer].setdefault(name, []).append(m[name].sum(-1).flatten().cpu())  # [B*T]
    return total / len(offsets), [{name: torch.cat(parts) for name, parts in layer.items()} for layer in counts]


@torch.no_grad()
def activation_sparsity(model: GPT, x: Tensor) -> tuple[float, float]:
    """Share of feed-forward activations that are zero (or negative, for a GELU) and the mean square Hoyer, on x [B, T]."""
    zeros, effective = [], []
    for block, inputs in zip(model.transformer.h, model.hidden(x)[2], strict=True):
        z = block.mlp.c_fc(inputs["mlp"])  # [B, T, d_ff]
        zeros.append((z <= 0).float().mean())
        effective.append(square_hoyer(ACTIVATIONS[block.mlp.activation](z).abs()).mean())
    return torch.stack(zeros).mean().item(), torch.stack(effective).mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def first_line(error: BaseException) -> str:
    """Of an error's message, or the error's name where it has none"""
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears under its name only when it is complete. Exits, leaving an old file as it was, on failure."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        reason = getattr(cause, "strerror", None) or first_line(error)
        sys.exit(f"cannot write {path}: {reason}; what was there before is untouched")
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def save_checkpoint(path: Path, model: GPT, **rest) -> None:
    """Weights, config and `rest` (plain numbers, strings, tensors and dicts of them) in one file, written atomically."""
    with atomic_write(path) as f:
        torch.save({"model": model.state_dict(), "config": dataclasses.asdict(model.config), **rest}, f)


def keep_previous(folder: Path) -> None:
    """Gives an earlier run's ckpt.pt a second name, ckpt-previous.pt, before it loses the first. Exits on failure."""
    path, previous = folder / "ckpt.pt", folder / "ckpt-previous.pt"
    try:
        previous.unlink(missing_ok=True)
        try:
            previous.hardlink_to(path)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, previous)
    except OSError as error:
        sys.exit(f"cannot keep {path} as {previous}: {error.strerror}; it is untouched, choose another --out")
    print(f"the checkpoint that was in {folder} stays as {previous}")


def load_checkpoint(path: str | Path, name: str = "ckpt.pt") -> dict:
    """What a checkpoint file, or the file `name` in a folder, holds; on the CPU. Exits if missing, damaged or foreign.

    weights_only: a pickle can run any code when it is loaded, so one with more than tensors and plain values is refused.
    """
    path = Path(path)
    if path.is_dir():
        path = path / name
    if not path.exists():
        convert = f"python convert.py --ckpt {path.parent}" if path.with_name("ckpt.pt").exists() else "train.py, then convert.py"
        sys.exit(f"no checkpoint at {path}: first run {convert if name == 'd2dmoe.pt' else 'train.py'}")
    try:
        if zipfile.is_zipfile(path):  # torch.load does not compare the checksums that torch.save stored
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"checksum of {damaged} is wrong")
        with warnings.catch_warnings():  # torch's about foreign pickles, which it then refuses
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict):
            raise ValueError("it holds no dict")
    except Exception as error:  # a damaged file can make zipfile and the unpickler raise nearly anything
        reason = first_line(error).partition(". ")[0]
        sys.exit(f"{path} is damaged or not a checkpoint ({type(error).__name__}: {reason[:200]})")
    return checkpoint


def build_model(checkpoint: dict, source: str | Path) -> GPT:
    """The model in a checkpoint of ours, of nanoGPT's train.py, or in a GPT-2 state dict of Hugging Face; float32, CPU.

    Exits where sizes and weights do not fit together.
    """
    try:
        if "wte.weight" in checkpoint or "transformer.wte.weight" in checkpoint:
            config, weights = from_gpt2(checkpoint)
        else:
            weights = {name.removeprefix("_orig_mod."): w for name, w in checkpoint["model"].items()}
            if "model_args" in checkpoint:  # nanoGPT; its GELU is exact, its causal mask may sit in a buffer
                known = {f.name for f in dataclasses.fields(GPTConfig)}
                args = {k: v for k, v in checkpoint["model_args"].items() if k in known}
                config = GPTConfig(**{"activation": "gelu", **args})
                weights = {k: w for k, w in weights.items() if not (k.endswith(".attn.bias") and w.dim() == 4)}
            else:
                config = GPTConfig(**checkpoint["config"])
        blocks = {name.split(".")[2] for name in weights if name.startswith("transformer.h.")}
        if len(blocks) != config.n_layer:  # before a wrong n_layer builds a million of them
            raise ValueError(f"weights of {len(blocks)} blocks for n_layer {config.n_layer}")
        with torch.device("meta"):  # no memory until the shapes are known to fit
            model = GPT(config)
        model.load_state_dict({k: w.float() for k, w in weights.items()}, assign=True)
        model.lm_head.weight = model.transformer.wte.weight  # assign untied them
        if not all(w.isfinite().all() for w in model.state_dict().values()):
            raise ValueError("weights that are not finite")
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        sys.exit(f"{source} does not hold a model that fits its own sizes ({type(error).__name__}: {reason})")
    return model


HUB = "https://huggingface.co/{name}/resolve/main/pytorch_model.bin"
GPT2_REPOS = {"gpt2": "openai-community/gpt2"} | {f"gpt2-{s}": f"openai-community/gpt2-{s}" for s in ("medium", "large", "xl")}


def local_path(source: str) -> Path:
    """The path that a path or a file:// URL names"""
    return Path(url2pathname(urlsplit(source).path) if source.startswith("file://") else source)


def choose_tokenizer(asked: str | None, checkpoint: dict, vocab_size: int, data: str) -> str:
    """The tokenizer asked for, else the checkpoint's, else what its vocabulary suggests. Exits if it is to encode `data` but
    has more tokens than the model."""
    name = asked or str(checkpoint.get("tokenizer", "bytes" if vocab_size == 257 else "gpt2"))
    if name not in N_VOCAB:
        sys.exit(f"the checkpoint's tokenizer {name} is unknown: choose one of {', '.join(N_VOCAB)} by --tokenizer")
    if N_VOCAB[name] > vocab_size and not is_encoded(data):
        sys.exit(f"the model's vocabulary of {vocab_size} is too small for the tokenizer {name}: choose another --tokenizer")
    return name


def load_initial(init: str) -> tuple[GPT, dict]:
    """The model that --init names (a GPT-2 of OpenAI's, a file:// URL or a path) and the checkpoint it came in."""
    if init in GPT2_REPOS:
        url = HUB.format(name=GPT2_REPOS[init])
        try:  # one cache file a model: every repository calls its file pytorch_model.bin
            checkpoint = torch.hub.load_state_dict_from_url(url, map_location="cpu", file_name=f"{init}.bin", weights_only=True)
        except Exception as error:  # the network's many errors, or a file that is no state dict
            sys.exit(f"cannot load {url} ({first_line(error)}): connect to the internet, or download it and give its path instead")
    else:
        checkpoint = load_checkpoint(local_path(init))
    return build_model(checkpoint, init), checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# Settings

PRESETS = {
    "default": {},
    # 124M shapes and the paper's fine-tuning: 1,000 steps of 8 * 120 * 1024 tokens, L1 for ReLU (appendix of the paper)
    "gpt2": dict(
        tokenizer="gpt2", block_size=1024, n_layer=12, n_head=12, n_embd=768, activation="relu", penalty="l1", alpha=5e-4, steps=1000,
        batch_size=8, grad_accum=120, lr=6e-4, warmup=100, eval_every=50, eval_windows=64,
    ),  # fmt: skip
}  # fmt: skip


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that the three scripts have in common."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto takes the best there is (default: auto)")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn at random (default: %(default)s)")


def check_seed(parser: argparse.ArgumentParser, seed: int) -> None:
    """Exits through the parser if a seed lies outside of what torch's generators take."""
    if not 0 <= seed < 2**32:
        parser.error("--seed must be 0 or larger, and below 2**32")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a dense GPT with sparse activations.")
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="default", help="gpt2: 124M shapes and the paper's fine-tuning (default: %(default)s)")
    add("--out", type=Path, default=Path("out"), help="folder for ckpt.pt and encoded text (default: %(default)s)")
    add("--data", default="stdlib", help="stdlib (Python's own sources), a text file, a folder of text, or one with train.bin and val.bin of uint16 (default: %(default)s)")
    add("--tokenizer", choices=("bytes", "gpt2"), default=None, help="(default: bytes, or the checkpoint's)")
    add("--init", default="scratch", help=f"scratch, resume, {', '.join(GPT2_REPOS)}, or a checkpoint: ours, nanoGPT's, or a GPT-2 state dict (default: %(default)s)")
    add("--n_layer", type=int, default=4, help="blocks, when starting from scratch (default: %(default)s)")
    add("--n_head", type=int, default=4, help="attention heads, when starting from scratch (default: %(default)s)")
    add("--n_embd", type=int, default=128, help="width d, when starting from scratch (default: %(default)s)")
    add("--block_size", type=int, default=None, help="context in tokens (default: 128, or the checkpoint's)")
    add("--no_bias", action="store_true", help="leave biases out, when starting from scratch")
    add("--activation", choices=ACTIVATIONS, default=None, help="(default: relu, or the checkpoint's; another one than the checkpoint's is ReLUfication and the like)")
    add("--penalty", choices=("hoyer", "l1", "none"), default="hoyer", help="on feed-forward activations (default: %(default)s)")
    add("--alpha", type=float, default=1e-3, help="weight of the penalty, reached by a linear ramp at half of the steps; the paper's GPT-2 takes L1 with 5e-4 for ReLU, 5e-5 for GELU (default: %(default)s)")
    add("--steps", type=int, default=1500, help="optimizer steps (default: %(default)s)")
    add("--batch_size", type=int, default=16, help="sequences that a process computes at once (default: %(default)s)")
    add("--grad_accum", type=int, default=1, help="batches a step, shared out among the processes of torchrun (default: %(default)s)")
    add("--lr", type=float, default=2e-3, help="peak learning rate; cosine to a tenth of it (default: %(default)s)")
    add("--warmup", type=int, default=100, help="steps of linear warm-up (default: %(default)s)")
    add("--weight_decay", type=float, default=0.1, help="on matrices (default: %(default)s)")
    add("--beta2", type=float, default=0.95, help="AdamW's; beta1 is 0.9 (default: %(default)s)")
    add("--grad_clip", type=float, default=1.0, help="largest norm of the gradient, 0 for any (default: %(default)s)")
    add("--eval_every", type=int, default=100, help="steps between evaluations, each of which saves (default: %(default)s)")
    add("--eval_windows", type=int, default=256, help="contexts of held-out text in an evaluation (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the matrix multiplies (default: %(default)s)")
    add("--compile", action="store_true", help="torch.compile the model")
    add_shared_arguments(parser)
    parser.set_defaults(**PRESETS[parser.parse_known_args(argv)[0].preset])
    args = parser.parse_args(argv)
    if args.init == "resume":  # the run's own settings, save what this command line says otherwise
        settings = load_checkpoint(args.out).get("settings", {})
        settings = settings if isinstance(settings, dict) else {}
        parser.set_defaults(**{k: v for k, v in settings.items() if k not in ("out", "init", "preset") and hasattr(args, k)})
        args = parser.parse_args(argv)
    for name in ("steps", "batch_size", "grad_accum", "eval_every", "eval_windows"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    check_seed(parser, args.seed)
    if args.block_size is not None and args.block_size < 1:
        parser.error("--block_size must be at least 1")
    if not 0 <= args.beta2 < 1:
        parser.error("--beta2 must be at least 0 and below 1")
    for name in ("alpha", "lr", "warmup", "weight_decay", "grad_clip"):
        if not 0 <= getattr(args, name) < math.inf:
            parser.error(f"--{name} must be a finite number, 0 or larger")
    return args


def pick_device(name: str) -> torch.device:
    """auto: CUDA, else Apple's MPS, else the CPU; under torchrun this process's GPU. Exits if the device is not there."""
    local_rank = os.environ.get("LOCAL_RANK")
    if name == "auto":
        mps = torch.backends.mps.is_available() and local_rank is None  # gloo knows no MPS
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda" and local_rank is not None:
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        return device
    except (AssertionError, RuntimeError) as error:
        sys.exit(f"--device {name} cannot be used here: {first_line(error)}")


def start_processes(device: torch.device) -> tuple[int, int]:
    """rank and world size. Under torchrun joins the group, by nccl on GPUs and gloo elsewhere."""
    if "RANK" not in os.environ:
        return 0, 1
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Rank 0 may encode a large corpus while the others wait.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))
    return dist.get_rank(), dist.get_world_size()


def end_processes(world: int, status: int = 0) -> None:
    """Under torchrun leaves the group and ends this process, without Python's own shutdown: gloo's threads can still hold
    tensors of the last all_reduce, and Python, when it goes down, aborts a thread that lets go of one."""
    if world > 1:
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(status)


@contextlib.contextmanager
def rank_zero_first(rank: int, world: int) -> Iterator[None]:
    """Rank 0 goes through the block, downloading and encoding; the others follow and find what it left."""
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and world > 1:
        dist.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# The loop

PEAK_BFLOAT16 = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12, "4090": 165e12}  # data sheets


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up to `peak`, then a cosine down to a tenth of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.55 + 0.45 * math.cos(math.pi * min(1.0, progress)))


def penalty_weight(step: int, steps: int, alpha: float) -> float:
    """Linear from 0 to alpha over the first half of training."""
    return alpha * min(1.0, step / (0.5 * steps))


def initial_model(args: argparse.Namespace) -> tuple[GPT, dict]:
    """The model to train, in training's config, and the checkpoint it came from ({} for none)."""
    if args.init == "scratch":
        try:
            model = GPT(
                GPTConfig(
                    block_size=args.block_size or 128, vocab_size=N_VOCAB[args.tokenizer or "bytes"], n_layer=args.n_layer,
                    n_head=args.n_head, n_embd=args.n_embd, bias=not args.no_bias, activation=args.activation or "relu",
                    penalty=args.penalty,
                )
            )  # fmt: skip
        except ValueError as error:
            sys.exit(str(error))
        return model, {}
    model, checkpoint = load_initial(str(args.out) if args.init == "resume" else args.init)
    if model.config.num_experts or model.config.attention_experts:
        sys.exit(f"--init {args.init} is a converted model: training starts from a dense one")
    if args.init == "resume" and args.block_size not in (None, model.config.block_size):  # the optimizer's moments have its shape
        sys.exit(f"--init resume keeps the context of {model.config.block_size}: for another one use --init {args.out}/ckpt.pt")
    if args.block_size is not None and args.block_size > model.config.block_size:
        sys.exit(f"--block_size {args.block_size} is longer than the checkpoint's {model.config.block_size}")
    # The same weights under a config that may train another activation, penalty or a shorter context.
    config = dataclasses.replace(
        model.config, activation=args.activation or model.config.activation, penalty=args.penalty,
        block_size=args.block_size or model.config.block_size,
    )  # fmt: skip
    weights = model.state_dict()
    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][: config.block_size]
    model = GPT(config)
    model.load_state_dict(weights)
    return model, checkpoint


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    device = pick_device(args.device)
    rank, world = start_processes(device)
    master = rank == 0
    torch.manual_seed(args.seed)
    with rank_zero_first(rank, world):
        model, checkpoint = initial_model(args)
        config = model.config
        args.tokenizer = choose_tokenizer(args.tokenizer, checkpoint, config.vocab_size, args.data)
        train_tokens, val_tokens = load_corpus(args.data, args.tokenizer, args.out, config.block_size)
    model.to(device)

    rows = args.batch_size * args.grad_accum  # sequences a step, over all processes
    if rows % world:
        sys.exit(f"{rows} sequences a step do not divide among {world} processes: change --batch_size or --grad_accum")
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, args.beta2), fused=True,
    )  # fmt: skip
    first, best = 0, math.inf
    if args.init == "resume":
        try:
            optimizer.load_state_dict(checkpoint["optimizer"])
            for group, decay in zip(optimizer.param_groups, (args.weight_decay, 0.0), strict=True):
                group.update(weight_decay=decay, betas=(0.9, args.beta2))  # this run's, if they were changed
            first, best = int(checkpoint["step"]), float(checkpoint["best_loss"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            sys.exit(f"{args.out}/ckpt.pt cannot be resumed ({type(error).__name__}: {error}): use it with --init instead")
        if first >= args.steps:
            sys.exit(f"{args.out}/ckpt.pt has its {first} steps: give a larger --steps to train on, or run convert.py")
    checkpoint = None  # its weights and moments have been copied
    step_model = torch.compile(model) if args.compile else model
    if world > 1:
        step_model = torch.nn.parallel.DistributedDataParallel(step_model)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")

    def batches(step: int) -> list[tuple[Tensor, Tensor]]:
        """This process's share of a step's sequences, in pieces of at most batch_size."""
        offsets = draw_offsets(len(train_tokens), rows, config.block_size, args.seed, step).chunk(world)[rank]
        return [take_windows(train_tokens, o, config.block_size, config.vocab_size, device) for o in offsets.split(args.batch_size)]

    replaces = args.init != "resume" and (args.out / "ckpt.pt").exists()

    def save(step: int) -> None:
        nonlocal replaces
        if replaces:
            keep_previous(args.out)
            replaces = False
        # No random state: batches depend on seed and step alone, and the model has no dropout.
        settings = {k: v for k, v in vars(args).items() if k != "out"}
        save_checkpoint(
            args.out / "ckpt.pt", model, tokenizer=args.tokenizer, step=step, optimizer=optimizer.state_dict(),
            best_loss=best, settings=settings,
        )  # fmt: skip

    stop = []  # the signals that asked for an end, acted upon when the step is complete

    def ask_to_stop(number, frame):
        if stop:  # a second one does not wait for the step
            raise KeyboardInterrupt
        stop.append(number)

    handlers = {s: signal.signal(s, ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}

    if master:
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{millions:.2f}M parameters, {len(train_tokens):,} training and {len(val_tokens):,} held-out tokens, {device}, {world} process(es)")
        print("zeros: share of activations that are zero; neurons: effectively active ones a feed-forward layer (square Hoyer)")
        print(f"{'step':>6} {'loss':>7} {'val loss':>8} {'zeros':>6} {'neurons':>8} {'tokens/s':>9} {'left':>7}")
    peak = next((v for k, v in PEAK_BFLOAT16.items() if device.type == "cuda" and k in torch.cuda.get_device_name(device)), None)
    spread = torch.linspace(0, len(val_tokens) - config.block_size - 1, args.batch_size, dtype=torch.float64).long()
    probe, _ = take_windows(val_tokens, spread, config.block_size, config.vocab_size, device)  # held-out [B, T]
    losses, clock, since = [], time.perf_counter(), first
    upcoming = batches(first)
    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, args.warmup)
        alpha = penalty_weight(step, args.steps, args.alpha)
        current, total = upcoming, torch.zeros((), device=device)
        for i, (x, y) in enumerate(current):
            # DDP averages gradients over processes: once a step, with the last piece.
            sync = contextlib.nullcontext() if world == 1 or i == len(current) - 1 else step_model.no_sync()
            with sync:
                with autocast:
                    logits, measured = step_model(x)
                    cross_entropy = F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
                    penalty = torch.stack([m["penalty"] for m in measured]).mean()
                    share = len(x) * world / rows  # pieces may differ in size
                    loss = share * (cross_entropy + alpha * penalty)  # equation (1)
                loss.backward()
            total += share * cross_entropy.detach()
        upcoming = batches(step + 1) if step + 1 < args.steps else []  # read and queued while a GPU computes
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
        state = torch.stack([total, norm, torch.tensor(float(len(stop)), device=device)])
        if world > 1:
            dist.all_reduce(state)  # one decision for all processes
            state[:2] /= world
        total, norm, stopping = state.tolist()
        if not math.isfinite(total) or not math.isfinite(norm):
            sys.exit(
                f"step {step}: loss {total}, gradient norm {norm}: not finite, so nothing was saved since the last "
                f"evaluation; try a lower --lr, a longer --warmup or --dtype float32, then --init resume"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)

        done = step + 1
        if master and (done % args.eval_every == 0 or done == args.steps):
            seconds = time.perf_counter() - clock
            val_loss, _ = evaluate(model, val_tokens, args.eval_windows, args.batch_size, autocast=autocast)
            zeros, neurons = activation_sparsity(model, probe)
            if not math.isfinite(val_loss):
                sys.exit(f"step {step}: held-out loss {val_loss}: not finite, so nothing was saved since the last evaluation; try a lower --lr")
            best = min(best, val_loss)
            save(done)
            rate = (done - since) * rows * config.block_size / seconds
            per_step = (time.perf_counter() - clock) / (done - since)
            left = int(per_step * (args.steps - done))
            mfu = f"  mfu {3 * flops_per_token(config, (config.block_size + 1) / 2) * rate / world / peak:.1%}" if peak else ""
            print(
                f"{done:6d} {sum(losses) / len(losses):7.4f} {val_loss:8.4f} {zeros:6.1%} {neurons:8.1f} {rate:9,.0f} "
                f"{left // 60:3d}m{left % 60:02d}s{mfu}", flush=True,
            )  # fmt: skip
            losses, clock, since = [], time.perf_counter(), done
        if stopping and done < args.steps:
            if master:
                save(done)
                print(f"stopped at step {done} and saved; go on with: python train.py --init resume --out {args.out}")
            break
    for s, handler in handlers.items():
        signal.signal(s, handler)
    status = 128 + (stop[0] if stop else signal.SIGTERM) if stopping else 0
    if master and done == args.steps:
        print(f"\nwrote {args.out}/ckpt.pt; now: python convert.py --ckpt {args.out}")
    end_processes(world, status)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: what was saved before is untouched")
    except torch.OutOfMemoryError:
        sys.exit("out of GPU memory: lower --batch_size and raise --grad_accum as much; what was saved before is untouched")
