"""Checkpoints of AWQ, the "gemm" arrangement of AutoAWQ: 4 bits, groups, zero points.

Facts from AutoAWQ 0.2.9 (`modules/linear/gemm.py`): `qweight` is `int32[k, n / 8]` and `qzeros` `int32[groups, n / 8]`;
of every eight columns of a word the even ones lie first (0 2 4 6 1 3 5 7), lowest bits first; `scales` are
`float16[groups, n]`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpq.formats.integer import Integer
from mpq.hf.container import NOTHING, Part, Parts, Read, Reader, Shape, Site, signed, uniform, unsigned
from mpq.hf.words import pack_rows, unpack_rows
from mpq.types import MpqError, QTensor, Scheme

_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])


@dataclasses.dataclass(frozen=True)
class AWQFormat:
    """One group size for all linear layers but the head; 4 bits."""

    name: str = "awq"
    scale_dtype: str | None = None
    beside = NOTHING

    def refusal(self, site: Site, scheme: Scheme) -> str | None:
        """Why not."""
        if site.head or site.kind != "matmul":
            return "embeddings and heads stay plain floats there"
        if scheme.format != Integer(4) or scheme.blocks is not None or scheme.scale_dtype != "float16":
            return "it takes int4 with scales of float16"
        if scheme.per_tensor or scheme.group_size is None or site.k % scheme.group_size:
            return f"it takes whole groups only, and the weight has {site.k} rows"
        return f"columns must be a multiple of 8, and the weight has {site.n}" if site.n % 8 else None

    def parts(self, scheme: Scheme, k: int, n: int) -> dict[str, Part]:
        """Tensors of one matrix."""
        groups = scheme.num_groups(k)
        return {
            "qweight": Part("int32", (k, n // 8)),
            "qzeros": Part("int32", (groups, n // 8)),
            "scales": Part("float16", (groups, n)),
        }

    def pack(self, qtensor: QTensor) -> dict[str, np.ndarray]:
        """The same with their content; without zero points they are the middle code."""
        scale = np.asarray(qtensor.scale)[0]
        zeros = np.full(scale.shape, 8, np.uint8)
        if qtensor.zero_point is not None:
            zeros = unsigned(qtensor.zero_point, 4)
        return {"qweight": _pack(unsigned(qtensor.qvalue, 4)), "qzeros": _pack(zeros), "scales": scale}

    def config(self, modules: Mapping[str, Scheme], sites: Mapping[str, Site]) -> dict[str, Any]:
        """`quantization_config`.

        Raises:
          MpqError: the schemes differ.
        """
        scheme = uniform(self.name, modules, sites)
        plain = [m for m, s in modules.items() if not s.has_scale and sites[m].kind == "matmul"]
        size = {"bits": 4, "group_size": scheme.group_size, "zero_point": scheme.zero_point}
        return {"quant_method": "awq", "version": "gemm", **size, "modules_to_not_convert": plain or None}

    def reader(self, config: Mapping[str, Any]) -> Reader:
        """What reads a checkpoint with this config.

        Raises:
          MpqError: another arrangement or width.
        """
        version, bits = str(config.get("version", "gemm")).lower(), config.get("bits", config.get("w_bit"))
        if version != "gemm" or bits != 4:
            raise MpqError(f"AWQ of version {version!r} with {bits!r} bits is not read: supported is 'gemm' with 4")
        size = int(config.get("group_size", config.get("q_group_size", 128)))
        group = None if size == -1 else size
        affine = bool(config.get("zero_point", True))

        def describe(module: str, shape: Shape, read: Read) -> tuple[Scheme, int, int]:
            (k, words), _ = shape("qweight")
            return Scheme(Integer(4), group, affine, shape("scales")[1]), 8 * words, k

        ends = ("qweight", "qzeros", "scales")
        return Reader(("qweight",), ends, describe, lambda module, parts: _unpack(parts, group, affine))


def _pack(codes: np.ndarray) -> np.ndarray:
    rows, columns = codes.shape
    return pack_rows(codes.reshape(rows, columns // 8, 8)[..., _ORDER].reshape(rows, columns), 4)


def _codes(words: np.ndarray) -> np.ndarray:
    rows, columns = len(words), 8 * words.shape[1]
    stored = unpack_rows(words, columns, 4).reshape(rows, -1, 8)
    return stored[..., np.argsort(_ORDER)].reshape(rows, columns)


def _unpack(parts: Parts, group: int | None, affine: bool) -> QTensor:
    codes, scale = _codes(parts["qweight"]), parts["scales"]
    zeros = _codes(parts["qzeros"]) if "qzeros" in parts else np.full(scale.shape, 8, np.uint8)
    affine = affine or bool((zeros != 8).any())
    scheme = Scheme(Integer(4), group, affine, scale.dtype.name)
    zero = jnp.asarray(signed(zeros, 4)) if affine else None
    return QTensor(jnp.asarray(signed(codes, 4)), jnp.asarray(scale[None]), zero, scheme)
