"""A FAKE of what the TensorRT backend uses of `tensorrt`, `tensorrt_rtx` and `cuda.bindings.runtime`. For tests alone.

It proves nothing about NVIDIA's software. It lets the code above it, cache, locks, checks and errors, run as it is on a
machine without a GPU: "GPU memory" is memory, a "stream" runs at once, and an "engine" is the ONNX file behind a
header, run by ONNX Runtime. `GPU` and `FAULTS` say what there is and what goes wrong.
"""

from __future__ import annotations

import ctypes
import enum
import json
import os
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

HEADER = b"a fake engine of "
GPU = {"count": 1, "name": "Fake GPU", "major": 8, "minor": 6, "driver": 13000, "bytes": 1 << 30}
# What goes wrong: "no_driver", "build", "deserialize", "context", "execute", "wrong", "nan", "not_capturable",
# "capture", "launch".
FAULTS: set[str] = set()
COUNTS: dict[str, int] = {}  # of builds, deserialisations, launches
PROFILES: list[Any] = []  # that were asked for


def count(what: str) -> None:
    COUNTS[what] = COUNTS.get(what, 0) + 1
    if log := os.environ.get("FAKE_TENSORRT_LOG"):  # for several processes
        with open(log, "a") as file:
            file.write(f"{what}\n")


# cuda.bindings.runtime ----------------------------------------------------------------------------------------------


cudaError_t = enum.IntEnum(  # noqa: N816  # CUDA's name
    "cudaError_t",
    {
        "cudaSuccess": 0,
        "cudaErrorMemoryAllocation": 2,
        "cudaErrorInsufficientDriver": 35,
        "cudaErrorStreamCaptureUnsupported": 900,
    },
)
_OK = cudaError_t.cudaSuccess
_memory: dict[int, Any] = {}
_captured: list[Any] | None = None


def _allocate(size: int, *_: int) -> tuple[Any, ...]:
    if sum(len(each) for each in _memory.values()) + size > GPU["bytes"]:
        return cudaError_t.cudaErrorMemoryAllocation, None
    block = (ctypes.c_char * size)()
    _memory[ctypes.addressof(block)] = block
    return _OK, ctypes.addressof(block)


def _free(pointer: int) -> tuple[Any, ...]:
    del _memory[pointer]
    return (_OK,)


def _enqueue(work: Any) -> tuple[Any, ...]:
    if _captured is not None:
        _captured.append(work)
    else:
        work()
    return (_OK,)


def _copy(target: int, source: int, size: int, *_: Any) -> tuple[Any, ...]:
    return _enqueue(lambda: ctypes.memmove(target, source, size))


def _begin(*_: Any) -> tuple[Any, ...]:
    global _captured
    _captured = []
    return (_OK,)


def _end(_: Any) -> tuple[Any, ...]:
    global _captured
    graph, _captured = _captured, None
    return (cudaError_t.cudaErrorStreamCaptureUnsupported, None) if "capture" in FAULTS else (_OK, graph)


def _launch(graph: Any, _: Any) -> tuple[Any, ...]:
    count("launches")
    if "launch" in FAULTS:
        return (cudaError_t.cudaErrorMemoryAllocation,)
    for work in graph:
        work()
    return (_OK,)


