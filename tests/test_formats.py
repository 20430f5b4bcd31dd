"""Text form of schemes, and what the shared laws of formats do not say."""

import jax.numpy as jnp
import numpy as np
import pytest

from mpq.formats import FORMATS, parse_scheme
from mpq.types import MpqError, Scheme

TEXTS = ("int2_g16", "int3_g64_zp", "int4_g128", "int8_channel", "int5_channel_zp", "nf4_g64", "bf16", "fp16", "fp32")


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int9_g64", "unknown scheme 'int9_g64'"),
        ("int4-g64", "unknown scheme"),
        ("int4_g0", "unknown scheme"),
        ("int4_g64_sint8", "unknown scheme"),
        ("", "unknown scheme ''"),
        ("bf16_g64", "bf16 has no scale; write 'bf16'"),
        ("fp16_sfloat32", "fp16 has no scale"),
        ("int4", "lacks a granularity: write int4_g64 or int4_channel"),
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
