"""GPTQ with `desc_act`: groups whose rows are not neighbours, read bit for bit, and refused where they have no form."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mpq import artifacts
from mpq.distill.latent import freeze, reconstruct, start
from mpq.export import orbax
from mpq.export.arguments import export_arguments
from mpq.export.graphs import require_forms
from mpq.export.targets import TARGETS
from mpq.formats import parse_scheme
from mpq.hf import export as hf
from mpq.hf.containers import CONTAINERS, reader_of
from mpq.hf.load import load_codes
from mpq.models import load
from mpq.packed import pack_weights
from mpq.quantize import RTN, Candidates
from mpq.quantize.candidates import dequantize
from mpq.types import MpqError, QTensor
from tests import tiny
from tests.command import exit_code

GROUP = 16


def bits_of(words: np.ndarray | list[int], at: int, bits: int) -> int:
    """The integer in bits `at .. at + bits - 1` of a row of 32-bit words."""
    whole = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return (whole >> at) & ((1 << bits) - 1)


def by_hand(parts: dict[str, np.ndarray], bits: int, version: int) -> np.ndarray:
    """`float32[k, n]`, row by row: scale of the row's group times code less zero point of the row's group."""
    k, n = len(parts["g_idx"]), parts["qweight"].shape[1]
    ones = sum(1 << at for at in range(0, 32, bits)) if version == 1 and bits != 3 else 0  # carried through a word
    words = [[(int(word) + ones) % 2**32 for word in row] for row in parts["qzeros"]]
    zeros = np.array([[bits_of(row, j * bits, bits) for j in range(n)] for row in words])
    zeros = (zeros + (version == 1 and bits == 3)) % 2**bits
    codes = np.array([[bits_of(parts["qweight"][:, j], i * bits, bits) for j in range(n)] for i in range(k)])
    group = parts["g_idx"]
    return (codes - zeros[group]).astype(np.float32) * parts["scales"][group].astype(np.float32)


def shuffled(k: int, seed: int = 0) -> np.ndarray:
    """`int32[k]`: groups of `GROUP` rows that lie anywhere."""
    return np.random.default_rng(seed).permutation(np.arange(k) // GROUP).astype(np.int32)


def parts_of(bits: int, zero_point: bool, version: int, k: int = 64, n: int = 32) -> dict[str, np.ndarray]:
    """Any words and scales, which all are a checkpoint."""
    rng = np.random.default_rng(bits)
    words = lambda *shape: rng.integers(-(2**31), 2**31, shape).astype(np.int32)
    middle = CONTAINERS["gptq" if version == 1 else "gptq_v2"].pack(
        RTN()(jnp.ones((1, k, n)), parse_scheme(f"int{bits}_g{GROUP}"))
    )
    return {
        "qweight": words(k * bits // 32, n),
        "qzeros": words(k // GROUP, n * bits // 32) if zero_point else np.asarray(middle["qzeros"]),
        "scales": rng.uniform(0.01, 1, (k // GROUP, n)).astype(np.float16),
        "g_idx": shuffled(k),
    }


def config_of(bits: int, zero_point: bool, version: int) -> dict:
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "bits": bits,
        "group_size": GROUP,
        "sym": not zero_point,
        "desc_act": True,
    }


def message_of(call) -> str:
    with pytest.raises(MpqError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("bits", "zero_point"), [(4, False), (4, True), (3, True), (2, True), (8, False)])
def test_it_is_dequantized_as_by_hand(bits, zero_point, version):
    parts = parts_of(bits, zero_point, version)
    q = reader_of(config_of(bits, zero_point, version)).unpack("a", parts)
    want = by_hand(parts, bits, version)
    np.testing.assert_array_equal(np.asarray(q.dequantize())[0], want)
    np.testing.assert_array_equal(np.asarray(dequantize(q))[0], want)  # compiled, as models are read
    assert str(q.scheme) == f"int{bits}_g{GROUP}{'_zp' if zero_point else ''}"


def test_an_index_of_neighbours_is_no_index():
    parts = parts_of(4, True, 2) | {"g_idx": np.arange(64, dtype=np.int32) // GROUP}
    assert reader_of(config_of(4, True, 2)).unpack("a", parts).row_group is None


@pytest.mark.parametrize("index", [np.full(64, 4), np.full(64, -1), np.zeros(63)])
def test_an_index_that_names_no_group(index):
    parts = parts_of(4, True, 2) | {"g_idx": index.astype(np.int32)}
    message = "g_idx does not give each of 64 rows one of 4 groups: the checkpoint is damaged"
    assert message_of(lambda: reader_of(config_of(4, True, 2)).unpack("a", parts)) == message


def test_distillation_starts_from_it_and_comes_back_to_it():
    q = reader_of(config_of(4, True, 2)).unpack("a", parts_of(4, True, 2))
    w = q.dequantize() + 0.3 * q.spread(q.effective_scale)  # less than half a step away
    begun = start(w, q)
    np.testing.assert_array_equal(freeze(begun, q).qvalue, q.qvalue)
    np.testing.assert_array_equal(reconstruct(begun, q), q.dequantize())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A GPTQ folder of a whole model whose rows are in groups that lie anywhere, and its config says so."""
    place = tmp_path_factory.mktemp("order")
    config = tiny.CONFIG | {"tie_word_embeddings": False}
    model = load(str(tiny.write_folder(place / "model", config)))
    weights = model.trace(1, 16).weights
    plain = ("embed_tokens.embedding", "lm_head.kernel")
    choice = {w.path: parse_scheme("fp16" if w.path in plain else f"int4_g{GROUP}_zp") for w in weights}
    plan = artifacts.make_plan("plan", choice, None, weights, 0, model.digest)
    chosen = Candidates(model.params, weights, RTN()).choose(choice)
    orbax.save(place / "orbax", **export_arguments(model, weights, chosen, plan))
    hf.save(place / "gptq", orbax.load(place / "orbax"), CONTAINERS["gptq_v2"])
    tensors = load_file(place / "gptq/model.safetensors")
    for i, name in enumerate(sorted(tensors)):
        if name.endswith(".g_idx"):
            tensors[name] = shuffled(len(tensors[name]), i)
    save_file(tensors, place / "gptq/model.safetensors")
    body = json.loads((place / "gptq/config.json").read_text())
    body["quantization_config"]["desc_act"] = True
    (place / "gptq/config.json").write_text(json.dumps(body))
    return place / "gptq"


