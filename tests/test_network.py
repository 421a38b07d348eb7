"""The reference network against numbers of the public code (`tests/golden/`), and what its parts promise."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from msa2net.benchmarks import machine
from msa2net.core.checkpoint import model_by_rule, rule_value, used_state
from msa2net.core.config import IMAGE_SIZE, VARIANTS, ModelConfig, variant_name
from msa2net.core.decoder import ChannelAttention
from msa2net.core.masag import MASAG
from msa2net.core.maxvit import LayerScale, RelativePosition
from msa2net.core.network import MSA2Net, is_unused
from msa2net.runtimes.bundle import Bundle
from msa2net.runtimes.predictor import DEMO_BUNDLE

GOLDEN = Path(__file__).parent / "golden"
# Form of the deep decoder -> its file of key names and its file of numbers.
FORMS = {
    "lka": ("state_dict.tsv", "msa2net_golden.npz"),
    "dual_attention": ("state_dict_dual.tsv", "msa2net_dual_golden.npz"),
}
LARGEST, MEAN = 2e-5, 1.5e-6  # of the logits, whose standard deviation is 0.98
# Of a module's output, in parts of its largest value: ten times what rounding does.
TRACE_LIMIT = 1e-5

every_form = pytest.mark.parametrize("form", list(FORMS))


def seeded(shape: tuple[int, ...], seed: int) -> Tensor:
    rng = np.random.Generator(np.random.PCG64(seed))
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))


def small_shapes(form: str) -> MSA2Net:
    """The full-size network without memory behind it."""
    with torch.device("meta"):
        return MSA2Net(replace(VARIANTS["small"], deep_decoder=form))


def tiny(form: str, classes: int = 2) -> MSA2Net:
    return model_by_rule(replace(VARIANTS["tiny"], deep_decoder=form, num_classes=classes))


# The fill rule, keys and counts ---------------------------------------------------------------------------------


@every_form
def test_rule_values_are_those_of_the_reference(form: str) -> None:
    shapes = {key: tuple(value.shape) for key, value in small_shapes(form).state_dict().items()}
    with np.load(GOLDEN / FORMS[form][1]) as golden:
        checks = {name.removeprefix("rule_check/"): golden[name] for name in golden if name.startswith("rule_check/")}
    expected_input = checks.pop("input_seed1")
    assert len(checks) >= 6
    for key, first in checks.items():
        assert rule_value(key, shapes[key]).ravel()[:8].tolist() == first.tolist(), key
    assert seeded((1, 3, 224, 224), 1).flatten()[:8].tolist() == expected_input.tolist()


@every_form
def test_keys_shapes_and_types_are_exactly_those_of_the_reference(form: str) -> None:
    lines = (GOLDEN / FORMS[form][0]).read_text(encoding="utf-8").splitlines()[1:]
    found = [
        f"{key}\t{'x'.join(map(str, value.shape)) or 'scalar'}\t{str(value.dtype).removeprefix('torch.')}"
        for key, value in small_shapes(form).state_dict().items()
    ]
    assert sorted(found) == sorted(lines)


@pytest.mark.parametrize(
    ("form", "entries", "parameters", "unused"),
    [("lka", 1060, 93_660_877, 22_647_578), ("dual_attention", 1100, 112_767_981, 36_161_315)],
)
def test_parameters_are_as_many_as_in_the_paper_and_the_public_code(
    form: str, entries: int, parameters: int, unused: int
) -> None:
    model = small_shapes(form)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert len(model.state_dict()) == entries
    assert sum(sizes.values()) == parameters
    assert sum(size for name, size in sizes.items() if is_unused(name, model.config)) == unused


# The gate -------------------------------------------------------------------------------------------------------


def gate_by_rule(width: int) -> MASAG:
    gate = MASAG(width)
    state = {
        key: torch.from_numpy(rule_value(key, tuple(value.shape), name=f"masag{width}.{key}"))
        for key, value in gate.state_dict().items()
    }
    gate.load_state_dict(state)
    return gate.eval()


@pytest.mark.parametrize("name", ["d96_56x56", "d192_28x28", "d384_14x14", "d48_17x23"])
def test_the_gate_gives_the_numbers_of_the_reference(name: str) -> None:
    with np.load(GOLDEN / "masag_golden.npz") as golden:
        shape, out = tuple(golden[f"{name}/shape"]), golden[f"{name}/out"]
        x, g = (seeded(shape, int(golden[f"{name}/seed_{which}"])) for which in "xg")
    with torch.inference_mode():
        found = gate_by_rule(shape[1])(x, g).numpy()
    assert np.abs(found - out).max() <= 1e-5


def test_the_gates_gradients_are_those_of_the_reference() -> None:
    with np.load(GOLDEN / "masag_golden.npz") as golden:
        shape = tuple(golden["d48_17x23/shape"])
        inputs = [seeded(shape, int(golden[f"d48_17x23/seed_{which}"])).requires_grad_() for which in "xg"]
        expected = [golden[f"d48_17x23/grad_{which}"] for which in "xg"]
    gate_by_rule(48)(*inputs).square().mean().backward()
    for found, gradient in zip(inputs, expected, strict=True):
        assert found.grad is not None
        assert np.abs(found.grad.numpy() - gradient).max() <= 1e-5 * np.abs(gradient).max()


# The whole network ----------------------------------------------------------------------------------------------


def statistics(x: Tensor) -> NDArray[np.float64]:
    x = x.double()
    return np.array([x.mean().item(), x.std(unbiased=False).item(), x.abs().max().item()])


@dataclass(frozen=True)
class Output:
    shape: tuple[int, ...]
    stats: NDArray[np.float64]
    first64: NDArray[np.float32]


@dataclass(frozen=True)
class Run:
    """What one form gives for the reference's two inputs: logits, and every traced module's output for the first."""

    golden: dict[str, NDArray[Any]]
    logits: dict[str, NDArray[np.float32]]
    outputs: dict[str, dict[str, Output]]


def run_form(form: str) -> Run:
    with np.load(GOLDEN / FORMS[form][1]) as file:
        golden = {name: file[name] for name in file.files}
    traced = {name.split("/")[2] for name in golden if name.startswith("rgb/trace/")}
    model = model_by_rule(replace(VARIANTS["small"], deep_decoder=form))
    modules = dict(model.named_modules())
    outputs: dict[str, dict[str, Output]] = {"rgb": {}, "grey": {}}
    logits = {}
    for kind, collected in outputs.items():

        def note(name: str, value: Tensor, collected: dict[str, Output] = collected) -> None:
            if name == "backbone.backbone.norm":
                value = value.permute(0, 3, 1, 2)  # the reference's own works on (B, C, H, W)
            first = value.reshape(-1)[:64].numpy().copy()
            collected[name] = Output(tuple(value.shape), statistics(value), first)

        handles = [
            modules[name].register_forward_hook(lambda _m, _i, value, name=name: note(name, value)) for name in traced
        ]
        handles.append(
            model.backbone.register_forward_hook(
                lambda _m, _i, maps: [note(f"encoder_{i}", value) for i, value in enumerate(maps)] and None
            )
        )
        x = seeded(tuple(golden[f"{kind}/input_shape"]), int(golden[f"{kind}/seed"]))
        with torch.inference_mode():
            logits[kind] = model(x).numpy()
        for handle in handles:
            handle.remove()
    return Run(golden, logits, outputs)


@pytest.fixture(scope="module", params=list(FORMS))
def run(request: pytest.FixtureRequest) -> Run:
    """One form at full size, run once; its 450 MB of weights are gone before the first test sees the result."""
    result = run_form(request.param)
    gc.collect()
    return result


def complaints(run: Run, kind: str, prefix: str) -> list[str]:
    """Modules whose output is not the reference's, in the order in which they ran, with the size of the error."""
    found = []
    names = {name.removeprefix(prefix).split("/")[0] for name in run.golden if name.startswith(prefix)}
    assert names <= run.outputs[kind].keys()
    for name, output in run.outputs[kind].items():
        if name not in names:
            continue
        shape, stats, first = (run.golden[f"{prefix}{name}/{key}"] for key in ("shape", "stats", "first64"))
        error = max(np.abs(output.stats - stats).max(), np.abs(output.first64 - first).max()) / stats[2]
        if output.shape != tuple(shape) or not error <= TRACE_LIMIT:
            found.append(f"{name}: shape {output.shape}, error {error:.1e} of its largest value")
    return found


