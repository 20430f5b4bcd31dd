"""MobileNetV2 in Flax NNX (Sandler et al. 2018, arXiv:1801.04381): inverted residuals with linear bottlenecks.

Names follow the Hugging Face checkpoint. `tf_padding` pads as TensorFlow does, from which those checkpoints come: a
3x3 convolution of stride 2 over an even size has its one row and column of zeros at the bottom and right.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from mpq.inputs import Images
from mpq.models import vision
from mpq.models.family import CONV, LINEAR, Family, Stored, parse_strictly
from mpq.models.layers import NUM_BATCHES_TRACKED, num_labels, pytorch_tensor, without
from mpq.models.vision import ConvNorm, Preprocessor
from mpq.types import MpqError

CHANNELS = (16, 24, 24, 32, 32, 32, 64, 64, 64, 64, 96, 96, 96, 160, 160, 160, 320)
"""Channels after the stem and after each of the 16 blocks, before the multiplier (Sandler et al., table 2)."""
STRIDES = (2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1)
STEM_CHANNELS, HEAD_CHANNELS = 32, 1280
STEM_STRIDE = 2

NEUTRAL = ("classifier_dropout_prob", "semantic_loss_ignore_index")


@dataclasses.dataclass(frozen=True)
class MobileNetV2Config:
    """Shape of a MobileNetV2; the field names are those of a Hugging Face `config.json`."""

    num_channels: int
    image_size: int | tuple[int, int]
    depth_multiplier: float
    depth_divisible_by: int
    min_depth: int
    expand_ratio: float
    output_stride: int
    first_layer_is_expansion: bool
    finegrained_output: bool
    hidden_act: str
    tf_padding: bool
    layer_norm_eps: float
    preprocessor: Preprocessor
    num_labels: int

    def channels(self, wanted: float) -> int:
        """The multiple of `depth_divisible_by` nearest to `wanted`, at least `min_depth`, at most 10% below `wanted`.

        The rule is that of the paper's reference code.
        """
        step = self.depth_divisible_by
        rounded = max(self.min_depth, int(wanted + step / 2) // step * step)
        return rounded + step if rounded < 0.9 * wanted else rounded

    def scaled(self, channels: int) -> int:
        """`channels` times the depth multiplier."""
        return self.channels(round(channels * self.depth_multiplier))

    def unit(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        rngs: nnx.Rngs,
        *,
        stride: int = 1,
        dilation: int = 1,
        depthwise: bool = False,
        linear: bool = False,
    ) -> ConvNorm:
        """A convolution with batch norm, and with the activation unless it is `linear`."""
        padding = "SAME" if self.tf_padding else (kernel - 1) // 2 * dilation
        groups = inputs if depthwise else 1
        convolution = vision.conv(
            inputs, outputs, kernel, rngs, stride=stride, padding=padding, groups=groups, dilation=dilation
        )
        return ConvNorm(convolution, rngs, hidden_act=None if linear else self.hidden_act, epsilon=self.layer_norm_eps)


class InvertedResidual(nnx.Module):
    """Expand by a 1x1 convolution, filter each channel by a 3x3, reduce by a 1x1 without activation."""

    def __init__(
        self, config: MobileNetV2Config, inputs: int, outputs: int, stride: int, dilation: int, rngs: nnx.Rngs
    ):
        inner = config.channels(round(inputs * config.expand_ratio))
        self.residual = stride == 1 and inputs == outputs
        self.expand_1x1 = config.unit(inputs, inner, 1, rngs)
        self.conv_3x3 = config.unit(inner, inner, 3, rngs, stride=stride, dilation=dilation, depthwise=True)
        self.reduce_1x1 = config.unit(inner, outputs, 1, rngs, linear=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x[batch, height, width, inputs]` to `[batch, height / stride, width / stride, outputs]`."""
        y = self.reduce_1x1(self.conv_3x3(self.expand_1x1(x)))
        return x + y if self.residual else y


