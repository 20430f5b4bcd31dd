"""Sensitivity metrics: the predicted loss increase, in nats per output, of every weight at every scheme.

`METRICS` is the table of all of them. `kl` measures and is the ground truth, `loss` measures against the data's labels.
The others predict: from curvature, from gradients, or, cheapest, from proxies that one measured plan gives their unit
(`mpq.sensitivity.anchor`).
"""

from collections.abc import Mapping
from types import MappingProxyType

from mpq.sensitivity.activation_mse import Imatrix
from mpq.sensitivity.base import Coupling, MemoryStore, Metric, Store
from mpq.sensitivity.empirical_fisher import EmpiricalFisher
from mpq.sensitivity.fisher import Fisher
from mpq.sensitivity.gauss_newton import GaussNewton
from mpq.sensitivity.hessian_form import HessianForm
from mpq.sensitivity.hessian_trace import HessianTrace
from mpq.sensitivity.layer_error import LayerError
from mpq.sensitivity.measured_kl import MeasuredKL
from mpq.sensitivity.measured_loss import MeasuredLoss
from mpq.sensitivity.snr import SNR
from mpq.sensitivity.top_eigenvalue import TopEigenvalue
from mpq.sensitivity.weight_mse import WeightMSE

__all__ = [
    "METRICS",
    "SNR",
    "Coupling",
    "EmpiricalFisher",
    "Fisher",
    "GaussNewton",
    "HessianForm",
    "HessianTrace",
    "Imatrix",
    "LayerError",
    "MeasuredKL",
    "MeasuredLoss",
    "MemoryStore",
    "Metric",
    "Store",
    "TopEigenvalue",
    "WeightMSE",
]

METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "kl": MeasuredKL(),
        "fisher": Fisher(),
        "hessian_trace": HessianTrace(),
        "loss": MeasuredLoss(),
        "empirical_fisher": EmpiricalFisher(),
        "gauss_newton": GaussNewton(),
        "hessian": HessianForm(),
        "top_eigenvalue": TopEigenvalue(),
        "weight_mse": WeightMSE(),
        "snr": SNR(),
        "imatrix": Imatrix(),
        "layer_error": LayerError(),
    }
)
