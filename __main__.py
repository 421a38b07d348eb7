"""The command line, `msa2net export | predict | verify | info | sign | …`. An error of ours is one line, code 2."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from msa2net.errors import FrameError, Msa2NetError
from msa2net.runtimes import (
    AccuracyLossWarning,
    CacheWarning,
    DemoModelWarning,
    Predictor,
    Segmentation,
    acceptance,
    files,
    signature,
)
from msa2net.runtimes.backends import RUNTIMES, candidates
from msa2net.runtimes.bundle import (
    ENLARGE_RULES,
    HARDWARE_COMPATIBILITY,
    PRECISIONS,
    RESIZE_RULES,
    TARGETS,
    Bundle,
)
from msa2net.runtimes.cache import VARIABLE, default_folder
from msa2net.runtimes.images import read_frames
from msa2net.runtimes.predictor import DEMO_BUNDLE

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Number of the file and of the frame in it, from 1; pixels; bits stored.
_Frame: TypeAlias = "tuple[int, int, NDArray[Any], int | None]"


def _runtime_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runtime", default="auto", help=f"auto, {', '.join(RUNTIMES)} (default: auto)")
    parser.add_argument("--precision", default="fp32", help=f"{', '.join(PRECISIONS)} (default: fp32)")
    parser.add_argument("--device", help="CPU, cuda, cuda:N, …; default: cuda with TensorRT, else CPU")
    parser.add_argument("--threads", type=int, help="default: the cores that the process may use")
    parser.add_argument("--minimum-version", metavar="V", help="of the model; an older bundle is refused")
    parser.add_argument(
        "--require-signature", type=Path, metavar="KEY", help="a public key in PEM, or a folder of them"
    )


def _load(arguments: argparse.Namespace, path: Path | None) -> Predictor:
    return Predictor.load(
        path,
        runtime=arguments.runtime,
        precision=arguments.precision,
        device=arguments.device,
        threads=arguments.threads,
        minimum_version=arguments.minimum_version,
        require_signature=arguments.require_signature,
    )


# predict --------------------------------------------------------------------------------------------------------


def _inputs(paths: list[Path]) -> list[Path]:
    """The files given, each folder replaced by its files in order of name."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        else:
            files.append(path)
    if not files:
        raise FrameError("FILE", "an empty folder", "expected images", "Name files, or a folder that holds some.")
    return files


def _frames(files: list[Path]) -> Iterator[_Frame]:
    """Every frame of the files."""
    for number, file in enumerate(files, 1):
        try:
            for index, (pixels, bits) in enumerate(read_frames(file), 1):
                yield number, index, pixels, bits
        except FrameError as error:
            raise _of_input(error, number, len(files)) from error


def _of_input(error: FrameError, number: int, count: int) -> FrameError:
    return FrameError(f"input {number} of {count}, {error.place}", error.found, error.expected, error.advice)


class _Target:
    """Where pictures go: the named file for a single frame, else a folder with one file a frame."""

    def __init__(self, option: str, path: Path | None, inputs: list[Path], ending: str = ".png") -> None:
        self.option, self.path, self._ending = option, path, ending
        self.single = bool(path and path.suffix and not path.is_dir())
        if path and self.single and path.suffix.lower() != ending:
            raise Msa2NetError(
                option, f"got the ending {path.suffix!r}", f"expected {ending} or a folder", "Rename it."
            )
        if path and any(path.resolve() == file.resolve() for file in inputs):
            raise Msa2NetError(option, "names an input", "expected another file", "The image would be lost.")
        if path and not self.single and any(path.resolve() == file.resolve().parent for file in inputs):
            raise Msa2NetError(option, "is the folder of an input", "expected another", "An image could be lost.")

    def file(self, *numbers: int) -> Path:
        assert self.path is not None
        if self.single:
            return self.path
        self.path.mkdir(parents=True, exist_ok=True)
        return self.path / f"{'_'.join(f'{number:04d}' for number in numbers)}{self._ending}"

    def check(self, frames: Iterator[_Frame]) -> Iterator[_Frame]:
        """The same frames. Raises Msa2NetError if there are several for one picture, before any is segmented."""
        if not self.single:
            return frames
        first_two = list(islice(frames, 2))
        if len(first_two) > 1:
            raise Msa2NetError(
                self.option, "got several frames", "expected a folder for their pictures", "Name one without .png."
            )
        return iter(first_two)


