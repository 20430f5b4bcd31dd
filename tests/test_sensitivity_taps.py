"""Reads that all windows of a batch share, as of learned positions: no window is taken for another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq.formats import parse_scheme
from mpq.inputs import Dataset, Tokens
from mpq.models.model import Model
from mpq.quantize import RTN, Candidates
from mpq.sensitivity import METRICS
from mpq.sensitivity.taps import telling_windows
from mpq.tasks import CausalLM

VOCAB, WIDTH = 11, 8
SCHEMES = (parse_scheme("int3_channel"), parse_scheme("int4_channel"))


def positions(p, tokens):
    """Learned positions, looked up once for all windows, and a matrix that is the same for all windows."""
    h = p["table"][tokens] + p["positions"][jnp.arange(tokens.shape[1])] + jnp.eye(tokens.shape[1], 6) @ p["shared"]
    return jnp.tanh(h @ p["up"]) @ p["head"]


def make_model(apply):
    rng = np.random.default_rng(0)
    shapes = {"table": (VOCAB, WIDTH), "positions": (6, WIDTH), "shared": (6, WIDTH), "up": (WIDTH, 12)}
    shapes |= {"head": (12, VOCAB)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    stored = dict.fromkeys(params, "float32")
    return Model(apply=apply, params=params, stored=stored, name="toy", inputs=Tokens(6), task=CausalLM())


@pytest.fixture(scope="module")
def setup():
    model = make_model(positions)
    rng = np.random.default_rng(1)
    mask = np.arange(6) < rng.integers(2, 7, size=(10, 1))
    data = Dataset(rng.integers(VOCAB, size=(10, 6)).astype(np.int32), mask, np.arange(10), "noise", "digest")
    return model, data


def test_a_model_without_shared_reads_is_evaluated_in_batches(setup):
    model, _ = setup
    traced = model.trace(4, 6)
    assert telling_windows(traced).inputs.shape == (1, 6)
    plain = make_model(lambda p, tokens: jnp.tanh(p["table"][tokens] @ p["up"]) @ p["head"]).trace(4, 6)
    assert telling_windows(plain) is plain


@pytest.mark.parametrize("name", ["fisher", "empirical_fisher", "first_order", "aumann_shapley", "modelopt_gradient"])
@pytest.mark.parametrize("batch_size", [3, 4])  # the windows' length is a multiple of one of them only
def test_batches_change_nothing(setup, name, batch_size):
    """Single windows share nothing with others: what they give is right."""
    model, data = setup

    def table(size):
        traced = model.trace(size, 6)
        candidates = Candidates(model.params, traced.weights, RTN())
        return METRICS[name](model, traced, SCHEMES, candidates, data, key=jax.random.key(0), batch_size=size)

    single, batched = table(1), table(batch_size)
    assert {spec.path for spec in single.weights} == {"table", "positions", "shared", "up", "head"}
    # float32 sums in another order
    np.testing.assert_allclose(batched.loss_increase, single.loss_increase, rtol=2e-4, atol=1e-7)
    np.testing.assert_allclose(batched.stderr, single.stderr, rtol=2e-3, atol=1e-7)
