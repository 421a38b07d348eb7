"""TensorRT, and TensorRT for RTX, which has the same API under another name: an engine on an NVIDIA GPU.

TensorRT's engine is built on the device from the bundle's ONNX, which takes minutes, and kept in the cache; that of
TensorRT for RTX is built at export, and what its runtime compiles for the GPU is kept. An inference is one CUDA graph:
copy in, engine, copy out.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import weakref
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msa2net.errors import RuntimeUnavailableError
from msa2net.runtimes.backends import Facts, log
from msa2net.runtimes.bundle import Manifest, Recipe, version_numbers
from msa2net.runtimes.cache import VERDICT, Entry, Slot

_ENGINE, _COMPILED, _TIMINGS = "engine", "compiled", "timings"
Progress = Callable[[str, int, int], None]


class TensorRtBackend:
    """See `msa2net.runtimes.backends`."""

    runtime, library = "tensorrt", "tensorrt"

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
        from msa2net.runtimes.backends.cuda import Gpu

        trt = importlib.import_module(self.library)
        self._gpu = Gpu(self.runtime, device)
        self._recipe = recipe_of(manifest, self.runtime, precision)
        self._require_fit(trt.__version__)
        self._slot, self._lock, self._closed = slot, Lock(), False
        self._kept: dict[str, bytes] = {}  # what `keep` is to write
        self._logger = logger_of(trt)
        self._owner = ExitStack()
        with self._gpu.active(), ExitStack() as owner:
            self._owner = owner
            self._context = self._load(trt, trt.Runtime(self._logger), files[0])
            self._prepare(trt, manifest)
            self._owner = owner.pop_all()
        # Also if nobody closes it; not at the end of the process, when CUDA may be gone.
        weakref.finalize(self, self._owner.close).atexit = False
        self.facts = Facts(
            version=trt.__version__,
            device=self._gpu.name,
            provider=f"{'TensorRT' if self.runtime == 'tensorrt' else 'TensorRT for RTX'}, {self._how}",
            precision=precision,
            threads=0,
            layers=self._layers,
            built=bool(self._kept),
        )

    @classmethod
    def compiled_for(cls, device: str, threads: int = 0) -> dict[str, Any]:  # noqa: ARG003  # as the others have it
        from msa2net.runtimes.backends.cuda import Gpu

        gpu = Gpu(cls.runtime, device)
        version = importlib.import_module(cls.library).__version__
        return {"version": version, "gpu": gpu.name, "capability": gpu.capability, "driver": gpu.driver}

    def _require_fit(self, version: str) -> None:
        """Raises RuntimeUnavailableError if the library's version or the GPU is not one that the artifact is for."""
        require_version(self.runtime, self.library, version, self._recipe)
        fit = self._recipe.compute_capabilities
        if fit and self._gpu.capability not in fit:
            raise RuntimeUnavailableError(
                f"runtime {self.runtime!r}",
                f"{self._gpu.name} has compute capability {self._gpu.capability}",
                f"expected {' or '.join(fit)}, which the engine was built for",
                f"Export it again with --targets {self._gpu.capability}.",
            )

    def _load(self, trt: Any, runtime: Any, file: str) -> Any:
        """An execution context of the engine: out of the cache, or built now."""

        def from_cache(entry: Entry) -> Any:
            return self._deserialized(runtime, entry.read(_ENGINE))

        engine = self._slot.find(from_cache, exclusive=True) if self._slot else None
        if engine is None:
            if self._slot:
                self._slot.confirm()
            self._kept = {_ENGINE: self._build(trt, Path(file).read_bytes())}
            engine = self._deserialized(runtime, self._kept[_ENGINE])
        return self._prepared(engine.create_execution_context())

    def _deserialized(self, runtime: Any, engine: bytes) -> Any:
        loaded = runtime.deserialize_cuda_engine(engine)
        if loaded is None:
            raise RuntimeError(f"the engine cannot be loaded: {self._logger.said()}")
        return loaded

    def _prepared(self, context: Any) -> Any:
        if context is None:
            raise RuntimeError(f"the engine cannot be prepared: {self._logger.said()}")
        return context

    def _build(self, trt: Any, model: bytes) -> bytes:
        log.warning(
            "tensorrt: building an engine for %s, which takes minutes; %s",
            self._gpu.name,
            f"it is kept in {self._slot.folder}" if self._slot and not self._slot.problem else "it is not kept",
        )
        timings = None
        if self._slot and not self._slot.problem:
            facts = {"timings of": self.compiled_for(f"cuda:{self._gpu.index}")}
            timings = Slot(self._slot.folder, facts)
        known = timings.find(lambda entry: entry.read(_TIMINGS)) if timings else None
        engine, learned = build(trt, model, self._recipe, known or b"", _shown())
        if timings and learned:
            timings.keep(partial(_write, {_TIMINGS: learned}))
        return engine

    def _prepare(self, trt: Any, manifest: Manifest) -> None:
        """Takes all memory, and captures one inference in a graph where the engine allows it."""
        from msa2net.runtimes.backends.cuda import Buffer, Stream

        context, contract = self._context, manifest.input
        self._stream = Stream(self._owner)
        self._image, self._logits = (
            self._buffer(trt, context, mode, (1, planes, contract.height, contract.width), Buffer)
            for mode, planes in (
                (trt.TensorIOMode.INPUT, contract.channels),
                (trt.TensorIOMode.OUTPUT, len(manifest.classes)),
            )
        )
        self._image.array[:] = 0
        self._enqueue()  # the first run loads kernels, which a capture would forbid
        self._stream.synchronize()
        self._graph: Callable[[], None] | None = None
        self._how = "without a CUDA graph"
        if getattr(context, "is_stream_capturable", lambda _: True)(self._stream.handle):  # RTX says so itself
            try:
                self._graph, self._how = self._stream.capture(self._enqueue), "one CUDA graph"
            except RuntimeError as error:
                log.warning("%s: the engine runs without a CUDA graph: %s", self.runtime, error)
        inspector = context.engine.create_engine_inspector()
        inspector.execution_context = context
        self._layers = layers(inspector.get_engine_information(trt.LayerInformationFormat.JSON))

    def _enqueue(self) -> None:
        self._image.to_device(self._stream.raw)
        if not self._context.execute_async_v3(self._stream.handle):
            raise RuntimeError(f"the engine cannot run: {self._logger.said()}")
        self._logits.to_host(self._stream.raw)

    def _buffer(self, trt: Any, context: Any, mode: Any, shape: tuple[int, ...], buffer: Any) -> Any:
        """The memory of the engine's one input or output. Raises RuntimeError if it is not what was exported."""
        engine = context.engine
        every = map(engine.get_tensor_name, range(engine.num_io_tensors))
        names = [name for name in every if engine.get_tensor_mode(name) == mode]
        if len(names) == 1 and mode == trt.TensorIOMode.INPUT:
            context.set_input_shape(names[0], shape)
        found = [(engine.get_tensor_dtype(name), tuple(context.get_tensor_shape(name))) for name in names]
        if found != [(trt.float32, shape)]:
            raise RuntimeError(f"the engine has the {mode} {found}, expected one of float32 {shape}")
        made = buffer(shape, self._owner)
        if not context.set_tensor_address(names[0], made.device):
            raise RuntimeError(f"the engine does not take the memory of its {mode}: {self._logger.said()}")
        return made

    def infer(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._infer(x)

    def infer_without_graph(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """The same, enqueued piece by piece: what the graph gains is for benchmarks to say."""
        return self._infer(x, graph=False)

    def _infer(self, x: NDArray[np.float32], graph: bool = True) -> NDArray[np.float32]:
        with self._lock:
            if self._closed:  # while this thread waited
                raise RuntimeError("it was closed")
            with self._gpu.active():
                self._image.array[:] = x
                (self._graph if graph and self._graph else self._enqueue)()
                self._stream.synchronize()
                return self._logits.array.copy()

    def keep(self, verdict: dict[str, Any]) -> None:
        """Puts what was built into the cache, with the verdict of the golden frames on it."""
        files, self._kept = self._kept | {VERDICT: json.dumps(verdict).encode()}, {}
        if self._slot:
            self._slot.keep(partial(_write, files))

    def close(self) -> None:
        with self._lock:
            self._closed = True
            with self._gpu.active():
                self._owner.close()  # graph, buffers, stream: what was taken last goes first
            vars(self).pop("_context", None)


def _write(files: Mapping[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


class TensorRtRtxBackend(TensorRtBackend):
    """The same for an engine that is ready; what is cached is what its runtime compiles for this GPU."""

    runtime, library = "tensorrt-rtx", "tensorrt_rtx"

    def _load(self, trt: Any, runtime: Any, file: str) -> Any:
        if self._slot:
            self._slot.confirm()
        engine = Path(file).read_bytes()
        validity, why = runtime.get_engine_validity(engine)
        if validity == trt.EngineValidity.INVALID:
            names = [name for name, flag in trt.EngineInvalidityDiagnostics.__members__.items() if int(flag) & int(why)]
            raise RuntimeUnavailableError(
                f"runtime {self.runtime!r}",
                f"the engine does not fit this device ({', '.join(names) or why})",
                f"expected {self.library} {self._recipe.version[0]}, a driver for it and one of "
                f"{', '.join(self._recipe.compute_capabilities)}",
                "Update the driver, or export it again.",
            )
        loaded = self._deserialized(runtime, engine)
        self._config = config = loaded.create_runtime_config()
        self._compiled = config.create_runtime_cache()
        config.set_runtime_cache(self._compiled)
        if self._recipe.batch > 1:  # all kernels at once, not in the background while others stand in for them
            eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = eager

        def from_cache(entry: Entry) -> bool:
            if not self._compiled.deserialize(entry.read(_COMPILED)):
                raise ValueError("its kernels are of another GPU, driver or version")
            return True

        self._found = bool(self._slot and self._slot.find(from_cache))
        return self._prepared(loaded.create_execution_context(config))

    def _prepare(self, trt: Any, manifest: Manifest) -> None:
        super()._prepare(trt, manifest)
        if not self._found:  # the first run has compiled all of them
            self._kept = {_COMPILED: bytes(self._compiled.serialize())}


def require_version(runtime: str, library: str, version: str, recipe: Recipe) -> None:
    """Raises RuntimeUnavailableError unless the library's version is one that the recipe is for."""
    least, below = recipe.version
    if not version_numbers(least) <= version_numbers(version) < version_numbers(below):
        raise RuntimeUnavailableError(
            f"runtime {runtime!r}",
            f"{library} {version} is installed",
            f"expected at least {least} and below {below}",
            f"Install such a version, or export the artifact with {version}.",
        )


def recipe_of(manifest: Manifest, runtime: str, precision: str) -> Recipe:
    """The recipe of this artifact. Raises RuntimeUnavailableError if it has none."""
    for artifact in manifest.artifacts:
        if (artifact.runtime, artifact.precision) == (runtime, precision) and artifact.recipe:
            return artifact.recipe
    raise RuntimeUnavailableError(
        f"runtime {runtime!r}", f"the artifact in {precision} has no recipe", "expected one", "Export it again."
    )


def build(
    trt: Any, model: bytes, recipe: Recipe, timings: bytes = b"", progress: Progress | None = None
) -> tuple[bytes, bytes]:
    """The engine, and the timing cache with what was learned, of an ONNX model whose own types are kept.

    trt        the module `tensorrt`, or `tensorrt_rtx`, which needs no GPU: it builds for the recipe's capabilities
    timings    a timing cache of earlier builds, or nothing
    progress   called with the name of a phase, the steps done and their number

    Raises RuntimeError with what TensorRT said.
    """
    logger = logger_of(trt)
    try:
        builder = trt.Builder(logger)
    except TypeError as error:  # its binding's word for nothing
        raise RuntimeError(f"TensorRT cannot start: {logger.said()}") from error
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # TensorRT 11 has no other kind
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise RuntimeError(f"the model cannot be parsed: {errors}")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 is IEEE's
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # so that the engine says what its layers compute in
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, recipe.workspace)
    level = {"ampere+": "AMPERE_PLUS", "same-capability": "SAME_COMPUTE_CAPABILITY"}.get(recipe.hardware_compatibility)
    if level and not hasattr(trt.HardwareCompatibilityLevel, level):
        raise RuntimeError(f"TensorRT {trt.__version__} knows no hardware compatibility {level}: export with none")
    if level:
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
    if recipe.compute_capabilities:
        config.num_compute_capabilities = len(recipe.compute_capabilities)
        for i, each in enumerate(recipe.compute_capabilities):
            target = getattr(trt.ComputeCapability, f"SM{each.replace('.', '')}", None)
            if target is None or config.set_compute_capability(target, i) is False:
                raise RuntimeError(f"it builds no engine for compute capability {each}")
    if recipe.batch > 1:
        image = network.get_input(0)
        rest = tuple(image.shape)[1:]
        profile = builder.create_optimization_profile()
        profile.set_shape(image.name, (1, *rest), (recipe.batch, *rest), (recipe.batch, *rest))
        config.add_optimization_profile(profile)
    cache = None
    if not recipe.compute_capabilities:
        cache = config.create_timing_cache(timings)
        config.set_timing_cache(cache, False)
    if progress:
        config.progress_monitor = _monitor(trt, progress)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise RuntimeError(f"no engine was built: {logger.said()}")
    return bytes(engine), bytes(cache.serialize()) if cache else b""


def layers(information: str) -> dict[str, int]:
    """How many layers touch which precision, of what the engine inspector says; empty if it says nothing to be read.

    A layer counts as the lowest precision of what it reads and gives, so that one which rounds to int8 counts as int8,
    too; what only moves or converts numbers is left out.
    """
    counted: Counter[str] = Counter()
    try:
        for layer in json.loads(information)["Layers"]:
            if not isinstance(layer, dict) or layer.get("LayerType") in _NO_COMPUTE:
                continue
            tensors = [each for key in ("Inputs", "Outputs") for each in layer.get(key) or []]
            texts = [str(each.get("Format/Datatype", "")) for each in tensors if isinstance(each, dict)]
            kinds = [name for name, pattern in _KINDS for text in texts if re.search(pattern, text, re.IGNORECASE)]
            counted[kinds[0] if kinds else "other"] += 1
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
    return dict(sorted(counted.items()))


_NO_COMPUTE = {"Reformat", "NoOp", "Shuffle", "Constant", "Quantize", "Dequantize", "Cast", "Slice", "signal", "wait"}
_KINDS = (("fp8", "fp8"), ("int8", "int8"), ("fp16", "fp16|half"), ("bf16", "bf16|bfloat"), ("fp32", "fp32|float"))


@cache
def logger_of(trt: Any) -> Any:
    """The logger of this library, one for the whole process: TensorRT keeps the first that it is given.

    What it says goes to ours, the last errors into messages.
    """

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: deque[str] = deque(maxlen=3)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)
            if severity <= trt.ILogger.Severity.WARNING:
                log.info("tensorrt: %s", message)

        def said(self) -> str:
            """The last errors, once."""
            text = " ".join("; ".join(self.errors).split())[:1000]
            self.errors.clear()
            return text or "it gave no reason"

    return Logger()


def _shown() -> Progress | None:
    """Draws a phase as it goes, on a terminal."""
    if not sys.stderr.isatty():
        return None

    def show(phase: str, done: int, steps: int) -> None:
        end = "\n" if done == steps else ""
        print(f"\r{phase[:60]:<60} {done:>4} of {steps}", end=end, file=sys.stderr, flush=True)

    return show


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.steps:
                progress(phase_name, min(step + 1, self.steps[phase_name]), self.steps[phase_name])
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()
