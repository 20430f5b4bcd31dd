"""Rounding of scales to the dtype that they are stored in."""

import jax
import jax.numpy as jnp


def round_scale(scale: jax.Array, dtype: str) -> jax.Array:
    """`scale` rounded to `dtype`, as float32; finite and never zero: magnitudes are clamped to what `dtype` can hold.

    Half precision and e4m3 keep their subnormals. What is below the normal numbers of float32 is not kept: processors
    may flush it to zero.
    """
    info = jnp.finfo(dtype)
    smallest = max(float(info.smallest_subnormal), float(jnp.finfo(jnp.float32).smallest_normal))
    magnitude = jnp.clip(jnp.abs(scale), smallest, float(info.max)).astype(dtype).astype(jnp.float32)
    return jnp.where(scale < 0, -magnitude, magnitude)
