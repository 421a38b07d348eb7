"""Quality flags: the figures against what they say they are, the limits, and that a mask never depends on them."""

from __future__ import annotations

import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import set_manifest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from msa2net.__main__ import main
from msa2net.core.phantoms import phantom
from msa2net.runtimes import Predictor, quality
from msa2net.runtimes.bundle import MANIFEST, QUALITY, Bundle
from msa2net.runtimes.predictor import DEMO_BUNDLE
from msa2net.runtimes.quality import Quality, assess, limits_of, sample

SURE = np.stack([np.full((4, 4), 20, np.float32), np.zeros((4, 4), np.float32)])
EMPTY = np.zeros((6, 8), np.uint8)


def figures(frame: NDArray[Any], mask: NDArray[np.uint8] = EMPTY, bits: int | None = None) -> Quality:
    return assess(sample(frame), bits, SURE, mask)


def test_a_blank_and_a_saturated_frame_show_in_their_figures() -> None:
    assert figures(np.full((50, 60), 7, np.uint8)).contrast == 0
    halves = np.repeat(np.array([0, 255], np.uint8), 30)[None].repeat(50, 0)
    assert figures(halves).contrast == pytest.approx(0.5)
    assert figures(halves).saturation == pytest.approx(0.5)
    # The same in every type: its own largest value counts.
    assert figures((halves // 255).astype(np.float32)) == figures(halves)
    assert figures(halves.astype(np.uint16) // 255 * 4095, bits=12) == figures(halves)
    assert figures(halves.astype(np.uint16)).saturation == 0


def test_the_margin_is_that_of_the_two_best_classes() -> None:
    logits = np.log(np.array([[[0.5]], [[0.3]], [[0.2]]], np.float32))
    assert assess(sample(EMPTY), None, logits, EMPTY).margin == pytest.approx(0.2, abs=1e-6)


def test_border_and_area_count_every_pixel_once() -> None:
    mask = EMPTY.copy()
    mask[0, :] = 1  # 8 of the 24 outermost pixels, corners among them, of 48 in all
    found = figures(EMPTY, mask)
    assert (found.border, found.area) == (pytest.approx(8 / 24), pytest.approx(8 / 48))
    mask[:] = 2
    assert (figures(EMPTY, mask).border, figures(EMPTY, mask).area) == (1, 1)
    inside = EMPTY.copy()
    inside[1:-1, 1:-1] = 1
    assert figures(EMPTY, inside).border == 0


@given(
    arrays.arrays(
        st.sampled_from([np.uint8, np.uint16]), st.tuples(st.integers(1, 600), st.integers(1, 9)), fill=st.just(3)
    )
)
def test_any_frame_has_figures_from_0_to_1_and_its_sample_is_a_copy(frame: NDArray[Any]) -> None:
    taken = sample(frame)
    assert max(taken.shape) <= quality.SAMPLED
    assert not np.shares_memory(taken, frame)
    found = figures(frame, np.zeros(frame.shape, np.uint8))
    assert all(0 <= value <= 1 for value in astuple(found))


def test_the_limits_are_kept_by_99_of_100_and_flags_name_what_is_beyond() -> None:
    values = np.linspace(0.2, 0.6, 200)
    seen = [Quality(*[float(value)] * 5) for value in values]
    limits = limits_of(seen)
    assert set(limits) == set(QUALITY)
    counts = {name: sum(name in each.flags(limits) for each in seen) for name in QUALITY}
    assert counts == {"contrast": 2, "saturation": 2, "margin": 2, "border": 2, "area": 4}  # of both sides
    assert seen[100].flags(limits) == ()
    assert Quality(0, 0, 0, 0, 0).flags(limits) == ("contrast", "margin", "area")
    assert Quality(1, 1, 1, 1, 1).flags(limits) == ("saturation", "border", "area")
    assert limits_of(seen[:50])["area"] == (values[0], values[49])  # of few, all


def test_the_demo_flags_a_blank_frame_and_not_a_phantom(predictors: dict[str, Predictor]) -> None:
    predictor = predictors["onnxruntime"]
    assert predictor.predict(phantom("dermoscopy", 78, (240, 320)).image).flags == ()
    blank = predictor.predict(np.full((240, 320, 3), 128, np.uint8))
    assert blank.flags is not None
    assert "contrast" in blank.flags
    white = predictor.predict(np.full((240, 320, 3), 255, np.uint8))
    assert {"contrast", "saturation"} <= set(white.flags or ())


def test_the_manifest_says_how_often_the_flags_are_wrong() -> None:
    said = json.loads((DEMO_BUNDLE / MANIFEST).read_bytes())["quality"]
    assert set(said["false_alarms"]) == set(QUALITY)
    assert min(said["images"]) >= 20
    assert all(0 <= count <= said["images"][1] for count in said["false_alarms"].values())


@pytest.mark.parametrize("limits", [None, {name: [1.0, 1.0] for name in QUALITY}])
def test_a_mask_does_not_depend_on_the_limits(
    bundle: Path, predictors: dict[str, Predictor], limits: dict[str, list[float]] | None
) -> None:
    document = json.loads((bundle / MANIFEST).read_bytes())
    document.pop("quality")
    if limits:
        document["quality"] = {"limits": limits}
    set_manifest(bundle, json.dumps(document).encode())
    frame = phantom("ultrasound", 79, (120, 160)).image
    with Predictor.load(bundle, runtime="onnxruntime", cache=False) as other:
        found = other.predict(frame)
    expected = predictors["onnxruntime"].predict(frame)
    assert np.array_equal(found.mask, expected.mask)
    assert np.array_equal(found.logits, expected.logits)
    assert found.quality == expected.quality
    assert found.flags == (None if limits is None else QUALITY[:3] + QUALITY[3:])


def test_the_command_shows_figures_and_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "blank.npy", np.full((64, 64), 9, np.uint8))
    assert main(["predict", str(tmp_path / "blank.npy"), "--runtime", "onnxruntime", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["quality"]["contrast"] == 0
    assert "contrast" in report["flags"]
    assert main(["predict", str(tmp_path / "blank.npy"), "--runtime", "onnxruntime"]) == 0
    assert "flags: contrast" in capsys.readouterr().out
    assert main(["info"]) == 0
    assert "flag     contrast   below" in capsys.readouterr().out


def test_old_bundles_have_no_limits_and_no_flags(bundle: Path) -> None:
    document = json.loads((bundle / MANIFEST).read_bytes())
    del document["quality"]
    document["schema_version"] = "3.1"
    set_manifest(bundle, json.dumps(document).encode())
    assert Bundle(bundle).manifest.quality is None
