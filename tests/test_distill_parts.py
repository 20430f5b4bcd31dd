"""What training has beside codes: low-rank updates, biases and norms, moved images, several devices."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq.distill import Devices, Distill
from mpq.distill.beside import positive, reconstruct_beside, start_beside
from mpq.distill.latent import freeze, reconstruct, start, start_value
from mpq.distill.vary import moved
from mpq.evaluate import Reference, score
from mpq.formats import parse_scheme
from mpq.quantize import RTN, Candidates, apply_plan
from mpq.types import MpqError
from tests import tiny
from tests.conftest import ROOT

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def weight():
    return jnp.asarray(np.random.default_rng(0).normal(size=(1, 24, 6)), jnp.float32)


@pytest.mark.parametrize("text", ["int3_g16", "int3_g16_zp", "nf4_g8"])
def test_a_low_rank_update_is_merged_into_codes(weight, text):
    """Value and gradients against those of the whole latent value, by the chain rule in float64."""
    qtensor = RTN()(weight, parse_scheme(text))
    latent = start(weight, qtensor, rank=3, key=KEY)
    assert latent.value is None
    assert latent.left.shape == (1, 24, 3)
    assert latent.right.shape == (1, 3, 6)
    for a, b in zip(
        jax.tree.leaves(freeze(latent.merged(weight, qtensor), qtensor)), jax.tree.leaves(qtensor), strict=True
    ):
        np.testing.assert_array_equal(a, b)

    rng = np.random.default_rng(1)
    latent = dataclasses.replace(latent, right=jnp.asarray(rng.normal(size=(1, 3, 6)) * 0.7, jnp.float32))
    value = np.asarray(start_value(weight, qtensor), np.float64) + np.asarray(latent.left, np.float64) @ np.asarray(
        latent.right, np.float64
    )
    whole = dataclasses.replace(latent, value=jnp.asarray(value, jnp.float32), left=None, right=None)
    merged = freeze(latent.merged(weight, qtensor), qtensor)
    np.testing.assert_array_equal(merged.qvalue, freeze(whole, qtensor).qvalue)  # no value lies between two codes here
    assert (np.asarray(merged.qvalue) != np.asarray(qtensor.qvalue)).mean() > 0.2

    upstream = jnp.asarray(rng.normal(size=weight.shape), jnp.float32)
    loss = lambda latent: jnp.sum(reconstruct(latent.merged(weight, qtensor), qtensor) * upstream)
    got, by_value = jax.grad(loss)(latent), np.asarray(jax.grad(loss)(whole).value, np.float64)
    left, right = (np.asarray(part, np.float64) for part in (latent.left, latent.right))
    # sums of at most 24 products in float32
    np.testing.assert_allclose(got.left, by_value @ right.transpose(0, 2, 1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.right, left.transpose(0, 2, 1) @ by_value, rtol=1e-4, atol=1e-5)


def test_parameters_beside_the_weights():
    rng = np.random.default_rng(0)
    params = {
        "norm": jnp.asarray(np.exp(rng.normal(size=5)), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=5), jnp.float32),
        "zero": jnp.zeros(5),
        "steps": jnp.arange(5),
    }
    learned = start_beside(params, ())
    assert learned.keys() == {"norm", "bias", "zero"}
    kept = positive(params, learned)
    assert kept == {"norm"}
    for path, same in reconstruct_beside(learned, params, {}, kept).items():
        np.testing.assert_array_equal(same, params[path])

    change = {path: jnp.asarray(rng.normal(size=5), jnp.float32) for path in learned}
    upstream = {path: jnp.asarray(rng.normal(size=5), jnp.float32) for path in learned}
    run = lambda change: reconstruct_beside(change, params, {"bias": "bfloat16"}, kept)
    got, pullback = jax.vjp(run, change)
    (slope,) = pullback(upstream)
    double = lambda tree: {path: np.asarray(x, np.float64) for path, x in tree.items()}
    begin, moves, weights = double(params), double(change), double(upstream)
    size = np.sqrt(np.mean(begin["bias"] ** 2))
    want = {"norm": begin["norm"] * np.exp(moves["norm"]), "zero": moves["zero"]}
    for path, expected in want.items():
        np.testing.assert_allclose(got[path], expected, rtol=1e-6)
    bias = begin["bias"] + size * moves["bias"]
    np.testing.assert_allclose(got["bias"], bias, rtol=2**-8)  # half a step of bfloat16
    np.testing.assert_array_equal(got["bias"], got["bias"].astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(slope["norm"], weights["norm"] * want["norm"], rtol=1e-5)
    np.testing.assert_allclose(slope["bias"], weights["bias"] * size, rtol=1e-5)
    np.testing.assert_allclose(slope["zero"], weights["zero"], rtol=1e-6)


def test_moved_images_are_crops_of_images_with_repeated_edges():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 8, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(moved(images, rng, mirror=False, shift=0.0), images)
    found = []
    for image, got in zip(images, moved(images, np.random.default_rng(1), mirror=True, shift=0.125), strict=True):
        clipped = lambda places, size: np.clip(places, 0, size - 1)
        for up, left, mirrored in np.ndindex(3, 5, 2):
            rows, columns = clipped(np.arange(8) + up - 1, 8), clipped(np.arange(16) + left - 2, 16)
            crop = image[rows][:, columns[::-1] if mirrored else columns]
            if np.array_equal(crop, got):
                found.append((up, left, mirrored))
    assert len(found) == len(images)
    assert [len({one[i] for one in found}) for i in range(3)] == [3, 5, 2]


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    model, data = tiny.loaded(tmp_path_factory.mktemp("parts") / "model", max_windows=12)
    traced = model.trace(4, 16)
    choice = {spec.path: parse_scheme("int3_g16") for spec in traced.weights}
    return model, traced, Candidates(model.params, traced.weights, RTN()).choose(choice), data


def test_low_rank_updates_and_norms_lower_the_loss(setup):
    model, traced, qtensors, data = setup
    reference = Reference(model, data, 4)

    def kl(qtensors, beside=None):
        params = apply_plan({**model.params, **(beside or {})}, traced.weights, qtensors)
        return score(model, params, data, reference=reference, batch_size=0).summary().kl

    options = Distill(
        steps=40, batch_size=4, rounding=0.05, scale=0.0, beside=0.01, rank=4, written=0, noise=0.0, splice=False
    )
    found = options(*setup, key=KEY)
    norms = {path for path in model.params if path.endswith("scale")}
    assert found.beside.keys() == norms
    assert all((found.beside[path] != model.params[path]).any() for path in norms)
    after = kl(found.qtensors, found.beside)
    assert after < 0.7 * kl(qtensors)
    assert after < kl(found.qtensors)  # the norms are part of it
    for path, q in found.qtensors.items():
        np.testing.assert_array_equal(q.scale, qtensors[path].scale)
    # Where it starts from other norms, the loss of the first step is theirs.
    whole = dataclasses.replace(options, steps=1, batch_size=12)
    assert whole(*setup, key=KEY, beside=found.beside).losses[0] == pytest.approx(kl(qtensors, found.beside), rel=1e-4)


_ON_EIGHT = """
import json, sys
import jax, numpy as np
from mpq.distill import Devices, Distill, loop
from mpq.formats import parse_scheme
from mpq.quantize import RTN, Candidates
from tests.activation_cases import make_data, make_model
shapes = {"embed": (7, 8), **dict.fromkeys(("query", "key", "value", "out"), (8, 8))}
shapes |= {"up": (8, 16), "down": (16, 8), "head": (8, 7)}
model, data = make_model(shapes=tuple(shapes.items())), make_data(16)
traced = model.trace(8, 6)
choice = {w.path: parse_scheme("int4_channel") for w in traced.weights}
qtensors = Candidates(model.params, traced.weights, RTN()).choose(choice)
told = {}
for name, devices in {"one": Devices(), "data": Devices(8), "fsdp": Devices(8, fsdp=True)}.items():
    held = []
    loop.checkpoint.save = lambda path, whole, losses, of: held.append(whole)
    options = Distill(steps=4, batch_size=8, written=0, noise=0.0, splice=False, devices=devices)
    found = options(model, traced, qtensors, data, key=jax.random.key(0), state=__import__("pathlib").Path("none"))
    size = lambda leaf: leaf.addressable_shards[0].data.size
    leaves = [leaf for leaf in jax.tree.leaves(held[0]) if leaf.size >= 64]
    told[name] = {
        "losses": np.asarray(found.losses, float).tolist(),
        "codes": [np.asarray(q.qvalue).ravel().tolist() for q in found.qtensors.values()],
        "share": [size(leaf) / leaf.size for leaf in leaves],
        "devices": max(len(leaf.sharding.device_set) for leaf in leaves),
    }
