"""The gate's kernels without a GPU: the operator, Triton's kernels in its interpreter, the CUDA source run on the CPU
(see `csrc/host.h`), and the compilation of both.

The bar: a kernel's error against float64 is at most twice that of PyTorch's layers in the same dtype.
"""

from __future__ import annotations

import copy
import ctypes
import itertools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import deterministic

from msa2net.benchmarks import kernels
from msa2net.core.checkpoint import model_by_rule, rule_value
from msa2net.core.config import VARIANTS
from msa2net.core.kernels import build, cuda, operator, reference
from msa2net.core.kernels.build import BINDING, FOLDER, LIBRARY, SOURCES, binding_flags, digest
from msa2net.core.kernels.operator import KERNELS, masag, select
from msa2net.core.kernels.reference import GateWeights, collapse
from msa2net.core.masag import MASAG
from msa2net.errors import KernelError

GOLDEN = Path(__file__).parent / "golden"
CASES = Path(__file__).parent / "masag_case.cpp"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FLOOR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # an ulp or two of the results, about 1 to 4
# (B, C, H, W)
REAL = {"384x14x14": (1, 384, 14, 14), "192x28x28": (1, 192, 28, 28), "96x56x56": (1, 96, 56, 56)}
SHAPES = REAL | {
    "one": (1, 1, 1, 1),
    "one_pixel": (3, 96, 1, 1),
    "one_channel": (2, 1, 5, 3),
    "primes": (3, 13, 11, 7),
    "no_block": (3, 50, 9, 17),
    "golden": (2, 48, 17, 23),
    "batch_8": (8, 24, 6, 5),
}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))


def gate_of(channels: int, seed: int = 0) -> MASAG:
    """A gate in float64 with BatchNorms that do something, in evaluation mode."""
    gate = MASAG(channels).double().eval()
    state = {
        key: torch.from_numpy(rule_value(f"{seed}.{key}", tuple(value.shape)))
        for key, value in gate.state_dict().items()
    }
    gate.load_state_dict(state)
    return gate


def problem(shape: tuple[int, ...], dtype: torch.dtype, norm: bool = False) -> list[Tensor]:
    """x, g, the weights and, with `norm`, the LayerNorm's: rounded to the dtype."""
    rng = np.random.default_rng(sum(shape))
    maps = [torch.from_numpy(rng.standard_normal(shape)) for _ in range(2)]
    norms = [torch.from_numpy(rng.standard_normal(shape[1])) for _ in range(2)] if norm else []
    with torch.no_grad():
        weights = collapse(gate_of(shape[1]))
    return [each.to(dtype) for each in (*maps, *weights, *norms)]


def gated(arguments: list[Tensor], kernel: str, tf32: bool = False) -> Tensor:
    norms = arguments[12:] or [None, None]
    return masag(*arguments[:12], *norms, kernel=kernel, tf32=tf32)


def double(arguments: list[Tensor]) -> list[Tensor]:
    return [each.detach().double() for each in arguments]


