"""Rotated, every decoder family is the same function; an independent float64 Llama says what its weights must be."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq.equalize import rotate
from mpq.equalize import rotate as rotate_model
from mpq.equalize.cut import Cut
from mpq.equalize.heads import find_heads
from mpq.equalize.orthogonal import identity, random_rotation
from mpq.equalize.rotate import BOUND
from mpq.equalize.stream import Refusal, Stream, find_stream
from mpq.inputs import Arrays, Dataset
from mpq.models import load
from mpq.models.model import Model
from mpq.models.untied import untie
from mpq.tasks import TASKS
from mpq.types import MpqError
from tests import decoder_cases, tiny
from tests.decoder_oracle import numpy_logits

KEY = jax.random.key(7)
TIED = ("qwen2", "gpt2", "opt")
CENTRED = ("gpt2", "opt", "gpt_neox")
SANDWICH = (
    "the residual stream cannot be rotated before `layers.0.mlp.gate_proj.kernel`: "
    "`layers.0.post_attention_layernorm.scale` acts on its features one by one"
)
REFUSED = {
    "gemma2": SANDWICH,
    "gemma3_text": SANDWICH,
    "opt, post-norm, projected": "`layers.0.input_layernorm.scale` scales the residual stream itself, which "
    "`layers.1.self_attn.q_proj.kernel` reads through another norm",
}


def random_data(vocabulary=decoder_cases.VOCAB, time=12):
    tokens = np.random.default_rng(0).integers(0, vocabulary, (2, time), dtype=np.int32)
    return Dataset(tokens, np.ones_like(tokens, bool), np.arange(2, dtype=np.int32), "random tokens", "0")


# One of each kind of block is always run: the others are `slow`.
FIRST = ("llama", "qwen2_moe", "gemma2", "gpt2", "opt, post-norm, projected")
FAMILIES = [pytest.param(name, marks=() if name in FIRST else pytest.mark.slow) for name in decoder_cases.CASES]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_decoder_family_is_rotated_and_stays_what_it_was_or_says_why_not(name, tmp_path):
    model = load(str(decoder_cases.write(tmp_path / "model", name)))
    found = rotate(model, model.trace(1, 12), random_data(), KEY)
    assert found.refusal == REFUSED.get(name)
    assert (found.untied is not None) == (name in TIED)
    assert [heads.writer.split(".")[1] for heads in found.heads] == ["0", "1"]
    largest = float(np.abs(jax.jit(model.apply)(model.params, random_data().inputs)).max())
    assert 0 < found.change <= found.bound < 1e-4 * largest  # a wrong one changes as much as there is
    changed = {path for path in model.params if found.model.params[path] is not model.params[path]}
    if found.stream is None:
        assert changed <= {
            f"layers.{i}.self_attn.{n}" for i in range(2) for n in ("v_proj.kernel", "o_proj.kernel", "v_proj.bias")
        }
        return
    assert found.stream.keep_ones == (name in CENTRED)
    assert {spec.param for spec in found.traced.weights if spec.k == decoder_cases.D} <= changed | {"lm_head.kernel"}
    for path in found.model.params:
        if path.endswith("layernorm.scale") or path == "norm.scale":
            np.testing.assert_array_equal(found.model.params[path], 1.0)
    # the window that proved it is not the only one: other tokens, and all of the context
    tokens = np.random.default_rng(1).integers(0, decoder_cases.VOCAB, (2, decoder_cases.CONTEXT), dtype=np.int32)
    before, after = jax.jit(model.apply)(model.params, tokens), jax.jit(found.model.apply)(found.model.params, tokens)
    np.testing.assert_allclose(after, before, rtol=0, atol=4 * found.bound)


@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_is_rotated_as_the_equations_say(tied, tmp_path):
    """W Q of writers, Q^T diag(g) W of readers, R of the values' heads: in float64, from the checkpoint's tensors."""
    config = tiny.CONFIG | {"num_hidden_layers": 1, "tie_word_embeddings": tied}
    tensors = tiny.tensors(config)
    model = load(str(tiny.write_folder(tmp_path / "model", config, tensors)))
    found = rotate(model, model.trace(1, 12), random_data(96), KEY)
    stream, values = (jax.random.fold_in(jax.random.split(KEY)[0], i) for i in range(2))
    q = random_rotation(32, stream).matrix
    r = [random_rotation(8, jax.random.fold_in(values, head)).matrix for head in range(2)]
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}  # [out, in]
    at = "model.layers.0."
    first, second = (w[f"{at}{name}_layernorm.weight"] for name in ("input", "post_attention"))
    by_head = lambda blocks: np.block(
        [[b if i == j else np.zeros((8, 8)) for j in range(len(blocks))] for i, b in enumerate(blocks)]
    )
    last = w["model.norm.weight"]
    head = w["model.embed_tokens.weight"] if tied else w["lm_head.weight"]
    o, v = w[f"{at}self_attn.o_proj.weight"].T, w[f"{at}self_attn.v_proj.weight"].T
    want = {
        "embed_tokens.embedding": w["model.embed_tokens.weight"] @ q,
        "lm_head.kernel": q.T @ (head * last).T,
        "layers.0.self_attn.v_proj.kernel": q.T @ (first[:, None] * v) @ by_head(r),
        "layers.0.self_attn.o_proj.kernel": by_head([r[0], r[0], r[1], r[1]]).T @ o @ q,
        "layers.0.mlp.down_proj.kernel": w[f"{at}mlp.down_proj.weight"].T @ q,
    }
    for name, norm in {"self_attn.q": first, "self_attn.k": first, "mlp.gate": second, "mlp.up": second}.items():
        want[f"layers.0.{name}_proj.kernel"] = q.T @ (norm[:, None] * w[f"{at}{name}_proj.weight"].T)
    norms = ("norm.scale", "layers.0.input_layernorm.scale", "layers.0.post_attention_layernorm.scale")
    assert found.model.params.keys() == want.keys() | set(norms)
    for path, expected in want.items():
        # float64 and rounded once, where both rotations meet twice: each rounding is of 2^-24
        np.testing.assert_allclose(found.model.params[path], expected, rtol=0, atol=2**-22 * np.abs(expected).max())
    for path in norms:
        np.testing.assert_array_equal(found.model.params[path], 1.0)
    renamed = {
        "model." + p.replace("kernel", "weight").replace("embedding", "weight").replace("scale", "weight"): np.asarray(
            x
        )
        for p, x in found.model.params.items()
    }
    renamed["lm_head.weight"] = renamed.pop("model.lm_head.weight")
    turned = {n: x.T if x.ndim == 2 and "embed" not in n else x for n, x in renamed.items()}
    tokens = random_data(96).inputs[0]
    got = numpy_logits(dict(found.model.config), turned, tokens)
    # both in float64, so what differs is the rounding of the new weights alone
    np.testing.assert_allclose(got, numpy_logits(config, tensors, tokens), rtol=0, atol=1e-5)


def test_the_key_is_all_that_decides(tmp_path):
    model = load(str(tiny.write_folder(tmp_path / "model")))
    traced = model.trace(1, 12)
    digests = [rotate(model, traced, random_data(96), jax.random.key(seed)).model.digest for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]
    other = dataclasses.replace(random_data(96), inputs=random_data(96).inputs[::-1].copy())
    assert rotate(model, traced, other, jax.random.key(0)).model.digest == digests[0]  # data prove, and choose nothing


@pytest.mark.parametrize("width", [1, 2, 5, 12, 64, 96, 256])
@pytest.mark.parametrize("keep_ones", [False, True])
def test_rotations_are_orthogonal(width, keep_ones):
    rotation = random_rotation(width, KEY, keep_ones=keep_ones)
    q = rotation.matrix
    # float64, at most four products of which each adds up the width: a hundred times their rounding
    np.testing.assert_allclose(q @ q.T, np.eye(width), atol=1e-13)
    x = np.random.default_rng(0).normal(size=(2, 3, width))
    np.testing.assert_allclose(rotation(x), x @ q, atol=1e-13 * width)
    if keep_ones:
        np.testing.assert_allclose(q.sum(axis=1), 1.0, atol=1e-13)
    elif width & (width - 1) == 0:
        np.testing.assert_allclose(np.abs(q), width**-0.5)  # the flattest there is


def test_the_identity_does_nothing():
    np.testing.assert_array_equal(identity(10)(np.arange(10.0)), np.arange(10.0))


def test_an_outlier_is_spread(tmp_path):
    """One channel of the stream 60 times the others: after rotation no value that is read stands out."""
    model = load(str(tiny.write_folder(tmp_path / "model")))
    params = dict(model.params)
    params["embed_tokens.embedding"] *= jnp.where(jnp.arange(32) == 5, 60.0, 1.0)
    model = dataclasses.replace(model, params=params)
    found = rotate(model, model.trace(1, 12), random_data(96), KEY)
    name = lambda cut: next(n for n, site in cut.values.items() if site.spec.path.endswith("0.self_attn.q_proj.kernel"))

    def peak(model, traced):
        x = reads_of(model, traced)
        return float(np.median(np.abs(x).max(axis=-1) / np.sqrt(np.square(x).mean(axis=-1))))

    def reads_of(model, traced):
        cut = Cut.of(model, traced, random_data(96))
        outputs = cut.random_outputs(0)
        table = np.asarray(model.params["embed_tokens.embedding"])[random_data(96).inputs[0]]
        number = next(i for i, site in enumerate(cut.traced.sites) if site.use.kind == "embedding")
        bare = {**model.params, "layers.0.input_layernorm.scale": jnp.ones(32)}
        return cut.reads(bare, cut.with_matrix(number, outputs, table[None]))[name(cut)]

    assert peak(model, model.trace(1, 12)) > 0.9 * 32**0.5
    assert peak(found.model, found.traced) < 3.0  # of signs and a little noise; 1 is the least there is


def function(apply, params, width=8):
    """A model of a function of `float32[batch, width]`."""
    inputs = Arrays((width,))
    params = {path: jnp.asarray(value, jnp.float32) for path, value in params.items()}
    return Model(apply, params, dict.fromkeys(params, "float32"), "toy", inputs, TASKS["regression"])


def rows(width=8):
    x = np.random.default_rng(0).normal(size=(4, width)).astype(np.float32)
    return Dataset(x, np.ones((4, 1), bool), np.arange(4, dtype=np.int32), "noise", "0")


def matrices(*names, shape=(8, 8)):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape) / np.sqrt(shape[0]) for name in names}


def normed(x, gain):
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * gain


def residual(params, x, last=lambda params, h: normed(h, params["g"][2]) @ params["head"]):
    """Two blocks whose norms' scales are `g1` and `g2`."""
    h = x @ params["in"]
    h = h + jax.nn.relu(normed(h, params["g1"]) @ params["up"]) @ params["down"]
    return last(params, h)


