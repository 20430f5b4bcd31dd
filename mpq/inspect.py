"""What `mpq inspect` computes: the weights of a model, what is no weight and why, and what the model would cost.

Shapes are enough: no weight is read, and a `config.json` alone will do.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpq.artifacts import other_bits
from mpq.export import orbax
from mpq.files import read_json
from mpq.formats import parse_scheme
from mpq.gguf.load import open_gguf
from mpq.gguf.reader import is_gguf
from mpq.inputs import Images, Tokens
from mpq.models import FAMILIES, Model, load_shapes, resolve
from mpq.trace import Trace
from mpq.types import MpqError, WeightSpec
from mpq.units import bpw_to_bits

SCHEMES = ("int2_g64", "int3_g64", "int4_g64", "int8_channel", "bf16")
BPW = (3.5,)


def inspect(source: str, *, strict: bool = False, bpw: Sequence[float] = BPW) -> dict[str, Any]:
    """The plain result that `--json` prints.

    Args:
      source: a model as `load_shapes` takes it.
      strict: refuse a model of which a matrix is left unquantized.
      bpw: bits per weight whose sizes are wanted.

    Raises:
      MpqError: no such model; a size that is no positive number; or, if `strict`, the matrix that nothing claims.
    """
    model = load_shapes(source)
    traced = model.trace()
    if strict:
        refuse_unclaimed(model, traced)
    kinds, size = _stored(source, traced.weights)
    kinds |= {w.path: (str(s), w.size_bits(s) // 8) for w in traced.weights if (s := model.schemes.get(w.param))}
    stored = (stored_bits(model, traced.weights) + other_bits(model, traced.weights)) // 8
    unit, units = unit_of(model)
    return {
        "model": model.name,
        "parameters": model.num_parameters,
        "size_bytes": stored if size is None else size,
        "unit": unit,
        "weights": [
            {
                "path": w.path,
                "kind": w.kind,
                "k": w.k,
                "n": w.n,
                "batch": w.batch,
                "uses": len(w.uses),
                f"macs_per_{unit}": w.macs / units,
                "group": w.group,
                "stored": kinds[w.path][0] if w.path in kinds else model.stored[w.param],
                "size_bytes": kinds[w.path][1] if w.path in kinds else _bytes_as_stored(model, w),
            }
            for w in traced.weights
        ],
        "skipped": [
            {"path": s.path, "shape": list(model.params[s.path].shape), "reason": s.reason} for s in traced.skipped
        ],
        "costs": costs(model, traced.weights, bpw),
    }


def costs(model: Model, weights: Sequence[WeightSpec], bpw: Sequence[float] = BPW) -> list[dict[str, Any]]:
    """Size of the whole model under uniform schemes and at given bits per weight, the largest first.

    What is no weight is counted in the dtype that it is stored in, as a plan's `size_bytes` counts it.

    Args:
      model: its parameters may be shapes.
      weights: what `trace` found.
      bpw: bits per weight; the size is the largest number of whole bytes within them.

    Raises:
      MpqError: a value of `bpw` is not a positive number.
    """
    beside, values = other_bits(model, tuple(weights)), sum(w.size for w in weights)
    if not values:
        return []
    bits = {f"{value:g} bpw": bpw_to_bits(value, values) for value in bpw}
    bits |= {name: sum(w.size_bits(parse_scheme(name)) for w in weights) for name in SCHEMES}
    rows = [
        {"at": name, "bits_per_weight": size / values, "size_bytes": (size + beside) // 8}
        for name, size in bits.items()
    ]
    return sorted(rows, key=lambda row: -row["bits_per_weight"])


def parse_bpw(texts: Sequence[str]) -> tuple[float, ...]:
    """Numbers from `3.5`, or several joined by commas; 3.5 where nothing is given.

    Raises:
      MpqError: one of them is no number.
    """
    parts = [part for text in texts for part in text.split(",")]
    try:
        return tuple(dict.fromkeys(float(part) for part in parts)) or BPW
    except ValueError as error:
        raise MpqError(
            f"bits per weight {','.join(texts)!r} is no number, nor several joined by commas: try 3.5"
        ) from error


def stored_bits(model: Model, weights: Sequence[WeightSpec]) -> int:
    """Bits of the weights as the checkpoint has them: under its schemes where it is quantized, else as floats."""
    sizes = ((w, model.schemes.get(w.param)) for w in weights)
    return sum(8 * _bytes_as_stored(model, w) if scheme is None else w.size_bits(scheme) for w, scheme in sizes)


def unit_of(model: Model) -> tuple[str, int]:
    """What multiply-accumulates are counted for, and how many of them `Model.trace` evaluates."""
    if isinstance(model.inputs, Tokens):
        return "token", model.inputs.context
    return ("image" if isinstance(model.inputs, Images) else "example"), 1


def refuse_unclaimed(model: Model, traced: Trace) -> None:
    """Refuse a model with a matrix that no matmul, convolution or embedding reads, or of which some slice is not read.

    A matrix has two or more axes longer than one; the norm scales of a stack of layers are vectors, one for each.

    Raises:
      MpqError: names the first such parameter.
    """
    claimed: dict[str, int] = {}
    for w in traced.weights:
        claimed[w.param] = claimed.get(w.param, 0) + w.size
    left = [
        s
        for s in traced.skipped
        if claimed.get(s.path, 0) < np.prod(model.params[s.path].shape)
        and sum(axis > 1 for axis in model.params[s.path].shape) >= 2
        and s.reason != "vector in every slice"
    ]
    if left:
        first = f"{left[0].path!r}: {left[0].reason}"
        raise MpqError(f"{len(left)} matrices are not quantized, first {first}; without --strict they stay as they are")


def _stored(source: str, weights: Sequence[WeightSpec]) -> tuple[dict[str, tuple[str, int]], int | None]:
    """Of what holds quantized weights: scheme, or type in a GGUF file, and bytes of each; and the size of it all."""
    if is_gguf(source):
        opened = open_gguf(source, FAMILIES)
        found = {w.path: opened.stored[w.param] for w in weights}
        return {path: (t.kind, t.nbytes) for path, t in found.items()}, opened.file.size_bytes
    if Path(source).is_file():
        return {}, None
    manifest = resolve(source, weights=False) / orbax.MANIFEST
    if not manifest.exists():
        return {}, None
    body = read_json(manifest, "the quantized model's manifest")
    schemes = {w["path"]: w["scheme"] for w in body["weights"]}
    sizes = {w.path: w.size_bits(parse_scheme(schemes[w.path])) // 8 for w in weights}
    return {path: (schemes[path], size) for path, size in sizes.items()}, body["plan"]["size_bytes"]


def _bytes_as_stored(model: Model, weight: WeightSpec) -> int:
    return weight.size * jnp.dtype(model.stored[weight.param]).itemsize
