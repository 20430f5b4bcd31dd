"""`experiments.conv_correction` on a tiny network."""

import dataclasses

import numpy as np
import pytest

from analysis.corrections import page
from experiments import conv_correction
from experiments.conv_correction import CORRECTIONS, METHODS, PLANS, Comparison, Options
from mpq.activations import parse_activation_scheme
from mpq.activations.plans import split_plan
from mpq.files import read_json
from mpq.formats import parse_scheme
from mpq.types import MpqError
from tests.data_cases import write_images
from tests.test_families_vision import write as write_vision


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    root = tmp_path_factory.mktemp("corrections")
    write_vision(root / "model", "resnet_cifar")
    write_images(root / "images.npz", 40, 40)
    sizes = {"calibration": 16, "test": 24, "batch_size": 8}
    return Options(str(root / "model"), root / "images.npz", root / "out.json", plans=("W3",), **sizes)


def test_there_is_a_row_for_each_plan_method_and_correction(options):
    conv_correction.main(options)
    result = read_json(options.out, "results")
    rows = {(row["method"], row["correction"]): row for row in result["rows"]}
    assert list(rows) == [(method, correction) for method in METHODS for correction in CORRECTIONS]
    assert rows["rtn", "biases"]["kl"] < 0.8 * rows["rtn", "none"]["kl"]
    assert result["corrected"] == 8
    assert set(result["record"]["inputs"]) == {"model", "calibration", "selection", "test"}
    conv_correction.main(options)
    assert read_json(options.out, "results")["rows"] == result["rows"]  # not computed again
    written = page([result])
    assert "| W3 (`int3_channel`) | rtn | " in written
    assert f"| {100 * rows['gptq', 'none']['top1']:.2f} % |" in written


def test_every_plan_names_schemes():
    for plan in PLANS.values():
        weights, activations, _ = split_plan(plan)
        parse_scheme(weights)
        if activations:
            parse_activation_scheme(activations)


def test_an_unknown_plan_is_refused(options):
    with pytest.raises(MpqError) as refused:
        conv_correction.main(dataclasses.replace(options, plans=("W1",)))
    assert str(refused.value) == (
        "unknown plan 'W1': the valid ones are W4, W3, W8A8 static, W4A8 static, W4A4 static, W8, one scale, W6, one "
        "scale, W4, one scale, W8A8 static, one scale"
    )


def test_plans_with_one_scale_are_measured_equalized_too(options):
    few = {"plans": ("W4, one scale",), "methods": ("rtn",), "corrections": ("none",)}
    one = dataclasses.replace(options, **few, out=options.out.with_name("one.json"))
    conv_correction.main(one)
    plain, equalized = read_json(one.out, "results")["rows"]
    assert (plain["equalized"], equalized["equalized"]) == (False, True)
    assert equalized["kl"] != pytest.approx(plain["kl"], rel=1e-3)
    comparison = Comparison(one)
    choice = {spec.path: parse_scheme("int4_tensor") for spec in comparison.traced.weights}
    same = comparison.equalized(choice)
    assert same.quality(same.model, same.model.params)["kl"] < 1e-6  # the same function, of other weights
    read = lambda of, spec: np.asarray(spec.read(of.model.params))
    moved = [(read(same, spec) != read(comparison, spec)).any() for spec in same.traced.weights]
    assert sum(moved) > len(moved) / 2
    conv_correction.main(one)
    assert len(read_json(one.out, "results")["rows"]) == 2  # not computed again
    lines = page([read_json(one.out, "results")]).splitlines()
    assert [line.split(" | ")[1] for line in lines if line.startswith("| W4, one scale")] == ["rtn", "rtn, equalized"]