def toy(apply, **more):
    params = matrices("in", "up", "down", "head") | {"g1": np.linspace(1, 2, 8), "g2": np.linspace(2, 3, 8)} | more
    return function(apply, params)


def test_any_function_of_the_form_will_do():
    model = toy(lambda p, x: residual(p, x, lambda p, h: normed(h, p["g2"]) @ p["head"]))
    found = rotate(model, model.trace(1), rows(), KEY)
    assert found.stream is not None
    assert {path: (role.rows, role.columns) for path, role in found.stream.roles.items()} == {
        "in": (False, True),
        "up": (True, False),
        "down": (False, True),
        "head": (True, False),
    }
    assert found.heads == ()
    assert found.change <= found.bound


REASONS = {
    "the model has no residual stream: no two weights read what the same weights wrote": lambda p, x: (
        jax.nn.relu(normed(jax.nn.relu(x @ p["in"]), p["g1"]) @ p["up"]) @ p["down"] + p["g2"] + 0 * p["head"].sum()
    ),
    "the model returns its residual stream itself, whose features must stay as they are": lambda p, x: residual(
        p, x, lambda p, h: h + normed(h, p["g2"]) @ p["head"]
    ),
    "`g1` and `g2`": lambda p, x: residual(p, x, lambda p, h: normed(h, p["g1"] * p["g2"]) @ p["head"]),
}


