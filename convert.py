"""Converts a trained dense model to a dynamic-k mixture of experts: the second half of D2DMoE.

    python convert.py --ckpt out/                                  the paper's recipe
    python convert.py --ckpt out/ --out better/ --recipe better    fewer experts at the same loss
    python convert.py --ckpt out/ --out attention/ --attention     the attention projections too
    python convert.py --ckpt out/ --out tuned/ --recipe better --finetune 1000      fewer still, beyond the paper
    python convert.py --ckpt out/ --eval --taus 0.5 0.85           another table for the same conversion: no training

It reads out/ckpt.pt and, beside it, the tokens out/train.bin and out/val.bin (or those of --data). It writes d2dmoe.pt,
cost_vs_loss.csv and, where matplotlib is installed, cost_vs_loss.png.

The stages, in the order of this file (convert() runs 3 where it is asked for, then 1 and 2; main runs 4 and 5):
1. Split every MLP into experts: balanced k-means groups similar neurons. Nothing is lost.
2. Train a router for each, to predict the norms of its experts' outputs. All else is frozen.
3. With --attention: train two-layer MLPs to imitate the attention projections; then 1 and 2 treat them like the rest.
4. Beyond the paper, with --finetune: train the whole model briefly with the gate on.
5. Measure loss against cost over tau, beside top-k and beside an oracle that knows the true norms.
"""

