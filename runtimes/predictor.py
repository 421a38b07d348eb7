"""`Predictor`: frame in, mask out: check_frame -> to_tensor -> backend.infer -> check_logits -> to_mask."""

from __future__ import annotations

import itertools
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Condition, Lock
from time import perf_counter_ns
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from msa2net.errors import BundleError, FaultError, FrameError, Msa2NetError, OutputError, RuntimeUnavailableError
from msa2net.runtimes import images, postprocess, preprocess, quality, signature, stream
from msa2net.runtimes.backends import (
    BAKED,
    INT8,
    RUNTIMES,
    Backend,
    FrameBackend,
    backend_class,
    candidates,
    default_threads,
    why_not,
    why_not_here,
    why_not_on,
    why_not_precision,
)
from msa2net.runtimes.bundle import PRECISIONS, Artifact, Baked, Bundle, ClassInfo
from msa2net.runtimes.cache import CacheWarning, Slot, default_folder

log = logging.getLogger("msa2net")
_NOT_PASSED = "failed its accuracy check at export"
_OFF = "Do not use it on this device: update the runtime and its driver, or take another runtime."
_IDLE_SECONDS = 10.0  # how long closing waits for frames that are in the runtime
DEMO_BUNDLE = Path(__file__).parent / "demo.bundle"


class DemoModelWarning(UserWarning):
    """The demo model is in use: trained on synthetic phantoms, not for clinical use."""


class AccuracyLossWarning(UserWarning):
    """An artifact is in use that did not pass its accuracy check at export, and was written all the same."""


@dataclass(frozen=True)
class Timings:
    """Milliseconds of one `predict`."""

    preprocess: float
    inference: float
    postprocess: float

    @property
    def total(self) -> float:
        return self.preprocess + self.inference + self.postprocess


@dataclass(frozen=True, kw_only=True)
class Execution:
    """What was asked for and what really ran, the latter read back from the runtime.

    runtime_asked is "auto" if it was left open; threads is 0 where the device has no such setting; accuracy is the
    verdict of the artifact's check at export: "high", "standard", "failed" or "unjudged" (see BUNDLE.md); cached is
    whether the compiled model came from the cache; signature is "unsigned", "not verified" if there is one and no key
    was given, or the fingerprint of the key that has signed the bundle; layers is how many layers run in each
    precision, such as {"bf16": 617, "f32": 24}, empty if the runtime does not say; graph is "network", or the baked
    graph that took the frame as it is, such as "baked 1080x1920x3".
    """

    runtime: str
    runtime_asked: str
    runtime_version: str
    device: str
    device_asked: str
    provider: str
    precision: str
    precision_asked: str
    accuracy: str
    threads: int
    cached: bool
    model: str
    model_version: str
    bundle_digest: str
    signature: str
    layers: dict[str, int]
    graph: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Segmentation:
    """The result for one frame, or a region of it, of H rows and W columns, K classes.

    mask        (H, W) uint8 class indices
    logits      (K, h, w) float32, the network's raw output at its own size
    classes     their names and colours
    timings     milliseconds of the three parts
    execution   what ran
    region      (top, left, H, W) in the frame; all of it if none was asked for
    """

    def __init__(
        self,
        mask: NDArray[np.uint8],
        logits: NDArray[np.float32],
        placement: preprocess.Placement,
        enlarge: str,
        classes: tuple[ClassInfo, ...],
        timings: Timings,
        execution: Execution,
        made: Mapping[str, NDArray[np.uint8]],
        seen: tuple[NDArray[Any], int | None],
        limits: quality.Limits | None,
    ) -> None:
        self._made, self._seen, self._limits = dict(made), seen, limits
        self.mask, self.logits, self.classes = mask, logits, classes
        self.timings, self.execution = timings, execution
        self._placement, self._enlarge = placement, enlarge
        self.region: tuple[int, int, int, int] = (0, 0, mask.shape[0], mask.shape[1])
        self._frame_size = (mask.shape[0], mask.shape[1])

    def on_frame(self, outside: int = 0) -> NDArray[np.uint8]:
        """The mask at the frame's size, with the value `outside` where the region is not."""
        top, left, rows, columns = self.region
        whole = np.full(self._frame_size, outside, np.uint8)
        whole[top : top + rows, left : left + columns] = self.mask
        return whole

    def _rightly_made(self) -> NDArray[np.bool_]:
        made = self._made | {"mask": self.mask}
        return postprocess.rightly_made(made, self.logits, self._placement, self._enlarge, self.classes)

    @property
    def probabilities(self) -> NDArray[np.float32]:
        """(K, H, W) float32, computed at each access; their argmax over K is the mask."""
        size = (self.mask.shape[0], self.mask.shape[1])
        return postprocess.to_probabilities(self.logits, self._placement, size, self._enlarge)

    @property
    def quality(self) -> quality.Quality:
        """Figures of the frame and the mask, computed at each access."""
        return quality.assess(*self._seen, postprocess.crop(self.logits, self._placement), self.mask)

    @property
    def flags(self) -> tuple[str, ...] | None:
        """The names of those figures of `quality` that are beyond what training-like images keep, by the limits in the
        manifest; None if it has none, as before format 3.3. A flag informs: the mask is the same with and without.
        """
        return None if self._limits is None else self.quality.flags(self._limits)

    @property
    def confidence(self) -> NDArray[np.uint8]:
        """(H, W), 255 times the probability of the mask's class: a baked graph's, or computed at the first access."""
        if "confidence" not in self._made:
            size = (self.mask.shape[0], self.mask.shape[1])
            self._made["confidence"] = postprocess.to_confidence(self.logits, self._placement, size, self._enlarge)
        return self._made["confidence"]

    @property
    def colors(self) -> NDArray[np.uint8]:
        """(H, W, 3), the colour of the mask's class, red, green, blue: a baked graph's, or computed."""
        if "colors" not in self._made:
            self._made["colors"] = postprocess.to_colors(self.mask, self.classes)
        return self._made["colors"]


