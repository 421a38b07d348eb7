"""The evidence: what an artifact makes of each image beside what the reference network makes of it, and the verdict."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from msa2net.core.data import Dataset
from msa2net.core.network import MSA2Net
from msa2net.core.phantoms import KINDS, frames, phantom
from msa2net.errors import DataError, ExportError, FrameError, OutputError
from msa2net.export import fp16, fp16_sums
from msa2net.runtimes import postprocess, preprocess
from msa2net.runtimes.backends import INT8, backend_class, default_threads
from msa2net.runtimes.bundle import Artifact, ClassInfo, Manifest, has_passed
from msa2net.runtimes.measure import ImageParity, image_parity, judge, pixel_agreement

PHANTOM_SEED = 2_000_000  # apart from training, validation and test
# Sizes of the phantoms (H, W): the network's own, then smaller, larger, wide and odd ones.
_SIZES = ((224, 224), (168, 224), (480, 640), (301, 227))
# fp32 differs between runtimes only by rounding: measured 1e-6 to 1e-5 of the largest logit.
LOGIT_LIMIT, PIXEL_LIMIT = 1e-4, 0.9999
MARGIN = 2.0  # of a lower precision's tolerance on the golden frames: other CPUs round its sums in another order
T = TypeVar("T")
MAX_FRAMES, MAX_BYTES = 1000, 2**30  # of the frames that are held in memory


@dataclass(frozen=True)
class Case:
    """A frame, how many bits a uint16 one stores, its truth if known, and names that tell nothing of a patient.

    case   the patient or image that the frame is of
    """

    name: str
    frame: NDArray[Any]
    bits: int | None = None
    truth: NDArray[np.uint8] | None = None
    case: str = ""


@dataclass(frozen=True)
class Result:
    """Logits (K, h, w) float32 and mask (H, W) uint8 for one case."""

    logits: NDArray[np.float32]
    mask: NDArray[np.uint8]


def phantom_cases(grey: bool, count: int = 40) -> list[Case]:
    """Phantoms of both kinds in several sizes. Ultrasound comes in grey, dermoscopy too if the network takes grey.

    Without their truth: what the network was trained to find need not be their lesions.
    """
    cases = []
    for i in range(count):
        kind, seed = KINDS[i % len(KINDS)], PHANTOM_SEED + i
        image = phantom(kind, seed, _SIZES[(i // 2) % len(_SIZES)]).image
        frame = np.ascontiguousarray(image[..., 1]) if grey or kind == "ultrasound" else image
        cases.append(Case(f"phantom {kind} {seed}", frame))
    return cases


def shaped_cases(shape: tuple[int, ...], count: int = 1) -> list[Case]:
    """Phantoms of one shape, (H, W, 3) or (H, W)."""
    found = frames(shape, count, PHANTOM_SEED + 1000)
    return [Case(f"phantom of {shape} {i}", frame) for i, frame in enumerate(found)]


def saturating_case() -> Case:
    """A golden frame of black and white blocks: its large sums show a CPU that cuts them off, see `export.quantize`."""
    blocks = np.random.default_rng(0).integers(0, 2, (7, 7), np.uint8) * 255
    return Case("blocks", blocks.repeat(32, 0).repeat(32, 1))


def data_cases(dataset: Dataset, classes: int, limit: int = MAX_FRAMES) -> list[Case]:
    """A `sample` of a data set's cases, and of each frames evenly spread: at most `limit`, and about a gigabyte.

    Raises DataError for one that cannot be read or has no pixels, and ExportError for labels beyond `classes`.
    """
    wanted = sample(range(len(dataset.cases)), limit)
    share = max(1, limit // max(1, len(wanted)))
    found: list[Case] = []
    for number in tuple(wanted):
        if number not in wanted:
            continue
        case = dataset.cases[number]
        volume = case.read()
        count = len(volume.frames)
        taken = min(count, share)
        for i in (k * count // taken for k in range(taken)):
            truth = None if volume.labels is None else volume.labels[i]
            if truth is not None and truth.max(initial=0) >= classes:
                raise ExportError(
                    case.name, f"has the label {truth.max()}", f"expected less than {classes}", "Is it another task's?"
                )
            frame = preprocess.check_frame(volume.frames[i], volume.bits)
            found.append(Case(case.frame_name(i, count), frame, volume.bits, truth, case.name))
        if sum(each.frame.nbytes for each in found) > MAX_BYTES:
            wanted = sample(wanted, len(wanted) // 2)
            kept = {dataset.cases[i].name for i in wanted}
            found = [each for each in found if each.case in kept] or found[:1]
    if not found:
        raise DataError(f"--data {dataset.kind}", "no images", "expected some for the parity check", "Name others.")
    return found


def sample(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, in their order, and always the same.

    Not every n-th, for data often comes in turns: of two kinds in turn, every second is of one.
    """
    ranks = np.random.default_rng(0).permutation(len(items))
    return [item for item, rank in zip(items, ranks, strict=True) if rank < count]


