"""Proxy scores and their unit, each against an independent computation in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq.estimate import mean_over_documents
from mpq.formats import parse_scheme
from mpq.sensitivity import SNR, ExLlamaV2, Imatrix, LayerError, MemoryStore, WeightMSE
from mpq.sensitivity.anchor import anchor_column
from mpq.types import MpqError
from tests.sensitivity_cases import (
    EXACT,
    LARGE,
    SCHEMES,
    SHAPES,
    SMALL,
    VOCAB,
    WIDTH,
    Huge,
    Shifted,
    double,
    forward,
    make_data,
    make_model,
    random_data,
    run,
)

ANCHORED = {metric.name: metric for metric in (WeightMSE(), SNR(), Imatrix(), LayerError(), ExLlamaV2())}


def tapped(p, tokens, taps):
    """`forward`, with an array added at the output of every use of a weight.

    Returns:
      `(logits, inputs)`: inputs of every use but the lookup, by the name of its tap.
    """
    inputs = {}

    def read(name, x, w):
        inputs[name] = x
        return x @ w + taps[name]

    h = p["table"][tokens] + taps["lookup"]
    steps = jnp.arange(1, tokens.shape[1] + 1, dtype=h.dtype)[:, None]
    h = h + jnp.cumsum(read("value", h, p["value"]), axis=1) / steps
    h = h + read("down", jnp.tanh(read("up", h, p["up"])), p["down"])
    return read("head", h, p["table"].T), inputs


def zero_taps(shape):
    width = {"lookup": WIDTH, "value": WIDTH, "up": SHAPES["up"][1], "down": WIDTH, "head": VOCAB}
    return {name: jnp.zeros((*shape, size)) for name, size in width.items()}


def measured(model, params, data):
    """KL of `params` per document and counted tokens, in float64."""
    with jax.enable_x64(True):
        p, q = (np.asarray(jax.nn.log_softmax(forward(double(w), data.inputs))) for w in (model.params, params))
    return ((np.exp(p) * (p - q)).sum(-1)[:, :-1] * data.mask[:, 1:]).sum(1), data.mask[:, 1:].sum(1)


def actual_errors(model, candidates, scheme):
    """Candidate minus weight as the metric can see it: rounded to float32, then taken in float64."""
    return {
        name: np.asarray(w + candidates.error(name, scheme), np.float64) - np.asarray(w, np.float64)
        for name, w in model.params.items()
    }


def in_nats(model, candidates, data, scores, anchor=LARGE):
    """The unit: `scores[scheme][name]` times the measured KL of the plan over their sum at its scheme."""
    plan = {name: model.params[name] + candidates.error(name, anchor) for name in SHAPES}
    kl, stderr = mean_over_documents(*measured(model, plan, data))
    total = sum(scores[anchor].values())
    return {s: {n: (c * kl / total, c * stderr / total) for n, c in of.items()} for s, of in scores.items()}


def assert_table(table, want, rtol):
    for row, spec in enumerate(table.weights):
        for column, scheme in enumerate(table.schemes):
            if scheme == EXACT:
                assert (table.loss_increase[row, column], table.stderr[row, column]) == (0, 0)
                continue
            loss, stderr = want[scheme][spec.param]
            assert table.loss_increase[row, column] == pytest.approx(loss, rel=rtol), spec.path
            assert table.stderr[row, column] == pytest.approx(stderr, rel=rtol), spec.path


# The scores agree to float32's 1e-6. The unit is a KL of about 0.1 nats from float32 log-probabilities of order 10,
# which carry 1e-6 each: 1e-5 relative; a tenfold margin for the smaller of the documents that the error is made of.
RTOL = 1e-4


def test_squared_and_relative_errors():
    model, data = make_model(), random_data(10)
    candidates = Shifted(model)
    squares = {
        s: {n: np.square(e).sum() for n, e in actual_errors(model, candidates, s).items()} for s in (SMALL, LARGE)
    }
    signal = {n: np.square(np.asarray(w, np.float64)).sum() for n, w in model.params.items()}
    relative = {s: {n: v / signal[n] for n, v in of.items()} for s, of in squares.items()}
    assert_table(run(WeightMSE(), model, candidates, data), in_nats(model, candidates, data, squares), RTOL)
    assert_table(run(SNR(), model, candidates, data), in_nats(model, candidates, data, relative), RTOL)


@pytest.mark.parametrize("metric", [Imatrix(), LayerError()], ids=["diagonal", "gram"])
def test_output_errors_equal_those_of_every_position(metric):
    model, data = make_model(), random_data(10)
    candidates = Shifted(model)
    with jax.enable_x64(True):
        _, inputs = tapped(double(model.params), data.inputs, zero_taps(data.inputs.shape))
        inputs = {name: np.asarray(x)[data.mask] for name, x in inputs.items()}  # [positions, k]
    combine = lambda x, error: x**2 @ error**2 if isinstance(metric, Imatrix) else (x @ error) ** 2
    scores = {}
    for scheme in (SMALL, LARGE):
        errors = actual_errors(model, candidates, scheme)
        scores[scheme] = {name: combine(inputs[name], errors[name]).sum() for name in ("value", "up", "down")}
        looked_up = errors["table"][data.inputs[data.mask]]
        scores[scheme]["table"] = np.square(looked_up).sum() + combine(inputs["head"], errors["table"].T).sum()
    assert_table(run(metric, model, candidates, data), in_nats(model, candidates, data, scores), RTOL)


def test_the_gram_matters():
    model, data = make_model(), random_data(10)
    by_diagonal, by_gram = (run(m, model, Shifted(model), data).loss_increase for m in (Imatrix(), LayerError()))
    assert not np.allclose(by_diagonal, by_gram, rtol=0.05)


@pytest.mark.parametrize("metric", ANCHORED.values(), ids=ANCHORED)
class TestEveryAnchoredMetric:
    def test_its_scores_at_the_anchor_add_up_to_the_measured_loss(self, metric):
        model, data = make_model(), random_data(10)
        candidates = Shifted(model)
        plan = {name: model.params[name] + candidates.error(name, LARGE) for name in SHAPES}
        kl, stderr = mean_over_documents(*measured(model, plan, data))
        table = run(metric, model, candidates, data)
        assert table.loss_increase[:, 1].sum() == pytest.approx(kl, rel=RTOL)
        assert table.stderr[:, 1].sum() == pytest.approx(stderr, rel=RTOL)

    def test_exact_candidates_alone_measure_nothing(self, metric):
        store = MemoryStore()
        model = make_model()
        table = run(metric, model, Shifted(model), random_data(4), schemes=(EXACT,), store=store)
        np.testing.assert_array_equal((table.loss_increase, table.stderr), 0.0)
        assert not any('"anchor"' in key for key in store.values)

    def test_one_document_has_an_unknown_error(self, metric):
        model = make_model()
        data = make_data(np.random.default_rng(0).integers(VOCAB, size=(3, 6)), document=[4, 4, 4])
        table = run(metric, model, Shifted(model), data)
        assert np.isfinite(table.loss_increase).all()
        assert np.isnan(table.stderr[:, :2]).all()
        np.testing.assert_array_equal(table.stderr[:, 2], 0.0)


def test_the_anchor_is_of_median_size_among_those_that_change_something():
    model = make_model()
    weights = model.trace(2, 6).weights
    names = ("fp32", "int8_channel", "int2_channel", "int4_channel", "int3_channel")
    schemes = tuple(map(parse_scheme, names))
    changes = lambda *which: np.isin(names, which)
    assert anchor_column(weights, schemes, changes(*names[1:])) == names.index("int3_channel")  # of four, the second
    assert anchor_column(weights, schemes, changes("int8_channel", "int2_channel", "int4_channel")) == 3
    assert anchor_column(weights, schemes, changes("int8_channel")) == 1
    assert anchor_column(weights, schemes, changes()) is None


def test_a_plan_that_overflows_is_named():
    model = make_model(apply=lambda p, x: forward(p, x) + 0 * jnp.sum(jnp.square(p["up"])))
    with pytest.raises(MpqError, match="all weights stored as int4_channel make the model's outputs NaN or infinite"):
        run(WeightMSE(), model, Huge(model), random_data(4), schemes=(LARGE,))


def test_a_score_that_overflows_is_named():
    model = make_model()
    with pytest.raises(MpqError, match="the loss increase of weight up at int4_channel is"):
        run(LayerError(), model, Huge(model), random_data(4), schemes=SCHEMES)