class _Segmentations:
    """`--segmentation`: a DICOM Segmentation of each input, written when its last frame has been segmented."""

    def __init__(self, arguments: argparse.Namespace, inputs: list[Path], predictor: Predictor) -> None:
        """Before anything is segmented: every input can be referred to, and every class has its codes."""
        self._target = _Target("--segmentation", arguments.segmentation, inputs, ".dcm")
        self._count, self._of, self._masks = len(inputs), 0, list[bytes]()
        self._sources: list[Any] = []
        self._codes = _codes(arguments.codes) if arguments.codes else None
        if not self._target.path:
            return
        if self._target.single and len(inputs) > 1:
            found, expected = f"got {len(inputs)} inputs", "expected a folder for their objects"
            raise Msa2NetError("--segmentation", found, expected, "Name one without .dcm.")
        try:
            from pydicom import dcmread

            from msa2net.runtimes import dicom
        except ImportError as error:
            advice = "pip install 'msa2net-edge[dicom-seg]'"
            raise Msa2NetError("--segmentation", f"needs the package {error.name}", "", advice) from error
        classes, execution = predictor.bundle.manifest.classes, predictor.execution
        dicom.require_codes(classes, self._codes)
        for number, file in enumerate(inputs, 1):
            try:
                self._sources.append(dcmread(file, stop_before_pixels=True))
            except Exception:  # a damaged file raises nearly anything
                wrong = FrameError(
                    "--segmentation", "is no DICOM file", "expected one that the object can refer to", "Use --mask."
                )
                raise _of_input(wrong, number, self._count) from None
            try:
                dicom.require_source(self._sources[-1], classes, execution, self._codes)
            except FrameError as error:
                raise _of_input(error, number, self._count) from error

    def add(self, number: int, seg: Segmentation) -> None:
        if self._target.path:
            if self._masks and number != self._of:
                self.write()
            self._of, self._last, self._shape = number, seg, seg.mask.shape
            self._masks.append(zlib.compress(seg.on_frame().tobytes(), 1))  # a clip may have thousands

    def write(self) -> None:
        if not self._masks:
            return
        from msa2net.runtimes import dicom

        masks = (np.frombuffer(zlib.decompress(each), np.uint8).reshape(self._shape) for each in self._masks)
        try:
            made = dicom.segmentation(
                self._sources[self._of - 1], masks, self._last.classes, self._last.execution, codes=self._codes
            )
        except FrameError as error:
            raise _of_input(error, self._of, self._count) from error
        with (
            warnings.catch_warnings(),
            files.replacing(self._target.file(self._of), f"--segmentation, input {self._of}") as out,
        ):
            warnings.simplefilter("ignore")  # they quote attributes
            made.save_as(out)
        self._masks = []


def _codes(path: Path) -> dict[str, Any]:
    """{"class": [[value, scheme, meaning], [value, scheme, meaning]]}: category and type. Raises Msa2NetError."""
    expected = 'expected {"class": [[value, scheme, meaning], [value, scheme, meaning]]}, category and type'
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Msa2NetError("--codes", f"cannot be read ({type(error).__name__})", expected, "See the README.") from None
    if not isinstance(found, dict):
        raise Msa2NetError("--codes", "is no object", expected, "See the README.")
    for pair in found.values():
        two = isinstance(pair, list) and len(pair) == 2 and all(isinstance(code, list) for code in pair)
        if not two or any(len(code) != 3 or not all(isinstance(text, str) for text in code) for code in pair):
            raise Msa2NetError("--codes", f"got {json.dumps(pair)[:60]}", expected, "See the README.")
    return {name: tuple(map(tuple, pair)) for name, pair in found.items()}


