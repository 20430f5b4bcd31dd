"""Integers of all widths share their compilations, and lose nothing by it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq.formats import parse_scheme
from mpq.quantize import gptq, rtn, scales
from mpq.quantize.gptq import GPTQ
from mpq.quantize.rtn import RTN
from mpq.quantize.widths import common
from mpq.types import QTensor
from tests.quantize_cases import assert_equal

K, N = 24, 5


def drawn(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("rest", ["g8", "channel", "g8_zp", "tensor", "g8_sfp8"])
def test_one_compilation_serves_all_widths(rest):
    w, x = drawn(0, 1, K, N), drawn(1, 50, K)
    gram = (x.T @ x)[None] / len(x)
    compiled = gptq._quantize, gptq._fit_matrix, rtn._rtn

    def run(bits: int) -> list[QTensor]:
        return [q(w, parse_scheme(f"int{bits}_{rest}"), gram) for q in (GPTQ(columns=N), RTN("mse"))]

    run(8)
    before = [f._cache_size() for f in compiled]
    for bits in range(2, 8):
        for got in run(bits):
            grid = got.scheme.format
            assert got.scheme == parse_scheme(f"int{bits}_{rest}")
            assert grid.min_qvalue <= got.qvalue.min() < got.qvalue.max() <= grid.max_qvalue
    assert [f._cache_size() for f in compiled] == before


@pytest.mark.parametrize("text", ["int2_g8", "int3_g8_zp", "int4_tensor", "int5_g8_sfp8", "int6_channel_sfloat32"])
@pytest.mark.parametrize("method", scales.METHODS)
def test_a_width_as_an_argument_changes_no_bit(text, method):
    """Against the same rounding compiled for the scheme itself."""
    w, scheme = drawn(2, 2, K, N), parse_scheme(text)
    alone = jax.jit(functools.partial(scales.quantize, scheme=scheme, method=method))
    assert_equal(RTN(method)(w, scheme), alone(w, weight=jnp.ones(w.shape[:-1])))


@pytest.mark.parametrize("text", ["int3_g8", "int8_tensor_zp"])
def test_the_common_form_keeps_all_but_the_width(text):
    scheme = parse_scheme(text)
    form, width = common(scheme)
    assert (str(form), width) == (f"int8{text[4:]}", scheme.format.bits)


@pytest.mark.parametrize("text", ["nf4_g8", "bf16", "fp4_g8_sfp8", "int4_g8_se8m0"])
def test_other_schemes_are_their_own_common_form(text):
    scheme = parse_scheme(text)
    assert common(scheme) == (scheme, None)
