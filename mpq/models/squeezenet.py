"""SqueezeNet 1.0 and 1.1 in Flax NNX (Iandola et al. 2016, arXiv:1602.07360).

Tensors are named and laid out as torchvision's, which come without a config; the `config.json` beside
`model.safetensors` is our own:

    {"model_type": "squeezenet", "architectures": ["SqueezeNet"], "version": "1_1", "num_labels": 1000,
     "image_size": 224, "preprocessor": {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}}

`preprocessor` may lie in a `preprocessor_config.json` instead. Version 1.1 squeezes earlier: 2.4 times less computation
for the same accuracy, say its authors.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mpq.inputs import Images
from mpq.models import vision
from mpq.models.family import CONV, Family, Stored, parse_strictly
from mpq.models.layers import num_labels, pytorch_tensor, without
from mpq.models.vision import Preprocessor
from mpq.types import MpqError

POOL = "pool"
EXPAND = 4  # each of a fire module's two expansions is this many times as wide as its squeeze, in both versions


@dataclasses.dataclass(frozen=True)
class Layout:
    """One version.

    Attributes:
      stem: channels and kernel of the first convolution, which has stride 2 and no padding.
      rest: what follows it and its ReLU: the channels that a fire module squeezes to, or `POOL`.
    """

    stem: tuple[int, int]
    rest: tuple[int | str, ...]


LAYOUTS = {
    "1_0": Layout((96, 7), (POOL, 16, 16, 32, POOL, 32, 48, 48, 64, POOL, 64)),
    "1_1": Layout((64, 3), (POOL, 16, 16, POOL, 32, 32, POOL, 48, 48, 64, 64)),
}
"""Iandola et al., table 1, and the authors' second release; torchvision numbers `rest` from 2, after the ReLU."""

FIRST = 2


@dataclasses.dataclass(frozen=True)
class SqueezeNetConfig:
    """Version, classes and image size of a SqueezeNet."""

    version: str
    num_labels: int
    preprocessor: Preprocessor
    image_size: int = 224


class Fire(nnx.Module):
    """Squeeze by a 1x1 convolution, then expand by a 1x1 and a 3x3 side by side."""

    def __init__(self, inputs: int, squeeze: int, rngs: nnx.Rngs):
        expand = EXPAND * squeeze
        self.squeeze = vision.conv(inputs, squeeze, 1, rngs, bias=True)
        self.expand1x1 = vision.conv(squeeze, expand, 1, rngs, bias=True)
        self.expand3x3 = vision.conv(squeeze, expand, 3, rngs, padding=1, bias=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x[batch, height, width, inputs]` to `[batch, height, width, 2 * EXPAND * squeeze]`."""
        x = jax.nn.relu(self.squeeze(x))
        return jax.nn.relu(jnp.concatenate([self.expand1x1(x), self.expand3x3(x)], axis=-1))


class SqueezeNet(nnx.Module):
    """Images `uint8[batch, height, width, 3]` to logits `float32[batch, classes]`."""

    def __init__(self, config: SqueezeNetConfig, *, rngs: nnx.Rngs):
        layout = LAYOUTS[config.version]
        self.preprocessor = config.preprocessor
        channels, kernel = layout.stem
        self.stem = vision.conv(3, channels, kernel, rngs, stride=2, bias=True)
        features: list[Fire | None] = []
        for squeeze in layout.rest:
            if isinstance(squeeze, int):
                features.append(Fire(channels, squeeze, rngs))
                channels = 2 * EXPAND * squeeze
            else:
                features.append(None)
        self.features = nnx.List(features)
        self.classifier = vision.conv(channels, config.num_labels, 1, rngs, bias=True)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits: the mean over all positions of what the last convolution says of each, above zero."""
        x = jax.nn.relu(self.stem(self.preprocessor(images)))
        for fire in self.features:
            # Where a last window of 3 does not fit it is kept, cut short: PyTorch's `ceil_mode`.
            x = vision.max_pool(x, 3, 2, (0, (x.shape[1] - 3) % 2)) if fire is None else fire(x)
        return vision.global_mean(jax.nn.relu(self.classifier(x)))


def parse_config(config: Mapping[str, Any]) -> SqueezeNetConfig:
    """Shape of the model that a `squeezenet` config describes.

    Raises:
      MpqError: a key is missing, unknown, or has a value this implementation would get wrong.
    """
    values = {"num_labels": num_labels(config), "preprocessor": vision.parse_preprocessor(config)}
    parsed = parse_strictly(without(config, "num_labels", "preprocessor"), SqueezeNetConfig, only={}, defaults=values)
    if parsed.version not in LAYOUTS:
        raise MpqError(f"config key 'version' is {parsed.version!r}: supported is {', '.join(map(repr, LAYOUTS))}")
    return parsed


def stored(config: SqueezeNetConfig, path: str) -> Stored:
    """Where a torchvision checkpoint keeps the parameter at `path`."""
    del config
    first, *rest = path.split(".")
    if first == "features":
        rest[0] = str(int(rest[0]) + FIRST)
    numbered = {"stem": "features.0", "classifier": "classifier.1", "features": "features"}[first]
    return pytorch_tensor(".".join([numbered, *rest]), CONV)


FAMILY = Family(
    name="squeezenet",
    architectures={"SqueezeNet": "classification"},
    parse=parse_config,
    build=lambda config: SqueezeNet(config, rngs=nnx.Rngs(0)),
    stored=stored,
    inputs=lambda config: Images(config.image_size, config.image_size),
)
