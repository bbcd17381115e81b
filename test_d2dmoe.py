"""Tests, in the order of the files: kernels, d2dmoe, train, convert, sample, then all of it under failure. `pytest -q`

They need no GPU, no network and no files but these: Triton's kernels run in its interpreter and are compiled ahead of time.
D2DMOE_LONG=1 makes the kill and fuzz sweeps ten times longer.
"""

import argparse
import ast
import csv
import dataclasses
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shlex
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
from d2dmoe import GPT, DynamicKMoE, GPTConfig, Router, dynamic_k, top_k

torch.set_num_threads(1)  # what else runs on the machine would slow two threads far more than one

HERE = Path(d2dmoe.__file__).resolve().parent
PYTHONPATH = os.pathsep.join([str(HERE), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).rstrip(os.pathsep)
LONG = 10 if os.environ.get("D2DMOE_LONG") == "1" else 1
needs_triton = pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def signal_handlers_stay():
    """train.main takes over SIGINT, SIGTERM and SIGHUP, and a test that ends it early must not leave pytest without them."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))}
    yield
    for s, handler in handlers.items():
        signal.signal(s, handler)


# ---------------------------------------------------------------------------------------------------------------------
# Helpers


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


def tiny_config(**changes):
    return GPTConfig(**{"block_size": 16, "vocab_size": 257, "n_layer": 2, "n_head": 2, "n_embd": 16} | changes)


def tiny_dense(seed=0, scale=6.0, **changes):
    """A random model whose weights are large enough for its layers to matter, in eval mode"""
    torch.manual_seed(seed)
    model = GPT(tiny_config(**changes))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale) if p.dim() > 1 else p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def with_projection_mlps(dense, seed=0):
    """The dense model with projection MLPs that nobody trained"""
    torch.manual_seed(seed)
    model = GPT(dataclasses.replace(dense.config, projections="mlp"))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.load_state_dict(dense.state_dict(), strict=False)
    return model.eval()


def tiny_moe(dense, num_experts=8, seed=0, **changes):
    """The dense model, or the one with projection MLPs, split; with routers as they are drawn"""
    torch.manual_seed(seed)
    if dense.config.projections == "mlp":
        changes = dict(projections="moe", projection_experts=4, projection_router_width=3) | changes
    moe = GPT(dataclasses.replace(dense.config, **dict(num_experts=num_experts, router_width=4) | changes))
    convert.split_model(dense, moe, None, seed=0)
    return moe.eval()


def write_text(path, words=6000, seed=0):
    draw = random.Random(seed)
    path.write_text(" ".join(draw.choice(["to", "be", "or", "not", "that", "is", "the", "question", "\n"]) for _ in range(words)))
    return path


TINY = "--n_layer 2 --n_head 2 --n_embd 16 --block_size 16 --batch_size 4 --eval_every 10 --eval_windows 8 --warmup 2 --device cpu".split()
CONVERT = "--num_experts 8 --router_width 4 --steps 20 --eval_windows 8 --taus 1 0.9 0.5 --device cpu".split()


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a text (text.txt), its tokens (train.bin, val.bin), a tiny trained model (ckpt.pt) and its conversion
    (d2dmoe.pt, cost_vs_loss.csv). Tests only read it."""
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


def refused(main, *arguments):
    """Calls a script's main, or a function with its arguments, and returns the one sentence that it raises."""
    with pytest.raises((ValueError, OSError)) as error:
        main([str(a) for a in arguments] if main in (train.main, convert.main, sample.main) else arguments[0])
    line = str(error.value)
    del error  # its traceback keeps main's variables alive, and among them the lock on a folder
    assert line and "\n" not in line
    return line


class Evil:
    """A pickle that creates a file when it is loaded"""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def script(name, *arguments, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | options.pop("env", {})
    return subprocess.Popen(
        [sys.executable, str(HERE / name), *map(str, arguments)], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# kernels.py


ODD_SHAPES = [(0, 16, 3, 8), (1, 33, 1, 5), (1, 40, 7, 24), (2, 64, 4, 64), (17, 40, 3, 24), (17, 48, 1, 72), (40, 20, 5, 3)]  # N d E h
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
    paths = [kernels.expert_ffn, kernels.masked_ffn, kernels.dense_ffn, kernels.grouped_ffn, kernels.sampled_ffn]
    paths += [kernels.triton_ffn] if kernels.triton else []
    for activation in kernels.ACTIVATIONS:
        layer = kernels.random_layer(N, d, E, h, torch.float32, "cpu")
        expected = loops(*layer, executed, activation)
        for path in paths:
            assert_close(path(*layer, executed, activation), expected, 1e-5)
            if executed.all():
                assert_close(path(*layer, None, activation), expected, 1e-5)
        if N == 1:
            experts = executed[0].nonzero()[:, 0].tolist()
            assert_close(kernels.looped_ffn(*layer, experts, activation), expected, 1e-5)


def test_the_cpu_takes_each_path_where_it_pays(monkeypatch):
    torch.manual_seed(0)
    taken = []
    for name in ("masked_ffn", "dense_ffn", "sampled_ffn", "looped_ffn", "grouped_ffn"):
        path = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, path=path, name=name: taken.append(name) or path(*a))
    for N, d, E, h, share, expected in (
        (1, 512, 16, 128, 0.25, "sampled_ffn"),
        (4, 512, 16, 128, 0.1, "sampled_ffn"),
        (1, 64, 16, 16, 0.1, "looped_ffn"),
        (1, 64, 16, 16, 0.9, "dense_ffn"),
        (4, 512, 16, 128, 0.9, "dense_ffn"),
        (512, 256, 8, 128, 0.1, "grouped_ffn"),
        (512, 256, 8, 128, 1.0, "dense_ffn"),
        (512, 16, 32, 4, 0.1, "dense_ffn"),  # a call costs more than a tiny expert saves
    ):
        layer, executed = kernels.random_layer(N, d, E, h, torch.float32, "cpu"), kernels.random_mask(N, E, share, "cpu")
        y = kernels.expert_ffn(*layer, executed, "gelu")
        assert taken == [expected], (N, d, E, h, share)
        assert_close(y, kernels.masked_ffn(*(t.double() for t in layer), executed, "gelu"), 1e-5)
        taken.clear()


def test_gradients_reach_inputs_and_weights():
    torch.manual_seed(0)
    layer = [t.double().requires_grad_() for t in kernels.random_layer(5, 6, 3, 4, torch.float32, "cpu")]
    executed = torch.rand(5, 3) < 0.5
    for activation in kernels.ACTIVATIONS:
        assert torch.autograd.gradcheck(lambda *t: kernels.expert_ffn(*t, executed, activation), layer)


def test_weights_other_than_contiguous_float32():
    torch.manual_seed(0)
    layer, executed = kernels.random_layer(1, 64, 4, 128, torch.float32, "cpu"), torch.tensor([[True, False, True, True]])
    expected = kernels.masked_ffn(*(t.double() for t in layer), executed, "relu")
    for dtype, tolerance in {torch.bfloat16: 2e-2, torch.float64: 1e-6}.items():
        y = kernels.expert_ffn(*(t.to(dtype) for t in layer), executed, "relu")
        assert y.dtype == dtype
        assert_close(y, expected, tolerance)
    strided = [torch.stack([t, t], -1)[..., 0] for t in layer]
    assert_close(kernels.expert_ffn(*strided, executed, "relu"), expected, 1e-5)


def test_dtypes_mixed_by_autocast():
    torch.manual_seed(0)
    for N in (1, 40):
        x, *weights = kernels.random_layer(N, 64, 4, 128, torch.float32, "cpu")
        executed = kernels.random_mask(N, 4, 0.5, "cpu")
        expected = loops(x, *weights, executed, "relu")
        assert kernels.expert_ffn(x.bfloat16(), *weights, executed, "relu").dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            for given in (x, x.bfloat16()):
                assert_close(kernels.expert_ffn(given, *weights, executed, "relu").float(), expected, 2e-2)
                assert kernels.linear(given, weights[0][0]).dtype == torch.bfloat16
        if kernels.triton:
            assert_close(kernels.triton_ffn(x.bfloat16().float(), *weights, executed, "relu"), expected, 2e-2)


def test_unknown_activation_is_an_error():
    layer = kernels.random_layer(2, 8, 2, 4, torch.float32, "cpu")
    with pytest.raises(ValueError, match="must be one of relu, gelu, gelu_tanh, not 'swish'"):
        kernels.expert_ffn(*layer, torch.ones(2, 2, dtype=torch.bool), "swish")


def test_linear_is_f_linear(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    torch.manual_seed(0)
    split, rule = [], kernels.reading_is_slow
    monkeypatch.setattr(kernels, "reading_is_slow", lambda *a: split.append(rule(*a)) or split[-1])
    for out, rows, bias in itertools.product((1, 3, 24, 1024, 1031, 50257), ((), (0,), (1,), (1, 1), (2, 3), (40,)), (True, False)):
        if out == 50257 and rows not in ((1,), (2, 3)):
            continue
        x, w, b = torch.randn(*rows, 96), torch.randn(out, 96), torch.randn(out) if bias else None
        assert torch.allclose(kernels.linear(x, w, b), F.linear(x, w, b), atol=1e-4)
    assert set(split) == ({True, False} if torch.backends.mkl.is_available() else {False})
    split.clear()
    x, w, b = torch.randn(3, 128), torch.randn(1031, 128, requires_grad=True), torch.randn(1031, requires_grad=True)
    mine, theirs = (torch.autograd.grad(f(x, w, b).square().sum(), (w, b)) for f in (kernels.linear, F.linear))
    assert all(map(torch.equal, mine, theirs))
    x, w = torch.randn(2, 128, dtype=torch.float64, requires_grad=True), torch.randn(1024, 128, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: kernels.linear(x, w[:5]), x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kernels.linear(x.float(), w.float()), F.linear(x.float(), w.float()))
    assert not any(split)


def test_linear_in_every_mode_after_inference_mode():
    x, w, b = torch.randn(1, 64), torch.randn(7777, 64), torch.randn(7777)
    expected = F.linear(x, w, b)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):  # what the first call keeps serves the others
        with mode():
            assert torch.allclose(kernels.linear(x, w, b), expected, atol=1e-4)


def test_compiles_and_exports_whole():
    layer, executed = kernels.random_layer(1, 128, 4, 256, torch.float32, "cpu"), torch.tensor([[True, False, True, False]])

    class Model(torch.nn.Module):
        def forward(self, x, executed):
            return kernels.linear(kernels.expert_ffn(x, *layer[1:], executed, "relu"), layer[3].flatten(0, 1))

    model, x = Model(), layer[0]
    with torch.no_grad():
        expected = model(x, executed)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x, executed), expected, atol=1e-4)
        for strict in (True, False):
            exported = torch.export.export(model, (x, executed), strict=strict).module()
            assert torch.allclose(exported(x, executed), expected, atol=1e-4)
            assert torch.allclose(exported(x, ~executed), model(x, ~executed), atol=1e-4)  # the mask is data, not a constant


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
def test_triton_random_sweep(bfloat16_interpreter, monkeypatch):
    """Decoding and prefill, and prefill in chunks; twice, bit for bit the same"""
    draw = random.Random(0)
    torch.manual_seed(0)
    for trial in range(40):
        N, d, E, h = draw.choice([1, 2, 5, 16, 17, 63, 140]), draw.randint(1, 150), draw.randint(1, 4), draw.randint(1, 140)
        monkeypatch.setattr(kernels, "PARTIAL_BYTES", draw.choice([1 << 28, 1 << 17]))
        dtype, activation = draw.choice(list(kernels.TOLERANCE)), draw.choice(list(kernels.ACTIVATIONS))
        layer = kernels.random_layer(N, d, E, h, dtype, "cpu")
        executed = torch.rand(N, E) < draw.random()
        y = kernels._triton_ffn(*layer, executed, activation)  # triton_ffn without its way out to dense_ffn
        assert y.dtype == dtype
        assert trial % 4 or torch.equal(y, kernels._triton_ffn(*layer, executed, activation))
        assert_close(y, kernels.masked_ffn(*(t.double() for t in layer), executed, activation), kernels.TOLERANCE[dtype])


@needs_triton
def test_chunks_are_even_and_partial_rows_within_their_budget():
    for N, row in itertools.product((1, 17, 2048, 16384, 100000), (2, 36864, 1 << 20, 1 << 29)):
        size = kernels.chunk_size(N, row)
        assert 1 <= size <= 8192 and (size * row <= kernels.PARTIAL_BYTES or size == 1)
        assert size * (-(-N // size) - 1) < N <= size * -(-N // size)


@needs_triton
def test_triton_works_under_torch_compile_without_a_graph_break():
    layer = kernels.random_layer(3, 16, 4, 8, torch.float32, "cpu")
    executed = torch.rand(3, 4) < 0.5
    model = lambda x: kernels.triton_ffn(x.relu(), *layer[1:], executed, "relu") + 1
    with torch.no_grad():
        assert torch.allclose(torch.compile(model, fullgraph=True, backend="aot_eager")(layer[0]), model(layer[0]))
    torch.library.opcheck(kernels._triton_op, (*layer, executed, "relu"))


def compile_ahead_of_time(arch):
    """Compiles the kernels for a GPU that need not be there; asserts what the machine code must show."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    precision, k = {"PRECISION": "ieee"}, kernels

    def build(kernel, types, constants, ones=()):
        """types by the kernel's argument names, in order; pointers and sizes divisible by 16, `ones` are 1 as in decoding"""
        options = {o: constants[o] for o in ("num_warps", "num_stages") if o in constants}
        constants = {n: v for n, v in constants.items() if n not in options} | dict.fromkeys(ones, 1)
        names = [p.name for p in kernel.params]
        signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
        attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants and n not in ("N", "S")}
        built = triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)
        if "amdgcn" in built.asm:
            assert built.metadata.shared <= 64 << 10, "more than a workgroup's LDS"
            return int(re.search(r"ScratchSize: (\d+)", built.asm["amdgcn"])[1]), built.asm["amdgcn"]
        limit = {75: 64, 80: 163, 90: 227, 100: 227, 120: 99}[arch] << 10
        assert built.metadata.shared <= limit, f"{kernel.__name__}: {built.metadata.shared} bytes of shared memory"
        cubin = Path(os.environ["TRITON_CACHE_DIR"], "kernel.cubin")
        cubin.write_bytes(built.asm["cubin"])
        report, sass = (
            subprocess.run([tool, *flag, cubin], capture_output=True, text=True, check=True).stdout for flag in (["-res-usage"], ["-sass"])
        )
        return int(re.search(r"STACK:(\d+)", report)[1]), sass

    build(k._group_tokens, {"executed_ptr": "*i1", "tokens_ptr": "*i32", "counts_ptr": "*i32"}, {"BLOCK": 8192, "num_warps": 8})
    # Turing has neither bfloat16 nor, in Triton, tensor cores: it only decodes, and however well.
    for dtype, activation in [("fp32", "relu"), *itertools.product(["fp16" if arch == 75 else "bf16"], ("relu", "gelu"))]:
        types = dict.fromkeys(("x_ptr", "w1_ptr", "b1_ptr", "w2_ptr", "a_ptr", "y_ptr", "partial_ptr"), f"*{dtype}")
        types |= {"executed_ptr": "*i1", "tokens_ptr": "*i32", "counts_ptr": "*i32"}
        act, decode = {"ACTIVATION": activation}, precision | {"BLOCK_E": 128, "BLOCK_N": k.DECODE_TOKENS}
        config = k.FLOAT32 if dtype == "fp32" else k.HALF
        builds = [] if arch == 75 else [(k._prefill_experts, precision | act | config["experts"], ())]
        if activation == "relu":
            builds += [(k._prefill_sum, {"BLOCK_D": 1024, "num_warps": 4}, ("S",))]
            for ones in ((), ("N",)):
                builds += [(k._decode_first, decode | act | config["first"], ones), (k._decode_second, decode | config["second"], ones)]
        for kernel, constants, ones in builds:
            spilled, code = build(kernel, types, constants, ones)
            if arch == 75:
                continue
            name = f"{arch} {dtype} {activation} {kernel.__name__} {ones}: "
            assert spilled <= (64 if dtype == "fp32" else 0), name + f"{spilled} bytes of a thread's registers spilled"
            if dtype == "fp32" or kernel is k._prefill_sum:
                continue
            assert re.search(r"HMMA|HGMMA|UTCHMMA|v_mfma", code), name + "no matrix instructions"
            if arch in (80, 90, 100, 120):
                assert "LDGSTS.E.BYPASS.128" in code, name + "weights are not loaded by 16 bytes"
            if arch == 90 and kernel is k._prefill_experts:
                assert "HGMMA" in code and "STG.E.128" in code, name + "no wgmma, or rows not stored by 16 bytes"


@needs_triton
def test_the_kernels_compile_ahead_of_time(tmp_path):
    # In processes of their own: here the kernels belong to the interpreter.
    runs = []
    for i, archs in enumerate(((75, 80, 90), (100, 120, "gfx942"))):
        script = f"import {__name__} as t; [t.compile_ahead_of_time(arch) for arch in {archs}]"
        environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / str(i)), "PYTHONPATH": PYTHONPATH, "TRITON_INTERPRET": "0"}
        runs.append(subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE, text=True))
    for run in runs:
        _, errors = run.communicate()
        assert run.returncode == 0, errors[-2000:]


def test_the_benchmark_checks_first_and_then_measures(capsys, monkeypatch):
    real = kernels.benchmark
    small = lambda device, dtype, d, E, h, tokens, repeats=1: real(device, dtype, 32, 4, 8, tokens[:2], 1)
    monkeypatch.setattr(kernels, "benchmark", small)  # the shapes of a second
    monkeypatch.setattr(kernels, "ACTIVATIONS", {"relu": F.relu})
    monkeypatch.setattr(kernels, "CACHE_BYTES", 1 << 16)
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--device", "cpu"])
    kernels.main()
    out = capsys.readouterr().out
    assert {line.split()[1] for line in out.splitlines() if line.startswith("check")} == {
        "masked_ffn", "dense_ffn", "sampled_ffn", "looped_ffn", "grouped_ffn", "expert_ffn",
    }  # fmt: skip
    rows = re.findall(r"^ +(\d+) +([\d.]+)% +([\d.]+) +([\d.]+) +[\d.]+x$", out, flags=re.M)
    assert [(n, share) for n, share, _, _ in rows] == [(n, share) for n in ("1", "4") for share in ("100.0", "50.0", "25.0", "25.0")]
    assert [int(d) for d in re.findall(r"^ +(\d+) (?: *[\d.]+x){8}$", out, flags=re.M)] == [128, 256, 384, 512, 768, 1024]
    monkeypatch.setattr(kernels, "grouped_ffn", lambda x, *_: torch.ones_like(x))
    with pytest.raises(ArithmeticError, match="_ffn is wrong in torch.float32"):
        kernels.main()
    if not torch.cuda.is_available():
        monkeypatch.setattr(sys, "argv", ["kernels.py", "--device", "cuda"])
        with pytest.raises(SystemExit, match="needs a GPU that torch sees"):
            kernels.main()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernels_on_this_gpu():
    """float64 reference, equal bits, no synchronization, and CUDA graphs that replay on other masks; in a process of its own"""
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "TRITON_INTERPRET": "0"}
    script = """
import torch, kernels as k
k.check("cuda")
for N in (1, 16, 300):
    layer = k.random_layer(N, 256, 8, 64, torch.bfloat16, "cuda")
    mask = k.random_mask(N, 8, 0.5, "cuda")
    assert torch.equal(k.triton_ffn(*layer, mask, "relu"), k.triton_ffn(*layer, mask, "relu"))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    k.triton_ffn(*layer, mask, "relu")
    torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = k.triton_ffn(*layer, mask, "relu")
    for share in (0.1, 0.9):
        mask.copy_(k.random_mask(N, 8, share, "cuda"))
        graph.replay()
        assert k.relative_error(y, layer, mask, "relu") < 1e-2
"""
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


