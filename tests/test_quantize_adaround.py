"""AdaRound against a descent in float64 and against all roundings there are."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from mpq.formats import parse_scheme
from mpq.quantize import adaround
from mpq.quantize.adaround import AdaRound
from mpq.quantize.gptq import GPTQ
from mpq.quantize.rtn import RTN
from mpq.types import MpqError
from tests.quantize_cases import assert_equal, correlated_gram, layer_loss, weights

FEW = 10
NEAREST = RTN("mse")


def grid(w, scheme, start):
    """Level below, distance to the one above, and code of the one below, `[k, n]` in float64: one group a column."""
    decode = lambda code: np.asarray(scheme.format.decode(jnp.asarray(code, jnp.int8)), np.float64)
    codes = np.arange(scheme.format.min_qvalue, scheme.format.max_qvalue + 1)
    scale = np.asarray(start.scale, np.float64)[0]
    zero = 0.0 if start.zero_point is None else decode(start.zero_point)[0]
    # A negative scale turns the order of the levels round: "below" is of the code then.
    value = w[0].astype(np.float64) / scale + zero
    lower = np.clip(np.searchsorted(decode(codes), value, side="right") - 1, 0, len(codes) - 2)
    low, high = ((decode(codes[at]) - zero) * scale for at in (lower, lower + 1))
    return low, high - low, codes[lower]


def descent(w, gram, low, step, start_loss, options):
    """h after all steps, by derivatives written out."""
    share = np.clip((w[0] - low) / step, 0.01, 0.99)
    inside = (share + 0.1) / 1.2
    v, first, second = np.log(inside / (1 - inside)), 0.0, 0.0
    for index in range(options.steps):
        sigmoid = 1 / (1 + np.exp(-v))
        h = np.clip(1.2 * sigmoid - 0.1, 0, 1)
        slope = -2 * step * (gram[0].astype(np.float64) @ (w[0] - low - h * step)) / start_loss
        time = (index / options.steps - 0.2) / 0.8
        if time > 0:
            beta = 2 + 18 * 0.5 * (1 + np.cos(np.pi * time))
            off = 2 * h - 1
            slope -= options.regularization * beta * np.abs(off) ** (beta - 1) * np.sign(off) * 2 / len(w[0])
        raw = 1.2 * sigmoid - 0.1
        slope = slope * np.where((raw > 0) & (raw < 1), 1.2 * sigmoid * (1 - sigmoid), 0)
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        v = v - options.rate * (first / (1 - 0.9 ** (index + 1))) / (
            np.sqrt(second / (1 - 0.999 ** (index + 1))) + 1e-5
        )
    return np.clip(1.2 / (1 + np.exp(-v)) - 0.1, 0, 1)


@pytest.mark.parametrize("text", ["int3_channel_sfloat32", "int2_channel_zp_sfloat32", "nf4_channel_sfloat32"])
def test_the_descent_is_that_in_float64_and_its_end_is_stored_where_it_is_better(text):
    w, gram, scheme = weights(3, FEW, 24), correlated_gram(3, FEW), parse_scheme(text)
    options = AdaRound(steps=21, rate=0.05, start=NEAREST)
    start = NEAREST(jnp.asarray(w), scheme, jnp.asarray(gram))
    low, step, code = grid(w, scheme, start)
    least = layer_loss(w, start, gram)
    between = adaround._between(jnp.asarray(w), start, scheme)
    np.testing.assert_array_equal(between.code[0], code)
    h = adaround._settled(jnp.asarray(w), between, jnp.asarray(gram), jnp.asarray(least, jnp.float32)[None], options)
    # h begins where there is no error, but of weights beyond or on a level: without them slopes are rounding alone.
    share = (w[0] - low) / step
    pulled = ((share < 0.01) | (share > 0.99)).any(axis=0)
    assert pulled.mean() > 0.3
    expected = descent(w, gram, low, step, least, options)
    np.testing.assert_allclose(h[0][:, pulled], expected[:, pulled], atol=1e-3)
    up = np.asarray(h[0]) > 0.5
    error = w[0] - low - up * step
    loss = np.einsum("kn,kl,ln->n", error, gram[0].astype(np.float64), error)
    clear = np.abs(loss / least - 1) > 1e-4
    expected = np.where(loss < least, code + up, np.asarray(start.qvalue)[0])
    got = np.asarray(options(jnp.asarray(w), scheme, jnp.asarray(gram)).qvalue)[0]
    assert 0 < (loss < least)[clear].mean() < 1
    np.testing.assert_array_equal(got[:, clear], expected[:, clear])


def test_it_comes_close_to_the_best_of_all_roundings_down_or_up():
    w, gram, scheme = weights(4, FEW, 16), correlated_gram(4, FEW), parse_scheme("int3_channel_sfloat32")
    start = NEAREST(jnp.asarray(w), scheme, jnp.asarray(gram))
    low, step, _ = grid(w, scheme, start)
    every = np.array(list(itertools.product((0, 1), repeat=FEW)), np.float64)[:, :, None]
    error = w[0] - low - every * step
    best = np.einsum("akn,kl,aln->an", error, gram[0].astype(np.float64), error).min(axis=0)
    got = layer_loss(w, AdaRound(start=NEAREST)(jnp.asarray(w), scheme, jnp.asarray(gram)), gram)
    assert (got >= best * (1 - 1e-6)).all()
    assert got.sum() < best.sum() + 0.25 * (layer_loss(w, start, gram).sum() - best.sum())


@pytest.mark.parametrize(("start", "share"), [(NEAREST, 0.5), (GPTQ(), 0.15)], ids=["rtn", "gptq"])
def test_no_column_is_worse_than_the_start_and_some_are_better(start, share):
    w, gram, scheme = weights(5, 40, 32), correlated_gram(5), parse_scheme("int3_g16")
    before = layer_loss(w, start(jnp.asarray(w), scheme, jnp.asarray(gram)), gram)
    got = layer_loss(w, AdaRound(start=start)(jnp.asarray(w), scheme, jnp.asarray(gram)), gram)
    assert (got <= before * (1 + 160 * np.finfo(np.float32).eps)).all()
    assert (got < 0.99 * before).mean() > share


@pytest.mark.parametrize("text", ["q4_k", "bf16"])
def test_what_has_no_free_scales_is_the_start(text):
    w, gram, scheme = jnp.asarray(weights(6, 256, 2)), jnp.eye(256)[None], parse_scheme(text)
    assert_equal(AdaRound(start=NEAREST)(w, scheme, gram), NEAREST(w, scheme, gram))


def test_grams_that_say_nothing_leave_the_start():
    w, scheme = jnp.asarray(weights(7)), parse_scheme("int3_g16")
    for gram in (None, jnp.zeros((1, 40, 40)), jnp.full((1, 40, 40), jnp.nan)):
        assert_equal(AdaRound()(w, scheme, gram), GPTQ()(w, scheme, gram))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps 0 and columns 256 must be at least 1, such as 400 and 256"),
        ({"columns": 0}, "steps 400 and columns 0 must be at least 1, such as 400 and 256"),
        ({"rate": 0.0}, "rate 0.0 must be positive and regularization 10.0 at least 0, such as 0.2 and 10"),
        (
            {"regularization": float("nan")},
            "rate 0.2 must be positive and regularization nan at least 0, such as 0.2 and 10",
        ),
    ],
)
def test_options_out_of_range_are_refused(wrong, message):
    with pytest.raises(MpqError) as caught:
        AdaRound(**wrong)
    assert str(caught.value) == message
