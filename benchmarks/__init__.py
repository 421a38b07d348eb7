"""Proof of speed and parity. Outside the checkout: `python -m msa2net.benchmarks.latency`."""
