"""What a plan's rounded activations are to a checkpoint folder: settings of the runtime that rounds them."""

from mpq.activations.apply import RoundedActivation
from mpq.export.orbax import Exported
from mpq.hf.llm_int8 import LLMInt8
from mpq.types import MpqError


def llm_int8_of(exported: Exported) -> LLMInt8:
    """The container of LLM.int8 with the threshold of a plan's activations; bitsandbytes' own where it rounds none.

    Raises:
      MpqError: it rounds others than the inputs of its int8 layers, not all of them alike, or not as LLM.int8 does.
    """
    given = exported.plan.get("activations") or {}
    rows = [RoundedActivation.from_json(row, *exported.of_row(path)) for path, row in given.items()]
    thresholds: dict[str, float] = {}
    for row in rows:
        plain = str(row.scheme).partition("_outlier")[0]
        moved = row.smooth is not None or row.turn is not None
        if row.spec.kind != "activation" or plain != "int8_token" or row.scheme.is_calibrated or moved:
            raise MpqError(
                f"{row.spec.path} at {row.scheme} has no form in llm_int8: it rounds inputs as they are by int8_token, "
                "also with _outlier6 or another threshold"
            )
        thresholds |= dict.fromkeys(row.spec.weights, row.scheme.threshold)
    if not rows:
        return LLMInt8()
    for path, qtensor in exported.qtensors.items():
        if qtensor.scheme.has_scale != (path in thresholds):
            here = "are rounded, and it is a plain float" if path in thresholds else "are not rounded, and it is int8"
            raise MpqError(f"inputs of {path} {here}: llm_int8 rounds those of int8 layers, and of no others")
    first, *others = sorted(set(thresholds.values()))
    if others:
        raise MpqError(f"outliers begin at {first:g} and at {others[0]:g}: llm_int8 has one threshold for all")
    return LLMInt8(first)
