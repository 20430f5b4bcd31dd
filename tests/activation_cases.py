"""A tiny attention model, and what rounding one of its values does to it, in float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mpq.activations import activation_rows, kv_rows, parse_activation_scheme
from mpq.inputs import Dataset, Tokens
from mpq.models.model import Model
from mpq.tasks import CausalLM

VOCAB, WIDTH, HEADS, TIME = 7, 4, 2, 6
SHAPES = {"embed": (VOCAB, WIDTH), "query": (WIDTH, WIDTH), "key": (WIDTH, WIDTH), "value": (WIDTH, WIDTH)}
SHAPES |= {"out": (WIDTH, WIDTH), "up": (WIDTH, 6), "down": (6, WIDTH), "head": (WIDTH, VOCAB)}
SHARED = "{query,key,value}"
EVERY_KIND = {
    "activations": tuple(
        map(
            parse_activation_scheme,
            ("int3_token_asym", "int4_tensor", "int8_token", "int2_tensor_asym", "int3_token_outlier4"),
        )
    ),
    "kv": tuple(map(parse_activation_scheme, ("int4_head", "int2_head_asym", "int3_token", "int4_tensor_asym"))),
}
SCHEMES = {of: schemes[:2] for of, schemes in EVERY_KIND.items()}


def forward(p, tokens):
    """Embedding, causal attention of two heads, MLP, head."""
    h = p["embed"][tokens]
    split = lambda x: x.reshape(*x.shape[:2], HEADS, -1)
    q, k, v = (split(h @ p[name]) for name in ("query", "key", "value"))
    scores = jnp.einsum("bthd,bshd->bhts", q, k)
    weights = jax.nn.softmax(jnp.where(jnp.tri(tokens.shape[1], dtype=bool), scores, -jnp.inf), axis=-1)
    h = h + jnp.einsum("bhts,bshd->bthd", weights, v).reshape(h.shape) @ p["out"]
    h = h + jnp.tanh(h @ p["up"]) @ p["down"]
    return h @ p["head"]


def logits_of(p, tokens, change):
    """`forward` in float64 or complex128, each value passed through `change(row, x[batch, time, width])`."""
    h = p["embed"][tokens]
    x = change(SHARED, h)
    split = lambda x: x.reshape(*x.shape[:2], HEADS, -1)
    q, k, v = split(x @ p["query"]), split(change("key", x @ p["key"])), split(change("value", x @ p["value"]))
    scores = np.einsum("bthd,bshd->bhts", q, k)
    weights = np.exp(scores - scores.real.max()) * np.tri(tokens.shape[1])
    weights = weights / weights.sum(-1, keepdims=True)
    h = h + change("out", np.einsum("bhts,bshd->bthd", weights, v).reshape(h.shape)) @ p["out"]
    h = h + change("down", np.tanh(change("up", h) @ p["up"])) @ p["down"]
    return change("head", h) @ p["head"]


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def round_group(values, seen, scheme):
    """`values` by the range of `seen`, number by number in Python floats."""
    low, high = min(0.0, 0.0, *seen), max(0.0, 0.0, *seen)
    if scheme.asymmetric:
        least, top = 0, 2**scheme.bits - 1
        scale = float(np.float16((high - low) / top)) or 2.0**-24
        zero = round(-low / scale)
    else:
        top = 2 ** (scheme.bits - 1) - 1
        least, zero = -top, 0
        scale = float(np.float16(max(high, -low) / top)) or 2.0**-24
    return [(min(max(round(v / scale) + zero, least), top) - zero) * scale for v in values]


def rounded(x, scheme, mask, columns=None):
    """`x[batch, time, width]` at a scheme, a group at a time; `bool[width]`: features that stay, if they are known."""
    y = np.empty_like(x)
    for b, t in np.ndindex(x.shape[:2]):
        if scheme.threshold:
            large = (abs(x[b]) >= scheme.threshold).T @ mask[b] > 0 if columns is None else columns
            y[b, t, large] = x[b, t, large]
            y[b, t, ~large] = round_group(x[b, t, ~large], x[b, t, ~large], scheme)
        elif scheme.granularity == "tensor":
            y[b, t] = round_group(x[b, t], x[b][mask[b]].ravel(), scheme)
        else:
            parts = np.split(x[b, t], HEADS if scheme.granularity == "head" else 1)
            y[b, t] = np.concatenate([round_group(part, part, scheme) for part in parts])
    return y


def only(row, function):
    """A `change` of one row."""
    return lambda name, x: function(x) if name == row else x


def keep(name, x):
    """The `change` of nothing."""
    del name
    return x


@functools.cache
def make_model(apply=forward, shapes=None):
    rng = np.random.default_rng(0)
    sizes = SHAPES if shapes is None else dict(shapes)
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in sizes.items()}
    stored = dict.fromkeys(params, "float32")
    return Model(lambda p, x: apply(p, x), params, stored, name="tiny", inputs=Tokens(64), task=CausalLM())


def make_data(windows, seed=0, documents=None):
    rng = np.random.default_rng(seed)
    mask = np.arange(TIME) < rng.integers(2, TIME + 1, size=windows)[:, None]
    inputs = rng.integers(VOCAB, size=(windows, TIME)).astype(np.int32)
    document = np.arange(windows) if documents is None else np.arange(windows) % documents
    return Dataset(inputs, mask, document.astype(np.int32), "noise", f"{seed} {windows}")


@functools.cache
def traced(model, batch_size=4):
    return model.trace(batch_size, TIME)


def rows_of(of, model):
    return activation_rows(traced(model)) if of == "activations" else kv_rows(traced(model), "key|value")


def run(metric, of, model, data, *, schemes=None, batch_size=4, store=None, key=0, rows=None):
    rows = rows_of(of, model) if rows is None else rows
    schemes = SCHEMES[of] if schemes is None else schemes
    options = {"key": jax.random.key(key), "batch_size": batch_size, "store": store}
    return metric(model, traced(model, batch_size), rows, schemes, data, **options)


def double(params):
    return {name: np.asarray(p, np.float64) for name, p in params.items()}
