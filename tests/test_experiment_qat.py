"""`experiments.qat` on tiny models, and its page."""

import dataclasses

import pytest

from analysis.qat import page, recovered
from experiments import qat
from experiments.qat import IN_ORDER, NORMS, PLANS, ROUNDED, TRAINED, Options
from mpq.activations import parse_activation_scheme
from mpq.files import read_json
from mpq.formats import parse_scheme
from mpq.types import MpqError
from tests import tiny
from tests.data_cases import write_images
from tests.test_families_vision import write as write_vision

FEW = {"metric": "weight_mse", "steps": 4, "train_batch": 4, "table_rows": 8, "beside": 0.003}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("qat")
    write_vision(root / "model", "resnet_cifar")
    data = root / "images.npz"
    write_images(data, 40, 40)
    sizes = {"calibration": 16, "test": 24, "batch_size": 8, "train_rows": 16}
    schemes = ("int2_channel", "int4_channel")
    return Options(str(root / "model"), str(data), str(data), root / "out.json", ("W3A3",), schemes, **FEW | sizes)


@pytest.mark.slow
def test_every_way_of_a_plan_for_images(images):
    qat.main(images)
    result = read_json(images.out, "results")
    rows = {row["way"]: row for row in result["rows"]}
    assert list(rows) == [ROUNDED, NORMS, TRAINED]
    assert rows[ROUNDED]["schemes"] == {"int3_channel": 6, "int8_channel": 2}
    assert rows[ROUNDED]["activations"] == ["int3_tensor_static_asym", "int8_tensor_static_asym"]
    assert len({row["kl"] for row in rows.values()}) == 3
    assert {row["bits_per_weight"] for row in rows.values()} == {rows[ROUNDED]["bits_per_weight"]}
    assert set(result["record"]["inputs"]) == {"model", "train", "calibration", "selection", "test"}
    qat.main(images)
    assert read_json(images.out, "results")["rows"] == result["rows"]  # not computed again
    assert "Published, not measured here" in page([result])


def test_a_mixed_plan_of_a_text_model(tmp_path):
    files = tiny.model_and_texts(tmp_path)
    options = Options(
        model=files["model"],
        data=str(files["data"]),
        train=str(files["test"]),
        out=tmp_path / "out.json",
        schemes=("int2_tensor", "int4_tensor"),
        calibration=8,
        test=8,
        batch_size=4,
        train_rows=8,
        **FEW,
    )
    qat.main(options)
    result = read_json(options.out, "results")
    rows = {row["way"]: row for row in result["rows"]}
    assert list(rows) == [ROUNDED, IN_ORDER, TRAINED]
    assert all(row["bits_per_weight"] <= 2.5 for row in rows.values())
    assert rows[TRAINED]["last_losses"] > 0
    written = page([result])
    assert "Published" not in written
    for row in rows.values():
        assert f"| 2.5 bpw | {row['way']} | {row['bits_per_weight']:.3f} | {row['quality']:.3f} |" in written


def test_the_share_that_is_recovered():
    row = lambda quality, excess: {"plan": "a", "quality": quality, "excess": excess}
    rows = [row(0.5, 0.4), row(0.6, 0.3), row(0.85, 0.15)]
    found = recovered({"quality_name": "accuracy", "quality": 0.9, "rows": rows}, "a")
    assert found == pytest.approx((1 - 0.05 / 0.4, 1 - 0.05 / 0.3))
    found = recovered({"quality_name": "perplexity", "quality": 9.0, "rows": rows}, "a")
    assert found == pytest.approx((1 - 0.15 / 0.4, 0.5))
    nothing = [row(0.8, 0.1), row(0.95, 0.1), row(0.9, 0.1)]
    found = recovered({"quality_name": "accuracy", "quality": 0.9, "rows": nothing}, "a")
    assert found == (pytest.approx(1.0), None)


def test_every_plan_names_schemes():
    for setting in PLANS.values():
        if setting.bpw is None:
            parse_scheme(setting.weights)
            parse_activation_scheme(setting.activations)


def test_an_unknown_plan_is_refused(images):
    with pytest.raises(MpqError) as refused:
        qat.main(dataclasses.replace(images, plans=("W1",)))
    assert str(refused.value) == "unknown plan 'W1': the valid ones are 2.5 bpw, W4A4, W3A3, W2A4"
