"""Tests, in the order of the files: kernels, d2dmoe, train, convert, sample, then all of it under failure. `pytest -q`

They need no GPU, no network and no files but these: Triton's kernels run in its interpreter and are compiled ahead of time.
D2DMOE_LONG=1 makes the kill and fuzz sweeps ten times longer.
"""

import contextlib
import csv
import dataclasses
import io
import itertools
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels then run on the CPU

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F

import convert
import d2dmoe
import kernels
import sample
import train
from d2dmoe import GPT, DynamicKMoE, Gate, GPTConfig, Router, dynamic_k, top_k

HERE = Path(__file__).resolve().parent
PYTHONPATH = os.pathsep.join([str(HERE), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).rstrip(os.pathsep)
LONG = 10 if os.environ.get("D2DMOE_LONG") == "1" else 1
needs_triton = pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def signal_handlers_stay():
    """train.main takes over SIGINT and SIGTERM, and a test that ends it early must not leave pytest without them."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for s, handler in handlers.items():
        signal.signal(s, handler)


# ---------------------------------------------------------------------------------------------------------------------
# kernels.py


def loops(x, w1, b1, w2, executed, activation):
    """The definition, written as loops over tokens and experts, in float64."""
    act = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}[activation]
    y = torch.zeros(x.shape, dtype=torch.float64)
    for n, e in itertools.product(range(len(x)), range(len(w1))):
        if executed[n, e]:
            y[n] += act(w1[e].double() @ x[n].double() + b1[e].double()) @ w2[e].double()
    return y


def assert_close(y, expected, tolerance):
    assert y.shape == expected.shape and torch.isfinite(y).all()
    assert (y.double() - expected).norm() <= tolerance * expected.norm() + 1e-30


ODD_SHAPES = [(0, 16, 3, 8), (1, 33, 1, 5), (1, 40, 7, 24), (2, 64, 4, 64), (17, 40, 3, 24), (17, 24, 1, 48), (40, 20, 5, 3)]  # N d E h
MASKS = {
    "none": lambda N, E: torch.zeros(N, E, dtype=torch.bool),
    "all": lambda N, E: torch.ones(N, E, dtype=torch.bool),
    "some": lambda N, E: torch.rand(N, E) < 0.4,
    "one expert": lambda N, E: F.one_hot(torch.full((N,), E - 1), E).bool(),
    "one unused": lambda N, E: torch.ones(N, E, dtype=torch.bool) & (torch.arange(E) != E // 2),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_every_path_equals_the_definition(shape, mask):
    torch.manual_seed(0)
    N, d, E, h = shape
    executed = MASKS[mask](N, E)
    for activation in kernels.ACTIVATIONS:
        layer = kernels.random_layer(N, d, E, h, torch.float32, "cpu")
        expected = loops(*layer, executed, activation)
        paths = [kernels.expert_ffn, kernels.masked_ffn, kernels.dense_ffn, kernels.grouped_ffn]
        if kernels.triton is not None:
            paths.append(kernels.triton_ffn)
        for path in paths:
            assert_close(path(*layer, executed, activation), expected, 1e-5)
        if executed.all():
            assert_close(kernels.expert_ffn(*layer, None, activation), expected, 1e-5)
            assert_close(kernels.masked_ffn(*layer, None, activation), expected, 1e-5)
        if N == 1:
            experts = executed[0].nonzero().flatten().tolist()
            assert_close(kernels.looped_ffn(*layer, experts, activation), expected, 1e-5)


def test_the_cpu_takes_each_path_where_it_pays(monkeypatch):
    big = dict(h=64, d=768)
    mask = partial(kernels.random_mask, device="cpu")
    assert kernels.looping_pays(5, E=48, **big) and not kernels.looping_pays(48, E=48, **big)
    assert kernels.grouping_pays(mask(2048, 48, 0.1), **big) and not kernels.grouping_pays(mask(2048, 48, 0.9), **big)
    assert not kernels.grouping_pays(mask(2048, 32, 0.1), h=4, d=16)  # a call costs more than a tiny expert saves
    torch.manual_seed(0)
    taken = []
    for name in ("masked_ffn", "dense_ffn", "looped_ffn", "grouped_ffn"):
        path = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, path=path, name=name: taken.append(name) or path(*a))
    for N, (d, h), share in ((1, (256, 64), 0.1), (300, (256, 64), 0.1), (300, (16, 4), 0.1), (1, (256, 64), 1.0), (300, (256, 64), 1.0)):
        layer = kernels.random_layer(N, d, 16, h, torch.float32, "cpu")
        executed = mask(N, 16, share)
        assert_close(kernels.expert_ffn(*layer, executed, "gelu"), loops(*layer, executed, "gelu"), 1e-5)
    assert taken == ["looped_ffn", "grouped_ffn", "dense_ffn", "dense_ffn", "dense_ffn"]


def test_gradients_reach_inputs_and_weights():
    torch.manual_seed(0)
    layer = [t.double().requires_grad_() for t in kernels.random_layer(5, 6, 3, 4, torch.float32, "cpu")]
    executed = torch.rand(5, 3) < 0.5
    for activation in kernels.ACTIVATIONS:
        assert torch.autograd.gradcheck(lambda *t: kernels.expert_ffn(*t, executed, activation), layer)


def test_unknown_activation_is_an_error():
    layer = kernels.random_layer(2, 8, 2, 4, torch.float32, "cpu")
    with pytest.raises(KeyError):
        kernels.expert_ffn(*layer, torch.ones(2, 2, dtype=torch.bool), "swish")


@pytest.fixture
def bfloat16_interpreter(monkeypatch):
    """Triton's interpreter keeps bfloat16 as its bits and multiplies those; widen both sides first, as hardware does."""
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *rest):
        widen = lambda t: self.create_fp_ext(t, kernels.tl.float32) if t.dtype.scalar == kernels.tl.bfloat16 else t
        return plain(self, widen(a), widen(b), d, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@needs_triton
def test_triton_random_sweep(bfloat16_interpreter):
    draw = random.Random(0)
    torch.manual_seed(0)
    for trial in range(40):
        N, d, E, h = draw.choice([1, 2, 5, 16, 17, 63, 70]), draw.randint(1, 150), draw.randint(1, 6), draw.randint(1, 70)
        dtype = draw.choice([torch.float32, torch.bfloat16, torch.float16])
        activation = draw.choice(list(kernels.ACTIVATIONS))
        layer = kernels.random_layer(N, d, E, h, dtype, "cpu")
        executed = torch.rand(N, E) < draw.random()
        y = kernels.triton_ffn(*layer, executed, activation)
        assert y.dtype == dtype
        assert_close(y, kernels.masked_ffn(*(t.double() for t in layer), executed, activation), kernels.TOLERANCE[dtype])


@needs_triton
@pytest.mark.parametrize("N", [1, 15, 16, 17, 300, 5000])
def test_group_tokens_lists_each_experts_tokens_in_order(N):
    torch.manual_seed(N)
    executed = torch.rand(N, 5) < torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
    tokens, counts = kernels.group_tokens(executed)
    for e in range(5):
        assert tokens[e, : counts[e]].tolist() == executed[:, e].nonzero().flatten().tolist()


@needs_triton
def test_triton_works_under_torch_compile_without_a_graph_break():
    layer = kernels.random_layer(3, 16, 4, 8, torch.float32, "cpu")
    executed = torch.rand(3, 4) < 0.5
    model = lambda x: kernels.triton_ffn(x.relu(), *layer[1:], executed, "relu") + 1
    assert torch.allclose(torch.compile(model, fullgraph=True, backend="aot_eager")(layer[0]), model(layer[0]))
    torch.library.opcheck(kernels.triton_ffn, (*layer, executed, "relu"))


def compile_ahead_of_time(arch):
    """Compiles both kernels for a GPU that need not be there; asserts what the machine code must show."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)

    def build(kernel, arguments, constants, aligned, **options):
        signature = arguments | dict.fromkeys(constants, "constexpr")
        attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(arguments) if name in aligned}
        return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)

    build(kernels._group_tokens, {"executed_ptr": "*i1", "tokens_ptr": "*i32", "counts_ptr": "*i32", "N": "i32", "E": "i32"}, {"BLOCK": 4096}, ())
    for dtype, activation in itertools.product(("fp32", "bf16", "fp16"), kernels.ACTIVATIONS):
        prefill = kernels.PREFILL_FLOAT32[0] if dtype == "fp32" else kernels.PREFILL[1]
        for config in [prefill] + [kernels.DECODE[0]] * (activation == "relu"):
            arguments = dict.fromkeys(("x_ptr", "w1_ptr", "b1_ptr", "w2_ptr"), f"*{dtype}")
            arguments |= {"tokens_ptr": "*i32", "counts_ptr": "*i32", "out_ptr": "*fp32", "N": "i32", "d": "i32", "h": "i32"}
            constants = {"ACTIVATION": activation, "PRECISION": "ieee"} | config.kwargs
            built = build(
                kernels._fused_ffn, arguments, constants, set(arguments) - {"N"},
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
            if "amdgcn" in built.asm:
                spilled = int(re.search(r"ScratchSize: (\d+)", built.asm["amdgcn"])[1])
                assert built.metadata.shared <= 64 << 10, "more than a workgroup's LDS"
            else:
                cubin = Path(os.environ["TRITON_CACHE_DIR"], "kernel.cubin")
                cubin.write_bytes(built.asm["cubin"])
                tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
                report = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
                spilled = int(re.search(r"STACK:(\d+)", report)[1])
                if dtype != "fp32":
                    assert any(unit in built.asm["ptx"] for unit in ("wgmma", "mma.sync", "tcgen05.mma")), "no matrix units"
            assert spilled <= 64, f"{arch} {dtype} {activation} {config}: {spilled} bytes of a thread's registers spilled"


@needs_triton
@pytest.mark.parametrize("arch", [80, 90, 100, "gfx942"])
def test_both_kernels_compile_ahead_of_time(arch, tmp_path):
    # In a process of its own: here the kernels belong to the interpreter.
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": PYTHONPATH, "TRITON_INTERPRET": "0"}
    script = f"import test_d2dmoe; test_d2dmoe.compile_ahead_of_time({arch!r})"
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def test_the_benchmark_checks_first_and_then_measures(capsys, monkeypatch):
    run = partial(kernels.benchmark, d=32, E=4, h=8, tokens=[1, 17], cache_bytes=2**16)
    monkeypatch.setattr(kernels, "benchmark", lambda device, dtype, **sizes: run(device, dtype))  # the shapes of a second
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--device", "cpu"])
    kernels.main()
    out = capsys.readouterr().out
    assert {line.split()[1] for line in out.splitlines() if line.startswith("check")} == {"masked_ffn", "dense_ffn", "looped_ffn", "grouped_ffn", "expert_ffn"}
    rows = re.findall(r"^ +(\d+) +([\d.]+)% +([\d.]+) +([\d.]+) +[\d.]+x$", out, flags=re.M)
    assert [(n, share) for n, share, _, _ in rows] == [(n, share) for n in ("1", "17") for share in ("100.0", "50.0", "25.0", "25.0")]
    monkeypatch.setattr(kernels, "looped_ffn", lambda x, *_: torch.ones_like(x))
    with pytest.raises(SystemExit, match="_ffn is wrong in torch.float32"):
        kernels.main()
    if not torch.cuda.is_available():
        monkeypatch.setattr(sys, "argv", ["kernels.py", "--device", "cuda"])
        with pytest.raises(SystemExit, match="needs a GPU that torch sees"):
            kernels.main()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernels_on_this_gpu():
    """float64 reference, no synchronization, and a CUDA graph that replays on other masks; in a process of its own too"""
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "TRITON_INTERPRET": "0"}
    script = """
import torch, kernels as k
k.check("cuda")
layer = k.random_layer(300, 256, 8, 64, torch.bfloat16, "cuda")
mask = k.random_mask(300, 8, 0.5, "cuda")
k.triton_ffn(*layer, mask, "relu")
torch.cuda.synchronize()
torch.cuda.set_sync_debug_mode("error")
k.triton_ffn(*layer, mask, "relu")
torch.cuda.set_sync_debug_mode("default")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y = k.triton_ffn(*layer, mask, "relu")
for share in (0.1, 0.9):
    mask.copy_(k.random_mask(300, 8, share, "cuda"))
    graph.replay()
    assert k.relative_error(y, layer, mask, "relu") < 1e-2
"""
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


# ---------------------------------------------------------------------------------------------------------------------
# d2dmoe.py


def tiny_config(**changes):
    return GPTConfig(**{"block_size": 16, "vocab_size": 257, "n_layer": 2, "n_head": 2, "n_embd": 16} | changes)


def tiny_dense(seed=0, scale=6.0, **changes):
    """A random model whose weights are large enough for its layers to matter"""
    torch.manual_seed(seed)
    model = GPT(tiny_config(**changes))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(scale) if p.dim() > 1 else p.add_(0.1 * torch.randn_like(p))
    return model


def tiny_moe(dense, attention=False, target="norm", num_experts=8, seed=0):
    """The dense model split, with routers as they are drawn; with attention, stand-ins that nobody trained"""
    torch.manual_seed(seed)
    config = dataclasses.replace(
        dense.config, num_experts=num_experts, router_width=4, router_target=target,
        attention_experts=4 if attention else 0, attention_router_width=3 if attention else 0,
    )  # fmt: skip
    moe, d = GPT(config), config.n_embd
    students = None
    if attention:
        students = [{n: d2dmoe.MLP(d, config.projection_width, "relu", "hoyer") for n in convert.PROJECTIONS} for _ in dense.transformer.h]
    convert.split_model(dense, moe, students, None, seed=0)
    return moe.eval(), students


def penalty_of(z, activation, penalty):
    return d2dmoe.sparsity_penalty(z, kernels.ACTIVATIONS[activation](z), activation, penalty)


def test_square_hoyer_and_l1_by_hand():
    a = torch.tensor([[3.0, 0.0, 4.0], [2.0, 2.0, 2.0], [0.0, 5.0, 0.0], [0.0, 0.0, 0.0]])
    assert torch.allclose(d2dmoe.square_hoyer(a), torch.tensor([49 / 25, 3.0, 1.0, 0.0]), atol=1e-5)
    z = torch.tensor([[-1.0, 3.0, 4.0], [2.0, -7.0, 0.0]])
    assert torch.isclose(penalty_of(z, "relu", "hoyer"), torch.tensor((49 / 25 + 1) / 2))
    assert torch.isclose(penalty_of(z, "relu", "l1"), torch.tensor((7 + 2) / 2))
    assert penalty_of(z, "relu", "none") == 0


def test_the_displaced_penalty_of_a_gelu():
    s = d2dmoe.DISPLACEMENT
    z = torch.tensor([[s - 5, s + 3.0, 1.0]])
    b = [0.0, 3.0, 1.0 - s]
    assert s < 0
    for activation in ("gelu", "gelu_tanh"):
        assert math.isclose(penalty_of(z, activation, "l1"), sum(b), rel_tol=1e-6)
        assert math.isclose(penalty_of(z, activation, "hoyer"), sum(b) ** 2 / sum(v * v for v in b), rel_tol=1e-5)
    z.requires_grad_()
    penalty_of(z, "gelu", "l1").backward()
    assert z.grad.tolist() == [[0.0, 1.0, 1.0]]  # nothing pushes a pre-activation below s


def test_penalty_gradients_are_finite_where_nothing_fires():
    z = torch.full((3, 8), -1.0, requires_grad=True)
    penalty_of(z, "relu", "hoyer").backward()
    assert torch.isfinite(z.grad).all()


def test_dynamic_k_is_the_papers_rule():
    torch.manual_seed(0)
    norms = torch.rand(50, 9)
    for tau in (0.0, 0.1, 0.5, 0.9, 1.0):
        executed = dynamic_k(norms, tau)
        for r, row in zip(norms.tolist(), executed.tolist(), strict=True):
            limit = (1 - tau) * max(r)
            assert all(ran == (value >= limit) for value, ran in zip(r, row, strict=True) if abs(value - limit) > 1e-6)
        assert executed.any(-1).all()
    assert dynamic_k(norms, 1.0).all() and (dynamic_k(norms, 0.0).sum(-1) == 1).all()
    assert dynamic_k(torch.zeros(2, 3), 0.0).any(-1).all()  # a router that predicts nothing still runs an expert
    for tau in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="tau must be between 0 and 1"):
            dynamic_k(norms, tau)


def test_top_k_takes_the_k_largest():
    norms = torch.tensor([[0.1, 0.5, 0.3], [0.9, 0.2, 0.4]])
    assert top_k(norms, 2).tolist() == [[False, True, True], [True, False, True]]
    assert (top_k(torch.zeros(4, 6), 3).sum(-1) == 3).all()  # ties too
    for k in (0, 4):
        with pytest.raises(ValueError, match="k must be between"):
            top_k(norms, k)


def test_expert_norms_are_the_norms_of_the_experts_outputs():
    torch.manual_seed(0)
    a, w2 = torch.rand(7, 3, 4), torch.randn(3, 4, 10)
    expected = torch.stack([torch.stack([(a[n, e] @ w2[e]).norm() for e in range(3)]) for n in range(7)])
    assert torch.allclose(d2dmoe.expert_norms(a, w2), expected, atol=1e-5)


def test_router_is_two_layers_without_bias():
    torch.manual_seed(0)
    x = torch.randn(5, 6)
    for target, inner, outer in (
        ("norm", torch.relu, torch.abs), ("sqrt", torch.relu, torch.square), ("share", torch.tanh, torch.sigmoid),
    ):  # fmt: skip
        router = Router(6, 4, 3, target)
        assert [tuple(p.shape) for p in router.parameters()] == [(4, 6), (3, 4)]
        assert torch.allclose(router(x), outer(inner(x @ router.fc1.weight.t()) @ router.fc2.weight.t()), atol=1e-6)
        assert (router(x) >= 0).all()


def test_a_moe_layer_sums_what_its_gate_selects():
    torch.manual_seed(0)
    moe = DynamicKMoE(10, 24, 6, "relu", 5, "norm")
    for p in moe.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(2, 3, 10)
    for gate in (Gate(), Gate(dynamic_k, 0.5), Gate(top_k, 2), Gate(dynamic_k, 0.5, oracle=True)):
        y, executed = moe(x, gate)
        assert executed.shape == (2, 3, 6)
        flat = x.reshape(6, 10)
        norms = d2dmoe.expert_norms(moe.activations(flat), moe.w2) if gate.oracle else moe.router(flat)
        assert torch.equal(executed.reshape(6, 6), gate.rule(norms, gate.value))
        expected = loops(flat, moe.w1, moe.b1, moe.w2, executed.reshape(6, 6), "relu") + moe.b2.double()
        assert_close(y.reshape(6, 10), expected, 1e-5)


def test_parameter_names_are_nanogpts():
    names = set(GPT(tiny_config(n_layer=1)).state_dict())
    block = [f"{m}.{p}" for m in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj") for p in ("weight", "bias")]
    assert names == {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias",
                     "lm_head.weight", *(f"transformer.h.0.{b}" for b in block)}  # fmt: skip


def test_no_token_sees_a_later_one():
    dense = tiny_dense()
    for model in (dense, tiny_moe(dense)[0], tiny_moe(dense, attention=True)[0]):
        idx = torch.randint(257, (2, 16))
        changed = idx.clone()
        changed[:, 9:] = (changed[:, 9:] + 1) % 257
        gate = Gate(dynamic_k, 0.7)
        assert torch.allclose(model(idx, gate)[0][:, :9], model(changed, gate)[0][:, :9], atol=1e-5)
        assert not torch.allclose(model(idx, gate)[0][:, 9:], model(changed, gate)[0][:, 9:], atol=1e-3)


def test_a_context_that_is_too_long_is_an_error():
    with pytest.raises(ValueError, match="17 tokens do not fit into a context of 16"):
        tiny_dense()(torch.zeros(1, 17, dtype=torch.long))


@pytest.mark.parametrize("changes, message", [
    (dict(n_embd=15), "must be a multiple of n_head"), (dict(n_layer=0), "positive integers"), (dict(num_experts=7, router_width=4), "do not divide"),
    (dict(activation="swish"), "activation must be one of"), (dict(penalty="l2"), "penalty must be"), (dict(num_experts=8), "positive width"),
    (dict(router_target="cube"), "router_target must be"), (dict(attention_experts=5, attention_router_width=2), "do not divide"),
])  # fmt: skip
def test_a_config_that_cannot_be_built_says_so(changes, message):
    with pytest.raises(ValueError, match=message):
        GPT(tiny_config(**changes))


@pytest.mark.parametrize("kind", ["dense", "experts", "attention"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cached_generation_gives_the_tokens_of_full_recomputation(kind, temperature):
    dense = tiny_dense()
    model = dense if kind == "dense" else tiny_moe(dense, attention=kind == "attention")[0]
    gate = Gate(dynamic_k, 0.6)
    prompt = torch.randint(257, (2, 5))

    def text(use_cache):
        generator = torch.Generator().manual_seed(3)
        out = list(d2dmoe.generate(model, prompt, 40, gate, temperature, 20, generator, use_cache))  # context 16
        return torch.cat([token for token, _ in out], dim=1), [m for _, m in out]

    tokens, measured = text(True)
    recomputed, measured_again = text(False)
    assert tokens.shape == (2, 40) and torch.equal(tokens, recomputed)
    for a, b in zip(measured, measured_again, strict=True):
        assert all(torch.equal(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in x)

    # and of a loop that knows neither generate nor the cache
    generator, idx = torch.Generator().manual_seed(3), prompt
    for _ in range(40):
        logits = model(idx[:, -16:], gate)[0][:, -1]
        if temperature == 0:
            new = logits.argmax(-1, keepdim=True)
        else:
            kept = torch.where(logits >= logits.topk(20).values[:, -1:], logits, -math.inf)
            new = torch.multinomial(kept.softmax(-1), 1, generator=generator)
        idx = torch.cat((idx, new), dim=1)
    assert torch.equal(idx[:, 5:], tokens)


def test_every_layer_is_gated_by_its_own_router_and_attention_is_composed_of_its_projections():
    dense = tiny_dense()
    moe, students = tiny_moe(dense, attention=True)
    idx = torch.randint(257, (2, 16))
    _, measured, inputs = moe.hidden(idx, Gate(dynamic_k, 0.6))
    for block, m, read in zip(moe.transformer.h, measured, inputs, strict=True):
        assert set(m) == {"q", "k", "v", "o", "mlp"}
        for name, source in (("q", "qkv"), ("k", "qkv"), ("v", "qkv"), ("o", "o"), ("mlp", "mlp")):
            layer = block.mlp if name == "mlp" else getattr(block.attn, name)
            r = (torch.relu(read[source] @ layer.router.fc1.weight.t()) @ layer.router.fc2.weight.t()).abs()
            assert torch.equal(m[name], r >= 0.4 * r.amax(-1, keepdim=True)) and not m[name].all()

    x, _, inputs = moe.hidden(idx)  # all experts: the students, around an attention written by hand
    for i, block in enumerate(moe.transformer.h):
        heads = lambda t: t.view(2, 16, 2, 8).transpose(1, 2)  # noqa: E731  [B, nh, T, hs]
        q, k, v = (heads(students[i][name](inputs[i]["qkv"])[0]) for name in "qkv")
        scores = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(~torch.ones(16, 16, dtype=torch.bool).tril(), -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 16, 16)
        assert torch.allclose(inputs[i]["o"], mixed, atol=1e-4)
        before = inputs[i]["qkv"]  # ln_1 of the residual stream, which itself is known at the first block
        if i == 0:
            stream = moe.transformer.wte(idx) + moe.transformer.wpe(torch.arange(16))
        assert torch.allclose(before, block.ln_1(stream), atol=1e-4)
        stream = stream + students[i]["o"](mixed)[0]
        assert torch.allclose(inputs[i]["mlp"], block.ln_2(stream), atol=1e-4)
        stream = stream + dense.transformer.h[i].mlp(block.ln_2(stream))[0]
    assert torch.allclose(x, moe.transformer.ln_f(stream), atol=1e-4)


def test_a_cache_can_be_filled_in_pieces():
    model = tiny_dense()
    idx = torch.randint(257, (2, 12))
    cache = d2dmoe.KVCache(model.config, 2, idx.device, torch.float32)
    pieces = [model.hidden(part, cache=cache)[0] for part in idx.split([4, 1, 7], dim=1)]
    assert torch.allclose(torch.cat(pieces, dim=1), model.hidden(idx)[0], atol=1e-5)


def test_flops_by_hand():
    c = tiny_config(n_layer=1, num_experts=8, router_width=4)  # d 16, d_ff 64, h 8
    dense = 2 * (4 * 16 * 16 + 2 * 10 * 16 + 2 * 16 * 64 + 16 * 257)
    assert d2dmoe.flops_per_token(c, 10) == dense
    experts = 2 * (4 * 16 * 16 + 2 * 10 * 16 + 3 * 2 * 16 * 8 + (16 * 4 + 4 * 8) + 16 * 257)
    assert d2dmoe.flops_per_token(c, 10, [{"mlp": 3}]) == experts
    c = dataclasses.replace(c, attention_experts=4, attention_router_width=2)  # m 8, 2 neurons an expert
    assert c.projection_width == 8
    projection = 1.5 * 2 * 16 * 2 + (16 * 2 + 2 * 4)
    every = 2 * (4 * projection + 2 * 10 * 16 + 3 * 2 * 16 * 8 + (16 * 4 + 4 * 8) + 16 * 257)
    assert d2dmoe.flops_per_token(c, 10, [{"mlp": 3} | dict.fromkeys("qkvo", 1.5)]) == every


@pytest.mark.parametrize("d, m", [(128, 64), (256, 128), (768, 384), (1024, 512), (1280, 640), (1600, 800)])
def test_projection_width_costs_what_the_projection_costs(d, m):
    assert GPTConfig(n_embd=d).projection_width == m
    assert abs((2 * d * m + m + d) / (d * d + d) - 1) < 0.01  # parameters of d -> m -> d against d -> d


def plain_gpt2(weights, idx, n_head):
    """GPT-2 as its paper and its published weights define it, in float64: layers are x @ W + b with W [in, out]."""
    w = {name: t.double() for name, t in weights.items()}
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], 1e-5)
    linear = lambda x, name: x @ w[name + ".weight"] + w[name + ".bias"]
    T, d = idx.shape[1], w["wte.weight"].shape[1]
    x = w["wte.weight"][idx] + w["wpe.weight"][:T]
    for i in range(sum(name.endswith("ln_1.weight") for name in w)):
        q, k, v = (t.unflatten(-1, (n_head, -1)).transpose(1, 2) for t in linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").chunk(3, -1))
        scores = (q @ k.transpose(-1, -2) / math.sqrt(d // n_head)).masked_fill(~torch.ones(T, T).tril().bool(), -math.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"h.{i}.attn.c_proj")
        z = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        x = x + linear(0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))), f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].t()


def random_gpt2(d, n_layer, prefix="", vocab=1000, block_size=64):
    """A state dict as Hugging Face stores GPT-2, with its mask buffers, and random weights"""
    g = torch.Generator().manual_seed(d)
    normal = lambda *shape: torch.randn(*shape, generator=g) * 0.05
    sd = {"wte.weight": normal(vocab, d), "wpe.weight": normal(block_size, d)}
    for i in range(n_layer):
        for name, shape in (("attn.c_attn", (d, 3 * d)), ("attn.c_proj", (d, d)), ("mlp.c_fc", (d, 4 * d)), ("mlp.c_proj", (4 * d, d))):
            sd[f"h.{i}.{name}.weight"], sd[f"h.{i}.{name}.bias"] = normal(*shape), normal(shape[1])
        for name in ("ln_1", "ln_2"):
            sd[f"h.{i}.{name}.weight"], sd[f"h.{i}.{name}.bias"] = 1 + normal(d), normal(d)
        sd[f"h.{i}.attn.bias"] = torch.ones(1, 1, block_size, block_size).tril()
        sd[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    sd["ln_f.weight"], sd["ln_f.bias"] = 1 + normal(d), normal(d)
    return {prefix + name: t for name, t in sd.items()}


@pytest.mark.parametrize("d", [768, 1024, 1280, 1600])
def test_gpt2_weights_give_gpt2s_logits(d, tmp_path):
    weights = random_gpt2(d, n_layer=2)
    stored = {f"transformer.{k}": t for k, t in weights.items()} | {"lm_head.weight": weights["wte.weight"]} if d == 1024 else weights
    torch.save(stored, tmp_path / "pytorch_model.bin")
    source = (tmp_path / "pytorch_model.bin").as_uri() if d == 768 else str(tmp_path / "pytorch_model.bin")
    model, _ = train.load_initial(source)
    assert (model.config.n_head, model.config.n_layer, model.config.activation) == (d // 64, 2, "gelu_tanh")
    idx = torch.randint(1000, (2, 33))
    assert (model(idx)[0].double() - plain_gpt2(weights, idx, d // 64)).abs().max() < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# train.py


def test_the_byte_tokenizer_is_bytes():
    tokenizer = train.load_tokenizer("bytes")
    text = "h\u00e9llo\r\n\0 \U0001f600"
    assert tokenizer.encode_ordinary(text) == list(text.encode()) and tokenizer.decode(list(text.encode())) == text
    assert (tokenizer.eot_token, tokenizer.n_vocab) == (256, 257)


def pair_tokenizer():
    """GPT-2's pattern with a few merges, so that where text is cut matters"""
    ranks = {bytes([i]): i for i in range(256)}
    for pair in (b"\n\n", b"  ", b" t", b"he", b" the", b"\r\n", b"\n ", b"tt"):
        ranks[pair] = len(ranks)
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    return tiktoken.Encoding("pairs", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)})


