"""Tests, in the order of the files: kernels, d2dmoe, train, convert, sample, then all of it under failure. `pytest -q`

They need no GPU, no network and no files but these: Triton's kernels run in its interpreter and are compiled ahead of
time. D2DMOE_LONG=1 makes the kill and fuzz sweeps ten times longer.
"""

import argparse
import ast
import copy
import dataclasses
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from unittest.mock import Mock

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels then run on the CPU

import numpy as np
import pytest
import regex  # tiktoken's
import tiktoken
import torch
import torch.nn.functional as F

import convert
import d2dmoe
import kernels
import sample
import train
from d2dmoe import GPT, DynamicKMoE, GPTConfig, Router, dynamic_k, load_model, top_k

torch.set_num_threads(1)  # what else runs on the machine would slow two threads far more than one

HERE = Path(d2dmoe.__file__).resolve().parent
LONG = 10 if os.environ.get("D2DMOE_LONG") == "1" else 1
needs_triton = pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")


# ---------------------------------------------------------------------------------------------------------------------
# Helpers


def loops(x, w1, b1, w2, executed, activation):
    """The definition of the layer, written as loops over tokens and experts, in float64"""
    act = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}[activation]
    y = torch.zeros(x.shape, dtype=torch.float64)
    for n, e in itertools.product(range(len(x)), range(len(w1))):
        if executed[n, e]:
            y[n] += act(w1[e].double() @ x[n].double() + b1[e].double()) @ w2[e].double()
    return y


def assert_close(y, expected, tolerance):
    assert y.shape == expected.shape and torch.isfinite(y).all()
    assert (y.double() - expected).norm() <= tolerance * expected.norm() + 1e-30


def assert_same_weights(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance, name


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


def with_projection_mlps(dense):
    """The dense model with projection MLPs that nobody trained"""
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(dense.config, projections="mlp"))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.load_state_dict(dense.state_dict(), strict=False)
    return model.eval()


def tiny_moe(dense, **changes):
    """The dense model, or the one with projection MLPs, split; with routers as they are drawn"""
    torch.manual_seed(0)
    if dense.config.projections == "mlp":
        changes = dict(projections="moe", projection_experts=4, projection_router_width=3) | changes
    moe = GPT(dataclasses.replace(dense.config, **dict(num_experts=8, router_width=4) | changes))
    convert.split_model(dense, moe, None, seed=0)
    return moe.eval()


def models():
    """Dense, with experts, and with experts in attention too"""
    dense = tiny_dense()
    return {"dense": dense, "experts": tiny_moe(dense), "attention": tiny_moe(with_projection_mlps(dense))}


def write_text(path, words=6000, seed=0):
    draw = random.Random(seed)
    vocabulary = ["to", "be", "or", "not", "that", "is", "the", "question", "\n"]
    path.write_text(" ".join(draw.choice(vocabulary) for _ in range(words)))
    return path


TINY = """--n_layer 2 --n_head 2 --n_embd 16 --block_size 16 --batch_size 4 --eval_every 10 --eval_windows 8 --warmup 2
    --device cpu""".split()
CONVERT = "--num_experts 8 --router_width 4 --steps 20 --eval_windows 8 --taus 1 0.9 0.5 --device cpu".split()


def run(main, *arguments):
    """A script's main with these words as its command line"""
    return main([str(a) for a in arguments])


def run_train(out, *arguments):
    return run(train.main, *TINY, "--out", out, *arguments)


def run_convert(ckpt, *arguments):
    return run(convert.main, *CONVERT, "--ckpt", ckpt, *arguments)


def refused(function, *arguments):
    """Calls a function, or a script's main, and returns the one sentence that it raises."""
    call = partial(run, function) if function in (train.main, convert.main, sample.main) else function
    with pytest.raises((ValueError, OSError)) as error:
        call(*arguments)
    line = str(error.value)
    del error  # its traceback keeps main's variables alive, and among them the lock on a folder
    assert line and "\n" not in line
    return line


def check_refusals(call, table, path=None):
    """For a table {pattern: [what is wrong, ...]}: it is refused, with a line of the pattern, by call(wrong) or, where
    there is a path, by call() once it is written there; the line then names the file."""
    for pattern, wrongs in table.items():
        for wrong in wrongs:
            if path is None:
                line = refused(call, wrong)
            else:
                path.write_bytes(wrong) if isinstance(wrong, bytes) else torch.save(wrong, path)
                line = refused(call)
                assert path.name in line
            assert re.search(pattern, line), (wrong, line)


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a text (text.txt), its tokens (train.bin, val.bin), a tiny trained model (ckpt.pt) and its
    conversion (d2dmoe.pt, cost_vs_loss.csv). Tests only read it."""
    folder = tmp_path_factory.mktemp("trained")
    run_train(folder, "--data", write_text(folder / "text.txt"), "--steps", 30)
    run_convert(folder)
    return folder


def copy_run(trained, folder):
    """Copies the trained run into a folder; -> its checkpoint's bytes"""
    folder.mkdir(exist_ok=True)
    for name in ("ckpt.pt", "train.bin", "val.bin"):
        shutil.copy(trained / name, folder)
    return (folder / "ckpt.pt").read_bytes()


def saved(folder, name="ckpt.pt"):
    return torch.load(folder / name, weights_only=True)


def tokens_of(folder, name="train.bin"):
    return np.fromfile(folder / name, dtype=np.uint16)


@dataclasses.dataclass
class Evil:
    """A pickle that creates a file when it is loaded"""

    path: Path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def start(*words, **options):
    """A Python process on one thread: start("-c", code), start("train.py", "--steps", 5)"""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | options.pop("env", {})
    options = dict(cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) | options
    return subprocess.Popen([sys.executable, *map(str, words)], env=environment, **options)


def torchrun(*words):
    """A script in two processes, in a session of their own"""
    rendezvous = ("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0")
    return start("-m", "torch.distributed.run", "--nproc_per_node=2", *rendezvous, *words, start_new_session=True)


def output_of(process):
    """What a process said, once it has ended well"""
    out, errors = process.communicate(timeout=300 * LONG)
    assert process.returncode == 0, errors[-2000:]
    return out


# ---------------------------------------------------------------------------------------------------------------------
# kernels.py


