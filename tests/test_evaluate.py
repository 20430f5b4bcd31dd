import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq.estimate import mean_over_documents, paired_difference, sums_over_documents
from mpq.evaluate import Reference, score
from mpq.inputs import Dataset, Tokens
from mpq.models.model import Model
from mpq.tasks import CausalLM
from mpq.types import MpqError

VOCAB, PAD = 11, 10


def make_model(params, apply=None):
    return Model(
        apply=apply or (lambda p, x: jnp.tanh(p["embed"][x]) @ p["head"]),
        params=params,
        stored=dict.fromkeys(params, "float32"),
        name="bigram",
        inputs=Tokens(64),
        task=CausalLM(),
    )


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "embed": jnp.asarray(rng.normal(size=(VOCAB, 6)), jnp.float32),
        "head": jnp.asarray(rng.normal(size=(6, VOCAB)), jnp.float32),
    }


def make_data(windows=7, time=9, seed=0):
    """Windows of three documents out of order, some shorter than the window."""
    rng = np.random.default_rng(seed)
    inputs = rng.integers(PAD, size=(windows, time)).astype(np.int32)
    length = rng.integers(2, time + 1, size=windows)
    mask = np.arange(time) < length[:, None]
    document = rng.integers(3, size=windows).astype(np.int32)
    document[:3] = [2, 0, 1]
    inputs[~mask] = PAD
    return Dataset(inputs, mask, document, "noise", hashlib.sha256(inputs.tobytes()).hexdigest())


def oracle(params, reference, data):
    """Per document: tokens, nll, KL, agreement; position by position in float64."""

    def log_softmax(p, token):
        z = np.tanh(np.asarray(p["embed"], np.float64)[token]) @ np.asarray(p["head"], np.float64)
        return z - np.log(np.sum(np.exp(z)))

    sums = np.zeros((3, 4))
    for window, mask, document in zip(data.inputs, data.mask, data.document, strict=True):
        for t in range(len(window) - 1):
            if mask[t + 1]:
                q, p = log_softmax(params, window[t]), log_softmax(reference, window[t])
                sums[document] += [1, -q[window[t + 1]], np.sum(np.exp(p) * (p - q)), p.argmax() == q.argmax()]
    return sums


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10])
def test_scores_equal_a_loop_over_positions(batch_size):
    params, reference, data = make_params(0), make_params(1), make_data()
    scores = score(make_model(params), params, data, reference=reference, batch_size=batch_size)
    want = oracle(params, reference, data)
    np.testing.assert_array_equal(scores.document, [0, 1, 2])
    np.testing.assert_array_equal(scores.counts, want[:, 0])
    # float32 logits of order 5 carry 5 * 6e-8 each, and a document sums up to 30 positions
    np.testing.assert_allclose(np.stack([scores.nll, scores.kl], 1), want[:, 1:3], atol=30 * 5 * 6e-8 * 4)
    np.testing.assert_array_equal(scores.agree, want[:, 3])


def test_padding_has_no_influence_even_if_the_model_gives_nan_there():
    params, reference, data = make_params(0), make_params(1), make_data()
    want = score(make_model(params), params, data, reference=reference, batch_size=4)
    poison = {**params, "embed": params["embed"].at[PAD].set(jnp.nan)}
    got = score(make_model(params), poison, data, reference=reference, batch_size=4)
    for name in ("counts", "nll", "kl", "agree"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))


def test_a_model_equals_itself():
    params, data = make_params(), make_data()
    scores = score(make_model(params), params, data, reference=params, batch_size=4)
    np.testing.assert_array_equal(scores.kl, 0.0)
    np.testing.assert_array_equal(scores.agree, scores.counts)


def test_words_that_both_models_exclude_add_nothing_to_kl():
    params, reference, data = make_params(0), make_params(1), make_data()
    masked = lambda p, x: (jnp.tanh(p["embed"][x]) @ p["head"]).at[..., PAD].set(-jnp.inf)
    short = {name: (p[:, :PAD] if name == "head" else p) for name, p in params.items()}
    short_reference = {name: (p[:, :PAD] if name == "head" else p) for name, p in reference.items()}
    got = score(make_model(params, masked), params, data, reference=reference, batch_size=4)
    want = score(make_model(short), short, data, reference=short_reference, batch_size=4)
    np.testing.assert_allclose(got.kl, want.kl, rtol=1e-5)  # the same sums over 10 words, in another order


def test_summary_is_the_ratio_estimate_of_the_sums():
    params, data = make_params(0), make_data()
    scores = score(make_model(params), params, data, reference=make_params(1), batch_size=4)
    result = scores.summary()
    assert (result.nll, result.nll_stderr) == tuple(map(float, mean_over_documents(scores.nll, scores.counts)))
    assert (result.kl, result.kl_stderr) == tuple(map(float, mean_over_documents(scores.kl, scores.counts)))
    assert result.quality == pytest.approx(np.exp(result.nll))
    assert result.quality_stderr == pytest.approx(result.quality * result.nll_stderr)
    assert result.agreement == pytest.approx(scores.agree.sum() / scores.counts.sum())
    assert (result.num_documents, result.num_outputs) == (3, data.mask[:, 1:].sum())
    plain = score(make_model(params), params, data, batch_size=4).summary()
    assert plain.kl is plain.kl_stderr is plain.agreement is plain.agreement_stderr is None
    assert plain.nll == pytest.approx(result.nll, rel=1e-6)


