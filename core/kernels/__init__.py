"""MASAG's fused kernels behind one operator; see README.md in this folder."""
