"""The OpenVINO IR: model.xml and model.bin, weights in float32, read from the ONNX file; and the same in bf16."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import openvino
from numpy.typing import NDArray
from openvino.passes import ConstantFolding, Manager

from msa2net.export.precision import Infer, Logits, place_of

_COUNTED = re.compile(r"[A-Z][A-Za-z]*_[0-9]+")  # Reshape_5766
_NOT_RUN = ("Const", "Parameter", "Result")


def write(onnx_file: Path, xml: Path) -> dict[str, str]:
    """Converts the ONNX file to `xml` and its `.bin` beside it; returns versions.

    `Core.read_model` is used because `openvino.convert_model` reports its use over the network.
    """
    model = openvino.Core().read_model(onnx_file)
    # Every shape is fixed, so the importer's shape arithmetic is constant: over a third of its nodes.
    manager = Manager()
    manager.register_pass(ConstantFolding())
    manager.run_passes(model)
    number_unnamed(model)
    xml.parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(model, xml, compress_to_fp16=False)
    return {"openvino": openvino.__version__.split("-")[0]}


def number_unnamed(model: openvino.Model) -> None:
    """A node without a name gets one from a counter of the process: numbered, the same model gives the same file."""
    for index, node in enumerate(model.get_ordered_ops()):
        if _COUNTED.fullmatch(node.get_friendly_name()):
            node.set_friendly_name(f"{node.get_type_name()}.{index}")


def keep(xml: Path, target: Path, places: Collection[str]) -> int:
    """Writes the IR anew with the nodes of some places marked to run in fp32; returns how many there are."""
    tree = ElementTree.parse(xml)
    marked = 0
    for layer in tree.getroot().iter("layer"):
        if layer.get("type") in _NOT_RUN or place_of(layer.get("name", "")) not in places:
            continue
        mark(layer)
        marked += 1
    tree.write(target, encoding="utf-8", xml_declaration=True)
    return marked


def mark(layer: ElementTree.Element) -> None:
    """Lets a layer of an IR run in fp32 whatever the precision of the rest."""
    info = layer.find("rt_info")
    if info is None:
        info = ElementTree.Element("rt_info")
        layer.insert(1 if layer.find("data") is not None else 0, info)
    if info.find("attribute[@name='precise']") is None:
        ElementTree.SubElement(info, "attribute", name="precise", version="0")


class Bf16:
    """See `msa2net.export.precision.Lowering`. The weights stay those of fp32: both artifacts list the same `.bin`.

    files    the fp32 IR's `.xml` and `.bin`, below `folder`
    target   the `.xml` for the artifact with places marked, below `folder`
    """

    def __init__(self, folder: Path, files: Sequence[str], target: str) -> None:
        self._folder, self._files, self._target = folder, tuple(files), target
        layers = ElementTree.parse(folder / files[0]).getroot().iter("layer")
        named = {place_of(layer.get("name", "")) for layer in layers if layer.get("type") not in _NOT_RUN}
        self.places = tuple(sorted(named))

    def reference(self) -> Infer:
        return self._compiled(self._files[0], openvino.Type.f32)

    def infer(self, kept: Collection[str]) -> Infer:
        return self._compiled(self.write(kept)[0], openvino.Type.bf16)

    def write(self, kept: Collection[str]) -> tuple[str, ...]:
        if not kept:
            (self._folder / self._target).unlink(missing_ok=True)
            return self._files
        keep(self._folder / self._files[0], self._folder / self._target, kept)
        return self._target, self._files[1]

    def _compiled(self, xml: str, precision: openvino.Type) -> Infer:
        return runner(openvino.Core().read_model(self._folder / xml, self._folder / self._files[1]), precision)


def runner(model: openvino.Model, precision: openvino.Type) -> Infer:
    """The model on the CPU, on one thread, as a function of an image (1, C, h, w) float32."""
    config = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 1}
    request = openvino.Core().compile_model(model, "CPU", config).create_infer_request()

    def infer(x: NDArray[np.float32]) -> Logits:
        logits: Logits = next(iter(request.infer([x]).values())).copy()
        return logits

    return infer
