"""Writing a file so that its name holds the old content or the new, whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from msa2net.errors import Msa2NetError


@contextmanager
def replacing(file: Path, said: str = "") -> Iterator[BinaryIO]:
    """An open file that takes the name at the end of the block, if it was left without an error.

    What the name held before stays whole until then, and is lost in no power cut. Raises Msa2NetError if it cannot be
    written, with `said` in the place of its path.
    """
    beside = file.with_name(f".{file.name}.partial")
    try:
        with beside.open("wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        beside.replace(file)
    except BaseException as error:
        with suppress(OSError):  # what kept it from being written may keep it from being removed
            beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise Msa2NetError(
                said or file, f"cannot be written ({error.strerror})", "", "Name another file."
            ) from error
        raise


def write_json(file: Path, document: Any, indent: int | None = 1) -> None:
    """Writes a JSON document, see `replacing`."""
    with replacing(file) as out:
        out.write(f"{json.JSONEncoder(indent=indent).encode(document)}\n".encode())
