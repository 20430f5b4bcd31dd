"""Learned levels: k-means against an exact dynamic program in float64, and weights that have them at every stage."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import dequantize, quantized_matmul
from mpq.export.targets import TARGETS
from mpq.formats import parse_scheme
from mpq.packed import pack_weights
from mpq.quantize import GPTQ, RTN, codebooks
from mpq.quantize.best import Best
from mpq.types import MpqError, Use, WeightSpec
from tests.quantize_cases import correlated_gram, layer_loss, weights

K, N = 40, 6


def optimum(x: np.ndarray, weight: np.ndarray, count: int) -> float:
    """Least weighted sum of squared distances to `count` levels, the first -1: clusters are runs of sorted values."""
    order = np.argsort(x)
    x, weight = x[order].astype(np.float64), weight[order].astype(np.float64)
    size = len(x)
    least = np.concatenate([[0.0], np.cumsum(weight * (x + 1) ** 2)])
    for _ in range(1, count):
        more = least.copy()
        for begin in range(size):
            mass, mean, spread = 0.0, 0.0, 0.0  # West's update of a weighted mean and its squared deviations
            for end in range(begin, size):
                mass += weight[end]
                off = x[end] - mean
                mean += off * weight[end] / mass
                spread += weight[end] * off * (x[end] - mean)
                more[end + 1] = min(more[end + 1], least[begin] + spread)
        least = more
    return float(least[-1])


def error(x: np.ndarray, weight: np.ndarray, levels: np.ndarray) -> float:
    return float(np.sum(weight * np.abs(x[:, None] - np.asarray(levels, np.float64)).min(axis=1) ** 2))


@functools.cache
def fitted(count: int):
    return jax.jit(lambda x, w: codebooks.refine(x, w, codebooks.start(x, w, count)).astype(jnp.float16))


DRAWS = {
    "normal": lambda rng: np.clip(rng.standard_normal(60) / 3, -1, 1),
    "long tails": lambda rng: np.clip(rng.standard_t(2, 60) / 8, -1, 1),
    "few values": lambda rng: rng.choice([-1.0, -0.5, 0.1, 0.125, 0.9], 60),
    "on one side": lambda rng: rng.uniform(-1, -0.7, 60),
    "zeros": lambda rng: np.zeros(60),
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("count", [4, 8, 16])
def test_levels_are_near_those_of_the_exact_dynamic_program(name, count):
    rng = np.random.default_rng(count)
    x, weight = DRAWS[name](rng).astype(np.float32), rng.uniform(0.1, 3, 60).astype(np.float32)
    levels = np.asarray(fitted(count)(jnp.asarray(x)[:, None], jnp.asarray(weight)[:, None]), np.float32)
    assert levels[0] == -1
    assert (np.diff(levels) >= 0).all()
    assert (np.abs(levels) <= 1).all()
    got, best = (np.sqrt(e / weight.sum()) for e in (error(x, weight, levels), optimum(x, weight, count)))
    # The module's docstring: moving each value by half a bin moves the root mean square of any table by as much. Half
    # precision moves levels by 2^-12 at most.
    assert best * (1 - 1e-6) <= got <= best + 2 / codebooks.BINS + 2.0**-12
    for table in codebooks.FIXED[count.bit_length() - 1]:
        assert got <= np.sqrt(error(x, weight, np.asarray(table)) / weight.sum()) + 2.0**-12


def test_values_that_a_table_holds_give_it_back_exactly():
    levels = np.array([-1, -0.61, -0.2, -0.05, 0.03, 0.25, 0.5, 0.8]).astype(np.float16)
    x = np.random.default_rng(0).permutation(np.repeat(levels.astype(np.float32), 7))
    got = fitted(8)(jnp.asarray(x)[:, None], jnp.ones((56, 1)))
    np.testing.assert_array_equal(got, levels)


def test_far_and_unweighted_values_stay_finite():
    x = jnp.asarray([-1e30, -1.0, 0.2, 1e30])[:, None]
    weight = jnp.asarray([0.0, 1.0, 1.0, 0.0])[:, None]
    assert jnp.isfinite(fitted(4)(x, weight).astype(jnp.float32)).all()


@pytest.mark.parametrize(("text", "fixed"), [("lut2_g16", ("int2_g16",)), ("lut3_g16", ("int3_g16", "nf3_g16"))])
def test_the_weighted_error_is_below_that_of_fixed_tables(text, fixed):
    w, diagonal = jnp.asarray(weights(3)), np.exp(np.random.default_rng(3).standard_normal(K)).astype(np.float32)
    gram = jnp.asarray(np.diag(diagonal)[None])
    losses = [layer_loss(w, RTN("mse")(w, parse_scheme(t), gram), gram).sum() for t in (text, *fixed)]
    assert losses[0] < 0.95 * min(losses[1:])


def test_gptq_takes_the_levels_of_rounding_to_nearest_whatever_its_block_size():
    """Rows that only fill up a block are no zeros under levels without 0; they may not count."""
    w, gram, scheme = jnp.asarray(weights(4)), jnp.asarray(correlated_gram(4)), parse_scheme("lut2_g16")
    nearest, got = RTN("mse")(w, scheme, gram), GPTQ()(w, scheme, gram)
    np.testing.assert_array_equal(got.codebook, nearest.codebook)
    assert layer_loss(w, got, gram).sum() < 0.9 * layer_loss(w, nearest, gram).sum()
    np.testing.assert_array_equal(GPTQ(block_size=7)(w, scheme, gram).dequantize(), got.dequantize())


def test_the_best_of_two_does_not_mix_tables():
    w, gram, scheme = jnp.asarray(weights(5)), jnp.asarray(correlated_gram(5)), parse_scheme("lut2_g16")
    first, second = RTN("mse")(w, scheme, gram), RTN("absmax")(w, scheme)
    assert (first.codebook != second.codebook).any()
    got = Best((RTN("mse"), RTN("absmax")))(w, scheme, gram)
    np.testing.assert_array_equal(got.dequantize(), first.dequantize())


def spec(batch: int, k: int, n: int) -> WeightSpec:
    shape, uses = (batch, k, n) if batch > 1 else (k, n), (Use("matmul", "x", batch * k * n),)
    return WeightSpec("w", "w", (), shape, tuple(range(len(shape))), batch, k, n, "w", uses)


def test_one_matrix_is_packed_with_its_table_and_several_are_refused():
    w = jax.random.normal(jax.random.key(0), (2, 32, 16))
    one, two = (RTN()(a, parse_scheme("lut3_g16")) for a in (w[:1], w))
    packed = pack_weights([spec(1, 32, 16)], {"w": one})["w"]
    np.testing.assert_array_equal(dequantize(packed), one.dequantize()[0])
    x = jax.random.normal(jax.random.key(1), (3, 32))
    want = np.asarray(x, np.float64) @ np.asarray(one.dequantize()[0], np.float64)
    # Sums of 32 products in float32, each within 2^-24 of its size.
    bound = 34 * 2.0**-24 * np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(one.dequantize()[0], np.float64))
    assert (np.abs(np.asarray(quantized_matmul(x, packed), np.float64) - want) <= bound).all()
    message = (
        "weight w is lut3_g16: integers and tables of at most 16 levels, one for all matrices of a batch, can be "
        "packed; leave it among the parameters"
    )
    with pytest.raises(MpqError) as caught:
        pack_weights([spec(2, 32, 16)], {"w": two})
    assert str(caught.value) == message


@pytest.mark.parametrize("name", TARGETS)
def test_runtimes_without_tables_refuse_them_by_name(name):
    """PyTorch's program looks levels up; plans for the others leave such schemes out."""
    reason = TARGETS[name].refusal(spec(1, 64, 32), parse_scheme("lut4_g32"))
    assert (reason is None) == (name == "pt2")
    assert TARGETS[name].refusal(spec(1, 64, 32), parse_scheme("bf16")) is None or name == "bnb"
