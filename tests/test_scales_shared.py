"""Scales of 8 bits and scales of whole matrices, against the specifications, written again in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from mpq.formats import parse_scheme
from mpq.quantize import scales
from mpq.quantize.rtn import RTN

BATCH, K, N = 2, 72, 5
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def weights(seed: int = 0) -> np.ndarray:
    """Groups of very different size, each batch entry of its own."""
    rng = np.random.default_rng(seed)
    size = np.exp(2 * rng.standard_normal((BATCH, K // 8, N))).repeat(8, axis=1)
    return (rng.standard_normal((BATCH, K, N)) * size * np.array([1, 30])[:, None, None]).astype(np.float32)


def e2m1(x: np.ndarray) -> np.ndarray:
    """Nearest of the levels, ties to the even code, saturating: OCP Microscaling Formats 1.0."""
    distance = np.abs(np.abs(x)[..., None] - E2M1)
    nearest = distance.min(axis=-1, keepdims=True)
    code = np.arange(8)
    best = np.where(distance == nearest, code % 2 * 10 + code, 99).argmin(axis=-1)
    return np.sign(x) * E2M1[best]


def groups_of(k: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, k)) for start in range(0, k, size)]


def test_mxfp4_is_that_of_the_specification():
    w = weights()
    got = RTN("absmax")(jnp.asarray(w), parse_scheme("fp4_g32_se8m0"))
    for index, rows in enumerate(groups_of(K, 32)):
        block = w[:, rows].astype(np.float64)
        scale = 2.0 ** (np.floor(np.log2(np.abs(block).max(axis=1, keepdims=True))) - 2)
        np.testing.assert_array_equal(np.asarray(got.scale, np.float64)[:, index], scale[:, 0])
        np.testing.assert_array_equal(np.asarray(got.dequantize(), np.float64)[:, rows], e2m1(block / scale) * scale)
    whole = w[:, : K // 32 * 32]  # ggml's block of it is never padded
    stored = RTN("absmax")(jnp.asarray(whole), parse_scheme("mxfp4"))
    np.testing.assert_array_equal(stored.dequantize(), got.dequantize()[:, : K // 32 * 32])


def test_nvfp4_is_that_of_the_specification():
    w = weights()
    got = RTN("absmax")(jnp.asarray(w), parse_scheme("nvfp4"))
    whole = np.asarray(got.tensor_scale, np.float64)
    # 12 significant bits: within half a unit of the last
    np.testing.assert_allclose(whole, np.abs(w).max(axis=(1, 2), keepdims=True) / (6 * 448), rtol=2.0**-12)
    for index, rows in enumerate(groups_of(K, 16)):
        block = w[:, rows].astype(np.float64)
        exact = np.abs(block).max(axis=1) / 6 / whole[:, 0]
        scale = np.maximum(exact.astype(jnp.float8_e4m3fn).astype(np.float64), 2.0**-9)
        np.testing.assert_array_equal(np.asarray(got.scale, np.float64)[:, index], scale)
        step = (scale * whole[:, 0])[:, None]
        np.testing.assert_array_equal(np.asarray(got.dequantize(), np.float64)[:, rows], e2m1(block / step) * step)
    assert (np.asarray(got.scale, np.float32).max(axis=(1, 2)) == 448).all()


@pytest.mark.parametrize("text", ["int4_g16_sfp8", "int4_g16_zp_sfp8", "nf4_g16_sfp8", "fp8_e5m2_g16_sfp8"])
def test_the_largest_scale_is_the_largest_e4m3_and_the_smallest_are_not_lost(text):
    w = weights()
    w[:, :16] = np.abs(w).max(axis=(1, 2), keepdims=True)
    w[:, 1] *= -1  # both ends of the range in one group: the largest scale of an affine scheme
    w[:, 16:32] *= 1e-9
    got = RTN("absmax")(jnp.asarray(w), parse_scheme(text))
    scale = np.asarray(got.scale, np.float64)
    assert (scale[:, 0] == 448).all()
    assert (scale[:, 1] == 2.0**-9).all()
    error = np.abs(np.asarray(got.dequantize(), np.float64) - w)[:, 16:32]
    assert (error <= 2.0**-9 * np.asarray(got.tensor_scale)).all()


def test_a_range_under_a_tensor_scale_has_the_zero_point_of_its_effective_scale():
    w = weights()
    w[:, :16, 0] = np.abs(w).max(axis=(1, 2))[:, None] * np.linspace(-1, 1, 16, dtype=np.float32)
    got = RTN("absmax")(jnp.asarray(w), parse_scheme("int4_g16_zp_sfp8"))
    # the widest range of this matrix is that of a group, and as wide as ranges can be: its scale is the largest
    np.testing.assert_allclose(
        np.asarray(got.tensor_scale, np.float64)[:, 0, 0], 2 * np.abs(w).max(axis=(1, 2)) / 15 / 448, rtol=2.0**-12
    )
    assert (np.asarray(got.scale, np.float32)[:, 0, 0] == 448).all()
    for index, rows in enumerate(groups_of(K, 16)):
        block = w[:, rows].astype(np.float64)
        low, high = np.minimum(block.min(axis=1), 0), np.maximum(block.max(axis=1), 0)
        step = np.asarray(got.effective_scale, np.float64)[:, index]
        exact = (high - low) / 15
        # e4m3 rounds by at most a seventeenth of a normal number, and by half its smallest step below
        smallest = 2.0**-9 * np.asarray(got.tensor_scale, np.float64)[:, 0]
        assert (np.abs(step - exact) <= np.maximum(exact / 16, smallest)).all()
        zero = np.asarray(got.zero_point)[:, index]
        assert (np.abs(zero - np.clip(-8 - low / step, -8, 7)) <= 0.5 + 1e-5).all()


@pytest.mark.parametrize(("text", "chosen"), [("fp4_g16_se8m0", {1, 2}), ("nf4_g16_se8m0", {0.5, 1})])
def test_a_search_of_powers_of_two_finds_the_best_of_three(text, chosen):
    """Float64 brute force over the rule's scale, twice and half of it: fp4 clips by the rule, and nf4 does not."""
    w, scheme = weights(2), parse_scheme(text)
    levels = np.arange(scheme.format.min_qvalue, scheme.format.max_qvalue + 1, dtype=np.int8)
    levels = np.asarray(scheme.format.decode(jnp.asarray(levels)), np.float64)
    got, plain = (RTN(method)(jnp.asarray(w), scheme) for method in ("mse", "absmax"))
    rule = np.asarray(plain.scale, np.float64)
    assert chosen <= set(np.unique(np.asarray(got.scale, np.float64) / rule)) <= {0.5, 1, 2}
    for index, rows in enumerate(groups_of(K, 16)):
        block, scale = w[:, rows].astype(np.float64), rule[:, index, None]
        distance = lambda s, block=block: np.abs(block[..., None] - levels * s[..., None]).min(axis=-1)
        errors = [(distance(scale * factor) ** 2).sum(axis=1) for factor in (1, 2, 0.5)]
        error = ((np.asarray(got.dequantize(), np.float64)[:, rows] - block) ** 2).sum(axis=1)
        np.testing.assert_allclose(error, np.min(errors, axis=0), rtol=1e-5)  # sums of 16 float32 squares


