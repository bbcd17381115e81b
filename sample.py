"""Writes text with a converted model, shades every token by the share of experts that predicting it took, and says
what a token costs: its FLOPs, and the speed right after the prompt. (Once the text is longer than block_size, every
token takes a whole window, with any model.)

    python sample.py --tau 0.9
    python sample.py --ckpt better/ --tau 0.95 --prompt "def main(" --temperature 0.7 --top_k 50
    python sample.py --picture tokens.png           tokens x layers, coloured by the share of experts (needs matplotlib)

--tau decides how many experts run, and needs no retraining: 1 runs all of them, the lower, the fewer.
"""

import argparse
import codecs
import statistics
import sys
import time
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from d2dmoe import GPT, Gate, atomic_write, dynamic_k, flops_per_token, generate, load_checkpoint
from train import (
    Parser, add_system_options, as_path, encode, load_tokenizer, number, pick_device, printable, run, vocabulary,
)  # fmt: skip

SHADES = (255, 224, 217, 210, 203, 160)  # of a terminal's 256 colours, from white to red, behind black text


def shade(text: str, share: float, shares: list[float]) -> str:
    """Text on a background that tells where `share` lies between the smallest and the largest of `shares`."""
    low, high = min(shares), max(shares)
    level = (share - low) / (high - low) if high > low else 0.0
    return f"\x1b[48;5;{SHADES[round(level * (len(SHADES) - 1))]}m\x1b[38;5;16m{text}\x1b[0m"


def tokens_per_second(model: GPT, idx: Tensor, gates: list[Gate], tokens: int, turns: int = 3) -> list[float]:
    """Decoding speed after the prompt idx [1, T] under each gate: in turns, medians, without each turn's first two
    tokens (the first includes the prompt, and a GPU compiles its kernels in both)."""
    speeds = [[] for _ in gates]
    for _ in range(turns):
        for gate, results in zip(gates, speeds, strict=True):
            text = generate(model, idx, tokens + 2, gate, temperature=0)
            list(islice(text, 2))
            start = time.perf_counter()
            for token, _ in text:
                token.item()
            results.append(tokens / (time.perf_counter() - start))
    return [statistics.median(results) for results in speeds]


