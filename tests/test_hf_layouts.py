"""What lies in the tensors of quantized checkpoints, against readers written from the formats' descriptions."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from mpq.formats import parse_scheme
from mpq.hf.container import Site
from mpq.hf.containers import CONTAINERS, reader_of
from mpq.hf.words import pack_rows, unpack_rows, words_of
from mpq.quantize import RTN
from mpq.types import MpqError, QTensor

LINEAR = Site("a.kernel", "model.a", "matmul", 64, 96, head=False)


def random_qtensor(scheme_text: str, k: int = 64, n: int = 96, seed: int = 0) -> QTensor:
    """Every code, and zero points all over their range but the least."""
    scheme, rng = parse_scheme(scheme_text), np.random.default_rng(seed)
    grid, shape = scheme.format, scheme.scale_shape(k, n)
    codes = rng.integers(grid.min_qvalue, grid.max_qvalue + 1, (1, k, n)).astype(np.int8)
    scale = rng.uniform(0.01, 1, (1, *shape)).astype(scheme.scale_dtype)
    zero = None
    if scheme.zero_point:
        zero = jnp.asarray(rng.integers(grid.min_qvalue + 1, grid.max_qvalue + 1, (1, *shape)).astype(np.int8))
    return QTensor(jnp.asarray(codes), jnp.asarray(scale), zero, scheme)


def bits_of(words: np.ndarray, at: int, bits: int) -> int:
    """The integer in bits `at .. at + bits - 1` of a row of 32-bit words, by arithmetic on one big integer."""
    whole = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return (whole >> at) & ((1 << bits) - 1)


def assert_same(a: QTensor, b: QTensor) -> None:
    assert str(a.scheme) == str(b.scheme)
    for name in ("qvalue", "scale", "zero_point"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=name)


@pytest.mark.parametrize("bits", range(2, 9))
def test_rows_of_words_are_dense_streams(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 37))
    words = pack_rows(codes, bits)
    assert words.shape == (3, words_of(37, bits))
    for row, column in np.ndindex(codes.shape):
        assert bits_of(words[row], column * bits, bits) == codes[row, column]
    np.testing.assert_array_equal(unpack_rows(words, 37, bits), codes)


def test_long_matrices_are_packed_in_parts(monkeypatch):
    codes = np.random.default_rng(0).integers(0, 8, (50, 40))
    whole = pack_rows(codes, 3)
    monkeypatch.setattr("mpq.hf.words._ROWS", 700)
    np.testing.assert_array_equal(pack_rows(codes, 3), whole)
    np.testing.assert_array_equal(unpack_rows(whole, 40, 3), codes)


CASES = [
    ("hf", "int4_g32"),
    ("hf", "int3_g16_zp"),
    ("hf", "int5_channel_zp_sfloat32"),
    ("hf", "int8_channel"),
    ("hf", "int6_tensor"),
    ("hf", "int2_g16_sbfloat16"),
    ("gptq", "int3_g32_zp"),
    ("gptq", "int4_channel"),
    ("gptq_v2", "int2_g16_zp"),
    ("gptq_v2", "int8_g64"),
    ("awq", "int4_g32_zp"),
    ("awq", "int4_g64"),
    ("bnb", "nf4_g32_sfloat32"),
    ("llm_int8", "int8_channel"),
]


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_codes_scales_and_zero_points_come_back_bit_for_bit(name, scheme):
    container, qtensor = CONTAINERS[name], random_qtensor(scheme)
    assert container.refusal(LINEAR, qtensor.scheme) is None
    parts = container.pack(qtensor)
    expected = container.parts(qtensor.scheme, 64, 96)
    assert {end: (array.dtype.name, array.shape) for end, array in parts.items()} == dict(expected)
    config = json.loads(json.dumps(container.config({"model.a": qtensor.scheme}, {"model.a": LINEAR})))
    reader = reader_of(config)
    shape = lambda end: (parts[end].shape, parts[end].dtype.name)
    described, n, k = reader.describe("model.a", shape, parts.__getitem__)
    assert (str(described), n, k) == (scheme, 96, 64)
    assert_same(reader.unpack("model.a", parts), qtensor)


@pytest.mark.parametrize("scheme", ["int4_g32_zp", "int3_g32"])
def test_compressed_tensors_as_described(scheme):
    q = random_qtensor(scheme)
    bits, parts = q.scheme.format.bits, CONTAINERS["hf"].pack(q)
    middle = 2 ** (bits - 1)
    want = np.asarray(q.dequantize())[0]
    for k, n in [(0, 0), (7, 3), (33, 40), (63, 95)]:
        code = bits_of(parts["weight_packed"][n], k * bits, bits) - middle
        zero = 0
        if "weight_zero_point" in parts:
            zero = bits_of(parts["weight_zero_point"][:, k // 32], n * bits, bits) - middle
        assert (code - zero) * np.float32(parts["weight_scale"][n, k // 32]) == want[k, n]


@pytest.mark.parametrize(
    ("name", "scheme"), [("gptq", "int4_g32_zp"), ("gptq", "int3_g32"), ("gptq_v2", "int8_g32_zp")]
)
def test_gptq_as_described(name, scheme):
    q = random_qtensor(scheme)
    bits, parts = q.scheme.format.bits, CONTAINERS[name].pack(q)
    want = np.asarray(q.dequantize())[0]
    for k, n in [(0, 0), (10, 3), (33, 40), (63, 95)]:
        group = parts["g_idx"][k]
        zero = bits_of(parts["qzeros"][group], n * bits, bits) + (name == "gptq")
        code = bits_of(parts["qweight"][:, n], k * bits, bits)
        assert (code - zero) * np.float32(parts["scales"][group, n]) == want[k, n]


@pytest.mark.parametrize("scheme", ["int4_g32_zp", "int4_g32"])
def test_awq_as_described(scheme):
    q = random_qtensor(scheme)
    parts, want = CONTAINERS["awq"].pack(q), np.asarray(q.dequantize())[0]
    place = {0: 0, 1: 4, 2: 1, 3: 5, 4: 2, 5: 6, 6: 3, 7: 7}  # column of eight -> its nibble
    nibble = lambda words, n: (int(words[n // 8]) >> (4 * place[n % 8])) & 15
    for k, n in [(0, 0), (10, 3), (33, 41), (63, 94)]:
        zero = nibble(parts["qzeros"][k // 32], n)
        assert (nibble(parts["qweight"][k], n) - zero) * np.float32(parts["scales"][k // 32, n]) == want[k, n]


def test_nf4_as_described():
    q = random_qtensor("nf4_g32_sfloat32")
    parts, want = CONTAINERS["bnb"].pack(q), np.asarray(q.dequantize())[0]
    for k, n in [(0, 0), (10, 3), (33, 41), (63, 94)]:
        at = n * 64 + k
        byte = int(parts["weight"][at // 2, 0])
        code = byte & 15 if at % 2 else byte >> 4
        assert parts["weight.quant_map"][code] * parts["weight.absmax"][at // 32] == want[k, n]
    state = json.loads(parts["weight.quant_state.bitsandbytes__nf4"].tobytes())
    assert state == {"quant_type": "nf4", "blocksize": 32, "dtype": "float32", "shape": [96, 64]}


def test_nested_scales_of_bitsandbytes():
    parts = dict(CONTAINERS["bnb"].pack(random_qtensor("nf4_g32_sfloat32")))
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, parts["weight.absmax"].shape).astype(np.uint8)
    levels, outer = rng.uniform(-1, 1, 256).astype(np.float32), rng.uniform(1, 2, 3).astype(np.float32)
    state = json.loads(parts["weight.quant_state.bitsandbytes__nf4"].tobytes())
    state |= {"nested_blocksize": 64, "nested_dtype": "float32", "nested_offset": 0.5}
    parts |= {"weight.absmax": codes, "weight.nested_absmax": outer, "weight.nested_quant_map": levels}
    parts["weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    got = reader_of({"quant_method": "bitsandbytes"}).unpack("a", parts)
    want = [levels[code] * outer[i // 64] + np.float32(0.5) for i, code in enumerate(codes)]
    np.testing.assert_array_equal(np.asarray(got.scale)[0].T.reshape(-1), want)


def test_int8_of_bitsandbytes():
    rng = np.random.default_rng(0)
    weight, absmax = rng.integers(-127, 128, (48, 64)).astype(np.int8), rng.uniform(1, 2, 48).astype(np.float32)
    reader, parts = reader_of({"load_in_8bit": True}), {"weight": weight, "SCB": absmax}
    scheme, n, k = reader.describe("a", lambda end: (parts[end].shape, ""), parts.__getitem__)
    assert (str(scheme), n, k) == ("int8_channel_sfloat32", 48, 64)
    got = np.asarray(reader.unpack("a", parts).dequantize())[0]
    np.testing.assert_allclose(got, (weight * absmax[:, None] / 127).T, rtol=3e-7)  # two roundings of float32


def test_llm_int8_as_described():
    q = random_qtensor("int8_channel")
    parts, want = CONTAINERS["llm_int8"].pack(q), np.asarray(q.dequantize())[0]
    for k, n in [(0, 0), (10, 3), (33, 41), (63, 94)]:
        assert np.float32(parts["weight"][n, k]) * (parts["SCB"][n] / np.float32(127)) == want[k, n]
    assert (parts["weight_format"].dtype, parts["weight_format"].tolist()) == ("uint8", 0)


def test_every_scale_of_float16_comes_back_from_llm_int8():
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)]
    q = QTensor(
        jnp.ones((1, 2, len(every)), jnp.int8), jnp.asarray(every[None, None]), None, parse_scheme("int8_channel")
    )
    parts = dict(CONTAINERS["llm_int8"].pack(q))
    np.testing.assert_array_equal(parts["SCB"], every.astype(np.float64) * 127)
    assert_same(reader_of({"load_in_8bit": True}).unpack("a", parts), q)
    parts["SCB"][7] = np.nextafter(parts["SCB"][7], np.float32(1))
    assert reader_of({"load_in_8bit": True}).unpack("a", parts).scale.dtype == np.float32
    parts["SCB"][7] = 1e7  # more than float16 has
    assert reader_of({"load_in_8bit": True}).unpack("a", parts).scale.dtype == np.float32


@pytest.mark.parametrize(("bits", "ones"), [(2, 0x55555555), (4, 0x11111111), (8, 0x01010101)])
def test_version_1_of_gptq_gives_back_what_least_zero_points_borrowed(bits, ones):
    """As GPTQModel writes it: one less in every code of a word, as one number."""
    q = random_qtensor(f"int{bits}_g32_zp")
    least = np.random.default_rng(1).random(q.zero_point.shape) < 0.3
    q = dataclasses.replace(q, zero_point=jnp.where(least, -(2 ** (bits - 1)), q.zero_point).astype(jnp.int8))
    parts = dict(CONTAINERS["gptq_v2"].pack(q))
    stored = [[(int(word) - ones) % 2**32 for word in row] for row in parts["qzeros"]]
    parts["qzeros"] = np.array(stored, np.uint32).view(np.int32)
    config = CONTAINERS["gptq"].config({"model.a": q.scheme}, {"model.a": LINEAR})
    assert_same(reader_of(config).unpack("model.a", parts), q)


def test_version_1_of_gptq_reads_the_largest_code_of_three_bits_as_the_least():
    q = random_qtensor("int3_g32_zp")
    parts = dict(CONTAINERS["gptq"].pack(q))
    parts["qzeros"] = np.full_like(parts["qzeros"], -1)  # 7 throughout
    config = CONTAINERS["gptq"].config({"model.a": q.scheme}, {"model.a": LINEAR})
    assert (np.asarray(reader_of(config).unpack("model.a", parts).zero_point) == -4).all()


def test_awq_and_gptq_name_the_layers_that_stay_plain():
    modules = {"model.a": parse_scheme("int4_g32"), "model.b": parse_scheme("bf16")}
    sites = {"model.a": LINEAR, "model.b": LINEAR._replace(path="b.kernel")}
    assert CONTAINERS["awq"].config(modules, sites)["modules_to_not_convert"] == ["model.b"]
    config = CONTAINERS["gptq"].config(modules, sites)
    assert config["dynamic"] == {r"-:model\.b$": {}}
    assert reader_of(config).marks == ("qweight",)
    bnb = CONTAINERS["bnb"].config({**modules, "model.a": parse_scheme("nf4_g32_sfloat32")}, sites)
    assert bnb["llm_int8_skip_modules"] == ["model.b", "lm_head"]
    eight = CONTAINERS["llm_int8"].config({**modules, "model.a": parse_scheme("int8_channel")}, sites)
    assert (eight["load_in_8bit"], eight["load_in_4bit"], eight["llm_int8_threshold"]) == (True, False, 6.0)
    assert eight["llm_int8_skip_modules"] == ["model.b", "lm_head"]


WHOLE = "it takes whole groups only, and the weight has 64 rows"
REFUSED = [
    ("hf", "nf4_g32", {}, "it takes int2 to int8 with scales of float16, bfloat16, float32"),
    ("hf", "int4_g48", {}, WHOLE),
    ("hf", "int4_tensor_zp", {}, "it has no zero point of a whole matrix"),
    (
        "hf",
        "int4_g32",
        {"kind": "embedding"},
        "transformers loads no quantized embedding, nor one that is head too",
    ),
    ("gptq", "int4_g32", {"head": True}, "embeddings and heads stay plain floats there"),
    ("gptq", "int5_g32", {}, "it takes int2, int3, int4 and int8"),
    ("gptq", "int4_g32_sfloat32", {}, "its scales are float16, of groups or channels"),
    ("gptq", "int4_g48", {}, WHOLE),
    ("gptq", "int3_g16", {"n": 44}, "rows and columns must fill 32-bit words, and the weight is 64 x 44"),
    ("awq", "int4_g32", {"kind": "embedding"}, "embeddings and heads stay plain floats there"),
    ("awq", "int8_g32", {}, "it takes int4 with scales of float16"),
    ("awq", "int4_channel", {}, WHOLE),
    ("awq", "int4_g32", {"n": 44}, "columns must be a multiple of 8, and the weight has 44"),
    ("bnb", "nf4_g32_sfloat32", {"head": True}, "embeddings and heads stay plain floats there"),
    ("bnb", "nf4_g32", {}, "it takes nf4_gN_sfloat32 with N of 32, 64, 128, 256, 512, 1024, 2048, 4096"),
    ("llm_int8", "int8_channel", {"head": True}, "embeddings and heads stay plain floats there"),
    ("llm_int8", "int8_channel_zp", {}, "it takes int8_channel, with scales of float16"),
    ("llm_int8", "int8_channel_sfloat32", {}, "it takes int8_channel, with scales of float16"),
    ("bnb", "nf4_g128_sfloat32", {}, "its blocks must fill rows, and the weight has 64 of them"),
]


@pytest.mark.parametrize(("name", "scheme", "change", "message"), REFUSED)
def test_what_a_container_cannot_hold(name, scheme, change, message):
    assert CONTAINERS[name].refusal(LINEAR._replace(**change), parse_scheme(scheme)) == message


def refused(call) -> str:
    with pytest.raises(MpqError) as caught:
        call()
    return str(caught.value)


class TestWhatIsNotWritten:
    def test_the_least_zero_point_in_version_1_of_gptq(self):
        q = random_qtensor("int4_g32_zp")
        least = QTensor(q.qvalue, q.scale, jnp.full_like(q.zero_point, -8), q.scheme)
        message = "a zero point is the least code, which version 1 of GPTQ cannot store: use --to gptq_v2"
        assert refused(lambda: CONTAINERS["gptq"].pack(least)) == message
        assert not CONTAINERS["gptq_v2"].pack(least)["qzeros"].any()

    def test_two_schemes_where_one_is_for_all(self):
        sites = {"a": LINEAR, "b": LINEAR._replace(path="b.kernel")}
        modules = {"a": parse_scheme("int4_g32"), "b": parse_scheme("int4_g64")}
        message = (
            "b.kernel at int4_g64 and a.kernel at int4_g32: awq has one scheme for all linear layers; export mixed "
            "plans with --to hf"
        )
        assert refused(lambda: CONTAINERS["awq"].config(modules, sites)) == message

    def test_a_plan_that_quantizes_nothing(self):
        message = "no weight of the plan is quantized, and gptq is for those: choose another plan"
        assert refused(lambda: CONTAINERS["gptq"].config({"a": parse_scheme("bf16")}, {"a": LINEAR})) == message

    def test_plain_floats_of_two_types_in_bitsandbytes(self):
        sites = {"a": LINEAR, "b": LINEAR._replace(path="b.kernel")}
        modules = {"a": parse_scheme("bf16"), "b": parse_scheme("fp32")}
        message = (
            "a.kernel at bf16 and b.kernel at fp32: bitsandbytes has one type for all plain floats; pin them to one"
        )
        assert refused(lambda: CONTAINERS["bnb"].config(modules, sites)) == message
        assert refused(lambda: CONTAINERS["llm_int8"].config(modules, sites)) == message


GROUPS = (
    "supported are weights alone, as integers with scales of groups, channels or tensors in the order of the columns, "
    "and int8 beside inputs that are rounded by int8_token, int8_tensor_static, int8_tensor_static_asym"
)


class TestWhatIsNotRead:
    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (
                {"quant_method": "fp8"},
                "quantization method 'fp8' is not read: supported is compressed-tensors, gptq, awq, bitsandbytes",
            ),
            (
                {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
                "compressed-tensors format 'nvfp4-pack-quantized' is not read: supported is pack-quantized, "
                "int-quantized, mixed-precision",
            ),
            (
                {
                    "quant_method": "compressed-tensors",
                    "config_groups": {"g": {"targets": ["Linear"], "weights": {"type": "float", "strategy": "group"}}},
                },
                f"config group 'g' of compressed-tensors is not read: {GROUPS}",
            ),
            (
                {"quant_method": "awq", "version": "marlin", "bits": 4},
                "AWQ of version 'marlin' with 4 bits is not read: supported is 'gemm' with 4",
            ),
            (
                {"quant_method": "gptq", "bits": 4, "dynamic": {r"\.down": {"bits": 8}}},
                "GPTQ with 4 bits and 1 rules for modules of other widths is not read: supported is one of 2, 3, 4, 8 "
                "bits for all",
            ),
        ],
    )
    def test_a_config(self, config, message):
        assert refused(lambda: reader_of(config)) == message

    def test_a_module_that_no_group_names(self):
        q = random_qtensor("int4_g32")
        reader = reader_of(CONTAINERS["hf"].config({"a": q.scheme}, {"a": LINEAR}))
        message = "module 'b' is quantized, and no config group of compressed-tensors names it"
        assert refused(lambda: reader.unpack("b", CONTAINERS["hf"].pack(q))) == message

    def test_packed_codes_of_another_width(self):
        q = random_qtensor("int4_g32")
        reader = reader_of(CONTAINERS["hf"].config({"a": parse_scheme("int3_g32")}, {"a": LINEAR}))
        message = "weight_packed [96, 8] and its scales do not hold [96, 64] codes of 3 bits"
        assert refused(lambda: reader.unpack("a", CONTAINERS["hf"].pack(q))) == message

    def test_other_floats_of_bitsandbytes(self):
        reader = reader_of({"quant_method": "bitsandbytes"})
        message = "a is in the 4-bit floats of bitsandbytes (fp4), which are not read"
        assert refused(lambda: reader.describe("a", lambda end: ((), ""), {}.__getitem__)) == message

    @pytest.mark.parametrize(
        "change", [{"weight_format": np.array(1, np.uint8)}, {"weight": np.ones((96, 64), np.int32)}]
    )
    def test_other_arrangements_of_llm_int8(self, change):
        parts = {**CONTAINERS["llm_int8"].pack(random_qtensor("int8_channel")), **change}
        message = "codes of LLM.int8 that are not int8 in rows (weight_format) are not read: save them anew"
        assert refused(lambda: reader_of({"load_in_8bit": True}).unpack("a", parts)) == message

    def test_blocks_across_rows_and_other_levels(self):
        reader, parts = reader_of({"quant_method": "bitsandbytes"}), dict(CONTAINERS["bnb"].pack(nf4()))
        parts["weight.quant_map"] = parts["weight.quant_map"] + 1
        message = "the levels of nf4 are not those of bitsandbytes: the checkpoint is damaged"
        assert refused(lambda: reader.unpack("a", parts)) == message
        state = {"quant_type": "nf4", "blocksize": 48, "shape": [96, 64]}
        parts["weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
        message = "blocks of 48 of bitsandbytes go over rows of 64, which is not read"
        assert refused(lambda: reader.unpack("a", parts)) == message


def nf4() -> QTensor:
    return RTN()(jnp.ones((1, 64, 96)), parse_scheme("nf4_g32_sfloat32"))
