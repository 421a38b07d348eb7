"""Weights in and out: what is read, what is refused and in which words."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from msa2net.core import checkpoint as module
from msa2net.core.checkpoint import (
    Checkpoint,
    config_of,
    load_model,
    model_by_rule,
    read_checkpoint,
    save_checkpoint,
    used_state,
)
from msa2net.core.config import VARIANTS, ModelConfig
from msa2net.core.network import MSA2Net, is_unused
from msa2net.errors import CheckpointError

FORMS = ("dual_attention", "lka")
TINY = replace(VARIANTS["tiny"], num_classes=3)
every_form = pytest.mark.parametrize("form", FORMS)


def tiny_state(form: str = "dual_attention") -> dict[str, Tensor]:
    return model_by_rule(replace(TINY, deep_decoder=form)).state_dict()


def of_state(state: dict[str, Tensor]) -> Checkpoint:
    return Checkpoint(Path("w.safetensors"), state)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


# Reading --------------------------------------------------------------------------------------------------------


@every_form
def test_safetensors_come_back_bit_for_bit_with_their_metadata(tmp_path: Path, form: str) -> None:
    state = tiny_state(form)
    save_checkpoint(tmp_path / "w.safetensors", state, {"model": "demo", "mean": "[0.5]"})
    read = read_checkpoint(str(tmp_path / "w.safetensors"))
    assert equal(read.state, state)
    assert read.metadata == {"model": "demo", "mean": "[0.5]"}
    model = load_model(read)
    assert model.config == replace(TINY, deep_decoder=form)
    assert not model.training
    assert equal(model.state_dict(), state)


@pytest.mark.parametrize(
    ("ending", "form", "wrap"),
    [
        (".pth", "dual_attention", lambda state: state),
        (".pt", "lka", lambda state: {"epoch": 7, "state_dict": state, "optimizer": {"lr": 0.1}}),
        (".pth", "lka", lambda state: {"model": {f"module.{key}": value for key, value in state.items()}}),
    ],
    ids=["plain", "nested", "nested-parallel"],
)
def test_pickled_weights_come_back_bit_for_bit(tmp_path: Path, ending: str, form: str, wrap: object) -> None:
    state = tiny_state(form)
    path = tmp_path / f"w{ending}"
    torch.save(wrap(state), path)  # type: ignore[operator]
    read = read_checkpoint(path)
    assert equal(read.state, state)
    assert read.path == path
    assert config_of(read).deep_decoder == form


def test_the_prefix_of_parallel_training_is_removed(tmp_path: Path) -> None:
    state = tiny_state()
    save_checkpoint(tmp_path / "w.safetensors", {f"module.{key}": value for key, value in state.items()})
    assert equal(read_checkpoint(tmp_path / "w.safetensors").state, state)


def test_a_key_with_and_without_the_prefix_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "w.safetensors", {"module.a.weight": torch.ones(2), "a.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"holds a.weight with and without 'module.', expected it once"):
        read_checkpoint(tmp_path / "w.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_of_another_float_type_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    state = tiny_state()
    other = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    save_checkpoint(tmp_path / "w.safetensors", other)
    read = read_checkpoint(tmp_path / "w.safetensors").state
    assert {value.dtype for value in read.values()} == {torch.float32, torch.int64}
    assert all(torch.equal(read[key], other[key].to(read[key].dtype)) for key in state)


# Which network --------------------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("classes", [2, 9])
def test_the_sizes_are_read_from_the_shapes(form: str, variant: str, classes: int) -> None:
    config = replace(VARIANTS[variant], deep_decoder=form, num_classes=classes)
    with torch.device("meta"):
        state = MSA2Net(config).state_dict()
    assert config_of(of_state(state)) == config


def test_the_sizes_of_a_variant_without_a_name_are_read_too() -> None:
    config = ModelConfig(num_classes=4, stem=(8, 24), width=32, depths=(1, 2, 1, 3), head_width=8)
    with torch.device("meta"):
        state = MSA2Net(config).state_dict()
    assert config_of(of_state(state)) == config


# What is refused ------------------------------------------------------------------------------------------------


def test_missing_unexpected_and_misshaped_keys_are_all_listed() -> None:
    state = tiny_state()
    del state["decoder_0.last_layer.bias"]
    state["decoder_0.extra.weight"] = torch.zeros(1)
    state["decoder_1.x1_linear.bias"] = torch.zeros(31)
    with pytest.raises(CheckpointError) as caught:
        load_model(of_state(state))
    assert str(caught.value) == (
        "w.safetensors: 1 missing: decoder_0.last_layer.bias; 1 unexpected: decoder_0.extra.weight; "
        "1 mis-shaped: decoder_1.x1_linear.bias (31,) instead of (32,), "
        f"expected exactly the {len(tiny_state())} keys of the dual_attention form"
    )


def test_a_long_list_of_keys_is_cut_after_five() -> None:
    state = {key: value for key, value in tiny_state().items() if ".attn_grid." not in key}
    with pytest.raises(CheckpointError) as caught:
        load_model(of_state(state))
    listed = caught.value.found.removesuffix(", …").partition(" missing: ")
    assert int(listed[0]) > 50
    assert len(listed[2].split(", ")) == 5


def test_a_checkpoint_does_not_load_into_another_forms_network() -> None:
    with pytest.raises(CheckpointError, match=r"missing: decoder_2.*unexpected: decoder_2.*of the lka form"):
        load_model(of_state(tiny_state("dual_attention")), replace(TINY, deep_decoder="lka"))


@pytest.mark.parametrize(
    "state",
    [
        {"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.weight": torch.zeros(1000, 512)},
        {f"stages.{i}.weight": torch.zeros(1) for i in range(4)},
    ],
    ids=["resnet", "encoder-alone"],
)
def test_another_networks_file_is_refused_by_the_first_key_it_lacks(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_checkpoint(tmp_path / "w.safetensors", state)
    with pytest.raises(CheckpointError) as caught:
        load_model(read_checkpoint(tmp_path / "w.safetensors"))
    assert str(caught.value) == (
        f"{tmp_path / 'w.safetensors'}: the key decoder_2.layer_lka_1.norm1.weight is missing, expected the keys of an "
        "MSA2Net state_dict. Is this a checkpoint of another network, or of its encoder alone?"
    )


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("decoder_0.last_layer.weight", torch.tensor(1.0), r"its shapes give no network \(num_classes: got 1"),
        ("decoder_0.last_layer.weight", torch.zeros(0, 16, 1, 1), "decoder_0.last_layer.weight is empty"),
        ("decoder_0.last_layer.weight", torch.zeros(300, 16, 1, 1), r"num_classes: got 300, expected 2 to 256"),
        (
            "backbone.backbone.stages.0.blocks.0.attn_block.attn.rel_pos.mlp.fc2.weight",
            torch.zeros(17, 512),
            "its shapes give no network",
        ),
        (
            "backbone.backbone.stages.0.blocks.0.conv.conv3_1x1.weight",
            torch.zeros(17, 64, 1, 1),
            r"width: got 17, expected a multiple",
        ),
    ],
    ids=["scalar", "empty", "300-classes", "more-heads-than-channels", "odd-width"],
)
def test_shapes_that_give_no_network_are_refused(key: str, value: Tensor, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        load_model(of_state(tiny_state() | {key: value}))


def test_a_missing_stage_is_refused() -> None:
    state = {key: value for key, value in tiny_state().items() if ".stages.2." not in key}
    with pytest.raises(CheckpointError, match=r"depths: got \(1, 1, 0, 1\), expected four numbers of at least 1"):
        load_model(of_state(state))


@pytest.mark.parametrize("keep", [0, 5, 4000, -1], ids=["empty", "in-the-length", "in-the-header", "last-byte"])
def test_a_truncated_safetensors_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "w.safetensors"
    save_checkpoint(path, tiny_state())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"w.safetensors: cannot be read \(.*\), expected a whole safetensors fi"):
        read_checkpoint(path)


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_a_missing_file_is_named(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"none{ending}"
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert str(caught.value) == f"{path}: no such file, expected a checkpoint. Check the path."


@pytest.mark.parametrize("name", ["w.onnx", "w", "w.safetensors.gz"])
def test_another_ending_is_refused_before_the_file_is_opened(name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(name)
    assert (
        str(caught.value)
        == f"{name}: got the ending {Path(name).suffix!r}, expected .safetensors, .pth, .pt. Convert it."
    )


class Evil:
    """Runs a command when it is unpickled without care."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "bare-pickle"])
