"""Sensitivity metrics: the predicted loss increase, in nats per token, of every weight at every scheme.

`METRICS` is the table of all of them. `kl` measures and is the ground truth; the others predict it from curvature.
"""

from collections.abc import Mapping
from types import MappingProxyType

from mpq.sensitivity.base import MemoryStore, Metric, Store
from mpq.sensitivity.fisher import Fisher
from mpq.sensitivity.hessian_trace import HessianTrace
from mpq.sensitivity.measured_kl import MeasuredKL

__all__ = ["METRICS", "Fisher", "HessianTrace", "MeasuredKL", "MemoryStore", "Metric", "Store"]

METRICS: Mapping[str, Metric] = MappingProxyType(
    {"kl": MeasuredKL(), "fisher": Fisher(), "hessian_trace": HessianTrace()}
)
