"""Image files to `uint8[N, height, width, channels]`, in the size that the model reads.

Pillow decodes them, an image at a time. Orientation tags are followed, and palettes, grayscale, transparency and CMYK
become RGB (for a model of one channel, gray).
"""

import contextlib
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mpq.data.part import Part, Rows
from mpq.inputs import Images
from mpq.types import MpqError

SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))

EIGHT_BIT = frozenset(("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"))
"""Modes of Pillow whose channels have at most 8 bits: what others hold would be clipped."""


class Processor(NamedTuple):
    """What an image processor does where its file is silent."""

    shortest_edge: bool
    """A `size` that is one number is that of the shortest edge, else of both edges."""
    resample: int
    """Pillow's number of the filter."""


PROCESSORS: Mapping[str, Processor] = {
    "Bit": Processor(True, 3),
    "CLIP": Processor(True, 3),
    "ChineseCLIP": Processor(True, 3),
    "DeiT": Processor(False, 3),
    "MobileNetV1": Processor(True, 2),
    "MobileNetV2": Processor(True, 2),
    "Siglip": Processor(True, 3),
    "ViT": Processor(False, 2),
}
"""Image processors of transformers that resize and crop in the common way. Others have ways of their own: ConvNeXt's
`crop_pct` among them."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """How an image gets its size: resized, then cropped about its center, as image processors of transformers do it.

    Attributes:
      edge: pixels of the shortest edge, which keeps the proportions; None: see `size`.
      size: height and width to resize to; None: not resized, or by `edge`.
      resample: Pillow's number of the filter: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic, 4 box, 5 Hamming.
      crop: height and width to crop to, where the image is smaller filled up with black; None: not cropped.
    """

    edge: int | None = None
    size: tuple[int, int] | None = None
    resample: int = 2
    crop: tuple[int, int] | None = None

    def __call__(self, image: Any) -> Any:
        """A `PIL.Image.Image` to another."""
        width, height = image.size
        target = self.size
        if self.edge is not None:
            # The longer edge is rounded down.
            long = int(self.edge * max(width, height) / min(width, height))
            target = (long, self.edge) if width <= height else (self.edge, long)
        if target is not None:
            image = image.resize((target[1], target[0]), resample=self.resample)
        if self.crop is not None:
            top, left = (image.height - self.crop[0]) // 2, (image.width - self.crop[1]) // 2
            image = image.crop((left, top, left + self.crop[1], top + self.crop[0]))
        return image


def parse_fit(preprocessor: Mapping[str, Any] | None) -> Fit | None:
    """What the content of a `preprocessor_config.json` says of resizing and cropping.

    Returns:
      None where it says nothing, or something that `Fit` is no model of: images then have to have the model's size.

    Raises:
      MpqError: it resizes or crops to a size, or by a filter, that is missing or unknown.
    """
    given = preprocessor or {}
    name = str(given.get("image_processor_type") or given.get("feature_extractor_type") or "ViT")
    for suffix in ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor"):
        name = name.removesuffix(suffix)
    if name not in PROCESSORS or "crop_pct" in given:
        return None
    processor = PROCESSORS[name]
    size = given.get("size") if given.get("do_resize", "size" in given) else None
    crop = given.get("crop_size") if given.get("do_center_crop", "crop_size" in given) else None
    if (given.get("do_resize") and size is None) or (given.get("do_center_crop") and crop is None):
        raise MpqError("the preprocessor resizes or crops and does not say to what: write size or crop_size into it")
    if size is None and crop is None:
        return None
    shortest = isinstance(size, Mapping) and size.keys() == {"shortest_edge"}
    if isinstance(size, int):
        shortest = not given.get("default_to_square", not processor.shortest_edge)
    resample = given.get("resample", processor.resample)
    if resample not in range(6):
        raise MpqError(f"the preprocessor has resample {resample!r}: it is a number of Pillow, such as 2 (bilinear)")
    height_width = None if size is None else _height_width(size)
    return Fit(
        edge=height_width[0] if height_width and shortest else None,
        size=None if shortest else height_width,
        resample=resample,
        crop=None if crop is None else _height_width(crop),
    )


def decode(file: Any, inputs: Images, fit: Fit | None, name: str) -> np.ndarray:
    """One image.

    Args:
      file: a path, a file object, or an image of Pillow.
      inputs: what the model reads.
      fit: how the image gets its size; None: it has it.
      name: of the image, for a person.

    Returns:
      `uint8[height, width, channels]`.

    Raises:
      MpqError: it cannot be read, has more than 8 bits a channel, or has another size than the model's.
    """
    from PIL import Image, ImageOps

    mode = {1: "L", 3: "RGB"}.get(inputs.channels)
    if mode is None:
        raise MpqError(f"the model reads images of {inputs.channels} channels: give them as .npz, not as image files")
    try:
        with contextlib.nullcontext(file) if isinstance(file, Image.Image) else Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened).convert(mode) if opened.mode in EIGHT_BIT else None
            found = opened.mode
    except Exception as error:  # the decoders of Pillow raise whatever they meet
        raise MpqError(f"image {name} cannot be read ({error}): mend it or take it out") from error
    if image is None:
        raise MpqError(f"image {name} has pixels of mode {found}: needed are 8 bits a channel")
    if fit is not None:
        image = fit(image)
    if (image.height, image.width) != (inputs.height, inputs.width):
        hint = "" if fit else ", and no preprocessor that is known says how to resize it"
        raise MpqError(
            f"image {name} has {image.height} x {image.width} pixels: the model reads {inputs.height} x {inputs.width}"
            f"{hint}"
        )
    return np.asarray(image).reshape(inputs.height, inputs.width, inputs.channels)


def image_rows(
    files: Sequence[Any], inputs: Images, fit: Fit | None, name: Callable[[int], str], labels: np.ndarray | None
) -> Rows:
    """Rows of images that are decoded one by one."""
    pixels = np.empty((len(files), inputs.height, inputs.width, inputs.channels), np.uint8)
    for i, file in enumerate(files):
        pixels[i] = decode(file, inputs, fit, name(i))
    return Rows(pixels, np.ones(len(files), bool), labels)


def read_folder(folder: Path, inputs: Images, fit: Fit | None, task: str) -> Part:
    """The images of a folder: one sub-folder a class, sorted by name, or all in one without labels.

    Other files, and hidden ones, are passed over. Names of classes are labels for the task `classification` only.

    Raises:
      MpqError: it has no image, a sub-folder has none, or there are images beside sub-folders.
    """
    flat = _images_in(folder)
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if flat and classes:
        raise MpqError(f"folder {folder} has images beside the folder {classes[0].name!r}: are sub-folders classes?")
    members = [_images_in(path) for path in classes]
    if empty := [path.name for path, found in zip(classes, members, strict=True) if not found]:
        raise MpqError(f"folder {folder} has the sub-folder {empty[0]!r} without an image: each is one class")
    files = flat + [file for found in members for file in found]
    if not files:
        raise MpqError(f"folder {folder} has no images ({', '.join(sorted(SUFFIXES))})")
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(found) for found in members])
    labelled = bool(classes) and task == "classification"

    def read(chosen: np.ndarray) -> Rows:
        chosen_files = [files[i] for i in chosen]
        of_chosen = labels[chosen] if labelled else None
        return image_rows(chosen_files, inputs, fit, lambda i: str(chosen_files[i]), of_chosen)

    return Part(len(files), read)


def jpeg_part(
    jpeg: np.ndarray, offsets: np.ndarray, labels: np.ndarray | None, inputs: Images, fit: Fit | None, source: str
) -> Part:
    """Images that are stored as files one after the other.

    Args:
      jpeg: `uint8[bytes]`.
      offsets: `int[N + 1]`: image i is `jpeg[offsets[i] : offsets[i + 1]]`.
      labels: `[N]` or None.
      inputs: what the model reads.
      fit: how the images get their size.
      source: for a person.

    Raises:
      MpqError: the offsets do not cut the bytes in pieces.
    """
    ends = np.asarray(offsets)
    whole = ends.ndim == 1 and np.issubdtype(ends.dtype, np.integer) and len(ends) > 1 and jpeg.dtype == np.uint8
    if not whole or ends[0] != 0 or (np.diff(ends.astype(np.int64)) <= 0).any() or ends[-1] != jpeg.size:
        raise MpqError(f"{source} has offsets that do not cut its {jpeg.size} bytes in images: N + 1 ascending from 0")

    def read(chosen: np.ndarray) -> Rows:
        files = [io.BytesIO(jpeg[ends[i] : ends[i + 1]].tobytes()) for i in chosen]
        name = lambda i: f"{chosen[i]} of {source}"
        return image_rows(files, inputs, fit, name, None if labels is None else labels[chosen])

    return Part(len(ends) - 1, read)


def _images_in(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
    )


def _height_width(size: Any) -> tuple[int, int]:
    """Height and width from a number for both, from their names, or from the shortest edge."""
    values: list[Any] = [size]
    if isinstance(size, Mapping):
        pair = size.keys() == {"height", "width"}
        values = [size["height"], size["width"]] if pair else list(size.values())
        if not pair and size.keys() != {"shortest_edge"}:
            values = []
    if not values or any(not isinstance(value, int) or value < 1 for value in values):
        raise MpqError(
            f"the preprocessor has the size {size!r}: supported are a number, height and width, or shortest_edge"
        )
    return values[0], values[-1]