def test_a_pickle_that_runs_a_command_is_refused_and_does_not_run_it(tmp_path: Path, legacy: bool) -> None:
    marker, path = tmp_path / "marker", tmp_path / "evil.pth"
    content = {"decoder_0.last_layer.bias": torch.zeros(2), "x": Evil(f"touch '{marker}'")}
    if legacy:
        path.write_bytes(pickle.dumps({"x": Evil(f"touch '{marker}'")}))
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert not marker.exists()
    assert str(caught.value).startswith(f"{path}: cannot be unpickled as weights only (")
    assert str(caught.value).endswith(
        "expected a state_dict of tensors and nothing else. Save model.state_dict(), best as .safetensors."
    )
    assert "weights_only" not in str(caught.value)  # torch's own message advises to switch it off
    if not legacy:
        assert "unsupported GLOBAL posix.system" in str(caught.value)
        # The trap is armed: unpickled without care it does run.
        torch.load(path, weights_only=False)
        assert marker.exists()


@pytest.mark.parametrize("content", [{"a": [1, 2]}, [torch.zeros(1)], {"state_dict": {"a": "text"}}], ids=str)
def test_a_pickle_of_anything_but_tensors_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"weights only \(it does not hold a dictionary of tensors\), expected a"):
        read_checkpoint(tmp_path / "w.pth")


