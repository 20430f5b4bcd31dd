"""`experiments.surrogate` on a tiny model, and the page that `analysis.surrogate` makes of it."""

import dataclasses

import numpy as np
import pytest
from scipy.stats import kendalltau

from analysis.surrogate import by_rows, overview, page, reachable
from experiments import bakeoff
from experiments.surrogate import Options, compare, losses_on, main
from mpq.files import read_json
from mpq.types import MpqError
from tests import tiny
from tests.allocate_cases import make_problem
from tests.data_cases import write_images
from tests.test_families_vision import write as write_vision


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    root = tmp_path_factory.mktemp("surrogate")
    tiny.write_folder(root / "model")
    (root / "text.txt").write_text(tiny.text(documents=200))
    plans = bakeoff.Options(
        model=str(root / "model"),
        data=str(root / "text.txt"),
        out=root / "tiny.json",
        work=root / "work",
        granularity="g16",
        metrics=("kl", "weight_mse"),
        window=32,
        calibration_rows=8,
        statistics_rows=2,
        test_rows=6,
        batch_size=2,
        plans=12,
        fit_plans=16,
        fit_set="selection",
    )
    main(Options(plans, counts=(8, 16), bands=(1,), rows=(4, 6)))
    return read_json(plans.out, "result of surrogates")


def test_every_metric_is_fitted_to_every_number_of_plans(result):
    assert [band["bits"] for band in result["bands"]] == [[3, 5]]
    assert result["fit_set"] == "selection"
    assert result["record"]["config"]["counts"] == [8, 16]
    for band in result["bands"]:
        assert band["plan_cost"] == 6 / result["rows"][0]
        assert sorted(band["metrics"]) == ["kl", "marginal", "weight_mse"]
        assert [fitted["plans"] for fitted in band["metrics"]["kl"]["fitted"]] == [8, 16]
        for fitted in band["metrics"]["kl"]["fitted"]:
            assert fitted["surrogate"]["tau"] > 0.5
            assert 0.5 < fitted["surrogate"]["ratio"] < 2
            assert 0 <= fitted["surrogate"]["within"] <= 1
        some, all_of_them = band["metrics"]["kl"]["by_rows"]
        assert (some["rows"], all_of_them["rows"]) == (4, 6)
        assert all_of_them["surrogate"] == band["metrics"]["kl"]["fitted"][-1]["surrogate"]
        assert some["surrogate"]["ratio"] != all_of_them["surrogate"]["ratio"]


def test_losses_on_some_rows_are_of_whole_documents():
    sums, counts = np.array([[2.0, 6.0, 5.0], [4.0, 0.0, 1.0]]), np.array([2.0, 2.0, 1.0])
    document = np.array([7, 7, 8, 8, 9])
    for rows, losses in ((2, [1, 2]), (3, [1, 2]), (4, [2, 1]), (5, [2.6, 1]), (9, [2.6, 1])):
        np.testing.assert_allclose(losses_on(rows, sums, counts, document), losses)
    with pytest.raises(MpqError, match="1 rows are less than the first document has"):
        losses_on(1, sums, counts, document)


def test_corrected_plans_are_measured_corrected(tmp_path):
    write_vision(tmp_path / "model", "resnet_cifar")
    write_images(tmp_path / "images.npz", 48, 24)
    plans = bakeoff.Options(
        model=str(tmp_path / "model"),
        data=str(tmp_path / "images.npz"),
        out=tmp_path / "small.json",
        work=tmp_path / "work",
        granularity="channel",
        metrics=("kl",),
        calibration_rows=16,
        statistics_rows=16,
        test_rows=12,
        batch_size=4,
        plans=6,
        fit_plans=8,
    )
    bands = {}
    for corrected in (False, True):
        main(Options(dataclasses.replace(plans, corrected=corrected), counts=(8,), bands=(0,)))
        result = read_json(plans.out, "result of surrogates")
        assert result["corrected"] == corrected
        assert ("16 further rows" in page([result])) == corrected
        (bands[corrected],) = result["bands"]
    assert bands[True]["median"] < 0.8 * bands[False]["median"]
    assert bands[False]["plan_cost"] == 1
    assert bands[True]["plan_cost"] == 2  # as many rows to correct on
    assert sorted(bands[True]["metrics"]) == ["alone", "kl", "marginal"]
    groups = result["groups"]
    assert bands[True]["metrics"]["alone"]["cost"] == 2 * 3 * groups
    assert bands[True]["metrics"]["marginal"]["cost"] == 2 * (1 + 2 * groups)
    assert bands[True]["metrics"]["alone"]["sum"]["tau"] > 0.3