def error(found: Tensor, expected: Tensor) -> float:
    """NaN if anything in `found` is."""
    return float((found.double() - expected).abs().max())


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New memory holds NaN, so that what a kernel leaves unwritten is seen."""
    before = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    deterministic.fill_uninitialized_memory = before  # type: ignore[attr-defined]


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The Triton kernels, interpreted, see `conftest`. Triton 3.9's interpreter multiplies bits of bf16; not here."""
    language = pytest.importorskip("triton.language")
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from msa2net.core.kernels import triton

    create_dot = InterpreterBuilder.create_dot

    def wide(handle: Any) -> Any:
        if str(handle.dtype.scalar) != "bf16":
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), language.float32)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, wide(a), wide(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    return triton


@pytest.fixture(scope="session")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the CUDA library built for the CPU, the binding included."""
    output = tmp_path_factory.mktemp("host")
    flags = binding_flags()
    if shutil.which("g++") is None or flags is None:
        pytest.skip("needs g++ and PyTorch 2.13 or newer")
    on_host("-shared", "-O2", "-march=native", f'-DMASAG_SOURCES="{digest()}"', "-o", output / LIBRARY)
    binding = [
        "-DMASAG_ON_HOST",
        *flags[0],
        "-x",
        "c++",
        SOURCES / "binding.cpp",
        "-x",
        "none",
        output / LIBRARY,
        *flags[1],
    ]
    compile_cpp("-shared", "-O2", *binding, f"-Wl,-rpath,{output}", "-o", output / BINDING)
    return output


def compile_cpp(*arguments: str | Path) -> None:
    command = ["g++", "-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def on_host(*arguments: str | Path, source: Path = SOURCES / "masag.cu", macro: str = "-DHOST") -> None:
    """Compiles the CUDA source for the CPU; its scheduler apart, without sanitizers."""
    with tempfile.TemporaryDirectory() as scratch:
        scheduler = Path(scratch) / "host.o"
        compile_cpp("-O2", macro, "-c", SOURCES / "host.cpp", "-o", scheduler)
        compile_cpp(f"-I{SOURCES}", "-x", "c++", source, "-x", "none", scheduler, *arguments)


@pytest.fixture
def host(host_library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The library for the CPU, in use; as `host_device` it has a GPU of 16 multiprocessors."""
    monkeypatch.setenv(FOLDER, str(host_library))
    loaded = cuda.library(host_library)
    device(loaded)
    yield loaded
    device(loaded)


def device(
    loaded: Any,
    *,
    capability: int = 87,
    processors: int = 16,
    foreign: int | None = None,
    moved: int | None = None,
    launch_error: int = 0,
    copies_at_once: bool = False,
) -> None:
    pointers = ctypes.c_void_p(foreign), ctypes.c_void_p(moved)
    loaded.host_device(capability, processors, *pointers, launch_error, copies_at_once)
    cuda.unsupported.cache_clear()  # it is not the device that it was


@pytest.fixture(params=["triton", "cuda"])
def fused(request: pytest.FixtureRequest) -> str:
    """The name of a fused kernel, which then runs on the CPU."""
    request.getfixturevalue({"triton": "interpreter", "cuda": "host"}[request.param])
    return request.param


# The reference ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 6, 48])
def test_the_collapsed_gate_is_the_papers(channels: int) -> None:
    gate = gate_of(channels)
    x, g = (each.double() for each in problem((2, channels, 7, 5), torch.float64)[:2])
    with torch.no_grad():
        assert error(masag(x, g, *collapse(gate)), gate(x, g)) <= 1e-13


def test_a_gate_whose_norms_were_folded_before_collapses_to_the_same() -> None:
    gate = gate_of(6)
    folded = copy.deepcopy(gate)
    pairs = [(folded.multi.local.dconv, 0, 1), (folded.multi.local.dconv, 3, 4), (folded.multi.local.proj, 0, 1)]
    for owner, layer, norm in [*pairs, (folded.multi.global_.proj, 0, 1)]:
        owner[layer] = nn.utils.fuse_conv_bn_eval(owner[layer], owner[norm])
        owner[norm] = nn.Identity()
    for expected, found in zip(collapse(gate), collapse(folded), strict=True):
        assert torch.allclose(expected, found, rtol=1e-12, atol=1e-14)


def test_gradients_of_the_formula_are_those_of_finite_differences() -> None:
    arguments = [each.requires_grad_() for each in problem((2, 4, 4, 3), torch.float64, norm=True)]
    assert torch.autograd.gradcheck(lambda *given: gated(list(given), "reference"), arguments[:12])
    assert torch.autograd.gradcheck(lambda *given: gated(list(given), "reference"), arguments)


def test_equal_maxima_share_the_gradient_as_autograd_shares_it() -> None:
    gate = gate_of(4)
    x = problem((1, 4, 3, 3), torch.float64)[0]
    maps = [torch.ones_like(x).requires_grad_() for _ in range(2)]
    for found, g in ((gate(x, maps[0]), maps[0]), (masag(x, maps[1], *collapse(gate)), maps[1])):
        found.square().sum().backward()
        assert g.grad is not None
    assert torch.allclose(maps[0].grad, maps[1].grad, rtol=1e-12)  # type: ignore[arg-type]


def test_a_fine_tune_with_frozen_norms_reaches_the_gates_own_parameters() -> None:
    by_steps, by_operator = gate_of(6), gate_of(6)
    by_operator.kernel = "reference"
    x, g = problem((2, 6, 5, 5), torch.float64)[:2]
    for gate in (by_steps, by_operator):
        gate(x, g).square().mean().backward()
    for (name, expected), found in zip(by_steps.named_parameters(), by_operator.parameters(), strict=True):
        assert expected.grad is not None
        assert found.grad is not None
        assert torch.allclose(expected.grad, found.grad, rtol=1e-10, atol=1e-15), name


# The operator -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True], ids=["gate", "norm"])
def test_the_operator_passes_opcheck(norm: bool) -> None:
    arguments = [each.requires_grad_() for each in problem((2, 5, 4, 3), torch.float32, norm)]
    norms = arguments[12:] or [None, None]
    torch.library.opcheck(masag, (*arguments[:12], *norms))


class Tail(nn.Module):
    """The gate and what follows it."""

    def __init__(self, kernel: str) -> None:
        super().__init__()
        self.gate = gate_of(6).float()
        self.gate.kernel = kernel

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        return torch.relu(self.gate(x, g))


@pytest.mark.parametrize("kernel", ["reference", "triton", "cuda"])
def test_export_and_compile_see_one_node_for_any_batch_and_size(kernel: str, request: pytest.FixtureRequest) -> None:
    if kernel != "reference":
        request.getfixturevalue({"triton": "interpreter", "cuda": "host"}[kernel])
    model = Tail(kernel).eval()
    x, g = problem((2, 6, 5, 4), torch.float32)[:2]
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    program = torch.export.export(model, (x, g), dynamic_shapes=(sizes, sizes))
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    (gate,) = (node for node in nodes if node.target == torch.ops.msa2net.masag.default)
    assert kernel in gate.args
    assert not [node for node in nodes if "conv" in str(node.target)]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 6, 5, 4), (3, 6, 9, 8)):
        x, g = problem(shape, torch.float32)[:2]
        expected = model(x, g)
        assert torch.equal(program.module()(x, g), expected)
        assert torch.equal(compiled(x, g), expected)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch 2.13's own
