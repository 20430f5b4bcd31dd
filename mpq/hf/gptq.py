"""Checkpoints of GPTQ: AutoGPTQ, GPTQModel, and what vLLM and `transformers` read of them.

Facts from GPTQModel 7.7 (`nn_modules/qlinear`): `qweight` is `int32[words of k, n]`, words along the first axis;
`qzeros` `int32[groups, words of n]`; `scales` `float16[groups, n]`; `g_idx` `int32[k]`, the group of every row. All
modules have one width and one group size. With `desc_act` ("act-order") rows are rounded in the order of their
activations and grouped in it, so that those of a group lie anywhere; such checkpoints are read and not written.
Version 1 ("gptq") stores a zero point less one. Of a zero point that is the least code GPTQModel then borrows from the
next in the word, and gives that back as it reads (`utils/model.py`), which is how it is read here; for 3 bits, where
codes lie across words, and in other readers the least code comes out as the largest. As they disagree, it is not
written. Version 2 ("gptq_v2") stores zero points as they are.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpq.export.rules import fold
from mpq.formats.integer import Integer
from mpq.hf.container import NOTHING, Part, Parts, Read, Reader, Shape, Site, signed, uniform, unsigned
from mpq.hf.words import pack_rows, unpack_rows, words_of
from mpq.types import MpqError, QTensor, Scheme

WIDTHS = (2, 3, 4, 8)


@dataclasses.dataclass(frozen=True)
class GPTQFormat:
    """One width and group size for all linear layers but the head.

    Attributes:
      version: 1 or 2, of how zero points are stored.
    """

    version: int = 1
    scale_dtype: str | None = None
    beside = NOTHING

    @property
    def name(self) -> str:
        """`checkpoint_format` of the config."""
        return "gptq" if self.version == 1 else "gptq_v2"

    def refusal(self, site: Site, scheme: Scheme) -> str | None:
        """Why not."""
        if site.head or site.kind != "matmul":
            return "embeddings and heads stay plain floats there"
        bits = scheme.format.bits
        if not isinstance(scheme.format, Integer) or scheme.blocks is not None or bits not in WIDTHS:
            return "it takes int2, int3, int4 and int8"
        if scheme.scale_dtype != "float16" or scheme.per_tensor:
            return "its scales are float16, of groups or channels"
        if scheme.group_size and site.k % scheme.group_size:
            return f"it takes whole groups only, and the weight has {site.k} rows"
        if site.k * bits % 32 or site.n * bits % 32:
            return f"rows and columns must fill 32-bit words, and the weight is {site.k} x {site.n}"
        return None

    def parts(self, scheme: Scheme, k: int, n: int) -> dict[str, Part]:
        """Tensors of one matrix."""
        bits, groups = scheme.format.bits, scheme.num_groups(k)
        return {
            "qweight": Part("int32", (words_of(k, bits), n)),
            "qzeros": Part("int32", (groups, words_of(n, bits))),
            "scales": Part("float16", (groups, n)),
            "g_idx": Part("int32", (k,)),
        }

    def pack(self, qtensor: QTensor) -> dict[str, np.ndarray]:
        """The same with their content.

        Raises:
          MpqError: a zero point that version 1 cannot store.
        """
        scheme, bits = qtensor.scheme, qtensor.scheme.format.bits
        codes = unsigned(qtensor.qvalue, bits)
        k, (groups, n) = len(codes), qtensor.scale.shape[1:]  # type: ignore[union-attr]  # refused without scale
        zeros = np.full((groups, n), 1 << (bits - 1), np.uint8)
        if qtensor.zero_point is not None:
            zeros = unsigned(qtensor.zero_point, bits)
        if self.version == 1:
            if not zeros.all():
                raise MpqError("a zero point is the least code, which version 1 of GPTQ cannot store: use --to gptq_v2")
            zeros = zeros - 1
        return {
            "qweight": np.ascontiguousarray(pack_rows(codes.T, bits).T),
            "qzeros": pack_rows(zeros, bits),
            "scales": np.asarray(qtensor.scale)[0],
            "g_idx": (np.arange(k) // (scheme.group_size or k)).astype(np.int32),
        }

    def config(self, modules: Mapping[str, Scheme], sites: Mapping[str, Site]) -> dict[str, Any]:
        """`quantization_config`; layers that stay plain are what GPTQModel calls negative matches of `dynamic`.

        Raises:
          MpqError: the schemes differ.
        """
        scheme = uniform(self.name, modules, sites)
        plain = [m for m, s in modules.items() if not s.has_scale and sites[m].kind == "matmul" and not sites[m].head]
        skip = {"dynamic": {f"-:{pattern}$": {} for pattern, _ in fold(dict.fromkeys(plain, 0), ".")}} if plain else {}
        return {
            "quant_method": "gptq",
            "checkpoint_format": self.name,
            "bits": scheme.format.bits,
            "group_size": scheme.group_size or -1,
            "sym": not scheme.zero_point,
            "desc_act": False,
            "lm_head": False,
            **skip,
        }

    def reader(self, config: Mapping[str, Any]) -> Reader:
        """What reads a checkpoint with this config.

        Raises:
          MpqError: a width that it does not store, or widths of single modules (`dynamic`).
        """
        bits, size = config.get("bits"), config.get("group_size", -1)
        own = [pattern for pattern in config.get("dynamic") or {} if not pattern.startswith("-:")]
        if bits not in WIDTHS or own:
            raise MpqError(
                f"GPTQ with {bits!r} bits and {len(own)} rules for modules of other widths is not read: supported is "
                f"one of {', '.join(map(str, WIDTHS))} bits for all"
            )
        version = 2 if config.get("checkpoint_format") == "gptq_v2" else 1
        group = None if size in (-1, None) else int(size)
        unpack = lambda module, parts: _unpack(parts, int(bits), group, bool(config.get("sym", True)), version)

        def describe(module: str, shape: Shape, read: Read) -> tuple[Scheme, int, int]:
            (words, n), _ = shape("qweight")
            scheme = Scheme(Integer(int(bits)), group, not config.get("sym", True), shape("scales")[1])
            return scheme, n, words * 32 // int(bits)

        return Reader(("qweight",), ("qweight", "qzeros", "scales", "g_idx"), describe, unpack)


def _unpack(parts: Parts, bits: int, group: int | None, symmetric: bool, version: int) -> QTensor:
    words, n = parts["qweight"].shape
    k, scale = words * 32 // bits, parts["scales"]
    codes = unpack_rows(np.ascontiguousarray(parts["qweight"].T), k, bits).T
    zeros = _zeros(parts["qzeros"], n, bits, version)
    zero = None
    if not symmetric or (zeros != 1 << (bits - 1)).any():
        zero = jnp.asarray(signed(zeros, bits))
    scheme = Scheme(Integer(bits), group, zero is not None, scale.dtype.name)
    row_group = _row_group(parts.get("g_idx"), k, group or k, len(scale))
    return QTensor(jnp.asarray(signed(codes, bits)), jnp.asarray(scale[None]), zero, scheme, row_group=row_group)


def _zeros(words: np.ndarray, n: int, bits: int, version: int) -> np.ndarray:
    """`uint8[groups, n]`: zero points, the least code 0."""
    if version == 2:
        return unpack_rows(words, n, bits)
    if 32 % bits:
        return (unpack_rows(words, n, bits) + 1) & ((1 << bits) - 1)
    one_each = np.uint32(sum(1 << at for at in range(0, 32, bits)))
    return unpack_rows((words.view(np.uint32) + one_each).view(np.int32), n, bits)


def _row_group(index: np.ndarray | None, k: int, size: int, groups: int) -> jax.Array | None:
    """`int32[1, k]`, the group of every row, from `g_idx`; None where they are neighbours."""
    if index is None or np.array_equal(index, np.arange(k) // size):
        return None
    if index.shape != (k,) or index.min() < 0 or index.max() >= groups:
        raise MpqError(f"g_idx does not give each of {k} rows one of {groups} groups: the checkpoint is damaged")
    return jnp.asarray(index.astype(np.int32)[None])
