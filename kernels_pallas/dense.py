"""GPUs, in XLA alone: the weight is unpacked to the activations' type, then one dot of its library.

For many tokens, whose product takes longer than the unpacking. Weights for bfloat16 activations are rounded to
bfloat16, as those of a dense model are; codes for int8 activations stay what they are, and need one scale a column,
since sums of groups would not stay apart in one dot.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import compat, fragments, registers
from kernels_pallas.backend import Backend, Config, Problem, dot_type, plain_scales
from kernels_pallas.devices import Device
from kernels_pallas.hopper_unpack import unpacked
from kernels_pallas.packed import Packed, dequantize, unpack


def _run(x: jax.Array, packed: Packed, config: Config, interpret: bool) -> jax.Array:
    del config
    if packed.layout == "hopper" and not interpret and compat.hopper():
        return _from_tiles(x, packed)
    if x.dtype == jnp.int8:
        y = lax.dot_general(x, unpack(packed)[0], (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
        return y.astype(jnp.float32) * plain_scales(packed)
    weight = dequantize(dataclasses.replace(packed, zeros=None)).astype(x.dtype)
    return jnp.matmul(x, weight, preferred_element_type=jnp.float32)


def _from_tiles(x: jax.Array, packed: Packed) -> jax.Array:
    """A kernel unpacks, and writes columns as rows, which is how the library reads integers."""
    spec, integers = packed.spec, x.dtype == jnp.int8
    padded = jnp.pad(x, ((0, 0), (0, spec.tiled_k - spec.k)))
    padded = fragments.permute_rows(padded, packed.bits) if integers else padded
    total = jnp.int32 if integers else jnp.float32
    weight = unpacked(packed, x.dtype)
    y = lax.dot_general(padded, weight, (((1,), (1,)), ((), ())), preferred_element_type=total)[:, : spec.n]
    return y.astype(jnp.float32) * (plain_scales(packed) / registers.over(packed.bits)) if integers else y


def _refuses(problem: Problem) -> str | None:
    if problem.activation_bits is None:
        kept = problem.x_dtype == "bfloat16"
        return None if kept else f"it rounds weights to bfloat16, and the activations are {problem.x_dtype}"
    if problem.groups > 1:
        return f"it adds up rows of {problem.groups} groups in one integer"
    return registers.too_long(problem.k)


def _seconds(problem: Problem, device: Device) -> float:
    """Codes are read, an unpacked weight is written and read again."""
    operand = 1 if dot_type(problem) == "int8" else 2
    moved = problem.num_bytes + 2 * operand * problem.batch * problem.k * problem.n
    return problem.batch * 5e-6 + moved / device.bandwidth + device.seconds(0, problem.macs, dot_type(problem))


DENSE = Backend(
    platforms=("cuda",),
    layouts=("plain", "hopper"),
    interpretable=True,
    run=_run,
    refuses=_refuses,
    seconds=_seconds,
)
