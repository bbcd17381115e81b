"""Running only the executed experts of a feed-forward layer: `expert_ffn`, and the ways to compute it.

For every token n, with a_e = act(w1[e] @ x_n + b1[e]) the h activations of expert e,

    y_n = sum over e with executed[n, e] of  a_e @ w2[e]          (D2DMoE, arXiv 2310.04361)

w2[e] [h, d] is the transpose of the paper's W2_e; the bias b2 is added by who calls.

    masked_ffn    compute all experts, then zero the activations of the others: the reference; differentiable
    dense_ffn     the same without gradients, where too little is skipped for another path to pay
    sampled_ffn   few tokens or small experts on a CPU: read only their rows of both matrices, where these lie
    grouped_ffn   many tokens on a CPU: each expert gathers its tokens, two matmuls, scatter-add
    triton_ffn    a GPU: two kernels for a few tokens, three for many; no atomics, so results repeat bit for bit

`linear` is F.linear and `matmul` is @, both faster on a CPU for a few rows. Every linear layer uses `linear`, of the
dense model too.

Shapes, here and in the kernels: N tokens, d model width, E experts, h neurons per expert, K = executed.sum();
x [N, d], w1 [E, h, d], b1 [E, h], w2 [E, h, d] (a row is a neuron, in both matrices), executed [N, E] bool.

`python kernels.py` checks every path against float64 and prints benchmarks against the dense layer.
"""

import argparse
import functools
import itertools
import math
import statistics
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # macOS and Windows have no Triton: the kernels below are then functions that nobody calls
    triton, jit = None, lambda kernel: kernel

    class tl:
        constexpr = None


# "gelu" is the exact one (nanoGPT), "gelu_tanh" the approximation that OpenAI's GPT-2 was trained with.
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}


# ---------------------------------------------------------------------------------------------------------------------
# The reference


def masked_ffn(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, executed: Tensor | None, activation: str) -> Tensor:
    """All experts run as one dense layer, then the activations of those not executed are set to zero."""
    a = ACTIVATIONS[activation](F.linear(x, w1.flatten(0, 1), b1.flatten())).unflatten(1, b1.shape)  # [N, E, h]
    if executed is not None:
        a = a.masked_fill(~executed.unsqueeze(-1), 0)  # [N, E, h]
    return a.flatten(1) @ w2.flatten(0, 1)  # [N, E*h] @ [E*h, d] -> [N, d]


# ---------------------------------------------------------------------------------------------------------------------
# A linear layer for a few rows