def test_matrices_of_a_batch_have_tensor_scales_of_their_own():
    w = weights()
    got = RTN("mse")(jnp.asarray(w), parse_scheme("nvfp4"))
    for entry in range(BATCH):
        alone = RTN("mse")(jnp.asarray(w[entry : entry + 1]), parse_scheme("nvfp4"))
        np.testing.assert_array_equal(got.dequantize()[entry], alone.dequantize()[0])
        np.testing.assert_array_equal(got.tensor_scale[entry], alone.tensor_scale[0])


def test_a_negative_e4m3_scale_uses_the_extra_negative_code_and_a_power_of_two_has_no_sign():
    w = np.zeros((1, 16, 1), np.float32)
    w[0, :8, 0] = np.arange(1, 9) / 8  # int4 holds -8..7: eight positive steps need a negative scale
    signed, unsigned = (RTN("mse")(jnp.asarray(w), parse_scheme(f"int4_g16_{s}")) for s in ("sfp8", "se8m0"))
    assert np.asarray(signed.scale, np.float32) < 0
    assert np.asarray(unsigned.scale, np.float32) > 0
    error = lambda q: np.abs(np.asarray(q.dequantize()) - w).max()
    assert error(signed) < 0.03  # e4m3 holds 384, the exact scale is 392 = 448 * 7 / 8: eight steps are off by 0.02
    assert error(unsigned) == 0.125


