"""What every runtime's graph takes from a jaxpr: calls opened, constants computed, transposed parameters followed."""

import ast
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from mpq.types import MpqError

CALLS = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat")
SHAPES = ("reshape", "broadcast_in_dim", "squeeze", "expand_dims")
THROUGH = ("copy", "copy_p", "stop_gradient", "optimization_barrier")
T = TypeVar("T")
Emit = Callable[[Any, list[Any]], list[Any]]
"""Equation and values of what it reads -> values of what it gives."""


@dataclasses.dataclass(frozen=True)
class Param:
    """A parameter that nothing was done to but perhaps a transposition of its two axes."""

    path: str
    transposed: bool = False


class Known(np.ndarray):
    """The values of a parameter, which says where they are from as long as only their shape changes."""

    path: str

    @classmethod
    def of(cls, values: np.ndarray, path: str) -> "Known":
        """Values of the parameter at this path."""
        made = np.ascontiguousarray(values).view(cls)
        made.path = path
        return made


def dtype_of(var: Any) -> np.dtype:
    """Of a variable of a jaxpr."""
    return np.dtype(var.aval.dtype)


def shape_of(var: Any) -> tuple[Any, ...]:
    """Of a variable of a jaxpr; dimensions may be symbolic."""
    return tuple(var.aval.shape)


def arithmetic(
    dim: Any, symbols: Mapping[str, T], constant: Callable[[int], T], operation: Callable[..., T], runtime: str
) -> T:
    """A symbolic dimension, as JAX writes it, in the values of a graph.

    Args:
      dim: sums and products of named dimensions and numbers.
      symbols: name of a dimension -> its value.
      constant: number -> its value.
      operation: `Add`, `Sub`, `Mul` or `Neg` and its operands -> value.
      runtime: for the message.

    Raises:
      MpqError: it is none.
    """

    def value(node: ast.expr) -> T:
        kinds = {ast.Add: "Add", ast.Sub: "Sub", ast.Mult: "Mul"}
        if isinstance(node, ast.Name):
            return symbols[node.id]
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return constant(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return operation("Neg", value(node.operand))
        if isinstance(node, ast.BinOp) and type(node.op) in kinds:
            return operation(kinds[type(node.op)], value(node.left), value(node.right))
        raise MpqError(f"a dimension {ast.unparse(node)} has no form in {runtime} here: sums and products have")

    return value(ast.parse(str(dim), mode="eval").body)


def trace_open(
    apply: Callable[..., Any], params: Mapping[str, Any], inputs: Sequence[jax.ShapeDtypeStruct], cannot: str
) -> Any:
    """The closed jaxpr of a model, parameters first, for inputs of shapes with symbolic dimensions.

    Args:
      apply: parameters and inputs -> what is traced.
      params: path -> array, or its shape and dtype.
      inputs: their shapes.
      cannot: for which sizes it must not compute otherwise, and what cannot have that.

    Raises:
      MpqError: the function depends on an open dimension otherwise than by sums and products.
    """
    structs = {path: jax.ShapeDtypeStruct(p.shape, p.dtype) for path, p in params.items()}
    try:
        return jax.make_jaxpr(apply)(structs, *inputs)
    except jax.errors.InconclusiveDimensionOperation as error:
        reason = str(error).split("\n")[0].split(". ")[0].rstrip(".")
        raise MpqError(f"the model computes otherwise for other {cannot}: {reason}") from error


def product_equation(eqn: Any) -> str | None:
    """A `dot_general` as the equation of an einsum, `ab,bc->ac`; None where it is a plain product of matrices."""
    (contract_a, contract_b), (batch_a, batch_b) = eqn.params["dimension_numbers"]
    a, b = shape_of(eqn.invars[0]), shape_of(eqn.invars[1])
    if not batch_a and len(b) == 2 and tuple(contract_a) == (len(a) - 1,) and tuple(contract_b) == (0,):
        return None
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    left = [next(letters) for _ in a]
    right = [next(letters) for _ in b]
    for i, j in [*zip(contract_a, contract_b, strict=True), *zip(batch_a, batch_b, strict=True)]:
        right[j] = left[i]
    free_a = [left[i] for i in range(len(a)) if i not in (*contract_a, *batch_a)]
    free_b = [right[j] for j in range(len(b)) if j not in (*contract_b, *batch_b)]
    return f"{''.join(left)},{''.join(right)}->{''.join([*(left[i] for i in batch_a), *free_a, *free_b])}"


def walk(jaxpr: Any, consts: Any, args: list[Any], emit: Emit, *, folded: int) -> list[Any]:
    """Values of the outputs of a jaxpr.

    Args:
      jaxpr: what is opened at every call.
      consts: of the jaxpr.
      args: a value for every input: `np.ndarray` where it is known, `Param`, or whatever `emit` gives.
      emit: makes what is neither known nor a mere call, copy or transposition.
      folded: most elements of a constant that is computed here and not in the graph.
    """
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, map(np.asarray, consts), strict=True))
    env |= dict(zip(jaxpr.invars, args, strict=True))
    read = lambda var: np.asarray(var.val, dtype_of(var)) if hasattr(var, "val") else env[var]
    for eqn in jaxpr.eqns:
        values = [read(var) for var in eqn.invars]
        env |= dict(zip(eqn.outvars, _equation(eqn, values, emit, folded), strict=True))
    return [read(var) for var in jaxpr.outvars]


