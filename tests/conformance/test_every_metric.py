"""Every metric in METRICS keeps the laws of its kind, on a tiny Llama with a tied embedding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mpq.data.dataset import new_dataset
from mpq.formats import parse_scheme
from mpq.inputs import Dataset, Tokens
from mpq.models.llama import Llama, LlamaConfig
from mpq.models.model import Model, functional
from mpq.quantize import RTN, Candidates
from mpq.sensitivity import METRICS, Coupling, MemoryStore
from mpq.tasks import CausalLM
from mpq.types import MpqError

CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=16,
    tie_word_embeddings=True,
)
SCHEMES = tuple(map(parse_scheme, ("int3_g8", "fp32", "int4_channel")))
EXACT = 1
TIME, BATCH = 8, 4


class Counting:
    """A model's function that counts how often it is traced."""

    def __init__(self, apply):
        self.apply, self.traces = apply, 0

    def __call__(self, params, tokens):
        self.traces += 1
        return self.apply(params, tokens)


@pytest.fixture(scope="module")
def model():
    apply, params = functional(Llama(CONFIG, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    scaled = {
        n: jnp.asarray(rng.normal(size=p.shape) / 4, jnp.float32) if p.ndim == 2 else p for n, p in params.items()
    }
    return Model(
        apply=Counting(apply),
        params=scaled,
        stored=dict.fromkeys(scaled, "float32"),
        name="tiny",
        inputs=Tokens(16),
        task=CausalLM(),
    )


@pytest.fixture(scope="module")
def traced(model):
    return model.trace(BATCH, TIME)


@pytest.fixture(scope="module")
def candidates(model, traced):
    return Candidates(model.params, traced.weights, RTN())


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(1)
    inputs = rng.integers(CONFIG.vocab_size, size=(10, TIME)).astype(np.int32)
    mask = np.arange(TIME) < rng.integers(3, TIME + 1, size=10)[:, None]
    return Dataset(inputs, mask, (np.arange(10) // 2).astype(np.int32), "noise", "digest")


@pytest.fixture(scope="module", params=METRICS.values(), ids=METRICS.keys())
def metric(request):
    return request.param


@pytest.fixture(scope="module")
def run(metric, model, traced, candidates, data):
    """Calls the metric; keywords replace the usual arguments."""

    def call(**changes):
        given = {"model": model, "traced": traced, "schemes": SCHEMES, "candidates": candidates, "data": data}
        options = {"key": jax.random.key(5), "batch_size": BATCH, "store": None}
        given |= {k: v for k, v in changes.items() if k in given}
        options |= {k: v for k, v in changes.items() if k in options}
        return changes.get("metric", metric)(*given.values(), **options)

    return call


@pytest.fixture(scope="module")
def table(run, model):
    """The usual table, and how often the model's function was traced for it."""
    before = model.apply.traces
    result = run()
    return result, model.apply.traces - before


@pytest.fixture(scope="module")
def items(run):
    """What the usual run leaves in a store."""
    store = MemoryStore()
    run(store=store)
    return store.values


class TestEveryMetric:
    def test_is_registered_under_its_name(self, metric):
        assert METRICS[metric.name] is metric

    def test_fills_the_table(self, table, metric, model, traced, data):
        result, _ = table
        assert result.weights == traced.weights
        assert result.schemes == SCHEMES
        assert result.loss_increase.shape == result.stderr.shape == (len(traced.weights), len(SCHEMES))
        assert result.loss_increase.dtype == result.stderr.dtype == np.float64
        assert np.isfinite(result.loss_increase).all()
        assert np.isfinite(result.stderr).all()
        assert (result.stderr >= 0).all()
        assert result.metric.startswith(metric.name)
        assert (result.quantizer, result.model_digest, result.data_digest) == ("rtn", model.digest, data.digest)

    def test_an_exact_candidate_costs_nothing_for_certain_and_others_cost_something(self, table):
        result, _ = table
        exact = np.arange(len(SCHEMES)) == EXACT
        assert (result.loss_increase[:, exact] == 0).all()
        assert (result.stderr[:, exact] == 0).all()
        assert (result.loss_increase[:, ~exact] != 0).all()
        assert (result.stderr[:, ~exact] > 0).all()

    def test_one_trace_of_the_model_serves_every_candidate(self, table, traced):
        _, traces = table
        assert len(traced.weights) * (len(SCHEMES) - 1) > 20
        assert traces <= 2  # a forward function, and at most its derivative

    def test_the_same_key_gives_the_same_bits(self, table, run):
        again = run()
        np.testing.assert_array_equal(again.loss_increase, table[0].loss_increase)
        np.testing.assert_array_equal(again.stderr, table[0].stderr)

    def test_does_not_depend_on_the_batch_size(self, table, run):
        other = run(batch_size=3)  # 10 windows: the last batch is filled up by two
        self.assert_equal_up_to_rounding(other, table[0])

    def test_padding_never_counts(self, table, run, data):
        poisoned = np.where(data.mask, data.inputs, 31 - data.inputs)
        other = run(data=dataclasses.replace(data, inputs=poisoned))
        self.assert_equal_up_to_rounding(other, table[0])

    def test_an_entry_depends_on_its_own_candidate_and_what_the_coupling_says(self, table, run, metric, traced):
        # What an entry depends on stays whole, in another order; everything else loses a part.
        weights = traced.weights[:: -1 if Coupling.COLUMN in metric.coupling else -2]
        columns = [2, 1, 0] if Coupling.ROW in metric.coupling else [2, 1]
        other = run(traced=dataclasses.replace(traced, weights=weights), schemes=tuple(SCHEMES[c] for c in columns))
        rows = [traced.weights.index(w) for w in weights]
        take = lambda a: a[np.ix_(rows, columns)]
        result = table[0]
        picked = dataclasses.replace(result, loss_increase=take(result.loss_increase), stderr=take(result.stderr))
        if Coupling.FACTOR in metric.coupling:  # another plan was measured: same scores, another unit
            self.assert_equal_up_to_rounding(self.in_units_of_the_sum(other), self.in_units_of_the_sum(picked))
        elif "probes" in result.metric:  # fewer weights probed at once: fewer cross terms, hence other noise
            difference = np.abs(other.loss_increase - picked.loss_increase)
            assert (difference <= 5 * np.hypot(other.stderr, picked.stderr)).all()
        else:
            self.assert_equal_up_to_rounding(other, picked)

    def test_finished_items_are_not_computed_again(self, table, run, items):
        class Closed(MemoryStore):
            def put(self, key, value):
                raise AssertionError(f"{key} was computed again")

        closed = Closed()
        closed.values = items
        again = run(store=closed)
        np.testing.assert_array_equal(again.loss_increase, table[0].loss_increase)
        np.testing.assert_array_equal(again.stderr, table[0].stderr)

    @pytest.mark.parametrize("what", ["model", "data", "key", "batch_size", "candidates", "traced", "metric"])
    def test_what_a_store_holds_is_what_would_be_computed(self, run, items, metric, model, traced, data, what):
        """With another input, either an item is asked for that the usual run did not leave, or it changes none."""

        class Asked(BaseException):
            pass

        class Usual:
            def get(self, key):
                if key not in items:
                    raise Asked
                return items[key]

        name = "layers.0.mlp.up_proj.kernel"
        options = {field.name: getattr(metric, field.name) for field in dataclasses.fields(metric)}
        options = {k: not v if isinstance(v, bool) else 2 * v for k, v in options.items()}
        other = {
            "model": lambda: dataclasses.replace(model, params=model.params | {name: model.params[name] * 1.5}),
            "data": lambda: new_dataset(data.inputs[:, ::-1].copy(), data.mask, data.document, "noise"),
            "key": lambda: jax.random.key(6),
            "batch_size": lambda: 3,
            "candidates": lambda: Candidates(model.params, traced.weights, RTN(scale="mse")),
            "traced": lambda: dataclasses.replace(traced, weights=traced.weights[::-2]),
            "metric": lambda: dataclasses.replace(metric, **options),
        }
        changed = {what: other[what]()}
        try:
            found = run(store=Usual(), **changed)
        except Asked:
            return
        made = run(**changed)
        np.testing.assert_array_equal(found.loss_increase, made.loss_increase)
        np.testing.assert_array_equal(found.stderr, made.stderr)

    def test_a_weight_that_is_not_finite_is_named(self, run, model):
        name = "layers.1.mlp.up_proj.kernel"
        broken = {**model.params, name: model.params[name].at[3, 2].set(jnp.nan)}
        with pytest.raises(MpqError, match=f"weight {name} holds NaN or infinity"):
            run(model=dataclasses.replace(model, params=broken))

    def test_data_without_a_predicted_token_is_refused(self, run, data):
        with pytest.raises(MpqError, match="noise has no token that counts"):
            run(data=dataclasses.replace(data, mask=np.zeros_like(data.mask)))

    @staticmethod
    def in_units_of_the_sum(table):
        """Losses over their sum, after a check that all entries share one relative error: that of the unit."""
        relative = table.stderr[table.loss_increase > 0] / table.loss_increase[table.loss_increase > 0]
        np.testing.assert_allclose(relative, relative[0], rtol=1e-9)  # float64 on the host
        loss = table.loss_increase / table.loss_increase.sum()
        return dataclasses.replace(table, loss_increase=loss, stderr=np.zeros_like(loss))

    @staticmethod
    def assert_equal_up_to_rounding(got, want):
        """float32 matmuls of other shapes sum in another order: 1e-6 of logits of order 1 that KL weighs at first
        order."""
        np.testing.assert_allclose(got.loss_increase, want.loss_increase, rtol=2e-4, atol=1e-7)
        np.testing.assert_allclose(got.stderr, want.stderr, rtol=2e-3, atol=1e-7)