@pytest.mark.parametrize("N, d, E, h", [
    (0, 16, 3, 8), (1, 33, 1, 5), (1, 40, 7, 24), (2, 64, 4, 64), (17, 40, 3, 24), (17, 48, 1, 72), (40, 20, 5, 3),
])  # fmt: skip
def test_every_path_equals_the_definition(N, d, E, h):
    paths = [kernels.expert_ffn, kernels.masked_ffn, kernels.dense_ffn, kernels.grouped_ffn, kernels.sampled_ffn]
    paths += [kernels.triton_ffn] if kernels.triton else []
    every, expert = torch.ones(N, E, dtype=torch.bool), torch.arange(E)
    masks = (every, ~every, torch.rand(N, E) < 0.4, every & (expert == E - 1), every & (expert != E // 2))
    for executed, activation in itertools.product(masks, kernels.ACTIVATIONS):
        layer = kernels.random_layer(N, d, E, h, torch.float32, "cpu")
        expected = loops(*layer, executed, activation)
        for path in paths:
            assert_close(path(*layer, executed, activation), expected, 1e-5)
            if executed.all() and path not in (kernels.grouped_ffn, kernels.sampled_ffn):
                assert_close(path(*layer, None, activation), expected, 1e-5)


def test_the_cpu_takes_each_path_where_it_pays(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # with one, some ways of dense_ffn are not taken
    taken = []
    for name in ("masked_ffn", "dense_ffn", "sampled_ffn", "grouped_ffn"):
        path = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, path=path, name=name: taken.append(name) or path(*a))
    for expected, layers in {
        "sampled_ffn": [(1, 512, 16, 128, 0.25), (4, 512, 16, 128, 0.1), (512, 128, 64, 8, 0.2)],
        "grouped_ffn": [(2048, 256, 8, 128, 0.1), (1, 512, 16, 128, 0.1, torch.float64)],
        "dense_ffn": [
            (1, 64, 16, 16, 0.1), (512, 16, 8, 4, 0.4), (4, 512, 16, 128, 0.9), (2048, 256, 8, 128, 1.0),
            (2, 512, 16, 128, 1.0), (3, 640, 8, 128, 1.0),  # w2 by embedding_bag; wider, in eight parts
        ],
    }.items():  # fmt: skip
        for N, d, E, h, share, *dtype in layers:
            layer = kernels.random_layer(N, d, E, h, *dtype or [torch.float32], "cpu")
            executed = kernels.random_mask(N, E, share, "cpu")
            y = kernels.expert_ffn(*layer, executed, "gelu")
            assert taken == [expected], (N, d, E, h, share)
            assert_close(y, kernels.masked_ffn(*(t.double() for t in layer), executed, "gelu"), 1e-5)
            taken.clear()


def test_gradients_other_dtypes_strides_and_autocast():
    layer = [t.double().requires_grad_() for t in kernels.random_layer(5, 6, 3, 4, torch.float32, "cpu")]
    executed = torch.rand(5, 3) < 0.5
    for activation in kernels.ACTIVATIONS:
        assert torch.autograd.gradcheck(lambda *t: kernels.expert_ffn(*t, executed, activation), layer)
    for N in (1, 40):
        layer = kernels.random_layer(N, 64, 4, 128, torch.float32, "cpu")
        executed = kernels.random_mask(N, 4, 0.5, "cpu")
        expected = loops(*layer, executed, "relu")
        for dtype, tolerance in {torch.bfloat16: 2e-2, torch.float64: 1e-6}.items():
            y = kernels.expert_ffn(*(t.to(dtype) for t in layer), executed, "relu")
            assert y.dtype == dtype
            assert_close(y, expected, tolerance)
        strided = [torch.stack([t, t], -1)[..., 0] for t in layer]
        assert_close(kernels.expert_ffn(*strided, executed, "relu"), expected, 1e-5)
        x, *weights = layer
        assert kernels.expert_ffn(x.bfloat16(), *weights, executed, "relu").dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            for given in (x, x.bfloat16()):
                assert_close(kernels.expert_ffn(given, *weights, executed, "relu").float(), expected, 2e-2)
                assert kernels.linear(given, weights[0][0]).dtype == torch.bfloat16


def test_linear_is_f_linear(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    taken, rule = [], kernels.few_rows_on_cpu  # whether `linear` did other than F.linear
    monkeypatch.setattr(kernels, "few_rows_on_cpu", lambda *a: taken.append(rule(*a)) or taken[-1])
    rows = [(), (0,), (1,), (1, 1), (2, 3), (40,)]
    cases = [*itertools.product((1, 3, 24, 1024, 1031, 7777), rows), (50257, (1,)), (50257, (2, 3))]
    cases = [(out, shape, 96) for out, shape in cases] + [(3, (2,), 1 << 17)]
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):  # what the first call keeps serves the others
        for out, shape, width in cases:
            x, w, b = torch.randn(*shape, width), torch.randn(out, width), torch.randn(out)
            with mode():
                assert torch.allclose(kernels.linear(x, w, b), F.linear(x, w, b), atol=1e-4 * width / 96)
                assert torch.allclose(kernels.linear(x, w), F.linear(x, w), atol=1e-4 * width / 96)
    assert set(taken) == ({True, False} if torch.backends.mkl.is_available() else {False})
    x, w = torch.randn(1, 512), torch.randn(1024, 512)
    x1, w1, b1, w2 = kernels.random_layer(1, 8, 3, 4, torch.float32, "cpu")
    with torch.no_grad():
        assert torch.allclose(kernels.linear(x, w, w[0, :1]), F.linear(x, w, w[0, :1]), atol=1e-3)
        for call in (  # nothing may be read or written beyond a bias
            partial(kernels.linear, x, w, w[0, :9]), partial(kernels.linear, x, w, w[:, 0].repeat(2)),
            partial(kernels.sampled_ffn, x1, w1, b1[:, :1], w2, torch.ones(1, 3).bool(), "relu"),
        ):  # fmt: skip
            with pytest.raises(RuntimeError):
                call()
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):  # defaults are of no concern
            y = kernels.linear(x, w)
        torch.set_default_dtype(torch.float32)
        assert y.device.type == "cpu" and y.dtype == torch.float32

    taken.clear()
    x, w, b = torch.randn(3, 128), torch.randn(4096, 128), torch.randn(4096)
    for leaf in (x, w, b):
        leaf.requires_grad_()
        ours, theirs = (torch.autograd.grad(f(x, w, b).square().sum(), leaf)[0] for f in (kernels.linear, F.linear))
        assert torch.equal(ours, theirs)
        leaf.requires_grad_(False)
    assert torch.allclose(kernels.linear(x, w.t().contiguous().t(), b), F.linear(x, w, b), atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kernels.linear(x, w), F.linear(x, w))
    assert not any(taken)


@pytest.fixture
def bfloat16_interpreter(monkeypatch):
    """Triton's interpreter keeps bfloat16 as its bits and multiplies those: widen both sides first, as hardware."""
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *rest):
        widen = lambda t: self.create_fp_ext(t, kernels.tl.float32) if t.dtype.scalar == kernels.tl.bfloat16 else t
        return plain(self, widen(a), widen(b), d, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@needs_triton
def test_triton_random_sweep(bfloat16_interpreter, monkeypatch):
    """Decoding and prefill, and prefill in chunks within the budget of memory; twice, bit for bit the same"""
    draw, new_empty, sizes = random.Random(0), torch.Tensor.new_empty, []

    def measured(t, *shape, **options):
        if len(shape) == 4:  # partial rows
            sizes.append(math.prod(shape) * t.element_size() / kernels.PARTIAL_BYTES)
        return new_empty(t, *shape, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", measured)
    for trial in range(40):
        N, d = draw.choice([1, 2, 5, 16, 17, 63, 140]), draw.randint(1, 150)
        E, h = draw.randint(1, 4), draw.randint(1, 140)
        monkeypatch.setattr(kernels, "PARTIAL_BYTES", draw.choice([1 << 28, 1 << 16]))
        dtype, activation = draw.choice(list(kernels.TOLERANCE)), draw.choice(list(kernels.ACTIVATIONS))
        layer = kernels.random_layer(N, d, E, h, dtype, "cpu")
        executed = torch.rand(N, E) < draw.random()
        y = kernels._triton_ffn(*layer, executed, activation)  # triton_ffn without its way out to dense_ffn
        assert y.dtype == dtype
        assert trial % 4 or torch.equal(y, kernels._triton_ffn(*layer, executed, activation))
        expected = kernels.masked_ffn(*(t.double() for t in layer), executed, activation)
        assert_close(y, expected, kernels.TOLERANCE[dtype])
    assert 0.9 < max(sizes) <= 1


@needs_triton
def test_triton_works_under_torch_compile_without_a_graph_break():
    layer = kernels.random_layer(3, 16, 4, 8, torch.float32, "cpu")
    executed = torch.rand(3, 4) < 0.5
    model = lambda x: kernels.triton_ffn(x.relu(), *layer[1:], executed, "relu") + 1
    with torch.no_grad():
        assert torch.allclose(torch.compile(model, fullgraph=True, backend="aot_eager")(layer[0]), model(layer[0]))
    torch.library.opcheck(kernels._triton_op, (*layer, executed, "relu"))


def build(kernel, arch, dtype, **constants):
    """Compiles a kernel for a GPU that need not be there; -> bytes spilled, machine code. All pointers and sizes but N
    and S are divisible by 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {o: constants.pop(o) for o in ("num_warps", "num_stages") if o in constants}
    types = {"executed_ptr": "*i1", "tokens_ptr": "*i32", "counts_ptr": "*i32"} | dict.fromkeys(constants, "constexpr")
    type_of = lambda name: types.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
    signature = {p.name: type_of(p.name) for p in kernel.params}
    divisible = [i for i, name in enumerate(signature) if name not in constants and name not in ("N", "S")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in divisible}
    target = GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)
    built = triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)
    limit = {75: 64, 80: 163, 90: 227, 100: 227, 120: 99, "gfx942": 64}[arch] << 10
    assert built.metadata.shared <= limit, f"{kernel.__name__}: {built.metadata.shared} bytes of shared memory"
    if arch == "gfx942":
        return int(re.search(r"ScratchSize: (\d+)", built.asm["amdgcn"])[1]), built.asm["amdgcn"]
    cubin = Path(os.environ["TRITON_CACHE_DIR"], "kernel.cubin")
    cubin.write_bytes(built.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    shown = lambda flag: subprocess.run([tool, flag, cubin], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", shown("-res-usage"))[1]), shown("-sass")


def compile_ahead_of_time(arch):
    """Compiles all kernels for a GPU; asserts what the machine code must show."""
    k = kernels
    build(k._group_tokens, arch, "fp32", BLOCK=8192, num_warps=8)
    # Turing has neither bfloat16 nor, in Triton, tensor cores: it only decodes, and however well.
    half = "fp16" if arch == 75 else "bf16"
    for dtype, activation in (("fp32", "relu"), (half, "relu"), (half, "gelu")):
        config = k.FLOAT32 if dtype == "fp32" else k.HALF
        act, precision = {"ACTIVATION": activation}, {"PRECISION": "ieee"}
        decode = precision | {"BLOCK_E": 128, "BLOCK_N": k.DECODE_TOKENS}
        builds = [(k._prefill_experts, precision | act | config["experts"])] if arch != 75 else []
        if activation == "relu":
            builds.append((k._prefill_sum, {"BLOCK_D": 1024, "num_warps": 4, "S": 1}))
            for one in ({}, {"N": 1}):  # Triton makes an argument that is 1 a constant
                builds.append((k._decode_first, decode | act | config["first"] | one))
                builds.append((k._decode_second, decode | config["second"] | one))
        for kernel, constants in builds:
            spilled, code = build(kernel, arch, dtype, **constants)
            name = f"{arch} {dtype} {kernel.__name__} {constants}: "
            assert arch == 75 or spilled <= (64 if dtype == "fp32" else 0), name + f"{spilled} bytes spilled"
            if arch == 75 or dtype == "fp32" or kernel is k._prefill_sum:
                continue
            assert re.search(r"HMMA|HGMMA|UTCHMMA|v_mfma", code), name + "no matrix instructions"
            assert arch == "gfx942" or "LDGSTS.E.BYPASS.128" in code, name + "weights are not loaded by 16 bytes"
            if arch == 90 and kernel is k._prefill_experts:
                assert "HGMMA" in code and "STG.E.128" in code, name + "no wgmma, or rows not stored by 16 bytes"


@needs_triton
def test_the_kernels_compile_ahead_of_time(tmp_path):
    processes = []  # of their own: here the kernels belong to the interpreter
    for i, archs in enumerate(((75, 80, 90), (100, 120, "gfx942"))):
        code = f"import test_d2dmoe as t; [t.compile_ahead_of_time(arch) for arch in {archs}]"
        environment = {"TRITON_CACHE_DIR": str(tmp_path / str(i)), "TRITON_INTERPRET": "0"}
        processes.append(start("-c", code, env=environment))
    for process in processes:
        output_of(process)


def test_the_benchmark_checks_first_and_then_measures(capsys, monkeypatch):
    real = kernels.benchmark
    small = lambda device, dtype, d, E, h, tokens, repeats=1: real(device, dtype, 32, 4, 8, tokens[:2], 1)
    monkeypatch.setattr(kernels, "benchmark", small)  # the shapes of a second
    monkeypatch.setattr(kernels, "ACTIVATIONS", {"relu": F.relu})
    monkeypatch.setattr(kernels, "CACHE_BYTES", 1 << 16)
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--device", "cpu"])
    kernels.main()
    out = capsys.readouterr().out
    checked = set(re.findall(r"^check (\w+)_ffn", out, flags=re.M))
    assert checked == {"masked", "dense", "sampled", "grouped", "expert"}
    assert len(re.findall(r"^ +[14] +(?:100|50|25).0% +[\d.]+ +[\d.]+ +[\d.]+x$", out, flags=re.M)) == 8
    assert re.findall(r"^ +(\d+) (?: *[\d.]+x){8}$", out, flags=re.M) == ["128", "256", "384", "512", "768", "1024"]
    monkeypatch.setattr(kernels, "grouped_ffn", lambda x, *_: torch.full_like(x, math.nan))
    with pytest.raises(ArithmeticError, match="is wrong in torch.float32"):
        kernels.main()
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--device", "cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a GPU that torch sees"):
        kernels.main()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernels_on_this_gpu():
    """float64 reference, equal bits, no synchronization"""
    code = """
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
"""
    output_of(start("-c", code, env={"TRITON_INTERPRET": "0"}))


# ---------------------------------------------------------------------------------------------------------------------
# d2dmoe.py: the formulas


def plain_hoyer(a):
    return (a.sum(-1) ** 2 / (a**2).sum(-1).clamp(min=1e-12)).mean()


def test_penalties_by_hand_and_of_each_layer_in_training_alone(monkeypatch):
    a = torch.tensor([[3.0, 0.0, 4.0, 0.0], [2.0, 2.0, 2.0, 2.0], [0.0, 5.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.allclose(d2dmoe.square_hoyer(a), torch.tensor([49 / 25, 4.0, 1.0, 0.0]), atol=1e-5)
    assert torch.allclose(d2dmoe.square_hoyer(1e-3 * a), d2dmoe.square_hoyer(a), atol=1e-4)  # scaling does not lower it
    penalty_of = lambda z, act, penalty: d2dmoe.sparsity_penalty(z, kernels.ACTIVATIONS[act](z), act, penalty)
    s = d2dmoe.DISPLACEMENT  # of a GELU, below 0
    z = torch.tensor([[s - 5, s + 3.0, 1.0], [2.0, -7.0, 0.0]], requires_grad=True)
    relu = torch.tensor([[0.0, 0.0, 1.0], [2.0, 0.0, 0.0]])
    gelu = torch.tensor([[0.0, 3.0, 1.0 - s], [2.0 - s, -7.0 - s, -s]])
    for activation, penalized in (("relu", relu), ("gelu", gelu), ("gelu_tanh", gelu)):
        assert torch.isclose(penalty_of(z, activation, "l1"), penalized.sum() / 2)
        assert torch.isclose(penalty_of(z, activation, "hoyer"), plain_hoyer(penalized), rtol=1e-5)
        assert penalty_of(z, activation, "none") == 0
    penalty_of(z, "gelu", "l1").backward()
    assert s < 0 and z.grad.tolist() == [[0.0, 0.5, 0.5], [0.5, 0.5, 0.5]]  # nothing is pushed below s
    z = torch.full((3, 8), -1.0, requires_grad=True)
    penalty_of(z, "relu", "hoyer").backward()
    assert torch.isfinite(z.grad).all()  # where nothing fires

    for activation, penalty in (("relu", "hoyer"), ("relu", "l1"), ("gelu", "hoyer")):
        dense, idx = tiny_dense(activation=activation, penalty=penalty).train(), torch.randint(257, (2, 16))
        _, penalties = dense(idx)
        dense.hidden(idx, inputs=(inputs := []))
        for block, read, value in zip(dense.transformer.h, inputs, penalties, strict=True):
            z = read @ block.mlp.c_fc.weight.t() + block.mlp.c_fc.bias
            a = z.relu() if activation == "relu" else z.clamp(min=-10) + 10
            assert torch.isclose(value, plain_hoyer(a) if penalty == "hoyer" else a.sum(-1).mean(), rtol=1e-4)
    monkeypatch.setattr(d2dmoe, "sparsity_penalty", lambda *_: pytest.fail("a penalty that nobody reads was computed"))
    assert all(value.isnan() for value in dense.eval()(idx)[1])


def test_dynamic_k_is_the_papers_rule_and_top_k_takes_the_k_largest():
    norms = torch.rand(50, 9)
    for tau in (0.0, 0.1, 0.5, 0.9, 1.0):
        for r, row in zip(norms.tolist(), dynamic_k(norms, tau).tolist(), strict=True):
            limit = (1 - tau) * max(r)
            assert all(ran == (value >= limit) for value, ran in zip(r, row, strict=True) if abs(value - limit) > 1e-6)
    assert dynamic_k(norms, 1.0).all() and (dynamic_k(norms, 0.0).sum(-1) == 1).all()
    examples = torch.tensor([[8, 3.9, 0.5, 0.3], [2, 1.9, 1.8, 1.7]])
    assert [dynamic_k(examples, tau).sum(-1).tolist() for tau in (0.95, 0.9, 0.5)] == [[3, 4], [2, 4], [1, 4]]
    assert top_k(examples, 2).tolist() == [[True, True, False, False]] * 2
    assert (top_k(torch.zeros(4, 6), 3).sum(-1) == 3).all()  # ties too

    norms[0], norms[1, 2], norms[2, 3], norms[3], norms[4] = math.nan, math.nan, math.inf, math.inf, 0
    moe = tiny_moe(tiny_dense())
    moe.layers()[0].router.fc2.weight.data[3] = math.nan
    for gate in (*(partial(dynamic_k, tau=tau) for tau in (0, 0.9, 1)), partial(top_k, k=2)):
        assert all(executed.any(-1).all() for executed in (gate(norms), *moe(torch.randint(257, (2, 16)), gate)[1]))


def test_routers_are_two_layers_without_bias():
    x = torch.randn(5, 6)
    for router, inner, outer in (
        (Router(6, 4, 3), torch.relu, torch.abs),
        (Router(6, 4, 3, power=0.5), torch.relu, torch.square),
        (Router(6, 4, 3, power=2.0), torch.relu, lambda r: r.abs().sqrt()),
        (d2dmoe.MoEficationRouter(6, 4, 3), torch.tanh, torch.sigmoid),
    ):
        assert [tuple(p.shape) for p in router.parameters()] == [(4, 6), (3, 4)]
        raw = inner(x @ router.fc1.weight.t()) @ router.fc2.weight.t()
        assert torch.allclose(router(x), outer(raw), atol=1e-6) and (router(x) >= 0).all()


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


def test_a_moe_layer_sums_what_its_gate_selects():
    moe, x = random_moe(), torch.randn(2, 3, 10)
    flat = x.reshape(6, 10)
    assert torch.allclose(moe.expert_norms(flat), true_norms(moe, flat), rtol=1e-4)
    silent = random_moe().requires_grad_()
    silent.b1.data[0] = -1e3
    silent.expert_norms(flat).sum().backward()
    assert (silent.w2.grad[0] == 0).all() and all(p.grad.isfinite().all() for p in (silent.w1, silent.b1, silent.w2))
    r = (torch.relu(flat @ moe.router.fc1.weight.t()) @ moe.router.fc2.weight.t()).abs()
    every = torch.ones(6, 6, dtype=torch.bool)
    for gate, expected in (
        (None, every),
        (lambda norms: norms < 0, ~every),
        (partial(dynamic_k, tau=0.5), r >= 0.5 * r.amax(-1, keepdim=True)),
        (partial(top_k, k=2), r >= r.topk(2).values[:, -1:]),
    ):
        y, executed = moe(x, gate)
        assert executed.dtype == torch.bool and torch.equal(executed, expected.view(2, 3, 6))
        y64 = loops(flat, moe.w1, moe.b1, moe.w2, expected, "relu") + moe.b2.double()
        assert_close(y.reshape(6, 10), y64, 1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# d2dmoe.py: the transformer


@pytest.mark.parametrize("kind", ["dense", "experts", "attention"])
@pytest.mark.parametrize("temperature", [1e-40, 0.7])  # by 1e-40 it must not divide
def test_generate_gives_the_tokens_of_a_plain_loop_and_its_cache_takes_any_pieces(kind, temperature):
    model, gate, calls = models()[kind], partial(dynamic_k, tau=0.6), []
    model.register_forward_hook(lambda *_: calls.append(1))
    prompt = torch.randint(257, (2, 5))
    generator = torch.Generator().manual_seed(3)
    out = list(d2dmoe.generate(model, prompt, 40, gate, temperature, 20, generator))  # past the context of 16
    assert len(out) == len(calls) == 40  # not parts of the model are called: a compiled one runs compiled
    generator, idx = torch.Generator().manual_seed(3), prompt
    for token, executed in out:
        logits, aux = model(idx[:, -16:], gate)
        logits = logits[:, -1]
        if temperature < 0.7:
            new = logits.argmax(-1, keepdim=True)
        else:
            kept = torch.where(logits >= logits.topk(20).values[:, -1:], logits, -math.inf)
            new = torch.multinomial((kept / temperature).softmax(-1), 1, generator=generator)
        assert torch.equal(new, token)
        expected = [] if kind == "dense" else [e[:, -1:] for e in aux]
        assert len(executed) == len(expected) and all(map(torch.equal, executed, expected))
        idx = torch.cat((idx, new), dim=1)
    for B, k in ((2, None), (2, 1), (2, 10**6), (0, 20)):
        assert [t.shape for t, _ in d2dmoe.generate(model, prompt[:B], 2, gate, temperature, k)] == [(B, 1)] * 2

    cache, idx = d2dmoe.KVCache(model.config, 2), torch.randint(257, (2, 12))
    pieces = [model.hidden(part, cache=cache)[0] for part in idx.split([4, 1, 7], dim=1)]
    assert torch.allclose(torch.cat(pieces, dim=1), model.hidden(idx)[0], atol=1e-5) and cache.length == 12
    assert "17 tokens do not fit into a context of 16" in refused(partial(model.hidden, cache=cache), idx[:, :5])


def test_layers_inputs_and_aux_are_in_one_order_and_attention_is_composed_of_its_projections():
    linear, dense = tiny_dense(), with_projection_mlps(tiny_dense())
    moe, idx, seen, inputs = tiny_moe(dense), torch.randint(257, (2, 16)), [], []
    named = [(b.attn.q, b.attn.k, b.attn.v, b.attn.o, b.mlp) for b in moe.transformer.h]
    assert [id(m) for m in moe.layers()] == [id(m) for five in named for m in five]
    for layer in moe.layers():
        layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    _, aux = moe.hidden(idx, partial(dynamic_k, tau=0.3), inputs=inputs)
    for layer, read, executed, own in zip(moe.layers(), inputs, aux, seen, strict=True):
        r = (torch.relu(read @ layer.router.fc1.weight.t()) @ layer.router.fc2.weight.t()).abs()
        assert torch.equal(executed, r >= (1 - 0.3) * r.amax(-1, keepdim=True)) and not executed.all()
        assert torch.equal(read, own)
    for block, attn in zip(linear.transformer.h, (b.attn for b in dense.transformer.h), strict=True):
        block.attn.c_attn.forward = lambda x, a=attn: torch.cat([p(x)[0] for p in (a.q, a.k, a.v)], dim=-1)
        block.attn.c_proj.forward = lambda x, a=attn: a.o(x)[0]
    assert torch.allclose(linear(idx)[0], dense(idx)[0], atol=1e-5)


def test_flops_by_hand():
    c = tiny_config(n_layer=1, num_experts=8, router_width=4)  # d 16, d_ff 64, h 8
    dense = 2 * (4 * 16 * 16 + 2 * 10 * 16 + 2 * 16 * 64 + 16 * 257)
    assert d2dmoe.flops_per_token(c, 10) == dense
    experts = 2 * (4 * 16 * 16 + 2 * 10 * 16 + 3 * 2 * 16 * 8 + (16 * 4 + 4 * 8) + 16 * 257)
    assert d2dmoe.flops_per_token(c, 10, [3]) == experts
    c = dataclasses.replace(c, projections="moe", projection_experts=4, projection_router_width=2)
    assert c.projection_width == 8  # m: 2 neurons an expert
    projection = 1.5 * 2 * 16 * 2 + (16 * 2 + 2 * 4)
    every = 2 * (4 * projection + 2 * 10 * 16 + 3 * 2 * 16 * 8 + (16 * 4 + 4 * 8) + 16 * 257)
    assert d2dmoe.flops_per_token(c, 10, [1.5] * 4 + [3]) == every
    for d in (128, 256, 768, 1024, 1280, 1600):
        m = GPTConfig(n_embd=d).projection_width
        assert m == d // 2 and abs((2 * d * m + m + d) / (d * d + d) - 1) < 0.01  # parameters of d -> m -> d and d -> d


@torch.no_grad()
def test_a_gated_model_compiles_and_exports_whole(monkeypatch):
    monkeypatch.setattr(kernels, "FEW_WEIGHTS", 0)  # so that `linear` would have another way for these sizes
    class Gated(GPT):
        def forward(self, idx):
            return super().forward(idx, partial(dynamic_k, tau=0.7))[0]

    gated, example, idx = models()["attention"], torch.randint(257, (2, 16)), torch.randint(257, (2, 16))
    gated.__class__ = Gated
    for tokens in (idx, idx[:, :1]):
        torch._dynamo.reset()
        compiled = torch.compile(gated, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(tokens), gated(tokens), atol=1e-5)
    any_size = {0: torch.export.Dim("B", max=8), 1: torch.export.Dim("T", max=16)}
    for strict in (True, False):
        exported = torch.export.export(gated, (example,), strict=strict).module()
        assert torch.allclose(exported(idx), gated(idx), atol=1e-5)  # other tokens, other experts
        exported = torch.export.export(gated, (example,), dynamic_shapes=(any_size,), strict=strict).module()
        assert torch.allclose(exported(idx[:1, :7]), gated(idx[:1, :7]), atol=1e-5)


def test_d2dmoe_is_read_from_top_to_bottom():
    """No function uses what is defined below it (a method may); no dispatch on types of layers."""
    source = (HERE / "d2dmoe.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):  # Python itself looks at the rest, methods apart
            below = source.split("\n", node.end_lineno)[-1]
            used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            assert not [name for name in used if re.search(rf"^(def |class )?{name}\b", below, re.MULTILINE)], node.name
    assert not re.search(r"NamedTuple|namedtuple|_hook\(|isinstance\([^)]*(MLP|MoE|Router|Linear|nn)", source)


def test_functions_raise_ordinary_exceptions_so_that_they_can_be_taught():
    dense, moe, mlp, norms = tiny_dense(), random_moe(), d2dmoe.MLP(10, 24, "relu", "none"), torch.rand(3, 4)
    experts, projections = dict(num_experts=8, router_width=4), dict(projections="moe", projection_router_width=2)
    both = experts | projections
    config = lambda changes=(), **more: partial(tiny_config, **dict(changes) | more)
    evaluate = lambda tokens, windows: partial(train.evaluate, dense, np.array(tokens, np.uint16), windows)
    clusters = lambda k: partial(convert.balanced_kmeans, torch.randn(10, 3), k, seed=0)
    generate = lambda T=1, **options: lambda: list(d2dmoe.generate(dense, torch.ones(1, T).long(), 2, **options))
    check_refusals(lambda call: call(), {
        "n_embd and d_ff must be at least 1": [config(n_layer=0), config(d_ff=-4)],
        "width must be at least 1": [
            config(experts, router_width=0), config(both, projection_experts=4, projection_router_width=0),
        ],
        "activation must be one of relu, gelu, gelu_tanh": [
            config(activation="swish"), partial(kernels.expert_ffn, norms, moe.w1, moe.b1, moe.w2, None, "swish"),
        ],
        r"executed must be a mask \[N, E\] of bool": [
            partial(kernels.expert_ffn, torch.randn(3, 10), moe.w1, moe.b1, moe.w2, executed, "relu")
            for executed in (torch.ones(1, 6).bool(), torch.ones(4, 6).bool(), torch.ones(3, 6).int())
        ],
        "projections must be one of": [config(projections="conv")],
        "mlp in a dense model only": [config(experts, projections="mlp"), config(projections, projection_experts=4)],
        "layer_norm_epsilon .* router_power": [config(layer_norm_epsilon=-1.0), config(router_power=0.0)],
        "do not divide": [
            config(experts, num_experts=7), config(experts, num_experts=-8), config(both, projection_experts=5),
            partial(DynamicKMoE, 10, 24, 7, "relu", None), partial(DynamicKMoE, 10, 24, 0, "relu", None),
            clusters(4), clusters(0),
        ],
        "tau must be between 0 and 1": [partial(dynamic_k, norms, tau) for tau in (-0.1, 1.5, math.nan)],
        "k must be between": [partial(top_k, norms, k) for k in (0, 5)],
        "zip": [partial(d2dmoe.flops_per_token, tiny_config(**experts), 10, [3])],  # one number for two layers
        "prompt is empty": [generate(T=0)],
        "temperature must be at least 0": [generate(temperature=-1.0)],
        "top_k_tokens must be at least 1": [generate(top_k_tokens=0)],
        "an assignment must give": [
            partial(convert.split_mlp, mlp, moe, a) for a in (torch.zeros(24, dtype=torch.long), torch.arange(20) % 6)
        ],
        "token 300 lies outside the vocabulary of 257": [evaluate([300] * 99, windows=4)],
        "of 1 or more, and 17 tokens": [evaluate([0] * 99, windows=0), evaluate([0] * 16, windows=4)],
    })  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# d2dmoe.py: files. Each is computed exactly or refused with the reason


def gpt2_weights(d=32, n_layer=2, d_ff=None, vocab=257, positions=16, bias=True, head=False):
    """Random weights as Hugging Face stores GPT-2's: layers are x @ W + b with W [in, out]"""
    g, d_ff = torch.Generator().manual_seed(d), d_ff or 4 * d
    normal = lambda *shape: 0.2 * torch.randn(*shape, generator=g)
    sd = {"wte.weight": normal(vocab, d), "wpe.weight": normal(positions, d)}
    linears = {"attn.c_attn": (d, 3 * d), "attn.c_proj": (d, d), "mlp.c_fc": (d, d_ff), "mlp.c_proj": (d_ff, d)}
    for i in range(n_layer):
        for name, shape in linears.items():
            sd[f"h.{i}.{name}.weight"], sd[f"h.{i}.{name}.bias"] = normal(*shape), normal(shape[1])
    for name in ["ln_f"] + [f"h.{i}.{ln}" for i in range(n_layer) for ln in ("ln_1", "ln_2")]:
        sd[f"{name}.weight"], sd[f"{name}.bias"] = 1 + normal(d), normal(d)
    if head:
        sd["lm_head.weight"] = normal(vocab, d)
    return {k: w for k, w in sd.items() if bias or not k.endswith("bias")}


def plain_gpt2(weights, idx, n_head, activation="gelu_tanh", epsilon=1e-5):
    """GPT-2 as its paper and its published weights define it, in float64"""
    w = {name.removeprefix("transformer."): t.double() for name, t in weights.items()}
    bias = lambda name: w.get(name + ".bias", torch.zeros((), dtype=torch.float64))
    act = {
        "relu": lambda z: z.clamp(min=0),
        "gelu": lambda z: 0.5 * z * (1 + torch.erf(z / math.sqrt(2))),
        "gelu_tanh": lambda z: 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    }[activation]

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * w[name + ".weight"] + bias(name)

    linear = lambda x, name: x @ w[name + ".weight"] + bias(name)
    T, d = idx.shape[1], w["wte.weight"].shape[1]
    x = w["wte.weight"][idx] + w["wpe.weight"][:T]
    later = ~torch.ones(T, T).tril().bool()
    for i in range(sum(name.endswith("ln_1.weight") for name in w)):
        qkv = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").chunk(3, -1)
        q, k, v = (t.unflatten(-1, (n_head, -1)).transpose(1, 2) for t in qkv)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(d // n_head)).masked_fill(later, -math.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"h.{i}.attn.c_proj")
        x = x + linear(act(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")), f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w.get("lm_head.weight", w["wte.weight"]).t()


def assert_computes(source, weights, **kind):
    """load_model(source) gives the logits of the plain GPT-2; -> whether its head is tied."""
    idx = torch.randint(len(weights["wte.weight"]), (2, min(20, len(weights["wpe.weight"]))))
    expected = plain_gpt2(weights, idx, **kind)
    model = load_model(source)
    assert (model(idx)[0].double() - expected).abs().max() < 1e-4 < 0.1 * expected.std()
    return model.lm_head.weight is model.transformer.wte.weight


HF_CONFIG = {  # what transformers 5 writes for a GPT2Config, and at the end some of the fields that change nothing
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new", "n_embd": 32,
    "n_head": 8, "n_inner": None, "n_layer": 2, "n_positions": 16, "vocab_size": 257, "layer_norm_epsilon": 1e-05,
    "tie_word_embeddings": True, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False, "resid_pdrop": 0.1, "eos_token_id": 50256, "task_specific_params": {"a": {"b": 50}},
}  # fmt: skip


def hf_folder(folder, weights, kind="bin", **changes):
    """A folder as save_pretrained writes it: pytorch_model.bin or model.safetensors, in one file or in shards"""
    folder.mkdir(exist_ok=True)
    config = {k: v for k, v in (HF_CONFIG | changes).items() if v != "absent"}
    (folder / "config.json").write_text(json.dumps(config))
    name, save = "pytorch_model.bin", torch.save
    if kind.endswith("safetensors"):
        name, save = "model.safetensors", pytest.importorskip("safetensors.torch").save_file
    if not kind.startswith("sharded"):
        save(weights, folder / name)
        return folder
    shards = {k: f"{i % 3 + 1:05d}-of-00003-{name}" for i, k in enumerate(weights)}
    for shard in set(shards.values()):
        save({k: w for k, w in weights.items() if shards[k] == shard}, folder / shard)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": shards}))
    return folder


def test_a_hugging_face_folder_in_every_layout_and_with_every_hyper_parameter_is_computed_exactly(tmp_path):
    weights = gpt2_weights()
    masks = {"h.0.attn.bias": torch.ones(1, 1, 16, 16).tril(), "h.0.attn.masked_bias": torch.tensor(-1e4)}  # older ones
    stored = {f"transformer.{k}": w for k, w in (weights | masks).items()}
    for kind in ("bin", "safetensors", "sharded bin", "sharded safetensors"):
        folder = hf_folder(tmp_path / kind, stored, kind)
        assert assert_computes(folder, weights, n_head=8)
        if kind.startswith("sharded"):
            shard = next(folder.glob("*00002*"))
            assert re.search("does not hold a GPT-2|KeyError", refused(load_model, shard))
            shard.unlink()
            assert shard.name in refused(load_model, folder)
        else:  # the file in it, too
            assert_computes(next(folder.glob("*model*")), weights, n_head=8)
    stored["lm_head.weight"] = stored.pop("transformer.wte.weight")  # of the tied two either may be stored
    assert_computes(hf_folder(tmp_path / "head", stored), weights, n_head=8)
    untied = dict(tie_word_embeddings=False)
    assert "it does not hold a GPT-2" in refused(load_model, hf_folder(tmp_path / "head", stored, **untied))

    left_out = dict.fromkeys(("activation_function", "layer_norm_epsilon", "tie_word_embeddings", "n_inner"), "absent")
    other = dict(activation_function="relu", n_inner=24, n_head=4, layer_norm_epsilon=0.1, resid_pdrop=0.0)
    for changes, reference, sizes in (
        (dict(activation_function="gelu"), dict(activation="gelu"), dict()),
        (untied | other, dict(n_head=4, activation="relu", epsilon=0.1), dict(head=True, d_ff=24)),
        (left_out, dict(), dict()),  # then they are GPT-2's
    ):
        weights = gpt2_weights(**sizes)
        tied = assert_computes(hf_folder(tmp_path / "a", weights, **changes), weights, **dict(n_head=8) | reference)
        assert tied != ("head" in sizes)


def test_a_hugging_face_folder_that_would_compute_something_else_is_refused_by_name(tmp_path):
    folder, weights, untied = tmp_path / "a", gpt2_weights(head=True), dict(tie_word_embeddings=False)
    for name, value in (
        ("scale_attn_by_inverse_layer_idx", True), ("scale_attn_weights", False), ("scale_attn_weights", None),
        ("add_cross_attention", True), ("auto_map", {"a": "b"}), ("pruned_heads", {"0": [1]}),
        ("quantization_config", {"bits": 4}),
    ):  # fmt: skip
        line = refused(load_model, hf_folder(folder, weights, **untied | {name: value}))
        assert name in line and str(value) in line and "not implemented here" in line
    check_refusals(lambda changes: load_model(hf_folder(folder, weights, **untied | changes)), {
        "a model of type gpt_neo: only GPT-2": [dict(model_type="gpt_neo")],
        "a model of type None": [dict(model_type="absent")],
        "lacks n_head": [dict(n_head="absent")],
        "multiple of n_head": [dict(n_head=5)],
        "must be of type": [
            dict(n_head="8"), dict(layer_norm_epsilon="x"), dict(layer_norm_epsilon=None),
            dict(tie_word_embeddings=None)],
        "config.json sets .*activation_function": [
            dict(activation_function=name) for name in ("silu", "gelu_tanh", None, ["relu"])],
        "layer_norm_epsilon must lie between": [dict(layer_norm_epsilon=0)],
        "2 blocks for n_layer 3": [dict(n_layer=3)],
        "size mismatch": [dict(n_inner=64), dict(vocab_size=300), dict(n_embd=64), dict(n_positions=32)],
        "lm_head is tied to wte, but their weights differ": [
            dict(tie_word_embeddings=True), dict(tie_word_embeddings="absent")],
    })  # fmt: skip
    headless = hf_folder(tmp_path / "headless", gpt2_weights(), **untied)
    assert re.search("cannot be loaded: .*lm_head.weight", refused(load_model, headless))
    for text, message in (("{", "its config.json is damaged"), ("[]", "AttributeError")):
        (folder / "config.json").write_text(text)
        assert re.search(f"{folder}/.* cannot be loaded: .*{message}", refused(load_model, folder))


def test_without_config_json_only_published_shapes_are_taken(tmp_path, monkeypatch):
    monkeypatch.setitem(d2dmoe.GPT2_SIZES, "small", (1, 128))  # as if OpenAI had published one so small
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    published = gpt2_weights(128, 1, vocab=50257, positions=1024)
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path: torch.save(published, path))
    torch.save(published, tmp_path / "pytorch_model.bin")
    for source in (tmp_path, tmp_path / "pytorch_model.bin", "distilgpt2"):
        assert_computes(source, published, n_head=2)
    assert d2dmoe.load_checkpoint(tmp_path)[1]["tokenizer"] == "gpt2"
    for wrong in (gpt2_weights(128, 1), gpt2_weights(128, 2, vocab=50257, positions=1024)):  # of other sizes; deeper
        torch.save(wrong, tmp_path / "pytorch_model.bin")
        assert "tell neither n_head nor the activation: give the folder" in refused(load_model, tmp_path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=ConnectionError("no route")))
    monkeypatch.chdir(tmp_path)
    line = "gpt2 cannot be loaded: no route: connect to the internet, or give the path of a copy"
    assert refused(load_model, "gpt2") == line
    weights = gpt2_weights()
    hf_folder(tmp_path / "gpt2", weights)  # a folder of that name comes first
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in ("gpt2", "~/gpt2"):
        assert_computes(source, weights, n_head=8)


def nanogpt(weights, prefix="", **changes):
    """What nanoGPT's train.py saves"""
    linears = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    state = {"lm_head.weight": weights["wte.weight"], "h.0.attn.bias": torch.ones(1, 1, 16, 16).tril()} | weights
    state = {k: w.t().contiguous() if k.endswith(linears) else w for k, w in state.items()}
    state = {prefix + (k if k == "lm_head.weight" else f"transformer.{k}"): w for k, w in state.items()}
    args = dict(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=257, bias="ln_f.bias" in weights, dropout=0.1)
    rest = {"optimizer": {"state": {}, "param_groups": []}, "iter_num": 7, "best_val_loss": torch.tensor(1.5)}
    return {"model": state, "model_args": args | changes, "config": {"dataset": "shakespeare"}} | rest


def test_nanogpts_checkpoints_are_computed_exactly(tmp_path):
    computes = partial(assert_computes, tmp_path, n_head=4, activation="gelu")
    for bias, head in itertools.product((True, False), repeat=2):
        weights = gpt2_weights(bias=bias, head=head)
        torch.save(nanogpt(weights), tmp_path / "ckpt.pt")
        assert computes(weights=weights) != head
    for prefix in ("_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."):
        torch.save(nanogpt(weights, prefix, dropout=0.5, flash=False), tmp_path / "ckpt.pt")
        computes(weights=weights)
    check_refusals(partial(load_model, tmp_path), {  # the first two of its forks
        "model_args sets n_kv_head: not implemented": [nanogpt(weights, n_kv_head=2)],
        "model_args sets activation, window": [nanogpt(weights, window=8, activation="relu")],
        "size mismatch": [nanogpt(weights, block_size=99)],
    }, tmp_path / "ckpt.pt")  # fmt: skip


def test_our_checkpoints_come_back_equal(tmp_path):
    others = {
        "moefication": tiny_moe(tiny_dense(), router="moefication"),
        "untied": tiny_dense(tie_weights=False, activation="gelu", bias=False, d_ff=24),
    }
    idx, gate = torch.randint(257, (2, 16)), partial(dynamic_k, tau=0.7)
    for kind, model in (models() | others).items():
        path = tmp_path / kind / "ckpt.pt"
        d2dmoe.save_checkpoint(path, model, tokenizer="bytes", step=3)
        for source in (path.parent, path, str(path.parent)):
            loaded = load_model(source)
            assert loaded.config == model.config and not loaded.training
            assert torch.equal(loaded(idx, gate)[0], model(idx, gate)[0])
            assert (loaded.lm_head.weight is loaded.transformer.wte.weight) == (kind != "untied")
        assert d2dmoe.load_checkpoint(path)[1]["step"] == 3
    other = tiny_dense(seed=5)
    d2dmoe.save_checkpoint(tmp_path / "dense/d2dmoe.pt", other)  # of a folder's two, the conversion
    (tmp_path / "dense" / "config.json").write_text("{")  # somebody else's
    assert torch.equal(load_model(tmp_path / "dense").lm_head.weight, other.lm_head.weight)


def test_what_cannot_be_computed_is_refused_with_its_reason(tmp_path, monkeypatch):
    dense, idx, weights, path = tiny_dense(), torch.randint(257, (2, 16)), gpt2_weights(), tmp_path / "ckpt.pt"
    state = dense.state_dict()
    config = dict(block_size=16, vocab_size=257, n_layer=2, n_head=2, n_embd=16, bias=True, activation="relu")
    config |= dict(penalty="hoyer", num_experts=0, router_target="norm", attention_experts=0)  # of the first edition
    ours = {"model": state, "config": config}
    torch.save(ours, path)
    assert torch.equal(load_model(tmp_path)(idx)[0], dense(idx)[0])
    with_config = lambda **changes: ours | {"config": config | changes}
    with_weights = lambda **changes: ours | {"model": state | changes}
    without_ln_f = {k: w for k, w in state.items() if "ln_f" not in k}
    bare, evil = nanogpt(weights)["model"], Evil(tmp_path / "executed")
    check_refusals(partial(load_model, tmp_path), {
        "config lacks activation, bias, block_size, penalty, vocab_size": [
            {"model": bare, "config": {"n_layer": 2, "n_head": 4, "n_embd": 32}}],
        "rotary: not implemented": [with_config(rotary=True)],
        "converted by an earlier version": [with_config(num_experts=8, router_width=4)],
        "names no tokenizer": [ours | {"tokenizer": ["gpt2"]}],
        "size mismatch": [with_config(n_embd=32)],
        "must be of type int": [with_config(n_head=2.0)],
        "Missing key.*": [ours | {"model": without_ln_f}],
        "2 blocks for n_layer 1000000000": [with_config(n_layer=10**9)],
        "cannot be loaded": [
            with_weights(x=[1]), ours | {"model": 5}, weights | {"transformer.wte.weight": torch.ones(9)}],
        "tied to wte, but their weights differ": [with_weights(**{"lm_head.weight": torch.ones(257, 16)})],
        "not finite": [with_weights(**{"transformer.wpe.weight": torch.full((16, 16), math.nan)})],
        "neither n_head nor the activation.*nanoGPT's checkpoint with its model_args": [
            bare, {"state_dict": bare, "epoch": 3}, {"model": bare, "epoch": 3},
            {"model_state_dict": {f"module.{k}": w for k, w in bare.items()}},
        ],
        "tell neither n_head nor the activation: give the folder": [weights],
        "does not hold a GPT-2": [{}, {"model.norm.weight": torch.zeros(4)}],
        "cannot be loaded: ": [ours | {"model": {k: w.to("meta") for k, w in state.items()}}],
        "it holds a (list|Tensor), not a checkpoint": [[1, 2], torch.zeros(3)],
        "object of d2dmoe.GPT, and loading objects can run code: save the state dict alone": [dense],
        "object of argparse.Namespace": [ours | {"args": argparse.Namespace(lr=1)}],
        "object of numpy": [ours | {"loss": np.float64(1.5)}],
        "object of (builtins|io|_io).open": [ours | {"x": evil}],
        "object of (builtins|io|_io).open|damaged": [pickle.dumps(evil)],
        "does not hold a GPT-2|damaged": [pickle.dumps({"a": 1})],
        "it is damaged": [b"", b"\x89PNG\r\n" * 99],
    }, path)  # fmt: skip
    assert not (tmp_path / "executed").exists()

    path.unlink()
    os.mkfifo(path)  # it is not waited for
    assert f"no checkpoint at {path}: train.py writes" in refused(load_model, tmp_path)
    path.unlink()
    torch.save({"h.0.attn.c_attn.lora_A.weight": torch.zeros(8, 32)}, tmp_path / "adapter_model.bin")
    assert "PEFT adapter: merge it into its model" in refused(load_model, tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # as Python has it for what cannot be imported
    (hf_folder(tmp_path, {}) / "model.safetensors").touch()
    assert "needs a package: pip install safetensors" in refused(load_model, tmp_path)


def test_another_package_named_kernels_is_explained(tmp_path):
    (tmp_path / "kernels.py").touch()
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(HERE)!r}]; import d2dmoe"
    _, errors = start("-c", code, cwd=tmp_path).communicate()
    assert "ImportError: cannot import name" in errors and "kernels.py first on sys.path, and restart" in errors


def test_corrupted_checkpoints_are_refused_or_load_to_the_same_values(trained, tmp_path):
    draw, path, refusals = random.Random(0), tmp_path / "c.pt", 0
    good, raw = saved(trained, "d2dmoe.pt")["model"], (trained / "d2dmoe.pt").read_bytes()
    for trial in range(100 * LONG):
        damaged = bytearray(raw if trial % 2 else raw[: draw.randrange(len(raw))])
        for _ in range(draw.choice([1, 1, 3, 50]) if trial % 2 else 0):
            damaged[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            model = load_model(path)
        except (ValueError, OSError) as error:
            refusals += 1
            assert "\n" not in str(error) and str(path) in str(error)
        else:
            assert_same_weights(model.state_dict(), good)
    assert refusals > 55 * LONG


# ---------------------------------------------------------------------------------------------------------------------
# train.py


def write_bins(folder, vocab=257, letters=""):
    """nanoGPT's train.bin and val.bin, of random tokens; and its meta.pkl for a character model"""
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(("train.bin", "val.bin")):
        np.random.default_rng(i).integers(0, len(letters) or vocab, 500).astype(np.uint16).tofile(folder / name)
    if letters:
        meta = {"itos": dict(enumerate(letters)), "stoi": {c: i for i, c in enumerate(letters)}}
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta | {"vocab_size": len(letters)}))
    return folder


def encoded(data, out):
    train.encode_text(str(data), train.load_tokenizer("bytes"), out)
    return tokens_of(out), tokens_of(out, "val.bin")


def test_nanogpts_character_bins_bring_their_tokenizer_and_code_beside_them_is_not_run(tmp_path):
    letters = "\n abc\u00e9"
    data, evil = write_bins(tmp_path / "data", letters=letters), Evil(tmp_path / "executed")
    for out in (tmp_path / "out", data / ".." / "data"):
        run_train(out, "--data", data, "--steps", 1)
        assert saved(out)["tokenizer"] == train.own_tokenizer(out) == "characters:" + letters
    assert saved(out)["config"]["vocab_size"] == 6
    assert b"itos" in (data / "meta.pkl").read_bytes()  # nanoGPT's own
    wrong = [{0: "ab"}, {0: "ab", 1: ""}, {0: "a", 1: "a"}, {1: "a"}, {0: 7}, 3]
    wrong = [{"itos": itos} for itos in wrong] + [[], {}, {"tokenizer": "nonsense"}, {"tokenizer": "characters:"}]
    pickles = map(pickle.dumps, (*wrong, evil, {"itos": evil}, {"itos": {0: "a"}, "x": evil}))
    own = partial(train.own_tokenizer, data)
    check_refusals(own, {"does not name a tokenizer known here": pickles}, data / "meta.pkl")
    assert not (tmp_path / "executed").exists()


def test_cutting_text_into_pieces_does_not_change_its_tokens():
    first_split = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")  # GPT-2's
    draw, cuts = random.Random(0), 0
    words = ["the", " ", "  ", "\n", "\n\n", "\r\n", "hette", "1", "\u00e9", ". ", "!\x1c", "\u2028"]
    for _ in range(30):
        text = "".join(draw.choice(words) for _ in range(3000))
        pieces = list(train.pieces(text, size=draw.randint(200, 400)))
        cuts += len(pieces) - 1
        assert sum(map(first_split.findall, pieces), []) == first_split.findall(text)
    assert cuts > 200 and list(train.pieces("")) == []
    pieces = list(train.pieces("x" * 5000, size=10))  # nowhere to cut, and still no piece is long
    assert "".join(pieces) == "x" * 5000 and max(map(len, pieces)) <= 20


NOT_TEXT = [
    b"\x89PNG\0\0", b"\x1f\x8b\x08\0gz", b"PK\3\4\0", "UTF-16".encode("utf-16"), bytes(range(128, 256)), b"a\0b",
    np.arange(9, dtype=np.uint16).tobytes(),
]  # fmt: skip


def test_of_the_standard_library_or_a_folder_text_is_taken_and_every_tenth_file_held_out(tmp_path, capsys):
    files = train.text_files("stdlib")
    assert len(files) > 300 and files == sorted(files) and {f.suffix for f in files} == {".py"}
    assert {"argparse.py", "ast.py"} <= {f.name for f in files}
    folders = {part for f in files for part in f.relative_to(os.path.dirname(os.__file__)).parts}
    assert not {"site-packages", "test", "tests", "idlelib", "lib2to3"} & folders

    folder = tmp_path / "text"
    (folder / "earlier_run").mkdir(parents=True)
    for i in range(21):
        (folder / f"{i:02d}.txt").write_text(chr(ord("a") + i) * 50)
    for i, content in enumerate(NOT_TEXT):
        (folder / f"03_{i}").write_bytes(content)
    for name in (".hidden", "earlier_run/ckpt.pt", "earlier_run/cost_vs_loss.csv"):
        (folder / name).write_text("x")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "above.txt").touch()  # no link leads there
    (folder / "20.txt").rename(elsewhere / "20.txt")
    for name, target in (("missing.txt", "nowhere"), ("loop", "."), ("up", ".."), ("linked", elsewhere)):
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "pipe.txt")  # nobody writes to it: reading would wait for ever
    tokens = encoded(folder, tmp_path / "out")
    assert [len(t) for t in tokens] == [19 * 51, 2 * 51]  # each with its <|endoftext|>
    assert set(tokens[1].tolist()) == {ord("a") + 9, ord("a") + 19, 256}
    assert "7 of 28 files are not UTF-8 text and were left out" in capsys.readouterr().out
    (folder / "prepare.py").touch()
    assert "run its prepare.py first" in refused(train.text_files, str(folder))
    (folder / "setup.py").touch()
    assert folder / "prepare.py" in train.text_files(str(folder))  # any project's


