"""Plans that round activations: the rounded model against the float64 one, the folder they are written to, and back."""

import dataclasses
import io
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from analysis.load import parse_result
from analysis.report import draw, report_html
from mpq import artifacts, pipeline, results, show
from mpq.activations import activation_rows, calibrate_activations, kv_rows, parse_activation_scheme
from mpq.activations.apply import RoundedActivation, choose_activations, with_activations
from mpq.activations.clip import choose_range
from mpq.activations.plans import PRESETS, split_plan
from mpq.activations.ranges import drifting
from mpq.config import RunConfig
from mpq.evaluate import Reference, score
from mpq.export import orbax
from mpq.export.targets import TARGETS
from mpq.hand_out import HandOut
from mpq.inputs import Arrays
from mpq.models import load
from mpq.types import MpqError
from tests import tiny
from tests.activation_cases import double, logits_of, make_data, make_model, rounded, traced
from tests.command import exit_code

TEXT = ["--window", "16", "--batch-size", "4", "--max-windows", "8"]


def by_ends(x, scheme, low, high):
    """`x[..., width]` at a static scheme, by the formula, in float64; a pair of ends for every head."""
    parts = np.split(x, len(low), axis=-1)
    out = []
    for part, least, largest in zip(parts, low, high, strict=True):
        least, largest = min(least, 0.0), max(largest, 0.0)
        span = largest - least if scheme.asymmetric else max(largest, -least)
        step = float(np.float16(span / scheme.top))
        zero = np.round(-least / step) if scheme.asymmetric else 0
        bottom = 0 if scheme.asymmetric else -scheme.top
        out.append((np.clip(np.round(part / step) + zero, bottom, scheme.top) - zero) * step)
    return np.concatenate(out, axis=-1)


def test_all_rows_at_once_are_rounded_as_in_float64():
    model, data = make_model(), make_data(6)
    rows = (*activation_rows(traced(model)), *kv_rows(traced(model), "key|value"))
    texts = ["int8_token", "int5_tensor_static_asym", "int6_token_asym", "int7_tensor_static_absmax", "int8_token"]
    texts += ["int4_head_static", "int6_head"]
    schemes = dict(zip(rows, map(parse_activation_scheme, texts), strict=True))
    ranges = calibrate_activations(model, traced(model), rows, data, batch_size=4)
    chosen = choose_activations(schemes, ranges)
    by_path = {one.spec.path: one for one in chosen}
    mask = np.ones(data.mask.shape, bool)

    def change(name, x):
        one = by_path[name]
        return rounded(x, one.scheme, mask) if one.low is None else by_ends(x, one.scheme, one.low, one.high)

    want = logits_of(double(model.params), data.inputs, change)
    got = np.asarray(jax.jit(with_activations(model, traced(model), chosen).apply)(model.params, data.inputs))
    # float32 sums of a few products; a value that rounds the other way moves a token's logits by a step
    off = np.abs(got - want).max(axis=-1)
    assert np.median(off) < 1e-5
    assert (off < 1e-4).mean() > 0.9
    assert np.abs(got - np.asarray(model.apply(model.params, data.inputs))).max() > 0.1


def test_entries_of_plans_are_read_back():
    row = kv_rows(traced(make_model()), "key")[0]
    for text, bits in (("int8_head", 0), ("int8_head_static", 128), ("int4_tensor_static_absmax", 64)):
        one = RoundedActivation(row, parse_activation_scheme(text))
        body = json.loads(json.dumps(one.to_json()))
        assert RoundedActivation.from_json(body) == one
        assert body["range_bits"] == bits
        ends = np.array([[-1.0, -2.0], [1.0, 0.5]], np.float32)
        assert RoundedActivation.from_json(body, ends).high == (1.0, 0.5)


