"""Ways in which byte-level BPE cuts text before merging: what llama.cpp calls them, and as a `tokenizer.json`.

Names and expressions are those of llama.cpp's `llama-vocab.cpp` (v0.5.0) and of the models' own `tokenizer.json`.
Qwen's normalizes text to NFC, which llama.cpp does not: text that is not in NFC already gives other tokens there.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """One way.

    Attributes:
      pre_tokenizer, normalizer: of a `tokenizer.json`.
      ignore_merges: a piece of text that is a token is not merged together.
    """

    pre_tokenizer: Mapping[str, Any]
    normalizer: Mapping[str, Any] | None = None
    ignore_merges: bool = False


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(expression: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(False)]}


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DIGITS = {"type": "Digits", "individual_digits": True}

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = MappingProxyType(
    {
        "gpt-2": PreTokenizer(_byte_level(True)),
        "llama-bpe": PreTokenizer(_split(_CONTRACTIONS + r"\p{N}{1,3}" + _REST), ignore_merges=True),
        "qwen2": PreTokenizer(_split(_CONTRACTIONS + r"\p{N}" + _REST), {"type": "NFC"}),
        "smollm": PreTokenizer({"type": "Sequence", "pretokenizers": [_DIGITS, _byte_level(True)]}),
    }
)
"""Name in llama.cpp -> what it does."""

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "llama3": "llama-bpe",
        "llama-v3": "llama-bpe",
        "deepseek-r1-qwen": "qwen2",
    }
)
"""Further names that llama.cpp takes for the same."""


def name_of(body: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of the way in which a `tokenizer.json` cuts text, or None where it has none."""
    cut = _plain(body.get("pre_tokenizer"))
    ignores = bool(body["model"].get("ignore_merges"))
    for name, way in PRE_TOKENIZERS.items():
        if (_plain(way.pre_tokenizer), way.ignore_merges) == (cut, ignores):
            normalizer = body.get("normalizer")
            return name if normalizer in (None, way.normalizer) else None
    return None


def _plain(node: Any) -> Any:
    """A part of a `tokenizer.json` without what changes no token, and with defaults written out."""
    if not isinstance(node, Mapping):
        return node
    defaults: dict[str, Any] = {"use_regex": True, "add_prefix_space": True}
    parts = (defaults if node.get("type") == "ByteLevel" else {}) | {
        key: value for key, value in node.items() if key != "trim_offsets"
    }
    return parts | {key: [_plain(part) for part in value] for key, value in parts.items() if key == "pretokenizers"}