def _report(number: int, index: int, seg: Segmentation) -> dict[str, Any]:
    counts = np.bincount(seg.mask.ravel(), minlength=len(seg.classes))
    return {
        "input": number,
        "frame": index,
        "height": seg.mask.shape[0],
        "width": seg.mask.shape[1],
        "pixels": {info.name: int(count) for info, count in zip(seg.classes, counts, strict=True)},
        "milliseconds": {
            "preprocess": round(seg.timings.preprocess, 3),
            "inference": round(seg.timings.inference, 3),
            "postprocess": round(seg.timings.postprocess, 3),
        },
        "quality": {name: round(value, 4) for name, value in asdict(seg.quality).items()},
        "flags": seg.flags,
        "execution": seg.execution.to_json(),
    }


def predict(arguments: argparse.Namespace) -> int:
    from PIL import Image

    from msa2net.runtimes.overlay import draw

    files = _inputs(arguments.files)
    overlays, masks = _Target("--overlay", arguments.overlay, files), _Target("--mask", arguments.mask, files)
    if overlays.path and masks.path and overlays.path.resolve() == masks.path.resolve():
        raise Msa2NetError("--mask", "is --overlay, too", "expected another", "Name two files or folders.")
    with _load(arguments, arguments.bundle) as predictor:
        segmentations = _Segmentations(arguments, files, predictor)
        frames = _frames(files)
        for target in (overlays, masks):
            frames = target.check(frames)
        if not arguments.json:
            e = predictor.execution
            print(
                f"{e.model} {e.model_version} on {e.runtime} {e.runtime_version}, {e.precision} "
                f"(accuracy: {e.accuracy}), {e.threads} threads"
            )
            print(f"{'input':>5} {'frame':>5} {'rows':>6} {'cols':>6} {'ms':>8}  share of each class")
        for number, index, pixels, bits in frames:
            try:
                seg = predictor.predict(pixels, bits=bits)
            except FrameError as error:
                raise _of_input(error, number, len(files)) from error
            if overlays.path:
                draw(pixels, seg.mask, seg.classes, bits).save(overlays.file(number, index))
            if masks.path:
                Image.fromarray(seg.mask).save(masks.file(number, index))
            segmentations.add(number, seg)
            report = _report(number, index, seg)
            if arguments.json:
                print(json.dumps(report))
            else:
                shares = ", ".join(f"{name} {count / seg.mask.size:.2%}" for name, count in report["pixels"].items())
                size = f"{seg.mask.shape[0]:>6} {seg.mask.shape[1]:>6}"
                flags = f"  flags: {', '.join(report['flags'])}" if report["flags"] else ""
                print(f"{number:>5} {index:>5} {size} {seg.timings.total:>8.1f}  {shares}{flags}")
        segmentations.write()
    return 0


# verify, info, export -------------------------------------------------------------------------------------------


def verify(arguments: argparse.Namespace) -> int:
    """Every digest, then the golden frames on every artifact that can run here."""
    path = arguments.bundle or DEMO_BUNDLE
    bundle = Bundle(path)
    print(f"{bundle.verify()} files match their sums; bundle digest {bundle.digest}")
    if arguments.key:
        print(f"signed by the key {signature.verify(bundle, arguments.key)}")
    elif signature.path_of(path).exists():
        print("signed; not verified without --key")
    else:
        print("unsigned")
    failed = ran = 0
    for entry in Predictor.available(path):
        name = f"{entry.runtime:<12} {entry.precision:<13}"
        if not entry.available:
            print(f"{name} not run: {entry.reason}")
            continue
        ran += 1
        try:
            with Predictor.load(path, runtime=entry.runtime, precision=entry.precision) as predictor:
                result = predictor.self_test()
        except Msa2NetError as error:
            print(f"{name} FAIL: {error}")
            failed += 1
            continue
        print(f"{name} {result}")
        failed += not result.passed
    if failed or not ran:
        reason = f"{failed} artifacts fail their golden frames" if failed else "no artifact of it can run here"
        raise Msa2NetError(str(path), reason, "expected all to pass", "Do not use it on this device.")
    return 0


