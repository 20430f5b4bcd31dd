"""Reading tensors: damaged files in one sentence each, slabs, memory."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mpq.finite import all_finite
from mpq.models import load, load_shapes
from mpq.models import tensors as tensors_module
from mpq.models.tensors import Safetensors, find_tensors
from mpq.types import MpqError
from tests import tiny

FILE = "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    return tiny.write_folder(tmp_path / "model")


def with_header(folder, change):
    """Replace the header of the file by what `change` makes of it."""
    data = (folder / FILE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (folder / FILE).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def move_an_end(header):
    header["model.norm.weight"]["data_offsets"][1] += 10**9


def overlap(header):
    header["model.norm.weight"]["data_offsets"] = [0, 128]


DAMAGE = {
    "too short": (lambda f: f.write_bytes(b"1234"), "has 4 bytes and is no safetensors file"),
    "empty": (lambda f: f.write_bytes(b""), "has 0 bytes and is no safetensors file"),
    "header longer than the file": (
        lambda f: f.write_bytes((10**6).to_bytes(8, "little") + f.read_bytes()[8:]),
        "its header of 1000000 bytes is longer than the file",
    ),
    "no safetensors at all": (lambda f: f.write_bytes(b"PK\x03\x04" * 100), "is longer than the file"),
    "header that is no JSON": (
        lambda f: f.write_bytes(f.read_bytes()[:8] + b"garbage" + f.read_bytes()[15:]),
        "its header is not that of one",
    ),
    "header of another kind": (lambda f: f.write_bytes((4).to_bytes(8, "little") + b"[12]"), "its header is not that"),
    "truncated": (
        lambda f: f.write_bytes(f.read_bytes()[:-100]),
        "is truncated: its tensors need 86656 bytes and it has",
    ),
    "offset out of range": (lambda f: with_header(f.parent, move_an_end), "is truncated: its tensors need 1000"),
    "overlapping tensors": (lambda f: with_header(f.parent, overlap), "is damaged or no safetensors file"),
}


@pytest.mark.parametrize("case", DAMAGE, ids=list(DAMAGE))
@pytest.mark.parametrize("read", [load, load_shapes])
def test_a_damaged_file_is_refused_in_one_sentence(folder, case, read):
    damage, message = DAMAGE[case]
    damage(folder / FILE)
    with pytest.raises(MpqError, match=message) as error:
        read(str(folder))
    assert FILE in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_opened_is_refused(folder):
    (folder / FILE).unlink()
    (folder / FILE).mkdir()
    with pytest.raises(MpqError, match=r"model\.safetensors cannot be read"):
        load(str(folder))


def test_a_file_that_changes_while_it_is_read_is_refused(folder):
    tensors = Safetensors(folder)
    save_file({"other": np.zeros(3, np.float32)}, folder / FILE)
    with pytest.raises(MpqError, match=r"cannot give the tensor 'model\.norm\.weight'"):
        list(tensors.slabs("model.norm.weight"))


def shard(folder, where):
    (folder / FILE).unlink()
    weights = tiny.tensors()
    for file in set(where.values()):
        save_file({n: v for n, v in weights.items() if where.get(n) == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def test_an_index_that_names_a_tensor_its_shard_lacks_is_refused(folder):
    where = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(tiny.tensors()))}
    shard(folder, where)
    index = folder / "model.safetensors.index.json"
    moved = {**where, "model.norm.weight": "model-0.safetensors"}
    assert moved != where
    index.write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(MpqError, match=r"says that model-0\.safetensors holds 'model\.norm\.weight', but it does not"):
        load(str(folder))


@pytest.mark.parametrize("body", [{}, {"weight_map": [1]}, {"weight_map": {"a": 3}}, {"weight_map": {"a": "../b"}}])
def test_an_index_without_a_map_to_files_beside_it_is_refused(folder, body):
    (folder / "model.safetensors.index.json").write_text(json.dumps(body))
    with pytest.raises(MpqError, match="has no 'weight_map' from tensor to file name"):
        load(str(folder))


def test_weights_under_another_name_are_refused_by_name(folder):
    (folder / FILE).rename(folder / "weights.safetensors")
    with pytest.raises(MpqError, match=r"holds weights\.safetensors, but no model\.safetensors and no "):
        load(str(folder))


def test_a_sharded_pickle_is_refused_for_shapes_as_well(folder):
    (folder / FILE).rename(folder / "pytorch_model-00001-of-00002.bin")
    for read in (load, load_shapes):
        with pytest.raises(MpqError, match=r"pytorch_model-00001-of-00002\.bin, a pickle.*save_pretrained"):
            read(str(folder))


def test_no_weights_at_all(folder):
    (folder / FILE).unlink()
    assert find_tensors(folder) is None


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("slab", [1, 100, 10**9])
def test_slabs_and_transpositions_change_no_value(tmp_path, monkeypatch, dtype, slab):
    monkeypatch.setattr(tensors_module, "SLAB", slab)
    config = {**tiny.CONFIG, "intermediate_size": 200, "hidden_act": "silu"}
    weights = {name: value.astype(dtype) for name, value in tiny.tensors(config).items()}
    params = load(str(tiny.write_folder(tmp_path / "m", config, weights))).params
    for name, value in weights.items():
        path = name.removeprefix("model.").replace("proj.weight", "proj.kernel").replace("norm.weight", "norm.scale")
        got = np.asarray(params[path.replace("tokens.weight", "tokens.embedding")])
        want = value.astype(np.float32)
        np.testing.assert_array_equal(got, want.T if "kernel" in path else want)


def test_without_a_cpu_backend_numpy_transposes(folder, monkeypatch):
    want = load(str(folder)).digest

    def absent(*_, **__):
        raise RuntimeError("Unknown backend cpu")

    monkeypatch.setattr(jax, "local_devices", absent)
    assert load(str(folder)).digest == want


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_all_finite_agrees_with_isfinite(dtype):
    largest = jnp.finfo(dtype).max
    values = [0.0, -0.0, 1.0, -1.0, float(largest), -float(largest), float(jnp.finfo(dtype).smallest_subnormal)]
    assert all_finite(np.array(values, dtype))
    assert all_finite(np.zeros((0, 3), dtype))
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        for place in range(len(values)):
            assert not all_finite(np.array([*values[:place], bad, *values[place:]], dtype))
    bits = np.arange(2**16, dtype=np.uint16).view(dtype if np.dtype(dtype).itemsize == 2 else np.float16)
    with np.errstate(invalid="ignore"):  # bfloat16's isfinite raises the flag on NaN
        expected = np.isfinite(bits)
    assert all(all_finite(bits[i : i + 1]) == expected[i] for i in range(0, 2**16, 97))


@pytest.mark.parametrize("dtype", [np.float64, ml_dtypes.float8_e5m2])
def test_all_finite_takes_other_floats_and_jax_arrays(dtype):
    assert all_finite(np.ones((2, 3), dtype))
    assert not all_finite(np.array([1.0, np.inf], dtype))
    assert all_finite(np.arange(4))
    assert not all_finite(jnp.array([[1.0, 2.0], [jnp.nan, 0.0]])[:, :1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bfloat16_value_that_is_not_finite_is_named(folder, bad):
    weights = {name: value.astype(ml_dtypes.bfloat16) for name, value in tiny.tensors().items()}
    weights["model.layers.0.self_attn.v_proj.weight"][-1, -1] = bad
    save_file(weights, folder / FILE)
    with pytest.raises(MpqError, match=r"'model\.layers\.0\.self_attn\.v_proj\.weight' holds NaN or infinity"):
        load(str(folder))


MEASURE = """
import resource, sys
import jax
from mpq.models import load
load(sys.argv[1])
high = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
before = high()
model = load(sys.argv[2])
jax.block_until_ready(model.params)
print(high() - before, sum(p.nbytes for p in model.params.values()), max(p.nbytes for p in model.params.values()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_peak_memory_is_the_model_and_one_tensor(tmp_path, dtype):
    small = tiny.write_folder(tmp_path / "small")  # the baseline: what loading any model takes
    config = {
        **tiny.CONFIG,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "vocab_size": 16000,
    }
    weights = {name: value.astype(dtype) for name, value in tiny.tensors(config).items()}
    big = tmp_path / "big"
    big.mkdir()
    (big / "config.json").write_text(json.dumps(config))
    save_file(weights, big / FILE)
    command = [sys.executable, "-c", MEASURE, str(small), str(big)]
    # What is freed goes back to the system at once: measured is what loading holds, not what the allocator keeps.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=env).stdout
    peak, whole, largest = map(int, out.split())
    assert whole > 180e6  # as float32
    assert largest < whole / 5
    assert peak < whole + largest / 2  # a slab as stored, two temporary copies of it, and what Python takes
