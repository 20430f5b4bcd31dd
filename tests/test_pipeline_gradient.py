"""Runs whose bits are searched for by gradient: budgets kept, never worse than the exact solution, exact resume."""

import dataclasses

import numpy as np
import pytest

from mpq import pipeline, results
from mpq.budget import budget_bits
from mpq.distill import Mixture, mixture
from mpq.types import Status
from tests import tiny
from tests.test_pipeline import content, require_searched


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny.run_config(
        tmp_path_factory.mktemp("gradient"),
        schemes=("int2_g16", "int3_g16", "int4_g16", "bf16"),
        metrics=("fisher",),
        allocate_by="fisher",
        method="rtn",
        compare_methods=(),
        budgets=("3.5bpw", "int3_g16"),
        hand_out="3.5bpw",
        sensitivity_windows=(("fisher", 8),),
        gradient_steps=60,
        refine_windows=12,
        propagate=False,
    )


@pytest.fixture(scope="module")
def searched(config, tmp_path_factory):
    run = pipeline.prepare(config, tmp_path_factory.mktemp("searched"))
    return run, results.finish(run, "mpq run tiny")


def test_plans_keep_their_budgets_and_are_no_worse_than_the_exact_solutions(searched):
    require_searched(*searched, "gradient")


def test_what_it_finds_is_taken_where_it_is_better(searched):
    run, _ = searched
    loss, front = run._plan_loss, run.frontiers["rtn"]
    smallest = front.at(bits=front.problem.min_bits)
    budget = run.bits("int3_g16")
    found = run._by_gradient(front.problem, dataclasses.replace(smallest, budget_bits=budget))
    assert found.loss == loss(found.choice) < 0.9 * loss(smallest.choice)
    assert found.size_bits <= budget
    assert found.status is Status.FEASIBLE


def test_fused_weights_keep_one_scheme(searched):
    run, _ = searched
    for plan in run.mixed["rtn"].values():
        for group in run.frontiers["rtn"].problem.members:
            assert len({str(plan.choices[spec.path]) for spec in group}) == 1


def test_a_search_that_finds_nothing_better_leaves_the_exact_solution(config, tmp_path, monkeypatch):
    def worst(self, model, problem, candidates, data, budget_bits, **_):
        smallest = np.where(problem.allowed, problem.size_bits, np.inf).argmin(axis=1)
        return mixture.Mixed(smallest, np.zeros(problem.loss.shape), np.zeros(1, np.float32), {})

    monkeypatch.setattr(Mixture, "__call__", worst)
    run = pipeline.prepare(config, tmp_path)
    for budget, plan in run.mixed["rtn"].items():
        assert plan.choices == run.separable["rtn"][budget].choices


def test_what_it_finds_is_refined_if_that_is_asked_for_too(searched, tmp_path):
    before, _ = searched
    run = pipeline.prepare(dataclasses.replace(before.config, refine_rounds=1), tmp_path)
    for budget, plan in run.mixed["rtn"].items():
        assert plan.prediction["solver"] == "refine"
        assert plan.prediction["predicted_kl"] <= before.mixed["rtn"][budget].prediction["predicted_kl"]
        assert plan.size_bits <= budget_bits(budget, run.model, run.traced, run.uniform)


def test_an_interrupted_search_continues_and_gives_the_same_bytes(searched, tmp_path, monkeypatch):
    run, _ = searched
    steps, track = [], mixture.track

    def stopping(items, description, total=None):
        for item in track(items, description, total):
            if description == "search":
                steps.append(item)
                if len(steps) == 55:  # a state was written after 50
                    raise Stop
            yield item

    monkeypatch.setattr(mixture, "track", stopping)
    with pytest.raises(Stop):
        results.finish(pipeline.prepare(run.config, tmp_path), "mpq run tiny")
    results.finish(again := pipeline.prepare(run.config, tmp_path), "mpq run tiny")
    assert steps == [*range(55), *range(50, 60), *range(60)]  # the second budget from its beginning
    assert not (again.folder / "search.state").exists()
    assert content(again.folder) == content(run.folder)
