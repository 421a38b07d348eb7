"""int8: static post-training quantization, as ONNX with Q/DQ nodes and, by NNCF, as OpenVINO IR.

Weights are symmetric with a scale for each output channel, activations have a zero point and one scale. Both tools
quantize the whole network once; a place that is kept in higher precision then loses its quantizers and gets the weights
of fp32 back, so that the ranges of the others stay as they are.

`narrow` is the portable artifact: weights of 7 bits. A CPU without VNNI adds two products of 8 bits in 16 and cuts off
what does not fit, in silence; products with 7 bits always fit.
"""

from __future__ import annotations

import io
import logging
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
from numpy.typing import NDArray

from msa2net.errors import ExportError
from msa2net.export import onnx_file, openvino_ir
from msa2net.export.precision import Infer, Logits, boundary_error, place_of

Tensors = Sequence[NDArray[np.float32]]
# These only move numbers, so a rounding before them is of what comes after.
_MOVES = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Split", "VariadicSplit", "Concat", "Gather", "StridedSlice"}


def fine_place(node: str) -> str:
    """The layer that a node of this name is of, or the product of two activations: `stages.0.blocks.0.conv.se.fc1`."""
    block = place_of(node)
    module, _, what = node.partition("/")
    if block == "other":
        return module
    place = module[module.index(block) :]
    return f"{place}/{what.rpartition('_')[0] or what}" if what.startswith("matmul") else place


class _Int8:
    """See `msa2net.export.precision.Lowering`; `methods` is the error of each range method, of which the best is used.

    files      of the fp32 artifact, and `target`, the int8 one's first: paths below `folder`
    inputs     (1, C, h, w) float32, from which ranges are taken, and `held`, on which methods are compared
    narrow     weights of 7 bits
    """

    places: tuple[str, ...]

    def __init__(
        self,
        folder: Path,
        files: Sequence[str],
        target: str,
        inputs: Tensors,
        held: Tensors,
        narrow: bool,
        tick: Callable[[str], object] = len,
    ) -> None:
        self._folder, self._target, self._narrow = folder, target, narrow
        self._read([folder / file for file in files])
        expected = _run(self.reference(), held)
        found = {}
        self.methods: dict[str, float] = {}
        for method, quantization in self._quantizations(inputs, tick):
            found[method] = self._quantization = quantization
            self.methods[method] = boundary_error(expected, _run(self.infer(()), held))
        self._quantization = found[min(self.methods, key=self.methods.__getitem__)]
        self.places = self._places()

    def _read(self, files: Sequence[Path]) -> None:
        raise NotImplementedError

    def _quantizations(self, inputs: Tensors, tick: Callable[[str], object]) -> Iterator[tuple[str, Any]]:
        """By range method, what `infer` and `write` need of it."""
        raise NotImplementedError

    def _places(self) -> tuple[str, ...]:
        raise NotImplementedError

    def reference(self) -> Infer:
        raise NotImplementedError

    def infer(self, kept: Collection[str]) -> Infer:
        raise NotImplementedError

    def write(self, kept: Collection[str]) -> tuple[str, ...]:
        raise NotImplementedError


class OpenVinoInt8(_Int8):
    """`files` and `target` name an IR; a quantization is the model with FakeQuantize nodes."""

    def _read(self, files: Sequence[Path]) -> None:
        self._fp32 = openvino.Core().read_model(*files)
        self._plain = {node.get_friendly_name(): node for node in self._fp32.get_ops()}

    def _quantizations(self, inputs: Tensors, tick: Callable[[str], object]) -> Iterator[tuple[str, Any]]:
        for method in NNCF_METHODS:
            tick(f"ranges by {method}")
            yield method, _nncf(self._fp32.clone(), inputs, method, self._narrow)

    def _places(self) -> tuple[str, ...]:
        return tuple(sorted({place for places, *_ in self._quantizers(self._quantization) for place in places}))

    def reference(self) -> Infer:
        return openvino_ir.runner(self._fp32, openvino.Type.f32)

    def infer(self, kept: Collection[str]) -> Infer:
        return openvino_ir.runner(self._stripped(kept), openvino.Type.f32)

    def write(self, kept: Collection[str]) -> tuple[str, ...]:
        model = self._stripped(kept)
        openvino_ir.number_unnamed(model)
        openvino.save_model(model, self._folder / self._target, compress_to_fp16=False)
        return self._target, str(Path(self._target).with_suffix(".bin"))

    def _quantizers(self, model: Any) -> Iterator[tuple[set[str], Any, Any]]:
        """Every input that is rounded: the places that read it, the input, and what it reads in fp32."""
        for node in model.get_ops():
            plain = self._plain.get(node.get_friendly_name())
            for i, port in enumerate(node.inputs()):
                given = port.get_source_output().get_node()
                if given.get_type_name() == "FakeQuantize":
                    yield set(map(fine_place, _readers(port))), port, given.input_value(0)
                elif plain is not None and given.get_type_name() != "Constant":
                    weights = plain.input_value(i).get_node()
                    if weights.get_type_name() == "Constant":
                        yield {fine_place(node.get_friendly_name())}, port, weights

    def _stripped(self, kept: Collection[str]) -> Any:
        model = self._quantization.clone()
        for places, port, source in list(self._quantizers(model)):
            if not places <= set(kept):
                continue
            if isinstance(source, openvino.Node):
                weights = openvino.opset13.constant(source.data)
                weights.set_friendly_name(source.get_friendly_name())
                source = weights.output(0)
            port.replace_source_output(source)
        return model