def test_what_cannot_be_applied_is_refused():
    model = make_model()
    row = activation_rows(traced(model))[0]
    apply = lambda text, of=row, m=model: with_activations(
        m, traced(model), [RoundedActivation(of, parse_activation_scheme(text))]
    )
    with pytest.raises(MpqError, match=r"^\{query,key,value\} at int8_tensor_static has no calibrated range: give r"):
        apply("int8_tensor_static")
    with pytest.raises(MpqError, match=r"^\{query,key,value\} is no activation of tiny: the plan was made for a"):
        apply("int8_token", dataclasses.replace(row, at="elsewhere"))
    with pytest.raises(
        MpqError,
        match=r"^int8_tensor takes the range of a whole window, its padding too, and tiny reads text: use int8_token, "
        r"or int8_tensor_static$",
    ):
        apply("int8_tensor")
    apply("int8_tensor", m=dataclasses.replace(model, inputs=Arrays((6,))))
    assert with_activations(model, traced(model), []) is model
    with pytest.raises(MpqError, match=r"^int8_head has a scale for every head, and \{query,key,value\} has no heads"):
        choose_activations({row: parse_activation_scheme("int8_head")}, {})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("apply")
    tiny.write_folder(root / "model")
    (root / "text.txt").write_text(tiny.text(seed=1))
    (root / "test.txt").write_text(tiny.text(seed=2))
    return root


@pytest.fixture
def mpq(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "150")

    def call(*arguments):
        code = exit_code(*arguments)
        out, err = capsys.readouterr()
        return code, json.loads(out) if code == 0 and "--json" in arguments else out, err

    return call


@pytest.mark.parametrize(
    "to", [name for name, target in TARGETS.items() if not (target.activations or target.rounds_alike)]
)
def test_runtimes_that_hold_weights_only_refuse_it(mpq, place, to):
    if not (place / "a8").exists():
        assert mpq("quantize", "model", "int8_channel+int8_token", "--method", "rtn", "-o", "a8")[0] == 0
    count = len(orbax.load(place / "a8").plan["activations"])
    code, _, said = mpq("export", "a8", "--to", to, "-o", f"out-{to}")
    message = f"a8 rounds {count} activations as well, and format {to} holds weights only: quantize with the plan of"
    assert code == 2
    assert message in " ".join(said.split())
    assert not (place / f"out-{to}").exists()


def test_a_plan_with_activations_goes_through_the_commands(mpq, place):
    plan = "int8_channel+int8_tensor_static+int8_head_static_absmax"
    assert mpq("calibrate", "model", "--data", "text.txt", *TEXT, "--of", "both", "-o", "ranges")[0] == 0
    code, body, _ = mpq("quantize", "model", plan, "--method", "rtn", "--ranges", "ranges", "-o", "q", "--json")
    assert code == 0
    assert body["size_bytes"] == body["payload_bytes"]  # static ranges included
    exported = orbax.load(place / "q")
    rows = exported.plan["activations"]
    assert set(exported.ranges) == set(rows)
    assert body["size_bytes"] - 8 * sum(a.shape[1] for a in exported.ranges.values()) == (
        orbax.payload_bytes(place / "q") - sum(a.nbytes for a in exported.ranges.values())
    )
    # What load gives is the float model with these weights and rows rounded.
    model, quantized = load("model"), load("q")
    chosen = [RoundedActivation.from_json(row, exported.ranges[path]) for path, row in rows.items()]
    by_hand = with_activations(model, model.trace(4, 16), chosen)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (3, 16)), jnp.int32)
    run = lambda m: np.asarray(jax.jit(m.apply)(quantized.params, tokens))
    np.testing.assert_array_equal(run(quantized), run(by_hand))
    assert np.abs(run(quantized) - run(model)).max() > 1e-4
    kl = {}
    evaluate = ["--data", "test.txt", "--reference", "model", *TEXT, "--json"]
    plans = {"q8": "int8_channel", "qa4": "int8_channel+int4_token", "qkv": "int8_channel+keep+int2_head"}
    for name, text in plans.items():
        assert mpq("quantize", "model", text, "--method", "rtn", "-o", name)[0] == 0
    for name in ("q", "q8", "qa4", "qkv"):
        kl[name] = mpq("evaluate", name, *evaluate)[1]["kl"]
    assert kl["q8"] < kl["q"] < kl["qa4"]
    assert kl["qkv"] > kl["q8"]


def test_a_plan_file_takes_activations_beside_it(mpq, place):
    mpq("sensitivity", "model", "--data", "text.txt", *TEXT, "--metric", "weight_mse", "-o", "table")
    assert mpq("allocate", "table", "--bpw", "6", "-o", "plan")[0] == 0
    assert mpq("quantize", "model", "plan+int8_token", "--method", "rtn", "-o", "qp")[0] == 0
    assert {row["scheme"] for row in orbax.load(place / "qp").plan["activations"].values()} == {"int8_token"}
    model = load("model")
    weights = model.trace().weights
    whole = artifacts.load_plan(place / "plan", model, weights)
    entries = orbax.load(place / "qp").plan["activations"]
    artifacts.save_plan(place / "both", whole.with_activations(entries))
    again = artifacts.load_plan(place / "both", model, weights)
    assert again.activations == entries
    assert (again.choices, again.size_bytes) == (whole.choices, whole.size_bytes)


