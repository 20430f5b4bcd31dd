"""The state of a training: kills, damage, full disks, other devices."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq.distill import checkpoint
from mpq.types import MpqError

ROOT = Path(__file__).parents[1]
TOLD = {"of": "this training"}


def state(number: float):
    """A tree of some forms, with an array that has no elements."""
    return {"a": jnp.full((8, 6), number), "b": (jnp.int32(number), jnp.zeros((0, 3)), jnp.arange(5.0) + number)}


def load(path, number=0.0):
    return checkpoint.load(path, state(number), TOLD)


def test_the_last_state_comes_back_to_the_bit(tmp_path):
    path = tmp_path / "deep" / "state"
    assert not checkpoint.exists(path)
    checkpoint.save(path, state(1.0), [0.1, 0.2], TOLD)
    checkpoint.save(path, state(3.0), [0.1, 0.2, 1 / 3], TOLD)
    assert checkpoint.exists(path)
    whole, losses = load(path)
    assert losses == [0.1, 0.2, 1 / 3]
    assert jax.tree.structure(whole) == jax.tree.structure(state(3.0))
    for got, want in zip(jax.tree.leaves(whole), jax.tree.leaves(state(3.0)), strict=True):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        np.testing.assert_array_equal(got, want)
    assert os.listdir(path) == ["3"]  # one at a time
    checkpoint.remove(path)
    assert not path.exists()
    checkpoint.remove(path)


def test_any_user_of_orbax_can_read_it(tmp_path):
    from orbax.checkpoint import StandardCheckpointer

    checkpoint.save(tmp_path / "state", state(2.0), [0.5], TOLD)
    with checkpoint.quiet(), StandardCheckpointer() as reader:
        arrays = reader.restore((tmp_path / "state/1/state").absolute())
    assert sorted(arrays) == ["0", "1", "3"]
    np.testing.assert_array_equal(arrays["3"], np.arange(5.0) + 2)


def test_damage_is_refused_wherever_it_is(tmp_path):
    path = tmp_path / "state"
    checkpoint.save(path, state(1.0), [0.1], TOLD)
    files = [file for file in path.rglob("*") if file.is_file()]
    assert len(files) > 5
    for file in files:
        content = file.read_bytes()
        for changed in (content[: len(content) // 2] + b"x", b"\xff" + content[1:], content + b"}"):
            file.write_bytes(changed)
            with pytest.raises(MpqError, match=r"state is truncated or damaged, [^\n]*: remove it to start anew$"):
                load(path)
        if file.name != "mpq.json":
            file.unlink()
            with pytest.raises(MpqError, match=r"is truncated or damaged, not what was written: remove it to start"):
                load(path)
        file.write_bytes(content)
    (path / "1" / "state" / "more").write_text("")
    with pytest.raises(MpqError, match=r"is truncated or damaged"):
        load(path)
    (path / "1" / "state" / "more").unlink()
    load(path)


def test_a_state_of_a_wrong_number_of_steps_is_refused(tmp_path):
    path = tmp_path / "state"
    checkpoint.save(path, state(1.0), [0.1], TOLD)
    text = path / "1" / "mpq.json"
    body = json.loads(text.read_text())
    text.write_text(json.dumps(body | {"losses": [0.1, 0.2]}))
    with pytest.raises(MpqError, match=r"is truncated or damaged, not what was written: remove it to start anew"):
        load(path)
    text.write_text(json.dumps({"of": TOLD["of"]}))
    with pytest.raises(MpqError, match=r"its mpq.json cannot be read: remove it to start anew"):
        load(path)


def test_another_training_is_refused(tmp_path):
    path = tmp_path / "state"
    checkpoint.save(path, state(1.0), [0.1], {"of": "another"})
    with pytest.raises(MpqError, match=r"belongs to a training of another model, plan, text or options: remove it"):
        load(path)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_no_state_is_neither_written_over_nor_removed(tmp_path, kind):
    path = tmp_path / "state"
    if kind == "folder":
        path.mkdir()
    kept = path / "7.txt" if kind == "folder" else path
    kept.write_text("mine")
    does = (
        lambda: checkpoint.exists(path),
        lambda: checkpoint.save(path, state(1.0), [0.1], TOLD),
        lambda: checkpoint.remove(path),
    )
    for do in does:
        with pytest.raises(MpqError, match=r"is no state of a training, as an interrupted one leaves it: move or"):
            do()
    assert kept.read_text() == "mine"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), ValueError("RESOURCE_EXHAUSTED: writing /x")])
def test_a_full_disk_is_said_and_the_state_before_stays(tmp_path, monkeypatch, error):
    from orbax.checkpoint import StandardCheckpointer

    path = tmp_path / "state"
    checkpoint.save(path, state(1.0), [0.1], TOLD)

    def refuse(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(StandardCheckpointer, "save", refuse)
        with pytest.raises(MpqError, match=r"^cannot write .*state/2: the disk is full; free some space"):
            checkpoint.save(path, state(2.0), [0.1, 0.2], TOLD)
    assert load(path)[1] == [0.1]


_WRITES = """
import sys
from pathlib import Path
from mpq.distill import checkpoint
from tests.test_distill_checkpoint import TOLD, load, state
path = Path(sys.argv[1])
done = len(load(path)[1]) if checkpoint.exists(path) else 0
while True:
    done += 1
    checkpoint.save(path, state(float(done)), [0.5] * done, TOLD)
    print(done, flush=True)
