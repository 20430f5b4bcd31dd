"""Every self-check catches the fault that it is there for, and no sound run."""

import dataclasses

import numpy as np
import pytest

from mpq import checks
from mpq.allocate import Problem, solve_frontier
from mpq.artifacts import make_plan, plan_of_allocation
from mpq.calibrate import calibrate
from mpq.data import make_dataset
from mpq.formats import parse_scheme
from mpq.quantize import GPTQ, RTN, Candidates
from mpq.types import MpqError, SensitivityTable
from tests import tiny
from tests.allocate_cases import all_choices, make_problem

SCHEMES = tuple(map(parse_scheme, ("int2_g16", "int4_g16", "int8_channel")))


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    model, data = tiny.loaded(tmp_path_factory.mktemp("checks") / "model", max_windows=8)
    traced = model.trace(4, 16)
    stats = calibrate(traced, model.params, data, 4)
    return model, traced.weights, stats


def table_of(weights, seed=0):
    """Losses that fall with the bits."""
    spread = np.random.default_rng(seed).lognormal(size=(len(weights), 1))
    loss = spread * 4.0 ** -np.array([2, 4, 8])
    return SensitivityTable(tuple(weights), SCHEMES, loss, np.zeros_like(loss), "kl", "rtn", "model", "data")


def test_a_weight_without_input_is_named(setup):
    """A module that is never called has no loss: a search gave such experts the fewest bits (ModelOpt #641)."""
    _, weights, stats = setup
    checks.require_executed(weights, stats)
    spec = weights[3]
    dead = dataclasses.replace(stats[spec.path], absmax=np.zeros_like(stats[spec.path].absmax))
    with pytest.raises(MpqError, match=f"weight {spec.path} saw no input but zeros in calibration"):
        checks.require_executed(weights, {**stats, spec.path: dead})


def test_an_expert_without_input_is_named(setup):
    _, weights, stats = setup
    spec = dataclasses.replace(weights[3], batch=3)
    absmax = np.ones((3, spec.k), np.float32)
    absmax[1] = 0
    with pytest.raises(MpqError, match=f"expert 1 of {spec.path} saw no input"):
        checks.require_executed([spec], {spec.path: dataclasses.replace(stats[spec.path], absmax=absmax)})


def test_calibration_without_effect_is_caught(setup):
    """A calibration that silently did nothing was shipped for months (keras PR #23512)."""
    model, weights, stats = setup

    @dataclasses.dataclass(frozen=True)
    class Deaf:
        """GPTQ that never sees its gram."""

        name = "deaf"
        data_aware = True

        def __call__(self, w, scheme, gram=None):
            return GPTQ()(w, scheme)

    sound = Candidates(model.params, weights, GPTQ(), stats)
    checks.require_calibrated(sound, weights, stats, SCHEMES[0])
    checks.require_calibrated(Candidates(model.params, weights, RTN(), stats), weights, stats, SCHEMES[0])
    deaf = Candidates(model.params, weights, Deaf(), stats)
    with pytest.raises(MpqError, match="calibration changed nothing: deaf rounds all"):
        checks.require_calibrated(deaf, weights, stats, SCHEMES[0])


def test_a_weight_whose_rounding_changes_nothing_is_named(setup):
    model, weights, _ = setup
    candidates, table = Candidates(model.params, weights, RTN()), table_of(weights)
    checks.require_effect(table, candidates)
    loss = table.loss_increase.copy()
    loss[2] = 0
    with pytest.raises(MpqError, match=f"weight {weights[2].path} changes nothing that counts"):
        checks.require_effect(dataclasses.replace(table, loss_increase=loss), candidates)


def test_a_weight_that_every_scheme_holds_exactly_may_lose_nothing(setup):
    model, weights, _ = setup
    params = model.params | {weights[2].param: model.params[weights[2].param] * 0}
    table = table_of(weights)
    loss = table.loss_increase.copy()
    loss[2] = 0
    checks.require_effect(dataclasses.replace(table, loss_increase=loss), Candidates(params, weights, RTN()))


