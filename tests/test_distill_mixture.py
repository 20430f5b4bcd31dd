"""Bit widths by gradient: mixtures are what they should be, the plan fits, and it is one of the best there are."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq.allocate import Problem
from mpq.distill import mixture
from mpq.distill.mixture import Mixture, mixed
from mpq.evaluate import Reference, score
from mpq.formats import parse_scheme
from mpq.quantize import RTN, Candidates, apply_plan
from mpq.types import MpqError, SensitivityTable
from tests.activation_cases import make_data, make_model, traced

SCHEMES = tuple(map(parse_scheme, ("int2_channel", "int4_channel")))
SEARCH = Mixture(steps=120, batch_size=12)


@pytest.fixture(scope="module")
def setup():
    model, data = make_model(), make_data(12)
    weights = traced(model).weights
    nothing = np.zeros((len(weights), 2))
    table = SensitivityTable(weights, SCHEMES, nothing, nothing, "none", "rtn", model.digest, data.digest)
    problem = Problem.from_table(table)
    return model, data, problem, Candidates(model.params, weights, RTN())


def members_of(problem, candidates):
    return {
        spec.path: {s: candidates.qtensor(spec, scheme) for s, scheme in enumerate(problem.schemes)}
        for group in problem.members
        for spec in group
    }


def test_a_mixture_is_the_sum_of_its_candidates(setup):
    model, _, problem, candidates = setup
    members = members_of(problem, candidates)
    shares = np.random.default_rng(0).dirichlet((1, 1), size=len(problem.names)).astype(np.float32)
    got = mixed(problem, members, jnp.asarray(shares), model.params)
    for share, group in zip(shares, problem.members, strict=True):
        for spec in group:
            parts = [np.asarray(candidates.dequantized(spec, s), np.float64) for s in SCHEMES]
            want = sum(p * part for p, part in zip(share.astype(np.float64), parts, strict=True))
            np.testing.assert_allclose(spec.read(got), want, rtol=1e-5, atol=1e-6)
    # one candidate alone is the plan's weight
    choice = np.arange(len(problem.names)) % 2
    alone = mixed(problem, members, jnp.asarray(np.eye(2, dtype=np.float32)[choice]), model.params)
    plan = apply_plan(model.params, traced(model).weights, candidates.choose(problem.by_path(choice)))
    for path, param in plan.items():
        np.testing.assert_array_equal(alone[path], param)


def test_the_plan_fits_and_is_among_the_best(setup):
    """Of all 64 plans within the budget, by what they cost when they are measured."""
    model, data, problem, candidates = setup
    reference = Reference(model, data, 12)
    budget = (problem.min_bits + problem.max_bits) // 2
    found = SEARCH(model, problem, candidates, data, budget, key=jax.random.key(0))
    again = SEARCH(model, problem, candidates, data, budget, key=jax.random.key(0))
    np.testing.assert_array_equal(found.choice, again.choice)
    np.testing.assert_array_equal(found.losses, again.losses)
    np.testing.assert_allclose(found.shares.sum(axis=1), 1, rtol=1e-6)
    assert len(found.losses) == SEARCH.steps

    def kl(choice):
        params = apply_plan(model.params, traced(model).weights, candidates.choose(problem.by_path(choice)))
        return score(model, params, data, reference=reference, batch_size=0).summary().kl

    plans = [np.array(choice) for choice in itertools.product((0, 1), repeat=len(problem.names))]
    fitting = [choice for choice in plans if problem.evaluate(choice)[0] <= budget]
    losses = sorted(kl(choice) for choice in fitting)
    assert any((found.choice == choice).all() for choice in fitting)
    assert len(losses) > 20
    assert kl(found.choice) <= losses[1]  # the best, or the one behind it
    assert found.measured[tuple(found.choice.tolist())] == min(found.measured.values()) == kl(found.choice)
    assert 1 < len(found.measured) <= SEARCH.plans


def test_what_is_not_allowed_has_no_share(setup):
    model, data, problem, candidates = setup
    allowed = problem.allowed.copy()
    allowed[0, 0] = allowed[1, 1] = False
    narrower = dataclasses.replace(problem, allowed=allowed)
    budget = (narrower.min_bits + narrower.max_bits) // 2
    quick = dataclasses.replace(SEARCH, steps=2)
    found = quick(model, narrower, candidates, data, budget, key=jax.random.key(0))
    assert found.shares[0].tolist() == [0, 1]
    assert found.shares[1].tolist() == [1, 0]
    assert found.choice[:2].tolist() == [1, 0]


def test_what_cannot_be_searched(setup):
    model, data, problem, candidates = setup
    with pytest.raises(MpqError) as refused:
        dataclasses.replace(SEARCH, batch_size=13)(
            model, problem, candidates, data, problem.max_bits, key=jax.random.key(0)
        )
    assert str(refused.value) == "12 rows are fewer than a batch of 13: give more or a smaller batch"
    with pytest.raises(MpqError, match="below the smallest reachable size"):
        SEARCH(model, problem, candidates, data, problem.min_bits - 1, key=jax.random.key(0))
    with pytest.raises(MpqError) as refused:
        Mixture(steps=0)
    assert str(refused.value) == "steps, batch_size, plans and save_every of a search by gradient must be at least 1"
    with pytest.raises(MpqError) as refused:
        Mixture(cold=0.0)
    assert str(refused.value) == (
        "rate, penalty and temperatures (0.1, 10.0, 2.0, 0.0) of a search by gradient must be above 0 and finite"
    )


def test_an_interrupted_search_goes_on_and_that_of_another_budget_is_refused(setup, tmp_path, monkeypatch):
    model, data, problem, candidates = setup
    quick, state, budget = dataclasses.replace(SEARCH, steps=7, save_every=3), tmp_path / "state", problem.max_bits - 1
    search = lambda budget, **more: quick(model, problem, candidates, data, budget, key=jax.random.key(0), **more)
    want = search(budget)
    with monkeypatch.context() as patch:
        patch.setattr(
            mixture, "track", lambda items, what, *_: itertools.islice(items, 4 if what == "search" else None)
        )
        search(budget, state=state)
    seen = []
    monkeypatch.setattr(mixture, "track", lambda items, what, *_: (seen.append((what, i)) or i for i in items))
    found = search(budget, state=state)
    assert [i for what, i in seen if what == "search"] == [3, 4, 5, 6]
    np.testing.assert_array_equal(found.shares, want.shares)
    np.testing.assert_array_equal(found.losses, want.losses)
    assert found.measured == want.measured
    with pytest.raises(MpqError, match="belongs to a training of another model, plan, text or options"):
        search(budget - 8, state=state)


def test_plans_are_judged_by_the_loss_that_is_given(setup):
    model, data, problem, candidates = setup
    quick, asked = dataclasses.replace(SEARCH, steps=2), []

    def measure(plan):
        asked.append(plan)
        return -float(sum(str(scheme) == "int2_channel" for scheme in plan.values()))

    found = quick(model, problem, candidates, data, problem.max_bits, key=jax.random.key(0), measure=measure)
    assert min(found.measured.values()) == found.measured[tuple(found.choice.tolist())] == min(map(measure, asked[:]))
    assert len(asked) == 2 * len(found.measured)  # once in the search, once here
