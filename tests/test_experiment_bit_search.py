"""`experiments.bit_search` on a tiny model, and its page."""

from analysis.bit_search import METHODS, page
from experiments import bit_search
from experiments.bit_search import Options
from mpq.files import read_json
from tests import tiny


def test_every_method_has_the_same_candidates_and_budget(tmp_path):
    options = Options(
        **tiny.model_and_texts(tmp_path),
        out=tmp_path / "out.json",
        budgets=(3.0,),
        schemes=("int2_tensor", "int4_tensor"),
        metrics=("weight_mse",),
        steps=3,
        windows=8,
        window=16,
        batch_size=4,
        table_windows=4,
    )
    bit_search.main(options)
    result = read_json(options.out, "results")
    exact, gradient = result["rows"]
    assert (exact["method"], gradient["method"]) == ("weight_mse", "gradient")
    for row in result["rows"]:
        assert row["bits_per_weight"] <= 3.0
        assert sum(row["schemes"].values()) == 15
    assert gradient["above_gradient"] == 0
    assert abs(exact["above_gradient"] - (exact["kl"] - gradient["kl"])) < 1e-9
    bit_search.main(options)
    assert read_json(options.out, "results")["rows"] == result["rows"]  # not computed again
    written = page([result])
    assert f"| 3 | {METHODS['gradient']} | {gradient['bits_per_weight']:.3f} | " in written
