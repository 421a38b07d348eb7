"""Writing a file so that its name holds the old content or the new, whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from msa2net.errors import Msa2NetError


def write_json(file: Path, document: Any, indent: int | None = 1) -> None:
    """Writes a JSON document; what the file held before stays whole until it is there, and is lost in no power cut.

    Raises Msa2NetError if it cannot be written.
    """
    beside = file.with_name(f".{file.name}.partial")
    try:
        with beside.open("w", encoding="utf-8") as out:
            json.dump(document, out, indent=indent)
            out.write("\n")
            out.flush()
            os.fsync(out.fileno())
        beside.replace(file)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise Msa2NetError(file, f"cannot be written ({error.strerror})", "", "Name another file.") from error
