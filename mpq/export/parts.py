"""A quantized weight as the arrays that lie on the disk: bit streams of codes, scales, and what blocks have beside."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mpq.export.packing import pack, unpack
from mpq.formats.ggml import sub_range
from mpq.types import QTensor, Scheme


def to_parts(qtensor: QTensor) -> dict[str, np.ndarray]:
    """Arrays by name, of as many bytes as `Scheme.part_bits` says.

    `qvalue` and `zero_point` are `uint8[batch, bytes]`, a bit stream (`mpq.export.packing`) per batch entry; of a float
    format `qvalue` are the values. Scales of 8 bits are their bytes.
    """
    if qtensor.scale is None:
        return {"qvalue": np.asarray(qtensor.qvalue)}
    grid = qtensor.scheme.format
    stream = lambda codes: np.stack([pack(entry, grid.bits, grid.min_qvalue) for entry in np.asarray(codes)])
    scale = np.asarray(qtensor.scale)
    parts = {"qvalue": stream(qtensor.qvalue), "scale": scale.view(np.uint8) if scale.itemsize == 1 else scale}
    parts |= {} if qtensor.zero_point is None else {"zero_point": stream(qtensor.zero_point)}
    parts |= {} if qtensor.minimum is None else {"minimum": np.asarray(qtensor.minimum)}
    integers = {"sub_scale": qtensor.sub_scale, "sub_minimum": qtensor.sub_minimum}
    for name, codes in integers.items():
        if codes is not None:
            parts[name] = np.stack([pack(entry, *_integer_range(qtensor.scheme)) for entry in np.asarray(codes)])
    whole = {"tensor_scale": qtensor.tensor_scale, "codebook": qtensor.codebook}
    return parts | {name: np.asarray(array) for name, array in whole.items() if array is not None}


def from_parts(part: Callable[[str], np.ndarray], scheme: Scheme, k: int, n: int, batch: int) -> QTensor:
    """The weight `[batch, k, n]`: inverse of `to_parts`.

    Args:
      part: name -> array; a `KeyError` of it is passed on.
      scheme: of the weight.
      k: its rows.
      n: its columns.
      batch: matrices.
    """
    if not scheme.has_scale:
        return QTensor(jnp.asarray(part("qvalue")), None, None, scheme)

    def codes(name: str, rows: int, columns: int, width: tuple[int, int]) -> jax.Array:
        entries = [unpack(stream, rows * columns, *width) for stream in part(name)]
        return jnp.asarray(np.stack(entries).reshape(batch, rows, columns))

    grid, stored = (scheme.format.bits, scheme.format.min_qvalue), scheme.part_bits(k, n)
    zero_point = codes("zero_point", *scheme.scale_shape(k, n), grid) if scheme.zero_point else None
    integers = {
        name: codes(name, scheme.num_groups(k), n, _integer_range(scheme))
        for name in ("sub_scale", "sub_minimum")
        if name in stored
    }
    minimum = jnp.asarray(part("minimum")) if "minimum" in stored else None
    tensor_scale = jnp.asarray(part("tensor_scale")) if scheme.has_tensor_scale else None
    codebook = jnp.asarray(part("codebook")) if scheme.has_codebook else None
    scale = part("scale").view(scheme.scale_dtype) if part("scale").dtype == np.uint8 else part("scale")
    qvalue = codes("qvalue", k, n, grid)
    beside = {"minimum": minimum, "codebook": codebook, **integers}
    return QTensor(qvalue, jnp.asarray(scale), zero_point, scheme, tensor_scale, **beside)


def _integer_range(scheme: Scheme) -> tuple[int, int]:
    """Width and least of the integers of groups in blocks of ggml."""
    assert scheme.blocks is not None
    assert scheme.blocks.sub_bits is not None
    return scheme.blocks.sub_bits, sub_range(scheme.blocks)[0]
