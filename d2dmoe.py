"""D2DMoE in one file: a GPT whose feed-forward layers, and if wanted its attention projections, are split into experts
of which every token runs only those that matter to it.

    Szatkowski, Wójcik, Piórczyński, Scardapane. Exploiting Activation Sparsity with Dense to Dynamic-k
    Mixture-of-Experts Conversion. NeurIPS 2024, arXiv 2310.04361.                      called "the paper" below
    Zhang et al. MoEfication: Transformer Feed-forward Layers are Mixtures of Experts. arXiv 2110.01786.
    Radford et al. Language Models are Unsupervised Multitask Learners (GPT-2), whose parameter names are kept.

Equation numbers are those of the README's page on the method.

One class, `GPT`, is both the dense model that is trained and the converted model that is run. What a layer measures, the
sparsity penalty of a dense one or the experts that a converted one executed, comes back as a return value.

Shapes: B batch, T sequence, N = B*T tokens, d = n_embd, d_ff = 4d, E experts of h neurons each, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from kernels import ACTIVATIONS, expert_ffn


@dataclass
class GPTConfig:
    """Sizes of a model; the fields after `penalty` say how it was converted; in a dense one their sizes are 0."""

    block_size: int = 128  # longest context, in tokens
    vocab_size: int = 257
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    bias: bool = True  # in linear layers and layer norms
    activation: str = "relu"  # relu, gelu (exact), gelu_tanh (GPT-2's)
    penalty: str = "hoyer"  # hoyer, l1, none
    num_experts: int = 0  # E of each feed-forward layer
    router_width: int = 0
    router_target: str = "norm"  # what the router regresses: norm, sqrt or share
    attention_experts: int = 0  # E of each of the four attention projections; 0: they stay linear
    attention_router_width: int = 0

    @property
    def d_ff(self) -> int:
        return 4 * self.n_embd

    @property
    def projection_width(self) -> int:
        """Hidden width m of the MLP that replaces a d x d projection at equal cost, equation (6)."""
        d = self.n_embd
        return round((d * d + d) / (2 * d + 1))

    def experts(self, name: str) -> tuple[int, int, int]:
        """E, neurons in all, and router width of a converted layer: "mlp", or a projection, "q", "k", "v" or "o"."""
        if name == "mlp":
            return self.num_experts, self.d_ff, self.router_width
        return self.attention_experts, self.projection_width, self.attention_router_width

    def check(self) -> None:
        """Raises ValueError, in one line, for sizes that cannot be built."""
        sizes = (self.block_size, self.vocab_size, self.n_layer, self.n_head, self.n_embd)
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(f"block_size, vocab_size, n_layer, n_head and n_embd must be positive integers, not {sizes}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {self.activation!r}")
        if self.penalty not in ("hoyer", "l1", "none"):
            raise ValueError(f"penalty must be hoyer, l1 or none, not {self.penalty!r}")
        if self.router_target not in ("norm", "sqrt", "share"):
            raise ValueError(f"router_target must be norm, sqrt or share, not {self.router_target!r}")
        for what, name in (("d_ff", "mlp"), ("the projections' width", "q")):
            E, neurons, width = self.experts(name)
            if not isinstance(E, int) or E < 0 or (E and neurons % E):
                raise ValueError(f"{E} experts do not divide {what} {neurons} evenly")
            if E and not (isinstance(width, int) and width > 0):
                raise ValueError(f"a router must have a positive width, not {width}")


# ---------------------------------------------------------------------------------------------------------------------
# Activation sparsity

DISPLACEMENT = -10.0  # s: how far below zero the penalty pushes the pre-activations of a GELU (the paper's GPT-2)


def square_hoyer(a: Tensor) -> Tensor:
    """(sum_i a_i)^2 / sum_i a_i^2 over the last dimension of a >= 0, in float32: between 1 and its size, the number of
    effectively active neurons; 0 where all are zero. Equation (2), from Kurtz et al. 2020.  a [..., d_ff] -> [...]"""
    a = a.float()
    return (a.sum(-1) / (torch.linalg.vector_norm(a, dim=-1) + 1e-12)).square()  # (|a|_1 / |a|_2)^2


def sparsity_penalty(z: Tensor, a: Tensor, activation: str, penalty: str) -> Tensor:
    """Mean over tokens of the penalty, the second term of equation (1), for pre-activations z [..., d_ff] and a = act(z);
    a scalar in float32.

    A ReLU is penalized on its output a. A GELU has no zeros to count, so its pre-activation is clamped and displaced,
    max(z, s) - s with s = DISPLACEMENT, and is thereby pushed to where a GELU is flat.
    """
    if penalty == "none":
        return z.new_zeros((), dtype=torch.float32)
    if activation != "relu":
        a = F.relu(z.float() - DISPLACEMENT)
    return square_hoyer(a).mean() if penalty == "hoyer" else a.sum(-1, dtype=torch.float32).mean()


class MLP(nn.Module):
    """y = W2 act(W1 x + b1) + b2: a dense feed-forward layer, or the two-layer stand-in of an attention projection."""

    def __init__(self, d: int, d_ff: int, activation: str, penalty: str, bias: bool = True):
        super().__init__()
        self.activation, self.penalty = activation, penalty
        self.c_fc = nn.Linear(d, d_ff, bias=bias)
        self.c_proj = nn.Linear(d_ff, d, bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., d] -> y [..., d], penalty (a scalar, the mean over tokens)"""
        z = self.c_fc(x)  # [..., d_ff]
        a = ACTIVATIONS[self.activation](z)  # [..., d_ff]
        return self.c_proj(a), sparsity_penalty(z, a, self.activation, self.penalty)


