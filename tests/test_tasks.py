"""Numbers of single tasks against literal formulas, and what `Custom` refuses."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats as scipy_stats

from mpq.evaluate import score
from mpq.inputs import Dataset, Images, Tokens
from mpq.models.model import Model
from mpq.tasks import TASKS, Classification, Custom, Embedding, Regression
from mpq.types import MpqError

RNG = np.random.default_rng(0)


def as_model(apply, params, task, inputs=None):
    return Model(apply, params, dict.fromkeys(params, "float32"), "small", inputs or Tokens(8), task)


def rows(n, d=3):
    return RNG.normal(size=(n, d)).astype(np.float32)


def data_of(inputs, labels=None, document=None):
    document = np.arange(len(inputs), dtype=np.int32) if document is None else document
    return Dataset(inputs, np.ones(len(inputs), bool), document, "rows", "digest", labels)


def linear(params, x):
    return x @ params["w"]


PARAMS = {"w": jnp.asarray(rows(3, 4))}
OTHER = {"w": PARAMS["w"] + 0.1 * jnp.asarray(rows(3, 4))}


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("batch_size", [4, 10])
def test_classification(batch_size):
    x, labels = rows(10), RNG.integers(4, size=10).astype(np.int32)
    scores = score(
        as_model(linear, PARAMS, Classification()), OTHER, data_of(x, labels), reference=PARAMS, batch_size=batch_size
    )
    p, q = (softmax(x.astype(np.float64) @ np.asarray(w["w"], np.float64)) for w in (PARAMS, OTHER))
    result = scores.summary()
    right = q.argmax(-1) == labels
    assert (result.quality_name, result.quality) == ("accuracy", right.mean())
    assert result.quality_stderr == pytest.approx(np.sqrt(right.var(ddof=1) / 10))
    assert result.nll == pytest.approx(-np.log(q[np.arange(10), labels]).mean(), rel=1e-5)  # float32 logits
    assert result.kl == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-3)  # a difference of float32 logits
    assert result.agreement == (p.argmax(-1) == q.argmax(-1)).mean()
    assert (result.num_documents, result.num_outputs) == (10, 10)
    body = result.to_json()
    assert (body["accuracy"], body["top1_agreement"]) == (result.quality, result.agreement)
    assert body["top1_stderr"] == result.agreement_stderr


def test_regression():
    x, labels = rows(12), rows(12, 4)
    task = Regression(variance=0.5)
    result = score(as_model(linear, PARAMS, task), OTHER, data_of(x, labels), reference=PARAMS, batch_size=5).summary()
    z, y = (x.astype(np.float64) @ np.asarray(w["w"], np.float64) for w in (PARAMS, OTHER))
    squared = np.square(y - labels).sum(-1)
    assert result.quality == pytest.approx(squared.mean(), rel=1e-5)
    assert result.nll == pytest.approx(squared.mean() / (2 * 0.5) + 2 * np.log(2 * np.pi * 0.5), rel=1e-5)
    assert result.kl == pytest.approx(np.square(y - z).sum(-1).mean() / (2 * 0.5), rel=1e-4)


def test_embedding_pairs():
    x, human = rows(20), RNG.random(10)
    pairs = np.repeat(np.arange(10), 2).astype(np.int32)
    order = RNG.permutation(20)
    model = as_model(linear, PARAMS, Embedding())
    result = score(model, OTHER, data_of(x, np.repeat(human, 2), pairs), reference=PARAMS, batch_size=7).summary()
    unit = lambda w: (z := x.astype(np.float64) @ np.asarray(w["w"], np.float64)) / np.linalg.norm(z, axis=1)[:, None]
    p, q = unit(PARAMS), unit(OTHER)
    rho = scipy_stats.spearmanr((q[0::2] * q[1::2]).sum(-1), human).statistic
    assert result.quality == pytest.approx(rho)
    assert result.quality_stderr == pytest.approx((1 - rho**2) * np.sqrt((1 + rho**2 / 2) / 7))
    assert (result.nll, result.num_documents, result.num_outputs) == (None, 10, 20)
    assert result.kl == pytest.approx((1 - (p * q).sum(-1)).mean() / 0.05, rel=1e-3)
    assert result.agreement == pytest.approx((p * q).sum(-1).mean(), rel=1e-5)
    shuffled = data_of(x[order], np.repeat(human, 2)[order], pairs[order])
    assert score(model, OTHER, shuffled, batch_size=7).summary().quality == pytest.approx(rho)
    single = score(model, OTHER, data_of(x), reference=PARAMS, batch_size=7).summary()
    assert np.isnan(single.quality)
    assert single.to_json()["spearman"] is None


def test_a_person_s_own_loss_equals_the_built_in_one_of_the_same_formula():
    own = Custom(lambda reference, outputs: jnp.sum(jnp.square(outputs - reference)) / 2, name="squared")
    x, labels = rows(9), rows(9, 4)
    mine, theirs = (
        score(as_model(linear, PARAMS, t), OTHER, data_of(x, labels), reference=PARAMS, batch_size=4).summary()
        for t in (own, Regression())
    )
    assert mine.kl == pytest.approx(theirs.kl, rel=1e-6)
    assert mine.nll == pytest.approx(theirs.nll - 2 * np.log(2 * np.pi), rel=1e-6)
    assert mine.quality == pytest.approx(theirs.quality / 2, rel=1e-6)


def test_what_custom_refuses():
    wide = Custom(lambda reference, outputs: jnp.sum(jnp.square(outputs - reference)))
    with pytest.raises(MpqError, match="outputs of 2000 numbers"):
        wide.fisher_root(jnp.zeros((1, 2000)), jnp.ones((1, 2000)))
    vector = Custom(lambda reference, outputs: outputs - reference)
    with pytest.raises(MpqError, match="a scalar"):
        vector.divergence(jnp.zeros((2, 3)), jnp.zeros((2, 3)))


def test_a_label_that_is_no_class_is_refused():
    model = as_model(linear, PARAMS, Classification(), Images(1, 1))
    labels = np.array([0, 1, 4], np.int32)
    with pytest.raises(MpqError, match="labels from 0 to 4: the model has the 4 classes 0 to 3"):
        score(model, PARAMS, data_of(rows(3), labels), batch_size=3)


def test_tasks_are_listed_by_name():
    assert all(task.name == name for name, task in TASKS.items())
    assert hash(Embedding(0.1)) != hash(Embedding(0.2))
