"""Rules for qwix in qwix itself: every weight of a Flax model is stored as the plan says."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import qwix
from flax import nnx

from mpq.export import rules
from mpq.formats import parse_scheme
from mpq.models import functional
from mpq.models.llama import Llama
from mpq.trace import trace
from tests.conftest import TINY

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix.*"),  # it uses what Flax is about to drop
]

SCHEMES = ("int4_g16", "int8_channel", "int3_channel", "int4_g16_zp", "nf4_g16", "bf16", "fp8_e4m3_channel")
SCHEMES += ("int8_channel_zp", "int2_g16", "fp4_g16", "int6_g16", "fp8_e5m2_g16")
TYPES = {"fp4": "float4_e2m1fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}


@pytest.mark.parametrize("alike", ["no weights", "parts of all layers"])
def test_a_plan_is_what_qwix_stores(alike):
    module = Llama(dataclasses.replace(TINY, tie_word_embeddings=False), rngs=nnx.Rngs(0))
    tokens = jnp.zeros((1, 8), jnp.int32)
    weights = trace(*functional(module), tokens).weights
    parts = dict.fromkeys(spec.path if alike == "no weights" else spec.path.split(".")[-2] for spec in weights)
    of = {part: parse_scheme(SCHEMES[i % len(SCHEMES)]) for i, part in enumerate(parts)}
    choices = {spec.path: of.get(spec.path) or of[spec.path.split(".")[-2]] for spec in weights}
    written = rules.qwix(choices, weights)
    assert len(written) == len(parts)
    provider = qwix.PtqProvider([qwix.QuantizationRule(**rule) for rule in written])
    with jax.numpy_dtype_promotion("standard"):  # qwix divides integers by floats
        quantized = qwix.quantize_model(module, provider, tokens)
    found = {".".join(map(str, path)): node for path, node in nnx.iter_graph(quantized) if hasattr(node, "how")}
    for spec in weights:
        scheme = choices[spec.path]
        if not scheme.has_scale or spec.kind == "embedding":  # it has no form of a lookup
            assert spec.path not in found
            continue
        how, array = found[spec.path].how, found[spec.path].array
        assert how.qtype == TYPES.get(scheme.format.name, scheme.format.name), spec.path
        assert (how.channelwise_axes, how.tiled_axes) == ([1], {0: scheme.group_size} if scheme.group_size else {})
        assert array.scale.get_value().shape == (scheme.num_groups(spec.k), spec.n)
        assert (array.zero_point is not None) == scheme.zero_point
    assert [rule.module_path for rule in provider.get_unused_rules()] == ["embed_tokens"]
