"""Coverage-guided fuzzing of all that reads untrusted bytes: `python tests/fuzz.py TARGET FOLDER… [-options]`.

The options are libFuzzer's. Each target takes any bytes; if what is promised does not hold of them it raises
AssertionError, or anything else. `tests/corpus/TARGET.zip` holds inputs that each reach other code, which `make test`
replays.
"""

from __future__ import annotations

import io
import json
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

HERE = Path(__file__).resolve().parent
PATIENT = "DOE^JANE"


def bundle(data: bytes) -> None:
    """The sums, or the manifest. What is read lies inside the bundle, and the public schema holds of it."""
    from msa2net.errors import BundleError
    from msa2net.runtimes.bundle import Bundle, parse_manifest

    kind, content = data[:1], data[1:]
    try:
        if kind == b"s":
            check_sums(Bundle._parse_sums(content))
        else:
            parse_manifest(content)
            document = json.loads(content)
            assert document["schema_version"].startswith("2.") or schema().is_valid(document), "schema"
    except BundleError as error:
        require_line(error)


def require_line(error: Exception) -> None:
    """A message is one line of text, and names nobody."""
    text = str(error)
    assert text.isprintable()
    assert PATIENT not in text


def check_sums(sums: dict[str, str]) -> None:
    root = Path("/bundle")
    for path, digest in sums.items():
        assert (root / path).resolve().is_relative_to(root), "inside"
        assert path == (root / path).relative_to(root).as_posix(), "normal"
        assert re.fullmatch("[0-9a-f]{64}", digest)
    assert len({path.casefold() for path in sums}) == len(sums), "different everywhere"


@cache
def schema() -> Any:
    import jsonschema

    path = HERE.parent / "runtimes/manifest.schema.json"
    return jsonschema.Draft202012Validator(json.loads(path.read_text(encoding="utf-8")))


def graph(data: bytes) -> None:
    """An ONNX file or an IR. What passes, read by ONNX's own parser or Python's, asks for nothing outside of itself."""
    from msa2net.errors import BundleError
    from msa2net.runtimes import graphs

    kind, content = data[:1], data[1:]
    try:
        graphs.check("model.xml" if kind == b"x" else "model.onnx", content)
    except BundleError as error:
        require_line(error)
        return
    if kind == b"x":
        from xml.etree import ElementTree

        root = ElementTree.fromstring(content)
        assert not [each for each in root.iter("data") if "path" in each.attrib], "another file"
        assert all(re.fullmatch("opset[0-9]+", each.attrib["version"]) for each in root.iter("layer")), "extension"
        return
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_model_from_string(content)
    except DecodeError:
        return
    assert not model.functions, "functions"
    assert all(each.domain in ("", "ai.onnx") for each in model.opset_import), "domain"
    for message in walk(model):
        if isinstance(message, onnx.TensorProto):
            assert not message.external_data, "external data"
            assert message.data_location == onnx.TensorProto.DEFAULT, "external data"
        elif isinstance(message, onnx.NodeProto):
            assert message.domain in ("", "ai.onnx"), "domain"


def walk(message: Any) -> Iterator[Any]:
    """A message and all below it."""
    yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for each in [value] if hasattr(value, "ListFields") else value:
                yield from walk(each)


def image(data: bytes) -> None:
    """A file of any kind of image: frames that can be checked, or an error that names neither path nor patient."""
    from msa2net.errors import FrameError
    from msa2net.runtimes.images import read_frames
    from msa2net.runtimes.preprocess import check_frame

    path = scratch() / PATIENT
    path.write_bytes(data)
    try:
        for number, (pixels, bits) in enumerate(read_frames(path)):
            check_frame(pixels, bits)
            if number == 8:
                break
    except FrameError as error:
        require_line(error)


@cache
def scratch() -> Path:
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))


def signature(data: bytes) -> None:
    """A signature file beside the demo bundle: accepted only if what it says is what was signed."""
    from msa2net.errors import SignatureError
    from msa2net.runtimes.signature import verify

    opened, public, whole = signed()
    path = scratch() / "demo.bundle.sig"
    path.write_bytes(data)
    try:
        verify(opened, public, path)
    except SignatureError as error:
        require_line(error)
        return
    found, made = (json.loads(each)["dsseEnvelope"] for each in (data, whole))
    assert found["payload"] == made["payload"], "another payload"
    assert found["signatures"][0]["sig"] == made["signatures"][0]["sig"], "another signature"


@cache
def signed() -> tuple[Any, Path, bytes]:
    """The demo's bundle, a public key, and the file of its signature, the same each time."""
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from msa2net.runtimes.bundle import Bundle
    from msa2net.runtimes.predictor import DEMO_BUNDLE
    from msa2net.runtimes.signature import sign

    key, folder = Ed25519PrivateKey.from_private_bytes(bytes(range(32))), scratch()
    private, public = folder / "a.key", folder / "a.pem"
    private.write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo))
    return Bundle(DEMO_BUNDLE), public, sign(DEMO_BUNDLE, private, folder / "whole.sig").read_bytes()


TARGETS: dict[str, Callable[[bytes], None]] = {each.__name__: each for each in (bundle, graph, image, signature)}


