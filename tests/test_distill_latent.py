"""Latent numbers behind a quantized weight: they give it back, forward is what is stored, backward is what is said."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq.distill import Latent, freeze, reconstruct, start
from mpq.formats import parse_scheme
from mpq.quantize import GPTQ, RTN

SCHEMES = (
    "int2_g16",
    "int3_g16_zp",
    "int4_channel",
    "int8_tensor",
    "nf4_g16",
    "int4_g24_zp",
    "int3_g16_sfp8",
    "fp4_g16_se8m0",
    "int2_g16_zp_sfp8",
)
K, N = 40, 12


@pytest.fixture(scope="module")
def weight():
    return jax.random.normal(jax.random.key(0), (2, K, N))


@pytest.fixture(scope="module")
def gram():
    x = jax.random.normal(jax.random.key(1), (2, 200, K)) @ jax.random.normal(jax.random.key(2), (2, K, K))
    return jnp.einsum("btk,btl->bkl", x, x) / 200


def moved(latent, seed=3, by=0.3):
    """The latent numbers after a step in a random direction."""
    leaves, form = jax.tree.flatten(latent)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return form.unflatten([a + by * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)])


def same(a, b):
    assert a.scheme == b.scheme
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("quantizer", [RTN(), RTN("mse"), GPTQ(), GPTQ(act_order=True)], ids=repr)
def test_the_start_is_the_quantized_weight(weight, gram, scheme, quantizer):
    qtensor = quantizer(weight, parse_scheme(scheme), gram)
    for rounding, scale in ((True, True), (False, True), (True, False)):
        latent = start(weight, qtensor, rounding=rounding, scale=scale)
        same(freeze(latent, qtensor), qtensor)
        np.testing.assert_array_equal(reconstruct(latent, qtensor), qtensor.dequantize())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_forward_is_the_stored_weight_bit_for_bit(weight, scheme):
    qtensor = RTN("mse")(weight, parse_scheme(scheme))
    latent = moved(start(weight, qtensor))
    stored = freeze(latent, qtensor)
    assert not np.array_equal(stored.qvalue, qtensor.qvalue)
    assert not np.array_equal(stored.scale, qtensor.scale)
    assert stored.scale.dtype == qtensor.scale.dtype
    np.testing.assert_array_equal(reconstruct(latent, qtensor), stored.dequantize())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_are_those_of_the_unrounded_numbers(weight, scheme):
    """Against derivatives written out in NumPy, group by group."""
    qtensor = RTN()(weight, parse_scheme(scheme))
    latent = moved(start(weight, qtensor))
    upstream = np.asarray(jax.random.normal(jax.random.key(5), weight.shape), np.float64)
    got = jax.grad(lambda latent: jnp.sum(reconstruct(latent, qtensor) * upstream.astype(np.float32)))(latent)

    stored, number_format = freeze(latent, qtensor), qtensor.scheme.format
    size = qtensor.scheme.group_size or K
    step = {"nf4": 2 / 15, "fp4": 12 / 14}.get(number_format.name, 1.0)  # 16 levels in -1 .. 1, 15 in -6 .. 6
    ends = {"nf4": (-1, 1), "fp4": (-6, 6)}.get(
        number_format.name, (number_format.min_qvalue, number_format.max_qvalue)
    )
    for group in range(stored.scale.shape[1]):
        rows = slice(group * size, (group + 1) * size)
        scale = np.asarray(stored.effective_scale[:, group], np.float64)[:, None]
        zero = 0.0 if stored.zero_point is None else np.asarray(stored.zero_point[:, group], np.float64)[:, None]
        code = np.asarray(latent.value[:, rows], np.float64) * step + zero
        inside = (code > ends[0]) & (code < ends[1])
        decoded = np.asarray(number_format.decode(stored.qvalue[:, rows]), np.float64)
        np.testing.assert_allclose(got.value[:, rows], upstream[:, rows] * scale * step * inside, rtol=1e-5, atol=1e-6)
        want = np.sum(upstream[:, rows] * (decoded - zero) * scale, axis=1)
        if scale.shape[-1] == 1:
            want = want.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(got.log_scale[:, group], want, rtol=1e-4, atol=1e-4)
        if latent.zero_point is not None:
            z = np.asarray(latent.zero_point[:, group])
            free = (z > ends[0]) & (z < ends[1])
            want = -np.sum(upstream[:, rows] * scale * ~inside, axis=1) * free  # what is inside moves along
            np.testing.assert_allclose(got.zero_point[:, group], want, rtol=1e-4, atol=1e-4)


def test_what_is_not_learned_stays(weight):
    qtensor = RTN()(weight, parse_scheme("int3_g16_zp"))
    codes, scales = start(weight, qtensor, scale=False), start(weight, qtensor, rounding=False)
    assert (codes.log_scale, codes.zero_point, scales.value) == (None, None, None)
    only_codes, only_scales = freeze(moved(codes), qtensor), freeze(moved(scales, by=1.0), qtensor)
    np.testing.assert_array_equal(only_codes.scale, qtensor.scale)
    np.testing.assert_array_equal(only_codes.zero_point, qtensor.zero_point)
    assert not np.array_equal(only_codes.qvalue, qtensor.qvalue)
    np.testing.assert_array_equal(only_scales.qvalue, qtensor.qvalue)
    assert not np.array_equal(only_scales.scale, qtensor.scale)
    assert not np.array_equal(only_scales.zero_point, qtensor.zero_point)


def test_scales_keep_their_sign_and_stay_finite(weight):
    qtensor = RTN("mse")(weight, parse_scheme("int2_g16"))
    assert (np.asarray(qtensor.scale, np.float32) < 0).any()
    latent = start(weight, qtensor)
    for by in (-100.0, 80.0):
        far = freeze(Latent(latent.value, jnp.full_like(latent.log_scale, by), None), qtensor)
        scale = np.asarray(far.scale, np.float32)
        assert np.isfinite(scale).all()
        assert (np.sign(scale) == np.sign(np.asarray(qtensor.scale, np.float32))).all()


def test_learned_levels_stay_and_codes_and_scales_move(weight):
    qtensor = RTN()(weight, parse_scheme("lut3_g16"))
    latent = start(weight, qtensor)
    same(freeze(latent, qtensor), qtensor)
    latent = moved(latent)
    stored, upstream = freeze(latent, qtensor), jax.random.normal(jax.random.key(5), weight.shape)
    np.testing.assert_array_equal(stored.codebook, qtensor.codebook)
    assert not np.array_equal(stored.qvalue, qtensor.qvalue)
    np.testing.assert_array_equal(reconstruct(latent, qtensor), stored.dequantize())
    got = jax.grad(lambda latent: jnp.sum(reconstruct(latent, qtensor) * upstream))(latent).value
    scale, step = np.asarray(stored.spread(stored.effective_scale), np.float64), 2 / 7  # 8 levels in -1 .. 1
    value, last = np.asarray(latent.value, np.float64) * step, np.asarray(qtensor.codebook[:, -1:], np.float64)
    inside = (value > -1) & (value < last)
    assert 0 < inside.mean() < 1
    np.testing.assert_allclose(got, np.asarray(upstream) * scale * step * inside, rtol=1e-5, atol=1e-6)
