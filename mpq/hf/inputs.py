"""What a plan's rounded activations are to a checkpoint folder: settings of the runtime that rounds them."""

from collections.abc import Callable

from mpq.activations.apply import RoundedActivation
from mpq.export.orbax import Exported
from mpq.hf.compressed_tensors import CompressedTensors, has_rounded_inputs
from mpq.hf.llm_int8 import LLMInt8
from mpq.types import MpqError, Scheme


def llm_int8_of(exported: Exported) -> LLMInt8:
    """The container of LLM.int8 with the threshold of a plan's activations; bitsandbytes' own where it rounds none.

    Raises:
      MpqError: it rounds others than the inputs of its int8 layers, not all of them alike, or not as LLM.int8 does.
    """
    thresholds = _thresholds(exported, "llm_int8", lambda scheme: scheme.has_scale)
    if len(thresholds) > 1:
        first, second, *_ = thresholds
        raise MpqError(f"outliers begin at {first:g} and at {second:g}: llm_int8 has one threshold for all")
    return LLMInt8(thresholds[0]) if thresholds else LLMInt8()


def compressed_tensors_of(exported: Exported) -> CompressedTensors:
    """The container of compressed-tensors, with W8A8 where a plan rounds activations.

    Raises:
      MpqError: it rounds others than the inputs of its symmetric int8 layers, or not all of them, or keeps outliers.
    """
    thresholds = _thresholds(exported, "hf", has_rounded_inputs)
    if any(thresholds):
        raise MpqError(f"outliers begin at {thresholds[-1]:g}: hf keeps none in floating point; use int8_token")
    return CompressedTensors(rounds=bool(thresholds))


def _thresholds(exported: Exported, name: str, rounds: Callable[[Scheme], bool]) -> list[float]:
    """Of all outliers, in order; 0 for none, and nothing where no activation is rounded."""
    given = exported.plan.get("activations") or {}
    rows = [RoundedActivation.from_json(row, *exported.of_row(path)) for path, row in given.items()]
    thresholds: dict[str, float] = {}
    for row in rows:
        plain = str(row.scheme).partition("_outlier")[0]
        moved = row.smooth is not None or row.turn is not None
        if row.spec.kind != "activation" or plain != "int8_token" or row.scheme.is_calibrated or moved:
            raise MpqError(
                f"{row.spec.path} at {row.scheme} has no form in {name}: inputs are rounded there as they are, by "
                "int8_token"
            )
        thresholds |= dict.fromkeys(row.spec.weights, row.scheme.threshold)
    for path, qtensor in exported.qtensors.items() if rows else ():
        if rounds(qtensor.scheme) != (path in thresholds):
            here = "are rounded" if path in thresholds else "are not rounded"
            raise MpqError(
                f"inputs of {path} at {qtensor.scheme} {here}: {name} rounds all of int8 by channel, or none, and of "
                "no others"
            )
    return sorted(set(thresholds.values()))
