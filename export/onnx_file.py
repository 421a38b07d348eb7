"""The ONNX file: opset 20, IR version 10 at most, one file with its weights inside."""

from __future__ import annotations

import ast
import logging
import warnings
from pathlib import Path

import onnx
import onnxruntime
import torch

from msa2net.core.config import IMAGE_SIZE
from msa2net.core.network import MSA2Net
from msa2net.errors import ExportError
from msa2net.export.precision import Infer, Logits

OPSET, IR_VERSION = 20, 10


def write(model: MSA2Net, channels: int, file: Path, batch: int = 1) -> dict[str, str]:
    """Writes a network as `image` (1, channels, 224, 224) float32 -> `logits` (1, K, 224, 224); returns versions.

    batch   if above 1, both take 1 to `batch` images

    Raises ExportError if the exporter leaves anything but standard operators with weights inside.
    """
    example = torch.zeros(batch, channels, IMAGE_SIZE, IMAGE_SIZE)
    free = ({0: torch.export.Dim("batch", min=1, max=batch)},) if batch > 1 else None
    with warnings.catch_warnings(), _Quiet("torch.onnx"):
        warnings.simplefilter("ignore")  # of torch's own internals
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes=free,
            verbose=False,
        )
    assert program is not None  # it is None only when a file name is given
    proto = program.model_proto
    _name(proto)
    strip(proto)
    proto.ir_version = min(proto.ir_version, IR_VERSION)
    check(proto)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(proto.SerializeToString(deterministic=True))
    return {"onnx": onnx.__version__, "torch": torch.__version__, "opset": str(OPSET), "ir": str(proto.ir_version)}


def _name(proto: onnx.ModelProto) -> None:
    """Names every node `<path of its module>/<its output>`, so that a finding about a node can be read."""
    for node in proto.graph.node:
        path = ""
        for entry in node.metadata_props:
            if entry.key == "pkg.torch.onnx.name_scopes":
                path = ast.literal_eval(entry.value)[-2]
        node.name = f"{path}/{node.output[0]}"


class _Quiet:
    """Lowers a logger to errors: the exporter warns of operators of other packages that are not there."""

    def __init__(self, name: str) -> None:
        self.logger = logging.getLogger(name)

    def __enter__(self) -> None:
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self.logger.setLevel(self.level)


def strip(proto: onnx.ModelProto) -> None:
    """Removes what the exporter notes for debugging: it names source files of the exporting machine."""
    del proto.metadata_props[:]
    proto.doc_string = ""
    graph = proto.graph
    del graph.metadata_props[:]
    graph.doc_string = ""
    del graph.value_info[:]  # shapes are inferred again by every runtime
    for item in [*graph.node, *graph.initializer, *graph.input, *graph.output]:
        item.doc_string = ""
        del item.metadata_props[:]
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.DEFAULT:
            tensor.ClearField("data_location")  # that the weights are inside goes without saying


def check(proto: onnx.ModelProto) -> None:
    onnx.checker.check_model(proto, full_check=True)
    opsets = {(entry.domain, entry.version) for entry in proto.opset_import}
    external = [tensor.name for tensor in proto.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    if opsets != {("", OPSET)} or proto.functions or external:
        raise ExportError(
            "ONNX",
            f"opsets {sorted(opsets)}, {len(proto.functions)} functions, {len(external)} external tensors",
            f"expected opset {OPSET} alone, no functions, weights inside",
            "This torch version exports differently: report it.",
        )


def session(proto: onnx.ModelProto, fuse: bool = True) -> onnxruntime.InferenceSession:
    """ONNX Runtime on one thread: the same model and image give the same bits on every machine of a kind.

    fuse   False: every node as it stands, so that a product between Q/DQ nodes is one of floats, on any CPU
    """
    options = onnxruntime.SessionOptions()
    if not fuse:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def runner(proto: onnx.ModelProto, fuse: bool = True) -> Infer:
    """The model as a function of an image (1, C, h, w) float32; `fuse` as in `session`."""
    opened = session(proto, fuse)
    name = opened.get_inputs()[0].name

    def infer(x: Logits) -> Logits:
        logits: Logits = opened.run(None, {name: x})[0]
        return logits

    return infer
