"""The OpenVINO IR: model.xml and model.bin, weights in float32, read from the ONNX file."""

from __future__ import annotations

from pathlib import Path

import openvino
from openvino.passes import ConstantFolding, Manager


def write(onnx_file: Path, xml: Path) -> dict[str, str]:
    """Converts the ONNX file to `xml` and its `.bin` beside it; returns versions.

    `Core.read_model` is used because `openvino.convert_model` reports its use over the network.
    """
    model = openvino.Core().read_model(onnx_file)
    # Every shape is fixed, so the importer's shape arithmetic is constant: over a third of its nodes.
    manager = Manager()
    manager.register_pass(ConstantFolding())
    manager.run_passes(model)
    xml.parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(model, xml, compress_to_fp16=False)
    return {"openvino": openvino.__version__.split("-")[0]}