@pytest.mark.parametrize("keep_bytes", [1 << 30, 0])
def test_a_reference_serves_a_series_and_everything_compiles_once(keep_bytes, caplog):
    runs = []

    def apply(p, x):
        jax.debug.callback(lambda: runs.append(1))
        return jnp.tanh(p["embed"][x]) @ p["head"]

    params, data = make_params(0), make_data()
    model = make_model(params, apply)
    reference = Reference(model, data, 4, keep_bytes=keep_bytes)
    assert reference.nbytes == 2 * 4 * data.inputs.shape[1] * VOCAB * 4
    with jax.log_compiles():
        results = [score(model, make_params(i), data, reference=reference, batch_size=0) for i in range(1, 5)]
    compiled = [r.message for r in caplog.records if r.message.startswith("Finished XLA compilation of jit(")]
    assert sum("jit(distributions)" in m for m in compiled) == 1
    assert sum("jit(_row_sums)" in m for m in compiled) == 1
    jax.effects_barrier()
    assert len(runs) == 2 * 4 + (2 if keep_bytes else 2 * 4)  # batches: models, and the reference once or each time
    for i, result in enumerate(results, start=1):
        want = oracle(make_params(i), params, data)
        np.testing.assert_allclose(result.kl, want[:, 2], atol=30 * 5 * 6e-8 * 4)  # as above


def test_difference_is_paired_by_document():
    data, reference = make_data(40), make_params(1)
    a, b = (score(make_model(p), p, data, reference=reference, batch_size=8) for p in (make_params(0), make_params(2)))
    mean, stderr = a.difference(b)
    assert mean == pytest.approx(a.summary().kl - b.summary().kl)
    assert stderr == pytest.approx(float(paired_difference(a.kl, b.kl, a.counts)[1]))
    assert a.difference(a, "nll") == (0.0, 0.0)


def test_difference_refuses_what_cannot_be_paired():
    params, data = make_params(), make_data()
    a = score(make_model(params), params, data, batch_size=4)
    with pytest.raises(MpqError, match="cannot be paired"):
        a.difference(score(make_model(params), params, make_data(seed=1), batch_size=4), "nll")
    with pytest.raises(MpqError, match="no 'kl' in both scores"):
        a.difference(a, "kl")
    with pytest.raises(MpqError, match="no 'counts' in both"):
        a.difference(a, "counts")


def test_bad_weights_and_outputs_are_named():
    params, data = make_params(), make_data()
    bad = {**params, "head": params["head"].at[0, 0].set(jnp.inf)}
    with pytest.raises(MpqError, match="weight head holds NaN or infinity"):
        score(make_model(params), bad, data, batch_size=4)
    overflow = lambda p, x: p["embed"][x] @ p["head"] * 1e38 * 10
    with pytest.raises(MpqError, match="NaN or infinite outputs on noise although its weights are finite"):
        score(make_model(params, overflow), params, data, batch_size=4)


def test_unusable_data_is_refused():
    params, data = make_params(), make_data()
    model = make_model(params)
    nothing = Dataset(data.inputs, np.zeros_like(data.mask), data.document, "padding", "0")
    with pytest.raises(MpqError, match="padding has no token that counts"):
        score(model, params, nothing, batch_size=4)
    with pytest.raises(MpqError, match="the reference was made for"):
        score(model, params, data, reference=Reference(model, make_data(seed=1), 4), batch_size=4)


def test_mean_over_documents_equals_the_textbook_for_documents_of_equal_length():
    sums = np.random.default_rng(0).normal(size=(9, 2))
    mean, stderr = mean_over_documents(sums, np.full(9, 5))
    np.testing.assert_allclose(mean, sums.mean(0) / 5, rtol=1e-12)  # float64
    np.testing.assert_allclose(stderr, sums.std(0, ddof=1) / 5 / 3, rtol=1e-12)


def test_one_document_has_an_unknown_error_and_empty_ones_do_not_exist():
    assert mean_over_documents([6.0], [3])[0] == 2.0
    assert np.isnan(mean_over_documents([6.0], [3])[1])
    assert np.isnan(mean_over_documents([6.0, 0.0], [3, 0])[1])
    assert np.isnan(mean_over_documents(np.zeros((0, 2)), [])).all()
    mean, stderr = mean_over_documents([1.0, np.inf], [2, 2])
    assert np.isinf(mean)
    assert np.isnan(stderr)
    sums, counts = [1.0, 4.0, 2.0], [1, 2, 3]
    assert mean_over_documents([*sums, 0.0], [*counts, 0]) == mean_over_documents(sums, counts)


def test_standard_error_covers():
    """Documents of 20 to 200 tokens whose level varies more than their tokens do: 95 % within two."""
    rng = np.random.default_rng(0)
    trials, documents = 2000, 60
    counts = rng.integers(20, 200, size=(trials, documents))
    level = 1 + 0.3 * rng.normal(size=counts.shape)
    sums = level * counts + rng.normal(size=counts.shape) * np.sqrt(counts)
    z = [(mean - 1) / stderr for mean, stderr in map(mean_over_documents, sums, counts)]
    # binomial error of the share: sqrt(.95 * .05 / 2000) = 0.005; four of them
    assert np.mean(np.abs(z) < 2) == pytest.approx(0.95, abs=0.02)


def test_paired_difference_removes_what_documents_have_in_common():
    rng = np.random.default_rng(0)
    counts = rng.integers(20, 200, size=50)
    common = rng.normal(size=50) * counts
    a, b = common + 0.1 * counts, common + 0.01 * rng.normal(size=50) * counts
    mean, stderr = paired_difference(a, b, counts)
    assert abs(mean - 0.1) < 4 * stderr
    assert stderr < 0.05 * mean_over_documents(a, counts)[1]  # 0.01 against 1 in spread


def test_sums_over_documents_adds_windows_in_any_order():
    sums = sums_over_documents([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]], [7, -3, 7])
    np.testing.assert_array_equal(sums, [[2.0, 20.0], [5.0, 50.0]])
