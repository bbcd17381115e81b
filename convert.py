"""Converts a trained dense model to a dynamic-k mixture of experts: the second half of D2DMoE.

    python convert.py --ckpt out/                              the paper's recipe
    python convert.py --ckpt out/ --split coactivation --router_target sqrt --router_width 64    fewer experts, same loss
    python convert.py --ckpt out/ --attention                  the attention projections too
    python convert.py --ckpt out_none/ --baseline moefication  what the paper compares itself with

1. With --attention: train a two-layer MLP to imitate each attention projection, then all of them to predict as one model.
2. Cut every two-layer MLP into experts of equal size: balanced k-means on its neurons.
3. Train a router for each to predict the norms of its experts' outputs. Nothing else changes.
4. Measure loss against cost over tau, beside top-k and beside an oracle that knows the true norms.
"""

import argparse
import contextlib
import csv
import dataclasses
import io
import math
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

from d2dmoe import (
    GPT, MLP, Block, DynamicKMoE, Gate, GPTConfig, dynamic_k, executed_share, expert_norms, flops_per_token, square_hoyer, top_k,
)  # fmt: skip
from kernels import ACTIVATIONS
from train import (
    GPT2_REPOS, N_VOCAB, add_shared_arguments, atomic_write, check_seed, choose_tokenizer, draw_offsets, end_processes, evaluate,
    learning_rate, load_corpus, load_initial, local_path, pick_device, rank_zero_first, save_checkpoint, start_processes, take_windows,
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# Balanced k-means, as in MoEfication and the paper


def assign_balanced(score: Tensor, prices: Tensor, epsilon: float) -> Tensor:
    """Assigns n points to k clusters, exactly n/k to each, so that the sum of scores is within n * epsilon of the largest.

    Bertsekas' auction: every free point bids for its best cluster what makes the second best as good; a cluster keeps
    the highest bids and its price becomes the lowest of them. score [n, k], prices [k] (updated in place: they start the
    next call well) -> assignment [n] int64.
    """
    n, k = score.shape
    h = n // k
    if k == 1:
        return torch.zeros(n, dtype=torch.long)
    cluster = torch.full((n,), -1)
    bid = torch.zeros(n)
    while len(free := (cluster < 0).nonzero().flatten()):
        value, choice = (score[free] - prices).topk(2, dim=1)  # [free, 2]
        cluster[free] = choice[:, 0]
        bid[free] = prices[choice[:, 0]] + value[:, 0] - value[:, 1] + epsilon
        order = bid.argsort(descending=True)
        order = order[cluster[order].argsort(stable=True)]  # by cluster, and in a cluster from the highest bid down
        count = torch.bincount(cluster, minlength=k)  # [k]
        start = count.cumsum(0) - count  # [k]
        rank = torch.arange(n) - start[cluster[order]]  # of each point within its cluster
        cluster[order[rank >= h]] = -1  # outbid
        full = (count >= h).nonzero().flatten()
        prices[full] = torch.maximum(prices[full], bid[order[start[full] + h - 1]])
    return cluster


def balanced_kmeans(points: Tensor, k: int, seed: int, restarts: int = 3, iterations: int = 30) -> Tensor:
    """Clusters points [n, f] into k groups of exactly n/k; the best of some restarts by the within-cluster sum of squares.

    -> assignment [n] int64. Raises ValueError if k does not divide n.
    """
    n = len(points)
    if n % k:
        raise ValueError(f"{n} neurons do not divide into {k} experts of equal size")
    points = points.detach().float().cpu()
    generator = torch.Generator().manual_seed(seed)
    best, best_squares = None, math.inf
    for _ in range(restarts):
        centers = points[torch.randperm(n, generator=generator)[:k]]  # [k, f]
        prices, squares = torch.zeros(k), math.inf
        for _ in range(iterations):
            score = 2 * points @ centers.t() - centers.square().sum(1)  # [n, k]: -|p - c|^2 but for |p|^2
            # A tenth of the spread, for an assignment need not be exact while the centers still move; but at least some
            # roundings of a float32, or equal points would outbid each other for ever.
            epsilon = max(0.1 * score.std().item(), 1e-5 * score.abs().max().item(), 1e-12)
            assignment = assign_balanced(score, prices, epsilon)
            centers = torch.zeros_like(centers).index_add_(0, assignment, points) / (n // k)
            previous, squares = squares, (points - centers[assignment]).square().sum().item()
            if squares < best_squares:
                best, best_squares = assignment, squares
            if squares > previous * (1 - 1e-4):
                break
    return best


def weight_features(mlp: MLP) -> Tensor:
    """Neurons by what they react to: the rows of W1 at unit length (the paper's). -> [d_ff, d]"""
    return F.normalize(mlp.c_fc.weight)


def coactivation_features(mlp: MLP, x: Tensor, rank: int = 64) -> Tensor:
    """Neurons by when they fire: their |activation| for each of the tokens x [N, d], at unit length, so that a dot product
    is a cosine similarity, reduced to `rank` dimensions by a singular value decomposition. -> [d_ff, rank]"""
    a = ACTIVATIONS[mlp.activation](mlp.c_fc(x)).abs().cpu()  # [N, d_ff], where the clustering runs
    with torch.random.fork_rng(devices=[]):  # its random start is the same in every call, and costs no other draw its place
        torch.default_generator.manual_seed(0)
        u, s, _ = torch.svd_lowrank(F.normalize(a.t()), q=min(rank, *a.shape))  # u [d_ff, rank], s [rank]
    return u * s


@torch.no_grad()
def split_mlp(mlp: MLP, moe: DynamicKMoE, assignment: Tensor) -> None:
    """Copies an MLP's neurons into experts: neuron i goes to expert assignment[i]. The sum of all experts is the MLP."""
    order = assignment.argsort(stable=True).to(moe.w1.device)  # [d_ff], expert by expert
    moe.w1.copy_(mlp.c_fc.weight[order].view_as(moe.w1))  # [d_ff, d] -> [E, h, d]
    moe.w2.copy_(mlp.c_proj.weight.t()[order].view_as(moe.w2))  # [d, d_ff] -> [d_ff, d] -> [E, h, d]
    if mlp.c_fc.bias is not None:  # else they stay zero
        moe.b1.copy_(mlp.c_fc.bias[order].view_as(moe.b1))  # [d_ff] -> [E, h]
        moe.b2.copy_(mlp.c_proj.bias)


# ---------------------------------------------------------------------------------------------------------------------
# One training loop, for projections and for routers


def fit(
    parameters: list[Tensor], loss_of: Callable, config: GPTConfig, tokens: np.ndarray, steps: int, lr: float, rows: int,
    seed: int, label: str,
) -> None:  # fmt: skip
    """Trains `parameters` by Adam with a cosine schedule. Exits if the loss is not finite.

    loss_of(x, progress): x [B, T] is a batch of `rows` contexts, progress runs from 0 to 1. Layers that do not touch each
    other may share a call: Adam does not care for a loss's scale, so the sum of their losses trains each as if it were
    alone. Under torchrun each process takes its share of the rows.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = parameters[0].device
    optimizer = torch.optim.Adam(parameters, lr=lr)
    clock = time.perf_counter()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, lr, warmup=min(50, steps // 10))
        offsets = draw_offsets(len(tokens), rows, config.block_size, seed, step).chunk(world)[rank]
        x, _ = take_windows(tokens, offsets, config.block_size, config.vocab_size, device)
        loss = loss_of(x, step / steps)
        loss.backward()
        state = loss.detach().clone()
        if world > 1:
            for t in (state, *(p.grad for p in parameters)):
                dist.all_reduce(t)
                t /= world
        if not math.isfinite(state.item()):
            sys.exit(f"{label}: the loss is not finite at step {step}; nothing was written; try a lower --lr")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if rank == 0 and (step + 1) % max(1, steps // 5) == 0:
            left = (time.perf_counter() - clock) / (step + 1) * (steps - step - 1)
            print(f"{label}: step {step + 1:5d} of {steps}, loss {state.item():.5f}, {left:.0f} s left", flush=True)


PROJECTIONS = ("q", "k", "v", "o")
INPUT_OF = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o", "mlp": "mlp"}  # which of a block's inputs each layer reads


def projection_loss(student: MLP, x: Tensor, target: Tensor, weight: float) -> Tensor:
    """How far a two-layer MLP is from the linear projection that it replaces: the mean squared error relative to the
    target's variance, plus weight * the sparsity penalty. x, target [..., d] -> scalar"""
    y, penalty = student(x)
    return F.mse_loss(y, target) / target.var() + weight * penalty


def distill_projections(
    dense: GPT, tokens: np.ndarray, steps: int, lr: float, rows: int, seed: int, weight: float
) -> list[dict[str, MLP]]:  # fmt: skip
    """For each block the MLPs that imitate its Q, K, V and output projections on the dense model's own activations."""
    config, device = dense.config, dense.lm_head.weight.device
    students = [
        {name: MLP(config.n_embd, config.projection_width, "relu", "hoyer").to(device) for name in PROJECTIONS}
        for _ in range(config.n_layer)
    ]

    def loss_of(x, progress):
        with torch.no_grad():
            _, _, inputs = dense.hidden(x)
        total = 0.0
        for block, read, student in zip(dense.transformer.h, inputs, students, strict=True):
            with torch.no_grad():
                targets = (*block.attn.c_attn(read["qkv"]).split(config.n_embd, dim=-1), block.attn.c_proj(read["o"]))
            for name, target in zip(PROJECTIONS, targets, strict=True):
                total = total + projection_loss(student[name], read[INPUT_OF[name]], target, weight * progress)
        return total

    parameters = [p for block_students in students for mlp in block_students.values() for p in mlp.parameters()]
    fit(parameters, loss_of, config, tokens, steps, lr, rows, seed, "projections")
    return students


def tune_projections(
    dense: GPT, students: list[dict[str, MLP]], tokens: np.ndarray, steps: int, lr: float, rows: int, seed: int, weight: float
) -> None:  # fmt: skip
    """Trains all students once more, together and in place, so that their errors make up for each other: the model with all
    of them in it is to predict what the dense one predicts. Loss: the KL divergence of the next token's distributions plus
    weight * the sparsity penalty of every student."""
    config = dataclasses.replace(dense.config, attention_experts=1, attention_router_width=1)  # one expert: an MLP
    model = GPT(config).to(dense.lm_head.weight.device).requires_grad_(False)
    model.load_state_dict(dense.state_dict(), strict=False)
    pairs = []  # of a student and its place in the model
    for block, student in zip(model.transformer.h, students, strict=True):
        pairs += [(student[name], getattr(block.attn, name)) for name in PROJECTIONS]
    for mlp, layer in pairs:
        split_mlp(mlp, layer, torch.zeros(config.projection_width, dtype=torch.long))

    def divergence(y, target):  # of one context, y and target [T, d]
        target, predicted = (dense.lm_head(t).log_softmax(-1) for t in (target, y))  # [T, V]
        return F.kl_div(predicted, target, reduction="batchmean", log_target=True)

    def loss_of(x, progress):
        with torch.no_grad():
            targets, _, _ = dense.hidden(x)  # [B, T, d]
        y, _, inputs = model.hidden(x)  # [B, T, d]
        # One context at a time, and again in the backward: the logits of a batch of GPT-2's would fill gigabytes.
        recompute = partial(torch.utils.checkpoint.checkpoint, divergence, use_reentrant=False)
        kl = torch.stack([recompute(*context) for context in zip(y, targets, strict=True)]).mean()
        penalty = 0.0
        for block, read in zip(model.transformer.h, inputs, strict=True):
            for name in PROJECTIONS:
                a = getattr(block.attn, name).activations(read[INPUT_OF[name]].flatten(0, 1))  # [N, 1, m]
                penalty = penalty + square_hoyer(a).mean()
        return kl + weight * penalty

    parameters = [p.requires_grad_() for _, layer in pairs for p in (layer.w1, layer.b1, layer.w2, layer.b2)]
    fit(parameters, loss_of, config, tokens, steps, lr, rows, seed, "projections together")
    with torch.no_grad():
        for mlp, layer in pairs:
            mlp.c_fc.weight.copy_(layer.w1[0])  # [1, m, d] -> [m, d]
            mlp.c_fc.bias.copy_(layer.b1[0])  # [1, m] -> [m]
            mlp.c_proj.weight.copy_(layer.w2[0].t())  # [1, m, d] -> [d, m]
            mlp.c_proj.bias.copy_(layer.b2)


def expert_layers(block: Block) -> dict[str, DynamicKMoE]:
    """The converted layers of a block by name: mlp, and q, k, v, o if its attention is converted."""
    layers = {"mlp": block.mlp}
    if block.attn.converted:
        layers |= {name: getattr(block.attn, name) for name in PROJECTIONS}
    return layers


def router_loss(moe: DynamicKMoE, x: Tensor) -> Tensor:
    """What a router is trained on, for tokens x [N, d]; scalar.

    norm: mean squared error against || a_e W2_e ||, equation (4). sqrt: the same between square roots, because
    the rule looks at norms relative to the largest and plain squares are blind to the small ones. share: MoEfication's
    binary cross-entropy against each expert's sum of positive activations over the token's largest such sum.
    """
    with torch.no_grad():
        a = moe.activations(x)  # [N, E, h]
        if moe.router.target == "share":
            mass = a.clamp(min=0).sum(-1)  # [N, E]
            target = mass / mass.amax(-1, keepdim=True).clamp(min=1e-9)
        else:
            target = expert_norms(a, moe.w2)  # [N, E]
    raw = moe.router.raw(x)  # [N, E]
    if moe.router.target == "share":
        return F.binary_cross_entropy_with_logits(raw, target)
    return F.mse_loss(raw.abs(), target.sqrt() if moe.router.target == "sqrt" else target)


def train_routers(moe: GPT, tokens: np.ndarray, steps: int, lr: float, rows: int, seed: int) -> None:
    """Trains all routers of a converted model at once, on the forward in which every expert runs."""
    layers = [expert_layers(block) for block in moe.transformer.h]

    def loss_of(x, progress):
        with torch.no_grad():
            _, _, inputs = moe.hidden(x)
        return sum(
            router_loss(layer, read[INPUT_OF[name]].flatten(0, 1))  # [B, T, d] -> [N, d]
            for block_layers, read in zip(layers, inputs, strict=True)
            for name, layer in block_layers.items()
        )

    routers = [layer.router for block_layers in layers for layer in block_layers.values()]
    fit([p for r in routers for p in r.parameters()], loss_of, moe.config, tokens, steps, lr, rows, seed, "routers")


def split_model(dense: GPT, moe: GPT, students: list[dict[str, MLP]] | None, sample: Tensor | None, seed: int) -> None:
    """Fills the experts of `moe` from the dense model (and the projections' students); routers stay as they were drawn.

    sample [B, T]: tokens on which to look for neurons that fire together; None: neurons with similar weights.
    """
    moe.load_state_dict(dense.state_dict(), strict=False)  # all but what is split keeps its name
    inputs = dense.hidden(sample)[2] if sample is not None else None
    for i, (block, target) in enumerate(zip(dense.transformer.h, moe.transformer.h, strict=True)):
        mlps = {"mlp": block.mlp} | (students[i] if students else {})
        for name, layer in expert_layers(target).items():
            mlp = mlps[name]
            features = coactivation_features(mlp, inputs[i][INPUT_OF[name]].flatten(0, 1)) if inputs else weight_features(mlp)
            split_mlp(mlp, layer, balanced_kmeans(features, len(layer.w1), seed))


# ---------------------------------------------------------------------------------------------------------------------
# Cost against loss

EVAL_BATCH = 16  # contexts evaluated at once: small, for with experts the activations of a large batch leave a CPU's cache


def top_share(norms: Tensor, share: float) -> Tensor:
    """top_k for the number of experts that is `share` of E, rounded up so that top-k is never given less."""
    return top_k(norms, math.ceil(share * norms.shape[-1] - 1e-6))


def measure(moe: GPT, tokens: np.ndarray, windows: int, gate: Gate) -> tuple[dict[str, float], list[dict[str, Tensor]]]:
    """Executed share of all experts, FLOPs a token relative to dense, and loss, under a gate; and the counts a token."""
    config = moe.config
    loss, counts = evaluate(moe, tokens, windows, EVAL_BATCH, gate)
    means = [{name: c.float().mean().item() for name, c in layer.items()} for layer in counts]
    context = (config.block_size + 1) / 2  # what a token attends to, on average over a window
    return {
        "value": gate.value,
        "executed": executed_share(config, means),
        "flops": flops_per_token(config, context, means) / flops_per_token(config, context),
        "loss": loss,
    }, counts


def cost_table(moe: GPT, tokens: np.ndarray, windows: int, taus: list[float], dense_loss: float, baseline: bool) -> list[dict]:
    """Prints the table over tau and returns its points; for MoEfication over k alone."""
    points = []

    def point(rule, gate):
        row, _ = measure(moe, tokens, windows, gate)
        points.append({"rule": rule, **row})
        return row

    def change(loss):
        return f"{loss:7.4f} {loss / dense_loss - 1:+7.2%}"

    print(f"\ndense loss {dense_loss:.4f} nats a token; executed: share of experts; FLOPs: a token, relative to dense")
    if baseline:
        print("  share     FLOPs    loss  change")
        for share in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05):
            row = point("top_k", Gate(top_share, share))
            print(f"{row['executed']:7.1%} {row['flops']:9.1%} {change(row['loss'])}", flush=True)
        return points
    print("             dynamic-k (router)              top-k, as many experts    oracle (true norms)")
    print("   tau  executed   FLOPs    loss  change  executed    loss  change  executed    loss  change")
    for tau in taus:
        dynamic = point("dynamic_k", Gate(dynamic_k, tau))
        fixed = point("top_k", Gate(top_share, dynamic["executed"]))
        oracle = point("oracle", Gate(dynamic_k, tau, oracle=True))
        print(
            f"{tau:6.4g} {dynamic['executed']:9.1%} {dynamic['flops']:7.1%} {change(dynamic['loss'])} "
            f"{fixed['executed']:9.1%} {change(fixed['loss'])} {oracle['executed']:9.1%} {change(oracle['loss'])}", flush=True,
        )  # fmt: skip
    return points


def cost_at(points: list[dict], rule: str, loss: float) -> tuple[float, float] | None:
    """Executed share and relative FLOPs at a loss, read off a rule's curve by linear interpolation; None outside of it."""
    curve = sorted((p["loss"], p["executed"], p["flops"]) for p in points if p["rule"] == rule)
    for (a, *low), (b, *high) in zip(curve, curve[1:]):
        if a <= loss <= b:
            share = (loss - a) / (b - a) if b > a else 0.0
            executed, flops = (x + share * (y - x) for x, y in zip(low, high, strict=True))
            return executed, flops
    return None


def print_read_off(points: list[dict], dense_loss: float) -> None:
    """What each rule costs at 1% and at 2% above the dense loss. The oracle has no FLOPs: true norms cost the whole layer."""
    print()
    for percent in (1, 2):
        for rule in dict.fromkeys(p["rule"] for p in points):
            if cost := cost_at(points, rule, dense_loss * (1 + percent / 100)):
                flops = f", {cost[1]:6.1%} of the FLOPs" if rule != "oracle" else ""
                print(f"at {percent}% above the dense loss, {rule:9}: {cost[0]:6.1%} of the experts{flops}")
            else:
                print(f"at {percent}% above the dense loss, {rule:9}: outside of this table")


COLUMNS = ("recipe", "rule", "value", "executed", "flops", "loss", "dense_loss", "text")


def read_points(path: Path) -> list[dict[str, str | float]]:
    """The rows of a cost_vs_loss.csv, numbers as floats. Rows that are not ours are passed over; none if it is missing."""
    points = []
    try:
        with open(path, newline="", encoding="utf-8", errors="replace") as f:  # a damaged byte costs one row
            for row in csv.DictReader(f):
                with contextlib.suppress(KeyError, TypeError, ValueError):
                    points.append({name: float(row[name]) if name in COLUMNS[2:7] else row[name] for name in COLUMNS})
    except (OSError, csv.Error):
        pass
    return [point for point in points if None not in point.values()]


def write_points(path: Path, points: list[dict]) -> None:
    """Adds a conversion's points to the CSV, in place of an earlier conversion's by the same recipe."""
    earlier = read_points(path)
    if not earlier and path.exists() and path.stat().st_size:  # somebody else's
        path.replace(path.with_name(f"{path.name}.old"))
        print(f"{path} was not a table of ours: it stays as {path}.old")
    others = [point for point in earlier if point["recipe"] != points[0]["recipe"]]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(others + points)
    with atomic_write(path) as f:
        f.write(text.getvalue().encode())


def draw(path: Path, text: str, counts: list[dict[str, Tensor]], num_experts: int, gate: Gate) -> None:
    """The picture: loss against FLOPs for this conversion and all found beside it on the same text; and how many experts
    a token executes, block by block. An oracle is drawn at what a perfect router of the same size would cost. Without
    matplotlib one line says so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed, so no picture: pip install matplotlib draws cost_vs_loss.png")
        return
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = {}  # one a conversion; how it chooses experts is told by the kind of line
    for file in sorted(path.parent.absolute().parent.glob("*/cost_vs_loss.csv")):
        rows = [row for row in read_points(file) if row["text"] == text]
        for recipe, rule in dict.fromkeys((row["recipe"], row["rule"]) for row in rows):
            curve = sorted((r["flops"], r["loss"]) for r in rows if (r["recipe"], r["rule"]) == (recipe, rule))
            style = {"dynamic_k": "o-", "top_k": "s--", "oracle": ":"}.get(rule, "-")
            name = f"{file.parent.name}: {recipe}"
            color = colors.setdefault(name, f"C{len(colors)}")
            left.plot(*zip(*curve, strict=True), style, color=color, markersize=3, linewidth=1, label=f"{name}, {rule}")
        for dense in {row["dense_loss"] for row in rows}:
            left.plot([1.0], [dense], "k*", markersize=8)
    cheapest = min(line.get_xdata().min() for line in left.lines)
    left.set(xlabel="FLOPs a token, relative to dense (star)", ylabel="loss, nats a token", xlim=(min(0.4, cheapest), 1.1))
    best = min(line.get_ydata().min() for line in left.lines)
    left.set_ylim(best * 0.99, best * 1.2)  # beyond a fifth of the loss nobody would run it
    left.legend(fontsize=6)
    for layer, c in enumerate(counts):
        share = torch.bincount(c["mlp"].cpu(), minlength=num_experts + 1) / len(c["mlp"])
        right.plot(range(num_experts + 1), share.tolist(), label=f"block {layer}", linewidth=1)
    right.set(xlabel=f"experts executed of {num_experts}, {gate.rule.__name__} {gate.value:g}", ylabel="share of tokens")
    if len(counts) <= 12:
        right.legend(fontsize=6)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    with atomic_write(path) as f:
        f.write(picture.getvalue())


# ---------------------------------------------------------------------------------------------------------------------
# The script


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Convert a dense checkpoint to experts with dynamic-k gating.")
    add = parser.add_argument
    add("--ckpt", default="out", help=f"folder with ckpt.pt, a checkpoint of ours or nanoGPT's, a GPT-2 state dict, or {', '.join(GPT2_REPOS)} (default: %(default)s)")
    add("--out", type=Path, default=None, help="folder for d2dmoe.pt, cost_vs_loss.csv and .png (default: beside the checkpoint; of a downloaded GPT-2 the folder ./gpt2 and the like)")
    add("--data", default=None, help="as in train.py (default: what the checkpoint was trained on, else stdlib)")
    add("--tokenizer", choices=("bytes", "gpt2"), default=None, help="(default: the checkpoint's, else told by its vocabulary)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--num_experts", type=int, default=None, help="experts a feed-forward layer (default: 64)")
    size.add_argument("--expert_size", type=int, default=None, help="neurons an expert, instead of --num_experts")
    add("--attention", action="store_true", help="convert the attention projections too")
    add("--split", choices=("weights", "coactivation"), default="weights", help="what makes neurons alike: their weights (the paper's), or firing together (default: %(default)s)")
    add("--router_target", choices=("norm", "sqrt"), default="norm", help="what routers regress: the experts' output norms (the paper's), or their square roots (default: %(default)s)")
    add("--router_width", type=int, default=None, help="hidden width of the routers (default: three eighths of d, at most the paper's 128; projections get a quarter of that)")
    add("--baseline", choices=("none", "moefication"), default="none", help="MoEfication: classifier routers and top-k (default: %(default)s)")
    add("--steps", type=int, default=2500, help="training steps of the routers; with --attention as many of the projections, a quarter each alone and the rest together (default: %(default)s)")
    add("--batch_size", type=int, default=8, help="contexts a step (default: %(default)s)")
    add("--lr", type=float, default=5e-3, help="peak learning rate of Adam (default: %(default)s)")
    add("--taus", type=float, nargs="+", default=[1, 0.9999, 0.999, 0.995, 0.99, 0.98, 0.97, 0.96, 0.95, 0.93, 0.91, 0.9, 0.8, 0.7], help="rows of the table (default: %(default)s)")
    add("--eval_windows", type=int, default=128, help="contexts of held-out text for each row (default: %(default)s)")
    add_shared_arguments(parser)
    args = parser.parse_args(argv)
    for name in ("num_experts", "expert_size", "router_width", "steps", "batch_size", "eval_windows"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if not 0 < args.lr < math.inf:
        parser.error("--lr must be a positive number")
    if args.baseline == "moefication" and args.router_target != "norm":
        parser.error("--baseline moefication has a router of its own: leave --router_target out")
    check_seed(parser, args.seed)
    if bad := [tau for tau in args.taus if not 0 <= tau <= 1]:
        parser.error(f"--taus must lie between 0 and 1, not {bad[0]:g}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    device = pick_device(args.device)
    rank, world = start_processes(device)
    torch.manual_seed(args.seed)
    with rank_zero_first(rank, world):
        dense, checkpoint = load_initial(args.ckpt)
    if dense.config.num_experts or dense.config.attention_experts:
        sys.exit(f"{args.ckpt} is converted already: --ckpt takes the dense checkpoint, out/ckpt.pt")
    place = Path(args.ckpt) if args.ckpt in GPT2_REPOS else local_path(args.ckpt)
    out = args.out or (place if place.is_dir() or args.ckpt in GPT2_REPOS else place.parent)
    settings = checkpoint.get("settings", {}) if isinstance(checkpoint.get("settings", {}), dict) else {}
    data = args.data or settings.get("data", "stdlib")
    tokenizer = choose_tokenizer(args.tokenizer, checkpoint, dense.config.vocab_size, data)

    neurons, width = dense.config.d_ff, args.router_width or max(1, min(128, 3 * dense.config.n_embd // 8))
    experts = args.num_experts or (neurons // args.expert_size if args.expert_size else 64)
    if args.expert_size and neurons % args.expert_size:
        sys.exit(f"--expert_size {args.expert_size} does not divide the {neurons} neurons of a feed-forward layer")
    if neurons % experts:
        sys.exit(f"--num_experts {experts} does not divide the {neurons} neurons of a feed-forward layer")
    config = dataclasses.replace(
        dense.config, num_experts=experts, router_width=width,
        router_target="share" if args.baseline == "moefication" else args.router_target,
        attention_experts=math.gcd(dense.config.projection_width, 32) if args.attention else 0,
        attention_router_width=max(1, width // 4) if args.attention else 0,
    )  # fmt: skip
    recipe = "moefication" if args.baseline == "moefication" else f"{args.split}/{args.router_target}"
    recipe += f" E={experts} r={width}" + (" +attention" if args.attention else "")

    with rank_zero_first(rank, world):
        train_tokens, val_tokens = load_corpus(data, tokenizer, out, config.block_size)
    rows = args.batch_size
    if rows % world:
        sys.exit(f"--batch_size {rows} does not divide among {world} processes")

    dense.to(device).requires_grad_(False)
    if rank == 0:  # what could fail at the end of an hour is tried at its start
        dense_loss, _ = evaluate(dense, val_tokens, args.eval_windows, EVAL_BATCH)
        try:
            out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=out).close()
        except OSError as error:
            sys.exit(f"cannot write into {out}: {error.strerror}; choose another folder by --out")
    clock = time.perf_counter()
    students = None
    if args.attention:
        # The weight 1e-3 is the paper's, for its ViT. Training together matters more, so it gets more of the steps; there
        # the penalty's weight is lower, for a divergence is far below 1, and so is the learning rate, for it starts well.
        alone = max(1, args.steps // 4)
        students = distill_projections(dense, train_tokens, alone, args.lr, rows, args.seed, weight=1e-3)
        tune_projections(dense, students, train_tokens, max(1, args.steps - alone), args.lr / 2, rows, args.seed + 2, weight=1e-4)
    moe = GPT(config).to(device).requires_grad_(False)
    sample = None
    if args.split == "coactivation":
        windows = max(1, 8192 // config.block_size)  # 8,192 tokens, of a step that no training has
        offsets = draw_offsets(len(train_tokens), windows, config.block_size, args.seed, step=-1)
        sample, _ = take_windows(train_tokens, offsets, config.block_size, config.vocab_size, device)
    split_model(dense, moe, students, sample, args.seed)
    if world > 1:  # the same experts everywhere, whatever each machine's arithmetic
        for p in moe.parameters():
            dist.broadcast(p, 0)
    if rank == 0:
        seconds = time.perf_counter() - clock
        print(f"{config.n_layer} blocks of {experts} experts with {neurons // experts} neurons, split in {seconds:.0f} s", flush=True)
    for block in moe.transformer.h:
        for layer in expert_layers(block).values():
            layer.router.requires_grad_(True)
    train_routers(moe, train_tokens, args.steps, args.lr, rows, args.seed + 1)
    if rank > 0:
        end_processes(world)
        return

    save_checkpoint(
        out / "d2dmoe.pt", moe, tokenizer=tokenizer, recipe=recipe, dense_loss=dense_loss,
        settings={"data": data} | {k: v for k, v in vars(args).items() if k in ("split", "seed", "steps", "batch_size", "lr")},
    )  # fmt: skip
    if args.attention:
        loss, _ = evaluate(moe, val_tokens, args.eval_windows, EVAL_BATCH)
        print(f"with imitated projections and all experts: loss {loss:.4f}, {loss / dense_loss - 1:+.2%}")
    points = cost_table(moe, val_tokens, args.eval_windows, args.taus, dense_loss, args.baseline == "moefication")
    print_read_off(points, dense_loss)
    text = f"{data} ({tokenizer}, {len(val_tokens)} held-out tokens)"
    write_points(out / "cost_vs_loss.csv", [{"recipe": recipe, **p, "dense_loss": dense_loss, "text": text} for p in points])
    gate = Gate(top_share, 0.25) if args.baseline == "moefication" else Gate(dynamic_k, 0.95)
    _, counts = measure(moe, val_tokens, args.eval_windows, gate)
    draw(out / "cost_vs_loss.png", text, counts, experts, gate)
    speaks = args.baseline == "none" and N_VOCAB[tokenizer] <= config.vocab_size  # a model over letters of its own cannot
    then = f"; now: python sample.py --ckpt {out} --tau 0.95" if speaks else ""
    print(f"\nwrote {out}/d2dmoe.pt and {out}/cost_vs_loss.csv in {time.perf_counter() - clock:.0f} s{then}")
    end_processes(world)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: run it again, conversion does not resume; every file is complete or as it was")
    except torch.OutOfMemoryError:
        sys.exit("out of GPU memory: lower --batch_size")
