"""Stage files: what each stage writes and the next one reads. JSON for people and tools, safetensors for arrays.

Every file says what it is, from which model and text it was made, and carries a checksum of its content; a truncated,
edited, foreign or stale file is refused by name, never used.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpq.array_file import read_arrays, write_arrays
from mpq.data import row_digests
from mpq.evaluate import DocumentScores
from mpq.files import read_json, write_json
from mpq.formats import parse_scheme
from mpq.inputs import Dataset
from mpq.models import Model
from mpq.sensitivity.interactions import InteractionTable
from mpq.tasks import Task
from mpq.types import Allocation, LayerStats, MpqError, Scheme, SensitivityTable, WeightSpec

SCHEMA = 1
ORIGIN_KEYS = ("metric", "quantizer", "model_digest", "data_digest")


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A bit allocation as a file: the choice for every weight, and where it comes from.

    Attributes:
      name: for a person: `mixed@3.5bpw`, `int4_g64`.
      choices: path -> scheme.
      size_bits: of the quantized weights; `other_bits` of everything stored beside them.
      num_weights: number of quantized values.
      prediction: numbers of the allocation (`predicted_kl`, `lower_bound`, ...); None in a uniform plan.
      model_digest: the model it was made for.
      activations: path -> what `RoundedActivation.to_json` gives, of the activations and the parts of the KV cache that
        are rounded; their static ranges count among `other_bits`.
    """

    name: str
    choices: Mapping[str, Scheme]
    size_bits: int
    other_bits: int
    num_weights: int
    prediction: Mapping[str, Any] | None
    model_digest: str
    activations: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """The whole quantized model."""
        return (self.size_bits + self.other_bits) // 8

    @property
    def bits_per_weight(self) -> float:
        """All bits of the quantized weights over their number."""
        return self.size_bits / self.num_weights

    def with_activations(self, activations: Mapping[str, Mapping[str, Any]]) -> "Plan":
        """The same weights beside other activations."""
        held = lambda rows: sum(entry["range_bits"] for entry in rows.values())
        beside = self.other_bits - held(self.activations) + held(activations)
        return dataclasses.replace(self, other_bits=beside, activations=dict(activations))

    def to_json(self) -> dict[str, Any]:
        """Plain data, the shape of `plan.json`."""
        prediction = self.prediction or {}
        return {
            "name": self.name,
            "size_bytes": self.size_bytes,
            "bits_per_weight": self.bits_per_weight,
            **{key: prediction.get(key) for key in PREDICTION_KEYS},
            "choices": {path: str(scheme) for path, scheme in self.choices.items()},
            "size_bits": self.size_bits,
            "other_bits": self.other_bits,
            "num_weights": self.num_weights,
            "model_digest": self.model_digest,
            **({"activations": dict(self.activations)} if self.activations else {}),
        }


PREDICTION_KEYS = ("predicted_kl", "predicted_stderr", "lower_bound", "gap", "status", "solver", "metric", "quantizer")


def other_bits(model: Model, weights: tuple[WeightSpec, ...]) -> int:
    """Bits of the parameters that are not quantized, in the dtypes they are stored in."""
    quantized = sum(w.size * 8 * jnp.dtype(model.stored[w.param]).itemsize for w in weights)
    return 8 * model.size_bytes - quantized


def plan_of_allocation(name: str, allocation: Allocation, table: SensitivityTable, beside: int) -> Plan:
    """The plan file of a solved allocation; `beside` is `other_bits` of the model."""
    prediction = {
        "predicted_kl": allocation.loss,
        "predicted_stderr": None if np.isnan(allocation.stderr) else allocation.stderr,
        "lower_bound": allocation.lower_bound,
        "gap": allocation.gap,
        "status": allocation.status.value,
        "solver": allocation.solver,
        "metric": table.metric,
        "quantizer": table.quantizer,
    }
    return make_plan(name, allocation.choice, prediction, table.weights, beside, table.model_digest)


def uniform_plan(
    scheme: Scheme,
    model: Model,
    weights: tuple[WeightSpec, ...],
    activations: Mapping[str, Mapping[str, Any]] | None = None,
) -> Plan:
    """Every weight under one scheme."""
    choices, beside = {w.path: scheme for w in weights}, other_bits(model, weights)
    return make_plan(str(scheme), choices, None, weights, beside, model.digest, activations)