def seeds(target: str) -> list[bytes]:
    """Whole inputs to start from."""
    from msa2net.runtimes.predictor import DEMO_BUNDLE

    if target == "bundle":
        manifest, sums = ((DEMO_BUNDLE / name).read_bytes() for name in ("manifest.json", "SHA256SUMS"))
        return [b"s" + sums, b"m" + manifest, b"m" + sample()]
    if target == "graph":
        return [b"o" + small_onnx(), b"x" + SMALL_IR]
    if target == "signature":
        return [signed()[2]]
    return small_images()


def sample() -> bytes:
    """The sample manifest of the format's document."""
    text = (HERE.parent / "runtimes/BUNDLE.md").read_text(encoding="utf-8")
    return text.split("```json\n", 1)[1].split("```", 1)[0].encode()


def small_onnx() -> bytes:
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    weights = numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32), "w")
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], strides=[1, 1]), helper.make_node("Relu", ["y"], ["z"])]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 2, 2]) for name in "xz"]
    made = helper.make_graph(nodes, "g", ends[:1], ends[1:], [weights])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)]).SerializeToString()


SMALL_IR = (
    b'<?xml version="1.0"?><net name="a" version="11"><layers><layer id="0" name="x" type="Parameter" version="opset1">'
    b'<data shape="1,1" element_type="f32"/><output><port id="0" precision="FP32"><dim>1</dim></port></output></layer>'
    b'</layers><edges><edge from-layer="0" from-port="0" to-layer="1" to-port="0"/></edges></net>'
)


def small_images() -> list[bytes]:
    """Of each format and of each way to store pixels that is read, an image of a few pixels."""
    import numpy as np
    from PIL import Image
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

    rgb = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    grey, deep = rgb[..., 0], np.arange(20, dtype=np.uint16).reshape(4, 5) * 3000
    found = []

    def keep(pixels: Any, kind: str, mode: str = "", **options: Any) -> None:
        opened, content = Image.fromarray(pixels), io.BytesIO()
        (opened.convert(mode) if mode else opened).save(content, kind, **options)
        found.append(content.getvalue())

    keep(rgb, "PNG")
    keep(grey, "PNG")
    keep(deep, "PNG")
    keep(rgb, "PNG", "P")
    keep(grey, "PNG", "1")
    keep(rgb, "PNG", save_all=True, append_images=[Image.fromarray(rgb[::-1])])
    keep(rgb, "JPEG")
    keep(grey, "JPEG", progressive=True)
    keep(rgb, "TIFF", compression="tiff_lzw")
    keep(grey, "TIFF", save_all=True, append_images=[Image.fromarray(grey[::-1])])
    keep(deep, "TIFF", compression="tiff_deflate")
    keep(rgb, "TIFF", "CMYK")
    for array in (rgb, grey, deep, rgb[None].astype(np.float32) / 255):
        content = io.BytesIO()
        np.save(content, array)
        found.append(content.getvalue())
    for pixels, photometric in ((rgb, "RGB"), (grey, "MONOCHROME1"), (deep, "MONOCHROME2")):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
        meta.MediaStorageSOPInstanceUID = "1.2"
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))  # type: ignore[arg-type]
        dataset.SOPClassUID, dataset.SOPInstanceUID = SecondaryCaptureImageStorage, "1.2"
        dataset.PatientName = PATIENT
        dataset.Rows, dataset.Columns = pixels.shape[:2]
        dataset.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
        if pixels.ndim == 3:
            dataset.PlanarConfiguration = 0
        dataset.PhotometricInterpretation = photometric
        dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.itemsize
        dataset.HighBit, dataset.PixelRepresentation = dataset.BitsStored - 1, 0
        dataset.PixelData = pixels.tobytes()
        content = io.BytesIO()
        dataset.save_as(content, enforce_file_format=True)
        found.append(content.getvalue())
    return found


# Values that JSON can have, to put in place of others: bytes changed blindly seldom leave JSON at all.
_VALUES = (None, True, -1, 0, 2**63, 1e308, "", "..", "\x1b", "3.1", "9.0", "a/b", [], {}, [[]] * 3, {"": [0.5]})


def mutate_json(content: bytes, seed: int) -> bytes:
    """The same JSON with values replaced, removed or repeated; ValueError if it is none."""
    random, document = Random(seed), json.loads(content)
    for _ in range(random.randint(1, 3)):
        node, above = document, None
        while isinstance(node, dict | list) and node and (above is None or random.random() < 0.8):
            above, key = node, random.choice(list(node) if isinstance(node, dict) else range(len(node)))
            node = node[key]
        if above is None:
            break
        how = random.randrange(3)
        if how == 0:
            above[key] = random.choice(_VALUES)
        elif how == 1:
            del above[key]
        elif isinstance(above, list):
            above.append(node)
        else:
            above[random.choice(list(above))] = node
    return json.dumps(document).encode()


def main() -> None:
    import atheris

    def mutator(data: bytes, most: int, seed: int) -> bytes:
        prefix = data[:1] if target is bundle else b""
        if seed % 2 and target in (bundle, signature):
            with suppress(ValueError, RecursionError):
                return (prefix + mutate_json(data[len(prefix) :], seed))[:most]
        return bytes(atheris.Mutate(data, most))

    target = TARGETS[sys.argv.pop(1)]
    warnings.simplefilter("ignore")
    with atheris.instrument_imports(include=["msa2net", "PIL", "pydicom"]):
        for seed in seeds(target.__name__):
            target(seed)
    atheris.Setup(sys.argv, target, custom_mutator=mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
