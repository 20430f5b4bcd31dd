"""Registers of single threads in Mosaic GPU: what the bodies of `inline_mgpu` are written in.

Imported where a kernel is lowered, since it needs `absl-py` (see `compat.mosaic_gpu`).
"""

from typing import Any

import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from kernels_pallas.fragments import THREADS


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
    held = _objects([utils.bitcast(register, kind) for register in registers])
    return fragmented_array.FragmentedArray(
        _registers=held.reshape(layout.registers_shape(shape)), _layout=layout, _is_signed=True if integers else None
    )


def _objects(values: list[Any]) -> np.ndarray:
    """As an array of one axis, which NumPy would not make of values that have axes of their own."""
    held = np.empty(len(values), dtype=object)
    held[:] = values
    return held


def _place(ref: Any, i: int, block: int, bytes_each: int) -> tuple[Any, Any]:
    """First element of block `128 i` and this thread's number, and where it is in global memory."""
    index = ir.IntegerType.get_signless(32)
    constant = lambda value: arith.constant(index, ir.IntegerAttr.get(index, value))
    thread = arith.remui(utils.thread_idx(), constant(THREADS))
    first = arith.muli(arith.addi(thread, constant(i * THREADS)), constant(block))
    offset = arith.muli(first, constant(bytes_each))
    return first, utils.getelementptr(utils.memref_ptr(ref), [offset], ir.IntegerType.get_signless(8))


def load_blocks(row: Any, size: int, block: int, count: int) -> Any:
    """`row[size]` of 16 bits in global memory: a thread's `count` blocks of it in words, zeros behind its end."""
    integer = ir.IntegerType.get_signless(32)
    held = []
    for i in range(count):
        first, pointer = _place(row, i, block, 2)
        words = []
        for piece in range(block // 8):
            text = (
                f"{{ .reg .pred p; setp.lt.u32 p, $5, {size}; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; "
                f"mov.b32 $3, 0; @p ld.global.v4.b32 {{$0, $1, $2, $3}}, [$4+{16 * piece}]; }}"
            )
            four: Any = llvm.inline_asm(
                llvm.StructType.get_literal([integer] * 4), [pointer, first], text, "=&r,=&r,=&r,=&r,l,r"
            )
            words += [llvm.extractvalue(integer, four, [j]) for j in range(4)]
        held.append(vector.from_elements(ir.VectorType.get((len(words),), integer), words))
    layout = fragmented_array.WGStridedFragLayout((count * THREADS * block // 2,), block // 2)
    return fragmented_array.FragmentedArray(_registers=_objects(held), _layout=layout, _is_signed=True)


def words_of(held: Any) -> list[list[Any]]:
    """The words of each block of a thread."""
    count = ir.VectorType(held.registers.flat[0].type).shape[0]
    return [[word(block, i) for i in range(count)] for block in held.registers.flat]


def one_each(found: Any) -> Any:
    """A word of every thread, a float32, as an array of them."""
    kind = ir.VectorType.get((1,), ir.F32Type.get())
    layout = fragmented_array.WGStridedFragLayout((THREADS,), 1)
    return fragmented_array.FragmentedArray(
        _registers=_objects([utils.bitcast(found, kind)]), _layout=layout, _is_signed=None
    )


def bits_of(scalar: Any) -> Any:
    """The word of a float32 that all threads have."""
    return utils.bitcast(scalar.registers.item(), ir.IntegerType.get_signless(32))


def store_blocks(row: Any, size: int, blocks: list[list[Any]]) -> None:
    """Words of a thread's blocks of bytes into `row[size]` in global memory; nothing behind its end."""
    for i, words in enumerate(blocks):
        first, pointer = _place(row, i, 4 * len(words), 1)
        for piece in range(0, len(words), 4):
            text = (
                f"{{ .reg .pred p; setp.lt.u32 p, $5, {size}; "
                f"@p st.global.v4.b32 [$4+{4 * piece}], {{$0, $1, $2, $3}}; }}"
            )
            _effect([*words[piece : piece + 4], pointer, first], text, "r,r,r,r,l,r")


def store_word(place: Any, value: Any) -> None:
    """By the first thread alone."""
    first, pointer = _place(place, 0, 1, 0)
    _effect([value, pointer, first], "{ .reg .pred p; setp.eq.u32 p, $2, 0; @p st.global.b32 [$1], $0; }", "r,l,r")


def _effect(operands: list[Any], text: str, constraints: str) -> None:
    llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, text, constraints, has_side_effects=True)
