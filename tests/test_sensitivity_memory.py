"""What the metrics that score all candidates in one pass hold at once: large models keep what candidates store."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq import quantize
from mpq.formats import parse_scheme
from mpq.inputs import Tokens
from mpq.models.model import Model
from mpq.quantize import RTN, Candidates
from mpq.sensitivity import METRICS, errors, fisher
from mpq.sensitivity.errors import StoredErrors, differing_errors, looked_up
from mpq.sensitivity.score_squares import _squares
from mpq.tasks import CausalLM
from tests.sensitivity_cases import random_data

NAMES = "int2_g32", "int3_g32_zp", "nf4_g32", "int4_g32", "int4_tensor", "int8_channel", "nvfp4"
SCHEMES = tuple(map(parse_scheme, NAMES))
DEPTH, WIDTH, VOCABULARY, TIME = 6, 256, 64, 4


def forward(params, tokens):
    x = params["embedding"][tokens]
    for layer in range(DEPTH):
        x = x + jnp.tanh(x @ params[f"w{layer}"])
    return x @ params["embedding"].T


@pytest.fixture(scope="module")
def wide():
    """`(model, its trace, candidates)`: weights far larger than the activations of a window."""
    rng = np.random.default_rng(0)
    shapes = {"embedding": (VOCABULARY, WIDTH)} | {f"w{layer}": (WIDTH, WIDTH) for layer in range(DEPTH)}
    params = {path: jnp.asarray(rng.normal(size=shape) / WIDTH**0.5, jnp.float32) for path, shape in shapes.items()}
    stored, inputs = dict.fromkeys(params, "float32"), Tokens(VOCABULARY)
    model = Model(apply=forward, params=params, stored=stored, name="wide", inputs=inputs, task=CausalLM())
    traced = model.trace(1, TIME)
    return model, traced, Candidates(params, traced.weights, RTN())


def test_errors_of_large_models_are_worked_out_of_what_is_stored(wide, monkeypatch):
    model, traced, candidates = wide
    keep, dense = differing_errors(model.params, traced, SCHEMES, candidates)
    monkeypatch.setattr(errors, "SMALL", 0)
    same, stored = differing_errors(model.params, traced, SCHEMES, candidates)
    np.testing.assert_array_equal(same, keep)
    columns = jnp.asarray([[5, 5], [0, 63]])
    assert all(isinstance(error, StoredErrors) for error in stored.values())
    for path in ("embedding", "w0"):
        error = stored[path]
        assert len(error) == len(dense[path]) == len(SCHEMES)
        # the same two roundings an element, product and difference, but compiled together
        np.testing.assert_allclose(error.matrices(), dense[path].matrices(), rtol=0, atol=1e-6)
        np.testing.assert_allclose(looked_up(error, columns), looked_up(dense[path], columns), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["fisher", "modelopt_gradient", "exllamav2", "aumann_shapley"])
def test_scores_do_not_depend_on_how_errors_are_held(wide, monkeypatch, name):
    model, traced, candidates = wide
    arguments = model, traced, SCHEMES[:3], candidates, random_data(2, time=TIME)
    keywords = {"key": jax.random.key(0), "batch_size": 1}
    dense = METRICS[name](*arguments, **keywords)
    monkeypatch.setattr(errors, "SMALL", 0)
    stored = METRICS[name](*arguments, **keywords)
    # float32 sums over at most 2 * WIDTH**2 products, in another order
    np.testing.assert_allclose(stored.loss_increase, dense.loss_increase, rtol=1e-4)


def held(wide, schemes):
    """Temporary memory of the compiled pass of `fisher`, in sizes of the float32 weights."""
    model, traced, candidates = wide
    data = random_data(1, time=TIME)
    _, of_weights = differing_errors(model.params, traced, schemes, candidates)
    batch = next(iter(data.batches(1)))
    arguments = batch, model.task.counted(batch.mask), np.arange(1)
    lowered = _squares.lower(
        traced, fisher._scores, 2, 2, model.task, model.params, of_weights, jax.random.key(0), *arguments
    )
    return lowered.compile().memory_analysis().temp_size_in_bytes / sum(4 * spec.size for spec in traced.weights)


def test_a_pass_over_a_large_model_holds_a_fraction_of_its_weights_however_many_schemes(wide, monkeypatch):
    assert held(wide, SCHEMES[:1]) > 0  # or the compiler does not tell
    monkeypatch.setattr(errors, "SMALL", 0)
    # A quarter of the weights is worked on at a time; as much again for copies of that and for the activations.
    assert held(wide, SCHEMES) < 0.5


def test_candidates_hold_a_quarter_of_the_weights_and_find_the_rest_again(wide, monkeypatch):
    model, traced, _ = wide
    monkeypatch.setattr(quantize.candidates, "KEEP_BYTES", 0)
    candidates, first = Candidates(model.params, traced.weights, RTN()), {}
    for spec in traced.weights:
        for scheme in SCHEMES:
            first[spec, scheme] = np.asarray(candidates.dequantized(spec, scheme))
    assert candidates._qtensors._held <= sum(spec.size for spec in traced.weights)
    for (spec, scheme), values in first.items():
        np.testing.assert_array_equal(candidates.dequantized(spec, scheme), values)