# ---------------------------------------------------------------------------------------------------------------------
# d2dmoe.py: the formulas


def penalty_of(z, activation, penalty):
    return d2dmoe.sparsity_penalty(z, kernels.ACTIVATIONS[activation](z), activation, penalty)


def plain_hoyer(a):
    return (a.sum(-1) ** 2 / (a**2).sum(-1).clamp(min=1e-12)).mean()


def test_square_hoyer_and_l1_by_hand():
    a = torch.tensor([[3.0, 0.0, 4.0, 0.0], [2.0, 2.0, 2.0, 2.0], [0.0, 5.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.allclose(d2dmoe.square_hoyer(a), torch.tensor([49 / 25, 4.0, 1.0, 0.0]), atol=1e-5)
    assert torch.allclose(d2dmoe.square_hoyer(1e-3 * a), d2dmoe.square_hoyer(a), atol=1e-4)  # scaling does not lower it
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


def test_the_penalty_is_computed_in_training_and_not_in_evaluation(monkeypatch):
    for activation, penalty in (("relu", "hoyer"), ("relu", "l1"), ("gelu", "hoyer")):
        dense, inputs, idx = tiny_dense(activation=activation, penalty=penalty).train(), [], torch.randint(257, (2, 16))
        _, penalties = dense(idx)
        dense.hidden(idx, inputs=inputs)
        for block, read, value in zip(dense.transformer.h, inputs, penalties, strict=True):
            z = read @ block.mlp.c_fc.weight.t() + block.mlp.c_fc.bias
            a = z.relu() if activation == "relu" else z.clamp(min=-10) + 10
            assert torch.isclose(value, plain_hoyer(a) if penalty == "hoyer" else a.sum(-1).mean(), rtol=1e-4)
    monkeypatch.setattr(d2dmoe, "sparsity_penalty", lambda *_: pytest.fail("a penalty that nobody reads was computed"))
    assert all(value.isnan() for value in dense.eval()(idx)[1])


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
    examples = torch.tensor([[8, 3.9, 0.5, 0.3], [2, 1.9, 1.8, 1.7]])
    assert [dynamic_k(examples, tau).sum(-1).tolist() for tau in (0.95, 0.9, 0.5)] == [[3, 4], [2, 4], [1, 4]]
    assert dynamic_k(torch.zeros(2, 3), 0.0).any(-1).all()  # a router that predicts nothing still runs an expert
    for tau in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="tau must be between 0 and 1"):
            dynamic_k(norms, tau)


@pytest.mark.parametrize("gate", [partial(dynamic_k, tau=0.9), partial(dynamic_k, tau=1), partial(top_k, k=2)], ids=str)
def test_a_router_that_predicts_nan_or_infinity_still_runs_an_expert(gate):
    norms = torch.rand(5, 6)
    norms[0], norms[1, 2], norms[2, 3], norms[3] = math.nan, math.nan, math.inf, math.inf
    assert gate(norms).any(-1).all()
    moe = tiny_moe(tiny_dense())
    with torch.no_grad():
        moe.layers()[0].router.fc2.weight[3] = math.nan
    assert all(executed.any(-1).all() for executed in moe(torch.randint(257, (2, 16)), gate)[1])


def test_top_k_takes_the_k_largest():
    norms = torch.tensor([[0.1, 0.5, 0.3], [0.9, 0.2, 0.4]])
    assert top_k(norms, 2).tolist() == [[False, True, True], [True, False, True]]
    assert (top_k(torch.zeros(4, 6), 3).sum(-1) == 3).all()  # ties too
    for k in (0, 4):
        with pytest.raises(ValueError, match="k must be between"):
            top_k(norms, k)


def test_routers_are_two_layers_without_bias():
    torch.manual_seed(0)
    x = torch.randn(5, 6)
    for router, inner, outer in (
        (Router(6, 4, 3), torch.relu, torch.abs), (Router(6, 4, 3, power=0.5), torch.relu, torch.square),
        (Router(6, 4, 3, power=2.0), torch.relu, lambda r: r.abs().sqrt()), (d2dmoe.MoEficationRouter(6, 4, 3), torch.tanh, torch.sigmoid),
    ):  # fmt: skip
        assert [tuple(p.shape) for p in router.parameters()] == [(4, 6), (3, 4)]
        raw = inner(x @ router.fc1.weight.t()) @ router.fc2.weight.t()
        assert torch.allclose(router(x), outer(raw), atol=1e-6) and (router(x) >= 0).all()
        assert torch.allclose(router.powered_norms(x), raw.abs()) if isinstance(router, Router) else torch.allclose(router.logits(x), raw)


def random_moe(activation="relu", router=None):
    torch.manual_seed(0)
    moe = DynamicKMoE(10, 24, 6, activation, router or Router(10, 5, 6))
    for p in moe.parameters():
        torch.nn.init.normal_(p)
    return moe.eval()


def true_norms(moe, x):
    """|W2_e act(W1_e x + b1_e)|, expert by expert"""
    a = torch.relu(torch.einsum("nd,ehd->neh", x, moe.w1) + moe.b1)
    return torch.einsum("neh,ehd->ned", a, moe.w2).norm(dim=-1)


def test_expert_norms_are_the_norms_of_the_experts_outputs():
    moe, x = random_moe(), torch.randn(7, 10)
    assert torch.allclose(moe.expert_norms(x), true_norms(moe, x), rtol=1e-4)


@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
def test_a_moe_layer_sums_what_its_gate_selects(activation):
    moe = random_moe(activation)
    x = torch.randn(2, 3, 10)
    flat = x.reshape(6, 10)
    r = (torch.relu(flat @ moe.router.fc1.weight.t()) @ moe.router.fc2.weight.t()).abs()
    for gate, expected in (
        (None, torch.ones(6, 6, dtype=torch.bool)), (partial(dynamic_k, tau=0.5), r >= 0.5 * r.amax(-1, keepdim=True)),
        (partial(top_k, k=2), r >= r.topk(2).values[:, -1:]), (lambda norms: norms < 0, torch.zeros(6, 6, dtype=torch.bool)),
    ):  # fmt: skip
        y, executed = moe(x, gate)
        assert executed.dtype == torch.bool and torch.equal(executed, expected.view(2, 3, 6))
        assert_close(y.reshape(6, 10), loops(flat, moe.w1, moe.b1, moe.w2, expected, activation) + moe.b2.double(), 1e-5)
    moe.router = None  # without a gate no router is asked
    moe(x)


# ---------------------------------------------------------------------------------------------------------------------
# d2dmoe.py: the transformer


def models():
    """Dense, with experts, and with experts in attention too"""
    dense = tiny_dense()
    return {"dense": dense, "experts": tiny_moe(dense), "attention": tiny_moe(with_projection_mlps(dense))}


def test_no_token_sees_a_later_one():
    for model in models().values():
        idx = torch.randint(257, (2, 16))
        changed = idx.clone()
        changed[:, 9:] = (changed[:, 9:] + 1) % 257
        a, b = (model(i, partial(dynamic_k, tau=0.7))[0] for i in (idx, changed))
        assert torch.allclose(a[:, :9], b[:, :9], atol=1e-5) and not torch.allclose(a[:, 9:], b[:, 9:], atol=1e-3)
    with pytest.raises(ValueError, match="17 tokens do not fit into a context of 16"):
        model(torch.zeros(1, 17, dtype=torch.long))


@pytest.mark.parametrize("changes, message", [
    (dict(n_embd=15), "must be a multiple of n_head"), (dict(n_layer=0), "must be at least 1"), (dict(num_experts=7, router_width=4), "do not divide"),
    (dict(activation="swish"), "activation must be one of"), (dict(penalty="l2"), "penalty must be"), (dict(num_experts=8), "width must be at least 1"),
    (dict(router="cube"), "router must be"), (dict(projections="moe", projection_experts=5, projection_router_width=2), "do not divide"),
    (dict(n_layer="2"), "n_layer must be of type int"), (dict(router_power=0.0), "router_power"), (dict(layer_norm_epsilon=-1.0), "layer_norm_epsilon"),
    (dict(projections="conv"), "projections must be"), (dict(num_experts=-8, router_width=4), "do not divide"), (dict(d_ff=-4), "d_ff"),
])  # fmt: skip
def test_a_config_that_cannot_be_built_says_so(changes, message):
    with pytest.raises(ValueError, match=message):
        GPT(tiny_config(**changes))


@pytest.mark.parametrize("kind", ["dense", "experts", "attention"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generate_gives_the_tokens_of_a_plain_loop(kind, temperature):
    model, gate = models()[kind], partial(dynamic_k, tau=0.6)
    prompt = torch.randint(257, (2, 5))
    out = list(d2dmoe.generate(model, prompt, 40, gate, temperature, 20, torch.Generator().manual_seed(3)))  # context 16
    generator, idx = torch.Generator().manual_seed(3), prompt
    for token, executed in out:
        logits, aux = model(idx[:, -16:], gate)
        logits = logits[:, -1]
        if temperature == 0:
            new = logits.argmax(-1, keepdim=True)
        else:
            kept = torch.where(logits >= logits.topk(20).values[:, -1:], logits, -math.inf)
            new = torch.multinomial(kept.softmax(-1), 1, generator=generator)
        assert torch.equal(new, token)
        if kind == "dense":
            assert executed == []
        else:
            assert all(torch.equal(a, e[:, -1:]) for a, e in zip(executed, aux, strict=True))
        idx = torch.cat((idx, new), dim=1)
    assert len(out) == 40


def test_generate_runs_the_module_it_is_given_and_says_what_it_cannot_do():
    model, idx, calls = models()["experts"], torch.tensor([[1, 2]]), []

    class Counting(torch.nn.Module):  # like a compiled module, it passes attributes on
        def __init__(self):
            super().__init__()
            self.config, self.lm_head = model.config, model.lm_head

        def forward(self, *args, **kwargs):
            calls.append(1)
            return model(*args, **kwargs)

    text = torch.cat([t for t, _ in d2dmoe.generate(Counting(), idx, 5, temperature=0)], 1)
    assert len(calls) == 5 and torch.equal(text, torch.cat([t for t, _ in d2dmoe.generate(model, idx, 5, temperature=0)], 1))
    assert [t.shape for t, _ in d2dmoe.generate(model, idx[:0], 2)] == [(0, 1)] * 2  # a batch of none
    assert [len(list(d2dmoe.generate(model, idx, 2, top_k_tokens=k))) for k in (None, 1, 10**6)] == [2, 2, 2]
    for changes, message in (
        (dict(idx=idx[:, :0]), "prompt is empty"), (dict(top_k_tokens=0), "top_k_tokens must be at least 1"), (dict(temperature=-1.0), "temperature must be at least 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            list(d2dmoe.generate(**dict(model=model, idx=idx, max_new_tokens=2) | changes))


def test_a_cache_can_be_filled_in_pieces():
    for model in models().values():
        idx = torch.randint(257, (2, 12))
        cache = d2dmoe.KVCache(model.config, 2)
        pieces = [model.hidden(part, cache=cache)[0] for part in idx.split([4, 1, 7], dim=1)]
        assert torch.allclose(torch.cat(pieces, dim=1), model.hidden(idx)[0], atol=1e-5) and cache.length == 12
        with pytest.raises(ValueError, match="17 tokens do not fit"):
            model.hidden(idx[:, :5], cache=cache)


def test_layers_inputs_and_aux_are_in_one_order_and_attention_is_composed_of_its_projections():
    dense = with_projection_mlps(tiny_dense())
    moe = tiny_moe(dense)
    blocks = moe.transformer.h
    assert [id(m) for m in moe.layers()] == [id(m) for b in blocks for m in (b.attn.q, b.attn.k, b.attn.v, b.attn.o, b.mlp)]
    idx, inputs = torch.randint(257, (2, 16)), []
    _, aux = moe.hidden(idx, partial(dynamic_k, tau=0.3), inputs=inputs)
    for layer, read, executed in zip(moe.layers(), inputs, aux, strict=True):
        r = (torch.relu(read @ layer.router.fc1.weight.t()) @ layer.router.fc2.weight.t()).abs()
        assert torch.equal(executed, r >= (1 - 0.3) * r.amax(-1, keepdim=True)) and not executed.all()

    x, _ = moe.hidden(idx, inputs=(inputs := []))  # all experts: the dense MLPs, around an attention written by hand
    stream = moe.transformer.wte(idx) + moe.transformer.wpe(torch.arange(16))
    for i, block in enumerate(dense.transformer.h):
        first, second, third, fourth, fifth = inputs[5 * i : 5 * i + 5]
        normed = F.layer_norm(stream, (16,), block.ln_1.weight, block.ln_1.bias)
        q, k, v = (p(normed)[0].view(2, 16, 2, 8).transpose(1, 2) for p in (block.attn.q, block.attn.k, block.attn.v))  # [B, nh, T, hs]
        scores = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(~torch.ones(16, 16, dtype=torch.bool).tril(), -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 16, 16)
        assert all(torch.allclose(t, normed, atol=1e-4) for t in (first, second, third)) and torch.allclose(fourth, mixed, atol=1e-4)
        stream = stream + block.attn.o(mixed)[0]
        normed = F.layer_norm(stream, (16,), block.ln_2.weight, block.ln_2.bias)
        assert torch.allclose(fifth, normed, atol=1e-4)
        stream = stream + block.mlp(normed)[0]
    assert torch.allclose(x, moe.transformer.ln_f(stream), atol=1e-4)


def test_flops_by_hand():
    c = tiny_config(n_layer=1, num_experts=8, router_width=4)  # d 16, d_ff 64, h 8
    dense = 2 * (4 * 16 * 16 + 2 * 10 * 16 + 2 * 16 * 64 + 16 * 257)
    assert d2dmoe.flops_per_token(c, 10) == dense
    experts = 2 * (4 * 16 * 16 + 2 * 10 * 16 + 3 * 2 * 16 * 8 + (16 * 4 + 4 * 8) + 16 * 257)
    assert d2dmoe.flops_per_token(c, 10, [3]) == experts
    c = dataclasses.replace(c, projections="moe", projection_experts=4, projection_router_width=2)  # m 8, 2 neurons an expert
    assert c.projection_width == 8
    projection = 1.5 * 2 * 16 * 2 + (16 * 2 + 2 * 4)
    every = 2 * (4 * projection + 2 * 10 * 16 + 3 * 2 * 16 * 8 + (16 * 4 + 4 * 8) + 16 * 257)
    assert d2dmoe.flops_per_token(c, 10, [1.5] * 4 + [3]) == every
    with pytest.raises(ValueError):
        d2dmoe.flops_per_token(c, 10, [3])  # one number for five layers


@pytest.mark.parametrize("d, m", [(128, 64), (256, 128), (768, 384), (1024, 512), (1280, 640), (1600, 800)])
def test_projection_width_costs_what_the_projection_costs(d, m):
    assert GPTConfig(n_embd=d).projection_width == m
    assert abs((2 * d * m + m + d) / (d * d + d) - 1) < 0.01  # parameters of d -> m -> d against d -> d


@pytest.mark.parametrize("kind", ["experts", "attention"])
@torch.no_grad()
def test_a_gated_model_compiles_and_exports_whole(kind):
    model = models()[kind]
    gated = lambda idx: model(idx, partial(dynamic_k, tau=0.7))[0]
    for T in (16, 1):
        idx = torch.randint(257, (2, T))
        torch._dynamo.reset()
        assert torch.allclose(torch.compile(gated, fullgraph=True, backend="eager")(idx), gated(idx), atol=1e-5)

    class Gated(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, idx):
            return self.model(idx, partial(dynamic_k, tau=0.7))[0]

    exported = torch.export.export(Gated(), (torch.randint(257, (2, 16)),)).module()
    idx = torch.randint(257, (2, 16))  # other tokens, other experts
    assert torch.allclose(exported(idx), gated(idx), atol=1e-5)


def test_d2dmoe_is_read_from_top_to_bottom():
    """No module-level name is used before its definition (bodies of methods aside); no dispatch on types of layers."""
    tree = ast.parse((HERE / "d2dmoe.py").read_text(encoding="utf-8"))
    defined = {}  # name: line
    for node in tree.body:
        names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
        names += [a.asname or a.name.split(".")[0] for a in getattr(node, "names", [])]
        names += [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)] if not names else []
        for name in names:
            defined.setdefault(name, node.lineno)

    def uses(node):
        if isinstance(node, ast.ClassDef):  # bases, decorators, fields and signatures, but not the bodies of methods
            inner = [n for part in node.body for n in (part.decorator_list + [part.args] if isinstance(part, ast.FunctionDef) else [part])]
            parts = node.bases + node.decorator_list + inner
        else:
            parts = [node]
        return {n for part in parts for n in ast.walk(part) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}

    early = {(n.id, n.lineno) for node in tree.body for n in uses(node) if defined.get(n.id, 0) > node.lineno}
    assert not early, f"used before defined: {sorted(early)}"
    layers = {node.name for node in tree.body if isinstance(node, ast.ClassDef)} | {"nn", "Module", "Linear"}
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) in ("isinstance", "issubclass", "type")):
        assert not layers & {n.id for n in ast.walk(call.args[-1]) if isinstance(n, ast.Name)}, ast.unparse(call)
    assert not re.search(r"NamedTuple|namedtuple|_hook\(", ast.unparse(tree))


@pytest.mark.parametrize("call", [
    lambda moe: d2dmoe.square_hoyer([1.0, 2.0]), lambda moe: dynamic_k(torch.rand(3, 4), 1.5), lambda moe: dynamic_k(None, 0.5),
    lambda moe: DynamicKMoE(10, 24, 7, "relu", Router(10, 5, 7)), lambda moe: DynamicKMoE(10, 24, 0, "relu", Router(10, 5, 1)), lambda moe: moe(torch.randn(3, 10)),
    lambda moe: moe(torch.randn(1, 3, 9)), lambda moe: Router(10, 5, 6)(torch.randn(3, 9)), lambda moe: convert.balanced_kmeans(torch.randn(10, 3), 4, seed=0),
    lambda moe: convert.balanced_kmeans(torch.randn(10, 3), 0, seed=0), lambda moe: convert.split_mlp(d2dmoe.MLP(10, 24, "relu", "none"), moe, torch.zeros(24, dtype=torch.long)),
    lambda moe: convert.split_mlp(d2dmoe.MLP(10, 20, "relu", "none"), moe, torch.arange(20) % 6), lambda moe: convert.router_loss(moe, torch.randn(3, 9)),
    lambda moe: train.evaluate(tiny_dense(), np.zeros(99, np.uint16), 0), lambda moe: train.evaluate(tiny_dense(), np.zeros(9, np.uint16), 4),
    lambda moe: train.evaluate(tiny_dense(), np.full(99, 300, np.uint16), 4), lambda moe: kernels.masked_ffn(torch.randn(3, 9), moe.w1, moe.b1, moe.w2, None, "relu"),
    lambda moe: kernels.masked_ffn(torch.randn(3, 10), moe.w1, moe.b1, moe.w2, None, "swish"),
    lambda moe: kernels.masked_ffn(torch.randn(3, 10), moe.w1, moe.b1, moe.w2, torch.ones(2, 6, dtype=torch.bool), "relu"),
])  # fmt: skip
def test_functions_raise_ordinary_exceptions_so_that_they_can_be_taught(call):
    with pytest.raises(Exception) as error:  # SystemExit is no Exception
        call(random_moe())
    assert str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# d2dmoe.py: files. Each is computed exactly or refused with the reason


def gpt2_weights(d=32, n_layer=2, d_ff=None, vocab=257, positions=16, bias=True, head=False):
    """Random weights as Hugging Face stores GPT-2's: layers are x @ W + b with W [in, out]"""
    g, d_ff = torch.Generator().manual_seed(d), d_ff or 4 * d
    normal = lambda *shape: 0.2 * torch.randn(*shape, generator=g)
    sd = {"wte.weight": normal(vocab, d), "wpe.weight": normal(positions, d), "ln_f.weight": 1 + normal(d), "ln_f.bias": normal(d)}
    for i in range(n_layer):
        for name, shape in (("attn.c_attn", (d, 3 * d)), ("attn.c_proj", (d, d)), ("mlp.c_fc", (d, d_ff)), ("mlp.c_proj", (d_ff, d))):
            sd[f"h.{i}.{name}.weight"], sd[f"h.{i}.{name}.bias"] = normal(*shape), normal(shape[1])
        for name in ("ln_1", "ln_2"):
            sd[f"h.{i}.{name}.weight"], sd[f"h.{i}.{name}.bias"] = 1 + normal(d), normal(d)
    if head:
        sd["lm_head.weight"] = normal(vocab, d)
    return {k: w for k, w in sd.items() if bias or not k.endswith("bias")}


def plain_gpt2(weights, idx, n_head, activation="gelu_tanh", epsilon=1e-5):
    """GPT-2 as its paper and its published weights define it, in float64"""
    w = {name.removeprefix("transformer."): t.double() for name, t in weights.items()}
    bias = lambda name: w.get(name + ".bias", torch.zeros((), dtype=torch.float64))
    act = {
        "relu": lambda z: z.clamp(min=0), "gelu": lambda z: 0.5 * z * (1 + torch.erf(z / math.sqrt(2))),
        "gelu_tanh": lambda z: 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    }[activation]  # fmt: skip

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * w[name + ".weight"] + bias(name)

    linear = lambda x, name: x @ w[name + ".weight"] + bias(name)
    T, d = idx.shape[1], w["wte.weight"].shape[1]
    x = w["wte.weight"][idx] + w["wpe.weight"][:T]
    for i in range(sum(name.endswith("ln_1.weight") for name in w)):
        q, k, v = (t.unflatten(-1, (n_head, -1)).transpose(1, 2) for t in linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").chunk(3, -1))
        scores = (q @ k.transpose(-1, -2) / math.sqrt(d // n_head)).masked_fill(~torch.ones(T, T).tril().bool(), -math.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"h.{i}.attn.c_proj")
        x = x + linear(act(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")), f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w.get("lm_head.weight", w["wte.weight"]).t()


def assert_computes(source, weights, **kind):
    """load_model(source) gives the logits of the plain GPT-2."""
    idx = torch.randint(len(weights["wte.weight"]), (2, len(weights["wpe.weight"])))
    expected = plain_gpt2(weights, idx, **kind)
    model = d2dmoe.load_model(source)
    assert (model(idx)[0].double() - expected).abs().max() < 1e-4 < 0.1 * expected.std()
    return model


# What transformers 5 writes for a GPT2Config with n_head 8, and two fields of older versions
HF_CONFIG = {
    "activation_function": "gelu_new", "add_cross_attention": False, "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
    "dtype": "float32", "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
    "n_embd": 32, "n_head": 8, "n_inner": None, "n_layer": 2, "n_positions": 16, "pad_token_id": None, "reorder_and_upcast_attn": False,
    "resid_pdrop": 0.1, "scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True, "summary_activation": None, "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True, "tie_word_embeddings": True, "transformers_version": "5.24.0",
    "use_cache": True, "vocab_size": 257, "n_ctx": 16, "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}  # fmt: skip


def hf_folder(folder, weights, kind="bin", **changes):
    """A folder as save_pretrained writes it: pytorch_model.bin or model.safetensors, in one file or in shards"""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (HF_CONFIG | changes).items() if v != "absent"}))
    name, save = "pytorch_model.bin", torch.save
    if kind.endswith("safetensors"):
        name, save = "model.safetensors", pytest.importorskip("safetensors.torch").save_file
    if not kind.startswith("sharded"):
        save(weights, folder / name)
        return folder
    keys, stem, suffix = list(weights), Path(name).stem, Path(name).suffix
    files = {k: f"{stem}-{i % 3 + 1:05d}-of-00003{suffix}" for i, k in enumerate(keys)}
    for file in set(files.values()):
        save({k: weights[k] for k in keys if files[k] == file}, folder / file)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    return folder


@pytest.mark.parametrize("kind", ["bin", "safetensors", "sharded bin", "sharded safetensors"])
def test_every_layout_of_a_hugging_face_folder_is_computed_exactly(kind, tmp_path):
    weights = gpt2_weights()
    masks = {"h.0.attn.bias": torch.ones(1, 1, 16, 16).tril(), "h.0.attn.masked_bias": torch.tensor(-1e4)}  # of older versions
    stored = {f"transformer.{k}": w for k, w in (weights | masks).items()}
    model = assert_computes(hf_folder(tmp_path / "a", stored, kind), weights, n_head=8)
    assert model.lm_head.weight is model.transformer.wte.weight
    one = next((tmp_path / "a").glob("*00002*"), None)
    if one is not None:
        assert re.search("does not hold a (GPT-2|model)", refused(d2dmoe.load_model, one))
        one.unlink()
        assert one.name in refused(d2dmoe.load_model, tmp_path / "a")
    else:  # the file in it, too
        assert_computes(next((tmp_path / "a").glob("*model*")), weights, n_head=8)


def test_of_tied_embedding_and_head_either_may_be_the_one_that_is_stored(tmp_path):
    weights = gpt2_weights()
    stored = {"lm_head.weight": weights["wte.weight"]} | {f"transformer.{k}": w for k, w in weights.items() if k != "wte.weight"}
    assert_computes(hf_folder(tmp_path / "a", stored), weights, n_head=8)
    assert "does not hold a GPT-2" in refused(d2dmoe.load_model, hf_folder(tmp_path / "b", stored, tie_word_embeddings=False))


@pytest.mark.parametrize("changes, reference, sizes", [
    (dict(), dict(), dict()), (dict(n_head=2), dict(n_head=2), dict()), (dict(activation_function="relu"), dict(activation="relu"), dict()),
    (dict(activation_function="gelu"), dict(activation="gelu"), dict()), (dict(n_inner=40), dict(), dict(d_ff=40)),
    (dict(layer_norm_epsilon=0.1), dict(epsilon=0.1), dict()), (dict(tie_word_embeddings=False), dict(), dict(head=True)),
    (dict(tie_word_embeddings=False, activation_function="relu", n_inner=24, n_head=4, layer_norm_epsilon=1e-3, resid_pdrop=0.0, reorder_and_upcast_attn=True),
     dict(n_head=4, activation="relu", epsilon=1e-3), dict(head=True, d_ff=24)),
    (dict(activation_function="absent", layer_norm_epsilon="absent", tie_word_embeddings="absent", n_inner="absent"), dict(), dict()),  # left out: GPT-2's
])  # fmt: skip
def test_hyper_parameters_that_weights_cannot_tell_come_from_config_json(changes, reference, sizes, tmp_path):
    weights = gpt2_weights(**sizes)
    model = assert_computes(hf_folder(tmp_path / "a", weights, **changes), weights, **dict(n_head=8) | reference)
    assert (model.lm_head.weight is model.transformer.wte.weight) != ("head" in sizes)


@pytest.mark.parametrize("changes, message", [
    (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx.* True.*not implemented"), (dict(scale_attn_weights=False), "scale_attn_weights.* False"),
    (dict(add_cross_attention=True), "add_cross_attention.* True"), (dict(activation_function="silu"), "activation_function.* .?silu"),
    (dict(model_type="gpt_neo"), "a model of type gpt_neo: only GPT-2"), (dict(model_type="absent"), "a model of type None"),
    (dict(quantization_config={"bits": 4}), "quantization_config"), (dict(auto_map={"AutoModel": "modeling.GPT"}), "auto_map"),
    (dict(pruned_heads={"0": [1]}), "pruned_heads"), (dict(n_head="absent"), "lack.* n_head"), (dict(n_head=5), "multiple of n_head"), (dict(n_head="8"), "n_head must be of type int"),
    (dict(n_layer=3), "2 blocks for n_layer 3"),
    (dict(n_inner=64), "fits its own sizes"), (dict(vocab_size=300), "fits its own sizes"), (dict(n_embd=64), "fits its own sizes"), (dict(n_positions=32), "fits its own sizes"),
    (dict(activation_function=["relu"]), "activation_function"), (dict(scale_attn_weights=None), "scale_attn_weights"),
    (dict(layer_norm_epsilon="x"), "layer_norm_epsilon must be of type"), (dict(layer_norm_epsilon=0), "layer_norm_epsilon"),
    (dict(tie_word_embeddings=True), "lm_head.weight differs from wte.weight"),
])  # fmt: skip
def test_a_hugging_face_folder_that_would_compute_something_else_is_refused_by_name(changes, message, tmp_path):
    assert re.search(message, refused(d2dmoe.load_model, hf_folder(tmp_path / "a", gpt2_weights(head=True), **dict(tie_word_embeddings=False) | changes)))


@pytest.mark.parametrize("text, message", [("{", "is not JSON"), ("[]", "does not hold a JSON object"), (None, "tell neither n_head nor the activation")])
def test_a_damaged_or_missing_config_json_is_one_line(text, message, tmp_path):
    folder = hf_folder(tmp_path / "a", gpt2_weights())
    (folder / "config.json").write_text(text) if text else (folder / "config.json").unlink()
    assert message in refused(d2dmoe.load_model, folder)


def test_without_config_json_only_published_shapes_are_taken(tmp_path, monkeypatch):
    assert all(d // n_head == 64 for (_, d), n_head in d2dmoe.GPT2_HEADS.items()) and set(d2dmoe.GPT2_HEADS) == {
        (12, 768), (24, 1024), (36, 1280), (48, 1600), (6, 768)}  # fmt: skip
    monkeypatch.setitem(d2dmoe.GPT2_HEADS, (1, 16), 4)  # as if OpenAI had published one so small
    published = gpt2_weights(16, 1, vocab=50257, positions=1024)
    torch.save(published, tmp_path / "pytorch_model.bin")
    idx = torch.randint(50257, (1, 20))
    for source in (tmp_path, tmp_path / "pytorch_model.bin", "distilgpt2"):
        monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **_: published)
        assert torch.allclose(d2dmoe.load_model(source)(idx)[0].double(), plain_gpt2(published, idx, 4), atol=1e-4)
    for wrong in (gpt2_weights(16, 1), gpt2_weights(16, 2, vocab=50257, positions=1024)):  # other vocabulary and context; other depth
        torch.save(wrong, tmp_path / "w.pt")
        assert "tell neither n_head nor the activation: give the folder" in refused(d2dmoe.load_model, tmp_path / "w.pt")
    assert d2dmoe.load_checkpoint(tmp_path)["tokenizer"] == "gpt2"
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("no route")))
    assert "connect to the internet" in refused(d2dmoe.load_model, "gpt2")
    monkeypatch.chdir(tmp_path)
    weights = gpt2_weights()
    hf_folder(tmp_path / "gpt2", weights)  # a folder of that name comes first
    assert_computes("gpt2", weights, n_head=8)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert_computes("~/gpt2", weights, n_head=8)


def nanogpt(weights, prefix="", n_head=4, **changes):
    """What nanoGPT's train.py saves"""
    d, bias = weights["wte.weight"].shape[1], "ln_f.bias" in weights
    layers = [k for k in weights if k.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))]
    state = {f"transformer.{k}": w.t().contiguous() if k in layers else w for k, w in weights.items() if k != "lm_head.weight"}
    state |= {"lm_head.weight": weights.get("lm_head.weight", weights["wte.weight"]), "transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16).tril()}
    sizes = dict(n_layer=2, n_head=n_head, n_embd=d, block_size=16, bias=bias, vocab_size=257, dropout=0.1) | changes
    return {
        "model": {prefix + k: w for k, w in state.items()}, "optimizer": {"state": {}, "param_groups": []}, "model_args": sizes, "iter_num": 7,
        "best_val_loss": torch.tensor(1.5), "config": {"dataset": "shakespeare", "dtype": "float32"},
    }  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("head", [True, False])
def test_nanogpts_checkpoints_are_computed_exactly(bias, head, prefix, tmp_path):
    weights = gpt2_weights(bias=bias, head=head)
    torch.save(nanogpt(weights, prefix), tmp_path / "ckpt.pt")
    model = assert_computes(tmp_path, weights, n_head=4, activation="gelu")
    assert (model.lm_head.weight is model.transformer.wte.weight) != head


@pytest.mark.parametrize("changes, message", [
    (dict(n_kv_head=2), "model_args set.* n_kv_head: not implemented"), (dict(rope=True), "rope"), (dict(activation="swiglu"), "activation: not implemented"),
    (dict(window=8, qk_norm=True), "qk_norm, window"), (dict(n_head=3), "multiple of n_head"), (dict(n_layer=10**9), "2 blocks for n_layer 1000000000"),
    (dict(block_size=99), "fits its own sizes"), (dict(vocab_size="257"), "vocab_size must be of type int"), (dict(dropout=0.5, flash=False), None),
])  # fmt: skip
def test_fields_of_nanogpts_forks_are_refused_by_name(changes, message, tmp_path):
    weights = gpt2_weights()
    torch.save(nanogpt(weights, **changes), tmp_path / "ckpt.pt")
    if message is None:
        assert_computes(tmp_path, weights, n_head=4, activation="gelu")
    else:
        assert re.search(message, refused(d2dmoe.load_model, tmp_path))


FIRST_EDITION = dict(
    block_size=16, vocab_size=257, n_layer=2, n_head=2, n_embd=16, bias=True, activation="relu", penalty="hoyer", num_experts=0, router_width=0,
    router_target="norm", attention_experts=0, attention_router_width=0,
)  # fmt: skip


@pytest.mark.parametrize("kind", ["dense", "experts", "attention", "moefication", "untied"])
def test_our_checkpoints_come_back_equal(kind, tmp_path):
    others = {"moefication": tiny_moe(tiny_dense(), router="moefication"), "untied": tiny_dense(tie_weights=False, activation="gelu", bias=False, d_ff=24)}
    model = (models() | others)[kind]
    d2dmoe.save_checkpoint(tmp_path / "deep/ckpt.pt", model, tokenizer="bytes", step=3)
    for source in (tmp_path / "deep", tmp_path / "deep/ckpt.pt", str(tmp_path / "deep")):
        loaded = d2dmoe.load_model(source)
        idx, gate = torch.randint(257, (2, 16)), partial(dynamic_k, tau=0.7)
        assert loaded.config == model.config and not loaded.training and torch.equal(loaded(idx, gate)[0], model(idx, gate)[0])
        assert (loaded.lm_head.weight is loaded.transformer.wte.weight) == (kind != "untied")
    assert d2dmoe.load_checkpoint(tmp_path / "deep")["step"] == 3
    d2dmoe.save_checkpoint(tmp_path / "deep/d2dmoe.pt", tiny_dense(seed=5))  # of a folder's two, the conversion
    assert torch.equal(d2dmoe.load_model(tmp_path / "deep").lm_head.weight, tiny_dense(seed=5).lm_head.weight)


def test_dense_checkpoints_of_the_first_edition_load_and_its_conversions_are_refused(tmp_path):
    dense = tiny_dense()
    torch.save({"model": dense.state_dict(), "config": FIRST_EDITION, "tokenizer": "bytes", "settings": {"lr": 1e-3}, "step": 30}, tmp_path / "ckpt.pt")
    idx = torch.randint(257, (2, 16))
    assert torch.equal(d2dmoe.load_model(tmp_path)(idx)[0], dense(idx)[0])
    torch.save({"model": tiny_moe(dense).state_dict(), "config": FIRST_EDITION | dict(num_experts=8, router_width=4)}, tmp_path / "d2dmoe.pt")
    assert "converted by an earlier version: run convert.py again" in refused(d2dmoe.load_model, tmp_path)


def foreign(tmp_path):
    """What people bring that is no checkpoint of a kind we compute: name -> (content, what they are told)"""
    weights, ours = gpt2_weights(), {"model": tiny_dense().state_dict(), "config": FIRST_EDITION}
    bare = nanogpt(weights)["model"]
    config = {k: v for k, v in FIRST_EDITION.items() if k != "activation"}
    nan = {k: w.clone() for k, w in ours["model"].items()}
    nan["transformer.wpe.weight"][0, 0] = math.nan
    no_n_head = "nanoGPT's weights without .*n_head"
    lora = {"base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": torch.zeros(8, 32)}
    return {
        "model and config of somebody else": ({"model": bare, "config": {"n_layer": 2, "n_head": 4, "n_embd": 32}}, "lack.* activation, bias, block_size, penalty, vocab_size"),
        "ours without a field": (ours | {"config": config}, "lack.* activation"),
        "ours with an unknown field": (ours | {"config": FIRST_EDITION | {"rotary": True}}, "rotary: not implemented"),
        "ours with a wrong type": (ours | {"config": FIRST_EDITION | {"n_head": 2.0}}, "n_head must be of type int"),
        "ours of other sizes": (ours | {"config": FIRST_EDITION | {"n_embd": 32}}, "fits its own sizes"),
        "ours with a block less": (ours | {"config": FIRST_EDITION | {"n_layer": 3}}, "2 blocks for n_layer 3"),
        "ours without a weight": (ours | {"model": {k: w for k, w in ours["model"].items() if "ln_f" not in k}}, "fits its own sizes"),
        "ours with a list in it": (ours | {"model": ours["model"] | {"x": [1]}}, "is not a checkpoint"),
        "ours that ties what differs": (ours | {"model": ours["model"] | {"lm_head.weight": torch.ones(257, 16)}}, "tied to wte, but their weights differ"),
        "not finite": (ours | {"model": nan}, "weights that are not finite"),
        "bare nanoGPT": (bare, no_n_head), "bare nanoGPT with a prefix": ({f"_orig_mod.{k}": w for k, w in bare.items()}, no_n_head),
        "wrapped as state_dict": ({"state_dict": bare, "epoch": 3}, no_n_head), "wrapped as model": ({"model": bare, "epoch": 3}, no_n_head),
        "wrapped as model_state_dict": ({"model_state_dict": {f"module.{k}": w for k, w in bare.items()}}, no_n_head),
        "GPT-2 alone, of no published shape": (weights, "tell neither n_head nor the activation: give the folder"),
        "another architecture": ({"model.embed_tokens.weight": torch.zeros(8, 4), "model.norm.weight": torch.zeros(4)}, "does not hold a GPT-2: it has model.embed"),
        "PEFT adapter": (lora, "PEFT adapter: merge it into its model"), "empty": ({}, "does not hold a GPT-2"),
        "list": ([1, 2], "holds a list, not a checkpoint"), "tensor": (torch.zeros(3), "holds a Tensor, not a checkpoint"),
        "whole model": (tiny_dense(), "object of d2dmoe.GPT, and loading objects can run code: save the state dict alone"),
        "Namespace inside": (ours | {"args": argparse.Namespace(lr=1)}, "object of argparse.Namespace"),
        "numpy inside": (ours | {"loss": np.float64(1.5)}, "object of numpy"),
        "code inside": (ours | {"x": Evil(tmp_path / "executed")}, "object of (builtins|io|_io).open"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", list(foreign(Path())))
def test_what_cannot_be_computed_is_refused_with_its_reason(kind, tmp_path):
    content, message = foreign(tmp_path)[kind]
    torch.save(content, tmp_path / "ckpt.pt")
    line = refused(d2dmoe.load_model, tmp_path)
    assert re.search(message, line), line
    assert str(tmp_path) in line and not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", [
    "nothing", "an empty folder", "empty file", "truncated", "a bit flipped", "picture", "pickle", "pickle with code", "folder", "adapter folder", "no package",
])  # fmt: skip
def test_what_is_no_checkpoint_is_refused_with_its_reason(kind, tmp_path, monkeypatch):
    d2dmoe.save_checkpoint(tmp_path / "good.pt", tiny_dense())
    good, path = (tmp_path / "good.pt").read_bytes(), tmp_path / "a/ckpt.pt"
    path.parent.mkdir()
    flipped = bytearray(good)
    flipped[good.index(b"transformer.wte.weight") + 4000] ^= 4
    contents = {"empty file": b"", "truncated": good[: len(good) // 2], "a bit flipped": bytes(flipped), "picture": b"\x89PNG\r\n" * 99,
                "pickle": pickle.dumps({"a": 1}), "pickle with code": pickle.dumps(Evil(tmp_path / "executed"))}  # fmt: skip
    message = r"ckpt.pt is damaged or not a checkpoint"
    if kind in contents:
        path.write_bytes(contents[kind])
        message = {"pickle with code": "object of (builtins|io|_io).open|damaged", "pickle": "does not hold a GPT-2|damaged"}.get(kind, message)
    elif kind == "folder":
        path.mkdir()
        message = "Is a directory"
    elif kind == "adapter folder":
        (path.parent / "adapter_config.json").write_text("{}")
        message = "PEFT adapter: merge it into its model"
    elif kind == "no package":
        path = hf_folder(tmp_path / "a", {}, "bin") / "model.safetensors"
        path.write_bytes(b"")
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # what Python keeps there for a module that cannot be imported
        message = "needs a package: pip install safetensors"
    else:
        message = "no checkpoint at .*ckpt.pt: run train.py first"
    line = refused(d2dmoe.load_model, path.parent / "b" if kind == "nothing" else path.parent)
    assert re.search(message if kind != "nothing" else "no checkpoint at .*b", line), line
    assert not (tmp_path / "executed").exists()


def test_another_package_named_kernels_is_explained(tmp_path):
    (tmp_path / "kernels.py").write_text("")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(HERE)!r}]; import d2dmoe"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert "ImportError: cannot import name" in result.stderr and "kernels.py first on sys.path, and restart" in result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# train.py


def run_train(out, *arguments, tiny=TINY):
    """A training of the tiny model into the folder `out`; -> its exit status"""
    return train.main([*tiny, "--out", str(out), *map(str, arguments)])


def saved(folder, name="ckpt.pt"):
    return torch.load(Path(folder) / name, weights_only=True)


def write_bins(folder, tokens=500, vocab=257, dtype=np.uint16, **meta):
    """nanoGPT's train.bin and val.bin, of random tokens"""
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(("train.bin", "val.bin")):
        np.random.default_rng(i).integers(0, vocab, tokens).astype(dtype).tofile(folder / name)
    if meta:
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


def encoded(data, out, tokenizer=None):
    train.encode_text(str(data), tokenizer or train.load_tokenizer("bytes"), out)
    return [np.fromfile(out / name, dtype=np.uint16) for name in ("train.bin", "val.bin")]


def test_the_byte_tokenizer_is_bytes():
    tokenizer = train.load_tokenizer("bytes")
    text = "h\u00e9llo\r\n\0 \U0001f600"
    assert tokenizer.encode_ordinary(text) == list(text.encode()) and tokenizer.decode(list(text.encode())) == text
    assert (tokenizer.eot_token, tokenizer.n_vocab, train.vocabulary("bytes")) == (256, 257, 257)


def test_a_character_tokenizer_numbers_the_letters_of_its_alphabet():
    alphabet = "\n !$09AZaz\u00e9\u4e2d\U0001f600"
    tokenizer = train.load_tokenizer("characters:" + alphabet)
    text = "zA \u4e2d\n\U0001f600\u00e9!"
    assert train.encode(tokenizer, text) == [alphabet.index(c) for c in text]
    assert tokenizer.decode(train.encode(tokenizer, text)) == text and train.vocabulary("characters:" + alphabet) == len(alphabet)
    assert "alphabet has no 'q'" in refused(lambda text: train.encode(tokenizer, text), "aq")


def test_nanogpts_character_bins_bring_their_tokenizer_and_code_beside_them_is_not_run(tmp_path):
    letters = "\n abc\u00e9"
    meta = dict(vocab_size=6, itos=dict(enumerate(letters)), stoi={c: i for i, c in enumerate(letters)})
    data, marker = write_bins(tmp_path / "data", vocab=6, **meta), tmp_path / "executed"
    run_train(tmp_path / "out", "--data", data, "--steps", 1)
    assert saved(tmp_path / "out")["tokenizer"] == "characters:" + letters and saved(tmp_path / "out")["config"]["vocab_size"] == 6
    assert "do not agree how tokens are spelled" in refused(train.main, *TINY, "--data", data, "--tokenizer", "bytes", "--out", tmp_path / "b")
    for wrong in ([], {}, {"itos": 3}, {"itos": {0: "ab"}}, {"itos": {0: "a", 1: "a"}}, {"itos": {1: "a"}}, {"itos": {0: 7}}):
        (data / "meta.pkl").write_bytes(pickle.dumps(wrong))
        assert "meta.pkl is not a character table of nanoGPT's" in refused(train.own_tokenizer, data)
    for code in (Evil(marker), {"itos": Evil(marker)}, {"itos": dict(enumerate(letters)), "x": Evil(marker)}):
        (data / "meta.pkl").write_bytes(pickle.dumps(code))
        assert re.search(r"meta.pkl names (_?io|builtins).open: only dicts", refused(train.own_tokenizer, data))
    assert not marker.exists()
    (data / "meta.pkl").unlink()
    assert "does not tell its tokens: add --tokenizer" in refused(train.main, *TINY, "--data", data, "--out", tmp_path / "b")


def pair_tokenizer():
    """GPT-2's pattern with a few merges, so that where text is cut matters"""
    ranks = {bytes([i]): i for i in range(256)}
    for pair in (b"\n\n", b"  ", b" t", b"he", b" the", b"\r\n", b"\n ", b"tt"):
        ranks[pair] = len(ranks)
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    return tiktoken.Encoding("pairs", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)})


