"""Writes text with a converted model, shades every token by the share of experts it took, and says what that cost.
The closing line counts the new tokens, each at the context it saw, and not the prompt. Its speed leaves out a text's first
two tokens: the prompt is read for the one, and a GPU tunes its kernels in both.

    python sample.py --tau 0.9
    python sample.py --ckpt out/ --prompt "def main(" --temperature 0.7 --top_k 50

--tau decides how many experts run, and needs no retraining: 1 runs all of them, lower is cheaper.
"""

import argparse
import codecs
import math
import os
import sys
import time
from pathlib import Path

import torch

from d2dmoe import Gate, dynamic_k, executed_share, flops_per_token, generate
from train import N_VOCAB, add_shared_arguments, build_model, check_seed, load_checkpoint, load_tokenizer, pick_device


def shade(text: str, share: float) -> str:
    """Text on a background between black (no expert executed) and red (all), for a terminal with 256 colours."""
    background = (232, 52, 88, 124, 160, 196)[min(5, int(6 * share))]
    return f"\x1b[48;5;{background}m\x1b[38;5;255m{text}\x1b[0m"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generate text from a converted checkpoint.")
    add = parser.add_argument
    add("--ckpt", default="out", help="folder with d2dmoe.pt, or that file (default: %(default)s)")
    add("--tau", type=float, default=0.9, help="run the experts whose predicted norm is at least (1 - tau) of the token's largest (default: %(default)s)")
    add("--prompt", default="\n", help="text to continue (default: a line end)")
    add("--num_samples", type=int, default=1, help="texts to write (default: %(default)s)")
    add("--max_new_tokens", type=int, default=500, help="tokens a text (default: %(default)s)")
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: %(default)s)")
    add("--top_k", type=int, default=None, help="sample among the k likeliest tokens (default: all)")
    add("--color", choices=("auto", "always", "never"), default="auto", help="shade tokens by their share of experts; auto: on a terminal (default: %(default)s)")
    add_shared_arguments(parser)
    args = parser.parse_args(argv)
    if not 0 <= args.tau <= 1:
        parser.error(f"--tau must be between 0 and 1, not {args.tau:g}")
    if args.temperature != 0 and not 1e-3 <= args.temperature < math.inf:
        parser.error("--temperature must be 0 or at least 0.001")
    for name in ("num_samples", "max_new_tokens", "top_k"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    check_seed(parser, args.seed)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? for what it lacks
    device = pick_device(args.device)
    checkpoint = load_checkpoint(args.ckpt, "d2dmoe.pt")
    model = build_model(checkpoint, args.ckpt).to(device).eval()
    config = model.config
    if not config.num_experts:
        sys.exit(f"{args.ckpt} is a dense model: convert it first with python convert.py --ckpt {Path(args.ckpt)}")
    name = str(checkpoint.get("tokenizer", "bytes"))
    if N_VOCAB.get(name, 0) > config.vocab_size:
        sys.exit(f"{args.ckpt} has a vocabulary of its own, of {config.vocab_size} tokens: what they spell is not in it")
    tokenizer = load_tokenizer(name)
    prompt = tokenizer.encode(args.prompt, disallowed_special=()) or [tokenizer.eot_token]
    if len(prompt) > config.block_size:
        sys.exit(f"the prompt has {len(prompt)} tokens and the model's context {config.block_size}: shorten --prompt")
    if max(prompt) >= config.vocab_size:
        sys.exit(f"the prompt has a token outside the model's vocabulary of {config.vocab_size}")
    color = args.color == "always" or args.color == "auto" and sys.stdout.isatty()
    write = lambda text: print(text, end="", flush=True)  # noqa: E731

    generator = torch.Generator(device).manual_seed(args.seed)
    shares, flops, dense_flops, timed, seconds = [], 0.0, 0.0, 0, 0.0
    for sample in range(args.num_samples):
        if sample:
            write("\n---------------\n")
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end in the middle of a character
        write(args.prompt)
        idx = torch.tensor([prompt], device=device)  # [1, T]
        for i, (token, measured) in enumerate(generate(
            model, idx, args.max_new_tokens, Gate(dynamic_k, args.tau), args.temperature, args.top_k, generator
        )):  # fmt: skip
            if i == 1:
                clock = time.perf_counter()
            counts = [{name: executed.sum().item() for name, executed in m.items()} for m in measured]
            context = min(len(prompt) + i, config.block_size)
            flops += flops_per_token(config, context, counts)
            dense_flops += flops_per_token(config, context)
            shares.append(executed_share(config, counts))
            text = decoder.decode(tokenizer.decode_single_token_bytes(token.item()) if token.item() < tokenizer.n_vocab else b"?")
            write(shade(text, shares[-1]) if color and text.strip("\r\n") else text)
        write(decoder.decode(b"", final=True))
        if args.max_new_tokens > 2:
            seconds += time.perf_counter() - clock
            timed += args.max_new_tokens - 2
    speed = f", {timed / seconds:.0f} tokens a second" if timed else ""
    print(
        f"\n\ntau {args.tau:g}: {sum(shares) / len(shares):.1%} of the experts executed, {flops / dense_flops:.1%} of the "
        f"dense model's FLOPs{speed}"
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted")
    except torch.OutOfMemoryError:
        sys.exit("out of GPU memory: try --device cpu")
    except OSError as error:  # the reader of a pipe went away, as head does, or the disk behind > is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails again as it flushes at exit
        sys.exit(f"cannot write the text: {error.strerror}")
