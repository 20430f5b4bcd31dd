"""Ranges of channels and of what reads them, alike: against the formula, and with the outputs as they were."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq.calibrate import calibrate
from mpq.equalize import equalize, find_folds, find_shifts
from mpq.formats import parse_scheme
from mpq.inputs import Dataset
from mpq.models import load
from mpq.quantize import RTN, Candidates, apply_plan
from tests import decoder_cases
from tests.command import exit_code
from tests.data_cases import write_images
from tests.test_equalize import random_data
from tests.test_families_vision import images
from tests.test_families_vision import write as write_vision


def of_images(model):
    some = np.asarray(images(model, 4))
    return Dataset(some, np.ones(len(some), bool), np.arange(len(some), dtype=np.int32), "noise", "0")


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    model = load(str(write_vision(tmp_path_factory.mktemp("cifar"), "resnet_cifar")))
    data, traced = of_images(model), model.trace(4)
    folds, shifts = find_folds(model, traced, data, convs=True), find_shifts(model, traced, data)
    return model, traced, data, folds, shifts, calibrate(traced, model.params, data, 4)


def as_table(folds):
    return {(fold.vectors, fold.columns): fold.rows for fold in folds}


def test_a_norm_hands_on_what_the_next_convolution_of_a_block_reads(cifar):
    model, _, _, folds, _, _ = cifar
    blocks = [f"layer{stage}.0" for stage in (1, 2, 3)]  # all else goes into residual sums
    assert as_table(folds) == {((f"{b}.bn1.bias", f"{b}.bn1.scale"), None): (f"{b}.conv2.kernel",) for b in blocks}
    kernel = np.broadcast_to(np.arange(4)[:, None], (3, 3, 4, 4))  # [height, width, in, out]
    (spec,) = (spec for spec in model.trace(4).weights if spec.path == "layer1.0.conv2.kernel")
    rows = spec.read({spec.param: jnp.asarray(kernel, jnp.float32)})[0, :, 0]
    np.testing.assert_array_equal(folds[0].taps[0], rows)


def test_biases_of_convolutions_move_with_their_columns(tmp_path):
    """SqueezeNet has no norms: what a squeezing layer gives is read by two expanding ones."""
    model = load(str(write_vision(tmp_path, "squeezenet 1.1")))
    folds = as_table(find_folds(model, model.trace(1), of_images(model), convs=True))
    squeeze = {columns: (vectors, rows) for (vectors, columns), rows in folds.items() if "squeeze" in str(columns)}
    assert squeeze
    for columns, (vectors, rows) in squeeze.items():
        assert vectors == (columns.replace("kernel", "bias"),)
        assert sorted(rows) == [columns.replace("squeeze", f"expand{n}x{n}") for n in (1, 3)]


def test_decoders_have_the_same_folds_with_and_without_convolutions(tmp_path):
    model = load(str(decoder_cases.write(tmp_path, "opt, post-norm, projected")))
    traced, data = model.trace(1, 12), random_data()
    assert find_folds(model, traced, data, convs=True) == find_folds(model, traced, data)


@pytest.mark.parametrize("scheme", ["int4_channel", "int4_tensor"])
def test_outputs_stay_and_ranges_are_alike(cifar, scheme):
    model, traced, data, folds, shifts, stats = cifar
    choice = {spec.path: parse_scheme(scheme) for spec in traced.weights}
    new = equalize(model, traced, folds, shifts, choice, stats)
    run = jax.jit(model.apply)
    before, after = run(model.params, data.inputs), run(new.params, data.inputs)
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * float(jnp.abs(before).max()))
    again, specs = calibrate(traced, new.params, data, 4), {spec.path: spec for spec in traced.weights}
    channels = lambda fold, rows: np.array([rows[np.array(fold.taps[0]) == c].max() for c in range(fold.width)])
    for fold in folds:
        # Both ranges are sqrt(r1 r2), so their ratio is one number for all channels: in logarithms, without spread.
        ratios = []
        for params, of in ((model.params, stats), (new.params, again)):
            read = np.abs(np.asarray(specs[fold.rows[0]].read(params)[0])).max(axis=1)
            made, read = channels(fold, of[fold.rows[0]].absmax[0]), channels(fold, read)
            ratios.append(np.log(made[made > 0] / read[made > 0]))
        assert np.std(ratios[1]) < 1e-3 < np.std(ratios[0])
    first = np.abs(np.asarray(specs["conv1.kernel"].read(new.params)[0])).max(axis=0)
    if scheme == "int4_tensor":
        np.testing.assert_allclose(first, first[0], rtol=1e-5)
    else:
        np.testing.assert_array_equal(new.params["conv1.kernel"], model.params["conv1.kernel"])


def test_one_scale_for_a_kernel_is_enough_then(cifar):
    """Columns of very different sizes, which their norms make up for."""
    model, traced, data, folds, shifts, stats = cifar
    choice = {spec.path: parse_scheme("int6_tensor") for spec in traced.weights}
    params, specs = dict(model.params), {spec.path: spec for spec in traced.weights}
    for shift in shifts:
        if shift.gain is not None:
            s = np.geomspace(0.1, 10, shift.width).astype(np.float32)
            params = specs[shift.weight].write(params, specs[shift.weight].read(params) * s)
            params |= {path: params[path] * s for path in shift.vectors} | {shift.gain: params[shift.gain] / s}
    run, want = jax.jit(model.apply), model.apply(model.params, data.inputs)

    def error(of):
        rounded = Candidates(of, traced.weights, RTN()).choose(choice)
        return float(jnp.square(run(apply_plan(of, traced.weights, rounded), data.inputs) - want).mean())

    changed = dataclasses.replace(model, params=params)
    assert error(equalize(changed, traced, folds, shifts, choice, stats).params) < 0.1 * error(params)


def test_the_command_equalizes_and_refuses_what_it_cannot_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_vision(tmp_path / "model", "resnet_cifar")
    write_images("images.npz", 24, 24)
    data = ["--data", "images.npz", "--max-windows", "16", "--method", "rtn"]
    plan = "int8_tensor+int8_tensor_static"
    assert exit_code("quantize", "model", plan, *data, "--equalize", "--correct-bias", "-o", "out", "--json") == 0
    body = json.loads(capsys.readouterr().out)
    assert (body["equalized"], body["corrected"]) == (True, 8)
    original, got = load("model"), load("out")
    assert not np.array_equal(got.params["layer1.0.bn1.scale"], original.params["layer1.0.bn1.scale"])
    some = images(original, 8)
    want, have = (np.asarray(jax.jit(m.apply)(m.params, some)) for m in (original, got))
    assert np.abs(have - want).max() < 0.1 * np.abs(want).max()
    message = (
        "mpq: --equalize needs --data TEXT, from which ranges and statistics come too, and moves the scales that "
        "--smooth and --awq move: leave out those, --ranges and --stats"
    )
    for wrong in (["--method", "rtn"], [*data, "--smooth"], [*data, "--awq"], [*data, "--stats", "s"]):
        assert exit_code("quantize", "model", "int8_tensor", *wrong, "--equalize", "-o", "x") == 2
        assert capsys.readouterr().err.strip() == message