def test_cutting_text_into_pieces_does_not_change_its_tokens():
    draw, tokenizer, cuts = random.Random(0), pair_tokenizer(), 0
    for _ in range(30):
        text = "".join(draw.choice(["the", " ", "  ", "\n", "\n\n", "\r\n", "hette", "1", "\u00e9", ". ", "!\x1c", "\u2028"]) for _ in range(3000))
        pieces = list(train.pieces(text, size=draw.randint(200, 400)))
        cuts += len(pieces) - 1
        assert "".join(pieces) == text
        assert sum((tokenizer.encode_ordinary(p) for p in pieces), []) == tokenizer.encode_ordinary(text)
    assert cuts > 200 and list(train.pieces("")) == [""]
    pieces = list(train.pieces("x" * 5000, size=10))  # nowhere to cut, and still no piece is long
    assert "".join(pieces) == "x" * 5000 and max(map(len, pieces)) <= 20


def test_every_tenth_file_is_held_out_and_what_is_not_text_is_left_out_and_counted(tmp_path, capsys):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(21):
        (folder / f"{i:02d}.txt").write_text(chr(ord("a") + i) * 50)
    for i, content in enumerate((b"\x89PNG\0\0", "UTF-16".encode("utf-16"), bytes(range(128, 256)), b"\x1f\x8b\x08\0gz", np.arange(9, dtype=np.uint16).tobytes())):
        (folder / f"03_{i}").write_bytes(content)
    (folder / ".hidden").write_text("x")
    (folder / "missing.txt").symlink_to(tmp_path / "nowhere")
    (folder / "loop").symlink_to(folder)
    (folder / "earlier_run").mkdir()
    for name in ("ckpt.pt", "cost_vs_loss.csv"):
        (folder / "earlier_run" / name).write_text("x")
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe.txt")  # nobody writes to it: reading would wait for ever
    tokens = encoded(folder, tmp_path / "out")
    assert [len(t) for t in tokens] == [19 * 51, 2 * 51]  # each with its <|endoftext|>
    assert set(tokens[1].tolist()) == {ord("a") + 9, ord("a") + 19, 256}
    assert "5 of 26 files are not UTF-8 text and were left out" in capsys.readouterr().out
    (folder / "prepare.py").touch()
    assert "run its prepare.py first" in refused(train.text_files, str(folder))


