"""`experiments.rounding` on a tiny model."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import rounding
from experiments.rounding import Options
from mpq.files import read_json
from mpq.formats import parse_scheme
from mpq.quantize import RTN, Candidates
from mpq.types import LayerStats, MpqError, WeightSpec
from tests import tiny


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    root = tmp_path_factory.mktemp("rounding")
    return Options(
        **tiny.model_and_texts(root),
        out=root / "tiny.json",
        schemes=("int2_g16", "int4_g16"),
        algorithms=("rtn", "rtn_mse"),
        windows=8,
        window=16,
        batch_size=4,
    )


def test_there_is_a_row_for_each_algorithm_scheme_and_part(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = rounding.comparisons(options)
    monkeypatch.setattr(rounding, "comparisons", lambda _: parts)
    rounding.main(dataclasses.replace(options, algorithms=("rtn",)))
    first = read_json(options.out, "results")["rows"]
    rounding.main(options)
    result = read_json(options.out, "results")
    assert result["rows"][: len(first)] == first  # not computed again
    rows = {(row["algorithm"], row["scheme"], row["part"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 8
    for part in ("blocks", "all"):
        assert rows["rtn", "int2_g16", part]["kl"] > rows["rtn", "int4_g16", part]["kl"] > 0
        assert rows["rtn", "int2_g16", part]["layer_loss"] > rows["rtn_mse", "int2_g16", part]["layer_loss"] > 0
    assert rows["rtn", "int4_g16", "all"]["layer_loss"] > rows["rtn", "int4_g16", "blocks"]["layer_loss"]
    assert rows["rtn", "int4_g16", "blocks"]["bits_per_weight"] == 5
    assert set(result["record"]["inputs"]) == {"data", "model", "test"}


def test_awq_moves_scales_of_the_weights_that_are_rounded(options: Options) -> None:
    part = rounding.comparisons(options)["blocks"]
    choice = {w.path: parse_scheme("int2_g16") for w in part.weights}
    moved = part.equalized(choice)
    changed = {path for path, param in part.model.params.items() if param is not moved.model.params[path]}
    assert "layers.0.mlp.down_proj.kernel" in changed
    assert "embed_tokens.embedding" not in changed
    assert moved.scores({}).summary().kl < 1e-6  # in floats the same function
    loss = lambda c: rounding.layer_loss(c, Candidates(c.model.params, c.weights, RTN("mse"), c.stats).choose(choice))
    assert loss(moved) < loss(part)


def test_the_layer_loss_is_the_mean_square_of_what_outputs_change_by() -> None:
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.standard_normal((8, 3)), jnp.float32) for name in ("a", "looked up")}
    weights = [WeightSpec(name, name, (), (8, 3), (0, 1), 1, 8, 3, name, ()) for name in params]
    x = rng.standard_normal((50, 8))
    stats = {"a": LayerStats((x.T @ x / 50)[None].astype(np.float32), np.abs(x).max(axis=0)[None], 50)}
    qtensors = {w.path: RTN()(w.read(params), parse_scheme("int3_g8")) for w in weights}
    comparison: Any = SimpleNamespace(weights=weights, model=SimpleNamespace(params=params), stats=stats)
    change = x @ (np.asarray(params["a"], np.float64) - np.asarray(qtensors["a"].dequantize(), np.float64)[0])
    # The gram is rounded to float32, relatively by 2^-24 of each entry.
    expected = np.sum(change**2) / 50
    np.testing.assert_allclose(rounding.layer_loss(comparison, qtensors), expected, rtol=1e-5)


def test_an_unknown_algorithm_is_refused(options: Options) -> None:
    with pytest.raises(MpqError, match="unknown algorithm 'magic': the valid ones are rtn, hqq, gptq"):
        rounding.main(dataclasses.replace(options, algorithms=("magic",)))
    assert {"rtn", "gptq", "hqq", "signround", "best"} < set(rounding.ALGORITHMS)