def test_ranges_are_shown_merged_and_drawn(mpq, place):
    mpq("calibrate", "model", "--data", "text.txt", *TEXT, "--of", "activations", "-o", "ra")
    mpq("calibrate", "model", "--data", "text.txt", *TEXT, "--of", "kv", "-o", "rk")
    code, out, _ = mpq("ranges", "ra", "rk", "-o", "all", "--schemes", "int8_tensor_static", "int8_head_static")
    assert code == 0
    assert "layers.1.self_attn.v_proj.kernel" in out.replace("\n", "")
    assert "(2 heads)" in out
    assert "of 8 windows" in out
    body = mpq("ranges", "all", "--picture", "ranges.png", "--json")[1]
    changes = [f"{round(100 * row['change']):+d} %" for row in body["rows"]]
    assert all(change in out for change in changes)  # how each range differs between the halves of the windows
    there = load("model").trace()
    assert [row["path"] for row in body["rows"]] == [row.path for row in (*activation_rows(there), *kv_rows(there))]
    assert (place / "ranges.png").read_bytes().startswith(b"\x89PNG")
    few = mpq("calibrate", "model", "--data", "text.txt", *TEXT[:4], "--max-windows", "3", "--of", "kv", "-o", "few")[1]
    assert "warning: layers.0.self_attn.k_proj.kernel: 3 windows are few" in few.replace("\n", " ")


