"""Activations rounded to int8 for Hopper's kernel, in one pass: `reference.quantize_tokens`, then `permute_rows`.

A block of one warpgroup takes a token. Every thread loads blocks of rows that `permute_rows` permutes among themselves,
of 16 or 32, keeps them in registers while the warpgroup finds the largest, and writes their codes in the order that the
tensor cores want. So a token is read once, and written once.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import compat
from kernels_pallas.fragments import THREADS
from kernels_pallas.reference import MAX_CODE

_TINY, _LIFT = 2.0**-60, 2.0**64

MOST_ROWS = 32768
"""Of a token in the registers of a warpgroup."""


def block_rows(bits: int) -> int:
    """Rows that `permute_rows` permutes among themselves."""
    return 32 if bits == 2 else 16


def fits(shape: tuple[int, ...], dtype: Any, bits: int) -> bool:
    """Whether tokens `x[..., k]` can be rounded so."""
    return jnp.dtype(dtype) == jnp.bfloat16 and shape[-1] % block_rows(bits) == 0 and 0 < shape[-1] <= MOST_ROWS


def rounded(x: jax.Array, bits: int, tokens: int, rows: int, over: int) -> tuple[jax.Array, jax.Array]:
    """Codes of activations, and what their products are multiplied by.

    Args:
      x: `bfloat16[e, m, k]`, as `fits` says.
      bits: of the weight, whose order of rows the codes get.
      tokens: of an expert in the result, m or more; what is in those behind m is not defined.
      rows: of the result, k or more in whole blocks; zeros behind k.
      over: how many times a code of the weight counts.

    Returns:
      `int8[e, tokens, rows]`, and `float32[e, tokens]`, the scale of a token over `over`.
    """
    experts, m, k = x.shape
    gpu, block = compat.mosaic_gpu(), block_rows(bits)
    count = -(-rows // (THREADS * block))
    one_each = gpu.Layout.WG_STRIDED((THREADS,), vec_size=1)
    shape = (count * THREADS * block // 2,)
    words = gpu.Layout.WG_STRIDED(shape, vec_size=block // 2)

    def kernel(x_ref: Any, codes_ref: Any, factor_ref: Any) -> None:
        token = lax.axis_index("token")
        place = lax.div(token, m) * tokens + lax.rem(token, m)

        @gpu.inline_mgpu(
            arg_types=(gpu.RefType(),),
            return_type=gpu.ShapeDtypeStruct(shape, jnp.int32, layout=words),
        )
        def load(context: Any, row: Any) -> Any:
            del context
            return compat.mosaic_lanes().load_blocks(row, k, block, count)

        @gpu.inline_mgpu(arg_types=(words,), return_type=gpu.ShapeDtypeStruct((THREADS,), jnp.float32, layout=one_each))
        def largest(context: Any, held: Any) -> Any:
            del context
            lanes = compat.mosaic_lanes()
            return lanes.one_each(largest_of([word for words in lanes.words_of(held) for word in words]))

        held = load(x_ref.at[token])
        most = jnp.max(largest(held))
        scale = jnp.where(most > 0, most / MAX_CODE, 1.0)
        lift = jnp.where(scale < _TINY, _LIFT, 1.0)
        splat = gpu.Layout.WG_SPLAT

        @gpu.inline_mgpu(arg_types=(gpu.RefType(), gpu.RefType(), words, splat, splat, splat, splat))
        def store(context: Any, codes: Any, factors: Any, held: Any, factor: Any, *divisor: Any) -> None:
            del context
            lanes = compat.mosaic_lanes()
            by = [lanes.bits_of(scalar) for scalar in divisor]
            lanes.store_blocks(codes, rows, [in_order(words, *by) for words in lanes.words_of(held)])
            lanes.store_word(factors, lanes.bits_of(factor))

        step = scale * lift
        store(codes_ref.at[place], factor_ref.at[place], held, scale / over, lift, step, 1 / step)

    call = gpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((experts * tokens, rows), jnp.int8),
            jax.ShapeDtypeStruct((experts * tokens,), jnp.float32),
        ),
        grid=(experts * m,),
        grid_names=("token",),
        compiler_params=compat.gpu_params(),
        kernel_name=f"mpq_round_{bits}",
    )
    codes, factors = call(x.reshape(-1, k))
    return codes.reshape(experts, tokens, rows), factors.reshape(experts, tokens)


def largest_of(words: Sequence[Any]) -> Any:
    """The largest magnitude, a float32, of words of two bfloat16."""
    assemble = compat.mosaic_lanes().assemble
    most = assemble("and.b32 $0, $1, 0x7fff7fff;", words[0])
    for word in words[1:]:
        most = assemble("{ .reg .b32 t; and.b32 t, $2, 0x7fff7fff; max.NaN.bf16x2 $0, $1, t; }", most, word)
    return assemble("{ .reg .b32 a, b; shl.b32 a, $1, 16; and.b32 b, $1, 0xffff0000; max.NaN.f32 $0, a, b; }", most)


def in_order(words: Sequence[Any], lift: Any, step: Any, inverse: Any) -> list[Any]:
    """Words of four codes in the order of `permute_rows`, of the words of a block of 16 or 32 rows in bfloat16.

    A word has two neighbouring rows. Those of the second half of the block alternate with those of the first. Values
    are divided by `step / lift`, all float32; `inverse` is one over `step`.
    """
    half = len(words) // 2
    pairs = zip(words[:half], words[half:], strict=True)
    return [compat.mosaic_lanes().assemble(_ROUNDING, *pair, lift, step, inverse) for pair in pairs]


def _rounding() -> str:
    """Of two values each in words `$1` and `$2`, over a float32, their nearest integers, alternately.

    The quotient x r of a rounded inverse r = 1 / t is off in its last bit or two; adding the remainder x - q t times r
    rounds it as a division does (Markstein 1990, IBM J. Res. Dev. 34, Theorem 8.2). No remainder is lost to underflow,
    since values are lifted, by a power of two, where the step t is tiny.
    """
    lower = (f"shl.b32 x{i}, ${i + 1}, 16;" for i in range(2))
    upper = (f"and.b32 x{i + 2}, ${i + 1}, 0xffff0000;" for i in range(2))
    nearest = (
        f"mul.rn.f32 x{i}, x{i}, $3; mul.rn.f32 q, x{i}, $5; neg.f32 t, q; fma.rn.f32 t, t, $4, x{i}; "
        f"fma.rn.f32 q, t, $5, q; cvt.rni.s32.f32 x{i}, q;"
        for i in range(4)
    )
    packed = "cvt.pack.sat.s8.s32.b32 t, x3, x2, 0; cvt.pack.sat.s8.s32.b32 $0, x1, x0, t;"
    return f"{{ .reg .b32 x0, x1, x2, x3, q, t; {' '.join((*lower, *upper, *nearest))} {packed} }}"


_ROUNDING = _rounding()
