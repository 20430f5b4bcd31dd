"""`experiments.litert` on a tiny model."""

import dataclasses

import numpy as np
import pytest

from experiments import litert
from experiments.litert import Files, Options, folded
from mpq.files import read_json
from mpq.models import load
from mpq.types import MpqError
from tests import tiny
from tests.test_families_vision import write as write_vision

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> Options:
    root = tmp_path_factory.mktemp("litert")
    given = tiny.model_and_texts(root)
    return Options(
        model=str(given["model"]),
        data=str(given["data"]),
        out=root / "tiny.json",
        recipes=("weight_only_wi8_afp32",),
        schemes=("int2_channel", "int4_g16", "int8_channel"),
        rows=(8, 8),
        sensitivity_rows=8,
        window=16,
        batch_size=4,
        repeats=1,
    )


def test_a_row_has_both_files_and_ours_is_no_larger(options):
    litert.main(options)
    (row,) = read_json(options.out, "results")["rows"]
    assert row["our_bytes"] <= row["their_bytes"]
    assert row["our_kl"] > 0
    assert row["their_kl"] > 0
    assert row["kl_change"] == pytest.approx(row["our_kl"] - row["their_kl"], rel=1e-9)
    assert 0 < row["kl_change_stderr"] < row["our_kl_stderr"] + row["their_kl_stderr"]
    assert row["time_ratio"] > 0
    assert sum(row["schemes"].values()) == 15
    before = options.out.read_bytes()
    litert.main(options)
    assert options.out.read_bytes() == before


def test_the_file_that_both_start_from_is_the_model(options, tmp_path):
    files = Files(options, tmp_path)
    found, values = files.scores(files.base)
    assert found["kl"] == values.mean()
    assert abs(found["kl"]) < 1e-7  # float32 sums in another order
    assert found["agreement"] == 1


def test_norms_that_are_folded_change_nothing(tmp_path):
    model = load(str(write_vision(tmp_path / "m", "resnet_cifar")))
    x = np.random.default_rng(0).integers(0, 256, model.inputs.struct(2).shape).astype(np.uint8)
    want, made = np.asarray(model.apply(model.params, x)), folded(model)
    np.testing.assert_allclose(np.asarray(made.apply(made.params, x)), want, atol=1e-5 * np.abs(want).max())
    assert float(np.abs(made.params["bn1.mean"]).max()) == 0


def test_an_unknown_recipe(options):
    with pytest.raises(MpqError) as caught:
        litert.main(dataclasses.replace(options, recipes=("int1",)))
    message = f"unknown recipe 'int1': the valid ones are {', '.join(litert.RECIPES)}"
    assert str(caught.value) == message
