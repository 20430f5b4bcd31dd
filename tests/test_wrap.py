"""Every kind of model becomes a function of a flat dictionary, and gets its weights back."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import core, nnx
from flax import linen as nn

from mpq.models.wrap import wrap
from mpq.types import MpqError
from tests.trace_cases import normal, redrawn, x6


class Net(nn.Module):
    """Batch statistics, dropout, partitioning metadata, two methods."""

    dropout: bool = True

    def setup(self):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        self.first, self.norm = nn.Dense(5, kernel_init=init, param_dtype=jnp.bfloat16), nn.BatchNorm()
        self.second, self.noise = nn.Dense(4), nn.Dropout(0.5)

    def __call__(self, x, shift=None, *, train=False):
        h = self.norm(
            self.first(x.astype(jnp.bfloat16)).astype(jnp.float32), use_running_average=self.dropout or not train
        )
        h = self.noise(h, deterministic=not (train and self.dropout))
        return self.second(h) if shift is None else self.second(h) + shift

    def encode(self, x):
        return self.norm(self.first(x.astype(jnp.bfloat16)).astype(jnp.float32), use_running_average=True)


class NnxNet(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(6, 5, param_dtype=jnp.float16, rngs=rngs), nnx.Linear(5, 4, rngs=rngs)])
        self.norm, self.noise = nnx.BatchNorm(5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.scales = nnx.Variable({"low": jnp.ones(()), "high": jnp.ones(2)})

    def __call__(self, x, shift=None):
        h = self.noise(self.norm(self.layers[0](x.astype(jnp.float16)).astype(jnp.float32)))
        return self.layers[1](h) if shift is None else self.layers[1](h) + shift

    def encode(self, x, times=1):
        return times * self.layers[0](x.astype(jnp.float16))


def variables_of(module: nn.Module) -> Any:
    """Variables without a zero or an equal pair."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), x6)
    return wrap(module, shapes).unflatten(redrawn(wrap(module, shapes).params))