def test_fused_weights_of_two_schemes_are_named(setup):
    _, weights, _ = setup
    choices = {spec.path: SCHEMES[0] for spec in weights}
    plan = make_plan("mixed", choices, None, weights, 0, "model")
    checks.require_groups(plan, weights)
    fused = next(spec for spec in weights if sum(other.group == spec.group for other in weights) > 1)
    broken = dataclasses.replace(plan, choices=choices | {fused.path: SCHEMES[1]})
    with pytest.raises(MpqError, match="which is fused with"):
        checks.require_groups(broken, weights)


def test_a_plan_at_the_floor_of_a_larger_budget_is_caught(setup):
    """A search that silently returned the smallest scheme for every budget (mlx-lm #1758)."""
    _, weights, _ = setup
    problem = Problem.from_table(table_of(weights))
    budget = (problem.min_bits + problem.max_bits) // 2
    best = solve_frontier(problem).at(bits=budget)
    checks.require_budget_used(problem, best.choice, budget, "mixed")
    floor = {spec.path: SCHEMES[0] for spec in weights}
    with pytest.raises(MpqError, match=r"plan mixed leaves \d+ bits unused although"):
        checks.require_budget_used(problem, floor, budget, "mixed")


def test_a_plan_above_its_budget_is_caught(setup):
    """A target of 2.80 bits that became 2.94 (AutoRound #2186)."""
    _, weights, _ = setup
    problem = Problem.from_table(table_of(weights))
    largest = {spec.path: SCHEMES[-1] for spec in weights}
    with pytest.raises(MpqError, match="takes 8 bits more than its budget"):
        checks.require_budget_used(problem, largest, problem.max_bits - 8, "mixed")


def test_a_plan_that_an_exchange_of_two_groups_would_better_is_caught():
    """Room for one upgrade, and it went to the group that gains less: no single change fits."""
    problem = make_problem([[10, 20], [10, 20], [10, 20]], [[1.0, 0.0], [9.0, 0.0], [5.0, 0.0]])
    by_hand = lambda *choice: problem.by_path(choice)
    checks.require_budget_used(problem, by_hand(0, 1, 0), 40, "mixed")
    for wrong, better in (((1, 0, 0), "w0001"), ((0, 0, 1), "w0001")):
        with pytest.raises(MpqError, match=rf"plan mixed is not the best: .*{better}.* fit together and lose less"):
            checks.require_budget_used(problem, by_hand(*wrong), 40, "mixed")
    forbidden = dataclasses.replace(problem, allowed=np.array([[True, True], [True, False], [True, False]]))
    checks.require_budget_used(forbidden, by_hand(1, 0, 0), 40, "mixed")


def test_every_sound_exchange_agrees_with_brute_force():
    """On random problems: an alarm exactly where some change of at most two of the three groups fits and is better."""
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(60):
        size, loss = rng.integers(1, 9, (3, 3)), rng.integers(-9, 9, (3, 3)) / 4.0
        problem = make_problem(size, loss)
        choices, sizes, losses = all_choices(problem)
        start = int(rng.integers(len(choices)))
        near = (choices != choices[start]).sum(axis=1) <= 2
        budget = int(sizes[start] + rng.integers(3))
        better = bool((near & (sizes <= budget) & (losses < losses[start])).any())
        alarms += better
        if better:
            with pytest.raises(MpqError, match=r"fits and loses less|fit together and lose less"):
                checks.require_budget_used(problem, problem.by_path(choices[start]), budget, "mixed")
        else:
            checks.require_budget_used(problem, problem.by_path(choices[start]), budget, "mixed")
    assert 10 < alarms < 58  # else one of the two branches shows nothing


