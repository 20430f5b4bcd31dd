"""How codes and scales lie in memory: one `Layout` for a kind of hardware, each without loss.

    plain    codes uint8[packed_rows(k), n], see `bits`; scales as given. Any width, any group size, any table.
    cpu      rows in segments (a group, or a whole column in 8 / bits parts), columns before rows, since that is the
             order of XLA's fast int8 dot on CPUs: 8 bits int8[segments, n, segment]; 4 and 2 bits uint8[segments * bits
             / 8, n, segment], a byte holding the same row and column of segments that lie evenly spaced. So the fields
             of an array of bytes are whole operands, and nothing is interleaved. Scales as given.
    tpu      int8, int4 or int2[k, n], sub-byte arrays native; k in whole groups and n to multiples of 128, filled with
             zeros; groups of 16, 32, 64 or of a multiple of 128; scales float32[groups, 1, n].
    hopper   int32[k / 128, n / 64, 2 * bits, 128], the order in which threads feed the tensor cores (`fragments`);
             k and n to multiples of 128, groups of 32, of 64 or of a multiple of 128; scales float32[groups, n].

Codes of integers are stored with an offset in `plain` and `cpu` (0 is the most negative one), as they are elsewhere.
Padding of `cpu`, `tpu` and `hopper` is what fills the last segment, group or tile up, and of the latter two what
float32 adds to narrower scales (of 16 bits for a group of 128 codes of 4 bits: 3 %).
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels_pallas import fragments
from kernels_pallas.bits import pack_bits, packed_rows, unpack_bits
from kernels_pallas.fragments import LANES, ROWS, words

NATIVE = {8: jnp.int8, 4: jnp.int4, 2: jnp.int2}


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is static about a packed weight; the attributes are those of `Packed`."""

    k: int
    n: int
    bits: int
    group_size: int | None
    levels: tuple[float, ...] | None = None

    @property
    def groups(self) -> int:
        """Scales per column."""
        return 1 if self.group_size is None else -(-self.k // self.group_size)

    @property
    def offset(self) -> int:
        """What is added to a code to make it unsigned."""
        return 0 if self.levels is not None else 2 ** (self.bits - 1)

    @property
    def segment(self) -> int:
        """Rows of one segment of layout `cpu`: those of a group, or what one field of a byte takes of a column."""
        return -(-self.k * self.bits // 8) if self.group_size is None else self.group_size

    @property
    def segments(self) -> int:
        """Segments of layout `cpu`, as many as bytes can be filled with."""
        per_byte = 8 // self.bits
        filled = -(-self.k // self.segment)
        return -(-filled // per_byte) * per_byte

    @property
    def tiled_k(self) -> int:
        """Rows of layouts `tpu` and `hopper`."""
        rows = self.k if self.group_size is None else self.groups * self.group_size
        return -(-rows // LANES) * LANES

    @property
    def tiled_groups(self) -> int:
        """Scales per column of layouts `tpu` and `hopper`."""
        return 1 if self.group_size is None else self.tiled_k // self.group_size

    @property
    def tiled_n(self) -> int:
        """Columns of layouts `tpu` and `hopper`."""
        return -(-self.n // LANES) * LANES


Stored = tuple[tuple[Any, tuple[int, ...]], tuple[int, ...]]
Arrays = tuple[jax.Array, jax.Array]
HostArrays = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Layout:
    """One arrangement of codes and scales: stored on the host, loaded wherever JAX computes.

    Attributes:
      code_rank: axes of the stored codes behind the batch axes.
      refuses: why a weight cannot be stored so, or None.
      store: `(codes int8[*batch, k, n], scales[*batch, groups, n or 1], spec) -> stored codes and scales`.
      load: the inverse.
      stored: of one weight, dtype and shape of its codes, and the shape of its scales, one a column.
    """

    code_rank: int
    refuses: Callable[[Spec], str | None]
    store: Callable[[np.ndarray, np.ndarray, Spec], HostArrays]
    load: Callable[[jax.Array, jax.Array, Spec], Arrays]
    stored: Callable[[Spec], Stored]


def unsigned(codes: np.ndarray, spec: Spec) -> np.ndarray:
    """Codes with their offset, `uint8`."""
    return (codes.astype(np.int16) + spec.offset).astype(np.uint8)


def signed(codes: jax.Array, spec: Spec) -> jax.Array:
    """The inverse of `unsigned`, `int8`."""
    return (codes.astype(np.int16) - spec.offset).astype(np.int8)


def _fill(array: np.ndarray, *sizes: int) -> np.ndarray:
    """Zeros behind the last axes, up to these sizes."""
    front = array.ndim - len(sizes)
    return np.pad(array, [(0, 0)] * front + [(0, s - old) for s, old in zip(sizes, array.shape[front:], strict=True)])


def _store_plain(codes: np.ndarray, scales: np.ndarray, spec: Spec) -> HostArrays:
    return pack_bits(unsigned(codes, spec), spec.bits), scales


def _load_plain(codes: jax.Array, scales: jax.Array, spec: Spec) -> Arrays:
    return signed(unpack_bits(codes, spec.bits, spec.k), spec), scales


def _store_cpu(codes: np.ndarray, scales: np.ndarray, spec: Spec) -> HostArrays:
    *batch, _, n = codes.shape
    per_byte = 8 // spec.bits
    whole = _fill(codes, spec.segments * spec.segment, n)
    if per_byte == 1:
        return whole.reshape(*batch, spec.segments, spec.segment, n).swapaxes(-1, -2), scales
    fields = unsigned(whole, spec).reshape(*batch, per_byte, spec.segments // per_byte, spec.segment, n)
    shifts = np.arange(0, 8, spec.bits, dtype=np.uint8).reshape(-1, 1, 1, 1)
    return np.bitwise_or.reduce(fields << shifts, axis=-4).swapaxes(-1, -2), scales


def cpu_fields(stored: jax.Array, spec: Spec) -> tuple[jax.Array, ...]:
    """The fields of the bytes of layout `cpu`, each an `int8` array of the same shape.

    Field f of row i is segment `f * segments * bits / 8 + i`.
    """
    if spec.bits == 8:
        return (stored,)
    mask, offset = jnp.uint8(2**spec.bits - 1), jnp.int8(spec.offset)
    fields = ((stored >> jnp.uint8(shift)) & mask for shift in range(0, 8, spec.bits))
    return tuple(lax.bitcast_convert_type(field, jnp.int8) - offset for field in fields)


def _load_cpu(codes: jax.Array, scales: jax.Array, spec: Spec) -> Arrays:
    *batch, _, n, size = codes.shape
    if spec.bits < 8:
        shifts = np.arange(0, 8, spec.bits, dtype=np.uint8).reshape(-1, 1, 1, 1)
        codes = signed((codes[..., None, :, :, :] >> shifts) & np.uint8(2**spec.bits - 1), spec)
    rows = codes.reshape(*batch, spec.segments, n, size).swapaxes(-1, -2).reshape(*batch, -1, n)
    return rows[..., : spec.k, :], scales


def _store_tpu(codes: np.ndarray, scales: np.ndarray, spec: Spec) -> HostArrays:
    stored = _fill(codes, spec.tiled_k, spec.tiled_n).astype(NATIVE[spec.bits])
    return stored, _tiled_scales(scales, spec)[..., None, :]


def _load_tpu(codes: jax.Array, scales: jax.Array, spec: Spec) -> Arrays:
    return codes.astype(np.int8)[..., : spec.k, : spec.n], scales[..., : spec.groups, 0, : spec.n]


def _store_hopper(codes: np.ndarray, scales: np.ndarray, spec: Spec) -> HostArrays:
    stored = fragments.store(_fill(codes, spec.tiled_k, spec.tiled_n), spec.bits, spec.levels is not None)
    return stored, _tiled_scales(scales, spec)


def _load_hopper(codes: jax.Array, scales: jax.Array, spec: Spec) -> Arrays:
    table = spec.levels is not None
    rows = fragments.load(codes, spec.bits, table)[..., : spec.k, : spec.n]
    return rows & np.int8(2**spec.bits - 1) if table else rows, scales[..., : spec.groups, : spec.n]


def _tiled_scales(scales: np.ndarray, spec: Spec) -> np.ndarray:
    columns = np.broadcast_to(scales.astype(np.float32), (*scales.shape[:-1], spec.n))
    return _fill(columns, spec.tiled_groups, spec.tiled_n)


def _plain(spec: Spec) -> Stored:
    return (jnp.uint8, (packed_rows(spec.k, spec.bits), spec.n)), (spec.groups, spec.n)


def _cpu(spec: Spec) -> Stored:
    dtype = jnp.int8 if spec.bits == 8 else jnp.uint8
    return (dtype, (spec.segments * spec.bits // 8, spec.n, spec.segment)), (spec.groups, spec.n)


def _tpu(spec: Spec) -> Stored:
    return (NATIVE[spec.bits], (spec.tiled_k, spec.tiled_n)), (spec.tiled_groups, 1, spec.tiled_n)


def _hopper(spec: Spec) -> Stored:
    tiles = spec.tiled_k // LANES, spec.tiled_n // ROWS, words(spec.bits), LANES
    return (jnp.int32, tiles), (spec.tiled_groups, spec.tiled_n)


def _widths(*allowed: int, tables: bool = False, lanes: tuple[int, ...] | None = None) -> Callable[[Spec], str | None]:
    """What refuses other widths, tables, and groups of other rows than multiples of `LANES` and so many."""

    def refuses(spec: Spec) -> str | None:
        if spec.bits not in allowed:
            return f"it has {spec.bits} bits, allowed are {', '.join(map(str, allowed))}"
        if spec.levels is not None and not tables:
            return "its values come from a table"
        size = spec.group_size
        if lanes is not None and size is not None and size % LANES and size not in lanes:
            fewer = "".join(f"{rows}, " for rows in lanes)
            return f"its groups have {size} rows, allowed are {fewer}multiples of {LANES} and whole columns"
        return None

    return refuses


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "plain": Layout(2, _widths(*range(1, 9), tables=True), _store_plain, _load_plain, _plain),
        "cpu": Layout(3, _widths(8, 4, 2, tables=True), _store_cpu, _load_cpu, _cpu),
        "tpu": Layout(2, _widths(8, 4, 2, lanes=(16, 32, 64)), _store_tpu, _load_tpu, _tpu),
        "hopper": Layout(4, _widths(8, 4, 2, tables=True, lanes=(32, 64)), _store_hopper, _load_hopper, _hopper),
    }
)

TILED = ("tpu", "hopper")
"""Layouts whose scales are there for every column."""
