"""Registers of single threads in Mosaic GPU: what the bodies of `inline_mgpu` are written in.

Imported where a kernel is lowered, since it needs `absl-py` (see `compat.mosaic_gpu`).
"""

from typing import Any

import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector


def word(four: Any, i: int) -> Any:
    """Word i of a vector of them."""
    return vector.extract(four, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))


def assemble(text: str, *operands: Any) -> Any:
    """One word by PTX that writes `$0` and reads `$1`, `$2` and so on."""
    integer = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(integer, list(operands), text, ",".join(["=r", *["r"] * len(operands)]))


def lane_address(ref: Any) -> Any:
    """Where in shared memory this lane's column of a table of 32 words a row begins."""
    integer = ir.IntegerType.get_signless(32)
    start = llvm.ptrtoint(integer, utils.memref_ptr(ref))
    return assemble("{ .reg .b32 t; mov.u32 t, %laneid; shl.b32 t, t, 2; add.u32 $0, t, $1; }", start)


def array(registers: list[Any], layout: Any, shape: tuple[int, ...], integers: bool) -> Any:
    """An array in a layout, from the words of a thread: pairs of bfloat16, or four int8 each."""
    kind = (
        ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
        if integers
        else ir.VectorType.get((2,), ir.BF16Type.get())
    )
    held = np.empty(len(registers), dtype=object)
    held[:] = [utils.bitcast(register, kind) for register in registers]
    return fragmented_array.FragmentedArray(
        _registers=held.reshape(layout.registers_shape(shape)), _layout=layout, _is_signed=True if integers else None
    )
