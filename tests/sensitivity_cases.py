"""A tiny model with a tied embedding, candidates at a known distance, and data: what the metrics' tests share."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mpq.files import digest_arrays
from mpq.formats import parse_scheme
from mpq.inputs import Dataset, Tokens
from mpq.models.model import Model
from mpq.tasks import CausalLM
from mpq.types import QTensor, Scheme, WeightSpec

VOCAB, WIDTH = 7, 4
SHAPES = {"table": (VOCAB, WIDTH), "value": (WIDTH, WIDTH), "up": (WIDTH, 6), "down": (6, WIDTH)}
SMALL, LARGE, EXACT = parse_scheme("int8_channel"), parse_scheme("int4_channel"), parse_scheme("fp32")
SCHEMES = (SMALL, LARGE, EXACT)


def forward(p, tokens, errors=None, scale=None):
    """Embedding, causal averaging, MLP, tied head. At position t the weight `name` is p[name] + scale[t] *
    errors[name]."""
    errors = errors or {}

    def read(name, x):
        y = x @ p[name]
        return y + scale[..., None] * (x @ errors[name]) if name in errors else y

    h = p["table"][tokens]
    if "table" in errors:
        h = h + scale[..., None] * errors["table"][tokens]
    h = h + jnp.cumsum(read("value", h), axis=1) / jnp.arange(1, tokens.shape[1] + 1, dtype=h.dtype)[:, None]
    h = h + read("down", jnp.tanh(read("up", h)))
    logits = h @ p["table"].T
    return logits + scale[..., None] * (h @ errors["table"].T) if "table" in errors else logits


@functools.cache  # equal models are one, so that what is compiled for one test serves the next
def make_model(apply=forward):
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}
    return Model(
        apply=lambda p, x: apply(p, x),
        params=params,
        stored=dict.fromkeys(params, "float32"),
        name="tiny",
        inputs=Tokens(64),
        task=CausalLM(),
    )


@dataclasses.dataclass(frozen=True)
class Shifted:
    """Candidates at a known distance: `unit[path]` for `LARGE`, half of it for `SMALL`, nothing for `EXACT`."""

    model: Model
    size: float = 0.1
    name = "shifted"

    @property
    def quantizer(self):
        return self

    def error(self, path, scheme):
        seed = sorted(self.model.params).index(path)
        unit = np.random.default_rng(seed).normal(size=self.model.params[path].shape).astype(np.float32) * self.size
        return {SMALL: 0.5, LARGE: 1.0, EXACT: 0.0}[scheme] * unit

    def dequantized(self, spec: WeightSpec, scheme: Scheme) -> jax.Array:
        param = self.model.params[spec.param]
        return spec.to_matrix(param + self.error(spec.param, scheme))

    def qtensor(self, spec: WeightSpec, scheme: Scheme) -> QTensor:
        return QTensor(self.dequantized(spec, scheme), None, None, parse_scheme("fp32"))

    def digest(self, spec: WeightSpec, scheme: Scheme) -> str:
        return digest_arrays({"candidate": self.dequantized(spec, scheme)})


def make_data(inputs, mask=None, document=None):
    inputs = np.asarray(inputs, np.int32)
    mask = np.ones_like(inputs, bool) if mask is None else mask
    document = np.arange(len(inputs)) if document is None else np.asarray(document)
    return Dataset(inputs, mask, document.astype(np.int32), "noise", str(inputs.sum()))


def random_data(windows, time=6, seed=0):
    rng = np.random.default_rng(seed)
    mask = np.arange(time) < rng.integers(2, time + 1, size=windows)[:, None]
    return make_data(rng.integers(VOCAB, size=(windows, time)), mask)


@functools.cache
def traced(model, batch_size, time):
    return model.trace(batch_size, time)


def run(metric, model, candidates, data, *, schemes=SCHEMES, batch_size=4, store=None):
    shaped = traced(model, batch_size, data.inputs.shape[1])
    key = jax.random.key(0)
    return metric(model, shaped, schemes, candidates, data, key=key, batch_size=batch_size, store=store)


def double(params):
    return {name: jnp.asarray(np.asarray(p), jnp.float64) for name, p in params.items()}


class Broken(Shifted):
    """The LARGE candidate of `up` holds `value`."""

    value = np.nan

    def dequantized(self, spec, scheme):
        matrix = super().dequantized(spec, scheme)
        return jnp.full_like(matrix, self.value) if (spec.param, scheme) == ("up", LARGE) else matrix


class Huge(Broken):
    """The LARGE candidate of `up` is finite and far beyond what float32 products hold."""

    value = 1e38
