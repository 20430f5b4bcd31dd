"""`quantized_matmul`: checks once, chooses a backend, and knows the derivative."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import compat
from kernels_pallas.backend import Config, Problem
from kernels_pallas.dispatch import BACKENDS, choose, refusal
from kernels_pallas.errors import KernelError
from kernels_pallas.packed import Packed, check, dequantize

FLOATS = ("float32", "bfloat16", "float16")
CODES = "int8"
"""Dtype of activations that are rounded already."""
PLATFORMS = ("cpu", "tpu", "cuda")


def quantized_matmul(
    x: jax.Array,
    packed: Packed,
    *,
    activation_bits: int | None = None,
    activation_scale: jax.Array | None = None,
    backend: str = "auto",
    config: Config | None = None,
    out_dtype: Any = None,
    platform: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`x @ w` with a packed weight; `reference` says what exactly. Differentiable once in `x`.

    The derivative is that of the dequantized weight; rounding of activations counts as the identity (straight-through,
    Bengio et al. 2013, arXiv:1308.3432).

    Args:
      x: floats `[..., k]`; if the weight has batch axes `[*batch, m, k]`. Or activations that are rounded already, by
        any range: their codes, int8.
      packed: the weight.
      activation_bits: 8 rounds every token of `x` to int8; None leaves `x` as it is.
      activation_scale: of codes `x`: what a step is worth, floats that broadcast to `[..., 1]`. The product is that of
        the codes, exact in int32 for every group, times this.
      backend: a key of `BACKENDS`, or `auto`, which works wherever the reference does.
      config: tiles of the named backend, which a benchmark compares; None: those of the tuned table.
      out_dtype: of the result; None: that of `x`, of codes float32. Sums are float32.
      platform: `cpu`, `tpu` or `cuda`: what the computation is lowered for; None: where JAX runs.
      interpret: run a kernel of other hardware on this CPU, slowly.

    Returns:
      `out_dtype[..., n]`, or `[*batch, m, n]`.

    Raises:
      KernelError: shapes, dtypes, layout, backend and platform do not go together.
    """
    problem = describe(x, packed, activation_bits)
    _check_scale(x, activation_scale)
    platform = "cuda" if platform == "gpu" else platform or compat.platform()
    if platform not in PLATFORMS:
        raise KernelError(f"unknown platform {platform!r}: allowed is {', '.join(PLATFORMS)}")
    if backend == "auto":
        name, config = choose(problem, platform, interpret=interpret)
    elif backend not in BACKENDS:
        raise KernelError(f"unknown backend {backend!r}: allowed is auto, {', '.join(BACKENDS)}")
    elif reason := refusal(BACKENDS[backend], problem, platform, interpret):
        raise KernelError(f"backend {backend!r} cannot compute this matmul: {reason}")
    else:
        name, config = backend, tuned(backend, problem, platform) if config is None else tuple(config)
        if not BACKENDS[name].legal(problem, config):
            raise KernelError(
                f"backend {name!r} has no tiles {list(config)} for this matmul: leave `config` out for "
                f"{list(BACKENDS[name].tiles(problem))}"
            )
    call = _Call(name, config, problem.activation_bits, interpret, str(x.dtype))
    batch = packed.batch_shape
    flat = x.reshape(*batch, -1, packed.k) if batch else x.reshape(-1, packed.k)
    if activation_scale is not None:
        y = jnp.reshape(_run(call, flat, packed), (*x.shape[:-1], packed.n)) * activation_scale.astype(jnp.float32)
        return y.astype(jnp.float32 if out_dtype is None else out_dtype)
    y = jnp.reshape(_matmul(call, flat, packed), (*x.shape[:-1], packed.n))
    return y.astype(x.dtype if out_dtype is None else out_dtype)


def tuned(backend: str, problem: Problem, platform: str) -> Config:
    """Config of one backend for a problem: of the device's table if that names this backend, else its own choice."""
    name, config = choose(problem, platform)
    return config if name == backend else BACKENDS[backend].tiles(problem)