def test_reading_in_pieces_does_not_change_the_tokens(tmp_path):
    draw = random.Random(0)
    tokenizer = pair_tokenizer()
    for trial in range(30):
        text = "".join(draw.choice(["the", " ", "  ", "\n", "\n\n", "\r\n", "hette", "1", "\u00e9", ". ", "!\x1c"]) for _ in range(400))
        (tmp_path / "t.txt").write_bytes(text.encode())
        pieces = list(train.read_chunks(tmp_path / "t.txt", size=draw.randint(1, 60)))
        assert "".join(pieces) == text
        assert sum((tokenizer.encode_ordinary(p) for p in pieces), []) == tokenizer.encode_ordinary(text)
    (tmp_path / "t.txt").write_text("x" * 5000)  # nowhere to cut, and still not in memory whole
    pieces = list(train.read_chunks(tmp_path / "t.txt", size=10))
    assert "".join(pieces) == "x" * 5000 and max(map(len, pieces)) < 200
    with pytest.raises(SystemExit, match="cannot read .*nowhere.txt: No such file"):
        list(train.read_chunks(tmp_path / "nowhere.txt"))


def write_text(path, words=6000, seed=0):
    draw = random.Random(seed)
    path.write_text(" ".join(draw.choice(["to", "be", "or", "not", "that", "is", "the", "question", "\n"]) for _ in range(words)))
    return path