import argparse
import codecs
import copy
import csv
import json
import math
import shlex
import statistics
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from d2dmoe import (
    GPT, GPT2_SIZES, HF_ACTIVATIONS, HF_FIELDS, HF_TRANSPOSED, MLP, DynamicKMoE, Gate, GPTConfig, atomic_write,
    dynamic_k, flops_per_token, load_checkpoint, neurons_per_expert, save_checkpoint, top_k,
)  # fmt: skip
from train import (
    Parser, add_system_options, as_path, claim, draw_batch, draw_offsets, evaluate, find_tokens, fingerprint, held_out,
    keep_previous, learning_rate, number, open_tokens, pick_device, put_aside, put_tokens, rank_zero_first, run, say,
    start_processes, take_windows,
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# 1. Split (section 3.2 of the paper; as in MoEfication)


def balanced_kmeans(points: Tensor, k: int, seed: int, iterations: int = 30) -> Tensor:
    """Clusters points [n, f] into k groups of exactly n / k points, so that all experts have one shape and one cost.

    k-means with one change: in each iteration points are assigned not each to its nearest center, but so that the sum
    of squared distances is (nearly) smallest among the assignments that fill every cluster exactly.
    -> assignment [n] int64. Raises ValueError if k does not divide n.
    """
    h = neurons_per_expert(len(points), k)
    points = points.detach().float().cpu()
    centers = spread_centers(points, k, torch.Generator().manual_seed(seed))  # [k, f]
    prices, squares, assignment = torch.zeros(k), math.inf, None
    for _ in range(iterations):
        score = 2 * points @ centers.t() - centers.square().sum(1)  # [n, k]: -|p - c|^2, up to a constant per point
        # epsilon trades accuracy for speed: a tenth of the scores' spread will do, since the centers move anyway. The
        # lower bounds keep it above float32 rounding, or identical points could outbid each other forever.
        epsilon = max(0.1 * score.std().item(), 1e-5 * score.abs().max().item(), 1e-12)
        candidate = assign_balanced(score, prices, epsilon)  # [n]
        centers = torch.zeros_like(centers).index_add_(0, candidate, points) / h
        previous, squares = squares, (points - centers[candidate]).square().sum().item()
        if squares < previous:  # the auction is not exact, so an iteration can make it worse
            assignment = candidate
        if squares > previous * (1 - 1e-4):
            break
    return assignment


def spread_centers(points: Tensor, k: int, generator: torch.Generator, tries: int = 8) -> Tensor:
    """k of the points [n, f] as first centers [k, f], far from each other (greedy k-means++: of some candidates, drawn
    with probability proportional to the squared distance from the centers so far, the one that lowers the sum most)."""
    squared = points.square().sum(1)  # [n]
    first = torch.randint(len(points), (1,), generator=generator).item()
    chosen = [first]
    distance = (squared + squared[first] - 2 * points @ points[first]).clamp(min=0)  # [n], squared, to the nearest one
    for _ in range(k - 1):
        candidates = torch.multinomial(distance + 1e-12, min(tries, len(points)), generator=generator)  # [tries]
        to_each = (squared + squared[candidates, None] - 2 * points[candidates] @ points.t()).clamp(min=0)  # [tries, n]
        nearest = torch.minimum(to_each, distance)  # [tries, n]
        best = nearest.sum(1).argmin()
        chosen.append(candidates[best].item())
        distance = nearest[best]
    return points[chosen]


def assign_balanced(score: Tensor, prices: Tensor, epsilon: float) -> Tensor:
    """Assigns n points to k clusters, exactly n / k to each, with a sum of scores within n * epsilon of the largest.

    The auction algorithm (Bertsekas 1988). Each unassigned point bids on the cluster with the best score minus price:
    the price at which its second choice would be as good, plus epsilon. A cluster keeps its h highest bidders, and its
    price becomes the lowest bid that it keeps. score [n, k], prices [k] (updated in place: a good start for the next
    call) -> assignment [n] int64.
    """
    n, k = score.shape
    h = n // k
    if k == 1:
        return torch.zeros(n, dtype=torch.long)
    cluster, bid = torch.full((n,), -1), torch.zeros(n)  # [n] each; -1: unassigned
    while len(free := (cluster < 0).nonzero().flatten()):
        value, choice = (score[free] - prices).topk(2, dim=1)  # [free, 2]
        cluster[free] = choice[:, 0]
        bid[free] = prices[choice[:, 0]] + value[:, 0] - value[:, 1] + epsilon
        order = bid.argsort(descending=True)  # [n]
        order = order[cluster[order].argsort(stable=True)]  # [n], cluster by cluster, each from its highest bid down
        count = torch.bincount(cluster, minlength=k)  # [k]
        start = count.cumsum(0) - count  # [k], where each cluster begins in order
        rank = torch.arange(n) - start[cluster[order]]  # [n], place of each point within its cluster
        cluster[order[rank >= h]] = -1  # outbid
        full = (count >= h).nonzero().flatten()
        prices[full] = torch.maximum(prices[full], bid[order[start[full] + h - 1]])  # the h-th highest bid
    return cluster


def weight_features(mlp: MLP) -> Tensor:
    """Neurons by what they react to, the paper's choice: the rows of W1 at unit length. -> [d_ff, d]"""
    return F.normalize(mlp.c_fc.weight)


def coactivation_features(mlp: MLP, x: Tensor, rank: int = 64) -> Tensor:
    """Neurons by when they fire: for each of the tokens x [N, d] 1 if the neuron fires, else 0, at unit length, so that
    a dot product is a cosine similarity, reduced to `rank` dimensions by a singular value decomposition. (MoEfication
    has such a split too, of the graph of coactivations.) How strongly they fire is left out: clusters that used it
    needed more experts for the same loss. -> [d_ff, min(rank, N, d_ff)]"""
    fires = (mlp.c_fc(x) > 0).float().cpu()  # [N, d_ff]; a ReLU or a GELU is positive where its argument is
    with torch.random.fork_rng(devices=[]):  # svd_lowrank starts at random: seeded, leaving the global state
        torch.default_generator.manual_seed(0)
        u, s, _ = torch.svd_lowrank(F.normalize(fires.t()), q=min(rank, *fires.shape))  # u [d_ff, rank], s [rank]
    return u * s


@torch.no_grad()
def split_mlp(mlp: MLP, moe: DynamicKMoE, assignment: Tensor) -> None:
    """Copies an MLP's neurons into experts. assignment [d_ff]: neuron i goes to expert assignment[i].

    Permuting neurons is free: with any permutation P, W2 P^T act(P W1 x + P b1) + b2 is the same layer, so the sum of
    all experts is the MLP. Raises ValueError if the sizes do not fit.
    """
    E, h, _ = moe.w1.shape
    if len(assignment) != len(mlp.c_fc.weight) or torch.bincount(assignment, minlength=E).tolist() != [h] * E:
        raise ValueError(f"an assignment must give each of {E} experts {h} of the {len(mlp.c_fc.weight)} neurons")
    order = assignment.argsort(stable=True).to(moe.w1.device)  # [d_ff], expert by expert
    moe.w1.copy_(mlp.c_fc.weight[order].view_as(moe.w1))  # [d_ff, d] -> [E, h, d]
    moe.w2.copy_(mlp.c_proj.weight.t()[order].view_as(moe.w2))  # [d, d_ff] -> [d_ff, d] -> [E, h, d]
    if mlp.c_fc.bias is None:
        moe.b1.zero_()
        moe.b2.zero_()
    else:
        moe.b1.copy_(mlp.c_fc.bias[order].view_as(moe.b1))  # [d_ff] -> [E, h]
        moe.b2.copy_(mlp.c_proj.bias)


@torch.no_grad()
def split_model(model: GPT, moe: GPT, sample: Tensor | None, seed: int) -> None:
    """Fills the experts of `moe` from the MLPs of `model`; its routers stay as they were drawn.

    sample: tokens [B, T] on which to see which neurons fire together; None: neurons are grouped by their weights.
    """
    moe.load_state_dict(model.state_dict(), strict=False)  # embeddings, attention, norms: the same names
    inputs: list[Tensor] = []
    if sample is not None:
        model.hidden(sample, inputs=inputs)
    clock = time.perf_counter()
    for i, (mlp, layer) in enumerate(zip(model.layers(), moe.layers(), strict=True)):
        features = coactivation_features(mlp, inputs[i].flatten(0, 1)) if inputs else weight_features(mlp)
        split_mlp(mlp, layer, balanced_kmeans(features, len(layer.w1), seed))
        if time.perf_counter() - clock > 5:
            clock = time.perf_counter()
            say(f"split {i + 1} of {len(moe.layers())} layers")


# ---------------------------------------------------------------------------------------------------------------------
# 2. Routers (section 3.3), and the one training loop of this file


def fit(
    parameters: list[Tensor], loss_of: Callable[..., Tensor], draw: Callable, steps: int, lr: float, label: str
) -> None:
    """Trains `parameters` with Adam, a cosine schedule and a short warm-up; loss_of(x, y, step) -> scalar, for tokens x
    and the tokens y that follow them, [B, T] each; draw(step) -> [(x, y)]. Raises ValueError if the loss is not finite.

    Losses of layers that share no parameters may be summed: their gradients do not interact, and Adam is (up to its
    epsilon) invariant to the scale of a loss.
    """
    optimizer = torch.optim.Adam(parameters, lr=lr)
    optimizer.zero_grad()  # of gradients from before
    start = told = time.perf_counter()
    for step in range(steps):
        [(x, y)] = draw(step)  # one micro-batch
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, lr, warmup=min(50, steps // 10))
        loss = loss_of(x, y, step)
        loss.backward()
        loss = loss.detach()
        if dist.is_initialized():  # the mean over processes
            for t in (loss, *(p.grad for p in parameters)):
                dist.all_reduce(t)
                t /= dist.get_world_size()
        if not loss.isfinite():
            raise ValueError(f"{label}: the loss is not finite at step {step + 1}: try a lower --lr, or --finetune_lr")
        optimizer.step()
        optimizer.zero_grad()
        if (now := time.perf_counter()) - told > 8 or step == steps - 1:
            told, left = now, (now - start) / (step + 1) * (steps - step - 1)
            say(f"{label}: step {step + 1:5d} of {steps}, loss {loss.item():.5f}, {left:.0f} s left")


def router_loss(layer: DynamicKMoE, x: Tensor) -> Tensor:
    """Mean squared error between the router's prediction and the true ||W2_e act(W1_e x + b1_e)|| ** power, for tokens
    x [N, d]; a scalar. Of the layer's parameters only the router's get gradients."""
    with torch.no_grad():
        norms = layer.expert_norms(x)  # [N, E]
    return F.mse_loss(layer.router.powered_norms(x), norms**layer.router.power)


def moefication_loss(layer: DynamicKMoE, x: Tensor) -> Tensor:
    """The baseline's: binary cross-entropy of the router's logits against the sum of each expert's positive
    activations, divided by the largest such sum of the whole batch (as in MoEfication's and the authors' code), for
    tokens x [N, d]; a scalar."""
    with torch.no_grad():
        mass = layer.activations(x).clamp(min=0).sum(-1)  # [N, E, h] -> [N, E]
        largest = mass.max()
        if dist.is_initialized():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
    return F.binary_cross_entropy_with_logits(layer.router.logits(x), mass / largest.clamp(min=1e-9))


def train_routers(moe: GPT, draw: Callable, steps: int, lr: float) -> None:
    """Trains all routers at once, on what their layers read when every expert runs."""
    layers = moe.layers()
    loss_of_layer = moefication_loss if moe.config.router == "moefication" else router_loss

    def loss_of(x, y, step):
        inputs: list[Tensor] = []
        with torch.no_grad():
            moe.hidden(x, inputs=inputs)
        return sum(loss_of_layer(layer, read.flatten(0, 1)) for layer, read in zip(layers, inputs, strict=True))

    parameters = [p.requires_grad_() for layer in layers for p in layer.router.parameters()]
    fit(parameters, loss_of, draw, steps, lr, "routers")


# ---------------------------------------------------------------------------------------------------------------------
# 3. Attention projections as MLPs (section 3.5)


@torch.no_grad()
def projection_examples(dense: GPT, idx: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What each attention projection of the dense model reads and returns on idx [B, T]: pairs of [B, T, d]; of each
    block q, k, v and o."""
    x = dense.transformer.wte(idx) + dense.transformer.wpe(torch.arange(idx.shape[1], device=idx.device))  # [B, T, d]
    examples = []
    for block in dense.transformer.h:
        read = block.ln_1(x)  # [B, T, d]
        q, k, v = block.attn.c_attn(read).split(x.shape[-1], dim=-1)  # [B, T, 3d] -> three of [B, T, d]
        mixed = block.attn.attend(q, k, v)  # [B, T, d]
        o = block.attn.c_proj(mixed)  # [B, T, d]
        examples += [(read, q), (read, k), (read, v), (mixed, o)]
        x = x + o
        x = x + block.mlp(block.ln_2(x))[0]
    return examples


def projection_loss(mlp: MLP, x: Tensor, target: Tensor, weight: float) -> Tensor:
    """How far a projection MLP is from the linear layer it replaces: mean squared error divided by the target's
    variance, plus weight * the sparsity penalty. x, target [..., d] -> scalar"""
    y, penalty = mlp(x)
    variance = target.var()
    if dist.is_initialized():  # that of the whole batch
        moments = torch.stack((target.mean(), target.square().mean()))
        dist.all_reduce(moments)
        mean, square = moments / dist.get_world_size()
        n = target.numel() * dist.get_world_size()
        variance = (square - mean**2) * n / (n - 1)
    return F.mse_loss(y, target) / variance + weight * penalty


def distill_projections(dense: GPT, draw: Callable, draw_jointly: Callable, steps: int, lr: float) -> GPT:
    """The dense model with a projection MLP in place of each attention projection.

    First each MLP by itself imitates its layer, as in the paper; the weight of the penalty grows to the paper's 1e-3.
    Then all of them jointly match the dense model's predictions, so that they compensate each other's errors. The
    KL divergence is far below 1, hence the lower penalty weight; the MLPs are trained already, hence the lower rate.
    """
    alone = max(1, steps // 4)  # three quarters of the steps for training jointly, which matters more
    model = GPT(replace(dense.config, projections="mlp")).to(dense.lm_head.weight.device).requires_grad_(False)
    model.load_state_dict(dense.state_dict(), strict=False)
    projections = [mlp for block in model.transformer.h for mlp in block.attn.layers()]  # training: penalties
    parameters = [p.requires_grad_() for mlp in projections for p in mlp.parameters()]

    def loss_alone(x, y, step):
        examples = zip(projections, projection_examples(dense, x), strict=True)
        weight = 1e-3 * step / alone
        return sum(projection_loss(mlp, read, target, weight) for mlp, (read, target) in examples)

    def loss_together(x, y, step):
        with torch.no_grad():
            target = dense(x)[0].flatten(0, 1).log_softmax(-1)  # [B*T, V]
        logits, aux = model(x)
        predicted = logits.flatten(0, 1).log_softmax(-1)  # [B*T, V]
        divergence = F.kl_div(predicted, target, reduction="batchmean", log_target=True)  # mean over tokens
        penalties = [a for layer, a in zip(model.layers(), aux, strict=True) if layer in projections]
        return divergence + 1e-4 * sum(penalties)

    fit(parameters, loss_alone, draw, alone, lr, "projections")
    fit(parameters, loss_together, draw_jointly, max(1, steps - alone), lr / 2, "projections jointly")
    return model.requires_grad_(False).eval()


# ---------------------------------------------------------------------------------------------------------------------
# 4. Beyond the paper: fine-tuning with the gate on

FINETUNE_TAUS = (0.99, 0.97, 0.94, 0.88, 0.75)  # in turns, so that one model serves the whole range


def finetune(moe: GPT, draw: Callable, steps: int, lr: float) -> None:
    """Trains all of the converted model while it runs only the selected experts: it learns to do without the others.

    The loss is cross entropy plus the routers' regression. No gradient passes the gate: an expert learns from the
    tokens that ran it, and a router, as before, from the true norms. The two losses share no parameter, since a
    router's input is detached, so Adam needs no weight between them. There is no sparsity penalty: what is skipped
    gives it no gradient, and without it the loss came out lower. Compare the result with a dense model that was
    trained for as many further steps.
    """
    layers, parameters = moe.layers(), [p.requires_grad_() for p in moe.parameters()]

    def loss_of(x, y, step):
        inputs: list[Tensor] = []
        gate = partial(dynamic_k, tau=FINETUNE_TAUS[step % len(FINETUNE_TAUS)])
        hidden, _ = moe.hidden(x, gate, inputs=inputs)  # [B, T, d]
        cross_entropy = F.cross_entropy(moe.lm_head(hidden).flatten(0, 1), y.flatten())  # [B, T, V] -> [B*T, V]
        reads = zip(layers, inputs, strict=True)
        return cross_entropy + sum(router_loss(layer, read.detach().flatten(0, 1)) for layer, read in reads)

    fit(parameters, loss_of, draw, steps, lr, "fine-tuning")


# ---------------------------------------------------------------------------------------------------------------------
# 5. Cost against loss


def top_share(norms: Tensor, share: float) -> Tensor:
    """top_k with k = share * E in every layer, rounded up: never fewer experts than the rule it is compared with."""
    return top_k(norms, math.ceil(share * norms.shape[-1] - 1e-6))  # 2 of 8 may arrive as a hair above 0.25


def with_oracles(moe: GPT) -> GPT:
    """A copy of the model whose routers cheat: they return the true norms, at the price of running every expert, and so
    show what is left to gain by predicting norms better. The weights are not copied."""
    cheat = copy.deepcopy(moe, memo={id(p): p for p in moe.parameters()})  # what stands in the memo is not copied
    for layer in cheat.layers():
        layer.router.forward = layer.expert_norms
    return cheat


def relative_flops(config: GPTConfig, counts: list[float] | None) -> float:
    """FLOPs per token over those of the dense model, on average over a window; `counts` as in flops_per_token."""
    context = (config.block_size + 1) / 2  # tokens that a token attends to
    return flops_per_token(config, context, counts) / flops_per_token(config, context)


@torch.no_grad()
def relative_time(moe: GPT, dense: GPT, tokens: np.ndarray, gate: Gate, turns: int = 5) -> float:
    """Seconds of the converted model for one batch of windows over the dense model's, in turns; ratio of medians."""
    x, _ = next(held_out(dense, tokens, windows=16))  # so few that experts' activations stay in a CPU's cache
    seconds = ([], [])
    for _ in range(turns):
        for model, g, times in ((dense, None, seconds[0]), (moe, gate, seconds[1])):
            start = time.perf_counter()
            model(x, g)
            if x.device.type != "cpu":
                torch.accelerator.synchronize()
            times.append(time.perf_counter() - start)
    return statistics.median(seconds[1]) / statistics.median(seconds[0])


def cost_table(
    moe: GPT, dense: GPT, tokens: np.ndarray, windows: int, taus: list[float], dense_loss: float
) -> list[dict]:
    """Prints the table over tau and returns its points; for MoEfication over the share of experts that top-k runs."""
    config, points, all_experts = moe.config, [], [len(layer.w1) for layer in moe.layers()]
    floor, full = relative_flops(config, [0] * len(all_experts)), relative_flops(config, all_experts)

    def change(loss):
        return f"{loss:7.4f} {loss / dense_loss - 1:+7.2%}"

    def point(rule, value, gate, timed=True, model=moe):
        loss, counts = evaluate(model, tokens, windows, gate=gate)
        means = [c.float().mean().item() for c in counts]  # per layer
        executed = sum(means) / sum(all_experts)  # of all experts: each counts once, whatever its size
        flops = math.nan if rule == "oracle" else relative_flops(config, means if gate else None)
        ratio = relative_time(model, dense, tokens, gate) if timed else math.nan
        points.append(dict(rule=rule, value=value, executed=executed, flops=flops, time=ratio, loss=loss))
        return points[-1]

    say(f"\ndense loss {dense_loss:.4f} nats per token over {windows} windows; FLOPs and time: over the dense model's")
    about = "about " if config.projections == "moe" else ""  # there experts differ in size
    say(f"FLOPs = {about}{floor:.1%} + {full - floor:.1%} x share of experts executed (below tau = 1)")
    if config.router == "moefication":
        say("  share     FLOPs   time    loss  change")
        for share in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05):
            row = point("top_k", share, partial(top_share, share=share) if share < 1 else None)
            say(f"{row['executed']:7.1%} {row['flops']:9.1%} {row['time']:6.2f} {change(row['loss'])}")
        return points
    say("             dynamic-k (router)                     top-k, as many experts    oracle (true norms)")
    say("   tau  executed   FLOPs   time    loss  change  executed    loss  change  executed    loss  change")
    cheat = with_oracles(moe)
    for tau in taus:
        gate = None if tau == 1 else partial(dynamic_k, tau=tau)  # at tau = 1 no router is asked
        routed = point("dynamic_k", tau, gate)
        share = routed["executed"]
        fixed = point("top_k", share, partial(top_share, share=share) if gate else None, timed=False)
        best = point("oracle", tau, gate, timed=False, model=cheat)
        say(
            f"{tau:6g} {share:9.1%} {routed['flops']:7.1%} {routed['time']:6.2f} {change(routed['loss'])} "
            f"{fixed['executed']:9.1%} {change(fixed['loss'])} {best['executed']:9.1%} {change(best['loss'])}"
        )
    return points


def cost_at(points: list[dict], rule: str, loss: float) -> tuple[float, float]:
    """The least executed share and relative FLOPs at a loss, interpolated between a rule's rows; nan outside."""
    *costs, losses = zip(*sorted((p["executed"], p["flops"], p["loss"]) for p in points if p["rule"] == rule))
    best = np.minimum.accumulate(losses)[::-1]  # with so many experts or fewer: rising, as np.interp needs it
    return tuple(float(np.interp(loss, best, cost[::-1], left=math.nan, right=math.nan)) for cost in costs)


def print_read_off(points: list[dict], dense_loss: float) -> None:
    """What each rule costs at 1% and at 2% above the dense loss. (An oracle is not priced: it runs every expert.)"""
    rules = dict.fromkeys(p["rule"] for p in points)
    outside = "outside of this table" + (" (--eval measures other --taus)" if "dynamic_k" in rules else "")
    say()
    for percent in (1, 2):
        for rule in rules:
            executed, flops = cost_at(points, rule, dense_loss * (1 + percent / 100))
            priced = "" if rule == "oracle" else f", {flops:6.1%} of the FLOPs"
            cost = outside if math.isnan(executed) else f"{executed:6.1%} of the experts{priced}"
            say(f"at {percent}% above the dense loss, {rule:9}: {cost}")


COLUMNS = ("recipe", "rule", "value", "executed", "flops", "time", "loss", "dense_loss", "text")


def write_table(path: Path, points: list[dict]) -> None:
    """The points as CSV; an earlier table keeps another name. Raises OSError."""
    keep_previous(path)
    with atomic_write(path) as f:
        writer = csv.DictWriter(codecs.getwriter("utf-8")(f), COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(points)


def read_table(folder: Path) -> list[dict]:
    """The points of a folder's cost_vs_loss.csv. Raises ValueError if there is none of ours."""
    path = folder / "cost_vs_loss.csv"
    try:
        rows = csv.DictReader(path.read_text(encoding="utf-8").splitlines())
        points = [{name: float(row[name]) if name in COLUMNS[2:8] else row[name] for name in COLUMNS} for row in rows]
        points = [p for p in points if math.isfinite(p["loss"] / p["dense_loss"])]
        points[0]  # an empty table cannot be drawn
    except (ArithmeticError, csv.Error, LookupError, OSError, TypeError, ValueError):
        raise ValueError(f"{path} is missing, or no table of this version: run convert.py --eval there") from None
    return points


def plot(path: Path, tables: list[list[dict]]) -> bool:
    """Loss above dense in % against FLOPs in %: a curve for each of at most four tables, and for the first one's top-k
    if there is room. -> False, and no picture, without matplotlib. Raises OSError."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8.3, 3.6), layout="constrained")
    axes = figure.subplots()
    curves = [(table, table[0]["rule"]) for table in tables]  # each by the rule that its table begins with
    if len(tables) < 4 and curves[0][1] != "top_k":
        curves.insert(1, (tables[0], "top_k"))
    for i, (table, rule) in enumerate(curves):
        own = rule == table[0]["rule"]
        color = ("#b2182b", "#1b7837", "#2166ac", "#8c510a")[i] if own else "#888888"
        name = table[0]["recipe"].partition(" E=")[0] if own else "same model, top-k"
        chosen = [p for p in table if p["rule"] == rule]
        points = sorted((100 * p["flops"], 100 * (p["loss"] / p["dense_loss"] - 1)) for p in chosen)
        x, y = zip(*points, strict=True)
        axes.plot(x, y, "o-", color=color, markersize=3, linewidth=1.8)
        height = 9 - 1.3 * i  # labels stand one below the other, with a line to where the curve has this loss
        tip = np.interp(height, y[::-1], x[::-1]), min(height, max(y))
        line = dict(arrowstyle="-", color=color, linewidth=0.6)
        place = dict(xytext=(0.55, height), textcoords=("axes fraction", "data"), va="center")
        axes.annotate(name, tip, **place, color=color, fontsize=11, arrowprops=line)
    axes.plot([100], [0], "k*", markersize=13, clip_on=False)
    axes.annotate("dense", (100, 0), (-6, 9), textcoords="offset points", ha="right", fontsize=11)
    axes.set(xlabel="FLOPs per token, % of the dense model", ylabel="loss above dense, %")
    axes.set_ylim(axes.dataLim.y0 - 0.3, 10)  # y0: the lowest of all points
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    keep_previous(path)
    with atomic_write(path) as f:
        figure.savefig(f, format="png", dpi=200)
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Export


def export_gpt2(model: GPT, folder: Path) -> None:
    """Writes a dense model as a folder that Hugging Face's GPT2LMHeadModel.from_pretrained loads, with equal logits.
    Raises ValueError for a converted model and for a folder that is not empty, OSError."""
    if model.config.num_experts or model.config.projections != "linear":
        raise ValueError("only a dense model can be exported as a GPT-2")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: --export takes a new folder")
    biased = GPT(replace(model.config, bias=True))  # Hugging Face's layers always have biases; ours start at 0
    biased.load_state_dict(model.state_dict(), strict=False)
    weights = biased.state_dict()
    weights |= {k: w.t().contiguous() for k, w in weights.items() if k.endswith(HF_TRANSPOSED)}
    names = {ours: theirs for theirs, ours in reversed(HF_ACTIVATIONS.items())}  # for gelu_tanh the first: gelu_new
    hf = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    hf |= {theirs: getattr(model.config, ours) for ours, theirs in HF_FIELDS.items()}
    hf["activation_function"] = names[model.config.activation]
    with atomic_write(folder / "pytorch_model.bin") as f:
        torch.save(weights, f)
    with atomic_write(folder / "config.json") as f:
        f.write(json.dumps(hf, indent=2).encode())


# ---------------------------------------------------------------------------------------------------------------------
# The script

RECIPES = {
    "paper": dict(split="weights", router="norm", router_power=1.0, width_share=3 / 8),
    "better": dict(split="coactivation", router="norm", router_power=0.5, width_share=1 / 2),
    "moefication": dict(split="weights", router="moefication", router_power=1.0, width_share=3 / 8),
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        "convert.py", "Convert a dense checkpoint to experts with dynamic-k gating.",
        "--ckpt out/ --out better/ --recipe better", "--ckpt out/ --eval --taus 0.5 0.85",
    )  # fmt: skip
    count = number(int, 1, 2**40)
    taus = [1, 0.9999, 0.999, 0.995, 0.99, 0.98, 0.97, 0.96, 0.95, 0.93, 0.91, 0.9, 0.8, 0.7]
    add = parser.add_argument_group("what to run").add_argument
    add("--ckpt", default="out", help="folder with ckpt.pt, a checkpoint of ours or nanoGPT's, a folder of Hugging"
        f" Face's GPT-2, or, downloaded, {', '.join(GPT2_SIZES)}")  # fmt: skip
    add("--out", type=as_path, help="folder for d2dmoe.pt and cost_vs_loss.csv and .png (default: the checkpoint's)")
    add("--data", help="a folder of .bin files, as in train.py, or text, which is encoded into OUT/text (default: the"
        " .bin files beside the checkpoint)")  # fmt: skip
    add("--tokenizer", choices=("bytes", "gpt2"), help="(default: the checkpoint's or the .bin files' own)")
    add("--eval", action="store_true", help="only measure OUT/d2dmoe.pt, at other --taus for instance: no training")
    add("--export", type=as_path, metavar="FOLDER", help="only write the dense model as a folder for transformers")
    add("--compare", type=as_path, nargs="+", default=[], metavar="FOLDER", help="other conversions for the picture")
    add = parser.add_argument_group("model").add_argument
    add("--recipe", choices=RECIPES, default="paper", help="better: coactivation clusters and square roots of norms;"
        " moefication: the baseline, a classifier and top-k")  # fmt: skip
    add("--num_experts", type=count, default=64, help="experts per feed-forward layer")
    add("--attention", action="store_true", help="convert the attention projections too")
    add("--split", choices=("weights", "coactivation"), help="which neurons are alike (default: the recipe's)")
    add("--router_power", type=number(float, 0.05, 8), help="routers regress norm ** power (default: 1, better: 0.5)")
    add("--router_width", type=count, help="hidden width of the routers (default: 3/8 of d, better: 1/2, at most 128;"
        " projections: a quarter of that)")  # fmt: skip
    add = parser.add_argument_group("optimization").add_argument
    add("--steps", type=count, default=2500, help="training steps of the routers; with --attention as many of the"
        " projection MLPs before: the first quarter each by itself, then jointly")  # fmt: skip
    add("--finetune", type=number(int, 0, 2**40), default=0, help="then steps of training the whole model with the gate"
        " on, which the paper does not do")  # fmt: skip
    add("--batch_size", type=count, default=8, help="sequences per step")
    add("--lr", type=number(float, 0), default=5e-3, help="peak learning rate of the routers, and of projection MLPs"
        " each by itself; jointly they take half of it")  # fmt: skip
    add("--finetune_lr", type=number(float, 0), default=5e-4, help="peak learning rate of --finetune; the fewer steps,"
        " the lower")  # fmt: skip
    add = add_system_options(parser).add_argument
    add("--taus", type=number(float, 0, 1), nargs="+", default=taus, help="rows of the table")
    add("--eval_windows", type=count, default=128, help="windows of held-out text per row")
    args = parser.parse_args(argv)
    if len(args.compare) > 3:
        raise ValueError("--compare takes at most three folders: a picture of more curves cannot be read")
    if args.recipe == "moefication" and (args.router_power or args.attention or args.finetune):
        raise ValueError("--recipe moefication, the baseline, has no --router_power, --attention or --finetune")
    return args


def converted_config(dense: GPT, args: argparse.Namespace) -> GPTConfig:
    """The dense model's config with what the options say of experts and routers. Raises ValueError."""
    c, recipe = dense.config, RECIPES[args.recipe]
    width = args.router_width or max(1, min(128, int(recipe["width_share"] * c.n_embd)))
    config = replace(
        c, num_experts=args.num_experts, router=recipe["router"], router_width=width,
        router_power=args.router_power or recipe["router_power"],
    )  # fmt: skip
    if not args.attention:
        return config
    E = math.gcd(c.projection_width, 32)  # the largest power of two up to 32 that divides
    return replace(config, projections="moe", projection_experts=E, projection_router_width=max(1, width // 4))


def described(config: GPTConfig, args: argparse.Namespace, finetuned: bool = False) -> str:
    """What tables and pictures call a conversion: the recipe, what was changed in it, and the sizes."""
    changes = (
        args.attention and "attention", finetuned and "fine-tuning", args.split and f"{args.split} split",
        args.router_power and f"power {args.router_power}",
    )  # fmt: skip
    return f"{' + '.join(filter(None, (args.recipe, *changes)))} E={config.num_experts} r={config.router_width}"


def convert(dense: GPT, config: GPTConfig, tokens: np.ndarray, args: argparse.Namespace) -> GPT:
    """The recipe: projection MLPs if asked for, split, routers; config is converted_config's. Raises ValueError."""
    device = dense.lm_head.weight.device
    # draw(seed, step): stages see different windows, projections alone those of seed, routers of seed + 1, projections
    # jointly of seed + 2, fine-tuning (in main) of seed + 3.
    draw = partial(draw_batch, tokens, args.batch_size, config, device=device)
    unsplit = dense
    if args.attention:
        alone, jointly = partial(draw, args.seed), partial(draw, args.seed + 2)
        unsplit = distill_projections(dense, alone, jointly, args.steps, args.lr)
    moe = GPT(config).to(device).requires_grad_(False).eval()
    sample, start = None, time.perf_counter()
    if (args.split or RECIPES[args.recipe]["split"]) == "coactivation":
        T = config.block_size  # about 8,192 tokens; no training has a step -1, and every process draws the same
        offsets = draw_offsets(len(tokens), max(1, 8192 // T), T, args.seed, step=-1)
        sample, _ = take_windows(tokens, offsets, config, device)
    split_model(unsplit, moe, sample, args.seed)
    if dist.is_initialized():  # the same experts everywhere, whatever each machine's arithmetic
        for p in moe.parameters():
            dist.broadcast(p, 0)
    sizes = f"{config.num_experts} experts with {config.d_ff // config.num_experts} neurons"
    say(f"{config.n_layer} blocks of {sizes}, split in {time.perf_counter() - start:.0f} s")
    train_routers(moe, partial(draw, args.seed + 1), args.steps, args.lr)
    return moe


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    device = pick_device(args.device)
    ckpt = as_path(args.ckpt)
    home = ckpt.parent if ckpt.is_file() else ckpt  # where the checkpoint's tokens lie
    out = args.out or home
    rank, _ = start_processes(device)
    torch.manual_seed(args.seed)
    with rank_zero_first():
        dense, checkpoint = load_checkpoint(args.ckpt, ("ckpt.pt",))
        if dense.config.num_experts or dense.config.projections != "linear":
            raise ValueError(f"{args.ckpt} is converted already: --ckpt takes the dense checkpoint, out/ckpt.pt")
        if args.export:
            if rank == 0:
                export_gpt2(dense, args.export)
            say(f"wrote {args.export}/config.json and pytorch_model.bin")
            return
        config = None if args.eval else converted_config(dense, args)  # wrong sizes are told before text is encoded
        tables = [read_table(folder) for folder in args.compare]
        lock = claim(out) if rank == 0 else None  # noqa: F841
        beside = [folder for folder in (home, out / "text") if (folder / "train.bin").exists()]
        if args.data is None and not beside:
            raise FileNotFoundError(f"no train.bin and val.bin beside {args.ckpt}: --data takes their folder, or text")
        data = args.data or f"{beside[0]}/"  # the slash: even if the folder is named stdlib
        folder, tokenizer = find_tokens(data, args.tokenizer, checkpoint["tokenizer"], dense)
        if folder is None and rank == 0:
            put_tokens(None, data, tokenizer, out / "text", dense.config)
        tokens, val_tokens = open_tokens(folder or out / "text", dense.config)
        say(f"{len(tokens):,} training and {len(val_tokens):,} held-out tokens of {data}")
    windows = min(args.eval_windows, len(val_tokens) - dense.config.block_size)  # there are no more
    checksum = 0  # tells one dense model from another
    for p in dense.parameters():
        checksum = zlib.crc32(p.detach().contiguous().numpy(), checksum)
    dense.to(device)
    if rank == 0:
        dense_loss, _ = evaluate(dense, val_tokens, windows)
        if not math.isfinite(dense_loss):
            raise ValueError(f"the dense model's loss on held-out text is {dense_loss}: this checkpoint cannot be used")
    start = time.perf_counter()

    if args.eval:
        moe, saved = load_checkpoint(out / "d2dmoe.pt")
        moe.to(device)
        if saved.get("dense_crc32") != checksum:
            other = f"{out}/d2dmoe.pt was not converted from the model in {args.ckpt}"
            raise ValueError(f"{other}, as its dense_crc32 is not {checksum}: give its own as --ckpt")
        recipe, text = str(saved.get("recipe")), fingerprint(tokens, val_tokens, saved)
        say(f"{out}/d2dmoe.pt: {recipe}")
    else:
        text = fingerprint(tokens, val_tokens, checkpoint)
        moe = convert(dense, config, tokens, args)
        recipe, facts = described(config, args), dict(tokenizer=tokenizer, dense_crc32=checksum, text=text)
        if rank == 0:
            keep_previous(out / "d2dmoe.pt")
            save_checkpoint(out / "d2dmoe.pt", moe, recipe=recipe, **facts)
            # An earlier conversion's, as this one may be stopped before it has its own.
            put_aside(out / "cost_vs_loss.csv", out / "cost_vs_loss.png")
        if args.finetune:  # stopped or diverged, it leaves the file without it
            draw = partial(draw_batch, tokens, args.batch_size, config, args.seed + 3, device=device)
            finetune(moe, draw, args.finetune, args.finetune_lr)
            recipe = described(config, args, finetuned=True)
            if rank == 0:
                save_checkpoint(out / "d2dmoe.pt", moe, recipe=recipe, **facts)
        say(f"wrote {out}/d2dmoe.pt in {time.perf_counter() - start:.0f} s")
    if rank > 0:
        return

    points = cost_table(moe, dense, val_tokens, windows, args.taus, dense_loss)
    print_read_off(points, dense_loss)
    about = f"{text['train_tokens']} training and {text['val_tokens']} held-out tokens, {windows} windows"
    points = [{"recipe": recipe, **p, "dense_loss": dense_loss, "text": about} for p in points]
    if any(table[0]["text"] != about for table in tables):
        say("warning: not all of --compare were measured on this text and as many windows")
    write_table(out / "cost_vs_loss.csv", points)
    with_picture = plot(out / "cost_vs_loss.png", [points, *tables])
    wrote = "and .png" if with_picture else "(pip install matplotlib draws it)"
    say(f"\nwrote {out}/cost_vs_loss.csv {wrote} in {time.perf_counter() - start:.0f} s")
    times = [p["time"] for p in points if p["executed"] < 1 and p["loss"] < 1.02 * dense_loss and p["time"] > 0]
    if device.type == "cpu" and times and min(times) > 0.95:  # (nan, which was not timed, is not above 0)
        say("at this size a layer is too small for experts to save time; python kernels.py shows where they do")
    if tokenizer and moe.config.router == "norm":
        say(f"now: python sample.py --ckpt {shlex.quote(str(out))} --tau 0.95")


if __name__ == "__main__":
    run(main)