WRONG = {
    "too many parts": (
        ["quantize", "model", "a+b+c+d"],
        "plan 'a+b+c+d' is not PLAN, PLAN+ACTIVATIONS or PLAN+ACTIVATIONS+KV: write int4_g32+int8_token, "
        "int4_g32+int8_token+int8_head, or one of w8a8, w8a8_static, w4a8, w4a8_static, w4a4, w8a8_fp8, w4a4_g32, "
        "llm_int8; keep stands for rows that stay as they are",
    ),
    "no ranges": (
        ["quantize", "model", "w8a8_static", "--method", "rtn"],
        "static ranges of activations need calibration: give --data TEXT or --ranges FILE",
    ),
    "a dynamic range": (
        ["ranges", "ranges", "--schemes", "int8_token"],
        "int8_token is dynamic and has no range to show: give static schemes, int8_tensor_static",
    ),
    "of": (
        ["calibrate", "model", "--data", "text.txt", "--of", "biases"],
        "unknown kind of row 'biases': the valid ones are weights, activations, kv, both",
    ),
    "no plan": (["quantize", "model", "w9a9"], "plan 'w9a9' is neither a file nor a scheme: unknown scheme 'w9a9'"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_said_in_one_sentence(mpq, place, arguments, message):
    if not (place / "ranges").exists():
        mpq("calibrate", "model", "--data", "text.txt", *TEXT, "--of", "both", "-o", "ranges")
    code, _, err = mpq(*arguments, "-o", "nothing")
    assert code == 2
    assert message in err
    assert not (place / "nothing").exists()


def test_every_preset_is_a_plan():
    for name, text in PRESETS.items():
        assert split_plan(name) == split_plan(text)
        bits = re.fullmatch(r"w\da(\d).*|llm_int(\d)", name)
        assert bits is not None
        assert parse_activation_scheme(split_plan(name)[1] or "").bits == int(bits[1] or bits[2])
    assert split_plan("int4_g32") == ("int4_g32", None, None)
    assert split_plan("p+keep+int8_head") == ("p", None, "int8_head")


def test_scores_of_a_rounded_model_do_not_depend_on_the_batching():
    model, data = make_model(), make_data(7)
    rows = activation_rows(traced(model))
    rounding = with_activations(
        model, traced(model), choose_activations(dict.fromkeys(rows, parse_activation_scheme("int4_token")), {})
    )
    scores = [score(rounding, model.params, data, reference=Reference(model, data, n), batch_size=0) for n in (3, 7)]
    kl = [each.summary().kl for each in scores]
    assert kl[0] == pytest.approx(kl[1], rel=1e-5)
    assert kl[0] > 0.01


def test_a_run_measures_and_hands_out_plans_with_rounded_activations(place, tmp_path):
    config = RunConfig(
        name="tiny",
        model=str(place / "model"),
        data=str(place / "text.txt"),
        schemes=("int4_g16", "int8_channel"),
        metrics=("fisher",),
        allocate_by="fisher",
        method="rtn",
        compare_methods=(),
        budgets=("6bpw",),
        hand_out="6bpw",
        window=16,
        batch_size=4,
        calibration_windows=8,
        selection_windows=8,
        test_windows=8,
        propagate=False,
        activations="int4_tensor_static+int4_head",
    )
    run = pipeline.prepare(config, tmp_path)
    body = results.finish(run, "mpq run tiny")  # holds size and outputs of the folder against the plan
    require_ranges_told(run, body)
    plain = pipeline.prepare(dataclasses.replace(config, activations=""), tmp_path)
    assert plain.ranges == {}
    method = plain.config.method
    (kl,) = (p["kl"] for p in body["plans"] if p["name"] == "int8_channel")
    assert kl > 5 * plain.scores(plain.uniform["int8_channel"], method, "test").summary().kl
    assert {row["scheme"] for row in orbax.load(run.folder / "quantized").plan["activations"].values()} == {
        "int4_tensor_static",
        "int4_head",
    }
    assert HandOut(plain).stored().activations == {}
    with pytest.raises(MpqError, match=r"^unknown activation scheme 'int9_token'"):
        dataclasses.replace(config, activations="int9_token").check()


def require_ranges_told(run, body):
    """Ranges in the results, on the terminal and in the report, against what the calibration set holds."""
    static = [one.spec for one in run.activations if one.scheme.static]
    seen = calibrate_activations(run.model, run.traced, static, run.sets["calibration"], batch_size=4)
    assert [entry["path"] for entry in body["ranges"]] == list(seen)
    for entry, found in zip(body["ranges"], seen.values(), strict=True):
        (low,), (high,) = choose_range(found, parse_activation_scheme("int4_tensor_static"), entry["path"])
        assert (entry["low"], entry["high"]) == (float(low), float(high))
        assert (entry["least"], entry["largest"]) == found.extremes
        assert sum(entry["counts"]) == entry["values"] == found.values
        middles = (np.arange(8192) - 4095.5) * 2.0**found.exponent / 4096
        beyond = found.counts[0][np.abs(middles) > high].sum() / found.values
        assert entry["clipped"] == pytest.approx(
            beyond, abs=2 * found.counts[0].max() / found.values
        )  # bins at the ends
        first, second = (np.log(found.magnitudes[part]).mean() for part in (np.s_[:4], np.s_[4:]))
        assert entry["change"] == pytest.approx(np.exp(second - first) - 1)
    assert max(entry["clipped"] for entry in body["ranges"]) > 0
    assert body["warnings"] == drifting(seen)
    shown = io.StringIO()
    show.run({"results": body, "run": "x"}, Console(file=shown, width=300))
    assert f"{len(seen)} static ranges of activations, from 8 windows; between the halves of those " in shown.getvalue()
    drifts = dict(body, warnings=["a: its range is +90 % in the later half"])
    show.run({"results": drifts, "run": "x"}, Console(file=shown, width=300))
    assert "warning: a: its range is +90 % in the later half\n" in shown.getvalue()
    result = parse_result(drifts)
    report = report_html(result, None, draw(result))
    assert report.count('<section id="ranges"') == report.count('href="#ranges"') == 1
    assert "Values of every row on 8 windows of the calibration set" in report
    assert "Warning: a: its range is +90 % in the later half." in report
    for row in result.ranges:
        assert f"<td>{row.scheme}</td>" in report
        assert row.change is None or f"{round(100 * row.change):+d} %</td>" in report
    without = dataclasses.replace(result, ranges=(), warnings=())
    assert 'id="ranges"' not in report_html(without, None, draw(without))
    (few,) = (dict(row, change=None) for row in body["ranges"][:1])
    show.run({"results": dict(body, ranges=[few]), "run": "x"}, Console(file=shown, width=300))
    assert "1 static ranges of activations, from 8 windows: too few to compare halves" in shown.getvalue()
