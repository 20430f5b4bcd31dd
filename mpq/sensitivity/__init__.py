"""Sensitivity metrics: the predicted loss increase, in nats per output, of every weight at every scheme.

`METRICS` is the table of all of them. `kl` measures and is the ground truth, `loss` measures against the data's labels.
The others predict: from curvature, from gradients, or, cheapest, from proxies that one measured plan gives their unit
(`mpq.sensitivity.anchor`).

`Interactions` is no metric: it is what the errors of two weights cost together, which a table of single weights lacks.
"""

from collections.abc import Mapping
from types import MappingProxyType

from mpq.sensitivity.activation_mse import Imatrix
from mpq.sensitivity.aumann_shapley import AumannShapley
from mpq.sensitivity.base import Coupling, Metric
from mpq.sensitivity.delta_loss import DeltaLoss
from mpq.sensitivity.empirical_fisher import EmpiricalFisher
from mpq.sensitivity.exllamav2 import ExLlamaV2
from mpq.sensitivity.exllamav3 import ExLlamaV3
from mpq.sensitivity.first_order import FirstOrder
from mpq.sensitivity.fisher import Fisher
from mpq.sensitivity.gauss_newton import GaussNewton
from mpq.sensitivity.hessian_form import HessianForm
from mpq.sensitivity.hessian_trace import HessianTrace
from mpq.sensitivity.higgs import Higgs
from mpq.sensitivity.interactions import Interactions, InteractionTable
from mpq.sensitivity.layer_error import LayerError
from mpq.sensitivity.measured_kl import MeasuredKL
from mpq.sensitivity.measured_loss import MeasuredLoss
from mpq.sensitivity.mlx_alignment import MLXAlignment
from mpq.sensitivity.modelopt_gradient import ModelOptGradient
from mpq.sensitivity.nncf import NNCF
from mpq.sensitivity.snr import SNR
from mpq.sensitivity.top_eigenvalue import TopEigenvalue
from mpq.sensitivity.weight_mse import WeightMSE
from mpq.store import MemoryStore, Store

__all__ = [
    "METRICS",
    "NNCF",
    "SNR",
    "AumannShapley",
    "Coupling",
    "DeltaLoss",
    "EmpiricalFisher",
    "ExLlamaV2",
    "ExLlamaV3",
    "FirstOrder",
    "Fisher",
    "GaussNewton",
    "HessianForm",
    "HessianTrace",
    "Higgs",
    "Imatrix",
    "InteractionTable",
    "Interactions",
    "LayerError",
    "MLXAlignment",
    "MeasuredKL",
    "MeasuredLoss",
    "MemoryStore",
    "Metric",
    "ModelOptGradient",
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
        "aumann_shapley": AumannShapley(),
        "higgs": Higgs(),
        "first_order": FirstOrder(),
        "delta_loss": DeltaLoss(),
        "modelopt_gradient": ModelOptGradient(),
        "layer_error": LayerError(),
        "nncf": NNCF(),
        "mlx_alignment": MLXAlignment(),
        "exllamav2": ExLlamaV2(),
        "exllamav3": ExLlamaV3(),
    }
)
