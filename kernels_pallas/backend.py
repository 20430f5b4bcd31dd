"""What a backend is, and what all but the reference share: activations, zero points, descriptions of a problem."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.devices import Device
from kernels_pallas.packed import Packed, zero_points
from kernels_pallas.reference import quantize_tokens

Config = tuple[int, ...]
"""Tile sizes of a kernel; `()` for a backend that has none."""

Run = Callable[[jax.Array, Packed, Config, bool], jax.Array]
"""`(x[m, k], packed, config, interpret) -> float32[m, n]`: the sum over groups of `scale * (x[group] @ code[group])`.

For a weight without batch axes, and as if it had no zero points. Inner products of int8 `x` are int32."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One matmul, as dispatch, tables and benchmarks know it. Static and hashable.

    Attributes:
      m, k, n: tokens, rows and columns of one weight.
      batch: number of weights (experts), each with `m` tokens.
      bits, group_size, layout, table, zeros: of the packed weight.
      x_dtype: name of the activations' dtype; int8 where they are rounded already.
      activation_bits: None or 8.
    """

    m: int
    k: int
    n: int
    batch: int
    bits: int
    group_size: int | None
    layout: str
    table: bool
    zeros: bool
    x_dtype: str
    activation_bits: int | None

    @property
    def format(self) -> str:
        """`w4a16`, `w8a8`; weights whose values come from a table are `t4a16`."""
        return f"{'t' if self.table else 'w'}{self.bits}a{self.activation_bits or 16}"

    @property
    def groups(self) -> int:
        """Scales per column."""
        return 1 if self.group_size is None else -(-self.k // self.group_size)

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.batch * self.m * self.k * self.n

    @property
    def num_bytes(self) -> int:
        """Bytes that must move at least: packed codes, float32 scales, activations in and float32 out."""
        weight = self.k * self.n * self.bits // 8 + 4 * self.groups * self.n
        activations = self.m * self.k * jnp.dtype(self.x_dtype).itemsize + 4 * self.m * self.n
        return self.batch * (weight + activations)


def dot_type(problem: Problem) -> str:
    """The operands' dtype of the inner products: `int8`, or that of the activations."""
    return "int8" if problem.activation_bits == 8 else problem.x_dtype


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation of the contract in `reference`.

    Attributes:
      platforms: where it runs compiled; empty: everywhere.
      layouts: tags that it reads; empty: all.
      interpretable: whether `interpret=True` runs it on a CPU.
      run: the computation.
      seconds: predicted time of a problem on a device, from bytes and operations. Only the order matters.
      refuses: `Problem` -> why it cannot be computed, or None; tags, platforms and what none computes aside.
      tiles: the config where no table has one.
      legal: whether a tuned config fits a problem.
      candidates: configs worth measuring.
      complete: `run` rounds activations and takes zero points itself; it has the arguments of a call.
      experts: it takes weights with one batch axis too, and `x` with the same.
    """

    platforms: tuple[str, ...]
    layouts: tuple[str, ...]
    interpretable: bool
    run: Callable[..., jax.Array]
    seconds: Callable[[Problem, Device], float]
    refuses: Callable[[Problem], str | None] = lambda problem: None
    tiles: Callable[[Problem], Config] = lambda problem: ()
    legal: Callable[[Problem, Config], bool] = lambda problem, config: config == ()
    candidates: Callable[[Problem], tuple[Config, ...]] | None = None
    complete: bool = False
    experts: bool = False

    def worth_measuring(self, problem: Problem) -> tuple[Config, ...]:
        """What a benchmark tries: `candidates`, or `tiles` alone."""
        return (self.tiles(problem),) if self.candidates is None else self.candidates(problem)

    def __call__(
        self, x: jax.Array, packed: Packed, activation_bits: int | None, config: Config = (), interpret: bool = False
    ) -> jax.Array:
        """`float32[m, n]` for `x[m, k]` and a weight without batch axes, or both with one of as many experts.

        Zero points and token scales are applied here.
        """
        if self.complete:
            return self.run(x, packed, activation_bits, config, interpret)
        rounded = activation_bits is None or x.dtype == jnp.int8
        x, token_scale = (x, None) if rounded else quantize_tokens(x)
        y = self.run(x, packed, config, interpret)
        y = y if packed.zeros is None else y - of_zeros(x, packed)
        return y if token_scale is None else y * token_scale


def of_zeros(x: jax.Array, packed: Packed) -> jax.Array:
    """`float32[m, n]`, what zero points take from `x[m, k] @ codes`; the weight has some, and no batch axes.

    `sum of x (q - z) s = sum of x q s - (sum of x over the group) z s`: one thin matmul more, exact in integers.
    """
    zeros = zero_points(packed)
    assert zeros is not None
    shift = zeros.astype(jnp.float32) * plain_scales(packed)
    return jnp.matmul(group_sums(x, packed), shift, precision=lax.Precision.HIGHEST)


def plain_scales(packed: Packed) -> jax.Array:
    """`float32[groups, n or 1]`, whatever the layout, for a weight without batch axes."""
    scales = packed.scales[:, 0] if packed.layout == "tpu" else packed.scales
    return scales[: packed.spec.groups, : packed.n].astype(jnp.float32)


def group_sums(x: jax.Array, packed: Packed) -> jax.Array:
    """`float32[m, groups]`: sums of `x[m, k]` over the rows of every group; of int8 `x` exact."""
    size = packed.group_size or packed.k
    whole = jnp.pad(x, ((0, 0), (0, packed.spec.groups * size - packed.k)))
    grouped = whole.reshape(x.shape[0], packed.spec.groups, size)
    wide = jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32
    return jnp.sum(grouped, axis=-1, dtype=wide).astype(jnp.float32)
