"""The matmuls that every backend is tested on and measured on, and their random data."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels_pallas.layouts import LAYOUTS, Spec
from kernels_pallas.packed import NF4, Packed, pack


@dataclasses.dataclass(frozen=True)
class Case:
    """One matmul; attributes as in `Problem`, and `nf4` for a table."""

    m: int
    k: int
    n: int
    bits: int
    group_size: int | None = None
    activation_bits: int | None = None
    zeros: bool = False
    batch: tuple[int, ...] = ()
    nf4: bool = False
    x_dtype: str = "bfloat16"

    def __str__(self) -> str:
        batch = "".join(f"{size}x" for size in self.batch)
        return f"{self.format}-{batch}{self.m}x{self.k}x{self.n}-{self.x_dtype}"

    @property
    def format(self) -> str:
        """`w4a16_g128`: of weight and activations."""
        width = f"{'nf' if self.nf4 else 'w'}{self.bits}a{self.activation_bits or 16}"
        groups = "channel" if self.group_size is None else f"g{self.group_size}"
        return f"{width}_{groups}{'_zp' if self.zeros else ''}"

    @property
    def spec(self) -> Spec:
        """What layouts ask."""
        return Spec(self.k, self.n, self.bits, self.group_size, self.levels)

    @property
    def levels(self) -> tuple[float, ...] | None:
        """The table, or None."""
        return NF4 if self.nf4 else None


CONFORMANCE = (
    Case(1, 256, 128, 4, 128),
    Case(3, 300, 72, 4, 128, zeros=True, x_dtype="float32"),
    Case(5, 100, 33, 4, 32, x_dtype="float32"),
    Case(2, 130, 40, 8),
    Case(1, 259, 17, 2, 128, zeros=True),
    Case(3, 129, 17, 4, 64, nf4=True, x_dtype="float32"),
    Case(3, 70, 9, 3, 16, zeros=True, x_dtype="float16"),
    Case(2, 619, 12, 5),
    Case(3, 776, 10, 6, 32, zeros=True),
    Case(2, 531, 11, 3, 16, activation_bits=8),
    Case(2, 300, 9, 7, activation_bits=8),
    Case(1, 384, 130, 8, activation_bits=8),
    Case(7, 257, 64, 4, 128, activation_bits=8),
    Case(2, 131, 48, 4, activation_bits=8, zeros=True, x_dtype="float32"),
    Case(4, 96, 10, 2, 32, activation_bits=8, x_dtype="float32"),
    Case(3, 200, 24, 8, 128, activation_bits=8, batch=(2,)),
    Case(4, 200, 60, 4, 64, zeros=True),
    Case(2, 300, 100, 4, 32, activation_bits=8, zeros=True),
    Case(3, 96, 130, 4, 32, batch=(2, 2)),
)
"""Small, with odd sizes, short last groups and every format: what tests run, and the first rows of a benchmark."""

SPEED = tuple(
    Case(m, 4096, 4096, bits, group, activation, nf4=nf4, x_dtype="float32")
    for m in (1, 8, 16, 128, 512)
    for bits, group, activation, nf4 in (
        (8, None, None, False),
        (4, 128, None, False),
        (4, 32, None, False),
        (2, 128, None, False),
        (4, 128, None, True),
        (8, None, 8, False),
        (4, 128, 8, False),
        (4, 32, 8, False),
    )
)
"""A layer of a model of 7 billion parameters, for one token, a few and many."""

_FIRST = (
    *((m, 4, 128, None, False) for m in (1, 16, 64)),
    (16, 8, None, None, False),
    *((m, 4, 128, 8, False) for m in (16, 64, 256, 2048)),
    *((m, 8, None, 8, False) for m in (256, 2048)),
    (16, 2, 128, None, False),
    (16, 4, 128, None, True),
)
"""Tokens, bits, rows of a group, bits of activations, and whether values come from a table."""

_THEN = (
    *((m, 4, 128, None, False) for m in (2048, 4, 256)),
    *((m, 8, None, None, False) for m in (1, 64)),
    *((m, 8, None, 8, False) for m in (16, 64)),
    *((m, 4, None, 8, False) for m in (64, 2048)),
    (1, 2, 128, None, False),
    (1, 4, 128, None, True),
)

_LAYERS = ((8192, 8192), (4096, 4096), (8192, 57344), (4096, 11008), (28672, 8192))

_OTHERS = (
    *(Case(m, 4096, 14336, 4, 128, batch=(8,)) for m in (1, 16)),
    *(Case(m, 8192, 8192, 4, group) for m, group in ((16, 64), (16, 32), (64, 32))),
)
"""A layer of a mixture of eight experts, each with so many tokens; and smaller groups."""


def _served(formats: tuple[tuple[Any, ...], ...]) -> tuple[Case, ...]:
    return tuple(
        Case(m, k, n, bits, group, activation, nf4=nf4)
        for k, n in _LAYERS
        for m, bits, group, activation, nf4 in formats
    )


DECODE = (*_served(_FIRST), *_OTHERS, *_served(_THEN))
"""For accelerators: layers of models of 7 and of 70 billion parameters, activations in bfloat16; what matters first."""


def shapes(case: Case, layout: str) -> tuple[jax.ShapeDtypeStruct, Packed]:
    """`x` and a packed weight of a case on an accelerator, without values and zero points."""
    (dtype, codes), scales = LAYOUTS[layout].stored(case.spec)
    arrays: dict[str, Any] = {
        "codes": jax.ShapeDtypeStruct((*case.batch, *codes), dtype),
        "scales": jax.ShapeDtypeStruct((*case.batch, *scales), jnp.float32),
        "zeros": None,
    }
    packed = Packed(
        k=case.k, n=case.n, bits=case.bits, group_size=case.group_size, layout=layout, levels=case.levels, **arrays
    )
    return jax.ShapeDtypeStruct((*case.batch, case.m, case.k), case.x_dtype), packed


def fill(case: Case, seed: int) -> tuple[jax.Array, Packed]:
    """Normal activations, and a weight of random codes in layout `hopper`, made on the device: any word is one."""
    x, packed = shapes(case, "hopper")
    keys = jax.random.split(jax.random.key(seed), 3)
    codes = lax.bitcast_convert_type(jax.random.bits(keys[0], packed.codes.shape, jnp.uint32), jnp.int32)
    scales = jax.random.uniform(keys[1], packed.scales.shape, jnp.float32, 0.01, 0.1)
    return jax.random.normal(keys[2], x.shape, x.dtype), dataclasses.replace(packed, codes=codes, scales=scales)


def draw(case: Case, layout: str, seed: int, exact: bool) -> tuple[jax.Array, Packed, dict[str, np.ndarray]]:
    """Activations, the packed weight, and the logical arrays behind it.

    Args:
      case: sizes and format.
      layout: of the packed weight.
      seed: of the data.
      exact: integers below 9 and powers of two as scales, so that small sums are exact in float32 in any order; else
        normal activations and scales that are no powers of two. With rounded activations `x` is, in both, integers up
        to 127 times a power of two, with 127 in every token: the rounding itself then leaves them as they are.

    Returns:
      `x[*batch, m, k]`, the weight, and `codes`, `scales`, and with zero points `zeros` as NumPy arrays.
    """
    rng = np.random.default_rng(seed)
    spec, batch = case.spec, case.batch
    lowest, count = (0, 16) if case.nf4 else (-spec.offset, 2**case.bits)
    shape = (*batch, spec.groups, case.n)
    scales = np.exp2(rng.integers(-3, 3, shape)) if exact else rng.uniform(0.01, 0.1, shape)
    arrays: dict[str, np.ndarray] = {
        "codes": rng.integers(lowest, lowest + count, (*batch, case.k, case.n)).astype(np.int8),
        "scales": scales.astype(np.float32),
    }
    if case.zeros:
        arrays["zeros"] = rng.integers(lowest, lowest + count, shape).astype(np.int8)
    top = 8 if exact else 127
    x = rng.integers(-top, top + 1, (*batch, case.m, case.k)).astype(np.float64)
    if case.activation_bits == 8:
        x[..., 0] = 127
        x *= np.exp2(rng.integers(-2, 2, (*batch, case.m, 1)))
    elif not exact:
        x = rng.normal(size=x.shape)
    packed = pack(
        jnp.asarray(arrays["codes"]),
        jnp.asarray(arrays["scales"]),
        jnp.asarray(arrays["zeros"]) if case.zeros else None,
        bits=case.bits,
        group_size=case.group_size,
        layout=layout,
        levels=case.levels,
    )
    return jnp.asarray(x, case.x_dtype), packed, arrays