def test_a_truncated_pth_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(tiny_state(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"w.pth: cannot be unpickled as weights only \(RuntimeError "):
        read_checkpoint(path)


# Unused entries -------------------------------------------------------------------------------------------------


@every_form
def test_unused_keys_may_be_absent_and_are_zero_then(form: str) -> None:
    model = model_by_rule(replace(TINY, deep_decoder=form))
    carried = used_state(model)
    loaded = load_model(of_state(dict(carried))).state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[key], value) for key, value in carried.items())
    assert not any(loaded[key].any() for key in loaded.keys() - carried.keys())
    assert all(is_unused(key, model.config) for key in loaded.keys() - carried.keys())


@pytest.mark.parametrize(
    "key",
    [
        "backbone.backbone.norm.bias",
        "decoder_3.layer_up.norm.weight",
        "decoder_1.ag_attn.bn.running_var",
        "decoder_1.ag_attn.bn.num_batches_tracked",
        "decoder_2.ag_attn.selection.bias",
    ],
)
def test_no_used_key_may_be_absent(key: str) -> None:
    state = tiny_state()
    del state[key]
    with pytest.raises(CheckpointError, match=f"^w.safetensors: 1 missing: {key}, expected exactly the"):
        load_model(of_state(state))


# Writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["while writing", "before the rename"])
def test_a_save_that_dies_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    path = tmp_path / "w.safetensors"
    save_checkpoint(path, {"a": torch.zeros(4)}, {"model": "old"})
    before = path.read_bytes()

    def die(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    def write_half(_state: object, file: Path, _metadata: object) -> None:
        file.write_bytes(b"half")
        die()

    if place == "while writing":
        monkeypatch.setattr(module, "save_file", write_half)
    else:
        monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(OSError, match="the disk is full"):
        save_checkpoint(path, {"a": torch.ones(4)})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_save_replaces_the_old_file_and_takes_views(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_checkpoint(path, {"a": torch.zeros(4)}, {"model": "old"})
    value = torch.arange(6.0, requires_grad=True).view(2, 3).T
    save_checkpoint(path, {"a": value})
    read = read_checkpoint(path)
    assert torch.equal(read.state["a"], value)
    assert read.metadata == {}
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


def test_the_same_weights_are_saved_as_the_same_bytes(tmp_path: Path) -> None:
    """Ten times, as the library shuffles metadata."""
    state = tiny_state()
    metadata = {"notice": "Größe “n”\t\\\x1f", "b": "1", "a": "2", "z": '["x", "y"]'}
    saved = set()
    for i in range(10):
        path = tmp_path / f"{i}.safetensors"
        order = list(state) if i % 2 else list(reversed(state))
        save_checkpoint(path, {key: state[key] for key in order}, dict(reversed(metadata.items())))
        saved.add(path.read_bytes())
    assert len(saved) == 1
    read = read_checkpoint(path)
    assert read.metadata == metadata
    assert equal(read.state, state)


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    state = model_by_rule(replace(VARIANTS["tiny"], num_classes=2)).state_dict()
    state["decoder_0.last_layer.bias"][1] = torch.nan
    with pytest.raises(CheckpointError) as caught:
        load_model(Checkpoint(Path("diverged.safetensors"), state))
    assert str(caught.value) == (
        "diverged.safetensors: NaN or infinity in decoder_0.last_layer.bias, expected finite weights. "
        "Did the training diverge?"
    )
