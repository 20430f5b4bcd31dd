"""Training against the outputs of the original: what a quantized model stores, and which bits its weights get."""

from mpq.distill.harmless import distill_harmless as distill_harmless
from mpq.distill.latent import Latent as Latent
from mpq.distill.latent import freeze as freeze
from mpq.distill.latent import reconstruct as reconstruct
from mpq.distill.latent import start as start
from mpq.distill.loop import Distill as Distill
from mpq.distill.loop import Distilled as Distilled
from mpq.distill.mixture import Mixed as Mixed
from mpq.distill.mixture import Mixture as Mixture
from mpq.distill.shard import Devices as Devices