def _equation(eqn: Any, values: list[Any], emit: Emit, folded: int) -> list[Any]:
    name = eqn.primitive.name
    if name in CALLS:
        inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr") or eqn.params["fun_jaxpr"]
        closed = hasattr(inner, "consts")
        return walk(inner.jaxpr if closed else inner, inner.consts if closed else (), values, emit, folded=folded)
    if name in THROUGH:
        return values
    if name == "convert_element_type" and dtype_of(eqn.invars[0]) == np.dtype(eqn.params["new_dtype"]):
        return values
    if name == "transpose" and isinstance(values[0], Param) and eqn.params["permutation"] == (1, 0):
        return [dataclasses.replace(values[0], transposed=not values[0].transposed)]
    if (known := fold(eqn, values, folded)) is not None:
        return known
    if (same := unchanged(eqn, values)) is not None:
        return [same]
    return emit(eqn, values)


def unchanged(eqn: Any, values: list[Any]) -> Any:
    """What a sum with zeros or a product with ones leaves as it is; None where an equation is none of these."""
    neutral = {"add": 0, "sub": 0, "mul": 1, "div": 1}.get(eqn.primitive.name)
    if neutral is None:
        return None
    places = (0,) if eqn.primitive.name in ("sub", "div") else (0, 1)
    for place in places:
        by, same = values[1 - place], shape_of(eqn.invars[place]) == shape_of(eqn.outvars[0])
        if same and isinstance(by, np.ndarray) and not isinstance(values[place], np.ndarray) and (by == neutral).all():
            return values[place]
    return None


def fold(eqn: Any, values: list[Any], most: int) -> list[Any] | None:
    """What an equation gives, where all that it reads is known and nothing of it is symbolic or large."""
    if not all(isinstance(value, np.ndarray) for value in values) or eqn.primitive.name == "dim_as_value":
        return None
    sizes = [shape_of(var) for var in eqn.outvars]
    if not all(isinstance(size, int) for shape in sizes for size in shape):
        return None
    if any(int(np.prod(shape)) > most for shape in sizes):
        return None
    first = values[0] if values else None
    if eqn.primitive.name in SHAPES and isinstance(first, Known) and np.prod(sizes[0], dtype=int) == first.size:
        return [Known.of(first.reshape(sizes[0]), first.path)]
    made = eqn.primitive.bind(*map(jax.numpy.asarray, values), **eqn.params)
    return [np.asarray(m) for m in (made if eqn.primitive.multiple_results else [made])]
