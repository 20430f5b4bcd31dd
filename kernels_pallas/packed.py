"""`Packed`: a quantized weight as a kernel reads it, and its way there and back.

A weight `w[k, n]` is `(code - zero) * scale`, or `levels[code] * scale` for a format given by a table such as NF4
(Dettmers et al. 2023, arXiv:2305.14314). Groups of `group_size` rows share a scale; the last one may be shorter.

`pack` takes logical codes and lays them out for one kind of hardware (`layouts.LAYOUTS`); `unpack` gives the same codes
back, whatever the layout. Leading axes are batch axes: the experts of a mixture.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kernels_pallas.bits import pack_bits, packed_rows, planes, unpack_bits
from kernels_pallas.errors import KernelError
from kernels_pallas.layouts import LAYOUTS, TILED, Spec, signed, unsigned

MAX_LEVELS = 16

# 16 quantiles of the unit normal, halves joined at an exact zero: arXiv:2305.14314, Appendix E.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """A packed weight `w[*batch, k, n]`. A pytree: arrays are leaves, the rest is static.

    Attributes:
      codes: in the arrangement of `layout`.
      scales: likewise; floats.
      zeros: zero points packed along `n`, `uint8[*batch, groups, packed_rows(n)]`; None if symmetric.
      k: rows, the contracted axis.
      n: columns.
      bits: width of a code, 1 to 8.
      group_size: rows that share a scale; None: all of a column.
      layout: tag, a key of `LAYOUTS`: which backends can read it.
      levels: value of each code, 0 upwards; None for integers, whose codes are signed.
    """

    codes: jax.Array
    scales: jax.Array
    zeros: jax.Array | None
    k: int = dataclasses.field(metadata={"static": True})
    n: int = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})
    group_size: int | None = dataclasses.field(metadata={"static": True})
    layout: str = dataclasses.field(metadata={"static": True})
    levels: tuple[float, ...] | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def spec(self) -> Spec:
        """What is static, as layouts take it."""
        return Spec(self.k, self.n, self.bits, self.group_size, self.levels)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Leading axes."""
        return tuple(self.codes.shape[: self.codes.ndim - LAYOUTS[self.layout].code_rank])

    @property
    def size_bits(self) -> int:
        """Bits of all arrays as an accelerator stores them, with int4 and int2 packed; a CPU gives each a byte."""
        arrays = [a for a in (self.codes, self.scales, self.zeros) if a is not None]
        return sum(math.prod(a.shape) * width(a.dtype) for a in arrays)


def width(dtype: jnp.dtype) -> int:
    """Bits of one element; 4 and 2 for `int4` and `int2`."""
    dtype = jnp.dtype(dtype)
    return int(jnp.iinfo(dtype).bits) if jnp.issubdtype(dtype, jnp.integer) else dtype.itemsize * 8


def pack(
    codes: ArrayLike,
    scales: ArrayLike,
    zeros: ArrayLike | None = None,
    *,
    bits: int,
    group_size: int | None,
    layout: str = "plain",
    levels: tuple[float, ...] | None = None,
) -> Packed:
    """Lay a quantized weight out for a kernel, without loss. This happens on the host: arrays are concrete.

    Args:
      codes: `int8[*batch, k, n]`; signed integers of `bits` bits, or with `levels` their indices.
      scales: floats `[*batch, groups, n]`, or `[*batch, groups, 1]` for one scale of all columns.
      zeros: `int8`, as many as `n` columns of scales, in the range of the codes; None: symmetric.
      bits: width of a code, 1 to 8.
      group_size: rows that share a scale, None for all.
      layout: a key of `LAYOUTS`.
      levels: value of each code, at most 16.

    Raises:
      KernelError: the parts do not go together, a code does not fit, or the layout does not hold such weights.
    """
    codes, scales, zeros = np.asarray(codes), np.asarray(scales), None if zeros is None else np.asarray(zeros)
    if layout not in LAYOUTS:
        raise KernelError(f"unknown layout {layout!r}: allowed is {', '.join(LAYOUTS)}")
    if codes.ndim < 2 or codes.dtype != jnp.int8:
        raise KernelError(f"codes are {codes.dtype}{list(codes.shape)}: allowed is int8[*batch, k, n]")
    planes(bits)  # refuses other widths than 1 to 8
    *batch, k, n = codes.shape
    if group_size is not None and group_size < 1:
        raise KernelError(f"a group of {group_size} rows: allowed is 1 or more, or None for whole columns")
    spec = Spec(k, n, bits, group_size, levels)
    want = (*batch, spec.groups, n)
    if scales.shape not in (want, (*batch, spec.groups, 1)) or not jnp.issubdtype(scales.dtype, jnp.floating):
        raise KernelError(
            f"scales are {scales.dtype}{list(scales.shape)}: allowed are floats{list(want)}, or 1 for {n}"
        )
    if zeros is not None and (zeros.dtype != jnp.int8 or zeros.shape != want or levels is not None):
        raise KernelError(f"zero points are {zeros.dtype}{list(zeros.shape)}: allowed is int8{list(want)}, of integers")
    if levels is not None and not len(levels) <= min(2**bits, MAX_LEVELS):
        raise KernelError(f"{len(levels)} levels for codes of {bits} bits: allowed are {min(2**bits, MAX_LEVELS)}")
    for name, values in (("code", codes), ("zero point", zeros)):
        _check_range(name, values, spec)
    if refusal := LAYOUTS[layout].refuses(spec):
        raise KernelError(f"layout {layout!r} does not hold this weight: {refusal}; pack it as 'plain'")
    stored, arranged = LAYOUTS[layout].store(codes, scales, spec)
    packed_zeros = None if zeros is None else pack_bits(unsigned(zeros, spec).swapaxes(-1, -2), bits).swapaxes(-1, -2)
    to_device = lambda array: None if array is None else jnp.asarray(array)
    return Packed(
        jnp.asarray(stored), jnp.asarray(arranged), to_device(packed_zeros), k, n, bits, group_size, layout, levels
    )