def test_every_tenth_file_is_held_out(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(21):
        (folder / f"{i:02d}.txt").write_text(chr(ord("a") + i) * 50)
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0")
    (folder / "missing.txt").symlink_to(tmp_path / "nowhere")
    (folder / "loop").symlink_to(folder)
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe.txt")  # nobody writes to it: reading would wait for ever
    tokens = train.load_corpus(str(folder), "bytes", tmp_path / "out", 16)
    assert [len(t) for t in tokens] == [19 * 51, 2 * 51]  # each with its <|endoftext|>
    assert set(tokens[1].tolist()) == {ord("a") + 9, ord("a") + 19, 256}
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    train.load_corpus(str(folder), "bytes", tmp_path / "out", 16)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before  # kept, not encoded again
    (folder / "00.txt").write_text("changed")
    assert len(train.load_corpus(str(folder), "bytes", tmp_path / "out", 16)[0]) == 19 * 51 - 43


def test_a_single_file_gives_its_last_tenth_and_nanogpts_bins_are_taken_as_they_are(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(range(100)) * 10)
    parts = train.load_corpus(str(path), "bytes", tmp_path / "out", 16)
    assert [len(p) for p in parts] == [901, 100]
    assert np.concatenate(parts)[:1000].tolist() == [*range(100)] * 10
    for name in ("train.bin", "val.bin"):
        np.arange(500, dtype=np.uint16).tofile(tmp_path / name)
    parts = train.load_corpus(str(tmp_path), "gpt2", tmp_path / "out", 16)
    assert [p.tolist() for p in parts] == [[*range(500)]] * 2


def test_the_default_corpus_is_the_standard_library():
    files = train.text_files("stdlib")
    assert len(files) > 300 and files == sorted(files)
    assert {"argparse.py", "ast.py"} <= {f.name for f in files}
    assert not {"site-packages", "test", "tests", "idlelib", "lib2to3"} & {part for f in files for part in f.relative_to(os.path.dirname(os.__file__)).parts}


TEXTS = {
    "empty": b"", "one byte": b"x", "not UTF-8": bytes(range(128, 256)) * 30, "NUL bytes": b"a\0b" * 900,
    "CRLF": b"one\r\ntwo\r\n" * 300, "one long line": b"abc" * 200_000 * LONG,
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_any_file_is_text_or_one_clear_line(name, tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(TEXTS[name])
    if len(TEXTS[name]) < 100:
        with pytest.raises(SystemExit, match="tokens are too few for a context of 16"):
            train.load_corpus(str(path), "bytes", tmp_path, 16)
    else:
        parts = train.load_corpus(str(path), "bytes", tmp_path, 16)
        expected = TEXTS[name].decode(errors="replace").encode()
        assert np.concatenate(parts)[:-1].astype(np.uint8).tobytes() == expected


def test_batches_depend_on_seed_and_step_alone():
    draws = [train.draw_offsets(1000, 12, 16, seed, step).tolist() for seed in (0, 1) for step in (0, 1)]
    assert len({tuple(d) for d in draws}) == 4 and draws[0] == train.draw_offsets(1000, 12, 16, 0, 0).tolist()
    assert all(0 <= o <= 1000 - 17 for d in draws for o in d)
    tokens = np.arange(1000, dtype=np.uint16)
    x, y = train.take_windows(tokens, torch.tensor([3, 983]), 16, 1000, torch.device("cpu"))
    assert torch.equal(x[0], torch.arange(3, 19)) and torch.equal(y, x + 1) and y[1, -1] == 999
    with pytest.raises(SystemExit, match="token 999 lies outside the model's vocabulary of 257"):
        train.take_windows(tokens, torch.tensor([983]), 16, 257, torch.device("cpu"))


def test_schedules():
    rates = [train.learning_rate(s, 100, 1.0, 10) for s in range(101)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0 and math.isclose(rates[100], 0.1) and rates[55] == pytest.approx(0.55)
    weights = [train.penalty_weight(s, 100, 2.0) for s in (0, 25, 50, 99)]
    assert weights == [0.0, 1.0, 2.0, 2.0]


def test_evaluation_is_the_mean_loss_and_counts_experts():
    moe, _ = tiny_moe(tiny_dense())
    tokens = np.random.default_rng(0).integers(0, 257, 200).astype(np.uint16)
    loss, counts = train.evaluate(moe, tokens, windows=7, batch_size=3, gate=Gate(top_k, 3))
    losses = []
    for o in torch.linspace(0, 200 - 17, 7, dtype=torch.float64).long().tolist():
        window = torch.from_numpy(tokens[o : o + 17].astype(np.int64))
        losses.append(F.cross_entropy(moe(window[None, :-1], Gate(top_k, 3))[0][0], window[1:]))
    assert loss == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)
    assert [c["mlp"].tolist() for c in counts] == [[3] * 7 * 16] * 2


TINY = "--n_layer 2 --n_head 2 --n_embd 16 --block_size 16 --batch_size 4 --eval_every 10 --eval_windows 8 --warmup 2 --device cpu".split()
CONVERT = "--num_experts 8 --router_width 4 --steps 20 --eval_windows 8 --taus 1 0.9 0.5 --device cpu".split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a tiny trained checkpoint (ckpt.pt), its text (text.txt) and its conversion (d2dmoe.pt)"""
    folder = tmp_path_factory.mktemp("trained")
    write_text(folder / "text.txt")
    train.main([*TINY, "--data", str(folder / "text.txt"), "--out", str(folder), "--steps", "30"])
    convert.main([*CONVERT, "--ckpt", str(folder)])
    return folder


def weights_of(path):
    return torch.load(path, weights_only=True)["model"]


def assert_same_weights(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance, name


def test_a_training_step_is_equation_1(trained, tmp_path):
    """At a learning rate of zero Adam's first moments are the mean of the gradients of two steps on the same weights."""
    train.main([*TINY, "--data", str(trained / "text.txt"), "--out", str(tmp_path), "--steps", "2", "--lr", "0", "--alpha", "0.5",
                "--grad_clip", "0", "--grad_accum", "2"])  # fmt: skip
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    model = train.build_model(checkpoint, tmp_path)
    tokens, _ = train.load_corpus(str(trained / "text.txt"), "bytes", tmp_path, 16)
    parameters = sorted(model.parameters(), key=lambda p: p.dim() < 2)  # as training groups them: matrices, then vectors
    moments = [torch.zeros_like(p) for p in parameters]
    for step, alpha in ((0, 0.0), (1, 0.5)):  # the ramp ends at half of two steps
        offsets = train.draw_offsets(len(tokens), 8, 16, 0, step)
        x, y = train.take_windows(tokens, offsets, 16, 257, torch.device("cpu"))
        penalties = []
        for block, read in zip(model.transformer.h, model.hidden(x)[2], strict=True):
            a = torch.relu(block.mlp.c_fc(read["mlp"]))
            penalties.append((a.sum(-1) ** 2 / (a**2).sum(-1).clamp(min=1e-12)).mean())
        loss = F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten()) + alpha * torch.stack(penalties).mean()
        moments = [0.9 * m + 0.1 * g for m, g in zip(moments, torch.autograd.grad(loss, parameters), strict=True)]
    for i, m in enumerate(moments):
        assert torch.allclose(checkpoint["optimizer"]["state"][i]["exp_avg"], m, atol=1e-6)
        assert m.abs().max() > 1e-5


def test_pieces_of_a_step_add_up_to_it(trained, tmp_path):
    for batch, pieces in (("8", "1"), ("4", "2")):  # the later --batch_size counts
        arguments = ["--batch_size", batch, "--grad_accum", pieces, "--data", str(trained / "text.txt"), "--steps", "10"]
        train.main([*TINY, *arguments, "--out", str(tmp_path / pieces)])
    assert_same_weights(weights_of(tmp_path / "1/ckpt.pt"), weights_of(tmp_path / "2/ckpt.pt"), 1e-5)


def test_sparsity_of_activations_by_plain_formula():
    model = tiny_dense()
    x = torch.randint(257, (3, 16))
    zeros, effective = train.activation_sparsity(model, x)
    a = [torch.relu(b.mlp.c_fc(read["mlp"])) for b, read in zip(model.transformer.h, model.hidden(x)[2], strict=True)]
    assert zeros == pytest.approx(torch.stack([(t == 0).double().mean() for t in a]).mean().item())
    hoyer = torch.stack([(t.sum(-1) ** 2 / (t**2).sum(-1)).mean() for t in a]).mean().item()
    assert 0 < zeros < 1 and effective == pytest.approx(hoyer, rel=1e-4)


def test_training_learns_and_its_progress_is_printed(trained, capsys, tmp_path):
    train.main([*TINY, "--data", str(trained / "text.txt"), "--out", str(tmp_path), "--steps", "30", "--lr", "1e-2"])
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if re.match(r" +\d+ ", line)]
    assert [r[0] for r in rows] == ["10", "20", "30"] and all(len(r) == 7 for r in rows)
    assert float(rows[-1][2]) < float(rows[0][2]) < math.log(257) + 0.5
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert checkpoint["step"] == 30 and checkpoint["tokenizer"] == "bytes" and checkpoint["settings"]["lr"] == 1e-2
    assert checkpoint["best_loss"] == pytest.approx(min(float(r[2]) for r in rows), abs=1e-3)


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_second_run_in_the_same_folder_keeps_the_first_ones_checkpoint(trained, tmp_path, capsys, monkeypatch, hard_links):
    if not hard_links:
        monkeypatch.setattr(Path, "hardlink_to", lambda *_: (_ for _ in ()).throw(OSError("not supported")))
    arguments = [*TINY, "--data", str(trained / "text.txt"), "--out", str(tmp_path), "--steps", "10"]
    train.main(arguments)
    first = weights_of(tmp_path / "ckpt.pt")
    assert not (tmp_path / "ckpt-previous.pt").exists()
    train.main([*arguments, "--seed", "1"])
    assert f"stays as {tmp_path}/ckpt-previous.pt" in capsys.readouterr().out
    assert_same_weights(weights_of(tmp_path / "ckpt-previous.pt"), first)
    second = weights_of(tmp_path / "ckpt.pt")
    train.main(["--init", "resume", "--steps", "20", "--out", str(tmp_path)])  # the same run going on: nothing to keep
    assert_same_weights(weights_of(tmp_path / "ckpt-previous.pt"), first)
    assert any(not torch.equal(w, second[n]) for n, w in weights_of(tmp_path / "ckpt.pt").items())


def test_resumed_and_uninterrupted_runs_end_alike(trained, tmp_path):
    arguments = [*TINY, "--data", str(trained / "text.txt"), "--steps", "20", "--grad_accum", "2"]
    train.main([*arguments, "--out", str(tmp_path / "whole")])
    saves = []
    plain = train.save_checkpoint

    def save_and_stop(path, *args, **kwargs):
        plain(path, *args, **kwargs)
        saves.append(kwargs["step"])
        raise KeyboardInterrupt  # a crash right after the first save

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "save_checkpoint", save_and_stop)
        train.main([*arguments, "--out", str(tmp_path / "parts")])
    assert saves == [10]
    train.main(["--init", "resume", "--out", str(tmp_path / "parts")])  # settings come from the checkpoint
    assert_same_weights(weights_of(tmp_path / "whole/ckpt.pt"), weights_of(tmp_path / "parts/ckpt.pt"))
    with pytest.raises(SystemExit, match="has its 20 steps: give a larger --steps"):
        train.main(["--init", "resume", "--out", str(tmp_path / "parts")])