def runtime() -> types.ModuleType:
    """The module `cuda.bindings.runtime`."""
    module = types.ModuleType("cuda.bindings.runtime")
    flag = types.SimpleNamespace
    one = (_OK, 1)
    vars(module).update(
        cudaError_t=cudaError_t,
        cudaStreamNonBlocking=1,
        cudaMemcpyKind=flag(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2),
        cudaStreamCaptureMode=flag(cudaStreamCaptureModeThreadLocal=1),
        cudaGetErrorName=lambda error: (_OK, error.name.encode()),
        cudaGetErrorString=lambda error: (_OK, b"out of memory" if error == 2 else b"no driver"),
        cudaGetDeviceCount=lambda: (
            (cudaError_t.cudaErrorInsufficientDriver, None) if "no_driver" in FAULTS else (_OK, GPU["count"])
        ),
        cudaGetDeviceProperties=lambda _: (
            _OK,
            flag(name=str(GPU["name"]).encode(), major=GPU["major"], minor=GPU["minor"]),
        ),
        cudaDriverGetVersion=lambda: (_OK, GPU["driver"]),
        cudaGetDevice=lambda: (_OK, 0),
        cudaSetDevice=lambda _: (_OK,),
        cudaMemGetInfo=lambda: (_OK, GPU["bytes"] - sum(len(each) for each in _memory.values()), GPU["bytes"]),
        cudaMalloc=_allocate,
        cudaHostAlloc=_allocate,
        cudaFree=_free,
        cudaFreeHost=_free,
        cudaMemcpyAsync=_copy,
        cudaStreamCreateWithFlags=lambda _: one,
        cudaStreamDestroy=lambda _: (_OK,),
        cudaStreamSynchronize=lambda _: (_OK,),
        cudaStreamBeginCapture=_begin,
        cudaStreamEndCapture=_end,
        cudaGraphInstantiate=lambda graph, _: (_OK, graph),
        cudaGraphDestroy=lambda _: (_OK,),
        cudaGraphExecDestroy=lambda _: (_OK,),
        cudaGraphLaunch=_launch,
    )
    return module


# tensorrt, tensorrt_rtx ---------------------------------------------------------------------------------------------


class Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO = range(4)


class ILogger:
    Severity = Severity

    def __init__(self) -> None: ...


class TensorIOMode(enum.Enum):
    INPUT, OUTPUT = 1, 2


class Config:
    """A builder's."""

    progress_monitor: Any = None

    def __init__(self) -> None:
        self.flags = {"TF32"}
        self.targets: dict[int, Any] = {}

    def clear_flag(self, flag: str) -> None:
        self.flags.discard(flag)

    def set_memory_pool_limit(self, pool: str, size: int) -> None:
        assert size > 0

    def set_compute_capability(self, target: Any, index: int) -> None:
        self.targets[index] = target

    def create_timing_cache(self, known: bytes) -> Any:
        return types.SimpleNamespace(serialize=lambda: known + b"timed ")

    def set_timing_cache(self, cache: Any, mismatch: bool) -> None: ...

    def add_optimization_profile(self, profile: Any) -> None:
        PROFILES.append(profile.shapes)


class Parser:
    num_errors = 1

    def __init__(self, network: Any, logger: Any) -> None:
        self.network = network

    def parse(self, model: bytes) -> bool:
        try:
            onnx.checker.check_model(onnx.load_from_string(model))
        except Exception:
            return False
        self.network.model = model
        return True

    def get_error(self, _: int) -> str:
        return "it is no ONNX model"


class Builder:
    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def create_network(self, flags: int) -> Any:
        assert flags == 1, "not strongly typed"
        image = types.SimpleNamespace(name="image", shape=(-1, 3, 224, 224))
        return types.SimpleNamespace(model=b"", get_input=lambda _: image)

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> Any:
        shapes: list[Any] = []
        return types.SimpleNamespace(shapes=shapes, set_shape=lambda *each: shapes.append(each))

    def build_serialized_network(self, network: Any, config: Config) -> bytes | None:
        count("builds")
        assert "TF32" not in config.flags
        if "build" in FAULTS:
            self.logger.log(Severity.ERROR, "out of GPU memory")
            return None
        if monitor := config.progress_monitor:
            monitor.phase_start("building", None, 2)
            monitor.step_complete("building", 0)
            monitor.step_complete("building", 1)
            monitor.phase_finish("building")
        time.sleep(float(os.environ.get("FAKE_TENSORRT_SECONDS", 0)))
        return HEADER + str(GPU["name"]).encode() + b"\n" + network.model


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.addresses: dict[str, int] = {}
        self.shapes = {name: list(each.shape) for name, each in engine.tensors.items()}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self.shapes[name] = list(shape)

    def get_tensor_shape(self, name: str) -> list[int]:
        return self.shapes[name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def is_stream_capturable(self, _: int) -> bool:
        return "not_capturable" not in FAULTS

    def execute_async_v3(self, _: int) -> bool:
        if "execute" in FAULTS:
            return False

        def array(name: str) -> Any:
            size = int(np.prod(self.shapes[name]))
            flat = (ctypes.c_float * size).from_address(self.addresses[name])
            return np.ctypeslib.as_array(flat).reshape(self.shapes[name])

        def work() -> None:
            (out,) = self.engine.session.run(None, {"image": array("image")})
            array("logits")[:] = -out if "wrong" in FAULTS else out * np.nan if "nan" in FAULTS else out

        _enqueue(work)
        return True


class Engine:
    num_io_tensors = 2

    def __init__(self, blob: bytes) -> None:
        model = blob.partition(b"\n")[2]
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self.tensors = {each.name: each for each in (*self.session.get_inputs(), *self.session.get_outputs())}

    def get_tensor_name(self, i: int) -> str:
        return list(self.tensors)[i]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name == "image" else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, _: str) -> str:
        return "float32"

    def create_execution_context(self, config: Any = None) -> Context | None:
        return None if "context" in FAULTS else Context(self)

    def create_engine_inspector(self) -> Any:
        layer = {"LayerType": "Convolution", "Inputs": [{"Format/Datatype": "Row major linear FP16 format"}]}
        return types.SimpleNamespace(get_engine_information=lambda _: json.dumps({"Layers": [layer]}))

    def create_runtime_config(self) -> Any:
        compiled = types.SimpleNamespace(serialize=lambda: b"compiled", deserialize=lambda blob: blob == b"compiled")
        return types.SimpleNamespace(create_runtime_cache=lambda: compiled, set_runtime_cache=lambda _: None)


