"""HQQ against its two steps, written again in float64 for one group at a time."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from mpq.formats import parse_scheme
from mpq.quantize.hqq import HQQ
from mpq.quantize.rtn import RTN
from mpq.types import MpqError

K, N = 40, 12


def weights(seed: int) -> np.ndarray:
    """Long tails: what the norm is for."""
    return np.random.default_rng(seed).standard_t(3, (1, K, N)).astype(np.float32)


def levels_of(scheme) -> np.ndarray:
    codes = np.arange(scheme.format.min_qvalue, scheme.format.max_qvalue + 1, dtype=np.int8)
    return np.asarray(scheme.format.decode(jnp.asarray(codes)), np.float64)


def half_quadratic(x: np.ndarray, levels: np.ndarray, affine: bool, options: HQQ) -> tuple[np.ndarray, float, float]:
    """One group `x[rows]`.

    Returns:
      What it becomes, its p-norm in steps of absmax scales, and how far the run kept from ties: of a value between two
      levels, of a zero point between two codes, in steps; of two rounds of nearly the same norm, relatively.
    """
    low, high = min(x.min(), 0), max(x.max(), 0)
    step = (high - low) / (len(levels) - 1) if affine else np.abs(x).max() / levels.max()
    scale, zero, margin = step, 0.0, np.inf
    step *= np.mean(np.diff(levels))
    if affine:
        zero = np.round(levels[0] - low / scale)
        margin = 0.5 - abs(levels[0] - low / scale - zero)
    rounds = []
    for t in range(options.rounds + 1):
        distance = np.abs(x[:, None] / scale + zero - levels)
        nearest = np.sort(distance, axis=1)
        margin = min(margin, (nearest[:, 1] - nearest[:, 0]).min())
        level = levels[distance.argmin(axis=1)]
        value = (level - zero) * scale
        error = (x - value) / step
        rounds.append((np.sum(np.abs(error) ** options.p), np.sum(error**2), value))
        beta = options.beta * options.kappa**t
        size = np.maximum(np.abs(error), 1e-300)
        target = x - np.sign(error) * np.maximum(0, size - size ** (options.p - 1) / beta) * step
        if affine:
            mean = np.mean(level - target / scale)
            zero = np.clip(np.round(mean), levels[0], levels[-1])
            margin = min(margin, 0.5 - abs(mean - np.round(mean)))
        if np.sum((level - zero) * target) > 0:
            scale = np.sum((level - zero) * target) / np.sum((level - zero) ** 2)
    allowed = [r for r in rounds if r[1] <= rounds[0][1]]
    norms = sorted(r[0] for r in allowed)
    distinct = [b / a - 1 for a, b in itertools.pairwise(norms) if b / a - 1 > 1e-9]
    best = min(allowed, key=lambda r: r[0])
    return best[2], best[0], min([margin, *distinct[:1], *(abs(r[1] / rounds[0][1] - 1) for r in rounds[1:])])


@pytest.mark.parametrize("text", ["int2_g16", "int3_g16_zp", "nf4_g16"])
def test_it_is_the_best_round_of_the_two_steps(text):
    scheme, options = parse_scheme(f"{text}_sfloat32"), HQQ(rounds=4)
    levels, w = levels_of(scheme), weights(0)
    got, nearest = (np.asarray(q(jnp.asarray(w), scheme).dequantize(), np.float64)[0] for q in (options, RTN()))
    compared, moved = 0, 0
    for start in range(0, K, 16):
        rows = slice(start, start + 16)
        for column in range(N):
            x = w[0, rows, column].astype(np.float64)
            value, _, margin = half_quadratic(x, levels, scheme.zero_point, options)
            # Values of up to 16 steps are off by a few eps of that, their sums by 16 eps more: 1e-4 is far above.
            if margin > 1e-4:
                compared += 1
                moved += not np.allclose(value, nearest[rows, column], rtol=1e-4)
                np.testing.assert_allclose(got[rows, column], value, rtol=1e-5, atol=1e-6 * np.abs(x).max())
    assert compared > 0.7 * N * 3
    assert moved > 0.2 * compared  # the start of nf4 is mostly the best already


# Scales of e4m3 are coarse: where the start is good, as that of nf4 is, a fit seldom reaches the next one.
@pytest.mark.parametrize(("text", "falls"), [("int3_g16", 0.95), ("int2_g16_zp", 0.95), ("nf4_g16_sfp8", 1)])
def test_the_norm_falls_and_the_squared_error_does_not_rise(text, falls):
    scheme, w = parse_scheme(text), weights(1)
    step = np.asarray(RTN()(jnp.asarray(w), scheme).spread(RTN()(jnp.asarray(w), scheme).effective_scale), np.float64)
    error = lambda q: np.abs(np.asarray(q(jnp.asarray(w), scheme).dequantize(), np.float64) - w) / np.abs(step)
    fitted, nearest = error(HQQ()), error(RTN())
    for start in range(0, K, 16):
        part = np.s_[0, start : start + 16]
        for p in (0.7, 2):
            # Sums of 16 float32 powers, each within a few eps.
            assert ((fitted[part] ** p).sum(axis=0) <= (nearest[part] ** p).sum(axis=0) * (1 + 1e-5)).all()
    assert (fitted**0.7).sum() <= falls * (nearest**0.7).sum()


def test_one_scale_for_the_matrix_is_that_of_rounding_to_nearest():
    w, scheme = jnp.asarray(weights(2)), parse_scheme("int3_tensor_zp")
    np.testing.assert_array_equal(HQQ()(w, scheme).dequantize(), RTN()(w, scheme).dequantize())


@pytest.mark.parametrize("p", [0, 1.5, float("nan")])
def test_a_norm_that_is_none_is_refused(p):
    with pytest.raises(MpqError, match=r"it must be above 0 and at most 1, such as 0\.7"):
        HQQ(p=p)


@pytest.mark.parametrize("wrong", [{"beta": 0}, {"beta": float("inf")}, {"kappa": 0.5}])
def test_proximal_steps_that_grow_are_refused(wrong):
    with pytest.raises(MpqError, match=r"must be positive and kappa .* at least 1"):
        HQQ(**wrong)


def test_no_rounds_are_refused():
    with pytest.raises(MpqError, match="rounds is 0: it must be at least 1"):
        HQQ(rounds=0)
