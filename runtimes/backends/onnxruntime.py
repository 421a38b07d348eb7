"""ONNX Runtime, on the CPU or an NVIDIA GPU.

On the CPU the second start maps weights that are already laid out as the kernels want them from the cache, instead of
holding them in memory of its own. What ONNX Runtime optimises is for one processor, so it is never part of a bundle. On
a GPU image and logits have memory there that is bound once, and every node runs there or nothing does.
"""

from __future__ import annotations

import json
import mmap
import os
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from msa2net.errors import RuntimeUnavailableError
from msa2net.runtimes.backends import ADDED, INT8, Facts, gpu_index, is_cuda, require_cpu
from msa2net.runtimes.bundle import Manifest
from msa2net.runtimes.cache import Entry, Slot
from msa2net.runtimes.graphs import fields, message, varint

PROVIDER = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
_PROVIDERS = {"cuda": (_CUDA,), "tensorrt": ("TensorrtExecutionProvider", _CUDA)}  # by device
_SETTINGS = {_CUDA: {"use_tf32": "0"}}
_MEMORY = "cuda"
_ERRORS_ONLY = 3
_PRODUCTS = {"Conv", "FusedConv", "Gemm", "MatMul", "FusedMatMul"}
_INT8_PRODUCTS = {"QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"}
_NO_COMPUTE = {"Cast", "Concat", "Gather", "Reshape", "Split", "Squeeze", "Transpose"}  # these move data
_MODEL, _DATA = "model.onnx", "model.data"
_LEAST = 1024  # bytes; smaller tensors stay in the model
_ALIGNMENT = 4096  # a tensor's place in the file that is mapped


