"""The gate's kernels without a GPU: the operator, Triton's kernels in its interpreter, and their compilation.

The bar: a kernel's error against float64 is at most twice that of PyTorch's layers in the same dtype.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import deterministic

from msa2net.core.checkpoint import model_by_rule, rule_value
from msa2net.core.config import VARIANTS
from msa2net.core.kernels import operator, reference
from msa2net.core.kernels.operator import KERNELS, masag, select
from msa2net.core.kernels.reference import GateWeights, collapse
from msa2net.core.masag import MASAG
from msa2net.errors import KernelError

GOLDEN = Path(__file__).parent / "golden"
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


def gated(arguments: list[Tensor], kernel: str) -> Tensor:
    norms = arguments[12:] or [None, None]
    return masag(*arguments[:12], *norms, kernel=kernel)


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

    from msa2net.core.kernels import triton as kernels

    create_dot = InterpreterBuilder.create_dot

    def wide(handle: Any) -> Any:
        if str(handle.dtype.scalar) != "bf16":
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), language.float32)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, wide(a), wide(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    return kernels


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


def test_export_and_compile_see_one_node_for_any_batch_and_size() -> None:
    model = Tail("reference").eval()
    x, g = problem((2, 6, 5, 4), torch.float32)[:2]
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    program = torch.export.export(model, (x, g), dynamic_shapes=(sizes, sizes))
    nodes = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert nodes.count(torch.ops.msa2net.masag.default) == 1
    assert not [node for node in nodes if "conv" in str(node)]
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
def test_auto_says_why_it_passed_a_kernel_over(
    capability: tuple[int, int], chosen: str, said: str, monkeypatch: Any, caplog: Any
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with caplog.at_level("INFO", operator.__name__):
        assert select("auto", OnGpu()) == chosen  # type: ignore[arg-type]
    assert said in caplog.text


# Triton, interpreted ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("interpreter", "poisoned")
@every_dtype
@pytest.mark.parametrize(
    ("shape", "norm"),
    # The real sizes take seconds each: one of them with the LayerNorm.
    [
        (shape, norm)
        for shape in SHAPES.values()
        for norm in (False, True)
        if shape[1] < 96 or norm == (shape[1] == 192)
    ],
    ids=str,
)
def test_the_triton_kernels_err_at_most_twice_as_much_as_pytorch(
    shape: tuple[int, ...], norm: bool, dtype: torch.dtype
) -> None:
    arguments = problem(shape, dtype, norm)
    expected = gated(double(arguments), "reference")
    found, eager = gated(arguments, "triton"), gated(arguments, "reference")
    assert found.stride() == eager.stride()
    assert error(found, expected) <= 2 * error(eager, expected) + FLOOR[dtype], error(eager, expected)


@pytest.mark.usefixtures("poisoned")
def test_every_configuration_computes_the_same(interpreter: Any) -> None:
    kernels = interpreter
    x, g, *rest = problem((2, 40, 9, 7), torch.float32, norm=True)
    weights, norm = GateWeights(*rest[:10]), (rest[10], rest[11])
    expected = reference.forward(*(each.double() for each in (x, g)), GateWeights(*double(rest[:10])), None)
    normal = gated(double([x, g, *rest]), "reference")
    lists = (kernels.CONTEXT, kernels.DILATED, sum(kernels.GATE.values(), ()))
    for i, configs in enumerate(lists):
        for config in configs:
            chosen = tuple(config if i == j else each[0] for j, each in enumerate(lists))
            assert error(kernels.forward(x, g, weights, configs=chosen), expected) <= 5e-6
            assert error(kernels.forward(x, g, weights, norm, configs=chosen), normal) <= 5e-6


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
def test_maps_of_any_strides_give_the_same_bits(layout: str) -> None:
    x, g, *weights = problem((2, 20, 6, 7), torch.float32)
    x = x[:1].expand(2, -1, -1, -1) if layout == "expanded" else x
    expected = gated([x.contiguous(), g, *weights], "triton")
    if layout == "channels_last":
        x, g = (each.contiguous(memory_format=torch.channels_last) for each in (x, g))
    elif layout == "sliced":
        x, g = (torch.nn.functional.pad(each, (1, 2, 3, 0))[..., 3:, 1:-2] for each in (x, g))
    assert torch.equal(gated([x, g, *weights], "triton"), expected)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("which", [0, 1], ids=["x", "g"])
def test_nan_in_a_map_comes_out_where_pytorch_has_it(which: int) -> None:
    arguments = problem((1, 20, 9, 9), torch.float32)
    arguments[which][0, 3, 4, 5] = torch.nan
    expected, found = gated(arguments, "reference"), gated(arguments, "triton")
    assert expected.isnan().any()
    assert torch.equal(found.isnan(), expected.isnan())


@pytest.mark.usefixtures("interpreter")
@every_dtype
def test_gradients_through_the_triton_kernels_err_at_most_twice_as_much_as_pytorch(
    dtype: torch.dtype,
) -> None:
    arguments = problem((2, 20, 9, 7), dtype)
    grads = []
    for given, kernel in ((double(arguments), "reference"), (arguments, "triton")):
        leaves = [each.detach().clone().requires_grad_() for each in given]
        grads.append(torch.autograd.grad(gated(leaves, kernel).double().square().mean(), leaves))
    leaves = [each.detach().clone().requires_grad_() for each in arguments]
    eager = torch.autograd.grad(
        reference.forward(leaves[0], leaves[1], GateWeights(*leaves[2:])).double().square().mean(), leaves
    )
    for expected, found, other in zip(*grads, eager, strict=True):
        floor = FLOOR[dtype] * float(expected.abs().max())
        assert error(found, expected) <= 2 * error(other, expected) + floor


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