def test_what_cannot_be_rotated_is_refused_with_the_reason():
    no_stream = lambda p, x: jax.nn.relu(x @ p["in"]) @ p["up"]
    returned = lambda p, x: residual(p, x, lambda p, h: h + normed(h, p["g2"]) @ p["head"])
    both = lambda p, x: residual(p | {"g1": p["g2"]}, x, lambda p, h: normed(h, p["g2"]) * 1.0 @ p["head"])
    twice = lambda p, x: residual(p, x, lambda p, h: normed(h, p["g2"] * p["g3"]) @ p["head"])
    clipped = lambda p, x: residual(p, x, lambda p, h: normed(jnp.tanh(h), p["g2"]) @ p["head"])
    again = lambda p, x: residual(p, x, lambda p, h: jax.nn.relu(normed(h, p["g2"]) @ p["head"]) @ p["up"])
    narrow = lambda p, x: residual(p, x, lambda p, h: normed(h, p["g2"])[:, :4] @ p["part"])
    shifted = lambda p, x: residual(p, x, lambda p, h: (normed(h, p["g2"]) + p["g3"]) @ p["head"])
    zero = np.linspace(0, 1, 8)
    cases = {
        "the model has no residual stream: no two weights read what the same weights wrote": (no_stream, {}),
        "the model returns its residual stream itself, whose features must stay as they are": (returned, {}),
        "`head` reads what `g2` and `g3` both scale or shift": (twice, {"g3": np.ones(8)}),
        "the residual stream cannot be rotated before `head`: what it reads does not turn with its features": (
            clipped,
            {},
        ),
        "`up` reads or writes the residual stream at one place and not at another": (again, {}),
        "`part` reads 4 features of a residual stream of 8": (narrow, {"part": np.ones((4, 3))}),
        "`g2` is zero where `g3` is not: their quotient, which would be kept, is infinite": (
            shifted,
            {"g2": zero, "g3": np.ones(8)},
        ),
    }
    assert both
    for reason, (apply, more) in cases.items():
        model = toy(apply, **more)
        found = find_stream(Cut.of(model, model.trace(1), rows()), model.params, KEY)
        assert isinstance(found, Refusal)
        assert found.reason == reason
        with pytest.raises(MpqError) as error:
            rotate_model(model, model.trace(1), rows(), KEY)
        assert str(error.value) == f"toy cannot be rotated: {reason}, and no heads average values linearly"


