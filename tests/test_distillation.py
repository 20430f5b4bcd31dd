"""`experiments.distillation` on a tiny model, and the page that `analysis.distillation` makes of it."""

import dataclasses

import pytest

from analysis.distillation import INGREDIENTS, page
from experiments.distillation import Comparison, Options, main, windows_of
from mpq.files import read_json
from mpq.inputs import Images
from mpq.models import load
from mpq.types import MpqError
from tests import tiny

MADE = ("propagated", "nearest", "nearest_scales_written", "scales")  # of the plan of `fine`


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    root = tmp_path_factory.mktemp("distillation")
    return Options(
        **tiny.model_and_texts(root),
        out=root / "tiny.json",
        budgets=(3.5, 4.4),
        uniform=("int2_g16", "int3_g16", "int4_g16"),
        fine=("int3_g8",),
        learned=("int4_channel",),
        ingredients=(
            "uniform",
            "allocated",
            "fine",
            "propagated",
            "nearest",
            "nearest_scales_written",
            "scales",
            "learned",
        ),
        steps=5,
        windows=8,
        window=16,
        batch_size=4,
        sensitivity_windows=4,
    )


@pytest.fixture(scope="module")
def result(options):
    main(dataclasses.replace(options, ingredients=("uniform", "fine")))
    first = read_json(options.out, "results")
    main(options)
    result = read_json(options.out, "results")
    assert result["rows"][: len(first["rows"])] == first["rows"]  # not computed again
    return result


def test_there_is_a_row_for_each_budget_and_ingredient_and_none_is_too_large(options, result):
    rows = {(row["budget"], row["ingredient"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 16
    assert all(row["bits_per_weight"] <= budget for (budget, _), row in rows.items())
    assert rows[3.5, "uniform"]["schemes"] == {"int2_g16": 14}
    assert rows[4.4, "uniform"]["schemes"] == {"int3_g16": 14}
    assert all("int3_g8" not in rows[budget, "allocated"]["schemes"] for budget in options.budgets)
    assert any("int4_channel" in rows[budget, "learned"]["schemes"] for budget in options.budgets)
    assert all("int4_channel" not in row["schemes"] for (_, name), row in rows.items() if name != "learned")
    assert all(rows[3.5, same]["schemes"] == rows[3.5, "fine"]["schemes"] for same in MADE)
    assert len({rows[3.5, same]["kl"] for same in ("fine", *MADE)}) == 5


@pytest.mark.slow
def test_grams_weighted_by_the_end_loss_round_otherwise(options, result, tmp_path):
    main(dataclasses.replace(options, ingredients=("guided",), out=tmp_path / "guided.json"))
    learned = {row["budget"]: row for row in result["rows"] if row["ingredient"] == "learned"}
    for row in read_json(tmp_path / "guided.json", "results")["rows"]:
        assert row["bits_per_weight"] <= row["budget"]
        assert row["kl"] != learned[row["budget"]]["kl"]


def test_the_page_has_every_number(options, result):
    text = page([result])
    for row in result["rows"]:
        if row["ingredient"] == options.ingredients[-1]:
            schemes = ", ".join(f"{count} {scheme}" for scheme, count in row["schemes"].items())
            assert f"| {row['budget']:g} | {row['bits_per_weight']:.3f} | {schemes} |" in text
    for name in options.ingredients:
        assert text.count(f"| {INGREDIENTS[name]} |") == 2
    assert f"| {INGREDIENTS['varied']} |" not in text
    assert f"{result['perplexity']:.4f}" in text


def test_what_cannot_be_compared(options):
    with pytest.raises(MpqError, match="no weight matches 'nothing'"):
        Comparison(dataclasses.replace(options, only="nothing"))
    with pytest.raises(MpqError, match="fits 1 bits: give a larger budget"):
        Comparison(options).uniform(1)
    images = dataclasses.replace(load(options.model), inputs=Images(4, 4))
    with pytest.raises(MpqError, match="reads no text: give"):
        windows_of(images, options.data, options.windows, options.window)
