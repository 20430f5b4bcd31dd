"""The main job on a tiny model: everything is written, numbers agree, and an interrupted run gives the same bytes."""

import dataclasses
import io
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from mpq import files, pipeline, results, show
from mpq.allocate.correction import Correction
from mpq.artifacts import load_stats, uniform_plan
from mpq.budget import budget_bits
from mpq.certainty import certainty
from mpq.data import row_digests
from mpq.evaluate import score
from mpq.export import orbax
from mpq.formats import parse_scheme
from mpq.hand_out import HandOut
from mpq.predict import Predictor
from mpq.quantize import GPTQ, RTN, apply_plan
from mpq.store import FolderStore
from mpq.types import MpqError
from tests import tiny

DETERMINISTIC = ("results.json", "plan.json", "record.json", "sensitivity-kl-gptq.json", "stats.safetensors")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny.run_config(
        tmp_path_factory.mktemp("pipeline"),
        schemes=("int2_g16", "int3_g16", "int4_g16", "int8_channel"),
        budgets=("3.5bpw", "int4_g16", "20kB"),
        hand_out="3.5bpw",
        sensitivity_windows=(("kl", 8), ("fisher", 8), ("hessian_trace", 4)),
        propagate=False,
    )


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    run = pipeline.prepare(config, tmp_path_factory.mktemp("runs"))
    return run, results.finish(run, "mpq run tiny")


def content(folder):
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "costs.json"]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def test_a_plan_that_stores_the_original_bit_for_bit_is_not_run_again(finished, monkeypatch, tmp_path):
    done, _ = finished
    run = dataclasses.replace(done, folder=tmp_path / "run")
    shutil.copytree(done.folder, run.folder)
    plan = uniform_plan(parse_scheme("fp32"), run.model, run.traced.weights)
    monkeypatch.setattr(pipeline, "score", None)
    got = run.scores(plan, "gptq", "test")
    assert (got.summary().kl, got.summary().agreement) == (0.0, 1.0)
    assert got.summary() == run.reference_scores("test").summary()


def test_statistics_are_of_other_windows_than_losses(finished):
    run, _ = finished
    _, seen = load_stats(run.folder / "stats.safetensors", run.model.digest)
    assert len(seen) == run.config.calibration_windows - run.config.scored_windows
    for metric in run.config.metrics:
        assert seen.isdisjoint(row_digests(run.sensitivity_data(metric)))


def test_every_file_is_there(finished):
    run, _ = finished
    names = {p.name for p in run.folder.iterdir()}
    assert {*DETERMINISTIC, "costs.json", "quantized", "plans", "scores"} <= names


def test_plans_keep_their_budgets(finished):
    run, body = finished
    weights = run.traced.weights
    limits = {"3.5bpw": int(3.5 * body["model"]["weights"]), "int4_g16": run.uniform["int4_g16"].size_bits}
    for budget, limit in limits.items():
        assert run.mixed["gptq"][budget].size_bits <= limit
    assert run.mixed["gptq"]["20kB"].size_bytes <= 20_000
    for plan in (p for m in run.methods for p in run.mixed[m].values()):
        assert plan.size_bits == sum(w.size_bits(plan.choices[w.path]) for w in weights)


def test_every_row_is_the_plan_rounded_by_its_method(finished):
    """Measured again from weights that are rounded here, one after the other."""
    run, body = finished
    quantizers = {"gptq": GPTQ(), "rtn": RTN()}
    rows = [p for p in body["plans"] if p["name"] in ("int2_g16", "mixed@int4_g16")]
    assert {p["method"] for p in rows} == set(quantizers)
    for row in rows:
        choices = {path: parse_scheme(scheme) for path, scheme in row["choices"].items()}
        quantizer = quantizers[row["method"]]
        gram = lambda spec: jnp.asarray(run.stats[spec.path].gram)
        made = {w.path: quantizer(w.read(run.model.params), choices[w.path], gram(w)) for w in run.traced.weights}
        params = apply_plan(run.model.params, run.traced.weights, made)
        scores = score(run.model, params, run.sets["test"], reference=run.reference("test"), batch_size=0)
        assert row["kl"] == pytest.approx(scores.summary().kl, rel=1e-4), (row["name"], row["method"])


def test_the_winner_is_never_worse_than_a_uniform_scheme_that_fits(finished):
    _, body = finished
    for budget, winner in body["winners"].items():
        assert winner["selection_kl"][winner["plan"]] == min(winner["selection_kl"].values())
        assert f"mixed@{budget}" in winner["selection_kl"]


