"""Metrics of one candidate at a time, and of the data's labels, against dense float64 computations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq.inputs import Arrays, Dataset
from mpq.models.model import Model
from mpq.sensitivity import (
    EmpiricalFisher,
    GaussNewton,
    HessianForm,
    HessianTrace,
    MeasuredKL,
    MeasuredLoss,
    TopEigenvalue,
)
from mpq.tasks import Classification, Embedding, Regression
from mpq.types import MpqError
from tests.sensitivity_cases import (
    LARGE,
    SHAPES,
    SMALL,
    Shifted,
    double,
    forward,
    make_data,
    make_model,
    random_data,
    run,
)

DATA = random_data(6)  # three to five tokens of six are real: padding is in every comparison
TOKENS = DATA.mask[:, 1:].sum(axis=1)


def window_losses(params, data=DATA):
    """Loss of each window, summed over its tokens: float64 where the parameters are."""
    q = jax.nn.log_softmax(forward(params, jnp.asarray(data.inputs)))[:, :-1]
    nll = -jnp.take_along_axis(q, data.inputs[:, 1:, None], -1)[..., 0]
    return jnp.where(data.mask[:, 1:], nll, 0.0).sum(axis=1)


@functools.cache
def dense_hessians():
    """Of each window's loss, the block of every weight: `float64[windows, n, n]`."""
    with jax.enable_x64(True):
        params = double(make_model().params)
        block = lambda name: jax.jit(jax.hessian(lambda w: window_losses({**params, name: w})))(params[name])
        return {n: np.asarray(block(n)).reshape(len(DATA.inputs), p.size, p.size) for n, p in params.items()}


def measured(name, error):
    with jax.enable_x64(True):
        params = double(make_model().params)
        changed = {**params, name: params[name] + jnp.asarray(error, jnp.float64)}
        return np.asarray(window_losses(changed) - window_losses(params))


def every_label(name, error):
    """Half the mean square of the scores' projection over all labels, each with its probability."""
    with jax.enable_x64(True):
        params, tangent = double(make_model().params), jnp.asarray(error, jnp.float64)
        log_p = lambda w: jax.nn.log_softmax(forward({**params, name: w}, jnp.asarray(DATA.inputs)))
        value, slope = jax.jvp(log_p, (params[name],), (tangent,))
        form = np.asarray((jnp.exp(value) * slope**2).sum(axis=-1)) / 2
    return (form[:, :-1] * DATA.mask[:, 1:]).sum(axis=1)


def dense_form(name, error):
    flat = np.asarray(error, np.float64).ravel()
    return flat @ dense_hessians()[name] @ flat / 2


def top_of_dense(name, error):
    hessians = dense_hessians()[name]
    v = np.linalg.eigh(hessians.sum(axis=0))[1][:, -1]
    return v @ hessians @ v * np.square(np.asarray(error, np.float64)).sum() / 2


def squared_scores(name, error, spans):
    """Squares of the loss's derivative in the error at each position, summed within spans."""
    time = DATA.inputs.shape[1]
    with jax.enable_x64(True):
        params, errors = double(make_model().params), {name: jnp.asarray(error, jnp.float64)}

        def loss(scale):
            q = jax.nn.log_softmax(forward(params, jnp.asarray(DATA.inputs), errors, scale))[:, :-1]
            nll = -jnp.take_along_axis(q, DATA.inputs[:, 1:, None], -1)[..., 0]
            return jnp.where(DATA.mask[:, 1:], nll, 0.0).sum()

        s = np.asarray(jax.grad(loss)(jnp.zeros(DATA.inputs.shape)))
    return sum(s[:, span].sum(axis=1) ** 2 for span in np.array_split(np.arange(time), spans)) / 2


def squared_gradient(name, error):
    with jax.enable_x64(True):
        params = double(make_model().params)
        gradients = np.asarray(jax.jacrev(lambda w: window_losses({**params, name: w}))(params[name]))
    return np.square(np.tensordot(gradients, np.asarray(error, np.float64), axes=2)) / 2