def test_of_a_single_file_every_byte_is_a_token_and_the_last_tenth_is_held_out(tmp_path, monkeypatch, capsys):
    path = tmp_path / "t.txt"
    for content in (b"one\r\ntwo\r\n" * 300, b"abc" * 200_000 * LONG, "\ufeff\u4e2d\U0001f600 \x1c".encode() * 99):
        path.write_bytes(content)
        parts = encoded(path, tmp_path)
        assert np.concatenate(parts).tolist() == [*content, 256] and len(parts[1]) == (len(content) + 1) // 10
    monkeypatch.setattr(train.time, "perf_counter", itertools.count(0, 6).__next__)  # six seconds a look
    encoded(path, tmp_path)
    assert re.search(r"encoding file 1 of 1, [\d,]+ tokens so far", capsys.readouterr().out)
    before = (tmp_path / "train.bin").read_bytes()
    for content in NOT_TEXT:
        path.write_bytes(content * 99)
        assert "t.txt is not UTF-8 text" in refused(train.main, *TINY, "--data", path, "--out", tmp_path)
        assert (tmp_path / "train.bin").read_bytes() == before and not list(tmp_path.glob("*.tmp"))


def test_a_folder_of_bins_is_taken_as_it_is_and_linked_beside_the_checkpoint(tmp_path, monkeypatch):
    a, b, c = write_bins(tmp_path / "a"), tmp_path / "b", tmp_path / "c"
    original = [tokens_of(a), tokens_of(a, "val.bin")]
    for out, data in ((b, a), (c, b), (a, c), (b, b)):  # links must not end where they begin
        told = () if (data / "meta.pkl").exists() else ("--tokenizer", "bytes")  # a run's tokens name theirs
        run_train(out, "--data", data, "--steps", 1, *told)
    for folder in (a, b, c):
        assert all(map(np.array_equal, original, [tokens_of(folder), tokens_of(folder, "val.bin")]))
        assert not any(p.is_symlink() for p in folder.iterdir())
    monkeypatch.setattr(os, "link", Mock(side_effect=OSError("another file system")))
    run_train(tmp_path / "e", "--data", c / ".." / "a", "--steps", 1)
    assert np.array_equal(tokens_of(tmp_path / "e"), original[0])


