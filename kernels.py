"""Running only the selected experts of a feed-forward layer: `expert_ffn` and the ways it can be computed.

For every token n, with a_e(n) = act(W1_e x_n + b1_e) the h activations of expert e,

    y_n = sum over e with executed[n, e] of  a_e(n) W2_e          (D2DMoE, arXiv 2310.04361)

    masked_ffn    compute everything, then zero what was not selected: the definition, differentiable
    dense_ffn     the same tuned for a CPU: where skipping would not pay
    looped_ffn    one token on a CPU: multiply by the selected blocks of the weights where they lie, copy nothing
    grouped_ffn   many tokens on a CPU: an expert gathers its own tokens, two matmuls, adds the result back
    triton_ffn    a GPU: `group_tokens` lists each expert's tokens, one fused kernel runs all experts

Shapes, here and in the kernels: N tokens, d model width, E experts, h neurons an expert;
x [N, d], w1 [E, h, d], b1 [E, h], w2 [E, h, d] (row = one neuron, in both matrices), executed [N, E] bool.

`python kernels.py` checks every path against float64 and prints a benchmark against the dense layer.
"""

import argparse
import functools
import math
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows have no Triton: everything but triton_ffn works
    triton = None

# "gelu" is the exact one (nanoGPT), "gelu_tanh" the approximation that OpenAI's GPT-2 was trained with.
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}


