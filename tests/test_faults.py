"""Bits flipped, tails cut and tails zeroed, in every kind of file that is read: none may go unseen.

`make test` takes some of each; the slow part 10,000 of each, and prints what it tried.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import sha256, sum_again
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from msa2net.errors import BundleError, SignatureError
from msa2net.export import tensorrt
from msa2net.runtimes import signature
from msa2net.runtimes.bundle import MANIFEST, SUMS, Bundle
from msa2net.runtimes.cache import ENTRY, Entry, Slot

FEW, MANY = 300, 10_000
HOW = ("a bit flipped", "cut short", "its tail zeroed")
Check = Callable[[], bool]  # whether what is there now is refused


def damages(path: Path, count: int, seed: int = 0) -> Iterator[str]:
    """Damages the file in place, one way after the other; says how; and repairs it before the next."""
    rng, size = np.random.default_rng(seed), path.stat().st_size
    with path.open("r+b", buffering=0) as file:
        for i in range(count):
            how, at = HOW[i % 3], int(rng.integers(size))
            if how == HOW[0]:
                before = os.pread(file.fileno(), 1, at)
                os.pwrite(file.fileno(), bytes([before[0] ^ 1 << int(rng.integers(8))]), at)
            else:
                before = os.pread(file.fileno(), size - at, at)
                os.ftruncate(file.fileno(), at)
                if how == HOW[2]:
                    if not any(before):
                        os.pwrite(file.fileno(), before, at)
                        continue
                    os.ftruncate(file.fileno(), size)
            yield how
            os.pwrite(file.fileno(), before, at)


def unseen(path: Path, refused: Check, count: int) -> tuple[int, dict[str, int]]:
    """How many damages were tried, and how many of each way were not refused."""
    tried, missed = 0, dict.fromkeys(HOW, 0)
    for how in damages(path, count):
        tried += 1
        missed[how] += not refused()
    assert refused() is False  # whole again, it is accepted: so what was refused was the damage
    return tried, missed


def opens(root: Path, *names: str) -> Check:
    def refused() -> bool:
        try:
            bundle = Bundle(root)
            for name in names or bundle.sums:
                with bundle.open(name):
                    pass
        except BundleError:
            return True
        return False

    return refused


@pytest.fixture
def small(bundle: Path) -> Path:
    """The demo's bundle with artifacts of 2,000 bytes: its sums can be checked ten thousand times."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    for artifact in manifest["artifacts"]:
        for entry in artifact["files"]:
            content = (bundle / entry["path"]).read_bytes()[:2000]
            (bundle / entry["path"]).write_bytes(content)
            entry |= {"bytes": len(content), "sha256": sha256(content)}
    for path in (bundle / "golden").iterdir():
        path.write_bytes(path.read_bytes()[:2000])
    (bundle / MANIFEST).write_text(json.dumps(manifest, indent=1))
    sum_again(bundle)
    return bundle


def of_bundle(name: str) -> Callable[[Path, Path], tuple[Path, Check]]:
    return lambda bundle, _: (bundle / name, opens(bundle, name))


def of_engine(bundle: Path, _: Path) -> tuple[Path, Check]:
    """An engine of the demo, built here."""
    pytest.importorskip("tensorrt_rtx")
    recipe = {"batch": 1, "workspace": 1 << 30}
    _, engine = tensorrt.engine((bundle / "onnx/model.onnx").read_bytes(), recipe, ["8.6"])
    (bundle / "model.engine").write_bytes(engine)
    sum_again(bundle)
    return bundle / "model.engine", opens(bundle, "model.engine")


def of_signature(bundle: Path, folder: Path) -> tuple[Path, Check]:
    key = Ed25519PrivateKey.generate()
    s = serialization
    (folder / "a.key").write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
    public = folder / "a.pem"
    public.write_bytes(key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo))
    path = signature.sign(bundle, folder / "a.key")
    opened, whole = Bundle(bundle), json.loads(path.read_bytes())

    def refused() -> bool:
        try:
            signature.verify(opened, public)
        except SignatureError:
            return True
        found = json.loads(path.read_bytes())
        return found != whole and essence(found) == essence(whole)  # a field was hit that is not read

    return path, refused


def essence(document: Any) -> tuple[str, str, str]:
    """What of a signature file is read."""
    envelope = document["dsseEnvelope"]
    hint = document["verificationMaterial"]["publicKey"]["hint"]
    return envelope["payload"], envelope["signatures"][0]["sig"], hint


def of_cache(name: str) -> Callable[[Path, Path], tuple[Path, Check]]:
    def prepared(bundle: Path, folder: Path) -> tuple[Path, Check]:
        weights = (bundle / "onnx/model.onnx").read_bytes()
        slot = Slot(folder / "cache", {"model": "demo"})
        slot.keep(lambda target: (target / "engine").write_bytes(weights) and None)
        assert not slot.problem

        def refused() -> bool:
            try:
                Entry(slot.path, slot.facts).close()
            except (OSError, ValueError):
                return True
            return False

        return slot.path / name, refused

    return prepared


KINDS: dict[str, Callable[[Path, Path], tuple[Path, Check]]] = {
    "SHA256SUMS": lambda root, _: (root / SUMS, opens(root)),
    "manifest.json": of_bundle(MANIFEST),
    "ONNX": of_bundle("onnx/model.onnx"),
    "OpenVINO's IR": of_bundle("openvino/model.xml"),
    "OpenVINO's weights": of_bundle("openvino/model.bin"),
    "safetensors": of_bundle("torch/weights.safetensors"),
    "engine": of_engine,
    "golden frame": of_bundle("golden/0_frame.npy"),
    "golden logits": of_bundle("golden/0_logits.npy"),
    "bill of materials": of_bundle("sbom.cdx.json"),
    "signature": of_signature,
    "cached engine": of_cache("engine"),
    "cache entry": of_cache(ENTRY),
}


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        *((kind, FEW) for kind in KINDS if kind != "engine"),  # which takes seconds to build
        *(pytest.param(kind, MANY, marks=pytest.mark.slow) for kind in KINDS),
    ],
)
def test_no_damage_goes_unseen(
    request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, count: int
) -> None:
    bundle = request.getfixturevalue("small" if kind in ("SHA256SUMS", "signature") else "bundle")
    path, refused = KINDS[kind](bundle, tmp_path)
    size, start = path.stat().st_size, time.monotonic()
    tried, missed = unseen(path, refused, count)
    if count == MANY:
        with capsys.disabled():
            print(
                f"\n{kind:<20} {size:>9} bytes  {tried:>6} tried  {time.monotonic() - start:5.0f} s  unseen: {missed}"
            )
    assert tried > 0.9 * count
    assert sum(missed.values()) == 0, missed
