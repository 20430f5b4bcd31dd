"""`results.json`: every number of a run in one plain file, from which figures and report are drawn."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats as scipy_stats

from mpq.activations.ranges import drifting
from mpq.activations.told import range_entries
from mpq.allocate.heuristic import NAME as HEURISTIC
from mpq.artifacts import Plan, other_bits, save_plan
from mpq.certainty import certainty, unknown
from mpq.checks import check
from mpq.evaluate import DocumentScores, counts_of, score
from mpq.export import orbax
from mpq.files import write_json
from mpq.hand_out import MADE_BETTER, HandOut
from mpq.pipeline import Run
from mpq.predict import Predictor, number
from mpq.progress import track
from mpq.record import Costs, RunRecord, timed
from mpq.types import MpqError, SensitivityTable

SCHEMA = 1


def finish(run: Run, command: str) -> dict[str, Any]:
    """Compute what is missing, export the winner, check the export, and write the results, the record and the plan.

    Raises:
      MpqError: the exported model differs from the evaluated one, in size or in what it computes, or a self-check of
        the run fails (`mpq.checks`).
    """
    hand_out = HandOut(run)
    body = collect(hand_out)
    with timed(run.seconds, "export"):
        body["exported"] = check_export(hand_out)
    body["checks"] = check(hand_out)
    save_plan(run.folder / "plan.json", hand_out.plan)
    write_json(run.folder / "results.json", body)
    inputs = {"model": run.model.digest} | {f"data/{name}": data.digest for name, data in run.sets.items()}
    record = RunRecord.collect(
        dataclasses.asdict(run.config), seeds={"all": run.config.seed}, inputs=inputs, command=command
    )
    write_json(run.folder / "record.json", record.to_json())
    write_json(run.folder / "costs.json", Costs.collect(run.seconds).to_json())
    return body


def check_export(hand_out: HandOut) -> dict[str, Any]:
    """Load what was written to disk, and hold its size and its outputs against the plan and the evaluated model.

    Raises:
      MpqError: they differ.
    """
    run, plan, method = hand_out.run, hand_out.plan, hand_out.method
    path = hand_out.export()
    payload = orbax.payload_bytes(path)
    size = hand_out.stored().size_bytes
    if payload != size:
        raise MpqError(
            f"{path} holds {payload} bytes of weights and the plan says {size}: remove the folder and run again"
        )
    loaded = orbax.load(path).dequantized()
    exported = score(run.rounded, loaded, run.sets["test"], reference=run.reference("test"), batch_size=0)
    expected = hand_out.scores(plan, method, "test")
    if exported.kl is None or expected.kl is None or not np.array_equal(exported.kl, expected.kl):
        raise MpqError(
            f"{path} computes other outputs than the plan that was evaluated: remove the folder and run again"
        )
    return {"plan": plan.name, "method": method, "payload_bytes": payload, **evaluation(exported)}


def collect(hand_out: HandOut) -> dict[str, Any]:
    """Evaluate every plan on the test set and put all numbers together; `analysis/load.py` documents the schema."""
    run = hand_out.run
    weights, task, main = run.traced.weights, run.model.task, run.config.method
    tables, _ = run.tables, run.frontiers  # in this order, so that costs are booked to the stage that causes them
    winners = hand_out.winners
    ways = hand_out.ways
    predicted = predictors(run, winners)
    pairs = [(plan, m) for m in run.methods for plan in (*run.mixed[m].values(), *run.uniform.values())]
    beside = {p.name: p for p in (*run.heuristics.values(), *(winner for winner, _ in winners.values()))}
    listed = {plan.name for plan, _ in pairs}
    pairs += [(plan, main) for name, plan in beside.items() if name not in listed]
    more = {(winner.name, way): (winner, way) for b, (winner, _) in winners.items() for way in ways[b] if way != main}
    pairs += more.values()
    handed_out = {(winner.name, way) for b, (winner, _) in winners.items() for way in (main, hand_out.way(b))}
    scores = {(plan.name, m): hand_out.scores(plan, m, "test") for plan, m in track(pairs, "measure plans")}
    return {
        "schema": SCHEMA,
        "name": run.config.name,
        "task": {
            "name": task.name,
            "unit": task.unit,
            "quality": task.quality_name,
            "agreement": task.agreement_name,
        },
        "model": {
            "name": run.model.name,
            "digest": run.model.digest,
            "parameters": run.model.num_parameters,
            "weights": sum(w.size for w in weights),
            "reference_size_bytes": run.model.size_bytes,
        },
        "data": {
            name: {
                "source": data.source,
                "digest": data.digest,
                "num_documents": data.num_documents,
                "num_outputs": int(counts_of(run.model.task, data).sum()),
            }
            for name, data in run.sets.items()
        },
        "reference": evaluation(run.reference_scores("test")),
        "frontier": frontier(run, predicted[run.config.method]),
        "plans": [
            plan_entry(plan, m, scores[plan.name, m], predicted, (plan.name, m) in handed_out) for plan, m in pairs
        ],
        "winners": {
            budget: {"plan": winner.name, "selection_kl": kl, "method": hand_out.way(budget), "ways_kl": ways[budget]}
            for budget, (winner, kl) in winners.items()
        },
        "stability": {budget: stability(run, budget, winner) for budget, (winner, _) in winners.items()},
        "comparisons": [compare(run, budget, m, scores) for m in run.methods for budget in run.config.budgets],
        "tables": {metric: table_entry(table) for metric, table in tables.items()},
        "weights": [
            {"path": w.path, "group": w.group, "k": w.k, "n": w.n, "kind": w.kind, "macs": w.macs, "size": w.size}
            for w in weights
        ],
        "agreement": agreement(tables),
        **told_ranges(run),
    }


def told_ranges(run: Run) -> dict[str, Any]:
    """Static ranges of activations, and what is doubtful about them; nothing where none is static."""
    if not run.ranges:
        return {}
    return {"ranges": range_entries(run.activations, run.ranges), "warnings": drifting(run.ranges)}


def plan_entry(
    plan: Plan,
    method: str,
    scores: DocumentScores,
    predicted: Mapping[str, Predictor],
    handed_out: bool,
) -> dict[str, Any]:
    """One row: a plan, rounded by one method, measured on the test set."""
    kind, plain = kind_of(plan), method
    for suffix, made in reversed(MADE_BETTER.items()):
        kind = made if method.endswith(suffix) else kind
        plain = plain.removesuffix(suffix)
    return {
        "name": plan.name,
        "kind": kind,
        "scheme": plan.name if kind == "uniform" else None,
        "method": method,
        "handed_out": handed_out,
        **predicted[plain].of(plan),
        **evaluation(scores),
        "size_bytes": plan.size_bytes,
        "bits_per_weight": plan.bits_per_weight,
        "choices": {path: str(scheme) for path, scheme in plan.choices.items()},
    }


def stability(run: Run, budget: str, winner: Plan) -> dict[str, Any]:
    """How sure the choices of a budget's winner are (`mpq.certainty`); of a searched one, beside solutions as well."""
    if kind_of(winner) != "mixed":
        sure = unknown("the plan is one scheme or a fixed mix, so none of its choices rests on the sensitivities")
    else:
        problem = run.frontiers[run.config.method].problem
        sure = certainty(problem, winner.choices, run.bits(budget), run.config.seed)
    return {"plan": winner.name, **sure}