@pytest.mark.parametrize("text", ["nf3_g16", "nf4_g16", "int2_g16"])
def test_powers_of_two_clip_no_format_whose_largest_level_is_one(text):
    w = np.abs(weights())
    got = np.asarray(RTN("absmax")(jnp.asarray(w), parse_scheme(f"{text}_se8m0")).scale, np.float64)
    for index, rows in enumerate(groups_of(K, 16)):
        np.testing.assert_array_equal(got[:, index], 2.0 ** np.ceil(np.log2(np.abs(w[:, rows]).max(axis=1))))
    exact = RTN("absmax")(jnp.full((1, 16, 1), 0.25), parse_scheme(f"{text}_se8m0"))
    assert (exact.dequantize() == 0.25).all()
    assert np.asarray(exact.scale, np.float32) == 0.25


@pytest.mark.parametrize("text", ["fp4_g32_se8m0", "nf4_g16_se8m0", "int4_g16_sfp8", "fp4_g16_sfp8", "int4_tensor"])
def test_a_search_is_never_worse_than_absmax(text):
    w, scheme = weights(1), parse_scheme(text)
    error = lambda method: ((np.asarray(RTN(method)(jnp.asarray(w), scheme).dequantize(), np.float64) - w) ** 2).sum(
        axis=(1, 2)
    )
    # Chosen per group by float32 sums of up to 360 squares.
    assert (error("mse") <= error("absmax") * (1 + 400 * np.finfo(np.float32).eps)).all()


@pytest.mark.parametrize("zero_point", [False, True])
def test_one_scale_for_the_matrix_is_that_of_its_largest_values(zero_point):
    w = weights()
    got = RTN("absmax")(jnp.asarray(w), parse_scheme("int4_tensor_zp" if zero_point else "int4_tensor"))
    low, high = w.min(axis=(1, 2)).astype(np.float64), w.max(axis=(1, 2)).astype(np.float64)
    expected = (high - low) / 15 if zero_point else np.maximum(-low, high) / 7
    # One rounding to float16 (2^-11) and a few to float32, of which the last can move the float16 by one more.
    np.testing.assert_allclose(np.asarray(got.scale, np.float64)[:, 0, 0], expected, rtol=2.0**-11 * 1.001)
    error = np.abs(np.asarray(got.dequantize(), np.float64) - w).max(axis=(1, 2))
    assert (error <= expected * (1 if zero_point else 0.51)).all()  # a rounded zero point moves both ends by a half


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [
        ("float8_e4m3fn", 1e9, 448.0),
        ("float8_e4m3fn", -1e-9, -(2.0**-9)),
        ("float8_e8m0fnu", 1e-45, 2.0**-126),
        ("float8_e8m0fnu", np.inf, 2.0**127),
        ("bfloat16", 0.0, np.finfo(np.float32).tiny),
        ("bfloat16", np.inf, float(jnp.finfo("bfloat16").max)),
    ],
)
def test_scales_are_clamped_to_what_their_dtype_holds(dtype, value, expected):
    assert scales.round_scale(jnp.float32(value), dtype) == expected


def test_e4m3_scales_are_rounded_as_their_dtype_does():
    values = np.geomspace(2.0**-9, 448, 5000).astype(np.float32)
    expected = values.astype(jnp.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(scales.round_scale(jnp.asarray(values), "float8_e4m3fn"), expected)
