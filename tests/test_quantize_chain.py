"""The factor of a damped gram, and products with it, against float64 NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from mpq.formats import parse_scheme
from mpq.quantize import chain, gptq
from mpq.quantize.gptq import GPTQ
from tests.quantize_cases import K, assert_equal, correlated_gram, weights

EPS = np.finfo(np.float32).eps


def triangle(k: int, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A unit lower triangular matrix and columns to multiply."""
    rng = np.random.default_rng(seed)
    links = np.tril(rng.standard_normal((k, k)), -1).astype(np.float32) / np.float32(k**0.5) + np.eye(k, dtype="f")
    return links, rng.standard_normal((k, n)).astype(np.float32)


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_the_factor_is_that_of_the_damped_gram_and_solves_its_own_blocks(damping):
    gram = correlated_gram(0)
    got = chain.factor(jnp.asarray(gram), jnp.arange(K)[None], jnp.float32(damping), 5)
    links, weight = np.asarray(got.links[0], np.float64), np.asarray(got.weight[0], np.float64)
    damped = gram[0].astype(np.float64) + damping * np.mean(np.diag(gram[0])) * np.eye(K)
    # Backward error of a Cholesky factor: some k eps of the largest entry.
    np.testing.assert_allclose(links.T @ np.diag(weight) @ links, damped, atol=4 * K * EPS * damped.max())
    np.testing.assert_array_equal(np.triu(links, 1), 0)
    np.testing.assert_allclose(got.share[0], weight * np.sum(links**2, axis=1), rtol=1e-5)
    np.testing.assert_allclose(got.damping[0], damping * np.mean(np.diag(gram[0])), rtol=1e-6)
    for number, solve in enumerate(np.asarray(got.solve[0], np.float64)):
        rows = slice(8 * number, 8 * number + 8)
        np.testing.assert_allclose(solve @ links[rows, rows], np.eye(8), atol=64 * EPS * np.abs(solve).max())


@pytest.mark.parametrize("count", [0, 128, 640, 1024, 1536])
def test_rows_before_are_summed_whatever_the_number_of_slabs(count):
    links, error = triangle(1536, 3)  # three slabs of 512
    error[count:] = 0
    got = chain.before(jnp.asarray(links[1400:]), jnp.asarray(error), jnp.int32(count), 128)
    wide = links[1400:].astype(np.float64) @ error.astype(np.float64)
    np.testing.assert_allclose(got, wide, atol=1536 * EPS)


@pytest.mark.parametrize("k", [40, 1536])
def test_a_loss_is_below_that_of_an_error_where_it_is(k):
    links, error = triangle(k, 8, 1)
    weight, share = np.random.default_rng(2).uniform(1, 2, (2, k)).astype(np.float32)  # any rows may come first
    exact = np.sum(weight[:, None] * (links.astype(np.float64) @ error) ** 2, axis=0)
    factor = np.float32([0.2, 0.6, 0.999, 1.001, 2, np.inf, np.nan, -1])
    whole = chain.Chain(jnp.asarray(links), jnp.asarray(weight), jnp.asarray(share), jnp.float32(0), None)
    below = lambda loss, span: chain.below(jnp.asarray(loss, jnp.float32), whole, jnp.asarray(error), span)
    np.testing.assert_array_equal(below(exact * factor, 1), [True, True, True, False, False, False, False, True])
    for factor in ([0.5, 0.5, 2, 2, 0.5, 0.9, 1.001, 1.001], [0.5, 0.5, np.nan, 0.5, 2, 2, 0.999, 0.999]):
        loss = exact * np.float32(factor)
        together = [loss[at : at + 2].sum() < exact[at : at + 2].sum() for at in range(0, 8, 2)]
        np.testing.assert_array_equal(below(loss, 2), np.repeat(together, 2))
        np.testing.assert_array_equal(below(loss, 8), np.repeat(loss.sum() < exact.sum(), 8))


def test_a_loss_is_below_that_of_an_error_of_which_a_damping_is_no_part():
    links, error = triangle(40, 8, 3)
    whole = chain.Chain(jnp.asarray(links), jnp.ones(40), jnp.ones(40), jnp.float32(0.5), None)
    exact = np.sum((links.astype(np.float64) @ error) ** 2 - 0.5 * error.astype(np.float64) ** 2, axis=0)
    for factor in (0.999, 1.001):
        got = chain.below(jnp.asarray(exact * factor, jnp.float32), whole, jnp.asarray(error), 1)
        np.testing.assert_array_equal(got, exact * factor < exact)


@pytest.mark.parametrize(("text", "act_order"), [("int3_g8", False), ("int2_channel", False), ("int3_g8", True)])
def test_slabs_change_nothing(monkeypatch, text, act_order):
    """They change the order of float32 sums alone: see the same of the block size in `test_quantize_gptq.py`."""
    w, gram, scheme = jnp.asarray(weights(5)), jnp.asarray(correlated_gram(5)), parse_scheme(text)
    quantizer = GPTQ(act_order=act_order, block_size=8)
    expected = quantizer(w, scheme, gram)
    monkeypatch.setattr(chain, "_SLAB", 16)
    gptq._quantize.clear_cache()
    got = quantizer(w, scheme, gram)
    gptq._quantize.clear_cache()
    assert_equal(got, expected)