def test_the_heuristic_is_a_candidate_that_fits_and_is_measured(finished):
    run, body = finished
    rows = {p["name"]: p for p in body["plans"] if p["kind"] == "heuristic"}
    assert set(rows) == {plan.name for plan in run.heuristics.values()}
    assert set(run.heuristics) == set(run.config.budgets)
    for budget, plan in run.heuristics.items():
        assert plan.size_bits <= run.bits(budget)
        assert plan.name in body["winners"][budget]["selection_kl"]
        table = run.allocation_tables["gptq"]
        loss = sum(
            table.loss_increase[row, table.schemes.index(plan.choices[w.path])] for row, w in enumerate(table.weights)
        )
        assert rows[plan.name]["predicted_kl"] == pytest.approx(loss, rel=1e-9)
        assert (rows[plan.name]["method"], rows[plan.name]["scheme"]) == ("gptq", None)


def test_a_heuristic_that_is_better_is_handed_out(finished, monkeypatch):
    run, _ = finished
    monkeypatch.setattr(HandOut, "_kl", lambda self, plan, way: 0.0 if plan.name.startswith("heuristic-") else 1.0)
    winners = HandOut(run).winners
    for budget, expected in run.heuristics.items():
        assert winners[budget][0] is expected


def test_how_sure_the_choices_are_is_said_of_every_winner(finished, monkeypatch):
    run, body = finished
    assert set(body["stability"]) == set(run.config.budgets)
    for budget, sure in body["stability"].items():
        assert sure["plan"] == body["winners"][budget]["plan"]
        plan = run.mixed["gptq"][budget]
        expected = certainty(run.frontiers["gptq"].problem, plan.choices, run.bits(budget), run.config.seed)
        if sure["plan"] == plan.name:
            assert {"plan": plan.name, **expected} == sure
    sure = results.stability(run, "3.5bpw", run.uniform["int3_g16"])
    assert (sure["plan"], sure["share"], sure["unsure"]) == ("int3_g16", None, [])
    assert "none of its choices rests on the sensitivities" in sure["statement"]


def test_predictions_are_corrected_by_the_other_plans_on_the_selection_set(finished):
    _, body = finished
    measured = {k: v for winner in body["winners"].values() for k, v in winner["selection_kl"].items()}
    rows = {p["name"]: p for p in body["plans"] if p["method"] == "gptq"}
    for name, row in rows.items():
        others = [p for p in rows.values() if p["name"] in measured and p["choices"] != row["choices"]]
        correct = Correction.fit([p["predicted_kl"] for p in others], [measured[p["name"]] for p in others])
        loss, spread = correct(np.array([row["predicted_kl"]]))
        stderr = loss[0] * np.hypot(row["predicted_stderr"] / row["predicted_kl"], spread[0])
        assert (row["corrected_kl"], row["corrected_stderr"]) == pytest.approx((loss[0], stderr), rel=1e-9), name
    front = body["frontier"]
    assert len(front["corrected_kl"]) == len(front["corrected_stderr"]) == len(front["predicted_kl"])
    assert all(p["corrected_kl"] is None for p in body["plans"] if p["method"] == "rtn")  # none was measured


def test_too_few_plans_correct_nothing(finished):
    run, _ = finished
    plan = run.uniform["int4_g16"]
    predictor = Predictor(run.allocation_tables["gptq"], [(p, 0.1) for p in [*run.uniform.values()][:3]])
    assert predictor.of(plan)["corrected_kl"] is None
    assert predictor.frontier(run.frontiers["gptq"])["corrected_kl"] is None


def test_what_is_handed_out_has_prediction_and_measurement_with_errors(finished):
    _, body = finished
    rows = [p for p in body["plans"] if p["handed_out"]]
    assert {p["name"] for p in rows} == {winner["plan"] for winner in body["winners"].values()}
    text = shown(body)
    for row in rows:
        assert min(row["predicted_kl"], row["predicted_stderr"], row["kl"], row["kl_stderr"]) > 0
        summed = f"(sum over weights {row['predicted_kl']:.4g} ± {row['predicted_stderr']:.1g})"
        predicted = f"predicted {row['corrected_kl']:.4g} ± {row['corrected_stderr']:.1g} {summed}"
        assert f"{predicted}, measured {row['kl']:.4g} ± {row['kl_stderr']:.1g} nats" in text


def test_the_terminal_says_what_every_budget_ends_with(finished):
    _, body = finished
    text = shown(body)
    for budget, winner in body["winners"].items():
        kl = winner["selection_kl"]
        second = min(kl.keys() - {winner["plan"]}, key=kl.get)
        line = f"{budget}: {winner['plan']} wins, with KL {kl[winner['plan']]:.4g} on the selection set"
        assert f"{line} (of the others {second}: {kl[second]:.4g})" in text
    only = {"plan": "mixed@3.5bpw", "selection_kl": {"mixed@3.5bpw": 0.5}, "method": "gptq", "ways_kl": {"gptq": 0.5}}
    alone = body | {"winners": {"3.5bpw": only}}
    alone["plans"] = [p | {"handed_out": p["name"] == "mixed@3.5bpw"} for p in body["plans"]]
    assert "3.5bpw: mixed@3.5bpw wins, with KL 0.5 on the selection set; predicted" in shown(alone)