FEW_ROWS = 128  # with more, one large matmul is as good
FEW_WEIGHTS = 1 << 18  # fewer than these (1 MB) stay in a cache, where our calls cost more than they save

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the format's first use PyTorch warns that it is beta: here nobody hears it
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, x [..., in] -> [..., out], for every linear layer. Generating text multiplies one row by all weights,
    which takes as long as reading them, and MKL's matmul reads slowly and on one thread. For one row PyTorch's own
    sampled_addmm, asked for every entry, reads faster; for 2 to FEW_ROWS rows a batch of eight parts of the weights."""
    if not few_rows_on_cpu(x, weight, bias):
        return F.linear(x, weight, bias)
    (*leading, width), out = x.shape, len(weight)
    x = x.reshape(-1, width)  # [N, in]
    if len(x) == 1:
        start = x.new_zeros(out) if bias is None else bias.expand(out).clone()  # [out]
        return sampled_product(x, weight, every_row(out), start).view(*leading, out)  # [..., out]
    n = out - out % 8  # outputs that make eight equal parts
    parts = weight[:n].view(8, n // 8, width).transpose(1, 2)  # [8, in, n/8]
    y = torch.bmm(x.expand(8, -1, -1), parts)  # [8, N, in] @ [8, in, n/8] -> [8, N, n/8]
    y = y.transpose(0, 1).reshape(len(x), n)  # [N, n]
    if n < out:
        y = torch.cat((y, F.linear(x, weight[n:])), dim=1)  # [N, out]
    y = y.view(*leading, out)  # [..., out]
    return y if bias is None else y.add_(bias)


def matmul(a: Tensor, w2: Tensor) -> Tensor:
    """a @ w2, a [N, in], w2 [in, out]: what `linear` is for weights stored the other way round, as w2's are here. For a
    few rows the sum over in, the rows of w2, is taken in parts: in quarters or in eighths."""
    (N, width), out = a.shape, w2.shape[1]
    if width % 8 or not few_rows_on_cpu(a, w2):
        return a @ w2  # [N, out]
    if N in (2, 3) or N == 1 and out <= 512:  # where this reads fastest
        return torch.cat([weighted_sums(row, w2, every_row(width)) for row in a])  # N of [1, out] -> [N, out]
    parts = a.view(N, 8, width // 8).transpose(0, 1)  # [8, N, in/8]
    y = torch.bmm(parts, w2.view(8, width // 8, out))  # [8, N, in/8] @ [8, in/8, out] -> [8, N, out]
    return y.sum(0)  # [N, out]


# Two operators that read only chosen rows of weights. `rows` lists the choices of all N tokens, M together, one token's
# after another's: token i's are rows[j] for j from offsets[i] up to offsets[i + 1] (offsets [N + 1], the last is M).
# The threads share out the tokens. A single token has no offsets: it is computed as four, with a quarter of M each,
# so that every thread has work.


def sampled_product(x: Tensor, weight: Tensor, rows: Tensor, start: Tensor, offsets: Tensor | None = None) -> Tensor:
    """start[j] + x[i] @ weight[rows[j]], for every token i and its j: of x weight^T only the entries that a sparse
    matrix in CSR format names.   x [N, in], weight [out, in], rows [M] -> start [M], written over"""
    if offsets is None:
        x, offsets = x.expand(4, -1), quarters(len(rows))  # [4, in], [5]
    start, size = start.view_as(rows), (len(x), len(weight))  # nothing else checks the length
    wanted = torch.sparse_csr_tensor(offsets, rows, start, size, device=x.device, check_invariants=False)
    return torch.sparse.sampled_addmm(wanted, x, weight.t(), out=wanted).values()  # without out it copies all indices


def weighted_sums(a: Tensor, w2: Tensor, rows: Tensor, offsets: Tensor | None = None) -> Tensor:
    """The sum of a[j] * w2[rows[j]] over the j of each token.   a [M], w2 [in, out], rows [M] -> [N, out]"""
    if offsets is None:
        return weighted_sums(a, w2, rows, quarters(len(rows))).sum(0, keepdim=True)  # [4, out] -> [1, out]
    return F.embedding_bag(rows, w2, offsets, mode="sum", per_sample_weights=a, include_last_offset=True)


@functools.cache
def quarters(n: int) -> Tensor:
    """offsets [5] of four tokens that share n rows as equally as possible, kept from call to call"""
    return torch.tensor([n * i // 4 for i in range(5)], device="cpu")


@functools.cache
def every_row(n: int) -> Tensor:
    """0, 1, 2 and so on [n], kept from call to call"""
    return torch.arange(n, device="cpu")


def few_rows_on_cpu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `linear` and `matmul` go their own way: for 1 to FEW_ROWS rows, float32, no gradients, weights too many
    for a cache. A rule by shape and not a timing, so that a busy machine cannot change it and equal inputs give equal
    outputs. Where it holds, weights that come from memory are read about twice as fast, and those that do lie in a
    cache at most a fifth slower."""
    # Compiling comes first, or the compiled code would depend on the sizes.
    if torch.compiler.is_compiling() or weight.numel() < FEW_WEIGHTS:
        return False
    rows = x.shape[:-1].numel()
    return (
        0 < rows <= FEW_ROWS
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)))
        and not torch.is_autocast_enabled("cpu")
        and weight.is_contiguous()
        and (rows == 1 or torch.get_num_threads() > 1)
        and torch.backends.mkl.is_available()
    )


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch without gradients: dense, and two ways to skip


def activate_(z: Tensor, activation: str) -> Tensor:
    """In place where PyTorch can: allocating a second [N, E*h] costs more than the activation."""
    return F.relu_(z) if activation == "relu" else ACTIVATIONS[activation](z)


def dense_ffn(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, executed: Tensor | None, activation: str) -> Tensor:
    """masked_ffn without gradients, in place; executed is None where every expert runs."""
    a = activate_(linear(x, w1.flatten(0, 1), b1.flatten()), activation)  # [N, E*h]
    if executed is not None:
        by_expert, keep = a.view(-1, *b1.shape), executed.unsqueeze(-1)  # [N, E, h], [N, E, 1]
        if a.dtype == torch.float32:  # up to six times as fast; a float16 may have become infinite, and inf * 0 is nan
            by_expert.mul_(keep)
        else:
            by_expert.masked_fill_(~keep, 0)
    return matmul(a, w2.flatten(0, 1))  # [N, E*h] @ [E*h, d] -> [N, d]


