"""Texts to rows of tokens, for encoders: one text or one pair of sentences an example, truncated and padded.

Each text becomes one row, with the special tokens that the tokenizer itself adds (`[CLS] ... [SEP]`), cut to the window
in front of the last of them. The two rows of a pair follow each other.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mpq.data.labels import parse_labels
from mpq.data.part import Part, Rows
from mpq.data.text import json_lines, plain_tokenizer, read_text
from mpq.inputs import Tokens
from mpq.types import MpqError

Line = tuple[int, tuple[str, ...], Any]
"""Number of a line, its texts, and its label or score or None."""

STSB = {"score": 4, "sentence1": 5, "sentence2": 6}
"""Columns of a line of STS-B (Cer et al. 2017, arXiv:1708.00055): genre, file, year, id, score 0 to 5, two texts."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """How texts become rows.

    Attributes:
      tokenizer: of the model, or None, which is refused when a text is read.
      inputs: of the model.
      window: tokens a row.
    """

    tokenizer: Tokenizer | None
    inputs: Tokens
    window: int

    def __call__(self, texts: Sequence[str], where: Callable[[int], str]) -> tuple[np.ndarray, np.ndarray]:
        """Rows of `texts`.

        Args:
          texts: one a row.
          where: `i` to what a person calls the place of `texts[i]`.

        Returns:
          `(inputs int32[N, window], mask bool[N, window])`.

        Raises:
          MpqError: no tokenizer, a window that special tokens fill, or a text that has no token.
        """
        # A copy, since truncation is a state of the tokenizer that others share.
        tokenizer = Tokenizer.from_str(plain_tokenizer(self.tokenizer).to_str())
        special = tokenizer.num_special_tokens_to_add(is_pair=False)
        if self.window <= special:
            raise MpqError(f"window {self.window} is too short: {special} tokens of each text are special ones")
        tokenizer.enable_truncation(self.window)
        if missing := [i for i, text in enumerate(texts) if not isinstance(text, str)]:
            raise MpqError(f"{where(missing[0])} has no text but {texts[missing[0]]!r}: leave it out")
        inputs = np.full((len(texts), self.window), self.inputs.pad, np.int32)
        lengths = np.zeros(len(texts), int)
        for i, encoding in enumerate(tokenizer.encode_batch(list(texts))):
            lengths[i] = len(encoding.ids)
            if lengths[i] <= special:
                raise MpqError(f"{where(i)} has an empty text: leave it out")
            inputs[i, : lengths[i]] = encoding.ids
        return inputs, np.arange(self.window) < lengths[:, None]


def sentence_rows(
    reader: Reader, examples: Sequence[Sequence[str]], labels: np.ndarray | None, where: Callable[[int], str]
) -> Rows:
    """Rows of examples of one or two texts each; a label stands on every row of its example."""
    per_example = len(examples[0]) if examples else 1
    inputs, mask = reader([text for example in examples for text in example], lambda i: where(i // per_example))
    return Rows(inputs, mask, None if labels is None else np.repeat(labels, per_example, axis=0))


def read_sentences(path: Path, task: str, reader: Reader) -> Part:
    """Examples of a `.tsv` or `.jsonl` file.

    An embedding model reads pairs, `{"sentence1": ..., "sentence2": ..., "score": ...}` or lines of STS-B, or single
    texts; other tasks read `{"text": ..., "label": ...}`. Scores and labels may be absent from all lines.

    Raises:
      MpqError: the file cannot be read, is empty, or a line is not as it should be; names the line.
    """
    numbers, examples, values = [], [], []
    for number, texts, value in _tsv(path) if path.suffix == ".tsv" else _jsonl(path, task):
        if examples and len(texts) != len(examples[0]):
            raise MpqError(f"line {number} of {path} has {len(texts)} texts, and those before {len(examples[0])}")
        numbers.append(number)
        examples.append(texts)
        values.append(value)
    if not examples:
        raise MpqError(f"{path} is empty: give at least one line")
    where = lambda i: f"line {numbers[i]} of {path}"
    labels = parse_labels(values, task, where)

    def read(chosen: np.ndarray) -> Rows:
        of_chosen = None if labels is None else labels[chosen]
        return sentence_rows(reader, [examples[i] for i in chosen], of_chosen, lambda i: where(int(chosen[i])))

    return Part(len(examples), read, len(examples[0]))


def _jsonl(path: Path, task: str) -> Iterator[Line]:
    pairs = task == "embedding"
    needed = "'sentence1', 'sentence2' and 'score' (or 'text')" if pairs else "'text' and 'label'"
    for number, value in json_lines(path, needed):
        keys = ("sentence1", "sentence2") if pairs and ("sentence1" in value or "text" not in value) else ("text",)
        texts = tuple(value[key] for key in keys if isinstance(value.get(key), str))
        if len(texts) != len(keys):
            raise MpqError(f"text {str(path)!r} needs one object with {needed} a line: line {number} has {list(value)}")
        yield number, texts, value.get("score" if pairs else "label") if len(keys) == 2 or not pairs else None


def _tsv(path: Path) -> Iterator[Line]:
    """Two sentences and their score a line. Quotes are text: the files have them unbalanced."""
    columns, first = STSB, 1
    lines = read_text(path).split("\n")
    header = lines[0].split("\t")
    if {"sentence1", "sentence2", "score"} <= set(header):
        columns, first = {name: header.index(name) for name in STSB}, 2
    for number, line in enumerate(lines[first - 1 :], first):
        if not line.strip():
            continue
        fields = line.split("\t")
        try:
            yield number, (fields[columns["sentence1"]], fields[columns["sentence2"]]), float(fields[columns["score"]])
        except (IndexError, ValueError) as error:
            raise MpqError(
                f"line {number} of {path} has no score and two sentences: give the columns of STS-B (genre, file, "
                "year, id, score, sentence 1, sentence 2), or a first line that names sentence1, sentence2 and score"
            ) from error
