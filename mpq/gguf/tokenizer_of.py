"""A `tokenizer.json` from the metadata of a GGUF file: the inverse of `mpq.gguf.tokenizer`.

Byte-level BPE has its merges in the file. For the SentencePiece style llama.cpp joins the two neighbours whose token
has the best score, so the merges are all pairs of tokens that make a third, ordered by its score.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mpq.gguf.pre_tokenizers import ALIASES, PRE_TOKENIZERS
from mpq.gguf.tokenizer import CONTROL, SPACE, UNKNOWN, UNUSED, USER_DEFINED, sentencepiece_normalizer
from mpq.types import MpqError

_KEY = "tokenizer.ggml."


def special_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """`bos_token_id` and `eos_token_id`, as far as the file has them."""
    names = ("bos_token_id", "eos_token_id")
    return {name: int(metadata[_KEY + name]) for name in names if _KEY + name in metadata}


def chat_template(metadata: Mapping[str, Any]) -> str | None:
    """The template of a chat, or None."""
    found = metadata.get("tokenizer.chat_template")
    return None if found is None else str(found)


def tokenizer_of(metadata: Mapping[str, Any]) -> str | None:
    """The text of a `tokenizer.json`; None where the file has no tokenizer.

    Raises:
      MpqError: the kind of tokenizer, or the way that it cuts text, is not known; or its parts do not fit together.
    """
    kind = metadata.get(_KEY + "model")
    if kind in (None, "none"):
        return None
    if kind not in ("gpt2", "llama"):
        raise MpqError(f"the file's tokenizer is of kind {kind!r}: read are gpt2, byte-level BPE, and llama")
    tokens, kinds = metadata.get(_KEY + "tokens"), metadata.get(_KEY + "token_type")
    if not tokens:
        raise MpqError(f"the file lacks the key '{_KEY}tokens', without which its tokenizer is unknown")
    kinds = kinds or [1] * len(tokens)
    if len(kinds) != len(tokens):
        raise MpqError(f"the file has {len(tokens)} tokens and {len(kinds)} types of tokens: it is damaged")
    added = [
        _added(i, token, kind) for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if _is_added(kind)
    ]
    vocab = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != UNUSED}
    body = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    make = _byte_level if kind == "gpt2" else _sentencepiece
    body |= make(metadata, tokens, kinds, vocab)
    return json.dumps(body | {"post_processor": _template(metadata, tokens, kind)}, ensure_ascii=False)


def _is_added(kind: int) -> bool:
    return kind in (CONTROL, USER_DEFINED, UNKNOWN)


def _added(i: int, token: str, kind: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": token, **flags, "special": kind != USER_DEFINED}


def _byte_level(
    metadata: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int], vocab: Mapping[str, int]
) -> dict[str, Any]:
    name = str(metadata.get(_KEY + "pre", "default"))
    name = ALIASES.get(name, name)
    if name not in PRE_TOKENIZERS:
        known = ", ".join((*PRE_TOKENIZERS, *ALIASES))
        raise MpqError(f"the file's tokenizer cuts text as {name!r} does, which is unknown here: known are {known}")
    pre = PRE_TOKENIZERS[name]
    merges = [_pair(merge, vocab) for merge in metadata.get(_KEY + "merges", ())]
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": pre.ignore_merges}
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {"normalizer": pre.normalizer, "pre_tokenizer": pre.pre_tokenizer, "model": model, "decoder": decoder}


def _pair(merge: str, vocab: Mapping[str, int]) -> list[str]:
    left, _, right = merge.partition(" ")
    if left not in vocab or right not in vocab or left + right not in vocab:
        raise MpqError(f"the file's tokenizer merges {merge!r}, which are not all tokens: it is damaged")
    return [left, right]


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int], vocab: Mapping[str, int]
) -> dict[str, Any]:
    scores = metadata.get(_KEY + "scores")
    if scores is None or len(scores) != len(tokens):
        raise MpqError(f"the file lacks the key '{_KEY}scores', one for every token: its tokenizer is unknown")
    plain = {token: i for token, i in vocab.items() if kinds[i] == 1}
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, i in plain.items():
        cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        ways = [(a, b) for a, b in cuts if a in plain and b in plain]
        ranked += [(-scores[i], plain[a], plain[b], a, b) for a, b in ways]
    ranked.sort()
    unknown = next((tokens[i] for i, kind in enumerate(kinds) if kind == UNKNOWN), None)
    model = {
        "type": "BPE",
        "unk_token": unknown,
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": vocab,
        "merges": [[a, b] for *_, a, b in ranked],
    }
    normalizer = sentencepiece_normalizer(bool(metadata.get(_KEY + "add_space_prefix", True)))
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    decoder = {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]}
    return {"normalizer": normalizer, "pre_tokenizer": None, "model": model, "decoder": decoder}


def _template(metadata: Mapping[str, Any], tokens: Sequence[str], kind: str) -> dict[str, Any] | None:
    """What is put around a text: BOS and EOS as the file asks for them, and else as llama.cpp does by itself."""
    pre = str(metadata.get(_KEY + "pre", ""))
    by_itself = kind == "llama" or ALIASES.get(pre, pre) == "llama-bpe"
    asked = {
        "bos": bool(metadata.get(_KEY + "add_bos_token", by_itself)),
        "eos": bool(metadata.get(_KEY + "add_eos_token", False)),
    }
    ids = {end: int(metadata.get(f"{_KEY}{end}_token_id", -1)) for end in asked if asked[end]}
    if wrong := [end for end, i in ids.items() if not 0 <= i < len(tokens)]:
        raise MpqError(f"the file's tokenizer adds {wrong[0].upper()} and names none of its tokens: it is damaged")
    if not ids:
        return None
    special = {tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in ids.values()}
    piece = lambda i: {"SpecialToken": {"id": tokens[i], "type_id": 0}}
    text = lambda name: {"Sequence": {"id": name, "type_id": 0}}
    around = lambda middle: (
        [*([piece(ids["bos"])] if "bos" in ids else []), *middle] + ([piece(ids["eos"])] if "eos" in ids else [])
    )
    template = {"single": around([text("A")]), "pair": around([text("A"), text("B")]), "special_tokens": special}
    return {"type": "TemplateProcessing", **template}