print(json.dumps(told))
"""


def test_eight_devices_give_the_loss_of_one():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", _ON_EIGHT], env=os.environ | flags, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    one = told["one"]
    assert (one["devices"], told["data"]["devices"], told["fsdp"]["devices"]) == (1, 8, 8)
    assert set(one["share"]) == set(told["data"]["share"]) == {1.0}
    assert len(told["fsdp"]["share"]) == 18  # values, and two moments of each, of six weights of 64 numbers or more
    assert set(told["fsdp"]["share"]) == {0.125}
    for name in ("data", "fsdp"):
        # Sums of 48 outputs of 7 classes in another order: at most some 340 roundings of 2**-24.
        np.testing.assert_allclose(told[name]["losses"], one["losses"], rtol=2e-5)
        assert told[name]["codes"] == one["codes"]


@pytest.mark.parametrize(
    ("devices", "told"),
    [
        (Devices(0), "0 devices are wanted and 1 are here: give 1 to 1"),
        (Devices(99), "99 devices are wanted and 1 are here: give 1 to 1"),
    ],
)
def test_devices_that_are_not_there(setup, devices, told):
    with pytest.raises(MpqError) as refused:
        Distill(batch_size=4, devices=devices)(*setup, key=KEY)
    assert str(refused.value) == told


def test_a_batch_that_cannot_be_divided(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [None] * 8)
    with pytest.raises(MpqError) as refused:
        Devices(8).check(12)
    assert str(refused.value) == "a batch of 12 cannot be divided among 8 devices: give a multiple of them"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rank": -1}, "the rank of a low-rank update is -1: give at least 1, or 0 for none"),
        ({"shift": 1.5}, "warmup 0.05, noise 0.3 and shift 1.5 must be in 0 .. 1"),
        ({"beside": -1.0}, "learning rates (0.006, 0.001, 0.006, 0.003, -1.0) must be at least 0 and finite"),
    ],
)
def test_options_out_of_range(options, told):
    with pytest.raises(MpqError) as refused:
        Distill(**options)
    assert str(refused.value) == told
