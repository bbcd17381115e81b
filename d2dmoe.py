"""D2DMoE: a GPT whose feed-forward layers are split into experts, of which each token runs only those that matter.

    Szatkowski, Wójcik, Piórczyński, Scardapane. Exploiting Activation Sparsity with Dense to Dynamic-k
    Mixture-of-Experts Conversion. NeurIPS 2024, arXiv 2310.04361.                        "the paper" below
    Zhang et al. MoEfication: Transformer Feed-forward Layers are Mixtures of Experts. arXiv 2110.01786.
    Radford et al. Language Models are Unsupervised Multitask Learners (GPT-2). Its parameter names are kept.

    one token: few of         the same neurons            a router predicts       tau = 0.9: those of at
    nine neurons fire         in three experts            each one's norm         least 0.1 * 2.3 run
    . # . . # . . . #   ->    [. . .] [# # .] [. . #]   ->   0.1  2.3  0.2   ->   [# # .]

What differs from nanoGPT's model.py:
- forward takes no targets: it returns (logits, aux), and train.py computes the loss. There is no dropout.
- MLP returns a second value, the sparsity penalty on its activations, which train.py adds to the loss.
- DynamicKMoE takes an MLP's place after conversion. Its second value is the mask of executed experts, [B, T, E].
- aux lists these second values: one tensor for each of layers().
- The model takes a gate, which turns the routers' predicted norms into that mask: partial(dynamic_k, tau=0.9).
- The four attention projections may be MLPs or experts too.
- generate is a function that yields tokens. It keeps keys and values.

Shapes: B batch, T sequence, N = B*T tokens, d = n_embd, nh = n_head heads of hs = d / nh, d_ff neurons, E experts of
h = d_ff / E neurons, V vocabulary. n_layer counts blocks, as in nanoGPT; layers() lists what can become experts: of
each block its MLP, and before it q, k, v and o where these are MLPs too.
"""

import dataclasses
import json
import math
import os
import pickle
import re
import secrets
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

try:
    from kernels import ACTIVATIONS, expert_ffn, linear
except ImportError as error:  # PyPI has a package of that name, too
    raise ImportError(f"{error}: put the folder of d2dmoe.py and kernels.py first on sys.path, and restart") from error

Gate = Callable[[Tensor], Tensor] | None  # norms [N, E] -> executed [N, E] bool; None: all run, no router is asked


# ---------------------------------------------------------------------------------------------------------------------
# Sparse activations (section 3.1 of the paper)

DISPLACEMENT = -10.0  # s: where the penalty pushes the pre-activations of a GELU (the authors' GPT-2)


def square_hoyer(a: Tensor) -> Tensor:
    """(sum_i a_i)^2 / sum_i a_i^2 over the last dimension, for a >= 0 as a ReLU leaves it (Kurtz et al. 2020): the
    effective number of active neurons, from 1 to d_ff, and 0 if none is active. [3, 0, 4, 0] -> 49 / 25 = 1.96 of 4.

    It does not change when a is scaled. A ReLU network can halve W1 and b1 and double W2, which halves an L1 penalty
    without one more zero; this penalty cannot be lowered that way.   a [..., d_ff] -> [...] float32
    """
    a = a.float()
    return (a.sum(-1) / (torch.linalg.vector_norm(a, dim=-1) + 1e-12)).square()  # (|a|_1 / |a|_2)^2


PENALTIES = {  # [..., d_ff] -> [...] float32
    "hoyer": square_hoyer,
    "l1": lambda a: a.sum(-1, dtype=torch.float32),
    "none": lambda a: a.new_zeros(a.shape[:-1], dtype=torch.float32),
}


def sparsity_penalty(z: Tensor, a: Tensor, activation: str, penalty: str) -> Tensor:
    """Mean over tokens of the penalty on one layer, for pre-activations z [..., d_ff] and a = act(z); a float32 scalar.

    A ReLU is penalized on its output a. A GELU has no zeros to count, so its pre-activation is clamped and displaced,
    max(z, s) - s with s = DISPLACEMENT: the penalty pushes z towards s, where GELU(z) is almost 0.
    """
    penalized = a if activation == "relu" else z.float().clamp(min=DISPLACEMENT) - DISPLACEMENT  # [..., d_ff]
    return PENALTIES[penalty](penalized).mean()