class OnnxRuntimeBackend:
    """See `msa2net.runtimes.backends`."""

    def __init__(
        self,
        files: tuple[str, ...],
        manifest: Manifest,
        device: str,
        precision: str,
        threads: int,
        slot: Slot | None = None,
        rest: str = "fp32",
    ) -> None:
        self._threads, self._profiles = threads, None
        if device.partition(":")[0] in _PROVIDERS:
            session = _on_gpu(files[0], device, precision, self._options())
            bound = _Bound(session, manifest, device)
            self._run: Callable[[NDArray[Any]], list[NDArray[Any]]] = lambda x: [bound(x)]
            provider, *_ = session.get_providers()
            self.facts = Facts(
                version=onnxruntime.__version__,
                device=device,
                provider=provider,
                precision=precision,
                threads=0,
                built=not is_cuda(device),  # TensorRT's provider builds an engine, at every start
            )
            return
        require_cpu("onnxruntime", device, precision, ("fp32", "fp16", *INT8))
        with TemporaryDirectory() if precision != "fp32" else nullcontext() as self._profiles:
            # Of fp16, ONNX Runtime 1.32 on Arm cannot read the packed weights that it wrote.
            session = self._load(files[0], slot if precision != "fp16" else None)
            # A graph of floats runs in fp32 on this provider; one in less may do so, too, and that is read back.
            layers = self._executed(session, precision) if precision != "fp32" else {}
        image = session.get_inputs()[0].name
        self._run = lambda x: session.run(None, {image: x})
        self.facts = Facts(
            version=onnxruntime.__version__,
            device="CPU",
            provider=PROVIDER,
            precision=precision,
            threads=threads,
            layers=layers,
        )

    def _load(self, file: str, slot: Slot | None) -> Any:
        session = slot.use(self._from_cache, lambda folder: self._compile(file, folder)) if slot else None
        try:
            session = session or self._open(file, self._options())
        except Exception as error:  # its exception classes share no other base
            raise RuntimeUnavailableError(
                "runtime 'onnxruntime'", f"cannot load the model ({error})", "", "Update onnxruntime, or export again."
            ) from error
        # It drops a provider that fails to load without an error, so what it really uses is read back.
        if session.get_providers() != [PROVIDER]:
            raise RuntimeUnavailableError(
                "runtime 'onnxruntime'",
                f"runs on {session.get_providers()}",
                f"expected [{PROVIDER!r}]",
                "Reinstall onnxruntime alone, without onnxruntime-gpu.",
            )
        return session

    @staticmethod
    def _executed(session: Any, precision: str) -> dict[str, int]:
        """How many nodes compute in each precision, by the profile of one inference; no output is used.

        Raises RuntimeUnavailableError if no product is computed in the precision.
        """
        (image,) = session.get_inputs()
        nothing = np.zeros(image.shape, np.uint8 if "uint8" in image.type else np.float32)
        session.run(None, {image.name: nothing})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        ran = [
            event["args"]
            for event in events
            if "output_type_shape" in event.get("args", {}) and not event["name"].startswith(ADDED)
        ]
        kinds = [(each["op_name"], next(iter(each["output_type_shape"][0]), "")) for each in ran]
        kinds = [(name, "int8" if name in _INT8_PRODUCTS else kind) for name, kind in kinds]
        wanted = "float16" if precision == "fp16" else "int8"
        if not any(name in _PRODUCTS | _INT8_PRODUCTS and kind == wanted for name, kind in kinds):
            raise RuntimeUnavailableError(
                "runtime 'onnxruntime'",
                f"computes every product of this {precision} model in fp32",
                f"expected {precision}",
                "Use the artifact in fp32.",
            )
        return dict(sorted(Counter(kind for name, kind in kinds if name not in _NO_COMPUTE).items()))

    @staticmethod
    def compiled_for(device: str, threads: int) -> dict[str, Any] | None:
        return {"version": onnxruntime.__version__} if device == "CPU" else None

    def _options(self) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _ERRORS_ONLY
        # Threads spin from one operator to the next, which is a tenth faster than waking them, and sleep between two
        # frames: a device has other work to do.
        options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self._profiles:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(self._profiles, "profile"))
        return options

    @staticmethod
    def _open(model: str | bytes, options: Any) -> Any:
        return onnxruntime.InferenceSession(model, options, providers=[PROVIDER])

    def _compile(self, source: str, folder: Path) -> None:
        """Optimises the model and writes it with its weights, packed for the kernels, in a file of their own."""
        weights = folder / "weights"
        options = self._options()
        options.optimized_model_filepath = str(folder / _MODEL)
        for key, value in (
            ("session.model_external_initializers_file_folder_path", str(folder)),
            ("session.optimized_model_external_initializers_file_name", _DATA),
            ("session.optimized_model_external_initializers_min_size_in_bytes", str(_LEAST)),
            ("session.save_external_prepacked_constant_initializers", "1"),
        ):
            options.add_session_config_entry(key, value)
        # Parsing the whole file would hold the weights in memory twice; from a file of their own they are mapped.
        with open(source, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            model = without_weights(content, weights)
        self._open(model, options)
        weights.unlink()

    def _from_cache(self, entry: Entry) -> Any:
        options = self._options()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # it was done
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(entry.path))
        session = self._open(entry.files[_MODEL].read(), options)
        entry.require_unmoved(_DATA)
        return session

    def infer(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        (logits,) = self._run(x)
        return logits

    def run(self, x: NDArray[Any]) -> list[NDArray[Any]]:
        return self._run(x)

    def keep(self, verdict: dict[str, Any]) -> None:
        """Nothing: the engine of TensorRT's provider lies in no file."""

    def close(self) -> None:
        del self._run


def _on_gpu(file: str, device: str, precision: str, options: Any) -> Any:
    """A session on a GPU: "cuda" or "cuda:N" by CUDA's provider, "tensorrt" or "tensorrt:N" by both."""
    kind = device.partition(":")[0]
    index = gpu_index("onnxruntime", device, kind)
    place, providers = "runtime 'onnxruntime'", _PROVIDERS[kind]
    if precision not in ("fp32", "fp16"):
        raise RuntimeUnavailableError(
            place, f"got precision {precision!r} on a GPU", "expected 'fp32' or 'fp16'", "TensorRT's int8 runs there."
        )
    if kind == "tensorrt" and precision == "fp32" and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0":
        raise RuntimeUnavailableError(
            place,
            "TensorRT's provider would compute float32 in TF32",
            "expected NVIDIA_TF32_OVERRIDE=0 in the environment, its only switch",
            "Start the process with it, or take device='cuda' or fp16.",
        )
    if missing := [name for name in providers if name not in onnxruntime.get_available_providers()]:
        raise RuntimeUnavailableError(
            place,
            f"got device {device!r}, the package that is installed has no {missing[0]}",
            "expected 'CPU', or onnxruntime-gpu alone: with onnxruntime beside it one overwrites the other's files",
            "pip uninstall onnxruntime onnxruntime-gpu, then pip install onnxruntime-gpu.",
        )
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    settings = [(name, {"device_id": str(index)} | _SETTINGS.get(name, {})) for name in providers]
    try:
        session = onnxruntime.InferenceSession(file, options, providers=settings, enable_fallback=0)
    except Exception as error:  # its exception classes share no other base
        raise RuntimeUnavailableError(
            place, f"cannot load the model on {device} ({error})", "", "Check the driver, CUDA and cuDNN."
        ) from error
    found = tuple(session.get_providers())
    if found[: len(providers)] != providers:
        raise RuntimeUnavailableError(
            place,
            f"runs on {', '.join(found)}",
            f"expected {', '.join(providers)}",
            "Are the driver, CUDA and cuDNN there in the versions that onnxruntime-gpu names?",
        )
    return session


class _Bound:
    """A session with image and logits in memory of the GPU; one inference at a time, a second thread waits."""

    def __init__(self, session: Any, manifest: Manifest, device: str) -> None:
        contract, index = manifest.input, int(device.partition(":")[2] or 0)  # it has been checked
        shapes = ((1, planes, contract.height, contract.width) for planes in (contract.channels, len(manifest.classes)))
        self._image, self._logits = (
            onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32), _MEMORY, index) for shape in shapes
        )
        self._session, self._lock = session, Lock()
        self._binding = session.io_binding()
        self._binding.bind_ortvalue_input(session.get_inputs()[0].name, self._image)
        self._binding.bind_ortvalue_output(session.get_outputs()[0].name, self._logits)
        session.run_with_iobinding(self._binding)  # kernels are chosen, or an engine is built, at the first

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        with self._lock:
            self._image.update_inplace(x)
            self._session.run_with_iobinding(self._binding)
            logits: NDArray[np.float32] = self._logits.numpy().copy()
            return logits


