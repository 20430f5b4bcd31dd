"""Distillation end to end: the loss falls, the format stays, the same bytes come out, also after an interrupt."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq.data import new_dataset
from mpq.distill import Distill, loop
from mpq.distill.vary import varied
from mpq.evaluate import Reference, score
from mpq.formats import parse_scheme
from mpq.generate import write
from mpq.quantize import RTN, Candidates, apply_plan
from mpq.types import MpqError
from tests import tiny

KEY = jax.random.key(0)
OPTIONS = Distill(steps=24, batch_size=4, rounding=0.05, scale=0.01, written=0, noise=0.1, save_every=6)
SCHEMES = ("int2_g16", "int3_g16_zp", "nf4_g16", "fp32")


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """Model, its trace, a mixed plan rounded to nearest, and windows."""
    model, data = tiny.loaded(tmp_path_factory.mktemp("distill") / "model", max_windows=14)
    traced = model.trace(4, 16)
    candidates = Candidates(model.params, traced.weights, RTN())
    plan = {spec.path: parse_scheme(SCHEMES[i % len(SCHEMES)]) for i, spec in enumerate(traced.weights)}
    return model, traced, candidates.choose(plan), data


@pytest.fixture(scope="module")
def distilled(setup):
    return OPTIONS(*setup, key=KEY)


def kl(setup, qtensors):
    model, traced, _, data = setup
    params = apply_plan(model.params, traced.weights, qtensors)
    return score(model, params, data, reference=Reference(model, data, 4), batch_size=0).summary().kl


def leaves(qtensors):
    return {path: [np.asarray(a) for a in jax.tree.leaves(q)] for path, q in sorted(qtensors.items())}


def same_bytes(a, b):
    for path, arrays in leaves(a).items():
        for x, y in zip(arrays, leaves(b)[path], strict=True):
            assert x.tobytes() == y.tobytes(), path


def test_the_loss_falls_and_is_that_of_an_evaluation(setup, distilled):
    before, after = kl(setup, setup[2]), kl(setup, distilled.qtensors)
    assert len(distilled.losses) == OPTIONS.steps
    assert after < 0.7 * before
    one_batch = dataclasses.replace(OPTIONS, batch_size=14, steps=1, noise=0.0, splice=False)
    assert one_batch(*setup, key=KEY).losses[0] == pytest.approx(before, rel=1e-4)


def take_rows(data, rows):
    return new_dataset(data.inputs[rows], data.mask[rows], np.arange(len(rows)), "rows")


def test_scheme_and_size_stay(setup, distilled):
    qtensors = setup[2]
    assert distilled.qtensors.keys() == qtensors.keys()
    for path, before in qtensors.items():
        after = distilled.qtensors[path]
        assert after.scheme == before.scheme
        assert [(a.shape, a.dtype) for a in jax.tree.leaves(after)] == [
            (a.shape, a.dtype) for a in jax.tree.leaves(before)
        ]
        if before.scale is None:
            np.testing.assert_array_equal(after.qvalue, before.qvalue)
        else:
            low, high = before.scheme.format.min_qvalue, before.scheme.format.max_qvalue
            assert ((np.asarray(after.qvalue) >= low) & (np.asarray(after.qvalue) <= high)).all()


@pytest.mark.parametrize(("rates", "kept"), [({"rounding": 0.0}, "qvalue"), ({"scale": 0.0}, "scale")])
def test_a_part_alone(setup, rates, kept):
    got = dataclasses.replace(OPTIONS, **rates)(*setup, key=KEY)
    for path, before in setup[2].items():
        if before.scale is not None:
            np.testing.assert_array_equal(getattr(got.qtensors[path], kept), getattr(before, kept))
    assert kl(setup, got.qtensors) < kl(setup, setup[2])


def test_the_same_key_gives_the_same_bytes_and_another_others(setup, distilled):
    again, other = OPTIONS(*setup, key=KEY), OPTIONS(*setup, key=jax.random.key(1))
    same_bytes(again.qtensors, distilled.qtensors)
    np.testing.assert_array_equal(again.losses, distilled.losses)
    assert not np.array_equal(other.losses, distilled.losses)


def test_interrupted_it_continues_to_the_same_bytes(setup, distilled, tmp_path, monkeypatch):
    state = tmp_path / "state"

    def stopping(items, description, total=None):
        for item in items:
            if item == 15:  # the last state on disk is after step 12
                raise KeyboardInterrupt
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(loop, "track", stopping)
        with pytest.raises(KeyboardInterrupt):
            OPTIONS(*setup, key=KEY, state=state)
    seen = []
    monkeypatch.setattr(loop, "track", lambda items, *_: (seen.append(i) or i for i in items))
    resumed = OPTIONS(*setup, key=KEY, state=state)
    assert seen == list(range(12, 24))
    same_bytes(resumed.qtensors, distilled.qtensors)
    np.testing.assert_array_equal(resumed.losses, distilled.losses)

    finished = OPTIONS(*setup, key=KEY, state=state)  # nothing left to do
    same_bytes(finished.qtensors, distilled.qtensors)
    with pytest.raises(MpqError, match="of another model, plan, text or options"):
        dataclasses.replace(OPTIONS, rounding=0.01)(*setup, key=KEY, state=state)
    for file in state.glob("24/state/d/*"):
        file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(MpqError, match="truncated"):
        OPTIONS(*setup, key=KEY, state=state)


@pytest.mark.parametrize("written", [8, 10_000])
def test_a_language_model_writes_what_its_quantized_form_is_trained_on(setup, tmp_path, monkeypatch, written):
    model, _, qtensors, data = setup
    options = dataclasses.replace(OPTIONS, written=written, steps=6, save_every=3)
    texts = []
    monkeypatch.setattr(loop, "write", lambda *a, **o: texts.append(write(*a, **o)) or texts[-1])
    found = options(*setup, key=KEY)
    (text,) = texts
    assert len(text.inputs) == min(written, 6 * 4)
    assert text.inputs.shape[1:] == data.inputs.shape[1:]
    assert not {row.tobytes() for row in text.inputs} & {row.tobytes() for row in data.inputs}

    # The first loss is that of the start on the first batch of this text, which nothing that is varied changes.
    batch = take_rows(text, options._rows(KEY, 0, len(text.inputs)))
    start = apply_plan(model.params, setup[1].weights, qtensors)
    want = score(model, start, batch, reference=Reference(model, batch, 4), batch_size=0).summary().kl
    assert found.losses[0] == pytest.approx(want, rel=1e-4)
    same_bytes(dataclasses.replace(options, noise=0.9)(*setup, key=KEY).qtensors, found.qtensors)

    state = tmp_path / "state"
    options(*setup, key=KEY, state=state)
    count = len(texts)
    same_bytes(options(*setup, key=KEY, state=state).qtensors, found.qtensors)
    assert len(texts) == count  # nothing left to do, nothing to write
    with pytest.raises(MpqError, match="of another model, plan, text or options"):
        dataclasses.replace(options, written=9)(*setup, key=KEY, state=state)


def test_a_model_without_a_cache_is_trained_on_the_text_given(setup, distilled):
    model, *rest = setup
    without = dataclasses.replace(model, decoder=None)
    same_bytes(dataclasses.replace(OPTIONS, written=8)(without, *rest, key=KEY).qtensors, distilled.qtensors)


def test_every_window_of_an_epoch_comes_once():
    rows = np.concatenate([OPTIONS._rows(KEY, number, 14) for number in range(3)])
    assert len(rows) == len(set(rows.tolist())) == 12
    assert not np.array_equal(OPTIONS._rows(KEY, 0, 14), OPTIONS._rows(KEY, 3, 14))


def test_varied_text_keeps_bos_and_padding_and_draws_from_the_text():
    tokens = np.arange(5 * 40).reshape(5, 40).astype(np.int32)
    mask = np.ones(tokens.shape, bool)
    mask[2, 30:] = False
    data, rows = new_dataset(tokens, mask, np.arange(5), "numbers"), np.array([2, 0])
    vary = lambda seed, **options: varied(data, rows, np.random.default_rng(seed), **options)
    np.testing.assert_array_equal(vary(0, noise=0.0, splice=False), tokens[rows])

    exchanged = np.concatenate([vary(seed, noise=0.2, splice=False) != tokens[rows] for seed in range(50)])
    assert exchanged[:, 1:30].mean() == pytest.approx(0.2, abs=0.03)
    assert not exchanged[:, 0].any()
    assert not exchanged[::2, 30:].any()
    for seed in range(20):
        spliced = vary(seed, noise=0.0, splice=True)
        assert (spliced % 40 == tokens[rows] % 40).all()  # every token at its place in its window
        for row in (spliced[0, :30], spliced[1]):
            assert len({*(row // 40).tolist()}) <= 3  # itself, another, and itself where the other is padding
            assert set(row.tolist()) <= set(tokens[mask].tolist())


def test_one_compilation_serves_all_steps(setup):
    model, traced, qtensors, data = setup
    calls = []

    def apply(params, inputs):
        calls.append(1)
        return model.apply(params, inputs)

    counting = dataclasses.replace(model, apply=apply)
    dataclasses.replace(OPTIONS, steps=2)(counting, traced, qtensors, data, key=KEY)
    few = len(calls)
    dataclasses.replace(OPTIONS, steps=9)(counting, traced, qtensors, data, key=KEY)
    assert len(calls) == 2 * few


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"steps": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"rounding": -0.1}, "at least 0"),
        ({"scale": float("inf")}, "at least 0 and finite"),
        ({"warmup": 1.5}, "warmup 1.5"),
        ({"noise": 2.0}, "noise 2.0"),
        ({"written": -1}, "written is -1"),
        ({"rounding": 0.0, "scale": 0.0}, "nothing is learned"),
    ],
)
def test_options_out_of_range(options, told):
    with pytest.raises(MpqError, match=told):
        Distill(**options)


def test_what_cannot_be_distilled(setup):
    model, traced, qtensors, data = setup
    plain = {path: q for path, q in qtensors.items() if q.scale is None}
    with pytest.raises(MpqError, match="no weight of the plan has a scale"):
        OPTIONS(model, traced, plain, data, key=KEY)
    with pytest.raises(MpqError, match="14 windows are fewer than a batch of 15"):
        dataclasses.replace(OPTIONS, batch_size=15)(*setup, key=KEY)
    path = next(path for path, q in qtensors.items() if q.scale is not None)

    def apply(params, inputs):
        changed = (params[path] != model.params[path]).any()
        return jnp.where(changed, jnp.nan, model.apply(params, inputs))

    failing = dataclasses.replace(model, apply=apply)
    with pytest.raises(MpqError, match=r"^the distillation's loss is nan at step 1: give smaller learning rates$"):
        OPTIONS(failing, traced, qtensors, data, key=KEY)