class Linear(nn.Linear):
    """nn.Linear, whose product kernels.linear computes: on a CPU that is faster for the few rows of a decoding step."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class MLP(nn.Module):
    """y = W2 act(W1 x + b1) + b2: a dense feed-forward layer, or the MLP that replaces an attention projection."""

    def __init__(self, d: int, d_ff: int, activation: str, penalty: str, bias: bool = True):
        super().__init__()
        self.activation, self.penalty = activation, penalty
        self.c_fc = Linear(d, d_ff, bias=bias)
        self.c_proj = Linear(d_ff, d, bias=bias)

    def forward(self, x: Tensor, gate: Gate = None) -> tuple[Tensor, Tensor]:
        """x [..., d] -> y [..., d], penalty (a scalar; nan in eval mode, where it is not computed). There is nothing to
        gate: the argument is there because a DynamicKMoE can stand in the same place."""
        z = self.c_fc(x)  # [..., d_ff]
        a = ACTIVATIONS[self.activation](z)  # [..., d_ff]
        if self.training:
            penalty = sparsity_penalty(z, a, self.activation, self.penalty)
        else:
            penalty = x.new_full((), math.nan)  # not 0, so that who uses it notices
        return self.c_proj(a), penalty


# ---------------------------------------------------------------------------------------------------------------------
# Routing and gating (sections 3.3 and 3.4)


class Router(nn.Module):
    """Predicts the L2 norm of every expert's output, ||W2_e act(W1_e x + b1_e)||: two linear layers without bias, ReLU
    between, absolute value at the end, since a norm is not negative.

    With power p the layers regress norm ** p. p = 1 is the paper's. With p = 0.5 the squared error is not dominated by
    the large norms. That helps because at tau = 0.95 dynamic_k decides at 5% of the largest one.

    Why norms: y is the sum of the experts' outputs, so leaving some out changes y by at most the sum of their norms.
    """

    def __init__(self, d: int, width: int, num_experts: int, power: float = 1.0):
        super().__init__()
        self.power = power
        self.fc1 = Linear(d, width, bias=False)
        self.fc2 = Linear(width, num_experts, bias=False)

    def powered_norms(self, x: Tensor) -> Tensor:
        """x [..., d] -> predicted norm ** power [..., E], which is what training compares with the truth"""
        return self.fc2(F.relu(self.fc1(x))).abs()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] -> predicted norms [..., E]"""
        r = self.powered_norms(x)
        return r if self.power == 1 else r ** (1 / self.power)


def dynamic_k(norms: Tensor, tau: float) -> Tensor:
    """Executes expert e iff r_e >= (1 - tau) max_j r_j, for every token by itself. (The paper's tau is our 1 - tau.)

    tau = 1 runs all experts, tau = 0 only the best (and what equals it); no retraining is needed to change it.
    Norms 8, 3.9, 0.5, 0.3 at tau = 0.9: the threshold is 0.8, and two experts run. 2, 1.9, 1.8, 1.7: all four run.

    norms [..., E], none negative -> executed [..., E] bool. Raises ValueError unless 0 <= tau <= 1.
    """
    if not 0 <= tau <= 1:
        raise ValueError(f"tau must be between 0 and 1, not {tau}")
    # "not below" instead of "at least", so that a router that predicts nan runs every expert and not none.
    return ~(norms < (1 - tau) * norms.amax(-1, keepdim=True))


def neurons_per_expert(neurons: int, num_experts: int) -> int:
    """h, the neurons of an expert. Raises ValueError unless the experts divide them evenly."""
    if num_experts < 1 or neurons % num_experts:
        raise ValueError(f"{num_experts} experts do not divide {neurons} neurons evenly")
    return neurons // num_experts


class DynamicKMoE(nn.Module):
    """An MLP cut into E experts of h neurons each, and the router whose norms decide which of them a token runs.

    The experts' outputs are added without weights, unlike in a Switch or Mixtral layer: the router only selects, so
    that with all experts executed this is the dense layer it was cut from. Raises ValueError if E does not divide d_ff.
    """

    def __init__(self, d: int, d_ff: int, num_experts: int, activation: str, router: nn.Module):
        super().__init__()
        self.activation = activation
        h = neurons_per_expert(d_ff, num_experts)
        self.w1 = nn.Parameter(torch.zeros(num_experts, h, d))  # [E, h, d], a row per neuron; split_mlp fills them
        self.b1 = nn.Parameter(torch.zeros(num_experts, h))  # [E, h]
        self.w2 = nn.Parameter(torch.zeros(num_experts, h, d))  # [E, h, d], a row per neuron here too
        self.b2 = nn.Parameter(torch.zeros(d))  # [d], not per expert: it is added once
        self.router = router

    def forward(self, x: Tensor, gate: Gate = None) -> tuple[Tensor, Tensor]:
        """x [..., d] -> y [..., d], executed [..., E] bool"""
        (*leading, d), E = x.shape, len(self.w1)
        x = x.reshape(-1, d)  # [N, d]
        executed = None if gate is None else gate(self.router(x))  # [N, E]
        y = expert_ffn(x, self.w1, self.b1, self.w2, executed, self.activation) + self.b2  # [N, d]
        if executed is None:
            executed = x.new_ones(len(x), E, dtype=torch.bool)  # [N, E]
        return y.view(*leading, d), executed.view(*leading, E)

    def activations(self, x: Tensor) -> Tensor:
        """Of all experts: x [N, d] -> a [N, E, h]"""
        z = F.linear(x, self.w1.flatten(0, 1), self.b1.flatten())  # [N, E*h]
        return ACTIVATIONS[self.activation](z).unflatten(1, self.b1.shape)  # [N, E, h]

    def expert_norms(self, x: Tensor) -> Tensor:
        """The true norms ||W2_e act(W1_e x + b1_e)||, which the router learns to predict: x [N, d] -> [N, E].

        With the stored w2[e], of shape [h, d], y_e = a_e w2[e], and the square is |y_e|^2 = a_e (w2[e] w2[e]^T) a_e^T:
        h^2 operations per token instead of h d, and no [N, E, d] in memory.
        """
        a = self.activations(x)  # [N, E, h]
        gram = self.w2 @ self.w2.transpose(1, 2)  # [E, h, h]
        squared = torch.einsum("neh,ehg,neg->ne", a, gram, a)  # [N, E]
        # Rounding can leave a square just below 0. And at 0, where a root's gradient is infinite, here it is 0.
        return squared.masked_fill(squared <= 0, 0).sqrt()


