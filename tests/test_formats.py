"""Text form of schemes, and what the shared laws of formats do not say."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from mpq.formats import ALIASES, FORMATS, parse_scheme
from mpq.types import MpqError, Scheme

TEXTS = ("int2_g16", "int3_g64_zp", "int4_g128", "int8_channel", "int5_channel_zp", "nf4_g64", "bf16", "fp16", "fp32")
TEXTS += ("nf3_g64", "fp4_g32", "fp8_e4m3_channel", "fp8_e5m2_g128", "int8_tensor", "int4_tensor_zp_sbfloat16")
TEXTS += ("fp4_g16_sfp8", "int4_g32_zp_sfp8", "int4_channel_sfp8", "fp4_g32_se8m0", "fp8_e4m3_tensor_se8m0")
TEXTS += ("tcq2_g32", "tcq3_channel_sfp8", "tcq4_g64_sbfloat16", "tcq5_tensor")
TEXTS += ("lut2_g32", "lut3_g64_sfp8", "lut4_channel_sfloat32", "lut4_tensor")


@pytest.mark.parametrize("text", [*TEXTS, "int4_g64_sfloat32", "int4_g64_zp_sfloat32", "nf4_channel_sfloat32"])
def test_the_text_form_of_a_scheme_reads_back(text):
    scheme = parse_scheme(text)
    assert str(scheme) == text
    assert parse_scheme(str(scheme)) == scheme
    assert hash(parse_scheme(text)) == hash(scheme)


def test_the_text_form_says_every_part():
    expected = Scheme(FORMATS["int3"], group_size=32, zero_point=True, scale_dtype="float32")
    assert parse_scheme("int3_g32_zp_sfloat32") == expected
    assert parse_scheme("int8_channel").group_size is None
    assert parse_scheme("int8_tensor") == Scheme(FORMATS["int8"], per_tensor=True)
    assert parse_scheme("int4_g64_sfloat16") == parse_scheme("int4_g64") == Scheme(FORMATS["int4"], 64)
    assert parse_scheme("nvfp4") == Scheme(FORMATS["fp4"], 16, scale_dtype="float8_e4m3fn")
    assert parse_scheme("fp4_g32_se8m0") == Scheme(FORMATS["fp4"], 32, scale_dtype="float8_e8m0fnu")
    assert [str(parse_scheme(alias)) for alias in ALIASES] == list(ALIASES.values())


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        # k = 37 fills no group: the last one is shorter and has a scale of its own
        ("int3_g16", {"qvalue": 1224, "scale": 3 * 11 * 16}),
        ("int3_g16_zp", {"qvalue": 1224, "scale": 3 * 11 * 16, "zero_point": 104}),
        ("int3_g16_zp_sfp8", {"qvalue": 1224, "scale": 3 * 11 * 8, "zero_point": 104, "tensor_scale": 32}),
        ("int3_tensor_zp_sfloat32", {"qvalue": 1224, "scale": 32, "zero_point": 8}),
        ("nf3_channel_sbfloat16", {"qvalue": 1224, "scale": 11 * 16}),
        ("nvfp4", {"qvalue": 1632, "scale": 3 * 11 * 8, "tensor_scale": 32}),
        ("fp4_g32_se8m0", {"qvalue": 1632, "scale": 2 * 11 * 8}),
        ("lut3_g16", {"qvalue": 1224, "scale": 3 * 11 * 16, "codebook": 8 * 16}),
        ("lut4_g32_sfp8", {"qvalue": 1632, "scale": 2 * 11 * 8, "tensor_scale": 32, "codebook": 16 * 16}),
        ("fp8_e5m2_tensor", {"qvalue": 3256, "scale": 16}),
        ("bf16", {"qvalue": 6512}),
    ],
)
def test_every_part_of_a_size_by_hand(text, parts):
    assert parse_scheme(text).part_bits(37, 11) == parts
    assert parse_scheme(text).size_bits(37, 11, batch=3) == 3 * sum(parts.values())


def test_nvfp4_takes_four_and_a_half_bits_and_mxfp4_a_quarter_less():
    size = 4096 * 4096
    assert parse_scheme("nvfp4").size_bits(4096, 4096) == 4.5 * size + 32
    assert parse_scheme("mxfp4").size_bits(4096, 4096) == 4.25 * size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int9_g64", "unknown scheme 'int9_g64'"),
        ("int4-g64", "unknown scheme"),
        ("int4_g0", "unknown scheme"),
        ("int4_g64_sint8", "unknown scheme"),
        ("int4_g64_sfloat8", "unknown scheme 'int4_g64_sfloat8': .* _sfloat32, _sbfloat16, _sfp8, _se8m0"),
        ("nvfp4_g16", "unknown scheme 'nvfp4_g16'"),
        ("fp4_g32_se8m0_zp", "unknown scheme 'fp4_g32_se8m0_zp'"),
        ("fp4_g32_zp_se8m0", "a zero point goes with integer formats only"),
        ("int4_g32_zp_se8m0", "a range with a zero point needs other scales than powers of two"),
        ("lut3_g32_zp", "a zero point goes with integer formats only, not lut3"),
        ("lut3_g32_se8m0", "wrong: a table of levels is mirrored by negative scales; write _sfp8"),
        ("tcq3_g32_zp", "a zero point goes with integer formats only, not tcq3"),
        ("tcq3_g32_se8m0", "wrong: the scale is a root mean square, no power of two; write _sfp8"),
        ("tcq6_g32", "unknown scheme 'tcq6_g32': allowed is a format of .* tcq2, tcq3, tcq4, tcq5 with"),
        ("lut5_g32", "unknown scheme 'lut5_g32'"),
        ("int4_tensor_sfp8", "a single scale needs no float32 beside it; write _tensor_sfloat32"),
        ("bf16_sfp8", "bf16 has no scale"),
        ("", "unknown scheme ''"),
        ("bf16_g64", "bf16 has no scale; write 'bf16'"),
        ("fp16_sfloat32", "fp16 has no scale"),
        ("int4", "lacks a granularity: write int4_g64 or int4_channel"),
        ("fp8_g64", "unknown scheme"),
        ("fp8_e3m4_g64", "unknown scheme"),
        ("fp4_g64_zp", "a zero point goes with integer formats only, not fp4"),
        ("nf4_g64_zp", "a zero point goes with integer formats only, not nf4"),
    ],
)
def test_a_wrong_scheme_is_refused_with_what_is_allowed(text, message):
    with pytest.raises(MpqError, match=message):
        parse_scheme(text)


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_float_formats_stay_finite_and_keep_what_they_can_hold(name):
    grid = FORMATS[name]
    largest = float(jnp.finfo(grid.dtype).max)
    x = np.array([0.0, -1.5, 3e38, -3.4e38, np.finfo(np.float32).max, largest], np.float32)
    got = np.asarray(grid.decode(grid.encode(jnp.asarray(x))))
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got[[0, 1, 5]], x[[0, 1, 5]])
    np.testing.assert_array_equal(got[2:5], np.clip(x[2:5], -largest, largest).astype(jnp.dtype(grid.dtype)))


def test_int4_rounds_ties_to_even_and_saturates():
    x = jnp.array([0.5, 1.5, -0.5, -1.5, 7.4, 7.6, 99.0, -8.4, -99.0])
    np.testing.assert_array_equal(FORMATS["int4"].encode(x), [0, 2, 0, -2, 7, 7, 7, -8, -8])


def test_nf4_levels_are_those_of_the_paper():
    # Dettmers et al. 2023, App. E, to 7 digits.
    expected = [-1.0, -0.6961928, -0.5250730, -0.3949174, -0.2844413, -0.1847734, -0.0910500, 0.0]
    expected += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
    np.testing.assert_allclose(
        FORMATS["nf4"].decode(jnp.arange(16)), expected, atol=1.1e-7
    )  # half a unit of the last digit, and a float32 ulp


@pytest.mark.parametrize(("bits", "tolerance"), [(4, 1e-6), (3, 1e-12)])
def test_normal_float_levels_are_those_of_the_recipe(bits, tolerance):
    """Dettmers et al. 2023, App. E, as bitsandbytes computes it; the published NF4 was rounded on the way."""
    end = 1 - (1 / 2 ** (bits + 1) + 1 / (2 ** (bits + 1) - 2)) / 2
    half = lambda steps: norm.ppf(np.linspace(end, 0.5, steps + 1)[:-1])
    levels = np.sort([*half(2 ** (bits - 1)), 0.0, *-half(2 ** (bits - 1) - 1)]) / norm.ppf(end)
    np.testing.assert_allclose(FORMATS[f"nf{bits}"].levels, levels, rtol=0, atol=tolerance)


def test_fp4_levels_are_those_of_the_specification():
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # OCP Microscaling Formats 1.0
    np.testing.assert_array_equal(FORMATS["fp4"].decode(jnp.arange(8)), levels)
    np.testing.assert_array_equal(FORMATS["fp4"].decode(-jnp.arange(8)), -levels)


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp4", "float4_e2m1fn"), ("fp8_e4m3", "float8_e4m3fn"), ("fp8_e5m2", "float8_e5m2")]
)
class TestMinifloat:
    def test_values_are_those_of_the_dtype(self, name, dtype):
        grid = FORMATS[name]
        codes = np.arange(grid.max_qvalue + 1, dtype=np.uint8)  # exponent and mantissa bits of the dtype itself
        np.testing.assert_array_equal(grid.decode(jnp.asarray(codes)), codes.view(jnp.dtype(dtype)).astype(np.float32))
        assert grid.max_magnitude == float(jnp.finfo(dtype).max)

    def test_rounding_is_that_of_the_dtype_ties_and_subnormals_included(self, name, dtype):
        grid = FORMATS[name]
        levels = np.asarray(grid.decode(jnp.arange(grid.max_qvalue + 1)))
        ties = (levels[1:] + levels[:-1]) / 2
        beside = [np.nextafter(ties, np.float32(side)) for side in (-np.inf, np.inf)]
        x = np.concatenate([levels, ties, *beside, np.geomspace(1e-9, grid.max_magnitude, 5000)]).astype(np.float32)
        x = np.concatenate([x, -x])
        np.testing.assert_array_equal(grid.decode(grid.encode(jnp.asarray(x))), x.astype(dtype).astype(np.float32))

    def test_what_is_beyond_the_range_saturates(self, name, dtype):
        x = jnp.array([1e9, -1e9, 3.4e38, jnp.inf, -jnp.inf, 1e-40])
        largest = float(jnp.finfo(dtype).max)
        expected = [largest, -largest, largest, largest, -largest, 0]
        np.testing.assert_array_equal(FORMATS[name].decode(FORMATS[name].encode(x)), expected)
