"""Quantization-aware training: gradients of LSQ by hand, the model that is trained, and `mpq qat`."""

import dataclasses
import io
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from mpq.activations import activation_rows, calibrate_activations, parse_activation_scheme
from mpq.activations.apply import RoundedActivation, choose_activations, with_activations
from mpq.distill import Distill, loop
from mpq.distill.learned import Student
from mpq.distill.rows import freeze_rows, start_rows, train_rounded
from mpq.evaluate import Reference, score
from mpq.export import orbax
from mpq.formats import parse_scheme
from mpq.progress import Watch, shown, track
from mpq.quantize import RTN, Candidates, apply_plan
from mpq.types import MpqError
from tests import tiny
from tests.activation_cases import make_data, make_model, traced
from tests.command import exit_code

ROW = activation_rows(traced(make_model()))[0]
KEY = jax.random.key(0)


def row(text, low=None, high=None, heads=0):
    return RoundedActivation(dataclasses.replace(ROW, heads=heads), parse_activation_scheme(text), low, high)


@pytest.mark.parametrize(
    "one",
    [
        row("int3_tensor_static", (-1.5,), (1.5,)),
        row("int4_tensor_static_asym", (-0.5,), (2.0,)),
        row("int4_head_static", (-1.0, -3.0), (1.0, 3.0), heads=2),
    ],
    ids=str,
)
def test_gradients_are_those_of_learned_step_sizes(one):
    """Esser et al. 2020, eq. 3, number by number: of x' in the step, and in x."""
    rng, (parts, width) = np.random.default_rng(0), (max(one.spec.heads, 1), 4)
    x = jnp.asarray(rng.normal(size=(1, 6, width)) * 1.5, jnp.float32)
    g = np.asarray(rng.normal(size=(1, 6, width)), np.float32)
    factor = jnp.asarray(rng.normal(size=parts) * 0.1, jnp.float32)
    run = jax.jit(lambda x, f: train_rounded(one, x, 2, f))
    got, pullback = jax.vjp(run, x, factor)
    (frozen,) = freeze_rows([one], {one.spec.path: factor})
    np.testing.assert_array_equal(got, frozen(x, 2))  # what will run
    dx, dfactor = pullback(jnp.asarray(g))
    want_x, want = np.zeros(x.shape), np.zeros(parts)
    for t, j in np.ndindex(6, width):
        part = j // (width // parts)
        low, high = frozen.low[part], frozen.high[part]
        top = one.scheme.top
        span = high - low if one.scheme.asymmetric else max(high, -low)
        step = float(np.float16(span / top))
        zero = round(-low / step) if one.scheme.asymmetric else 0
        least, most = (-zero, top - zero) if one.scheme.asymmetric else (-top, top)
        v = float(x[0, t, j]) / step
        inside = least <= v <= most
        by_step = round(v) - v if inside else min(max(v, least), most)
        want_x[0, t, j] = g[0, t, j] * inside
        want[part] += g[0, t, j] * by_step * step  # by the logarithm of the step
    np.testing.assert_allclose(dx, want_x, rtol=1e-6)
    np.testing.assert_allclose(dfactor, want, rtol=1e-4, atol=1e-5)


def test_a_dynamic_range_has_straight_through_gradients():
    one, x = row("int4_token"), jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 4)), jnp.float32)
    got, pullback = jax.vjp(jax.jit(lambda x: train_rounded(one, x, 2, None)), x)
    np.testing.assert_array_equal(got, one(x, 2))
    np.testing.assert_array_equal(pullback(jnp.ones_like(x))[0], 1)
    assert start_rows([one]) == {}
    assert freeze_rows([one], {}) == (one,)


@pytest.fixture(scope="module")
def setup():
    model, data = make_model(), make_data(12)
    scheme = parse_activation_scheme("int3_tensor_static_absmax")
    rows = activation_rows(traced(model))
    ranges = calibrate_activations(model, traced(model), rows, data, batch_size=4)
    chosen = choose_activations(dict.fromkeys(rows, scheme), ranges)
    choice = {w.path: parse_scheme("int4_channel") for w in traced(model).weights}
    return model, data, chosen, Candidates(model.params, traced(model).weights, RTN()).choose(choice)


OPTIONS = Distill(steps=40, batch_size=4, written=0, noise=0.0, splice=False, save_every=10, ranges=0.02)


def kl(setup, qtensors, rows):
    model, data, *_ = setup
    params = apply_plan(model.params, traced(model).weights, qtensors)
    rounded = with_activations(model, traced(model), rows)
    return score(rounded, params, data, reference=Reference(model, data, 4), batch_size=0).summary().kl


