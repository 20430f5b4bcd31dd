"""What vision families share: what an image goes through before the network, and convolution with batch norm.

Images come as `uint8[batch, height, width, channels]` of the size that `Images` says; resizing and cropping are done
before. Rescaling and normalization are part of the model, as constants, so that no evaluation can forget them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mpq.inputs import Images
from mpq.models.layers import activation, without
from mpq.types import MpqError

BEFORE_THE_MODEL = (
    "_valid_processor_keys",
    "crop_pct",
    "crop_size",
    "data_format",
    "default_to_square",
    "device",
    "disable_grouping",
    "do_center_crop",
    "do_convert_rgb",
    "do_resize",
    "feature_extractor_type",
    "image_processor_type",
    "input_data_format",
    "processor_class",
    "resample",
    "return_tensors",
    "size",
)
"""Keys of a `preprocessor_config.json` that say how an image gets its size, or nothing that changes a pixel."""


@dataclasses.dataclass(frozen=True)
class Preprocessor:
    """Pixels `x` of 0 to 255 become `(x * rescale_factor - mean) / std`, one mean and std a channel.

    Attributes:
      rescale_factor: 1 where nothing is rescaled.
      mean, std: of rescaled values; empty where nothing is normalized.
      size: height and width that it makes images of, or None where it does not say.
    """

    rescale_factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None

    def __call__(self, images: jax.Array) -> jax.Array:
        """`uint8[batch, height, width, channels]` to float32."""
        x = images.astype(jnp.float32) * self.rescale_factor
        if not self.mean:
            return x
        return (x - jnp.asarray(self.mean, jnp.float32)) / jnp.asarray(self.std, jnp.float32)


def parse_preprocessor(config: Mapping[str, Any], channels: int = 3) -> Preprocessor:
    """What `config["preprocessor"]`, the content of a `preprocessor_config.json`, does to pixels.

    Args:
      config: a model's config.
      channels: of its images.

    Raises:
      MpqError: it is missing, has an unknown key, lacks mean and std, or has them for another number of channels.
    """
    given = config.get("preprocessor")
    if given is None:
        raise MpqError(
            "the checkpoint has no preprocessor_config.json: the model reads pixels of 0 to 255 and has to know how to "
            "rescale and normalize them; write one with rescale_factor, image_mean and image_std"
        )
    rest = without(given, *BEFORE_THE_MODEL)
    rescale = rest.pop("rescale_factor", 1 / 255)
    mean, std = rest.pop("image_mean", None), rest.pop("image_std", None)
    if not rest.pop("do_rescale", True):
        rescale = 1.0
    if rest.pop("do_normalize", True):
        if mean is None or std is None or len(mean) != channels or len(std) != channels:
            raise MpqError(
                f"the preprocessor has image_mean {mean} and image_std {std}: needed is one value for each of "
                f"{channels} channels, or do_normalize false"
            )
    else:
        mean = std = ()
    if unknown := sorted(key for key, value in rest.items() if value):
        raise MpqError(f"preprocessor key {unknown[0]!r} (value {rest[unknown[0]]!r}) is unknown: it may change pixels")
    return Preprocessor(float(rescale), tuple(map(float, mean)), tuple(map(float, std)), _size(given))


def _size(given: Mapping[str, Any]) -> tuple[int, int] | None:
    """Size of the images a preprocessor makes: that of the crop where it crops, else that of resizing."""
    crop = given.get("do_center_crop", "crop_size" in given)
    size = given.get("crop_size") if crop else given.get("size")
    if isinstance(size, Mapping):
        # A shortest edge alone is that of a square: ConvNextImageProcessor, which ResNet has, crops to it.
        size = (size["height"], size["width"]) if "height" in size else size.get("shortest_edge")
    return square(size) if size else None


def square(size: Any) -> tuple[int, int]:
    """Height and width from one number for both, or from a pair."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def images(preprocessor: Preprocessor, channels: int) -> Images:
    """What a network without a size of its own reads: what its preprocessor makes.

    Raises:
      MpqError: the preprocessor does not say.
    """
    if preprocessor.size is None:
        raise MpqError("the preprocessor states no size: write size or crop_size, with height and width, into it")
    return Images(*preprocessor.size, channels)


def conv(
    inputs: int,
    outputs: int,
    kernel: int,
    rngs: nnx.Rngs,
    *,
    stride: int = 1,
    padding: int | str = 0,
    groups: int = 1,
    dilation: int = 1,
    bias: bool = False,
) -> nnx.Conv:
    """A square 2-D convolution over `[batch, height, width, channels]`, kernel `[height, width, in / groups, out]`.

    Args:
      inputs: channels.
      outputs: channels.
      kernel: height and width.
      rngs: for the initializers.
      stride: of both axes.
      padding: zeros on all four sides, as PyTorch pads; or "SAME", as TensorFlow pads: so many that a stride of s gives
        ceil(size / s) outputs, the odd one at the bottom and at the right.
      groups: blocks of channels that do not mix.
      dilation: distance between taps.
      bias: whether there is one.
    """
    return nnx.Conv(
        inputs,
        outputs,
        (kernel, kernel),
        strides=(stride, stride),
        padding=padding if isinstance(padding, str) else [(padding, padding)] * 2,
        feature_group_count=groups,
        kernel_dilation=(dilation, dilation),
        use_bias=bias,
        rngs=rngs,
    )


def batch_norm(features: int, rngs: nnx.Rngs, epsilon: float = 1e-5) -> nnx.BatchNorm:
    """Batch normalization (Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 2): inference with stored statistics."""
    return nnx.BatchNorm(features, use_running_average=True, epsilon=epsilon, rngs=rngs)


class ConvNorm(nnx.Module):
    """Convolution, batch norm, activation (or none); the attributes have the names that Hugging Face gives them."""

    def __init__(self, convolution: nnx.Conv, rngs: nnx.Rngs, *, hidden_act: str | None = None, epsilon: float = 1e-5):
        self.convolution = convolution
        self.normalization = batch_norm(convolution.out_features, rngs, epsilon)
        self.act = None if hidden_act is None else activation(hidden_act)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x[batch, height, width, in]` to `[batch, height', width', out]`."""
        x = self.normalization(self.convolution(x))
        return x if self.act is None else self.act(x)


def max_pool(x: jax.Array, window: int, stride: int, padding: tuple[int, int]) -> jax.Array:
    """Largest value of each square window of `x[batch, height, width, channels]`; padding never wins."""
    windows, strides = (1, window, window, 1), (1, stride, stride, 1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, windows, strides, ((0, 0), padding, padding, (0, 0)))


def global_mean(x: jax.Array) -> jax.Array:
    """`x[batch, height, width, channels]` to its mean over all positions, `[batch, channels]`."""
    return x.mean(axis=(1, 2))
