"""Plain data into dataclasses, checked by their type hints; what is wrong is named by its place."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from mpq.types import MpqError

_TYPE_NAMES = {
    tuple: "a list",
    Mapping: "an object",
    float: "a number",
    int: "a whole number",
    str: "text",
    bool: "true or false",
}


def read(hint: Any, value: Any, where: str, keys: Mapping[str, str]) -> Any:
    """`value` as the type `hint`: a dataclass, `X | None`, a literal, tuple, mapping, number, text or truth value.

    Args:
      hint: the type.
      value: plain data, as JSON gives it.
      where: its place, such as `plans[0].kl`, for the message.
      keys: keys of the fields whose metadata has `by_task`, by field; the key of any other field is its name.

    Returns:
      The value, objects as dataclasses and lists as tuples; unknown keys are left out.

    Raises:
      MpqError: a key is missing, or a value has another type; the place is named.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:  # only `X | None` occurs
        return None if value is None else read(arguments[0], value, where, keys)
    if origin is Literal:
        return value if value in arguments else _refuse(where, value, " or ".join(map(repr, arguments)))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _read_object(hint, value, where, keys)
    if origin is tuple and isinstance(value, list):
        return tuple(read(arguments[0], item, f"{where}[{i}]", keys) for i, item in enumerate(value))
    if origin is Mapping and isinstance(value, Mapping):
        return {key: read(arguments[1], item, f"{where}.{key}", keys) for key, item in value.items()}
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if math.isfinite(value) else _refuse(where, value, "a finite number")
    if hint in (int, str, bool) and type(value) is hint:
        return value
    return _refuse(where, value, _TYPE_NAMES[origin or hint])


def _read_object(cls: type, value: Any, where: str, keys: Mapping[str, str]) -> Any:
    if not isinstance(value, Mapping):
        return _refuse(where, value, "an object")
    hints, arguments = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        key = keys[field.name] if field.metadata.get("by_task") else field.name
        place = f"{where}.{key}" if where else key
        if key in value:
            arguments[field.name] = read(hints[field.name], value[key], place, keys)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise MpqError(f"result: {place} is missing")
    return cls(**arguments)


def _refuse(where: str, value: Any, wanted: str) -> typing.NoReturn:
    shown = repr(value)
    raise MpqError(f"result: {where} is {shown if len(shown) <= 60 else shown[:57] + '...'}, not {wanted}")
