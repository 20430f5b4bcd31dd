"""Corrections in one forward pass: the same vectors as layer by layer, and what plans lose with them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from mpq.equalize import find_shifts
from mpq.evaluate import Reference, score
from mpq.formats import parse_scheme
from mpq.inputs import Dataset
from mpq.measure import PlanLoss
from mpq.models import load
from mpq.quantize import RTN, Candidates, apply_plan
from mpq.quantize.correction import correct_biases
from mpq.quantize.one_pass import OnePass
from mpq.store import MemoryStore
from tests.test_quantize_correction import SHAPES, by_hand, case, place

__all__ = ["case", "place"]


@pytest.mark.parametrize("norms", [False, True])
def test_vectors_are_those_of_the_formulas(case, norms):
    model, traced, rounded, data, shifts = case
    got = OnePass(model, traced, shifts, data, norms=norms)(rounded)
    want = by_hand(model, rounded, data, norms)
    assert got.keys() == rounded.keys()
    for name in SHAPES:  # sums of 40 in float32
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_what_is_exact_stays_as_it_is_up_to_rounding(case):
    model, traced, _, data, shifts = case
    got = OnePass(model, traced, shifts, data, norms=True)(model.params)
    for name, value in model.params.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-6, atol=1e-6, err_msg=name)


def test_vectors_are_rounded_to_the_dtype_that_they_are_stored_in(case):
    model, traced, rounded, data, shifts = case
    half = dataclasses.replace(model, stored=dict.fromkeys(model.params, "bfloat16"))
    got = OnePass(half, traced, shifts, data, norms=True)(rounded)
    for name in ("bias", "mean", "scale", "last"):
        np.testing.assert_array_equal(got[name], got[name].astype(jnp.bfloat16).astype(jnp.float32))


def test_a_channel_that_gives_one_value_keeps_its_scale(case):
    model, traced, rounded, data, shifts = case
    dead = rounded | {"b": rounded["b"].at[:, 2].set(0)}
    got = OnePass(model, traced, shifts, data, norms=True)(dead)
    want = correct_biases(model, traced, dead, shifts, data, norms=True, batch_size=8)
    assert got["scale"][2] == model.params["scale"][2]
    for name in SHAPES:  # the same sums in float32, in other batches
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def images(place):
    model = load(str(place / "model"))
    with np.load(place / "images.npz") as file:
        sets = [Dataset(file[n], np.ones(48, bool), np.arange(48, dtype=np.int32), n, n) for n in ("train_x", "test_x")]
    traced = model.trace(16)
    return model, traced, Candidates(model.params, traced.weights, RTN()), find_shifts(model, traced, sets[0]), sets


def test_convolutions_are_corrected_as_layer_by_layer(images):
    model, traced, candidates, shifts, (data, _) = images
    choice = {spec.path: parse_scheme("int3_channel") for spec in traced.weights}
    rounded = apply_plan(model.params, traced.weights, candidates.choose(choice))
    got = OnePass(model, traced, shifts, data, norms=True)(rounded)
    want = correct_biases(model, traced, rounded, shifts, data, norms=True, batch_size=16)
    assert shifts
    for shift in shifts:
        for path in shift.parameters:  # errors of float32 grow from layer to layer
            size = np.abs(np.asarray(want[path])).max()
            np.testing.assert_allclose(got[path], want[path], rtol=1e-3, atol=1e-3 * size, err_msg=path)


def test_plans_are_measured_with_what_corrects_them(images):
    model, traced, candidates, shifts, (data, test) = images
    choice = {spec.path: parse_scheme("int3_channel") for spec in traced.weights}
    rounded = apply_plan(model.params, traced.weights, candidates.choose(choice))
    reference, store = Reference(model, test, 16), MemoryStore()
    loss = lambda correct: PlanLoss(model, traced, candidates, reference, store, correct)(choice)
    biases, norms = (OnePass(model, traced, shifts, data, norms=norms) for norms in (False, True))
    assert biases.digest != norms.digest
    for correct in (biases, norms):
        scores = score(model, correct(rounded), test, reference=reference, batch_size=0)
        assert loss(correct) == pytest.approx(scores.summary().kl, rel=1e-5)
        assert loss(correct) < 0.7 * loss(None)
    assert len(store.values) == 3
