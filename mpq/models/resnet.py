"""ResNet for ImageNet in Flax NNX (He et al. 2016, arXiv:1512.03385), basic and bottleneck blocks.

Names follow the Hugging Face checkpoint. The stride of a bottleneck is in its 3x3 convolution ("v1.5"), or in its first
1x1 convolution as in the paper, where the config says `downsample_in_bottleneck`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from mpq.models import vision
from mpq.models.family import CONV, LINEAR, Family, Stored, parse_strictly
from mpq.models.layers import NUM_BATCHES_TRACKED, activation, num_labels, pytorch_tensor, without
from mpq.models.vision import ConvNorm, Preprocessor
from mpq.types import MpqError

NEUTRAL = ("out_features", "out_indices", "stage_names")
"""Keys for the use as a backbone, which returns inner features too."""

REDUCTION = 4  # a bottleneck is a quarter as wide inside (He et al., section 4.1)


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """Shape of a ResNet; the field names are those of a Hugging Face `config.json`."""

    num_channels: int
    embedding_size: int
    hidden_sizes: tuple[int, ...]
    depths: tuple[int, ...]
    layer_type: str
    hidden_act: str
    preprocessor: Preprocessor
    num_labels: int
    downsample_in_first_stage: bool = False
    downsample_in_bottleneck: bool = False


@dataclasses.dataclass(frozen=True)
class BlockShape:
    """One residual block: its channels, its stride, and in which convolution a bottleneck has the stride."""

    inputs: int
    outputs: int
    stride: int
    bottleneck: bool
    stride_first: bool


class Block(nnx.Module):
    """Residual block: two 3x3 convolutions, or 1x1, 3x3 and 1x1; a projection where the shape changes."""

    def __init__(self, shape: BlockShape, hidden_act: str, rngs: nnx.Rngs):
        n, s = shape.outputs, shape.stride
        first, second = (s, 1) if shape.stride_first or not shape.bottleneck else (1, s)
        inner = n // REDUCTION if shape.bottleneck else n
        # The inner activation is ReLU whatever hidden_act says: transformers applies hidden_act after the sum only.
        unit = lambda inputs, outputs, kernel, stride, act: ConvNorm(
            vision.conv(inputs, outputs, kernel, rngs, stride=stride, padding=kernel // 2), rngs, hidden_act=act
        )
        if shape.bottleneck:
            units = [
                unit(shape.inputs, inner, 1, first, "relu"),
                unit(inner, inner, 3, second, "relu"),
                unit(inner, n, 1, 1, None),
            ]
        else:
            units = [unit(shape.inputs, n, 3, first, "relu"), unit(n, n, 3, second, None)]
        self.layer = nnx.List(units)
        self.shortcut = unit(shape.inputs, n, 1, s, None) if shape.inputs != n or s != 1 else None
        self.act = activation(hidden_act)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x[batch, height, width, inputs]` to `[batch, height / stride, width / stride, outputs]`."""
        y = x
        for unit in self.layer:
            y = unit(y)
        return self.act(y + (x if self.shortcut is None else self.shortcut(x)))


class Stage(nnx.Module):
    """Blocks of one width; the first may halve the resolution."""

    def __init__(self, config: ResNetConfig, inputs: int, outputs: int, depth: int, stride: int, rngs: nnx.Rngs):
        bottleneck = config.layer_type == "bottleneck"
        # Only the first block has a stride, so only there does its place matter.
        shapes = [
            BlockShape(inputs, outputs, stride, bottleneck, config.downsample_in_bottleneck),
            *[BlockShape(outputs, outputs, 1, bottleneck, False)] * (depth - 1),
        ]
        self.layers = nnx.List(Block(shape, config.hidden_act, rngs) for shape in shapes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """All blocks in turn."""
        for block in self.layers:
            x = block(x)
        return x


class ResNet(nnx.Module):
    """Images `uint8[batch, height, width, channels]` to logits `float32[batch, classes]`."""

    def __init__(self, config: ResNetConfig, *, rngs: nnx.Rngs):
        self.preprocessor = config.preprocessor
        stem = vision.conv(config.num_channels, config.embedding_size, 7, rngs, stride=2, padding=3)
        self.embedder = ConvNorm(stem, rngs, hidden_act=config.hidden_act)
        widths = zip((config.embedding_size, *config.hidden_sizes), config.hidden_sizes, config.depths, strict=False)
        self.stages = nnx.List(
            Stage(config, inputs, outputs, depth, 2 if i or config.downsample_in_first_stage else 1, rngs)
            for i, (inputs, outputs, depth) in enumerate(widths)
        )
        self.classifier = nnx.Linear(config.hidden_sizes[-1], config.num_labels, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits."""
        x = vision.max_pool(self.embedder(self.preprocessor(images)), 3, 2, (1, 1))
        for stage in self.stages:
            x = stage(x)
        return self.classifier(vision.global_mean(x))


def parse_config(config: Mapping[str, Any]) -> ResNetConfig:
    """The shape of the model that a Hugging Face `config.json` describes.

    Raises:
      MpqError: a key is missing, unknown, or has a value this implementation would get wrong.
    """
    defaults = {
        "num_labels": num_labels(config),
        "preprocessor": vision.parse_preprocessor(config, config.get("num_channels", 3)),
    }
    config = without(config, "num_labels", "preprocessor", *NEUTRAL)
    config |= {key: tuple(config[key]) for key in ("hidden_sizes", "depths") if key in config}
    parsed = parse_strictly(config, ResNetConfig, only={}, defaults=defaults)
    if parsed.layer_type not in ("basic", "bottleneck"):
        raise MpqError(f"config key 'layer_type' is {parsed.layer_type!r}: supported is 'basic', 'bottleneck'")
    if len(parsed.hidden_sizes) != len(parsed.depths):
        raise MpqError(
            f"hidden_sizes {parsed.hidden_sizes} and depths {parsed.depths} differ in their number of stages"
        )
    return parsed


def stored(config: ResNetConfig, path: str) -> Stored:
    """Where a Hugging Face checkpoint keeps the parameter at `path`."""
    del config
    if path.startswith("classifier."):
        return pytorch_tensor(path.replace("classifier", "classifier.1"), LINEAR)
    module = "embedder." if path.startswith("embedder.") else "encoder."
    return pytorch_tensor(f"resnet.{module}{path}", CONV)


FAMILY = Family(
    name="resnet",
    architectures={"ResNetForImageClassification": "classification"},
    parse=parse_config,
    build=lambda config: ResNet(config, rngs=nnx.Rngs(0)),
    stored=stored,
    inputs=lambda config: vision.images(config.preprocessor, config.num_channels),
    ignored=(NUM_BATCHES_TRACKED,),
)