def test_the_exported_folder_is_the_plan_to_the_byte_and_computes_the_same(finished):
    run, body = finished
    plan, exported = HandOut(run).plan, body["exported"]
    assert exported["payload_bytes"] == plan.size_bytes == orbax.payload_bytes(run.folder / "quantized")
    row = next(p for p in body["plans"] if p["name"] == plan.name and p["method"] == "gptq")
    assert exported["kl"] == row["kl"]


def test_an_export_that_differs_is_refused(finished, monkeypatch):
    run, _ = finished
    monkeypatch.setattr(orbax, "payload_bytes", lambda path: 1)
    with pytest.raises(MpqError, match="holds 1 bytes of weights and the plan says"):
        results.check_export(HandOut(run))
    monkeypatch.undo()
    wrong = {"scale": lambda p: {k: v * 1.01 for k, v in p.items()}}["scale"](run.model.params)
    monkeypatch.setattr(orbax, "load", lambda path: type("Loaded", (), {"dequantized": lambda self: wrong})())
    with pytest.raises(MpqError, match="computes other outputs"):
        results.check_export(HandOut(run))


def test_the_prediction_of_a_mixed_plan_is_the_solver_s(finished):
    run, body = finished
    for row in body["plans"]:
        if row["kind"] == "mixed":
            budget = row["name"].removeprefix("mixed@")
            assert row["predicted_kl"] == pytest.approx(
                run.mixed[row["method"]][budget].prediction["predicted_kl"], rel=1e-9
            )


def test_numbers_on_the_test_set_are_plausible(finished):
    _, body = finished
    kl = {(p["name"], p["method"]): p["kl"] for p in body["plans"]}
    assert kl["int2_g16", "gptq"] > kl["int4_g16", "gptq"] > kl["int8_channel", "gptq"] > 0
    assert body["reference"]["kl"] == pytest.approx(0, abs=1e-6)


def test_the_same_config_gives_the_same_bytes(finished, config, tmp_path):
    run, _ = finished
    again = pipeline.prepare(config, tmp_path)
    results.finish(again, "mpq run tiny")
    assert again.folder.name == run.folder.name
    assert content(again.folder) == content(run.folder)


def shown(body):
    """What a terminal shows of a run."""
    console = Console(file=io.StringIO(), width=240)
    show.run({"results": body, "run": "folder"}, console)
    return console.file.getvalue()


class Stop(BaseException):
    """What a kill looks like from inside."""


def test_a_run_stopped_at_ten_random_points_continues_and_gives_the_same_bytes(finished, config, tmp_path, monkeypatch):
    written, move = [], files._move
    stops = np.cumsum(np.random.default_rng(0).integers(1, 16, size=10)).tolist()

    def stopping(source, target):
        if stops and len(written) == stops[0]:
            stops.pop(0)
            raise Stop  # before what was computed is on the disk under its name
        move(source, target)
        written.append(target)

    monkeypatch.setattr(files, "_move", stopping)
    monkeypatch.setattr(pipeline, "load", lambda source: finished[0].model)  # what is compiled serves every start
    while stops:
        with pytest.raises(Stop):
            results.finish(pipeline.prepare(config, tmp_path), "mpq run tiny")
    results.finish(again := pipeline.prepare(config, tmp_path), "mpq run tiny")
    scores = [path for path in written if path.parent.parent.name == "scores"]
    assert len(set(scores)) == len(scores)  # nothing is computed twice
    assert content(again.folder) == content(finished[0].folder)
    assert content(again.folder.parent / "scores") == content(finished[0].folder.parent / "scores")


def test_a_config_with_one_more_scheme_measures_only_that(finished, config, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "load", lambda source: finished[0].model)
    fewer = dataclasses.replace(config, schemes=config.schemes[:-1], metrics=("kl", "hessian_trace"))
    _ = pipeline.prepare(fewer, tmp_path).tables
    before = content(tmp_path / "scores")
    run = pipeline.prepare(dataclasses.replace(config, metrics=("kl", "hessian_trace")), tmp_path)
    new = content(tmp_path / "scores").keys() - before.keys() if run.tables else None
    assert len(new) == len(run.traced.weights)
    for metric, table in run.tables.items():
        np.testing.assert_array_equal(table.loss_increase, finished[0].tables[metric].loss_increase)


def test_a_damaged_score_is_refused_by_name(finished, config, tmp_path):
    shutil.copytree(finished[0].folder.parent / "scores", tmp_path / "scores")
    for path in (tmp_path / "scores").rglob("*.json"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MpqError, match=r"scores/.*\.json is damaged: delete it to compute its item again"):
        _ = pipeline.prepare(config, tmp_path).tables