def unpack(packed: Packed) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Codes, scales and zero points as `pack` took them; scales may come back in a wider float dtype.

    Of a `Packed` of NumPy arrays it gives NumPy arrays and compiles nothing.
    """
    codes, scales = LAYOUTS[packed.layout].load(packed.codes, packed.scales, packed.spec)
    return codes, scales, zero_points(packed)


def check(packed: Packed) -> None:
    """That the arrays are those which `pack` makes of such a weight.

    Raises:
      KernelError: the layout is unknown or does not hold the weight, or an array has another shape or dtype.
    """
    spec, layout = packed.spec, LAYOUTS.get(packed.layout)
    if layout is None:
        raise KernelError(f"unknown layout {packed.layout!r}: allowed is {', '.join(LAYOUTS)}")
    if refusal := layout.refuses(spec):
        raise KernelError(f"layout {packed.layout!r} does not hold this weight: {refusal}")
    batch = packed.batch_shape if packed.codes.ndim >= layout.code_rank else ()
    (dtype, shape), scales = layout.stored(spec)
    allowed = {
        "codes": [(dtype, shape)],
        "scales": [(None, scales), (None, (*scales[:-1], 1))][: 1 if packed.layout in TILED else 2],
        "zeros": [(jnp.uint8, (spec.groups, packed_rows(spec.n, spec.bits)))],
    }
    for name, wanted in allowed.items():
        array = getattr(packed, name)
        fits = lambda dtype, shape, array=array: (
            array.shape == (*batch, *shape)
            and (jnp.issubdtype(array.dtype, jnp.floating) if dtype is None else array.dtype == dtype)
        )
        if array is not None and not any(fits(*one) for one in wanted):
            dtype, shape = wanted[0]
            raise KernelError(
                f"{name} of a weight [{spec.k}, {spec.n}] of {spec.bits} bits in layout {packed.layout!r} are "
                f"{array.dtype}{list(array.shape)}: allowed are {'floats' if dtype is None else jnp.dtype(dtype).name}"
                f"{[*batch, *shape]}; use what `pack` returns"
            )


def zero_points(packed: Packed) -> jax.Array | None:
    """`int8[*batch, groups, n]`, or None."""
    if packed.zeros is None:
        return None
    codes = unpack_bits(packed.zeros.swapaxes(-1, -2), packed.bits, packed.n).swapaxes(-1, -2)
    return signed(codes, packed.spec)


def relayout(packed: Packed, layout: str) -> Packed:
    """The same weight in another layout. Raises `KernelError` as `pack` does."""
    codes, scales, zeros = unpack(jax.tree.map(np.asarray, packed))
    return pack(
        codes,
        scales,
        zeros,
        bits=packed.bits,
        group_size=packed.group_size,
        layout=layout,
        levels=packed.levels,
    )


def dequantize(packed: Packed) -> jax.Array:
    """What the weight stands for: `float32[*batch, k, n]`."""
    codes, scales, zeros = unpack(packed)
    spread = lambda per_group: jnp.repeat(per_group, packed.group_size or packed.k, axis=-2)[..., : packed.k, :]
    value = codes.astype(jnp.float32) if packed.levels is None else jnp.asarray(packed.levels, jnp.float32)[codes]
    if zeros is not None:
        value = value - spread(zeros.astype(jnp.float32))
    return value * spread(scales.astype(jnp.float32))


def _check_range(name: str, values: np.ndarray | None, spec: Spec) -> None:
    if values is None or values.size == 0:
        return
    last = len(spec.levels) - 1 if spec.levels is not None else 2**spec.bits - 1 - spec.offset
    for found in (int(values.min()), int(values.max())):
        if not -spec.offset <= found <= last:
            raise KernelError(f"{name} {found} does not fit into {spec.bits} bits: allowed is {-spec.offset} to {last}")