def test_of_a_single_file_the_last_tenth_is_held_out(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(1, 101)) * 10)
    parts = encoded(tmp_path / "a.txt", tmp_path / "out")
    assert [len(p) for p in parts] == [901, 100] and np.concatenate(parts).tolist() == [*range(1, 101)] * 10 + [256]


@pytest.mark.parametrize("content", [b"one\r\ntwo\r\n" * 300, b"abc" * 200_000 * LONG, "\ufeff\u4e2d\U0001f600 \x1c".encode() * 99])
def test_every_byte_of_a_text_becomes_a_token(content, tmp_path):
    (tmp_path / "t.txt").write_bytes(content)
    assert np.concatenate(encoded(tmp_path / "t.txt", tmp_path))[:-1].astype(np.uint8).tobytes() == content


def test_encoding_a_large_text_is_not_silent(tmp_path, monkeypatch, capsys):
    (tmp_path / "t.txt").write_text("word\n" * 500_000)
    monkeypatch.setattr(train.time, "perf_counter", itertools.count(0, 6).__next__)  # six seconds a look
    encoded(tmp_path / "t.txt", tmp_path)
    assert re.search(r"encoding file 1 of 1, [\d,]+ tokens so far", capsys.readouterr().out)


@pytest.mark.parametrize("content", [bytes(range(128, 256)) * 30, b"a\0b" * 900, "word " .encode("utf-16") * 99, b"\x1f\x8b\x08\0" * 99, b"PK\3\4\0" * 99])
def test_a_named_file_that_is_not_text_is_refused_and_older_tokens_stay(content, tmp_path):
    encoded(write_text(tmp_path / "good.txt"), tmp_path)
    (tmp_path / ".lock").touch()  # as a run leaves it
    before = (tmp_path / "train.bin").read_bytes()
    (tmp_path / "t.txt").write_bytes(content)
    assert "t.txt is not UTF-8 text" in refused(train.main, *TINY, "--data", tmp_path / "t.txt", "--out", tmp_path)
    assert (tmp_path / "train.bin").read_bytes() == before and not list(tmp_path.glob("*.tmp"))


def test_the_default_corpus_is_the_standard_library():
    files = train.text_files("stdlib")
    assert len(files) > 300 and files == sorted(files) and {f.suffix for f in files} == {".py"}
    assert {"argparse.py", "ast.py"} <= {f.name for f in files}
    assert not {"site-packages", "test", "tests", "idlelib", "lib2to3"} & {part for f in files for part in f.relative_to(os.path.dirname(os.__file__)).parts}


def test_a_folder_of_bins_is_taken_as_it_is_and_linked_beside_the_checkpoint(tmp_path):
    a, tokenizer = write_bins(tmp_path / "a"), ["--tokenizer", "bytes", "--steps", 1]
    original = {name: (a / name).read_bytes() for name in ("train.bin", "val.bin")}
    run_train(tmp_path / "b", "--data", a, *tokenizer)
    encoded(write_text(tmp_path / "text.txt"), tmp_path / "c")
    (tmp_path / "c/.lock").touch()  # an earlier run
    run_train(tmp_path / "c", "--data", tmp_path / "b", *tokenizer)
    run_train(a, "--data", tmp_path / "c", *tokenizer)  # links must not end where they begin
    run_train(tmp_path / "b", "--data", tmp_path / "b", *tokenizer)
    for folder in (a, tmp_path / "b", tmp_path / "c"):
        assert {name: (folder / name).read_bytes() for name in original} == original
        convert.main([*CONVERT, "--steps", "1", "--taus", "1", "--ckpt", str(folder)])
    assert not any(p.is_symlink() for p in a.iterdir()) and (tmp_path / "c/val.bin").is_symlink()


@pytest.mark.parametrize("message, content", [
    ("not a plain file of uint16", b"\x93NUMPY\1\0" + bytes(900)), ("not a plain file of uint16", np.array([20240520, 1, *range(900)], np.int32).tobytes()),
    ("not a plain file of uint16", bytes(901)), ("tokens of 32 bits or more", np.arange(200, dtype=np.uint32).tobytes()),
    ("tokens of 32 bits or more", np.arange(200, dtype=np.int64).tobytes()), ("holds text, not tokens", b"to be or not to be " * 90),
    ("token 257 lies outside the vocabulary of 257", np.arange(258, dtype=np.uint16).tobytes()), ("16 tokens are too few for a context of 16", np.full(16, 200, np.uint16).tobytes()),
    ("0 tokens are too few", b""), ("val.bin is missing", None),
])  # fmt: skip
def test_token_files_with_headers_or_of_other_widths_are_refused(message, content, tmp_path):
    data = write_bins(tmp_path / "data")
    (data / "val.bin").unlink() if content is None else (data / "val.bin").write_bytes(content)
    line = refused(train.main, *TINY, "--data", data, "--tokenizer", "bytes", "--out", tmp_path / "out")
    assert message in line and "val.bin" in line and not list((tmp_path / "out").glob("*.bin"))


def test_batches_depend_on_seed_and_step_alone(monkeypatch):
    draws = [train.draw_offsets(1000, 12, 16, seed, step).tolist() for seed in (0, 1) for step in (0, 1)]
    assert len({tuple(d) for d in draws}) == 4 and draws[0] == train.draw_offsets(1000, 12, 16, 0, 0).tolist()
    assert min(map(min, draws)) >= 0 and max(map(max, draws)) <= 1000 - 17
    assert set(train.draw_offsets(18, 99, 16, 0, 0).tolist()) == {0, 1}  # the last window counts too
    tokens, config = np.arange(1000, dtype=np.uint16), tiny_config(vocab_size=1000)
    x, y = train.take_windows(tokens, torch.tensor([3, 983]), 16, 1000)
    assert torch.equal(x[0], torch.arange(3, 19)) and torch.equal(y, x + 1) and y[1, -1] == 999
    assert "token 999 lies outside the vocabulary of 257" in refused(lambda t: train.take_windows(t, torch.tensor([983]), 16, 257), tokens)
    whole = train.Batches(tokens, config, 5, 12, seed=1, device=torch.device("cpu"))
    assert len(whole) == 5 and [x[:, 0].tolist() for x, _ in whole[1]] == [draws[3]]
    shares = []
    for rank in (0, 1):  # two processes share out the same sequences
        part = train.Batches(tokens, config, 5, 12, seed=1, device=torch.device("cpu"), at_once=4)
        part.rank, part.world = rank, 2
        shares += [x[:, 0].tolist() for x, _ in part[1]]
    assert [len(s) for s in shares] == [4, 2, 4, 2] and sum(shares, []) == draws[3]
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(train.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(train.dist, "get_world_size", lambda: 5)
    assert "12 sequences per step do not divide among 5" in refused(lambda n: train.Batches(tokens, config, 5, n, 1, torch.device("cpu")), 12)


def test_schedules():
    rates = [train.learning_rate(s, 100, 1.0, 10) for s in range(101)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0 and math.isclose(rates[100], 0.1) and rates[55] == pytest.approx(0.55)
    assert [train.learning_rate(s, 4, 2.0, 0, final=0.5) for s in (0, 2, 4)] == pytest.approx([2.0, 1.5, 1.0])
    assert [train.penalty_weight(s, 100, 2.0) for s in (0, 25, 50, 99)] == [0.0, 1.0, 2.0, 2.0]
    assert [train.penalty_weight(s, 100, 2.0, ramp) for s in (0, 50) for ramp in (0, 1)] == [2.0, 0.0, 2.0, 1.0]


def test_evaluation_is_the_mean_loss_and_counts_experts():
    moe, gate = tiny_moe(tiny_dense()), partial(top_k, k=3)
    tokens = np.random.default_rng(0).integers(0, 257, 200).astype(np.uint16)
    losses = []
    for o in torch.linspace(0, 200 - 17, 7, dtype=torch.float64).long().tolist():
        window = torch.from_numpy(tokens[o : o + 17].astype(np.int64))
        losses.append(F.cross_entropy(moe(window[None, :-1], gate)[0][0], window[1:]))
    loss, counts = train.evaluate(moe, tokens, windows=7, batch_size=3, gate=gate)
    assert loss == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)
    assert [c.tolist() for c in counts] == [[3] * 7 * 16] * 2
    dense = tiny_dense().train()
    assert train.evaluate(dense, tokens, 10**9)[1] == [] and dense.training  # not more windows than there are


def test_a_training_step_is_the_papers_loss(trained, tmp_path):
    """At a learning rate of zero Adam's first moments are the mean of the gradients of two steps on the same weights."""
    run_train(tmp_path, "--data", trained / "text.txt", *"--steps 2 --lr 0 --alpha 0.5 --grad_clip 0 --grad_accum 2".split())
    checkpoint, tokens = saved(tmp_path), np.fromfile(tmp_path / "train.bin", dtype=np.uint16)
    model = d2dmoe.load_model(tmp_path)
    parameters = sorted(model.parameters(), key=lambda p: p.dim() < 2)  # as training groups them: matrices, then vectors
    moments = [torch.zeros_like(p) for p in parameters]
    for step, alpha in ((0, 0.0), (1, 0.5)):  # the ramp ends at half of two steps
        x, y = train.take_windows(tokens, train.draw_offsets(len(tokens), 8, 16, 0, step), 16, 257)
        inputs, penalties = [], []
        model.hidden(x, inputs=inputs)
        for mlp, read in zip(model.layers(), inputs, strict=True):
            a = torch.relu(mlp.c_fc(read))
            penalties.append((a.sum(-1) ** 2 / (a**2).sum(-1).clamp(min=1e-12)).mean())
        loss = F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten()) + alpha * torch.stack(penalties).mean()
        moments = [0.9 * m + 0.1 * g for m, g in zip(moments, torch.autograd.grad(loss, parameters), strict=True)]
    for i, m in enumerate(moments):
        assert torch.allclose(checkpoint["optimizer"]["state"][i]["exp_avg"], m, atol=1e-6) and m.abs().max() > 1e-5
    assert [g["weight_decay"] for g in checkpoint["optimizer"]["param_groups"]] == [0.1, 0.0]