def selftest(arguments: argparse.Namespace) -> int:
    """The acceptance test, printed and written; the exit code is 0 if it is passed and 1 if not."""
    if arguments.rounds < 1:
        raise Msa2NetError("--rounds", f"got {arguments.rounds}", "expected at least 1", f"{acceptance.ROUNDS} serve.")
    path = arguments.bundle or DEMO_BUNDLE
    report = acceptance.accept(
        path, lambda: _load(arguments, arguments.bundle), rounds=arguments.rounds, limit=arguments.limit_ms
    )
    if arguments.report:
        files.write_json(arguments.report, report)
    print(f"{'bundle':<12} {report['bundle']['digest']}, {report['bundle']['files']} files match their sums")
    verdict = "PASS" if report["passed"] else f"FAIL: {'; '.join(report['reasons'])}"
    if "golden" not in report:  # it cannot even run
        print(verdict)
        return 1
    execution, device, golden = report["execution"], report["device"], report["golden"]
    print(f"{'model':<12} {report['bundle']['model']} {report['bundle']['model_version']}, {execution['signature']}")
    print(f"{'artifact':<12} {report['artifact']['name']}, accuracy {report['artifact']['accuracy']}")
    print(f"{'device':<12} {device['processor']}, {device['architecture']}, {execution['threads']} threads")
    print(
        f"{'golden':<12} {golden['frames']} frames, largest logit difference {golden['logit_difference']:.2e} (limit "
        f"{golden['logit_tolerance']:.0e}), equal pixels {golden['pixel_agreement']:.4%} (limit "
        f"{golden['pixel_tolerance']:.2%})"
    )
    for entry in report["milliseconds"]:
        last = "-" if entry["p99"] is None else f"{entry['p99']:.2f}"
        print(
            f"{'milliseconds':<12} {'x'.join(map(str, entry['frame'])):<14} p50 {entry['p50']:.2f}, p99 {last}, "
            f"longest {entry['longest']:.2f}, n {entry['n']}, {entry['graph']}"
        )
    if (at_export := report["inference_at_export"])["ratio"]:
        before = f"{at_export['milliseconds']:.2f} ms on {at_export['machine']}"
        print(f"{'at export':<12} {before}: {at_export['ratio']} times it")
    print(verdict)
    return 0 if report["passed"] else 1


def sign(arguments: argparse.Namespace) -> int:
    made = signature.sign(arguments.bundle, arguments.key, arguments.output)
    print(f"{made}: of the bundle {Bundle(arguments.bundle).digest}")
    return 0


def build_engine(arguments: argparse.Namespace) -> int:
    """Builds what the runtime compiles on this device, runs the golden frames on it, and keeps it for every start."""
    if arguments.cache is None and default_folder() is None:
        raise Msa2NetError("build-engine", f"${VARIABLE} is off", "expected a folder", "Give --cache.")
    start = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)
        try:
            with Predictor.load(
                arguments.bundle,
                runtime=arguments.runtime,
                precision=arguments.precision,
                device=arguments.device,
                cache=arguments.cache,
            ) as predictor:
                execution = predictor.execution
        except CacheWarning as warning:
            raise Msa2NetError("build-engine", str(warning), "", "Nothing was kept.") from warning
    found = "was there" if execution.cached else f"built in {time.monotonic() - start:.0f} s, its golden frames passed"
    print(f"{execution.runtime} {execution.precision} on {execution.device}: {found}; {execution.provider}")
    if execution.layers:
        print(f"layers   {', '.join(f'{count} in {name}' for name, count in execution.layers.items())}")
    return 0


def info(arguments: argparse.Namespace) -> int:
    path = arguments.bundle or DEMO_BUNDLE
    bundle = Bundle(path)
    manifest, contract = bundle.manifest, bundle.manifest.input
    print(f"model    {manifest.model_name} {manifest.model_version} ({manifest.model_variant})")
    print(f"notice   {manifest.notice}")
    print(f"digest   {bundle.digest}")
    print(f"classes  {', '.join(c.name for c in manifest.classes)}")
    print(f"input    {contract.channels} x {contract.height} x {contract.width}, {contract.resize}, {contract.fit}")
    for name, (least, most) in (manifest.quality or {}).items():
        print(f"flag     {name:<10} below {least:.4f} or above {most:.4f}")
    print(f"{'runtime':<12} {'precision':<13} {'MB':>7}  {'equal pixels':>12}  {'accuracy':<8}  here")
    withheld = {(each.runtime, each.precision) for each in manifest.withheld}
    for entry in Predictor.available(path):
        if (entry.runtime, entry.precision) in withheld:
            print(f"{entry.runtime:<12} {entry.precision:<13} {'-':>7}  {'-':>12}  {entry.accuracy:<8}  {entry.reason}")
            continue
        artifact = bundle.artifact(entry.runtime, entry.precision)
        size = sum(file.bytes for file in artifact.files) / 1e6
        agreement = artifact.parity.get("pixel_agreement")
        shown = f"{agreement:.4%}" if isinstance(agreement, float) else "?"
        here = ", ".join(filter(None, ("yes", entry.speed))) if entry.available else entry.reason
        print(f"{entry.runtime:<12} {entry.precision:<13} {size:>7.1f}  {shown:>12}  {entry.accuracy:<8}  {here}")
    return 0