def _readers(port: Any) -> set[str]:
    """The names of the nodes that compute with what this input reads, past those that only move it."""
    node = port.get_node()
    if node.get_type_name() not in _MOVES:
        return {node.get_friendly_name()}
    return {name for output in node.outputs() for target in output.get_target_inputs() for name in _readers(target)}


def _run(infer: Infer, inputs: Tensors) -> list[Logits]:
    return [infer(each) for each in inputs]


def _import_nncf() -> Any:
    """The package, imported without the telemetry client that it would report its use with."""
    if "nncf" in sys.modules:
        return sys.modules["nncf"]
    client = "openvino_telemetry"
    before = sys.modules.get(client)
    sys.modules[client] = None  # type: ignore[assignment]
    try:
        import nncf
    except ImportError as error:
        raise ExportError(
            "int8 for openvino", f"needs the package {error.name}", "", "pip install 'msa2net-edge[export]'"
        ) from error
    finally:
        del sys.modules[client]
        if before:
            sys.modules[client] = before
    logging.getLogger("nncf").setLevel(logging.ERROR)
    return nncf


NNCF_METHODS = {"mean of extremes": "MEAN_MINMAX", "extremes": "MINMAX", "histogram": "HISTOGRAM"}


def _nncf(model: Any, inputs: Tensors, method: str, narrow: bool) -> Any:
    """The model with FakeQuantize nodes, and its weights in int8."""
    nncf = _import_nncf()
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    # Smoothing and bias correction would change other nodes' constants; measured, neither gains anything here.
    parameters = nncf.AdvancedQuantizationParameters(
        overflow_fix=nncf.OverflowFix.ENABLE if narrow else nncf.OverflowFix.DISABLE,
        smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=-1, convolution=-1),
        disable_bias_correction=True,
        activations_range_estimator_params=getattr(RangeEstimatorParametersSet, NNCF_METHODS[method]),
    )
    with redirect_stdout(io.StringIO()):  # its own progress bars
        return nncf.quantize(
            model,
            nncf.Dataset(list(inputs)),
            subset_size=len(inputs),
            model_type=nncf.ModelType.TRANSFORMER,
            advanced_parameters=parameters,
        )


_BINS = 2048  # of the histograms of "least squares"
_QUANTIZED = ("Conv", "Gemm", "MatMul")