def test_onnx_gets_standard_operators_for_it(tmp_path: Path) -> None:
    import onnxruntime

    model = Tail("reference").eval()
    x, g = problem((2, 6, 5, 4), torch.float32)[:2]
    program = torch.onnx.export(model, (x, g), dynamo=True, verbose=False)
    assert program is not None
    assert {node.domain for node in program.model.graph} == {""}
    program.save(tmp_path / "gate.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "gate.onnx", providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    (found,) = session.run(None, dict(zip(names, (x.numpy(), g.numpy()), strict=True)))
    assert np.abs(found - model(x, g).detach().numpy()).max() <= 1e-6


def test_live_batch_statistics_take_the_papers_steps() -> None:
    gate = gate_of(4)
    gate.kernel = "reference"
    x, g = problem((2, 4, 3, 3), torch.float64)[:2]
    assert gate.kernel_for(x) == "reference"
    gate.train()
    assert gate.kernel_for(x) is None
    before = gate.bn_2.running_mean.clone()  # type: ignore[union-attr]
    gate(x, g)
    assert not torch.equal(before, gate.bn_2.running_mean)  # type: ignore[arg-type]


def test_auto_takes_the_papers_steps_on_a_cpu() -> None:
    gate = gate_of(4)
    x = problem((1, 4, 3, 3), torch.float64)[0]
    assert gate.kernel_for(x) is None
    assert select("auto", x) == "reference"


@pytest.mark.parametrize("form", ["lka", "dual_attention"])
def test_the_network_with_the_operator_inside_gives_the_golden_logits(form: str, monkeypatch: Any) -> None:
    name = "msa2net_golden.npz" if form == "lka" else "msa2net_dual_golden.npz"
    model = model_by_rule(replace(VARIANTS["small"], deep_decoder=form))
    calls = []
    forward = reference.forward
    monkeypatch.setattr(reference, "forward", lambda *given: calls.append(given[0].shape) or forward(*given))
    for module in model.modules():
        if isinstance(module, MASAG):
            module.kernel = "reference"
    with np.load(GOLDEN / name) as golden, torch.inference_mode():
        rng = np.random.Generator(np.random.PCG64(int(golden["rgb/seed"])))
        x = rng.standard_normal(tuple(golden["rgb/input_shape"])).astype(np.float32)
        logits = model(torch.from_numpy(x)).numpy()
        expected = golden["rgb/logits"]
    assert len(calls) == (2 if form == "lka" else 3)
    assert np.abs(logits - expected).max() <= 2e-5


# Bad input ----------------------------------------------------------------------------------------------------------


def wrong(change: Callable[[list[Any]], Any]) -> list[Any]:
    arguments: list[Any] = problem((1, 4, 3, 3), torch.float32)
    change(arguments)
    return arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.__setitem__(0, a[0][0]), r"x: got the shape \(4, 3, 3\), expected \(B, C, H, W\), none of them 0"),
        (lambda a: a.__setitem__(0, a[0][:0]), r"x: got the shape \(0, 4, 3, 3\)"),
        (lambda a: a.__setitem__(0, a[0].int()), r"x: got torch.int32, expected a floating-point map"),
        (lambda a: a.__setitem__(1, a[1][..., :2]), r"g: got the shape \(1, 4, 3, 2\), expected \(1, 4, 3, 3\)"),
        (lambda a: a.__setitem__(1, a[1].half()), r"g: got torch.float16 on cpu, expected torch.float32 on cpu"),
        (lambda a: a.__setitem__(4, a[4][:3]), r"dilated: got the shape \(3, 4, 4\), expected \(9, 4, 4\)"),
        (lambda a: a.__setitem__(6, a[6].double()), r"u: got torch.float64 on cpu, expected torch.float32 on cpu"),
        (lambda a: a.__setitem__(8, a[8].T), r"projection: got the strides \(1, 4\), expected a contiguous tensor"),
        (lambda a: a.append(a[6]), r"norm_weight, norm_bias: got one of them, expected both or neither"),
        (lambda a: a.extend([a[6], a[6][:3]]), r"norm_bias: got the shape \(3,\), expected \(4,\)"),
    ],
    ids=["axes", "zero", "integers", "size", "dtype", "weights", "precision", "strides", "half_norm", "norm"],
)
def test_a_bad_argument_is_refused_by_its_name(change: Callable[[list[Any]], Any], message: str) -> None:
    with pytest.raises(KernelError, match=f"^{message}"):
        masag(*wrong(change))


def test_a_kernel_that_cannot_run_is_refused_and_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = problem((1, 4, 3, 3), torch.float32)
    with pytest.raises(KernelError, match=r"kernel: got 'fast', expected one of auto, reference, triton"):
        gated(arguments, "fast")
    for kernel in KERNELS[2:]:
        with pytest.raises(KernelError, match=f"^kernel '{kernel}': "):
            gated(arguments, kernel)
    with pytest.raises(KernelError, match=r"x is torch.float64, it computes in float32, float16 and bfloat16"):
        gated([each.double() for each in arguments], "triton")


def test_auto_takes_the_papers_steps_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 7))
    gate, x = gate_of(4), OnGpu()
    assert gate.kernel_for(x) == "triton"  # type: ignore[arg-type]
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    assert gate.kernel_for(x) is None  # type: ignore[arg-type]


class OnGpu:
    """What `select` asks of a map."""

    dtype, device, is_cuda, shape = torch.float16, torch.device("cuda", 0), True, (1, 96, 56, 56)


@pytest.mark.parametrize(
    ("capability", "chosen", "said"), [((8, 7), "triton", ""), ((7, 5), "reference", "compute capability 7.5")]
)
def test_auto_says_once_what_it_took_and_why_not_another(
    capability: tuple[int, int], chosen: str, said: str, monkeypatch: Any, caplog: Any
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    operator._say.cache_clear()
    with caplog.at_level("INFO", operator.__name__):
        for _ in range(2):
            assert select("auto", OnGpu()) == chosen  # type: ignore[arg-type]
    assert said in caplog.text
    assert caplog.text.count(f"kernel 'auto' took {chosen}") == 1


# Fused, on the CPU --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("shape", "norm", "dtype"),
    # The real sizes take seconds each: one of them with the LayerNorm, and but for fp16 in the slow part.
    [
        pytest.param(shape, norm, dtype, id=f"{name}-{'norm' if norm else 'gate'}-{precision}", marks=marks)
        for name, shape in SHAPES.items()
        for norm in (False, True)
        for precision, dtype in DTYPES.items()
        for marks in [[pytest.mark.slow] if name in REAL and precision != "fp16" else []]
        if shape[1] < 96 or norm == (shape[1] == 192)
    ],
)
def test_fused_kernels_err_at_most_twice_as_much_as_pytorch(
    shape: tuple[int, ...], norm: bool, dtype: torch.dtype, fused: str
) -> None:
    arguments = problem(shape, dtype, norm)
    expected = gated(double(arguments), "reference")
    found, eager = gated(arguments, fused), gated(arguments, "reference")
    assert found.stride() == eager.stride()
    assert error(found, expected) <= 2 * error(eager, expected) + FLOOR[dtype], error(eager, expected)