def test_tokens_name_their_tokenizer(tmp_path, monkeypatch):
    unnamed, other = write_bins(tmp_path / "unnamed"), tmp_path / "other"
    d2dmoe.save_checkpoint(tmp_path / "nano.pt", tiny_dense())
    run_train(other, "--init", tmp_path / "nano.pt", "--data", unnamed, "--steps", 1)
    assert train.own_tokenizer(other) is None  # nothing tells it
    for folder in (other, unnamed):
        run_train(folder, "--data", unnamed, "--tokenizer", "bytes", "--steps", 1)
        assert train.own_tokenizer(folder) == "bytes"
    for name in ("train.bin", "val.bin", "meta.pkl"):  # one that is left over does not name others' tokens
        line = refused(run_train, other, "--data", write_bins(tmp_path / "more"), "--tokenizer", "gpt2", "--steps", 1)
        assert "has tokens of another text or tokenizer" in line
        (other / name).unlink()
    run_train(other, "--data", tmp_path / "more", "--tokenizer", "gpt2", "--steps", 1)

    write_text(tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "text_files", lambda data: {"stdlib": [Path("text.txt")]}[data])
    for arguments in (["--steps", 3], ["--steps", 4], ["--init", "resume", "--steps", 5]):
        run_train("stdlib", *arguments)  # a folder of that name is not the standard library
    run_convert("stdlib", "--steps", 1, "--taus", 1)


def test_token_files_with_headers_or_of_other_widths_are_refused(tmp_path):
    path, config = write_bins(tmp_path) / "val.bin", tiny_config()
    llm_c = np.array([20240520, 1, *range(900)], np.int32).tobytes()
    check_refusals(partial(train.open_tokens, tmp_path, config), {
        "not a plain file of uint16": [b"\x93NUMPY\1\0" + bytes(900), llm_c, b"\1\0" * 450 + b"\1"],
        "a header, an odd size or wider": [np.arange(200, dtype=wide).tobytes() for wide in (np.uint32, np.int64)],
        "holds text, not tokens": [b"to be or not to be " * 90],
        "token 257 lies outside the vocabulary of 257": [np.arange(258, dtype=np.uint16).tobytes()],
        "(16|0) tokens are too few for a context of 16": [np.full(16, 200, np.uint16).tobytes(), b""],
    }, path)  # fmt: skip
    path.unlink()
    assert "val.bin is missing" in refused(train.open_tokens, tmp_path, config)


def test_batches_and_schedules_depend_on_seed_and_step_alone(monkeypatch):
    draws = [train.draw_offsets(1000, 12, 16, seed, step).tolist() for seed in (0, 1) for step in (0, 1)]
    assert len({tuple(d) for d in draws}) == 4 and draws[0] == train.draw_offsets(1000, 12, 16, 0, 0).tolist()
    assert min(map(min, draws)) >= 0 and max(map(max, draws)) <= 1000 - 17
    assert set(train.draw_offsets(18, 99, 16, 0, 0).tolist()) == {0, 1}  # the last window counts too
    tokens, config = np.arange(1000, dtype=np.uint16), tiny_config(vocab_size=1000)
    x, y = train.take_windows(tokens, torch.tensor([3, 983]), config)
    assert torch.equal(x[0], torch.arange(3, 19)) and torch.equal(y, x + 1) and y[1, -1] == 999
    draw = partial(train.draw_batch, tokens, 12, config, 1, 1)
    assert [x[:, 0].tolist() for x, _ in draw()] == [draws[3]]
    process, shares = {"is_initialized": True, "get_rank": 0, "get_world_size": 2}, []
    for name in process:
        monkeypatch.setattr(train.dist, name, lambda name=name: process[name])
    for process["get_rank"] in (0, 1):  # two processes share out the same sequences
        shares += [x[:, 0].tolist() for x, _ in draw(micro_batch=4)]
    assert [len(s) for s in shares] == [4, 2, 4, 2] and sum(shares, []) == draws[3]
    process["get_world_size"] = 5
    assert "12 sequences per step do not divide among 5" in refused(draw)

    rates = [train.learning_rate(s, 100, 1.0, 10) for s in range(101)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55) and rates[100] == pytest.approx(0.1)
    quarter = 1 + 0.5 * (1 + math.cos(math.pi / 4))
    assert [train.learning_rate(s, 4, 2.0, 0, final=0.5) for s in range(3)] == pytest.approx([2.0, quarter, 1.5])
    assert [train.penalty_weight(s, 100, 2.0) for s in (0, 25, 50, 99)] == [0.0, 1.0, 2.0, 2.0]
    assert [train.penalty_weight(s, 100, 2.0, ramp) for s in (0, 50) for ramp in (0, 1)] == [2.0, 0.0, 2.0, 1.0]


def by_hand(model, tokens, windows, gate):
    """Mean loss over evenly spaced windows, and the share of all experts that ran"""
    losses, shares = [], []
    for o in torch.linspace(0, len(tokens) - 17, windows, dtype=torch.float64).long().tolist():
        window = torch.from_numpy(tokens[o : o + 17].astype(np.int64))
        logits, executed = model(window[None, :-1], gate)
        losses.append(F.cross_entropy(logits[0], window[1:]).item())
        shares += [e.double().mean().item() for e in executed]
    return sum(losses) / len(losses), sum(shares) / len(shares)


def test_evaluation_is_the_mean_loss_and_counts_experts_and_what_fires():
    moe, dense, gate = tiny_moe(tiny_dense()), tiny_dense().train(), partial(top_k, k=3)
    tokens = np.random.default_rng(0).integers(0, 257, 200).astype(np.uint16)
    loss, counts = train.evaluate(moe, tokens, windows=7, batch_size=3, gate=gate)
    assert loss == pytest.approx(by_hand(moe, tokens, 7, gate)[0], abs=1e-5)
    assert [c.tolist() for c in counts] == [[3] * 7 * 16] * 2
    assert train.evaluate(dense, tokens, 10**9)[1] == [] and dense.training  # not more windows than there are
    for activation in ("relu", "gelu"):
        model, x = tiny_dense(activation=activation), torch.randint(257, (3, 16))
        zeros, effective = train.activation_sparsity(model, x)
        model.hidden(x, inputs=(inputs := []))
        reads = zip(model.layers(), inputs, strict=True)
        a = torch.stack([kernels.ACTIVATIONS[activation](mlp.c_fc(read)).double() for mlp, read in reads])
        assert 0 < zeros < 1 and zeros == pytest.approx((a <= 0).double().mean().item())
        assert effective == pytest.approx(plain_hoyer(a.abs()).item(), rel=1e-4)


