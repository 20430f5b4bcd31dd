"""Data sets of the Hugging Face hub, by its `datasets` library: `datasets:OWNER/NAME[@REVISION][:SPLIT]`.

The library is an extra. It downloads a data set once, keeps it on disk, and reads from there what is asked for.
"""

import importlib
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mpq.data.images import image_rows, parse_fit
from mpq.data.labels import parse_labels
from mpq.data.part import Part, Rows
from mpq.data.sentences import Reader, sentence_rows
from mpq.inputs import Images
from mpq.models.model import Model
from mpq.types import MpqError

PREFIX = "datasets:"
CHUNK = 1024  # documents read at a time


def load_splits(source: str) -> Mapping[str, Any]:
    """The splits of a data set: `all` where the source or the data set states one only, else `train` and `test`.

    A data set without a split `test` is tested on `validation`.

    Raises:
      MpqError: the source is misspelt, the library is missing, or it cannot give the data set or the split.
    """
    match = re.fullmatch(r"datasets:([^/@:\s]+/[^/@:\s]+)(?:@([^:\s]+))?(?::(\S+))?", source)
    if match is None:
        raise MpqError(f"data {source!r} is misspelt: write datasets:OWNER/NAME, datasets:OWNER/NAME@REVISION:SPLIT")
    name, revision, split = match.groups()
    try:
        library = importlib.import_module(PREFIX.removesuffix(":"))
    except ImportError as error:
        raise MpqError("data sets of the hub need an extra: pip install 'mpq[data]'") from error
    try:
        splits = library.load_dataset(name, revision=revision)
    except Exception as error:  # whatever its builders and its network raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MpqError(f"data {source!r} could not be loaded ({reason})") from error
    if split is not None:
        if split not in splits:
            raise MpqError(f"data set {name} has no split {split!r}: it has {', '.join(splits)}")
        return {"all": splits[split]}
    if len(splits) == 1:
        return {"all": next(iter(splits.values()))}
    test = "test" if "test" in splits else "validation"
    if "train" not in splits or test not in splits:
        raise MpqError(
            f"data set {name} has the splits {', '.join(splits)}: name one, datasets:{name}:{next(iter(splits))}"
        )
    return {"train": splits["train"], "test": splits[test]}


def split_part(split: Any, source: str, model: Model, reader: Reader | None) -> Part:
    """Examples of a split: images, pairs of sentences for an embedding model, or texts.

    Args:
      split: of `load_splits`.
      source: for a person.
      model: what they are for.
      reader: of texts; None for images.

    Raises:
      MpqError: a column is missing.
    """
    label = "label"
    if reader is None:
        columns = ("image",)
        label = "label" if model.task.name != "embedding" else ""
    elif model.task.name == "embedding" and ("sentence1" in split.column_names or "text" not in split.column_names):
        columns, label = ("sentence1", "sentence2"), "score"
    else:
        columns = ("text",)
        label = "" if model.task.name == "embedding" else "label"
    require_columns(split, source, *columns, *([label] if label else []))

    def read(chosen: np.ndarray) -> Rows:
        some = split.select(chosen.tolist())
        where = lambda i: f"row {chosen[i]} of {source}"
        labels = parse_labels(list(some[label]), model.task.name, where) if label else None
        values = [list(some[column]) for column in columns]
        if reader is None:
            assert isinstance(model.inputs, Images)
            return image_rows(values[0], model.inputs, parse_fit(model.config.get("preprocessor")), where, labels)
        return sentence_rows(reader, list(zip(*values, strict=True)), labels, where)

    return Part(len(split), read, len(columns))


def read_column(split: Any, source: str, share: tuple[float, float], limit: int) -> list[str]:
    """The first `limit` texts that are not empty in a contiguous share of a split, such as `(0.5, 0.7)`.

    Raises:
      MpqError: there is no column `text`.
    """
    require_columns(split, source, "text")
    start, stop = (round(len(split) * edge) for edge in share)

    def texts() -> Iterator[str]:
        for first in range(start, stop, CHUNK):
            yield from split.select(range(first, min(first + CHUNK, stop)))["text"]

    return list(itertools.islice((text.strip() for text in texts() if text and text.strip()), limit))


def require_columns(split: Any, source: str, *columns: str) -> None:
    """Raise if a column is missing.

    Raises:
      MpqError: names those that are missing and those that there are.
    """
    if missing := [column for column in columns if column not in split.column_names]:
        raise MpqError(f"data {source!r} lacks the column {', '.join(missing)}: it has {', '.join(split.column_names)}")
