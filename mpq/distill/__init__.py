"""Training what a quantized model stores, codes, scales and zero points, against the outputs of the original."""

from mpq.distill.latent import Latent as Latent
from mpq.distill.latent import freeze as freeze
from mpq.distill.latent import reconstruct as reconstruct
from mpq.distill.latent import start as start
from mpq.distill.loop import Distill as Distill
from mpq.distill.loop import Distilled as Distilled