def test_multiply_accumulates_counted_twice_are_caught(setup):
    model, weights, _ = setup
    traced = model.trace(4, 16)
    checks.require_counted_once(traced)
    tied = next(spec for spec in weights if spec.kind == "embedding+matmul")
    assert len(tied.uses) == 2
    twice = dataclasses.replace(tied, uses=(*tied.uses, tied.uses[1]))
    broken = dataclasses.replace(traced, weights=tuple(twice if w == tied else w for w in traced.weights))
    with pytest.raises(MpqError, match=rf"weight {tied.path} is counted with \d+ multiply-accumulates and its"):
        checks.require_counted_once(broken)


def test_statistics_of_other_data_are_caught(setup):
    model, weights, stats = setup
    documents = tiny.text(documents=20, seed=7).split("<|endoftext|>")
    data = lambda text: make_dataset(
        text, model.tokenizer, bos=model.inputs.bos, window=16, max_windows=8, source="noise"
    )
    traced, own = model.trace(4, 16), tiny.text(documents=20).split("<|endoftext|>")
    checks.require_orderless(traced, model.params, data(own), stats, 4)
    with pytest.raises(MpqError, match="they are of other data, or weigh the windows by their place"):
        checks.require_orderless(traced, model.params, data(documents), stats, 4)
    lookups = {tied.path: stats[tied.path] for tied in weights if len(tied.uses) == 2}
    checks.require_orderless(traced, model.params, data(documents), lookups, 4)  # none has a single use: no claim


def test_codes_and_scales_of_another_scheme_are_caught(setup):
    model, weights, _ = setup
    plan = make_plan("mixed", {spec.path: SCHEMES[1] for spec in weights}, None, weights, 0, "model")
    sound = Candidates(model.params, weights, RTN()).choose(plan.choices)
    checks.require_schemes(plan, sound, weights)
    path = weights[3].path
    coarse = Candidates(model.params, weights, RTN()).qtensor(weights[3], parse_scheme("int4_channel"))
    wide = dataclasses.replace(sound[path], qvalue=sound[path].qvalue.at[0, 0, 0].set(9))
    for broken in (dataclasses.replace(coarse, scheme=SCHEMES[1]), wide):
        with pytest.raises(MpqError, match=f"plan mixed gives {path} int4_g16, and what is stored is another scheme's"):
            checks.require_schemes(plan, sound | {path: broken}, weights)


@pytest.mark.parametrize("text", ["int4_g16_sfp8", "int4_tensor", "fp4_g16_se8m0"])
def test_what_a_whole_matrix_shares_is_part_of_a_scheme(setup, text):
    model, weights, _ = setup
    plan = make_plan("mixed", {spec.path: parse_scheme(text) for spec in weights}, None, weights, 0, "model")
    sound = Candidates(model.params, weights, RTN()).choose(plan.choices)
    checks.require_schemes(plan, sound, weights)
    path = weights[3].path
    ones = np.ones((1, 1, 1), np.float32)
    broken = dataclasses.replace(sound[path], tensor_scale=None if sound[path].tensor_scale is not None else ones)
    with pytest.raises(MpqError, match=f"gives {path} {text}, and what is stored is another scheme's"):
        checks.require_schemes(plan, sound | {path: broken}, weights)


def test_a_plan_whose_prediction_is_not_the_table_s_is_stale(setup):
    _, weights, _ = setup
    table = table_of(weights)
    problem, other = Problem.from_table(table), Problem.from_table(table_of(weights, seed=1))
    allocation = solve_frontier(problem).at(bits=(problem.min_bits + problem.max_bits) // 2)
    plan = plan_of_allocation("mixed", allocation, table, 0)
    checks.require_predicted(plan, problem)
    with pytest.raises(MpqError, match="plan mixed is stale: it predicts a loss of"):
        checks.require_predicted(plan, other)


def test_twenty_sound_solutions_pass(setup):
    _, weights, _ = setup
    for seed in range(20):
        problem = Problem.from_table(table_of(weights, seed))
        frontier = solve_frontier(problem)
        for budget in np.linspace(problem.min_bits, problem.max_bits, 7, dtype=int).tolist():
            checks.require_budget_used(problem, frontier.at(bits=budget).choice, budget, "mixed")
