"""Small convolutional networks and 1,797 real images without a download: the digits of scikit-learn's wheel.

They are the test half of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998, UCI), 8x8 pixels of 17
grey levels. 797 train a network, for seconds and from a fixed key; runtimes are compared on the other 1,000.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mpq.data.dataset import new_dataset
from mpq.inputs import Dataset, Images
from mpq.models import FAMILIES, Model, find_family, functional, vision
from mpq.models.checkpoint import make_model
from mpq.models.family import Family, Stored
from mpq.models.vision import ConvNorm, Preprocessor

TRAINING = 797
_STEPS, _BATCH, _RATE = 300, 64, 1e-2
_PIXELS = Preprocessor(1 / 255, (0.3,), (0.35,), None)


class Separable(nnx.Module):
    """Depthwise convolutions between pointwise ones, with a residual at stride 1 and without at stride 2."""

    def __init__(self, *, rngs: nnx.Rngs):
        def unit(k: int, n: int, size: int, stride: int = 1, groups: int = 1, act: str | None = "relu6") -> ConvNorm:
            conv = vision.conv(k, n, size, rngs, stride=stride, padding="SAME", groups=groups)
            return ConvNorm(conv, rngs, hidden_act=act)

        self.stem = unit(1, 16, 3)
        self.expand, self.filter, self.reduce = unit(16, 32, 1), unit(32, 32, 3, groups=32), unit(32, 16, 1, act=None)
        self.widen, self.halve, self.mix = unit(16, 32, 1), unit(32, 32, 3, stride=2, groups=32), unit(32, 48, 1)
        self.head = nnx.Linear(48, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Images `uint8[batch, 8, 8, 1]` to logits `float32[batch, 10]`."""
        x = self.stem(_PIXELS(images))
        x = x + self.reduce(self.filter(self.expand(x)))
        return self.head(vision.global_mean(self.mix(self.halve(self.widen(x)))))


SEPARABLE = Family(
    name="separable",
    architectures={"Separable": "classification"},
    parse=lambda config: config,
    build=lambda config: Separable(rngs=nnx.Rngs(0)),
    stored=lambda config, path: Stored((path,)),
    inputs=lambda config: Images(8, 8, 1),
)
RESNET = {
    "architectures": ["ResNetCifar"],
    "model_type": "resnet_cifar",
    "depth": 8,
    "width": 8,
    "num_labels": 10,
    "image_size": 8,
    "preprocessor": {"rescale_factor": 1 / 255, "image_mean": [0.3] * 3, "image_std": [0.35] * 3},
}
CONFIGS: Mapping[str, dict[str, Any]] = {
    "resnet": RESNET,
    "separable": {"model_type": "separable", "architectures": ["Separable"]},
}
KNOWN = {**FAMILIES, "separable": SEPARABLE}
"""With the network that is of no family of `mpq`."""


@functools.cache
def digits(channels: int) -> tuple[Dataset, Dataset]:
    """Images `uint8[count, 8, 8, channels]`, channels alike: those to train on, and 1,000 others."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    images = np.repeat((15 * found.images[order]).astype(np.uint8)[..., None], channels, axis=-1)
    labels, count = found.target[order].astype(np.int32), np.arange(len(order), dtype=np.int32)
    return tuple(
        new_dataset(images[part], np.ones(len(images[part]), bool), count[part], "digits", labels[part])
        for part in (slice(0, TRAINING), slice(TRAINING, None))
    )


@functools.cache
def trained(name: str) -> Model:
    """A network of `CONFIGS`, trained on the first of `digits`; its norms have the statistics of all of those."""
    family = find_family(CONFIGS[name], KNOWN)
    parsed = family.parse(CONFIGS[name])
    module = nnx.eval_shape(lambda: family.build(parsed))
    apply, shapes = functional(module)
    normalizing = _normalizing(module)
    data, _ = digits(family.inputs(parsed).channels)
    adam = optax.adam(optax.cosine_decay_schedule(_RATE, _STEPS))

    def loss(params: dict[str, jax.Array], images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = normalizing(params, images)[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params: dict[str, jax.Array], state: Any, images: jax.Array, labels: jax.Array) -> Any:
        change, state = adam.update(jax.grad(loss)(params, images, labels), state)
        return optax.apply_updates(params, change), state

    params = {path: jnp.asarray(_drawn(path, shape.shape)) for path, shape in shapes.items()}
    with jax.numpy_dtype_promotion("standard"):  # Optax mixes its counts with floats
        state = adam.init(params)
        for batch in np.random.default_rng(1).integers(0, TRAINING, (_STEPS, _BATCH)):
            params, state = step(params, state, data.inputs[batch], data.labels[batch])
    params = jax.jit(normalizing)(params, data.inputs)[1]
    return make_model(apply, params, dict.fromkeys(params, "float32"), CONFIGS[name], family, None, name)


def _normalizing(module: nnx.Module) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """Parameters and images -> logits by the batch statistics of these images, and the parameters with those."""
    module.train()
    for _, part in nnx.iter_modules(module):
        if isinstance(part, nnx.BatchNorm):
            part.momentum = 0.0
    graph, state = nnx.split(module)
    flat = {".".join(map(str, path)): (path, var) for path, var in nnx.to_flat_state(state)}

    def run(params: Mapping[str, jax.Array], images: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        leaves = [(path, var.replace(params[name])) for name, (path, var) in flat.items()]
        made = nnx.merge(graph, nnx.from_flat_state(leaves))
        logits, variables = made(images), dict(nnx.to_flat_state(nnx.state(made)))
        return logits, {name: variables[path].get_value() for name, (path, _) in flat.items()}

    return run


def _drawn(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """Kernels as large as He et al. 2015 (arXiv:1502.01852, eq. 10) have them, norms that change nothing."""
    if not path.endswith("kernel"):
        return np.full(shape, path.endswith(("scale", "var")), np.float32)
    rng = np.random.default_rng(list(path.encode()))
    return rng.normal(0, np.sqrt(2 / np.prod(shape[:-1])), shape).astype(np.float32)