# ---------------------------------------------------------------------------------------------------------------------
# The baseline: MoEfication


def top_k(norms: Tensor, k: int) -> Tensor:
    """Executes the k experts with the largest norms, the same k for every token: MoEfication's rule.

    norms [..., E] -> executed [..., E] bool. Raises ValueError unless 1 <= k <= E.
    """
    if not 1 <= k <= norms.shape[-1]:
        raise ValueError(f"k must be between 1 and the number of experts, {norms.shape[-1]}, not {k}")
    return torch.zeros_like(norms, dtype=torch.bool).scatter_(-1, norms.topk(k, sorted=False).indices, True)


class MoEficationRouter(nn.Module):
    """The baseline's router, a classifier: two linear layers without bias, tanh between, one logit per expert."""

    def __init__(self, d: int, width: int, num_experts: int):
        super().__init__()
        self.fc1 = Linear(d, width, bias=False)
        self.fc2 = Linear(width, num_experts, bias=False)

    def logits(self, x: Tensor) -> Tensor:
        """x [..., d] -> [..., E]"""
        return self.fc2(self.fc1(x).tanh())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] -> scores between 0 and 1 [..., E]"""
        return self.logits(x).sigmoid()


# ---------------------------------------------------------------------------------------------------------------------
# The transformer


@dataclass
class GPTConfig:
    """Sizes of a model; convert.py sets the fields from num_experts on. Raises ValueError if they do not fit."""

    block_size: int = 128  # longest context, in tokens
    vocab_size: int = 257
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128  # d
    d_ff: int = 0  # neurons of a feed-forward layer; 0 means 4 * n_embd
    bias: bool = True  # in linear layers and layer norms; experts and projection MLPs always have biases
    activation: str = "relu"  # relu, gelu (exact), gelu_tanh (GPT-2's)
    penalty: str = "hoyer"  # one of PENALTIES: hoyer, l1, none
    layer_norm_epsilon: float = 1e-5
    tie_weights: bool = True  # the LM head is the token embedding
    num_experts: int = 0  # E of each feed-forward layer; 0 means dense
    router: str = "norm"  # norm (the paper's) or moefication (the baseline's)
    router_width: int = 0  # hidden units of each router
    router_power: float = 1.0  # routers regress norm ** power
    projections: str = "linear"  # the four of attention: linear, mlp (projection MLPs) or moe (these split)
    projection_experts: int = 0
    projection_router_width: int = 0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), (int, float) if field.type is float else field.type
            if not isinstance(value, kind):
                raise ValueError(f"{field.name} must be of type {field.type.__name__}, not {value!r}")
        self.d_ff = self.d_ff or 4 * self.n_embd
        if min(self.block_size, self.vocab_size, self.n_layer, self.n_head, self.n_embd, self.d_ff) < 1:
            raise ValueError("block_size, vocab_size, n_layer, n_head, n_embd and d_ff must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}")
        choices = {"activation": ACTIVATIONS, "penalty": PENALTIES, "router": ("norm", "moefication"),
                   "projections": ("linear", "mlp", "moe")}  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if not (0 < self.layer_norm_epsilon < 1 and 0 < self.router_power <= 8):
            raise ValueError("layer_norm_epsilon must lie between 0 and 1 and router_power between 0 and 8")
        if self.num_experts:  # raises if they do not divide
            neurons_per_expert(self.d_ff, self.num_experts)
        if self.projections == "moe":
            neurons_per_expert(self.projection_width, self.projection_experts)
        if self.projections == "mlp" and self.num_experts or self.projections == "moe" and not self.num_experts:
            raise ValueError("projections are mlp in a dense model only, and moe in a converted one")
        if self.num_experts and self.router_width < 1 or self.projections == "moe" and self.projection_router_width < 1:
            raise ValueError("a router's width must be at least 1")

    @property
    def projection_width(self) -> int:
        """Hidden width m of the MLP d -> m -> d that replaces a d x d projection (section 3.5), so that both have about
        as many parameters: the projection d^2 + d; the MLP, its output bias apart, (2d + 1) m. So m is about d / 2."""
        d = self.n_embd
        return round((d * d + d) / (2 * d + 1))


class KVCache:
    """Keys and values of the tokens seen so far, in buffers [n_layer, B, nh, block_size, hs], allocated once."""

    def __init__(self, config: GPTConfig, batch: int, device: torch.device | str = "cpu", dtype=torch.float32):
        shape = (config.n_layer, batch, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.length = 0  # tokens held; GPT.hidden advances it once all blocks have written theirs

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends k, v [B, nh, T, hs]; returns all keys and values of this layer [B, nh, length + T, hs]."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention. Its four d x d projections are linear, or each is an MLP or a DynamicKMoE, then
    always with ReLU, square Hoyer and biases, whatever the feed-forward layers have (section 3.5)."""

    def __init__(self, config: GPTConfig, layer: int = 0):
        super().__init__()
        self.n_head, self.layer, self.is_linear = config.n_head, layer, config.projections == "linear"
        d, m, E = config.n_embd, config.projection_width, config.projection_experts
        if self.is_linear:
            self.c_attn = Linear(d, 3 * d, bias=config.bias)  # q, k and v in one
            self.c_proj = Linear(d, d, bias=config.bias)
        elif config.projections == "mlp":
            self.q, self.k, self.v, self.o = (MLP(d, m, "relu", "hoyer") for _ in range(4))
        else:
            routers = [Router(d, config.projection_router_width, E, config.router_power) for _ in range(4)]
            self.q, self.k, self.v, self.o = (DynamicKMoE(d, m, E, "relu", router) for router in routers)

    def layers(self) -> list[nn.Module]:
        return [] if self.is_linear else [self.q, self.k, self.v, self.o]

    def forward(self, x: Tensor, gate: Gate = None, cache: KVCache | None = None, inputs: list | None = None) -> tuple:
        """x [B, T, d] -> y [B, T, d], and aux of layers(), a list"""
        if self.is_linear:
            q, k, v = self.c_attn(x).split(x.shape[-1], dim=-1)  # [B, T, 3d] -> three of [B, T, d]
            return self.c_proj(self.attend(q, k, v, cache)), []
        (q, aux_q), (k, aux_k), (v, aux_v) = self.q(x, gate), self.k(x, gate), self.v(x, gate)
        mixed = self.attend(q, k, v, cache)  # [B, T, d]
        y, aux_o = self.o(mixed, gate)
        if inputs is not None:
            inputs += [x, x, x, mixed]
        return y, [aux_q, aux_k, aux_v, aux_o]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache | None = None) -> Tensor:
        """q, k, v [B, T, d] -> each token's mixture of the values up to itself [B, T, d]"""
        B, T, d = q.shape
        q, k, v = (t.view(B, T, self.n_head, d // self.n_head).transpose(1, 2) for t in (q, k, v))  # [B, nh, T, hs]
        mask = None
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # [B, nh, length + T, hs]
            if cache.length > 0 and T > 1:  # new token i sees the cached ones and the new ones up to itself
                mask = k.new_ones(T, k.shape[2], dtype=torch.bool).tril(diagonal=cache.length)  # [T, length + T]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=cache is None or cache.length == 0)
        return y.transpose(1, 2).reshape(B, T, d)  # [B, T, nh, hs] -> [B, T, d]


class Block(nn.Module):
    """Pre-norm block: x = x + attn(ln_1(x)), then x = x + mlp(ln_2(x))."""

    def __init__(self, config: GPTConfig, layer: int = 0):
        super().__init__()
        d, E, width = config.n_embd, config.num_experts, config.router_width
        self.ln_1 = nn.LayerNorm(d, config.layer_norm_epsilon, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(d, config.layer_norm_epsilon, bias=config.bias)
        if E == 0:
            self.mlp = MLP(d, config.d_ff, config.activation, config.penalty, config.bias)
        else:
            moefication = config.router == "moefication"
            router = MoEficationRouter(d, width, E) if moefication else Router(d, width, E, config.router_power)
            self.mlp = DynamicKMoE(d, config.d_ff, E, config.activation, router)

    def forward(self, x: Tensor, gate: Gate = None, cache: KVCache | None = None, inputs: list | None = None) -> tuple:
        """x [B, T, d] -> x [B, T, d], and aux of attn.layers() and of mlp"""
        y, aux = self.attn(self.ln_1(x), gate, cache, inputs)
        x = x + y
        normed = self.ln_2(x)
        if inputs is not None:
            inputs.append(normed)
        y, own = self.mlp(normed, gate)
        return x + y, [*aux, own]


class GPT(nn.Module):
    """GPT-2, dense or converted. `logits, aux = model(idx, gate)`; aux has one tensor for each of model.layers()."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, config.layer_norm_epsilon, bias=config.bias),
        ))  # fmt: skip
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        for name, p in self.named_parameters():
            if "router" in name:
                continue  # keeps PyTorch's own start: a router does not write to the residual stream
            if name.endswith(("weight", "w1", "w2")) and p.dim() > 1:
                # As in GPT-2: the layers that write to the residual stream start smaller by a factor of
                # sqrt(2 n_layer). (So do the second layers of projection MLPs.)
                residual = name.endswith(("c_proj.weight", "w2"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def layers(self) -> list[nn.Module]:
        """Every MLP or DynamicKMoE, block by block: q, k, v and o where the projections are not linear, then mlp."""
        return [layer for block in self.transformer.h for layer in (*block.attn.layers(), block.mlp)]

    def hidden(self, idx: Tensor, gate: Gate = None, cache: KVCache | None = None, inputs: list | None = None) -> tuple:
        """idx [B, T] -> the states before the LM head [B, T, d], and aux, for each of layers() its second value: an
        MLP's penalty (scalar), a DynamicKMoE's executed experts [B, T, E] bool.

        With a cache, idx continues the tokens that it holds. A list given as `inputs` is filled with what each of
        layers() reads, [B, T, d]. Raises ValueError if the tokens do not fit into block_size.
        """
        T, start = idx.shape[1], cache.length if cache is not None else 0
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens do not fit into a context of {self.config.block_size}")
        position = torch.arange(start, start + T, device=idx.device)  # [T]
        x = self.transformer.wte(idx) + self.transformer.wpe(position)  # [B, T, d]
        aux = []
        for block in self.transformer.h:
            x, block_aux = block(x, gate, cache, inputs)
            aux += block_aux
        if cache is not None:
            cache.length += T
        return self.transformer.ln_f(x), aux

    def forward(self, idx: Tensor, gate: Gate = None, cache: KVCache | None = None, last_only: bool = False) -> tuple:
        """idx [B, T] -> logits [B, T, V] ([B, 1, V] with last_only), and aux"""
        x, aux = self.hidden(idx, gate, cache)
        return self.lm_head(x[:, -1:] if last_only else x), aux


@torch.no_grad()
def generate(
    model: GPT, idx: Tensor, max_new_tokens: int, gate: Gate = None, temperature: float = 1.0,
    top_k_tokens: int | None = None, generator: torch.Generator | None = None,
) -> Iterator[tuple[Tensor, list[Tensor]]]:  # fmt: skip
    """Continues idx [B, T]; yields each new token [B, 1] with the experts that predicting it executed, [B, 1, E] bool
    for each of model.layers() (an empty list if the model is dense).

    temperature 0 (below 0.001) takes the likeliest token; top_k_tokens samples among the likeliest. Up to block_size
    tokens the cache serves; after that all positions change, and the whole window is recomputed for each token.
    Raises ValueError, when the first token is asked for, on an empty prompt, a negative temperature, top_k_tokens < 1.
    """
    if idx.shape[1] == 0:
        raise ValueError("the prompt is empty: give at least one token")
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, not {temperature}")
    if top_k_tokens is not None and top_k_tokens < 1:
        raise ValueError(f"top_k_tokens must be at least 1, not {top_k_tokens}")
    config, weight = model.config, model.lm_head.weight
    cache = KVCache(config, len(idx), weight.device, weight.dtype)
    new = idx = idx[:, -config.block_size :]  # [B, T]
    for _ in range(max_new_tokens):
        if cache.length + new.shape[1] > config.block_size:
            cache.length, new = 0, idx
        logits, aux = model(new, gate, cache, last_only=True)
        logits = logits[:, -1].float()  # [B, V]
        if temperature < 1e-3:  # dividing by less could overflow
            new = logits.argmax(-1, keepdim=True)  # [B, 1]
        else:
            logits = logits / temperature
            if top_k_tokens is not None:
                kth = logits.topk(min(top_k_tokens, logits.shape[-1])).values[:, -1:]  # [B, 1]
                logits = logits.masked_fill(logits < kth, -math.inf)
            new = torch.multinomial(logits.softmax(-1), 1, generator=generator)  # [B, 1]
        idx = torch.cat((idx, new), dim=1)[:, -config.block_size :]  # [B, T]
        yield new, ([executed[:, -1:] for executed in aux] if config.num_experts else [])


def flops_per_token(config: GPTConfig, context: float, counts: list[float] | None = None) -> float:
    """Floating-point operations for one token that attends to `context` tokens: matrix multiplies only (projections,
    attention, feed-forward, routers, LM head); a multiply-add counts as 2.

    counts: for each of model.layers(), the mean number of experts that a token executed; the routers then count too,
    by the widths in config (set config.router_width if you put wider ones into a model).
    None: the dense model, or the converted one without a gate (which for an odd d would take slightly more).
    """
    d, blocks = config.n_embd, config.n_layer
    total = 2 * d * config.vocab_size + blocks * 2 * (2 * context * d)  # LM head; scores and mixture of values
    if counts is None:
        return total + blocks * 2 * (4 * d * d + 2 * d * config.d_ff)
    sizes = [(config.num_experts, config.d_ff, config.router_width)]  # of the layers of one block
    if config.projections == "moe":
        sizes = [(config.projection_experts, config.projection_width, config.projection_router_width)] * 4 + sizes
    else:
        total += blocks * 2 * (4 * d * d)
    for (E, neurons, width), count in zip(sizes * blocks, counts, strict=True):
        total += 2 * (d * width + width * E) + count / E * 2 * (2 * d * neurons)
    return total


# ---------------------------------------------------------------------------------------------------------------------
# Files: ours, nanoGPT's, Hugging Face's. Each is loaded exactly or refused with the reason.


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes its name only when it is complete and on disk, so that a crash or a full disk leaves the
    old file or the new one, never half of one. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "x+b") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save turns a full disk's OSError into a RuntimeError and keeps it as the context.
        cause = error if isinstance(error, OSError) else error.__context__
        if getattr(cause, "errno", None) is None:  # raised for another file, with its own message; or a bug
            raise
        raise OSError(f"cannot write {path}: {cause.strerror}; an older file is untouched") from error
    finally:
        with suppress(OSError):  # gone, or a file system that is read-only now: what is raised above says more
            temporary.unlink()


def save_checkpoint(path: str | Path, model: GPT, **rest) -> None:
    """Weights, config and `rest` (plain values, tensors, lists and dicts of them) in one file. Classes are not saved:
    loading builds this file's, so a router of your own comes back as a Router. Raises OSError."""
    with atomic_write(Path(path)) as f:
        torch.save({"model": model.state_dict(), "config": dataclasses.asdict(model.config), **rest}, f)


def read_weights(path: Path) -> dict:
    """What torch.save or safetensors wrote. Nothing in it is executed. A damaged file can raise nearly anything."""
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ValueError("it needs a package: pip install safetensors") from None
        return load_file(path)
    if zipfile.is_zipfile(path):  # torch.load does not compare the checksums that torch.save stored
        with zipfile.ZipFile(path) as archive:
            # A file that is marked as a folder (0x10) torch.load would not read, and leave its tensor unset.
            folders = [entry.filename for entry in archive.infolist() if entry.external_attr & 0x10]
            if damaged := archive.testzip() or "".join(folders):
                raise ValueError(f"its {damaged} is damaged")
    with warnings.catch_warnings():  # torch's about foreign pickles, which it then refuses
        warnings.simplefilter("ignore")
        raw = torch.load(path, map_location="cpu", weights_only=True)  # unpickling objects could execute code
    if not isinstance(raw, dict):
        raise ValueError(f"it holds a {type(raw).__name__}, not a checkpoint")
    return raw


OBJECT = r"(?:GLOBAL|type) ([\w.]+\.[\w.]+)"  # in what torch.load says of a pickle that names one
NOT_IMPLEMENTED = "not implemented here, so it would compute something else"

# Of a GPT-2's config.json: its names for GPTConfig's fields and for activations, and the fields that change the
# computation, with the only value that is implemented. (What transformers does not read for a GPT-2 changes nothing.)
HF_FIELDS = {
    "block_size": "n_positions", "vocab_size": "vocab_size", "n_layer": "n_layer", "n_head": "n_head",
    "n_embd": "n_embd", "d_ff": "n_inner", "activation": "activation_function",
    "layer_norm_epsilon": "layer_norm_epsilon", "tie_weights": "tie_word_embeddings",
}  # fmt: skip
HF_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
HF_FIXED = {
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "pruned_heads": False,
    "add_cross_attention": False, "quantization_config": False, "auto_map": False,
}  # fmt: skip
HF_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored as [in, out]
HF_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
GPT2_SIZES = {  # n_layer and n_embd of what is published; a head is always 64 wide
    "gpt2": (12, 768), "gpt2-medium": (24, 1024), "gpt2-large": (36, 1280), "gpt2-xl": (48, 1600),
    "distilgpt2": (6, 768),
}  # fmt: skip


def check_fields(given: dict, required: set[str], allowed: set[str], what: str) -> None:
    """Raises ValueError if a field is missing, or one is set that may change the computation in ways unknown here."""
    if missing := required - given.keys():
        raise ValueError(f"its {what} lacks {', '.join(sorted(missing))}: this format is not known here")
    if unknown := sorted(str(k) for k, value in given.items() if k not in allowed and value):
        raise ValueError(f"its {what} sets {', '.join(unknown)}: {NOT_IMPLEMENTED}")


def bare(weights: dict) -> dict[str, Tensor]:
    """Without the prefixes of torch.compile and DataParallel and without causal masks. Raises ValueError."""
    weights = {re.sub(r"^(module\.)+", "", str(k).replace("_orig_mod.", "")): w for k, w in weights.items()}
    if any("lora_" in k for k in weights):
        raise ValueError("it holds a PEFT adapter: merge it into its model (merge_and_unload) and save that")
    masks = (".attn.bias", ".attn.masked_bias")
    return {k: w for k, w in weights.items() if not (k.endswith(masks) and w.dim() != 1)}


def from_gpt2(weights: dict[str, Tensor], config_json: Path) -> tuple[dict[str, Tensor], dict]:
    """Weights and config in our format, for the weights of a Hugging Face GPT-2 and its config.json, if there. Weights
    alone do not tell n_head, the activation or the epsilon: then only GPT2_SIZES are accepted. Raises ValueError."""
    weights = {k.removeprefix("transformer."): w for k, w in weights.items()}
    try:
        hf = json.loads(config_json.read_text(encoding="utf-8")) if config_json.is_file() else None
    except ValueError as error:
        raise ValueError(f"its config.json is damaged ({error})") from None
    if hf is not None and hf.get("model_type") != "gpt2":
        raise ValueError(f"it is a model of type {hf.get('model_type')}: only GPT-2's is implemented here")
    if (hf is None or hf.get("tie_word_embeddings", True)) and "lm_head.weight" in weights:
        weights.setdefault("wte.weight", weights["lm_head.weight"])  # of the tied two a file may hold either
    if not {"wte.weight", "wpe.weight", "h.0.attn.c_attn.weight"} <= weights.keys():
        raise ValueError(f"it does not hold a GPT-2: it has {', '.join(list(weights)[:3])}")
    if hf is None:
        n_layer = len({k.split(".")[1] for k in weights if k.startswith("h.")})
        (V, d), positions = weights["wte.weight"].shape, len(weights["wpe.weight"])
        if (n_layer, d) not in GPT2_SIZES.values() or (V, positions) != (50257, 1024):
            raise ValueError(
                "it holds weights alone, which tell neither n_head nor the activation: give the folder that "
                "save_pretrained wrote, with its config.json, or nanoGPT's checkpoint with its model_args"
            )
        hf = dict(n_layer=n_layer, n_head=d // 64, n_embd=d, n_positions=positions, vocab_size=V)
    check_fields(hf, {"n_layer", "n_head", "n_embd", "n_positions", "vocab_size"}, hf.keys(), "config.json")
    wrong = {k: hf[k] for k, value in HF_FIXED.items() if bool(hf.get(k, value)) != value}  # None and {} are False, too
    if (activation := hf.get("activation_function", "gelu_new")) not in list(HF_ACTIVATIONS):  # it may be unhashable
        wrong["activation_function"] = activation
    if wrong:
        raise ValueError(f"its config.json sets {wrong}: {NOT_IMPLEMENTED}")
    config = {ours: hf[theirs] for ours, theirs in HF_FIELDS.items() if theirs in hf}
    config |= dict(activation=HF_ACTIVATIONS[activation], d_ff=hf.get("n_inner") or 0, penalty="none")
    for k, w in weights.items():
        if k.endswith(HF_TRANSPOSED):
            weights[k] = w.t().contiguous()
    return {k if k == "lm_head.weight" else f"transformer.{k}": w for k, w in weights.items()}, config


def recognise(raw: dict, config_json: Path) -> tuple[dict[str, Tensor], GPTConfig, dict]:
    """Weights, config and what else a loaded file holds, "tokenizer" in any case; its own fields tell whose it is.
    config_json: where a file of that name would lie. Raises ValueError with the reason and the next step."""
    fields = {field.name for field in dataclasses.fields(GPTConfig)}
    sizes = {"n_layer", "n_head", "n_embd", "block_size", "vocab_size"}
    match raw:
        case {"model": dict(weights), "model_args": dict(given)}:  # nanoGPT
            weights = bare(weights)
            check_fields(given, sizes, sizes | {"bias", "dropout"}, "model_args")
            wte = weights["transformer.wte.weight"]
            tied = torch.equal(weights.setdefault("lm_head.weight", wte), wte)
            config = dict(bias="transformer.ln_f.bias" in weights, activation="gelu", penalty="none", tie_weights=tied)
            config |= given
            rest = {"tokenizer": "gpt2" if given["vocab_size"] in (50257, 50304) else None}  # nanoGPT pads to 50304
        case {"model": dict(weights), "config": dict(config), **rest}:  # ours
            weights = bare(weights)
            earlier = {"router_target", "attention_experts", "attention_router_width"}  # of an earlier version
            check_fields(config, sizes | {"bias", "activation", "penalty"}, fields | earlier, "config")
            if config.get("num_experts") and earlier & config.keys():
                raise ValueError("it was converted by an earlier version: run convert.py again")
            if not isinstance(rest.setdefault("tokenizer"), str | None):
                raise ValueError(f"it names no tokenizer: it has {rest['tokenizer']!r:.100}")
        case {"state_dict": dict(weights)} | {"model_state_dict": dict(weights)} | {"model": dict(weights)}:
            return recognise(weights, config_json)
        case _:
            weights, config = from_gpt2(bare(raw), config_json)
            rest = {"tokenizer": "gpt2" if config["vocab_size"] == 50257 else None}
    return weights, GPTConfig(**{k: v for k, v in config.items() if k in fields}), rest


def build_model(weights: dict[str, Tensor], config: GPTConfig) -> GPT:
    """The model, in eval mode. Raises ValueError or RuntimeError where sizes and weights do not fit."""
    blocks = {k.split(".")[2] for k in weights if k.startswith("transformer.h.")}
    if len(blocks) != config.n_layer:  # before a wrong n_layer builds a million of them
        raise ValueError(f"it has weights of {len(blocks)} blocks for n_layer {config.n_layer}")
    if config.tie_weights:
        weights.setdefault("lm_head.weight", weights["transformer.wte.weight"])
    with torch.device("meta"):  # no memory before the shapes are known to fit
        model = GPT(config)
    model.load_state_dict({k: w.float() for k, w in weights.items()}, assign=True)
    if not all(w.isfinite().all() for w in model.state_dict().values()):
        raise ValueError("it has weights that are not finite")
    if config.tie_weights:
        if not torch.equal(model.lm_head.weight, model.transformer.wte.weight):
            raise ValueError("its lm_head is tied to wte, but their weights differ")
        model.lm_head.weight = model.transformer.wte.weight  # assign untied them
    return model.eval()


def load_checkpoint(source: str | Path, names: tuple[str, ...] = ("d2dmoe.pt", "ckpt.pt")) -> tuple[GPT, dict]:
    """The model in `source`, in eval mode, float32, on the CPU, and what else was saved with it ("tokenizer", None if
    it is unknown; "step", ...). A source is a folder with one of `names`, ours or nanoGPT's, or such a file; a folder
    that Hugging Face's save_pretrained wrote; a file with GPT-2's weights; or one of GPT2_SIZES, to be downloaded.
    Raises FileNotFoundError if there is none, ValueError if it cannot be computed exactly."""
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        known = (*names, *HF_WEIGHTS, "adapter_model.safetensors", "adapter_model.bin")  # PEFT's: recognise tells
        path = next((path / name for name in known if (path / name).exists()), path / names[-1])
    if not path.is_file() and str(source) in GPT2_SIZES:
        path = Path(torch.hub.get_dir(), "checkpoints", source, "pytorch_model.bin")
    elif not path.is_file():  # nor a pipe, which would be waited for
        raise FileNotFoundError(
            f"no checkpoint at {path}: train.py writes ckpt.pt, and convert.py makes d2dmoe.pt of it; run them first, "
            f"or check the path (by name: {', '.join(GPT2_SIZES)})"
        )
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            owner = "distilbert" if str(source) == "distilgpt2" else "openai-community"
            url = f"https://huggingface.co/{owner}/{source}/resolve/main/pytorch_model.bin"
            torch.hub.download_url_to_file(url, str(path))
        files = [path]
        if path.name.endswith(".index.json"):  # of a model in several files
            shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
            files = [path.with_name(Path(name).name) for name in sorted(set(shards))]
        raw = {k: w for file in files for k, w in read_weights(file).items()}
        weights, config, rest = recognise(raw, path.with_name("config.json"))
        return build_model(weights, config), rest
    except Exception as error:  # a damaged file can make zipfile and the unpickler raise nearly anything
        reason = " ".join(str(error).split()).partition(". ")[0][:300]  # PyTorch's first sentence
        if not path.exists():
            reason = f"{reason}: connect to the internet, or give the path of a copy"
        elif isinstance(error, pickle.UnpicklingError) and (found := re.search(OBJECT, str(error))):
            reason = (
                f"it holds an object of {found[1]}, and loading objects can run code: save the state dict alone, as "
                "torch.save({'model': model.state_dict(), 'model_args': ...}) in nanoGPT's train.py does"
            )
        elif type(error) is not ValueError and not getattr(error, "filename", None):  # neither ours, nor of a shard
            reason = f"it is damaged, incomplete, or nothing that is known here ({type(error).__name__}: {reason})"
        raise ValueError(f"{path if path.exists() else source} cannot be loaded: {reason}") from error


def load_model(source: str | Path) -> GPT:
    """The model of load_checkpoint(source); a folder's d2dmoe.pt comes before its ckpt.pt. Call it under
    torch.no_grad(): with gradients all experts are computed, and those not executed are masked."""
    return load_checkpoint(source)[0]
