"""A checkpoint to a bundle. Needs the extra `export`: torch, onnx, onnxscript and the runtimes to export for."""

from msa2net.export.pipeline import export_bundle

__all__ = ["export_bundle"]