def test_every_module_gives_the_numbers_of_the_reference(run: Run) -> None:
    assert complaints(run, "rgb", "rgb/trace/") == []


@pytest.mark.parametrize("kind", ["rgb", "grey"])
def test_the_encoders_maps_are_those_of_the_reference(run: Run, kind: str) -> None:
    encoder = replace(run, golden={name: v for name, v in run.golden.items() if name.startswith(f"{kind}/encoder_")})
    assert len(encoder.golden) == 12
    assert complaints(encoder, kind, f"{kind}/") == []


def test_logits_are_those_of_the_reference(run: Run) -> None:
    expected = run.golden["rgb/logits"]
    error = np.abs(run.logits["rgb"] - expected)
    assert error.max() <= LARGEST
    assert error.mean(dtype=np.float64) <= MEAN
    assert np.mean(run.logits["rgb"].argmax(1) == expected.argmax(1)) >= 0.9999


@pytest.mark.parametrize("kind", ["rgb", "grey"])
def test_the_middle_of_the_logits_and_their_statistics_are_those_of_the_reference(run: Run, kind: str) -> None:
    logits = run.logits[kind]
    error = np.abs(logits[0, :, 80:144, 80:144] - run.golden[f"{kind}/logits_crop64"])
    assert error.max() <= LARGEST
    assert error.mean(dtype=np.float64) <= MEAN
    assert np.abs(statistics(torch.from_numpy(logits)) - run.golden[f"{kind}/logits_stats"]).max() <= LARGEST