def assert_equal_trees(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_linen_module():
    variables = variables_of(Net())
    wrapped = wrap(Net(), variables, train=False)
    assert {path: (p.shape, p.dtype.name) for path, p in wrapped.params.items()} == {
        "first.kernel": ((6, 5), "bfloat16"),
        "first.bias": ((5,), "bfloat16"),
        "norm.scale": ((5,), "float32"),
        "norm.bias": ((5,), "float32"),
        "second.kernel": ((5, 4), "float32"),
        "second.bias": ((4,), "float32"),
        "batch_stats/norm.mean": ((5,), "float32"),
        "batch_stats/norm.var": ((5,), "float32"),
    }
    model = jax.jit(Net().apply)
    np.testing.assert_array_equal(jax.jit(wrapped.apply)(wrapped.params, x6), model(variables, x6))
    pair = wrapped.apply(wrapped.params, (x6, normal(4)))
    np.testing.assert_array_equal(pair, Net().apply(variables, x6, normal(4)))
    encoded = wrap(Net(), variables, method="encode").apply(wrapped.params, x6)
    np.testing.assert_array_equal(encoded, Net().apply(variables, x6, method="encode"))
    frozen = wrap(Net(), core.freeze(variables))
    assert isinstance(frozen.unflatten(wrapped.params), core.FrozenDict)


def test_weights_go_back_into_a_linen_model():
    variables = variables_of(Net())
    wrapped = wrap(Net(), variables)
    assert_equal_trees(wrapped.unflatten(wrapped.params), variables)  # metadata boxes included
    (spec, _) = wrapped.trace(x6).weights
    new = dict(wrapped.params)
    new[spec.param] = spec.from_matrix(jnp.round(spec.to_matrix(new[spec.param])), new[spec.param])
    back = wrapped.unflatten(new)
    assert back["params"]["first"]["kernel"].names == (None, "model")
    assert back["params"]["first"]["kernel"].value.dtype == jnp.bfloat16
    np.testing.assert_array_equal(Net().apply(back, x6), wrapped.apply(new, x6))
    assert not np.array_equal(Net().apply(back, x6), Net().apply(variables, x6))


def test_a_linen_module_in_training_says_what_to_do():
    variables = variables_of(Net())
    with pytest.raises(
        MpqError, match=r"Net draws random numbers in this call: .*`wrap\(module, variables, train=False"
    ):
        wrap(Net(), variables, train=True).trace(x6)
    with pytest.raises(MpqError, match=r"Net updates a collection in this call, .* for evaluation"):
        wrap(Net(dropout=False), variables, train=True).trace(x6)
    key = jax.random.key(1)
    fixed = wrap(nn.Dropout(0.5, deterministic=False), {"params": {}}, rngs={"dropout": key})
    want = nn.Dropout(0.5, deterministic=False).apply({}, x6, rngs={"dropout": key})
    np.testing.assert_array_equal(fixed.apply({}, x6), want)


def test_an_nnx_module():
    module = NnxNet(nnx.Rngs(0))
    module.norm.mean.set_value(jnp.arange(5.0))
    wrapped = wrap(module)
    assert {path: (p.shape, p.dtype.name) for path, p in wrapped.params.items()} == {
        "layers.0.kernel": ((6, 5), "float16"),
        "layers.0.bias": ((5,), "float16"),
        "layers.1.kernel": ((5, 4), "float32"),
        "layers.1.bias": ((4,), "float32"),
        "norm.scale": ((5,), "float32"),
        "norm.bias": ((5,), "float32"),
        "norm.mean": ((5,), "float32"),
        "norm.var": ((5,), "float32"),
        "scales.low": ((), "float32"),
        "scales.high": ((2,), "float32"),
    }
    output = wrapped.apply(wrapped.params, x6)
    assert not module.noise.deterministic  # the user's own is as it was
    assert not module.norm.use_running_average
    np.testing.assert_array_equal(module.norm.mean.get_value(), jnp.arange(5.0))
    module.eval()
    np.testing.assert_array_equal(output, module(x6))
    np.testing.assert_array_equal(wrapped.apply(wrapped.params, (x6, normal(4))), module(x6, normal(4)))
    for method in ("encode", NnxNet.encode):
        twice = wrap(module, method=method, times=2)
        np.testing.assert_array_equal(twice.apply(twice.params, x6), module.encode(x6, 2))


def test_weights_go_back_into_an_nnx_model():
    module = NnxNet(nnx.Rngs(0))
    wrapped = wrap(module)
    new = redrawn(wrapped.params)
    back = wrapped.unflatten(new)
    assert type(back) is NnxNet
    assert not back.noise.deterministic  # still in training
    assert back.layers[0].kernel.get_value() is new["layers.0.kernel"]
    assert module.layers[0].kernel.get_value() is wrapped.params["layers.0.kernel"]
    assert back.noise.rngs.key.get_value() == module.noise.rngs.key.get_value()
    assert back.noise.rngs.count is not module.noise.rngs.count  # drawing from one leaves the other
    back.eval()
    np.testing.assert_array_equal(back(x6), wrapped.apply(new, x6))


def test_an_nnx_module_that_draws_numbers_draws_the_same_ones():
    """`RNN` takes a key for its first carry; the random state is no parameter and does not move on."""
    rnn = nnx.RNN(nnx.LSTMCell(6, 5, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    wrapped = wrap(rnn)
    assert not [path for path in wrapped.params if "rngs" in path]
    run = jax.jit(wrapped.apply)
    np.testing.assert_array_equal(run(wrapped.params, x6), run(wrapped.params, x6))
    assert len(wrapped.trace(x6).weights) == 8


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass
class Affine:
    """A module as Equinox has them: a pytree that holds its arrays, and other leaves."""

    weight: Any
    bias: Any
    activation: Any

    def tree_flatten_with_keys(self):
        names = [field.name for field in dataclasses.fields(self)]
        return [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names], None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)

    def __call__(self, x):
        return self.activation(self.weight @ x + self.bias)


def test_a_pytree_of_modules():
    model = [Affine(np.ones((5, 6), np.float32), normal(5), jnp.tanh), Affine(normal(4, 5), normal(4), jax.nn.relu)]
    forward = lambda model, x: model[1](model[0](x))
    wrapped = wrap(lambda model, x, scale: scale * jax.vmap(jax.vmap(lambda x: forward(model, x)))(x), model, scale=2.0)
    assert sorted(wrapped.params) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    assert [(w.path, w.k, w.n) for w in wrapped.trace(x6).weights] == [("0.weight", 6, 5), ("1.weight", 5, 4)]
    np.testing.assert_array_equal(
        wrapped.apply(wrapped.params, x6)[1, 2], 2 * jax.vmap(jax.vmap(lambda x: forward(model, x)))(x6)[1, 2]
    )
    back = wrapped.unflatten(wrapped.params)
    assert_equal_trees([back[0].weight, back[1].bias], [jnp.asarray(model[0].weight), model[1].bias])
    assert back[0].activation is jnp.tanh


def test_nested_dictionaries_and_a_lone_array():
    params = {"linear/~/first": {"w": normal(6, 4)}, "second": {"w": normal(4, 3)}}  # as Haiku names them
    wrapped = wrap(lambda p, x: x @ p["linear/~/first"]["w"] @ p["second"]["w"], params)
    assert [w.path for w in wrapped.trace(x6).weights] == ["linear/~/first.w", "second.w"]
    assert_equal_trees(wrapped.unflatten(wrapped.params), params)
    assert list(wrap(lambda w, x: x @ w, normal(6, 4)).params) == ["params"]


def test_shapes_are_enough_to_trace():
    shapes = nnx.eval_shape(lambda: NnxNet(nnx.Rngs(0)))
    inputs = jax.ShapeDtypeStruct(x6.shape, x6.dtype)
    assert [w.path for w in wrap(shapes).trace(inputs).weights] == ["layers.0.kernel", "layers.1.kernel"]


def test_user_errors():
    variables = variables_of(Net())
    with pytest.raises(MpqError, match=r"wrapped with all its variables, \{'params'"):
        wrap(Net())
    with pytest.raises(MpqError, match=r"wrapped with all its variables, \{'params'"):
        wrap(Net(), variables["params"])
    with pytest.raises(MpqError, match="holds its parameters: pass Linear alone"):
        wrap(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), {})
    with pytest.raises(MpqError, match=r"`wrap` takes .*, not a dict"):
        wrap(variables)
    with pytest.raises(MpqError, match=r"`wrap\(fn, params\)`"):
        wrap(lambda p, x: x)
    with pytest.raises(MpqError, match=r"Two parameters have the path `a\.b`"):
        wrap(lambda p, x: x, {"a": {"b": normal(2)}, "a.b": normal(2)})
    wrapped = wrap(lambda p, x: x @ p["w"], {"w": normal(6, 4)})
    with pytest.raises(MpqError, match=r"missing \['w'\], not expected \['v'\]"):
        wrapped.unflatten({"v": normal(6, 4)})
    with pytest.raises(MpqError, match=r"`w` has shape \(6, 4\) in the model, not \(4, 6\)"):
        wrapped.unflatten({"w": normal(4, 6)})
