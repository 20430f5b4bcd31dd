"""Every container, by its name in `mpq export --to`."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from mpq.hf.awq import AWQFormat
from mpq.hf.bitsandbytes import BitsAndBytes
from mpq.hf.compressed_tensors import CompressedTensors
from mpq.hf.container import Container, Reader
from mpq.hf.gptq import GPTQFormat
from mpq.hf.llm_int8 import LLMInt8
from mpq.types import MpqError

CONTAINERS: Mapping[str, Container] = MappingProxyType(
    {
        "hf": CompressedTensors(),
        "gptq": GPTQFormat(1),
        "gptq_v2": GPTQFormat(2),
        "awq": AWQFormat(),
        "bnb": BitsAndBytes(),
        "llm_int8": LLMInt8(),
    }
)
"""Name -> container."""

_METHODS = {"compressed-tensors": "hf", "gptq": "gptq", "awq": "awq", "bitsandbytes": "bnb"}


def reader_of(config: Mapping[str, Any]) -> Reader:
    """What reads a checkpoint whose `config.json` has this `quantization_config`.

    Raises:
      MpqError: a method that is not read, or a part of it.
    """
    method = config.get("quant_method")
    if method is None and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        method = "bitsandbytes"  # which says so only since 2023
    if method not in _METHODS:
        raise MpqError(f"quantization method {method!r} is not read: supported is {', '.join(_METHODS)}")
    return CONTAINERS[_METHODS[method]].reader(config)