# Epsilons -------------------------------------------------------------------------------------------------------


@every_form
def test_every_norm_has_the_references_epsilon(form: str) -> None:
    """The golden logits hardly see the decoder's, so each is read here."""
    wrong, counts = [], {"BatchNorm": 0, "encoder LayerNorm": 0, "decoder LayerNorm": 0}
    for name, module in small_shapes(form).named_modules():
        if isinstance(module, nn.BatchNorm2d):
            kind, expected = "BatchNorm", 1e-5
            if module.momentum != 0.1 or not module.affine or not module.track_running_stats:
                wrong.append(f"{name}: momentum {module.momentum}")
        elif isinstance(module, nn.LayerNorm):
            kind, expected = (
                ("encoder LayerNorm", 1e-6) if name.startswith("backbone.") else ("decoder LayerNorm", 1e-5)
            )
        else:
            continue
        counts[kind] += 1
        if module.eps != expected:
            wrong.append(f"{name}: {module.eps}")
    assert wrong == []
    # 11 encoder blocks with 2 attention layers of 2 norms each, and the last norm.
    assert counts["encoder LayerNorm"] == 45
    assert counts["BatchNorm"] == 1 + 1 + 11 * 3 + 4 * 7
    deep = 2 * 2 * (4 if form == "dual_attention" else 2)
    assert counts["decoder LayerNorm"] == 4 + 4 + deep + 2 * 2 * 2


