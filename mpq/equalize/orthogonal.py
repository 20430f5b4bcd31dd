"""Orthogonal matrices as products of cheap ones: signs and Kronecker products of small factors.

The randomized Hadamard matrix of QuaRot (Ashkboos et al. 2024, arXiv:2404.00456, section 3) is D H, with random signs
on the diagonal D and H[i, j] = +-n^-1/2. Hadamard matrices of Sylvester's construction exist for powers of two; for
n = 2^p m with odd m it is D (H (x) O) here, O a random orthogonal matrix of size m, where QuaRot looks up Hadamard
matrices of some multiples of four. H itself is a Kronecker product, so that a vector costs n (sum of the sizes of the
factors) operations, not n^2.

A matrix that keeps the vector of ones commutes with the mean over the features, which layer normalization subtracts:
U diag(1, D) U^T, where the first column of U = H (x) O is constant.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

LARGEST_FACTOR = 64
"""Size of a factor of a Hadamard matrix."""

Step = np.ndarray | tuple[np.ndarray, ...]
"""Signs `float64[n]` of the features, or the factors `float64[m, m]` of a product."""


@dataclasses.dataclass(frozen=True, eq=False)
class Rotation:
    """Q, as the steps of x Q in their order.

    Attributes:
      width: n.
      steps: one after the other.
    """

    width: int
    steps: tuple[Step, ...]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """X Q along the last axis, `float64[..., n]`."""
        return functools.reduce(lambda value, step: _step(step, value), self.steps, np.asarray(x, np.float64))

    def on_device(self, x: jax.Array) -> jax.Array:
        """X Q in the dtype of `x[..., n]`, as part of a program."""
        for step in self.steps:
            x = x * jnp.asarray(step, x.dtype) if isinstance(step, np.ndarray) else _product(step, x)
        return x

    @property
    def matrix(self) -> np.ndarray:
        """Q, `float64[n, n]`."""
        return self(np.eye(self.width))


def random_rotation(width: int, key: jax.Array, *, keep_ones: bool = False) -> Rotation:
    """A randomized Hadamard matrix, or where the width is no power of two its product with a random orthogonal one.

    Args:
      width: n, at least 1.
      key: of the signs and of the orthogonal factor.
      keep_ones: Q maps the vector of ones to itself.
    """
    power = width & -width
    odd = width // power
    rng = generator(key)
    signs = rng.choice([-1.0, 1.0], size=width)
    factors = _hadamard_factors(power)
    if odd > 1:
        noise = rng.normal(size=(odd, odd))
        if keep_ones:
            noise[:, 0] = 1.0
        factors = (*factors, _orthogonal(noise))
    if not keep_ones:
        return Rotation(width, (signs, factors))
    signs[0] = 1.0
    return Rotation(width, (factors, signs, tuple(factor.T for factor in factors)))


def generator(key: jax.Array) -> np.random.Generator:
    """Random numbers of a key in float64, without a program for every shape of them."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())


def identity(width: int) -> Rotation:
    """No change."""
    return Rotation(width, ())


def _hadamard_factors(power: int) -> tuple[np.ndarray, ...]:
    """Factors of the normalized Hadamard matrix of a power of two; none for 1."""
    sizes = []
    while power > 1:
        sizes.append(min(power, LARGEST_FACTOR))
        power //= sizes[-1]
    return tuple(_sylvester(size) for size in sizes)


def _sylvester(size: int) -> np.ndarray:
    """The Hadamard matrix of a power of two over its root; its first column is constant."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / math.sqrt(size)


def _orthogonal(noise: np.ndarray) -> np.ndarray:
    """The orthogonal factor of `noise`, of the signs that make it unique: uniformly distributed if noise is normal."""
    q, r = np.linalg.qr(noise)
    return q * np.sign(np.diagonal(r))


def _product(factors: tuple[np.ndarray, ...], x: jax.Array) -> jax.Array:
    """X times the Kronecker product, a matmul with every factor."""
    value = x.reshape(-1, *(len(factor) for factor in factors))
    for factor in factors:  # the axis that is contracted goes to the end: after all of them the order is what it was
        small = jnp.asarray(factor, x.dtype)
        value = jax.lax.dot_general(value, small, (((1,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
    return value.reshape(x.shape)


def _step(step: Step, x: np.ndarray) -> np.ndarray:
    if isinstance(step, np.ndarray):
        return x * step
    if not step:
        return x
    lead, sizes = x.shape[:-1], [len(factor) for factor in step]
    value = x.reshape(-1, *sizes)
    for axis, factor in enumerate(step, start=1):
        value = np.moveaxis(np.moveaxis(value, axis, -1) @ factor, -1, axis)
    return value.reshape(*lead, math.prod(sizes))