def test_a_training_step_is_the_papers_loss(trained, tmp_path):
    """At a learning rate of zero Adam's first moments are a mean of the gradients of two steps on the same weights."""
    options = "--steps 2 --lr 0 --alpha 0.5 --grad_clip 0 --grad_accum 2".split()
    run_train(tmp_path, "--data", trained / "text.txt", *options)
    optimizer, tokens, model = saved(tmp_path)["optimizer"], tokens_of(tmp_path), load_model(tmp_path)
    parameters = sorted(model.parameters(), key=lambda p: p.dim() < 2)  # in training's groups: matrices, then vectors
    moments = [torch.zeros_like(p) for p in parameters]
    for step, alpha in ((0, 0.0), (1, 0.5)):  # the ramp ends at half of two steps
        x, y = train.take_windows(tokens, train.draw_offsets(len(tokens), 8, 16, 0, step), tiny_config())
        model.hidden(x, inputs=(inputs := []))
        reads = zip(model.layers(), inputs, strict=True)
        penalties = [plain_hoyer(torch.relu(mlp.c_fc(read))) for mlp, read in reads]
        loss = F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten()) + alpha * torch.stack(penalties).mean()
        moments = [0.9 * m + 0.1 * g for m, g in zip(moments, torch.autograd.grad(loss, parameters), strict=True)]
    for i, m in enumerate(moments):
        assert torch.allclose(optimizer["state"][i]["exp_avg"], m, atol=1e-6) and m.abs().max() > 1e-5
    assert [g["weight_decay"] for g in optimizer["param_groups"]] == [0.1, 0.0]


def test_a_run_learns_and_resumed_or_uninterrupted_ends_alike(trained, tmp_path, monkeypatch, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = ["--data", trained / "text.txt", "--steps", 20, "--grad_accum", 2]
    run_train(whole, *arguments)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if re.match(r" +\d+ ", line)]
    val_loss = train.evaluate(load_model(whole), tokens_of(whole, "val.bin"), 8)[0]
    assert [(r[0], len(r)) for r in rows] == [("10", 7), ("20", 7)] and abs(float(rows[1][1]) - val_loss) < 1
    assert pytest.approx(val_loss, abs=1e-4) == float(rows[1][2]) < float(rows[0][2]) < math.log(257) + 0.5

    crash = lambda text: re.match(" +10 ", text) and Mock(side_effect=KeyError("a crash after the first save"))()
    with monkeypatch.context() as patch, pytest.raises(KeyError, match="after the first save"):
        patch.setattr(train, "say", crash)
        run_train(parts, *arguments)
    assert saved(parts)["step"] == 10
    resume = (train.main, "--init", "resume", "--out", parts, "--device", "cpu")  # all else comes from the checkpoint
    run(*resume)
    assert_same_weights(saved(whole)["model"], saved(parts)["model"])
    assert "has its 20 steps: give a larger --steps" in refused(*resume)
    capsys.readouterr()
    run(*resume, "--steps", 40)  # more steps: the schedules jump, which is said
    lr, alpha = train.learning_rate(20, 40, 2e-3, 2), train.penalty_weight(20, 40, 1e-3)
    last = train.learning_rate(19, 20, 2e-3, 2)
    said = f"resuming at step 20, with learning rate {lr:.2e} (last {last:.2e}) and penalty weight {alpha:.2e}"
    assert said in capsys.readouterr().out


def test_resuming_takes_the_runs_options_and_refuses_what_the_checkpoint_decides(trained, tmp_path):
    options = "--steps 10 --no_bias --penalty l1 --alpha 0.25 --seed 7 --grad_accum 2 --dtype bfloat16".split()
    run_train(tmp_path, "--data", trained / "text.txt", *options)
    resume = ["--init", "resume", "--out", tmp_path, "--steps", 12]
    args = train.parse_arguments([str(a) for a in (*resume, "--lr", 1e-4)])
    assert (args.steps, args.lr, args.alpha, args.seed, args.grad_accum) == (12, 1e-4, 0.25, 7, 2)
    assert (args.dtype, args.eval_windows) == ("bfloat16", 8)
    for option, value, has in (
        ("n_layer", 3, 2), ("n_head", 4, 2), ("n_embd", 32, 16), ("block_size", 8, 16),
        ("activation", "gelu", "relu"), ("penalty", "hoyer", "l1"),
    ):  # fmt: skip
        line = refused(train.main, *resume, f"--{option}", value)
        assert f"--{option} cannot differ from the checkpoint, whose {option} is {has}" in line
    assert "leave --preset out" in refused(train.main, *resume, "--preset", "gpt2")
    same = ["--n_embd", 16, "--penalty", "l1", "--no_bias", "--tokenizer", "bytes"]
    run(train.main, *resume, *same)  # saying the same is no difference
    assert saved(tmp_path)["step"] == 12 and not saved(tmp_path)["config"]["bias"]
    shutil.copy(trained / "ckpt.pt", tmp_path)
    assert "--no_bias cannot differ from the checkpoint" in refused(train.main, *resume, "--no_bias")


def test_relufication_and_a_shorter_context_start_from_another_models_weights(trained, tmp_path):
    dense = tiny_dense(activation="gelu")
    d2dmoe.save_checkpoint(tmp_path / "gelu.pt", dense, tokenizer="bytes")
    options = "--eval_windows 4 --steps 1 --lr 0 --device cpu --out".split()
    start_from = (train.main, "--init", tmp_path / "gelu.pt", "--data", trained / "text.txt", *options, tmp_path)
    run(*start_from, "--activation", "relu", "--block_size", 8, "--penalty", "l1")
    model = load_model(tmp_path)
    assert (model.config.activation, model.config.block_size, model.config.penalty) == ("relu", 8, "l1")
    shorter = {"transformer.wpe.weight": dense.transformer.wpe.weight[:8]}
    assert_same_weights(model.state_dict(), dense.state_dict() | shorter)
    assert "block_size 99 is longer than the checkpoint's 16" in refused(*start_from, "--block_size", 99)
    assert "--n_embd cannot differ" in refused(*start_from, "--n_embd", 32)


def test_options_and_presets(capsys):
    args = train.parse_arguments("--preset gpt2 --init openai --steps 5".split())
    assert (args.n_layer, args.block_size, args.activation, args.steps) == (None, None, "relu", 5)  # the checkpoint's
    args = train.parse_arguments("--preset gpt2 --steps 5".split())
    assert (args.n_layer, args.n_head, args.n_embd, args.block_size, args.tokenizer) == (12, 12, 768, 1024, "gpt2")
    assert (args.activation, args.penalty, args.alpha, args.lr, args.steps) == ("relu", "l1", 5e-4, 6e-4, 5)
    assert args.batch_size * args.grad_accum == 960
    args = train.parse_arguments("--lr 1 --lr 0.5 --no_bias --no-compile --compile".split())
    assert args.lr == 0.5 and args.bias is False and args.compile and args.n_embd is None and args.batch_size == 16
    words = train.as_words(args)
    assert "--lr=0.5" in words and "--compile" in words and not any("out" in w or "data" in w for w in words)
    again = train.parse_arguments(words)
    assert {k for k, v in vars(args).items() if vars(again)[k] != v} == {"bias"}  # which the checkpoint decides
    for main in (train.main, convert.main, sample.main):
        with pytest.raises(SystemExit) as end:
            main(["--help"])
        text = capsys.readouterr().out
        assert end.value.code == 0 and "examples:" in text and text.count("default:") > 8


def test_a_step_in_pieces_in_two_processes_compiled_or_in_bfloat16_is_the_same_step(trained, tmp_path):
    one, two, arguments = tmp_path / "one", tmp_path / "two", ["--data", trained / "text.txt", "--steps", 20]
    run_train(one, *arguments, "--batch_size", 12)
    run_train(tmp_path / "pieces", *arguments, "--grad_accum", 3)  # 4, 4, 4 sequences; each of two processes: 4 and 2
    run_train(tmp_path / "bfloat16", *arguments, "--batch_size", 12, "--dtype", "bfloat16")
    out = output_of(torchrun("train.py", *TINY, *arguments, "--grad_accum", 3, "--out", two))
    assert out.count("wrote") == 1 and "2 process(es)" in out
    tolerances = {"pieces": 1e-5, "two": 1e-5, "bfloat16": 0.05}
    if shutil.which("g++") or shutil.which("clang++"):
        run_train(tmp_path / "compiled", *arguments, "--batch_size", 12, "--compile")
        tolerances["compiled"] = 1e-4
    exact = saved(one)["model"]
    for name, tolerance in tolerances.items():
        weights = saved(tmp_path / name)["model"]
        assert_same_weights(exact, weights, tolerance)
        assert all(w.dtype == torch.float32 for w in weights.values())
    assert any((w != exact[n]).any() for n, w in saved(tmp_path / "bfloat16")["model"].items())
    run_train(two, "--init", "resume", "--steps", 25)
    assert saved(two)["step"] == 25
    options, both = ["--finetune", 5, "--data", trained / "text.txt"], tmp_path / "both"
    output_of(torchrun("convert.py", *CONVERT, *options, "--ckpt", one, "--out", both))
    run_convert(one, *options)
    assert_same_weights(saved(one, "d2dmoe.pt")["model"], saved(both, "d2dmoe.pt")["model"], 1e-4)
    assert all(np.array_equal(tokens_of(folder / "text"), tokens_of(trained)) for folder in (both, one))


# ---------------------------------------------------------------------------------------------------------------------
# convert.py


