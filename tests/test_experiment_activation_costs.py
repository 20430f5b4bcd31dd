"""`experiments.image_activations`, `activation_cost` and `activation_peers` on tiny models; a peer is stood in for."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from analysis.activation_tables import asked, costs, images, peers
from analysis.activations import BESIDE, page
from experiments import activation_cost, activation_peers, image_activations
from experiments.activations import SETTINGS
from experiments.image_activations import OWN, PLANS, SELECTION, SHIFTED
from mpq.activations import parse_activation_scheme
from mpq.activations.plans import split_plan
from mpq.files import read_json
from mpq.formats import parse_scheme
from mpq.models import load
from mpq.quantize import apply_plan
from mpq.types import MpqError
from tests import tiny
from tests.test_families_vision import write as write_vision


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    write_vision(root / "model", "resnet_cifar")
    rng = np.random.default_rng(0)
    for name, low in (("own", 0), ("shifted", 128)):
        parts = {f"{n}_x": rng.integers(low, 256, (40, 16, 16, 3), dtype=np.uint8) for n in ("train", "test")}
        np.savez(root / f"{name}.npz", **parts, **{f"{n}_y": rng.integers(0, 3, 40) for n in ("train", "test")})
    return root


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return tiny.model_and_texts(tmp_path_factory.mktemp("texts"))


@pytest.mark.slow
def test_images_are_judged_by_ranges_of_both_sets(pictures):
    sets = {
        "data": pictures / "own.npz",
        "shifted_data": pictures / "shifted.npz",
        "shifted_test": pictures / "shifted.npz",
    }
    sizes = {"calibration": 16, "selection": 20, "test": 24, "shifted": 24, "batch_size": 8}
    plans = ("W8", "W8A8 static, absmax", "W8, corrected")
    options = image_activations.Options(
        str(pictures / "model"), **sets, out=pictures / "out.json", plans=plans, **sizes
    )
    image_activations.main(options)
    result = read_json(options.out, "results")
    rows = {(row["setting"], row["calibrated_on"]): row for row in result["rows"]}
    assert list(rows) == [("W8", None), (plans[1], OWN), (plans[1], SHIFTED), (plans[2], None)]
    for row in rows.values():
        assert 0 < row[OWN]["kl"] < 0.1
        assert 0 <= row[SHIFTED]["top1"] <= 1
        assert 0 < row[SELECTION]["kl"] < 0.1
    assert rows["W8, corrected", None][OWN]["kl"] < rows["W8", None][OWN]["kl"]
    sets = image_activations.Comparison(options)
    seen, choose = {row.tobytes() for row in sets.calibration[OWN].inputs}, sets.judged[SELECTION].data
    assert len(choose.inputs) == 20
    assert not seen & {row.tobytes() for row in choose.inputs}
    assert rows["W8", None][OWN]["kl"] < rows[plans[1], OWN][OWN]["kl"]
    assert rows[plans[1], OWN] | {"calibrated_on": SHIFTED} != rows[plans[1], SHIFTED]
    assert result["original"][OWN]["kl"] == 0
    image_activations.main(options)
    assert read_json(options.out, "results") == result  # not computed again
    shown, first = images(result), rows["W8", None]
    change = 100 * (first[OWN]["top1"] - result["original"][OWN]["top1"])
    assert f"| W8 (`int8_channel`) |  | {100 * first[OWN]['top1']:.2f} % | {change:+.2f} |" in shown
    assert shown.count("| own images |") == shown.count("absmax`) | shifted |") == 1
    with pytest.raises(MpqError, match=r"^unknown plan 'W1': the valid ones are W8, W8A8 dynamic, by image, "):
        image_activations.main(dataclasses.replace(options, plans=("W1",)))


def test_every_plan_and_setting_that_is_named_is_one():
    for plan in PLANS.values():
        weights, activations, _ = split_plan(plan)
        parse_scheme(weights)
        if activations:
            parse_activation_scheme(activations)
    assert set(activation_cost.TEXTS) <= SETTINGS.keys()
    assert set(activation_cost.IMAGES) <= PLANS.keys()
    assert {name for peer in activation_peers.PEERS.values() for name in peer.ours} <= SETTINGS.keys()
    assert {peer.package for peer in activation_peers.PEERS.values()} == activation_peers.QUANTIZE.keys()


@pytest.mark.slow
def test_times_are_of_programs_that_give_what_the_rounded_model_gives(texts, pictures, tmp_path):
    sizes = {"window": 16, "batch_size": 4, "repeats": 2}
    text = activation_cost.Options(
        texts["model"], texts["data"], tmp_path / "t", ("W8", "W8A8 dynamic, groups"), **sizes
    )
    image = activation_cost.Options(
        str(pictures / "model"), pictures / "own.npz", tmp_path / "i", ("W8A8 static, absmax",), batch_size=4, repeats=1
    )
    for options in (text, image):
        activation_cost.main(options)
        result = read_json(options.out, "results")
        assert [row["setting"] for row in result["rows"]] == [activation_cost.FLOAT, *options.settings]
        first, *_, last = result["rows"]
        assert f"| {last['seconds'] / first['seconds']:.2f} |" in costs([result])
        for row in result["rows"]:
            assert row["repeats"] == options.repeats
            assert 0 < row["quartiles"][0] <= row["seconds"] <= row["quartiles"][1]
        with pytest.raises(MpqError, match=r"^unknown setting 'W1': the valid ones are W8, W8A8 dynamic, "):
            activation_cost.main(dataclasses.replace(options, settings=("W1",)))
    model, made, batch, *_ = activation_cost.prepare(text)
    got = np.asarray(activation_cost.runners(model, made, batch, ("W8",))["W8"]())
    rounded = made("W8")
    dequantized = apply_plan(rounded.model.params, rounded.traced.weights, rounded.qtensors)
    # Float32 sums in another order, in every layer; what rounding itself changes is far more.
    np.testing.assert_allclose(got, model.apply(dequantized, batch), atol=1e-4 * np.abs(got).max())
    assert np.abs(got - model.apply(model.params, batch)).max() > 1e-2 * np.abs(got).max()


def test_a_peer_is_judged_by_its_own_logits(texts, tmp_path, monkeypatch):
    model = load(texts["model"])
    apply = jax.jit(model.apply)
    seen = []

    def logits_of(folder, peer, calibration):
        seen.append((folder, peer, calibration.shape))
        noise = 0.0 if peer is None else 0.5
        return lambda tokens: np.asarray(apply(model.params, tokens)) + noise * np.sin(np.arange(96.0))

    monkeypatch.setattr(activation_peers, "logits_of", logits_of)
    name = "torchao W8A8 dynamic"
    sizes = {"windows": 8, "window": 16, "batch_size": 4}
    options = activation_peers.Options(texts["model"], texts["data"], texts["test"], tmp_path / "p", (name,), **sizes)
    activation_peers.main(options)
    first, row = read_json(options.out, "results")["rows"]
    assert first["theirs"]["kl"] == pytest.approx(0, abs=1e-6)
    assert 0.01 < row["theirs"]["kl"] < 0.2
    assert row["theirs"]["perplexity"] != pytest.approx(first["theirs"]["perplexity"], rel=1e-4)
    assert row["ours"].keys() == set(activation_peers.PEERS[name].ours)
    assert all(of["kl"] < row["theirs"]["kl"] for of in row["ours"].values())
    assert row["calibration_kl"].keys() == row["ours"].keys()
    assert row["chosen"] == min(row["calibration_kl"], key=row["calibration_kl"].get)
    assert (first["ours"], first["chosen"]) == ({}, None)
    lines = peers(read_json(options.out, "results")).splitlines()
    (line,) = [line for line in lines if "| W8A8 dynamic |" in line or "| **W8A8 dynamic** |" in line]
    assert line.startswith(f"| {name} | {row['theirs']['perplexity']:.4g} | ")
    assert [line for line in lines if "**" in line] == [line for line in lines if f"| **{row['chosen']}** |" in line]
    assert seen == [(texts["model"], None, (8, 16)), (texts["model"], activation_peers.PEERS[name], (8, 16))]
    with pytest.raises(MpqError, match=r"^unknown peer 'none': the valid ones are torchao W8A8 dynamic, "):
        activation_peers.main(dataclasses.replace(options, peers=("none",)))


def text_row(setting, change, kl):
    of = {"perplexity": 1.0, "change_percent": change, "kl": kl, "kl_stderr": None}
    return {"setting": setting, "plan": "p", "test": of, "shifted": of}


def test_what_is_asked_is_held_against_the_best_of_each_kind():
    rows = [("W8A8 dynamic", -0.7, 0.2), ("W8A8 static, MSE", 9.0, 0.3), ("W8A8 static, online", 0.5, 0.1)]
    text = {"record": {"config": {"model": "a"}}, "rows": [text_row(*row) for row in rows]}
    worse = {"record": {"config": {"model": "b"}}, "rows": [text_row("W8A8 dynamic", 0.6, 0.2), *text["rows"][1:]]}
    of = lambda top1, kl, seen=None: {"own": {"top1": top1, "kl": kl}} | ({"selection": {"kl": seen}} if seen else {})
    image = {"record": {"config": {"model": "c"}}, "original": {"own": {"top1": 0.9}}}
    image["rows"] = [
        {"setting": "W8A8 dynamic", "calibrated_on": None, **of(0.896, 0.1)},
        {"setting": "W8A8 static, MSE", "calibrated_on": "own", **of(0.9, 0.2)},
        {"setting": "W8A8 static, MSE", "calibrated_on": "shifted", **of(0.8, 0.1)},
    ]
    chosen = {"record": {"config": {"model": "d"}}, "original": {"own": {"top1": 0.9}}}
    chosen["rows"] = [
        {"setting": "W8A8 dynamic", "calibrated_on": None, **of(0.9, 0.1, 0.1)},
        {"setting": "W8A8 static, MSE", "calibrated_on": "own", **of(0.899, 0.2, 0.1)},
        {"setting": "W8A8 static, absmax", "calibrated_on": "own", **of(0.8, 0.1, 0.2)},
    ]
    assert asked([text, worse], [image, chosen]).splitlines()[2:] == [
        "| a | W8A8 dynamic | -0.70 % | W8A8 static, online | +0.50 % | 0.5 % | yes |",
        "| b | W8A8 dynamic | +0.60 % | W8A8 static, online | +0.50 % | 0.5 % | no |",
        "| c | W8A8 dynamic | -0.40 points | W8A8 static, MSE | +0.00 points | 0.3 points | no |",
        "| d | W8A8 dynamic | +0.00 points | W8A8 static, MSE | -0.10 points | 0.3 points | yes |",
    ]


def test_the_page_has_what_lies_beside():
    folder = Path("experiments/results/activations")
    read = lambda part: [read_json(path, "results") for path in sorted(part.glob("*.json"))]
    written = page(read(folder), {name: read(folder / name) for name in BESIDE})
    assert (folder / "README.md").read_text(encoding="utf-8") == written
    headings = ("Images", "Time at run time", "Beside other libraries", "Beside ONNX Runtime", "What is asked of W8A8")
    for heading in headings:
        assert f"\n## {heading}\n" in written