def test_a_norm_whose_scale_and_bias_are_both_zero_somewhere_is_rotated():
    shifted = lambda p, x: residual(p, x, lambda p, h: (normed(h, p["g2"]) + p["g3"]) @ p["head"])
    gain, bias = np.linspace(0, 1, 8), np.linspace(0, 3, 8)
    model = toy(shifted, g2=gain, g3=bias)
    found = rotate(model, model.trace(1), rows(), KEY)
    assert found.change <= found.bound


def test_a_tied_table_needs_a_model_that_can_hold_two():
    def apply(params, x):
        h = params["table"][x]
        h = h + jax.nn.relu(normed(h, params["g1"]) @ params["up"]) @ params["down"]
        return normed(h, params["g2"]) @ params["table"].T

    params = matrices("up", "down") | matrices("table", shape=(10, 8)) | {"g1": np.ones(8), "g2": np.linspace(1, 2, 8)}
    model = function(apply, params)
    tokens = Dataset(np.arange(10, dtype=np.int32)[None], np.ones((1, 10), bool), np.zeros(1, np.int32), "tokens", "0")
    traced = __import__("mpq").trace(apply, model.params, jax.ShapeDtypeStruct((1, 10), jnp.int32))
    with pytest.raises(MpqError) as error:
        rotate(model, traced, tokens, KEY)
    assert str(error.value) == (
        "`table` is both looked up and multiplied, and toy has no config.json that could give the head a table of its "
        "own: give it one in the model's code"
    )
    even = dataclasses.replace(model, params={**model.params, "g2": jnp.ones(8)})  # nothing has to go into the head
    assert isinstance(find_stream(Cut.of(even, traced, tokens), even.params, KEY), Stream)


def test_a_family_without_a_head_of_its_own_is_refused(tmp_path, monkeypatch):
    model = load(str(tiny.write_folder(tmp_path / "model")))
    monkeypatch.setattr("mpq.models.untied.TIED", "bos_token_id")
    with pytest.raises(MpqError) as error:
        untie(model, "embed_tokens.embedding")
    assert str(error.value) == (
        "`embed_tokens.embedding` is both looked up and multiplied, and the family llama has no head of its own"
    )


def test_a_rotation_that_changes_the_function_is_refused(tmp_path, monkeypatch):
    model = load(str(tiny.write_folder(tmp_path / "model")))
    lost = lambda cut, params, key: dataclasses.replace(heads := find_heads(cut, params, key)[0], rows=heads.rows[::-1])
    monkeypatch.setattr(sys.modules["mpq.equalize.rotate"], "find_heads", lambda *args: (lost(*args),))
    with pytest.raises(
        MpqError,
        match=(
            r"^rotated, model gives outputs that differ by [\d.e-]+, where rounding and another order of sums explain "
            r"[\d.e-]+: a weight has a part in it that was not found; leave the rotation out$"
        ),
    ):
        rotate(model, model.trace(1, 12), random_data(96), KEY)
    assert BOUND == 4
