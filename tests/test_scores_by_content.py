"""What a new scheme, a changed weight or another metric costs: measurements are counted, and bits compared."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from mpq.sensitivity import (
    SNR,
    AumannShapley,
    DeltaLoss,
    Fisher,
    HessianTrace,
    Imatrix,
    LayerError,
    MeasuredKL,
    MemoryStore,
    TopEigenvalue,
    WeightMSE,
)
from mpq.tasks import CausalLM
from mpq.tasks.categorical import divergence
from tests.sensitivity_cases import EXACT, LARGE, SCHEMES, SHAPES, SMALL, Shifted, make_model, random_data, run

DATA = random_data(10)  # three batches of four


class Counted(MemoryStore):
    """Counts by item what had to be computed."""

    def __init__(self):
        super().__init__()
        self.made = []

    def put(self, key, value):
        super().put(key, value)
        self.made.append(key)

    def new(self):
        """How many items of each kind since the last call."""
        kinds = [key.split('"item": "')[1].split('"')[0].split("(")[0] for key in self.made]
        self.made = []
        return {kind: kinds.count(kind) for kind in kinds}


def score(metric, store, schemes=SCHEMES, model=None):
    model = model or make_model()
    return run(metric, model, Shifted(model), DATA, schemes=schemes, store=store)


def assert_equal(got, want):
    np.testing.assert_array_equal(got.loss_increase, want.loss_increase)
    np.testing.assert_array_equal(got.stderr, want.stderr)


@pytest.mark.parametrize(
    ("metric", "new"),
    [
        (MeasuredKL(), {"kl": len(SHAPES)}),
        (AumannShapley(num_nodes=2), {"aumann_shapley": 2}),
        (DeltaLoss(), {"delta_loss": 1, "anchor": 1}),  # the median scheme is another one
        (HessianTrace(num_probes=3), {}),
        (TopEigenvalue(num_iterations=2), {}),
        (WeightMSE(), {"squared_error": len(SHAPES), "anchor": 1}),
        (LayerError(), {"layer_error": len(SHAPES), "anchor": 1}),
        (Fisher(num_samples=1), {"fisher": 3}),  # one pass over the three batches, as the scheme alone would cost
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_new_scheme_costs_only_its_own_passes(metric, new):
    store = Counted()
    score(metric, store, (SMALL, EXACT))
    assert store.new()
    table = score(metric, store, (SMALL, LARGE, EXACT))
    assert store.new() == new
    assert_equal(table, score(metric, None, (SMALL, LARGE, EXACT)))
    score(metric, store, (SMALL, LARGE, EXACT))
    score(metric, store, (SMALL, EXACT))
    assert store.new() == {}


def test_proxies_share_the_measured_plan_and_the_squared_errors():
    store = Counted()
    score(WeightMSE(), store)
    assert store.new() == {"squared_error": len(SHAPES) * len(SCHEMES), "anchor": 1}
    for metric, new in ((SNR(), {}), (Imatrix(), {"imatrix": len(SHAPES) * len(SCHEMES)})):
        assert_equal(score(metric, store), score(metric, None))
        assert store.new() == new


@pytest.mark.parametrize(
    ("metric", "changed", "weights"),
    [
        (WeightMSE(), "up", 1),
        (LayerError(), "down", 2),  # its own weight, and the table, whose gram is of the head that reads what it writes
        (LayerError(), "up", 3),
        (MeasuredKL(), "up", len(SHAPES)),  # the loss of every candidate is one of the whole model
    ],
    ids=["weight_mse", "layer_error-down", "layer_error-up", "kl"],
)
def test_a_changed_weight_costs_the_scores_that_depend_on_it(metric, changed, weights):
    store, model = Counted(), make_model()
    score(metric, store)
    store.new()
    params = {**model.params, changed: model.params[changed].at[0, 0].add(jnp.float32(0.25))}
    other = dataclasses.replace(model, params=params)
    table = score(metric, store, model=other)
    new = store.new()
    assert new.pop("anchor", 1) == 1
    assert list(new.values()) == [weights * len(SCHEMES)]
    assert_equal(table, score(metric, None, model=other))


def test_a_changed_candidate_costs_only_its_own_measurements():
    @dataclasses.dataclass(frozen=True)
    class Requantized(Shifted):
        """`up` is rounded otherwise, as after a calibration on other data."""

        def error(self, path, scheme):
            return super().error(path, scheme) * (1.5 if path == "up" else 1.0)

    store, model = Counted(), make_model()
    score(MeasuredKL(), store)
    store.new()
    table = run(MeasuredKL(), model, Requantized(model), DATA, store=store)
    assert store.new() == {"kl": 2}  # the exact candidate is the same
    assert_equal(table, run(MeasuredKL(), model, Requantized(model), DATA))


@dataclasses.dataclass(frozen=True)
class Twice(CausalLM):
    """Every divergence counts twice."""

    def divergence(self, p, q):
        return 2 * divergence(p, q)


@pytest.mark.parametrize("what", ["function", "task"])
def test_the_model_s_function_and_task_count_where_its_parameters_do_not(what):
    store, model = Counted(), make_model()
    score(MeasuredKL(), store)
    every = store.new()
    changed = {"function": {"apply": lambda p, x: 2.0 * model.apply(p, x)}, "task": {"task": Twice()}}[what]
    score(MeasuredKL(), store, model=dataclasses.replace(model, **changed))
    assert store.new() == every