class Stem(nnx.Module):
    """The first convolution and a block whose expansion it is, unless the config wants one of its own."""

    def __init__(self, config: MobileNetV2Config, rngs: nnx.Rngs):
        inner = config.scaled(STEM_CHANNELS)
        self.first_conv = config.unit(config.num_channels, inner, 3, rngs, stride=STEM_STRIDE)
        self.expand_1x1 = None if config.first_layer_is_expansion else config.unit(inner, inner, 1, rngs)
        self.conv_3x3 = config.unit(inner, inner, 3, rngs, depthwise=True)
        self.reduce_1x1 = config.unit(inner, config.scaled(CHANNELS[0]), 1, rngs, linear=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x[batch, height, width, channels]` to half the resolution."""
        x = self.first_conv(x)
        if self.expand_1x1 is not None:
            x = self.expand_1x1(x)
        return self.reduce_1x1(self.conv_3x3(x))


class MobileNetV2(nnx.Module):
    """Images `uint8[batch, height, width, channels]` to logits `float32[batch, classes]`."""

    def __init__(self, config: MobileNetV2Config, *, rngs: nnx.Rngs):
        self.preprocessor = config.preprocessor
        self.conv_stem = Stem(config, rngs)
        channels = [config.scaled(width) for width in CHANNELS]
        self.layer = nnx.List(
            InvertedResidual(config, inputs, outputs, stride, dilation, rngs)
            for inputs, outputs, (stride, dilation) in zip(
                channels[:-1], channels[1:], strides(config.output_stride), strict=True
            )
        )
        fine = config.finegrained_output and config.depth_multiplier < 1
        outputs = HEAD_CHANNELS if fine else config.scaled(HEAD_CHANNELS)
        self.conv_1x1 = config.unit(channels[-1], outputs, 1, rngs)
        self.classifier = nnx.Linear(outputs, config.num_labels, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits."""
        x = self.conv_stem(self.preprocessor(images))
        for block in self.layer:
            x = block(x)
        return self.classifier(vision.global_mean(self.conv_1x1(x)))


def strides(output_stride: int) -> list[tuple[int, int]]:
    """Stride and dilation of each block.

    Once the resolution is `output_stride` times smaller than the image, a block that would have a stride keeps the
    resolution, and those after it are dilated instead (Chen et al. 2017, arXiv:1706.05587, section 3.1).
    """
    result, current, dilation = [], STEM_STRIDE, 1
    for stride in STRIDES:
        if current == output_stride:
            result.append((1, dilation))
            dilation *= stride
        else:
            result.append((stride, 1))
            current *= stride
    return result


def parse_config(config: Mapping[str, Any]) -> MobileNetV2Config:
    """The shape of the model that a Hugging Face `config.json` describes.

    Raises:
      MpqError: a key is missing, unknown, or has a value this implementation would get wrong.
    """
    defaults = {
        "num_labels": num_labels(config),
        "preprocessor": vision.parse_preprocessor(config, config.get("num_channels", 3)),
    }
    config = without(config, "num_labels", "preprocessor", *NEUTRAL)
    parsed = parse_strictly(config, MobileNetV2Config, only={}, defaults=defaults)
    if parsed.output_stride not in (8, 16, 32):
        raise MpqError(f"config key 'output_stride' is {parsed.output_stride!r}: supported is 8, 16, 32")
    return parsed


def stored(config: MobileNetV2Config, path: str) -> Stored:
    """Where a Hugging Face checkpoint keeps the parameter at `path`."""
    del config
    return (
        pytorch_tensor(path, LINEAR) if path.startswith("classifier.") else pytorch_tensor(f"mobilenet_v2.{path}", CONV)
    )


FAMILY = Family(
    name="mobilenet_v2",
    architectures={"MobileNetV2ForImageClassification": "classification"},
    parse=parse_config,
    build=lambda config: MobileNetV2(config, rngs=nnx.Rngs(0)),
    stored=stored,
    inputs=lambda config: Images(*vision.square(config.image_size), config.num_channels),
    ignored=(NUM_BATCHES_TRACKED,),
)