def test_what_is_fitted_sees_the_further_plans_alone():
    rng = np.random.default_rng(0)
    loss = np.exp(rng.normal(size=(6, 1))) * 0.25 ** np.arange(3)
    problem = make_problem(1000 * np.array([2, 3, 4]) * np.ones((6, 1), np.int64), loss)
    plans = rng.integers(3, size=(50, 6))
    true = problem.parts(plans).sum(axis=1) ** 1.2
    fit, measured = 2 * true[30:], true[:30]
    (found,) = compare(problem, plans, fit, measured, [20])
    assert found["surrogate"]["tau"] == pytest.approx(1, abs=0.01)
    assert found["surrogate"]["ratio"] == pytest.approx(2, rel=0.02)
    assert found["surrogate"]["within"] == 0
    assert not list(compare(make_problem(problem.size_bits, -loss), plans, fit, measured, [20]))


def test_the_page_says_which_goals_are_met(result):
    band = {"bits": [3, 5], "halves": 0.97, "plan_cost": 1.0, "median": 0.4, "metrics": {}}
    sums = {"tau": 0.8, "r2": 0.9, "ratio": 0.7}
    for name, tau, ratio in (("kl", 0.96, 1.02), ("fisher", 0.94, 1.2)):
        found = {"tau": tau, "r2": 0.995, "ratio": ratio, "spread": 0.05, "promised": 0.04, "within": 0.93}
        fitted = [{"plans": 40, "refit": sums, "surrogate": found}]
        band["metrics"][name] = {"sum": sums, "cost": 10.0, "fitted": fitted}
    best = overview([result | {"bands": [band]}]).splitlines()[-1]
    assert "`kl` | 40 | 50" in best
    assert best.endswith("| 0.800 | 0.960 | 0.995 | 1.02 | met |")
    del band["metrics"]["kl"]
    assert overview([result | {"bands": [band]}]).endswith("missed: tau 0.95, ratio within 0.1 |")
    assert "measured on the selection set" in page([result])
    band["halves"] = 0.85
    assert overview([result | {"bands": [band]}]).endswith(
        "missed: tau 0.95, which this test set cannot show, ratio within 0.1 |"
    )


def test_the_page_says_what_rows_buy(result):
    band = {"bits": [3, 5], "halves": 0.97, "plan_cost": 1.0, "median": 0.4, "metrics": {}}
    sums = {"tau": 0.8, "r2": 0.9, "ratio": 0.7}
    for name, tau in (("kl", 0.96), ("fisher", 0.94)):
        found = {"tau": tau, "r2": 0.995, "ratio": 1.02, "spread": 0.05, "promised": 0.04, "within": 0.93}
        few = [{"rows": rows, "surrogate": found | {"tau": tau - 1 / rows}} for rows in (50, 100, 400)]
        fitted = [{"plans": 40, "refit": sums, "surrogate": found}]
        band["metrics"][name] = {"sum": sums, "cost": 10.0, "fitted": fitted, "by_rows": few}
    known = result | {"bands": [band], "fit_set": "calibration", "rows": [200, 300]}
    rows = [[cell.strip() for cell in line.split("|")[2:5]] for line in by_rows(known).splitlines()[2:]]
    assert rows == [["`kl`", "50", "0.940"], ["`kl`", "100", "0.950"], ["`kl`", "200", "0.960"]]
    assert "fitted to their losses on the first of these rows" in page([known])
    assert "`kl` sees 128 of the 200. " in page([known | {"metric_rows": {"kl": 128}}])
    for entry in band["metrics"].values():
        entry["by_rows"] = []
    assert "on the first of these rows" not in page([known])


def test_what_is_reachable_is_what_a_predictor_of_the_truth_reaches():
    """Losses of 4,000 plans on two halves of a test set, each with an error of its own."""
    rng = np.random.default_rng(3)
    truth = rng.normal(size=4000)
    halves = truth[:, None] + 0.4 * rng.normal(size=(4000, 2))
    tau = lambda a, b: float(np.asarray(kendalltau(a, b))[0])
    between, whole = tau(*halves.T), tau(truth, halves.sum(axis=1))
    # The variance of tau is at most 2 (1 - tau^2) / n (Kendall and Gibbons 1990, chapter 4): .014 squared at .8.
    assert reachable(between) == pytest.approx(whole, abs=0.02)
    assert whole - between > 0.08
    assert reachable(1.0) == pytest.approx(1)
    assert reachable(-0.2) == 0
