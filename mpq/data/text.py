"""Text to windows of tokens, for language models.

A document's token ids, BOS in front, are cut into consecutive windows; the first token of every window is BOS, as it is
when a model is used. A shorter last window is padded on the right and its padding never counts.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mpq.data.dataset import new_dataset
from mpq.inputs import Dataset
from mpq.types import MpqError

SEPARATOR = "<|endoftext|>"
MIN_TOKENS = 16  # a shorter rest of a document says little per window and is dropped


CHUNK = 1024  # documents tokenized at a time


def read_text(path: Path) -> str:
    """All of a UTF-8 file, with or without a byte order mark.

    Raises:
      MpqError: no such file, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise MpqError(f"text {str(path)!r} cannot be read as UTF-8 ({error}): give a text or .jsonl file") from error


def json_lines(path: Path, needed: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a `.jsonl` file with the numbers of their lines, from 1; empty lines are passed over.

    Args:
      path: the file.
      needed: the keys that an object has to have, for the message: `a 'text'`.

    Raises:
      MpqError: the file cannot be read, or a line is no JSON object; names the line.
    """
    # Not `splitlines`: JSON strings may hold U+2028 and its like, which it takes for line ends.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise MpqError(
                f"text {str(path)!r} needs one object with {needed} a line: line {number}: {error}"
            ) from error
        if not isinstance(value, dict):
            raise MpqError(
                f"text {str(path)!r} needs one object with {needed} a line: line {number} is {type(value).__name__}"
            )
        yield number, value


def read_documents(path: Path) -> list[str]:
    """Documents of a text file: separated by `<|endoftext|>`, or one `{"text": ...}` a line in `.jsonl`.

    Raises:
      MpqError: no such file, not UTF-8, not JSON lines, or empty.
    """
    if path.suffix == ".jsonl":
        documents = []
        for number, value in json_lines(path, "a 'text'"):
            if not isinstance(value.get("text"), str):
                raise MpqError(f"text {str(path)!r} needs one object with a 'text' a line: line {number} has none")
            documents.append(value["text"])
    else:
        documents = read_text(path).split(SEPARATOR)
    documents = [d.strip() for d in documents if d.strip()]
    if not documents:
        raise MpqError(f"text {str(path)!r} is empty: give at least one document")
    return documents


def plain_tokenizer(tokenizer: Tokenizer | None) -> Tokenizer:
    """A tokenizer that neither truncates nor pads: a `tokenizer.json` may ask for both, at a length of its own.

    Raises:
      MpqError: there is none.
    """
    if tokenizer is None:
        raise MpqError("the model folder has no tokenizer.json, so text cannot be read: put one beside config.json")
    if tokenizer.truncation is None and tokenizer.padding is None:
        return tokenizer
    copy = Tokenizer.from_str(tokenizer.to_str())  # the model's own stays as it is
    copy.no_truncation()
    copy.no_padding()
    return copy


def make_dataset(
    documents: Sequence[str],
    tokenizer: Tokenizer | None,
    *,
    bos: int | None,
    window: int,
    max_windows: int | None = None,
    windows_per_document: int | None = None,
    drop_tail: bool = False,
    source: str,
) -> Dataset:
    """Windows of `window` tokens.

    Args:
      documents: texts; with a single one, every window counts as a document of its own in standard errors.
      tokenizer: of the model.
      bos: id put first in every window, or None for models without one.
      window: tokens a window, BOS included.
      max_windows: keep the first so many.
      windows_per_document: keep at most so many of one document, evenly spread over it.
      drop_tail: leave out windows that would need padding.
      source: for a person.

    Raises:
      MpqError: no tokenizer, or the text has fewer tokens than one window takes.
    """
    plain = plain_tokenizer(tokenizer)
    if window < 2:
        raise MpqError(f"window {window} is too short: the least is 2 tokens")
    inputs, masks, owner, tokens = [], [], [], 0
    for first in range(0, len(documents), CHUNK):
        # What has its windows reads no further; one window's worth of tokens has to come together all the same.
        if max_windows is not None and len(inputs) >= max_windows and tokens >= window:
            break
        chunk = plain.encode_batch(list(documents[first : first + CHUNK]), add_special_tokens=False)
        for index, encoding in enumerate(chunk, first):
            for ids in _windows(encoding.ids, bos, window, windows_per_document):
                if drop_tail and len(ids) < window:
                    continue
                inputs.append(np.pad(ids, (0, window - len(ids))))
                masks.append(np.arange(window) < len(ids))
                owner.append(index)
                tokens += len(ids)
    if tokens < window:
        what = f"{source} is too short: it gives {tokens} tokens and one window takes {window}"
        raise MpqError(f"{what}; give more text or a smaller window")
    document = np.arange(len(owner)) if len(documents) == 1 else np.asarray(owner)
    keep = slice(max_windows)
    return new_dataset(np.stack(inputs)[keep].astype(np.int32), np.stack(masks)[keep], document[keep], source)


def split_documents(documents: Sequence[str], parts: tuple[float, ...] = (0.5, 0.2, 0.3)) -> list[list[str]]:
    """Contiguous parts of a text by share of its characters; a text of few documents is first cut at line ends.

    Raises:
      MpqError: there is not enough text for every part to get some.
    """
    pieces = list(documents)
    if len(pieces) < 8 * len(parts):
        lines = [line for d in pieces for line in d.splitlines(keepends=True)]
        ends = np.cumsum([len(line) for line in lines])
        count = 8 * len(parts)
        cuts = np.searchsorted(ends, ends[-1] * np.arange(1, count) / count)
        pieces = ["".join(part) for part in np.split(np.asarray(lines, object), np.unique(cuts))]
    position = np.cumsum([0, *(len(p) for p in pieces)])
    middle = (position[:-1] + position[1:]) / 2 / position[-1]
    which = np.searchsorted(np.cumsum(parts)[:-1], middle)
    result = [[p for p, w in zip(pieces, which, strict=True) if w == part and p.strip()] for part in range(len(parts))]
    if not all(result):
        raise MpqError(
            f"the text ({len(documents)} documents) is too short to split in {len(parts)} parts: give more of it"
        )
    return result


def _windows(ids: Sequence[int], bos: int | None, window: int, limit: int | None) -> list[np.ndarray]:
    stream = np.asarray(([] if bos is None else [bos]) + list(ids), np.int32)
    starts = [s for s in range(0, len(stream), window) if s == 0 or len(stream) - s >= MIN_TOKENS]
    if len(stream) < 2:
        return []
    if limit is not None and len(starts) > limit:
        starts = [starts[i] for i in np.linspace(0, len(starts) - 1, limit).round().astype(int)]
    result = []
    for start in starts:
        piece = stream[start : start + window].copy()
        if bos is not None:
            piece[0] = bos
        result.append(piece)
    return result
