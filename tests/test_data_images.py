"""Image files: folders, sizes, modes, damaged files; and the sizes that image processors make."""

import io

import numpy as np
import pytest
from PIL import Image

from mpq.data.images import Fit, parse_fit
from mpq.data.sources import read_set, read_sets
from mpq.types import MpqError
from tests.data_cases import images, pixels


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def write_classes(folder, counts, seed=0):
    """A sub-folder a class with so many random images; returns what is in each by class."""
    content = {}
    for number, (name, count) in enumerate(counts.items()):
        content[name] = pixels(count, seed=seed + number)
        for i, array in enumerate(content[name]):
            save(folder / name / f"{i}.png", array)
    return content


def test_a_folder_of_classes_gives_their_sorted_numbers(tmp_path):
    content = write_classes(tmp_path, {"dog": 3, "cat": 4, "ant": 2})
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "dog" / ".hidden.png").write_bytes(b"no image")
    data = read_set(images(), str(tmp_path), "test", window=None, limit=100)
    assert (data.inputs.dtype, data.labels.dtype, data.mask.dtype) == (np.uint8, np.int32, np.bool_)
    assert data.mask.tolist() == [True] * 9
    assert data.document.tolist() == list(range(9))
    found = sorted((int(y), x.tobytes()) for x, y in zip(data.inputs, data.labels, strict=True))
    expected = [(y, x.tobytes()) for y, name in enumerate(("ant", "cat", "dog")) for x in content[name]]
    assert found == sorted(expected)


def test_a_flat_folder_has_no_labels_and_other_tasks_have_no_classes(tmp_path):
    write_classes(tmp_path, {"cat": 4, "dog": 3})
    assert read_set(images(), str(tmp_path / "cat"), "test", window=None, limit=9).labels is None
    assert read_set(images("embedding"), str(tmp_path), "test", window=None, limit=9).labels is None
    assert read_set(images("regression"), str(tmp_path), "test", window=None, limit=9).labels is None


def test_three_sets_of_a_folder_are_disjoint(tmp_path):
    write_classes(tmp_path, {"cat": 20, "dog": 20})
    limits = {"calibration": 15, "selection": 100, "test": 100}
    sets = read_sets(images(), str(tmp_path), window=None, limits=limits, windows_per_document=None)
    assert [len(data.inputs) for data in sets.values()] == [15, 8, 12]
    assert set(sets["test"].labels) == {0, 1}
    assert len({row.tobytes() for data in sets.values() for row in data.inputs}) == 35


def test_only_the_images_that_are_used_are_decoded(tmp_path):
    write_classes(tmp_path, {"cat": 8})
    for path in (tmp_path / "cat").iterdir():
        path.write_bytes(b"damaged")
    first = read_order(8)[0]
    save(tmp_path / "cat" / f"{first}.png", pixels(1)[0])
    assert len(read_set(images(), str(tmp_path), "test", window=None, limit=1).inputs) == 1


def read_order(count):
    from mpq.data.part import permutation

    return permutation(count).tolist()


def test_grayscale_palettes_transparency_and_orientation(tmp_path):
    gray = np.array([[0, 100, 255], [7, 8, 9]], np.uint8)
    save(tmp_path / "a" / "gray.png", gray)
    data = read_set(images(), str(tmp_path / "a"), "test", window=None, limit=9)
    np.testing.assert_array_equal(data.inputs[0], np.repeat(gray[..., None], 3, axis=-1))

    color = pixels(1)[0]
    (tmp_path / "b").mkdir()
    Image.fromarray(color).quantize(6).save(tmp_path / "b" / "palette.png")  # six colors hold six pixels exactly
    data = read_set(images(), str(tmp_path / "b"), "test", window=None, limit=9)
    np.testing.assert_array_equal(data.inputs[0], color)

    save(tmp_path / "c" / "alpha.png", np.concatenate([color, color[..., :1]], axis=-1))
    data = read_set(images(), str(tmp_path / "c"), "test", window=None, limit=9)
    np.testing.assert_array_equal(data.inputs[0], color)

    tag = Image.Exif()
    tag[0x0112] = 6  # stored turned left by a quarter: row 0 of the file is the right column of the scene
    save(tmp_path / "d" / "turned.png", np.rot90(color), exif=tag)
    data = read_set(images(), str(tmp_path / "d"), "test", window=None, limit=9)
    np.testing.assert_array_equal(data.inputs[0], color)

    data = read_set(images(channels=1), str(tmp_path / "a"), "test", window=None, limit=9)
    np.testing.assert_array_equal(data.inputs[0], gray[..., None])


# A picture of 2 x 6 blocks of 2 x 2 equal pixels: by the box filter, half its size is the blocks exactly.
BLOCKS = np.arange(36, dtype=np.uint8).reshape(2, 6, 3)
PICTURE = BLOCKS.repeat(2, axis=0).repeat(2, axis=1)


