"""The model card of the reference model: a page of Markdown from the training record, computing nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

HISTORY_ROWS = 12


def card(record: Mapping[str, Any]) -> str:
    """The whole `README.md`.

    Args:
      record: what `training.json` holds: `model`, `training`, `command`, `corpus`, `held_out`, `history`, `samples` and
        `documents`.
    """
    model = record["model"]
    sections = [
        f"# Reference language model ({model['parameters'] / 1e6:.2f}M parameters)",
        "A Llama-architecture language model of Python source, trained on the standard library of CPython. It is the "
        "default of `mpq`: small enough to ship, trained far enough to react to quantization as large models do. It "
        "writes plausible Python; it is not meant to be useful for that.",
        "```\n" + record["command"] + "\n```",
        "## Quality",
        _held_out(record),
        "## Architecture",
        _architecture(model),
        "## Data",
        _data(record),
        "## Training",
        _training(record["training"], sorted({row["device"] for row in record["history"]})),
        _history(record["history"]),
        "## Samples",
        "Greedy continuations of the first line (or lines), computed in float32 from the stored weights.",
        *(f"```python\n{text.rstrip()}\n```" for text in record["samples"].values()),
        "## Licences",
        "The weights and this card: Apache-2.0, as the project. The files under `text/` are copies of parts of "
        "CPython, copyright Python Software Foundation, under the licence in `text/LICENSE.txt`.",
    ]
    return "\n\n".join(sections) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def thinned(history: Sequence[Mapping[str, Any]], rows: int) -> list[Mapping[str, Any]]:
    """At most `rows` rows, evenly spread, the last always among them."""
    if len(history) <= rows:
        return list(history)
    return [history[round((i + 1) * len(history) / rows) - 1] for i in range(rows)]


def _held_out(record: Mapping[str, Any]) -> str:
    rows = [
        (
            name,
            f"{row['tokens']:,}",
            f"{row['bytes']:,}",
            f"{row['nats_per_token']:.4f}",
            f"{row['bits_per_byte']:.4f}",
        )
        for name, row in record["held_out"].items()
    ]
    protocol = (
        f"Text that the model was not trained on. Whole files, each cut into windows of {record['training']['window']} "
        "tokens that begin with BOS; every token is predicted once, in float32 from the stored weights."
    )
    return protocol + "\n\n" + table(("text", "tokens", "bytes", "nats per token", "bits per byte"), rows)


def _architecture(model: Mapping[str, Any]) -> str:
    rows = [
        ("layers", model["num_hidden_layers"]),
        ("hidden / feed-forward", f"{model['hidden_size']} / {model['intermediate_size']}"),
        (
            "heads / key-value heads / head size",
            f"{model['num_attention_heads']} / {model['num_key_value_heads']} / {model['head_dim']}",
        ),
        ("vocabulary", model["vocab_size"]),
        ("context", model["max_position_embeddings"]),
        ("embedding and head", "tied" if model["tie_word_embeddings"] else "separate"),
        ("RMSNorm epsilon / RoPE base", f"{model['rms_norm_eps']:g} / {model['rope_theta']:g}"),
        ("parameters", f"{model['parameters']:,}"),
        ("stored as", "bfloat16"),
    ]
    return table(("", "value"), rows)


def _data(record: Mapping[str, Any]) -> str:
    corpus = record["corpus"]
    rows = [
        (name, f"{split['documents']:,}", f"{split['bytes']:,}", f"{split['tokens']:,}")
        for name, split in corpus["splits"].items()
    ]
    what = (
        f"The `.py` files of the standard library of CPython {corpus['python']}, as `experiments/stdlib_corpus.py` "
        "reads them. A file is a document; the hash of its path decides its split, one in twenty is held out. The "
        "vocabulary is a byte-level BPE of the training split; BOS is put in front of every document.\n\n"
        f"sha256 of the corpus: `{corpus['digest']}`"
    )
    texts = ", ".join(f"`text/{name}.txt` ({len(paths)})" for name, paths in record["documents"].items())
    shipped = (
        "Part of each split ships with the model, whole files separated by `<|endoftext|>` on a line of its own: "
        f"{texts}. The calibration text is from the training split. `training.json` lists the files."
    )
    return "\n\n".join([what, table(("split", "documents", "bytes", "tokens"), rows), shipped])


def _training(training: Mapping[str, Any], devices: Sequence[str]) -> str:
    return (
        "Muon for the matrices of the blocks, Adam for embedding and norms; linear warmup, constant, linear decay to "
        "zero, again after each restart (`experiments/train_reference.py`). "
        f"{training['tokens_seen']:,} tokens seen, on {', then '.join(devices)}.\n\n"
        + table(("hyperparameter", "value"), [(name, value) for name, value in training.items()])
    )


def _history(history: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (int(row["step"]), f"{row['train_loss']:.4f}", f"{row['held_out_nll']:.4f}")
        for row in thinned(history, HISTORY_ROWS)
    ]
    return (
        "Loss in nats per token: of the batch at that step, and on windows of the selection split, in the type it was "
        "trained in.\n\n" + table(("step", "batch", "held out"), rows)
    )
