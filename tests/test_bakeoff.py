"""`experiments.bakeoff` on a tiny model, and the table that `analysis.bakeoff` makes of it."""

import dataclasses

import numpy as np
import pytest

from analysis.bakeoff import page
from experiments.bakeoff import BANDS, Bakeoff, Options, agreement, compare, main
from mpq.files import read_json
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
        calibration_rows=4,
        test_rows=6,
        batch_size=2,
        plans=12,
        fit_plans=5,
    )


@pytest.fixture(scope="module")
def result(options):
    main(options)
    return read_json(options.out, "bake-off result")


def test_every_metric_is_compared_in_every_band(options, result):
    assert [band["bits"] for band in result["bands"]] == [list(band) for band in BANDS]
    for band in result["bands"]:
        assert list(band["metrics"]) == ["first_order", "imatrix", "kl", "weight_mse"]
        assert band["metrics"]["kl"]["tau"] > 0.5
    assert result["metric_rows"] == {"imatrix": 2}
    assert result["cost"]["kl"] > result["cost"]["weight_mse"]


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
        assert bits.shape == (17, 9)
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
    assert text.count("\n| `") == 4
    assert "imatrix` (2 rows)" in text
    best = max(result["cost"], key=lambda name: sum(band["metrics"][name]["tau"] for band in result["bands"]))
    assert text.split("\n| `")[1].startswith(best)