def test_channel_attention_divides_by_the_norm_or_by_1e_12_if_that_is_larger() -> None:
    """Queries and keys whose norm is about the epsilon, against the formula written out."""
    torch.manual_seed(0)
    attention = ChannelAttention(16).double().requires_grad_(False)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    attention.qkv.weight[:32] *= 1e-12
    q, k, v = (part.view(2, 5, 8, 2).permute(0, 2, 3, 1) for part in attention.qkv(x).chunk(3, -1))
    norms = q.norm(dim=-1)
    assert (norms < 1e-12).any()
    assert (norms > 1e-12).any()
    q, k = (part / part.norm(dim=-1, keepdim=True).clamp_min(1e-12) for part in (q, k))
    mixed = (q @ k.transpose(-2, -1) * attention.temperature).softmax(-1) @ v
    expected = attention.proj(mixed.permute(0, 3, 1, 2).reshape(2, 5, 16))
    assert torch.allclose(attention(x), expected, rtol=0, atol=1e-12)


# Parameters that no output depends on ---------------------------------------------------------------------------


@every_form
def test_unused_entries_change_no_bit_of_the_logits(form: str) -> None:
    model = tiny(form)
    x = seeded((1, 3, 224, 224), 1)
    state = model.state_dict()
    changed = 0
    with torch.inference_mode():
        before = model(x)
        for key, value in state.items():
            if is_unused(key, model.config):
                value.copy_(torch.rand_like(value.float()) * 9)
                changed += 1
        after = model(x)
    assert changed > 50
    assert changed + len(used_state(model)) == len(state)
    assert torch.equal(before, after)


@every_form
def test_every_other_parameter_gets_a_gradient(form: str) -> None:
    """One backward pass of the tiny variant, which has every kind of block, in float64."""
    model = tiny(form).double()
    model(seeded((1, 3, 224, 224), 1).double()).square().mean().backward()
    # A softmax does not see what is added to all its inputs alike.
    no_effect = ("rel_pos.mlp.fc2.bias", "attn.keys.bias")
    wrong = []
    for name, parameter in model.named_parameters():
        if is_unused(name, model.config):
            if parameter.grad is not None:
                wrong.append(f"{name}: unused, but reached")
        elif parameter.grad is None:
            wrong.append(f"{name}: not reached")
        elif (parameter.grad.abs().max().item() < 1e-14) != name.endswith(no_effect):
            wrong.append(f"{name}: largest gradient {parameter.grad.abs().max().item():.1e}")
    assert wrong == []


@every_form
def test_exactly_the_used_modules_are_called(form: str) -> None:
    """Buffers have no gradient: what is called uses its own."""
    model = tiny(form)
    owners = {name for name, module in model.named_modules() if module.state_dict(keep_vars=True) and leaf(module)}
    called: set[str] = set()
    for name, module in model.named_modules():
        if name in owners:
            module.register_forward_hook(lambda _m, _i, _o, name=name: called.add(name))
    with torch.inference_mode():
        model(seeded((1, 1, 224, 224), 1))
    assert called == {name for name in owners if not is_unused(f"{name}.", model.config)}


def leaf(module: nn.Module) -> bool:
    return not list(module.children())


# Input, classes, training mode ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [(3, 224, 224), (1, 2, 224, 224), (1, 4, 224, 224), (1, 3, 224, 225), (1, 3, 112, 224), (1, 224, 224, 3)],
    ids=str,
)
def test_an_input_of_another_shape_is_refused_with_its_shape(shape: tuple[int, ...]) -> None:
    model = tiny("dual_attention")
    with pytest.raises(ValueError, match=r"^x: got shape") as caught:
        model(torch.zeros(shape))
    assert str(caught.value) == f"x: got shape {shape}, expected (B, 1 or 3, 224, 224). Resize the image."


@every_form
@pytest.mark.parametrize("classes", [2, 3, 256])
def test_any_number_of_classes_and_any_batch_works(form: str, classes: int) -> None:
    model = tiny(form, classes)
    x = seeded((2, 1, IMAGE_SIZE, IMAGE_SIZE), 3)
    with torch.inference_mode():
        logits = model(x)
        alone = model(x[1:])
    assert logits.shape == (2, classes, IMAGE_SIZE, IMAGE_SIZE)
    # The batch changes the order of sums in a matrix product: rounding, of logits up to 5.
    assert torch.allclose(logits[1:], alone, rtol=0, atol=1e-5 * logits.abs().max().item())