def test_balanced_kmeans_fills_every_cluster_finds_planted_ones_and_is_near_the_best():
    for n, k in ((12, 3), (64, 64), (30, 1), (24, 6)):
        points = torch.randn(n, 5) if k != 6 else torch.ones(n, 5)  # these are all equal
        assignment = convert.balanced_kmeans(points, k, seed=0)
        assert torch.bincount(assignment, minlength=k).tolist() == [n // k] * k
        assert torch.equal(assignment, convert.balanced_kmeans(points, k, seed=0))
    truth = torch.arange(8).repeat_interleave(16)[torch.randperm(128)]
    points = torch.eye(8)[truth] + 0.05 * torch.randn(128, 8)
    found = convert.balanced_kmeans(points, 8, seed=0)
    assert len(set(zip(found.tolist(), truth.tolist(), strict=True))) == 8
    centers = convert.spread_centers(points, 8, torch.Generator().manual_seed(0))
    assert sorted(centers.argmax(1).tolist()) == [*range(8)]  # one in each cluster, before any iteration

    pairs = [torch.tensor(a) for a in set(itertools.permutations((0, 0, 1, 1, 2, 2)))]  # all assignments of 6 to 3
    squares = lambda points, a: sum(((points[a == c] - points[a == c].mean(0)) ** 2).sum().item() for c in range(3))
    sets = torch.randn(20, 6, 2)
    best = sum(min(squares(points, a) for a in pairs) for points in sets)
    ours = sum(squares(points, convert.balanced_kmeans(points, 3, seed=0)) for points in sets)
    assert best <= ours + 1e-3 < 1.03 * best
    for score in torch.randn(20, 6, 3):
        total = lambda a: score[torch.arange(6), a].sum().item()
        a = convert.assign_balanced(score, torch.zeros(3), epsilon=1e-4)
        assert total(a) >= max(map(total, pairs)) - 6 * 1e-4 - 1e-5


def test_splitting_loses_nothing_and_experts_are_the_clusters_of_features_by_plain_formula():
    mlp, x = d2dmoe.MLP(6, 20, "relu", "none"), torch.randn(50, 6)
    w = mlp.c_fc.weight
    assert torch.allclose(convert.weight_features(mlp), w / w.norm(dim=1, keepdim=True))
    fires = (torch.relu(x @ w.t() + mlp.c_fc.bias) > 0).float()  # [50, 20]
    unit = (fires / fires.norm(dim=0)).t()  # [20, 50]
    features = convert.coactivation_features(mlp, x, rank=20)
    assert torch.allclose(features @ features.t(), unit @ unit.t(), atol=1e-4)  # a rotation of them, at full rank
    before = torch.get_rng_state()
    first, second = (convert.coactivation_features(mlp, x, rank=3) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (20, 3) and torch.equal(torch.get_rng_state(), before)

    for bias, activation in itertools.product((True, False), kernels.ACTIVATIONS):
        dense, idx = tiny_dense(bias=bias, activation=activation), torch.randint(257, (2, 16))
        for source in (dense, with_projection_mlps(dense)):
            assert_close(tiny_moe(source)(idx)[0], source(idx)[0].double(), 1e-5)
    layer, x = random_moe(), torch.randn(5, 10)  # whose own biases must not stay
    for mlp in (d2dmoe.MLP(10, 24, "relu", "none", bias) for bias in (True, False)):
        convert.split_mlp(mlp, layer, torch.arange(24) % 6)
        assert_close(layer(x)[0], mlp(x)[0].double(), 1e-5)
    dense, idx = tiny_dense(), torch.randint(257, (4, 16))
    moe = tiny_moe(dense)
    dense.hidden(idx, inputs=(inputs := []))
    for tokens in (None, idx):
        convert.split_model(dense, moe, tokens, seed=0)
        for mlp, layer, read in zip(dense.layers(), moe.layers(), inputs, strict=True):
            features = convert.weight_features(mlp)
            if tokens is not None:
                features = convert.coactivation_features(mlp, read.flatten(0, 1))
            assignment = convert.balanced_kmeans(features, 8, seed=0)
            for e in range(8):
                assert torch.equal(layer.w1[e], mlp.c_fc.weight[assignment == e])
                assert torch.equal(layer.w2[e], mlp.c_proj.weight[:, assignment == e].t())


def test_router_losses_by_plain_formula():
    x = torch.randn(9, 10)
    for power in (1.0, 0.5, 2.0):
        moe = random_moe(router=Router(10, 5, 6, power))
        raw = torch.relu(x @ moe.router.fc1.weight.t()) @ moe.router.fc2.weight.t()
        loss = convert.router_loss(moe, x)
        assert torch.isclose(loss, ((raw.abs() - true_norms(moe, x) ** power) ** 2).mean(), rtol=1e-4)
        loss.backward()
        with_gradient = {n for n, p in moe.named_parameters() if p.grad is not None}
        assert with_gradient == {"router.fc1.weight", "router.fc2.weight"}
    for activation in ("relu", "gelu"):
        moe = random_moe(activation, d2dmoe.MoEficationRouter(10, 5, 6))
        z = torch.einsum("nd,ehd->neh", x, moe.w1) + moe.b1
        mass = kernels.ACTIVATIONS[activation](z).clamp(min=0).sum(-1)
        share = mass / max(mass.flatten().tolist())
        p = torch.sigmoid(torch.tanh(x @ moe.router.fc1.weight.t()) @ moe.router.fc2.weight.t())
        expected = -(share * p.log() + (1 - share) * (1 - p).log()).mean()
        assert torch.isclose(convert.moefication_loss(moe, x), expected, rtol=1e-3)
        assert (share.amax(-1) < 1).any()  # a token's own largest is not 1: it is divided by the whole batch's


@torch.no_grad()
def test_projections_learn_from_what_the_linear_layers_read_and_return(monkeypatch):
    dense, seen = tiny_dense(bias=False), []
    see = lambda layer, x, y: seen.extend((x[0], part) for part in y.split(16, dim=-1))
    for block in dense.transformer.h:
        for layer in (block.attn.c_attn, block.attn.c_proj):
            layer.register_forward_hook(see)
    idx = torch.randint(257, (3, 16))
    dense(idx)
    for (x, y), (x_, y_) in zip([*seen], convert.projection_examples(dense, idx), strict=True):
        assert torch.allclose(x, x_, atol=1e-5) and torch.allclose(y, y_, atol=1e-5)
    mlp, target = d2dmoe.MLP(16, 4, "relu", "hoyer"), y
    a = torch.relu(x @ mlp.c_fc.weight.t() + mlp.c_fc.bias)
    expected = ((mlp.c_proj(a) - target) ** 2).mean() / target.var() + 0.3 * plain_hoyer(a)
    assert torch.isclose(convert.projection_loss(mlp, x, target, 0.3), expected, rtol=1e-4)
    moments = [torch.stack((part.mean(), part.square().mean())) for part in (target[:, :8], target[:, 8:])]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: t.copy_(sum(moments)))
    of_two = [convert.projection_loss(mlp, x[:, s], target[:, s], 0.3) for s in (slice(8), slice(8, 16))]
    assert torch.isclose(sum(of_two) / 2, expected, rtol=1e-4)


def training_draw(trained, config, seed=0):
    return partial(train.draw_batch, tokens_of(trained), 4, config, seed)


def test_projections_are_trained_alone_then_together_by_plain_formula(trained, capsys):
    dense = tiny_dense(scale=3.0).requires_grad_(False)
    draw = partial(training_draw, trained, dense.config)

    def distill(steps, lr):
        torch.manual_seed(0)
        model = convert.distill_projections(dense, draw(), draw(2), steps, lr)
        return model, re.findall(r"projections.*loss ([\d.]+)", capsys.readouterr().out)

    untrained, (_, together) = distill(1, 0.0)  # at a learning rate of 0 the losses are those of the weights as drawn
    [(x, _)] = draw(2)(0)
    p = dense(x)[0].softmax(-1)
    divergence = lambda model: (p * (p.log() - model(x)[0].log_softmax(-1))).sum(-1).mean()
    untrained.hidden(x, inputs=(inputs := []))
    penalty, kl = 0.0, divergence(untrained)
    for i, (mlp, read) in enumerate(zip(untrained.layers(), inputs, strict=True)):
        if i % 5 < 4:  # q, k, v, o, but not the block's own MLP
            penalty += plain_hoyer(torch.relu(read @ mlp.c_fc.weight.t() + mlp.c_fc.bias))
    assert float(together) == pytest.approx((kl + 1e-4 * penalty).item(), rel=1e-3) and kl > 1e-3

    before = {n: w.clone() for n, w in dense.state_dict().items()}
    model, _ = distill(100, 1e-2)
    assert divergence(model) < 0.5 * kl
    assert_same_weights(dense.state_dict(), before)
    kept = {n: w for n, w in model.state_dict().items() if n in before}
    assert kept and all(torch.equal(w, before[n]) for n, w in kept.items())
    assert not model.training and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("router", ["norm", "moefication"])
def test_training_routers_changes_routers_alone_and_lowers_their_loss(trained, router):
    dense = load_model(trained / "ckpt.pt").requires_grad_(False)
    moe = tiny_moe(with_projection_mlps(dense) if router == "norm" else dense, router=router).requires_grad_(False)
    frozen = {n: p.clone() for n, p in moe.named_parameters() if "router" not in n}
    x = torch.from_numpy(tokens_of(trained)[:64].astype(np.int64)).view(4, 16)
    moe.hidden(x, inputs=(inputs := []))
    loss = convert.router_loss if router == "norm" else convert.moefication_loss
    losses = lambda: [loss(layer, r.flatten(0, 1)).item() for layer, r in zip(moe.layers(), inputs, strict=True)]
    before, again = losses(), copy.deepcopy(moe)
    for p in again.parameters():
        p.grad = torch.full_like(p, 1e3)  # of whatever was done before
    for model in (moe, again):
        convert.train_routers(model, training_draw(trained, moe.config), 150, 1e-2)
    assert_same_weights(moe.state_dict(), again.state_dict())
    assert all(after < b for b, after in zip(before, losses(), strict=True)) and sum(losses()) < 0.8 * sum(before)
    assert all(torch.equal(p, frozen[n]) for n, p in moe.named_parameters() if n in frozen)


def test_finetuning_is_cross_entropy_with_the_gate_on_and_the_routers_regression(trained, monkeypatch):
    dense = load_model(trained / "ckpt.pt").requires_grad_(False)
    moe = tiny_moe(with_projection_mlps(dense))
    for layer in moe.layers():  # untrained routers hardly tell experts apart
        layer.router.fc2.weight.data.mul_(torch.logspace(-2, 0, len(layer.w1)).unsqueeze(1))
    draw, made = training_draw(trained, moe.config), {}
    monkeypatch.setattr(convert, "fit", lambda parameters, loss_of, *_: made.update(of=parameters, loss=loss_of))
    convert.finetune(moe, draw, 5, lr=1e-3)
    [(x, y)] = draw(2)
    made["loss"](x, y, 12).backward()
    gate = partial(dynamic_k, tau=0.94)  # the third
    routers = [n for n, _ in moe.named_parameters() if "router" in n]
    assert len(made["of"]) == len(list(moe.parameters())) and len(routers) == 2 * len(moe.layers())
    ours = {n: p.grad.clone() for n, p in moe.named_parameters()}

    moe.zero_grad()
    logits, executed = moe(x, gate)
    assert 0.1 < torch.cat([e.flatten() for e in executed]).float().mean() < 0.95
    F.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
    assert all(p.grad is None for n, p in moe.named_parameters() if n in routers), "no gradient passes the gate"
    moe.hidden(x, gate, inputs=(inputs := []))
    for layer, read in zip(moe.layers(), inputs, strict=True):
        convert.router_loss(layer, read.detach().flatten(0, 1)).backward()
    for n, p in moe.named_parameters():
        assert torch.allclose(ours[n], p.grad, rtol=1e-3, atol=1e-6), n


def test_a_finetuning_that_diverges_costs_no_routers(trained, tmp_path, capsys):
    finetuned = ("--finetune", 9, "--finetune_lr", 1e30, "--out", tmp_path)
    for name in ("d2dmoe.pt", "cost_vs_loss.csv"):
        shutil.copy(trained / name, tmp_path)
    assert "fine-tuning: the loss is not finite" in refused(convert.main, *CONVERT, "--ckpt", trained, *finetuned)
    kept, without = saved(tmp_path, "d2dmoe.pt"), saved(trained, "d2dmoe.pt")  # both of the same options and seed
    assert kept["recipe"] == without["recipe"] and "fine-tuning" not in kept["recipe"]
    assert f"stays as {tmp_path}/d2dmoe-previous.pt" in capsys.readouterr().out  # told before it is written over
    assert_same_weights(kept["model"], without["model"], 0)
    assert [p.name for p in tmp_path.glob("cost*")] == ["cost_vs_loss-previous.csv"]  # it is not this conversion's


def test_the_table_is_the_model_measured_by_hand(trained):
    dense, moe, cheat = load_model(trained / "ckpt.pt"), load_model(trained), load_model(trained)
    for layer in cheat.layers():
        layer.router.forward = partial(true_norms, layer)
    rows, val = convert.read_table(trained), tokens_of(trained, "val.bin")
    assert [r["rule"] for r in rows] == ["dynamic_k", "top_k", "oracle"] * 3
    assert [r["value"] for r in rows if r["rule"] != "top_k"] == [1, 1, 0.9, 0.9, 0.5, 0.5]
    dense_loss, _ = by_hand(dense, val, 8, None)
    fixed = 2 * (2 * 8.5 * 16 + 4 * 16 * 16) + 257 * 16  # attention over (1 + ... + 16) / 16 tokens, LM head
    mlps, routers = 2 * 64 * 2 * 16, 2 * (16 * 4 + 4 * 8)
    for row in rows:
        rule, value = row["rule"], row["value"]
        gate = None if value == 1 else partial(dynamic_k, tau=value)
        if rule == "top_k" and value < 1:
            gate = partial(top_k, k=math.ceil(8 * value - 1e-6))
        loss, executed = by_hand(cheat if rule == "oracle" else moe, val, 8, gate)
        assert row["dense_loss"] == pytest.approx(dense_loss, abs=1e-5) and row["recipe"] == "paper E=8 r=4"
        assert row["loss"] == pytest.approx(loss, abs=1e-3 if rule == "oracle" else 1e-5)
        assert row["executed"] == pytest.approx(executed, abs=2e-3 if rule == "oracle" else 1e-6)
        cost = fixed + row["executed"] * mlps + (routers if gate else 0)  # no router is asked at tau 1
        price = math.nan if rule == "oracle" else cost / (fixed + mlps)  # an oracle has to run every expert
        assert row["flops"] == pytest.approx(price, nan_ok=True)
        assert row["time"] > 0 or rule != "dynamic_k"
    assert rows[0]["executed"] == rows[0]["flops"] == 1 > rows[6]["executed"]
    assert rows[0]["loss"] == pytest.approx(dense_loss, abs=1e-4)
    assert all(a.w1 is b.w1 for a, b in zip(convert.with_oracles(moe).layers(), moe.layers(), strict=True))  # no copy
    for share, k in ((0.25, 2), (0.26, 3), (0.3750001, 3), (1.0, 8), (0.01, 1)):  # rounded up
        assert torch.equal(convert.top_share(norms := torch.rand(5, 8), share), top_k(norms, k))


def test_costs_are_read_off_the_curve_by_interpolation(capsys):
    curve = [
        ("dynamic_k", 1.0, 1.0, 2.0), ("dynamic_k", 0.5, 0.7, 2.02), ("dynamic_k", 0.25, 0.5, 2.06),
        ("top_k", 1.0, 1.0, 2.0), ("top_k", 0.5, 0.8, 2.4), ("oracle", 1.0, 1.0, 2.0), ("oracle", 0.2, 0.3, 2.01),
    ]  # fmt: skip
    points = [dict(zip(("rule", "executed", "flops", "loss"), row, strict=True)) for row in curve]
    assert convert.cost_at(points, "dynamic_k", 2.03) == pytest.approx((0.4375, 0.65))
    assert all(math.isnan(convert.cost_at(points, "dynamic_k", loss)[0]) for loss in (3.0, 1.9))
    bumpy = [points[0], points[1], points[2] | {"loss": 2.005}]  # its cheapest row is below 2.01: the cost is unknown
    assert math.isnan(convert.cost_at(bumpy, "dynamic_k", 2.01)[1])
    bumpy[2]["loss"], bumpy[0]["loss"] = 2.015, 2.03  # with more experts worse again
    assert math.isnan(convert.cost_at(bumpy, "dynamic_k", 2.01)[0])
    convert.print_read_off(points, 2.0)
    out = capsys.readouterr().out
    assert "dynamic_k:  37.5% of the experts,  60.0% of the FLOPs\n" in out
    assert re.search("at 2% above the dense loss, oracle +: outside of this table", out)


def test_tables_come_back_and_an_earlier_one_keeps_another_name(tmp_path, capsys, monkeypatch):
    path = tmp_path / "cost_vs_loss.csv"
    monkeypatch.setattr(os, "link", Mock(side_effect=OSError("not supported")))  # then it is copied
    numbers = dict(value=0.1, executed=1 / 3, flops=0.75, time=1.5, loss=2.0, dense_loss=1.5)
    first = dict(recipe='a, \x1b[31m"b"', rule="top_k", text="t") | numbers
    second = first | {"value": 0.2}
    convert.write_table(path, [first])
    convert.write_table(path, [second, first | {"loss": math.nan}])  # what is not finite cannot be drawn
    assert convert.read_table(tmp_path) == [second] and "cost_vs_loss-previous.csv" in capsys.readouterr().out
    shutil.copy(tmp_path / "cost_vs_loss-previous.csv", path)
    assert convert.read_table(tmp_path) == [first]
    damaged = ",".join(convert.COLUMNS) + "\nx,top_k,1,oops,1,1,2,2,t\n"
    contents = [b"", b"a,b\n1,2\n", b"\xff\xfe" * 50, damaged.encode()]
    check_refusals(partial(convert.read_table, tmp_path), {"or no table of this version": contents}, path)
    assert "run convert.py --eval there" in refused(convert.read_table, tmp_path / "nowhere")


@pytest.mark.parametrize("arguments, coactivation, router, power, width, name", [
    ("--recipe better", True, "norm", 0.5, 8, "better E=8 r=8"),
    ("--recipe moefication", False, "moefication", 1.0, 6, "moefication E=8 r=6"),
    ("--split coactivation --router_power 0.25 --router_width 3",
     True, "norm", 0.25, 3, "paper + coactivation split + power 0.25 E=8 r=3"),
    ("--recipe paper --finetune 3", False, "norm", 1.0, 6, "paper + fine-tuning E=8 r=6"),
    ("--recipe better --split weights --attention",
     False, "norm", 0.5, 8, "better + attention + weights split E=8 r=8"),
])  # fmt: skip
def test_recipes(trained, tmp_path, monkeypatch, capsys, arguments, coactivation, router, power, width, name):
    seen, plain = [], convert.coactivation_features
    monkeypatch.setattr(convert, "coactivation_features", lambda mlp, x: seen.append(len(x)) or plain(mlp, x))
    words = [w for w in CONVERT if w not in ("--router_width", "4")]
    run(convert.main, *words, "--ckpt", trained, "--out", tmp_path, "--steps", 4, *arguments.split())
    model, rows, out = load_model(tmp_path), convert.read_table(tmp_path), capsys.readouterr().out
    c = model.config
    assert (c.num_experts, c.router, c.router_power, c.router_width) == (8, router, power, width)
    assert seen == ([8192, 8192] if coactivation else [])  # tokens, for each of two layers
    assert {row["recipe"] for row in rows} == {name} == {saved(tmp_path, "d2dmoe.pt")["recipe"]}
    assert ("fine-tuning: step     3 of 3" in out) == ("--finetune" in arguments)
    assert (f"now: python sample.py --ckpt {tmp_path} --tau 0.95" in out) == (router == "norm")
    if router == "moefication":
        assert [row["executed"] for row in rows] == [math.ceil(8 * row["value"] - 1e-6) / 8 for row in rows]
        assert len(rows) == 13 and {row["rule"] for row in rows} == {"top_k"}
    if "--attention" in arguments:
        assert (c.projections, c.projection_experts, c.projection_router_width) == ("moe", 8, 2)
        for row, gate in zip(rows[::3], (None, partial(dynamic_k, tau=0.9), partial(dynamic_k, tau=0.5)), strict=True):
            assert row["executed"] == pytest.approx(by_hand(model, tokens_of(trained, "val.bin"), 8, gate)[1])


def test_eval_measures_other_taus_and_trains_nothing_and_compare_draws_others(trained, tmp_path, monkeypatch, capsys):
    copy_run(trained, tmp_path)
    shutil.copy(trained / "d2dmoe.pt", tmp_path)
    before, drawn = (tmp_path / "d2dmoe.pt").read_bytes(), []
    monkeypatch.setattr(convert, "plot", lambda path, tables: drawn.extend(tables))
    monkeypatch.setattr(convert, "fit", lambda *_: pytest.fail("it trains"))
    arguments = (convert.main, "--ckpt", tmp_path, "--eval", *"--eval_windows 8 --device cpu --taus 0.7 0.9".split())
    run(*arguments, "--compare", trained)
    rows, others = convert.read_table(tmp_path), convert.read_table(trained)
    assert [row["value"] for row in rows if row["rule"] == "dynamic_k"] == [0.7, 0.9]
    assert {row["recipe"] for row in rows} == {"paper E=8 r=4"}
    but_time = lambda table: [{k: str(v) for k, v in row.items() if k != "time"} for row in table]  # nan is not nan
    assert but_time(rows[3:]) == but_time(others[3:6])  # tau 0.9, as before
    assert list(map(but_time, drawn)) == [but_time(rows), but_time(others)]
    assert (tmp_path / "d2dmoe.pt").read_bytes() == before and not (tmp_path / "d2dmoe-previous.pt").exists()
    assert "another text" not in capsys.readouterr().out
    other = write_text(tmp_path / "other.txt", seed=5)
    run(*arguments, "--data", other, "--eval_windows", 10**6)
    out, length = capsys.readouterr().out, len(tokens_of(tmp_path / "text", "val.bin"))
    assert "was trained on another text" in out and f"over {length - 16} windows" in out
    for seconds in (0.5, 1.2):
        monkeypatch.setattr(convert, "relative_time", lambda *_: seconds)
        run(*arguments)
        assert ("a layer is too small for experts to save time" in capsys.readouterr().out) == (seconds > 1)
    assert "at most three folders" in refused(*arguments, "--compare", *[trained] * 4)
    checkpoint, name = saved(tmp_path), "transformer.h.1.mlp.c_fc.weight"
    checkpoint["model"][name] = (checkpoint["model"][name] + 1).t().contiguous().t()  # trained again; in any layout
    for name in ("ckpt.pt", "d2dmoe.pt"):  # then d2dmoe.pt is no conversion at all
        torch.save(checkpoint, tmp_path / name)
        assert "was not converted from the model in" in refused(*arguments)


def test_a_picture_is_drawn_where_matplotlib_is_installed(trained, tmp_path, capsys, monkeypatch):
    table, names = convert.read_table(trained), ("better $x_1$ E=8", "moefication E=8", "\u0107 E=4")
    if (trained / "cost_vs_loss.png").exists():  # requirements.txt leaves it out
        convert.plot(tmp_path / "c.png", [table] + [[row | {"recipe": name} for row in table] for name in names])
        convert.plot(tmp_path / "c.png", [table])
        for picture in (tmp_path / "c.png", tmp_path / "c-previous.png", trained / "cost_vs_loss.png"):
            assert picture.read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run_convert(trained, "--out", tmp_path, "--steps", 1, "--taus", 1)
    assert "pip install matplotlib draws it" in capsys.readouterr().out
    assert not (tmp_path / "cost_vs_loss.png").exists()


def test_export_writes_a_gpt2_of_hugging_faces_that_computes_the_same(tmp_path):
    idx = torch.randint(257, (2, 16))
    for changes, theirs in (  # activations by transformers' own names
        (dict(), "relu"), (dict(bias=False, activation="gelu", n_head=4), "gelu"),
        (dict(tie_weights=False, activation="gelu_tanh", d_ff=48, layer_norm_epsilon=1e-3), "gelu_new"),
    ):  # fmt: skip
        dense, folder = tiny_dense(**changes), tmp_path / theirs
        c, expected = dense.config, dense(idx)[0]
        d2dmoe.save_checkpoint(tmp_path / "ckpt.pt", dense)
        export = (convert.main, "--ckpt", tmp_path / "ckpt.pt", "--export", folder)
        run(*export)
        config, weights = json.loads((folder / "config.json").read_text()), saved(folder, "pytorch_model.bin")
        assert (config["model_type"], config["activation_function"], config["n_inner"]) == ("gpt2", theirs, c.d_ff)
        plain = plain_gpt2(weights, idx, config["n_head"], c.activation, config["layer_norm_epsilon"])
        assert (expected.double() - plain).abs().max() < 1e-4
        assert torch.allclose(load_model(folder)(idx)[0], expected, atol=1e-4)
        assert weights.keys() == {f"transformer.{k}" for k in gpt2_weights()} | {"lm_head.weight"}
        assert "is not empty: --export takes a new folder" in refused(*export)


def test_a_hugging_face_model_converts_on_bins_or_text_of_its_tokens(trained, tmp_path):
    weights, idx, out = gpt2_weights(), torch.randint(257, (2, 16)), tmp_path / "out"
    ckpt, expected = hf_folder(tmp_path / "hf", weights), plain_gpt2(weights, idx, n_head=8)
    copy_run(trained, out)
    assert "--data takes their folder, or text" in refused(convert.main, *CONVERT, "--ckpt", ckpt)
    for data in ([trained], [write_text(tmp_path / "other.txt", seed=1), "--tokenizer", "bytes"]):
        run_convert(ckpt, "--steps", 1, "--taus", 0.9, "--out", out, "--data", *data)
        assert (load_model(out)(idx)[0].double() - expected).abs().max() < 1e-3
    assert np.array_equal(tokens_of(out), tokens_of(trained))  # text is not encoded over the tokens of a run
    first = tokens_of(out / "text")
    third = ("--data", write_text(tmp_path / "third.txt", seed=2), "--tokenizer", "bytes")
    assert "has tokens of another text" in refused(run_convert, ckpt, "--out", out, *third)
    assert np.array_equal(tokens_of(out / "text"), first)
    assert "no checkpoint at" in refused(convert.main, "--ckpt", ckpt, "--eval", "--data", trained)


# ---------------------------------------------------------------------------------------------------------------------
# sample.py

FOOTER = (
    r"tau ([\d.]+): ([\d.]+)% of the experts executed, ([\d.]+)% of the dense model's FLOPs; "
    r"(\d+) tokens/s, ([\d.]+)x the (\d+) of all experts without a router"
)


def sampled(capsys, ckpt, *arguments):
    run(sample.main, "--ckpt", ckpt, "--device", "cpu", "--max_new_tokens", 8, *arguments)
    return capsys.readouterr().out


def speaking(path, token, vocab_size=257, tokenizer="bytes"):
    """A checkpoint of a model that says one token for ever"""
    model = tiny_dense(vocab_size=vocab_size, tie_weights=False)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1)
        model.lm_head.weight.zero_()[token] = 100
    d2dmoe.save_checkpoint(path, tiny_moe(model), tokenizer=tokenizer)
    return path