def test_two_processes_train_as_one_does_and_one_resumes_from_them(trained, tmp_path):
    # 12 sequences a step: one process takes them as 4, 4, 4, each of two as 4 and 2
    arguments = [*TINY, "--data", str(trained / "text.txt"), "--steps", "20", "--grad_accum", "3"]
    train.main([*arguments, "--out", str(tmp_path / "one")])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = [*torchrun, str(HERE / "train.py"), *arguments, "--out", str(tmp_path / "two")]
    subprocess.run(run, env=environment, check=True, capture_output=True)
    assert_same_weights(weights_of(tmp_path / "one/ckpt.pt"), weights_of(tmp_path / "two/ckpt.pt"), 1e-5)
    train.main(["--init", "resume", "--steps", "25", "--out", str(tmp_path / "two")])
    assert torch.load(tmp_path / "two/ckpt.pt", weights_only=True)["step"] == 25
    run = [*torchrun, str(HERE / "convert.py"), *CONVERT, "--ckpt", str(tmp_path / "one")]
    subprocess.run(run, env=environment, check=True, capture_output=True)
    shutil.copy(tmp_path / "one/d2dmoe.pt", tmp_path / "two_processes.pt")
    convert.main([*CONVERT, "--ckpt", str(tmp_path / "one")])
    assert_same_weights(weights_of(tmp_path / "one/d2dmoe.pt"), weights_of(tmp_path / "two_processes.pt"), 1e-4)


