"""The deploy form: each rewrite is the same function, found where it should be, and no worse in low precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from msa2net.core import VARIANTS, ModelConfig, MSA2Net
from msa2net.core.checkpoint import model_by_rule
from msa2net.core.decoder import LKABlock
from msa2net.core.masag import MASAG
from msa2net.core.maxvit import LayerScale, RelativePosition
from msa2net.core.rewrites import EAGER_ONLY, NAMES, apply, chosen, rewritten
from msa2net.core.rewrites.gate_selection import CollapsedMASAG, collapsed

FORMS = ("dual_attention", "lka")
EXACT = [name for name in NAMES if name not in EAGER_ONLY]
every_form = pytest.mark.parametrize("form", FORMS)
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


def config(form: str, classes: int = 3, variant: str = "tiny") -> ModelConfig:
    return replace(VARIANTS[variant], num_classes=classes, deep_decoder=form)


@pytest.fixture(scope="module")
def networks() -> dict[str, MSA2Net]:
    """Weights by rule: layer scales from 0.1 to 1, norms and BatchNorm statistics far from the identity."""
    return {form: model_by_rule(config(form)) for form in FORMS}


@pytest.fixture(scope="module")
def doubles(networks: dict[str, MSA2Net]) -> dict[str, MSA2Net]:
    return {form: copy.deepcopy(network).double() for form, network in networks.items()}


def image(channels: int = 3, dtype: torch.dtype = torch.float32, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(batch, channels, 224, 224, generator=generator, dtype=torch.float64).to(dtype)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


# Where -------------------------------------------------------------------------------------------------------------


def expected_sites(config: ModelConfig) -> dict[str, int]:
    blocks = sum(config.depths)
    attentions, dual = 2 * blocks, config.deep_decoder == "dual_attention"
    gates = 3 if dual else 2
    return {
        "position_table": attentions,
        "batch_norm": 1 + 3 * blocks + 7 * gates,
        "attention_scale": attentions,
        "layer_scale": 2 * attentions,
        "norm_affine": 2 * attentions + (2 * 4 if dual else 0) + 4,
        "attention_heads": attentions,
        "lka_block": 4 if dual else 6,
        "gate_selection": gates,
        "last_expansion": 1,
        "window_order": blocks,
    }


@every_form
def test_each_rewrite_finds_every_site(form: str) -> None:
    model = model_by_rule(config(form))
    assert apply(model, EXACT) == expected_sites(model.config)


@every_form
def test_each_rewrite_finds_every_site_at_the_released_size(form: str) -> None:
    with torch.device("meta"):  # shapes are enough; these four compute with values
        model = MSA2Net(config(form, variant="small")).eval()
    names = [
        name for name in EXACT if name not in ("position_table", "attention_scale", "gate_selection", "window_order")
    ]
    found = apply(model, names)
    assert found == {name: expected_sites(model.config)[name] for name in names}
    assert found["batch_norm"] == (55 if form == "dual_attention" else 48)
    assert found["layer_scale"] == 44


LEFT: dict[str, tuple[type[nn.Module], ...]] = {
    "position_table": (RelativePosition,),
    "batch_norm": (nn.BatchNorm2d,),
    "layer_scale": (LayerScale,),
    "lka_block": (LKABlock,),
    "gate_selection": (MASAG,),
}


@pytest.mark.parametrize("name", sorted(LEFT))
@every_form
def test_nothing_is_left_of_what_a_rewrite_replaces(networks: dict[str, MSA2Net], form: str, name: str) -> None:
    found = [type(module) for module in rewritten(networks[form], [name]).modules()]
    assert not [kind for kind in found if issubclass(kind, LEFT[name])]


@every_form
def test_the_gate_keeps_neither_its_projection_nor_its_batch_norms(networks: dict[str, MSA2Net], form: str) -> None:
    model = rewritten(networks[form], ["batch_norm", "gate_selection"])
    for gate in (module for module in model.modules() if isinstance(module, CollapsedMASAG)):
        layers = [module for module in gate.modules() if isinstance(module, nn.Conv2d)]
        assert len(layers) == 5  # depthwise, dilated, u, and the two 1 x 1 of the recalibration
        assert gate.select.weight.shape[0] == 1


@every_form
def test_layers_that_no_output_needs_are_dropped(networks: dict[str, MSA2Net], form: str) -> None:
    keys = list(rewritten(networks[form], []).state_dict())
    assert {key.split(".")[1] for key in keys if key.startswith("decoder_3.")} == {"layer_up"}
    assert any(key.startswith("decoder_2.ag_attn.") for key in keys) == (form == "dual_attention")


# The same function -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [*[[name] for name in EXACT], EXACT], ids=[*EXACT, "all"])
@every_form
def test_a_rewrite_is_exact(
    networks: dict[str, MSA2Net], doubles: dict[str, MSA2Net], form: str, names: list[str]
) -> None:
    with torch.inference_mode():
        x = image(dtype=torch.float64)
        expected = doubles[form](x)
        assert relative(rewritten(doubles[form], names)(x), expected) <= 1e-10
        assert relative(rewritten(networks[form], names)(x.float()), expected) <= 1e-4


@given(names=st.sets(st.sampled_from(EXACT)), form=st.sampled_from(FORMS))
@settings(max_examples=8, deadline=None)
def test_any_set_of_rewrites_is_exact(doubles: dict[str, MSA2Net], names: set[str], form: str) -> None:
    with torch.inference_mode():
        x = image(dtype=torch.float64)
        assert relative(rewritten(doubles[form], names)(x), doubles[form](x)) <= 1e-10


@pytest.mark.parametrize(("classes", "channels"), [(2, 3), (9, 1)])
@every_form
def test_any_number_of_classes_and_grey_frames(form: str, classes: int, channels: int) -> None:
    model = model_by_rule(config(form, classes)).double()
    with torch.inference_mode():
        x = image(channels, torch.float64, batch=2)
        found = rewritten(model, EXACT)(x)
        assert found.shape == (2, classes, 224, 224)
        assert relative(found, model(x)) <= 1e-10


def test_the_collapsed_gate_is_what_its_basis_vectors_say() -> None:
    """The selection logits' difference, column by column, through the reference's own affine tail."""
    gate = MASAG(8).double().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, tensor in gate.state_dict().items():
            if tensor.is_floating_point():
                values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.copy_(values.abs() + 0.1 if key.endswith("running_var") else values)

        def difference(h: Tensor, mean: float, most: float) -> float:
            context = gate.multi.global_.proj(torch.tensor([mean, most], dtype=torch.float64).view(1, 2, 1, 1))
            logits = gate.selection(gate.multi.bn(gate.multi.local.proj(h.view(1, -1, 1, 1)) + context))
            return float(logits[0, 0] - logits[0, 1])

        u, alpha, beta, gamma = collapsed(gate)
        zero, unit = torch.zeros(8, dtype=torch.float64), torch.eye(8, dtype=torch.float64)
        base = difference(zero, 0, 0)
        assert float(gamma) == pytest.approx(base, rel=1e-9)
        assert float(alpha) == pytest.approx(difference(zero, 1, 0) - base, rel=1e-9)
        assert float(beta) == pytest.approx(difference(zero, 0, 1) - base, rel=1e-9)
        assert u.tolist() == pytest.approx([difference(row, 0, 0) - base for row in unit], rel=1e-9)


def test_a_block_in_window_order_attends_to_the_same_tokens(doubles: dict[str, MSA2Net]) -> None:
    """The block alone, so that a wrong order cannot hide behind what follows."""
    block, moved = (
        model.backbone.backbone.stages[0].get_submodule("blocks.0")
        for model in (doubles["lka"], rewritten(doubles["lka"], ["window_order"]))
    )
    x = torch.randn(2, 16, 112, 112, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert relative(moved(x), block(x)) <= 1e-12


# Low precision -----------------------------------------------------------------------------------------------------


def _rounded(x: Tensor, precision: str, axis: int | None = None) -> Tensor:
    """`x` as `precision` holds it; int8 symmetric, with one scale, or one for each index of `axis`."""
    if precision != "int8":
        return x.to(torch.bfloat16 if precision == "bf16" else torch.float16).to(x.dtype)
    others = [i for i in range(x.ndim) if i != axis]
    scale = (x.abs().amax(others, keepdim=True) / 127).clamp_min(1e-30)
    return (x / scale).round() * scale


@contextmanager
def simulated(model: nn.Module, precision: str) -> Iterator[None]:
    """Weights and inputs of every product as `precision` holds them; in bf16 and fp16 its result, too."""
    hooks: list[Any] = []
    with torch.no_grad():
        for module in model.modules():
            if not isinstance(module, nn.Conv2d | nn.Linear):
                continue
            module.weight.copy_(_rounded(module.weight, precision, 0))
            hooks.append(module.register_forward_pre_hook(lambda _, x: (_rounded(x[0], precision),)))
            if precision != "int8":
                hooks.append(module.register_forward_hook(lambda *of: _rounded(of[2], precision)))
    yield
    for hook in hooks:
        hook.remove()


def error_in(model: MSA2Net, precision: str, truth: Tensor) -> float:
    """Root mean square of the logits' error, relative to that of the logits. The network is used up."""
    with simulated(model, precision), torch.no_grad():
        found = model(image(dtype=torch.float64))
    return float((found - truth).square().mean().sqrt() / truth.square().mean().sqrt())