# float32 against float64: logits of order 10 carry 1e-6, of which losses of a few tokens and forms of order 0.1 keep
# 1e-5; the errors themselves are float32 differences w + delta - w, 1e-7 of a weight and 1e-6 of an error of 0.1.
ORACLES = {
    "loss": (MeasuredLoss(), measured),
    "gauss_newton": (GaussNewton(), every_label),
    "hessian": (HessianForm(), dense_form),
    # the shifted eigenvalues fall by 0.965 at the least: what is left of the second one is 0.965^400 = 1e-6
    "top_eigenvalue": (TopEigenvalue(num_iterations=400), top_of_dense),
    "empirical_fisher of windows": (EmpiricalFisher(span=None), squared_gradient),
    "empirical_fisher of spans": (EmpiricalFisher(span=2), functools.partial(squared_scores, spans=3)),
    "empirical_fisher of positions": (EmpiricalFisher(span=1), functools.partial(squared_scores, spans=6)),
}


@pytest.mark.parametrize(("metric", "oracle"), ORACLES.values(), ids=ORACLES)
def test_equals_the_dense_computation(metric, oracle):
    candidates = Shifted(make_model())
    table = run(metric, make_model(), candidates, DATA)
    assert {spec.param for spec in table.weights} == set(SHAPES)
    assert {spec.param: spec.kind for spec in table.weights}["table"] == "embedding+matmul"  # tied
    for row, spec in enumerate(table.weights):
        for column, scheme in enumerate((SMALL, LARGE)):
            windows = oracle(spec.param, candidates.error(spec.param, scheme))
            mean = windows.sum() / TOKENS.sum()
            spread = np.sqrt(6 / 5 * np.square(windows - mean * TOKENS).sum()) / TOKENS.sum()
            assert table.loss_increase[row, column] == pytest.approx(mean, rel=2e-4, abs=5e-6)
            assert table.stderr[row, column] == pytest.approx(spread, rel=1e-3, abs=5e-6)
    np.testing.assert_array_equal((table.loss_increase[:, 2], table.stderr[:, 2]), 0.0)


def test_the_hessian_form_tells_the_sign_of_the_curvature():
    """In a direction of negative curvature the form is negative, where Gauss-Newton is not."""
    values, vectors = np.linalg.eigh(dense_hessians()["value"].sum(axis=0))
    assert values[0] < -2 * values[-1]  # so the eigenvalue of largest size is not the largest, either
    model = make_model()

    class Along(Shifted):
        def error(self, path, scheme):
            along = vectors[:, 0].reshape(SHAPES["value"]).astype(np.float32)
            return along if (path, scheme) == ("value", LARGE) else 0.0

    hessian = run(HessianForm(), model, Along(model), DATA)
    row = [w.param for w in hessian.weights].index("value")
    # an eigenvector of length 1: half the eigenvalue
    assert hessian.loss_increase[row, 1] == pytest.approx(values[0] / TOKENS.sum() / 2, rel=1e-4)
    assert run(GaussNewton(), model, Along(model), DATA).loss_increase[row, 1] > 0


def test_gauss_newton_is_the_second_order_term_of_the_measured_kl():
    model = make_model()
    small = Shifted(model, size=0.01)
    form, kl = run(GaussNewton(), model, small, DATA), run(MeasuredKL(), model, small, DATA)
    # third order: errors of 1 % of a weight change the form by a few percent; the KL itself carries 1e-6
    np.testing.assert_allclose(form.loss_increase[:, 1], kl.loss_increase[:, 1], rtol=0.1, atol=5e-6)


def array_model(apply, params, task, shape):
    params = {name: jnp.asarray(p, jnp.float32) for name, p in params.items()}
    return Model(apply, params, dict.fromkeys(params, "float32"), "small", Arrays(shape), task)


def array_data(inputs, labels=None, mask=None):
    mask = np.ones(len(inputs), bool) if mask is None else mask
    document = np.arange(len(inputs), dtype=np.int32)
    return Dataset(np.asarray(inputs, np.float32), mask, document, "rows", "digest", labels)


RNG = np.random.default_rng(0)
W, X, Y = RNG.normal(size=(3, 2)), RNG.normal(size=(9, 3)), RNG.normal(size=(9, 2))
REAL = np.arange(9) != 4
VARIANCE = 0.5


