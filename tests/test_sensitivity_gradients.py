"""Metrics made of gradients and of noise, each against an independent computation in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq.estimate import mean_over_documents
from mpq.sensitivity import (
    NNCF,
    AumannShapley,
    DeltaLoss,
    ExLlamaV2,
    ExLlamaV3,
    FirstOrder,
    Higgs,
    LayerError,
    MemoryStore,
    MLXAlignment,
    ModelOptGradient,
    WeightMSE,
)
from mpq.sensitivity.errors import DenseErrors
from mpq.sensitivity.modelopt_gradient import SQUARES
from mpq.tasks import Regression
from mpq.types import MpqError
from tests.sensitivity_cases import (
    EXACT,
    LARGE,
    SHAPES,
    SMALL,
    VOCAB,
    Broken,
    Huge,
    Shifted,
    double,
    forward,
    make_data,
    make_model,
    random_data,
    run,
)
from tests.test_sensitivity_proxies import (
    RTOL,
    actual_errors,
    assert_table,
    in_nats,
    measured,
    tapped,
    zero_taps,
)

NOT_ANCHORED = (AumannShapley(), FirstOrder(), Higgs(), MLXAlignment(), ExLlamaV3(), NNCF())
ANCHORED = (FirstOrder(signed=False), DeltaLoss(), ModelOptGradient(), LayerError(), WeightMSE(), ExLlamaV2())
NEW = (*NOT_ANCHORED, *ANCHORED)
IDS = [f"{m.name}{'' if getattr(m, 'signed', True) else '-unsigned'}" for m in NEW]


def document_losses(params, data, reference=None):
    """NLL of the next tokens, or KL from `reference`, summed over each window, in the precision of `params`."""
    q = jax.nn.log_softmax(forward(params, data.inputs))[:, :-1]
    if reference is None:
        values = -jnp.take_along_axis(q, jnp.asarray(data.inputs)[:, 1:, None], -1)[..., 0]
    else:
        p = jax.nn.log_softmax(forward(reference, data.inputs))[:, :-1]
        values = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    return jnp.where(data.mask[:, 1:], values, 0.0).sum(axis=1)


def moved(params, errors, t):
    return {name: w + t * errors[name] for name, w in params.items()}


def derivatives(model, data, errors, t=0.0, reference=None):
    """Name -> derivative of each document's loss along the weight's error, at t times all errors, in float64."""
    with jax.enable_x64(True):
        params = double(model.params)
        reference = None if reference is None else double(reference)
        at = moved(params, errors, t)
        result = {}
        for name in SHAPES:
            direction = {n: jnp.asarray(errors[n] * float(n == name)) for n in SHAPES}
            loss = lambda w: document_losses(w, data, reference)
            result[name] = np.asarray(jax.jvp(loss, (at,), (direction,))[1])
        return result


def unsigned(model, data, errors, t, loss):
    """Name -> sum of |gradient * error| of the loss summed over the data, at t times all errors, in float64."""
    with jax.enable_x64(True):
        gradient = jax.grad(loss)(moved(double(model.params), errors, t))
        return {name: float(np.abs(np.asarray(gradient[name]) * errors[name]).sum()) for name in SHAPES}


def test_first_order_is_the_derivative_of_the_labels_loss():
    model, data = make_model(), random_data(10)
    candidates = Shifted(model)
    table = run(FirstOrder(), model, candidates, data)
    for column, scheme in enumerate((SMALL, LARGE)):
        errors = actual_errors(model, candidates, scheme)
        slopes = derivatives(model, data, errors)
        terms = unsigned(model, data, errors, 0.0, lambda w: document_losses(w, data).sum())
        for row, spec in enumerate(table.weights):
            loss, stderr = mean_over_documents(slopes[spec.param], data.mask[:, 1:].sum(1))
            # float32 sums of terms that cancel: 20 roundings, relative to what is summed
            bound = 20 * float(np.finfo(np.float32).eps) * terms[spec.param]
            assert table.loss_increase[row, column] == pytest.approx(loss, abs=bound)
            assert table.stderr[row, column] == pytest.approx(stderr, rel=RTOL)
    np.testing.assert_array_equal((table.loss_increase[:, 2], table.stderr[:, 2]), 0.0)
    assert (table.loss_increase[:, 1] < 0).any()  # signs are kept


@pytest.mark.parametrize(("metric", "t"), [(FirstOrder(signed=False), 0.0), (DeltaLoss(), 1.0)], ids=["at 0", "at 1"])
def test_unsigned_products_equal_those_of_the_dense_gradient(metric, t):
    model, data = make_model(), random_data(10)
    candidates = Shifted(model)
    loss = lambda w: document_losses(w, data).sum()
    scores = {s: unsigned(model, data, actual_errors(model, candidates, s), t, loss) for s in (SMALL, LARGE)}
    assert_table(run(metric, model, candidates, data), in_nats(model, candidates, data, scores), RTOL)


# Gauss-Legendre with three nodes on [0, 1], from a table
NODES = (0.5 - np.sqrt(15) / 10, 0.5, 0.5 + np.sqrt(15) / 10)
SHARES = (5 / 18, 8 / 18, 5 / 18)


def test_aumann_shapley_is_the_quadrature_of_path_derivatives():
    model, data = make_model(), random_data(10)
    candidates = Shifted(model)
    table = run(AumannShapley(), model, candidates, data)
    for column, scheme in enumerate((SMALL, LARGE)):
        errors = actual_errors(model, candidates, scheme)
        at_nodes = [derivatives(model, data, errors, t, model.params) for t in NODES]
        for row, spec in enumerate(table.weights):
            phi = sum(share * slopes[spec.param] for share, slopes in zip(SHARES, at_nodes, strict=True))
            loss, stderr = mean_over_documents(phi, data.mask[:, 1:].sum(1))
            # gradients of float32 distributions carry 1e-6 of order 1, times errors of order 1
            assert table.loss_increase[row, column] == pytest.approx(loss, rel=RTOL, abs=2e-6)
            assert table.stderr[row, column] == pytest.approx(stderr, rel=1e-3, abs=2e-6)
    np.testing.assert_array_equal((table.loss_increase[:, 2], table.stderr[:, 2]), 0.0)


def test_aumann_shapley_adds_up_to_the_loss_of_the_whole_plan():
    model, data = make_model(), random_data(10)
    candidates = Shifted(model)
    gaps = []
    for num_nodes in (1, 3, 6):
        table = run(AumannShapley(num_nodes), model, candidates, data, schemes=(LARGE,))
        plan = {name: model.params[name] + candidates.error(name, LARGE) for name in SHAPES}
        kl, _ = mean_over_documents(*measured(model, plan, data))
        gaps.append(abs(table.loss_increase.sum() / kl - 1))
    assert gaps[0] > 10 * gaps[1]  # one node is exact for quadratic losses, and this one is not
    assert gaps[1] < 1e-2  # the default
    assert gaps[2] < RTOL  # only float32 is left


def fnv1a(text):
    value = 0x811C9DC5
    for byte in text.encode():
        value = ((value ^ byte) * 0x01000193) % 2**32
    return value % 2**31


def test_higgs_is_the_measured_loss_of_noise_of_the_size_of_the_errors():
    model, data = make_model(), random_data(10)
    candidates = Shifted(model)
    table = run(Higgs(), model, candidates, data)
    for row, spec in enumerate(table.weights):
        weight = np.asarray(model.params[spec.param], np.float64)
        t2 = [
            np.square(actual_errors(model, candidates, s)[spec.param]).sum() / np.square(weight).sum()
            for s in (SMALL, LARGE)
        ]
        size = np.sqrt(t2[0] * t2[1])
        key = jax.random.fold_in(jax.random.key(0), fnv1a(spec.path))
        matrix = np.asarray(jax.random.normal(key, (spec.batch, spec.k, spec.n)), np.float64)[0]
        noise = (matrix.T if spec.param == "table" else matrix) * np.sqrt(
            size * np.square(weight).sum() / np.square(matrix).sum()
        )
        kl, stderr = mean_over_documents(*measured(model, {**model.params, spec.param: weight + noise}, data))
        for column in range(2):
            # float32 log-probabilities of order 10 carry 1e-6 each, scaled as the loss is
            scale = t2[column] / size
            assert table.loss_increase[row, column] == pytest.approx(kl * scale, rel=RTOL, abs=2e-6 * scale)
            assert table.stderr[row, column] == pytest.approx(stderr * scale, rel=1e-3, abs=2e-6 * scale)
    np.testing.assert_array_equal((table.loss_increase[:, 2], table.stderr[:, 2]), 0.0)


def test_modelopt_gradient_squares_every_output_element():
    model, data = make_model(), random_data(10)
    candidates = Shifted(model)
    with jax.enable_x64(True):
        params = double(model.params)

        def loss(taps):
            q = jax.nn.log_softmax(tapped(params, data.inputs, taps)[0])[:, :-1]
            nll = -jnp.take_along_axis(q, jnp.asarray(data.inputs)[:, 1:, None], -1)[..., 0]
            return jnp.where(data.mask[:, 1:], nll, 0.0).sum()

        zero = zero_taps(data.inputs.shape)
        e = {name: np.asarray(g) for name, g in jax.grad(loss)(zero).items()}
        inputs = {name: np.asarray(x) for name, x in tapped(params, data.inputs, zero)[1].items()}
    scores = {}
    for scheme in (SMALL, LARGE):
        errors = actual_errors(model, candidates, scheme)
        product = lambda tap, change: np.square(e[tap] * change).sum()
        scores[scheme] = {name: product(name, inputs[name] @ errors[name]) for name in ("value", "up", "down")}
        looked_up = product("lookup", errors["table"][data.inputs])
        scores[scheme]["table"] = looked_up + product("head", inputs["head"] @ errors["table"].T)
    assert_table(run(ModelOptGradient(), model, candidates, data), in_nats(model, candidates, data, scores), RTOL)


def test_modelopt_gradient_is_clamped_before_it_is_squared():
    x = jnp.full((1, 1, 1, 1, 1), 1e6)  # [batch, windows, spans, time, k]
    errors = DenseErrors(jnp.full((1, 1, 1, 2), 1e6))
    e = jnp.asarray([-1e6, 1e-12]).reshape(1, 1, 1, 1, 2)
    np.testing.assert_allclose(SQUARES.of_matmul(x, errors, e), 1e20 + 1.0, rtol=1e-6)
    errors = DenseErrors(jnp.full((1, 1, 1, 3), 1e6))
    indices = jnp.zeros((1, 1, 1), jnp.int32)
    np.testing.assert_allclose(SQUARES.of_lookup(indices, errors, jnp.full((1, 1, 1, 1), 1e6)), 1e20, rtol=1e-6)


@functools.cache
def unlabelled_model():
    """Means over positions as the means of a normal distribution: `[batch, VOCAB]`."""
    model = make_model()
    return dataclasses.replace(model, apply=lambda p, x: forward(p, x).mean(axis=1), task=Regression())


def test_delta_loss_without_labels_is_that_of_the_divergence():
    model, data = unlabelled_model(), make_data(np.random.default_rng(0).integers(VOCAB, size=(6, 6)))
    candidates = Shifted(model)

    def divergence(w):
        z, original = (forward(p, data.inputs).mean(axis=1) for p in (w, double(model.params)))
        return 0.5 * jnp.square(z - original).sum()

    table = run(DeltaLoss(), model, candidates, data)
    scores = {s: unsigned(model, data, actual_errors(model, candidates, s), 1.0, divergence) for s in (SMALL, LARGE)}
    with jax.enable_x64(True):
        plan = moved(double(model.params), actual_errors(model, candidates, LARGE), 1.0)
        unit = float(divergence(plan)) / len(data.inputs) / sum(scores[LARGE].values())
    for row, spec in enumerate(table.weights):
        want = [scores[s][spec.param] * unit for s in (SMALL, LARGE)]
        np.testing.assert_allclose(table.loss_increase[row, :2], want, rtol=RTOL)


@pytest.mark.parametrize("metric", [FirstOrder(), FirstOrder(signed=False), ModelOptGradient()])
def test_data_without_labels_is_refused(metric):
    model, data = unlabelled_model(), make_data(np.zeros((3, 6)))
    with pytest.raises(
        MpqError, match=f"metric {metric.name} compares outputs with targets, which noise does not have"
    ):
        run(metric, model, Shifted(model), data)


def test_labels_that_are_there_are_used():
    model = unlabelled_model()
    rng = np.random.default_rng(0)
    data = make_data(rng.integers(VOCAB, size=(6, 6)))
    data = dataclasses.replace(data, labels=rng.normal(size=(6, VOCAB)).astype(np.float32))
    candidates = Shifted(model)
    table = run(FirstOrder(), model, candidates, data, schemes=(LARGE,))
    errors = actual_errors(model, candidates, LARGE)
    with jax.enable_x64(True):
        loss = lambda w: 0.5 * jnp.square(forward(w, data.inputs).mean(axis=1) - data.labels.astype(float)).sum()
        gradient = jax.grad(loss)(double(model.params))
        want = [float((np.asarray(gradient[spec.param]) * errors[spec.param]).sum()) / 6 for spec in table.weights]
    np.testing.assert_allclose(table.loss_increase[:, 0], want, rtol=RTOL, atol=1e-5)


@pytest.mark.parametrize("metric", NOT_ANCHORED, ids=IDS[: len(NOT_ANCHORED)])
def test_one_document_has_an_unknown_error(metric):
    model = make_model()
    data = make_data(np.random.default_rng(0).integers(VOCAB, size=(3, 6)), document=[4, 4, 4])
    table = run(metric, model, Shifted(model), data)
    assert np.isfinite(table.loss_increase).all()
    assert np.isnan(table.stderr[:, :2]).all()
    np.testing.assert_array_equal(table.stderr[:, 2], 0.0)


@pytest.mark.parametrize("metric", NEW, ids=IDS)
def test_exact_candidates_alone_cost_nothing(metric):
    model = make_model()
    table = run(metric, model, Shifted(model), random_data(4), schemes=(EXACT,), store=MemoryStore())
    np.testing.assert_array_equal((table.loss_increase, table.stderr), 0.0)


@pytest.mark.parametrize("metric", NEW, ids=IDS)
def test_a_candidate_that_is_not_finite_is_named(metric):
    model = make_model()
    with pytest.raises(MpqError, match=r"up .*int4_channel"):
        run(metric, model, Broken(model), random_data(4), schemes=(LARGE, EXACT))


@pytest.mark.parametrize("metric", NEW, ids=IDS)
def test_a_model_whose_outputs_overflow_is_refused(metric):
    model = make_model(apply=lambda p, x: forward(p, x) * 1e38 * 1e2)
    with pytest.raises(MpqError, match=r"NaN or infinite outputs on noise.* although its weights are finite"):
        run(metric, model, Shifted(model), random_data(4), schemes=(LARGE,))


def test_what_overflows_with_a_candidate_is_named():
    model = make_model(apply=lambda p, x: forward(p, x) + 0 * jnp.sum(jnp.square(p["up"])))
    with pytest.raises(MpqError, match="all weights stored as int4_channel make the gradient of the loss NaN"):
        run(DeltaLoss(), model, Huge(model), random_data(4))
    with pytest.raises(MpqError, match="noise of the size of its errors on weight up makes the model's outputs NaN"):
        run(Higgs(), model, Huge(model), random_data(4), schemes=(LARGE,))