def test_a_grey_input_is_repeated_to_three_channels() -> None:
    model = tiny("dual_attention")
    x = seeded((1, 1, 224, 224), 2)
    with torch.inference_mode():
        assert torch.equal(model(x), model(x.repeat(1, 3, 1, 1)))


def test_the_position_mlp_drops_an_eighth_of_its_hidden_values_in_training_only() -> None:
    torch.manual_seed(0)
    mlp = RelativePosition(1).mlp
    mlp.fc2 = nn.Identity()  # type: ignore[assignment]
    nn.init.ones_(mlp.fc1.bias)
    nn.init.zeros_(mlp.fc1.weight)  # so that every hidden value is 1
    offsets = torch.zeros(169, 2)
    assert torch.equal(mlp.eval()(offsets), torch.ones(169, 512))
    trained = mlp.train()(offsets)
    kept = trained[trained != 0]
    assert torch.allclose(kept, torch.tensor(1 / 0.875))
    assert abs(kept.numel() / trained.numel() - 0.875) < 0.005  # 86,528 draws: four standard deviations


def test_the_position_mlp_is_the_only_random_part_of_training_mode() -> None:
    model = tiny("dual_attention").train()
    x = seeded((2, 3, 224, 224), 1)
    with torch.no_grad():
        assert not torch.equal(model(x), model(x))
        for module in model.modules():
            if isinstance(module, RelativePosition):
                module.eval()
        assert torch.equal(model(x), model(x))


def test_layer_scales_start_as_in_the_public_code() -> None:
    model = MSA2Net(VARIANTS["tiny"])
    gammas = {module.gamma.detach().unique().item() for module in model.modules() if isinstance(module, LayerScale)}
    scales = {p.detach().unique().item() for name, p in model.named_parameters() if "layer_scale" in name}
    assert gammas == {np.float32(1e-6).item()}
    assert scales == {np.float32(1e-2).item()}


# Configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"num_classes": 1}, "num_classes: got 1, expected 2 to 256, the background included"),
        ({"num_classes": 257}, "num_classes: got 257, expected 2 to 256, the background included"),
        ({"deep_decoder": "mlp"}, "deep_decoder: got 'mlp', expected one of dual_attention, lka"),
        ({"width": 100}, "width: got 100, expected a multiple of head_width (32) and of 2"),
        ({"width": 17, "head_width": 17}, "width: got 17, expected a multiple of head_width (17) and of 2"),
        ({"depths": (2, 2, 5)}, "depths: got (2, 2, 5), expected four numbers of at least 1"),
        ({"depths": (2, 2, 0, 2)}, "depths: got (2, 2, 0, 2), expected four numbers of at least 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_config_that_gives_no_network_is_refused_by_field(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match="got") as caught:
        ModelConfig(**fields)
    assert str(caught.value) == text


@pytest.mark.parametrize("name", list(VARIANTS))
@every_form
def test_a_config_survives_json(name: str, form: str) -> None:
    config = replace(VARIANTS[name], deep_decoder=form, num_classes=5)
    assert ModelConfig.from_json(config.to_json()) == config
    assert variant_name(config) == name
    assert variant_name(replace(config, width=2 * config.width)) == "custom"


def test_an_unknown_field_of_a_config_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^window: unknown field, expected deep_decoder, depths, head_width, num_cl"):
        ModelConfig.from_json({"window": 7})


def test_the_network_runs_on_the_meta_device_where_its_arithmetic_is_counted() -> None:
    assert machine.multiply_adds(Bundle(DEMO_BUNDLE).manifest) == 316_320_296