@pytest.fixture(scope="module")
def quadratic():
    """A linear model with squared error, one row of the data being padding."""
    model = array_model(lambda p, x: x @ p["w"], {"w": W}, Regression(VARIANCE), (3,))
    x = np.where(REAL[:, None], X, 1e3)
    return model, array_data(x, Y.astype(np.float32), REAL)


def test_exact_on_a_quadratic_loss(quadratic):
    model, data = quadratic
    delta = Shifted(model).error("w", LARGE).astype(np.float64)
    x, w = X[REAL], np.asarray(model.params["w"], np.float64)
    form = np.square(x @ delta).sum() / (2 * VARIANCE * 8)
    slope = ((x @ w - Y[REAL]) * (x @ delta)).sum() / (VARIANCE * 8)
    scores = np.square(((x @ w - Y[REAL]) * (x @ delta)).sum(axis=1) / VARIANCE).sum() / (2 * 8)
    top = np.linalg.eigvalsh(x.T @ x).max() / (VARIANCE * 8) / 2 * np.square(delta).sum()
    for metric, want in (
        (MeasuredLoss(), form + slope),
        (GaussNewton(), form),
        (HessianForm(), form),
        (EmpiricalFisher(), scores),
        (TopEigenvalue(num_iterations=100), top),
    ):
        table = run(metric, model, Shifted(model), data)
        # float32 losses of order 1 to 10; a second derivative of a quadratic has no truncation error
        np.testing.assert_allclose(
            table.loss_increase[0], [want_of(metric, want, slope), want, 0], rtol=2e-5, atol=1e-6
        )


def want_of(metric, want, slope):
    """Of half the error: a quarter of the form, half the slope."""
    return (want - slope) / 4 + slope / 2 if metric.name == "loss" else want / 4


def test_a_candidate_closer_to_the_labels_has_a_negative_loss_increase(quadratic):
    model, data = quadratic
    best = np.linalg.lstsq(X[REAL], Y[REAL], rcond=None)[0].astype(np.float32)

    class Best(Shifted):
        def error(self, path, scheme):
            return best - self.model.params[path]

    table = run(MeasuredLoss(), model, Best(model), data)
    before, after = (np.square(X[REAL] @ w - Y[REAL]).sum() / (2 * VARIANCE * 8) for w in (W, best))
    assert after - before < -0.1
    np.testing.assert_allclose(table.loss_increase[0], after - before, rtol=1e-5)


