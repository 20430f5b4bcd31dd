"""From the name of a source to the data sets of a model: what kind of source suits which model, and who reads it.

| model reads | task | sources |
|---|---|---|
| text | causal_lm | text file, `.jsonl`, `reference`, `datasets:` |
| text | embedding | `.tsv` or `.jsonl` of sentence pairs, `datasets:` |
| text | any other | `.jsonl`, `.npz` of token ids, `datasets:` |
| images | any | `.npz`, a folder of images, `datasets:` |
| anything else | any | `.npz` |

A language model's text is cut into windows in the order in which it comes, and the three sets are contiguous shares of
it. All other sources hold examples, which are taken in a fixed pseudo-random order.
"""

from collections.abc import Mapping
from pathlib import Path

from mpq.data import hub
from mpq.data.arrays import read_arrays
from mpq.data.dataset import require_disjoint
from mpq.data.images import parse_fit, read_folder
from mpq.data.part import SHARES, Parts, one_set, three_sets
from mpq.data.sentences import Reader, read_sentences
from mpq.data.text import make_dataset, read_documents, split_documents
from mpq.inputs import Dataset, Images, Tokens
from mpq.models.hub import resolve
from mpq.models.model import Model
from mpq.types import MpqError

REFERENCE = "reference"
DEFAULT_WINDOW = 256
EITHER = "or datasets:OWNER/NAME"


def read_sets(
    model: Model, source: str, *, window: int | None, limits: Mapping[str, int], windows_per_document: int | None
) -> dict[str, Dataset]:
    """The sets `calibration`, `selection` and `test` of one source; no row is in two of them.

    A source that states its parts gives the test set from `test` and the other two from `train`; another is divided in
    shares of 0.5, 0.2 and 0.3.

    Args:
      model: what they are for.
      source: a file, a folder, `reference` or `datasets:OWNER/NAME[@REVISION][:SPLIT]`.
      window: tokens a row of text; None: `DEFAULT_WINDOW`, or the model's context if that is shorter.
      limits: by set, the most rows. A pair of sentences takes two.
      windows_per_document: of text for a language model, the most windows from one document.

    Raises:
      MpqError: the source is missing, unreadable, empty or too small, does not suit the model, or has the same rows in
        two sets; the window is longer than the context.
    """
    _require_limits(limits)
    window = _window(model, window)
    if model.task.name != "causal_lm":
        sets = three_sets(_parts(model, source, window), source, limits)
    else:
        sets = {
            which: _windows(model, documents, f"{source} ({which})", window, limits[which], windows_per_document)
            for which, documents in _three_texts(model, source, limits).items()
        }
    require_disjoint(**sets)
    return sets


def read_set(
    model: Model,
    source: str,
    which: str,
    *,
    window: int | None,
    limit: int,
    windows_per_document: int | None = None,
) -> Dataset:
    """One whole source as one set.

    Args:
      model: what it is for.
      source: as of `read_sets`.
      which: `calibration`, `selection` or `test`: the part to read where the source states parts.
      window: tokens a row of text; None: `DEFAULT_WINDOW`, or the model's context if that is shorter.
      limit: the most rows.
      windows_per_document: of text for a language model, the most windows from one document.

    Raises:
      MpqError: the source is missing, unreadable or empty, or does not suit the model; the window is longer than the
        context.
    """
    _require_limits({which: limit})
    window = _window(model, window)
    if model.task.name != "causal_lm":
        return one_set(_parts(model, source, window), source, which, limit)
    if source == REFERENCE:
        documents = _reference_text(which)
    elif source.startswith(hub.PREFIX):
        splits = hub.load_splits(source)
        split = splits["all" if "all" in splits else "test" if which == "test" else "train"]
        documents = hub.read_column(split, source, (0.0, 1.0), limit)
    else:
        documents = read_documents(_file(model, source))
    return _windows(model, documents, source, window, limit, windows_per_document)