def make_plan(
    name: str,
    choices: Mapping[str, Scheme],
    prediction: Mapping[str, Any] | None,
    weights: tuple[WeightSpec, ...],
    beside: int,
    model_digest: str,
    activations: Mapping[str, Mapping[str, Any]] | None = None,
) -> Plan:
    """A plan with its sizes counted from the weights; `beside` is without ranges of activations."""
    size, values = sum(w.size_bits(choices[w.path]) for w in weights), sum(w.size for w in weights)
    plan = Plan(name, dict(choices), size, beside, values, prediction, model_digest)
    return plan.with_activations(activations or {})


def save_plan(path: Path, plan: Plan) -> None:
    """Write `plan.json`."""
    write_stage(path, "plan", plan.to_json())


def load_plan(path: Path, model: Model, weights: tuple[WeightSpec, ...]) -> Plan:
    """Read a plan made for `model`.

    Raises:
      MpqError: damaged, not a plan, or made for another model (says which weights differ).
    """
    body = read_stage(path, "plan")
    choices = {p: parse_scheme(s) for p, s in body["choices"].items()}
    ours = {w.path for w in weights}
    if differing := sorted(ours ^ set(choices)):
        side = "the plan lacks" if differing[0] in ours else "the plan also names"
        raise MpqError(f"{path} was made for another model: {side} {differing[0]!r} ({len(differing)} weights differ)")
    if body["model_digest"] != model.digest:
        raise MpqError(
            f"{path} was made for another model: the weights have the same names but other values "
            f"(digest {body['model_digest'][:12]}, this one {model.digest[:12]}); allocate again for this model"
        )
    prediction = None if body["predicted_kl"] is None else {key: body[key] for key in PREDICTION_KEYS}
    beside, activations = other_bits(model, weights), body.get("activations")
    return make_plan(body["name"], choices, prediction, weights, beside, model.digest, activations)


def save_table(path: Path, table: SensitivityTable, extra: Mapping[str, Any]) -> None:
    """Write a sensitivity table. `extra` (such as `other_bits`) is kept for the next stage."""
    write_stage(
        path,
        "sensitivity",
        {
            **table_body(table),
            "weights": [dataclasses.asdict(w) for w in table.weights],
            **extra,
        },
    )


def load_table(path: Path) -> tuple[SensitivityTable, dict[str, Any]]:
    """Read a sensitivity table, and the whole file's content."""
    body = read_stage(path, "sensitivity")
    table = SensitivityTable(
        weights=tuple(WeightSpec.from_json(w) for w in body["weights"]),
        schemes=tuple(parse_scheme(s) for s in body["schemes"]),
        **table_fields(body),
    )
    return table, body


def table_body(table: Any) -> dict[str, Any]:
    """Columns and numbers of a `SensitivityTable`, or of one with its fields but other rows, as plain data."""
    return {
        **{key: getattr(table, key) for key in ORIGIN_KEYS},
        "schemes": [str(s) for s in table.schemes],
        "loss_increase": table.loss_increase.tolist(),
        "stderr": [[None if np.isnan(v) else v for v in row] for row in table.stderr.tolist()],
    }