def test_a_whole_checkpoint_is_a_model_and_codes(folder, tmp_path, capsys):
    tensors, model, exported = load_file(folder / "model.safetensors"), load(str(folder)), load_codes(folder)
    indices = 0
    for spec in exported.weights:
        module = "model." + spec.path.removesuffix(".kernel")
        parts = {
            end: tensors[f"{module}.{end}"]
            for end in ("qweight", "qzeros", "scales", "g_idx")
            if f"{module}.{end}" in tensors
        }
        if parts:
            want = by_hand(parts, 4, 2)
            np.testing.assert_array_equal(np.asarray(model.params[spec.path]), want, err_msg=spec.path)
            np.testing.assert_array_equal(np.asarray(exported.qtensors[spec.path].dequantize())[0], want)
            indices += 32 * spec.k
    assert indices > 0
    norms = 8 * sum(value.nbytes for value in exported.params.values())
    assert exported.plan["other_bits"] == norms + indices
    text = tmp_path / "test.txt"
    text.write_text(tiny.text(documents=6))
    assert exit_code("evaluate", folder, "--data", text, "--window", "16", "--max-windows", "8", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert np.isfinite(told["perplexity"])


def test_it_is_not_written_again(folder, tmp_path):
    exported = load_codes(folder)
    path = exported.weights[1].path
    reason = (
        "has groups of rows that are not neighbours (desc_act of GPTQ), which can be read, dequantized and evaluated "
        "alone: quantize the model anew to export or pack it"
    )
    folders = (lambda name=name: hf.save(tmp_path / name, exported, CONTAINERS[name]) for name in ("gptq_v2", "hf"))
    graphs = (
        lambda name=name: require_forms(exported, name, TARGETS[name].refusal) for name in ("onnx", "litert", "pt2")
    )
    for write in (*folders, *graphs):
        message = message_of(write)
        assert re.fullmatch(rf"weight layers\..*\.kernel {re.escape(reason)}", message)
    whole = {f.name: getattr(exported, f.name) for f in dataclasses.fields(exported)}
    arguments = {key: whole[key] for key in ("params", "weights", "qtensors", "config", "tokenizer_json")}
    stored = {name: dtype for name, (_, dtype) in exported.shapes.items()}
    saved = lambda: orbax.save(tmp_path / "orbax", stored=stored, plan_json=exported.plan, **arguments)
    assert message_of(saved) == f"weight {path} {reason}"
    one: QTensor = exported.qtensors[path]
    assert message_of(lambda: pack_weights(exported.weights, {path: one})) == f"weight {path} {reason}"
    assert not list(tmp_path.iterdir())


def test_gradients_go_to_the_scale_of_a_row_s_own_group():
    q = reader_of(config_of(4, True, 2)).unpack("a", parts_of(4, True, 2))
    total = lambda scale: dataclasses.replace(q, scale=scale).dequantize()[0, 5].sum()
    slope = np.asarray(jax.grad(total)(q.scale.astype(jnp.float32)))[0]
    assert np.flatnonzero(np.abs(slope).sum(axis=1)).tolist() == [int(q.row_group[0, 5])]
