"""A run that corrects biases and norms of its winners: handed out so where that is better on the selection set."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from analysis.load import parse_result
from mpq import pipeline, results
from mpq.config import RunConfig
from mpq.export import orbax
from mpq.hand_out import HandOut
from mpq.quantize.correction import SUFFIX
from tests.test_families_vision import write as write_vision

NAME, BEST = "mixed@3.5bpw", "rtn+correct"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    root = tmp_path_factory.mktemp("corrected")
    write_vision(root / "model", "resnet_cifar")
    rng = np.random.default_rng(0)
    images = lambda: rng.integers(0, 256, (96, 16, 16, 3), dtype=np.uint8)
    np.savez(
        root / "images.npz",
        train_x=images(),
        test_x=images(),
        train_y=rng.integers(0, 3, 96),
        test_y=rng.integers(0, 3, 96),
    )
    return RunConfig(
        name="images",
        model=str(root / "model"),
        data=str(root / "images.npz"),
        schemes=("int3_channel", "int4_channel"),
        metrics=("kl",),
        method="rtn",
        compare_methods=(),
        budgets=("3.5bpw",),
        hand_out="3.5bpw",
        batch_size=16,
        calibration_windows=48,
        selection_windows=32,
        test_windows=32,
        propagate=False,
    )


@pytest.fixture(scope="module")
def finished(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Any:
    run = pipeline.prepare(config, tmp_path_factory.mktemp("runs"))
    return run, results.finish(run, "mpq run images")


def test_it_is_better_and_handed_out(finished: Any) -> None:
    _, body = finished
    winner = body["winners"]["3.5bpw"]
    kl = winner["ways_kl"]
    assert winner["method"] == BEST
    assert list(kl) == ["rtn", BEST]
    assert kl[BEST] < 0.8 * kl["rtn"]
    rows = {p["method"]: p for p in body["plans"] if p["name"] == winner["plan"]}
    assert rows[BEST]["kind"] == "corrected"
    assert rows[BEST]["kl"] < 0.8 * rows["rtn"]["kl"]
    assert rows[BEST]["size_bytes"] == rows["rtn"]["size_bytes"]
    assert rows[BEST]["predicted_kl"] == rows["rtn"]["predicted_kl"]
    assert parse_result(body).main_method == "rtn"


def test_what_is_exported_has_the_corrected_vectors(finished: Any) -> None:
    run, body = finished
    exported = orbax.load(run.folder / "quantized").dequantized()
    assert body["exported"]["method"] == BEST
    assert body["exported"]["kl"] == next(p["kl"] for p in body["plans"] if p["method"] == BEST)
    made = HandOut(run).beside(HandOut(run).plan, BEST)
    assert made
    for path, vector in made.items():
        np.testing.assert_array_equal(exported[path], vector)
    assert any(not np.array_equal(vector, run.model.params[path]) for path, vector in made.items())
    weights = {spec.path for spec in run.traced.weights}
    for path, value in run.model.params.items():
        if path not in weights and path not in made:
            np.testing.assert_array_equal(exported[path], value)


def test_distillation_starts_from_them_and_comes_back_from_its_folder(
    finished: Any, config: RunConfig, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "load", lambda source: finished[0].model)
    run = pipeline.prepare(dataclasses.replace(config, distill_steps=3), tmp_path)
    made = HandOut(run)
    way = BEST + "+distill"
    first, beside = made.qtensors(made.plan, way), made.beside(made.plan, way)
    assert beside.keys() == made.beside(made.plan, BEST).keys()
    for path, vector in made.beside(made.plan, BEST).items():
        np.testing.assert_array_equal(beside[path], vector)  # they are not trained
    again = HandOut(pipeline.prepare(dataclasses.replace(config, distill_steps=3), tmp_path))
    for path, qtensor in again.qtensors(again.plan, way).items():
        np.testing.assert_array_equal(qtensor.qvalue, first[path].qvalue)
    for path, vector in again.beside(again.plan, way).items():
        np.testing.assert_array_equal(vector, beside[path])
        assert vector.dtype == beside[path].dtype


def test_without_the_wish_or_a_place_nothing_is_corrected(finished: Any, config: RunConfig) -> None:
    run, _ = finished
    plain = dataclasses.replace(run, config=dataclasses.replace(config, correct=False))
    assert list(HandOut(plain).ways["3.5bpw"]) == ["rtn"]
    nowhere = HandOut(run)
    nowhere.__dict__["_shifts"] = ()
    assert not any(way.endswith(SUFFIX) for way in nowhere.ways["3.5bpw"])