@pytest.fixture(scope="module")
def untouched(doubles: dict[str, MSA2Net]) -> Callable[[str, str], tuple[Tensor, float]]:
    """The logits in float64, and the untouched network's error, by form and precision; computed once each."""
    truths: dict[str, Tensor] = {}
    known: dict[tuple[str, str], float] = {}

    def of(form: str, precision: str) -> tuple[Tensor, float]:
        if form not in truths:
            with torch.no_grad():
                truths[form] = doubles[form](image(dtype=torch.float64))
        if (form, precision) not in known:
            known[form, precision] = error_in(copy.deepcopy(doubles[form]), precision, truths[form])
        return truths[form], known[form, precision]

    return of


@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8"])
@pytest.mark.parametrize("name", [*EXACT, "all"])
@every_form
def test_a_rewrite_costs_no_accuracy_in_low_precision(
    doubles: dict[str, MSA2Net],
    untouched: Callable[[str, str], tuple[Tensor, float]],
    form: str,
    name: str,
    precision: str,
) -> None:
    """At most twice the error of the untouched network in the same precision, plus a floor."""
    truth, before = untouched(form, precision)
    after = error_in(rewritten(doubles[form], EXACT if name == "all" else [name]), precision, truth)
    assert after <= 2 * before + 1e-4, f"{name} in {precision}: {after:.2e}, untouched {before:.2e}"


