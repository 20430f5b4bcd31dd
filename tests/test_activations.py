"""Scores of activations and of the KV cache against a float64 NumPy model that rounds number by number."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpq
from mpq.activations import (
    ACTIVATION_METRICS,
    ActivationFisher,
    ActivationKL,
    fisher,
    kv_rows,
    measured_kl,
    parse_activation_scheme,
)
from mpq.sensitivity import MemoryStore
from mpq.types import MpqError
from tests.activation_cases import (
    EVERY_KIND,
    SCHEMES,
    SHAPES,
    SHARED,
    TIME,
    WIDTH,
    double,
    forward,
    keep,
    log_softmax,
    logits_of,
    make_data,
    make_model,
    only,
    rounded,
    run,
)

BOTH = pytest.mark.parametrize("of", ["activations", "kv"])
EVERY_METRIC = pytest.mark.parametrize("metric", ACTIVATION_METRICS.values(), ids=ACTIVATION_METRICS.keys())


def mean_and_error(windows, data):
    """The ratio estimator over documents of one window each, from `[windows, ...]` sums."""
    counts = data.mask[:, 1:].sum(1).astype(np.float64)
    mean = windows.sum(0) / counts.sum()
    residual = windows - counts[:, None] * mean
    return mean, np.sqrt(len(counts) / (len(counts) - 1) * (residual**2).sum(0)) / counts.sum()


@BOTH
def test_kl_is_that_of_a_float64_model_whose_value_is_rounded(of):
    model, data = make_model(), make_data(10)
    table = run(ActivationKL(), of, model, data, schemes=EVERY_KIND[of])
    p, params = log_softmax(logits_of(double(model.params), data.inputs, keep)), double(model.params)
    for row, spec in enumerate(table.activations):
        sums = []
        for scheme in table.schemes:
            change = only(spec.path, lambda x, s=scheme: rounded(x, s, data.mask))
            q = log_softmax(logits_of(params, data.inputs, change))
            sums.append(((np.exp(p) * (p - q)).sum(-1)[:, :-1] * data.mask[:, 1:]).sum(1))
        mean, stderr = mean_and_error(np.stack(sums, axis=1), data)
        # float32 log-probabilities of order 10 carry 1e-6 each
        np.testing.assert_allclose(table.loss_increase[row], mean, rtol=1e-4, atol=5e-6)
        np.testing.assert_allclose(table.stderr[row], stderr, rtol=1e-3, atol=5e-6)
    assert (table.loss_increase > 1e-6).all()


@pytest.mark.parametrize(("of", "span", "spans"), [("activations", 1, 6), ("activations", 4, 2), ("kv", None, 1)])
def test_fisher_is_the_squared_product_of_scores_and_the_derivative_along_the_rounding_error(of, span, spans):
    """The derivative by a complex step, which is exact: Im f(x + ih dx) / h."""
    model, data, samples, step = make_model(), make_data(5), 2, 1e-30
    table = run(ActivationFisher(samples, span), of, model, data, schemes=EVERY_KIND[of], key=3)
    params, seen = double(model.params), {}
    logits = logits_of(params, data.inputs, lambda name, x: seen.setdefault(name, x))
    scores = np.zeros((samples, *logits.shape))
    for m, w in np.ndindex(samples, len(data.inputs)):
        own = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), m), w)
        p = np.exp(log_softmax(logits[w]))
        part = np.sqrt(p) * np.asarray(jax.random.rademacher(own, p.shape, jnp.float32))
        scores[m, w] = part - p * part.sum(-1, keepdims=True)
    scores[:, ~np.pad(data.mask[:, 1:], ((0, 0), (0, 1)))] = 0
    for row, spec in enumerate(table.activations):
        sums = np.zeros((len(data.inputs), len(table.schemes)))
        for column, scheme in enumerate(table.schemes):
            error = rounded(seen[spec.path], scheme, data.mask) - seen[spec.path]
            for positions in np.array_split(np.arange(TIME), spans):
                part = np.zeros_like(error)
                part[:, positions] = error[:, positions]
                change = only(spec.path, lambda x, e=part: x + 1j * step * e)
                slope = logits_of(params, data.inputs, change).imag / step
                sums[:, column] += ((scores * slope).sum((-2, -1)) ** 2).mean(0) / 2
        mean, stderr = mean_and_error(sums, data)
        # x rounded to float32 moves an error of 1/100 of x by 1e-5 of itself; sums cancel to a tenth
        np.testing.assert_allclose(table.loss_increase[row], mean, rtol=1e-3)
        np.testing.assert_allclose(table.stderr[row], stderr, rtol=1e-3)


@EVERY_METRIC
def test_rounding_that_changes_nothing_costs_nothing_for_certain(metric):
    model = make_model()
    codes = np.random.default_rng(0).integers(-20, 20, size=SHAPES["embed"]).astype(np.float32)
    codes[:, 1] = 127  # the scale is 1: all values of a token are codes
    changed = lambda **params: dataclasses.replace(model, params=model.params | params)
    exact, empty = changed(embed=jnp.asarray(codes) * 2.0**-6), changed(value=jnp.zeros(SHAPES["value"]))
    data = make_data(6, documents=1)  # whatever is not certain has an unknown error
    schemes = tuple(map(parse_activation_scheme, ("int8_token", "int4_token")))
    table = run(metric, "activations", exact, data, schemes=schemes)
    row = next(i for i, spec in enumerate(table.activations) if spec.path == SHARED)
    assert (table.loss_increase[row, 0], table.stderr[row, 0]) == (0, 0)
    assert table.loss_increase[row, 1] > 0
    assert np.isnan(table.stderr[row, 1])
    cache = run(metric, "kv", empty, data)
    value = [spec.path for spec in cache.activations].index("value")
    np.testing.assert_array_equal((cache.loss_increase[value], cache.stderr[value]), 0)


def test_outputs_that_rounding_breaks_are_named():
    first = lambda p, tokens: p["embed"][tokens] @ p["first"]  # of four features, which two bits round to 0
    model = make_model(
        lambda p, tokens: forward(p, tokens) / first(p, tokens), (*SHAPES.items(), ("first", (WIDTH, 1)))
    )
    model = dataclasses.replace(model, params=model.params | {"first": jnp.eye(WIDTH, 1)})
    schemes = tuple(map(parse_activation_scheme, ("int8_token", "int2_token")))
    message = r"activation first at int2_token is (nan|inf): rounded so coarsely"
    with pytest.raises(MpqError, match=message):
        run(ActivationKL(), "activations", model, make_data(4), schemes=schemes)


def test_one_program_serves_all_rows_and_bits_of_a_kind():
    model, data = make_model(), make_data(10, seed=9)
    texts = ("int2_token", "int3_token", "int8_token", "int4_token_asym", "int6_token_asym")
    model = dataclasses.replace(model, apply=lambda p, x: forward(p, x))  # a model that nothing is compiled for
    programs = lambda: (measured_kl.rounded_outputs._cache_size(), fisher._squares._cache_size())
    before = programs()
    for metric in ACTIVATION_METRICS.values():
        table = run(metric, "activations", model, data, schemes=tuple(map(parse_activation_scheme, texts)))
    assert table.loss_increase.size == 25
    assert np.subtract(programs(), before).tolist() == [2, 1]


def test_a_further_scheme_costs_its_own_passes():
    model, data, store = make_model(), make_data(10), MemoryStore()
    first, second = SCHEMES["kv"][:1], SCHEMES["kv"][:2]
    run(ActivationKL(), "kv", model, data, schemes=first, store=store)
    assert len(store.values) == 3 * 2  # batches and rows
    table = run(ActivationKL(), "kv", model, data, schemes=second, store=store)
    assert len(store.values) == 2 * 3 * 2
    np.testing.assert_array_equal(
        table.loss_increase, run(ActivationKL(), "kv", model, data, schemes=second).loss_increase
    )


def test_the_prediction_is_of_the_size_of_the_measurement_on_the_reference_model():
    model = mpq.load("reference")
    data = mpq.datasets(model, mpq.RunConfig(name="cache", window=32, calibration_windows=4))["calibration"]
    shaped = model.trace(4, 32)
    rows = kv_rows(shaped)
    assert [row.path for row in rows] == [f"layers.{i}.self_attn.{n}_proj.kernel" for i in range(6) for n in "kv"]
    assert {(row.width, row.heads) for row in rows} == {(128, 2)}
    schemes = (parse_activation_scheme("int4_head_asym"),)
    options = {"key": jax.random.key(0), "batch_size": 4}
    kl, predicted = (
        m(model, shaped, rows, schemes, data, **options).loss_increase for m in ACTIVATION_METRICS.values()
    )
    assert (kl > 0).all()
    assert 0.7 < predicted.sum() / kl.sum() < 1.3
