"""Matmuls with quantized weights, each beside the plain `jnp` reference that says what it computes.

    packed = pack(codes, scales, bits=4, group_size=128, layout="cpu")
    y = quantized_matmul(x, packed)                         # weights alone: W4A16
    y = quantized_matmul(x, packed, activation_bits=8)      # and activations, rounded by token: W4A8

`reference.py` is the contract of every backend; `bits.py`, `layouts.py` and `packed.py` say how codes lie in memory;
`cpu.py`, `tpu.py` and `hopper.py` are the backends, one file for a kind of hardware; `dispatch.py` chooses among them,
by tables in `tuned/` or by bytes and operations; `grouped.py` multiplies activations with a scale for every group;
`cases.py` lists the shapes that tests and `bench.py` share. The
package imports jax and numpy only and takes plain arrays, never a type of `mpq`.
"""

from kernels_pallas.dispatch import BACKENDS
from kernels_pallas.errors import KernelError
from kernels_pallas.grouped import grouped_matmul, segment_size
from kernels_pallas.layouts import LAYOUTS
from kernels_pallas.matmul import quantized_matmul
from kernels_pallas.packed import NF4, Packed, dequantize, pack, relayout, unpack

__all__ = [
    "BACKENDS",
    "LAYOUTS",
    "NF4",
    "KernelError",
    "Packed",
    "dequantize",
    "grouped_matmul",
    "pack",
    "quantized_matmul",
    "relayout",
    "segment_size",
    "unpack",
]
