"""What stock llama.cpp makes of exported files: tokens, logits, greedy text; and its own quantizer beside ours."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from experiments.llama_cpp import LlamaCpp, quantize_rows
from mpq.export.orbax import Exported
from mpq.formats import parse_scheme
from mpq.formats.ggml import GGML_SCHEMES
from mpq.gguf.export import save
from mpq.gguf.layouts import row_bytes, unpack
from mpq.models import Model, load
from mpq.quantize import RTN
from mpq.trace import Default, Site
from mpq.types import QTensor
from tests.gguf_cases import CONFIGS, quantized, random_model

pytestmark = pytest.mark.parity

WINDOW = 192


@pytest.fixture(scope="module")
def reference() -> Model:
    return load("reference")


@pytest.fixture(scope="module")
def text(root) -> str:
    return (root / "mpq/assets/reference_lm/text/test.txt").read_text()


@pytest.fixture(scope="module")
def mixed(reference, tmp_path_factory) -> Exported:
    """Every type of ggml, each in two weights or three."""
    return quantized(reference, list(GGML_SCHEMES.values()), tmp_path_factory.mktemp("mix") / "out")


@pytest.fixture(scope="module")
def opened(mixed, tmp_path_factory):
    """`mixed` as it is, and with every weight in float32 at the value that its blocks stand for."""
    folder, single = tmp_path_factory.mktemp("gguf"), parse_scheme("fp32")
    plain = {path: QTensor(q.dequantize(), None, None, single) for path, q in mixed.qtensors.items()}
    files = {}
    for name, model in (("blocks", mixed), ("float32", dataclasses.replace(mixed, qtensors=plain))):
        save(folder / name, model, name)
        files[name] = LlamaCpp(folder / name, WINDOW)
    yield files
    for file in files.values():
        file.close()


@pytest.fixture(scope="module")
def ours(reference, mixed):
    """Logits of the dequantized model in JAX, of windows filled up to one length."""
    params, apply = mixed.dequantized(), jax.jit(reference.apply)

    def logits(tokens: list[int]) -> np.ndarray:
        padded = jnp.asarray([tokens + [0] * (WINDOW - len(tokens))], jnp.int32)
        return np.asarray(apply(params, padded), np.float64)[0, : len(tokens)]

    return logits


def log_softmax(z: np.ndarray) -> np.ndarray:
    shifted = z - z.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def compare(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Smallest cosine of two sets of logits, and mean KL in nats."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    p, q = log_softmax(a), log_softmax(b)
    return float(cosine.min()), float((np.exp(p) * (p - q)).sum(-1).mean())


def as_llama_cpp_rounds(x: jax.Array, scheme: str) -> jax.Array:
    """Inputs `[..., k]` of a weight, as ggml's CPU code has them: the `vec_dot_type` of its table `type_traits_cpu`."""
    halves = {"f16": jnp.float16, "bf16": jnp.bfloat16}
    if scheme in halves:
        return x.astype(halves[scheme]).astype(jnp.float32)
    size = 256 if scheme in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "tq2_0") else 32
    blocks = x.reshape(*x.shape[:-1], -1, size)
    scale = jnp.abs(blocks).max(axis=-1, keepdims=True) / 127
    codes = jnp.round(blocks / jnp.where(scale == 0, 1, scale))
    if size == 32:
        scale = scale.astype(jnp.float16).astype(jnp.float32)
    return (codes * scale).reshape(x.shape)


def test_a_thousand_strings_are_tokenized_alike(reference, opened, text):
    rng = np.random.default_rng(0)
    pieces = [text[start : start + rng.integers(1, 200)] for start in rng.integers(0, len(text) - 200, 970)]
    pieces += ["", " ", "\n\n\t x", "naïve — 你好 🙂", "<|endoftext|>a", "it's we'll 'x", "0123456789 3.14e-5"]
    pieces += ["".join(map(chr, rng.integers(32, 0x2FFF, 20))) for _ in range(23)]
    assert len(pieces) == 1000
    for piece in pieces:
        assert opened["blocks"].tokenize(piece) == reference.tokenizer.encode(piece).ids, piece


@pytest.mark.parametrize("name", ["stories260k", "tiny1m"])
def test_sentencepiece_style_tokens_are_alike(shared_data, tmp_path, name):
    model = load(str(shared_data / "models" / name))
    save(tmp_path / "model.gguf", quantized(model, [parse_scheme("f16")], tmp_path / "out"), name)
    file, rng = LlamaCpp(tmp_path / "model.gguf", 64), np.random.default_rng(1)
    text = (shared_data / "text/tinystories_valid_head.txt").read_text()
    pieces = [text[start : start + rng.integers(1, 200)] for start in rng.integers(0, len(text) - 200, 500)]
    for piece in [*pieces, "", "naïve 你好", "  two  spaces "]:
        assert file.tokenize(piece) == model.tokenizer.encode(piece).ids, piece
    file.close()