def test_pieces_of_a_step_add_up_to_it(trained, tmp_path):
    for batch, pieces in ((12, 1), (4, 3)):
        run_train(tmp_path / str(pieces), "--batch_size", batch, "--grad_accum", pieces, "--data", trained / "text.txt", "--steps", 10)
    assert_same_weights(weights_of(tmp_path / "1/ckpt.pt"), weights_of(tmp_path / "3/ckpt.pt"), 1e-5)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_sparsity_of_activations_by_plain_formula(activation):
    model, x, inputs = tiny_dense(activation=activation), torch.randint(257, (3, 16)), []
    zeros, effective = train.activation_sparsity(model, x)
    model.hidden(x, inputs=inputs)
    a = [kernels.ACTIVATIONS[activation](mlp.c_fc(read)).double() for mlp, read in zip(model.layers(), inputs, strict=True)]
    assert 0 < zeros < 1 and zeros == pytest.approx(torch.stack([(t <= 0).double().mean() for t in a]).mean().item())
    hoyer = torch.stack([(t.abs().sum(-1) ** 2 / (t**2).sum(-1)).mean() for t in a]).mean().item()
    assert effective == pytest.approx(hoyer, rel=1e-4)


def test_training_learns_and_its_progress_is_printed(trained, capsys, tmp_path):
    assert run_train(tmp_path, "--data", trained / "text.txt", "--steps", 30, "--lr", 1e-2) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if re.match(r" +\d+ ", line)]
    assert [r[0] for r in rows] == ["10", "20", "30"] and all(len(r) == 7 for r in rows)
    assert float(rows[-1][2]) < float(rows[0][2]) < math.log(257) + 0.5
    checkpoint, val = saved(tmp_path), np.fromfile(tmp_path / "val.bin", dtype=np.uint16)
    assert checkpoint["step"] == 30 and checkpoint["tokenizer"] == "bytes" and "--lr=0.01" in checkpoint["arguments"]
    assert float(rows[-1][2]) == pytest.approx(train.evaluate(d2dmoe.load_model(tmp_path), val, 8)[0], abs=1e-4)


def test_resumed_and_uninterrupted_runs_end_alike(trained, tmp_path, monkeypatch, capsys):
    arguments = ["--data", trained / "text.txt", "--steps", 20, "--grad_accum", 2]
    run_train(tmp_path / "whole", *arguments)
    plain = train.save_checkpoint

    def save_and_crash(*a, **k):
        plain(*a, **k)
        raise KeyError("crash right after the first save")

    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(train, "save_checkpoint", save_and_crash)
        run_train(tmp_path / "parts", *arguments)
    assert saved(tmp_path / "parts")["step"] == 10
    resume = ["--init", "resume", "--out", str(tmp_path / "parts"), "--device", "cpu"]  # all else comes from the checkpoint
    train.main(resume)
    assert_same_weights(weights_of(tmp_path / "whole/ckpt.pt"), weights_of(tmp_path / "parts/ckpt.pt"))
    assert "has its 20 steps: give a larger --steps" in refused(train.main, *resume)
    capsys.readouterr()
    train.main([*resume, "--steps", "40"])  # more steps: the schedules jump, which is said
    lr, alpha = train.learning_rate(20, 40, 2e-3, 2), train.penalty_weight(20, 40, 1e-3)
    last = train.learning_rate(19, 20, 2e-3, 2)
    assert f"resuming at step 20, with learning rate {lr:.2e} (last {last:.2e}) and penalty weight {alpha:.2e}" in capsys.readouterr().out


def test_resuming_takes_the_runs_options_and_refuses_what_the_checkpoint_decides(trained, tmp_path):
    run_train(tmp_path, "--data", trained / "text.txt", *"--steps 10 --no_bias --penalty l1 --alpha 0.25 --seed 7 --grad_accum 2 --dtype bfloat16".split())
    args, _ = train.parse_arguments(["--init", "resume", "--out", str(tmp_path), "--steps", "12", "--lr", "1e-4"])
    assert (args.steps, args.lr, args.alpha, args.seed, args.grad_accum, args.dtype, args.eval_windows) == (12, 1e-4, 0.25, 7, 2, "bfloat16", 8)
    resume = ["--init", "resume", "--out", tmp_path, "--steps", 12]
    for option, value, has in (("n_layer", 3, 2), ("n_head", 4, 2), ("n_embd", 32, 16), ("block_size", 8, 16), ("activation", "gelu", "relu"), ("penalty", "hoyer", "l1")):
        assert f"--{option} cannot differ from the checkpoint, whose {option} is {has}" in refused(train.main, *resume, f"--{option}", value)
    assert "tokens are spelled" in refused(train.main, *resume, "--tokenizer", "gpt2")
    train.main([str(a) for a in (*resume, "--n_embd", 16, "--penalty", "l1", "--no_bias", "--tokenizer", "bytes")])  # saying the same is no difference
    assert saved(tmp_path)["step"] == 12 and not saved(tmp_path)["config"]["bias"]
    shutil.copy(trained / "ckpt.pt", tmp_path)
    assert "--no_bias cannot differ from the checkpoint, whose bias is True" in refused(train.main, *resume, "--no_bias")


def test_options_and_presets(capsys):
    args, _ = train.parse_arguments("--preset gpt2 --init gpt2 --steps 5".split())
    assert (args.n_layer, args.n_head, args.n_embd, args.block_size, args.tokenizer) == (12, 12, 768, 1024, "gpt2")
    assert (args.activation, args.penalty, args.alpha, args.lr, args.batch_size * args.grad_accum, args.steps) == ("relu", "l1", 5e-4, 6e-4, 960, 5)
    args, chosen = train.parse_arguments("--lr 1 --lr 0.5 --no_bias --compile".split())
    assert args.lr == 0.5 and not args.bias and chosen.keys() == {"lr", "bias", "compile"} and args.n_embd == 128
    words = train.as_words(args)
    assert "--lr=0.5" in words and "--compile" in words and not any("out" in w or "data" in w for w in words)
    again, _ = train.parse_arguments(words)
    assert {k for k, v in vars(args).items() if vars(again)[k] != v} == {"bias"}  # which the checkpoint decides
    for main in (train.main, convert.main, sample.main):
        with pytest.raises(SystemExit) as end:
            main(["--help"])
        text = capsys.readouterr().out
        assert end.value.code == 0 and "examples:" in text and text.count("default:") > 8


def test_two_runs_with_one_seed_are_identical(trained, tmp_path, capsys):
    texts = []
    for name in ("a", "b"):
        run_train(tmp_path / name, "--data", trained / "text.txt", "--steps", 10, "--seed", 5)
        convert.main([*CONVERT, "--ckpt", str(tmp_path / name), "--split", "coactivation", "--attention"])
        capsys.readouterr()
        sample.main(["--ckpt", str(tmp_path / name), "--max_new_tokens", "30", "--device", "cpu"])
        texts.append(capsys.readouterr().out.partition("FLOPs;")[0])  # without the speed
    for file in ("ckpt.pt", "d2dmoe.pt"):
        assert_same_weights(weights_of(tmp_path / "a" / file), weights_of(tmp_path / "b" / file))
    assert texts[0] == texts[1]


def test_relufication_and_a_shorter_context_start_from_another_models_weights(trained, tmp_path):
    dense = tiny_dense(activation="gelu")
    d2dmoe.save_checkpoint(tmp_path / "gelu.pt", dense, tokenizer="bytes")
    start = ["--init", tmp_path / "gelu.pt", "--data", trained / "text.txt", "--device", "cpu", "--out", tmp_path, "--eval_windows", 4, "--steps", 1, "--lr", 0]
    train.main([str(a) for a in (*start, "--activation", "relu", "--block_size", 8, "--penalty", "l1")])
    model = d2dmoe.load_model(tmp_path)
    assert (model.config.activation, model.config.block_size, model.config.penalty) == ("relu", 8, "l1")
    expected = dense.state_dict()
    expected["transformer.wpe.weight"] = expected["transformer.wpe.weight"][:8]
    assert_same_weights(model.state_dict(), expected)
    assert "block_size 99 is longer than the checkpoint's 16" in refused(train.main, *start, "--block_size", 99)
    assert "--n_embd cannot differ" in refused(train.main, *start, "--n_embd", 32)