def sampled_ffn(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, executed: Tensor, activation: str) -> Tensor:
    """Only the executed experts' weights are read, where they lie: each of their neurons multiplies its row of w1 with
    the token, then their rows of w2 are added up, weighted by the activations. Reading is most of the cost of a few
    tokens; for many it pays where experts are so small or rare that grouping costs more."""
    (N, d), (E, h, _) = x.shape, w1.shape
    if N == 0:  # a sparse matrix must have rows
        return torch.empty_like(x)
    experts = executed.nonzero()[:, 1]  # [K], token by token
    rows = every_row(E * h).view(E, h).index_select(0, experts).flatten()  # [K*h], of w1 and w2 seen as [E*h, d]
    b1 = b1.index_select(0, experts).flatten()  # [K*h]
    offsets = None if N == 1 else h * F.pad(executed.sum(1).cumsum(0), (1, 0))  # [N+1], each token's place in rows
    a = activate_(sampled_product(x, w1.view(E * h, d), rows, b1, offsets), activation)  # [K*h]
    return weighted_sums(a, w2.view(E * h, d), rows, offsets)  # [N, d]


def grouped_ffn(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, executed: Tensor, activation: str) -> Tensor:
    """Every expert runs on its own tokens: per expert one gather, two matmuls, one scatter-add."""
    y = torch.zeros_like(x)
    counts = executed.sum(0).tolist()  # n_e, tokens of each expert
    tokens_of = executed.t().nonzero()[:, 1].split(counts)  # [K], expert by expert -> E of [n_e]
    for e, tokens in enumerate(tokens_of):
        if counts[e]:
            a = activate_(F.linear(x.index_select(0, tokens), w1[e], b1[e]), activation)  # [n_e, h]
            y.index_add_(0, tokens, a @ w2[e])  # [n_e, d] into [N, d]
    return y


# ---------------------------------------------------------------------------------------------------------------------
# Triton

DECODE_TOKENS = 16  # up to so many the work is reading weights; also the fewest rows that tl.dot takes everywhere
PARTIAL_BYTES = 256 << 20  # at most, of experts' outputs waiting to be summed


@jit
def _activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        a = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "gelu":
        a = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))  # 1/sqrt(2)
    else:  # gelu_tanh; (1 + tanh u) / 2 = sigmoid(2u)
        a = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))  # 2 sqrt(2/pi)
    return a


@jit
def _load_mask(executed_ptr, N, E, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr):
    """executed, whole, as integers [BLOCK_N, BLOCK_E]; each expert's place among those in use [BLOCK_E], -1 for the
    others; how many are in use. By this every program of a decode kernel finds its expert, without a list."""
    n, e = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_E)[None, :]
    ran = tl.load(executed_ptr + n * E + e, mask=(n < N) & (e < E), other=0).to(tl.int32)  # [BLOCK_N, BLOCK_E]
    used = tl.max(ran, 0)  # [BLOCK_E]
    return ran, tl.where(used != 0, tl.cumsum(used, 0) - 1, -1), tl.sum(used, 0)


@jit
def _decode_first(
    x_ptr, w1_ptr, b1_ptr, executed_ptr, a_ptr,
    N, d, E, h,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (j, i): BLOCK_H activations of the i-th expert in use, for all N <= BLOCK_N tokens. a is [N, E*h]; it is
    written for every expert in use, with zeros for the tokens that don't run it, and stays unset for the others."""
    ran, place, count = _load_mask(executed_ptr, N, E, BLOCK_N, BLOCK_E)
    if tl.program_id(1) >= count:  # the grid assumes that all experts are in use, because the host never looks
        return
    experts = tl.arange(0, BLOCK_E)  # [BLOCK_E]
    e = tl.sum(tl.where(place == tl.program_id(1), experts, 0), 0)
    runs = tl.max(tl.where((experts == e)[None, :], ran, 0), 1) != 0  # [BLOCK_N], executed[:, e]
    n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    neuron = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)  # [BLOCK_H], within the expert
    neuron_mask = neuron < h
    row = e.to(tl.int64) * h + neuron  # [BLOCK_H], of w1 and w2 seen as [E*h, d]; 64 bits, as E*h*d may pass 2^31

    z = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    for start in range(0, d, BLOCK_D):
        c = start + tl.arange(0, BLOCK_D)  # [BLOCK_D], columns
        c_mask = (c < d)[None, :]
        x = tl.load(x_ptr + n[:, None] * d + c[None, :], mask=runs[:, None] & c_mask, other=0.0)  # [BLOCK_N, BLOCK_D]
        w1_mask = neuron_mask[:, None] & c_mask
        w1 = tl.load(w1_ptr + row[:, None] * d + c[None, :], mask=w1_mask, other=0.0)  # [BLOCK_H, BLOCK_D]
        z = tl.dot(x, tl.trans(w1), z, input_precision=PRECISION)  # [BLOCK_N, BLOCK_H]
    z += tl.load(b1_ptr + row, mask=neuron_mask, other=0.0).to(tl.float32)[None, :]
    a = tl.where(runs[:, None], _activate(z, ACTIVATION), 0.0).to(a_ptr.dtype.element_ty)
    tl.store(a_ptr + n[:, None].to(tl.int64) * (E * h) + row[None, :], a, mask=(n < N)[:, None] & neuron_mask[None, :])


