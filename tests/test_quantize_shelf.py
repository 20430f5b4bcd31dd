"""Quantized weights on disk come back as they were, whatever their types."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq.formats import parse_scheme
from mpq.quantize import RTN
from mpq.quantize.shelf import Shelf

NAMES = "int4_g32", "int4_g32_zp", "nf4_g32", "nvfp4", "mxfp4", "bf16", "fp8_e4m3_channel", "q4_k", "q2_k"


def quantized(name, seed=0):
    weight = jnp.asarray(np.random.default_rng(seed).normal(size=(1, 256, 8)), jnp.float32)
    return RTN()(weight, parse_scheme(name))


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def test_all_types_come_back_with_the_same_bits():
    shelf, values = Shelf(keep_bytes=1), {name: quantized(name) for name in NAMES}
    for name, value in values.items():
        shelf[name] = value
    for _ in range(2):  # the second time they are read again without having been written again
        for name, value in values.items():
            assert name in shelf
            assert_same(shelf[name], value)


def test_the_values_used_last_stay_in_memory():
    a, b, c = (quantized("int4_g32", seed) for seed in range(3))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(a))
    shelf = Shelf(keep_bytes=2 * size)
    shelf["a"], shelf["b"] = a, b
    assert shelf["a"] is a
    shelf["c"] = c
    assert shelf["a"] is a
    assert shelf["c"] is c
    assert shelf["b"] is not b
    assert_same(shelf["b"], b)


def test_a_value_that_is_not_there():
    shelf = Shelf(keep_bytes=1)
    assert "a" not in shelf
    with pytest.raises(KeyError, match="a"):
        shelf["a"]
