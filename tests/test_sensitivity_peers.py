"""The scores of other tools that need more than a norm or a gradient, each against float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq.estimate import mean_over_documents
from mpq.sensitivity import NNCF, ExLlamaV2, ExLlamaV3, MLXAlignment
from mpq.types import MpqError
from tests.sensitivity_cases import (
    LARGE,
    SHAPES,
    SMALL,
    VOCAB,
    Huge,
    Shifted,
    double,
    forward,
    make_model,
    random_data,
    run,
)
from tests.test_sensitivity_gradients import document_losses, moved
from tests.test_sensitivity_proxies import RTOL, actual_errors, assert_table, in_nats, measured, tapped, zero_taps

LOW = LARGE  # int4 is smaller than int8, and comes second


def inputs_of(model, data):
    """Name -> input of every matmul, `float64[windows, time, k]`."""
    with jax.enable_x64(True):
        _, inputs = tapped(double(model.params), data.inputs, zero_taps(data.inputs.shape))
        return {name: np.asarray(x) for name, x in inputs.items()}


def int8(w):
    """`w[k, n]` in 256 levels from the smallest to the largest value of each column, zero among them."""
    low, high = np.minimum(w.min(axis=0), 0), np.maximum(w.max(axis=0), 0)
    scale = (high - low) / 255
    zero = np.round(-low / scale)
    return (np.clip(np.round(w / scale + zero), 0, 255) - zero) * scale


@pytest.mark.parametrize("data_free", [False, True])
def test_nncf_compares_weights_by_their_int8_error_at_every_scheme(data_free):
    model, data = make_model(), random_data(10)
    candidates = Shifted(model)
    inputs = inputs_of(model, data)
    mean_square = {name: np.square(inputs[name][data.mask]).mean() for name in ("value", "up", "down")}
    mean_square["table"] = np.square(inputs["head"][data.mask]).mean() + 1 / VOCAB  # and the one-hot rows of the lookup
    score = {}
    for name, w in model.params.items():
        matrix = np.asarray(w.T if name == "table" else w, np.float64)  # a scale for every row looked up
        error = int8(matrix) - matrix
        inverse = 1 / (np.square(error).mean(axis=0).max() + np.finfo(np.float32).eps)
        score[name] = inverse if data_free else np.linalg.norm(error) * mean_square[name]
    want = {s: in_nats(model, candidates, data, {s: score}, anchor=s)[s] for s in (SMALL, LARGE)}
    assert_table(run(NNCF(data_free), model, candidates, data), want, RTOL)


def test_nncf_shares_out_what_is_changed():
    class OneExact(Shifted):
        def error(self, path, scheme):
            return super().error(path, scheme) * (path != "up")

    model, data = make_model(), random_data(6)
    table = run(NNCF(), model, OneExact(model), data, schemes=(LARGE,))
    paths = [spec.path for spec in table.weights]
    assert (table.loss_increase[paths.index("up"), 0], table.stderr[paths.index("up"), 0]) == (0, 0)
    plan = {name: model.params[name] + OneExact(model).error(name, LARGE) for name in SHAPES}
    assert table.loss_increase.sum() == pytest.approx(mean_over_documents(*measured(model, plan, data))[0], rel=RTOL)


def test_mlx_alignment_is_the_derivative_at_the_smallest_plan():
    model, data = make_model(), random_data(10)
    candidates = Shifted(model)
    table = run(MLXAlignment(), model, candidates, data)
    original = {name: np.asarray(w, np.float64) for name, w in model.params.items()}
    at_small, low = (moved(original, actual_errors(model, candidates, s), 1.0) for s in (SMALL, LOW))
    with jax.enable_x64(True):
        kl_of_windows = lambda w: document_losses(w, data, double(model.params))
        gradient = jax.device_get(jax.jacrev(kl_of_windows)(double(low)))  # name -> [windows, *shape]
    # what mlx-lm scores a weight by, of every window
    alignment = lambda name, high: np.sum(gradient[name] * (low[name] - high[name]), axis=(1, 2))
    for row, spec in enumerate(table.weights):
        saved = alignment(spec.param, original)
        for column, sums in ((0, saved - alignment(spec.param, at_small)), (1, saved)):
            loss, stderr = mean_over_documents(sums, data.mask[:, 1:].sum(1))
            # gradients of float32 distributions carry 1e-6 of order 1, times errors of order 1
            assert table.loss_increase[row, column] == pytest.approx(loss, rel=RTOL, abs=2e-6)
            assert table.stderr[row, column] == pytest.approx(stderr, rel=1e-3, abs=2e-6)
    np.testing.assert_array_equal((table.loss_increase[:, 2], table.stderr[:, 2]), 0.0)


def test_exllamav2_is_the_relative_error_of_the_output():
    model, data = make_model(), random_data(10)
    data = dataclasses.replace(data, mask=data.mask & (np.arange(10) != 3)[:, None])  # a window of padding alone
    candidates = Shifted(model)
    inputs = inputs_of(model, data)

    def output(name, w, window):
        rows = data.mask[window]
        if name != "table":
            return inputs[name][window][rows] @ w
        return np.concatenate([w[data.inputs[window][rows]].ravel(), (inputs["head"][window][rows] @ w.T).ravel()])

    used = np.flatnonzero(data.mask.any(axis=1))
    scores = {}
    for scheme in (SMALL, LARGE):
        errors = actual_errors(model, candidates, scheme)
        norm = lambda name, w, window: np.linalg.norm(output(name, np.asarray(w, np.float64), window))
        ratios = {n: [norm(n, errors[n], window) / norm(n, model.params[n], window) for window in used] for n in SHAPES}
        scores[scheme] = {name: np.mean(of) ** 2 for name, of in ratios.items()}
    assert_table(run(ExLlamaV2(), model, candidates, data), in_nats(model, candidates, data, scores), RTOL)


def test_exllamav3_is_measured_in_the_smallest_plan():
    model, data = make_model(), random_data(10)
    candidates = Shifted(model)
    table = run(ExLlamaV3(), model, candidates, data)
    plan = {name: model.params[name] + candidates.error(name, LOW) for name in SHAPES}
    for row, spec in enumerate(table.weights):
        name = spec.param
        original, counts = measured(model, {**plan, name: model.params[name]}, data)
        for column, scheme in enumerate((SMALL, LARGE)):
            at = {**plan, name: model.params[name] + candidates.error(name, scheme)}
            loss, stderr = mean_over_documents(measured(model, at, data)[0] - original, counts)
            # float32 log-probabilities of order 10 carry 1e-6 each
            assert table.loss_increase[row, column] == pytest.approx(loss, rel=RTOL, abs=2e-6)
            assert table.stderr[row, column] == pytest.approx(stderr, rel=1e-3, abs=2e-6)
    np.testing.assert_array_equal((table.loss_increase[:, 2], table.stderr[:, 2]), 0.0)


def test_a_smallest_plan_that_overflows_is_named():
    model = make_model(apply=lambda p, x: forward(p, x) + 0 * jnp.sum(jnp.square(p["up"])))
    with pytest.raises(MpqError, match="all weights stored as int4_channel make the gradient of the KL NaN"):
        run(MLXAlignment(), model, Huge(model), random_data(4))
    with pytest.raises(MpqError, match="all weights but table stored as int4_channel make the model's outputs NaN"):
        run(ExLlamaV3(), model, Huge(model), random_data(4))
