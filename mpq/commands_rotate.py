"""What `mpq rotate` does, and what `mpq quantize --rotate` makes of a plan and tells."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from mpq import artifacts
from mpq.activations import activation_rows
from mpq.commands import Data
from mpq.equalize import Rotated
from mpq.equalize import rotate as rotate_model
from mpq.models import load, save_orbax
from mpq.types import MpqError


def rotate(model_source: str, text: Data, out: Path, seed: int) -> dict[str, Any]:
    """The rotated model as a folder that every other stage reads."""
    model = load(model_source)
    if out.exists():
        raise MpqError(f"{out} exists already: choose another folder or remove it")
    found = rotate_model(model, text.trace(model), text.dataset(model, "calibration"), jax.random.key(seed))
    save_orbax(found.model, out)
    told = {"out": str(out), **told_of(found), "size_bytes": found.model.size_bytes}
    return told | ({"warnings": warnings} if (warnings := warnings_of(found)) else {})


def told_of(found: Rotated) -> dict[str, Any]:
    """Width of the stream that was rotated, attention layers whose values were, the change as a part of its bound."""
    width = 0 if found.stream is None else found.stream.width
    turned = {"rotated_stream": width, "rotated_values": len(found.heads)}
    return {**turned, "change_of_bound": found.change / found.bound if found.bound else 0.0}


def warnings_of(found: Rotated) -> list[str]:
    """What a person should know of it."""
    said = []
    if found.refusal is not None:
        said.append(f"values of heads are rotated alone: {found.refusal}")
    if found.untied is not None:
        table, head = found.untied
        said.append(f"`{head}` is a table of its own now, for the scale of the last norm cannot go into `{table}`")
    return said


def plan_after(found: Rotated, plan: artifacts.Plan) -> artifacts.Plan:
    """The plan for the rotated model: a head of its own takes the scheme of the table it was."""
    model, weights = found.model, found.traced.weights
    table, head = found.untied or ("", "")
    choices = {spec.path: plan.choices[table if spec.path == head else spec.path] for spec in weights}
    rows = dict(plan.activations)
    if found.untied is not None:  # values have other names in a trace of other parameters
        read = {row.weights: row for row in activation_rows(found.traced)}
        for path, entry in plan.activations.items():
            if entry["kind"] == "activation":
                row = read[tuple(head if one == table else one for one in entry["weights"])]
                rows.pop(path)
                rows[row.path] = {**entry, **dataclasses.asdict(row)}
    beside = artifacts.other_bits(model, weights)
    return artifacts.make_plan(plan.name, choices, plan.prediction, weights, beside, model.digest, rows)
