"""`experiments.bakeoff` on a tiny model, and the table that `analysis.bakeoff` makes of it."""

import dataclasses

import numpy as np
import pytest

from analysis.bakeoff import overview, page
from experiments.bakeoff import BANDS, Bakeoff, Options, agreement, compare, main
from mpq.allocate import Problem
from mpq.files import read_json
from mpq.types import MpqError
from tests import tiny


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    root = tmp_path_factory.mktemp("bakeoff")
    tiny.write_folder(root / "model")
    (root / "text.txt").write_text(tiny.text(documents=200))
    return Options(
        model=str(root / "model"),
        data=str(root / "text.txt"),
        out=root / "tiny.json",
        work=root / "work",
        granularity="g16",
        metrics=("kl", "weight_mse", "imatrix:2", "first_order"),
        window=32,
        calibration_rows=8,
        statistics_rows=16,
        test_rows=6,
        batch_size=2,
        plans=12,
        fit_plans=9,
    )


@pytest.fixture(scope="module")
def result(options):
    main(options)
    return read_json(options.out, "bake-off result")


def test_every_metric_is_compared_in_every_band(options, result):
    assert [band["bits"] for band in result["bands"]] == [list(band) for band in BANDS]
    for band in result["bands"]:
        assert sorted(band["metrics"]) == ["first_order", "imatrix", "kl", "kl+interactions", "marginal", "weight_mse"]
        assert band["metrics"]["kl"]["tau"] > 0.5
        assert band["metrics"]["kl"]["refitted"]["tau"] > 0.5
        assert "refitted" not in band["metrics"]["kl+interactions"]  # pairs are no table
    assert result["metric_rows"] == {"imatrix": 2}
    assert set(result["cost"]) == set(result["bands"][0]["metrics"])


def test_the_marginal_losses_of_a_plan_add_up_to_what_is_measured(options, result):
    run = Bakeoff(options)
    problem = Problem.from_table(run.table("kl")[0])
    allowed = run.allowed(BANDS[1])
    around, cost = run.marginal(BANDS[1], problem)
    assert cost == 1 + len(problem.names) * (len(allowed) - 1)
    plan = np.full(len(problem.names), allowed[len(allowed) // 2])
    plan[3] = allowed[0]
    other = np.full(len(plan), allowed[0])
    measured, _ = run.measure("calibration", [problem.by_path(plan), problem.by_path(other)], "two")
    assert around.loss[np.arange(len(plan)), plan].sum() == pytest.approx(measured[0])


def test_corrections_may_go_by_the_selection_set(options, result):
    selected = dataclasses.replace(options, fit_set="selection", out=options.out.with_name("tiny_selected.json"))
    run = Bakeoff(selected)
    assert len(run.sets["selection"].inputs) == len(run.sets["test"].inputs)
    main(selected)
    found = read_json(selected.out, "bake-off result")
    assert (result["fit_set"], found["fit_set"]) == ("calibration", "selection")
    for band, before in zip(found["bands"], result["bands"], strict=True):
        assert {key: band[key] for key in ("ceiling", "median")} == {key: before[key] for key in ("ceiling", "median")}
        assert band["metrics"]["kl"]["tau"] == before["metrics"]["kl"]["tau"]
        assert band["metrics"]["kl"]["calibrated"]["ratio"] != before["metrics"]["kl"]["calibrated"]["ratio"]
    assert "9 plans, measured on the selection set" in page([found])
    with pytest.raises(MpqError, match="--test leaves none: give --data alone"):
        Bakeoff(dataclasses.replace(selected, test=options.data))


def test_metrics_without_kl_are_refused(options):
    with pytest.raises(MpqError, match="metrics lack kl"):
        Bakeoff(dataclasses.replace(options, metrics=("fisher",)))
    some = Bakeoff(dataclasses.replace(options, metrics=("kl:2", "fisher")))
    assert some.description()["metric_rows"] == {"kl": 2}


def test_a_model_with_nothing_to_correct_is_refused(options):
    with pytest.raises(MpqError, match="no bias and no norm behind a weight: leave out --corrected"):
        Bakeoff(dataclasses.replace(options, corrected=True))


def test_measured_plans_are_kept(options, result, monkeypatch):
    def fail(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr("mpq.measure.PlanLoss._measure", fail)
    before = options.out.read_bytes()
    main(options)
    assert options.out.read_bytes() == before


def test_plans_stay_in_their_band_and_use_all_of_it(options, result):
    run = Bakeoff(options)
    for band in BANDS:
        bits = np.array([scheme.format.bits for scheme in run.schemes])[run.plans(band, 9)]
        assert bits.shape == (21, 9)
        assert (bits.min(), bits.max()) == band
    assert (run.plans(BANDS[0], 9) == Bakeoff(dataclasses.replace(options, plans=12)).plans(BANDS[0], 9)).all()


def test_agreement_of_known_predictions():
    measured = np.geomspace(0.1, 1.0, 20)
    assert agreement(2 * measured, measured) == {"tau": 1.0, "r2": 1.0, "ratio": 2.0, "spread": 0.0}
    reversed_order = agreement(measured[::-1], measured)
    assert reversed_order["tau"] == -1.0
    assert reversed_order["ratio"] == pytest.approx(1.0)
    assert agreement(-measured, measured) == {"tau": -1.0}


def test_the_power_law_sees_only_the_further_plans():
    measured = np.geomspace(0.1, 1.0, 30)
    total = measured**0.5
    judged = compare(total, measured[20:], measured, plans=20)
    assert judged["calibrated"]["ratio"] == pytest.approx(1.0)
    assert judged["exponent"] == pytest.approx(2.0)
    other = measured.copy()
    other[:20] *= 3
    assert compare(total, measured[20:], other, plans=20)["calibrated"]["ratio"] == pytest.approx(1 / 3, rel=1e-3)


def test_the_page_has_a_row_for_every_metric(result):
    text = page([result])
    assert text.count("\n| `") == 6 * (1 + len(BANDS))  # the overview, and every band
    assert "imatrix` (2 rows)" in text
    of = lambda **other: page([{**result, **other}])
    assert "Rounding saw no text." in of(method="rtn")
    assert "Moments for rounding: of 16 others." in of(method="gptq", statistics_rows=16)
    assert "Moments for rounding: of the same rows." in of(method="gptq", statistics_rows=None)
    best = max(result["cost"], key=lambda name: result["bands"][0]["metrics"][name]["tau"])
    assert text.split("### 2 to 4 bits")[1].split("\n| `")[1].startswith(best)


def test_the_overview_leaves_out_what_a_result_lacks(result):
    fewer = {**result, "model": "other", "cost": {"kl": 1.0}, "metric_rows": {}}
    fewer["bands"] = [{**band, "metrics": {"kl": band["metrics"]["kl"]}} for band in result["bands"]]
    lines = overview([result, fewer]).splitlines()
    row = next(line for line in lines if line.startswith("| `imatrix`"))
    assert row.endswith("| \N{EN DASH} → \N{EN DASH} |")
    assert any(line.startswith("| `kl`") and line.count("0.") >= 4 for line in lines)