class Runtime:
    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, blob: bytes) -> Engine | None:
        count("deserialisations")
        if "deserialize" in FAULTS or not blob.startswith(HEADER):
            self.logger.log(Severity.ERROR, "the magic tag does not match")
            return None
        return Engine(blob)

    def get_engine_validity(self, blob: bytes) -> tuple[Any, int]:
        good = blob.startswith(HEADER)
        return (EngineValidity.VALID, 0) if good else (EngineValidity.INVALID, 2)


class EngineValidity(enum.Enum):
    VALID, INVALID = 0, 1


class EngineInvalidityDiagnostics(enum.IntFlag):
    VERSION_MISMATCH, UNSUPPORTED_CC, OLD_CUDA_DRIVER = 1, 2, 4


def library(name: str, version: str) -> types.ModuleType:
    """The module `tensorrt` or `tensorrt_rtx`."""
    module = types.ModuleType(name)
    words = types.SimpleNamespace
    vars(module).update(
        __version__=version,
        float32="float32",
        ILogger=ILogger,
        IProgressMonitor=object,
        TensorIOMode=TensorIOMode,
        Builder=Builder,
        OnnxParser=Parser,
        Runtime=Runtime,
        EngineValidity=EngineValidity,
        EngineInvalidityDiagnostics=EngineInvalidityDiagnostics,
        NetworkDefinitionCreationFlag=words(STRONGLY_TYPED=0),
        BuilderFlag=words(TF32="TF32"),
        ProfilingVerbosity=words(DETAILED=2),
        MemoryPoolType=words(WORKSPACE="workspace"),
        HardwareCompatibilityLevel=words(AMPERE_PLUS=1, SAME_COMPUTE_CAPABILITY=2),
        ComputeCapability=words(SM86=86),
        DynamicShapesKernelSpecializationStrategy=words(EAGER="eager"),
        LayerInformationFormat=words(JSON=1),
    )
    return module


def install(modules: Any, version: str = "10.16.0", rtx_version: str = "1.7.1.116") -> None:
    """Puts all of it into `modules`, which is `sys.modules`."""
    bindings, cuda = types.ModuleType("cuda.bindings"), types.ModuleType("cuda")
    vars(bindings)["runtime"] = runtime()
    for module in (
        cuda,
        bindings,
        bindings.runtime,
        library("tensorrt", version),
        library("tensorrt_rtx", rtx_version),
    ):
        module.__spec__ = types.SimpleNamespace(name=module.__name__)  # type: ignore[assignment]  # `find_spec` asks it
        modules[module.__name__] = module
    modules.pop("msa2net.runtimes.backends.cuda", None)
    modules.pop("msa2net.runtimes.backends.tensorrt", None)


def engine_of(model: Path) -> bytes:
    return HEADER + b"any\n" + model.read_bytes()