def test_resume_keeps_the_context_and_survives_foreign_settings(trained, tmp_path):
    shutil.copy(trained / "ckpt.pt", tmp_path)
    resume = ["--init", "resume", "--out", tmp_path, "--steps", "40"]
    assert "keeps the context of 16" in refused(train.main, *resume, "--block_size", "8")
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    torch.save(checkpoint | {"settings": ["not", "ours"]}, tmp_path / "ckpt.pt")
    train.main([*TINY, "--init", "resume", "--data", str(trained / "text.txt"), "--out", str(tmp_path), "--steps", "31"])
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"] == 31


def test_a_downloaded_model_is_converted_into_a_folder_of_its_name(trained, tmp_path, monkeypatch):
    sizes = {"wte.weight": (50257, 64), "wpe.weight": (16, 64), "ln_f.weight": (64,), "ln_f.bias": (64,), "h.0.ln_1.weight": (64,),
             "h.0.ln_1.bias": (64,), "h.0.ln_2.weight": (64,), "h.0.ln_2.bias": (64,), "h.0.attn.c_attn.weight": (64, 192),
             "h.0.attn.c_attn.bias": (192,), "h.0.attn.c_proj.weight": (64, 64), "h.0.attn.c_proj.bias": (64,), "h.0.mlp.c_fc.weight": (64, 256),
             "h.0.mlp.c_fc.bias": (256,), "h.0.mlp.c_proj.weight": (256, 64), "h.0.mlp.c_proj.bias": (64,)}  # fmt: skip
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: {n: 0.02 * torch.randn(s) for n, s in sizes.items()})
    monkeypatch.chdir(tmp_path)
    convert.main([*CONVERT, "--ckpt", "gpt2", "--data", str(trained / "text.txt"), "--tokenizer", "bytes"])
    assert [p.name for p in tmp_path.iterdir()] == ["gpt2"] and (tmp_path / "gpt2/d2dmoe.pt").exists()


def test_a_conversion_that_cannot_be_written_ends_before_it_begins(trained, tmp_path, monkeypatch):
    for name in ("train.bin", "val.bin"):
        np.random.default_rng(0).integers(0, 257, 500).astype(np.uint16).tofile(tmp_path / name)
    (tmp_path / "file").touch()
    monkeypatch.setattr(convert, "train_routers", lambda *_: pytest.fail("it began"))
    arguments = [*CONVERT, "--ckpt", trained, "--data", tmp_path]
    assert "choose another folder by --out" in refused(convert.main, *arguments, "--out", tmp_path / "file")
    np.full(500, 300, dtype=np.uint16).tofile(tmp_path / "val.bin")
    assert "outside the model's vocabulary" in refused(convert.main, *arguments, "--out", tmp_path / "new")


def test_two_runs_with_one_seed_are_identical(trained, tmp_path, capsys):
    texts = []
    for name in ("a", "b"):
        train.main([*TINY, "--data", str(trained / "text.txt"), "--out", str(tmp_path / name), "--steps", "10", "--seed", "5"])
        convert.main([*CONVERT, "--ckpt", str(tmp_path / name), "--split", "coactivation", "--attention"])
        capsys.readouterr()
        sample.main(["--ckpt", str(tmp_path / name), "--max_new_tokens", "30", "--device", "cpu"])
        texts.append(capsys.readouterr().out.rsplit(",", 1)[0])  # without the speed
    for file in ("ckpt.pt", "d2dmoe.pt"):
        assert_same_weights(weights_of(tmp_path / "a" / file), weights_of(tmp_path / "b" / file))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_nanogpt_checkpoint_loads_and_converts(trained, tmp_path, bias, prefix):
    dense = tiny_dense(bias=bias, activation="gelu")
    state = dense.state_dict() | {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
    sizes = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, bias=bias, vocab_size=257, dropout=0.0)
    checkpoint = {  # the layout that nanoGPT's train.py saves
        "model": {prefix + k: v for k, v in state.items()}, "optimizer": {"state": {}, "param_groups": []}, "model_args": sizes,
        "iter_num": 7, "best_val_loss": torch.tensor(1.5), "config": {"dataset": "shakespeare", "dtype": "float32"},
    }  # fmt: skip
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    model, _ = train.load_initial(str(tmp_path))
    idx = torch.randint(257, (2, 16))
    assert torch.equal(model(idx)[0], dense(idx)[0])
    convert.main([*CONVERT, "--ckpt", str(tmp_path), "--data", str(trained / "text.txt")])
    moe = train.build_model(train.load_checkpoint(tmp_path, "d2dmoe.pt"), tmp_path)
    assert torch.allclose(moe(idx)[0], dense(idx)[0], atol=1e-4)


def test_a_model_over_letters_converts_on_its_own_encoded_text(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "load_tokenizer", lambda name: pytest.fail("nothing is to be encoded"))
    sizes = dict(n_layer=1, n_head=2, n_embd=16, block_size=16, bias=False, vocab_size=65, dropout=0.0)  # as nanoGPT's shakespeare_char
    dense = GPT(GPTConfig(**{k: v for k, v in sizes.items() if k != "dropout"}, activation="gelu"))
    torch.save({"model": dense.state_dict(), "model_args": sizes, "iter_num": 1}, tmp_path / "ckpt.pt")
    for name in ("train.bin", "val.bin"):
        np.random.default_rng(0).integers(0, 65, 500).astype(np.uint16).tofile(tmp_path / name)
    convert.main([*CONVERT, "--ckpt", str(tmp_path), "--data", str(tmp_path)])
    assert train.load_checkpoint(tmp_path, "d2dmoe.pt")["config"]["vocab_size"] == 65
    assert "sample.py" not in capsys.readouterr().out
    assert "has a vocabulary of its own, of 65 tokens" in refused(sample.main, "--ckpt", tmp_path)
    assert "vocabulary of 65 is too small for the tokenizer gpt2" in refused(convert.main, *CONVERT, "--ckpt", tmp_path)


def test_relufication_and_a_shorter_context_start_from_another_models_weights(trained, tmp_path):
    dense = tiny_dense(activation="gelu")
    train.save_checkpoint(tmp_path / "gelu.pt", dense, tokenizer="bytes")
    train.main(["--init", str(tmp_path / "gelu.pt"), "--activation", "relu", "--block_size", "8", "--steps", "1", "--lr", "0",
                "--data", str(trained / "text.txt"), "--out", str(tmp_path), "--device", "cpu", "--eval_windows", "4"])  # fmt: skip
    model, _ = train.load_initial(str(tmp_path))
    assert (model.config.activation, model.config.block_size) == ("relu", 8)
    expected = dense.state_dict()
    expected["transformer.wpe.weight"] = expected["transformer.wpe.weight"][:8]
    assert_same_weights(model.state_dict(), expected)


def test_bfloat16_and_compile_train_too(trained, tmp_path):
    arguments = [*TINY, "--data", str(trained / "text.txt"), "--steps", "10"]
    train.main([*arguments, "--out", str(tmp_path), "--dtype", "bfloat16"])
    assert all(w.dtype == torch.float32 for w in weights_of(tmp_path / "ckpt.pt").values())
    if shutil.which("g++") or shutil.which("clang++"):
        train.main([*arguments, "--out", str(tmp_path / "compiled"), "--compile"])
        train.main([*arguments, "--out", str(tmp_path / "eager")])
        assert_same_weights(weights_of(tmp_path / "compiled/ckpt.pt"), weights_of(tmp_path / "eager/ckpt.pt"), 1e-4)


def test_the_gpt2_preset_is_the_papers():
    args = train.parse_arguments(["--preset", "gpt2", "--init", "gpt2", "--steps", "5"])
    assert (args.n_layer, args.n_head, args.n_embd, args.block_size, args.tokenizer) == (12, 12, 768, 1024, "gpt2")
    assert (args.activation, args.penalty, args.alpha, args.lr, args.batch_size * args.grad_accum, args.steps) == ("relu", "l1", 5e-4, 6e-4, 960, 5)


# ---------------------------------------------------------------------------------------------------------------------
# convert.py


