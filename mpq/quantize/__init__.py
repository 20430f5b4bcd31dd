"""Rounding algorithms: arrays in, `QTensor` out. `QUANTIZERS` is the table of all of them."""

from collections.abc import Mapping
from types import MappingProxyType

from mpq.quantize.adaround import AdaRound
from mpq.quantize.best import Best
from mpq.quantize.candidates import Candidates as Candidates
from mpq.quantize.candidates import apply_plan as apply_plan
from mpq.quantize.candidates import dequantize as dequantize
from mpq.quantize.gptq import GPTQ
from mpq.quantize.hqq import HQQ
from mpq.quantize.quantizer import Quantizer
from mpq.quantize.rtn import RTN
from mpq.quantize.signround import SignRound

QUANTIZERS: Mapping[str, Quantizer] = MappingProxyType(
    {
        "rtn": RTN(),
        "hqq": HQQ(),
        "gptq": GPTQ(),
        "gptq_act_order": GPTQ(act_order=True),
        "signround": SignRound(),
        "adaround": AdaRound(),
        "best": Best(),
    }
)
