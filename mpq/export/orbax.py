"""A quantized model as an Orbax folder whose payload is, to the byte, what the plan says.

    FOLDER/mpq.json         plan, model config, the weights and their schemes, shape, dtype and sha256 of every array
    FOLDER/tokenizer.json   if the model has a tokenizer
    FOLDER/arrays/          an Orbax checkpoint, `{"quantized": {path: {...}}, "params": {path: array}}`; of a plan
                            that rounds activations also `{"ranges": {path: float32[2, parts]}}` of static ones and
                            `{"smooth": {path: float32[width]}}` of those that are divided first and
                            `{"columns": {path: uint8[ceil(width / 8)]}}`, a bit a feature, of outliers known from
                            calibration

A quantized weight is a sub-tree: `qvalue` (`uint8[batch, bytes]`, a bit stream per batch entry, see `packing`; for a
float format the values), `scale` (`[batch, groups, n]` in its dtype; scales of 8 bits as their bytes, `uint8`),
`zero_point` (a bit stream too), `tensor_scale` (`float32[batch, 1, 1]`) and `codebook` (`float16[batch, levels, 1]`),
as the scheme has them, and in blocks of ggml `minimum` and the bit streams `sub_scale` and `sub_minimum`. Everything
else of the model is under `params` in the dtype that it was stored in. Arrays are one chunk each and not compressed:
the chunk files are the payload, and `payload_bytes` counts them. Any Orbax user can read the arrays with
`PyTreeCheckpointer().restore`.

The same content gives the same bytes: time stamps and paths that Orbax writes beside the arrays are taken out.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpq.export.parts import from_parts, to_parts
from mpq.files import canonical_json, digest_arrays, read_json, writing
from mpq.formats import parse_scheme
from mpq.quantize.candidates import apply_plan
from mpq.types import MpqError, Params, QTensor, Scheme, WeightSpec

MANIFEST = "mpq.json"
SCHEMA = 1
_ARRAYS, _TOKENIZER = "arrays", "tokenizer.json"
_WHAT = "the manifest of a quantized model, as 'mpq quantize -o' writes it"


@dataclasses.dataclass(frozen=True, eq=False)
class Exported:
    """A quantized model read back.

    Attributes:
      plan: what `save` was given as `plan_json`.
      config: the model's config.
      tokenizer_json: text of `tokenizer.json`, or None.
      weights: the quantized weights.
      qtensors: their codes, scales and zero points by path.
      params: everything else by path, in the dtype it is stored in.
      shapes: shape and dtype name of every parameter of the model.
      ranges: static ranges of activations by path of the row, `float32[2, parts]`.
      smooth: what activations are divided by, by path of the row, `float32[width]`.
      columns: features that stay in floating point, by path of the row, a bit each, `uint8[ceil(width / 8)]`.
    """

    plan: dict[str, Any]
    config: dict[str, Any]
    tokenizer_json: str | None
    weights: tuple[WeightSpec, ...]
    qtensors: dict[str, QTensor]
    params: dict[str, np.ndarray]
    shapes: dict[str, tuple[tuple[int, ...], str]]
    ranges: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    smooth: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    columns: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def of_row(self, path: str) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
        """Range, factors and kept features of an activation, as `RoundedActivation.from_json` takes them."""
        return self.ranges.get(path), self.smooth.get(path), self.columns.get(path)

    @property
    def structs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every parameter of the model."""
        return {path: jax.ShapeDtypeStruct(shape, dtype) for path, (shape, dtype) in self.shapes.items()}

    def dequantized(self) -> dict[str, jax.Array]:
        """All parameters of the model, with the quantized weights in their place."""
        params: dict[str, jax.Array] = {}
        for path, (shape, dtype) in self.shapes.items():
            kept = self.params.get(path)
            params[path] = jnp.zeros(shape, dtype) if kept is None else jnp.asarray(kept).astype(dtype)
        return apply_plan(params, self.weights, self.qtensors)