@dataclass(frozen=True, eq=False)
class _Graph:
    """A graph that is loaded: the network alone, or a baked one with the names of its `outputs`."""

    backend: Backend
    execution: Execution
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _Golden:
    """A golden frame for a graph, and what it gave at export."""

    graph: _Graph
    pixels: NDArray[Any]
    logits: NDArray[np.float32]
    mask: NDArray[np.uint8]


@dataclass(frozen=True)
class Availability:
    """Whether an artifact of a bundle can run here; `reason` says why not, or is empty.

    accuracy   the verdict of its check at export: "high", "standard", "failed" or "unjudged"
    speed      of int8, its time over the fastest higher precision's, and on which machine; else empty
    """

    runtime: str
    precision: str
    accuracy: str
    available: bool
    reason: str
    speed: str = ""


@dataclass(frozen=True)
class SelfTest:
    """The golden frames on this device, against the outputs recorded at export.

    frames            number of golden frames
    logit_difference  largest |difference| of a logit, and `logit_tolerance`, its limit
    pixel_agreement   smallest share of equal mask pixels, and `pixel_tolerance`, its limit
    repeats           whether a second run of each frame gave the same bits
    """

    frames: int
    logit_difference: float
    logit_tolerance: float
    pixel_agreement: float
    pixel_tolerance: float
    repeats: bool

    @property
    def passed(self) -> bool:
        close = self.logit_difference <= self.logit_tolerance and self.pixel_agreement >= self.pixel_tolerance
        return close and self.repeats

    def __str__(self) -> str:
        return (
            f"{'pass' if self.passed else 'FAIL'}: {self.frames} golden frames, "
            f"largest logit difference {self.logit_difference:.2e} (limit {self.logit_tolerance:.0e}), "
            f"equal pixels {self.pixel_agreement:.4%} (limit {self.pixel_tolerance:.2%})"
            f"{'' if self.repeats else ', and a second run gave other bits'}"
        )