class OnnxInt8(_Int8):
    """`files` and `target` name one ONNX file each; a quantization is the range of every tensor."""

    def _read(self, files: Sequence[Path]) -> None:
        self._fp32 = _fused(files[0])
        self._nodes = quantized_nodes(self._fp32)

    def _quantizations(self, inputs: Tensors, tick: Callable[[str], object]) -> Iterator[tuple[str, Any]]:
        tick("ranges")
        for method, ranges in _ranges(self._fp32, self._nodes, inputs).items():
            tick(f"ranges by {method}")
            yield method, ranges

    def _places(self) -> tuple[str, ...]:
        return tuple(sorted(set(self._nodes.values())))

    def reference(self) -> Infer:
        return onnx_file.runner(self._fp32)

    def infer(self, kept: Collection[str]) -> Infer:
        return onnx_file.runner(self._with_quantizers(kept))

    def write(self, kept: Collection[str]) -> tuple[str, ...]:
        model = self._with_quantizers(kept)
        onnx_file.strip(model)
        onnx_file.check(model)
        (self._folder / self._target).write_bytes(model.SerializeToString(deterministic=True))
        return (self._target,)

    def _with_quantizers(self, kept: Collection[str]) -> onnx.ModelProto:
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        chosen = [name for name, place in self._nodes.items() if place not in kept]
        model = onnx.ModelProto()
        model.CopyFrom(self._fp32)
        if not chosen:
            return model
        quantizer = QDQQuantizer(
            model,
            per_channel=True,
            reduce_range=self._narrow,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=TensorsData(CalibrationMethod.MinMax, self._quantization),
            nodes_to_quantize=chosen,
            nodes_to_exclude=[],
            op_types_to_quantize=list(_QUANTIZED),
            # What a product gives is in fp32, and is rounded where the next one reads it.
            extra_options={"WeightSymmetric": True, "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        quantized: onnx.ModelProto = quantizer.model.model
        return quantized


def quantized_nodes(model: onnx.ModelProto) -> dict[str, str]:
    """The products with weights that int8 is for, by name, with the `fine_place` of each."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return {
        node.name: fine_place(node.name)
        for node in model.graph.node
        if node.op_type in _QUANTIZED and node.input[1] in weights and not _depthwise(node)
    }


def _depthwise(node: onnx.NodeProto) -> bool:
    """ONNX Runtime is slower at these in int8: with them the full network took 0.75 of fp32's time, without 0.69."""
    return any(each.name == "group" and each.i > 1 for each in node.attribute)


def _fused(file: Path) -> onnx.ModelProto:
    """The graph as ONNX Runtime fuses it, in standard operators: in Q/DQ it knows a Gemm, not a MatMul and an Add."""
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(Path(folder, "fused.onnx"))
        options.log_severity_level = 3
        onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        model = onnx.load(options.optimized_model_filepath)
    del model.opset_import[:]
    model.opset_import.append(onnx.helper.make_opsetid("", onnx_file.OPSET))  # it lists all domains that it knows
    return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


def _ranges(
    model: onnx.ModelProto, nodes: Collection[str], inputs: Tensors
) -> dict[str, dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]]:
    """By method, the least and the largest value of every tensor that the nodes read or give."""
    weights = {tensor.name for tensor in model.graph.initializer}
    read = [node for node in model.graph.node if node.name in nodes]
    names = list(
        dict.fromkeys(name for node in read for name in (*node.input[:2], *node.output) if name not in weights)
    )
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    given = {value.name for value in [*model.graph.input, *model.graph.output]}
    probed.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names if name not in given
    )
    session = onnx_file.session(probed)
    image = session.get_inputs()[0].name
    wanted = [name for name in names if name != image]

    def tensors() -> Iterator[tuple[int, int, NDArray[np.float32]]]:
        for i, tensor in enumerate(inputs):
            values = dict(zip(wanted, session.run(wanted, {image: tensor}), strict=True)) | {image: tensor}
            for j, name in enumerate(names):
                yield i, j, values[name].ravel()

    low, high = np.zeros((2, len(inputs), len(names)), np.float32)
    for i, j, flat in tensors():
        low[i, j], high[i, j] = flat.min(), flat.max()
    spans = np.stack([low.min(0), high.max(0)])
    counts = np.zeros((len(names), _BINS), np.int64)
    for _, j, flat in tensors():
        counts[j] += np.histogram(flat, _BINS, (spans[0, j], spans[1, j]))[0]
    fitted = [least_squares(a, b, count) for (a, b), count in zip(spans.T, counts, strict=True)]
    by_method = {
        "mean of extremes": np.stack([low.mean(0), high.mean(0)]),
        "extremes": spans,
        "least squares": np.array(fitted, np.float32).T,
    }
    return {
        method: {name: (a.reshape(1), b.reshape(1)) for name, a, b in zip(names, *both, strict=True)}
        for method, both in by_method.items()
    }


def least_squares(low: float, high: float, counts: NDArray[np.int64]) -> tuple[float, float]:
    """The range, within low to high, of least squared error: of what is rounded inside it and of what it cuts off.

    `counts` is the histogram of the values in bins of one width. The range holds zero, as every quantized one does.
    """
    values = low + (np.arange(counts.size) + 0.5) * (high - low) / counts.size
    shares = np.linspace(0.05, 1, 96)  # of each end
    lows, highs = (shares * end for end in (min(low, 0.0), max(high, 0.0)))
    below = np.square(np.minimum(values - lows[:, None], 0)) @ counts
    above = np.square(np.maximum(values - highs[:, None], 0)) @ counts
    rounding = np.square(highs - lows[:, None]) / (255**2 * 12) * counts.sum()  # a step's, evenly spread, is its ² / 12
    i, j = np.unravel_index(np.argmin(below[:, None] + above + rounding), rounding.shape)
    return float(lows[i]), float(highs[j])
