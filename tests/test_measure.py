"""Measured plans: equal to an evaluation, measured once, resumed, and refused when they are not finite."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from mpq.evaluate import Reference, score
from mpq.formats import parse_scheme
from mpq.measure import PlanLoss
from mpq.quantize import RTN, Candidates, apply_plan
from mpq.sensitivity import MemoryStore
from mpq.types import MpqError
from tests import tiny

SCHEMES = tuple(map(parse_scheme, ("int2_g16", "int4_g16", "fp32")))


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    model, data = tiny.loaded(tmp_path_factory.mktemp("measure") / "model", max_windows=10)
    traced = model.trace(4, 16)
    return model, data, traced, Candidates(model.params, traced.weights, RTN())


def plan(traced, seed):
    picks = np.random.default_rng(seed).integers(len(SCHEMES), size=len(traced.weights))
    return {spec.path: SCHEMES[pick] for spec, pick in zip(traced.weights, picks, strict=True)}


def test_a_plan_s_loss_is_that_of_its_evaluation(setup):
    model, data, traced, candidates = setup
    loss = PlanLoss(model, traced, candidates, Reference(model, data, 4))
    for seed in range(3):
        choice = plan(traced, seed)
        params = apply_plan(model.params, traced.weights, candidates.choose(choice))
        scores = score(model, params, data, reference=model.params, batch_size=4)
        np.testing.assert_allclose(loss.documents(choice), scores.kl, rtol=1e-5, atol=1e-7)  # the same float32 sums
        np.testing.assert_array_equal(loss.counts, scores.counts)
        assert loss(choice) == pytest.approx(scores.summary().kl, rel=1e-5)
    assert loss(dict.fromkeys(choice, SCHEMES[-1])) == pytest.approx(0, abs=1e-6)


def test_a_plan_is_measured_once_also_after_an_interrupt(setup):
    model, data, traced, candidates = setup
    store, calls = MemoryStore(), []

    def apply(params, inputs):
        calls.append(1)
        return model.apply(params, inputs)

    counting = dataclasses.replace(model, apply=apply)
    first = PlanLoss(counting, traced, candidates, Reference(counting, data, 4), store)(plan(traced, 0))
    traces = len(calls)
    again = PlanLoss(counting, traced, candidates, Reference(counting, data, 4), store)
    assert again(plan(traced, 0)) == first
    again(plan(traced, 1))
    assert len(store.values) == 2
    assert len(calls) == traces <= 3  # sizes of the outputs, the reference and every plan: each traced once


def test_outputs_that_are_not_finite_are_refused(setup):
    model, data, traced, candidates = setup
    broken = dataclasses.replace(model, apply=lambda p, x: model.apply(p, x) / (p[traced.weights[0].param].max() * 0))
    reference = dataclasses.replace(Reference(model, data, 4), model=broken)
    object.__setattr__(reference, "_kept", list(Reference(model, data, 4).batches()))
    loss = PlanLoss(broken, traced, candidates, reference)
    with pytest.raises(MpqError, match="a plan of int2_g16 makes the model's outputs NaN or infinite"):
        loss({spec.path: SCHEMES[0] for spec in traced.weights})


def test_a_weight_that_is_not_finite_is_named(setup):
    model, data, traced, candidates = setup
    spec = traced.weights[1]
    params = model.params | {spec.param: model.params[spec.param] * jnp.nan}
    with pytest.raises(MpqError, match=f"weight {spec.path} holds NaN or infinity"):
        PlanLoss(dataclasses.replace(model, params=params), traced, candidates, Reference(model, data, 4))
