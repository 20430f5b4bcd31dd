import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from mpq import curvature

CLASSES = 5


@pytest.fixture
def net():
    """A two-layer tanh net in float64, its batch, and the log-likelihood's ingredients."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        weights = {"a": jnp.asarray(rng.normal(size=(4, 3))), "b": jnp.asarray(rng.normal(size=(3, CLASSES)))}
        batch = (jnp.asarray(rng.normal(size=(6, 4))), jnp.asarray(rng.integers(CLASSES, size=6)))
        yield weights, batch


def logits(weights, batch):
    return jnp.tanh(batch[0] @ weights["a"]) @ weights["b"]


def loss(weights, batch):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits(weights, batch)), batch[1][:, None], 1).sum()


def dense(function, weights):
    """The matrix that `function` applies to a flat vector, column by column, and the leaf of every row."""
    flat, unravel = ravel_pytree(weights)
    columns = [ravel_pytree(function(unravel(column)))[0] for column in np.eye(len(flat))]
    leaf = np.concatenate([np.full(w.size, name) for name, w in sorted(weights.items())])
    return np.stack(columns, axis=1), leaf


def finite_difference_hessian(weights, batch, step=1e-4):
    flat, unravel = ravel_pytree(weights)
    gradient = lambda x: np.asarray(ravel_pytree(jax.grad(loss)(unravel(x), batch))[0])
    eye = step * np.eye(len(flat))
    return np.stack([(gradient(flat + e) - gradient(flat - e)) / (2 * step) for e in eye], axis=1)


def test_hvp_equals_differences_of_the_gradient(net):
    weights, batch = net
    got, _ = dense(lambda v: curvature.hvp(loss, weights, batch, v), weights)
    # central differences: step^2 = 1e-8 times third derivatives of order 10, rounding 1e-16 / 1e-4
    np.testing.assert_allclose(got, finite_difference_hessian(weights, batch), atol=1e-6)


def test_ggn_equals_the_fisher_matrix_with_every_label_enumerated(net):
    weights, batch = net
    got, _ = dense(lambda v: curvature.ggn_vp(logits, weights, batch, v), weights)
    p = np.asarray(jax.nn.softmax(logits(weights, batch)))
    want = np.zeros_like(got)
    for t in range(len(p)):
        for label in range(CLASSES):
            one = (batch[0][t : t + 1], jnp.asarray([label]))
            g = np.asarray(ravel_pytree(jax.grad(loss)(weights, one))[0])
            want += p[t, label] * np.outer(g, g)
    np.testing.assert_allclose(got, want, atol=1e-12)  # float64, 30 terms of order 1


def test_ggn_is_positive_semidefinite_where_the_hessian_is_not(net):
    weights, batch = net
    ggn, _ = dense(lambda v: curvature.ggn_vp(logits, weights, batch, v), weights)
    hessian, _ = dense(lambda v: curvature.hvp(loss, weights, batch, v), weights)
    assert np.linalg.eigvalsh(ggn).min() > -1e-12  # float64 rounding of a matrix of order 10
    assert np.linalg.eigvalsh(hessian).min() < -1e-3


def test_trace_samples_average_to_the_trace_of_every_block(net):
    weights, batch = net
    hessian, leaf = dense(lambda v: curvature.hvp(loss, weights, batch, v), weights)
    one = jax.jit(lambda k: curvature.trace_sample(loss, weights, batch, curvature.rademacher_like(k, weights)))
    samples = jax.vmap(one)(jax.random.split(jax.random.key(1), 400))
    for name in weights:
        block, cross = hessian[leaf == name][:, leaf == name], hessian[leaf == name][:, leaf != name]
        variance = 2 * (np.square(block).sum() - np.square(np.diag(block)).sum()) + np.square(cross).sum()
        x = np.asarray(samples[name])
        assert abs(x.mean() - np.trace(block)) < 4 * np.sqrt(variance / len(x))
        # relative error of a variance from 400 samples of a bell-shaped sum: sqrt(2 / 400) = 0.07; four of them
        assert x.var() == pytest.approx(variance, rel=0.28)


def test_trace_sample_is_exact_on_a_separable_quadratic():
    quadratic = lambda w, _: 0.5 * (3.0 * jnp.sum(w["a"] ** 2) + 2.0 * jnp.sum(w["b"] ** 2))
    weights = {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}
    v = curvature.rademacher_like(jax.random.key(0), weights)
    sample = curvature.trace_sample(quadratic, weights, None, v)
    assert (float(sample["a"]), float(sample["b"])) == (18.0, 8.0)


def test_signs_are_signs_and_do_not_depend_on_the_other_leaves():
    key = jax.random.key(3)
    small, large = {"b": jnp.ones((40, 25))}, {"a": jnp.ones(7), "b": jnp.ones((40, 25)), "c": jnp.ones(3)}
    b = np.asarray(curvature.rademacher_like(key, small)["b"])
    np.testing.assert_array_equal(b, curvature.rademacher_like(key, large)["b"])
    assert set(np.unique(b)) == {-1.0, 1.0}
    assert abs(b.mean()) < 4 / np.sqrt(b.size)
    twins = curvature.rademacher_like(key, {"a": jnp.ones(64), "b": jnp.ones(64)})
    assert not np.array_equal(twins["a"], twins["b"])


def test_second_derivative_gives_the_form_of_every_loss(net):
    weights, batch = net
    v = curvature.rademacher_like(jax.random.key(2), weights)
    every = lambda w: jax.vmap(lambda x, y: loss(w, (x[None], y[None])))(*batch)
    got = np.asarray(curvature.second_derivative(every, weights, v))
    assert got.shape == (6,)
    hessian = finite_difference_hessian(weights, batch)
    flat = np.asarray(ravel_pytree(v)[0])
    # the differences of test_hvp, summed with signs over 27 x 27 elements
    assert got.sum() == pytest.approx(flat @ hessian @ flat, abs=1e-5)
    for i in range(6):
        one = tuple(part[i : i + 1] for part in batch)
        assert got[i] == pytest.approx(flat @ finite_difference_hessian(weights, one) @ flat, abs=1e-5)


def test_hutch_plus_plus_is_exact_on_a_matrix_of_low_rank():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        factor = rng.normal(size=(40, 4))
        matrix = jnp.asarray(factor @ np.diag([3.0, -1.0, 2.0, 0.5]) @ factor.T)
        trace, stderr = curvature.hutch_plus_plus(lambda v: matrix @ v, jnp.zeros(40), jax.random.key(0), 5)
        # float64 rounding of sums of order 100, and of the basis of a range of condition 100
        assert float(trace) == pytest.approx(float(jnp.trace(matrix)), abs=1e-9)
        assert float(stderr) < 1e-9


def test_hutch_plus_plus_of_a_hessian_is_unbiased_and_knows_its_error(net):
    weights, batch = net
    hessian, _ = dense(lambda v: curvature.hvp(loss, weights, batch, v), weights)
    one = lambda key: curvature.hutch_plus_plus(lambda v: curvature.hvp(loss, weights, batch, v), weights, key, 6)
    estimate, stderr = (np.asarray(x) for x in jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(4), 100)))
    error = estimate - np.trace(hessian)
    assert abs(error.mean()) < 4 * error.std() / np.sqrt(100)
    # the reported variances average to the true one: a relative error of sqrt(2 / 100) = 0.14
    assert np.square(stderr).mean() == pytest.approx(error.var(), rel=0.5)


def test_hutch_plus_plus_beats_hutchinson_at_equal_products_where_few_eigenvalues_dominate():
    with jax.enable_x64(True):
        basis = np.linalg.qr(np.random.default_rng(1).normal(size=(60, 60)))[0]
        eigenvalues = 1 / np.arange(1, 61.0) ** 2
        matrix = jnp.asarray(basis @ np.diag(eigenvalues) @ basis.T)
        keys = jax.random.split(jax.random.key(0), 60)
        one = lambda key: curvature.hutch_plus_plus(lambda v: matrix @ v, jnp.zeros(60), key, 6)[0]
        ours = jax.jit(jax.vmap(one))(keys)
        form = lambda v: v @ matrix @ v
        signs = jax.vmap(lambda k: jax.random.rademacher(k, (18, 60), jnp.float64))(keys)
        plain = jax.vmap(lambda v: jax.vmap(form)(v).mean())(signs)
        error = lambda x: np.sqrt(np.square(np.asarray(x) - eigenvalues.sum()).mean())
        # Hutchinson: sqrt(2 / 18 * sum of squares, without the diagonal's) is about 0.33. Ours: what is left beyond
        # six directions has squares that sum to 0.002 at best, so sqrt(2 / 6 * 0.002) = 0.03
        assert error(ours) < 0.3 * error(plain)


def test_one_probe_has_an_unknown_error():
    trace, stderr = curvature.hutch_plus_plus(lambda v: 2 * v, jnp.ones(5), jax.random.key(0), 1)
    assert np.isfinite(trace)
    assert np.isnan(stderr)
