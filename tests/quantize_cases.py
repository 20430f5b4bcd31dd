"""Weights and grams that tests of rounding share, and how results are compared."""

import jax
import numpy as np

from mpq.types import QTensor

K, N = 40, 6


def weights(seed: int = 0, k: int = K, n: int = N) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((1, k, n)).astype(np.float32)


def correlated_gram(seed: int = 0, k: int = K) -> np.ndarray:
    """Inputs of unequal size that are strongly correlated."""
    rng = np.random.default_rng(seed)
    x = (
        rng.standard_normal((300, k))
        @ (0.3 * rng.standard_normal((k, k)) + np.eye(k))
        * np.exp(0.5 * rng.standard_normal(k))
    )
    return (x.T @ x / 300)[None].astype(np.float32)


def layer_loss(w, qtensor, gram) -> np.ndarray:
    """`float64[n]`."""
    error = np.asarray(w, np.float64)[0] - np.asarray(qtensor.dequantize(), np.float64)[0]
    return np.einsum("kn,kl,ln->n", error, np.asarray(gram, np.float64)[0], error)


def assert_equal(a: QTensor, b: QTensor) -> None:
    assert a.scheme == b.scheme
    jax.tree.map(np.testing.assert_array_equal, a, b)


def intermediates(jaxpr):
    """Shapes of all that is computed, in loop bodies too."""
    for equation in jaxpr.eqns:
        yield from (v.aval for v in equation.outvars)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from intermediates(inner)


def count_equations(jaxpr) -> int:
    """All equations, those of loop bodies included."""
    return sum(1 for _ in intermediates(jaxpr))