def test_sampling_ends_with_what_it_cost(trained, capsys):
    moe, idx = load_model(trained), torch.tensor([[*b"to be"]])
    out = sampled(capsys, trained, *"--tau 0.9 --num_samples 2 --seed 3 --prompt".split(), "to be")
    shares, flops, dense, texts = [], 0, 0, []
    fixed = lambda c: 2 * (2 * c * 16 + 4 * 16 * 16) + 257 * 16  # two blocks for a token that sees c, and the LM head
    for seed in (3, 4):
        generator = torch.Generator().manual_seed(seed)
        text = [*d2dmoe.generate(moe, idx, 8, partial(dynamic_k, tau=0.9), 0.9, None, generator)]
        texts.append("to be" + bytes(token.item() for token, _ in text).decode(errors="replace"))
        for i, (_, executed) in enumerate(text):
            ran = sum(e.sum().item() for e in executed)
            shares.append(ran / 16)
            flops += fixed(5 + i) + ran * 8 * 2 * 16 + 2 * (16 * 4 + 4 * 8)
            dense += fixed(5 + i) + 2 * 64 * 2 * 16
    assert out.startswith("\n\n---------------\n".join(texts) + "\n\ntau")
    assert "\x1b" not in out and texts[0] != texts[1]
    tau, share, cost, speed, ratio, dense_speed = re.search(FOOTER, out).groups()
    assert (tau, share, cost) == ("0.9", f"{100 * sum(shares) / 16:.1f}", f"{100 * flops / dense:.1f}")
    assert float(ratio) == pytest.approx(int(speed) / int(dense_speed), abs=0.02 + 1 / int(dense_speed))


def test_at_tau_1_no_router_is_asked_and_the_text_is_the_dense_models(trained, capsys, tmp_path, monkeypatch):
    d2dmoe.save_checkpoint(tmp_path / "d2dmoe.pt", tiny_moe(tiny_dense(), router="moefication"), tokenizer="bytes")
    assert re.search(FOOTER + r"\n\(.*whose own rule is top-k", sampled(capsys, tmp_path))
    monkeypatch.setattr(Router, "forward", lambda *_: pytest.fail("a router was asked"))
    options = "--tau 1 --max_new_tokens 40 --prompt to".split()
    ours, dense = (sampled(capsys, path, *options) for path in (trained, trained / "ckpt.pt"))
    assert re.search(FOOTER, ours).groups()[:3] == ("1", "100.0", "100.0")
    text, remark = dense.split("\n\na dense model, to which tau does not apply")
    assert ours.startswith(text + "\n\ntau") and re.search(r": \d+ tokens/s\n$", remark) and "executed" not in dense


def test_prompts_the_end_of_text_and_control_characters(tmp_path, capsys, monkeypatch):
    path, end = speaking(tmp_path / "a.pt", ord("a")), speaking(tmp_path / "end.pt", 256)
    monkeypatch.setattr(sys, "stdin", io.StringIO("from\nstdin"))
    for prompt, shown in (
        (["--prompt", "-"], "from\nstdin"),
        (["--prompt", 40 * "x"], 40 * "x"),  # longer than the context
        (["--prompt", "<|endoftext|>"], "<|endoftext|>"),  # as letters
        (["--prompt", ""], ""),  # begins after one
        ([], "    def "),
    ):
        assert sampled(capsys, path, *prompt).startswith(shown + 8 * "a" + "\n")
    assert sampled(capsys, end, "--prompt", "ab").startswith("ab\n")
    assert sampled(capsys, end, "--prompt", "ab", "--ignore_end").startswith("ab" + 8 * "<|endoftext|>" + "\n")
    for token, escaped in ((27, r"\x1b"), (10, "\n"), (9, "\t"), (7, r"\x07")):
        path = speaking(tmp_path / "d2dmoe.pt", token)
        for on_terminal, shown in ((True, r"a\x1b]0;b\r" + 8 * escaped), (False, "a\x1b]0;b\r" + 8 * chr(token))):
            monkeypatch.setattr(sys.stdout, "isatty", lambda: on_terminal, raising=False)  # a pipe gets the bytes
            assert sampled(capsys, path, "--prompt", "a\x1b]0;b\r", "--color", "never").startswith(shown)


def test_shades_spread_over_the_shares_that_occur(trained, capsys):
    out = sampled(capsys, trained, "--color", "always", "--tau", 0.5)
    assert out.splitlines()[0].count("\x1b[48;5;") == 6 and "\x1b[48;5;" in out.partition("\n")[2]
    low, middle, high = (sample.shade("x", share, [0.1, 0.2, 0.3]) for share in (0.1, 0.2, 0.3))
    assert len({low, middle, high}) == 3 and low == "\x1b[48;5;255m\x1b[38;5;16mx\x1b[0m"
    assert low == sample.shade("x", 0.8, [0.8, 0.9]) and high == sample.shade("x", 0.9, [0.8, 0.9])


def test_a_picture_of_tokens_by_layers(trained, capsys, tmp_path, monkeypatch):
    if (trained / "cost_vs_loss.png").exists():  # matplotlib is installed
        sampled(capsys, trained, "--picture", tmp_path / "p.png", "--prompt", "$x_1$")
        assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    drawn, path, picture = [], speaking(tmp_path / "d2dmoe.pt", 256), ["--picture", tmp_path / "q.png"]
    with monkeypatch.context() as patch:
        patch.setattr(sample, "plot", lambda _, texts, counts, experts: drawn.append([len(texts), len(counts)]))
        patch.setattr(sample, "find_spec", lambda _: True)  # requirements.txt leaves matplotlib out
        for ending in ([], ["--ignore_end"]):  # it ends at once, both times
            sampled(capsys, path, *picture, "--num_samples", 2, *ending)
    assert drawn == [[8, 8]]  # the first text alone, if there is one
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for ckpt, message in ((path, "pip install matplotlib"), (trained / "ckpt.pt", "is a dense model")):
        assert message in refused(sample.main, "--ckpt", ckpt, *picture, "--device", "cpu")


def test_a_nanogpt_character_model_speaks_its_alphabet_and_without_one_is_not_guessed(tmp_path, capsys):
    letters = "\n !$09AZabch\u00e9\u4e2d\U0001f600"  # the last three are more than one byte in UTF-8
    write_bins(tmp_path, letters=letters)  # and what else nanoGPT's shakespeare_char leaves
    torch.save(nanogpt(gpt2_weights(vocab=len(letters)), vocab_size=len(letters)), tmp_path / "ckpt.pt")
    run_convert(tmp_path, "--steps", 1)
    assert "now: python sample.py" in capsys.readouterr().out
    prompt = "abc \u00e9\u4e2d"
    out = sampled(capsys, tmp_path, "--prompt", prompt, *"--tau 1 --temperature 0".split())
    idx = torch.tensor([[letters.index(c) for c in prompt]])
    text = [t.item() for t, _ in d2dmoe.generate(load_model(tmp_path / "ckpt.pt"), idx, 8, temperature=0)]
    assert out.startswith(prompt + "".join(letters[i] for i in text) + "\n\ntau 1:")
    for i, letter in enumerate(letters):
        path = speaking(tmp_path / "d2dmoe.pt", i, len(letters), "characters:" + letters)
        assert sampled(capsys, path, "--prompt", "a").startswith("a" + 8 * letter)
    for prompt in ("z", "\u00c3"):  # half of an é is no letter
        assert "alphabet has no" in refused(sample.main, "--ckpt", tmp_path, "--prompt", prompt)

    (tmp_path / "meta.pkl").unlink()
    assert "names no tokenizer" in refused(sample.main, "--ckpt", tmp_path / "ckpt.pt")
    run_convert(tmp_path, "--steps", 1)
    assert "sample.py" not in capsys.readouterr().out
    for name in (None, "gpt2", "characters:" + letters + "zz", "nonsense", ["bytes"], 3):
        path = speaking(tmp_path / "d2dmoe.pt", 0, len(letters), name)
        assert re.search("names no tokenizer|is unknown", refused(sample.main, "--ckpt", path))


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong: one clear line, status 1, nothing lost


def test_a_mistake_is_one_line_and_status_1_a_signal_128_and_its_number_a_bug_a_traceback(trained, tmp_path, capsys):
    too_wide = partial(run_convert, trained, "--out", tmp_path, "--router_width", 2**40)
    for main, status, message in (
        (lambda: None, 0, ""),
        (lambda: 143, 143, ""),
        (Mock(side_effect=ValueError("two\nlines")), 1, "error: two lines"),
        (Mock(side_effect=FileNotFoundError("gone")), 1, "error: gone"),
        (Mock(side_effect=OSError("\x1b[2Jfull")), 1, r"error: \x1b[2Jfull"),
        (Mock(side_effect=KeyboardInterrupt()), 130, "interrupted"),
        (Mock(side_effect=MemoryError()), 1, "error: out of memory: lower --batch_size"),
        (too_wide, 1, "error: out of memory"),
    ):
        with pytest.raises(SystemExit) as end:
            train.run(main)
        said = capsys.readouterr().err.removeprefix("\n")  # which ends what is half written
        assert end.value.code == status and said.startswith(message) and said.count("\n") == bool(message)
    with pytest.raises(RuntimeError, match="a bug"):
        train.run(Mock(side_effect=RuntimeError("a bug")))
    for script in ("train.py", "convert.py", "sample.py"):
        process = start(script, "--device", "toaster")
        out, err = process.communicate()
        assert process.returncode == 1 and out == ""
        assert re.fullmatch("error: --device toaster cannot be used here.*\n", err)


def test_user_errors_end_in_one_line(trained, tmp_path, monkeypatch):
    text, out, bare = trained / "text.txt", tmp_path / "out", tmp_path / "bare"
    for folder, file in ((bare, "ckpt.pt"), (tmp_path / "converted", "d2dmoe.pt")):
        folder.mkdir()
        shutil.copy(trained / file, folder)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "nothing").mkdir()
    d2dmoe.save_checkpoint(tmp_path / "nano.pt", tiny_dense())  # it names no tokenizer
    nano, bins = ("--ckpt", tmp_path / "nano.pt"), write_bins(tmp_path / "bins")
    words = write_bins(tmp_path / "words")  # of a run with other tokens
    (words / "meta.pkl").write_bytes(pickle.dumps({"tokenizer": "gpt2"}))
    into = (*TINY, "--data", text, "--out", out)
    too_late = ("--data", tmp_path / "empty.txt")  # what is refused before is not refused for it
    before = {p: p.read_bytes() for p in trained.iterdir()}
    for main, arguments, message in (
        (train.main, ["--init", "resume", "--out", out], f"no checkpoint at {out}/ckpt.pt: train.py writes"),
        (train.main, ["--init", "resume", "--out", bare], "has no train.bin and val.bin: give their folder"),
        (train.main, [*into, "--init", trained / "d2dmoe.pt"], "training starts from a dense one"),
        (train.main, [*into, "--init", tmp_path / "nano.pt"], "nothing names the tokenizer of --data"),
        (train.main, [*into, "--data", tmp_path / "empty.txt"], "1 tokens are too few for a context of 16"),
        (train.main, [*into, "--data", tmp_path / "nothing"], "nothing is not UTF-8 text"),
        (train.main, [*into, "--data", tmp_path / "nowhere"], "nowhere: no such file or folder"),
        (train.main, [*into, "--data", bins], "nothing names the tokenizer of --data"),
        (train.main, [*into, "--data", trained, "--tokenizer", "gpt2"], "name different tokenizers"),
        (train.main, [*into, "--init", trained, "--data", words], "name different tokenizers"),
        (convert.main, ["--ckpt", trained, "--out", out, "--data", words], "name different tokenizers"),
        (train.main, ["--n_layer", "x"], "--n_layer: invalid int value: 'x'"),
        (convert.main, ["--ckpt", tmp_path / "converted"], "no checkpoint at"),
        (convert.main, ["--ckpt", trained / "d2dmoe.pt"], "is converted already"),
        (sample.main, ["--ckpt", trained / "typo.pt"], "typo.pt: train.py writes ckpt.pt, and convert.py makes"),
        (train.main, [*into, *too_late, "--n_head", 3], "n_embd 16 must be a multiple of n_head 3"),
        (train.main, [*into, *too_late, "--out", text], f"cannot write into {text} (File exists): choose"),
        (convert.main, ["--ckpt", trained, *too_late, "--out", text], f"cannot write into {text} (File exists)"),
        (convert.main, ["--ckpt", trained, *too_late, "--num_experts", 7], "7 experts do not divide 64 neurons"),
        (convert.main, nano, "no train.bin and val.bin beside"),
        (convert.main, [*nano, "--out", out, "--data", text, "--tokenizer", "gpt2"], "is too small for the tokenizer"),
        (convert.main, ["--recipe", "moefication", "--router_power", 0.5], "the baseline, has no --router_power"),
        (sample.main, ["--device", "cuda:77"], "cuda:77 cannot be used here"),
        (convert.main, ["--tau", 0.5], "unrecognized arguments: --tau"),  # not --taus, which would start a conversion
    ):
        line = refused(main, *arguments)
        assert message in line, f"{arguments}: {line}"
    for main, words in (
        (train.main, ("--steps 0", "--lr nan", "--lr -1", "--beta2 1", "--final_lr 1.1")),
        (convert.main, ("--lr inf", "--taus 0.5 -0.5", "--router_power 0")),
        (sample.main, ("--tau 1.5", "--tau nan", "--seed -1", "--top_k 0")),
    ):
        assert all(re.search(r" is not (at least|between) \d", refused(main, *line.split())) for line in words)

    monkeypatch.setattr(tiktoken, "get_encoding", Mock(side_effect=ConnectionError("no route")))
    line = refused(train.main, *into, "--tokenizer", "gpt2")
    assert re.search("connect to the internet once, or set TIKTOKEN_CACHE_DIR.*sha1 of their URL", line)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "--compile needs a C++ compiler" in refused(train.main, *into, "--compile")
    assert not list(out.glob("*.pt")) and {p: p.read_bytes() for p in before} == before


