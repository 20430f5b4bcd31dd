"""A model in stages gives what it gives as a whole, whatever weights change on the way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq.models import load
from mpq.stages import Stages
from mpq.trace import trace
from tests import decoder_cases

WIDTH = 6


def whole(traced, params, inputs, paths=None):
    """The input of every weight's first site, as a matrix, from one evaluation: site -> value."""
    first = {}
    for site in traced.sites:
        if site.use.kind == "matmul" and (paths is None or site.spec.path in paths):
            first.setdefault(site.spec.path, site)

    paths = {site.id: path for path, site in first.items()}
    keep = lambda site, x, state: state | ({paths[site.id]: site.inputs_matrix(x)} if site.id in paths else {})
    zeros = {path: jnp.zeros(site.matrix_shape) for path, site in first.items()}
    _, values = jax.jit(lambda *args: traced.accumulate(*args, zeros, keep))(params, inputs)
    return {site: values[path] for path, site in first.items()}


def staged(stages, params, inputs):
    """The same in stages, with the parameters of each stage."""
    live, found = stages.start(inputs), {}
    for number, site in enumerate(stages.sites):
        x, live = stages.run(number, params(number), live)
        found[site] = site.inputs_matrix(x)
    return found


def assert_close(got, expected):
    assert list(got) == list(expected)
    for site, x in expected.items():
        np.testing.assert_allclose(got[site], x, rtol=1e-5, atol=1e-5, err_msg=site.spec.path)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral"])
def test_every_input_is_that_of_the_whole_model(tmp_path, name):
    model = load(decoder_cases.write(tmp_path / name, name))
    inputs = jnp.asarray(np.random.default_rng(1).integers(0, 20, (2, 7)), jnp.int32)
    traced = model.trace(*inputs.shape)
    expected = whole(traced, model.params, inputs)
    stages = Stages(traced, expected)
    assert len(stages) == len(expected) > 4
    assert_close(staged(stages, lambda number: model.params, inputs), expected)


@pytest.fixture(scope="module")
def chain():
    """Two weights of one value, a sum that crosses cuts, and a matrix that is transposed before all else."""

    def apply(params, x):
        turned, late = params["d"].T, params["scale"] * 2
        h = x @ params["a"] + x @ params["b"]
        block = jax.checkpoint(lambda h, c: h + jnp.tanh(h @ c))
        h = block(h, params["c"])
        return (h + x) @ turned * late

    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=(WIDTH, WIDTH)), jnp.float32) for name in "abcd"}
    params["scale"] = jnp.ones(WIDTH)
    x = jnp.asarray(rng.normal(size=(3, WIDTH)), jnp.float32)
    return trace(apply, params, x), params, x


def test_a_stage_reads_the_weights_it_is_given(chain):
    """Replaced before their stage, weights have an effect; afterwards they have none, which is what saves the time."""
    traced, params, x = chain
    sites = whole(traced, params, x, "acd")
    stages = Stages(traced, sites)
    assert [site.spec.path for site in stages.sites] == ["a", "c", "d"]
    changed = params | {"b": params["b"] * 2, "c": params["c"] + 1}
    final = whole(traced, changed, x, "acd")

    def given(number):
        """Of the final ones those that are read by then; the others are garbage, and so is what was read before."""
        names = [{}, {"a", "b"}, {"c"}][number]
        return {name: changed[name] if name in names or name == "scale" else params[name] * jnp.nan for name in params}

    assert_close(staged(stages, given, x), final)


def test_a_transposition_before_the_first_stage_is_made_anew(chain):
    """What parameters alone decide crosses no cut: it would be what it was when the parameter was another one."""

    def apply(params, x):
        turned = jnp.tanh(params["d"]).T
        return jnp.sin(jnp.sin(x @ params["a"]) @ turned) @ params["b"]

    _, params, x = chain
    traced = trace(apply, params, x)
    stages = Stages(traced, [site for site in traced.sites if site.spec.path in "ab"])
    first, live = stages.run(0, params, stages.start(x))
    last, _ = stages.run(1, params | {"d": params["d"] * 3}, live)
    np.testing.assert_array_equal(first, x)
    expected = np.sin(np.sin(x @ params["a"]) @ np.tanh(params["d"] * 3).T)
    np.testing.assert_allclose(last, expected, rtol=1e-5, atol=1e-5)


def test_sites_inside_a_loop_are_left_out(chain):
    def apply(params, x):
        looped = jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ params["a"]), x)
        return jax.lax.cond(x[0, 0] > 0, lambda h: h @ params["c"], lambda h: h, looped) @ params["b"]

    _, params, x = chain
    traced = trace(apply, params, x)
    stages = Stages(traced, traced.sites)
    assert [site.spec.path for site in stages.sites] == ["b"]
    assert_close(staged(stages, lambda number: params, x), whole(traced, params, x, "b"))
