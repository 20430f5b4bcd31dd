"""Laws of every task, and of a person's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq.sensitivity.base import random_scores
from mpq.tasks import TASKS, Custom, Regression

SIZES = {"causal_lm": (5, 3, 6), "classification": (5, 6), "embedding": (5, 4), "regression": (5, 2), "custom": (5, 3)}


def huber_like(reference, outputs):
    """A smooth cost whose Hessian at equal outputs is neither diagonal nor the unit matrix."""
    mix = jnp.array([[1.0, 0.5, 0.0], [0.5, 2.0, 0.2], [0.0, 0.2, 0.5]])
    return jnp.sum(jnp.log(jnp.cosh(mix @ (outputs - reference))))


ALL = {**TASKS, "custom": Custom(huber_like)}


@pytest.fixture(params=ALL)
def task(request):
    return ALL[request.param]


def outputs_of(task, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=SIZES[task.name]), jnp.float32)


def test_the_divergence_is_zero_for_equal_outputs_and_positive_else(task):
    p, q = (task.distribution(outputs_of(task, seed)) for seed in (0, 1))
    assert p.dtype == jnp.float32
    assert p.shape == SIZES[task.name]
    np.testing.assert_array_equal(task.divergence(p, p), np.zeros(p.shape[:-1]))
    assert (np.asarray(task.divergence(p, q)) > 0.01).all()


def test_agreement_is_one_for_equal_outputs(task):
    p, q = (task.distribution(outputs_of(task, seed)) for seed in (0, 1))
    np.testing.assert_allclose(task.agreement(p, p), np.ones(p.shape[:-1]), rtol=1e-6)
    assert np.asarray(task.agreement(p, q)).mean() < 0.9


def test_scores_have_the_second_moment_of_the_fisher_matrix(task):
    """E[s s^T] is the Hessian of the divergence at equal outputs, computed here by autodiff."""
    z = outputs_of(task).reshape(-1, SIZES[task.name][-1])[:1]
    fisher = jax.hessian(lambda y: task.divergence(task.distribution(z), task.distribution(y))[0])(z)[0, :, 0]
    draws = 20_000
    same = jnp.repeat(z, draws, axis=0)
    s = np.asarray(random_scores(task, same, jnp.arange(draws), jax.random.key(0)), np.float64)
    products = s[:, :, None] * s[:, None, :]
    error = products.std(axis=0, ddof=1) / np.sqrt(draws)
    assert (np.abs(products.mean(axis=0) - fisher) <= 5 * error + 1e-6).all()  # 5 standard errors, float32 rounding
    assert (np.abs(s.mean(axis=0)) <= 5 * s.std(axis=0) / np.sqrt(draws) + 1e-6).all()


def test_the_root_of_the_fisher_matrix_squares_to_it(task):
    """S applied to the unit vectors is S itself, and S S^T the Hessian of the divergence at equal outputs."""
    z, d = outputs_of(task).reshape(-1, SIZES[task.name][-1]), SIZES[task.name][-1]
    root = np.stack([task.fisher_root(z, jnp.broadcast_to(unit, z.shape)) for unit in jnp.eye(d)], axis=-1)
    divergence = lambda y, reference: task.divergence(task.distribution(reference), task.distribution(y))
    fisher = jax.vmap(jax.hessian(divergence), (0, 0))(z, z)
    # float32: eigenvalues and second derivatives of order 1 to 20 carry 1e-6 of themselves
    np.testing.assert_allclose(root @ root.swapaxes(-1, -2), fisher, rtol=1e-5, atol=2e-5)


def test_scores_of_different_outputs_are_drawn_independently(task):
    z = jnp.repeat(outputs_of(task)[:1], 40, axis=0)
    s = np.asarray(random_scores(task, z, jnp.arange(40), jax.random.key(1)))
    assert len(np.unique(s.reshape(40, -1), axis=0)) > 2
    again = random_scores(task, z[5:9], jnp.arange(5, 9), jax.random.key(1))
    np.testing.assert_array_equal(s[5:9], again)  # a window's draw is its own, whatever batch it is in


def test_padding_never_counts(task):
    time = SIZES[task.name][1]
    mask = np.arange(time) < np.array([time, 2, 0])[:, None]
    counted = np.asarray(task.counted(mask))
    if task.name == "causal_lm":
        assert counted.sum(axis=1).tolist() == [time - 1, 1, 0]
    else:
        assert counted.tolist() == [True, True, False]
        assert np.asarray(task.counted(np.array([True, False]))).tolist() == [True, False]


def test_the_loss_is_smallest_in_expectation_at_the_truth(task):
    """For a proper loss the derivative of E_y[loss] vanishes where y is drawn; its gradient is what `score` draws."""
    if task.name in ("embedding", "custom"):
        pytest.skip("its loss is the divergence, which the tests above hold")
    z = outputs_of(task).reshape(-1, SIZES[task.name][-1])[:1]
    if task.name == "regression":
        targets = z + 0.3
        want = (np.asarray(z) - np.asarray(targets)) / Regression().variance
    else:
        targets = jnp.array([2])
        want = np.asarray(jax.nn.softmax(z)) - np.eye(z.shape[-1])[2]
    gradient = jax.grad(lambda y: task.loss(task.distribution(y), targets).sum())(z)
    np.testing.assert_allclose(gradient, want, atol=1e-6)


def test_quality_is_nan_without_labels(task):
    if task.name == "causal_lm":
        pytest.skip("text labels itself")
    q = task.distribution(outputs_of(task))
    evidence = np.asarray(task.evidence(q, task.targets(None, None)), np.float64)
    evidence = evidence if evidence.ndim == 1 else evidence[:, 0]
    assert np.isnan(task.quality(evidence, np.ones(len(evidence)), None).value)
