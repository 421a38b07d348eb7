"""The command line: what it prints, writes and refuses, in one process unless a traceback could hide."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread

from msa2net.__main__ import main
from msa2net.core.phantoms import phantom
from msa2net.runtimes.backends import candidates

RUNTIMES = candidates("CPU")

FRAME = phantom("ultrasound", 5, (90, 120)).image


@pytest.fixture
def png(tmp_path: Path) -> Path:
    path = tmp_path / "frame.png"
    Image.fromarray(FRAME).save(path)
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


Run = Callable[..., tuple[int, str, str]]


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_predict_writes_mask_and_overlay_of_the_frame_s_size(run: Run, png: Path, tmp_path: Path, runtime: str) -> None:
    mask, overlay = tmp_path / "mask.png", tmp_path / "overlay.png"
    code, out, err = run("predict", png, "--runtime", runtime, "--mask", mask, "--overlay", overlay)
    assert code == 0
    assert f"on {runtime} " in out
    assert err == (
        "warning: no bundle was named: this is the demo model, trained on synthetic phantoms. Not for clinical use.\n"
    )
    assert pixels_of(mask).shape == (90, 120)
    assert set(np.unique(pixels_of(mask))) <= {0, 1}
    assert pixels_of(overlay).shape == (90, 120, 3)


def test_json_counts_every_pixel_and_names_no_path(run: Run, png: Path, bundle: Path) -> None:
    code, out, err = run("predict", png, png, "--bundle", bundle, "--json")
    assert (code, err) == (0, "")
    reports = [json.loads(line) for line in out.splitlines()]
    assert [report["input"] for report in reports] == [1, 2]
    for report in reports:
        assert sum(report["pixels"].values()) == report["height"] * report["width"] == FRAME[..., 0].size
        assert report["execution"]["precision"] == "fp32"
    assert png.name not in out
    assert str(png.parent) not in out


def test_a_folder_gives_one_picture_a_frame(run: Run, png: Path, bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.png", "b.png", ".hidden"):
        (folder / name).write_bytes(png.read_bytes())
    code, _, _ = run("predict", folder, "--bundle", bundle, "--overlay", tmp_path / "out")
    assert code == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["0001_0001.png", "0002_0001.png"]


def test_a_clip_gives_one_line_a_frame(run: Run, bundle: Path, examples: Callable[[str], Path]) -> None:
    code, out, _ = run("predict", examples("ybr_color"), "--bundle", bundle, "--json", "--runtime", "onnxruntime")
    assert code == 0
    assert [json.loads(line)["frame"] for line in out.splitlines()] == list(range(1, 31))


def test_verify_checks_every_file_and_runtime(run: Run, bundle: Path) -> None:
    code, out, _ = run("verify", bundle)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].endswith("bundle digest " + lines[0].rpartition(" ")[2])
    assert [line.split()[0] for line in lines[2:]] == list(RUNTIMES)
    assert all(" pass: " in line for line in lines[2:])


def test_info_shows_what_can_run(run: Run, bundle: Path) -> None:
    code, out, _ = run("info", bundle)
    assert code == 0
    assert "classes  background, lesion" in out
    assert "Not for clinical use" in out or "notice" in out
    assert all(f"{runtime:<12} fp32" in out for runtime in RUNTIMES)


def test_info_shows_each_artifacts_accuracy(run: Run, judged: Callable[..., Path]) -> None:
    bundle = judged("failed", ["bound 0.98 of the reference's mean Dice, standard needs 0.99"], "openvino")
    code, out, err = run("info", bundle)
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines() if " fp32 " in line]
    assert [(row[0], row[4], row[5]) for row in rows] == [
        ("onnxruntime", "high", "yes"),
        ("openvino", "failed", "yes"),
        ("pytorch", "high", "yes"),
    ]


def test_info_shows_the_resize_rule(run: Run, bundle: Path) -> None:
    _, out, _ = run("info", bundle)
    assert "input    3 x 224 x 224, bilinear, stretch" in out.splitlines()


def test_predict_with_an_artifact_that_failed_warns_and_says_so(
    run: Run, png: Path, judged: Callable[..., Path]
) -> None:
    bundle = judged("failed", ["first reason", "second reason"], "onnxruntime")
    code, out, err = run("predict", png, "--bundle", bundle, "--runtime", "onnxruntime")
    assert code == 0
    assert ", fp32 (accuracy: failed), " in out.splitlines()[0]
    assert err == ("warning: onnxruntime fp32 failed its accuracy check at export: first reason; second reason\n")
    code, out, err = run("predict", png, "--bundle", bundle, "--json")
    assert (code, err) == (0, "")
    execution = json.loads(out)["execution"]
    assert (execution["runtime"], execution["accuracy"]) == ("openvino", "high")


def test_the_warning_is_shown_however_the_command_is_started(png: Path, judged: Callable[..., Path]) -> None:
    bundle = judged("failed", ["first reason"], "onnxruntime")
    command = ["predict", str(png), "--bundle", str(bundle), "--runtime", "onnxruntime"]
    child = subprocess.run([sys.executable, "-m", "msa2net", *command], capture_output=True, text=True, cwd="/")
    assert child.returncode == 0
    assert child.stderr == "warning: onnxruntime fp32 failed its accuracy check at export: first reason\n"


EXPORT_ARGUMENTS = ("export", "--checkpoint", "w.safetensors", "--output", "w.bundle")


def exported_with(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> dict[str, object]:
    """The options that the export gets, once it has run; it writes nothing and gives `bundle`."""
    import msa2net.export.__main__ as command

    found: dict[str, object] = {}

    def export_bundle(checkpoint: Path, output: Path, **options: object) -> Path:
        found.update(options, checkpoint=checkpoint, output=output)
        return bundle

    monkeypatch.setattr(command, "export_bundle", export_bundle)
    return found


def test_the_options_of_export_are_passed_on(run: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = exported_with(monkeypatch, bundle)
    data = ("--data", "folder:images", "--report", "report", "--allow-accuracy-loss", "--resize", "spline")
    assert run(*EXPORT_ARGUMENTS, *data, "--runtimes", "pytorch")[0] == 0
    assert (found["data"], found["report"], found["resize"]) == ("folder:images", Path("report"), "spline")
    assert found["allow_accuracy_loss"] is True
    assert found["runtimes"] == ("pytorch",)


def test_export_asks_for_nothing_by_default(run: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = exported_with(monkeypatch, bundle)
    assert run(*EXPORT_ARGUMENTS)[0] == 0
    assert (found["data"], found["report"], found["resize"]) == (None, None, None)
    assert (found["allow_accuracy_loss"], found["force"]) == (False, False)


def test_export_prints_each_artifacts_verdict_and_reasons(
    run: Run, judged: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = judged("failed", ["first reason", "second reason"], "openvino")
    exported_with(monkeypatch, bundle)
    code, out, err = run(*EXPORT_ARGUMENTS)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith(f"{bundle}: bundle digest ")
    assert [line.split()[0] for line in lines[1:]] == ["onnxruntime", "openvino", "first", "second", "pytorch"]
    figures = "equal pixels 100.0000%, bound 1.0000 of fp32's Dice, largest logit difference "
    for line, verdict in ((lines[1], "high"), (lines[2], "failed"), (lines[5], "high")):
        assert f" MB  {verdict:<8} {figures}" in line
        assert line.endswith(", 40 images")
    assert [line.strip() for line in lines[3:5]] == ["first reason", "second reason"]


def test_the_images_option_that_there_was_is_gone(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*EXPORT_ARGUMENTS, "--images", "folder")
    assert caught.value.code == 2
    assert "unrecognized arguments: --images folder" in capsys.readouterr().err


def damage(bundle: Path) -> None:
    file = bundle / "onnx" / "model.onnx"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_verify_names_a_changed_file(run: Run, bundle: Path) -> None:
    damage(bundle)
    code, out, err = run("verify", bundle)
    assert (code, out) == (2, "")
    assert err == f"error: {bundle}: changed onnx/model.onnx, expected the sums of SHA256SUMS. Copy the bundle anew.\n"


def test_predict_refuses_a_changed_model_and_writes_nothing(run: Run, png: Path, bundle: Path, tmp_path: Path) -> None:
    damage(bundle)
    mask = tmp_path / "mask.png"
    code, _, err = run("predict", png, "--bundle", bundle, "--runtime", "onnxruntime", "--mask", mask)
    assert code == 2
    assert err.startswith("error: onnx/model.onnx: changed: SHA-256 ")
    assert not mask.exists()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "an empty file, expected a PNG, JPEG, TIFF, .npy or DICOM file. Copy it anew."),
        (b"not an image", "not a readable image, expected a PNG, JPEG, TIFF, .npy or DICOM file. Is it whole"),
        (None, "no such file, expected a PNG, JPEG, TIFF, .npy or DICOM file. Check the path."),
    ],
    ids=["empty", "text", "missing"],
)
def test_a_file_that_is_no_image_is_one_line_and_code_2(
    run: Run, bundle: Path, tmp_path: Path, content: bytes | None, text: str
) -> None:
    path = tmp_path / "patient_name.png"
    if content is not None:
        path.write_bytes(content)
    code, _, err = run("predict", path, "--bundle", bundle, "--json")
    assert code == 2
    assert err.startswith(f"error: input 1 of 1, image: {text}")
    assert err.count("\n") == 1
    assert "patient_name" not in err


@pytest.mark.parametrize("damage", [False, True], ids=["whole", "truncated"])
def test_nothing_that_is_printed_logged_or_written_tells_whose_image_it_was(
    run: Run,
    bundle: Path,
    tmp_path: Path,
    examples: Callable[[str], Path],
    caplog: pytest.LogCaptureFixture,
    damage: bool,
) -> None:
    """Of a real clip: neither its path, nor any text of its attributes, nor its pixels."""
    folder = tmp_path / "DOE^JANE"
    folder.mkdir()
    source = examples("ybr_color")
    content = source.read_bytes()
    path = folder / "DOE^JANE.dcm"
    path.write_bytes(content[: len(content) // 2] if damage else content)
    texts = {"DOE^JANE"} | {
        str(element.value)
        for element in dcmread(source)
        if element.VR in ("PN", "LO", "SH", "UI", "DA", "TM", "LT", "ST", "AS") and len(str(element.value)) > 4
    }
    assert len(texts) > 10
    with caplog.at_level(logging.DEBUG):
        code, out, err = run("predict", path, "--bundle", bundle, "--json", "--mask", tmp_path / "masks")
    assert code == (2 if damage else 0)
    written = "".join(str(file) for file in (tmp_path / "masks").rglob("*"))
    told = out + err + caplog.text + written.replace(str(tmp_path), "")
    assert [text for text in texts if text in told] == []


def test_a_truncated_image_is_named_by_its_number(run: Run, png: Path, bundle: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(png.read_bytes()[:-200])
    code, out, err = run("predict", png, broken, "--bundle", bundle, "--json")
    assert code == 2
    assert len(out.splitlines()) == 1  # the good one before it
    assert err == (
        "error: input 2 of 2, image: PNG data is truncated or damaged, expected a whole file. Copy it anew.\n"
    )


def test_an_array_out_of_range_is_refused(run: Run, bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "frame.npy"
    np.save(path, np.full((8, 8), 3, np.float32))
    code, _, err = run("predict", path, "--bundle", bundle, "--json")
    assert code == 2
    assert err == (
        "error: input 1 of 1, frame: got float32 from 3 to 3, expected values in [0, 1]. "
        "Divide by the type's largest value.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ("--runtime", "tflite"),
            "error: runtime: got 'tflite', expected one of auto, onnxruntime, openvino, pytorch, tensorrt",
        ),
        (("--precision", "int8", "--runtime", "openvino"), "no artifact for openvino in int8, it has: "),
        (("--threads", "0"), "error: threads: got 0, expected a whole number of at least 1"),
        (("--overlay", "out.jpg"), "error: --overlay: got the ending '.jpg', expected .png or a folder"),
    ],
    ids=["runtime", "precision", "threads", "overlay"],
)
def test_a_wrong_option_is_one_line_and_code_2(
    run: Run, png: Path, bundle: Path, arguments: tuple[str, ...], text: str
) -> None:
    code, out, err = run("predict", png, "--bundle", bundle, *arguments)
    assert (code, out) == (2, "")
    assert text in err
    assert err.count("\n") == 1


def test_two_frames_do_not_fit_into_one_picture(run: Run, png: Path, bundle: Path, tmp_path: Path) -> None:
    code, _, err = run("predict", png, png, "--bundle", bundle, "--mask", tmp_path / "mask.png")
    assert code == 2
    assert "got several frames, expected a folder for their pictures" in err
    assert not (tmp_path / "mask.png").exists()


def test_the_command_s_process_ends_with_code_2_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "msa2net", "verify", str(tmp_path / "none.bundle")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {tmp_path / 'none.bundle'}: no such folder, expected a bundle. Make one with 'msa2net export'.\n"
    )


@pytest.mark.parametrize("option", ["--mask", "--overlay"])
def test_an_input_is_never_overwritten(run: Run, png: Path, bundle: Path, option: str) -> None:
    before = png.read_bytes()
    code, _, err = run("predict", png, "--bundle", bundle, option, png)
    assert code == 2
    assert err == f"error: {option}: names an input, expected another file. The image would be lost.\n"
    assert png.read_bytes() == before


def test_mask_and_overlay_do_not_share_a_place(run: Run, png: Path, bundle: Path, tmp_path: Path) -> None:
    code, _, err = run("predict", png, "--bundle", bundle, "--mask", tmp_path / "out", "--overlay", tmp_path / "out")
    assert code == 2
    assert err == "error: --mask: is --overlay, too, expected another. Name two files or folders.\n"


def test_verify_goes_on_after_a_runtime_that_cannot_load(
    run: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from msa2net.runtimes.backends.onnxruntime import OnnxRuntimeBackend

    def broken(*_: object) -> None:
        raise RuntimeError("no such symbol")

    monkeypatch.setattr(OnnxRuntimeBackend, "__init__", broken)
    code, out, err = run("verify", bundle)
    assert code == 2
    assert "FAIL: runtime 'onnxruntime': cannot load the model (RuntimeError: no such symbol)" in out
    assert out.count(" pass: ") == len(RUNTIMES) - 1
    assert "1 artifacts fail their golden frames" in err