def _three_texts(model: Model, source: str, limits: Mapping[str, int]) -> dict[str, list[str]]:
    """Documents for the windows of each set."""
    if source == REFERENCE:
        return {which: _reference_text(which) for which in SHARES}
    if not source.startswith(hub.PREFIX):
        documents = read_documents(_file(model, source))
        return dict(zip(SHARES, split_documents(documents, tuple(SHARES.values())), strict=True))
    splits = hub.load_splits(source)
    # Every document gives a window at least, so that no set needs more of them than windows.
    if "all" in splits:
        of = {"calibration": ("all", 0.0, 0.5), "selection": ("all", 0.5, 0.7), "test": ("all", 0.7, 1.0)}
    else:
        of = {"calibration": ("train", 0.0, 5 / 7), "selection": ("train", 5 / 7, 1.0), "test": ("test", 0.0, 1.0)}
    return {
        which: hub.read_column(splits[key], source, (start, stop), limits[which])
        for which, (key, start, stop) in of.items()
    }


def _windows(
    model: Model, documents: list[str], source: str, window: int | None, limit: int, windows_per_document: int | None
) -> Dataset:
    assert isinstance(model.inputs, Tokens)  # a language model reads text
    assert window is not None
    return make_dataset(
        documents,
        model.tokenizer,
        bos=model.inputs.bos,
        window=window,
        max_windows=limit,
        windows_per_document=windows_per_document,
        source=source,
    )


def _reference_text(which: str) -> list[str]:
    return read_documents(resolve(REFERENCE) / "text" / f"{which}.txt")


def _parts(model: Model, source: str, window: int | None) -> Parts:
    """The examples of a source, by the parts that it states, for every task but causal_lm."""
    reader = None
    if isinstance(model.inputs, Tokens):
        assert window is not None
        reader = Reader(model.tokenizer, model.inputs, window)
    if source.startswith(hub.PREFIX) and isinstance(model.inputs, Tokens | Images):
        splits = hub.load_splits(source)
        return {key: hub.split_part(split, source, model, reader) for key, split in splits.items()}
    path = _file(model, source)
    if path.is_dir():
        assert isinstance(model.inputs, Images)
        fit = parse_fit(model.config.get("preprocessor"))
        return {"all": read_folder(path, model.inputs, fit, model.task.name)}
    if path.suffix == ".npz":
        return read_arrays(path, model, window)
    assert reader is not None
    return {"all": read_sentences(path, model.task.name, reader)}


def _file(model: Model, source: str) -> Path:
    """The file or folder of a source, of a kind that suits the model.

    Raises:
      MpqError: there is none, or it is of another kind.
    """
    task, path = model.task.name, Path(source)
    if not isinstance(model.inputs, Tokens | Images):
        suffixes, wanted = {".npz"}, "an array file .npz with inputs and targets"
    elif isinstance(model.inputs, Images):
        suffixes, wanted = {".npz"}, f"an array file .npz, a folder of images, {EITHER}"
    elif task == "causal_lm":
        suffixes, wanted = None, f"a text file, .jsonl with a 'text' a line, 'reference', {EITHER}"
    elif task == "embedding":
        suffixes, wanted = {".tsv", ".jsonl"}, f".tsv (the columns of STS-B) or .jsonl of sentence pairs, {EITHER}"
    else:
        suffixes, wanted = {".jsonl", ".npz"}, f".jsonl with 'text' and 'label' a line, {EITHER}"
    what = f"the {task} model {model.name!r} reads {wanted}"
    if source == REFERENCE or source.startswith(hub.PREFIX):
        raise MpqError(f"data {source!r} does not suit: {what}")
    if not path.exists():
        raise MpqError(f"data {source!r} is no file or folder here: {what}")
    suits = isinstance(model.inputs, Images) if path.is_dir() else suffixes is None or path.suffix in suffixes
    if not suits or (suffixes is None and path.suffix in (".npz", ".tsv")):
        raise MpqError(f"data {source!r} does not suit: {what}")
    return path


def _window(model: Model, window: int | None) -> int | None:
    """Tokens a row; None for what has none.

    Raises:
      MpqError: more than the context.
    """
    if not isinstance(model.inputs, Tokens):
        return None
    context = model.inputs.context
    if window is not None and window > context:
        raise MpqError(f"window {window} is longer than the model's context of {context}: use at most that")
    return min(DEFAULT_WINDOW, context) if window is None else window


def _require_limits(limits: Mapping[str, int]) -> None:
    for which, limit in limits.items():
        if limit < 1:
            raise MpqError(f"the {which} set is limited to {limit} rows: it needs at least 1")