def test_moments_and_settings_of_a_checkpoint_are_checked_before_they_are_used(trained, tmp_path):
    copy_run(trained, tmp_path)
    good = saved(tmp_path)
    resume = (train.main, "--init", "resume", "--out", tmp_path, "--steps", 40)
    for name, wrong in {
        "arguments": (None, 3, ["--steps=30", 5], ["--lr=nan"], ["--lr"], ["stray"], ["--da=x"], ["--help"]),
        "step": (-1, "x", None, math.inf, math.nan, torch.zeros(3)),
        "tokenizer": (3, ["bytes"]),
        "config": (None, good["config"] | {"vocab_size": [1]}, good["config"] | {"n_layer": 10**9}),
        "optimizer": (None, {}),
        "model": ({},),
    }.items():
        for value in wrong:
            torch.save(good | {name: value}, tmp_path / "ckpt.pt")
            refused(*resume)
    for name in ("exp_avg", "exp_avg_sq"):  # fused AdamW would write past the end of a smaller one
        moments = good["optimizer"]["state"][1]
        right = moments[name]
        for wrong in (
            torch.zeros(5, 7), right[:1], right.flatten(), right.t().contiguous().t(), right.double(), right.half(),
            right.to_sparse(), right.to("meta"), right.tolist(), None,
        ):  # fmt: skip
            moments[name] = wrong
            torch.save(good, tmp_path / "ckpt.pt")
            line = refused(*resume)
            assert "cannot be resumed" in line and f"use it with --init {tmp_path}/ckpt.pt" in line
        moments[name] = right
    elsewhere = [f"--out={tmp_path}/elsewhere", f"--data={tmp_path}/elsewhere", "--init=scratch", "--device=toaster"]
    torch.save(good | {"arguments": good["arguments"] + elsewhere}, tmp_path / "ckpt.pt")
    run(*resume)  # no path is taken from it
    assert saved(tmp_path)["step"] == 40 and not (tmp_path / "elsewhere").exists()


def test_changed_text_is_noticed(trained, tmp_path, capsys):
    text, out = write_text(tmp_path / "text.txt", seed=1), tmp_path / "out"
    run_train(out, "--data", text, "--steps", 10)
    write_text(text, seed=2)
    run_train(out, "--init", "resume", "--steps", 11)  # it has its tokens
    assert "warning" not in capsys.readouterr().out
    for init, data, warns in (trained, trained, False), (trained, text, True), (tmp_path / "nanogpt.pt", text, False):
        torch.save({k: v for k, v in saved(trained).items() if k != "text"}, tmp_path / "nanogpt.pt")
        run_train(tmp_path / f"from {data.name}", "--init", init, "--data", data, "--tokenizer", "bytes", "--steps", 1)
        assert ("was trained on another text" in capsys.readouterr().out) == warns
    for name in ("train.bin", "val.bin"):
        shutil.copy(trained / name, out)
    for command in (partial(run_convert, out), partial(run_train, out, "--init", "resume", "--steps", 20)):
        command()
        assert "warning: the model was trained on another text" in capsys.readouterr().out


def test_an_earlier_model_keeps_another_name(trained, tmp_path, capsys, monkeypatch):
    first, data = copy_run(trained, tmp_path), ["--data", trained / "text.txt"]
    of_first = [shutil.copy(trained / name, tmp_path) for name in ("d2dmoe.pt", "cost_vs_loss.csv")]
    run_train(tmp_path, *data, "--steps", 20, "--seed", 1)  # it saves twice
    assert f"stays as {tmp_path}/ckpt-previous.pt" in capsys.readouterr().out
    for path in map(Path, of_first):  # not of the new model
        kept = path.with_stem(f"{path.stem}-previous")
        assert not path.exists() and kept.read_bytes() == (trained / path.name).read_bytes()
        kept.unlink()
    second = (tmp_path / "ckpt.pt").read_bytes()
    run_train(tmp_path, *data, "--steps", 10, "--seed", 2)
    third = (tmp_path / "ckpt.pt").read_bytes()
    stop_at(monkeypatch, 5)
    assert run_train(tmp_path, "--init", "resume", "--steps", 20) == 143  # a finished model goes on: it is kept
    assert saved(tmp_path)["step"] == 15
    run_train(tmp_path, "--init", "resume", "--steps", 20)  # a stopped one goes on: there is nothing to keep
    run_train(tmp_path, *data, "--init", tmp_path / "ckpt-previous.pt", "--steps", 10)  # back to the first one
    (tmp_path / "ckpt.pt").unlink()
    (tmp_path / "ckpt.pt").symlink_to("ckpt-previous.pt")  # what it leads to is not written over
    run_train(tmp_path, *data, "--steps", 10)
    names = {*(f"ckpt-previous{i}.pt" for i in ("", "-2", "-3", "-4", "-5")), "ckpt.pt"}
    assert {p.name for p in tmp_path.glob("*.pt")} == names and not list(tmp_path.glob("*.tmp"))
    for i, content in (("", first), ("-2", second), ("-3", third)):
        assert (tmp_path / f"ckpt-previous{i}.pt").read_bytes() == content


def test_a_run_never_changes_the_tokens_of_a_folder(trained, tmp_path):
    copy_run(trained, tmp_path / "out")
    out, before = tmp_path / "out", {p.name: p.read_bytes() for p in trained.glob("*.*")}
    text, bins = write_text(tmp_path / "other.txt", seed=5), write_bins(tmp_path / "bins")
    for other, more in itertools.product((text, bins), ([], ["--init", trained], ["--init", "resume"])):
        line = refused(run_train, out, "--data", other, "--tokenizer", "bytes", "--steps", 40, *more)
        assert f"{out} has tokens of another text or tokenizer: choose another --out, or delete its" in line
    (out / "train.bin").unlink()
    refused(run_train, out, "--data", bins, "--tokenizer", "bytes")
    assert not (out / "train.bin").exists()  # val.bin is another's
    (tmp_path / "short.txt").write_text("short")
    for wrong in (["--data", tmp_path / "short.txt"], ["--data", text, "--n_head", 3], ["--data", bins, "--n_head", 3]):
        refused(run_train, tmp_path / "new", *wrong)
    run_train(out, "--data", trained / "text.txt", "--steps", 10)  # the same once more
    run_train(tmp_path / "new", "--data", text, "--steps", 1)  # what was refused left none
    for name in ("train.bin", "val.bin"):
        assert (out / name).read_bytes() == before[name]
    assert not list(tmp_path.glob("*/.new"))


def stop_at(monkeypatch, step):
    """From now on a training gets SIGTERM in the middle of its step of that number, counted from 1."""
    plain, calls = train.training_loss, itertools.count(1)
    stop = lambda: next(calls) == step and signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(train, "training_loss", lambda *arguments: stop() or plain(*arguments))


def test_a_stop_or_a_loss_that_is_not_finite_spares_the_checkpoint(trained, tmp_path, monkeypatch, capsys):
    before, new = copy_run(trained, tmp_path), tmp_path / "new"
    arguments = ["--data", trained / "text.txt", "--steps", 1000, "--eval_every", 1000]
    for out, said in ((tmp_path, "/ckpt.pt stays the earlier run's"), (new, "stopped at step 5 and saved")):
        stop_at(monkeypatch, 5)
        assert run_train(out, *arguments) == 143 and said in capsys.readouterr().out
    assert (tmp_path / "ckpt.pt").read_bytes() == before and saved(new)["step"] == 5

    resume = (train.main, "--init", "resume", "--out", tmp_path, "--warmup", 0, "--steps", 40)
    for every, step in ((100, 32), (1, 31)):  # the second: at the evaluation after the step that broke the weights
        line = refused(*resume, "--lr", 1e30, "--eval_every", every)
        assert re.search(rf"step {step}: .*loss.* not finite.*try a lower --lr", line)
    stop_at(monkeypatch, 1)  # a stop in the step that breaks the weights does not save them
    assert "not finite" in refused(*resume, "--lr", 1e38)
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    assert "routers: the loss is not finite at step" in refused(run_convert, tmp_path, "--lr", "1e20")
    assert not (tmp_path / "d2dmoe.pt").exists()
    poisoned = saved(tmp_path)
    poisoned["model"]["transformer.ln_f.bias"][:] = 3e38  # finite weights, infinite logits
    torch.save(poisoned, tmp_path / "ckpt.pt")
    assert "loss on held-out text is" in refused(run_convert, tmp_path)


def test_after_a_run_this_process_is_as_before(trained, tmp_path):
    """In a notebook Ctrl-C works again, and a mistake's traceback does not keep a folder locked."""
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    arguments = ["--data", trained / "text.txt", "--steps", 1]
    with pytest.raises(ValueError, match="multiple of n_head") as kept:  # noqa: F841
        run_train(tmp_path, *arguments, "--n_embd", 15)
    run_train(tmp_path, *arguments)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with train.noted_signals():
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signal.signal(signal.SIGHUP, hangup)
    thread = threading.Thread(target=run_train, args=(tmp_path / "thread", *arguments))
    thread.start()
    thread.join()
    assert saved(tmp_path / "thread")["step"] == 1


def read_until(process, pattern):
    for line in process.stdout:
        if re.match(pattern, line):
            return
    raise AssertionError(process.stderr.read())


def test_signals_save_first_and_say_how_to_resume(trained, tmp_path):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    command = ("train.py", *TINY, "--data", trained / "text.txt", "--steps", 10**6, "--out")
    processes = [start(*command, tmp_path / number.name) for number in numbers]
    for number, process in zip(numbers, processes, strict=True):
        read_until(process, " +20 ")
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number and err == ""
        said = r"stopped at step (\d+) and saved; go on with: python train.py --init resume --out"
        step = int(re.search(said, out)[1])
        assert step >= 20 and saved(tmp_path / number.name)["step"] == step


def test_a_second_ctrl_c_cuts_a_long_step_short(trained, tmp_path, monkeypatch):
    before, clock = copy_run(trained, tmp_path), iter((0, 0.9, 0.9, 1.1))  # within a second it is torchrun's copy
    monkeypatch.setattr(train.time, "monotonic", clock.__next__)
    monkeypatch.setattr(train, "training_loss", lambda *_: [signal.raise_signal(signal.SIGINT) for _ in range(9)])
    with pytest.raises(KeyboardInterrupt):
        run_train(tmp_path, "--init", "resume", "--steps", 40)
    assert next(clock, None) is None and (tmp_path / "ckpt.pt").read_bytes() == before


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in Linux's /proc")
def test_a_signal_to_torchrun_and_all_its_processes_saves_too(trained, tmp_path):
    options = ["--out", tmp_path, "--steps", 10**6, "--grad_accum", 50]
    agent = torchrun("train.py", *TINY, "--data", trained / "text.txt", *options)
    read_until(agent, " +10 ")
    workers = [int(p) for p in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]
    assert len(workers) >= 2
    for pid in (agent.pid, *workers):  # the agent passes it on, so that workers get it twice
        os.kill(pid, signal.SIGTERM)
    out, _ = agent.communicate(timeout=60)
    step = int(re.search(r"stopped at step (\d+) and saved", out)[1])
    assert step >= 10 and saved(tmp_path)["step"] == step


def test_of_two_runs_into_one_folder_the_second_is_refused(trained, tmp_path):
    arguments = ["--data", trained / "text.txt"]
    process = start("train.py", *TINY, *arguments, "--out", tmp_path, "--steps", 10**6)
    read_until(process, " +10 ")
    for main, *words in (run_train, *arguments), (run_train, "--init", "resume"), (run_convert,):
        assert "another run is writing into" in refused(main, tmp_path, *words)
    process.kill()  # and a run that was killed locks nobody out
    process.communicate()
    run_train(tmp_path, "--init", "resume", "--steps", saved(tmp_path)["step"] + 1)


def test_a_full_disk_leaves_the_old_checkpoint_and_says_why(trained, tmp_path):
    before = copy_run(trained, tmp_path)
    options = [*TINY, "--data", trained / "text.txt", "--out", tmp_path, "--steps", 10]
    for size, file in ((60_000, "ckpt.pt"), (1000, "(train|val).bin")):  # more than tokens need, and less
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        process = start("train.py", *options, preexec_fn=limit)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 1
        assert re.fullmatch(f"error: cannot write .*{file}: File too large; an older file is untouched\n", err)
    assert (tmp_path / "ckpt.pt").read_bytes() == before and not list(tmp_path.glob("*.tmp"))
    run_train(tmp_path, "--init", "resume", "--steps", 31)  # the earlier run has its tokens still
    assert (tmp_path / "ckpt-previous.pt").read_bytes() == before


@pytest.mark.parametrize("name", ["train", "convert"])
def test_killed_at_random_there_is_no_checkpoint_or_a_whole_one(trained, tmp_path, name):
    """Children are forked from a process that has imported everything, so that a kill costs a fraction of a second."""
    copy_run(trained, tmp_path)
    arguments = [*TINY, "--data", str(trained / "text.txt"), *"--steps 1000000 --eval_every 1 --eval_windows 1".split()]
    if name == "convert":
        arguments = [*CONVERT, "--ckpt", str(tmp_path), *"--taus 1 --steps 2".split()]
    code = f"""
import os, random, signal, sys, time
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
            {name}.main([*{arguments!r}, "--out", str(folder), *resume])
    time.sleep(0.1 + draw.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for path in folder.glob("*.pt"):
        train.load_checkpoint(path)
    step = train.load_checkpoint(folder / "ckpt.pt")[1]["step"] if (folder / "ckpt.pt").exists() else 0
    print(len(list(folder.glob("*.pt"))), step, flush=True)
"""
    found = [tuple(map(int, line.split())) for line in output_of(start("-c", code)).splitlines()]
    assert len(found) == 8 * LONG and sum(n > 0 for n, _ in found) > 4 * LONG and found == sorted(found)
    assert (found[-1][1] > found[0][1]) == (name == "train")  # each training resumed from the one before


def test_standard_output_is_no_reason_to_lose_a_run(trained, tmp_path):
    run = f"{sys.executable} {HERE}/train.py {' '.join(TINY)} --data {trained}/text.txt --steps 20 --out {tmp_path}"
    speak = f"{sys.executable} {HERE}/sample.py --ckpt {trained} --device cpu --max_new_tokens 5000"
    commands = {
        f"{run}/head": "| head -1",
        f"{run}/full": ">/dev/full",
        f"{run}/closed": ">&-",
        f"PYTHONIOENCODING=cp1252 {run}/Książka": f">{tmp_path}/said",
        speak: "| head -c 5",
    }
    shells = [f"{{ {command}; echo status $? >&2; }} {redirection}" for command, redirection in commands.items()]
    options = dict(stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    processes = [subprocess.Popen(shell, shell=True, text=True, **options) for shell in shells]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert errors == ["status 0\n"] * 4 + ["status 141\n"]
    assert re.search(r"\nwrote .*/Ksi\\u0105\\u017cka/ckpt.pt; now: ", (tmp_path / "said").read_text())
    assert [saved(tmp_path / name)["step"] for name in ("head", "full", "closed", "Książka")] == [20] * 4


# ---------------------------------------------------------------------------------------------------------------------
# README.md


def test_the_readmes_python_runs_in_a_notebook(trained, capsys):
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    for i, snippet in enumerate(snippets):
        if i < 3:  # the last three go on from the one before
            names = {}
        exec(snippet.replace('"out"', repr(str(trained))), names)
    out = capsys.readouterr().out
    share, error = re.search(r"(\d+)% of the experts, relative error ([\d.]+)", out).groups()
    assert len(snippets) == 6 and "torch.Size([1, 9, 257])" in out and int(share) < 30 and float(error) < 0.1
    assert -1 <= float(re.search(r"correlation (\S+)", out)[1]) <= 1
    assert re.search(r"run: \d+% of the experts below 1% of the largest norm, \d+% of the others", out)
    assert out.count("of the experts\n") == 3 and re.search(r"^0 [\d.]+\n1 [\d.]+$", out, re.MULTILINE)
    norms = torch.tensor([[5.0, 1.0, 3.0, 1.0], [1.0, 1.0, 1.0, 97.0]])
    assert names["top_mass"](norms, 0.8).tolist() == [[True, False, True, False], [False, False, False, True]]


def test_the_readmes_commands_have_options_that_exist_and_its_pictures_are_there():
    text = (HERE / "README.md").read_text(encoding="utf-8").replace(" && ", "\n")
    commands = re.findall(r"^(?:torchrun \S+ |python )(train|convert|sample)\.py([^#\n]*)", text, flags=re.MULTILINE)
    assert len(commands) >= 12
    for name, rest in commands:
        if "resume" not in rest:
            {"train": train, "convert": convert, "sample": sample}[name].parse_arguments(shlex.split(rest))
    pictures = re.findall(r"^!\[.*\]\((.*)\)$", text, flags=re.MULTILINE)
    assert len(pictures) == 3 and all((HERE / picture).is_file() for picture in pictures)
