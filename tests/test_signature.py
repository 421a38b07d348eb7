"""Signatures: what is accepted, and what each way of being wrong is called."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundles import set_manifest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from msa2net import Predictor
from msa2net.__main__ import main
from msa2net.errors import SignatureError
from msa2net.runtimes import signature
from msa2net.runtimes.bundle import MANIFEST, Bundle

KINDS: dict[str, Callable[[], Any]] = {
    "ed25519": ed25519.Ed25519PrivateKey.generate,
    "p256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "p384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "p521": lambda: ec.generate_private_key(ec.SECP521R1()),
}


def write_keys(folder: Path, name: str, key: Any, password: bytes | None = None) -> tuple[Path, Path]:
    """The files of a private key and of its public one."""
    folder.mkdir(exist_ok=True)
    private, public = folder / f"{name}.key", folder / f"{name}.pem"
    s = serialization
    encryption = s.BestAvailableEncryption(password) if password else s.NoEncryption()
    private.write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, encryption))
    public.write_bytes(key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("keys")
    return {name: write_keys(folder / name, name, make()) for name, make in KINDS.items()}


Keys = dict[str, tuple[Path, Path]]


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_signed_bundle_is_accepted_and_the_key_is_named(bundle: Path, keys: Keys, kind: str) -> None:
    private, public = keys[kind]
    made = signature.sign(bundle, private)
    assert made == bundle.with_name(f"{bundle.name}.sig")
    opened = Bundle(bundle)  # what lies beside it changes nothing
    hint = signature.verify(opened, public)
    with Predictor.load(bundle, runtime="onnxruntime", require_signature=public, cache=False) as predictor:
        assert predictor.execution.signature == hint
    with Predictor.load(bundle, runtime="onnxruntime", cache=False) as predictor:
        assert predictor.execution.signature == "not verified"


def test_an_unsigned_bundle_says_so_and_is_refused_where_a_signature_is_required(bundle: Path, keys: Keys) -> None:
    with Predictor.load(bundle, runtime="onnxruntime", cache=False) as predictor:
        assert predictor.execution.signature == "unsigned"
    with pytest.raises(SignatureError, match=r"is not signed, expected the file copy\.bundle\.sig beside it"):
        Predictor.load(bundle, require_signature=keys["p256"][1])


def test_another_key_and_a_revoked_one_are_named(bundle: Path, keys: Keys, tmp_path: Path) -> None:
    signature.sign(bundle, keys["p256"][0])
    with pytest.raises(SignatureError, match=r"copy.bundle.sig: is by the key \w{16}…, expected one of \w{16}…"):
        signature.verify(Bundle(bundle), keys["p384"][1])
    ring = tmp_path / "ring"
    ring.mkdir()
    for kind in ("p256", "ed25519"):
        shutil.copy(keys[kind][1], ring)
    hint = signature.verify(Bundle(bundle), ring)
    (ring / "revoked").write_text(f"{hint.upper()}\n")
    with pytest.raises(SignatureError, match=r"is by the key \w{16}…, which is revoked, expected another"):
        signature.verify(Bundle(bundle), ring)
    signature.sign(bundle, keys["ed25519"][0])
    assert signature.verify(Bundle(bundle), ring) != hint


@pytest.mark.parametrize("path", [MANIFEST, "onnx/model.onnx"])
def test_a_bundle_whose_sums_were_written_anew_is_not_the_signed_one(bundle: Path, keys: Keys, path: str) -> None:
    """The sums hold, so only the signature can tell."""
    private, public = keys["ed25519"]
    signature.sign(bundle, private)
    if path == MANIFEST:
        content = (bundle / path).read_bytes().replace(b"Not for clinical use", b"Fit for clinical use")
        set_manifest(bundle, content)
        Bundle(bundle).verify()
        with pytest.raises(SignatureError, match="is of another bundle, expected one of the digest"):
            Predictor.load(bundle, require_signature=public)
    else:
        (bundle / path).write_bytes(b"changed")
        with pytest.raises(Exception, match="got 7 bytes"):
            Predictor.load(bundle, require_signature=public)


def changed(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def repayload(document: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> None:
    envelope = document["dsseEnvelope"]
    payload = json.loads(base64.b64decode(envelope["payload"]))
    change(payload)
    envelope["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(mediaType="application/json"), "is no signature of a model"),
        (lambda d: d["dsseEnvelope"].update(payloadType="text/plain"), "is no signature of a model"),
        (lambda d: d["dsseEnvelope"].update(signatures=[]), "is no signature of a model"),
        (lambda d: d["dsseEnvelope"].update(payload="*"), "is no signature of a model"),
        (lambda d: d["dsseEnvelope"]["signatures"][0].update(sig="AAAA"), "does not fit what it signs"),
        (lambda d: d["verificationMaterial"]["publicKey"].update(hint="0" * 64), "is by the key 0000"),
        (lambda d: d["verificationMaterial"]["publicKey"].update(hint=None), "is no signature of a model"),
        (lambda d: d.pop("verificationMaterial"), "is no signature of a model"),
        (
            lambda d: repayload(d, lambda p: p["predicate"]["resources"].pop()),
            "does not fit what it signs",
        ),
        (lambda d: repayload(d, lambda p: p.update(predicateType="other")), "does not fit what it signs"),
    ],
)
@pytest.mark.parametrize("kind", ["ed25519", "p256"])
def test_a_changed_signature_is_refused(bundle: Path, keys: Keys, kind: str, change: Any, message: str) -> None:
    private, public = keys[kind]
    changed(signature.sign(bundle, private), change)
    with pytest.raises(SignatureError, match=message):
        signature.verify(Bundle(bundle), public)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.update(predicateType="other"),
        lambda p: p["subject"].append(p["subject"][0]),
        lambda p: p["subject"][0]["digest"].update(sha256="0" * 64),
        lambda p: p["predicate"]["resources"].append(p["predicate"]["resources"][0]),
        lambda p: p["predicate"]["resources"][0].update(digest="zz"),
        lambda p: p.pop("predicate"),
    ],
)
def test_a_statement_that_is_signed_and_unsound_is_refused(
    bundle: Path, keys: Keys, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = keys["p256"]
    dumps = json.dumps

    def unsound(value: Any, **rest: Any) -> str:
        change(value)
        return dumps(value, **rest)

    monkeypatch.setattr(signature.json, "dumps", unsound)
    signature.sign(bundle, private)
    monkeypatch.undo()
    with pytest.raises(SignatureError, match=r"signs no model \("):
        signature.verify(Bundle(bundle), public)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=400))
def test_any_bytes_as_a_signature_are_refused(bundle: Path, keys: Keys, content: bytes) -> None:
    signature.path_of(bundle).write_bytes(content)
    with pytest.raises(SignatureError):
        signature.verify(Bundle(bundle), keys["p256"][1])


def test_no_flipped_bit_of_a_signature_passes(bundle: Path, keys: Keys) -> None:
    private, public = keys["p256"]
    file = signature.sign(bundle, private)
    content, opened = file.read_bytes(), Bundle(bundle)
    passed = []
    for i in range(len(content)):
        file.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        try:
            signature.verify(opened, public)
        except SignatureError:
            continue
        passed.append(i)
    text = content.decode()
    # What nobody reads: names of fields that are not looked at, and the key's id and the log, which are empty.
    unread = [text.index('"tlogEntries"'), text.index('"keyid"')]
    assert all(any(0 <= i - start < 20 for start in unread) for i in passed), [
        text[i - 5 : i] + "|" + text[i : i + 5] for i in passed if not any(0 <= i - x < 20 for x in unread)
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no private key that can be read"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "holds no private key that can be read"),
        (None, "cannot be read"),
    ],
)
def test_a_key_that_is_none_is_named(bundle: Path, tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "k").write_bytes(content)
    with pytest.raises(SignatureError, match=message):
        signature.sign(bundle, tmp_path / "k")
    assert not signature.path_of(bundle).exists()


def test_keys_of_other_kinds_and_public_ones_in_place_of_private_ones_are_refused(
    bundle: Path, keys: Keys, tmp_path: Path
) -> None:
    others = {
        "rsa": rsa.generate_private_key(65537, 2048),
        "k1": ec.generate_private_key(ec.SECP256K1()),
    }
    for name, key in others.items():
        private, public = write_keys(tmp_path / name, name, key)
        with pytest.raises(SignatureError, match="holds a key of another kind"):
            signature.sign(bundle, private)
        with pytest.raises(SignatureError, match="holds a key of another kind"):
            signature.verify(Bundle(bundle), public)
    with pytest.raises(SignatureError, match="holds no private key that can be read"):
        signature.sign(bundle, keys["p256"][1])
    with pytest.raises(SignatureError, match="holds no public key that can be read"):
        signature.verify(Bundle(bundle), keys["p256"][0])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SignatureError, match="holds no key"):
        signature.verify(Bundle(bundle), tmp_path / "empty")


def test_a_damaged_bundle_is_not_signed(bundle: Path, keys: Keys) -> None:
    content = bytearray((bundle / "onnx/model.onnx").read_bytes())
    content[-1] ^= 1
    (bundle / "onnx/model.onnx").write_bytes(content)
    with pytest.raises(Exception, match=r"changed onnx/model\.onnx"):
        signature.sign(bundle, keys["p256"][0])
    assert not signature.path_of(bundle).exists()


def test_the_commands_sign_and_verify(bundle: Path, keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    private, public = keys["ed25519"]
    assert main(["sign", str(bundle), "--key", str(private)]) == 0
    assert Bundle(bundle).digest in capsys.readouterr().out
    assert main(["verify", str(bundle), "--key", str(public)]) == 0
    assert "signed by the key " in capsys.readouterr().out
    assert main(["verify", str(bundle), "--key", str(keys["p256"][1])]) == 2
    assert "error: copy.bundle.sig: is by the key" in capsys.readouterr().err


def test_model_signings_own_tool_accepts_it(bundle: Path, keys: Keys) -> None:
    """Where it is installed, see CONTRIBUTING.md; it knows no Ed25519."""
    pytest.importorskip("model_signing")
    for kind in ("p256", "p384", "p521"):
        private, public = keys[kind]
        made = signature.sign(bundle, private)
        tool = [sys.executable, "-m", "model_signing", "verify", "key", str(bundle)]
        done = subprocess.run(
            [*tool, "--signature", str(made), "--public_key", str(public)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
