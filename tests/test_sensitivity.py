import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq.estimate import mean_over_documents
from mpq.sensitivity import (
    METRICS,
    EmpiricalFisher,
    Fisher,
    GaussNewton,
    HessianForm,
    HessianTrace,
    MeasuredKL,
    MeasuredLoss,
    MemoryStore,
    TopEigenvalue,
)
from mpq.types import MpqError
from tests.sensitivity_cases import (
    EXACT,
    LARGE,
    SCHEMES,
    SHAPES,
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


def exact_fisher(model, data, path, error, spans):
    """1/2 delta^T F delta per predicted token with every label enumerated: Var_p of the logits' derivative, in
    float64."""
    time = data.inputs.shape[1]
    total = 0.0
    with jax.enable_x64(True):
        params, error = double(model.params), {path: jnp.asarray(error, jnp.float64)}
        p = np.asarray(jax.nn.softmax(forward(params, data.inputs)))
        for span in np.array_split(np.arange(time), spans):
            direction = jnp.zeros(data.inputs.shape).at[:, span].set(1.0)
            zero = jnp.zeros(data.inputs.shape)
            a = np.asarray(jax.jvp(lambda c: forward(params, data.inputs, error, c), (zero,), (direction,))[1])
            variance = (p * a**2).sum(-1) - (p * a).sum(-1) ** 2
            total += variance[:, :-1][data.mask[:, 1:]].sum()
    return total / 2 / data.mask[:, 1:].sum()


@pytest.mark.parametrize(("span", "spans"), [(1, 6), (4, 2), (None, 1)])
def test_fisher_is_unbiased_for_every_span(span, spans):
    model = make_model()
    mask = np.arange(6) < np.array([[5]])  # the last position is padding
    one = make_data([[0, 3, 2, 3, 6, 6]], mask)
    # every copy of the window draws its own labels, so the error over documents is the Monte Carlo error
    data = make_data(np.repeat(one.inputs, 900, 0), np.repeat(mask, 900, 0))
    candidates = Shifted(model)
    table = run(Fisher(num_samples=4, span=span), model, candidates, data, batch_size=300)
    for row, spec in enumerate(table.weights):
        want = exact_fisher(model, one, spec.param, candidates.error(spec.param, LARGE), spans)
        loss, stderr = table.loss_increase[row, 1], table.stderr[row, 1]
        assert stderr < 0.06 * want  # strong enough to see a lost 1/2, a missing use, a wrong span
        assert abs(loss - want) < 4 * stderr
    assert {spec.param: spec.kind for spec in table.weights}["table"] == "embedding+matmul"


def test_fisher_is_quadratic_in_the_error():
    model = make_model()
    table = run(Fisher(), model, Shifted(model), random_data(9))
    # same labels, half the error: a quarter, up to float32 rounding of w + delta - w (1e-7 of a weight, 1e-5 of delta)
    np.testing.assert_allclose(table.loss_increase[:, 1], 4 * table.loss_increase[:, 0], rtol=1e-4)
    np.testing.assert_array_equal(table.loss_increase[:, 2], 0.0)
    np.testing.assert_array_equal(table.stderr[:, 2], 0.0)


def test_exact_candidates_alone_need_no_pass():
    runs = []

    def apply(p, x):
        jax.debug.callback(lambda: runs.append(1))
        return forward(p, x)

    model = make_model(apply)
    table = run(Fisher(), model, Shifted(model), random_data(9), schemes=(EXACT,))
    jax.effects_barrier()
    assert runs == []
    np.testing.assert_array_equal((table.loss_increase, table.stderr), 0.0)


def test_fisher_samples_and_windows_extend_the_sequence():
    model, data = make_model(), random_data(8)
    stores = one, two, short = MemoryStore(), MemoryStore(), MemoryStore()
    run(Fisher(num_samples=1), model, Shifted(model), data, store=one)
    run(Fisher(num_samples=2), model, Shifted(model), data, store=two)
    run(Fisher(num_samples=1), model, Shifted(model), make_data(data.inputs[:5], data.mask[:5]), store=short)
    first, both, fewer = (np.concatenate(list(s.values.values()))[..., 1] for s in stores)
    # what the second sample adds is a square: negative somewhere, had it moved the first one
    assert (2 * both - first > -1e-5 * first.max()).all()  # float32 sums in another order
    assert not np.allclose(both, first)
    np.testing.assert_allclose(fewer, first[:5], rtol=1e-5)  # the same labels


def test_fisher_standard_error_covers():
    model, data = make_model(), random_data(2400, seed=3)
    store = MemoryStore()
    table = run(Fisher(num_samples=1), model, Shifted(model), data, schemes=(LARGE,), batch_size=400, store=store)
    squares = np.concatenate(list(store.values.values()))[..., 0] / 2  # [documents, weights]
    tokens = data.mask[:, 1:].sum(1)
    truth, stderr = mean_over_documents(squares, tokens)
    np.testing.assert_array_equal((truth, stderr), (table.loss_increase[:, 0], table.stderr[:, 0]))
    groups = [mean_over_documents(squares[i::60], tokens[i::60]) for i in range(60)]  # 40 documents each
    covered = np.mean([np.abs(mean - truth) < 2 * stderr for mean, stderr in groups])
    # 240 groups and weights; skewed squares cost some of the 95 %: 0.05 of skew and three binomial errors of 0.014
    assert 0.86 < covered <= 0.995


def kl_oracle(model, params, data):
    """KL per document over all tokens, in float64."""
    with jax.enable_x64(True):
        p, q = (np.asarray(jax.nn.log_softmax(forward(double(w), data.inputs))) for w in (model.params, params))
    kl = (np.exp(p) * (p - q)).sum(-1)[:, :-1] * data.mask[:, 1:]
    return kl.sum() / data.mask[:, 1:].sum()


def test_kl_equals_a_float64_evaluation_of_every_candidate():
    model, data = make_model(), random_data(10)
    candidates = Shifted(model)
    table = run(MeasuredKL(), model, candidates, data)
    for row, spec in enumerate(table.weights):
        for column, scheme in enumerate(SCHEMES):
            name = spec.param
            changed = {**model.params, name: model.params[name] + candidates.error(name, scheme)}
            # float32 log-probabilities of order 10 carry 1e-6 each
            assert table.loss_increase[row, column] == pytest.approx(kl_oracle(model, changed, data), abs=5e-6)
    np.testing.assert_array_equal(table.loss_increase[:, 2], 0.0)
    np.testing.assert_array_equal(table.stderr[:, 2], 0.0)
    assert (table.stderr[:, :2] > 0).all()


@pytest.mark.parametrize("keep_bytes", [1 << 30, 0])
def test_kl_compiles_once_and_runs_one_forward_a_candidate(keep_bytes, caplog):
    runs = []

    def apply(p, x):
        jax.debug.callback(lambda: runs.append(1))
        return forward(p, x)

    model, data = make_model(apply=apply), random_data(10)
    candidates = Shifted(model)
    with jax.log_compiles():
        table = run(MeasuredKL(keep_bytes), model, candidates, data)
    jax.effects_barrier()
    compiled = [r.message for r in caplog.records if r.message.startswith("Finished XLA compilation of jit(")]
    assert sum("jit(row_divergence)" in m for m in compiled) == 1
    assert sum("jit(distributions)" in m for m in compiled) == 1
    assert len(runs) == 3 * (1 + 2 * len(SHAPES))  # batches times: the reference, and every candidate that differs
    want = run(MeasuredKL(), make_model(), candidates, data)
    np.testing.assert_array_equal(table.loss_increase, want.loss_increase)
    np.testing.assert_array_equal(table.stderr, want.stderr)


class Interrupting(MemoryStore):
    """Interrupts after `left` items."""

    left = 5

    def put(self, key, value):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        super().put(key, value)


@pytest.mark.parametrize(
    "metric", [MeasuredKL(), Fisher(num_samples=1), HessianTrace(num_probes=8), MeasuredLoss(), EmpiricalFisher()]
)
def test_an_interrupted_metric_continues_and_gives_the_same_bits(metric):
    model, data, store = make_model(), random_data(22), Interrupting()
    want = run(metric, model, Shifted(model), data)
    with pytest.raises(KeyboardInterrupt):
        run(metric, model, Shifted(model), data, store=store)
    before, store.left = dict(store.values), 1000
    assert len(before) == 5
    got = run(metric, model, Shifted(model), data, store=store)
    assert list(store.values)[:5] == list(before)
    assert 1000 - store.left == len(store.values) - 5  # nothing was computed twice
    np.testing.assert_array_equal(got.loss_increase, want.loss_increase)
    np.testing.assert_array_equal(got.stderr, want.stderr)


def dense_traces(model, data):
    """tr of the Hessian of the mean NLL for every parameter, in float64."""
    with jax.enable_x64(True):
        params, inputs = double(model.params), jnp.asarray(data.inputs)

        def loss(p):
            q = jax.nn.log_softmax(forward(p, inputs))[:, :-1]
            nll = -jnp.take_along_axis(q, inputs[:, 1:, None], -1)[..., 0]
            return jnp.where(data.mask[:, 1:], nll, 0.0).sum() / float(data.mask[:, 1:].sum())

        hessian = jax.jit(jax.hessian(loss))(params)
        return {n: float(np.trace(np.asarray(h[n]).reshape(params[n].size, -1))) for n, h in hessian.items()}


def test_hessian_trace_equals_the_dense_hessian():
    model, data = make_model(), random_data(6)
    candidates = Shifted(model)
    table = run(HessianTrace(num_probes=512), model, candidates, data, batch_size=3)
    traces = dense_traces(model, data)
    for row, spec in enumerate(table.weights):
        error = candidates.error(spec.param, LARGE).astype(np.float64)
        want = 0.5 * traces[spec.param] / error.size * np.square(error).sum()
        assert table.stderr[row, 1] < 0.12 * abs(want)  # strong enough to see a lost 1/2
        assert abs(table.loss_increase[row, 1] - want) < 4 * table.stderr[row, 1]


def test_hessian_probes_extend_the_sequence_and_their_error_covers():
    model, data, few, many = make_model(), random_data(4), MemoryStore(), MemoryStore()
    candidates = Shifted(model)
    small = run(HessianTrace(num_probes=16), model, candidates, data, store=few)
    run(HessianTrace(num_probes=800), model, candidates, data, store=many)
    samples = np.array(list(many.values.values()))  # in the order of the probes
    np.testing.assert_array_equal(samples[:16], list(few.values.values()))
    half = np.array([np.square(candidates.error(w.param, LARGE)).mean() / 2 for w in small.weights])
    np.testing.assert_allclose(small.loss_increase[:, 1], samples[:16].mean(0) * half, rtol=1e-4)  # float32 errors
    np.testing.assert_allclose(small.stderr[:, 1], samples[:16].std(0, ddof=1) / 4 * half, rtol=1e-4)
    groups = samples.reshape(50, 16, -1)
    traces = dense_traces(model, data)
    truth = np.array([traces[w.param] for w in small.weights])
    z = (groups.mean(1) - truth) / (groups.std(1, ddof=1) / 4)
    # 95 % of Student's t with 15 degrees of freedom lie within 2.13; 200 values: binomial error 0.015, four of them
    assert np.mean(np.abs(z) < 2.13) == pytest.approx(0.95, abs=0.06)


def test_one_document_has_an_unknown_error():
    model = make_model()
    data = make_data(np.random.default_rng(0).integers(VOCAB, size=(3, 6)), document=[4, 4, 4])
    over_documents = set(METRICS) - {"hessian_trace"}
    for metric in (METRICS[name] for name in sorted(over_documents)):
        table = run(metric, model, Shifted(model), data)
        assert np.isfinite(table.loss_increase).all()
        assert np.isnan(table.stderr[:, :2]).all()
        np.testing.assert_array_equal(table.stderr[:, 2], 0.0)
    assert np.isnan(run(HessianTrace(num_probes=1), model, Shifted(model), data).stderr[:, :2]).all()


FAST = [
    MeasuredKL(),
    Fisher(),
    HessianTrace(num_probes=2),
    MeasuredLoss(),
    EmpiricalFisher(),
    GaussNewton(),
    HessianForm(),
    TopEigenvalue(num_iterations=2),
]


@pytest.mark.parametrize("metric", FAST, ids=lambda metric: metric.name)
def test_a_candidate_that_is_not_finite_is_named(metric):
    model = make_model()
    with pytest.raises(MpqError, match=r"up .*int4_channel"):
        run(metric, model, Broken(model), random_data(4))


def test_a_candidate_that_overflows_is_named():
    model = make_model(apply=lambda p, x: forward(p, x) + 0 * jnp.sum(jnp.square(p["up"])))
    for metric in (MeasuredKL(), MeasuredLoss(), GaussNewton(), HessianForm()):
        with pytest.raises(MpqError, match="weight up stored as int4_channel makes the model's outputs NaN"):
            run(metric, model, Huge(model), random_data(4))
    for metric in (Fisher(), EmpiricalFisher()):
        with pytest.raises(MpqError, match="the loss increase of weight up at int4_channel is"):
            run(metric, model, Huge(model), random_data(4))


@pytest.mark.parametrize("metric", FAST, ids=lambda metric: metric.name)
def test_a_model_whose_outputs_overflow_is_refused(metric):
    model = make_model(apply=lambda p, x: forward(p, x) * 1e38 * 1e2)
    with pytest.raises(MpqError, match=r"NaN or infinite outputs on noise.* although its weights are finite"):
        run(metric, model, Shifted(model), random_data(4))