# By name -----------------------------------------------------------------------------------------------------------


def test_the_network_is_left_alone(networks: dict[str, MSA2Net]) -> None:
    before = copy.deepcopy(networks["lka"].state_dict())
    kinds = [type(module) for module in networks["lka"].modules()]
    rewritten(networks["lka"], EXACT)
    after = networks["lka"].state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert [type(module) for module in networks["lka"].modules()] == kinds


def test_an_unknown_rewrite_is_refused(networks: dict[str, MSA2Net]) -> None:
    with pytest.raises(ValueError, match=r"^rewrites: got 'fold', expected some of position_table, batch_norm, "):
        rewritten(networks["lka"], ["batch_norm", "fold"])


def test_a_network_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^model: got training mode, expected evaluation mode. Call model.eval\(\)"):
        rewritten(model_by_rule(config("lka")).train(), ["batch_norm"])


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "pytorch"])
def test_every_runtime_has_rewrites_of_its_own(runtime: str) -> None:
    names = chosen(runtime)
    assert set(names) <= set(NAMES if runtime == "pytorch" else EXACT)
    assert len(set(names)) == len(names) > 0


# Packed products ---------------------------------------------------------------------------------------------------


@needs_onednn
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@every_form
def test_packed_products_compute_the_same(networks: dict[str, MSA2Net], form: str, layout: torch.memory_format) -> None:
    packed = rewritten(networks[form], NAMES)
    with torch.inference_mode():
        for x in (image(), image() * 0.5 - 1):
            found = packed(x.contiguous(memory_format=layout))
            assert relative(found, networks[form](x)) <= 1e-4
            assert torch.equal(found, packed(x.contiguous(memory_format=layout)))


@needs_onednn
def test_packed_products_keep_no_second_copy_of_the_weights(networks: dict[str, MSA2Net]) -> None:
    packed = rewritten(networks["lka"], NAMES)
    with torch.inference_mode():
        packed(image())
    assert not [module for module in packed.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
