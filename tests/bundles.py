"""Bundles by hand: what several test files write."""

from __future__ import annotations

import hashlib
from pathlib import Path

from msa2net.runtimes.bundle import MANIFEST, SUMS


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sum_again(root: Path) -> None:
    """Writes SHA256SUMS anew for the files that are there."""
    files = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file() and p.name != SUMS)
    (root / SUMS).write_text("".join(f"{sha256((root / f).read_bytes())}  {f}\n" for f in files), encoding="utf-8")


def set_manifest(root: Path, content: bytes) -> None:
    (root / MANIFEST).write_bytes(content)
    sum_again(root)
