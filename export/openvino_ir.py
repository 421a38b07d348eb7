"""The OpenVINO IR: model.xml and model.bin, weights in float32, read from the ONNX file."""

from __future__ import annotations

import re
from pathlib import Path

import openvino
from openvino.passes import ConstantFolding, Manager

_COUNTED = re.compile(r"[A-Z][A-Za-z]*_[0-9]+")  # Reshape_5766


def write(onnx_file: Path, xml: Path) -> dict[str, str]:
    """Converts the ONNX file to `xml` and its `.bin` beside it; returns versions.

    `Core.read_model` is used because `openvino.convert_model` reports its use over the network.
    """
    model = openvino.Core().read_model(onnx_file)
    # Every shape is fixed, so the importer's shape arithmetic is constant: over a third of its nodes.
    manager = Manager()
    manager.register_pass(ConstantFolding())
    manager.run_passes(model)
    # A node without a name gets one from a counter of the process: numbered here, the same model gives the same file.
    for index, node in enumerate(model.get_ordered_ops()):
        if _COUNTED.fullmatch(node.get_friendly_name()):
            node.set_friendly_name(f"{node.get_type_name()}.{index}")
    xml.parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(model, xml, compress_to_fp16=False)
    return {"openvino": openvino.__version__.split("-")[0]}
