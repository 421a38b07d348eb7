"""Lower precisions: what a CPU can run, what is asked for by name, and the scan's figures."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

import msa2net.runtimes.backends as backends
from msa2net.errors import ExportError
from msa2net.export import pipeline, precision


@pytest.mark.parametrize(
    ("node", "place"),
    [
        ("backbone.backbone.stages.2.blocks.4.attn_grid.mlp.fc2/linear_71", "stages.2.blocks.4"),
        ("backbone.backbone.stem.conv1/conv2d", "stem"),
        ("decoder_0.layer_up/mul", "decoder_0.layer_up"),
        ("MVN.51", "other"),
    ],
)
def test_a_node_is_of_the_place_that_its_name_tells(node: str, place: str) -> None:
    assert precision.place_of(node) == place


def test_a_precision_that_no_runtime_has_is_refused() -> None:
    with pytest.raises(ExportError, match="precisions: got 'bf16', expected what a runtime has"):
        pipeline._artifacts(("onnxruntime",), ("fp32", "bf16"))


def test_bf16_is_refused_where_it_cannot_be_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "cpu_lacks", lambda name: "AVX512_BF16" if name == "bf16" else "")
    with pytest.raises(ExportError, match="openvino bf16: this CPU cannot run bf16, it has no AVX512_BF16"):
        pipeline._artifacts(("openvino",), ("bf16",))


def test_the_error_is_of_the_pixels_near_a_change_of_class() -> None:
    want = np.zeros((1, 2, 10, 10), np.float32)
    want[0, 1] = np.arange(1, 101, dtype=np.float32).reshape(10, 10)
    far, near = want.copy(), want.copy()
    far[0, 1, 9] += 5
    near[0, 1, 0] += 5
    assert precision.boundary_error([want], [far]) == 0
    assert precision.boundary_error([want], [near]) == pytest.approx(5)


def test_the_nodes_of_a_kept_place_are_marked_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text(
        '<net><layers><layer name="decoder_0/add" type="Add"><data/><output/></layer>'
        '<layer name="decoder_1/add" type="Add"/><layer name="decoder_0/c" type="Const"/></layers></net>'
    )
    assert precision.keep(tmp_path / "a.xml", tmp_path / "b.xml", ["decoder_0"]) == 1
    first, second, constant = ElementTree.parse(tmp_path / "b.xml").getroot().iter("layer")
    assert [child.tag for child in first] == ["data", "rt_info", "output"]
    assert len(second) == len(constant) == 0
