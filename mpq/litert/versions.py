"""Versions of LiteRT's operators: the least that has what is asked, so that an older runtime refuses in a sentence.

The rules are those of LiteRT's converter (`tools/versioning/op_version.cc`) for what is written here.
"""

from collections.abc import Sequence

_INT8 = {"ADD": 2, "CONV_2D": 3, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 4, "BATCH_MATMUL": 2, "RESHAPE": 1}
_WEIGHTS = {
    "DEQUANTIZE": {"int8": 5, "int4": 6, "int2": 7, "float16": 3},
    "EMBEDDING_LOOKUP": {"int8": 4, "int4": 4, "int2": 5},
    "FULLY_CONNECTED": {"int8": 12, "int4": 12, "int2": 14, "float32": 5},
    "CONV_2D": {"int8": 5},
    "DEPTHWISE_CONV_2D": {"int8": 6},
}
_RANK = {"SUB": 3, "DIV": 2, "MAXIMUM": 3, "MINIMUM": 3, "STRIDED_SLICE": 4, "PAD": 4, "PADV2": 4, "SLICE": 5}
_BOOL = {"TRANSPOSE": 3, "STRIDED_SLICE": 3, "GATHER": 3}
_INT8_VERSION_1 = ("RESHAPE", "QUANTIZE", "DEQUANTIZE")


def version_of(kind: str, types: Sequence[str], rank: int, output: str) -> int:
    """The version of an operator.

    Args:
      kind: its name in `BuiltinOperator`.
      types: dtypes of its inputs.
      rank: most dimensions of an input.
      output: dtype of its first output.
    """
    found = 2 if kind == "BROADCAST_TO" else 1
    if types[0] == "int8" and kind not in _INT8_VERSION_1:
        found = max(found, _INT8.get(kind, 2))
    if types[0] == "int8" and kind in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED") and types[1] == "int4":
        found = max(found, 10 if kind == "FULLY_CONNECTED" else 7)
    if kind in _WEIGHTS and output == "float32":
        weight = types[0] if kind == "DEQUANTIZE" else types[1]
        found = max(found, _WEIGHTS[kind].get(weight, 1))
    if types[0] == "bool":
        found = max(found, _BOOL.get(kind, 1))
    if kind == "TRANSPOSE" and rank > 4:
        found = max(found, 4 if rank == 5 else 6)
    return max(found, _RANK.get(kind, 1)) if rank > 4 else found