@pytest.mark.parametrize("n, k", [(12, 3), (64, 8), (64, 64), (30, 1), (96, 2)])
def test_balanced_kmeans_fills_every_cluster_exactly(n, k):
    torch.manual_seed(0)
    assignment = convert.balanced_kmeans(torch.randn(n, 5), k, seed=0)
    assert torch.bincount(assignment, minlength=k).tolist() == [n // k] * k
    with pytest.raises(ValueError, match="do not divide"):
        convert.balanced_kmeans(torch.randn(n, 5), n - 1 if n % (n - 1) else n + 1, seed=0)


def test_balanced_kmeans_finds_planted_clusters_and_survives_equal_points():
    torch.manual_seed(0)
    truth = torch.arange(8).repeat_interleave(16)[torch.randperm(128)]
    points = torch.eye(8)[truth] + 0.05 * torch.randn(128, 8)
    assignment = convert.balanced_kmeans(points, 8, seed=0)
    assert len({(a, b) for a, b in zip(assignment.tolist(), truth.tolist(), strict=True)}) == 8
    assert torch.bincount(convert.balanced_kmeans(torch.ones(24, 3), 6, seed=0)).tolist() == [4] * 6


def test_the_auction_assigns_almost_optimally():
    torch.manual_seed(0)
    for _ in range(20):
        score = torch.randn(6, 3)
        best = max(
            sum(score[i, c].item() for i, c in enumerate(a))
            for a in itertools.product(range(3), repeat=6) if all(a.count(c) == 2 for c in range(3))
        )  # fmt: skip
        a = convert.assign_balanced(score, torch.zeros(3), epsilon=1e-4)
        assert score[torch.arange(6), a].sum().item() >= best - 6 * 1e-4 - 1e-5


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
def test_splitting_loses_nothing(bias, activation):
    dense = tiny_dense(bias=bias, activation=activation)
    moe, _ = tiny_moe(dense)
    for block, target in zip(dense.transformer.h, moe.transformer.h, strict=True):
        rows = torch.cat([block.mlp.c_fc.weight, block.mlp.c_proj.weight.t()], dim=1)
        split = torch.cat([target.mlp.w1.flatten(0, 1), target.mlp.w2.flatten(0, 1)], dim=1)
        assert torch.equal(rows[rows[:, 0].argsort()], split[split[:, 0].argsort()])  # the same neurons in another order
    idx = torch.randint(257, (2, 16))
    y, expected = moe(idx)[0], dense(idx)[0]
    assert (y - expected).norm() <= 1e-5 * expected.norm()


def test_experts_are_the_clusters():
    dense = tiny_dense()
    moe, _ = tiny_moe(dense)
    sample = torch.randint(257, (4, 16))
    inputs = dense.hidden(sample)[2]
    for tokens in (None, sample):
        convert.split_model(dense, moe, None, tokens, seed=0)
        for block, target, read in zip(dense.transformer.h, moe.transformer.h, inputs, strict=True):
            features = convert.weight_features(block.mlp) if tokens is None else convert.coactivation_features(block.mlp, read["mlp"].flatten(0, 1))
            assignment = convert.balanced_kmeans(features, 8, seed=0)
            for e in range(8):
                members = block.mlp.c_fc.weight[assignment == e]  # [h, d]
                assert torch.equal(members[members[:, 0].argsort()], target.mlp.w1[e][target.mlp.w1[e][:, 0].argsort()])


def test_features_of_neurons():
    torch.manual_seed(0)
    mlp = d2dmoe.MLP(6, 20, "relu", "none")
    x = torch.randn(50, 6)
    a = torch.relu(x @ mlp.c_fc.weight.t() + mlp.c_fc.bias)  # [50, 20]
    unit = (a / a.norm(dim=0)).t()  # [20, 50]
    features = convert.coactivation_features(mlp, x, rank=20)
    assert torch.allclose(features @ features.t(), unit @ unit.t(), atol=1e-4)  # a rotation of them, at full rank
    assert convert.coactivation_features(mlp, x, rank=3).shape == (20, 3)
    before = torch.get_rng_state()
    assert torch.equal(convert.coactivation_features(mlp, x, rank=3), convert.coactivation_features(mlp, x, rank=3))
    assert torch.equal(torch.get_rng_state(), before)
    w = mlp.c_fc.weight
    assert torch.allclose(convert.weight_features(mlp), w / w.norm(dim=1, keepdim=True))


def test_router_losses_by_plain_formula():
    torch.manual_seed(0)
    x = torch.randn(9, 10)
    for target in ("norm", "sqrt", "share"):
        moe = DynamicKMoE(10, 24, 6, "relu", 5, target)
        for p in moe.parameters():
            torch.nn.init.normal_(p)
        a = torch.relu(torch.einsum("nd,ehd->neh", x, moe.w1) + moe.b1)
        norms = torch.einsum("neh,ehd->ned", a, moe.w2).norm(dim=-1)
        raw = (torch.tanh if target == "share" else torch.relu)(x @ moe.router.fc1.weight.t()) @ moe.router.fc2.weight.t()
        if target == "share":
            share = a.sum(-1) / a.sum(-1).max(dim=-1, keepdim=True).values
            p = torch.sigmoid(raw)
            expected = -(share * p.log() + (1 - share) * (1 - p).log()).mean()
        else:
            expected = ((raw.abs() - (norms.sqrt() if target == "sqrt" else norms)) ** 2).mean()
        assert torch.isclose(convert.router_loss(moe, x), expected, rtol=1e-4)


def test_projection_loss_by_plain_formula():
    torch.manual_seed(0)
    student, x, target = d2dmoe.MLP(6, 4, "relu", "hoyer"), torch.randn(7, 6), torch.randn(7, 6)
    a = torch.relu(student.c_fc(x))
    hoyer = (a.sum(-1) ** 2 / (a**2).sum(-1).clamp(min=1e-12)).mean()
    expected = ((student.c_proj(a) - target) ** 2).mean() / target.var() + 0.3 * hoyer
    assert torch.isclose(convert.projection_loss(student, x, target, 0.3), expected, rtol=1e-4)


def test_one_loop_trains_projections_and_routers(trained):
    dense, _ = train.load_initial(str(trained))
    dense.requires_grad_(False)
    tokens, _ = train.load_corpus(str(trained / "text.txt"), "bytes", trained, 16)
    inputs = dense.hidden(torch.from_numpy(tokens[:64].astype(np.int64)).view(4, 16))[2]

    def error(students):
        x = inputs[0]["qkv"]
        return F.mse_loss(students[0]["k"](x)[0], dense.transformer.h[0].attn.c_attn(x).split(16, dim=-1)[1]).item()

    torch.manual_seed(0)
    untrained = convert.distill_projections(dense, tokens, 1, 0.0, 4, 0, 1e-3)
    torch.manual_seed(0)
    students = convert.distill_projections(dense, tokens, 150, 1e-2, 4, 0, 1e-3)
    assert error(students) < 0.5 * error(untrained)
    moe, _ = tiny_moe(dense, attention=True)
    convert.split_model(dense, moe, students, None, seed=0)
    x = inputs[0]["qkv"]
    for name in "qkvo":
        assert torch.allclose(getattr(moe.transformer.h[0].attn, name)(x)[0], students[0][name](x)[0], atol=1e-5)
    frozen = {n: p.clone() for n, p in moe.named_parameters() if "router" not in n}
    for n, p in moe.named_parameters():
        p.requires_grad_("router" in n)
    layer, x = moe.transformer.h[1].mlp, inputs[1]["mlp"].flatten(0, 1)
    before = convert.router_loss(layer, x).item()
    convert.train_routers(moe, tokens, 100, 1e-2, 4, 0)
    assert convert.router_loss(layer, x).item() < 0.8 * before
    assert all(torch.equal(p, frozen[n]) for n, p in moe.named_parameters() if n in frozen)


def test_projections_are_tuned_together_by_plain_formula(trained, capsys):
    dense = tiny_dense(scale=3.0)
    dense.requires_grad_(False)
    tokens, _ = train.load_corpus(str(trained / "text.txt"), "bytes", trained, 16)
    _, students = tiny_moe(dense, attention=True)
    tune = partial(convert.tune_projections, dense, students, tokens, rows=4, seed=3, weight=0.01)
    tune(steps=1, lr=0.0)
    printed = float(re.search(r"step +1 of 1, loss ([\d.]+)", capsys.readouterr().out)[1])

    moe, _ = tiny_moe(dense, attention=True)  # the same students, drawn from the same seed
    offsets = train.draw_offsets(len(tokens), 4, 16, seed=3, step=0)
    x = torch.stack([torch.from_numpy(tokens[o : o + 16].astype(np.int64)) for o in offsets.tolist()])
    p, q = dense(x)[0].softmax(-1), moe(x)[0].softmax(-1)
    kl = (p * (p.log() - q.log())).sum(-1).mean()
    penalty = 0.0
    for i, inputs in enumerate(moe.hidden(x)[2]):
        for name, source in (("q", "qkv"), ("k", "qkv"), ("v", "qkv"), ("o", "o")):
            a = torch.relu(students[i][name].c_fc(inputs[source]))
            penalty += (a.sum(-1) ** 2 / (a**2).sum(-1).clamp(min=1e-12)).mean()
    assert printed == pytest.approx((kl + 0.01 * penalty).item(), rel=1e-3)

    weights = dense.lm_head.weight.clone()
    tune(steps=60, lr=1e-2)
    last = float(re.findall(r"loss ([\d.]+)", capsys.readouterr().out)[-1])
    assert last < 0.7 * printed and torch.equal(weights, dense.lm_head.weight)
    convert.split_model(dense, moe, students, None, seed=0)
    q = moe(x)[0].softmax(-1)
    assert (p * (p.log() - q.log())).sum(-1).mean() < kl


def test_conversion_writes_a_model_and_a_table(trained, capsys):
    moe = train.build_model(train.load_checkpoint(trained, "d2dmoe.pt"), trained)
    dense, _ = train.load_initial(str(trained))
    _, val = train.load_corpus(str(trained / "text.txt"), "bytes", trained, 16)
    with open(trained / "cost_vs_loss.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [(r["rule"], float(r["value"])) for r in rows if r["rule"] != "top_k"] == [(rule, tau) for tau in (1, 0.9, 0.5) for rule in ("dynamic_k", "oracle")]
    dense_loss = train.evaluate(dense, val, 8, 16)[0]
    for row in rows:
        assert float(row["dense_loss"]) == pytest.approx(dense_loss, abs=1e-6)
    assert float(rows[0]["executed"]) == 1 and float(rows[0]["loss"]) == pytest.approx(dense_loss, abs=1e-4)
    measured, counts = convert.measure(moe, val, 8, Gate(dynamic_k, 0.9))
    row = next(r for r in rows if r["rule"] == "dynamic_k" and r["value"] == "0.9")
    for name in ("executed", "flops", "loss"):
        assert float(row[name]) == pytest.approx(measured[name], abs=1e-6)
    share = torch.cat([c["mlp"] for c in counts]).double().mean().item() / 8
    assert measured["executed"] == pytest.approx(share)
    # multiply-adds: attention over (1 + ... + 16) / 16 tokens and its projections, router, experts of 8 neurons, head
    fixed, neuron = 2 * (2 * 8.5 * 16 + 4 * 16 * 16) + 257 * 16, 2 * 16
    flops = (fixed + 2 * (16 * 4 + 4 * 8 + share * 64 * neuron)) / (fixed + 2 * 64 * neuron)
    assert measured["flops"] == pytest.approx(flops)


def test_a_share_of_the_experts_is_rounded_up():
    norms = torch.rand(5, 8)
    for share, k in ((0.25, 2), (0.26, 3), (0.3750001, 3), (1.0, 8), (0.01, 1)):
        assert torch.equal(convert.top_share(norms, share), top_k(norms, k))


def test_conversions_share_one_csv_and_a_repeated_one_replaces_itself(trained, tmp_path):
    shutil.copy(trained / "ckpt.pt", tmp_path)
    recipes = [[], ["--split", "coactivation", "--router_target", "sqrt"], ["--baseline", "moefication"], ["--attention"], []]
    for arguments in recipes:
        convert.main([*CONVERT, "--ckpt", str(tmp_path), *arguments])
    with open(tmp_path / "cost_vs_loss.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    count = {r["recipe"]: sum(q["recipe"] == r["recipe"] for q in rows) for r in rows}
    assert count == {
        "coactivation/sqrt E=8 r=4": 9, "moefication E=8 r=4": 13, "weights/norm E=8 r=4 +attention": 9, "weights/norm E=8 r=4": 9,
    }  # fmt: skip
    assert {r["rule"] for r in rows if r["recipe"].startswith("moef")} == {"top_k"}
    assert [{k: str(v) for k, v in r.items()} for r in convert.read_points(tmp_path / "cost_vs_loss.csv")] == rows


def test_a_csv_that_is_not_ours_counts_as_none(tmp_path):
    header = ",".join(convert.COLUMNS).encode()
    for content in (b"", b"a,b\n1,2\n", b"\xff\xfe" * 50, header + b"\nx,top_k,1,oops,1,2,2,t\n", header + b"\nx,top_k,1\n"):
        (tmp_path / "c.csv").write_bytes(content)
        assert convert.read_points(tmp_path / "c.csv") == []
    assert convert.read_points(tmp_path) == []


def test_no_point_of_another_conversion_is_lost(tmp_path):
    path = tmp_path / "c.csv"
    point = {"recipe": "a", "rule": "top_k", "value": 1.0, "executed": 0.5, "flops": 0.75, "loss": 2.0, "dense_loss": 1.5, "text": "t"}
    convert.write_points(path, [point])
    with open(path, "ab") as f:
        f.write(b"b,top_k,1,oops,1,2,2,t\nb,top_k\nb,top_k,\xff,1,1,2,2,t\n")  # rows that are no points
    convert.write_points(path, [point | {"recipe": "c"}])
    assert convert.read_points(path) == [point, point | {"recipe": "c"}]
    path.write_text("somebody's,notes\n")
    convert.write_points(path, [point])
    assert convert.read_points(path) == [point] and (tmp_path / "c.csv.old").read_text() == "somebody's,notes\n"


def test_costs_are_read_off_the_curve_by_interpolation(capsys):
    curve = [("dynamic_k", 1.0, 1.0, 2.0), ("dynamic_k", 0.5, 0.7, 2.02), ("dynamic_k", 0.25, 0.5, 2.06), ("top_k", 1.0, 1.0, 2.0), ("top_k", 0.5, 0.8, 2.4)]
    points = [dict(zip(("rule", "executed", "flops", "loss"), row, strict=True)) for row in curve]
    assert convert.cost_at(points, "dynamic_k", 2.04) == pytest.approx((0.375, 0.6))
    assert convert.cost_at(points, "dynamic_k", 3.0) is None
    convert.print_read_off(points, 2.0)
    assert "at 2% above the dense loss, dynamic_k:  37.5% of the experts,  60.0% of the FLOPs" in capsys.readouterr().out


def test_a_picture_is_drawn_where_matplotlib_is_installed(trained, capsys, monkeypatch):
    counts = [{"mlp": torch.randint(0, 9, (50,))} for _ in range(2)]
    text = convert.read_points(trained / "cost_vs_loss.csv")[0]["text"]
    convert.draw(trained / "picture.png", text, counts, 8, Gate(dynamic_k, 0.9))
    try:  # requirements.txt leaves it out: where it is not installed, only that it is not needed is checked
        import matplotlib  # noqa: F401

        assert (trained / "picture.png").read_bytes()[:4] == b"\x89PNG"
    except ImportError:
        assert not (trained / "picture.png").exists()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # what Python keeps there for a module that cannot be imported
    convert.draw(trained / "none.png", text, counts, 8, Gate(dynamic_k, 0.9))
    assert "matplotlib is not installed" in capsys.readouterr().out and not (trained / "none.png").exists()


# ---------------------------------------------------------------------------------------------------------------------
# sample.py


def test_sampling_ends_with_what_it_cost(trained, capsys):
    sample.main(["--ckpt", str(trained), "--tau", "0.9", "--prompt", "to be", "--max_new_tokens", "40", "--device", "cpu", "--num_samples", "2"])
    out = capsys.readouterr().out
    assert out.startswith("to be") and out.count("---------------") == 1 and "\x1b[48" not in out
    line = out.strip().splitlines()[-1]
    found = re.fullmatch(r"tau 0.9: ([\d.]+)% of the experts executed, ([\d.]+)% of the dense model's FLOPs, \d+ tokens a second", line)
    assert found and 0 < float(found[1]) <= 100
    sample.main(["--ckpt", str(trained), "--tau", "1", "--max_new_tokens", "5", "--device", "cpu"])
    # multiply-adds of two blocks for tokens that see 1 to 5: scores and mixture, projections, 64 neurons; routers; the head
    dense = sum(2 * (2 * c * 16 + 4 * 16 * 16 + 2 * 16 * 64) + 257 * 16 for c in range(1, 6))
    share = (dense + 5 * 2 * (16 * 4 + 4 * 8)) / dense
    assert f"100.0% of the experts executed, {share:.1%} of the dense model's FLOPs" in capsys.readouterr().out
    sample.main(["--ckpt", str(trained), "--max_new_tokens", "2", "--device", "cpu"])
    assert capsys.readouterr().out.endswith("of the dense model's FLOPs\n")  # nothing to time


def test_tau_1_writes_what_the_dense_model_writes(trained):
    moe = train.build_model(train.load_checkpoint(trained, "d2dmoe.pt"), trained)
    dense, _ = train.load_initial(str(trained))
    texts = [
        torch.cat([t for t, _ in d2dmoe.generate(m, torch.tensor([[65, 66]]), 60, Gate(dynamic_k, 1.0), 0.8, None, torch.Generator().manual_seed(1))])
        for m in (dense, moe)
    ]
    assert torch.equal(*texts)


def test_the_text_is_the_same_through_every_path(trained, monkeypatch):
    moe = train.build_model(train.load_checkpoint(trained, "d2dmoe.pt"), trained)
    paths = [kernels.masked_ffn, kernels.dense_ffn, kernels.grouped_ffn, kernels.expert_ffn]
    if kernels.triton is not None:
        paths.append(kernels.triton_ffn)
    texts = []
    for path in paths:
        monkeypatch.setattr(d2dmoe, "expert_ffn", path)
        texts.append(torch.cat([t for t, _ in d2dmoe.generate(moe, torch.tensor([[65]]), 30, Gate(dynamic_k, 0.9), temperature=0)]))
    assert all(torch.equal(texts[0], t) for t in texts)


def test_shading(trained, capsys):
    sample.main(["--ckpt", str(trained), "--max_new_tokens", "8", "--color", "always", "--device", "cpu"])
    assert "\x1b[48;5;" in capsys.readouterr().out
    shades = [sample.shade("x", share) for share in (0.01, 0.5, 1.0)]
    assert len(set(shades)) == 3 and all("x" in s and s.endswith("\x1b[0m") for s in shades)


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong: one clear line, a non-zero exit, nothing lost


def refused(main, *arguments):
    """Runs a script's main and returns the line that it ends with; it must end, and not with success."""
    stderr = io.StringIO()
    with pytest.raises(SystemExit) as end, contextlib.redirect_stderr(stderr):
        main([str(a) for a in arguments])
    if isinstance(end.value.code, str):
        assert "\n" not in end.value.code.strip()
        return end.value.code
    assert end.value.code not in (None, 0)
    return stderr.getvalue().strip().splitlines()[-1]


class Evil:
    """A pickle that creates a file when it is loaded"""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_user_errors_end_in_one_line(trained, tmp_path, monkeypatch):
    text, ckpt = trained / "text.txt", trained / "ckpt.pt"
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "half.pt").write_bytes(ckpt.read_bytes()[: ckpt.stat().st_size // 2])
    (tmp_path / "photo.pt").write_bytes(b"\x89PNG\r\n" * 100)
    (tmp_path / "list.pt").write_bytes(b"")
    torch.save({"model": {}, "evil": Evil(tmp_path / "executed")}, tmp_path / "evil.pt")
    with open(tmp_path / "plain.pkl", "wb") as f:
        pickle.dump(Evil(tmp_path / "executed"), f)
    np.full(500, 300, dtype=np.uint16).tofile(tmp_path / "train.bin")
    np.full(500, 300, dtype=np.uint16).tofile(tmp_path / "val.bin")
    (tmp_path / "bins/empty").mkdir(parents=True)
    (tmp_path / "trained").mkdir()
    shutil.copy(ckpt, tmp_path / "trained")
    for name in ("train.bin", "val.bin"):
        (tmp_path / "bins" / name).write_bytes(b"")
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: pair_tokenizer())
    before = {p: p.read_bytes() for p in trained.iterdir() if p.suffix == ".pt"}
    out, small = tmp_path / "out", [*TINY, "--steps", "10", "--data", text]

    for message, main, *arguments in [
        ("no checkpoint at .*nowhere", sample.main, "--ckpt", tmp_path / "nowhere"),
        ("no checkpoint at .*d2dmoe.pt: first run train.py, then convert.py", sample.main, "--ckpt", tmp_path),
        ("no checkpoint at .*d2dmoe.pt: first run python convert.py --ckpt .*trained", sample.main, "--ckpt", tmp_path / "trained"),
        ("--baseline moefication has a router of its own", convert.main, "--ckpt", trained, "--baseline", "moefication", "--router_target", "sqrt"),
        ("bins/empty: no text in this folder", train.main, *small, "--out", out, "--data", tmp_path / "bins/empty"),
        ("no checkpoint at .*nowhere: first run train.py$", convert.main, "--ckpt", tmp_path / "nowhere"),
        ("no checkpoint at", train.main, "--init", "resume", "--out", out),
        ("no checkpoint at", train.main, *small, "--out", out, "--init", tmp_path / "nowhere.pt"),
        ("half.pt is damaged or not a checkpoint", convert.main, "--ckpt", tmp_path / "half.pt"),
        ("photo.pt is damaged or not a checkpoint", sample.main, "--ckpt", tmp_path / "photo.pt"),
        ("list.pt is damaged or not a checkpoint", sample.main, "--ckpt", tmp_path / "list.pt"),
        ("evil.pt is damaged or not a checkpoint", convert.main, "--ckpt", tmp_path / "evil.pt"),
        ("plain.pkl is damaged or not a checkpoint", sample.main, "--ckpt", tmp_path / "plain.pkl"),
        ("is a dense model: convert it first", sample.main, "--ckpt", ckpt),
        ("is converted already", convert.main, "--ckpt", trained / "d2dmoe.pt"),
        ("is a converted model: training starts from a dense one", train.main, *small, "--out", out, "--init", trained / "d2dmoe.pt"),
        ("tau must be between 0 and 1, not 1.5", sample.main, "--ckpt", trained, "--tau", "1.5"),
        ("tau must be between 0 and 1, not nan", sample.main, "--ckpt", trained, "--tau", "nan"),
        ("taus must lie between 0 and 1, not -0.5", convert.main, "--ckpt", trained, "--taus", "0.5", "-0.5"),
        ("num_experts 7 does not divide the 64 neurons", convert.main, "--ckpt", trained, "--num_experts", "7"),
        ("expert_size 5 does not divide the 64 neurons", convert.main, "--ckpt", trained, "--expert_size", "5"),
        ("not allowed with argument", convert.main, "--ckpt", trained, "--expert_size", "8", "--num_experts", "8"),
        ("tokens are too few for a context of 16", train.main, *small, "--out", out, "--data", tmp_path / "empty.txt"),
        ("no such file or folder", train.main, *small, "--out", out, "--data", tmp_path / "nowhere"),
        ("token 300 lies outside the model's vocabulary of 257", train.main, *small, "--out", out, "--data", tmp_path),
        ("the prompt has 17 tokens and the model's context 16", sample.main, "--ckpt", trained, "--prompt", "x" * 17),
        ("n_embd 15 must be a multiple of n_head", train.main, *small, "--out", out, "--n_embd", "15"),
        ("--device cuda:77 cannot be used here", sample.main, "--ckpt", trained, "--device", "cuda:77"),
        ("--device toaster cannot be used here", train.main, "--device", "toaster"),
        ("--steps must be at least 1", train.main, "--steps", "0"),
        ("--lr must be a finite number", train.main, "--lr", "nan"),
        ("--beta2 must be at least 0 and below 1", train.main, "--beta2", "1"),
        ("--block_size must be at least 1", train.main, "--block_size", "0"),
        ("--seed must be 0 or larger", sample.main, "--seed", "100000000000000"),
        ("--temperature must be 0 or at least 0.001", sample.main, "--temperature", "1e-40"),
        ("cannot write .*ckpt.pt/.*: ", train.main, *small, "--data", trained / "text.txt", "--out", ckpt),
        ("cannot read tokens from .*train.bin", train.main, *small, "--out", out, "--data", tmp_path / "bins"),
        ("vocabulary of 257 is too small for the tokenizer gpt2", convert.main, "--ckpt", trained, "--tokenizer", "gpt2"),
        ("block_size 99 is longer than the checkpoint's 16", train.main, *small, "--out", out, "--init", ckpt, "--block_size", "99"),
    ]:  # fmt: skip
        line = refused(main, *arguments)
        assert re.search(message, line), f"{arguments}: {line}"
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: (_ for _ in ()).throw(ConnectionError("no route")))
    assert "connect to the internet once, or set TIKTOKEN_CACHE_DIR" in refused(train.main, *small, "--out", out, "--tokenizer", "gpt2")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("no route")))
    assert "connect to the internet, or download it" in refused(train.main, *small, "--out", out, "--init", "gpt2")
    assert not (tmp_path / "executed").exists() and not (out / "ckpt.pt").exists()
    assert {p: p.read_bytes() for p in before} == before


