"""CPUs, in C: packed weights read once, with the vector instructions that the machine has.

XLA on CPUs has no fast product of one token with int8, and writes unpacked weights to memory before it multiplies them.
There are two ways, in AVX-512 with VNNI, AVX2, NEON or what the compiler makes of plain vectors. `csrc/kernel.c`, for
few tokens, unpacks into registers, for eight tokens at a time. `csrc/panels.c`, for many, unpacks a block of columns
and rows once for all tokens, into memory that stays in a cache: 0.6 MB a thread, and a copy of the activations.
`native_build` compiles both where there is a compiler; elsewhere this backend refuses and others do the work.
"""

import jax
import jax.ffi
import jax.numpy as jnp
import numpy as np

from kernels_pallas.backend import Backend, Config, Problem, dot_type, plain_scales
from kernels_pallas.devices import Device
from kernels_pallas.errors import KernelError
from kernels_pallas.native_build import TARGET, Library, library
from kernels_pallas.packed import MAX_LEVELS, Packed

TILE = 8
"""Tokens that share one unpacking, where they are few."""


def matmul(x: jax.Array, packed: Packed, isa: str = "", least: int = 0) -> jax.Array:
    """`float32[m, n]`, as `backend.Run` says.

    Args:
      x: floats or int8 `[m, k]`.
      packed: of layout `cpu`, without batch axes.
      isa: instruction set, one of `library().kernels`; empty: the first.
      least: tokens for which the second way is taken; 0: as many as make it the faster one on this instruction set.

    Raises:
      KernelError: there is no library.
    """
    if isinstance(found := library(), str):
        raise KernelError(f"the native kernels are not there: {found}")
    spec = packed.spec
    x = x if x.dtype == jnp.int8 else x.astype(jnp.float32)
    whole = jnp.pad(x, ((0, 0), (0, spec.segments * spec.segment - spec.k)))
    out = jax.ShapeDtypeStruct((x.shape[0], spec.n), jnp.float32)
    call = jax.ffi.ffi_call(TARGET, out, vmap_method="sequential")
    return call(
        whole,
        packed.codes,
        plain_scales(packed),
        _values(packed),
        bits=np.int64(packed.bits),
        isa=isa,
        least=np.int64(least),
    )


def _values(packed: Packed) -> np.ndarray:
    """`float32[16]`: value of every code, repeated: what lies above a field of fewer bits changes nothing."""
    if packed.bits == 8:
        return np.zeros(MAX_LEVELS, np.float32)
    count = 2**packed.bits
    values = np.arange(count) - packed.spec.offset if packed.levels is None else np.array(packed.levels)
    values = np.pad(values, (0, count - len(values)))
    return np.resize(values, MAX_LEVELS).astype(np.float32)


def _run(x: jax.Array, packed: Packed, config: Config, interpret: bool) -> jax.Array:
    del config, interpret
    return matmul(x, packed)


def _refuses(problem: Problem) -> str | None:
    if problem.table and problem.bits == 8:
        return "codes of a table have 8 bits, allowed are 4, 2"
    found = library()
    if not isinstance(found, Library):
        return found
    return None if found.fast else "this processor has no AVX2"


def _seconds(problem: Problem, device: Device) -> float:
    """Roofline, and unpacking, much faster than XLA's: in registers for a tile of tokens, or into a cache for all."""
    unpack = problem.batch * min(-(-problem.m // TILE), 2) * problem.k * problem.n / (16 * device.unpack)
    return device.seconds(problem.num_bytes, problem.macs, dot_type(problem)) + unpack


NATIVE = Backend(
    platforms=("cpu",),
    layouts=("cpu",),
    interpretable=False,
    run=_run,
    refuses=_refuses,
    seconds=_seconds,
)