def run_case(case: Case, manifest: Manifest, infer: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> Result:
    """One case through the pixel contract and `infer`."""
    try:
        tensor = preprocess.to_tensor(case.frame, manifest.input, case.bits)
    except FrameError as error:
        raise ExportError(case.name, str(error), "", "Remove it from the parity check's images.") from error
    logits, mask, _ = postprocess.finish(infer(tensor), manifest, case.frame.shape[0], case.frame.shape[1])
    return Result(logits, mask)


def reference(model: MSA2Net) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """The reference network as a function of arrays."""

    def infer(x: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits: NDArray[np.float32] = model(torch.from_numpy(x)).numpy()
        return logits

    return infer


@dataclass(frozen=True)
class Judge:
    """Runs an artifact over the cases and the golden frames, each with what the reference makes of them."""

    folder: Path
    cases: Sequence[Case]
    expected: Sequence[Result]
    golden: Sequence[Case]
    golden_expected: Sequence[Result]
    report: Path | None
    bar: Any

    def __call__(self, manifest: Manifest, artifact: Artifact) -> dict[str, Any]:
        """The manifest's `parity` and `tolerance` of the artifact. Raises RuntimeUnavailableError if it cannot run."""
        self.bar.set_postfix_str(f"parity {artifact.name}")
        self.bar.total = max(self.bar.total, self.bar.n + len(self.cases))
        with ExitStack() as stack:
            if artifact.precision == "fp16" or artifact.runtime == "tensorrt":  # judged without a GPU
                infer = fp16.emulation(self.folder / artifact.files[0].path)
            else:
                files = tuple(str(self.folder / file.path) for file in artifact.files)
                kind = backend_class("pytorch" if artifact.runtime == "torch-tensorrt" else artifact.runtime)
                backend = kind(files, manifest, "CPU", artifact.precision, 1, None, artifact.rest)
                stack.callback(backend.close)
                infer = backend.infer

            def results() -> Iterator[Result]:
                for case in self.cases:
                    yield run_case(case, manifest, infer)
                    self.bar.update()

            figures = compare(
                self.cases,
                self.expected,
                results(),
                manifest.classes,
                artifact.precision,
                self.report,
                artifact.name,
            )
            held = [[run_case(case, manifest, infer) for case in self.golden]]
            if artifact.precision == "fp16":  # Arm's kernels sum in it, and some of a GPU's
                summed = fp16_sums.emulation(self.folder / artifact.files[0].path)
                try:
                    held.append([run_case(case, manifest, summed) for case in self.golden])
                except OutputError as error:
                    figures["verdict"] = "failed"
                    figures["reasons"].insert(
                        0, f"with sums in fp16, as Arm's kernels take them: {error.place}: {error.found}"
                    )
            repeats = artifact.precision not in INT8 or self._repeats(stack, manifest, artifact)
        if not repeats:
            figures["verdict"] = "failed"
            figures["reasons"].insert(
                0, "the same frame gives other logits at a second run: its runtime is broken here"
            )
        return {"parity": figures, "tolerance": self._tolerance(artifact.precision, held)}

    def _repeats(self, stack: ExitStack, manifest: Manifest, artifact: Artifact) -> bool:
        """Whether golden frames in turn give the same bits on all cores.

        OpenVINO's int8 did not, on a CPU with VNNI and without AMX; on one core, as judged, it was only wrong.
        """
        if artifact.runtime == "tensorrt":  # emulated
            return True
        files = tuple(str(self.folder / file.path) for file in artifact.files)
        kind = backend_class(artifact.runtime)
        backend = kind(files, manifest, "CPU", artifact.precision, default_threads(), None, artifact.rest)
        stack.callback(backend.close)
        runs = [[run_case(case, manifest, backend.infer).logits for case in self.golden] for _ in range(3)]
        return all(np.array_equal(first, other) for run in runs for first, other in zip(runs[0], run, strict=True))

    def _tolerance(self, precision: str, found: Sequence[Sequence[Result]]) -> dict[str, float]:
        """In fp32 what rounding explains, else `MARGIN` times what differs on the golden frames."""
        if precision == "fp32":
            largest = max(float(np.abs(result.logits).max()) for result in self.golden_expected)
            return {"logit": logit_limit(largest), "pixels": PIXEL_LIMIT}
        pairs = [pair for held in found for pair in zip(self.golden_expected, held, strict=True)]
        difference = max(float(np.abs(a.logits - b.logits).max()) for a, b in pairs)
        other = max(1 - pixel_agreement(a.mask, b.mask) for a, b in pairs)
        return {"logit": MARGIN * difference, "pixels": min(PIXEL_LIMIT, 1 - MARGIN * other)}


def compare(
    cases: Sequence[Case],
    expected: Sequence[Result],
    found: Iterable[Result],
    classes: Sequence[ClassInfo],
    precision: str,
    report: Path | None = None,
    artifact: str = "",
) -> dict[str, Any]:
    """The manifest's parity entry of an artifact: figures, `verdict` and `reasons`, see `runtimes.measure.judge`.

    An fp32 artifact that is further from the reference than rounding explains has failed, whatever its Dice.
    report   folder for `<artifact>.json`, the figures of every image, and `<artifact>.png`, the worst image
    """
    differences: list[float] = []
    images: list[ImageParity] = []
    masks: list[NDArray[np.uint8]] = []
    for case, want, got in zip(cases, expected, found, strict=True):
        differences.append(float(np.abs(want.logits - got.logits).max()))
        images.append(image_parity(case.name, want.mask, got.mask, len(classes), case.truth, case.case or None))
        masks.append(got.mask)
    figures = judge(images, [info.name for info in classes])
    largest = max(float(np.abs(result.logits).max()) for result in expected)
    figures = {"logit_difference": float(np.max(differences)), "largest_logit": largest} | figures
    limit = logit_limit(largest)
    # Asked this way round, NaN does not pass.
    close = figures["logit_difference"] <= limit and figures["pixel_agreement"] >= PIXEL_LIMIT
    if precision == "fp32" and not close:
        figures["verdict"] = "failed"
        figures["reasons"].insert(
            0,
            f"largest logit difference {figures['logit_difference']:.2e}, equal pixels "
            f"{figures['pixel_agreement']:.4%}: fp32 needs {limit:.2e} and {PIXEL_LIMIT:.2%}",
        )
    if report is not None:
        worst = next(i for i, image in enumerate(images) if image.name == figures["worst"]["image"])
        stem = report / artifact.replace(" ", "-")
        with reporting(report):
            _write_report(stem, figures, images, cases[worst], expected[worst], masks[worst], classes)
    return figures


@contextmanager
def reporting(report: Path) -> Iterator[None]:
    """Raises ExportError in place of OSError: the report cannot be written."""
    try:
        yield
    except OSError as error:
        raise ExportError(
            report, f"cannot be written ({error.strerror})", "expected a folder", "Name another --report."
        ) from error


def logit_limit(largest_logit: float) -> float:
    """What rounding may change of a logit in fp32, given the largest."""
    return LOGIT_LIMIT * max(1.0, largest_logit)


def require(artifact: str, figures: dict[str, Any], precision: str) -> None:
    """Raises ExportError with the figures unless the artifact has passed."""
    if has_passed(figures["verdict"], precision):
        return
    raise ExportError(
        f"parity of {artifact}",
        "; ".join([*figures["reasons"], *filter(None, [figures["reason"]])]),
        f"expected the verdict 'standard' over {figures['images']} images (worst: {figures['worst']['image']})",
        "Nothing was written. --report DIR draws the worst image, --allow-accuracy-loss writes it all the same.",
    )


def _write_report(
    stem: Path,
    figures: dict[str, Any],
    images: Sequence[ImageParity],
    case: Case,
    expected: Result,
    mask: NDArray[np.uint8],
    classes: Sequence[ClassInfo],
) -> None:
    from PIL import Image

    from msa2net.runtimes.overlay import draw, side_by_side, to_rgb

    stem.parent.mkdir(parents=True, exist_ok=True)
    every = [asdict(image) for image in images]
    stem.with_suffix(".json").write_text(json.dumps(figures | {"each": every}, indent=1) + "\n", encoding="utf-8")
    pictures = {
        case.name: Image.fromarray(to_rgb(case.frame, case.bits)),
        "fp32 reference": draw(case.frame, expected.mask, classes, case.bits),
        f"{stem.name} ({figures['worst']['pixel_agreement']:.2%} equal)": draw(case.frame, mask, classes, case.bits),
    }
    if case.truth is not None:
        pictures["truth"] = draw(case.frame, case.truth, classes, case.bits)
    side_by_side(pictures).save(stem.with_suffix(".png"))