class Predictor:
    """A loaded model. Make one with `Predictor.load`; it may be called from several threads, but not after a fork."""

    def __init__(
        self, bundle: Bundle, artifact: Artifact, network: _Graph | None, baked: dict[tuple[int, ...], _Graph]
    ) -> None:
        self.bundle, self.artifact = bundle, artifact
        self._network, self._baked = network, baked
        self.execution = (network or next(iter(baked.values()))).execution
        self._process = os.getpid()
        self._closed = self._freed = False
        self._latched: FaultError | None = None
        self._last_fault: FaultError | None = None
        self._faults = 0  # so far, whatever was reset; as all here, changed with `_idle` held
        self._idle = Condition()
        self._users = 0  # frames in the runtime
        self._turn = Lock()  # of its streams, whose frames take the runtime one after the other

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        *,
        runtime: str = "auto",
        precision: str = "fp32",
        device: str | None = None,
        threads: int | None = None,
        cache: str | Path | Literal[False] | None = None,
        minimum_version: str | None = None,
        require_signature: str | Path | None = None,
        frame_shape: tuple[int, ...] | None = None,
        self_test: bool = False,
    ) -> Predictor:
        """Loads a bundle, or the demo model with a DemoModelWarning if `path` is None.

        runtime     "onnxruntime", "openvino", "pytorch", "tensorrt", "tensorrt-rtx", or "auto": the first of
                    `backends.candidates(device)` that is installed and has an artifact in `precision` that did not fail
                    its accuracy check. One that is named never falls back to another; if it failed, there is an
                    AccuracyLossWarning.
        precision   "fp32"; others if the bundle has them. Never changed in silence: what ran is in `execution`. "int8"
                    with runtime "auto" takes "int8-portable" where the CPU has no VNNI or dot products.
        device      "CPU"; with OpenVINO any device that it lists; "cuda" or "cuda:N" with the others. If None, "cuda"
                    with TensorRT, else "CPU".
        threads     for one inference; by default the cores that the process may use, by its affinity and by the quota
                    of its control groups
        cache       where what the runtime compiles is kept for the next start: a folder, made if need be; None or
                    "auto" for $MSA2NET_CACHE, else msa2net in $XDG_CACHE_HOME or ~/.cache; False for nowhere. Where
                    it cannot be used there is a CacheWarning that says why.
        minimum_version     of the model, such as "2.1": an older bundle is refused
        require_signature   a public key in PEM, or a folder of such: a bundle that none of them has signed is refused,
                    see `runtimes.signature`
        frame_shape  (H, W) or (H, W, 3): load only the graph that is baked for such uint8 frames, and refuse others.
                    If None, the network and all that is baked are loaded, and a frame takes the graph that it fits.
        self_test   run the golden frames, and refuse to start if this device's masks are off

        Raises BundleError (damaged, changed, unknown schema; as SignatureError, without the signature that is asked
        for) and RuntimeUnavailableError (unknown, not installed, no such precision or device, or a model that the
        runtime cannot load); with `self_test`, OutputError.
        """
        if threads is not None and (type(threads) is not int or threads < 1):
            raise RuntimeUnavailableError(
                "threads", f"got {threads!r}", "expected a whole number of at least 1", "Leave it out."
            )
        if cache is not None and cache is not False and not isinstance(cache, str | Path):
            raise RuntimeUnavailableError(
                "cache", f"got {cache!r}", "expected a folder, None, 'auto' or False", "Leave it out."
            )
        if precision not in PRECISIONS:
            raise RuntimeUnavailableError(
                "precision", f"got {precision!r}", f"expected one of {', '.join(PRECISIONS)}", "Check it."
            )
        if runtime != "auto" and (error := why_not(runtime)):
            raise error
        if path is None:
            warnings.warn(
                "no bundle was named: this is the demo model, trained on synthetic phantoms. Not for clinical use.",
                DemoModelWarning,
                stacklevel=2,
            )
        bundle = Bundle(DEMO_BUNDLE if path is None else path)
        if minimum_version is not None:
            bundle.require_version(minimum_version)
        signed = "not verified" if signature.path_of(bundle.path).exists() else "unsigned"
        if require_signature is not None:
            signed = signature.verify(bundle, require_signature)
        device = device or ("CPU" if runtime == "auto" else RUNTIMES[runtime].device)
        artifact = _choose(bundle, precision, device) if runtime == "auto" else bundle.artifact(runtime, precision)
        if not artifact.passed:
            reasons = "; ".join(artifact.shortfalls) or "its images allowed no judgement"
            warnings.warn(f"{artifact.name} {_NOT_PASSED}: {reasons}", AccuracyLossWarning, stacklevel=2)
        threads = threads or default_threads()
        baked = artifact.baked if artifact.runtime in BAKED and device == "CPU" else ()
        if frame_shape is not None:
            there = ", ".join(str(graph.frame) for graph in baked) or "none"
            baked = tuple(graph for graph in baked if graph.frame == tuple(frame_shape))
            if not baked:
                raise RuntimeUnavailableError(
                    "frame_shape", f"got {frame_shape}", f"expected a baked graph's ({there})", "Export with --bake."
                )
        asked = {"runtime_asked": runtime, "precision_asked": precision, "device_asked": device, "signature": signed}
        with _enough_memory(), ExitStack() as stack, ExitStack() as failed:
            preprocess.reserve_memory()
            slots = []

            def loaded(part: Artifact | Baked) -> _Graph:
                backend, slot = _load(bundle, artifact, part, device, threads, cache, stack, failed)
                slots.append(slot)
                outputs: tuple[str, ...] = ()
                name = "network"
                if isinstance(part, Baked):
                    outputs, name = part.outputs, f"baked {'x'.join(map(str, part.frame))}"
                execution = _execution(bundle, artifact, backend, asked, slot is not None and slot.hit, name)
                return _Graph(backend, execution, outputs)

            network = loaded(artifact) if frame_shape is None else None
            predictor = cls(bundle, artifact, network, {part.frame: loaded(part) for part in baked})
            built = network and network.backend.facts.built
            # int8 has been seen to be right on one CPU and not on another that has the same instructions.
            if built or self_test or (artifact.precision in INT8 and artifact.passed):
                verdict = predictor._prove(built=bool(built))
                if network and built:
                    network.backend.keep(verdict)
            if problem := next((slot for slot in slots if slot and slot.problem), None):
                warnings.warn(
                    f"cache {problem.folder}: the compiled model is not kept ({problem.problem}), so the next start "
                    "takes as long as this one. Name another folder, or pass cache=False.",
                    CacheWarning,
                    stacklevel=2,
                )
            failed.pop_all()
        return predictor

    def _prove(self, built: bool) -> dict[str, Any]:
        """Runs the golden frames and returns their verdict. Raises OutputError if they do not pass."""
        verdict = self.self_test()
        if not verdict.passed:
            raise OutputError(
                f"runtime {self.execution.runtime!r}",
                f"what {'it built' if built else 'runs'} on this device does not do what was exported ({verdict})",
                "expected the golden frames to pass",
                _OFF,
            )
        return asdict(verdict) | {"passed": True}

    def predict(
        self, frame: Any, *, bits: int | None = None, region: tuple[int, int, int, int] | None = None
    ) -> Segmentation:
        """Segments one frame.

        frame   (H, W) grey or (H, W, 3) RGB array: uint8, uint16 or float32 in [0, 1]; or a PIL image, a pydicom
                Dataset, or the path of a PNG, JPEG, TIFF, `.npy` or DICOM file that holds one frame
        bits    for a uint16 array: how many bits the device stores; 16 if None (files and datasets say it themselves)
        region  (top, left, rows, columns) of the frame: the rest is not looked at, and the mask is the region's

        Raises FrameError for anything else (dtype, shape, NaN, out of range, no pixels, unreadable), and OutputError
        if the runtime fails or returns values that are not finite, or if memory is short. The same frame gives the same
        bits at every call.
        """
        return self._predict(frame, bits, region, nullcontext())

    def _predict(
        self,
        frame: Any,
        bits: int | None,
        region: tuple[int, int, int, int] | None,
        turn: AbstractContextManager[object],
    ) -> Segmentation:
        """As `predict`; the runtime is used with `turn` held."""
        with self._in_use():
            start = perf_counter_ns()
            if not isinstance(frame, np.ndarray):
                frame, bits = images.single(frame, bits)
            part, region = (frame, None) if region is None else preprocess.cut(frame, region)
            pixels = preprocess.check_frame(part, bits)
            segmentation = self._segment(self._graph_for(pixels), pixels, bits, start, turn)
            if region is not None:
                segmentation.region, segmentation._frame_size = region, (frame.shape[0], frame.shape[1])
            return segmentation

    def stream(
        self,
        frames: Iterable[Any],
        *,
        in_flight: int = 2,
        late: stream.Late = "drop",
        deadline_ms: float | None = None,
        timeout_ms: float = 5000,
        recheck_every: int | None = None,
        bits: int | None = None,
        region: tuple[int, int, int, int] | None = None,
    ) -> stream.Stream[Segmentation]:
        """Video: segments what `frames` gives while it gives the next, and hands the results over in its order.

        frames      arrays as `predict` takes them, which are copied; or pairs of one and the time of its capture, an
                    int in nanoseconds of `time.monotonic_ns`, which is that of a camera's driver on Linux
                    (CLOCK_MONOTONIC); without it a frame is captured when the source gives it
        in_flight   how many frames are worked on at a time or wait for the caller; the runtime does one after the other
        late        "drop": a frame that has not been begun gives way to a newer one, and one that is older than the
                    deadline is not begun; "wait": the source is not asked for a frame before there is room
        deadline_ms    milliseconds from capture until the caller gets the mask; a later one is given, and marked `late`
        timeout_ms     milliseconds that a frame may be in the runtime
        recheck_every  a golden frame is run after so many frames, each in its turn
        bits, region   as of `predict`

        A frame over the timeout, an output that is not finite, a runtime that fails, memory that is short or a golden
        frame that is off is a fault: neither this stream nor another of the predictor gives a mask any more, and the
        predictor refuses everything with FaultError until `reset`, what it was doing included.

        Raises RuntimeUnavailableError for an argument out of range; what iterating raises is said at `stream.Stream`.
        """
        faults = self._faults
        self._check_usable()
        region = tuple(region) if isinstance(region, list) else region  # the caller's list may change
        cases = itertools.cycle(self._golden_cases() if recheck_every else [])

        def recheck(turn: AbstractContextManager[None]) -> None:
            with self._in_use():
                verdict = self._try([next(cases)], 1, turn)
            if not verdict.passed:
                raise OutputError("golden frame", str(verdict), "expected a pass between two frames", _OFF)

        return stream.start(
            lambda frame, turn: self._predict(frame, bits, region, turn),
            recheck,
            frames,
            latch=self._latch,
            fault_elsewhere=lambda: self._fault_since(faults),
            lock=self._turn,
            in_flight=in_flight,
            late=late,
            deadline_ms=deadline_ms,
            timeout_ms=timeout_ms,
            recheck_every=recheck_every,
        )

    def reset(self) -> None:
        """After a fault: runs the golden frames, and if they pass predicts again.

        Raises OutputError, and is latched from then on, if they do not; FaultError if another fault came up meanwhile;
        RuntimeUnavailableError while a frame is in the runtime, as one that ran into the timeout or those of a stream
        that goes on; BundleError as `self_test` does.
        """
        self._wait_until_idle("Close its streams, or end the process.")
        faults = self._faults
        try:
            self._prove(built=False)
        except OutputError as error:
            self._latch(FaultError.of(error))
            raise
        with self._idle:
            if self._faults == faults:
                self._latched = None
        self._check_usable()

    @property
    def fault(self) -> FaultError | None:
        """What went wrong in a stream, until `reset`; else None."""
        return self._latched

    def _latch(self, fault: FaultError) -> None:
        with self._idle:
            self._latched, self._last_fault = self._latched or fault, fault
            self._faults += 1

    def _fault_since(self, faults: int) -> FaultError | None:
        """The last fault, if there are more by now: what was made before it is not to be trusted, reset or not."""
        with self._idle:
            return self._last_fault if self._faults != faults else None

    def _segment(
        self,
        graph: _Graph,
        pixels: NDArray[Any],
        bits: int | None,
        start: int,
        turn: AbstractContextManager[object],
    ) -> Segmentation:
        """A checked frame through a graph; `start` is when it came, in nanoseconds."""
        manifest, (rows, columns) = self.bundle.manifest, pixels.shape[:2]
        outputs: dict[str, NDArray[Any]] = {}
        seen = quality.sample(pixels), bits
        if graph.outputs:
            whole = np.ascontiguousarray(pixels)
            prepared = perf_counter_ns()
            with turn:
                began = perf_counter_ns()
                outputs = self._run(graph, whole)
                inferred = perf_counter_ns()
            logits, mask, placement = postprocess.check_baked(outputs, manifest, rows, columns)
        else:
            tensor = preprocess.to_tensor(pixels, manifest.input, bits)
            prepared = perf_counter_ns()
            with turn:
                began = perf_counter_ns()
                raw = self._infer(graph, tensor)
                inferred = perf_counter_ns()
            logits, mask, placement = postprocess.finish(raw, manifest, rows, columns)
        done = perf_counter_ns()
        timings = Timings((prepared - start) / 1e6, (inferred - began) / 1e6, (done - inferred) / 1e6)
        return Segmentation(
            mask,
            logits,
            placement,
            manifest.enlarge,
            manifest.classes,
            timings,
            graph.execution,
            outputs,
            seen,
            manifest.quality,
        )

    def _graph_for(self, pixels: NDArray[Any]) -> _Graph:
        """The baked graph that the frame fits, else the network. Raises FrameError if that is not loaded."""
        if found := self._fitting(pixels):
            return found
        shapes = " or ".join(f"uint8 {shape}" for shape in self._baked)
        raise FrameError(
            "frame",
            f"got {pixels.dtype} {pixels.shape}",
            f"expected {shapes}: the predictor was loaded for it",
            "Load it without frame_shape.",
        )

    def _fitting(self, pixels: NDArray[Any]) -> _Graph | None:
        return (self._baked.get(pixels.shape) if pixels.dtype == np.uint8 else None) or self._network

    def logits(self, tensor: NDArray[np.float32]) -> NDArray[np.float32]:
        """The network alone: (1, C, h, w) float32, resized and normalised by the caller -> (K, h, w) float32 logits.

        For another pipeline's pixels, such as a published protocol's. Raises FrameError for another dtype or shape or
        values not finite, and OutputError as `predict` does.
        """
        if self._network is None:
            raise FrameError(
                "tensor", "no network for it is loaded", "expected a frame", "Load it without frame_shape."
            )
        contract = self.bundle.manifest.input
        shape = (1, contract.channels, contract.height, contract.width)
        if tensor.dtype != np.float32 or tensor.shape != shape or not np.isfinite(tensor).all():
            raise FrameError(
                "tensor", f"got {tensor.dtype} {tensor.shape}", f"expected finite float32 {shape}", "Resize it first."
            )
        with self._in_use():
            raw = self._infer(self._network, np.ascontiguousarray(tensor))
        return postprocess.check_logits(raw, len(self.bundle.manifest.classes), contract.height, contract.width)

    @contextmanager
    def _in_use(self, faulty: bool = False) -> Iterator[None]:
        """While the runtime is used; `faulty`: even if a fault is latched. Memory that is short is an OutputError."""
        self._check_usable(faulty)  # before the lock: a child after a fork may never get it
        with self._idle:
            self._check_usable(faulty)
            self._users += 1
            faults = self._faults
        try:
            yield
            if not faulty and (fault := self._fault_since(faults)):
                raise self._refused(fault)
        except MemoryError as error:
            found = f"is not enough ({error})"
            raise OutputError("memory", found, "", "Free some, or give smaller frames.") from error
        finally:
            with self._idle:
                self._users -= 1
                self._idle.notify_all()

    def _wait_until_idle(self, advice: str) -> None:
        self._check_process()
        with self._idle:
            if not self._idle.wait_for(lambda: not self._users, _IDLE_SECONDS):
                found = f"{self._users} frames are still in the runtime after {_IDLE_SECONDS:g} s"
                raise RuntimeUnavailableError("predictor", found, "expected none", advice)

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeUnavailableError(
                "predictor", "was loaded before a fork", "expected the process that loaded it", "Load it in the child."
            )

    def _check_usable(self, faulty: bool = False) -> None:
        self._check_process()
        if self._closed:
            raise RuntimeUnavailableError("predictor", "is closed", "expected an open one", "Load it again.")
        if (fault := self._latched) and not faulty:
            raise self._refused(fault)

    @staticmethod
    def _refused(fault: FaultError) -> FaultError:
        found, expected = f"is latched after a fault ({fault})", "expected one that was proven since"
        error = FaultError("predictor", found, expected, "Call reset().")
        error.__cause__ = fault
        return error

    def _infer(self, graph: _Graph, tensor: NDArray[np.float32]) -> NDArray[np.float32]:
        with self._explained():
            return graph.backend.infer(tensor)

    def _run(self, graph: _Graph, frame: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        with self._explained():
            found = cast("FrameBackend", graph.backend).run(frame)
            return dict(zip(graph.outputs, found, strict=True))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each runtime has its own kinds
            raise OutputError(
                f"runtime {self.execution.runtime!r}",
                f"failed ({type(error).__name__}: {error})",
                "",
                "Verify the bundle on this device.",
            ) from error

    def self_test(self) -> SelfTest:
        """Runs the golden frames here and compares with the recorded outputs. Raises BundleError if one changed."""
        with self._in_use(faulty=True):
            return self._try(self._golden_cases(), 2, nullcontext())

    def _golden_cases(self) -> list[_Golden]:
        """Each golden frame with each graph that has to do with it. Raises BundleError as `self_test` does."""
        cases = []
        contract, classes = self.bundle.manifest.input, len(self.bundle.manifest.classes)
        for entry in self.bundle.manifest.golden:
            frame = self._golden(entry.frame)
            fitting = self._fitting(frame)
            if fitting is None:
                continue
            try:
                pixels = preprocess.check_frame(frame)
                preprocess.check_channels(pixels, contract)
            except FrameError as error:
                raise BundleError(entry.frame, error.found, error.expected, "Export the model again.") from error
            logits = self._golden(entry.logits, (np.float32, (classes, contract.height, contract.width)))
            mask = self._golden(entry.mask, (np.uint8, pixels.shape[:2]))
            # The network serves other frames, so it runs those of the baked graphs, too.
            cases += [_Golden(graph, pixels, logits, mask) for graph in {fitting, self._network or fitting}]
        for graph in set(self._graphs()) - {case.graph for case in cases}:
            found_text = f"no frame for the graph '{graph.execution.graph}', which is loaded"
            raise BundleError("golden", found_text, "expected one", "Export the model again.")
        return cases

    def _try(self, cases: Sequence[_Golden], times: int, turn: AbstractContextManager[object]) -> SelfTest:
        difference, agreement, repeats = 0.0, 1.0, True
        for case in cases:
            runs = [self._segment(case.graph, case.pixels, None, perf_counter_ns(), turn) for _ in range(times)]
            difference = max(difference, float(np.abs(runs[0].logits - case.logits).max()))
            equal = (runs[0].mask == case.mask) & runs[0]._rightly_made()
            agreement = min(agreement, float(equal.mean()))
            repeats = repeats and all(np.array_equal(runs[0].logits, again.logits) for again in runs[1:])
        frames, tolerance = len({id(case.pixels) for case in cases}), self.artifact.tolerance
        return SelfTest(frames, difference, tolerance.logit, agreement, tolerance.pixels, repeats)

    def _graphs(self) -> list[_Graph]:
        return [*filter(None, [self._network]), *self._baked.values()]

    def golden_frames(self) -> list[NDArray[Any]]:
        """The bundle's golden frames that this predictor takes. Raises BundleError if one changed."""
        frames = (self._golden(entry.frame) for entry in self.bundle.manifest.golden)
        return [frame for frame in frames if self._fitting(frame)]

    def _golden(self, path: str, like: tuple[Any, tuple[int, ...]] | None = None) -> NDArray[Any]:
        """A golden array; BundleError if it is damaged, or not finite or not of the dtype and shape `like`."""
        try:
            array = images.read_npy(self.bundle.read(path))
        except FrameError as error:
            raise BundleError(path, error.found, error.expected, "Export the model again.") from error
        if like is not None and not ((array.dtype, array.shape) == like and np.isfinite(array).all()):
            found, expected = f"got {array.dtype} {array.shape}", f"expected finite {np.dtype(like[0])} {like[1]}"
            raise BundleError(path, found, expected, "Export the model again.")
        return array

    @staticmethod
    def available(path: str | Path | None = None) -> list[Availability]:
        """What of a bundle (the demo's if None) can run on this machine, and why not the rest. Loads no runtime."""
        found = []
        manifest = Bundle(DEMO_BUNDLE if path is None else path).manifest
        for artifact in manifest.artifacts:
            try:
                error: Msa2NetError | None = why_not(artifact.runtime)
                error = error or why_not_here(artifact.runtime, artifact.precision)
            except RuntimeUnavailableError as unknown:
                error = unknown
            found.append(
                Availability(
                    runtime=artifact.runtime,
                    precision=artifact.precision,
                    accuracy=artifact.accuracy,
                    available=error is None,
                    reason=str(error) if error else "",
                    speed=str(artifact.speed) if artifact.speed else "",
                )
            )
        for each in manifest.withheld:
            reason = f"not shipped, it takes {each.speed}"
            found.append(Availability(each.runtime, each.precision, each.accuracy, False, reason, str(each.speed)))
        return found

    def close(self) -> None:
        """Frees the runtime. The Predictor cannot be used afterwards; a second call does nothing.

        Waits for frames that other threads have in the runtime. Raises RuntimeUnavailableError, and frees nothing, if
        they do not end within ten seconds; then it may be called again. In a child after a fork, which has not the
        runtime's threads, it frees nothing.
        """
        if os.getpid() != self._process:
            return
        self._closed = True
        self._wait_until_idle("Close again when they have ended, or end the process.")
        with self._idle:
            if not self._freed:
                self._freed = True
                for graph in self._graphs():
                    graph.backend.close()

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def _enough_memory() -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise RuntimeUnavailableError("memory", f"is not enough ({error})", "", "Free some.") from error


def _load(
    bundle: Bundle,
    artifact: Artifact,
    part: Artifact | Baked,
    device: str,
    threads: int,
    cache: str | Path | Literal[False] | None,
    stack: ExitStack,
    failed: ExitStack,
) -> tuple[Backend, Slot | None]:
    """A backend with the artifact, or with a graph that is baked from it, and its slot in the cache.

    The slot, with its lock, is closed by `stack`: what was built must be proven first; the backend by `failed`.
    """
    with bundle.open_unchecked(part) as (files, check), ThreadPoolExecutor(1) as pool:
        # Hashing takes as long as importing the runtime, or as packing the weights, and goes on beside both.
        try:
            checked = pool.submit(check)
        except RuntimeError as error:  # there is no memory for its stack
            found = f"cannot start a thread ({error})"
            raise RuntimeUnavailableError("memory", found, "", "Free some, or allow more threads.") from error
        backend_type = backend_class(artifact.runtime)
        facts = backend_type.compiled_for(device, threads)
        slot = _slot(cache, bundle, artifact, part, device, facts, checked.result)
        if slot:
            stack.callback(slot.close)
        else:
            checked.result()
        try:
            backend = backend_type(files, bundle.manifest, device, artifact.precision, threads, slot, artifact.rest)
            failed.callback(backend.close)
        except Msa2NetError:
            raise
        except Exception as error:  # each runtime has its own kinds
            raise RuntimeUnavailableError(
                f"runtime {artifact.runtime!r}",
                f"cannot load the model ({type(error).__name__}: {error})",
                "",
                "Update the runtime, or export again.",
            ) from error
        finally:
            checked.result()  # whatever came of it, a changed file is what there is to say
        return backend, slot


def _execution(
    bundle: Bundle, artifact: Artifact, backend: Backend, asked: dict[str, str], cached: bool, graph: str
) -> Execution:
    facts = backend.facts
    return Execution(
        **asked,
        runtime=artifact.runtime,
        runtime_version=facts.version,
        device=facts.device,
        provider=facts.provider,
        precision=facts.precision,
        accuracy=artifact.accuracy,
        threads=facts.threads,
        cached=cached,
        model=bundle.manifest.model_name,
        model_version=bundle.manifest.model_version,
        bundle_digest=bundle.digest,
        layers=facts.layers,
        graph=graph,
    )


def _choose(bundle: Bundle, precision: str, device: str) -> Artifact:
    """For runtime="auto": the first that can run on the device, each one passed over logged with its reason.

    For "int8" the portable artifact is taken where the CPU cannot run the other, or the bundle has no other.
    """
    reasons = []
    wanted = INT8 if precision == "int8" else (precision,)
    for precision, runtime in itertools.product(wanted, candidates(device)):
        try:
            if error := why_not(runtime) or why_not_precision(runtime, precision, device):
                raise error
            artifact = bundle.artifact(runtime, precision)
            if reason := why_not_on(runtime, device):
                raise RuntimeUnavailableError(f"runtime {runtime!r}", reason)
            if not artifact.passed:
                raise RuntimeUnavailableError(
                    artifact.name, _NOT_PASSED, "", "Name the runtime to use it all the same."
                )
        except RuntimeUnavailableError as error:
            reasons.append(str(error))
            log.info("auto: passed over %s: %s", runtime, error)
            continue
        log.info("auto: picked %s", artifact.name)
        return artifact
    raise RuntimeUnavailableError("runtime 'auto'", f"nothing can run here: {'; '.join(reasons)}", "", "Install one.")


def _slot(
    cache: str | Path | Literal[False] | None,
    bundle: Bundle,
    artifact: Artifact,
    part: Artifact | Baked,
    device: str,
    facts: dict[str, Any] | None,
    confirm: Callable[[], object],
) -> Slot | None:
    """The compiled model's place in the cache, an entry found there already checked; None if nothing is to be kept."""
    if facts is None or cache is False:
        return None
    folder = default_folder() if cache in (None, "auto") else Path(cache)
    if folder is None:
        return None
    about = {"bundle": bundle.digest, "files": [file.sha256 for file in part.files]}
    about |= {"runtime": artifact.runtime, "precision": artifact.precision}
    about |= {"device": "cuda:0" if device == "cuda" else device}
    return Slot(folder, about | facts, confirm)
