"""Block types of ggml as schemes: `q4_k`, `q8_0`, `iq4_nl`, stored as llama.cpp reads them.

A block is 32 or 256 consecutive weights of one output channel under one scale, a float16 in all but MXFP4. In the
K-quants and IQ4_XS each group of 16 or 32 of them has an integer besides, which multiplies that scale. Layouts of the
bytes are in `mpq.gguf.layouts`; facts about the types: ggml's `ggml-common.h` and `dequantize_row_*` of
`ggml-quants.c`.

Bits per weight: tq2_0 2.0625, q2_k 2.625, q3_k 3.4375, iq4_xs and mxfp4 4.25, q4_k, q4_0 and iq4_nl 4.5, q4_1 5, q5_k
and q5_0 5.5, q5_1 6, q6_k 6.5625, q8_0 8.5.

MXFP4 (OCP Microscaling Formats specification 1.0) has a power of two for each 32 weights; its values are those of
`fp4_g32_se8m0`, which pads rows and goes into no GGUF. TQ2_0 has the codes -1, 0 and 1; llama.cpp runs it on CPUs, and
not on every accelerator.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp

from mpq.formats.codebook import Codebook
from mpq.formats.integer import Integer
from mpq.formats.minifloat import Minifloat
from mpq.grids import Blocks, NumberFormat
from mpq.types import MpqError, Scheme

# The 16 values of ggml's `kvalues_iq4nl`.
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclasses.dataclass(frozen=True)
class Unsigned:
    """Codes `0 .. 2^bits - 1` with step 1, for blocks whose minimum says where 0 lies.

    Attributes:
      bits: width of a code, at most 7.
    """

    bits: int

    @property
    def name(self) -> str:
        """`uint2` .. `uint7`."""
        return f"uint{self.bits}"

    @property
    def min_qvalue(self) -> int:
        """0."""
        return 0

    @property
    def max_qvalue(self) -> int:
        """Largest code."""
        return (1 << self.bits) - 1

    @property
    def max_magnitude(self) -> float:
        """The same."""
        return float(self.max_qvalue)

    @property
    def uniform(self) -> bool:
        """True: equal steps."""
        return True

    @property
    def learned(self) -> bool:
        """False."""
        return False

    @property
    def span(self) -> int:
        """1: of one element each."""
        return 1

    def encode(self, x: jax.Array) -> jax.Array:
        """Nearest code of each element of `x`, already shifted and divided by its scale. `int8`, same shape."""
        return jnp.clip(jnp.round(x), 0, self.max_qvalue).astype(jnp.int8)

    def decode(self, qvalue: jax.Array) -> jax.Array:
        """Unscaled value of each code. `float32`, same shape."""
        return qvalue.astype(jnp.float32)


_IQ4 = Codebook("iq4", tuple(map(float, IQ4_LEVELS)))
_TERNARY = Codebook("ternary", (-1.0, 0.0, 1.0))
_E2M1 = Minifloat("fp4", 2, 1, max_qvalue=7)


def _scheme(
    name: str,
    grid: NumberFormat,
    rows: int,
    group: int,
    sub_bits: int | None,
    minimum: bool,
    scale_dtype: str = "float16",
) -> Scheme:
    return Scheme(grid, group, scale_dtype=scale_dtype, blocks=Blocks(name, rows, sub_bits, minimum))


GGML_SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        scheme.blocks.name: scheme
        for scheme in (
            _scheme("q8_0", Integer(8), 32, 32, None, False),
            _scheme("q6_k", Integer(6), 256, 16, 8, False),
            _scheme("q5_k", Unsigned(5), 256, 32, 6, True),
            _scheme("q4_k", Unsigned(4), 256, 32, 6, True),
            _scheme("q3_k", Integer(3), 256, 16, 6, False),
            _scheme("q2_k", Unsigned(2), 256, 16, 4, True),
            _scheme("q5_1", Unsigned(5), 32, 32, None, True),
            _scheme("q5_0", Integer(5), 32, 32, None, False),
            _scheme("q4_1", Unsigned(4), 32, 32, None, True),
            _scheme("q4_0", Integer(4), 32, 32, None, False),
            _scheme("iq4_nl", _IQ4, 32, 32, None, False),
            _scheme("iq4_xs", _IQ4, 256, 32, 6, False),
            _scheme("mxfp4", _E2M1, 32, 32, None, False, "float8_e8m0fnu"),
            _scheme("tq2_0", _TERNARY, 256, 256, None, False),
        )
        if scheme.blocks is not None
    }
)
"""Name -> scheme."""


FLOAT_TYPES: Mapping[str, str] = MappingProxyType({"bf16": "bf16", "fp16": "f16", "fp32": "f32"})
"""Plain float scheme -> what ggml calls it."""


def sub_range(blocks: Blocks) -> tuple[int, int]:
    """Least and largest integer of a group: signed where there is no minimum."""
    assert blocks.sub_bits is not None
    half = 1 << (blocks.sub_bits - 1)
    return (0, 2 * half - 1) if blocks.minimum else (-half, half - 1)


def require_fit(scheme: Scheme, k: int, what: str = "the weight") -> None:
    """Refuse a weight whose rows do not fill the blocks of its scheme: ggml never pads them.

    Raises:
      MpqError: `k` is no multiple of the block.
    """
    if scheme.blocks is not None and not scheme.fits(k):
        raise MpqError(
            f"{what} has rows of {k}, no multiple of the {scheme.blocks.rows} in a block of {scheme}: choose a scheme "
            "with smaller blocks, such as q8_0, or f16"
        )
