"""The bill of materials and the SOUP page: valid by the public schema, and true of what is installed and written."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from msa2net.export import sbom
from msa2net.export.parity import Case
from msa2net.export.sbom import SBOM, SOUP
from msa2net.runtimes.bundle import MANIFEST
from msa2net.runtimes.predictor import DEMO_BUNDLE

PATIENT = "DOE^JANE"
RECIPE = {"version": ["10.3", "12"], "compute_capabilities": []}
ENGINE = {"version": ["1.7.1.116", "1.7.1.117"], "compute_capabilities": ["8.6", "12.0"]}


def cases(seed: int = 0) -> list[Case]:
    frames = np.random.default_rng(seed).integers(0, 256, (3, 4, 5, 3), np.uint8)
    return [Case(f"{PATIENT} {i}", frame) for i, frame in enumerate(frames)]


def document() -> dict[str, Any]:
    """The demo's manifest, with an artifact of every runtime."""
    found: dict[str, Any] = json.loads((DEMO_BUNDLE / MANIFEST).read_text())
    first = found["artifacts"][0]
    for runtime, precision, recipe in (
        ("openvino", "int8", None),
        ("openvino", "bf16", None),
        ("tensorrt", "fp16", RECIPE),
        ("tensorrt-rtx", "int8", ENGINE),
        ("torch-tensorrt", "fp32", RECIPE),
    ):
        entry = first | {"runtime": runtime, "precision": precision} | ({"recipe": recipe} if recipe else {})
        found["artifacts"].append(entry)
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file, and both pages of it."""
    folder = tmp_path_factory.mktemp("sbom") / "bundle"
    (folder / "onnx").mkdir(parents=True)
    (folder / "onnx/model.onnx").write_bytes(b"graph")
    data = {"the accuracy check": ("pairs", cases()), "calibration": ("phantoms", cases(1))}
    sbom.write(folder, document(), {"checkpoint": "c" * 64, "fine-tuned checkpoint": "f" * 64}, data)
    return folder


@pytest.fixture
def bill(written: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((written / SBOM).read_text(encoding="utf-8"))
    return found


def named(bill: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (each for each in bill["components"] if each["name"] == name)
    return dict(found)


def test_it_is_valid_by_the_public_schema(written: Path) -> None:
    text = (written / SBOM).read_text(encoding="utf-8")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    spoilt = text.replace('"type": "library"', '"type": "libary"', 1)  # the validator does look
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(spoilt) is not None


def test_every_reference_leads_to_one_thing(bill: dict[str, Any]) -> None:
    tools = bill["metadata"]["tools"]["components"]
    everything = [bill["metadata"]["component"], *bill["components"], *tools]
    refs = [each["bom-ref"] for each in everything]
    assert len(refs) == len(set(refs))
    for each in bill["dependencies"]:
        assert {each["ref"], *each["dependsOn"]} <= set(refs)
    datasets = bill["metadata"]["component"]["modelCard"]["modelParameters"]["datasets"]
    assert {each["ref"] for each in datasets} == {"data:the accuracy check", "data:calibration"}


def test_files_and_checkpoints_come_with_their_digests(bill: dict[str, Any]) -> None:
    assert named(bill, "onnx/model.onnx")["hashes"] == [
        {"alg": "SHA-256", "content": hashlib.sha256(b"graph").hexdigest()}
    ]
    ancestors = bill["metadata"]["component"]["pedigree"]["ancestors"]
    assert [each["hashes"][0]["content"] for each in ancestors] == ["c" * 64, "f" * 64]


def test_what_is_installed_is_named_with_its_version(bill: dict[str, Any]) -> None:
    for name in ("numpy", "pillow", "onnxruntime", "openvino", "torch", "sympy", "msa2net-edge"):
        assert named(bill, name)["version"] == version(name)
        assert named(bill, name)["licenses"]
    assert named(bill, "CPython")["version"] == platform.python_version()
    assert "version" not in named(bill, "torch-tensorrt")
    tools = {each["name"] for each in bill["metadata"]["tools"]["components"]}
    assert {"msa2net-edge", "torch", "onnx", "onnxruntime", "openvino", "nncf", "tensorrt-rtx"} <= tools


def test_a_verdict_comes_as_a_metric(bill: dict[str, Any]) -> None:
    metrics = bill["metadata"]["component"]["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    judged = document()["artifacts"][0]["parity"]
    assert metrics[0]["slice"] == "onnxruntime fp32"
    assert metrics[0]["confidenceInterval"]["lowerBound"] == str(judged["ratio_bound"])


def test_no_image_is_named(written: Path) -> None:
    for name in (SBOM, SOUP):
        text = (written / name).read_text(encoding="utf-8")
        assert "DOE" not in text
        assert str(written) not in text


def test_the_digest_of_images_is_of_their_pixels() -> None:
    first = cases()
    digest = sbom.digest_of_frames(first)
    assert sbom.digest_of_frames([Case("other", case.frame) for case in reversed(first)]) == digest
    changed = first[1].frame.copy()
    changed[0, 0, 0] ^= 1
    assert sbom.digest_of_frames([first[0], Case("", changed), first[2]]) != digest
    assert sbom.digest_of_frames([Case("", case.frame.reshape(5, 4, 3)) for case in first]) != digest
    assert sbom.digest_of_frames([Case("", case.frame.view(np.int8)) for case in first]) != digest
    assert sbom.digest_of_frames(first[:2]) != digest


def rows(page: str, title: str) -> list[list[str]]:
    table = page.split(f"| {title} |", 1)[1].split("\n\n", 1)[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]]


def test_the_soup_page_says_what_iec_62304_asks(written: Path, bill: dict[str, Any]) -> None:
    page = (written / SOUP).read_text(encoding="utf-8")
    items = rows(page, "title")
    assert {row[0] for row in items} == {
        each["name"] for each in bill["components"] if each["type"] in ("library", "platform")
    }
    for title, maker, designator, licence, purpose, _needs, anomalies in items:
        assert maker, title
        assert designator == bill_version(bill, title)
        assert licence, title
        assert purpose, title
        assert anomalies == "not stated" or anomalies.startswith("https://"), title
    known = {row[0]: row[6] for row in items}
    assert known["onnxruntime"] == "https://github.com/microsoft/onnxruntime/issues"
    assert known["pillow"] == "https://github.com/python-pillow/Pillow/issues"
    forms = {row[0]: row[1:] for row in rows(page, "artifact")}
    assert forms["openvino int8"][0] == "a CPU with AVX512-VNNI, AVX-VNNI or Arm's dot products"
    assert forms["openvino bf16"][0] == "a CPU with bf16"
    assert forms["tensorrt-rtx int8"][0] == "an NVIDIA GPU of compute capability 8.6 or 12.0 and its driver"
    assert forms["tensorrt fp16"][1] == "tensorrt 10.3 to below 12"
    assert forms["onnxruntime fp32"][1] == f"onnxruntime {version('onnxruntime')}"


def bill_version(bill: dict[str, Any], name: str) -> str:
    return str(named(bill, name).get("version", "to be fixed on the device"))


# Other people's metadata -------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Installs a package of the given metadata; returns its component."""

    def install(metadata: str, record: str = "odd/__init__.py,sha256=abc,3\n") -> dict[str, Any]:
        folder = tmp_path / "odd-1.5+cpu.dist-info"
        folder.mkdir(exist_ok=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: odd\nVersion: 1.5+cpu\n{metadata}")
        (folder / "RECORD").write_text(record)
        monkeypatch.syspath_prepend(str(tmp_path))
        return sbom._library("odd")

    return install


@pytest.mark.parametrize(
    ("metadata", "licences"),
    [
        ("License-Expression: MIT OR Apache-2.0\nLicense: other\n", [{"expression": "MIT OR Apache-2.0"}]),
        ("License: BSD\n", [{"license": {"name": "BSD"}}]),
        (f"License: {'Permission is hereby granted ' * 9}\n", None),
        (
            f"License: {'Permission is hereby granted ' * 9}\nClassifier: License :: OSI Approved :: MIT License\n",
            [{"license": {"name": "MIT License"}}],
        ),
        ("", None),
    ],
)
def test_a_licence_is_what_the_package_says(package: Any, metadata: str, licences: Any) -> None:
    assert package(metadata).get("licenses") == licences


@pytest.mark.parametrize(
    ("metadata", "maker"),
    [
        ("Author: A Company\nAuthor-email: B <b@c.d>\n", "A Company"),
        ("Author-email: First One <a@b.c>, Second Two <d@e.f>\n", "First One, Second Two"),
        ("Author-email: a@b.c\nMaintainer: M\n", "M"),
        ('Author-email: "One, Two" <a@b.c>\n', "One, Two"),
        ("Author-email: a@b.c\n", None),
    ],
)
def test_a_maker_is_named_without_addresses(package: Any, metadata: str, maker: str | None) -> None:
    assert package(metadata).get("supplier", {}).get("name") == maker


@pytest.mark.parametrize(
    ("metadata", "url"),
    [
        (
            "Project-URL: Bug Tracker, https://a.b/bugs\nProject-URL: Source, https://github.com/a/b\n",
            "https://a.b/bugs",
        ),
        (
            "Project-URL: Docs, https://a.b\nProject-URL: X, https://github.com/a/b.git\n",
            "https://github.com/a/b/issues",
        ),
        ("Home-page: https://www.github.com/a/b#readme\n", "https://www.github.com/a/b/issues"),
        ("Home-page: https://a.b\n", None),
    ],
)
def test_anomalies_are_where_the_package_says(package: Any, metadata: str, url: str | None) -> None:
    found = {each["type"]: each["url"] for each in package(metadata)["externalReferences"]}
    assert found.get("issue-tracker") == url


def test_a_package_s_digest_is_of_its_own_files_alone(package: Any) -> None:
    def digest(record: str) -> str:
        (found,) = package("", record)["properties"]
        return str(found["value"])

    plain = digest("odd/a.py,sha256=abc,3\nodd/b.py,sha256=def,3\n")
    assert (
        digest("odd/b.py,sha256=def,3\nodd/a.py,sha256=abc,3\n../bin/x,sha256=1,1\nodd/__pycache__/a.pyc,,\n") == plain
    )
    assert digest("odd/a.py,sha256=abc,3\nodd/b.py,sha256=def,3\nodd-1.5+cpu.dist-info/INSTALLER,sha256=1,1\n") == plain
    assert digest("odd/a.py,sha256=abd,3\nodd/b.py,sha256=def,3\n") != plain
    assert package("")["purl"] == "pkg:pypi/odd@1.5%2Bcpu"
