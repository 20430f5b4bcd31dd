"""One decoder for many families: a `DecoderConfig` describes a model, `Decoder` computes it, a family file reads it.

A family that this decoder covers is a file beside this package with two things: a parser from `config.json` to a
`DecoderConfig`, and a table of the names that its checkpoints use.
"""

from mpq.models.decoders.cache import Cache
from mpq.models.decoders.config import DecoderConfig, ExpertsConfig
from mpq.models.decoders.modules import Decoder
from mpq.models.decoders.rope import Rope
from mpq.models.decoders.slots import Slots

__all__ = ["Cache", "Decoder", "DecoderConfig", "ExpertsConfig", "Rope", "Slots"]
