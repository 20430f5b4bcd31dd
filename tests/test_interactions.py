"""Sketched interactions against dense float64 computations, and the laws of the matrix that they make."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq.inputs import Arrays, Dataset
from mpq.models.model import Model
from mpq.sensitivity import GaussNewton, Interactions, InteractionTable, MeasuredKL, MemoryStore
from mpq.sensitivity.interactions import shrinkage
from mpq.tasks import Regression
from mpq.types import MpqError
from tests.sensitivity_cases import (
    EXACT,
    LARGE,
    SCHEMES,
    SMALL,
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

DATA = random_data(6)
REAL = DATA.mask[:, 1:]
WEIGHTS, KEY = ("down", "table", "up", "value"), jax.random.key(0)


def order(table):
    return [[spec.param for spec in table.weights].index(name) for name in WEIGHTS]


def whitened(params, error):
    """sqrt(p) (a - p.a) of every output that counts, `float64[windows, time - 1, vocabulary]`, a = J error."""
    with jax.enable_x64(True):
        change = {name: jnp.asarray(error.get(name, 0 * np.asarray(p)), jnp.float64) for name, p in params.items()}
        z, a = jax.jvp(lambda p: forward(p, jnp.asarray(DATA.inputs)), (double(params),), (change,))
        p = jax.nn.softmax(z)
        white = np.asarray(jnp.sqrt(p) * (a - (p * a).sum(axis=-1, keepdims=True)))[:, :-1]
    return white * REAL[..., None]


def dense(model, size=0.1):
    """The whitened moves of LARGE for every weight, in the order of WEIGHTS."""
    candidates = Shifted(model, size)
    return np.stack([whitened(model.params, {name: candidates.error(name, LARGE)}) for name in WEIGHTS])


@pytest.fixture(scope="module")
def many():
    """Interactions with so many probes that they are nearly exact."""
    return run(Interactions(num_probes=2000), make_model(), Shifted(make_model()), DATA)


def test_the_sketch_is_the_projection_of_the_whitened_derivative_on_the_documented_signs():
    table = run(Interactions(num_probes=2), make_model(), Shifted(make_model()), DATA)
    moves = dense(make_model())
    want = np.zeros((4, 6, 2))
    for window, probe in itertools.product(range(6), range(2)):
        key = jax.random.fold_in(jax.random.fold_in(KEY, probe), window)
        signs = np.asarray(jax.random.rademacher(key, (6, 7), jnp.float32), np.float64)[:-1]
        want[:, window, probe] = (moves[:, window] * signs).sum(axis=(1, 2))
    want /= np.sqrt(2 * 2 * REAL.sum())
    # float32 logits of order 10 carry 1e-6; the errors are float32 differences, 1e-6 of themselves
    np.testing.assert_allclose(table.sketch[order(table), 1].reshape(4, 6, 2), want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(table.sketch[order(table), 0], table.sketch[order(table), 1] / 2, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(table.sketch[:, 2], 0.0)


def test_products_of_sketches_are_unbiased(many):
    flat = dense(make_model()).reshape(4, -1)
    exact = flat @ flat.T / (2 * REAL.sum())
    s = many.sketch[order(many), 1].reshape(4, 6, 2000).swapaxes(1, 2)
    products = np.einsum("imw,jmw->ijm", s, s) * 2000
    error = products.std(axis=-1, ddof=1) / np.sqrt(2000)
    assert (np.abs(products.mean(axis=-1) - exact) <= 5 * error).all()
    assert (np.abs(exact) > 10 * error).any(where=~np.eye(4, dtype=bool))  # so that an interaction is told from none


def test_the_matrix_has_the_diagonal_of_the_table_and_the_dense_correlations(many):
    model = make_model()
    gauss_newton = run(GaussNewton(), model, Shifted(model), DATA)
    matrix = dataclasses.replace(many, shrinkage=0.0).matrix(gauss_newton)
    np.testing.assert_array_equal(np.einsum("isis->is", matrix), gauss_newton.loss_increase)
    flat = dense(model).reshape(4, -1)
    exact = flat @ flat.T / (2 * REAL.sum())
    got = matrix[:, 1, :, 1][np.ix_(order(many), order(many))]
    scale = np.sqrt(np.diag(exact)[:, None] * np.diag(exact))
    # a correlation from 6 windows of 2000 probes: (1 - r^2) / sqrt(12000) = 0.009 of one, here five of them; a few
    # windows weigh more than others
    np.testing.assert_allclose(got / scale, exact / scale, atol=0.045)


def test_at_the_scale_of_another_table_only_the_correlations_stay(many):
    model = make_model()
    kl = run(MeasuredKL(), model, Shifted(model), DATA)
    matrix, correlation = many.matrix(kl), many.correlation()
    np.testing.assert_array_equal(np.einsum("isis->is", matrix), kl.loss_increase)
    for i, j in itertools.product(range(4), range(4)):
        want = correlation[i, 0, j, 1] * np.sqrt(kl.loss_increase[i, 0] * kl.loss_increase[j, 1])
        if i != j:
            assert matrix[i, 0, j, 1] == pytest.approx(want, rel=1e-12)
    assert (matrix[:, 2] == 0).all()  # an exact candidate moves nothing
    np.testing.assert_array_equal(matrix, matrix.transpose(2, 3, 0, 1))
    assert np.linalg.eigvalsh(matrix.reshape(12, 12)).min() > -1e-14 * kl.loss_increase.max()


def test_a_prediction_is_the_sum_of_the_matrix_over_the_plan(many):
    model = make_model()
    kl = run(MeasuredKL(), model, Shifted(model), DATA)
    negative = kl.loss_increase.copy()
    negative[1, 0] = -0.01  # an entry below zero counts, and has no interactions
    for table in (kl, dataclasses.replace(kl, loss_increase=negative)):
        matrix = many.matrix(table)
        for columns in itertools.product(range(3), repeat=4):
            plan = {spec.path: SCHEMES[c] for spec, c in zip(table.weights, columns, strict=True)}
            want = matrix[np.arange(4), columns][:, np.arange(4), columns].sum()
            # a square of a sum less the sum of squares: rounding of float64 sums over 12000 numbers
            assert many.predict(table, plan) == pytest.approx(want, rel=1e-9, abs=1e-13)


RNG = np.random.default_rng(0)
X = RNG.normal(size=(9, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def scalar():
    """`x w + tanh(x) v`: of one number the sign squares to 1, and the sketch is exact."""
    params = {n: jnp.asarray(RNG.normal(size=(3, 1)), jnp.float32) for n in ("w", "v")}
    apply = lambda p, x: x @ p["w"] + jnp.tanh(x) @ p["v"]
    model = Model(apply, params, dict.fromkeys(params, "float32"), "scalar", Arrays((3,)), Regression(0.5))
    real = np.arange(9) != 4
    data = Dataset(np.where(real[:, None], X, 1e3), real, np.arange(9, dtype=np.int32) // 2, "rows", "digest")
    return model, data, real


def test_one_number_an_output_is_sketched_exactly_and_whole_plans_with_it(scalar):
    model, data, real = scalar
    table = run(Interactions(num_probes=1), model, Shifted(model), data)
    x = X[real].astype(np.float64)
    feature = {"w": x, "v": np.tanh(x)}
    columns = [(s.param, scheme) for s in table.weights for scheme in SCHEMES]
    a = np.stack([(feature[n] @ Shifted(model).error(n, s) + np.zeros((8, 1)))[:, 0] for n, s in columns])
    exact = a @ a.T / (2 * 0.5 * 8)
    flat = table.sketch.reshape(6, -1)
    np.testing.assert_allclose(flat @ flat.T, exact, rtol=1e-5, atol=1e-7)  # float32 outputs of order 1
    unshrunk = dataclasses.replace(table, shrinkage=0.0)
    gauss_newton = run(GaussNewton(), model, Shifted(model), data)
    np.testing.assert_allclose(unshrunk.matrix(gauss_newton).reshape(6, 6), exact, rtol=1e-5, atol=1e-7)
    both = {spec.path: LARGE for spec in table.weights}
    measured = np.square(a[1] + a[4]).sum() / (2 * 0.5 * 8)  # the divergence of the whole plan: it is quadratic
    assert unshrunk.predict(gauss_newton, both) == pytest.approx(measured, rel=1e-5)
    assert measured != pytest.approx(exact[1, 1] + exact[4, 4], rel=0.05)


def test_neither_batches_nor_padding_nor_more_probes_change_the_sketch():
    model, metric = make_model(), Interactions(num_probes=2)
    table = run(metric, model, Shifted(model), DATA)
    other = make_data(np.where(DATA.mask, DATA.inputs, 6 - DATA.inputs), DATA.mask)
    assert (other.inputs != DATA.inputs).any()
    same = run(metric, model, Shifted(model), other, batch_size=5)
    np.testing.assert_allclose(same.sketch, table.sketch, rtol=1e-4, atol=1e-6)
    assert same.shrinkage == pytest.approx(table.shrinkage, rel=1e-4)
    more = run(Interactions(num_probes=5), model, Shifted(model), DATA)
    first = more.sketch.reshape(4, 3, 6, 5)[..., :2].reshape(4, 3, 12) * np.sqrt(5 / 2)
    np.testing.assert_allclose(first, table.sketch, rtol=1e-4, atol=1e-6)


def test_errors_of_twice_the_size_have_twice_the_sketch_and_the_same_correlations():
    model, metric = make_model(), Interactions(num_probes=2)
    small, large = (run(metric, model, Shifted(model, size), DATA) for size in (0.1, 0.2))
    np.testing.assert_allclose(large.sketch, 2 * small.sketch, rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(large.correlation(), small.correlation(), rtol=1e-3, atol=1e-4)


def test_an_interrupted_run_continues():
    model, metric, store = make_model(), Interactions(num_probes=2), MemoryStore()
    table = run(metric, model, Shifted(model), DATA, store=store)
    assert [json.loads(key)["windows"] for key in store.values] == [[0, 4], [4, 6]]
    first = next(iter(store.values))
    store.values[first] = (2 * np.asarray(store.values[first])).tolist()
    again = run(metric, model, Shifted(model), DATA, store=store).sketch.reshape(4, 3, 6, 2)
    before = table.sketch.reshape(4, 3, 6, 2)
    np.testing.assert_array_equal(again[:, :, :4], 2 * before[:, :, :4])
    np.testing.assert_array_equal(again[:, :, 4:], before[:, :, 4:])


class TestShrinkage:
    def noise(self, documents, common, seed=0):
        rng = np.random.default_rng(seed)
        return rng.normal(size=(documents, 5, 2, 3)) + common * rng.normal(size=(documents, 1, 1, 3))

    def test_equals_the_formula_written_out(self):
        sketch, document = self.noise(7, 0.7), np.array([0, 0, 1, 2, 2, 2, 3])
        sketch = sketch * np.arange(1, 8)[:, None, None, None]  # documents of unequal weight
        flat = sketch.transpose(1, 2, 0, 3).reshape(10, 7, 3)
        variances, squares = 0.0, 0.0
        for i, j in itertools.combinations(range(10), 2):
            if i // 2 == j // 2:
                continue
            x, y = flat[i] / np.linalg.norm(flat[i]), flat[j] / np.linalg.norm(flat[j])
            r = (x * y).sum()
            squares += r**2
            for d in range(4):
                here = document == d
                part = (x[here] * y[here]).sum() - r * ((x[here] ** 2).sum() + (y[here] ** 2).sum()) / 2
                variances += 4 / 3 * part**2
        assert 0.01 < variances / squares < 1
        assert shrinkage(sketch, document, 4) == pytest.approx(variances / squares, rel=1e-12)

    def test_tells_noise_from_signal(self):
        """True correlations of 0 are all shrunk; those of 0.94 of 100 documents are kept."""
        documents = np.arange(100)
        mean = lambda common: np.mean([shrinkage(self.noise(100, common, s), documents, 100) for s in range(10)])
        assert mean(0.0) > 0.85  # a ratio near 1, cut off at 1
        assert mean(4.0) < 0.01

    def test_is_nearly_the_intensity_of_least_squared_error(self):
        documents, estimated, best = np.arange(40), [], []
        for seed in range(20):
            sketch = self.noise(40, 0.4, seed)
            unit = sketch.transpose(1, 2, 0, 3).reshape(10, -1)
            unit /= np.linalg.norm(unit, axis=1, keepdims=True)
            r = (unit @ unit.T)[np.add.outer(np.zeros(10, int), np.arange(10) // 2) != np.arange(10)[:, None] // 2]
            estimated.append(shrinkage(sketch, documents, 40))
            best.append(1 - (r * 0.16 / 1.16).sum() / np.square(r).sum())  # the true correlation is 0.16 / 1.16
        # both are near 0.35; the estimate is a mean over 20 of spread 0.06
        assert np.mean(estimated) == pytest.approx(np.mean(best), abs=0.08)

    def test_a_single_weight_has_nothing_to_shrink(self):
        assert shrinkage(self.noise(5, 1.0)[:, :1], np.arange(5), 5) == 0.0


def test_what_cannot_be_sketched_is_refused(many):
    model, metric = make_model(), Interactions(num_probes=1)
    one = make_data(DATA.inputs, DATA.mask, np.zeros(6, int))
    with pytest.raises(MpqError, match=r"noise has one document with outputs that count: .* so give two or more"):
        run(metric, model, Shifted(model), one)
    with pytest.raises(MpqError, match="weight up holds NaN or infinity when stored as int4_channel"):
        run(metric, model, Broken(model), DATA)
    with pytest.raises(MpqError, match="the loss increase of weight up at int4_channel is inf"):
        run(metric, model, Huge(model), DATA)


def test_other_candidates_are_refused(many):
    model = make_model()
    kl = run(MeasuredKL(), model, Shifted(model), DATA)
    plan = {spec.path: EXACT for spec in kl.weights}
    for other in (
        dataclasses.replace(kl, weights=kl.weights[::-1]),
        dataclasses.replace(kl, schemes=kl.schemes[::-1]),
        dataclasses.replace(kl, quantizer="gptq"),
        dataclasses.replace(kl, model_digest="other"),
    ):
        for use in (many.matrix, lambda table: many.predict(table, plan)):
            with pytest.raises(MpqError, match="the table of kl has other weights, schemes, rounding or model than"):
                use(other)
    for wrong in ({}, {**plan, "up": "int2_channel"}):
        with pytest.raises(MpqError, match=r"the plan gives \w+ \w+, which is none of int8_channel, int4_"):
            many.predict(kl, wrong)


def test_the_smaller_candidate_of_a_weight_has_correlation_one_with_the_larger(many):
    assert isinstance(many, InteractionTable)
    r = dataclasses.replace(many, shrinkage=0.0).correlation()
    columns = [SCHEMES.index(SMALL), SCHEMES.index(LARGE)]
    np.testing.assert_allclose(np.einsum("iaib->iab", r)[:, columns][:, :, columns], 1.0, rtol=1e-6)
