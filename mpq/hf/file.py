"""A safetensors file and its size, known to the byte before anything is quantized.

The file is 8 bytes, a JSON header filled up with spaces to a multiple of 8, and the tensors, the widest types first and
those of a type by name (safetensors' `docs` and `src/tensor.rs`).
"""

import json
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from mpq.hf.container import Part

METADATA = {"format": "pt"}
DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int8": "I8",
    "uint8": "U8",
}


def nbytes(part: Part) -> int:
    """Bytes of one tensor."""
    return int(np.prod(part.shape, dtype=np.int64)) * np.dtype(getattr(ml_dtypes, part.dtype, part.dtype)).itemsize


def predicted_bytes(parts: Mapping[str, Part]) -> int:
    """Bytes of a file of these tensors, by name."""
    # An enumeration of the library's orders types of equal width; BF16 comes after F16 in it, F32 after I32.
    rank = list(reversed(["U8", "I8", "F16", "BF16", "I32", "F32", "I64"]))
    order = sorted(parts, key=lambda name: (rank.index(DTYPES[parts[name].dtype]), name))
    header: dict[str, Any] = {"__metadata__": METADATA}
    end = 0
    for name in order:
        start, end = end, end + nbytes(parts[name])
        header[name] = {
            "dtype": DTYPES[parts[name].dtype],
            "shape": list(parts[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + end
