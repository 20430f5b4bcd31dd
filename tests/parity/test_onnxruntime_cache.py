"""Decoders with a KV cache in ONNX Runtime: a prompt, then token by token, against the whole window in JAX."""

import jax
import numpy as np
import onnxruntime
import pytest

from mpq.export.orbax import Exported
from mpq.models import load
from mpq.onnx.export import load as load_codes
from mpq.onnx.export import save, size_bytes
from mpq.onnx.weights import refusal
from tests import runtime_cases, tiny
from tests.command import exit_code
from tests.runtime_cases import made, message_of, noise, require_equal, rounded_rows

pytestmark = pytest.mark.parity

SCHEMES = ("int4_g16", "int8_channel", "int4_g8_zp", "bf16")
CASES = ("llama", "gemma2", "opt, post-norm, projected", "gpt_neox", "qwen2_moe", "llama by token")


class Session:
    """A file in ONNX Runtime with the keys and values of the tokens that it has read."""

    def __init__(self, path, batch: int) -> None:
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.names = [out.name for out in self.session.get_outputs()]
        caches = [given for given in self.session.get_inputs() if given.name.startswith("past_key_values.")]
        self.past = {given.name: np.zeros((batch, given.shape[1], 0, given.shape[3]), np.float32) for given in caches}
        self.mask = np.zeros((batch, 0), np.int64)

    def read(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Logits of more tokens; padding is where the mask is 0."""
        new = np.ones_like(tokens) if mask is None else mask
        self.mask = np.concatenate([self.mask, new], axis=1)
        positions = np.maximum(np.cumsum(self.mask, axis=1) - 1, 0)[:, -tokens.shape[1] :]
        given = {"input_ids": tokens, "attention_mask": self.mask, "position_ids": positions, **self.past}
        found = dict(zip(self.names, self.session.run(None, given), strict=True))
        logits = found.pop("logits")
        self.past = {name.replace("present", "past_key_values"): value for name, value in found.items()}
        return logits


def exported(name: str, folder) -> Exported:
    model = made(name.removesuffix(" by token"), folder / "model")
    rows = rounded_rows(model, "int8_token", smooth=False) if "by token" in name else ()
    return runtime_cases.exported(model, SCHEMES, folder / "q", refusal, noise(model), rows)


@pytest.mark.parametrize("name", CASES)
def test_token_by_token_is_as_the_whole_window(name, tmp_path):
    quantized, path = exported(name, tmp_path), tmp_path / "model.onnx"
    assert save(path, quantized, name, kv_cache=True) == path.stat().st_size
    assert size_bytes(quantized, name, kv_cache=True) == path.stat().st_size
    require_equal(load_codes(path), quantized)
    apply, params = jax.jit(load(str(tmp_path / "q")).apply), quantized.dequantized()
    session, tokens = Session(path, 2), np.random.default_rng(0).integers(0, 40, (2, 5))
    logits, tokens = [session.read(tokens)], np.pad(tokens, ((0, 0), (0, 6)))
    for at in range(5, 11):  # greedy
        tokens[:, at] = logits[-1][:, -1].argmax(-1)
        logits.append(session.read(tokens[:, at : at + 1]))
    want, got = np.asarray(apply(params, tokens.astype(np.int32))), np.concatenate(logits, axis=1)
    # The same float32 weights, in sums of another order: 2^-24 of the largest value in each of a few dozen steps.
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
    np.testing.assert_array_equal(got[:, 4:-1].argmax(-1), tokens[:, 5:])
    assert {value.shape[2] for value in session.past.values()} == {11}


def test_padding_on_the_left_is_not_seen(tmp_path):
    quantized = exported("gemma2", tmp_path)
    save(tmp_path / "model.onnx", quantized, "x", kv_cache=True)
    tokens = np.random.default_rng(1).integers(0, 40, (1, 7))
    alone, padded = Session(tmp_path / "model.onnx", 1), Session(tmp_path / "model.onnx", 2)
    want = [alone.read(tokens), alone.read(tokens[:, :1])]
    mask = np.array([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    other = np.random.default_rng(2).integers(0, 40, (1, 9))
    got = [padded.read(np.concatenate([np.pad(tokens, ((0, 0), (2, 0))), other]), mask)[:1, 2:]]
    got.append(padded.read(np.concatenate([tokens[:, :1], other[:, :1]]))[:1])
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())
    assert all(np.isfinite(value).all() for value in padded.past.values())


def test_the_command_and_its_names(tmp_path):
    folder = tiny.write_folder(tmp_path / "model")
    assert exit_code("quantize", folder, "int8_channel", "--method", "rtn", "-o", tmp_path / "q") == 0
    assert exit_code("export", tmp_path / "q", "--to", "onnx", "--kv-cache", "-o", tmp_path / "model.onnx") == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    layers = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    given = {x.name: x.shape for x in session.get_inputs()}
    assert list(given)[:3] == ["input_ids", "attention_mask", "position_ids"]
    assert list(given)[3:] == [f"past_key_values.{name}" for name in layers]
    assert given["past_key_values.0.key"] == ["batch", 2, "past", 8]
    assert [x.name for x in session.get_outputs()] == ["logits", *(f"present.{name}" for name in layers)]


def test_a_model_without_a_cache(tmp_path):
    quantized = exported("bert", tmp_path)
    message = "a KV cache is one of language models, which this model is not: leave out --kv-cache"
    assert message_of(lambda: save(tmp_path / "x", quantized, "x", kv_cache=True)) == message
    assert not (tmp_path / "x").exists()


def test_a_format_without_a_cache(tmp_path, capsys):
    folder = tiny.write_folder(tmp_path / "model")
    assert exit_code("quantize", folder, "int8_channel", "--method", "rtn", "-o", tmp_path / "q") == 0
    assert exit_code("export", tmp_path / "q", "--to", "litert", "--kv-cache", "-o", tmp_path / "x") == 2
    assert "format litert has no option --kv-cache: leave it out" in " ".join(capsys.readouterr().err.split())