def save(
    path: str | os.PathLike[str],
    *,
    params: Params,
    stored: Mapping[str, str],
    weights: Sequence[WeightSpec],
    qtensors: Mapping[str, QTensor],
    plan_json: Mapping[str, Any],
    config: Mapping[str, Any],
    tokenizer_json: str | None,
    ranges: Mapping[str, np.ndarray] | None = None,
    smooth: Mapping[str, np.ndarray] | None = None,
    columns: Mapping[str, np.ndarray] | None = None,
) -> int:
    """Write a quantized model; the folder appears whole or not at all.

    Args:
      path: the folder.
      params: the model's parameters. Those that the weights cover are not written.
      stored: dtype name that a parameter is stored in; without an entry, its own. Values are rounded to it.
      weights: what `trace` found.
      qtensors: quantized weight of every path in `weights`.
      plan_json: the plan.
      config: the model's config.
      tokenizer_json: text of its `tokenizer.json`, or None.
      ranges: static ranges of the plan's activations by path of the row, `float32[2, parts]`: ends below and above.
      smooth: what activations are divided by, by path of the row, `float32[width]`.
      columns: features that stay in floating point, by path of the row, a bit each, `uint8[ceil(width / 8)]`.

    Returns:
      Bytes of the payload, as `payload_bytes` counts them.

    Raises:
      MpqError: a weight has no `QTensor` or one of another shape, or the disk is full or refuses.
    """
    tree: dict[str, Any] = {"quantized": {}, "params": {}}
    for part, by_row, dtype in (("ranges", ranges, "f4"), ("smooth", smooth, "f4"), ("columns", columns, "u1")):
        if by_row:
            tree[part] = {_key(name): np.asarray(array, dtype) for name, array in by_row.items()}
    for spec in weights:
        tree["quantized"][_key(spec.path)] = _pack_weight(spec, qtensors)
    covered = {spec.param: 0 for spec in weights}
    for spec in weights:
        covered[spec.param] += spec.size
    for name, param in params.items():
        if param.size > covered.get(name, 0):  # false for arrays without elements, which Orbax refuses
            tree["params"][_key(name)] = np.asarray(jnp.asarray(param).astype(stored.get(name, param.dtype)))
    manifest = {
        "schema": SCHEMA,
        "plan": plan_json,
        "config": config,
        "weights": [{**dataclasses.asdict(s), "scheme": str(qtensors[s.path].scheme)} for s in weights],
        "params": {name: {"shape": param.shape, "dtype": str(param.dtype)} for name, param in params.items()},
        "arrays": {
            name: {"shape": array.shape, "dtype": str(array.dtype), "sha256": digest_arrays({"": array})}
            for name, array in _flatten(tree).items()
        },
    }
    text = canonical_json(manifest)
    with writing(path) as sibling:
        sibling.mkdir()
        _write_arrays(sibling / _ARRAYS, tree)
        (sibling / MANIFEST).write_text(text, encoding="utf-8")
        if tokenizer_json is not None:
            (sibling / _TOKENIZER).write_bytes(tokenizer_json.encode())
    return payload_bytes(path)


def load(path: str | os.PathLike[str]) -> Exported:
    """Read a quantized model.

    Raises:
      MpqError: the folder is not one, or a part of it is missing, truncated or changed; the part is named.
    """
    path = Path(path)
    manifest = read_json(path / MANIFEST, _WHAT)
    if manifest.get("schema") != SCHEMA:
        raise MpqError(
            f"{path / MANIFEST} has schema {manifest.get('schema')!r}, not {SCHEMA}: quantize the model again"
        )
    try:
        arrays = _read_arrays(path / _ARRAYS, manifest["arrays"])
        fields = [dict(body) for body in manifest["weights"]]
        schemes = [parse_scheme(body.pop("scheme")) for body in fields]
        weights = tuple(WeightSpec.from_json(body) for body in fields)
        qtensors = {spec.path: _unpack_weight(spec, s, arrays) for spec, s in zip(weights, schemes, strict=True)}
        shapes = {name: (tuple(entry["shape"]), entry["dtype"]) for name, entry in manifest["params"].items()}
        params = {name: arrays[f"params.{_key(name)}"] for name in shapes if f"params.{_key(name)}" in arrays}
        plan, config = manifest["plan"], manifest["config"]
        rows = plan.get("activations", {})
        of = lambda part: {n: arrays[f"{part}.{_key(n)}"] for n in rows if f"{part}.{_key(n)}" in arrays}
        beside = of("ranges"), of("smooth"), of("columns")
    except (KeyError, TypeError, AttributeError) as error:
        raise MpqError(f"{path / MANIFEST} is not {_WHAT}: it lacks or misplaces {error}") from error
    tokenizer = path / _TOKENIZER
    text = tokenizer.read_bytes().decode() if tokenizer.exists() else None
    return Exported(plan, config, text, weights, qtensors, params, shapes, *beside)