def _check_scale(x: jax.Array, scale: jax.Array | None) -> None:
    """Codes have scales, one a token or fewer, and floats none."""
    if (scale is None) != (str(x.dtype) != CODES):
        raise KernelError(
            f"x is {x.dtype} {'without' if scale is None else 'with'} a scale of activations: "
            "int8 codes and their scales go together"
        )
    if scale is None:
        return
    want = (*x.shape[:-1], 1)
    fits = scale.ndim <= x.ndim and all(a in (1, b) for a, b in zip(scale.shape[::-1], want[::-1], strict=False))
    if not fits or str(scale.dtype) not in FLOATS:
        raise KernelError(
            f"scales of activations are {scale.dtype}{list(scale.shape)}: allowed are floats that broadcast to "
            f"{list(want)}"
        )


def describe(x: jax.Array | jax.ShapeDtypeStruct, packed: Packed, activation_bits: int | None) -> Problem:
    """The problem that these arguments pose.

    Raises:
      KernelError: they do not go together.
    """
    if str(x.dtype) not in (*FLOATS, CODES):
        raise KernelError(f"x is {x.dtype}: allowed are {', '.join(FLOATS)}, and int8 codes with their scales")
    if activation_bits not in (None, 8):
        raise KernelError(f"activations of {activation_bits} bits: allowed are 8, or None to leave them as they are")
    check(packed)
    batch = packed.batch_shape
    front = x.shape[: len(batch)]
    if x.ndim < 1 or x.shape[-1] != packed.k or (batch and (x.ndim != len(batch) + 2 or front != batch)):
        want = f"[{', '.join(map(str, batch))}, m, {packed.k}]" if batch else f"[..., {packed.k}]"
        raise KernelError(f"x is {list(x.shape)} for a weight {[*batch, packed.k, packed.n]}: allowed is {want}")
    return Problem(
        m=math.prod(x.shape[len(batch) : -1]),
        k=packed.k,
        n=packed.n,
        batch=math.prod(batch),
        bits=packed.bits,
        group_size=packed.group_size,
        layout=packed.layout,
        table=packed.levels is not None,
        zeros=packed.zeros is not None,
        x_dtype=str(x.dtype),
        activation_bits=8 if str(x.dtype) == CODES else activation_bits,
    )


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is static about a call."""

    backend: str
    config: Config
    activation_bits: int | None
    interpret: bool
    x_dtype: str


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(call: _Call, x: jax.Array, packed: Packed) -> jax.Array:
    return _run(call, x, packed)


def _run(call: _Call, x: jax.Array, packed: Packed) -> jax.Array:
    """`float32[*batch, m, n]`: experts one after the other where the backend does not take them all at once."""
    backend, batch = BACKENDS[call.backend], packed.batch_shape
    if len(batch) > 1:
        flat = lambda array: array.reshape(-1, *array.shape[len(batch) :])
        y = _run(call, flat(x), jax.tree.map(flat, packed))
        return y.reshape(*batch, *y.shape[1:])
    if batch and not backend.experts:
        return lax.map(lambda pair: _run(call, *pair), (x, packed))
    return backend(x, packed, call.activation_bits, config=call.config, interpret=call.interpret)


def _forward(call: _Call, x: jax.Array, packed: Packed) -> tuple[jax.Array, Packed]:
    return _matmul(call, x, packed), packed


def _backward(call: _Call, packed: Packed, dy: jax.Array) -> tuple[jax.Array, None]:
    """`dx = dy @ w^T` in float32; nothing for the weight."""
    dx = jnp.matmul(dy, jnp.swapaxes(dequantize(packed), -1, -2), precision=lax.Precision.HIGHEST)
    return dx.astype(call.x_dtype), None


_matmul.defvjp(_forward, _backward)