def test_logits_are_those_of_the_dequantized_model(opened, ours, mixed, reference, text):
    tokens = reference.tokenizer.encode(text[:2000]).ids[:WINDOW]
    want = ours(tokens)
    # The same float32 values: what differs is the order of sums, and keys and values of half precision.
    cosine, kl = compare(want, opened["float32"].logits(tokens))
    assert cosine > 0.99999
    assert kl < 1e-5
    # Blocks are multiplied by inputs that llama.cpp rounds to 8 bits. What this costs is known from rounding the same
    # inputs here; the values themselves cannot be, since a rounding turns over where a half-precision key differs.
    params, inputs = mixed.dequantized(), jnp.asarray([tokens], jnp.int32)
    traced, schemes = reference.trace(1, len(tokens)), {path: str(q.scheme) for path, q in mixed.qtensors.items()}

    def rounded(site: Site, x: jax.Array, w: jax.Array, default: Default) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.integer):
            return default(x, w)  # rows of the embedding are looked up
        view = site.value_view(x.shape)
        return default(view.invert(as_llama_cpp_rounds(view(x), schemes[site.spec.path])), w)

    emulated = np.asarray(jax.jit(lambda params: traced.evaluate(params, inputs, rounded))(params))[0]
    cosine, kl = compare(want, opened["blocks"].logits(tokens))
    allowed_cosine, allowed_kl = compare(want, emulated)
    assert cosine > allowed_cosine - 1e-4
    assert kl < allowed_kl + 1e-4


def test_greedy_text_is_the_same(opened, ours, reference, text):
    start = reference.tokenizer.encode(text[:400]).ids[:64]
    written = {"jax": list(start), "llama.cpp": list(start)}
    for _ in range(60):
        written["jax"].append(int(ours(written["jax"])[-1].argmax()))
        written["llama.cpp"].append(int(opened["float32"].logits(written["llama.cpp"])[-1].argmax()))
    assert written["jax"] == written["llama.cpp"]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_computes_and_cuts_text_as_here(name, tmp_path):
    model, rng = random_model(name), np.random.default_rng(0)
    save(tmp_path / "model.gguf", quantized(model, [parse_scheme("fp32")], tmp_path / "out"), "tiny")
    file, tokens = LlamaCpp(tmp_path / "model.gguf", 48), rng.integers(2, 280, 40).tolist()
    want = np.asarray(jax.jit(model.apply)(model.params, jnp.asarray([tokens])))[0]
    # Other positions, windows, biases or norms change a cosine in its first digits; keys of half precision as above.
    cosine, kl = compare(want, file.logits(tokens))
    assert cosine > 0.99999
    assert kl < 1e-5
    letters = [*"abcdef   \n\t.,'123", "def", "abc", "  ", "'ll", "é", "你", "🙂", "\r\n", "<s>", "<|bos|>"]
    for _ in range(1000):
        piece = "".join(rng.choice(letters, rng.integers(0, 30)))
        assert file.tokenize(piece) == model.tokenizer.encode(piece).ids, piece
    file.close()


@pytest.mark.parametrize("name", GGML_SCHEMES)
def test_rounding_loses_no_more_than_llama_cpp_s_own(reference, name):
    scheme, path = GGML_SCHEMES[name], "layers.2.mlp.down_proj.kernel"
    w = np.asarray(reference.params[path], np.float32)
    importance = np.exp(np.random.default_rng(0).standard_normal(len(w))).astype(np.float32)

    def error(parts: QTensor, weight: np.ndarray) -> float:
        difference = np.asarray(parts.dequantize()[0], np.float64) - w
        return float((weight[:, None] * difference**2).sum())

    for weight in (None, importance):
        rows = quantize_rows(w, GGMLQuantizationType[name.upper()], row_bytes(scheme, len(w)), weight)
        arrays = {part: jnp.asarray(array)[None] for part, array in unpack(rows, scheme, len(w)).items()}
        theirs = QTensor(**arrays, zero_point=None, scheme=scheme)
        gram = None if weight is None else jnp.diag(jnp.asarray(weight))[None]
        got = RTN("mse")(jnp.asarray(w)[None], scheme, gram)
        plain = np.ones(len(w)) if weight is None else weight.astype(np.float64)
        assert error(got, plain) <= error(theirs, plain)
