"""Activations and the KV cache, scored like weights: rows of a trace, dynamic rounding schemes, and two metrics.

    rows = activation_rows(traced)                # or kv_rows(traced)
    schemes = tuple(map(parse_activation_scheme, ("int8_token", "int4_token")))
    table = ACTIVATION_METRICS["kl"](model, traced, rows, schemes, data, key=jax.random.key(0), batch_size=8)

`kl` measures and is the ground truth, `fisher` predicts all pairs from one backward pass a batch; both in nats per
output with standard errors over documents. Static schemes such as `int8_tensor_static` take their ranges from

    ranges = calibrate_activations(model, traced, rows, data, batch_size=8)
"""

from collections.abc import Mapping
from types import MappingProxyType

from mpq.activations.base import ActivationMetric
from mpq.activations.fisher import ActivationFisher
from mpq.activations.measured_kl import ActivationKL
from mpq.activations.ranges import ActivationRange, calibrate_activations
from mpq.activations.rows import KEYS_AND_VALUES, ActivationSpec, activation_rows, kv_rows
from mpq.activations.scheme import ActivationScheme, fake_quantize, parse_activation_scheme
from mpq.activations.table import ActivationTable, load_activation_table, save_activation_table

__all__ = [
    "ACTIVATION_METRICS",
    "KEYS_AND_VALUES",
    "ActivationFisher",
    "ActivationKL",
    "ActivationMetric",
    "ActivationRange",
    "ActivationScheme",
    "ActivationSpec",
    "ActivationTable",
    "activation_rows",
    "calibrate_activations",
    "fake_quantize",
    "kv_rows",
    "load_activation_table",
    "parse_activation_scheme",
    "save_activation_table",
]

ACTIVATION_METRICS: Mapping[str, ActivationMetric] = MappingProxyType(
    {"kl": ActivationKL(), "fisher": ActivationFisher()}
)
