"""Pallas kernels that multiply by quantized weights: each beside the plain `jnp` reference that says what it computes.

Here will live `reference.py` (the contract of every kernel), `packing.py` (sub-byte layouts), one file per kind of
hardware (`cpu.py`, `hopper.py`, `tpu.py`) and the tables of tuned block sizes. The package imports jax only and takes
plain arrays, never a type of `mpq`.
"""
