"""Which rows a plan rounds and how: presets, plans as a person names them, and the ranges of static rows."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from mpq.activations.apply import RoundedActivation, choose_activations
from mpq.activations.ranges import ActivationRange, calibrate_activations, drifting
from mpq.activations.rows import KEYS_AND_VALUES, ActivationSpec, activation_rows, kv_rows, require_schemes
from mpq.activations.scheme import parse_activation_scheme
from mpq.inputs import Dataset
from mpq.models.model import Model
from mpq.trace import Trace
from mpq.types import MpqError, Scheme

PRESETS = MappingProxyType(
    {
        "w8a8": "int8_channel+int8_token",
        "w8a8_static": "int8_channel+int8_tensor_static",
        "w4a8": "int4_g32+int8_token",
        "w4a8_static": "int4_g32+int8_tensor_static",
        "w4a4": "int4_g32+int4_token",
        "w8a8_fp8": "fp8_e4m3_channel+fp8_e4m3_token",
        "w4a4_g32": "int4_g32+int4_g32",
        "llm_int8": "int8_channel+int8_token_outlier6",
    }
)
"""Names of uniform plans of weights and activations."""


def split_plan(text: str) -> tuple[str, str | None, str | None]:
    """A plan as a person names it, `PLAN[+ACTIVATIONS[+KV]]` or a preset: plan file or scheme, and schemes beside it.

    Raises:
      MpqError: more than three parts, or one of them is empty.
    """
    parts = PRESETS.get(text.lower(), text).split("+")
    if len(parts) > 3 or not all(parts):
        raise MpqError(
            f"plan {text!r} is not PLAN, PLAN+ACTIVATIONS or PLAN+ACTIVATIONS+KV: write int4_g32+int8_token, "
            f"int4_g32+int8_token+int8_head, or one of {', '.join(PRESETS)}; keep stands for rows that stay as they are"
        )
    plan, activations, kv = (*parts, None, None)[:3]
    keep = lambda scheme: None if scheme == "keep" else scheme
    return plan or "", keep(activations), keep(kv)


def rows_of(
    of: str, traced: Trace, keys_values: str = KEYS_AND_VALUES, head_dim: int | None = None
) -> tuple[ActivationSpec, ...]:
    """Rows of a kind, or of both."""
    rows = () if of == "kv" else activation_rows(traced)
    return rows if of == "activations" else (*rows, *kv_rows(traced, keys_values, head_dim))


def uniform_rows(
    traced: Trace,
    activations: str | None,
    kv: str | None,
    keys_values: str = KEYS_AND_VALUES,
    head_dim: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Entries of a plan: all activations under one scheme, and all of the KV cache under another.

    Raises:
      MpqError: no such scheme, one that does not suit a row, or a model whose cache is not found.
    """
    rows: dict[str, dict[str, Any]] = {}
    for of, text in (("activations", activations), ("kv", kv)):
        if text is not None:
            scheme = parse_activation_scheme(text)
            for row in rows_of(of, traced, keys_values, head_dim):
                require_schemes([row], [scheme])
                rows[row.path] = RoundedActivation(row, scheme).to_json()
    return rows


def rows_at(
    rows: Mapping[str, Mapping[str, Any]], format_name: str, choices: Mapping[str, Scheme]
) -> dict[str, Mapping[str, Any]]:
    """Of entries of a plan, the inputs of weights that all have one number format, and all of the KV cache.

    Args:
      rows: entries of the plan.
      format_name: `int8`.
      choices: path of a weight -> its scheme.

    Raises:
      MpqError: no input is read by such weights alone.
    """
    specs = {path: RoundedActivation.from_json(row).spec for path, row in rows.items()}
    found = {
        path: row
        for path, row in rows.items()
        if specs[path].kind == "kv" or all(choices[w].format.name == format_name for w in specs[path].weights)
    }
    if all(specs[path].kind == "kv" for path in found):
        formats = ", ".join(sorted({scheme.format.name for scheme in choices.values()}))
        raise MpqError(f"@{format_name}: no input is read by weights of {format_name} alone; the plan has {formats}")
    return found


def calibrated(
    activations: Mapping[str, Mapping[str, Any]],
    model: Model,
    traced: Trace,
    data: Dataset | None,
    ranges: Mapping[str, ActivationRange] | None,
    batch_size: int,
) -> tuple[tuple[RoundedActivation, ...], list[str]]:
    """A plan's activations with their static ranges, and what to say of those.

    Args:
      activations: entries of the plan.
      model: the model.
      traced: its trace.
      data: to calibrate on where no ranges are given.
      ranges: by path of the row.
      batch_size: windows a pass.

    Raises:
      MpqError: static ranges, and neither ranges nor data; or a range that cannot be told.
    """
    chosen = [RoundedActivation.from_json(entry) for entry in activations.values()]
    static = [one.spec for one in chosen if one.scheme.is_calibrated]
    if static and ranges is None:
        if data is None:
            raise MpqError("static ranges of activations need calibration: give --data TEXT or --ranges FILE")
        ranges = calibrate_activations(model, traced, static, data, batch_size=batch_size)
    found = ranges or {}
    used = {row.path: found[row.path] for row in static if row.path in found}
    return choose_activations({one.spec: one.scheme for one in chosen}, found), drifting(used)


def all_ranges(text: str, model: Model, traced: Trace, data: Dataset) -> dict[str, ActivationRange]:
    """What `data` say of the rows that `int8_tensor_static+int8_head_static` takes static ranges of; none if dynamic.

    Raises:
      MpqError: no such schemes, rows that they do not suit, or a value that is not finite.
    """
    entries = _all_entries(text, traced).values()
    static = [one.spec for one in map(RoundedActivation.from_json, entries) if one.scheme.is_calibrated]
    return calibrate_activations(model, traced, static, data, batch_size=traced.inputs.shape[0])


def all_rows(
    text: str, model: Model, traced: Trace, data: Dataset, ranges: Mapping[str, ActivationRange] | None = None
) -> tuple[RoundedActivation, ...]:
    """All activations, and all of the KV cache, as `int8_token+int8_head` says; static ranges of `ranges`, or `data`.

    Raises:
      MpqError: no such schemes, rows that they do not suit, or a range that cannot be told.
    """
    return calibrated(_all_entries(text, traced), model, traced, data, ranges, traced.inputs.shape[0])[0]


def _all_entries(text: str, traced: Trace) -> dict[str, dict[str, Any]]:
    """Entries of a plan, of the schemes beside the weights'."""
    return uniform_rows(traced, *split_plan(f"plan+{text}")[1:]) if text else {}
