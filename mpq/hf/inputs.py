"""What a plan's rounded activations are to a checkpoint folder: settings of the runtime that rounds them."""

from collections.abc import Callable, Sequence

from mpq.activations.apply import RoundedActivation
from mpq.activations.rows import ActivationSpec
from mpq.activations.scheme import ActivationScheme
from mpq.export.orbax import Exported
from mpq.hf.compressed_tensors import CompressedTensors, has_rounded_inputs
from mpq.hf.llm_int8 import LLMInt8
from mpq.types import MpqError, Scheme

Refusal = Callable[[ActivationSpec, ActivationScheme], str | None]


def llm_int8_refusal(row: ActivationSpec, scheme: ActivationScheme) -> str | None:
    """Why LLM.int8 cannot round a row so; None where it can."""
    plain = str(scheme).partition("_outlier")[0] == "int8_token" and not scheme.fixed
    return None if row.kind == "activation" and plain else "inputs are rounded there as they are, by int8_token"


def compressed_tensors_refusal(row: ActivationSpec, scheme: ActivationScheme) -> str | None:
    """Why compressed-tensors cannot round a row so; None where it can."""
    static = scheme.static is not None and scheme.granularity == "tensor" and scheme.number == "int8"
    if row.kind == "activation" and (static or str(scheme) == "int8_token"):
        return None
    if scheme.threshold:
        return f"outliers begin at {scheme.threshold:g}, and it keeps none in floating point; use int8_token"
    return "inputs are rounded there as they are, by int8_token, int8_tensor_static or int8_tensor_static_asym"


def llm_int8_of(exported: Exported) -> LLMInt8:
    """The container of LLM.int8 with the threshold of a plan's activations; bitsandbytes' own where it rounds none.

    Raises:
      MpqError: it rounds others than the inputs of its int8 layers, not all of them alike, or not as LLM.int8 does.
    """
    rows = _rows(exported, "llm_int8", llm_int8_refusal, lambda scheme: scheme.has_scale)
    thresholds = sorted({row.scheme.threshold for row in rows})
    if len(thresholds) > 1:
        first, second, *_ = thresholds
        raise MpqError(f"outliers begin at {first:g} and at {second:g}: llm_int8 has one threshold for all")
    return LLMInt8(thresholds[0]) if thresholds else LLMInt8()


def compressed_tensors_of(exported: Exported) -> CompressedTensors:
    """The container of compressed-tensors, with W8A8 where a plan rounds activations.

    Raises:
      MpqError: it rounds others than the inputs of its symmetric int8 layers, or not all of them, or otherwise.
    """
    rows = _rows(exported, "hf", compressed_tensors_refusal, has_rounded_inputs)
    ranges: dict[str, tuple[float, int | None]] = {}
    for row in (row for row in rows if row.scheme.static is not None):
        scale, zero = row.step
        ranges |= dict.fromkeys(row.spec.weights, (scale, zero if row.scheme.asymmetric else None))
    return CompressedTensors(rounds=bool(rows), ranges=ranges)


def _rows(
    exported: Exported, name: str, refusal: Refusal, rounds: Callable[[Scheme], bool]
) -> Sequence[RoundedActivation]:
    """The activations that a plan rounds, where they are those that the runtime `name` does."""
    given = exported.plan.get("activations") or {}
    rows = [RoundedActivation.from_json(row, *exported.of_row(path)) for path, row in given.items()]
    for row in rows:
        moved = "inputs are rounded there as they are, neither divided nor rotated"
        reason = moved if row.smooth is not None or row.turn is not None else refusal(row.spec, row.scheme)
        if reason:
            raise MpqError(f"{row.spec.path} at {row.scheme} has no form in {name}: {reason}")
    rounded = {path for row in rows for path in row.spec.weights}
    for path, qtensor in exported.qtensors.items() if rows else ():
        if rounds(qtensor.scheme) != (path in rounded):
            here = "are rounded" if path in rounded else "are not rounded"
            raise MpqError(
                f"inputs of {path} at {qtensor.scheme} {here}: {name} rounds all of int8 by channel, or none, and of "
                "no others"
            )
    return rows
