"""Text to windows of tokens: calibration, selection and test sets that never overlap.

Windows, padding and masks are made here and nowhere else. A document's token ids, BOS in front, are cut into
consecutive windows; the first
token of every window is BOS, as it is when a model is used. A shorter last window is padded on the right and its
padding never counts.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from mpq.types import Dataset, MpqError

SEPARATOR = "<|endoftext|>"
MIN_TOKENS = 16  # a shorter rest of a document says little per window and is dropped


def read_documents(path: Path) -> list[str]:
    """Documents of a text file: separated by `<|endoftext|>`, or one `{"text": ...}` a line in `.jsonl`.

    Raises:
      MpqError: no such file, not UTF-8, not JSON lines, or empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MpqError(f"text {str(path)!r} cannot be read as UTF-8 ({error}): give a text or .jsonl file") from error
    if path.suffix == ".jsonl":
        try:
            documents = [str(json.loads(line)["text"]) for line in text.splitlines() if line.strip()]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise MpqError(f"text {str(path)!r} needs one object with a 'text' a line ({error!r})") from error
    else:
        documents = text.split(SEPARATOR)
    documents = [d.strip() for d in documents if d.strip()]
    if not documents:
        raise MpqError(f"text {str(path)!r} is empty: give at least one document")
    return documents


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
    if tokenizer is None:
        raise MpqError("the model folder has no tokenizer.json, so text cannot be read: put one beside config.json")
    if window < 2:
        raise MpqError(f"window {window} is too short: the least is 2 tokens")
    inputs, masks, owner = [], [], []
    for index, encoding in enumerate(tokenizer.encode_batch(list(documents), add_special_tokens=False)):
        for ids in _windows(encoding.ids, bos, window, windows_per_document):
            if drop_tail and len(ids) < window:
                continue
            inputs.append(np.pad(ids, (0, window - len(ids))))
            masks.append(np.arange(window) < len(ids))
            owner.append(index)
    tokens = sum(int(mask.sum()) for mask in masks)
    if tokens < window:
        what = f"{source} is too short: it gives {tokens} tokens and one window takes {window}"
        raise MpqError(f"{what}; give more text or a smaller window")
    document = np.arange(len(owner)) if len(documents) == 1 else np.asarray(owner)
    return _dataset(np.stack(inputs), np.stack(masks), document, source, max_windows)


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


def require_disjoint(**datasets: Dataset) -> None:
    """No window may be in two of the sets.

    Raises:
      MpqError: names the two sets and how many windows they share.
    """
    rows = {name: {row.tobytes() for row in d.inputs} for name, d in datasets.items()}
    names = list(rows)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            if shared := len(rows[a] & rows[b]):
                raise MpqError(f"the {a} and {b} sets share {shared} windows: give texts that do not overlap")


def take(data: Dataset, windows: int) -> Dataset:
    """`windows` of the windows, from as many documents as there are: a first one of each, then a second, and so on."""
    if windows >= len(data.inputs):
        return data
    order = np.argsort(data.document, kind="stable")
    _, start, count = np.unique(data.document[order], return_index=True, return_counts=True)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - np.repeat(start, count)
    keep = np.sort(np.argsort(rank, kind="stable")[:windows])
    return _dataset(data.inputs[keep], data.mask[keep], data.document[keep], data.source, None)


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


def _dataset(
    inputs: np.ndarray, mask: np.ndarray, document: np.ndarray, source: str, max_windows: int | None
) -> Dataset:
    inputs, mask = inputs[:max_windows].astype(np.int32), mask[:max_windows]
    document = document[:max_windows].astype(np.int32)
    digest = hashlib.sha256()
    for array in (inputs, mask, document):
        digest.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return Dataset(inputs, mask, document, source, digest.hexdigest())