def table_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `table_body`, but for the schemes: fields of the table."""
    return {
        **{key: body[key] for key in ORIGIN_KEYS},
        "loss_increase": np.asarray(body["loss_increase"], np.float64),
        "stderr": np.asarray([[np.nan if v is None else v for v in row] for row in body["stderr"]], np.float64),
    }


def save_stats(path: Path, stats: Mapping[str, LayerStats], model_digest: str, data: Dataset) -> None:
    """Write calibration statistics made of `data`; weights that share an input share one stored gram."""
    arrays: dict[str, np.ndarray] = {}
    index: dict[str, Any] = {}
    stored: dict[int, str] = {}
    for weight_path, s in stats.items():
        owner = stored.setdefault(id(s.gram), weight_path)
        if owner == weight_path:
            arrays[f"gram/{owner}"] = np.asarray(s.gram, np.float32)
            arrays[f"absmax/{owner}"] = np.asarray(s.absmax, np.float32)
        index[weight_path] = {"owner": owner, "num_tokens": s.num_tokens}
    made_of = {"model_digest": model_digest, "data_digest": data.digest, "windows": row_digests(data)}
    header = {**made_of, "weights": index}
    write_arrays(path, "statistics", header, arrays)


def load_stats(path: Path, model_digest: str) -> tuple[dict[str, LayerStats], frozenset[str]]:
    """Read calibration statistics made for the model with this digest.

    Returns:
      Path of the weight -> statistics, and the `row_digests` of the windows that they were made of.

    Raises:
      MpqError: damaged, no statistics, or made for another model.
    """
    header, arrays = read_arrays(path, "statistics", "mpq calibrate")
    require_model(path, header["model_digest"], model_digest)
    stats = {
        weight: LayerStats(arrays[f"gram/{e['owner']}"], arrays[f"absmax/{e['owner']}"], e["num_tokens"])
        for weight, e in header["weights"].items()
    }
    return stats, frozenset(header["windows"])


def save_interactions(path: Path, table: InteractionTable) -> None:
    """Write interactions."""
    header = {
        "weights": [dataclasses.asdict(w) for w in table.weights],
        "schemes": [str(s) for s in table.schemes],
        **{key: getattr(table, key) for key in ("shrinkage", "quantizer", "model_digest", "data_digest")},
    }
    write_arrays(path, "interactions", header, {"sketch": table.sketch})


def load_interactions(path: Path) -> InteractionTable:
    """Read interactions.

    Raises:
      MpqError: damaged, or no interactions.
    """
    header, arrays = read_arrays(path, "interactions", "mpq interactions")
    return InteractionTable(
        weights=tuple(WeightSpec.from_json(w) for w in header["weights"]),
        schemes=tuple(parse_scheme(s) for s in header["schemes"]),
        sketch=arrays["sketch"],
        **{key: header[key] for key in ("shrinkage", "quantizer", "model_digest", "data_digest")},
    )


def save_scores(path: Path, scores: DocumentScores) -> None:
    """Write one evaluation, document by document."""
    arrays = {f.name: getattr(scores, f.name) for f in dataclasses.fields(scores) if f.name != "task"}
    write_stage(path, "scores", {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in arrays.items()})


def load_scores(path: Path, task: Task) -> DocumentScores:
    """Read one evaluation of a model with this task."""
    body = read_stage(path, "scores")
    array = lambda key: np.asarray(body[key], np.float64)
    column = lambda key: None if body[key] is None else array(key)
    return DocumentScores(
        task=task,
        document=np.asarray(body["document"], np.int64),
        counts=array("counts"),
        nll=column("nll"),
        kl=column("kl"),
        agree=column("agree"),
        evidence=array("evidence"),
        labels=column("labels"),
        data_digest=body["data_digest"],
    )


def require_model(what: Path, digest: str, model_digest: str) -> None:
    """Refuse a stage file that was made from a model with another digest.

    Raises:
      MpqError: the digests differ.
    """
    if digest != model_digest:
        raise MpqError(
            f"{what} was made for another model (digest {digest[:12]}, this one {model_digest[:12]}): "
            "make it again for this model"
        )


def write_stage(path: Path, kind: str, body: Mapping[str, Any]) -> None:
    """Write a stage file of a kind, with the checksum of its content.

    Raises:
      MpqError: a number is not finite, the disk is full, or the operating system refuses.
    """
    body = {"kind": kind, "schema": SCHEMA, **body}
    write_json(path, {**body, "checksum": _checksum(body)})


def read_stage(path: Path, kind: str) -> dict[str, Any]:
    """The content of a stage file of a kind, without its checksum.

    Raises:
      MpqError: missing, of another kind or schema, or changed after it was written.
    """
    body = read_json(path, f"a {kind} file")
    if body.get("kind") != kind:
        raise MpqError(
            f"{path} is no {kind} file (it is {body.get('kind')!r}): give the file that the {kind} stage wrote"
        )
    if body.get("schema") != SCHEMA:
        raise MpqError(f"{path} has schema {body.get('schema')!r}: this version reads {SCHEMA}; make the file again")
    if body.pop("checksum", None) != _checksum(body):
        raise MpqError(f"{path} was changed or damaged after it was written (its checksum differs): make it again")
    return body


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
