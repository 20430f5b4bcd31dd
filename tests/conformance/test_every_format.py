"""Laws of every number format: registering one is enough to have it tested."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq.formats import FORMATS
from mpq.types import Scheme

SCALED = {name: grid for name, grid in FORMATS.items() if grid.max_magnitude is not None}
PLAIN = {name: grid for name, grid in FORMATS.items() if grid.max_magnitude is None}


def with_levels(grid):
    """The grid, with levels of some weight where it has none of its own."""
    if not grid.learned:
        return grid
    inner = np.sort(np.random.default_rng(0).uniform(-0.99, 0.99, grid.max_qvalue))
    return grid.with_levels(jnp.asarray([-1, *inner], jnp.float16)[:, None])


def qvalues(grid) -> jax.Array:
    return jnp.arange(grid.min_qvalue, grid.max_qvalue + 1, dtype=jnp.int8)


@pytest.mark.parametrize("name", FORMATS)
def test_the_table_s_key_is_the_format_s_name(name):
    assert FORMATS[name].name == name
    assert str(Scheme(FORMATS[name], 64)).startswith(name)
    assert hash(FORMATS[name]) is not None


@pytest.mark.parametrize("grid", list(map(with_levels, SCALED.values())), ids=SCALED.keys())
class TestEveryScaledFormat:
    def test_encode_inverts_decode_on_every_qvalue(self, grid):
        codes = qvalues(grid)
        assert grid.encode(grid.decode(codes)).dtype == jnp.int8
        np.testing.assert_array_equal(grid.encode(grid.decode(codes)), codes)

    def test_codes_fit_into_the_bits(self, grid):
        assert len(qvalues(grid)) <= 2**grid.bits
        assert len(qvalues(grid)) > 2 ** (grid.bits - 1)

    def test_levels_ascend_and_reach_the_largest_magnitude(self, grid):
        levels = np.asarray(grid.decode(qvalues(grid)), np.float64)
        assert (np.diff(levels) > 0).all()
        assert levels[0] <= -grid.max_magnitude
        assert levels[-1] <= grid.max_magnitude if grid.learned else levels[-1] == grid.max_magnitude

    def test_uniform_means_equal_steps_of_one(self, grid):
        steps = np.diff(np.asarray(grid.decode(qvalues(grid)), np.float64))
        assert grid.uniform == bool((steps == 1).all())

    def test_encode_picks_the_nearest_level(self, grid):
        levels = np.asarray(grid.decode(qvalues(grid)), np.float64)
        spread = 1.3 * np.abs(levels).max()
        x = np.random.default_rng(0).uniform(-spread, spread, 4096).astype(np.float32)
        got = np.asarray(grid.decode(grid.encode(jnp.asarray(x))), np.float64)
        nearest = np.abs(x[:, None].astype(np.float64) - levels).min(axis=1)
        # Only which side of a midpoint x lies on is rounded: the midpoint is off by at most a float32 ulp of its size.
        slack = np.spacing(np.float32(spread))
        np.testing.assert_allclose(np.abs(x - got), nearest, rtol=0, atol=2 * slack)

    def test_zero_is_exact(self, grid):
        assert grid.learned or grid.decode(grid.encode(jnp.zeros(1)))[0] == 0

    def test_both_directions_work_compiled_and_on_any_shape(self, grid):
        x = jnp.linspace(-2.0, 2.0, 24).reshape(2, 3, 4)
        np.testing.assert_array_equal(jax.jit(grid.encode)(x), grid.encode(x))
        codes = grid.encode(x)
        assert codes.shape == x.shape
        np.testing.assert_array_equal(jax.jit(grid.decode)(codes), grid.decode(codes))


@pytest.mark.parametrize("grid", PLAIN.values(), ids=PLAIN.keys())
class TestEveryPlainFormat:
    def test_encode_inverts_decode(self, grid):
        x = jnp.asarray(np.random.default_rng(0).standard_normal(1000).astype(np.float32))
        codes = grid.encode(x)
        assert 8 * codes.dtype.itemsize == grid.bits
        np.testing.assert_array_equal(grid.encode(grid.decode(codes)), codes)
        assert grid.decode(codes).dtype == jnp.float32

    def test_encode_picks_the_nearest_value(self, grid):
        x = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
        got = np.asarray(grid.decode(grid.encode(jnp.asarray(x))))
        # Round to nearest: half a unit in the last of `nmant` stored bits.
        assert (np.abs(got - x) <= np.abs(x) * 2.0 ** -(jnp.finfo(grid.dtype).nmant + 1)).all()

    def test_zero_is_exact(self, grid):
        assert grid.decode(grid.encode(jnp.zeros(1)))[0] == 0