def test_a_loss_that_is_not_finite_stops_training_and_spares_the_checkpoint(trained, tmp_path):
    shutil.copy(trained / "ckpt.pt", tmp_path)
    before = (tmp_path / "ckpt.pt").read_bytes()
    for every in ("100", "1"):  # the second is caught by the evaluation right after the step that broke the weights
        line = refused(train.main, "--init", "resume", "--out", tmp_path, "--steps", "40", "--lr", "1e30", "--warmup", "0", "--eval_every", every)
        assert re.search(r"step 3\d: .*loss .*: not finite.*try a lower --lr", line)
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    poisoned = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    poisoned["model"]["transformer.wte.weight"][:] = math.nan
    torch.save(poisoned, tmp_path / "nan.pt")
    assert "weights that are not finite" in refused(convert.main, *CONVERT, "--ckpt", tmp_path / "nan.pt", "--data", trained / "text.txt", "--out", tmp_path)
    line = refused(convert.main, *CONVERT, "--ckpt", trained, "--out", tmp_path, "--lr", "1e20")
    assert "routers: the loss is not finite at step" in line
    assert not (tmp_path / "d2dmoe.pt").exists()


def script(name, *arguments, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, str(HERE / name), *map(str, arguments)], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_first_and_says_how_to_resume(trained, tmp_path, number):
    arguments = [*TINY, "--data", trained / "text.txt", "--out", tmp_path, "--steps", "100000", "--eval_every", "10"]
    process = script("train.py", *arguments)
    for line in process.stdout:
        if re.match(r" +20 ", line):
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in err
    step = int(re.search(r"stopped at step (\d+) and saved; go on with: python train.py --init resume --out", out)[1])
    assert step >= 20 and torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"] == step


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
def test_a_full_disk_leaves_the_old_checkpoint_and_says_why(trained, tmp_path):
    import resource

    shutil.copy(trained / "ckpt.pt", tmp_path)
    before = (tmp_path / "ckpt.pt").read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # bytes: more than the tokens, less than a checkpoint
    process = script("train.py", "--init", "resume", "--out", tmp_path, "--steps", "40", preexec_fn=limit)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in err
    assert re.fullmatch(r"cannot write .*ckpt.pt: .*; what was there before is untouched", err.strip()), err
    assert (tmp_path / "ckpt.pt").read_bytes() == before and not list(tmp_path.glob("*.tmp"))


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
def test_a_reader_that_goes_away_ends_sampling_in_one_line(trained):
    process = script("sample.py", "--ckpt", trained, "--max_new_tokens", "5000", "--device", "cpu")
    process.stdout.read(1)
    process.stdout.close()
    process.stdout = None
    assert process.communicate(timeout=60)[1].strip() == "cannot write the text: Broken pipe" and process.returncode == 1


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("name", ["train.py", "convert.py"])
def test_killed_at_random_there_is_no_checkpoint_or_a_whole_one(trained, tmp_path, name):
    """A child is forked from a process that has imported everything, so that a kill costs a fraction of a second."""
    for name_ in ("ckpt.pt", "text.txt"):
        shutil.copy(trained / name_, tmp_path)
    train_arguments = [*TINY, "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run"), "--steps", "1000000", "--eval_every", "1", "--eval_windows", "1"]
    convert_arguments = [*CONVERT, "--ckpt", str(tmp_path), "--out", str(tmp_path / "run"), "--taus", "1", "--steps", "2"]
    code = f"""
import os, sys, time, random, signal
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, {str(HERE)!r})
import torch, torch._dynamo, train, convert  # the optimizer would import _dynamo in every child
torch.set_num_threads(1)
draw = random.Random(1)
for trial in range({10 * LONG}):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        while True:
            if {name == "train.py"}:
                train.main({train_arguments!r} + (["--init", "resume"] if os.path.exists({str(tmp_path / "run/ckpt.pt")!r}) else []))
            else:
                convert.main({convert_arguments!r})
    time.sleep(0.2 + 2 * draw.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    path = {str(tmp_path / "run")!r} + ("/ckpt.pt" if {name == "train.py"} else "/d2dmoe.pt")
    if os.path.exists(path):
        checkpoint = train.load_checkpoint(path)
        train.build_model(checkpoint, path)
        print("whole", checkpoint.get("step", 0), flush=True)
    else:
        print("none", flush=True)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300 * LONG)
    assert result.returncode == 0, result.stderr[-2000:]
    lines = result.stdout.splitlines()
    assert len(lines) == 10 * LONG and lines.count("none") < 5 * LONG, result.stderr[-2000:]
    if name == "train.py":
        steps = [int(line.split()[1]) for line in lines if line != "none"]
        assert steps == sorted(steps) and steps[-1] > steps[0]  # each resumed from the one before


def test_corrupted_checkpoints_are_refused_or_load_to_the_same_values(trained, tmp_path):
    draw = random.Random(0)
    good = train.load_checkpoint(trained, "d2dmoe.pt")
    raw = (trained / "d2dmoe.pt").read_bytes()
    path, marker, refusals = tmp_path / "c.pt", tmp_path / "executed", 0

    def edited():
        """A file written by torch.save whose content is wrong"""
        c = {**good, "model": dict(good["model"]), "config": dict(good["config"])}
        name = draw.choice(list(c["model"]))
        how = draw.randrange(7)
        if how == 0:
            del c["model"][name]
        elif how == 1:
            c["model"][name] = c["model"][name][..., :-1]
        elif how == 2:
            c["model"][name] = draw.choice([None, "text", 3, [1.0]])
        elif how == 3:
            c["config"][draw.choice(["n_layer", "n_embd", "vocab_size", "block_size", "num_experts", "router_width"])] = draw.choice([0, -1, 3, 10**9, "4", None, 2.5])
        elif how == 4:
            del c[draw.choice(["model", "config"])]
        elif how == 5:
            c[draw.choice(["model", "config"])] = draw.choice([None, [], "x", 5])
        else:
            c["extra"] = Evil(marker)
        torch.save(c, path)

    for trial in range(210 * LONG):
        kind = trial % 3
        if kind == 0:
            path.write_bytes(raw[: draw.randrange(len(raw))])
        elif kind == 1:
            flipped = bytearray(raw)
            for _ in range(draw.choice([1, 1, 3, 50])):
                flipped[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
            path.write_bytes(flipped)
        else:
            edited()
        try:
            model = train.build_model(train.load_checkpoint(path), path)
        except SystemExit as end:
            refusals += 1
            assert isinstance(end.code, str) and "\n" not in end.code and str(path) in end.code
        else:
            assert kind != 2, "wrong content was accepted"
            assert_same_weights(model.state_dict(), good["model"])
    assert refusals > 150 * LONG and not marker.exists()


def test_random_command_lines_have_a_clear_outcome(trained, tmp_path, capsys, monkeypatch):
    draw = random.Random(0)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: (_ for _ in ()).throw(ConnectionError()))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: (_ for _ in ()).throw(ConnectionError()))
    text, numbers = str(trained / "text.txt"), ["0", "1", "2", "3", "8", "-1", "nan", "1e9", "x", ""]
    options = {
        train.main: {
            "--init": ["scratch", "resume", "gpt2", str(trained), "nowhere"], "--data": [text, "nowhere", str(tmp_path)], "--tokenizer": ["bytes", "gpt2", "x"],
            "--n_layer": ["1", "0", "x"], "--n_head": ["1", "3"], "--n_embd": ["8", "7"], "--block_size": ["8", "0", "-3", "4000"], "--activation": ["relu", "gelu", "x"],
            "--penalty": ["hoyer", "l1", "none"], "--alpha": numbers, "--batch_size": ["1", "3", "0"], "--grad_accum": ["1", "2", "-1"], "--lr": numbers,
            "--warmup": ["0", "5", "-1"], "--grad_clip": ["0", "1", "inf"], "--eval_every": ["1", "0"], "--eval_windows": ["1", "5"], "--dtype": ["float32", "bfloat16", "x"],
            "--seed": numbers, "--no_bias": [None], "--preset": ["default"], "--bogus": ["1"],
        },
        convert.main: {
            "--num_experts": ["4", "5", "0", "64", "x"], "--expert_size": ["4", "3", "64"], "--attention": [None], "--split": ["weights", "coactivation", "x"],
            "--router_target": ["norm", "sqrt", "x"], "--router_width": ["1", "0", "5"], "--baseline": ["none", "moefication"], "--batch_size": ["1", "2", "0"], "--lr": numbers,
            "--taus": ["0", "0.5", "2", "x"], "--seed": numbers, "--data": [text, "nowhere"], "--tokenizer": ["bytes", "gpt2"], "--device": ["cpu", "toaster"],
        },
        sample.main: {
            "--tau": numbers, "--prompt": ["", "ab", "\u00e9\U0001f600", "x" * 40, "<|endoftext|>"], "--num_samples": ["1", "2", "0"], "--temperature": numbers,
            "--top_k": numbers, "--color": ["always", "never", "x"], "--seed": numbers, "--device": ["cpu", "toaster"],
        },
    }  # fmt: skip
    outcomes = {"done": 0, "refused": 0}
    for trial in range(120 * LONG):
        main = draw.choice(list(options))
        arguments = []
        for option in draw.sample(list(options[main]), draw.randint(1, 3)):
            value = draw.choice(options[main][option])
            arguments += [option] if value is None else [option, value]
        out = str(tmp_path / f"out{trial}")
        base = {
            train.main: [*TINY, "--data", text, "--steps", "1", "--out", out], convert.main: [*CONVERT, "--ckpt", str(trained), "--steps", "1", "--taus", "0.9", "--out", out, "--num_experts", "8"],
            sample.main: ["--ckpt", str(trained), "--max_new_tokens", "3", "--device", "cpu"],
        }[main]  # fmt: skip
        try:
            main(base + arguments)
            outcomes["done"] += 1
        except SystemExit as end:
            message = end.code if isinstance(end.code, str) else capsys.readouterr().err.strip().splitlines()[-1]
            assert end.code != 0 and message and "Traceback" not in message and "\n" not in message.strip(), (arguments, message)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 15 * LONG, outcomes