def test_training_lowers_the_loss_of_what_will_run(setup, tmp_path):
    model, data, chosen, qtensors = setup
    train = lambda options, **more: options(model, traced(model), qtensors, data, key=KEY, activations=chosen, **more)
    found = train(OPTIONS)
    before, after = kl(setup, qtensors, chosen), kl(setup, found.qtensors, found.activations)
    assert after < 0.8 * before
    assert all(a.high != b.high for a, b in zip(found.activations, chosen, strict=True))
    blind = OPTIONS(model, traced(model), qtensors, data, key=KEY)
    assert after < kl(setup, blind.qtensors, chosen)  # rounding in training is what helps
    still = train(dataclasses.replace(OPTIONS, steps=10, ranges=0.0))
    assert still.activations == chosen
    # The first loss is that of the plan as it came in, on the first batch.
    assert found.losses[0] == still.losses[0]
    state = tmp_path / "state"
    part = train(OPTIONS, state=state)
    for a, b in zip(jax.tree.leaves(part.qtensors), jax.tree.leaves(found.qtensors), strict=True):
        np.testing.assert_array_equal(a, b)
    assert part.activations == found.activations
    assert state.exists()
    again = train(OPTIONS, state=state)  # nothing is left to do
    assert again.activations == found.activations
    with pytest.raises(MpqError, match=r"^.* belongs to a training of another model, plan, text or options"):
        OPTIONS(model, traced(model), qtensors, data, key=KEY, state=state)


def test_smoothed_rows_are_refused(setup):
    model, data, chosen, qtensors = setup
    smoothed = [dataclasses.replace(chosen[0], smooth=(1.0,) * 4)]
    with pytest.raises(MpqError, match=r"^smoothed activations cannot be trained: quantize without --smooth$"):
        OPTIONS(model, traced(model), qtensors, data, key=KEY, activations=smoothed)


def test_a_loss_that_explodes_is_told_with_its_step_and_what_was_good_is_kept(setup, tmp_path, monkeypatch):
    model, data, chosen, qtensors = setup
    state, quick = tmp_path / "state", dataclasses.replace(OPTIONS, steps=20)
    train = lambda: quick(model, traced(model), qtensors, data, key=KEY, activations=chosen, state=state)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "track", lambda items, *_: (i for i in items if i < 10))
        train()
    contents = lambda: {file: file.read_bytes() for file in state.rglob("*") if file.is_file()}
    kept = contents()
    monkeypatch.setattr(Student, "loss", lambda self, learned, *_: jax.tree.leaves(learned)[0].sum() * jnp.nan)
    with pytest.raises(MpqError) as stopped:
        train()
    assert str(stopped.value) == (
        f"the distillation's loss is nan at step 11: give smaller learning rates; {state} holds the steps before it"
    )
    assert contents() == kept


def test_a_person_sees_loss_and_speed():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with shown(console) as bars:
        for _ in track(range(3), "distill", 3):
            watch = Watch("distill", outputs=1000, every=1)
            watch.tell(jnp.float32(1.25))
            (task,) = bars.tasks
            assert re.fullmatch(r"distill 1\.2500 [\d,]+/s", task.description)
    Watch("distill", outputs=1, every=1).tell("not read where nobody watches")


def test_the_command_trains_weights_and_activations(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.write_folder(tmp_path / "model")
    (tmp_path / "text.txt").write_text(tiny.text(documents=30))
    text = ["--data", "text.txt", "--window", "16", "--batch-size", "4", "--max-windows", "12"]
    plan = "int4_g16+int4_tensor_static"

    def answer(*arguments):
        assert exit_code(*arguments, "--json") == 0
        return json.loads(capsys.readouterr().out)

    answer("quantize", "model", plan, *text, "--method", "rtn", "-o", "ptq")
    told = answer("qat", "model", plan, *text, "--steps", "30", "-o", "qat")
    assert told["distill"] == 30
    assert told["size_bytes"] == told["payload_bytes"] == orbax.payload_bytes(tmp_path / "ptq")
    losses = {name: answer("evaluate", name, *text, "--reference", "model")["kl"] for name in ("ptq", "qat")}
    assert losses["qat"] < 0.8 * losses["ptq"]
    before, after = (orbax.load(tmp_path / name).ranges for name in ("ptq", "qat"))
    assert all((before[path] != after[path]).all() for path in before)
    assert not list(tmp_path.glob("*.distill"))
    beside = [orbax.load(tmp_path / name).params for name in ("ptq", "qat")]
    assert all((beside[0][path] != beside[1][path]).any() for path in beside[0])  # norms are trained, too
    low_rank = answer("qat", "model", plan, *text, "--steps", "2", "--rank", "4", "--beside-rate", "0", "-o", "lora")
    assert low_rank["payload_bytes"] == told["payload_bytes"]
    kept = orbax.load(tmp_path / "lora").params
    assert all((beside[0][path] == kept[path]).all() for path in kept)
    assert exit_code("qat", "model", plan, *text, "--devices", "99", "-o", "x") == 2
    assert "99 devices are wanted and 1 are here: give 1 to 1" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "x").exists()
    assert exit_code("qat", "model", plan, "--data", "text.txt", "--steps", "0", "-o", "x") == 2
    assert "steps, batch_size and save_every of a distillation must be at least 1" in capsys.readouterr().err
