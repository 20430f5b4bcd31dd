"""A `tokenizer.json` as the metadata of a GGUF file.

Two kinds of tokenizer have a counterpart in llama.cpp that gives the same tokens:

- byte-level BPE (`gpt2`), where the way text is cut before merging has a name there (`mpq.gguf.pre_tokenizers`);
- BPE with byte fallback on text whose spaces are U+2581 (`llama`, SentencePiece style). llama.cpp has no list of merges
  for it but joins the two neighbours whose token has the best score; a token's score is minus the rank of the merge
  that makes it. Both give the same tokens as long as whatever two tokens join to a third is a merge, and the merges
  that make one token follow one another; else the tokenizer is refused.

Anything else is refused: a tokenizer that is nearly right is wrong.
"""

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from mpq.gguf.container import Value
from mpq.gguf.pre_tokenizers import PRE_TOKENIZERS, name_of
from mpq.types import MpqError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
SPACE = "\u2581"
_SPM_NORMALIZERS = [
    {"type": "Prepend", "prepend": SPACE},
    {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
]


def tokenizer_metadata(tokenizer_json: str, vocab_size: int, eos: int | None) -> dict[str, Value]:
    """Keys and values.

    Args:
      tokenizer_json: text of the file.
      vocab_size: rows of the embedding; what the tokenizer does not fill is marked as unused.
      eos: the id that ends a text, of the model's config.

    Raises:
      MpqError: llama.cpp has no such tokenizer, or it has more tokens than the model.
    """
    body = json.loads(tokenizer_json)
    model = body.get("model", {})
    if model.get("type") != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _refused(f"its model is {model.get('type')!r}")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    added = {entry["id"]: entry for entry in body.get("added_tokens", [])}
    tokens = {i: token for token, i in model["vocab"].items()} | {i: e["content"] for i, e in added.items()}
    if max(tokens) >= vocab_size:
        raise MpqError(f"the tokenizer has token {max(tokens)}, and the model {vocab_size} rows: give its own one")
    if model.get("byte_fallback"):
        specific = _sentencepiece(body, merges)
        scores = {token.replace(" ", ""): -float(rank) for rank, token in enumerate(merges)}
        lowest = -float(len(merges))
        specific["tokenizer.ggml.scores"] = [scores.get(tokens.get(i, ""), lowest) for i in range(vocab_size)]
    else:
        specific = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _pre(body), "tokenizer.ggml.merges": merges}
    first = Tokenizer.from_str(tokenizer_json).encode("").ids
    ids: dict[str, Value] = {} if eos is None else {"tokenizer.ggml.eos_token_id": eos}
    if first:
        ids["tokenizer.ggml.bos_token_id"] = first[0]
    if len(first) > 1:
        raise _refused(f"it puts {len(first)} tokens around a text")
    return {
        **specific,
        "tokenizer.ggml.tokens": [tokens.get(i, f"[PAD{i}]") for i in range(vocab_size)],
        "tokenizer.ggml.token_type": [_kind(i, tokens, added, model) for i in range(vocab_size)],
        **ids,
        "tokenizer.ggml.add_bos_token": bool(first),
        "tokenizer.ggml.add_eos_token": False,
    }


def _kind(i: int, tokens: Mapping[int, str], added: Mapping[int, Mapping[str, Any]], model: Mapping[str, Any]) -> int:
    if i not in tokens:
        return UNUSED
    if model.get("unk_token") == tokens[i]:
        return UNKNOWN
    if i in added:
        return CONTROL if added[i]["special"] else USER_DEFINED
    return BYTE if model.get("byte_fallback") and tokens[i] in _BYTES else NORMAL


def _pre(body: Mapping[str, Any]) -> str:
    """llama.cpp's name of the way that text is cut before merging."""
    name = name_of(body)
    if name is None:
        pre = json.dumps(body.get("pre_tokenizer") or {})
        raise _refused(f"it cuts text by {pre[:120]}, normalized by {body.get('normalizer')}")
    return name


def sentencepiece_normalizer(prefix: bool) -> dict[str, Any]:
    """How text becomes pieces in the SentencePiece style, with a space put in front or not."""
    return {"type": "Sequence", "normalizers": _SPM_NORMALIZERS} if prefix else _SPM_NORMALIZERS[1]


def _sentencepiece(body: Mapping[str, Any], merges: list[str]) -> dict[str, Value]:
    normalizer = body.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    idle = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    if body.get("pre_tokenizer") not in (None, idle) or steps not in (_SPM_NORMALIZERS, _SPM_NORMALIZERS[1:]):
        raise _refused(f"it has byte fallback, and text is normalized by {json.dumps(normalizer)[:120]}")
    special = {entry["content"] for entry in body.get("added_tokens", [])}
    vocab, pairs = body["model"]["vocab"], set(merges)
    for token in vocab.keys() - special - _BYTES:
        cuts = range(1, len(token))
        ways = [f"{token[:i]} {token[i:]}" for i in cuts if token[:i] in vocab and token[i:] in vocab]
        if unlisted := [way for way in ways if way not in pairs]:
            raise _refused(f"the tokens {unlisted[0]!r} make a third, and no merge says so")
    made = [merge.replace(" ", "") for merge in merges]
    runs = [token for i, token in enumerate(made) if i == 0 or made[i - 1] != token]
    if len(runs) > len(set(runs)):
        raise _refused("merges of other tokens lie between two that make the same one")
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": steps == _SPM_NORMALIZERS,
    }


def _refused(why: str) -> MpqError:
    return MpqError(
        f"llama.cpp has no tokenizer that gives the same tokens: {why}; known are byte-level BPE cut as by "
        f"{', '.join(PRE_TOKENIZERS)}, and BPE with byte fallback and spaces as U+2581"
    )