def test_another_config_gets_another_folder(finished, config, tmp_path):
    other = pipeline.prepare(dataclasses.replace(config, seed=1), tmp_path)
    assert other.folder.name != finished[0].folder.name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": ("99bpw",), "hand_out": "99bpw"}, "is above the original's"),
        ({"budgets": ("xbpw",), "hand_out": "xbpw"}, "write 3.5bpw, 4MB, or a scheme"),
        ({"window": 4096}, "longer than the model's context of 64"),
        ({"model": "./none"}, "is no folder here"),
        ({"data": "none.txt"}, "is no file or folder here"),
    ],
)
def test_a_wrong_run_is_refused_before_anything_is_written(config, tmp_path, change, message):
    with pytest.raises(MpqError, match=message):
        pipeline.prepare(dataclasses.replace(config, **change), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_budget_below_the_smallest_size_says_that_size(config, tmp_path):
    run = pipeline.prepare(dataclasses.replace(config, budgets=("1bpw",), hand_out="1bpw"), tmp_path)
    with pytest.raises(MpqError, match="smallest"):
        results.finish(run, "")


def test_a_damaged_stage_file_is_refused(finished, config, tmp_path):
    shutil.copytree(finished[0].folder, tmp_path / finished[0].folder.name)
    file = tmp_path / finished[0].folder.name / "sensitivity-kl-gptq.json"
    body = json.loads(file.read_text())
    body["loss_increase"][0][0] = 0.0
    file.write_text(json.dumps(body))
    with pytest.raises(MpqError, match="checksum differs"):
        _ = pipeline.prepare(config, tmp_path).tables


def test_comparisons_are_paired(finished):
    run, body = finished
    row = next(c for c in body["comparisons"] if (c["budget"], c["method"]) == ("int4_g16", "gptq"))
    a = run.scores(run.mixed["gptq"]["int4_g16"], "gptq", "test")
    b = run.scores(run.uniform[row["baseline"]], "gptq", "test")
    np.testing.assert_allclose(row["kl_difference"], (a.kl - b.kl).sum() / a.counts.sum(), rtol=1e-9)
    assert row["stderr"] > 0


@pytest.fixture(scope="module")
def searched(config, tmp_path_factory):
    """A run whose solutions are searched on, of one rounding algorithm."""
    changes = {"refine_rounds": 2, "refine_windows": 12, "method": "rtn", "compare_methods": ()}
    changes |= {"metrics": ("fisher",), "allocate_by": "fisher", "budgets": ("3.5bpw", "int3_g16")}
    run = pipeline.prepare(dataclasses.replace(config, **changes), tmp_path_factory.mktemp("searched"))
    return run, results.finish(run, "mpq run tiny")


def require_searched(run, body, solver):
    """Every plan fits, is no worse than the exact solution, and is predicted by what was measured."""
    loss = run._plan_loss
    for budget, plan in run.mixed["rtn"].items():
        start = run.separable["rtn"][budget]
        assert plan.size_bits <= budget_bits(budget, run.model, run.traced, run.uniform)
        assert plan.prediction["solver"] == solver
        assert plan.prediction["predicted_kl"] == loss(plan.choices) <= loss(start.choices)
        row = next(p for p in body["plans"] if p["name"] == plan.name)
        assert (row["predicted_kl"], row["kind"]) == (loss(plan.choices), "mixed")
        assert row["predicted_stderr"] > 0


def test_a_searched_plan_is_measured_and_keeps_its_budget(searched):
    require_searched(*searched, "refine")


def test_the_plan_that_the_search_began_with_is_a_candidate_too(searched):
    run, body = searched
    changed = [b for b in run.mixed["rtn"] if run.mixed["rtn"][b].choices != run.separable["rtn"][b].choices]
    assert changed  # else this shows nothing
    for budget in changed:
        assert f"separable@{budget}" in body["winners"][budget]["selection_kl"]
    assert {winner["plan"] for winner in body["winners"].values()} <= {plan["name"] for plan in body["plans"]}


def test_an_interrupted_search_continues_and_gives_the_same_bytes(searched, tmp_path, monkeypatch):
    run, _ = searched
    original, plans = FolderStore.put, []

    def put(self, key, value):
        original(self, key, value)
        plans.extend([key] if '"item": "plan"' in key else [])
        if len(plans) == 5:
            raise Stop

    monkeypatch.setattr(FolderStore, "put", put)
    with pytest.raises(Stop):
        results.finish(pipeline.prepare(run.config, tmp_path), "mpq run tiny")
    monkeypatch.setattr(FolderStore, "put", original)
    results.finish(again := pipeline.prepare(run.config, tmp_path), "mpq run tiny")
    assert content(again.folder) == content(run.folder)
