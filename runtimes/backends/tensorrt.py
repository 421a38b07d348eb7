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
from collections import Counter, deque
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msa2net.errors import RuntimeUnavailableError
from msa2net.runtimes.backends import Facts, log
from msa2net.runtimes.bundle import Manifest, Recipe
from msa2net.runtimes.cache import Entry, Slot

_ENGINE, _COMPILED, _TIMINGS, _VERDICT = "engine", "compiled", "timings", "verdict.json"
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
        self._slot, self._lock = slot, Lock()
        self._kept: dict[str, bytes] = {}  # what `keep` is to write
        self._logger = _logger(trt)
        self._gpu.use()
        runtime = trt.Runtime(self._logger)
        self._owner = ExitStack()
        with self._owner:
            context = self._load(trt, runtime, files[0])
            self._prepare(trt, context, manifest)
            self._owner = self._owner.pop_all()
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
            return self._context(runtime, entry.files[_ENGINE].read())

        context = self._slot.find(from_cache, exclusive=True) if self._slot else None
        if context is None:
            if self._slot:
                self._slot.confirm()
            engine = self._build(trt, Path(file).read_bytes())
            self._kept = {_ENGINE: engine}
            context = self._context(runtime, engine)
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
        known = timings.find(lambda entry: entry.files[_TIMINGS].read()) if timings else None
        engine, learned = build(trt, model, self._recipe, self._logger, known or b"", _shown())
        if timings and learned:
            timings.keep({_TIMINGS: learned})
        return engine

    def _context(self, runtime: Any, engine: bytes) -> Any:
        loaded = runtime.deserialize_cuda_engine(engine)
        if loaded is None:
            raise RuntimeError(f"the engine cannot be loaded: {self._logger.said()}")
        context = loaded.create_execution_context()
        if context is None:
            raise RuntimeError(f"the engine cannot be prepared: {self._logger.said()}")
        return context

    def _prepare(self, trt: Any, context: Any, manifest: Manifest) -> None:
        """Takes all memory, and captures one inference in a graph where the engine allows it."""
        from msa2net.runtimes.backends.cuda import Buffer, Stream

        contract, engine = manifest.input, context.engine
        self._stream = Stream(self._owner)
        self._image, self._logits = (
            self._buffer(trt, context, mode, (1, planes, contract.height, contract.width), Buffer)
            for mode, planes in (
                (trt.TensorIOMode.INPUT, contract.channels),
                (trt.TensorIOMode.OUTPUT, len(manifest.classes)),
            )
        )

        def enqueue() -> None:
            self._image.to_device(self._stream.raw)
            if not context.execute_async_v3(self._stream.handle):
                raise RuntimeError(f"the engine cannot run: {self._logger.said()}")
            self._logits.to_host(self._stream.raw)

        self._enqueue = enqueue
        self._image.array[:] = 0
        enqueue()  # the first run loads kernels, which a capture would forbid
        self._stream.synchronize()
        capturable = getattr(context, "is_stream_capturable", lambda _: True)
        if capturable(self._stream.handle):
            self._launch, self._how = self._stream.capture(enqueue), "one CUDA graph"
        else:
            self._launch, self._how = enqueue, "without a CUDA graph: the engine cannot be captured"
        self._context_kept = context  # the graph uses its memory
        inspector = engine.create_engine_inspector()
        inspector.execution_context = context
        self._layers = layers(inspector.get_engine_information(trt.LayerInformationFormat.JSON))

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
        context.set_tensor_address(names[0], made.device)
        return made

    def infer(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._infer(x, self._launch)

    def infer_without_graph(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """The same, enqueued piece by piece: what the graph gains is for benchmarks to say."""
        return self._infer(x, self._enqueue)

    def _infer(self, x: NDArray[np.float32], launch: Callable[[], None]) -> NDArray[np.float32]:
        with self._lock:
            self._gpu.use()
            self._image.array[:] = x
            launch()
            self._stream.synchronize()
            return self._logits.array.copy()

    def keep(self, verdict: dict[str, Any]) -> None:
        """Puts what was built into the cache, with the verdict of the golden frames on it."""
        if self._slot:
            self._slot.keep(self._kept | {_VERDICT: json.dumps(verdict).encode()})
        self._kept = {}

    def close(self) -> None:
        with self._lock:
            self._gpu.use()
            self._owner.close()  # graph, buffers, stream: what was taken last goes first
            del self._context_kept, self._enqueue, self._launch


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
        loaded = runtime.deserialize_cuda_engine(engine)
        if loaded is None:
            raise RuntimeError(f"the engine cannot be loaded: {self._logger.said()}")
        config = loaded.create_runtime_config()
        self._compiled = config.create_runtime_cache()
        config.set_runtime_cache(self._compiled)

        def from_cache(entry: Entry) -> bool:
            if not self._compiled.deserialize(entry.files[_COMPILED].read()):
                raise ValueError("its kernels are of another GPU, driver or version")
            return True

        self._found = bool(self._slot and self._slot.find(from_cache))
        context = loaded.create_execution_context(config)
        if context is None:
            raise RuntimeError(f"the engine cannot be prepared: {self._logger.said()}")
        return context

    def _prepare(self, trt: Any, context: Any, manifest: Manifest) -> None:
        super()._prepare(trt, context, manifest)
        if not self._found:  # the first run has compiled all of them
            self._kept = {_COMPILED: bytes(self._compiled.serialize())}


def require_version(runtime: str, library: str, version: str, recipe: Recipe) -> None:
    """Raises RuntimeUnavailableError unless the library's version is one that the recipe is for."""
    least, below = recipe.version
    if not _numbers(least) <= _numbers(version) < _numbers(below):
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
    trt: Any, model: bytes, recipe: Recipe, logger: Any = None, timings: bytes = b"", progress: Progress | None = None
) -> tuple[bytes, bytes]:
    """The engine, and the timing cache with what was learned, of an ONNX model whose own types are kept.

    trt        the module `tensorrt`, or `tensorrt_rtx`, which needs no GPU: it builds for the recipe's capabilities
    timings    a timing cache of earlier builds, or nothing
    progress   called with the name of a phase, the steps done and their number

    Raises RuntimeError with what TensorRT said.
    """
    logger = logger or _logger(trt)
    builder = trt.Builder(logger)
    if builder is None:
        raise RuntimeError(f"TensorRT cannot start: {logger.said()}")
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
    if level:
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
    if recipe.compute_capabilities:
        config.num_compute_capabilities = len(recipe.compute_capabilities)
        for i, each in enumerate(recipe.compute_capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{each.replace('.', '')}"), i)
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
    """How many layers compute in each precision, of what the engine inspector says; empty if it says nothing.

    A layer's precision is the lowest of what it reads and gives; what only moves or converts numbers is left out.
    """
    try:
        found = json.loads(information)["Layers"]
    except (ValueError, KeyError, TypeError):
        return {}
    counted: Counter[str] = Counter()
    for layer in found:
        if not isinstance(layer, dict) or layer.get("LayerType") in _NO_COMPUTE:
            continue
        texts = [str(each.get("Format/Datatype", "")) for key in ("Inputs", "Outputs") for each in layer.get(key, [])]
        kinds = [name for name, pattern in _KINDS for text in texts if re.search(pattern, text, re.IGNORECASE)]
        counted[kinds[0] if kinds else "other"] += 1
    return dict(sorted(counted.items()))


_NO_COMPUTE = {"Reformat", "NoOp", "Shuffle", "Constant", "Quantize", "Dequantize", "Cast", "Slice", "signal", "wait"}
_KINDS = (("fp8", "fp8"), ("int8", "int8"), ("fp16", "fp16|half"), ("bf16", "bf16|bfloat"), ("fp32", "fp32|float"))


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:4]]


def _logger(trt: Any) -> Any:
    """TensorRT's logger: what it says goes to ours, and the last errors into messages."""

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
            return " ".join("; ".join(self.errors).split())[:1000] or "it gave no reason"

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