@pytest.mark.usefixtures("poisoned")
def test_every_tile_of_triton_computes_the_same(interpreter: Any) -> None:
    triton = interpreter
    x, g, *rest = problem((2, 40, 4, 5), torch.float32, norm=True)
    weights, norm = GateWeights(*rest[:10]), (rest[10], rest[11])
    expected = gated(double([x, g, *weights]), "reference")
    normal = gated(double([x, g, *rest]), "reference")
    gate = {each[:2]: each for each in sum(triton.GATE.values(), ())}.values()  # warps and stages are nothing to it
    lists = (triton.CONTEXT, triton.DILATED, tuple(gate))
    for i, configs in enumerate(lists):
        for config in configs:
            chosen = tuple(config if i == j else each[0] for j, each in enumerate(lists))
            assert error(triton.forward(x, g, weights, configs=chosen), expected) <= 5e-6
            if i == 2:
                assert error(triton.forward(x, g, weights, norm, configs=chosen), normal) <= 5e-6


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(2, 40, 9, 7), (1, 96, 16, 11)], ids=str)
def test_every_tile_of_cuda_computes_the_same(host: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    arguments = problem(shape, dtype, norm=True)
    expected, eager = gated(double(arguments), "reference"), gated(arguments, "reference")
    tiles, channels = [(16, 32), (32, 48), (64, 96), (128, 96)], shape[1]
    pixels = shape[0] * shape[2] * shape[3]
    # As many multiprocessors as each tile, of `Tile` in masag.cu and of 16, 32 and 64 pixels, fills.
    fills = {-(-pixels // p) * -(-channels // c) for p, c in tiles} | {-(-pixels // p) for p in (16, 32, 64)}
    for processors in (1, *sorted(fills), 10**6):
        device(host, processors=processors, copies_at_once=processors % 2 == 0)
        assert error(gated(arguments, "cuda"), expected) <= 2 * error(eager, expected) + FLOOR[dtype]


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
def test_maps_of_any_strides_give_the_same_bits(layout: str, fused: str) -> None:
    x, g, *weights = problem((2, 20, 6, 7), torch.float32)
    x = x[:1].expand(2, -1, -1, -1) if layout == "expanded" else x
    expected = gated([x.contiguous(), g, *weights], fused)
    if layout == "channels_last":
        x, g = (each.contiguous(memory_format=torch.channels_last) for each in (x, g))
    elif layout == "sliced":
        x, g = (torch.nn.functional.pad(each, (1, 2, 3, 0))[..., 3:, 1:-2] for each in (x, g))
    assert torch.equal(gated([x, g, *weights], fused), expected)


@pytest.mark.parametrize("which", [0, 1], ids=["x", "g"])
def test_nan_in_a_map_comes_out_where_pytorch_has_it(which: int, fused: str) -> None:
    arguments = problem((1, 20, 9, 9), torch.float32)
    arguments[which][0, 3, 4, 5] = torch.nan
    expected, found = gated(arguments, "reference"), gated(arguments, fused)
    assert expected.isnan().any()
    assert torch.equal(found.isnan(), expected.isnan())


@every_dtype
def test_gradients_through_fused_kernels_err_at_most_twice_as_much_as_pytorch(dtype: torch.dtype, fused: str) -> None:
    arguments = problem((2, 20, 9, 7), dtype)
    grads = []
    for given, kernel in ((double(arguments), "reference"), (arguments, fused)):
        leaves = [each.detach().clone().requires_grad_() for each in given]
        grads.append(torch.autograd.grad(gated(leaves, kernel).double().square().mean(), leaves))
    leaves = [each.detach().clone().requires_grad_() for each in arguments]
    eager = torch.autograd.grad(
        reference.forward(leaves[0], leaves[1], GateWeights(*leaves[2:])).double().square().mean(), leaves
    )
    for expected, found, other in zip(*grads, eager, strict=True):
        floor = FLOOR[dtype] * float(expected.abs().max())
        assert error(found, expected) <= 2 * error(other, expected) + floor


@pytest.mark.usefixtures("host")
def test_tf32_is_used_only_when_asked_for() -> None:
    arguments = problem((1, 48, 9, 9), torch.float32)
    expected = gated(double(arguments), "reference")
    assert error(gated(arguments, "cuda"), expected) <= 2e-6
    assert 2e-5 <= error(gated(arguments, "cuda", tf32=True), expected) <= 2e-3


# The CUDA library ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("norm", [False, True], ids=["gate", "norm"])
def test_the_c_api_gives_the_operators_bits(norm: bool) -> None:
    x, g, *rest = problem((2, 24, 6, 5), torch.float16, norm)
    found = cuda.forward_c(x, g, GateWeights(*rest[:10]), tuple(rest[10:]) or None)
    assert torch.equal(found, gated([x, g, *rest], "cuda"))


@pytest.mark.usefixtures("host")
def test_the_cuda_operator_passes_opcheck() -> None:
    arguments = [each.requires_grad_() for each in problem((2, 5, 4, 3), torch.float32, norm=True)]
    torch.library.opcheck(masag, (*arguments, "cuda"))


def test_the_header_is_plain_c(tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    source = tmp_path / "program.c"
    source.write_text('#include "masag.h"\nint main(void) { return masag_last_error() == 0; }\n')
    strict = ["-std=c11", "-pedantic", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["gcc", *strict, f"-I{SOURCES}", "-c", source, "-o", tmp_path / "program.o"], check=True)
    numbers = re.findall(r"MASAG_MOST_(\w+) = ([^,}]+)", (SOURCES / "masag.h").read_text("utf-8"))
    assert {name: eval(value) for name, value in numbers} == {
        "CHANNELS": reference.MOST_CHANNELS,
        "PIXELS": cuda.MOST_PIXELS,
    }


def call(loaded: Any, **changes: Any) -> tuple[int, str]:
    """Status and message of `masag_forward` on a good call but for `changes`."""
    x, g, *rest = problem((2, 8, 5, 3), torch.float32)
    out, workspace = torch.empty_like(x), torch.empty(1 << 16, dtype=torch.uint8)
    sizes = dict(zip(("batch", "channels", "height", "width"), x.shape, strict=True)) | {"dtype": 0, "tf32": 0}
    given = {
        "x": x.data_ptr(),
        "g": g.data_ptr(),
        "x_strides": x.stride(),
        "out": out.data_ptr(),
        "workspace": workspace.data_ptr(),
        "workspace_bytes": workspace.numel(),
        "norm_weight": None,
        "norm_bias": None,
        **dict(zip(GateWeights._fields, (each.data_ptr() for each in rest), strict=True)),
    }
    given |= sizes
    for name, value in changes.items():
        assert name in given
        given[name] = value(given) if callable(value) else value
    problem_ = cuda.Problem(*(given[name] for name in sizes))
    maps = [
        cuda.Map(given["x"], (ctypes.c_int64 * 4)(*given["x_strides"])),
        cuda.Map(given["g"], (ctypes.c_int64 * 4)(*g.stride())),
    ]
    weights = cuda.Weights(*(given[name] for name in (*GateWeights._fields, "norm_weight", "norm_bias")))
    status = loaded.masag_forward(
        *(ctypes.byref(each) for each in (problem_, *maps, weights)),
        *(ctypes.c_void_p(given[name]) for name in ("out", "workspace")),
        *(ctypes.c_size_t(given["workspace_bytes"]), None),
    )
    return status, loaded.masag_last_error().decode()


INVALID, UNSUPPORTED, FAILED = 1, 2, 3


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"batch": 0}, INVALID, "batch: got 0, expected at least 1"),
        ({"channels": 385}, UNSUPPORTED, "channels: got 385, this library takes at most 384"),
        ({"width": -3}, INVALID, "width: got -3, expected at least 1"),
        ({"height": 1 << 62}, UNSUPPORTED, f"height: got {1 << 62}, this library takes at most {1 << 30}"),
        ({"height": 1 << 20, "width": 1 << 20}, UNSUPPORTED, "batch x height x width: got 2 x 1048576 x 1048576"),
        ({"dtype": 3}, INVALID, "dtype: got 3, expected MASAG_FLOAT32, MASAG_FLOAT16 or MASAG_BFLOAT16"),
        ({"x": None}, INVALID, "x: got a null pointer"),
        ({"x": lambda given: given["x"] + 2}, INVALID, "x: got the address 0x"),
        ({"x_strides": (120, 15, -3, 1)}, INVALID, f"x: got the stride -3 of an axis of 5, expected 0 to {2**40 // 5}"),
        (
            {"x_strides": (2**40, 15, 3, 1)},
            INVALID,
            f"x: got the stride {2**40} of an axis of 2, expected 0 to {2**39}",
        ),
        ({"projection": None}, INVALID, "projection: got a null pointer"),
        ({"norm_weight": 64}, INVALID, "norm_weight, norm_bias: got one of them, expected both or neither"),
        ({"workspace": lambda given: given["workspace"] + 4}, INVALID, "workspace: got the address 0x"),
        ({"workspace_bytes": 1000}, INVALID, "workspace_bytes: got 1000, expected at least 1216"),
        ({"out": lambda given: given["x"]}, INVALID, "out: overlaps x, expected memory of its own"),
        ({"out": lambda given: given["g"] + 956}, INVALID, "out: overlaps g, expected memory of its own"),
        ({"out": lambda given: given["workspace"] + 1196}, INVALID, "out: overlaps workspace, expected memory"),
        ({"out": lambda given: given["u"] + 28}, INVALID, "out: overlaps u, expected memory of its own"),
        ({"workspace": lambda given: given["x"] + 944}, INVALID, "workspace: overlaps x, expected memory"),
        ({"g": lambda given: given["workspace"] + 1212}, INVALID, "workspace: overlaps g, expected memory"),
        ({"dilated": lambda given: given["workspace"] + 1212}, INVALID, "workspace: overlaps dilated, expected memory"),
        ({"context": lambda given: given["out"] + 956}, INVALID, "out: overlaps context, expected memory of its own"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_bad_call_from_c_gets_a_status_and_a_message(
    host: Any, changes: dict[str, Any], status: int, message: str
) -> None:
    assert call(host)[0] == 0
    found, said = call(host, **changes)
    assert found == status
    assert said.startswith(message)


def test_null_structures_from_c_are_refused_by_name(host: Any) -> None:
    size = ctypes.c_size_t()
    good = cuda.Problem(1, 8, 2, 2, 0, 0)
    assert host.masag_workspace_size(None, ctypes.byref(size)) == INVALID
    assert host.masag_last_error() == b"problem: got a null pointer"
    assert host.masag_workspace_size(ctypes.byref(good), None) == INVALID
    assert host.masag_last_error() == b"bytes: got a null pointer"
    assert host.masag_forward(ctypes.byref(good), None, None, None, None, None, size, None) == INVALID
    assert host.masag_last_error() == b"x: got a null pointer"


def test_memory_of_the_host_an_old_gpu_and_a_failed_launch_have_a_message(host: Any) -> None:
    x, g, *weights = problem((1, 8, 4, 4), torch.float32)
    device(host, capability=75)
    with pytest.raises(KernelError, match=r"device 0 has compute capability 7\.5, expected 8.0 or newer"):
        gated([x, g, *weights], "cuda")
    device(host, foreign=weights[4].data_ptr())
    with pytest.raises(
        KernelError, match=r"^kernel 'cuda': u: got pageable memory of the host, expected memory of device 0"
    ):
        gated([x, g, *weights], "cuda")
    device(host, moved=g.data_ptr())
    with pytest.raises(
        KernelError, match=r"g: got the address 0x\w+, expected .*, by which device 0 knows that memory"
    ):
        gated([x, g, *weights], "cuda")
    device(host, launch_error=209)
    with pytest.raises(KernelError, match=r"launch: this library was not built for the GPU, or .*: no kernel image is"):
        cuda.forward(x, g, GateWeights(*weights))
    device(host, launch_error=1)
    with pytest.raises(KernelError, match="launch: error"):
        cuda.forward_c(x, g, GateWeights(*weights))


def test_a_library_that_has_nothing_for_the_gpu_is_not_taken(host: Any) -> None:
    x = torch.zeros(1, 8, 4, 4)
    assert cuda.why_not(x) is None
    device(host, launch_error=35)
    assert "the current device: this library was not built for the GPU, or its driver is too old" in cuda.why_not(x)
    with pytest.raises(KernelError, match="this library was not built for the GPU"):
        gated(problem((1, 8, 4, 4), torch.float32), "cuda")


def test_a_library_that_is_missing_foreign_or_of_other_sources_is_not_used(
    host_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = problem((1, 4, 3, 3), torch.float32)
    monkeypatch.setenv(FOLDER, str(tmp_path))
    with pytest.raises(
        KernelError, match=r"libmasag.so: does not exist. Build it: python -m msa2net.core.kernels.build"
    ):
        gated(arguments, "cuda")
    (tmp_path / LIBRARY).write_bytes(b"no library")
    with pytest.raises(KernelError, match=r"libmasag.so: cannot be loaded: "):
        gated(arguments, "cuda")
    content = (host_library / LIBRARY).read_bytes()
    assert content.count(digest().encode()) == 1
    other = tmp_path / "other"
    other.mkdir()
    (other / LIBRARY).write_bytes(content.replace(digest().encode(), b"0" * 64))
    monkeypatch.setenv(FOLDER, str(other))
    with pytest.raises(KernelError, match=r"libmasag.so: was built of other sources \(00000000\). Build it"):
        gated(arguments, "cuda")


def test_without_nvcc_the_build_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("NVCC", raising=False)
    assert build.main(["--output", str(tmp_path / "lib")]) == 2
    assert "nvcc: not found: not in $NVCC, not on PATH, not in" in capsys.readouterr().err
    assert not (tmp_path / "lib").exists()


def test_a_build_is_for_the_gpus_that_nvcc_knows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compiler, said = tmp_path / "nvcc", tmp_path / "said"
    compiler.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --list-gpu-code ]; then printf "sm_75\\nsm_80\\nsm_87\\nsm_90a\\n"; exit; fi\n'
        f'echo "$@" >> {said}; exit 1\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("NVCC", str(compiler))
    for asked in ("75", "87,120"):
        assert build.main(["--targets", asked, "--output", str(tmp_path)]) == 2
        unknown = asked.split(",")[-1]
        assert f"targets: got {unknown}, expected some of 80, 87, as {compiler} knows" in capsys.readouterr().err
    assert not said.exists()
    assert build.main(["--output", str(tmp_path)]) == 2
    assert set(re.findall(r",code=(\w+)", said.read_text())) == {"sm_80", "sm_87", "compute_80"}


def test_a_build_that_fails_leaves_the_library_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\necho 'masag.cu(1): error' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("NVCC", str(compiler))
    (tmp_path / LIBRARY).write_bytes(b"before")
    with pytest.raises(KernelError, match=r"^nvcc: failed: masag.cu\(1\): error. The command was: "):
        build.build(tmp_path)
    assert sorted(each.name for each in tmp_path.iterdir()) == [LIBRARY, "nvcc"]
    assert (tmp_path / LIBRARY).read_bytes() == b"before"


# The benchmark ------------------------------------------------------------------------------------------------------


def benchmarked(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> dict[str, Any]:
    """A small run of it on the CPU."""
    monkeypatch.setattr(kernels, "FUSED", ("cuda",))
    small = {"gates": ((24, 5),), "batches": (1,), "dtypes": ("fp32",), "rounds": 2}
    return kernels.measure("cpu", compiled=False, with_network=False, **small, **settings)


@pytest.mark.usefixtures("host")
def test_the_benchmark_checks_before_it_times(monkeypatch: pytest.MonkeyPatch) -> None:
    result = benchmarked(monkeypatch)
    assert result["right"]
    assert [(row["norm"], row["kernel"]) for row in result["checks"]] == 2 * [(False, "cuda"), (True, "cuda")]
    (case,) = result["cases"]
    assert set(case["median"]) == {"eager", "collapsed", "cuda"}
    assert "24 x 5 x 5, fp32, batch 1" in kernels.table(result)
    json.dumps(result)


@pytest.mark.usefixtures("host")
def test_a_kernel_that_is_wrong_is_named_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = cuda.forward
    monkeypatch.setattr(cuda, "forward", lambda *given, **named: forward(*given, **named) + 1e-3)
    result = benchmarked(monkeypatch)
    assert not result["right"]
    assert set(result["cases"][0]["median"]) == {"eager", "collapsed"}
    assert "WRONG: cuda at 24 x 5 x 5, fp32, batch 1: error 1.0e-03, expected at most" in kernels.table(result)


@pytest.mark.usefixtures("host")
def test_a_kernel_that_fails_loses_nothing_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, forward = itertools.count(), cuda.forward

    def fails(*given: Any, **named: Any) -> Tensor:
        if next(calls) >= first:
            raise RuntimeError("an illegal memory access")
        return forward(*given, **named)

    monkeypatch.setattr(cuda, "forward", fails)
    first = 1
    assert "WRONG: cuda at 24 x 5 x 5, fp32, batch 1: RuntimeError: an illegal" in kernels.table(
        benchmarked(monkeypatch)
    )
    calls, first = itertools.count(), 4  # checked, then timed
    saved: list[str] = []
    result = benchmarked(monkeypatch, save=lambda so_far: saved.append(json.dumps(so_far)))
    (case,) = result["cases"]
    assert result["right"]
    assert case["failed"] == {"cuda": "RuntimeError: an illegal memory access"}
    assert set(case["median"]) == {"eager", "collapsed"}
    assert [len(json.loads(each).get("cases", [])) for each in saved] == [0, 1]


def test_without_a_kernel_nothing_is_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    result = benchmarked(monkeypatch)
    assert not result["right"]
    assert "cuda did not run: " in kernels.table(result)


def test_the_benchmark_without_a_gpu_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert kernels.main([]) == 2
    assert capsys.readouterr().err.startswith(
        "error: --device: got no GPU, expected 'cuda', with a GPU and a CUDA build"
    )


def test_a_floor_is_the_slower_of_bytes_and_products() -> None:
    case = kernels.Case(384, 14, "fp16", 1)
    rates = {"bytes": 1e12, "bytes_cached": 4e12, "fp16": 1e30}
    bytes_alone = pytest.approx((0.46e6 + 2.80e6 + 1.04e6) / 1e12, rel=0.01)  # as the kernels' README has it
    assert kernels.floor_of(case, rates, cache=8_000_000) == {"floor": bytes_alone, "floor_cached": False}
    assert kernels.floor_of(case, rates, cache=9_000_000)["floor"] * 4 == bytes_alone
    products_alone = kernels.floor_of(case, {"bytes": 1e30, "fp16": 1e12}, cache=0)["floor"]
    assert products_alone == pytest.approx(2 * (260.1e6 + 57.8e6) / 1e12, rel=0.01)


# The CUDA source under sanitizers -----------------------------------------------------------------------------------

SANITIZERS = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DHOST_ADDRESS_SANITIZER"),
    "thread": ("-fsanitize=thread", "-DHOST_THREAD_SANITIZER"),
}
NUMBERS = {dtype: i for i, dtype in enumerate(DTYPES.values())}


def sanitized(name: str, output: Path, source: Path = SOURCES / "masag.cu", optimise: str = "-O0") -> Path:
    """Builds `masag_case` with a sanitizer."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    *flags, macro = SANITIZERS[name]
    on_host(*flags, optimise, "-g", CASES, "-o", output / "masag_case", source=source, macro=macro)
    return output / "masag_case"


def case(path: Path, arguments: list[Tensor], processors: int, at_once: bool, tf32: bool = False) -> Path:
    """Writes the file that `masag_case` reads."""
    x, g, *weights = (each.contiguous() for each in arguments)
    parts = [each.flatten().view(torch.uint8).numpy().tobytes() for each in (x, g, *weights)]
    lengths = [len(each) for each in parts[2:]] + [0] * (12 - len(weights))
    header = struct.pack(
        "<4q2i8q17q",
        *(*x.shape, NUMBERS[x.dtype], tf32, *x.stride(), *g.stride()),
        *(len(parts[0]), len(parts[1]), *lengths, len(parts[0]), processors, at_once),
    )
    path.write_bytes(header + b"".join(parts))
    return path


def result(path: Path, arguments: list[Tensor]) -> Tensor:
    """What `masag_case` made of a case."""
    batch, channels, height, width = arguments[0].shape
    found = torch.frombuffer(bytearray(Path(f"{path}.out").read_bytes()), dtype=arguments[0].dtype)
    if len(arguments) == 12:
        return found.view(batch, channels, height, width)
    return found.view(batch, height, width, channels).permute(0, 3, 1, 2)


def run_cases(
    program: Path,
    shapes: Iterable[tuple[int, ...]],
    norms: tuple[bool, ...] = (False, True),
    devices: tuple[tuple[int, bool], ...] = ((1, False), (10**6, True)),
) -> None:
    """Every dtype, with and without norm, with the smallest tiles and the largest: against float64."""
    cases = []
    for number, (shape, dtype, norm, (processors, at_once)) in enumerate(
        itertools.product(shapes, DTYPES.values(), norms, devices)
    ):
        arguments = problem(shape, dtype, norm)
        cases.append((case(program.parent / f"{number}.case", arguments, processors, at_once), arguments))
    done = subprocess.run([program, *(path for path, _ in cases)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    for path, arguments in cases:
        expected, eager = gated(double(arguments), "reference"), gated(arguments, "reference")
        floor = FLOOR[arguments[0].dtype]
        assert error(result(path, arguments), expected) <= 2 * error(eager, expected) + floor


def test_the_address_sanitizer_finds_nothing(tmp_path: Path) -> None:
    run_cases(sanitized("address", tmp_path), [(1, 1, 1, 1), (2, 13, 11, 7), (1, 48, 6, 5)])


def test_the_thread_sanitizer_finds_no_race(tmp_path: Path) -> None:
    run_cases(sanitized("thread", tmp_path), [(2, 40, 5, 7)])


@pytest.mark.slow
def test_the_address_sanitizer_finds_nothing_at_the_real_sizes(tmp_path: Path) -> None:
    run_cases(sanitized("address", tmp_path, optimise="-O2"), REAL.values(), norms=(True,), devices=((16, False),))


SYNCHRONISES = re.compile(r"__syncthreads\(\);|(?<!void )(wait_for_copies<.*?>|commit_copies)\(\);")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SYNCHRONISES.findall((SOURCES / "masag.cu").read_text("utf-8")))))
def test_no_barrier_can_be_left_out_unseen(number: int, tmp_path: Path) -> None:
    content = (SOURCES / "masag.cu").read_text("utf-8")
    place = list(SYNCHRONISES.finditer(content))[number]
    mutant = tmp_path / "masag.cu"
    mutant.write_text(content[: place.start()] + content[place.end() :])
    program = sanitized("thread", tmp_path, mutant)
    for dtype, (processors, at_once) in itertools.product(DTYPES.values(), ((1, False), (10**6, True), (10**6, False))):
        arguments = problem((2, 40, 9, 7), dtype, norm=True)
        path = case(tmp_path / "one.case", arguments, processors, at_once)
        done = subprocess.run([program, path], capture_output=True, text=True, check=False)
        expected, eager = gated(double(arguments), "reference"), gated(arguments, "reference")
        right = error(result(path, arguments), expected) <= 2 * error(eager, expected) + FLOOR[dtype]
        if "data race" in done.stderr or not right:
            return
    pytest.fail(f"without {place[0]!r} of line {content.count(chr(10), 0, place.start()) + 1} nothing changes")


# The CUDA library, compiled -----------------------------------------------------------------------------------------


def built_for(targets: list[int], output: Path) -> list[build.Kernel]:
    try:
        build.nvcc()
    except KernelError as missing:
        pytest.skip(str(missing))
    return build.build(output, targets)


def test_no_cuda_kernel_for_orin_spills(tmp_path: Path) -> None:
    built = built_for([87], tmp_path)
    assert len(built) == 41
    assert not [each for each in built if each.spilled]
    assert {each.name for each in tmp_path.iterdir()} == {LIBRARY, BINDING}
    # What a device's program links needs no PyTorch, and of CUDA only what every driver brings.
    needed = subprocess.run(["ldd", tmp_path / LIBRARY], capture_output=True, text=True, check=True).stdout
    assert "torch" not in needed
    assert "cudart" not in needed


@pytest.mark.slow
def test_no_cuda_kernel_for_any_gpu_spills(tmp_path: Path) -> None:
    built = built_for(list(build.TARGETS), tmp_path)
    assert len(built) == 41 * len(build.TARGETS)
    assert not [each for each in built if each.spilled]


# Triton, compiled ---------------------------------------------------------------------------------------------------


def compile_for(targets: str, precisions: str) -> str:
    """Compiles every configuration in a process that does not interpret; returns what it printed."""
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "msa2net.core.kernels.compile", "--targets", targets, "--precisions", precisions],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_no_configuration_for_orin_spills_or_outgrows_its_memory() -> None:
    assert "0 faults" in compile_for("87", "fp32,fp16")


@pytest.mark.slow
def test_no_configuration_for_any_gpu_spills_or_outgrows_its_memory() -> None:
    assert "0 faults" in compile_for("80,86,87,89,90,110,120", "fp32,tf32,fp16,bf16")


# On a GPU, see CONTRIBUTING.md --------------------------------------------------------------------------------------


@pytest.fixture(params=["triton", "cuda"])
def on_gpu(request: pytest.FixtureRequest) -> str:
    """The name of a fused kernel, which then runs on a GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    if request.param == "triton" and os.environ["TRITON_INTERPRET"] == "1":
        pytest.skip("TRITON_INTERPRET is 1: set it to 0")
    return request.param


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("norm", [False, True], ids=["gate", "norm"])
@pytest.mark.parametrize("shape", [*SHAPES.values(), (16, 96, 56, 56)], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_on_a_gpu_kernels_err_at_most_twice_as_much_as_pytorch(
    shape: tuple[int, ...], norm: bool, dtype: torch.dtype, on_gpu: str
) -> None:
    arguments = [each.cuda() for each in problem(shape, dtype, norm)]
    expected = gated(double(arguments), "reference")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        eager = gated(arguments, "reference")
    found = gated(arguments, on_gpu)
    assert error(found, expected) <= 2 * error(eager, expected) + FLOOR[dtype], error(eager, expected)
    x, g, *rest = arguments
    if on_gpu == "cuda":
        by_c = cuda.forward_c(x, g, GateWeights(*rest[:10]), (rest[10], rest[11]) if norm else None)
        assert torch.equal(by_c, found)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gated(arguments, on_gpu)
    for _ in range(2):
        captured.fill_(torch.nan)
        graph.replay()
        assert torch.equal(captured, found)


@pytest.mark.gpu
@pytest.mark.usefixtures("on_gpu")
def test_on_a_gpu_the_predictor_passes_its_self_test() -> None:
    from msa2net.runtimes import Predictor

    with Predictor.load(runtime="pytorch", device="cuda") as segmenter:
        assert segmenter.self_test().passed
        assert "CUDA graph" in segmenter.execution.provider
        assert not segmenter.execution.provider.endswith("reference")
