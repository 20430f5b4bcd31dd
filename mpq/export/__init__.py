"""Exporters: a quantized model as files, and back. Each is a module with `save`, `load` and `payload_bytes`."""

from collections.abc import Mapping
from types import MappingProxyType, ModuleType

from mpq.export import orbax

EXPORTERS: Mapping[str, ModuleType] = MappingProxyType({"orbax": orbax})