def expert_ffn(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, executed: Tensor | None, activation: str) -> Tensor:
    """The sum of the executed experts' outputs, without the bias b2: on a GPU by Triton, on a CPU by the path that is
    fastest for this mask.

    x [N, d], w1 [E, h, d], b1 [E, h], w2 [E, h, d], executed [N, E] bool or None for all -> [N, d], all floats of one dtype.
    Differentiable in x and the weights (where gradients are wanted the masked path runs).
    Raises KeyError for an activation that is not in ACTIVATIONS.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, w1, b1, w2)):
        return masked_ffn(x, w1, b1, w2, executed, activation)
    if executed is None:
        return dense_ffn(x, w1, b1, w2, None, activation)
    if x.is_cuda and triton is not None:
        return triton_ffn(x, w1, b1, w2, executed, activation)
    if x.device.type == "cpu":
        E, h, d = w1.shape
        if executed.all():
            executed = None
        elif len(x) == 1:
            experts = executed.nonzero()[:, 1].tolist()
            if looping_pays(len(experts), E, h, d):
                return looped_ffn(x, w1, b1, w2, experts, activation)
        elif grouping_pays(executed, h, d):
            return grouped_ffn(x, w1, b1, w2, executed, activation)
        return dense_ffn(x, w1, b1, w2, executed, activation)
    return masked_ffn(x, w1, b1, w2, executed, activation)


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch: the reference, and the three CPU paths


def masked_ffn(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, executed: Tensor | None, activation: str) -> Tensor:
    """The reference: all experts run as one dense layer and the activations of unselected ones are set to zero."""
    a = ACTIVATIONS[activation](F.linear(x, w1.flatten(0, 1), b1.flatten())).unflatten(1, b1.shape)  # [N, E, h]
    if executed is not None:
        a = a.masked_fill(~executed.unsqueeze(-1), 0)  # [N, E, h]
    return a.flatten(1) @ w2.flatten(0, 1)  # [N, E*h] @ [E*h, d] -> [N, d]


def dense_ffn(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, executed: Tensor | None, activation: str) -> Tensor:
    """The same without gradients, as fast as the dense layer; executed is None where every expert runs."""
    (N, d), (E, h, _) = x.shape, w1.shape
    # On a CPU a thin matmul can run twice as fast as a batch of four; beyond a hundred tokens one large one is as good.
    P = math.gcd(E, 4) if N <= 128 and x.device.type == "cpu" else 1
    w1, b1, w2 = w1.reshape(P, -1, d), b1.reshape(P, 1, -1), w2.reshape(P, -1, d)  # [P, E*h/P, d], [P, 1, E*h/P]
    z = torch.baddbmm(b1, x.expand(P, N, d), w1.transpose(1, 2))  # [P, N, E*h/P]
    # In place: another [N, E*h] would cost more than the mask.
    a = F.relu_(z) if activation == "relu" else ACTIVATIONS[activation](z)
    if executed is not None:
        skipped = ~executed.reshape(N, P, E // P, 1).transpose(0, 1)  # [P, N, E/P, 1]
        a.unflatten(2, (E // P, h)).masked_fill_(skipped, 0)  # [P, N, E/P, h]
    y = torch.bmm(a, w2)  # [P, N, d]
    return y.sum(0) if P > 1 else y[0]  # [N, d]


def looped_ffn(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, experts: list[int], activation: str) -> Tensor:
    """One token, x [1, d]. A decode step is bound by reading weights, so it reads those of the selected experts only."""
    # Two experts at a time, as a strided batch of two that is a view of the weights: a batched matmul then gives each of
    # two cores a whole expert to read. An odd one at the end is cut into halves, where it has any.
    d, activate = x.shape[1], F.relu_ if activation == "relu" else ACTIVATIONS[activation]
    w1_t, b1_row, both = w1.transpose(1, 2), b1.unsqueeze(1), x.expand(2, 1, d)  # [E, d, h], [E, 1, h], [2, 1, d]
    out = x.new_zeros(2, 1, d)
    for i, j in zip(experts[::2], experts[1::2]):
        two = slice(i, j + 1, j - i)
        out.baddbmm_(activate(torch.bmm(both, w1_t[two]).add_(b1_row[two])), w2[two])  # [2, 1, h] @ [2, h, d]
    if len(experts) % 2:
        e, parts = experts[-1], 2 if w1.shape[1] % 2 == 0 else 1
        first, bias, second = (w[e].unflatten(0, (parts, -1)) for w in (w1, b1, w2))  # [2, h/2, d], [2, h/2], [2, h/2, d]
        z = torch.bmm(both[:parts], first.transpose(1, 2)).add_(bias.unsqueeze(1))  # [2, 1, h/2]
        out[:parts].baddbmm_(activate(z), second)
    return out.sum(0)  # [1, d]


def grouped_ffn(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, executed: Tensor, activation: str) -> Tensor:
    """Every expert runs on its own tokens: one gather, two matmuls, one scatter-add an expert."""
    out = torch.zeros_like(x)
    expert_of, token_of = executed.t().nonzero(as_tuple=True)  # the selected pairs, expert by expert
    counts = torch.bincount(expert_of, minlength=len(w1)).tolist()
    for e, tokens in enumerate(token_of.split(counts)):
        if counts[e]:
            a = ACTIVATIONS[activation](torch.addmm(b1[e], x.index_select(0, tokens), w1[e].t()))  # [n_e, h]
            out.index_add_(0, tokens, a @ w2[e])  # [n_e, d] into [N, d]
    return out


# When is a CPU faster running only the selected experts than running all of them as one dense layer with a mask? Where
# the sum of these costs is smaller. They are in multiply-adds of a large dense layer, of which the two cores that they
# were measured on do 80 a nanosecond; a call and a byte cost the same in any layer, so they hold for all sizes.
READ_ONE, READ_MANY = 20, 35  # reading a weight: as long as 20 multiply-adds for one token, 35 for a thin matrix of them
LOOP_CALL = 6.5e5  # dispatching one expert's operators for one token
GROUP_CALL = 1.4e6  # the same with a gather and a scatter-add
GATHERED_ROW = 1.6  # a gathered row against a dense one: it is copied in, added back, and the matrices are thin
# So small experts, or masks in which few tokens share an expert, run dense.


def looping_pays(selected: int, E: int, h: int, d: int) -> bool:
    """Whether looped_ffn over the selected experts is faster than dense_ffn over all E, for one token."""
    return selected * (LOOP_CALL + READ_ONE * h * d) < E * h * d * (READ_ONE + 1)


def grouping_pays(executed: Tensor, h: int, d: int) -> bool:
    """Whether grouped_ffn is faster than dense_ffn for executed [N, E]."""
    N, E = executed.shape
    dense = E * h * d * (READ_MANY + N)
    rows = GATHERED_ROW * h * d * int(executed.count_nonzero())
    if rows > dense:  # tells most masks without looking at which experts are in use
        return False
    return int(executed.any(0).count_nonzero()) * (GROUP_CALL + READ_MANY * h * d) + rows < dense


# ---------------------------------------------------------------------------------------------------------------------
# Triton

if triton is not None:

    @triton.jit
    def _group_tokens(executed_ptr, tokens_ptr, counts_ptr, N, E, BLOCK: tl.constexpr):
        """Program e writes the indices n with executed[n, e], in order, to tokens[e, :counts[e]]."""
        e = tl.program_id(0)
        tokens_ptr += e.to(tl.int64) * N
        count = 0
        for start in range(0, N, BLOCK):
            n = start + tl.arange(0, BLOCK)  # [BLOCK]
            selected = tl.load(executed_ptr + n.to(tl.int64) * E + e, mask=n < N, other=0).to(tl.int32)
            slot = count + tl.cumsum(selected, 0) - 1  # running count = place in the list, so no sort
            tl.store(tokens_ptr + slot, n, mask=selected != 0)
            count += tl.sum(selected, 0)
        tl.store(counts_ptr + e, count)

    @triton.jit
    def _fused_ffn(
        x_ptr, w1_ptr, b1_ptr, w2_ptr, tokens_ptr, counts_ptr, out_ptr,
        N, d, h,
        ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
        BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """One program: BLOCK_N tokens of one expert through BLOCK_H of its neurons, both layers.

        The activations stay on chip. Neurons are independent, so an expert may be split over several programs: each
        adds its share of the output rows, in float32, and the order of these additions is the only thing undefined.
        """
        e = tl.program_id(0)
        count = tl.load(counts_ptr + e)
        first = tl.program_id(1) * BLOCK_N
        if first >= count:  # the grid is sized for N tokens an expert, because the host never learns the counts
            return
        i = first + tl.arange(0, BLOCK_N)
        n = tl.load(tokens_ptr + e.to(tl.int64) * N + i, mask=i < count, other=0).to(tl.int64)
        neuron = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
        row_mask, neuron_mask = (i < count)[:, None], (neuron < h)[:, None]
        row = e.to(tl.int64) * h + neuron  # of w1 and w2 seen as [E*h, d]; 64 bits: E*h*d may pass 2^31

        z = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
        for start in range(0, d, BLOCK_D):
            c = start + tl.arange(0, BLOCK_D)
            c_mask = (c < d)[None, :]
            x = tl.load(x_ptr + n[:, None] * d + c[None, :], mask=row_mask & c_mask, other=0.0)  # [BLOCK_N, BLOCK_D]
            w1 = tl.load(w1_ptr + row[:, None] * d + c[None, :], mask=neuron_mask & c_mask, other=0.0)  # [BLOCK_H, BLOCK_D]
            z = tl.dot(x, tl.trans(w1), z, input_precision=PRECISION)  # [BLOCK_N, BLOCK_H]
        z += tl.load(b1_ptr + row, mask=neuron < h, other=0.0).to(tl.float32)[None, :]

        if ACTIVATION == "relu":
            a = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        elif ACTIVATION == "gelu":
            a = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))  # 1/sqrt(2)
        else:  # gelu_tanh; (1 + tanh u) / 2 = sigmoid(2u)
            a = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))  # 2 sqrt(2/pi)
        a = a.to(w2_ptr.dtype.element_ty)

        for start in range(0, d, BLOCK_D):
            c = start + tl.arange(0, BLOCK_D)
            c_mask = (c < d)[None, :]
            w2 = tl.load(w2_ptr + row[:, None] * d + c[None, :], mask=neuron_mask & c_mask, other=0.0)  # [BLOCK_H, BLOCK_D]
            y = tl.dot(a, w2, input_precision=PRECISION)  # [BLOCK_N, BLOCK_D]
            tl.atomic_add(out_ptr + n[:, None] * d + c[None, :], y, mask=row_mask & c_mask, sem="relaxed")

    def _config(BLOCK_N, BLOCK_H, BLOCK_D, num_warps, num_stages):
        blocks = {"BLOCK_N": BLOCK_N, "BLOCK_H": BLOCK_H, "BLOCK_D": BLOCK_D}
        return triton.Config(blocks, num_warps=num_warps, num_stages=num_stages)

    # Three regimes, each with a short list to tune over. Decode is bound by memory: the fewest rows that tl.dot takes,
    # few neurons a program so that a handful of experts fill the GPU. Prefill is bound by arithmetic: large blocks, each
    # weight tile used by many tokens. IEEE float32 has no matrix units on NVIDIA: smaller blocks, or registers spill.
    DECODE_TOKENS = 16
    DECODE = [_config(16, 16, 128, 4, 3), _config(16, 16, 256, 4, 3), _config(16, 32, 128, 4, 3)]
    PREFILL = [_config(64, 64, 64, 4, 3), _config(64, 128, 64, 4, 3), _config(128, 128, 64, 8, 3)]
    PREFILL_FLOAT32 = [_config(64, 64, 32, 8, 2), _config(32, 64, 32, 4, 2), _config(64, 32, 32, 4, 2)]

    def _tuned(configs):
        if os.environ.get("TRITON_INTERPRET") == "1":  # the interpreter has no clock to tune by
            configs = configs[:1]
        # Tuned by the first call for these sizes, whatever its N is. Tuning runs the kernel many times on one output, so
        # that is set to zero before each run.
        return triton.autotune(configs, key=["d", "h"], reset_to_zero=["out_ptr"])(_fused_ffn)

    _decode_ffn, _prefill_ffn, _prefill_ffn_float32 = _tuned(DECODE), _tuned(PREFILL), _tuned(PREFILL_FLOAT32)

    def group_tokens(executed: Tensor) -> tuple[Tensor, Tensor]:
        """executed [N, E] bool -> tokens [E, N] int32, counts [E] int32; tokens[e, :counts[e]] ascend, the rest is unset.

        No sort, and no copy to the host: the counts stay on the GPU.
        """
        N, E = executed.shape
        tokens = torch.empty(E, N, dtype=torch.int32, device=executed.device)
        counts = torch.empty(E, dtype=torch.int32, device=executed.device)
        block = min(4096, max(16, triton.next_power_of_2(N)))
        _group_tokens[(E,)](executed.contiguous(), tokens, counts, N, E, BLOCK=block, num_warps=4)
        return tokens, counts

    # A custom operator is opaque to torch.compile: no graph break, and Triton's own launcher and tuner do the work.
    @torch.library.custom_op("d2dmoe::triton_ffn", mutates_args=())
    def triton_ffn(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, executed: Tensor, activation: str) -> Tensor:
        """The Triton path of `expert_ffn`; float32, bfloat16 or float16, accumulated in float32.

        No synchronization, so it can be captured in a CUDA graph (after one call outside, in which Triton tunes it).
        float32 is IEEE arithmetic unless torch's own setting allows TF32. Raises KeyError for an unknown activation.
        """
        ACTIVATIONS[activation]
        (N, d), (E, h, _) = x.shape, w1.shape
        out = torch.zeros(N, d, dtype=torch.float32, device=x.device)
        if N == 0:
            return out.to(x.dtype)
        prefill = _prefill_ffn_float32 if x.dtype == torch.float32 else _prefill_ffn
        kernel = _decode_ffn if N <= DECODE_TOKENS else prefill
        tf32 = x.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32"
        grid = lambda meta: (E, triton.cdiv(N, meta["BLOCK_N"]), triton.cdiv(h, meta["BLOCK_H"]))  # noqa: E731
        with torch.cuda.device_of(x):  # Triton launches on the current device
            tokens, counts = group_tokens(executed)
            kernel[grid](
                x.contiguous(), w1.contiguous(), b1.contiguous(), w2.contiguous(), tokens, counts, out, N, d, h,
                ACTIVATION=activation, PRECISION="tf32" if tf32 else "ieee",
            )  # fmt: skip
        return out.to(x.dtype)

    @triton_ffn.register_fake
    def _(x, w1, b1, w2, executed, activation):
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)


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


def relative_error(y: Tensor, layer: tuple[Tensor, ...], executed: Tensor, activation: str) -> float:
    """|| y - y64 || / || y64 ||, y64 the masked reference in float64"""
    y64 = masked_ffn(*(t.double() for t in layer), executed, activation)
    return ((y.double() - y64).norm() / y64.norm().clamp(min=1e-30)).item()


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def check(device: str) -> None:
    """Every path of this device against float64 on odd shapes; prints the largest errors, exits if one is too large."""
    paths = {"masked_ffn": masked_ffn, "dense_ffn": dense_ffn, "looped_ffn": looped_ffn, "grouped_ffn": grouped_ffn, "expert_ffn": expert_ffn}
    if device != "cpu":
        paths["triton_ffn"] = triton_ffn
    dtypes = TOLERANCE if device != "cpu" else [torch.float32]
    worst = {}
    for dtype in dtypes:
        for activation in ACTIVATIONS:
            for N, d, E, h in ((0, 64, 4, 16), (1, 64, 1, 48), (1, 768, 48, 64), (17, 100, 5, 24), (300, 256, 8, 100)):
                layer = random_layer(N, d, E, h, dtype, device)
                for share in (0.0, 0.3, 1.0):
                    executed = torch.rand(N, E, device=device) < share
                    for name, path in paths.items():
                        if name == "looped_ffn" and N != 1:
                            continue
                        selected = executed[0].nonzero().flatten().tolist() if name == "looped_ffn" else executed
                        error = relative_error(path(*layer, selected, activation), layer, executed, activation)
                        worst[name, dtype] = max(worst.get((name, dtype), 0.0), error)
    for (name, dtype), error in worst.items():
        print(f"check {name:11} {str(dtype).removeprefix('torch.'):9} largest relative error {error:.1e}")
        if not error <= TOLERANCE[dtype]:
            raise SystemExit(f"{name} is wrong in {dtype}: relative error {error:.1e} is above {TOLERANCE[dtype]:.0e}")


def median_times(runs: list[Callable], repeats: int, device: str) -> list[float]:
    """Median seconds of each of some callables. They take turns, so that a slow moment of the machine hits them all, and
    a turn is four calls of which the first is not timed: in a model too a layer follows another of its kind."""
    times = [[] for _ in runs]
    for turn in range(0, 4 * repeats, 4):
        for run, seconds in zip(runs, times, strict=True):
            for j in range(turn, turn + 4):
                if device == "cpu":
                    start = time.perf_counter()
                    run(j)
                    seconds.append(time.perf_counter() - start)
                else:
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    start.record()
                    run(j)
                    end.record()
                    end.synchronize()
                    seconds.append(start.elapsed_time(end) / 1e3)
    return [statistics.median(t for i, t in enumerate(seconds) if i % 4) for seconds in times]


def as_graph(call: Callable, sets: int) -> Callable:
    """On a GPU: all of a callable's sets captured in one CUDA graph, so that the time to launch is not what is measured."""
    for i in range(sets):  # compiles and tunes
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(sets):
            call(i)
    return lambda _: graph.replay()