def kind_of(plan: Plan) -> str:
    """`uniform`, `heuristic`, or `mixed`: solved or searched for."""
    if plan.prediction is None:
        return "uniform"
    return HEURISTIC if plan.name.startswith(HEURISTIC) else "mixed"


def evaluation(scores: DocumentScores) -> dict[str, Any]:
    """The keys of `mpq evaluate`, without sizes."""
    return scores.summary().to_json()


def compare(run: Run, budget: str, method: str, scores: Mapping[tuple[str, str], DocumentScores]) -> dict[str, Any]:
    """The mixed plan of a budget against the best uniform one that fits, by KL on the test set, paired by document."""
    plan = run.mixed[method][budget]
    fitting = [p for p in run.uniform.values() if p.size_bits <= run.bits(budget)]
    if not fitting:
        return {
            "budget": budget,
            "plan": plan.name,
            "method": method,
            "bits_per_weight": plan.bits_per_weight,
            "baseline": None,
        }
    kl = {p.name: scores[p.name, method].summary().kl or 0.0 for p in fitting}
    baseline = min(fitting, key=lambda p: kl[p.name])
    difference, stderr = scores[plan.name, method].difference(scores[baseline.name, method], "kl")
    return {
        "budget": budget,
        "plan": plan.name,
        "method": method,
        "bits_per_weight": plan.bits_per_weight,
        "size_bytes": plan.size_bytes,
        "baseline": baseline.name,
        "baseline_bits_per_weight": baseline.bits_per_weight,
        "baseline_kl": kl[baseline.name],
        "plan_kl": scores[plan.name, method].summary().kl,
        "kl_difference": difference,
        "stderr": number(stderr),
        "z": number(difference / stderr) if stderr and stderr > 0 else None,
    }


def predictors(run: Run, winners: Mapping[str, tuple[Plan, Mapping[str, float]]]) -> dict[str, Predictor]:
    """By rounding algorithm; that of the main one knows the plans that were measured on the selection set."""
    found = {method: Predictor(table) for method, table in run.allocation_tables.items()}
    main = run.config.method
    known = {p.name: p for p in (*run.uniform.values(), *run.mixed[main].values(), *run.heuristics.values())}
    kl = {name: value for _, by_name in winners.values() for name, value in by_name.items() if name in known}
    measured = [(known[name], value) for name, value in kl.items()]
    return found | {main: Predictor(run.allocation_tables[main], measured)}


def frontier(run: Run, predictor: Predictor) -> dict[str, Any]:
    """Predicted loss of every point of the exact frontier."""
    values = sum(w.size for w in run.traced.weights)
    beside = other_bits(run.model, run.traced.weights)
    front = run.frontiers[run.config.method]
    size = [int(bits) for bits in front.size_bits]
    return {
        "metric": run.tables[run.config.allocate_by].metric,
        "bits_per_weight": [bits / values for bits in size],
        "size_bytes": [(bits + beside) // 8 for bits in size],
        **predictor.frontier(front),
    }


def table_entry(table: SensitivityTable) -> dict[str, Any]:
    """A sensitivity table as plain data."""
    return {
        "metric": table.metric,
        "weights": [w.path for w in table.weights],
        "schemes": [str(s) for s in table.schemes],
        "loss_increase": table.loss_increase.tolist(),
        "stderr": [[number(v) for v in row] for row in table.stderr.tolist()],
    }


def agreement(tables: Mapping[str, SensitivityTable]) -> dict[str, dict[str, float | None]]:
    """Rank correlations between metrics over all (weight, scheme) pairs that either finds above zero."""
    result = {}
    for (a, first), (b, second) in itertools.combinations(tables.items(), 2):
        x, y = first.loss_increase.ravel(), second.loss_increase.ravel()
        keep = (x != 0) | (y != 0)
        tau: Any = scipy_stats.kendalltau(x[keep], y[keep])  # scipy ships no types
        rho: Any = scipy_stats.spearmanr(x[keep], y[keep])
        result[f"{b} vs {a}"] = {
            "kendall_tau": number(float(tau.statistic)),
            "spearman": number(float(rho.statistic)),
        }
    return result