"""


def test_a_kill_at_any_moment_leaves_the_last_whole_state(tmp_path):
    path, seen = tmp_path / "state", 0
    for wait in (0.0, 0.02):
        command = [sys.executable, "-c", _WRITES, str(path)]
        env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
            assert child.stdout is not None
            told = [int(child.stdout.readline()) for _ in range(3)]
            assert told[0] == seen + 1  # went on from what the killed one left
            time.sleep(wait)  # somewhere in the next ones
            child.send_signal(signal.SIGKILL)
            told += map(int, child.stdout.read().split())
        whole, losses = load(path)
        seen = len(losses)
        assert seen in (told[-1], told[-1] + 1)
        np.testing.assert_array_equal(whole["a"], np.full((8, 6), seen))


_ELSEWHERE = """
import json, shutil, sys
from pathlib import Path
import jax, numpy as np
from mpq.distill import Devices, Distill, checkpoint, loop
from tests.activation_cases import make_data, make_model
from mpq.formats import parse_scheme
from mpq.quantize import RTN, Candidates
shapes = {"embed": (7, 8), **dict.fromkeys(("query", "key", "value", "out"), (8, 8))}
shapes |= {"up": (8, 16), "down": (16, 8), "head": (8, 7)}
model, data = make_model(shapes=tuple(shapes.items())), make_data(16)
traced = model.trace(8, 6)
qtensors = Candidates(model.params, traced.weights, RTN()).choose(
    {w.path: parse_scheme("int4_channel") for w in traced.weights}
)
ways = {"one": Devices(), "four": Devices(4, fsdp=True), "eight": Devices(8, fsdp=True)}
track = loop.track
def train(way, state, stop=None):
    loop.track = lambda items, *rest: track([i for i in items if stop is None or i < stop], *rest)
    options = Distill(steps=8, batch_size=8, written=0, noise=0.0, splice=False, save_every=4, devices=ways[way])
    return options(model, traced, qtensors, data, key=jax.random.key(0), state=state)
told = {"whole": np.asarray(train("one", None).losses, float).tolist()}
train("eight", Path(sys.argv[1]), stop=4)
load, shares = checkpoint.load, set()
def looked_at(*args):
    whole, losses = load(*args)
    leaves = [leaf for leaf in jax.tree.leaves(whole) if leaf.size >= 64]
    shares.update(leaf.addressable_shards[0].data.size / leaf.size for leaf in leaves)
    return whole, losses
loop.checkpoint.load = looked_at
for way in ways:
    state = Path(sys.argv[1] + way)
    shutil.copytree(sys.argv[1], state)
    shares.clear()
    told[way] = {"losses": np.asarray(train(way, state).losses, float).tolist(), "shares": sorted(shares)}
print(json.dumps(told))
"""


def test_a_state_of_eight_devices_goes_on_on_any_number_of_them(tmp_path):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _ELSEWHERE, str(tmp_path / "state")]
    run = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    for name, shares in {"one": [1.0], "four": [0.25], "eight": [0.125]}.items():
        assert told[name]["shares"] == shares
        # Sums of 48 outputs of 7 classes in another order: at most some 340 roundings of 2**-24.
        np.testing.assert_allclose(told[name]["losses"], told["whole"], rtol=2e-5)


def test_orbax_is_imported_only_to_write_and_read():
    code = "import sys, mpq.distill; sys.exit('orbax.checkpoint' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
