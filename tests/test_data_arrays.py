"""Arrays in .npz files: the layouts, labels and targets, images stored as JPEG, and everything that can be wrong."""

import dataclasses
import io

import jax
import numpy as np
import pytest
from PIL import Image

from mpq.data.sources import read_set, read_sets
from mpq.types import MpqError
from tests.data_cases import encoder, images, model, pixels

LIMITS = dict.fromkeys(("calibration", "selection", "test"), 1000)


def save(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def read(reads, source, which="test", limit=1000, window=None):
    return read_set(reads, source, which, window=window, limit=limit)


def rows(data):
    """Rows with their labels, in an order of their own."""
    labels = [None] * len(data.inputs) if data.labels is None else data.labels.tolist()
    return sorted((row.tobytes(), label) for row, label in zip(data.inputs, labels, strict=True))


@pytest.mark.parametrize("names", ["train_x train_y test_x test_y", "x_train y_train x_test y_test"])
def test_parts_that_the_file_states_are_kept(tmp_path, names):
    train, test, y = pixels(21), pixels(9, seed=1), np.arange(21) % 5
    arrays = dict(zip(names.split(), (train, y[:, None], test, y[:9].astype(np.uint8)), strict=True))
    source = save(tmp_path / "a.npz", **arrays)
    sets = read_sets(images(), source, window=None, limits=LIMITS, windows_per_document=None)
    assert [len(data.inputs) for data in sets.values()] == [15, 6, 9]
    assert (
        rows(sets["test"])
        == rows(read(images(), source))
        == sorted((x.tobytes(), c) for x, c in zip(test, y[:9], strict=True))
    )
    both = rows(sets["calibration"]) + rows(sets["selection"])
    assert (
        sorted(both)
        == rows(read(images(), source, "calibration"))
        == sorted((x.tobytes(), c) for x, c in zip(train, y, strict=True))
    )
    data = sets["test"]
    assert (data.inputs.dtype, data.labels.dtype, data.labels.shape) == (np.uint8, np.int32, (9,))
    assert data.mask.tolist() == [True] * 9
    assert data.document.tolist() == list(range(9))


def test_images_with_and_without_labels(tmp_path):
    x, y = pixels(12), np.arange(12)
    labelled = read(images(), save(tmp_path / "a.npz", images=x, labels=y))
    assert rows(labelled) == sorted((row.tobytes(), c) for row, c in zip(x, y, strict=True))
    assert read(images(), save(tmp_path / "b.npz", images=x)).labels is None
    assert read(images("embedding"), save(tmp_path / "c.npz", images=x, labels=y)).labels is None


@pytest.mark.parametrize("shape", [(12,), (12, 1), (12, 4)])
@pytest.mark.parametrize("dtype", [np.float64, np.int8])
def test_targets_of_a_regression(tmp_path, shape, dtype):
    x, y = pixels(12), np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    data = read(images("regression"), save(tmp_path / "a.npz", inputs=x, targets=y))
    assert data.labels.dtype == np.float32
    assert rows(data) == sorted(
        (row.tobytes(), target.tolist()) for row, target in zip(x, y.reshape(12, -1), strict=True)
    )


@dataclasses.dataclass(frozen=True)
class Plain:
    """Inputs of a kind that the package does not know: vectors of complex numbers."""

    def struct(self, batch, window=None):
        return jax.ShapeDtypeStruct((batch, 5), np.dtype(np.complex64))


def test_inputs_of_any_kind_are_held_against_what_the_model_reads(tmp_path):
    plain = model(Plain(), "regression")
    x, y = (np.arange(30).reshape(6, 5) * 1j).astype(np.complex64), np.arange(6.0)
    data = read(plain, save(tmp_path / "a.npz", inputs=x, targets=y))
    assert rows(data) == sorted((row.tobytes(), [target]) for row, target in zip(x, y, strict=True))
    assert data.mask.shape == (6,)
    with pytest.raises(MpqError, match=r"inputs has shape \(6, 4\): the model reads \[N, 5\]"):
        read(plain, save(tmp_path / "b.npz", inputs=x[:, 1:], targets=y))
    with pytest.raises(MpqError, match=r"inputs has dtype complex128: the model reads complex64$"):
        read(plain, save(tmp_path / "c.npz", inputs=x.astype(complex), targets=y))
    with pytest.raises(MpqError, match=r"'datasets:a/b' does not suit: .* reads an array file \.npz with inputs"):
        read(plain, "datasets:a/b")
    with pytest.raises(MpqError, match=r"does not suit: .* reads an array file \.npz with inputs"):
        read(plain, str(tmp_path))


def test_token_ids_are_masked_where_they_are_padding(tmp_path):
    ids = np.array([[1, 5, 2, 0], [1, 6, 7, 2], [1, 2, 0, 0]])
    source = save(tmp_path / "a.npz", inputs=ids, labels=np.array([0, 1, 2]))
    data = read(encoder("classification"), source, window=4)
    assert (data.inputs.dtype, data.mask.shape) == (np.int32, (3, 4))
    assert data.mask.tolist() == [(ids[c] != 0).tolist() for c in data.labels]
    with pytest.raises(MpqError, match=r"shape \(3, 4\): the model reads \[N, 5\]"):
        read(encoder("classification"), source, window=5)
    with pytest.raises(MpqError, match="token ids from -1 to 7: they count from 0"):
        read(encoder("classification"), save(tmp_path / "b.npz", inputs=ids - (ids == 0)), window=4)
    with pytest.raises(MpqError, match=r"dtype float64: the model reads int32$"):
        read(encoder("classification"), save(tmp_path / "c.npz", inputs=ids * 1.0), window=4)


def jpegs(count):
    """Files of images one after the other, and what a decoder makes of each."""
    files, decoded = [], []
    for array in pixels(count, 8, 8):
        file = io.BytesIO()
        Image.fromarray(array).save(file, "JPEG", quality=75)
        files.append(file.getvalue())
        decoded.append(np.asarray(Image.open(file)))
    return np.frombuffer(b"".join(files), np.uint8), np.cumsum([0, *map(len, files)]), decoded


def test_images_stored_as_jpeg(tmp_path):
    jpeg, offsets, decoded = jpegs(20)
    source = save(tmp_path / "a.npz", jpeg=jpeg, offsets=offsets, labels=np.arange(20))
    data = read(images(height=8, width=8), source)
    assert rows(data) == sorted((x.tobytes(), i) for i, x in enumerate(decoded))
    sets = read_sets(images(height=8, width=8), source, window=None, limits=LIMITS, windows_per_document=None)
    assert [len(data.inputs) for data in sets.values()] == [10, 4, 6]
    assert read(images(height=8, width=8), save(tmp_path / "b.npz", jpeg=jpeg, offsets=offsets)).labels is None


@pytest.mark.parametrize(
    "offsets", [lambda o: o[1:], lambda o: o[:-1], lambda o: o[::-1], lambda o: o * 1.0, lambda o: o[:1]]
)
def test_offsets_that_do_not_cut_the_bytes_are_refused(tmp_path, offsets):
    jpeg, ends, _ = jpegs(4)
    with pytest.raises(MpqError, match="offsets that do not cut"):
        read(images(height=8, width=8), save(tmp_path / "a.npz", jpeg=jpeg, offsets=offsets(ends)))


def test_a_damaged_jpeg_in_an_array_is_refused_by_number(tmp_path):
    jpeg, ends, _ = jpegs(4)
    damaged = jpeg.copy()
    damaged[ends[2] : ends[2] + 20] = 0
    with pytest.raises(MpqError, match=r"image 2 of .*a\.npz cannot be read"):
        read(images(height=8, width=8), save(tmp_path / "a.npz", jpeg=damaged, offsets=ends))


X, Y = pixels(4), np.arange(4)


@pytest.mark.parametrize(
    ("task", "arrays", "message"),
    [
        (
            "classification",
            {"images": X / 255, "labels": Y},
            "images has dtype float64: the model reads uint8, pixels of",
        ),
        ("classification", {"images": X[..., 0], "labels": Y}, r"shape \(4, 2, 3\): .* write images\[..., None\]"),
        ("classification", {"images": X[:, :1], "labels": Y}, r"shape \(4, 1, 3, 3\): the model reads \[N, 2, 3, 3\]"),
        (
            "classification",
            {"images": X[..., :1], "labels": Y},
            r"shape \(4, 2, 3, 1\): the model reads \[N, 2, 3, 3\]",
        ),
        ("classification", {"images": X[:0], "labels": Y[:0]}, "has 0 examples: too few for the test set"),
        ("classification", {"images": X, "labels": Y[:3]}, r"labels has labels of shape \(3,\) for 4 examples"),
        ("classification", {"images": X, "labels": np.int64(3)}, r"labels of shape \(\) for 4 examples"),
        ("classification", {"images": X, "labels": Y * 1.0}, r"labels float64\[4\]: classes are integers"),
        (
            "classification",
            {"images": X, "labels": np.eye(4, dtype=int)},
            r"labels int64\[4, 4\]: classes are integers",
        ),
        ("classification", {"images": X, "labels": Y - 1}, "labels from -1 to 2: classes count from 0"),
        ("classification", {"images": X, "labels": Y + 2**40}, "labels from 1099511627776 to"),
        (
            "regression",
            {"inputs": X, "targets": np.array([0, 1, np.nan, 3])},
            "NaN or infinite in float32, first in row 2",
        ),
        (
            "regression",
            {"inputs": X, "targets": np.array([0, 1, 2, 1e300])},
            "NaN or infinite in float32, first in row 3",
        ),
        ("regression", {"inputs": X, "targets": np.array(list("abcd"))}, "targets of dtype <U1: they are real numbers"),
        ("regression", {"inputs": X, "targets": np.ones((4, 2, 2))}, r"labels of shape \(4, 2, 2\) for 4 examples"),
        ("classification", {"x": X, "y": Y}, "has the arrays x, y: the names that are read are train_x, train_y"),
        ("classification", {}, r"has the arrays \(none\)"),
        (
            "classification",
            {"images": X, "labels": np.array([None] * 4)},
            r"cannot be read as \.npz .*plain arrays only",
        ),
    ],
)
def test_bad_arrays_are_refused(tmp_path, task, arrays, message):
    with pytest.raises(MpqError, match=message):
        read(images(task), save(tmp_path / "a.npz", **arrays))


def test_files_that_are_no_npz_are_refused(tmp_path):
    whole = tmp_path / "a.npz"
    save(whole, images=X, labels=Y)
    content = whole.read_bytes()
    for damaged in (b"", b"no zip", content[:-50], content[:200] + b"x" * 20 + content[220:]):
        (tmp_path / "b.npz").write_bytes(damaged)
        with pytest.raises(MpqError, match=r"b\.npz cannot be read as \.npz"):
            read(images(), str(tmp_path / "b.npz"))
    np.save(tmp_path / "c.npy", X)
    (tmp_path / "c.npy").rename(tmp_path / "c.npz")
    with pytest.raises(MpqError, match=r"c\.npz cannot be read as \.npz"):
        read(images(), str(tmp_path / "c.npz"))
    np.savez_compressed(tmp_path / "d.npz", images=np.repeat(X, 50, axis=0))
    content = bytearray((tmp_path / "d.npz").read_bytes())
    content[150:180] = b"\xff" * 30
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(MpqError, match=r"d\.npz cannot be read as \.npz"):
        read(images(), str(tmp_path / "d.npz"))


def test_real_images(shared_data):
    cifar = images(height=32, width=32)
    exact = str(shared_data / "vision" / "cifar10_lossless_head.npz")
    data = read(cifar, exact)
    with np.load(exact) as file:
        assert rows(data) == sorted((x.tobytes(), y) for x, y in zip(file["test_x"], file["test_y"], strict=True))
        x, y = file["test_x"], file["test_y"]
    sets = read_sets(cifar, exact, window=None, limits=LIMITS, windows_per_document=None)
    assert [len(s.inputs) for s in sets.values()] == [666, 266, 932]
    lossy = read(cifar, str(shared_data / "vision" / "cifar10_test_jpeg.npz"), limit=10**5)
    assert lossy.inputs.shape == (10000, 32, 32, 3)
    np.testing.assert_array_equal(np.bincount(lossy.labels), 1000)
    for image, label in zip(x[:10], y[:10], strict=True):  # every exact image has its compressed twin, of its class
        distance = np.abs(lossy.inputs.astype(np.int16) - image).mean(axis=(1, 2, 3))
        assert distance.min() < 15 < np.partition(distance, 1)[1]
        assert lossy.labels[distance.argmin()] == label