def plot(path: Path, tokens: list[str], counts: list[list[int]], experts: list[int]) -> None:
    """Tokens x layers, coloured by the share of experts that predicting the token executed. Raises ImportError without
    matplotlib, OSError."""
    from matplotlib.figure import Figure

    tokens, counts = tokens[:60], counts[:60]
    share = [[row[layer] / E for row in counts] for layer, E in enumerate(experts)]  # [layers][tokens]
    figure = Figure(figsize=(8.3, max(1.6, 0.9 + 0.25 * len(experts))), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share, aspect="auto", cmap="Reds", vmin=0)
    labels = [t.replace(" ", "\u2423").replace("\n", "\u21b5").replace("$", r"\$") for t in tokens]
    axes.set_xticks(range(len(tokens)), labels, fontsize=10, rotation=0 if max(map(len, labels)) < 2 else 90)
    axes.set(yticks=range(len(experts)), ylabel="layer", xlabel="token (\u2423 space, \u21b5 newline)")
    figure.colorbar(image, label="share of experts", pad=0.01)
    with atomic_write(path) as f:
        figure.savefig(f, format="png", dpi=200)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        "sample.py", "Generate text from a converted checkpoint.",
        "--tau 0.95", '--ckpt better/ --prompt "def main(" --temperature 0.7',
    )  # fmt: skip
    count = number(int, 1, 2**40)
    add = parser.add_argument_group("what to run").add_argument
    add("--ckpt", default="out", help="folder with d2dmoe.pt (else ckpt.pt, a dense model), or a file")
    add("--tau", type=number(float, 0, 1), default=0.9, help="run the experts whose predicted norm is at least"
        " (1 - tau) times the token's largest")  # fmt: skip
    add("--prompt", default="    def ", help="text to continue; - reads standard input (default: %(default)r)")
    add("--num_samples", type=count, default=1, help="texts to write")
    add("--max_new_tokens", type=count, default=500, help="tokens per text")
    add("--temperature", type=number(float, 0), default=0.9, help="0 takes the likeliest token")
    add("--top_k", type=count, help="sample among the k likeliest tokens (default: all)")
    add("--ignore_end", action="store_true", help="go on after <|endoftext|>")
    add("--color", choices=("auto", "always", "never"), default="auto", help="shade tokens by their share of experts;"
        " auto: on a terminal")  # fmt: skip
    add("--picture", type=as_path, metavar="FILE", help="draw the first text: tokens x layers, colour = share of"
        " experts")  # fmt: skip
    add_system_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    device = pick_device(args.device)
    model, saved = load_checkpoint(args.ckpt)
    config, name = model.to(device).config, saved["tokenizer"]
    if name is None or vocabulary(name) > config.vocab_size:
        raise ValueError(f"{args.ckpt} names no tokenizer: convert it with --tokenizer")
    tokenizer = load_tokenizer(name)
    gate = None if args.tau == 1 else partial(dynamic_k, tau=args.tau)  # at tau = 1 no router is asked
    experts = [len(layer.w1) for layer in model.layers()] if config.num_experts else []
    if args.picture and not experts:
        raise ValueError(f"--picture shows experts, and {args.ckpt} is a dense model: convert it first")
    if args.picture and find_spec("matplotlib") is None:
        raise ValueError("--picture needs matplotlib: pip install matplotlib")
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    end = tokenizer.eot_token if "<|endoftext|>" in tokenizer.special_tokens_set else -1
    prompt = encode(tokenizer, text)[-config.block_size :] or [max(end, 0)]  # longer ones are cut as generate does
    idx = torch.tensor([prompt], device=device)  # [1, T]
    on_terminal = sys.stdout is not None and sys.stdout.isatty()
    shaded = bool(experts) and (args.color == "always" or args.color == "auto" and on_terminal)
    show = printable if on_terminal else str  # what a model writes must not drive a terminal
    if shaded:
        print("shades, fewest to most experts so far: " + "".join(shade("   ", i, [0, 5]) for i in range(6)))

    written, counts, shares, flops, dense_flops = [], [], [], 0.0, 0.0
    for sample in range(args.num_samples):
        if sample:
            print("\n---------------")
        print(show(text), end="", flush=True)
        generator = torch.Generator(device).manual_seed(args.seed + sample)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end in the middle of a character
        tokens = generate(model, idx, args.max_new_tokens, gate, args.temperature, args.top_k, generator)
        for i, (token, executed) in enumerate(tokens):
            token_id = token.item()
            if token_id == end and not args.ignore_end:
                break
            context = min(len(prompt) + i, config.block_size)
            if experts:
                counts.append(torch.stack([e.sum() for e in executed]).tolist())  # one number per layer
                shares.append(sum(counts[-1]) / sum(experts))
                flops += flops_per_token(config, context, counts[-1] if gate else None)
                dense_flops += flops_per_token(config, context)
            spelled = tokenizer.decode_single_token_bytes(token_id) if token_id < tokenizer.n_vocab else b"?"
            written.append(decoder.decode(spelled))
            piece = show(written[-1])
            print(shade(piece, shares[-1], shares) if shaded and piece.strip() else piece, end="", flush=True)
        print(show(decoder.decode(b"", final=True)))
        if args.picture and sample == 0 and written:
            plot(args.picture, [show(piece) for piece in written], counts, experts)

    measured = min(32, args.max_new_tokens)
    if not experts:
        [speed] = tokens_per_second(model, idx, [None], measured)
        print(f"\na dense model, to which tau does not apply (convert.py makes experts of it): {speed:.0f} tokens/s")
        return
    if not shares:  # the text ended at once
        return
    speed, dense_speed = tokens_per_second(model, idx, [gate, None], measured)
    print(
        f"\ntau {args.tau:g}: {sum(shares) / len(shares):.1%} of the experts executed, {flops / dense_flops:.1%} of "
        f"the dense model's FLOPs; {speed:.0f} tokens/s, {speed / dense_speed:.2f}x the {dense_speed:.0f} of all "
        "experts without a router"
    )
    if config.router == "moefication" and gate:
        print("(a MoEfication conversion, whose own rule is top-k: tau was applied to its classifier's scores)")
    if speed < 0.95 * dense_speed:
        print("at this size and tau experts save no time; python kernels.py shows where they do")


if __name__ == "__main__":
    run(main)