# ---------------------------------------------------------------------------------------------------------------------
# Routing


class Router(nn.Module):
    """Predicts how much every expert would contribute to a token: two linear layers without bias.

    target "norm": the L2 norm of the expert's output, |raw|, equation (4): the paper's.
    target "sqrt": raw is trained on the norm's square root and squared here, so that small norms weigh more in the loss.
    target "share": MoEfication's classifier, a tanh inside and a logit for the expert's share of activation mass.
    """

    def __init__(self, d: int, width: int, num_experts: int, target: str):
        super().__init__()
        self.target = target
        self.fc1 = nn.Linear(d, width, bias=False)
        self.fc2 = nn.Linear(width, num_experts, bias=False)

    def raw(self, x: Tensor) -> Tensor:
        """x [..., d] -> [..., E], what the training loss is put on"""
        z = self.fc1(x)
        return self.fc2(z.tanh() if self.target == "share" else F.relu(z))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] -> norms [..., E], never negative"""
        raw = self.raw(x).float()
        if self.target == "share":
            return raw.sigmoid()
        return raw.square() if self.target == "sqrt" else raw.abs()


def dynamic_k(norms: Tensor, tau: float) -> Tensor:
    """Run the experts whose predicted norm is not small beside the token's largest: r_e >= (1 - tau) max_j r_j.

    Equation (5); the paper writes its threshold for 1 - tau. tau = 1 runs all experts, tau = 0 the best one.
    norms [..., E], finite, not negative -> executed [..., E] bool, at least one True a token. Raises ValueError unless 0 <= tau <= 1.
    """
    if not 0 <= tau <= 1:
        raise ValueError(f"tau must be between 0 and 1, not {tau}")
    return norms >= (1 - tau) * norms.amax(-1, keepdim=True)


def top_k(norms: Tensor, k: int) -> Tensor:
    """Run the k experts with the largest norms, the same number for every token: MoEfication's rule.

    norms [..., E] -> executed [..., E] bool. Raises ValueError unless 1 <= k <= E.
    """
    if not 1 <= k <= norms.shape[-1]:
        raise ValueError(f"k must be between 1 and the number of experts, {norms.shape[-1]}, not {k}")
    return torch.zeros_like(norms, dtype=torch.bool).scatter_(-1, norms.topk(k).indices, True)


class Gate(NamedTuple):
    """How a converted model chooses experts: Gate(dynamic_k, 0.9), Gate(top_k, 8). The default runs all of them."""

    rule: Callable[[Tensor, float], Tensor] = dynamic_k
    value: float = 1.0  # tau of dynamic_k or k of top_k
    oracle: bool = False  # apply the rule to the true norms, which cost as much as running everything, not to the router's


def expert_norms(a: Tensor, w2: Tensor) -> Tensor:
    """The L2 norm of every expert's output, || a_e W2_e ||: what a router is to predict, equation (3).

    a [N, E, h], w2 [E, h, d] -> [N, E]. Through the Gram matrix, ||a W||^2 = a (W W^T) a^T, so that no [N, E, d] is made.
    """
    gram = w2 @ w2.transpose(1, 2)  # [E, h, h]
    squared = torch.einsum("neh,ehg,neg->ne", a, gram, a)
    return squared.clamp(min=0).sqrt()


class DynamicKMoE(nn.Module):
    """A two-layer MLP cut into E experts of h neurons, and the router that selects among them.

    The experts' outputs are summed without weights: the router only selects. With all experts executed this is the
    dense layer that it was split from.
    """

    def __init__(self, d: int, d_ff: int, num_experts: int, activation: str, router_width: int, router_target: str):
        super().__init__()
        self.activation = activation
        h = d_ff // num_experts
        self.w1 = nn.Parameter(torch.zeros(num_experts, h, d))
        self.b1 = nn.Parameter(torch.zeros(num_experts, h))
        self.w2 = nn.Parameter(torch.zeros(num_experts, h, d))
        self.b2 = nn.Parameter(torch.zeros(d))
        self.router = Router(d, router_width, num_experts, router_target)

    def activations(self, x: Tensor) -> Tensor:
        """Of all experts: x [N, d] -> a [N, E, h]"""
        z = F.linear(x, self.w1.flatten(0, 1), self.b1.flatten())  # [N, E*h]
        return ACTIVATIONS[self.activation](z).unflatten(1, self.b1.shape)

    def forward(self, x: Tensor, gate: Gate = Gate()) -> tuple[Tensor, Tensor]:
        """x [B, T, d] -> y [B, T, d], executed [B, T, E] bool"""
        B, T, d = x.shape
        x = x.reshape(B * T, d)  # [N, d]
        if gate == Gate():  # tau = 1: all experts run, whatever the router says
            y = expert_ffn(x, self.w1, self.b1, self.w2, None, self.activation) + self.b2  # [N, d]
            return y.view(B, T, d), torch.ones(B, T, len(self.w1), dtype=torch.bool, device=x.device)
        norms = expert_norms(self.activations(x), self.w2) if gate.oracle else self.router(x)  # [N, E]
        executed = gate.rule(norms, gate.value)  # [N, E]
        y = expert_ffn(x, self.w1, self.b1, self.w2, executed, self.activation) + self.b2  # [N, d]
        return y.view(B, T, d), executed.view(B, T, -1)


# ---------------------------------------------------------------------------------------------------------------------
# The transformer


class KVCache:
    """Keys and values of the tokens seen so far, for every layer; preallocated: new ones are written in place."""

    def __init__(self, config: GPTConfig, batch: int, device: torch.device, dtype: torch.dtype):
        head_size = config.n_embd // config.n_head
        shape = (config.n_layer, batch, config.n_head, config.block_size, head_size)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0  # tokens held


class CausalSelfAttention(nn.Module):
    """GPT-2's attention: four d x d projections, linear or converted to experts, around PyTorch's attention."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.converted = config.attention_experts > 0
        d = config.n_embd
        if self.converted:
            sizes = (d, config.projection_width, config.attention_experts, "relu")
            router = (config.attention_router_width, config.router_target)
            self.q, self.k, self.v, self.o = (DynamicKMoE(*sizes, *router) for _ in range(4))
        else:
            self.c_attn = nn.Linear(d, 3 * d, bias=config.bias)
            self.c_proj = nn.Linear(d, d, bias=config.bias)

    def qkv(self, x: Tensor, gate: Gate) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """x [B, T, d] -> q, k, v [B, T, d] and the experts executed for each, none if the projection is linear"""
        if not self.converted:
            return *self.c_attn(x).split(x.shape[-1], dim=-1), {}
        (q, ran_q), (k, ran_k), (v, ran_v) = self.q(x, gate), self.k(x, gate), self.v(x, gate)
        return q, k, v, {"q": ran_q, "k": ran_k, "v": ran_v}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache | None, layer: int) -> Tensor:
        """q, k, v [B, T, d] -> each token's mixture of the values up to itself [B, T, d]"""
        B, T, d = q.shape
        q, k, v = (t.view(B, T, self.n_head, d // self.n_head).transpose(1, 2) for t in (q, k, v))  # [B, nh, T, hs]
        mask = None
        if cache is not None:
            start = cache.length
            cache.k[layer, :, :, start : start + T] = k
            cache.v[layer, :, :, start : start + T] = v
            k, v = cache.k[layer, :, :, : start + T], cache.v[layer, :, :, : start + T]  # [B, nh, start+T, hs]
            if start > 0 and T > 1:  # token i of the new ones sees the old ones and the new ones up to itself
                mask = torch.ones(T, start + T, dtype=torch.bool, device=q.device).tril(start)
        causal = mask is None and T > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)  # [B, nh, T, hs]
        return y.transpose(1, 2).reshape(B, T, d)

    def project(self, y: Tensor, gate: Gate) -> tuple[Tensor, dict[str, Tensor]]:
        """The output projection: y [B, T, d] -> [B, T, d] and the experts executed for it, none if it is linear"""
        if not self.converted:
            return self.c_proj(y), {}
        y, ran = self.o(y, gate)
        return y, {"o": ran}


class Block(nn.Module):
    """GPT-2's, with layer norms in front: x + attention(ln_1 x), then that + feed_forward(ln_2 that)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        d, d_ff, activation = config.n_embd, config.d_ff, config.activation
        self.ln_1 = nn.LayerNorm(d, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(d, bias=config.bias)
        self.mlp = (
            DynamicKMoE(d, d_ff, config.num_experts, activation, config.router_width, config.router_target)
            if config.num_experts
            else MLP(d, d_ff, activation, config.penalty, config.bias)
        )

    def forward(
        self, x: Tensor, gate: Gate, cache: KVCache | None, layer: int
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """x [B, T, d] -> x [B, T, d], what this block measured, and the inputs of its layers.

        measured: a dense block's penalty under "penalty" (scalar), and under "mlp", "q", "k", "v", "o" the experts [B, T, E]
        that the converted layers executed. inputs [B, T, d]: of "qkv", "o" and "mlp", to train their stand-ins on.
        """
        inputs = {"qkv": self.ln_1(x)}
        q, k, v, measured = self.attn.qkv(inputs["qkv"], gate)
        inputs["o"] = self.attn.attend(q, k, v, cache, layer)
        y, ran = self.attn.project(inputs["o"], gate)
        measured |= ran
        x = x + y
        inputs["mlp"] = self.ln_2(x)
        if isinstance(self.mlp, DynamicKMoE):
            y, measured["mlp"] = self.mlp(inputs["mlp"], gate)
        else:
            y, measured["penalty"] = self.mlp(inputs["mlp"])
        return x + y, measured, inputs


class GPT(nn.Module):
    """GPT-2: `model(idx)` for logits, `model.hidden(idx)` for what happens inside. Raises ValueError for a bad config."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        config.check()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied
        for name, p in self.named_parameters():
            if name.endswith(("weight", "w1", "w2")) and p.dim() > 1 and "router" not in name:
                # GPT-2's: smaller where 2 * n_layer additions pile up on the residual stream
                residual = name.endswith(("c_proj.weight", "w2"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(
        self, idx: Tensor, gate: Gate = Gate(), cache: KVCache | None = None
    ) -> tuple[Tensor, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
        """idx [B, T] -> x [B, T, d] before the LM head, and for each block what it measured and its layers' inputs.

        With a cache, idx continues the tokens it holds, and their keys and values are added to it.
        Raises ValueError if the tokens do not fit into block_size.
        """
        B, T = idx.shape
        start = cache.length if cache is not None else 0
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens do not fit into a context of {self.config.block_size}")
        position = torch.arange(start, start + T, device=idx.device)  # [T]
        x = self.transformer.wte(idx) + self.transformer.wpe(position)  # [B, T, d]
        measured, inputs = [], []
        for layer, block in enumerate(self.transformer.h):
            x, m, i = block(x, gate, cache, layer)
            measured.append(m)
            inputs.append(i)
        if cache is not None:
            cache.length += T
        return self.transformer.ln_f(x), measured, inputs

    def forward(self, idx: Tensor, gate: Gate = Gate()) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """idx [B, T] -> logits [B, T, V] and what each block measured (see Block)"""
        x, measured, _ = self.hidden(idx, gate)
        return self.lm_head(x), measured


@torch.no_grad()
def generate(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    gate: Gate = Gate(),
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Iterator[tuple[Tensor, list[dict[str, Tensor]]]]:
    """Continues idx [B, T]; yields each new token [B, 1] with what every block measured [B, 1, E] in predicting it.

    temperature 0 takes the likeliest token; top_k samples among the k likeliest. Within block_size only the new token is
    computed. Past it the window of the last block_size tokens slides, every token's position changes with it, and so
    the window is computed afresh for each token; use_cache=False does that from the start.
    """
    block_size = model.config.block_size
    p = model.transformer.wte.weight
    cache = KVCache(model.config, len(idx), p.device, p.dtype) if use_cache else None
    new = idx = idx[:, -block_size:]  # [B, T]
    for _ in range(max_new_tokens):
        if cache is not None and cache.length + new.shape[1] > block_size:
            cache = None
        x, measured, _ = model.hidden(new if cache is not None else idx, gate, cache)
        logits = model.lm_head(x[:, -1]).float()  # [B, V]
        if temperature == 0:
            new = logits.argmax(-1, keepdim=True)  # [B, 1]
        else:
            logits = logits / temperature
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # [B, 1]
                logits = logits.masked_fill(logits < kth, -math.inf)
            new = torch.multinomial(logits.softmax(-1), 1, generator=generator)  # [B, 1]
        idx = torch.cat((idx, new), dim=1)[:, -block_size:]  # [B, T]
        yield new, [{name: m[name][:, -1:] for name in m if name != "penalty"} for m in measured]


# ---------------------------------------------------------------------------------------------------------------------
# What it costs


def flops_per_token(config: GPTConfig, context: float, counts: list[dict[str, float]] | None = None) -> float:
    """Floating-point operations of the matrix multiplies for one token that attends to `context` tokens; a
    multiply-add is two. Counted: projections, attention, feed-forward, routers, LM head.

    counts: for every block the mean number of experts a token executed, by layer name as in Block; None: the dense model.
    """
    d, V = config.n_embd, config.vocab_size
    attention, linear = 2 * 2 * context * d, 2 * 4 * d * d  # scores and mixture; the four projections
    total = 2 * d * V + config.n_layer * attention
    if counts is None:
        return total + config.n_layer * (linear + 2 * 2 * d * config.d_ff)
    for block in counts:
        if not config.attention_experts:
            total += linear
        for name, count in block.items():
            E, neurons, width = config.experts(name)
            total += 2 * (d * width + width * E) + count * 2 * 2 * d * neurons / E
    return total


def executed_share(config: GPTConfig, counts: list[dict[str, float]]) -> float:
    """Share of all experts that ran, from the same numbers as `flops_per_token`."""
    return sum(sum(block.values()) for block in counts) / sum(config.experts(name)[0] for block in counts for name in block)


# ---------------------------------------------------------------------------------------------------------------------
# GPT-2's own weights


def from_gpt2(state_dict: dict[str, Tensor]) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The config and our state dict for the weights of a Hugging Face GPT2LMHeadModel or GPT2Model (any size).

    Its linear layers are stored as [in, out] ("Conv1D") and are transposed here; the causal mask it keeps in buffers is
    dropped; the head is tied to wte. Raises KeyError or ValueError where names or shapes are not GPT-2's.
    """
    sd = {name.removeprefix("transformer."): t for name, t in state_dict.items()}
    ours = {}
    for name, t in sd.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")) or name == "lm_head.weight":
            continue
        conv1d = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        ours[f"transformer.{name}"] = t.t().contiguous() if conv1d else t
    ours["lm_head.weight"] = ours["transformer.wte.weight"]
    vocab_size, d = sd["wte.weight"].shape
    if d % 64:
        raise ValueError(f"n_embd {d} is not a multiple of 64, the head size of every GPT-2")
    config = GPTConfig(
        block_size=sd["wpe.weight"].shape[0],
        vocab_size=vocab_size,
        n_layer=len({name.split(".")[1] for name in sd if name.startswith("h.")}),
        n_head=d // 64,
        n_embd=d,
        activation="gelu_tanh",
    )
    return config, ours