def payload_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes of all array data in the folder: packed codes, scales, zero points, ranges and unquantized parameters.

    What describes them (the manifest, the tokenizer, `.zarray` and other files of Orbax) is not counted.
    """
    folder = Path(path) / _ARRAYS
    return sum(file.stat().st_size for file in folder.glob("*/*") if not file.name.startswith("."))


def _key(path: str) -> str:
    """A parameter path as one name of a folder."""
    return path.replace("%", "%25").replace("/", "%2F")


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Arrays by the name of their folder."""
    flat: dict[str, np.ndarray] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _pack_weight(spec: WeightSpec, qtensors: Mapping[str, QTensor]) -> dict[str, np.ndarray]:
    if spec.path not in qtensors:
        raise MpqError(
            f"weight {spec.path} has no quantized value: give every weight a scheme (bf16 keeps it as it is)"
        )
    qtensor = qtensors[spec.path]
    if qtensor.qvalue.shape != (spec.batch, spec.k, spec.n):
        want = [spec.batch, spec.k, spec.n]
        raise MpqError(f"quantized weight {spec.path} is {list(qtensor.qvalue.shape)}, not {want}: quantize this model")
    qtensor.require_neighbours(spec.path)
    return to_parts(qtensor)


def _unpack_weight(spec: WeightSpec, scheme: Scheme, arrays: Mapping[str, np.ndarray]) -> QTensor:
    part = lambda name: arrays[f"quantized.{_key(spec.path)}.{name}"]
    return from_parts(part, scheme, spec.k, spec.n, spec.batch)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Orbax logs what it also raises, with the traceback, and warns of what it was told to do."""
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """A full disk is an `OSError`, also where TensorStore, which does Orbax's writing, makes a `ValueError` of it.

    Raises:
      OSError: the disk is full.
    """
    try:
        yield
    except ValueError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "No space left" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


def _write_arrays(folder: Path, tree: Mapping[str, Any]) -> None:
    whole = jax.tree.map(np.atleast_1d, tree)  # Orbax makes Python numbers of scalars; the manifest keeps their shape
    write_checkpoint(folder, {name: part for name, part in whole.items() if part})


def write_checkpoint(folder: Path, tree: Mapping[str, Any]) -> None:
    """An Orbax checkpoint, uncompressed, one folder an array; whatever differs between two equal saves is taken out.

    Args:
      folder: to write; it must not exist.
      tree: nested dictionaries of arrays.

    Raises:
      OSError: the disk is full.
    """
    from orbax.checkpoint import PyTreeCheckpointer  # two seconds to import, and only exporting needs it

    with quiet(), disk_errors(), PyTreeCheckpointer(use_ocdbt=False, use_compression=False) as checkpointer:
        checkpointer.save(folder.absolute(), tree)
    marker, metadata = folder / "commit_success.txt", folder / "_CHECKPOINT_METADATA"
    marker.unlink(missing_ok=True)  # says where the folder lay while it was written; nothing reads it on a file system
    body = json.loads(metadata.read_text())
    body |= {name: 0 for name in body if name.endswith("_timestamp_nsecs")}
    metadata.write_text(json.dumps(body, sort_keys=True))


def _read_arrays(folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """All arrays by the name of their folder, each checked against its size and digest."""
    from orbax.checkpoint import PyTreeCheckpointer

    expected = {n: jnp.dtype(e["dtype"]).itemsize * int(np.prod(e["shape"])) for n, e in entries.items()}
    for name, size in expected.items():
        found = sum(f.stat().st_size for f in (folder / name).glob("*") if not f.name.startswith("."))
        if found != size:
            raise MpqError(
                f"{folder / name} holds {found} bytes of data, not {size}: truncated? Copy or quantize again"
            )
    try:
        with quiet(), PyTreeCheckpointer(use_ocdbt=False) as checkpointer:
            flat = _flatten(checkpointer.restore(folder.absolute()))
    except (OSError, ValueError, KeyError) as error:
        raise MpqError(f"{folder} is no readable Orbax checkpoint ({error}): copy or quantize again") from error
    arrays: dict[str, np.ndarray] = {}
    for name, entry in entries.items():
        arrays[name] = np.asarray(flat[name]).reshape(entry["shape"])
        if digest_arrays({"": arrays[name]}) != entry["sha256"]:
            raise MpqError(f"{folder / name} is not what was written (its sha256 differs): copy or quantize again")
    return arrays
