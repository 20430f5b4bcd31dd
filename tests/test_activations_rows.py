"""What can be quantized beside weights, and how it is rounded."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mpq.activations import (
    ActivationKL,
    ActivationScheme,
    ActivationSpec,
    ActivationTable,
    activation_rows,
    fake_quantize,
    kv_rows,
    load_activation_table,
    parse_activation_scheme,
    save_activation_table,
)
from mpq.inputs import Dataset, Images
from mpq.models import functional
from mpq.models.decoders import Decoder, DecoderConfig
from mpq.models.model import Model
from mpq.tasks import Classification
from mpq.trace import trace
from mpq.types import MpqError
from tests.activation_cases import log_softmax, make_data, make_model, rounded, run

CONFIG = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
CONFIG |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}
TOKENS = jax.ShapeDtypeStruct((2, 8), jnp.int32)


def trace_of(fn, inputs=TOKENS, **shapes):
    return trace(fn, {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}, inputs)


def decoder(**changes):
    config = DecoderConfig(**CONFIG | changes)
    apply, params = functional(nnx.eval_shape(lambda: Decoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0))))
    return trace(apply, params, TOKENS)


class TestSchemes:
    @pytest.mark.parametrize("text", ["int8_token", "int2_token_asym", "int4_head", "int3_head_asym", "int7_tensor"])
    def test_text_is_that_of_the_scheme_it_names(self, text):
        assert str(parse_activation_scheme(text)) == text

    @pytest.mark.parametrize(
        "text", ["int8", "int9_token", "int1_token", "int8_channel", "int8_g0", "fp8_token", "int8_token_zp"]
    )
    def test_other_text_is_refused(self, text):
        with pytest.raises(
            MpqError, match=f"unknown activation scheme '{text}': allowed is int2 to int8 or fp8_e4m3 with _token"
        ):
            parse_activation_scheme(text)

    def test_sizes_count_codes_scales_and_zero_points(self):
        cache = ActivationSpec("k", "kv", "k", ("k",), batch=1, width=128, heads=2)
        bits = lambda text: cache.size_bits(parse_activation_scheme(text))
        assert bits("int4_head") == 128 * 4 + 2 * 16
        assert bits("int4_head_asym") == 128 * 4 + 2 * (16 + 4)
        assert bits("int8_token") == 128 * 8 + 16
        assert bits("int8_tensor") == 128 * 8

    @pytest.mark.parametrize("bits", range(2, 9))
    @pytest.mark.parametrize("asymmetric", [False, True])
    def test_zero_and_what_has_been_rounded_stay_and_the_rest_moves_by_half_a_step(self, bits, asymmetric):
        scheme = ActivationScheme(bits, "token", asymmetric)
        x = np.random.default_rng(bits).normal(size=(1, 50, 16)).astype(np.float32) + 0.3
        x[0, :, 3] = 0
        quantize = jax.jit(lambda x: fake_quantize(x, scheme.kind, scheme.top, heads=0, real=jnp.ones((5, 10), bool)))
        y = np.asarray(quantize(x))
        low, high = np.minimum(x.min(-1), 0), np.maximum(x.max(-1), 0)
        step = (high - low if asymmetric else np.maximum(high, -low)) / scheme.top
        # half a step, another half where the zero point is rounded, and 2^-11 of the range where the scale is
        limit = step * (1.0 if asymmetric else 0.5) + scheme.top * step * 2.0**-11 + 1e-6
        assert (np.abs(y - x) <= limit[..., None]).all()
        assert (y[0, :, 3] == 0).all()
        assert max(len(np.unique(row)) for row in y[0]) <= 2**bits
        if not asymmetric:  # whose largest value is a code, so the scale is that of before
            np.testing.assert_allclose(quantize(y), y, rtol=1e-3)

    def test_one_large_value_takes_the_levels_of_its_own_group_alone(self):
        x = np.random.default_rng(0).normal(size=(1, 12, 8)).astype(np.float32)
        large, real = x.copy(), jnp.ones((3, 4), bool)
        large[0, 5, 2] = 1000.0
        for granularity, touched in (("token", np.s_[5:6, :]), ("head", np.s_[5:6, :4]), ("tensor", np.s_[4:8, :])):
            kind = ActivationScheme(4, granularity).kind
            before, after = (
                np.asarray(fake_quantize(jnp.asarray(a), kind, 7, heads=2, real=real))[0] for a in (x, large)
            )
            changed = before != after
            inside = np.zeros_like(changed)
            inside[touched] = True
            assert not changed[~inside].any()
            assert changed[inside].mean() > 0.5

    def test_padding_is_no_part_of_a_tensor(self):
        x = np.random.default_rng(0).normal(size=(1, 12, 8)).astype(np.float32)
        real = np.arange(4) < np.array([[4], [2], [3]])
        padded = np.where(real.reshape(1, 12, 1), x, 1e3).astype(np.float32)
        kind = ActivationScheme(4, "tensor").kind
        a, b = (
            np.asarray(fake_quantize(jnp.asarray(v), kind, 7, heads=0, real=jnp.asarray(real))) for v in (x, padded)
        )
        np.testing.assert_array_equal(a[0, real.ravel()], b[0, real.ravel()])

    def test_positions_that_are_not_those_of_windows_have_no_tensor(self):
        kind = ActivationScheme(4, "tensor").kind
        with pytest.raises(MpqError, match="10 positions are not those of 3 windows: use a scale for every token"):
            fake_quantize(jnp.ones((1, 10, 4)), kind, 7, heads=0, real=jnp.ones((3, 4), bool))

    def test_a_scale_for_every_head_needs_heads(self):
        with pytest.raises(MpqError, match=r"int4_head has a scale for every head, and .* has no heads: use int4"):
            run(
                ActivationKL(),
                "activations",
                make_model(),
                make_data(2),
                schemes=(parse_activation_scheme("int4_head"),),
            )


class TestActivations:
    def test_weights_that_read_one_value_are_one_row(self):
        rows = activation_rows(decoder())
        layer = [f"layers.0.{name}.kernel" for name in ("self_attn.{q,k,v}_proj", "self_attn.o_proj")]
        layer += [f"layers.0.{name}.kernel" for name in ("mlp.{gate,up}_proj", "mlp.down_proj")]
        paths = [row.path for row in rows]
        assert paths == [*layer, *(path.replace("0", "1") for path in layer), "lm_head.kernel"]
        assert [row.values for row in rows[:4]] == [16, 32, 16, 24]
        assert rows[0].weights == tuple(f"layers.0.self_attn.{n}_proj.kernel" for n in "qkv")

    def test_a_weight_that_reads_two_values_has_two_rows(self):
        twice = trace_of(lambda p, x: jnp.tanh(p["e"][x] @ p["w"]) @ p["w"], e=(9, 4), w=(4, 4))
        assert [(row.path, row.weights) for row in activation_rows(twice)] == [("w", ("w",)), ("w#2", ("w",))]

    def test_stacked_experts_have_a_vector_each(self):
        def experts(p, x):
            h = jnp.stack([p["e"][x], 2 * p["e"][x], -p["e"][x]])
            return jnp.einsum("ebtk,ekn->ebtn", h, p["w"]).sum(0)

        (row,) = activation_rows(trace_of(experts, e=(9, 4), w=(3, 4, 5)))
        assert (row.batch, row.width, row.values) == (3, 4, 12)
        assert row.size_bits(parse_activation_scheme("int8_token")) == 12 * 8 + 3 * 16

    def test_indices_are_no_values(self):
        site = trace_of(lambda p, x: p["e"][x], e=(9, 4)).sites[0]
        with pytest.raises(MpqError, match="`e` is looked up by integer indices here; they are no values to view"):
            site.value_view((2, 8))

    def test_a_position_of_a_convolution_has_a_scale_over_its_channels(self):
        def net(p, x):
            h = jnp.tanh(x.astype(jnp.float32) / 64 - 1)
            h = jax.lax.conv_general_dilated(h, p["k"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            return h.mean((1, 2)) @ p["head"]

        rng = np.random.default_rng(0)
        params = {"k": rng.normal(size=(3, 3, 4, 6)), "head": rng.normal(size=(6, 5))}
        params = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
        images = rng.integers(256, size=(5, 6, 6, 4)).astype(np.uint8)
        stored = dict.fromkeys(params, "float32")
        model = Model(net, params, stored, name="cnn", inputs=Images(6, 6, 4), task=Classification())
        data = Dataset(images, np.ones(5, bool), np.arange(5), "noise", "images")
        traced, scheme = model.trace(2), parse_activation_scheme("int4_token")
        rows = activation_rows(traced)
        assert [(row.path, row.values) for row in rows] == [("k", 4), ("head", 6)]
        table = ActivationKL()(model, traced, rows, (scheme,), data, key=jax.random.key(0), batch_size=2)
        value = np.tanh(images.astype(np.float64) / 64 - 1)
        pixels = rounded(value.reshape(5, 36, 4), scheme, None).reshape(value.shape)
        after = lambda v: np.asarray(net(params, (jnp.arctanh(jnp.asarray(v, jnp.float32)) + 1) * 64), np.float64)
        p, q = log_softmax(np.asarray(net(params, images), np.float64)), log_softmax(after(pixels))
        want = (np.exp(p) * (p - q)).sum(-1).mean()
        assert table.loss_increase[0, 0] == pytest.approx(want, rel=1e-2)  # arctanh of a value near 1 loses digits


class TestCache:
    @pytest.mark.parametrize("changes", [{}, {"qkv_bias": True, "qk_norm": True}, {"residual": "parallel"}], ids=str)
    def test_keys_and_values_have_the_heads_that_the_model_makes(self, changes):
        rows = kv_rows(decoder(**changes))
        assert [row.path for row in rows] == [f"layers.{i}.self_attn.{n}_proj.kernel" for i in (0, 1) for n in "kv"]
        assert {(row.kind, row.width, row.heads, row.values) for row in rows} == {("kv", 16, 2, 16)}

    def test_one_head_may_serve_all_queries(self):
        rows = kv_rows(decoder(num_key_value_heads=1))
        assert {(row.width, row.heads) for row in rows} == {(8, 1)}

    def test_heads_may_be_an_axis_of_the_weight_or_lie_in_a_rematerialized_block(self):
        def block(p, h):
            q, k = (jnp.einsum("btd,dhf->bthf", h, p[name]) for name in ("q", "k"))
            v = (h @ p["v"] + 1.0).reshape(*h.shape[:2], 2, 4)
            return jnp.einsum("bthf,bshf,bshg->btg", q, k, v)

        fn = lambda p, x: jax.checkpoint(block)(p, p["e"][x])
        rows = kv_rows(trace_of(fn, e=(9, 6), q=(6, 2, 3), k=(6, 2, 3), v=(6, 8)), "k|v")
        assert [(row.path, row.width, row.heads) for row in rows] == [("k", 6, 2), ("v", 8, 2)]

    def test_fused_projections_are_refused(self):
        for qkv in ("fused", "interleaved"):
            fused = decoder(qkv=qkv, num_key_value_heads=4)
            with pytest.raises(MpqError, match=r"no weight matches '.*': give a .* fused ones are not supported"):
                kv_rows(fused)
            with pytest.raises(MpqError, match=r"layers\.0\.self_attn\.qkv_proj\.kernel is no key or value projection"):
                kv_rows(fused, r".*qkv_proj\.kernel")

    def test_a_bad_pattern_is_refused(self):
        with pytest.raises(MpqError, match=r"'\(k' is no regular expression"):
            kv_rows(decoder(), "(k")

    def test_heads_that_do_not_fit_or_do_not_show_are_refused(self):
        with pytest.raises(
            MpqError, match=r"the 16 outputs of .*k_proj\.kernel fall into no heads of 5: give head-dim"
        ):
            kv_rows(decoder(), head_dim=5)
        flat = trace_of(lambda p, x: (p["e"][x] @ p["k"]) * (p["e"][x] @ p["v"]), e=(9, 4), k=(4, 4), v=(4, 4))
        alone = "k is no key or value projection"
        with pytest.raises(MpqError, match=alone):  # two lookups are two values
            kv_rows(flat, "k|v")
        flat = trace_of(lambda p, x: (lambda h: (h @ p["k"]) * (h @ p["v"]))(p["e"][x]), e=(9, 4), k=(4, 4), v=(4, 4))
        with pytest.raises(MpqError, match="the 4 outputs of k fall into no heads of a size that the model shows"):
            kv_rows(flat, "k|v")
        assert [row.heads for row in kv_rows(flat, "k|v", head_dim=2)] == [2, 2]


class TestFile:
    @pytest.fixture
    def table(self):
        rows, schemes = activation_rows(decoder()), (parse_activation_scheme("int8_token"),) * 2
        values = np.random.default_rng(0).random((2, len(rows), 2))
        values[1, 0, 0] = np.nan
        return ActivationTable(rows, schemes, *values, "kl", "dynamic", "model", "data")

    def test_survives_the_disk_exactly(self, table, tmp_path):
        save_activation_table(tmp_path / "a", table)
        again = load_activation_table(tmp_path / "a")
        assert (again.activations, again.schemes) == (table.activations, table.schemes)
        assert (again.metric, again.quantizer, again.model_digest, again.data_digest) == (
            "kl",
            "dynamic",
            "model",
            "data",
        )
        np.testing.assert_array_equal(again.loss_increase, table.loss_increase)
        np.testing.assert_array_equal(again.stderr, table.stderr)
        assert json.loads((tmp_path / "a").read_text())["stderr"][0][0] is None

    def test_what_is_damaged_or_another_kind_is_refused(self, table, tmp_path):
        path = tmp_path / "a"
        save_activation_table(path, table)
        text = path.read_text()
        path.write_text(text.replace('"heads": 0', '"heads": 1', 1))
        with pytest.raises(MpqError, match="was changed or damaged after it was written"):
            load_activation_table(path)
        path.write_text(text.replace('"kind": "activations"', '"kind": "plan"'))
        with pytest.raises(MpqError, match="is no activations file"):
            load_activation_table(path)
        path.write_text(text[: len(text) // 2])
        with pytest.raises(MpqError, match=r"ends too early \(truncated\?\)"):
            load_activation_table(path)
        with pytest.raises(MpqError, match="cannot read"):
            load_activation_table(tmp_path / "none")