# The fields of ONNX's messages that matter here, by number: see onnx.proto.
_GRAPH, _INITIALIZER, _RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION = 7, 5, 9, 13, 14


def without_weights(model: mmap.mmap, weights: Path) -> bytes:
    """The ONNX model with its large tensors moved to the new file `weights` beside it, each aligned.

    Raises ValueError for what is no ONNX model, or one that has its tensors elsewhere already.
    """
    with weights.open("xb") as out:

        def moved(start: int, end: int) -> bytes:
            tensor = bytearray()
            for field, at, value, stop in fields(model, start, end):
                if field in (_EXTERNAL_DATA, _DATA_LOCATION):
                    raise ValueError("the model has weights outside its file")
                if field != _RAW_DATA or stop - value < _LEAST:
                    tensor += model[at:stop]
                    continue
                place = out.seek(-out.tell() % _ALIGNMENT, 1)
                with memoryview(model) as view, view[value:stop] as data:
                    out.write(data)
                for key, text in (("location", weights.name), ("offset", str(place)), ("length", str(stop - value))):
                    pair = message(1, key.encode()) + message(2, text.encode())
                    tensor += message(_EXTERNAL_DATA, pair)
                tensor += varint(_DATA_LOCATION << 3) + b"\x01"
            return bytes(tensor)

        parts = []
        for field, at, value, stop in fields(model, 0, len(model)):
            if field != _GRAPH:
                parts.append(model[at:stop])
                continue
            graph = b"".join(
                message(_INITIALIZER, moved(inner, last)) if number == _INITIALIZER else model[first:last]
                for number, first, inner, last in fields(model, value, stop)
            )
            parts.append(message(_GRAPH, graph))
    return b"".join(parts)