@pytest.mark.parametrize("task", [Classification(), Embedding(), Regression(VARIANCE)], ids=lambda task: task.name)
def test_without_targets_the_hessian_is_that_of_the_divergence(task):
    params = {"up": RNG.normal(size=(3, 5)), "down": RNG.normal(size=(5, 4))}
    model = array_model(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], params, task, (3,))
    data = array_data(X)
    hessian, form = (run(metric, model, Shifted(model), data) for metric in (HessianForm(), GaussNewton()))
    # the slope of the divergence vanishes at equal outputs, to float32 rounding of order 1e-6 of curvatures of order 1
    np.testing.assert_allclose(hessian.loss_increase, form.loss_increase, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(hessian.stderr, form.stderr, rtol=1e-3, atol=1e-6)
    assert (form.loss_increase[:, :2] > 1e-4).all()


@pytest.mark.parametrize(
    "metric",
    [GaussNewton(), HessianForm(), HessianTrace(num_probes=2), TopEigenvalue(num_iterations=2)],
    ids=lambda metric: metric.name,
)
def test_a_classifier_whose_outputs_overflow_is_refused_without_labels_too(metric):
    model = array_model(lambda p, x: x @ p["w"] * 1e38 * 1e2, {"w": W}, Classification(), (3,))
    with pytest.raises(MpqError, match=r"NaN or infinite outputs on rows.* although its weights are finite"):
        run(metric, model, Shifted(model), array_data(X))


def test_classification_scores_are_those_of_the_labels():
    labels = RNG.integers(4, size=9).astype(np.int32)
    w = RNG.normal(size=(3, 4))
    model = array_model(lambda p, x: x @ p["w"], {"w": w}, Classification(), (3,))
    table = run(EmpiricalFisher(), model, Shifted(model), array_data(X, labels))
    p = np.exp(X @ w) / np.exp(X @ w).sum(axis=1, keepdims=True)
    s = ((p - np.eye(4)[labels]) * (X @ Shifted(model).error("w", LARGE))).sum(axis=1)
    assert table.loss_increase[0, 1] == pytest.approx(np.square(s).mean() / 2, rel=1e-4)  # float32 logits


def test_the_top_eigenvalue_is_the_largest_in_sign():
    """(w_i^2 - y_i)^2 / 2 has the second derivative 6 w_i^2 - 2 y_i: here -19.94, 5 and 0, and 5 is wanted."""
    model = array_model(lambda p, x: jnp.square(x @ p["w"]), {"w": [[0.1], [1.0], [1.0]]}, Regression(), (3,))
    data = array_data(np.eye(3), np.array([[10.0], [0.5], [3.0]], np.float32))
    candidates = Shifted(model)
    half = np.square(candidates.error("w", LARGE)).sum() / 2
    table = run(TopEigenvalue(num_iterations=50), model, candidates, data, batch_size=3)
    # the shifted eigenvalues are 0, 24.94 and 19.94: what is left of the last has a weight of 0.8^100
    assert table.loss_increase[0, 1] == pytest.approx(5 / 3 * half, rel=1e-5)


def test_a_weight_without_influence_has_no_eigenvalue():
    model = array_model(lambda p, x: x @ p["w"] + 0 * (x @ p["v"]), {"w": W, "v": W}, Regression(), (3,))
    table = run(TopEigenvalue(), model, Shifted(model), array_data(X, Y))
    row = [w.param for w in table.weights].index("v")
    np.testing.assert_array_equal((table.loss_increase[row], table.stderr[row]), 0.0)
    assert (table.loss_increase[1 - row, :2] > 0).all()


@pytest.mark.parametrize("metric", [MeasuredLoss(), EmpiricalFisher()], ids=lambda metric: metric.name)
@pytest.mark.parametrize(("task", "labels"), [(Embedding(), Y[:, 0]), (Regression(), None), (Classification(), None)])
def test_data_without_targets_is_refused(metric, task, labels):
    model = array_model(lambda p, x: x @ p["w"], {"w": W}, task, (3,))
    message = f"metric {metric.name} compares outputs with targets, which rows does not have for task {task.name}: give"
    with pytest.raises(MpqError, match=message):
        run(metric, model, Shifted(model), array_data(X, labels))


@pytest.mark.parametrize(
    "metric", [MeasuredLoss(), EmpiricalFisher(), HessianForm(), TopEigenvalue()], ids=lambda metric: metric.name
)
def test_a_label_that_is_no_class_is_refused(metric):
    model = array_model(lambda p, x: x @ p["w"], {"w": W}, Classification(), (3,))
    with pytest.raises(MpqError, match="rows has labels from 0 to 2: the model has the 2 classes 0 to 1"):
        run(metric, model, Shifted(model), array_data(X, np.arange(9, dtype=np.int32) % 3))


@pytest.mark.parametrize(
    ("metric", "passes"),
    [(MeasuredLoss(), 1), (GaussNewton(), 0), (HessianForm(), 0)],
    ids=lambda x: getattr(x, "name", x),
)
def test_runs_the_model_once_a_batch_and_candidate_that_differs(metric, passes):
    runs = []

    def apply(p, x):
        jax.debug.callback(lambda: runs.append(1))
        return forward(p, x)

    model = make_model(apply)
    table = run(metric, model, Shifted(model), random_data(10))
    jax.effects_barrier()
    assert len(runs) == 3 * (passes + 2 * len(SHAPES))  # batches times: the original, and two schemes of three
    want = run(metric, make_model(), Shifted(model), random_data(10))
    np.testing.assert_allclose(table.loss_increase, want.loss_increase, rtol=1e-5, atol=1e-7)


def test_documents_are_the_unit_of_the_error():
    one, two = (make_data(DATA.inputs, DATA.mask, d) for d in (np.arange(6), np.arange(6) // 2))
    for metric in (MeasuredLoss(), GaussNewton(), HessianForm(), EmpiricalFisher()):
        a, b = (run(metric, make_model(), Shifted(make_model()), data) for data in (one, two))
        np.testing.assert_allclose(a.loss_increase, b.loss_increase, rtol=1e-12)
        assert (a.stderr[:, :2] != b.stderr[:, :2]).all()
