"""Signatures of bundles, in the OpenSSF model-signing format (version 1.0): the file NAME.bundle.sig beside the folder.

It is a Sigstore bundle with a DSSE envelope of an in-toto statement that lists every file of the bundle with its
SHA-256, `SHA256SUMS`, whose digest is the bundle's, among them. Keys are Ed25519, or ECDSA on P-256, P-384 or P-521.
Only `cryptography` is needed, to sign as to verify.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msa2net.errors import SignatureError
from msa2net.runtimes.bundle import SUMS, Bundle
from msa2net.runtimes.files import write_json

MEDIA = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://model_signing/signature/v1.0"
REVOKED = "revoked"
_MOST_BYTES = 1 << 23
_CURVES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}
_COPY = "Copy the bundle and its signature anew."
_KEY = "Make one: openssl genpkey -algorithm ed25519."


def path_of(bundle: Path) -> Path:
    """Where the signature of a bundle lies."""
    folder = bundle.resolve()
    return folder.with_name(f"{folder.name}.sig")


def sign(bundle: str | Path, key: str | Path, output: str | Path | None = None, password: bytes | None = None) -> Path:
    """Checks every digest of the bundle, signs it with a private key (PEM), and returns the path of the signature.

    Raises BundleError for a bundle that is not whole, SignatureError for a key that cannot be used.
    """
    crypto = _crypto()
    opened = Bundle(bundle)
    opened.verify()
    try:
        private = crypto.serialization.load_pem_private_key(_read(key), password)
    except (ValueError, TypeError) as error:
        raise SignatureError(
            key, f"holds no private key that can be read ({error})", "expected one in PEM", _KEY
        ) from error
    public = private.public_key()
    _require_kind(key, public)
    digests = {SUMS: opened.digest, **opened.sums}
    resources = [{"name": name, "algorithm": "sha256", "digest": digests[name]} for name in sorted(digests)]
    payload = json.dumps(
        {
            "_type": STATEMENT,
            "subject": [{"name": Path(bundle).resolve().name, "digest": {"sha256": _root(resources)}}],
            "predicateType": PREDICATE,
            "predicate": {
                "serialization": {
                    "method": "files",
                    "hash_type": "sha256",
                    "allow_symlinks": False,
                    "ignore_paths": [],
                },
                "resources": resources,
            },
        }
    ).encode()
    signed = private.sign(_pae(payload), *_algorithm(public))
    document = {
        "mediaType": MEDIA,
        "verificationMaterial": {"publicKey": {"hint": fingerprint(public)}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": PAYLOAD,
            "signatures": [{"sig": base64.b64encode(signed).decode(), "keyid": ""}],
        },
    }
    target = Path(output) if output else path_of(Path(bundle))
    write_json(target, document, indent=None)
    return target


def verify(bundle: Bundle, keys: str | Path, signature: str | Path | None = None) -> str:
    """The fingerprint of the key that has signed the bundle; its files' digests are those of `bundle.sums`.

    keys        a public key (PEM), or a folder of them, `*.pem`, whose file `revoked` may list fingerprints
    signature   default: beside the bundle

    Raises SignatureError if there is none, by another key, by a revoked one, or of other files.
    """
    file = Path(signature) if signature else path_of(bundle.path)
    trusted, revoked = _keys(Path(keys))
    if not file.is_file():
        raise SignatureError(bundle.path, "is not signed", f"expected the file {file.name} beside it", _COPY)
    payload, signed, hint = _parsed(file)
    if hint in revoked:
        raise SignatureError(
            file.name, f"is by the key {hint[:16]}…, which is revoked", "expected another", "Do not use the bundle."
        )
    if hint not in trusted:
        known = ", ".join(f"{each[:16]}…" for each in trusted)
        raise SignatureError(
            file.name, f"is by the key {hint[:16]}…", f"expected one of {known}", "Do not use the bundle."
        )
    try:
        trusted[hint].verify(signed, _pae(payload), *_algorithm(trusted[hint]))
    except _crypto().InvalidSignature as error:
        raise SignatureError(
            file.name, "does not fit what it signs", "expected a signature of it", "Do not use the bundle."
        ) from error
    listed = _digests(file, payload)
    if listed != {SUMS: bundle.digest, **bundle.sums}:
        raise SignatureError(
            file.name, "is of another bundle", f"expected one of the digest {bundle.digest[:16]}…", _COPY
        )
    return hint


def fingerprint(public: Any) -> str:
    """SHA-256 of a public key in PEM, in hexadecimal."""
    s = _crypto().serialization
    return hashlib.sha256(public.public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _keys(path: Path) -> tuple[dict[str, Any], set[str]]:
    """Public keys by their fingerprints, and the fingerprints that are revoked."""
    files: Sequence[Path] = sorted(path.glob("*.pem")) if path.is_dir() else [path]
    if not files:
        raise SignatureError(path, "holds no key", "expected *.pem", "Put the public keys there.")
    trusted = {}
    for file in files:
        try:
            public = _crypto().serialization.load_pem_public_key(_read(file))
        except (ValueError, TypeError) as error:
            raise SignatureError(
                file, f"holds no public key that can be read ({error})", "expected one in PEM", _KEY
            ) from error
        _require_kind(file, public)
        trusted[fingerprint(public)] = public
    listed = path / REVOKED if path.is_dir() else None
    lines = _read(listed).decode("utf-8", "replace").split() if listed and listed.exists() else []
    return trusted, {line.strip().lower() for line in lines}


def _parsed(file: Path) -> tuple[bytes, bytes, str]:
    """What is signed, the signature, and the fingerprint of the key that it says it is by."""
    try:
        document = json.loads(_read(file))
        envelope, material = document["dsseEnvelope"], document["verificationMaterial"]
        (signature,) = envelope["signatures"]
        kinds = document["mediaType"], envelope["payloadType"]
        payload, signed = map(_unbase64, (envelope["payload"], signature["sig"]))
        hint = material["publicKey"]["hint"]
        if kinds != (MEDIA, PAYLOAD) or not isinstance(hint, str) or len(hint) != 64 or not hint.isalnum():
            raise ValueError("its media types or the hint of its key")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SignatureError(
            file.name, f"is no signature of a model ({type(error).__name__}: {error})", f"expected {MEDIA}", _COPY
        ) from error
    return payload, signed, hint


def _unbase64(text: str) -> bytes:
    """Raises ValueError for another text than that of these bytes: its last character may hide bits."""
    found = base64.b64decode(text, validate=True)
    if base64.b64encode(found).decode() != text:
        raise ValueError("not the base64 of what it holds")
    return found


def _digests(file: Path, payload: bytes) -> dict[str, str]:
    """Digests by path, of a statement whose signature has been verified."""
    try:
        statement = json.loads(payload)
        (subject,) = statement["subject"]
        resources = statement["predicate"]["resources"]
        found = {each["name"]: each["digest"] for each in resources if each["algorithm"] == "sha256"}
        sound = (statement["_type"], statement["predicateType"]) == (STATEMENT, PREDICATE)
        if not sound or len(found) != len(resources) or subject["digest"]["sha256"] != _root(resources):
            raise ValueError("its type, a name twice, or the digest of all")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SignatureError(
            file.name, f"signs no model ({type(error).__name__}: {error})", f"expected {PREDICATE}", _COPY
        ) from error
    return found


def _root(resources: Sequence[dict[str, str]]) -> str:
    """The digest of all digests, in their order."""
    return hashlib.sha256(b"".join(bytes.fromhex(each["digest"]) for each in resources)).hexdigest()


def _pae(payload: bytes) -> bytes:
    """What DSSE signs: its version, the payload's type and the payload, each with its length."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD), PAYLOAD.encode(), len(payload), payload)