def export(arguments: argparse.Namespace) -> int:
    try:
        from msa2net.export.__main__ import run
    except ImportError as error:
        raise Msa2NetError(
            "export", f"needs the package {error.name}", "", "pip install 'msa2net-edge[export]'"
        ) from error
    return run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="msa2net", description="MSA2Net medical image segmentation on edge hardware.")
    parser.add_argument("--verbose", action="store_true", help="log what runtime=auto passes over and picks")
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("predict", help="segment images, folders of images, or clips")
    command.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="PNG, JPEG, TIFF, .npy, DICOM, or a folder"
    )
    command.add_argument("--bundle", type=Path, help="default: the demo model")
    _runtime_options(command)
    command.add_argument("--overlay", type=Path, help=".png for a single frame, else a folder")
    command.add_argument("--mask", type=Path, help=".png of class indices for a single frame, else a folder")
    command.add_argument(
        "--segmentation", type=Path, help=".dcm for a single input, else a folder: DICOM Segmentations of DICOM inputs"
    )
    command.add_argument("--codes", type=Path, help="JSON: category and type of each class, for --segmentation")
    command.add_argument("--json", action="store_true", help="one JSON object a frame, one a line")
    command.set_defaults(run=predict)

    command = commands.add_parser("verify", help="check every file of a bundle and run its golden frames here")
    command.add_argument("bundle", nargs="?", type=Path, help="default: the demo's")
    command.add_argument("--key", type=Path, help="a public key in PEM, or a folder of them, that must have signed it")
    command.set_defaults(run=verify)

    command = commands.add_parser("selftest", help="the acceptance test on this device, with a report")
    command.add_argument("bundle", nargs="?", type=Path, help="default: the demo's")
    _runtime_options(command)
    command.add_argument("--report", type=Path, metavar="FILE", help="JSON")
    command.add_argument("--rounds", type=int, default=acceptance.ROUNDS, help="of each frame (default: %(default)s)")
    command.add_argument("--limit-ms", type=float, metavar="MS", help="for 99 of 100 frames, all included")
    command.set_defaults(run=selftest)

    command = commands.add_parser("sign", help="sign a bundle, in the OpenSSF model-signing format")
    command.add_argument("bundle", type=Path)
    command.add_argument(
        "--key", type=Path, required=True, help="a private key in PEM: Ed25519, or ECDSA on a NIST curve"
    )
    command.add_argument("--output", type=Path, help="default: BUNDLE.sig beside the bundle")
    command.set_defaults(run=sign)

    command = commands.add_parser("build-engine", help="compile for this GPU now, and keep it for every start")
    command.add_argument("bundle", nargs="?", type=Path, help="default: the demo's")
    command.add_argument(
        "--runtime", default="tensorrt", choices=[name for name, entry in RUNTIMES.items() if entry.device == "cuda"]
    )
    command.add_argument("--precision", default="fp32", help=f"{', '.join(PRECISIONS)} (default: fp32)")
    command.add_argument("--device", help="cuda or cuda:N (default: cuda)")
    command.add_argument("--cache", type=Path, help="default: $MSA2NET_CACHE, else ~/.cache/msa2net")
    command.set_defaults(run=build_engine)

    command = commands.add_parser("info", help="what a bundle holds and what of it can run here")
    command.add_argument("bundle", nargs="?", type=Path, help="default: the demo's")
    command.set_defaults(run=info)

    command = commands.add_parser("export", help="a checkpoint to a bundle, parity checked")
    command.add_argument("--checkpoint", required=True, type=Path, help=".safetensors, or a released .pth")
    command.add_argument("--output", required=True, type=Path, help="the bundle's folder, such as lesion.bundle")
    command.add_argument("--force", action="store_true", help="replace an existing bundle, in one step")
    command.add_argument(
        "--runtimes",
        default=",".join(candidates("CPU")),
        help=f"some of {','.join(RUNTIMES)} (default: %(default)s)",
    )
    command.add_argument(
        "--precisions", default="fp32", help="some of fp32,bf16,fp16,int8,int8-portable (default: %(default)s)"
    )
    command.add_argument(
        "--data",
        metavar="KIND:PATH",
        help="images for the accuracy check, such as images:DIR or folder:DIR; default: phantoms",
    )
    command.add_argument(
        "--calibration",
        metavar="KIND:PATH",
        help="images for int8's ranges, other than --data's; default: phantoms",
    )
    command.add_argument("--keep", metavar="PLACES", help="places that stay out of int8, separated by commas")
    command.add_argument(
        "--fine-tuned",
        type=Path,
        metavar="FILE",
        help="weights for int8, from core.train --int8; judged against --checkpoint's fp32",
    )
    command.add_argument(
        "--allow-slower", action="store_true", help="ship int8 that is not faster on this machine, for another device"
    )
    command.add_argument("--batch", type=int, default=1, help="images that TensorRT's engine takes (default: 1, fixed)")
    command.add_argument(
        "--hardware-compatibility",
        choices=HARDWARE_COMPATIBILITY,
        default="none",
        help="other GPUs that TensorRT's engine may run on than the one that builds it (default: none)",
    )
    command.add_argument(
        "--targets",
        default=",".join(TARGETS),
        help="compute capabilities that TensorRT for RTX's engines are for (default: %(default)s)",
    )
    command.add_argument(
        "--bake",
        metavar="WxH",
        help="sizes of a camera's frames, as 1920x1080 or 640x480:grey: graphs from such a frame to its mask",
    )
    command.add_argument("--bake-outputs", metavar="NAMES", help="of these graphs, beside the mask: confidence, colors")
    command.add_argument("--report", type=Path, metavar="DIR", help="every image's figures, and the worst image drawn")
    command.add_argument(
        "--allow-accuracy-loss", action="store_true", help="write artifacts that fail the check; they will say so"
    )
    command.add_argument("--name", help="the model's name in the bundle; default: the checkpoint's")
    command.add_argument("--model-version", help="default: the checkpoint's, or 1")
    command.add_argument("--classes", help="names, separated by commas, the background first")
    command.add_argument("--mean", help="one or three numbers, of pixels scaled to [0, 1]")
    command.add_argument("--std", help="one or three numbers")
    command.add_argument("--channels", type=int, choices=(1, 3), default=3)
    command.add_argument("--resize", choices=RESIZE_RULES, help="default: the checkpoint's, bilinear as bilinear-fixed")
    command.add_argument("--fit", choices=("stretch", "letterbox"), default="stretch")
    command.add_argument("--enlarge", choices=ENLARGE_RULES, help="default: aligned with spline, else nearest")
    command.set_defaults(run=export)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.verbose:  # ours alone: what other libraries log can name a file or a patient
        logging.getLogger("msa2net").addHandler(logging.StreamHandler())
        logging.getLogger("msa2net").setLevel(logging.INFO)
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    with warnings.catch_warnings():
        # Shown as one line; a DemoModelWarning needs no line number of ours.
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning, module="msa2net")
        for category in (
            DemoModelWarning,
            AccuracyLossWarning,
            CacheWarning,
        ):  # by `python -m` they come from the module __main__
            warnings.simplefilter("always", category)
        try:
            code: int = arguments.run(arguments)
        except Msa2NetError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except OSError as error:
            print(f"error: {error.strerror or type(error).__name__}. Check disk and permissions.", file=sys.stderr)
            return 2
    return code


if __name__ == "__main__":
    sys.exit(main())