def measured_ceilings(dtype: torch.dtype, device: str) -> tuple[float, float]:
    """Bytes a second of a copy (read + write) and FLOPs a second of a square matmul, on this GPU now"""
    source, a = torch.randn(1 << 28, device=device), torch.randn(8192, 8192, device=device).to(dtype)
    target = torch.empty_like(source)
    copy, matmul = median_times([lambda _: target.copy_(source), lambda _: a @ a], 5, device)
    return 2 * source.nbytes / copy, 2 * 8192**3 / matmul


def benchmark(device: str, dtype: torch.dtype, d: int, E: int, h: int, tokens: list[int], cache_bytes: float) -> None:
    """A table of this layer against the dense one: two F.linear and a ReLU, compiled on a GPU."""
    weight_bytes = 2 * E * h * d * torch.finfo(dtype).bits / 8
    sets = max(8, math.ceil(1.5 * cache_bytes / weight_bytes))  # rotated, so that no call finds its weights in a cache
    layers = [random_layer(1, d, E, h, dtype, device) for _ in range(sets)]
    dense_weights = [(w1.flatten(0, 1), b1.flatten(), w2.flatten(0, 1).t().contiguous()) for _, w1, b1, w2 in layers]

    def dense(x, w1, b1, w2):
        return F.linear(F.relu(F.linear(x, w1, b1), inplace=True), w2)

    on_gpu = device != "cpu"
    if on_gpu:
        bandwidth, rate = measured_ceilings(dtype, device)
        print(f"copy {bandwidth / 1e12:.2f} TB/s, {dtype} matmul {rate / 1e12:.0f} TFLOP/s")
        dense = torch.compile(dense)
    print(f"d {d}, d_ff {E * h}, {E} experts of {h}, {str(dtype).removeprefix('torch.')}, {sets} sets of weights")
    print("tokens executed   dense ms    ours ms  speed-up" + ("  roofline" if on_gpu else ""))
    for N in tokens:
        x = torch.randn(N, d, device=device).to(dtype)
        for share in (1.0, 0.5, 0.25, 0.1):
            masks = [random_mask(N, E, share, device) for _ in range(sets)]
            runs = [
                lambda i: dense(x, *dense_weights[i % sets]),
                # half a turn behind, or it would find the weights that the dense layer has just read
                lambda i: expert_ffn(x, *layers[(i + sets // 2) % sets][1:], masks[i % sets], "relu"),
            ]
            if on_gpu:
                runs = [as_graph(run, sets) for run in runs]
            t_dense, t_ours = (t / (sets if on_gpu else 1) for t in median_times(runs, 4 if N > 1000 else 25, device))
            line = f"{N:6d} {masks[0].float().mean().item():8.1%} {t_dense * 1e3:10.3f} {t_ours * 1e3:10.3f} {t_dense / t_ours:8.2f}x"
            if on_gpu:
                used = sum(m.any(0).float().mean().item() for m in masks) / sets
                pairs = sum(m.float().mean().item() for m in masks) / sets * N * E
                floor = max(used * weight_bytes / bandwidth, pairs * 4 * h * d / rate)
                line += f" {floor / t_ours:8.1%}"
            print(line, flush=True)


def cpu_cache_bytes() -> int:
    """Size of the last-level cache where Linux tells it, else 32 MiB; at most 512 MiB"""
    try:
        with open("/sys/devices/system/cpu/cpu0/cache/index3/size") as f:
            return min(int(f.read().strip().removesuffix("K")) << 10, 1 << 29)
    except (OSError, ValueError):
        return 1 << 25


def main() -> None:
    on_gpu = torch.cuda.is_available() and triton is not None
    parser = argparse.ArgumentParser(description="Check the expert execution and measure it against the dense layer.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if on_gpu else "cpu", help="(default: %(default)s)")
    device = parser.parse_args().device
    if device != "cpu" and not on_gpu:
        raise SystemExit(f"--device {device} needs a GPU that torch sees, and Triton")
    torch.manual_seed(0)
    with torch.inference_mode():
        check(device)
        if device == "cpu":
            print(f"{torch.get_num_threads()} threads")
            benchmark(device, torch.float32, d=768, E=48, h=64, tokens=[1, 4, 16, 128, 2048], cache_bytes=cpu_cache_bytes())
            return
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        print(torch.cuda.get_device_name(device))
        benchmark(device, torch.bfloat16, d=4096, E=128, h=128, tokens=[1, 16], cache_bytes=cache)
        benchmark(device, torch.bfloat16, d=768, E=24, h=128, tokens=[16384], cache_bytes=cache)
        benchmark(device, torch.float32, d=768, E=24, h=128, tokens=[16384], cache_bytes=cache)


if __name__ == "__main__":
    main()