def _algorithm(public: Any) -> tuple[Any, ...]:
    """What `sign` and `verify` of such a key take beside the message."""
    crypto = _crypto()
    if isinstance(public, crypto.Ed25519PublicKey):
        return ()
    return (crypto.ec.ECDSA(getattr(crypto.hashes, _CURVES[public.curve.name])()),)


def _require_kind(place: object, public: Any) -> None:
    crypto = _crypto()
    known = isinstance(public, crypto.Ed25519PublicKey) or (
        isinstance(public, crypto.ec.EllipticCurvePublicKey) and public.curve.name in _CURVES
    )
    if not known:
        raise SignatureError(
            place,
            f"holds a key of another kind ({type(public).__name__})",
            "expected Ed25519 or ECDSA on a NIST curve",
            _KEY,
        )


def _read(path: str | Path) -> bytes:
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise SignatureError(
            path, f"cannot be read ({error.strerror})", "expected a readable file", "Check the path."
        ) from error
    if len(content) > _MOST_BYTES:
        raise SignatureError(path, f"got over {_MOST_BYTES} bytes", "expected fewer", "Name the right file.")
    return content


def _crypto() -> Any:
    """What of the package `cryptography` is used. Raises SignatureError if it is not there."""
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError as error:
        raise SignatureError(
            "signature", f"needs the package {error.name}", "", "pip install 'msa2net-edge[signature]'"
        ) from error
    from types import SimpleNamespace

    return SimpleNamespace(
        InvalidSignature=InvalidSignature,
        hashes=hashes,
        serialization=serialization,
        ec=ec,
        Ed25519PublicKey=Ed25519PublicKey,
    )