@pytest.mark.parametrize(
    ("preprocessor", "expected"),
    [
        ({"do_resize": True, "size": {"height": 2, "width": 6}, "resample": 4}, BLOCKS),
        ({"do_resize": True, "size": {"shortest_edge": 2}, "resample": 4}, BLOCKS),
        ({"size": {"shortest_edge": 2}, "resample": 4, "do_center_crop": True, "crop_size": 2}, BLOCKS[:, 2:4]),
        (
            {"size": 2, "default_to_square": False, "resample": 4, "crop_size": {"height": 1, "width": 3}},
            BLOCKS[:1, 1:4],
        ),
        ({"do_resize": False, "size": 2, "crop_size": {"height": 2, "width": 4}}, PICTURE[1:3, 4:8]),
        (
            {"do_center_crop": True, "crop_size": {"height": 7, "width": 2}},
            np.pad(PICTURE[:, 5:7], ((2, 1), (0, 0), (0, 0))),
        ),
        ({"size": 4, "image_processor_type": "CLIPImageProcessor", "resample": 0}, PICTURE),
        ({"size": 4, "image_processor_type": "ViTImageProcessorFast", "resample": 0}, PICTURE[:, 1::3]),
        ({"do_resize": False, "do_center_crop": False, "size": 2, "crop_size": 2}, PICTURE),
    ],
)
def test_images_are_resized_and_cropped_as_the_preprocessor_says(tmp_path, preprocessor, expected):
    save(tmp_path / "a.png", PICTURE)
    height, width, _ = expected.shape
    data = read_set(images("embedding", height, width, 3, preprocessor), str(tmp_path), "test", window=None, limit=1)
    np.testing.assert_array_equal(data.inputs[0], expected)


def test_the_longer_edge_is_rounded_down():
    resized = Fit(edge=10)
    assert resized(Image.new("RGB", (30, 40))).size == (10, 13)
    assert resized(Image.new("RGB", (50, 30))).size == (16, 10)


@pytest.mark.parametrize(
    ("preprocessor", "fit"),
    [
        (None, None),
        ({"do_normalize": True, "rescale_factor": 1.0}, None),
        ({"do_resize": True, "size": 224, "crop_pct": 0.875}, None),
        ({"do_resize": True, "size": 224, "image_processor_type": "ConvNextImageProcessor"}, None),
        ({"do_resize": True, "size": 224, "feature_extractor_type": "ViTFeatureExtractor"}, Fit(size=(224, 224))),
        (
            {"size": 256, "crop_size": 224, "image_processor_type": "DeiTImageProcessor"},
            Fit(size=(256, 256), crop=(224, 224), resample=3),
        ),
        (
            {"size": {"shortest_edge": 256}, "crop_size": 224, "image_processor_type": "MobileNetV2ImageProcessorPil"},
            Fit(edge=256, crop=(224, 224)),
        ),
    ],
)
def test_what_a_preprocessor_says(preprocessor, fit):
    assert parse_fit(preprocessor) == fit


@pytest.mark.parametrize(
    ("preprocessor", "message"),
    [
        ({"do_resize": True}, "resizes or crops and does not say to what"),
        ({"do_center_crop": True, "size": 3}, "resizes or crops and does not say to what"),
        ({"size": 3, "resample": 9}, "has resample 9: it is a number of Pillow"),
        ({"size": {"longest_edge": 3}}, "has the size {'longest_edge': 3}: supported are"),
        ({"size": {"shortest_edge": 3, "longest_edge": 4}}, "has the size {'shortest_edge': 3, 'longest_edge': 4}"),
        ({"size": {"height": 0, "width": 4}}, "has the size {'height': 0, 'width': 4}"),
        ({"crop_size": "3"}, "has the size '3'"),
    ],
)
def test_a_preprocessor_that_is_not_understood_is_refused(preprocessor, message):
    with pytest.raises(MpqError, match=message):
        parse_fit(preprocessor)


def truncated_jpeg():
    file = io.BytesIO()
    Image.fromarray(pixels(1, 64, 64)[0]).save(file, "JPEG")
    return file.getvalue()[:-600]


def sixteen_bits():
    file = io.BytesIO()
    Image.fromarray(np.zeros((2, 3), np.uint16)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no image", r"image .*x\.png cannot be read \(cannot identify image file"),
        (b"", r"image .*x\.png cannot be read"),
        (truncated_jpeg(), r"image .*x\.png cannot be read \(.*truncated"),
        (sixteen_bits(), r"image .*x\.png has pixels of mode I;16: needed are 8 bits"),
    ],
)
def test_a_damaged_image_is_refused_by_name(tmp_path, content, message):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(MpqError, match=message):
        read_set(images(), str(tmp_path), "test", window=None, limit=9)


def test_a_wrong_size_is_refused_by_name_with_both_sizes(tmp_path):
    save(tmp_path / "x.png", pixels(1, 5, 4)[0])
    with pytest.raises(MpqError, match=r"x\.png has 5 x 4 pixels: the model reads 2 x 3, and no preprocessor"):
        read_set(images(), str(tmp_path), "test", window=None, limit=9)
    fitted = images(preprocessor={"size": {"shortest_edge": 2}})
    with pytest.raises(MpqError, match=r"x\.png has 2 x 2 pixels: the model reads 2 x 3$"):
        read_set(fitted, str(tmp_path), "test", window=None, limit=9)


def test_a_model_of_other_channels_reads_no_image_files(tmp_path):
    save(tmp_path / "x.png", pixels(1)[0])
    with pytest.raises(MpqError, match=r"images of 4 channels: give them as \.npz"):
        read_set(images(channels=4), str(tmp_path), "test", window=None, limit=9)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "has no images"),
        (["notes.txt"], "has no images"),
        (["cat/1.png", "dog/notes.txt"], "has the sub-folder 'dog' without an image"),
        (["cat/1.png", "2.png"], "has images beside the folder 'cat'"),
    ],
)
def test_a_folder_that_is_no_data_set_is_refused(tmp_path, files, message):
    for file in files:
        save(tmp_path / file, pixels(1)[0]) if file.endswith("png") else save_text(tmp_path / file)
    with pytest.raises(MpqError, match=message):
        read_set(images(), str(tmp_path), "test", window=None, limit=9)


def save_text(path):
    path.parent.mkdir(exist_ok=True)
    path.write_text("no image")