def torchrun(name, *arguments):
    """The script in two processes, started in a session of their own"""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(HERE / name)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([*command, *map(str, arguments)], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def test_two_processes_train_and_convert_as_one_does(trained, tmp_path):
    # 12 sequences a step: one process takes them as 4, 4, 4, each of two as 4 and 2
    arguments = ["--data", trained / "text.txt", "--steps", 20, "--grad_accum", 3]
    run_train(tmp_path / "one", *arguments)
    process = torchrun("train.py", *TINY, *arguments, "--out", tmp_path / "two")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count("wrote") == 1 and "2 process(es)" in out
    assert_same_weights(weights_of(tmp_path / "one/ckpt.pt"), weights_of(tmp_path / "two/ckpt.pt"), 1e-5)
    run_train(tmp_path / "two", "--init", "resume", "--steps", 25)
    assert saved(tmp_path / "two")["step"] == 25
    process = torchrun("convert.py", *CONVERT, "--finetune", 5, "--ckpt", tmp_path / "one")
    assert process.wait(timeout=120) == 0, process.stderr.read()
    shutil.move(tmp_path / "one/d2dmoe.pt", tmp_path / "two_processes.pt")
    convert.main([*CONVERT, "--finetune", "5", "--ckpt", str(tmp_path / "one")])
    assert_same_weights(weights_of(tmp_path / "one/d2dmoe.pt"), weights_of(tmp_path / "two_processes.pt"), 1e-4)


def test_bfloat16_and_compile_train_too(trained, tmp_path):
    arguments = ["--data", trained / "text.txt", "--steps", 10]
    run_train(tmp_path, *arguments, "--dtype", "bfloat16")
    run_train(tmp_path / "eager", *arguments)
    weights, exact = weights_of(tmp_path / "ckpt.pt"), weights_of(tmp_path / "eager/ckpt.pt")
    assert all(w.dtype == torch.float32 for w in weights.values())
    assert 0 < max((w - exact[n]).abs().max() for n, w in weights.items()) < 0.05
    if shutil.which("g++") or shutil.which("clang++"):
        run_train(tmp_path / "compiled", *arguments, "--compile")
        assert_same_weights(weights_of(tmp_path / "compiled/ckpt.pt"), exact, 1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# convert.py


@pytest.mark.parametrize("n, k", [(12, 3), (64, 8), (64, 64), (30, 1), (96, 2)])
def test_balanced_kmeans_fills_every_cluster_exactly(n, k):
    torch.manual_seed(0)
    points = torch.randn(n, 5)
    assignment = convert.balanced_kmeans(points, k, seed=0)
    assert torch.bincount(assignment, minlength=k).tolist() == [n // k] * k
    assert torch.equal(assignment, convert.balanced_kmeans(points, k, seed=0))
    with pytest.raises(ValueError, match="do not divide"):
        convert.balanced_kmeans(points, n - 1 if n % (n - 1) else n + 1, seed=0)


def test_balanced_kmeans_finds_planted_clusters_and_survives_equal_points():
    torch.manual_seed(0)
    truth = torch.arange(8).repeat_interleave(16)[torch.randperm(128)]
    points = torch.eye(8)[truth] + 0.05 * torch.randn(128, 8)
    assignment = convert.balanced_kmeans(points, 8, seed=0)
    assert len({(a, b) for a, b in zip(assignment.tolist(), truth.tolist(), strict=True)}) == 8
    centers = convert.spread_centers(points, 8, torch.Generator().manual_seed(0))
    assert sorted(centers.argmax(1).tolist()) == [*range(8)]  # one in each cluster, before any iteration
    assert torch.bincount(convert.balanced_kmeans(torch.ones(24, 3), 6, seed=0)).tolist() == [4] * 6


def test_balanced_kmeans_is_near_the_best_of_all_assignments():
    torch.manual_seed(0)
    squares = lambda points, a: sum(((points[a == c] - points[a == c].mean(0)) ** 2).sum().item() for c in range(3))
    pairs = [torch.tensor(a) for a in itertools.product(range(3), repeat=6) if all(a.count(c) == 2 for c in range(3))]
    sets = torch.randn(20, 6, 2)
    best = sum(min(squares(points, a) for a in pairs) for points in sets)
    assert best <= sum(squares(points, convert.balanced_kmeans(points, 3, seed=0)) for points in sets) + 1e-3 < 1.03 * best


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
    for source in (dense, with_projection_mlps(dense)):
        moe = tiny_moe(source)
        for mlp, layer in zip(source.layers(), moe.layers(), strict=True):
            rows = torch.cat([mlp.c_fc.weight, mlp.c_proj.weight.t()], dim=1)
            split = torch.cat([layer.w1.flatten(0, 1), layer.w2.flatten(0, 1)], dim=1)
            assert torch.equal(rows[rows[:, 0].argsort()], split[split[:, 0].argsort()])  # the same neurons in another order
        idx = torch.randint(257, (2, 16))
        y, expected = moe(idx)[0], source(idx)[0]
        assert (y - expected).norm() <= 1e-5 * expected.norm()


def test_experts_are_the_clusters():
    dense = tiny_dense()
    moe, sample, inputs = tiny_moe(dense), torch.randint(257, (4, 16)), []
    dense.hidden(sample, inputs=inputs)
    for tokens in (None, sample):
        convert.split_model(dense, moe, tokens, seed=0)
        for mlp, layer, read in zip(dense.layers(), moe.layers(), inputs, strict=True):
            features = convert.weight_features(mlp) if tokens is None else convert.coactivation_features(mlp, read.flatten(0, 1))
            assignment = convert.balanced_kmeans(features, 8, seed=0)
            for e in range(8):
                members = mlp.c_fc.weight[assignment == e]  # [h, d]
                assert torch.equal(members[members[:, 0].argsort()], layer.w1[e][layer.w1[e][:, 0].argsort()])


def test_features_of_neurons():
    torch.manual_seed(0)
    mlp = d2dmoe.MLP(6, 20, "relu", "none")
    x = torch.randn(50, 6)
    a = torch.relu(x @ mlp.c_fc.weight.t() + mlp.c_fc.bias)  # [50, 20]
    unit = (a / a.norm(dim=0)).t()  # [20, 50]
    features = convert.coactivation_features(mlp, x, rank=20)
    assert torch.allclose(features @ features.t(), unit @ unit.t(), atol=1e-4)  # a rotation of them, at full rank
    before = torch.get_rng_state()
    assert torch.equal(convert.coactivation_features(mlp, x, rank=3), convert.coactivation_features(mlp, x, rank=3))
    assert torch.equal(torch.get_rng_state(), before) and convert.coactivation_features(mlp, x, rank=3).shape == (20, 3)
    w = mlp.c_fc.weight
    assert torch.allclose(convert.weight_features(mlp), w / w.norm(dim=1, keepdim=True))


def test_router_losses_by_plain_formula():
    torch.manual_seed(0)
    x = torch.randn(9, 10)
    for power in (1.0, 0.5, 2.0):
        moe = random_moe(router=Router(10, 5, 6, power))
        raw = torch.relu(x @ moe.router.fc1.weight.t()) @ moe.router.fc2.weight.t()
        loss = convert.router_loss(moe, x)
        assert torch.isclose(loss, ((raw.abs() - true_norms(moe, x) ** power) ** 2).mean(), rtol=1e-4)
        loss.backward()
        assert {n for n, p in moe.named_parameters() if p.grad is not None} == {"router.fc1.weight", "router.fc2.weight"}


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_moefications_label_is_divided_by_the_largest_sum_of_the_whole_batch(activation):
    torch.manual_seed(0)
    x, moe = torch.randn(9, 10), random_moe(activation, d2dmoe.MoEficationRouter(10, 5, 6))
    mass = kernels.ACTIVATIONS[activation](torch.einsum("nd,ehd->neh", x, moe.w1) + moe.b1).clamp(min=0).sum(-1)
    share = mass / max(mass.flatten().tolist())
    p = torch.sigmoid(torch.tanh(x @ moe.router.fc1.weight.t()) @ moe.router.fc2.weight.t())
    assert torch.isclose(convert.moefication_loss(moe, x), -(share * p.log() + (1 - share) * (1 - p).log()).mean(), rtol=1e-3)
    assert (share.amax(-1) < 1).any()  # a token's own largest is not 1


def test_projection_loss_by_plain_formula():
    torch.manual_seed(0)
    mlp, x, target = d2dmoe.MLP(6, 4, "relu", "hoyer"), torch.randn(7, 6), torch.randn(7, 6)
    a = torch.relu(x @ mlp.c_fc.weight.t() + mlp.c_fc.bias)
    expected = ((mlp.c_proj(a) - target) ** 2).mean() / target.var() + 0.3 * plain_hoyer(a)
    assert torch.isclose(convert.projection_loss(mlp, x, target, 0.3), expected, rtol=1e-4)


@torch.no_grad()
def test_projections_learn_from_what_the_linear_layers_read_and_return():
    dense, seen = tiny_dense(bias=False), []
    for block in dense.transformer.h:
        for layer in (block.attn.c_attn, block.attn.c_proj):
            layer.register_forward_hook(lambda layer, x, y: seen.extend([(x[0], part) for part in y.split(16, dim=-1)]))
    idx = torch.randint(257, (3, 16))
    dense(idx)
    expected, seen[:] = [*seen], []
    for (x, y), (x_, y_) in zip(convert.projection_examples(dense, idx), expected, strict=True):
        assert torch.allclose(x, x_, atol=1e-5) and torch.allclose(y, y_, atol=1e-5)


def tokens_of(folder, name="train.bin"):
    return np.fromfile(folder / name, dtype=np.uint16)


def test_projections_are_trained_alone_then_together_by_plain_formula(trained, capsys):
    dense = tiny_dense(scale=3.0).requires_grad_(False)
    batches = lambda steps, seed=0: train.Batches(tokens_of(trained), dense.config, steps, 4, seed, torch.device("cpu"))

    def distill(steps, lr):
        torch.manual_seed(0)
        model = convert.distill_projections(dense, batches(steps), batches(steps, 2), lr)
        return model, [float(loss) for loss in re.findall(r"projections.*loss ([\d.]+)", capsys.readouterr().out)]

    untrained, (_, together) = distill(1, 0.0)  # at a learning rate of 0 the losses are those of the weights as drawn
    [(x, _)] = batches(1, 2)[0]
    p, q = dense(x)[0].softmax(-1), untrained(x)[0].softmax(-1)
    kl = (p * (p.log() - q.log())).sum(-1).mean()
    untrained.hidden(x, inputs=(inputs := []))
    layers = [(layer, read) for i, (layer, read) in enumerate(zip(untrained.layers(), inputs, strict=True)) if i % 5 < 4]  # not the MLPs
    penalty = sum(plain_hoyer(torch.relu(read @ mlp.c_fc.weight.t() + mlp.c_fc.bias)) for mlp, read in layers)
    assert together == pytest.approx((kl + 1e-4 * penalty).item(), rel=1e-3) and kl > 1e-3

    before = {n: w.clone() for n, w in dense.state_dict().items()}
    model, _ = distill(100, 1e-2)
    q = model(x)[0].softmax(-1)
    assert (p * (p.log() - q.log())).sum(-1).mean() < 0.5 * kl
    assert_same_weights(dense.state_dict(), before)
    assert_same_weights({n: w for n, w in model.state_dict().items() if n in before}, {n: w for n, w in before.items() if n in model.state_dict()})
    assert not model.training and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("router", ["norm", "moefication"])
def test_training_routers_changes_routers_alone_and_lowers_their_loss(trained, router):
    dense = d2dmoe.load_model(trained / "ckpt.pt").requires_grad_(False)
    moe = tiny_moe(with_projection_mlps(dense) if router == "norm" else dense, router=router).requires_grad_(False)
    frozen = {n: p.clone() for n, p in moe.named_parameters() if "router" not in n}
    x = torch.from_numpy(tokens_of(trained)[:64].astype(np.int64)).view(4, 16)
    moe.hidden(x, inputs=(inputs := []))
    loss = convert.router_loss if router == "norm" else convert.moefication_loss
    losses = lambda: [loss(layer, read.flatten(0, 1)).item() for layer, read in zip(moe.layers(), inputs, strict=True)]
    before = losses()
    convert.train_routers(moe, train.Batches(tokens_of(trained), moe.config, 150, 4, 0, torch.device("cpu")), 1e-2)
    assert all(after < b for b, after in zip(before, losses(), strict=True)) and sum(losses()) < 0.8 * sum(before)
    assert all(torch.equal(p, frozen[n]) for n, p in moe.named_parameters() if n in frozen)


@pytest.mark.parametrize("attention", [False, True])
def test_finetuning_is_cross_entropy_with_the_gate_on_and_the_routers_regression(trained, monkeypatch, attention):
    dense = d2dmoe.load_model(trained / "ckpt.pt").requires_grad_(False)
    moe = tiny_moe(with_projection_mlps(dense) if attention else dense)
    for layer in moe.layers():  # untrained routers hardly tell experts apart
        layer.router.fc2.weight.data.mul_(torch.logspace(-2, 0, len(layer.w1)).unsqueeze(1))
    batches = train.Batches(tokens_of(trained), moe.config, 5, 4, 0, torch.device("cpu"))
    monkeypatch.setattr(convert, "fit", lambda parameters, loss_of, *_: made.update(parameters=parameters, loss_of=loss_of))
    made = {}
    convert.finetune(moe, batches, lr=1e-3)
    [(x, y)] = batches[2]
    made["loss_of"](x, y, 12).backward()
    tau = 0.94
    routers = [n for n, _ in moe.named_parameters() if "router" in n]
    assert len(made["parameters"]) == len(list(moe.parameters())) and len(routers) == 2 * len(moe.layers())
    ours = {n: p.grad.clone() for n, p in moe.named_parameters()}

    moe.zero_grad()
    logits, executed = moe(x, partial(dynamic_k, tau=tau))
    assert 0.1 < torch.cat([e.flatten() for e in executed]).float().mean() < 0.95
    F.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
    assert all(p.grad is None for n, p in moe.named_parameters() if n in routers), "no gradient passes the gate"
    moe.hidden(x, partial(dynamic_k, tau=tau), inputs=(inputs := []))
    for layer, read in zip(moe.layers(), inputs, strict=True):
        convert.router_loss(layer, read.detach().flatten(0, 1)).backward()
    for n, p in moe.named_parameters():
        assert torch.allclose(ours[n], p.grad, rtol=1e-3, atol=1e-6), n


def test_finetuning_lowers_the_loss_of_few_experts(trained, tmp_path, capsys):
    losses = {}
    for steps in (0, 60):
        convert.main([*CONVERT, "--ckpt", str(trained), "--out", str(tmp_path / str(steps)), "--taus", "0.5", "--finetune", str(steps)])
        [row] = [p for p in convert.read_table(tmp_path / str(steps)) if p["rule"] == "dynamic_k"]
        losses[steps] = row["loss"]
    assert losses[60] < losses[0] and "paper + fine-tuning E=8" in row["recipe"] and "fine-tuning: step    60 of 60" in capsys.readouterr().out


class TrueNorms(torch.nn.Module):
    """A router that computes the definition"""

    def __init__(self, layer):
        super().__init__()
        self.layer = [layer]  # in a list, or it would be a part of itself

    def forward(self, x):
        return true_norms(self.layer[0], x)


def by_hand(model, tokens, windows, gate):
    """Mean loss over evenly spaced windows, and the share of all experts that ran"""
    losses, shares = [], []
    for o in torch.linspace(0, len(tokens) - 17, windows, dtype=torch.float64).long().tolist():
        window = torch.from_numpy(tokens[o : o + 17].astype(np.int64))
        logits, executed = model(window[None, :-1], gate)
        losses.append(F.cross_entropy(logits[0], window[1:]).item())
        shares += [e.double().mean().item() for e in executed]
    return sum(losses) / len(losses), sum(shares) / len(shares)


def test_the_table_is_the_model_measured_by_hand(trained):
    dense, moe, val = d2dmoe.load_model(trained / "ckpt.pt"), d2dmoe.load_model(trained), tokens_of(trained, "val.bin")
    with open(trained / "cost_vs_loss.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [r["rule"] for r in rows] == ["dynamic_k", "top_k", "oracle"] * 3
    assert [float(r["value"]) for r in rows if r["rule"] != "top_k"] == [1, 1, 0.9, 0.9, 0.5, 0.5]
    dense_loss, _ = by_hand(dense, val, 8, None)
    fixed, neuron = 2 * (2 * 8.5 * 16 + 4 * 16 * 16) + 257 * 16, 2 * 16  # multiply-adds: attention over (1 + ... + 16) / 16 tokens, LM head
    routers = [layer.router for layer in moe.layers()]
    for row in rows:
        value, share = float(row["value"]), float(row["executed"])
        gate = None if value == 1 else partial(dynamic_k, tau=value)
        if row["rule"] == "top_k" and value < 1:
            k = math.ceil(8 * value - 1e-6)
            gate, share = partial(top_k, k=k), k / 8
        for layer, router in zip(moe.layers(), routers, strict=True):
            layer.router = TrueNorms(layer) if row["rule"] == "oracle" else router
        loss, executed = by_hand(moe, val, 8, gate)
        assert float(row["dense_loss"]) == pytest.approx(dense_loss, abs=1e-5) and row["recipe"] == "paper E=8 r=4"
        assert float(row["loss"]) == pytest.approx(loss, abs=1e-3 if row["rule"] == "oracle" else 1e-5)
        assert float(row["executed"]) == pytest.approx(executed, abs=2e-3 if row["rule"] == "oracle" else 1e-6) and executed == pytest.approx(share, abs=2e-3)
        asked = 2 * (16 * 4 + 4 * 8) if gate else 0  # no router is asked at tau 1
        flops = (fixed + 2 * float(row["executed"]) * 64 * neuron + asked) / (fixed + 2 * 64 * neuron)
        assert float(row["flops"]) == pytest.approx(flops) and (float(row["time"]) > 0 or row["rule"] != "dynamic_k")
    assert float(rows[0]["executed"]) == float(rows[0]["flops"]) == 1 and float(rows[0]["loss"]) == pytest.approx(dense_loss, abs=1e-4)
    assert float(rows[6]["executed"]) < 1


def test_oracles_give_way_to_the_routers_again():
    moe, x = tiny_moe(tiny_dense()), torch.randn(5, 16)
    routers, [first, _] = [layer.router for layer in moe.layers()], moe.layers()
    state = moe.state_dict().keys()
    with convert.oracles(moe):
        assert torch.allclose(first.router(x), true_norms(first, x), rtol=1e-3)
    assert [layer.router for layer in moe.layers()] == routers and moe.state_dict().keys() == state


def test_a_share_of_the_experts_is_rounded_up():
    norms = torch.rand(5, 8)
    for share, k in ((0.25, 2), (0.26, 3), (0.3750001, 3), (1.0, 8), (0.01, 1)):
        assert torch.equal(convert.top_share(norms, share), top_k(norms, k))


def test_costs_are_read_off_the_curve_by_interpolation(capsys):
    curve = [("dynamic_k", 1.0, 1.0, 2.0), ("dynamic_k", 0.5, 0.7, 2.02), ("dynamic_k", 0.25, 0.5, 2.06), ("top_k", 1.0, 1.0, 2.0), ("top_k", 0.5, 0.8, 2.4),
             ("oracle", 1.0, 1.0, 2.0), ("oracle", 0.2, 0.3, 2.01)]  # fmt: skip
    points = [dict(zip(("rule", "executed", "flops", "loss"), row, strict=True)) for row in curve]
    assert convert.cost_at(points, "dynamic_k", 2.03) == pytest.approx((0.4375, 0.65))
    assert convert.cost_at(points, "dynamic_k", 3.0) is convert.cost_at(points, "dynamic_k", 1.9) is None
    convert.print_read_off(points, 2.0)
    out = capsys.readouterr().out
    assert "at 2% above the dense loss, dynamic_k:  37.5% of the experts,  60.0% of the FLOPs" in out
    assert re.search("at 2% above the dense loss, oracle +: outside of this table", out)


def test_tables_come_back_and_an_earlier_one_keeps_another_name(tmp_path, capsys):
    point = dict(recipe="a, \x1b[31m\"b\"", rule="top_k", value=0.1, executed=1 / 3, flops=0.75, time=1.5, loss=2.0, dense_loss=1.5, text="t")
    convert.write_table(tmp_path / "cost_vs_loss.csv", [point])
    assert convert.read_table(tmp_path) == [point]
    convert.write_table(tmp_path / "cost_vs_loss.csv", [point | {"value": 0.2}, point | {"loss": math.nan}])
    assert convert.read_table(tmp_path) == [point | {"value": 0.2}]  # what is not finite cannot be drawn
    (tmp_path / "cost_vs_loss.csv").rename(tmp_path / "c.csv")
    (tmp_path / "cost_vs_loss-previous.csv").rename(tmp_path / "cost_vs_loss.csv")
    assert convert.read_table(tmp_path) == [point] and "the earlier table stays as" in capsys.readouterr().out
    for content in (b"", b"a,b\n1,2\n", b"\xff\xfe" * 50, ",".join(convert.COLUMNS).encode() + b"\nx,top_k,1,oops,1,1,2,2,t\n"):
        (tmp_path / "cost_vs_loss.csv").write_bytes(content)
        assert "is not a table that this version wrote" in refused(convert.read_table, tmp_path)
    assert "cost_vs_loss.csv is missing: --compare takes folders" in refused(convert.read_table, tmp_path / "nowhere")


RECIPES = {  # arguments: split by coactivation?, router, power, width at d = 16, what the table calls it
    "--recipe paper": (False, "norm", 1.0, 6, "paper E=8 r=6"), "--recipe better": (True, "norm", 0.5, 8, "better E=8 r=8"),
    "--recipe moefication": (False, "moefication", 1.0, 6, "moefication E=8 r=6"),
    "--split coactivation --router_power 0.25 --router_width 3": (True, "norm", 0.25, 3, "paper + coactivation split + power 0.25 E=8 r=3"),
    "--recipe better --split weights --attention": (False, "norm", 0.5, 8, "better + attention + weights split E=8 r=8"),
}  # fmt: skip


@pytest.mark.parametrize("arguments", RECIPES)
def test_recipes_set_split_router_and_rule_together(trained, tmp_path, monkeypatch, capsys, arguments):
    coactivation, router, power, width, name = RECIPES[arguments]
    seen, plain = [], convert.coactivation_features
    monkeypatch.setattr(convert, "coactivation_features", lambda mlp, x: seen.append(len(x)) or plain(mlp, x))
    convert.main([*CONVERT, "--ckpt", str(trained), "--out", str(tmp_path), "--steps", "4", "--router_width", str(width), *arguments.split()])
    assert convert.converted_config(tiny_dense(), convert.parse_arguments(["--num_experts", "8", *arguments.split()])).router_width == width
    model, out = d2dmoe.load_model(tmp_path), capsys.readouterr().out
    assert (model.config.num_experts, model.config.router, model.config.router_power, model.config.router_width) == (8, router, power, width)
    assert seen == [8192] * (2 if coactivation else 0)  # tokens, for each of two layers
    rows = convert.read_table(tmp_path)
    assert {row["recipe"] for row in rows} == {name} and load_recipe(tmp_path) == name
    if router == "moefication":
        assert [row["executed"] for row in rows] == [math.ceil(8 * row["value"] - 1e-6) / 8 for row in rows] and len(rows) == 13
    assert {row["rule"] for row in rows} == ({"top_k"} if router == "moefication" else {"dynamic_k", "top_k", "oracle"})
    assert (f"now: python sample.py --ckpt {tmp_path} --tau 0.95" in out) == (router == "norm")
    if "--attention" in arguments:
        assert (model.config.projections, model.config.projection_experts, model.config.projection_router_width) == ("moe", 8, 2)
        assert f"with projection MLPs and all experts: loss {rows[0]['loss']:.4f}" in out
        for row, gate in zip(rows[::3], (None, partial(dynamic_k, tau=0.9), partial(dynamic_k, tau=0.5)), strict=True):
            assert row["executed"] == pytest.approx(by_hand(model, tokens_of(trained, "val.bin"), 8, gate)[1])


def load_recipe(folder):
    return torch.load(folder / "d2dmoe.pt", weights_only=True)["recipe"]


def test_eval_measures_other_taus_and_trains_nothing_and_compare_draws_others(trained, tmp_path, monkeypatch, capsys):
    for name in ("ckpt.pt", "train.bin", "val.bin", "d2dmoe.pt"):
        shutil.copy(trained / name, tmp_path)
    before, drawn = (tmp_path / "d2dmoe.pt").read_bytes(), []
    monkeypatch.setattr(convert, "draw", lambda path, tables: drawn.append(tables))
    monkeypatch.setattr(convert, "fit", lambda *_: pytest.fail("it trains"))
    arguments = ["--ckpt", str(tmp_path), "--eval", "--eval_windows", "8", "--device", "cpu", "--compare", str(trained), "--taus", "0.7", "0.9"]
    convert.main(arguments)
    rows, others = convert.read_table(tmp_path), convert.read_table(trained)
    assert [row["value"] for row in rows if row["rule"] == "dynamic_k"] == [0.7, 0.9] and {row["recipe"] for row in rows} == {"paper E=8 r=4"}
    same = lambda row: (row["rule"], row["executed"], row["flops"], row["loss"])
    assert [same(row) for row in rows[3:]] == [same(row) for row in others if row["value"] == 0.9 or row["rule"] == "top_k" and row["value"] == rows[3]["executed"]]
    assert (tmp_path / "d2dmoe.pt").read_bytes() == before and not (tmp_path / "d2dmoe-previous.pt").exists()
    [[mine, compared]] = drawn
    assert [same(row) for row in mine] == [same(row) for row in rows] and [same(row) for row in compared] == [same(row) for row in others]
    shutil.copy(trained / "ckpt.pt", tmp_path / "d2dmoe.pt")
    assert "is a dense model" in refused(convert.main, *arguments)
    (tmp_path / "d2dmoe.pt").unlink()
    assert "no checkpoint at" in refused(convert.main, *arguments)


def test_a_picture_is_drawn_where_matplotlib_is_installed(trained, tmp_path, capsys, monkeypatch):
    table = convert.read_table(trained)
    others = [[row | {"recipe": recipe} for row in table] for recipe in ("better $x_1$ E=8", "moefication E=8", "\u0107 E=4", "d E=1", "e E=1")]
    if (trained / "cost_vs_loss.png").exists():  # requirements.txt leaves it out: where it is not installed, only that it is not needed is checked
        convert.draw(tmp_path / "c.png", [table, *others])
        assert (tmp_path / "c.png").read_bytes()[:4] == (trained / "cost_vs_loss.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    convert.main([*CONVERT, "--ckpt", str(trained), "--out", str(tmp_path / "out"), "--steps", "1", "--taus", "1"])
    assert "pip install matplotlib draws it" in capsys.readouterr().out and not (tmp_path / "out/cost_vs_loss.png").exists()


@pytest.mark.parametrize("changes", [
    dict(), dict(bias=False, activation="gelu", n_head=4), dict(tie_weights=False, activation="gelu_tanh", d_ff=48, layer_norm_epsilon=1e-3),
], ids=str)  # fmt: skip
def test_export_writes_a_gpt2_of_hugging_faces_that_computes_the_same(changes, tmp_path):
    dense, idx = tiny_dense(**changes), torch.randint(257, (2, 16))
    d2dmoe.save_checkpoint(tmp_path / "ckpt.pt", dense)
    export = ["--ckpt", str(tmp_path / "ckpt.pt"), "--export", str(tmp_path / "hf")]
    convert.main(export)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    names = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new"}
    assert (config["model_type"], names[dense.config.activation]) == ("gpt2", config["activation_function"]), "by transformers' own names"
    weights = torch.load(tmp_path / "hf/pytorch_model.bin", weights_only=True)
    expected = plain_gpt2(weights, idx, config["n_head"], dense.config.activation, config["layer_norm_epsilon"])
    assert (dense(idx)[0].double() - expected).abs().max() < 1e-4
    assert torch.allclose(d2dmoe.load_model(tmp_path / "hf")(idx)[0], dense(idx)[0], atol=1e-4)
    assert weights.keys() == {f"transformer.{k}" for k in gpt2_weights()} | {"lm_head.weight"}
    assert weights["transformer.h.0.mlp.c_fc.weight"].shape == (16, dense.config.d_ff) and config["n_inner"] == dense.config.d_ff
    assert "holds a model already: --export takes a new folder" in refused(convert.main, *export)


def test_foreign_checkpoints_convert(trained, tmp_path):
    weights, idx = gpt2_weights(), torch.randint(257, (2, 16))
    torch.save(nanogpt(weights), tmp_path / "nano.pt")
    hf_folder(tmp_path / "hf", weights)
    for name, kind, data in (
        ("nano.pt", dict(n_head=4, activation="gelu"), ["--data", trained]), ("hf", dict(n_head=8), ["--data", trained / "text.txt", "--tokenizer", "bytes"])
    ):  # fmt: skip
        assert "give their folder, or text, as --data" in refused(convert.main, *CONVERT, "--ckpt", tmp_path / name)
        convert.main([*map(str, [*CONVERT, "--steps", 1, "--taus", 0.9, "--ckpt", tmp_path / name, "--out", tmp_path / "out", *data])])
        assert (d2dmoe.load_model(tmp_path / "out")(idx)[0].double() - plain_gpt2(weights, idx, **kind)).abs().max() < 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# sample.py


def sampled(capsys, *arguments):
    sample.main([str(a) for a in ("--device", "cpu", "--max_new_tokens", 8, *arguments)])
    return capsys.readouterr().out


FOOTER = r"tau ([\d.]+): ([\d.]+)% of the experts executed, ([\d.]+)% of the dense model's FLOPs; (\d+) tokens/s, ([\d.]+)x the (\d+) of all experts without a router"


def test_sampling_ends_with_what_it_cost(trained, capsys):
    moe = d2dmoe.load_model(trained)
    out = sampled(capsys, "--ckpt", trained, "--tau", "0.9", "--prompt", "to be", "--num_samples", "2", "--seed", "3")
    shares, flops, dense, texts = [], 0, 0, []
    fixed = lambda c: 2 * (2 * c * 16 + 4 * 16 * 16) + 257 * 16  # multiply-adds of two blocks for a token that sees c, and the LM head
    for seed in (3, 4):
        idx = torch.tensor([[*b"to be"]])
        text = [*d2dmoe.generate(moe, idx, 8, partial(dynamic_k, tau=0.9), 0.9, None, torch.Generator().manual_seed(seed))]
        texts.append("to be" + bytes(token.item() for token, _ in text).decode(errors="replace"))
        for i, (_, executed) in enumerate(text):
            ran = sum(e.sum().item() for e in executed)
            shares.append(ran / 16)
            flops += fixed(5 + i) + ran * 8 * 2 * 16 + 2 * (16 * 4 + 4 * 8)
            dense += fixed(5 + i) + 2 * 64 * 2 * 16
    found = re.search(FOOTER, out)
    assert out.startswith("\n\n---------------\n".join(texts) + "\n\ntau") and "\x1b" not in out and texts[0] != texts[1]
    assert found and found.groups()[:3] == ("0.9", f"{100 * sum(shares) / 16:.1f}", f"{100 * flops / dense:.1f}") and int(found[4]) > 0
    assert float(found[5]) == pytest.approx(int(found[4]) / int(found[6]), abs=0.02 + 1 / int(found[6]))


def test_at_tau_1_no_router_is_asked_nor_counted_and_the_text_is_the_dense_models(trained, capsys, monkeypatch):
    sample_of = lambda path: sampled(capsys, "--ckpt", path, "--tau", "1", "--max_new_tokens", 40, "--prompt", "to", "--color", "never")
    texts = [sample_of(path) for path in (trained, trained / "ckpt.pt")]
    assert re.search(FOOTER, texts[0]).groups()[:3] == ("1", "100.0", "100.0")
    assert texts[0].partition("\n\ntau")[0] == texts[1].partition("\n\na dense model, to which tau does not apply")[0]
    assert re.search(r": \d+ tokens/s\n$", texts[1]) and "executed" not in texts[1]
    monkeypatch.setattr(Router, "forward", lambda *_: pytest.fail("a router was asked"))
    sampled(capsys, "--ckpt", trained, "--tau", "1")


def test_a_moefication_conversion_is_sampled_with_a_remark(trained, capsys, tmp_path):
    d2dmoe.save_checkpoint(tmp_path / "d2dmoe.pt", tiny_moe(tiny_dense(), router="moefication"), tokenizer="bytes")
    out = sampled(capsys, "--ckpt", tmp_path)
    assert re.search(FOOTER, out) and "whose own rule is top-k" in out


def speaking(path, token, vocab_size=257, tokenizer="bytes"):
    """A checkpoint of a model that says one token for ever"""
    model = tiny_dense(vocab_size=vocab_size, tie_weights=False)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1)
        model.lm_head.weight.zero_()[token] = 100
    d2dmoe.save_checkpoint(path, tiny_moe(model), tokenizer=tokenizer)
    return path


def test_it_stops_at_endoftext_unless_told_otherwise(tmp_path, capsys):
    path = speaking(tmp_path / "d2dmoe.pt", 256)
    assert sampled(capsys, "--ckpt", path, "--prompt", "ab").startswith("ab\n")
    assert sampled(capsys, "--ckpt", path, "--prompt", "ab", "--ignore_end").startswith("ab" + 8 * "<|endoftext|>" + "\n")
    assert sampled(capsys, "--ckpt", speaking(tmp_path / "a.pt", 97), "--prompt", "").startswith(8 * "a" + "\n")  # begins after one


def test_the_prompt_is_standard_input_for_a_dash_and_may_be_longer_than_the_context(tmp_path, capsys, monkeypatch):
    path = speaking(tmp_path / "d2dmoe.pt", 97)
    monkeypatch.setattr(sys, "stdin", io.StringIO("from\nstdin"))
    assert sampled(capsys, "--ckpt", path, "--prompt", "-").startswith("from\nstdin" + 8 * "a" + "\n")
    assert sampled(capsys, "--ckpt", path, "--prompt", 40 * "x").startswith(40 * "x" + 8 * "a" + "\n")
    assert sampled(capsys, "--ckpt", path, "--prompt", "<|endoftext|>").startswith("<|endoftext|>" + 8 * "a")  # as letters
    assert sampled(capsys, "--ckpt", path).startswith("    def " + 8 * "a")


@pytest.mark.parametrize("on_terminal", [True, False])
def test_control_characters_are_escaped_on_a_terminal(tmp_path, capsys, monkeypatch, on_terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: on_terminal, raising=False)
    for token, shown in ((27, r"\x1b"), (10, "\n"), (9, "\t"), (7, r"\x07")):
        out = sampled(capsys, "--ckpt", speaking(tmp_path / "d2dmoe.pt", token), "--prompt", "a\x1b]0;b\r", "--color", "never")
        if on_terminal:
            assert out.startswith(r"a\x1b]0;b\r" + 8 * shown)
        else:  # a pipe gets the bytes
            assert out.startswith("a\x1b]0;b\r" + 8 * chr(token))


def test_shades_spread_over_the_shares_that_occur(trained, capsys):
    out = sampled(capsys, "--ckpt", trained, "--color", "always", "--tau", "0.5", "--max_new_tokens", 20)
    assert "\x1b[48;5;" in out and out.splitlines()[0].count("\x1b[48;5;") == 6
    shares = [0.1, 0.2, 0.3]
    low, middle, high = (sample.shade("x", share, shares) for share in shares)
    assert len({low, middle, high}) == 3 and low == sample.shade("x", 0.8, [0.8, 0.9]) and high == sample.shade("x", 0.9, [0.8, 0.9])
    assert all("x" in s and s.endswith("\x1b[0m") and "38;5;16m" in s for s in (low, middle, high)) and "255m" in low


def test_a_picture_of_tokens_by_layers(trained, capsys, tmp_path, monkeypatch):
    if (trained / "cost_vs_loss.png").exists():  # matplotlib is installed
        sampled(capsys, "--ckpt", trained, "--picture", tmp_path / "p.png", "--prompt", "$x_1$")
        assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    drawn, picture = [], ["--ckpt", speaking(tmp_path / "d2dmoe.pt", 256), "--picture", tmp_path / "q.png"]
    with monkeypatch.context() as patch:
        patch.setattr(sample, "draw", lambda path, tokens, counts, experts: drawn.append((len(tokens), len(counts), experts)))
        sampled(capsys, *picture, "--num_samples", 2)  # ends at once, both times
        sampled(capsys, *picture, "--num_samples", 2, "--ignore_end")
    assert drawn[1] == (8, 8, [8, 8]) and drawn[0][0] == drawn[0][1]  # the first text alone
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in refused(sample.main, *picture, "--max_new_tokens", "2", "--device", "cpu")


LETTERS = "\n !abcdefgh\u00e9\u4e2d"  # of a nanoGPT character model; two are more than one byte in UTF-8


@pytest.fixture
def characters(tmp_path):
    """What nanoGPT's shakespeare_char leaves: ckpt.pt, train.bin, val.bin and meta.pkl"""
    torch.save(nanogpt(gpt2_weights(vocab=len(LETTERS)), vocab_size=len(LETTERS)), tmp_path / "ckpt.pt")
    for name in ("train.bin", "val.bin"):
        np.random.default_rng(0).integers(0, len(LETTERS), 500).astype(np.uint16).tofile(tmp_path / name)
    meta = {"vocab_size": len(LETTERS), "itos": dict(enumerate(LETTERS)), "stoi": {c: i for i, c in enumerate(LETTERS)}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    return tmp_path


def test_a_nanogpt_character_model_is_converted_and_speaks_its_alphabet(characters, capsys):
    convert.main([*CONVERT, "--steps", "1", "--ckpt", str(characters)])
    assert "now: python sample.py" in capsys.readouterr().out
    prompt = "abc \u00e9\u4e2d"
    out = sampled(capsys, "--ckpt", characters, "--prompt", prompt, "--tau", "1", "--max_new_tokens", 30, "--temperature", "0")
    text = torch.cat([t for t, _ in d2dmoe.generate(d2dmoe.load_model(characters / "ckpt.pt"), torch.tensor([[LETTERS.index(c) for c in prompt]]), 30, temperature=0)])
    assert out.startswith(prompt + "".join(LETTERS[i] for i in text.flatten().tolist()) + "\n\ntau 1:")
    for i, letter in enumerate(LETTERS):
        path = speaking(characters / "d2dmoe.pt", i, len(LETTERS), "characters:" + LETTERS)
        assert sampled(capsys, "--ckpt", path, "--prompt", "a").startswith("a" + 8 * letter)
    assert "alphabet has no 'z'" in refused(sample.main, "--ckpt", characters, "--prompt", "z")
    assert "alphabet has no" in refused(sample.main, "--ckpt", characters, "--prompt", "\u00c3")  # half of an é is no letter


def test_tokens_that_nobody_can_spell_are_refused_and_not_guessed(characters, capsys):
    (characters / "meta.pkl").unlink()
    assert "does not tell what its tokens spell" in refused(sample.main, "--ckpt", characters)
    convert.main([*CONVERT, "--steps", "1", "--ckpt", str(characters)])
    assert "sample.py" not in capsys.readouterr().out
    assert "does not tell what its tokens spell" in refused(sample.main, "--ckpt", characters)
    for name in ("gpt2", "characters:" + LETTERS + "zz", "nonsense", ["bytes"], 3):
        d2dmoe.save_checkpoint(characters / "d2dmoe.pt", tiny_moe(tiny_dense(vocab_size=len(LETTERS))), tokenizer=name)
        assert re.search("does not tell what its tokens spell|is unknown", refused(sample.main, "--ckpt", characters))


def test_a_meta_pkl_with_code_in_it_is_refused(characters):
    for content in (Evil(characters / "executed"), {"itos": Evil(characters / "executed")}, {"itos": {0: "ab"}}, {"stoi": {}}, [1], b"x"):
        (characters / "meta.pkl").write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
        assert re.search("meta.pkl (names|is not a character table)", refused(convert.main, *CONVERT, "--ckpt", characters))
    assert not (characters / "executed").exists() and not (characters / "d2dmoe.pt").exists()


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong: one clear line, status 1, nothing lost

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals, limits and pipes as POSIX has them")


def ended(main, *arguments):
    """Runs a script's main as the script does; -> its exit status"""
    with pytest.raises(SystemExit) as end:
        train.run(partial(main, [str(a) for a in arguments]))
    return end.value.code


def copy_run(trained, folder):
    """A folder with the trained run in it; -> its checkpoint's bytes"""
    folder.mkdir(exist_ok=True)
    for name in ("ckpt.pt", "train.bin", "val.bin"):
        shutil.copy(trained / name, folder)
    return (folder / "ckpt.pt").read_bytes()


def read_until(process, pattern):
    for line in process.stdout:
        if re.match(pattern, line):
            return line
    raise AssertionError(process.stderr.read())


def test_a_mistake_is_one_line_and_status_1_a_signal_128_and_its_number_a_bug_a_traceback(capsys):
    def raising(error):
        def main():
            raise error

        return main

    for error, status, message in (
        (ValueError("two\nlines"), 1, "error: two lines"), (FileNotFoundError("gone"), 1, "error: gone"), (OSError("\x1b[2Jfull"), 1, r"error: \x1b[2Jfull"),
        (KeyboardInterrupt(), 130, "interrupted"), (MemoryError(), 1, "error: out of memory: lower --batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "error: out of memory"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            train.run(raising(error))
        err = capsys.readouterr().err
        assert end.value.code == status and err.startswith(message) and err.count("\n") == 1
    for result, status in ((None, 0), (0, 0), (143, 143)):
        with pytest.raises(SystemExit) as end:
            train.run(lambda: result)
        assert end.value.code == status
    with pytest.raises(RuntimeError, match="a bug"):
        train.run(raising(RuntimeError("a bug")))


def test_the_scripts_end_in_one_line_too():
    processes = {name: script(name, "--device", "toaster") for name in ("train.py", "convert.py", "sample.py")}
    for process in processes.values():
        out, err = process.communicate(timeout=60)
        assert process.returncode == 1 and out == "" and re.fullmatch("error: --device toaster cannot be used here.*\n", err)


def test_user_errors_end_in_one_line(trained, tmp_path, monkeypatch):
    text, ckpt, out = trained / "text.txt", trained / "ckpt.pt", tmp_path / "out"
    (tmp_path / "empty.txt").touch()
    (tmp_path / "nothing").mkdir()
    (tmp_path / "half.pt").write_bytes(ckpt.read_bytes()[:9999])
    torch.save({"model": {}, "evil": Evil(tmp_path / "executed")}, tmp_path / "evil.pt")
    copy_run(trained, tmp_path / "run")
    (tmp_path / "converted").mkdir()
    shutil.copy(trained / "d2dmoe.pt", tmp_path / "converted")
    before, small = {p: p.read_bytes() for p in trained.iterdir()}, [*TINY, "--steps", "1", "--data", text, "--out", out]
    for message, main, *arguments in [
        ("no checkpoint at .*nowhere", sample.main, "--ckpt", tmp_path / "nowhere"), ("no checkpoint at .*nowhere", convert.main, "--ckpt", tmp_path / "nowhere"),
        ("no checkpoint at .*/out: run train.py first", train.main, "--init", "resume", "--out", out),
        ("no checkpoint at .*nowhere.pt", train.main, *small, "--init", tmp_path / "nowhere.pt"),
        ("half.pt is damaged or not a checkpoint", convert.main, "--ckpt", tmp_path / "half.pt"),
        ("evil.pt holds an object of .*open", train.main, *small, "--init", tmp_path / "evil.pt"),
        ("there is only a conversion; give the folder of the dense model", convert.main, "--ckpt", tmp_path / "converted"),
        ("is converted already", convert.main, "--ckpt", trained / "d2dmoe.pt"),
        ("is a converted model: training starts from a dense one", train.main, *small, "--init", trained / "d2dmoe.pt"),
        ("--tau.* 1.5 does not lie between 0 and 1", sample.main, "--ckpt", trained, "--tau", "1.5"), ("--tau.* nan does not lie", sample.main, "--tau", "nan"),
        ("--taus.* -0.5 does not lie", convert.main, "--ckpt", trained, "--taus", "0.5", "-0.5"),
        ("7 experts do not divide 64 neurons", convert.main, "--ckpt", trained, "--out", out, "--num_experts", "7"),
        ("--recipe moefication.* has no --router_power", convert.main, "--ckpt", trained, "--recipe", "moefication", "--router_power", "0.5"),
        ("tokens are too few for a context of 16", train.main, *small, "--data", tmp_path / "empty.txt"),
        ("nothing is not UTF-8 text", train.main, *small, "--data", tmp_path / "nothing"), ("nowhere: no such file or folder", train.main, *small, "--data", tmp_path / "nowhere"),
        ("n_embd 15 must be a multiple of n_head", train.main, *small, "--n_embd", "15"), ("cuda:77 cannot be used here", sample.main, "--device", "cuda:77"),
        ("--steps: 0 does not lie between 1 and", train.main, "--steps", "0"), ("--lr: nan does not lie", train.main, "--lr", "nan"), ("--lr: inf does not lie", convert.main, "--lr", "inf"),
        ("--beta2: 1 does not lie", train.main, "--beta2", "1"), ("--seed: -1 does not lie", sample.main, "--seed", "-1"), ("--n_layer: invalid int value: 'x'", train.main, "--n_layer", "x"),
        ("unrecognized arguments: --bogus", train.main, "--bogus"), ("--temperature must be 0 or at least 0.001", sample.main, "--temperature", "1e-40"),
        ("is too small for the tokenizer 'gpt2'", convert.main, "--ckpt", tmp_path / "nano.pt", "--out", out, "--data", text, "--tokenizer", "gpt2"),
        ("no train.bin and val.bin beside", convert.main, "--ckpt", tmp_path / "nano.pt"), ("do not agree how tokens are spelled", convert.main, "--ckpt", trained, "--tokenizer", "gpt2"),
        ("does not tell its tokens: add --tokenizer", train.main, *small, "--init", tmp_path / "nano.pt"),
        ("train.bin and val.bin are missing: give their folder", train.main, "--init", "resume", "--out", tmp_path / "bare", "--steps", "50"),
    ]:  # fmt: skip
        if not (tmp_path / "nano.pt").exists():  # a checkpoint that does not tell its tokenizer
            d2dmoe.save_checkpoint(tmp_path / "nano.pt", tiny_dense())
            (tmp_path / "bare").mkdir()
            shutil.copy(ckpt, tmp_path / "bare")
        line = refused(main, *arguments)
        assert re.search(message, line), f"{arguments}: {line}"
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: (_ for _ in ()).throw(ConnectionError("no route")))
    assert re.search("connect to the internet once, or set TIKTOKEN_CACHE_DIR.*sha1 of their URL", refused(train.main, *small, "--tokenizer", "gpt2"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "--compile needs a C++ compiler" in refused(train.main, *small, "--compile")
    assert not (tmp_path / "executed").exists() and not list(out.glob("*.pt"))
    assert {p: p.read_bytes() for p in before} == before


def test_what_the_end_needs_is_tried_at_the_start(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "encode_text", lambda *_: pytest.fail("it began"))
    monkeypatch.setattr(convert, "evaluate", lambda *_: pytest.fail("it began"))
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("train", "convert"):
        (tmp_path / name / {"train": "ckpt.pt", "convert": "d2dmoe.pt"}[name]).mkdir(parents=True)
    commands = {"train": (train.main, *TINY, "--data", trained / "text.txt"), "convert": (convert.main, *CONVERT, "--ckpt", trained)}
    for name, (main, *arguments) in commands.items():
        for out, message in (
            ("file", "file is not a folder"), ("file/deeper", "file is not a folder"), ("link", "link is not a folder"),
            (name, r"(ckpt|d2dmoe).pt is a folder, where a file is to be written"),
        ):  # fmt: skip
            assert re.search(message, refused(main, *arguments, "--out", tmp_path / out))
    monkeypatch.undo()
    arguments = [*CONVERT, "--ckpt", trained, "--out", tmp_path / "out"]
    assert ended(convert.main, *arguments, "--router_width", 2**40) == 1 and "out of memory" in capsys.readouterr().err


@pytest.mark.parametrize("hard_links", [True, False])
def test_an_earlier_model_keeps_another_name(trained, tmp_path, capsys, monkeypatch, hard_links):
    if not hard_links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("not supported")))
    first, data = copy_run(trained, tmp_path), ["--data", trained / "text.txt"]
    run_train(tmp_path, *data, "--steps", 20, "--seed", 1)  # it saves twice
    assert f"stays as {tmp_path}/ckpt-previous.pt" in capsys.readouterr().out
    second = (tmp_path / "ckpt.pt").read_bytes()
    run_train(tmp_path, *data, "--steps", 10, "--seed", 2)
    run_train(tmp_path, "--init", "resume", "--steps", 20)  # the same run going on: nothing to keep
    run_train(tmp_path, *data, "--init", tmp_path / "ckpt-previous.pt", "--steps", 10)  # back to the first one
    names = ["ckpt-previous.pt", "ckpt-previous-2.pt", "ckpt-previous-3.pt", "ckpt.pt"]
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == sorted(names) and not list(tmp_path.glob("*.tmp"))
    assert (tmp_path / names[0]).read_bytes() == first and (tmp_path / names[1]).read_bytes() == second


@pytest.mark.parametrize("resume", [True, False])
def test_a_checkpoint_that_is_a_link_loses_nothing(trained, tmp_path, resume):
    first = copy_run(trained, tmp_path)
    (tmp_path / "ckpt.pt").rename(tmp_path / "ckpt-previous.pt")
    (tmp_path / "ckpt.pt").symlink_to("ckpt-previous.pt")
    run_train(tmp_path, *(["--init", "resume"] if resume else ["--data", trained / "text.txt"]), "--steps", 40)
    assert saved(tmp_path)["step"] == 40 and (tmp_path / "ckpt-previous.pt").read_bytes() == first


def stop_at(monkeypatch, step):
    """From now on a training gets SIGTERM in the middle of its step of that number, counted from 1."""
    plain, calls = torch.nn.utils.clip_grad_norm_, itertools.count(1)

    def clip(*arguments):
        if next(calls) == step:
            signal.raise_signal(signal.SIGTERM)
        return plain(*arguments)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)


def test_a_run_stopped_before_its_first_evaluation_spares_an_earlier_model(trained, tmp_path, monkeypatch, capsys):
    before, arguments = copy_run(trained, tmp_path), ["--data", trained / "text.txt", "--steps", 1000, "--eval_every", 1000]
    for _ in range(2):
        with monkeypatch.context() as patch:
            stop_at(patch, 5)
            assert run_train(tmp_path, *arguments) == 143
        assert f"{tmp_path}/ckpt.pt stays the earlier run's" in capsys.readouterr().out
        assert (tmp_path / "ckpt.pt").read_bytes() == before
    stop_at(monkeypatch, 5)
    assert run_train(tmp_path / "new", *arguments) == 143
    assert "stopped at step 5 and saved" in capsys.readouterr().out and saved(tmp_path / "new")["step"] == 5


def test_a_stop_in_the_step_that_breaks_the_weights_does_not_save_them(trained, tmp_path, monkeypatch):
    before = copy_run(trained, tmp_path)
    stop_at(monkeypatch, 1)
    assert "not finite" in refused(train.main, "--init", "resume", "--out", tmp_path, "--steps", 40, "--lr", "1e38", "--warmup", 0)
    assert (tmp_path / "ckpt.pt").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_training_and_spares_the_checkpoint(trained, tmp_path):
    before = copy_run(trained, tmp_path)
    for every, step in ((100, 31), (1, 30)):  # the second is caught by the evaluation right after the step that broke the weights
        line = refused(train.main, "--init", "resume", "--out", tmp_path, "--steps", 40, "--lr", "1e30", "--warmup", 0, "--eval_every", every)
        assert re.search(rf"step {step}: .*loss.* not finite.*try a lower --lr", line)
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    line = refused(convert.main, *CONVERT, "--ckpt", tmp_path, "--lr", "1e20")
    assert "routers: the loss is not finite at step" in line and not (tmp_path / "d2dmoe.pt").exists()
    poisoned = saved(tmp_path)
    poisoned["model"]["transformer.ln_f.bias"][:] = 3e38  # finite weights, infinite logits
    torch.save(poisoned, tmp_path / "ckpt.pt")
    assert "loss on held-out text is" in refused(convert.main, *CONVERT, "--ckpt", tmp_path)


@posix
def test_signals_save_first_and_say_how_to_resume(trained, tmp_path):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    arguments = [*TINY, "--data", trained / "text.txt", "--steps", 10**6]
    processes = [script("train.py", *arguments, "--out", tmp_path / n.name) for n in numbers]
    for number, process in zip(numbers, processes, strict=True):
        read_until(process, " +20 ")
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number and err == ""
        step = int(re.search(r"stopped at step (\d+) and saved; go on with: python train.py --init resume --out", out)[1])
        assert step >= 20 and saved(tmp_path / number.name)["step"] == step


@posix
def test_a_second_ctrl_c_cuts_a_long_step_short(trained, tmp_path):
    before = copy_run(trained, tmp_path)
    process = script("train.py", "--init", "resume", "--out", tmp_path, "--steps", 40, "--grad_accum", 10**5)
    read_until(process, " +step ")
    for _ in range(2):
        try:
            process.wait(1.5)
        except subprocess.TimeoutExpired:  # the first one only asks to stop after the step
            process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and re.fullmatch("interrupted.*\n", err) and (tmp_path / "ckpt.pt").read_bytes() == before


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in Linux's /proc")
def test_a_signal_to_torchrun_and_all_its_processes_saves_too(trained, tmp_path):
    agent = torchrun("train.py", *TINY, "--data", trained / "text.txt", "--out", tmp_path, "--steps", 10**6, "--grad_accum", 50)
    read_until(agent, " +10 ")
    workers = [int(p) for p in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]
    assert len(workers) >= 2
    for pid in (agent.pid, *workers):  # the agent passes it on, so that workers get it twice
        os.kill(pid, signal.SIGTERM)
    out, _ = agent.communicate(timeout=60)
    step = int(re.search(r"stopped at step (\d+) and saved", out)[1])
    assert step >= 10 and saved(tmp_path)["step"] == step


def test_after_a_run_this_process_is_as_before(trained, tmp_path):
    """In a notebook Ctrl-C works again, and a mistake's traceback does not keep a folder locked."""
    import threading

    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    arguments = ["--data", trained / "text.txt", "--steps", 1]
    with pytest.raises(ValueError, match="multiple of n_head") as kept:  # noqa: F841
        run_train(tmp_path, *arguments, "--n_embd", 15)
    run_train(tmp_path, *arguments)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    thread = threading.Thread(target=run_train, args=(tmp_path / "thread", *arguments))
    thread.start()
    thread.join()
    assert saved(tmp_path / "thread")["step"] == 1


@posix
def test_of_two_runs_into_one_folder_the_second_is_refused(trained, tmp_path):
    arguments = [*TINY, "--data", trained / "text.txt", "--out", tmp_path]
    process = script("train.py", *arguments, "--steps", 10**6)
    read_until(process, " +10 ")
    for main, *words in ((train.main, *arguments), (train.main, "--init", "resume", "--out", tmp_path), (convert.main, *CONVERT, "--ckpt", tmp_path)):
        assert "another run is writing into" in refused(main, *words)
    process.kill()  # and a run that was killed locks nobody out
    process.communicate()
    run_train(tmp_path, "--init", "resume", "--steps", saved(tmp_path)["step"] + 1)


@posix
def test_a_full_disk_leaves_the_old_checkpoint_and_says_why(trained, tmp_path):
    import resource

    before = copy_run(trained, tmp_path)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # bytes: more than the tokens, less than a checkpoint
    process = script("train.py", *TINY, "--data", trained / "text.txt", "--out", tmp_path, "--steps", 10, preexec_fn=limit)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and re.fullmatch("error: cannot write .*ckpt.pt: File too large; an older file is untouched\n", err)
    assert (tmp_path / "ckpt.pt").read_bytes() == before and not list(tmp_path.glob("*.tmp"))


@posix
@pytest.mark.parametrize("name", ["train.py", "convert.py"])
def test_killed_at_random_there_is_no_checkpoint_or_a_whole_one(trained, tmp_path, name):
    """Children are forked from a process that has imported everything, so that a kill costs a fraction of a second."""
    copy_run(trained, tmp_path)
    arguments = [*TINY, "--data", str(trained / "text.txt"), "--steps", "1000000", "--eval_every", "1", "--eval_windows", "1"]
    if name == "convert.py":
        arguments = [*CONVERT, "--ckpt", str(tmp_path), "--taus", "1", "--steps", "2"]
    code = f"""
import os, random, signal, sys, time
sys.path.insert(0, {str(HERE)!r})
import torch, torch._dynamo, train, convert  # the optimizer would import _dynamo in every child
from pathlib import Path
torch.set_num_threads(1)
draw, folder = random.Random(1), Path({str(tmp_path / "run")!r})
for trial in range({8 * LONG}):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        resume = ["--init", "resume"] if (folder / "ckpt.pt").exists() else []
        while True:
            {name.removesuffix(".py")}.main([*{arguments!r}, "--out", str(folder), *resume])
    time.sleep(0.1 + draw.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for path in folder.glob("*.pt"):
        train.build_model(train.load_checkpoint(path), path)
    step = train.load_checkpoint(folder / "ckpt.pt")["step"] if (folder / "ckpt.pt").exists() else 0
    print(len(list(folder.glob("*.pt"))), step, flush=True)
"""
    result = subprocess.run([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300 * LONG)
    assert result.returncode == 0, result.stderr[-2000:]
    found = [tuple(map(int, line.split())) for line in result.stdout.splitlines()]
    assert len(found) == 8 * LONG and sum(n > 0 for n, _ in found) > 4 * LONG and found == sorted(found), result.stderr[-2000:]
    assert (found[-1][1] > found[0][1]) == (name == "train.py")  # each training resumed from the one before


def test_settings_and_steps_of_a_checkpoint_are_checked_as_the_command_line_is(trained, tmp_path):
    copy_run(trained, tmp_path)
    good = saved(tmp_path)
    for changes in (
        {"arguments": None}, {"arguments": 3}, {"arguments": ["--steps=30", 5]}, {"arguments": ["--lr=nan"]}, {"arguments": ["--steps=0"]}, {"arguments": ["--lr"]},
        {"arguments": ["stray"]}, {"arguments": ["--bogus=1"]}, {"arguments": ["--dtype=int8"]}, {"arguments": ["--help"]}, {"step": -1}, {"step": "x"}, {"step": None},
        {"step": math.inf}, {"step": math.nan}, {"step": torch.zeros(3)}, {"text": torch.zeros(3)}, {"text": None}, {"optimizer": None}, {"optimizer": {}}, {"tokenizer": 3},
        {"tokenizer": ["bytes"]}, {"config": good["config"] | {"vocab_size": [1]}}, {"config": good["config"] | {"n_layer": 10**9}}, {"config": None}, {"model": {}},
    ):  # fmt: skip
        torch.save(good | changes, tmp_path / "ckpt.pt")
        before = (tmp_path / "ckpt.pt").read_bytes()
        refused(train.main, "--init", "resume", "--out", tmp_path, "--steps", 40)
        assert (tmp_path / "ckpt.pt").read_bytes() == before
    elsewhere = [f"--out={tmp_path}/elsewhere", f"--da={tmp_path}/elsewhere", "--init=scratch", "--device=toaster", "--steps=31"]  # no path is taken from it
    torch.save(good | {"arguments": good["arguments"] + elsewhere}, tmp_path / "ckpt.pt")
    train.main(["--init", "resume", "--out", str(tmp_path)])
    assert saved(tmp_path)["step"] == 31 and not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("wrong", [
    lambda m: torch.zeros(5, 7), lambda m: m[:1], lambda m: m.flatten(), lambda m: m.t().contiguous().t(), lambda m: m.double(), lambda m: m.half(), lambda m: m.to_sparse(),
    lambda m: m.to("meta"), lambda m: m.tolist(), lambda m: None,
])  # fmt: skip
def test_moments_that_do_not_fit_are_refused_before_the_optimizer_sees_them(wrong, name, trained, tmp_path):
    copy_run(trained, tmp_path)
    checkpoint = saved(tmp_path)
    state = checkpoint["optimizer"]["state"][1]
    assert state[name].dim() == 2
    state[name] = wrong(state[name])
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    line = refused(train.main, "--init", "resume", "--out", tmp_path, "--steps", 40)
    assert "ckpt.pt cannot be resumed" in line and f"use it with --init {tmp_path}/ckpt.pt" in line


def test_changed_text_is_noticed(trained, tmp_path, monkeypatch, capsys):
    write_text(tmp_path / "text.txt")
    run_train(tmp_path / "out", "--data", tmp_path / "text.txt", "--steps", 10)
    resume = ["--init", "resume", "--out", tmp_path / "out", "--device", "cpu", "--steps"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    write_text(tmp_path / "text.txt", seed=1)  # the run has its tokens: neither the folder nor the text's new content matters
    train.main([*map(str, resume), "11"])
    assert "warning" not in capsys.readouterr().out
    train.main([*map(str, resume), "12", "--data", str(tmp_path / "text.txt")])
    assert "warning: this is not the text of the run so far" in capsys.readouterr().out
    for name in ("train.bin", "val.bin"):
        shutil.copy(trained / name, tmp_path / "out")
    for main, *arguments in ((train.main, *resume, 20), (convert.main, *CONVERT, "--ckpt", tmp_path / "out")):
        assert "are not what ckpt.pt was trained on: give that text as --data" in refused(main, *arguments)


@posix
def test_standard_output_is_no_reason_to_lose_a_run(trained, tmp_path):
    run = f"{sys.executable} {HERE}/train.py {' '.join(TINY)} --data {trained}/text.txt --steps 20 --out"
    speak = f"{sys.executable} {HERE}/sample.py --ckpt {trained} --device cpu --max_new_tokens 5000"
    commands = {
        f"{run} {tmp_path}/head": "| head -1", f"{run} {tmp_path}/full": ">/dev/full", f"{run} {tmp_path}/closed": ">&-",
        f"PYTHONIOENCODING=cp1252 {run} {tmp_path}/Książka": f">{tmp_path}/said", f"{speak}": "| head -c 5",
    }  # fmt: skip
    start = partial(subprocess.Popen, shell=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    processes = [start(f"{{ {command}; echo status $? >&2; }} {redirection}") for command, redirection in commands.items()]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert errors[:4] == ["status 0\n"] * 4 and re.fullmatch("error: .*Broken pipe\nstatus 1\n", errors[4])
    assert re.search(r"\nwrote .*/Ksi\\u0105\\u017cka/ckpt.pt; now: ", (tmp_path / "said").read_text())
    assert [saved(tmp_path / name)["step"] for name in ("head", "full", "closed", "Książka")] == [20] * 4


@posix
@pytest.mark.parametrize("name", [b"mo$ney$_^{x", b"not UTF-8 \xff", b"\x1b[2J new\nline"])
def test_odd_names_of_folders_end_no_conversion(name, trained, tmp_path, capsys):
    folder = tmp_path / os.fsdecode(name)
    copy_run(trained, folder)
    convert.main([*CONVERT, "--steps", "1", "--ckpt", str(folder)])
    convert.main([*CONVERT, "--ckpt", str(folder), "--eval", "--compare", str(folder)])
    assert d2dmoe.load_model(folder).config.num_experts == 8 and "\x1b" not in capsys.readouterr().out


def test_corrupted_checkpoints_are_refused_or_load_to_the_same_values(trained, tmp_path):
    draw, path, marker, refusals = random.Random(0), tmp_path / "c.pt", tmp_path / "executed", 0
    good, raw = saved(trained, "d2dmoe.pt"), (trained / "d2dmoe.pt").read_bytes()

    def edited():
        """A file written by torch.save whose content is wrong"""
        c = {**good, "model": dict(good["model"]), "config": dict(good["config"])}
        name, how = draw.choice(list(c["model"])), draw.randrange(6)
        if how == 0:
            del c["model"][name]
        elif how == 1:
            c["model"][name] = draw.choice([c["model"][name][..., :-1], None, "text", 3, [1.0]])
        elif how == 2:
            c["config"][draw.choice(["n_layer", "n_embd", "vocab_size", "block_size", "num_experts", "router_width"])] = draw.choice([-1, 3, 10**9, "4", None, 2.5])
        elif how == 3:
            del c[draw.choice(["model", "config"])]
        elif how == 4:
            c[draw.choice(["model", "config"])] = draw.choice([None, [], "x", 5])
        else:
            c["extra"] = Evil(marker)
        torch.save(c, path)

    for trial in range(150 * LONG):
        if trial % 3 == 0:
            path.write_bytes(raw[: draw.randrange(len(raw))])
        elif trial % 3 == 1:
            flipped = bytearray(raw)
            for _ in range(draw.choice([1, 1, 3, 50])):
                flipped[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
            path.write_bytes(flipped)
        else:
            edited()
        try:
            model = d2dmoe.load_model(path)
        except (ValueError, OSError) as error:
            refusals += 1
            assert "\n" not in str(error) and str(path) in str(error)
        else:
            assert trial % 3 != 2, "wrong content was accepted"
            assert_same_weights(model.state_dict(), good["model"])
    assert refusals > 105 * LONG and not marker.exists()


# ---------------------------------------------------------------------------------------------------------------------
# README.md


def test_the_readmes_python_runs_in_a_notebook(trained, capsys):
    torch.manual_seed(0)
    snippets = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    for i, snippet in enumerate(snippets):
        names = names if i == 3 else {}  # the last one goes on from the one before
        exec(snippet.replace('"out"', repr(str(trained))), names)
    out = capsys.readouterr().out
    share, error = re.search(r"(\d+)% of the experts, error ([\d.]+)", out).groups()
    assert len(snippets) == 4 and "torch.Size([1, 9, 257])" in out and int(share) < 30 and float(error) < 0.1
    assert -1 <= float(re.search(r"correlation (\S+)", out)[1]) <= 1 and out.count("of the experts\n") == 3 and re.search(r"^0 [\d.]+\n1 [\d.]+$", out, re.MULTILINE)
    norms = torch.tensor([[5.0, 1.0, 3.0, 1.0], [1.0, 1.0, 1.0, 97.0]])
    assert names["top_mass"](norms, 0.8).tolist() == [[True, False, True, False], [False, False, False, True]]


def test_the_readmes_commands_have_options_that_exist():
    text = (HERE / "README.md").read_text(encoding="utf-8").replace("convert.py --ckpt out/ && ", "convert.py --ckpt out/\n")
    commands = re.findall(r"^(?:torchrun \S+ |python )(train|convert|sample)\.py([^#\n]*)", text, flags=re.MULTILINE)
    assert len(commands) >= 12
    for name, rest in commands:
        if "resume" not in rest:
            getattr(globals()[name], "parse_arguments")(shlex.split(rest))