@jit
def _decode_second(
    a_ptr, w2_ptr, executed_ptr, y_ptr,
    N, d, E, h,
    PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program j: BLOCK_D columns of the output, summed over the experts in use."""
    ran, place, count = _load_mask(executed_ptr, N, E, BLOCK_N, BLOCK_E)
    experts, n = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_N)  # [BLOCK_E], [BLOCK_N]
    n_mask = (n < N)[:, None]
    c = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D], columns
    c_mask = (c < d)[None, :]
    blocks = tl.cdiv(h, BLOCK_H)  # of neurons in an expert

    y = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for i in range(0, count * blocks):
        e = tl.sum(tl.where(place == i // blocks, experts, 0), 0)
        neuron = i % blocks * BLOCK_H + tl.arange(0, BLOCK_H)  # [BLOCK_H]
        row = e.to(tl.int64) * h + neuron  # [BLOCK_H]
        a_mask, w2_mask = n_mask & (neuron < h)[None, :], (neuron < h)[:, None] & c_mask
        a_offsets = n[:, None].to(tl.int64) * (E * h) + row[None, :]
        a = tl.load(a_ptr + a_offsets, mask=a_mask, other=0.0)  # [BLOCK_N, BLOCK_H]
        w2 = tl.load(w2_ptr + row[:, None] * d + c[None, :], mask=w2_mask, other=0.0)  # [BLOCK_H, BLOCK_D]
        y = tl.dot(a, w2, y, input_precision=PRECISION)  # [BLOCK_N, BLOCK_D]
    tl.store(y_ptr + n[:, None] * d + c[None, :], y.to(y_ptr.dtype.element_ty), mask=n_mask & c_mask)


@jit
def _group_tokens(executed_ptr, tokens_ptr, counts_ptr, N, E, BLOCK: tl.constexpr):
    """Program e lists the tokens n with executed[n, e], in order, in tokens[e, :counts[e]]; N <= BLOCK."""
    e = tl.program_id(0)
    n = tl.arange(0, BLOCK)  # [BLOCK]
    ran = tl.load(executed_ptr + n.to(tl.int64) * E + e, mask=n < N, other=0).to(tl.int32)  # [BLOCK]
    slot = tl.cumsum(ran, 0) - 1  # the running count is the place in the list, so there is no sort
    tl.store(tokens_ptr + e.to(tl.int64) * N + slot, n, mask=ran != 0)
    tl.store(counts_ptr + e, tl.sum(ran, 0))


@jit
def _prefill_experts(
    x_ptr, w1_ptr, b1_ptr, w2_ptr, tokens_ptr, counts_ptr, partial_ptr,
    N, d, E, h,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (e, i, s): BLOCK_N tokens of expert e through slice s of its neurons, both layers; activations stay on
    chip. Its share of the output goes to rows of partial [N, E, S, d] of its own: nothing is added in memory."""
    e, s, S = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    count = tl.load(counts_ptr + e)
    first = tl.program_id(1) * BLOCK_N
    if first >= count:  # the grid assumes N tokens per expert, because the counts stay on the GPU
        return
    i = first + tl.arange(0, BLOCK_N)  # [BLOCK_N], places in the expert's list
    n = tl.load(tokens_ptr + e.to(tl.int64) * N + i, mask=i < count, other=0).to(tl.int64)  # [BLOCK_N], tokens
    neuron = s * BLOCK_H + tl.arange(0, BLOCK_H)  # [BLOCK_H], within the expert
    n_mask, neuron_mask = (i < count)[:, None], (neuron < h)[:, None]
    row = e.to(tl.int64) * h + neuron  # [BLOCK_H], of w1 and w2 seen as [E*h, d]

    z = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    for start in range(0, d, BLOCK_D):
        c = start + tl.arange(0, BLOCK_D)  # [BLOCK_D], columns
        c_mask = (c < d)[None, :]
        x = tl.load(x_ptr + n[:, None] * d + c[None, :], mask=n_mask & c_mask, other=0.0)  # [BLOCK_N, BLOCK_D]
        w1 = tl.load(w1_ptr + row[:, None] * d + c[None, :], mask=neuron_mask & c_mask, other=0.0)  # [BLOCK_H, BLOCK_D]
        z = tl.dot(x, tl.trans(w1), z, input_precision=PRECISION)  # [BLOCK_N, BLOCK_H]
    z += tl.load(b1_ptr + row, mask=neuron < h, other=0.0).to(tl.float32)[None, :]
    a = _activate(z, ACTIVATION).to(w2_ptr.dtype.element_ty)  # [BLOCK_N, BLOCK_H]

    partial_row = (n * E + e) * S + s  # [BLOCK_N], of partial seen as [N*E*S, d]
    for start in range(0, d, BLOCK_D):
        c = start + tl.arange(0, BLOCK_D)  # [BLOCK_D]
        c_mask = (c < d)[None, :]
        w2 = tl.load(w2_ptr + row[:, None] * d + c[None, :], mask=neuron_mask & c_mask, other=0.0)  # [BLOCK_H, BLOCK_D]
        y = tl.dot(a, w2, input_precision=PRECISION).to(partial_ptr.dtype.element_ty)  # [BLOCK_N, BLOCK_D]
        tl.store(partial_ptr + partial_row[:, None] * d + c[None, :], y, mask=n_mask & c_mask)


@jit
def _prefill_sum(partial_ptr, executed_ptr, y_ptr, d, E, S, BLOCK_D: tl.constexpr):
    """Program (n, j): BLOCK_D columns of token n's output, the sum of its experts' rows in partial [N, E, S, d]."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    y = tl.zeros((BLOCK_D,), tl.float32)
    for i in range(0, E * S):
        ran = tl.load(executed_ptr + n * E + i // S) != 0  # the rows of others are unset
        y += tl.load(partial_ptr + (n * E * S + i) * d + c, mask=(c < d) & ran, other=0.0).to(tl.float32)
    tl.store(y_ptr + n * d + c, y.to(y_ptr.dtype.element_ty), mask=c < d)


# One fixed configuration for each kernel, chosen by counting bytes, registers and programs, not by timing. Decoding is
# bound by memory: few neurons or columns per program, so that a handful of experts occupies the GPU, and many stages,
# so that a program keeps several blocks of weights under way. Prefill is bound by arithmetic: large blocks.
# float32 cannot use tensor cores in IEEE arithmetic and takes twice the room: with smaller blocks no registers spill.
HALF = {
    "first": dict(BLOCK_H=16, BLOCK_D=256, num_warps=4, num_stages=5),
    "second": dict(BLOCK_H=128, BLOCK_D=32, num_warps=4, num_stages=5),
    "experts": dict(BLOCK_N=128, BLOCK_H=128, BLOCK_D=64, num_warps=8, num_stages=3),
}
FLOAT32 = {
    "first": dict(BLOCK_H=16, BLOCK_D=128, num_warps=4, num_stages=5),
    "second": dict(BLOCK_H=64, BLOCK_D=32, num_warps=4, num_stages=5),
    "experts": dict(BLOCK_N=64, BLOCK_H=64, BLOCK_D=32, num_warps=8, num_stages=2),
}


def on_nvidia(x: Tensor) -> bool:
    """Whether x lies on an NVIDIA GPU. (To PyTorch AMD's are cuda devices too; there torch.version.cuda is None.)"""
    return x.is_cuda and torch.version.cuda is not None


def triton_ffn(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, executed: Tensor | None, activation: str) -> Tensor:
    """On a GPU, float32, bfloat16 or float16, equal bit for bit from run to run. Each product is summed in float32;
    of more than DECODE_TOKENS tokens each expert's output is rounded to x's dtype, then these are added in float32.

    The host never looks at the mask, so it need not wait for the GPU. float32 is IEEE arithmetic unless torch's own
    setting allows TF32. Has no gradient.
    """
    (N, d), h = x.shape, w1.shape[1]
    # Small experts do too little with the rows that they gather, rows that are not aligned are slow to load, and on
    # NVIDIA's GPUs before Ampere Triton has no tensor cores: there many tokens run dense.
    old = on_nvidia(x) and torch.cuda.get_device_capability(x.device) < (8, 0)
    if executed is None or (N > DECODE_TOKENS and (h < 64 or d % 16 or old)):
        return dense_ffn(x, w1, b1, w2, executed, activation)
    # Under torch.compile it is a custom operator, which is kept whole. Calling one costs time, so elsewhere the plain
    # function runs.
    run = _triton_op if torch.compiler.is_compiling() else _triton_ffn
    return run(x, w1, b1, w2, executed, activation)


def _triton_ffn(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, executed: Tensor, activation: str) -> Tensor:
    (N, d), (E, h, _) = x.shape, w1.shape
    x, w1, b1, w2, executed = (t.contiguous() for t in (x, w1, b1, w2, executed))
    y = torch.empty_like(x)
    if N == 0:
        return y
    tf32 = on_nvidia(x) and torch.backends.cuda.matmul.fp32_precision == "tf32"  # Triton has it for NVIDIA's alone
    precision = "tf32" if tf32 else "ieee"
    config = FLOAT32 if x.dtype == torch.float32 else HALF
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if N <= DECODE_TOKENS:
            a = x.new_empty(N, E * h)
            common = dict(PRECISION=precision, BLOCK_E=max(16, triton.next_power_of_2(E)), BLOCK_N=DECODE_TOKENS)
            first, second = config["first"] | common, config["second"] | common
            grid = triton.cdiv(h, first["BLOCK_H"]), E
            _decode_first[grid](x, w1, b1, executed, a, N, d, E, h, ACTIVATION=activation, **first)
            _decode_second[(triton.cdiv(d, second["BLOCK_D"]),)](a, w2, executed, y, N, d, E, h, **second)
            return y
        config = config["experts"] | dict(ACTIVATION=activation, PRECISION=precision)
        S = triton.cdiv(h, config["BLOCK_H"])  # slices of an expert's neurons
        size = max(1, min(N, 8192, PARTIAL_BYTES // (E * S * d * x.element_size())))  # tokens at a time
        tokens = torch.empty(E, size, dtype=torch.int32, device=x.device)
        counts = torch.empty(E, dtype=torch.int32, device=x.device)
        partial = x.new_empty(size, E, S, d)
        for x_, executed_, y_ in zip(x.split(size), executed.split(size), y.split(size)):
            n = len(x_)
            _group_tokens[(E,)](executed_, tokens, counts, n, E, BLOCK=triton.next_power_of_2(size), num_warps=8)
            grid = E, triton.cdiv(n, config["BLOCK_N"]), S
            _prefill_experts[grid](x_, w1, b1, w2, tokens, counts, partial, n, d, E, h, **config)
            block = min(1024, triton.next_power_of_2(d))
            _prefill_sum[n, triton.cdiv(d, block)](partial, executed_, y_, d, E, S, BLOCK_D=block, num_warps=4)
    return y


_triton_op = torch.library.custom_op("d2dmoe::triton_ffn", _triton_ffn, mutates_args=())
_triton_op.register_fake(lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format))


# ---------------------------------------------------------------------------------------------------------------------
# Dispatch


def expert_ffn(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, executed: Tensor | None, activation: str) -> Tensor:
    """The sum of the executed experts' outputs, without the bias b2, by the path that should be fastest for this mask.

    x [N, d], w1 [E, h, d], b1 [E, h], w2 [E, h, d], executed [N, E] bool or None for all -> [N, d] in the weights'
    dtype. Differentiable in x and the weights: where gradients are wanted the masked path runs. Raises ValueError
    for an unknown activation and for a mask of another shape or type.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    if executed is not None and (executed.dtype != torch.bool or executed.shape != x.shape[:1] + w1.shape[:1]):
        raise ValueError(f"executed must be a mask [N, E] of bool, not {list(executed.shape)} of {executed.dtype}")
    x = x.to(w1.dtype)  # under autocast it may differ
    args = (x, w1, b1, w2, executed, activation)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, w1, b1, w2)):
        return masked_ffn(*args)
    if x.is_cuda and triton is not None:
        return triton_ffn(*args)
    # Compiled code must not depend on the mask's values, and autocast picks the dtypes of single operators.
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return masked_ffn(*args)
    return cpu_ffn(*args)


# What the paths cost on a CPU. A dense layer multiplies each of N tokens by E * h * d pairs of weights, one of w1 and
# one of w2. The time that one pair takes in a large dense layer is the unit (the two cores that were measured do 49
# pairs per ns), and all else that takes time is converted into it.
DENSE_CALLS, SAMPLED_CALLS, GROUPED_CALLS = 1.2e6, 2e6, 2.8e6  # 25 us, 40 us; per expert in use 57 us (28 to 75)
GROUPED_ROW = 5e3  # 0.1 us for every token of an expert: to gather it and to add its output
READ, READ_SAMPLED, READ_GROUPED = 12, 11, 15  # fetching a pair of weights from memory, once for all tokens
SAMPLED = 2.4  # a multiplication in sampled_ffn, which does not reuse a row of weights for several tokens


def cpu_ffn(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, executed: Tensor | None, activation: str) -> Tensor:
    """expert_ffn on a CPU without gradients: estimates what each path would take and runs the fastest."""
    (N, d), (E, h, _) = x.shape, w1.shape
    if executed is None:
        return dense_ffn(x, w1, b1, w2, None, activation)
    counts = executed.tolist()[0] if N == 1 else executed.sum(0).tolist()  # [E], tokens of each expert
    K, used = sum(counts), E - counts.count(0)  # the experts that run, counted for every token; and counted once
    if K == N * E:
        return dense_ffn(x, w1, b1, w2, None, activation)
    dense_calls = DENSE_CALLS if E * h * d < FEW_WEIGHTS else 2 * DENSE_CALLS  # as `linear` and `matmul` make more
    cost = {  # calls and rows, then, for a pair of weights, reading and multiplying it
        dense_ffn: dense_calls + h * d * (E * READ + N * E),
        grouped_ffn: used * GROUPED_CALLS + K * GROUPED_ROW + h * d * (used * READ_GROUPED + K),
    }
    if x.dtype == torch.float32 and w1.is_contiguous() and w2.is_contiguous():  # as sampled_addmm and its views need
        cost[sampled_ffn] = SAMPLED_CALLS + h * d * (used * READ_SAMPLED + K * SAMPLED)
    return min(cost, key=cost.get)(x, w1, b1, w2, executed, activation)


# ---------------------------------------------------------------------------------------------------------------------
# python kernels.py: check, then measure


def random_layer(N: int, d: int, E: int, h: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """x, w1, b1, w2 with outputs of about unit size"""
    x, b1 = torch.randn(N, d, device=device), torch.randn(E, h, device=device)
    w1, w2 = torch.randn(E, h, d, device=device) / d**0.5, torch.randn(E, h, d, device=device) / (E * h) ** 0.5
    return tuple(t.to(dtype) for t in (x, w1, b1, w2))


def random_mask(N: int, E: int, share: float, device: str) -> Tensor:
    """executed [N, E]: for every token its own random share of the experts, at least one"""
    chosen = torch.rand(N, E, device=device).topk(max(1, round(share * E))).indices  # [N, k]
    return torch.zeros(N, E, dtype=torch.bool, device=device).scatter_(1, chosen, True)


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def check(device: str) -> None:
    """Every path of this device against float64 on odd shapes; prints the largest errors, raises if one is too big."""
    paths = [masked_ffn, dense_ffn, grouped_ffn, expert_ffn, sampled_ffn if device == "cpu" else triton_ffn]
    shapes = ((0, 64, 4, 16), (1, 64, 1, 48), (1, 768, 48, 64), (17, 100, 5, 24), (300, 256, 8, 100))
    for path, dtype in itertools.product(paths, [torch.float32] if device == "cpu" else TOLERANCE):
        worst = 0.0
        for activation, (N, d, E, h), share in itertools.product(ACTIVATIONS, shapes, (0.0, 0.3, 1.0)):
            layer, executed = random_layer(N, d, E, h, dtype, device), torch.rand(N, E, device=device) < share
            y64 = masked_ffn(*(t.double() for t in layer), executed, activation)
            difference = path(*layer, executed, activation).double() - y64
            error = (difference.norm() / y64.norm().clamp(min=1e-30)).item()
            if not error <= TOLERANCE[dtype]:  # nan too
                raise ArithmeticError(f"{path.__name__} is wrong in {dtype}: relative error {error:.1e}")
            worst = max(worst, error)
        print(f"check {path.__name__:11} {dtype} largest relative error {worst:.1e}")


def median_times(runs: list[Callable], repeats: int, device: str) -> list[float]:
    """Median seconds of each of some callables. On a CPU they take turns, in this order and then in the other, so that
    a slow moment of the machine hits them all; a turn is four calls, of which the first warms up and is not counted."""
    if device != "cpu":  # Triton's own benchmark empties the cache before each call and times by events
        return [triton.testing.do_bench(functools.partial(run, 0), return_mode="median") / 1e3 for run in runs]
    contest = [(run, []) for run in runs]  # each with its times
    for turn in range(repeats):
        for run, times in contest if turn % 2 else reversed(contest):
            for call in range(4):
                start = time.perf_counter()
                run(4 * turn + call)
                if call > 0:
                    times.append(time.perf_counter() - start)
    return [statistics.median(times) for _, times in contest]


def dense_layer(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
    """What every table compares with: w1 [d_ff, d], w2 [d, d_ff], through the linear layer that the model uses"""
    return linear(F.relu(linear(x, w1, b1), inplace=True), w2)


CACHE_BYTES = 128 << 20  # more than the last-level cache of most CPUs


def benchmark(device: str, dtype: torch.dtype, d: int, E: int, h: int, tokens: list[int], repeats: int = 25):
    """Times the layer with experts and the dense one; yields (N, executed share, seconds dense, seconds ours)."""
    weight_bytes = 2 * E * h * d * dtype.itemsize
    # rotated, so that no call finds its weights in a cache
    sets = max(8, math.ceil(2 * CACHE_BYTES / weight_bytes)) if device == "cpu" else 1
    layers = [random_layer(1, d, E, h, dtype, device)[1:] for _ in range(sets)]
    dense_layers = [(w1.flatten(0, 1), b1.flatten(), w2.flatten(0, 1).t().contiguous()) for w1, b1, w2 in layers]
    # dynamic=False, or dynamo compiles the second shape with symbolic sizes, which is slower
    run_dense = dense_layer if device == "cpu" else torch.compile(dense_layer, dynamic=False)
    for N, share in itertools.product(tokens, (1.0, 0.5, 0.25, 0.1)):
        x = torch.randn(N, d, device=device).to(dtype)
        # More masks than sets, or the few experts that one token selects would stay in the cache.
        masks = [random_mask(N, E, share, device) for _ in range(sets * (round(1 / share) if N <= 16 else 1))]
        runs = [
            lambda i: run_dense(x, *dense_layers[i % sets]),
            # half a turn behind, or it would find the weights that the dense layer has just read
            lambda i: expert_ffn(x, *layers[(i + sets // 2) % sets], masks[i % len(masks)], "relu"),
        ]
        executed = masks[0].float().mean().item()
        yield N, executed, *median_times(runs, max(2, repeats // (1 + N // 100)), device)


def print_layer(device: str, dtype: torch.dtype, d: int, E: int, h: int, tokens: list[int]) -> None:
    """A table of one layer"""
    print(f"d {d}, d_ff {E * h}, {E} experts of {h}, {str(dtype).removeprefix('torch.')}")
    print("tokens executed   dense ms    ours ms  speed-up")
    for N, share, t_dense, t_ours in benchmark(device, dtype, d, E, h, tokens):
        print(f"{N:6d} {share:8.1%} {t_dense * 1e3:10.3f} {t_ours * 1e3:10.3f} {t_dense / t_ours:8.2f}x", flush=True)


def print_sizes(sizes: list[int]) -> None:
    """A table of speed-ups on a CPU that shows from which size on experts gain"""
    print("speed-up over the dense layer by its width d: d_ff 4d, 32 experts of d/8; share of the experts executed")
    print("            one token                    2,048 tokens\n     d" + 2 * "   100%   50%   25%   10% ")
    for d in sizes:
        rows = benchmark("cpu", torch.float32, d, E=32, h=d // 8, tokens=[1, 2048], repeats=40)
        cells = [f"{t_dense / t_ours:5.2f}x" for _, _, t_dense, t_ours in rows]
        print(f"{d:6d} {''.join(cells[:4])}  {''.join(cells[4:])}", flush=True)


def main() -> None:
    on_gpu = torch.cuda.is_available() and triton is not None
    parser = argparse.ArgumentParser(description="Check the expert execution and measure it against the dense layer.")
    devices = ("cuda", "cpu") if on_gpu else ("cpu", "cuda")
    parser.add_argument("--device", choices=devices, default=devices[0], help="(default: %(default)s)")
    device = parser.parse_args().device
    if device != "cpu" and not on_gpu:
        raise SystemExit(f"--device {device} needs a GPU that torch sees, and Triton")
    torch.manual_seed(0)
    with torch.inference_mode():
        check(device)
        if device == "cpu":
            print(f"{torch.get_num_threads()} threads")
            print_layer(device, torch.float32, d=768, E=48, h=64, tokens=[1, 4, 16, 128, 2048])
            print_sizes([128, 256, 384, 512, 768, 1024])
            return
        print(torch.cuda.get_device_name(device))
        print_layer(device, torch.bfloat16, d=4096, E=128, h=128, tokens=[1, 16, 2048])
        print_layer(device, torch.bfloat16, d=768, E=24, h=128, tokens=[16384])
        print_layer(device, torch.float32, d=768, E=24, h=128, tokens=[16384])


if __name__ == "__main__":
    main()
