"""What every exporter of a graph does with a quantized model: checks, shapes, metadata, and which use a read is."""

import collections
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import export

from mpq.activations.apply import RoundedActivation
from mpq.activations.rows import ActivationSpec
from mpq.activations.scheme import ActivationScheme
from mpq.export.jaxprs import Param, shape_of
from mpq.export.orbax import Exported
from mpq.inputs import Tokens
from mpq.models import FAMILIES, Model, find_family, functional
from mpq.models.checkpoint import make_model
from mpq.types import MpqError, Scheme, Use, WeightSpec

READS = ("dot_general", "conv_general_dilated", "gather")
LAYOUT = ("reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim", "convert_element_type")


def require_forms(exported: Exported, runtime: str, refusal: Callable[[WeightSpec, Scheme], str | None]) -> None:
    """Refuse a plan with a weight that the runtime cannot have.

    Raises:
      MpqError: names the weight, its scheme and the reason.
    """
    for spec in exported.weights:
        exported.qtensors[spec.path].require_neighbours(spec.path)
        scheme = exported.qtensors[spec.path].scheme
        if reason := refusal(spec, scheme):
            raise MpqError(f"weight {spec.path} at {scheme} has no form in {runtime}: {reason}; choose another plan")


def model_of(exported: Exported, name: str) -> Model:
    """The model with shapes for parameters."""
    family = find_family(exported.config, FAMILIES)
    apply, _ = functional(nnx.eval_shape(lambda: family.build(family.parse(exported.config))))
    return make_model(apply, exported.structs, {}, exported.config, family, None, name)


def open_inputs(model: Model) -> jax.ShapeDtypeStruct:
    """A model's inputs for any batch, and of text any length within its context, in symbols."""
    inputs = model.inputs
    if isinstance(inputs, Tokens):
        limits = ["batch >= 1", "time >= 2", f"time <= {inputs.context}"]
        return jax.ShapeDtypeStruct(export.symbolic_shape("batch, time", constraints=limits), np.int32)
    struct = inputs.struct(1)
    batch = export.symbolic_shape("batch", constraints=["batch >= 1"])
    return jax.ShapeDtypeStruct((*batch, *struct.shape[1:]), struct.dtype)


def described(exported: Exported) -> str:
    """Scheme and shape of every weight, as JSON: what `load` needs beside the tensors."""
    weights = {s.path: [str(exported.qtensors[s.path].scheme), s.k, s.n, s.batch] for s in exported.weights}
    return json.dumps(weights, sort_keys=True)


ROTATED = "inputs that are rotated where they are rounded need a step that it lacks"
"""Why no runtime takes rows of `mpq.activations.turn`."""


def rounded_rows(
    exported: Exported,
    model: Model,
    runtime: str,
    refusal: Callable[[ActivationSpec, ActivationScheme], str | None],
) -> list[RoundedActivation]:
    """The activations that the plan rounds.

    Raises:
      MpqError: the runtime cannot round one of them so.
    """
    rows: list[RoundedActivation] = []
    for path, body in exported.plan.get("activations", {}).items():
        row = RoundedActivation.from_json(body, *exported.of_row(path))
        reason = refusal(row.spec, row.scheme)
        if row.scheme.granularity == "tensor" and row.limits is None and isinstance(model.inputs, Tokens):
            reason = "a range would be that of a whole batch of texts, padding too"
        reason = ROTATED if row.turn is not None else reason
        if reason:
            raise MpqError(f"{path} at {row.scheme} has no form in {runtime}: {reason}; choose another plan")
        rows.append(row)
    return rows


def require_windows_first(row: RoundedActivation, shape: Sequence[Any], batch: Any, runtime: str) -> None:
    """Refuse a range of a window where windows are not the first axis of the value.

    Args:
      row: the activation.
      shape: of its value.
      batch: the dimension of the windows.
      runtime: for the message.

    Raises:
      MpqError: names the activation, and what can be had instead.
    """
    if not shape or str(shape[0]) != str(batch):
        raise MpqError(
            f"{row.spec.path} at {row.scheme} has no form in {runtime}: windows are not its first axis; use "
            f"{row.scheme.of_tokens}, or {row.scheme.number}_tensor_static"
        )


def is_rows_product(eqn: Any, w: Any, spec: WeightSpec) -> bool:
    """Whether a product is that of rows, the last axis of its first operand, with the `[k, n]` of the weight `w`."""
    (contract_x, contract_w), (batch, _) = eqn.params["dimension_numbers"]
    if not isinstance(w, Param) or len(spec.shape) != 2 or batch:
        return False
    last = tuple(contract_x) == (len(shape_of(eqn.invars[0])) - 1,)
    return last and (1 - contract_w[0] if w.transposed else contract_w[0]) == spec.permutation[0]


def feature_axes(eqn: Any, operand: int) -> tuple[int, ...]:
    """Axes of an operand of a product or a convolution that are contracted with the weight."""
    numbers = eqn.params["dimension_numbers"]
    if eqn.primitive.name == "conv_general_dilated":
        return (numbers.lhs_spec[1],)
    return tuple(map(int, numbers[0][operand]))


class PlannedRows:
    """The rounded activations of a plan in one graph; what several weights read is rounded once."""

    def __init__(self, graph: Any, rows: Sequence[RoundedActivation], batch: Any) -> None:
        """Prepare.

        Args:
          graph: to add to.
          rows: of the plan.
          batch: the dimension of the windows.
        """
        self._graph, self._batch = graph, batch
        self._rows = {row.spec.at: row for row in rows}
        self._made: dict[Hashable, Any] = {}

    def of(self, value: str) -> RoundedActivation | None:
        """The row of `Use.input`, if it is rounded."""
        return self._rows.get(value)


class Reads:
    """Which use of a weight an equation is: arrays are followed from the weight through changes of layout."""

    def __init__(self, specs: Mapping[str, WeightSpec]) -> None:
        """Prepare.

        Args:
          specs: parameter path -> the weight that it is.
        """
        self._specs = specs
        self._origins: dict[Hashable, str] = {}
        self._counts = collections.Counter[str]()

    def made(self, value: Hashable, path: str) -> None:
        """`value` is the parameter at this path, laid out in some way."""
        self._origins[value] = path

    def follow(self, eqn: Any, given: Hashable, made: Hashable) -> None:
        """An equation made one value of another."""
        if eqn.primitive.name in LAYOUT and given in self._origins:
            self._origins[made] = self._origins[given]

    def next(self, values: Sequence[Any]) -> tuple[WeightSpec, Use, int] | None:
        """The weight among two operands, which of its uses this is, and its place; None where there is none."""
        known = [v for v in values if not isinstance(v, np.ndarray)]
        paths = [v.path if isinstance(v, Param) else self._origins.get(v) for v in known]
        if len(paths) != 2 or (path := next((p for p in paths if p in self._specs), None)) is None:
            return None
        spec = self._specs[path]
        self._counts[path] += 1
        return spec, spec.uses[self._counts[path] - 1], paths.index(path)

    def require_all(self) -> None:
        """Which value a weight reads is known by the number of the read: none must have been missed."""
        assert all(self._counts[spec.param] == len(spec.uses) for spec in self._specs.values())
