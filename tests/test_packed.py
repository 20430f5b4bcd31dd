"""A model on packed weights computes what it computes on their dequantized copies, and is given none of those."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from kernels_pallas import dequantize, quantized_matmul
from mpq import packed as packed_module
from mpq.activations import activation_rows, kv_rows, parse_activation_scheme
from mpq.activations.apply import RoundedActivation, with_activations
from mpq.activations.rows import replacing
from mpq.formats import parse_scheme
from mpq.packed import evaluate_packed, pack_weights
from mpq.quantize import RTN, Candidates, apply_plan
from mpq.trace import trace
from mpq.types import MpqError, QTensor
from tests.activation_cases import make_model
from tests.activation_cases import traced as traced_model

SCHEMES = {"embed": "int8_channel", "up": "int4_g16", "conv": "nf4_g8", "down": "int3_g8_zp"}
TOKENS = np.random.default_rng(0).integers(0, 24, (2, 7)).astype(np.int32)


def network(params, tokens):
    """An embedding that is tied to the output, two matmuls and a convolution over time."""
    x = jnp.tanh(params["embed"][tokens] @ params["up"])
    x = jax.lax.conv_general_dilated(x, params["conv"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))
    return (jnp.tanh(x) @ params["down"] + params["bias"]) @ params["embed"].T


@pytest.fixture(scope="module")
def model():
    """The traced model, its parameters, and all its weights quantized."""
    rng = np.random.default_rng(0)
    shapes = {"embed": (24, 16), "up": (16, 32), "conv": (3, 32, 16), "down": (16, 16), "bias": (16,)}
    params = {p: jnp.asarray(rng.normal(size=s) / np.sqrt(np.prod(s[:-1])), jnp.float32) for p, s in shapes.items()}
    traced = trace(network, params, jax.ShapeDtypeStruct(TOKENS.shape, jnp.int32))
    assert {spec.path for spec in traced.weights} == set(SCHEMES)
    choice = {path: parse_scheme(text) for path, text in SCHEMES.items()}
    return traced, params, Candidates(params, traced.weights, RTN()).choose(choice)


def test_equals_the_dequantized_model_without_a_copy_of_it(model):
    traced, params, qtensors = model
    packed = pack_weights(traced.weights, qtensors)
    assert {weight.layout for weight in packed.values()} == {"plain", "cpu"}
    # All that the compiled function is given: the packed weights, and the one parameter that is not a weight.
    got = jax.jit(functools.partial(evaluate_packed, traced))({"bias": params["bias"]}, packed, TOKENS)
    run = jax.jit(traced.evaluate)
    want = run(apply_plan(params, traced.weights, qtensors), TOKENS)
    # Float32 sums in another order: four in a row, each off by at most 96 * 2^-24 of its sum of magnitudes, which is at
    # most 10 times the largest output with normal data.
    tolerance = 4 * 96 * 2.0**-24 * 10 * float(jnp.abs(want).max())
    assert float(jnp.abs(got - want).max()) < tolerance
    assert float(jnp.abs(run(params, TOKENS) - want).max()) > 20 * tolerance


@pytest.mark.parametrize("text", ["fp4_g16_sfp8", "int8_tensor_zp", "nf3_g8_sbfloat16"])
def test_every_kind_of_scheme_keeps_its_values_and_its_size(model, text):
    traced, params, _ = model
    (spec,) = (spec for spec in traced.weights if spec.path == "up")
    scheme = parse_scheme(text)
    qtensor = Candidates(params, traced.weights, RTN()).qtensor(spec, scheme)
    packed = pack_weights(traced.weights, {"up": qtensor}, platform="cuda")["up"]
    np.testing.assert_array_equal(jax.jit(dequantize)(packed), jax.jit(QTensor.dequantize)(qtensor)[0])
    # Scales of 8 bits and the matrix's float32 become float32 each; a zero point for all is one a column.
    extra = {"fp4_g16_sfp8": 24 * 32 - 32, "int8_tensor_zp": 8 * 31}.get(text, 0)
    assert packed.size_bits == spec.size_bits(scheme) + extra


@pytest.mark.parametrize(("k", "n", "layout"), [(256, 128, "hopper"), (512, 320, "hopper"), (130, 128, "plain")])
def test_a_gpu_gets_tiles_that_are_full(k, n, layout):
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(k, n)), jnp.float32)}
    traced = trace(lambda p, x: x @ p["w"], params, jnp.zeros((2, k), jnp.float32))
    qtensors = Candidates(params, traced.weights, RTN()).choose({"w": parse_scheme("int4_g128")})
    packed = pack_weights(traced.weights, qtensors, platform="gpu")["w"]
    assert packed.layout == layout
    np.testing.assert_array_equal(jax.jit(dequantize)(packed), jax.jit(QTensor.dequantize)(qtensors["w"])[0])


@pytest.mark.parametrize(("platform", "kernel", "k"), [("tpu", "tpu_custom_call", 256), ("cuda", "mosaic_gpu", 2048)])
def test_a_whole_model_lowers_for_accelerators(platform, kernel, k):
    """Weights that kernels hold go through them, the others through XLA, all in one program; none for tiny weights."""
    rng = np.random.default_rng(0)
    schemes = {"a": "int8_channel", "b": "int4_g128", "c": "int3_g64"}
    params = {name: jnp.asarray(rng.normal(size=(k, k)) / 16, jnp.bfloat16) for name in schemes}
    x = jnp.asarray(rng.normal(size=(4, k)), jnp.bfloat16)
    traced = trace(lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"], params, x)
    qtensors = Candidates(params, traced.weights, RTN()).choose({n: parse_scheme(s) for n, s in schemes.items()})
    packed = pack_weights(traced.weights, qtensors, platform)
    assert [weight.layout == "plain" for weight in packed.values()] == [False, False, True]
    run = jax.jit(functools.partial(evaluate_packed, traced, platform=platform))
    lowered = export.export(run, platforms=[platform])({}, packed, x)
    assert lowered.mlir_module().count(f"custom_call @{kernel}") == 2
    assert lowered.out_avals[0].shape == (4, k)


def test_parameters_that_are_not_packed_are_needed(model):
    traced, params, qtensors = model
    packed = pack_weights(traced.weights, {path: qtensors[path] for path in ("embed", "conv", "down")})
    with pytest.raises(MpqError, match="parameter up is neither given nor packed as a whole"):
        evaluate_packed(traced, {"bias": params["bias"]}, packed, TOKENS)


def test_experts_are_packed_with_their_batch_axis():
    """A stack of three experts, each with inputs of its own."""
    rng = np.random.default_rng(0)
    params = {"experts": jnp.asarray(rng.normal(size=(3, 32, 8)), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(3, 5, 32)), jnp.float32)
    traced = trace(lambda p, x: jnp.einsum("emk,ekn->emn", x, p["experts"]), params, x)
    (spec,) = traced.weights
    qtensors = Candidates(params, traced.weights, RTN()).choose({spec.path: parse_scheme("int4_g16")})
    packed = pack_weights(traced.weights, qtensors)
    assert packed[spec.path].batch_shape == (3,)
    exact = np.asarray(qtensors[spec.path].dequantize(), np.float64)
    for bits, tolerance in ((None, 32 * 2.0**-23), (8, 0.5 / 127)):
        got = jax.jit(functools.partial(evaluate_packed, traced, activation_bits=bits))({}, packed, x)
        largest = np.abs(np.asarray(x)).max(-1, keepdims=True)
        # Of rounded activations at most half a step of 1/127 of the token's largest is off in every product.
        limit = tolerance * (np.abs(x) if bits is None else np.broadcast_to(largest, x.shape)) @ np.abs(exact)
        assert (np.abs(np.asarray(got) - np.asarray(x, np.float64) @ exact) <= 1.001 * limit).all()


def test_unknown_paths_and_formats_are_refused(model):
    traced, params, qtensors = model
    first = traced.weights[0].path
    with pytest.raises(MpqError, match="nothing is not one of the"):
        pack_weights(traced.weights, {"nothing": qtensors[first]})
    for text in ("bf16", "fp8_e4m3_channel"):
        odd = Candidates(params, traced.weights, RTN()).choose({first: parse_scheme(text)})
        with pytest.raises(MpqError, match=f"is {text}: integers and tables of at most 16 levels, one for all"):
            pack_weights(traced.weights, odd)


def dense_and_conv(params, x):
    """A matmul and a strided, padded convolution of one input, `x[images, height, width, channels]`."""
    dims = ("NHWC", "HWIO", "NHWC")
    return x @ params["up"], jax.lax.conv_general_dilated(x, params["conv"], (2, 2), "SAME", dimension_numbers=dims)


@pytest.mark.parametrize("text", ["int8_token", "int8_tensor", "int5_tensor_static", "int4_token", "int8_tensor_asym"])
@pytest.mark.parametrize("weights", ["int8_channel", "int4_g8"])
def test_integer_products_equal_the_emulated_ones(text, weights, monkeypatch):
    seen = []
    watched = lambda rows, *args, **options: seen.append(str(rows.dtype)) or quantized_matmul(rows, *args, **options)
    monkeypatch.setattr(packed_module, "quantized_matmul", watched)
    rng, scheme = np.random.default_rng(0), parse_activation_scheme(text)
    params = {"up": rng.normal(size=(16, 8)), "conv": rng.normal(size=(3, 3, 16, 8))}
    params = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    x = jnp.asarray(rng.normal(size=(2, 5, 5, 16)) * np.exp(rng.normal(size=(2, 5, 5, 1))), jnp.float32)
    traced = trace(dense_and_conv, params, x)
    qtensors = Candidates(params, traced.weights, RTN()).choose(dict.fromkeys(params, parse_scheme(weights)))
    dequantized = apply_plan(params, traced.weights, qtensors)
    ends = {"low": (-2.0,), "high": (2.0,)} if scheme.static else {}
    chosen = [RoundedActivation(row, scheme, **ends) for row in activation_rows(traced)]
    packed = pack_weights(traced.weights, qtensors)
    run = jax.jit(functools.partial(evaluate_packed, traced, activations=chosen))
    emulate = replacing([one.spec for one in chosen], lambda number, x: chosen[number](x, 2))
    emulated = jax.jit(functools.partial(traced.evaluate, replace=emulate))
    # Operands are the same numbers. A sum of k float32 products in any order is off by at most k eps of the sum of
    # their magnitudes (Higham 2002, eq. 3.5, with eps twice the unit roundoff); four more roundings are those of the
    # products of codes and scales. The integer product has no more.
    magnitude = jax.jit(dense_and_conv)(jax.tree.map(jnp.abs, dequantized), jnp.abs(x) + 0.5)
    for got, want, most, k in zip(run({}, packed, x), emulated(dequantized, x), magnitude, (16, 144), strict=True):
        assert (np.abs(got - want) <= 2 * (k + 4) * np.finfo(np.float32).eps * np.asarray(most)).all()
        exact = np.asarray(traced.evaluate(dequantized, x)[0 if k == 16 else 1])
        assert np.abs(got - exact).max() > 100 * np.finfo(np.float32).eps * np.asarray(most).max()
    convolutions = scheme.granularity == "tensor" and not scheme.asymmetric  # others are XLA's, of floats
    assert seen == ["float32" if scheme.asymmetric else "int8"] + ["int8"] * convolutions


def test_a_cache_is_rounded_beside_packed_weights():
    model, rows = make_model(), kv_rows(traced_model(make_model()), "key|value")
    chosen = [RoundedActivation(row, parse_activation_scheme("int4_head")) for row in rows]
    tokens = np.random.default_rng(0).integers(0, 7, (4, 6)).astype(np.int32)
    want = jax.jit(with_activations(model, traced_model(model), chosen).apply)(model.params, tokens)
    run = functools.partial(evaluate_packed, traced_model(model), activations=chosen)
    np.testing.assert_allclose(jax.jit(run)(model.params, {}, tokens), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "schemes",
    [("int4_g64", "int8_channel"), ("int3_g64", "lut3_g16"), ("int5_channel", "int6_g32_zp")],
    ids="-".join,
)
def test_a_compiled_model_holds_what_the_plan_promises(schemes):
    """Arguments are the packed bytes, and no temporary is as large as one weight in float32."""
    rng = np.random.default_rng(0)
    params = {f"w{i}": jnp.asarray(rng.normal(size=(256, 256)) / 16, jnp.float32) for i in range(6)}

    def layers(params, x):
        for i in range(6):
            x = jnp.tanh(x @ params[f"w{i}"])
        return x

    x = jnp.asarray(rng.normal(size=(2, 256)), jnp.float32)
    traced = trace(layers, params, x)
    choice = dict(zip(params, map(parse_scheme, 3 * schemes), strict=True))
    qtensors = Candidates(params, traced.weights, RTN()).choose(choice)
    packed = pack_weights(traced.weights, qtensors)
    compiled = jax.jit(functools.partial(evaluate_packed, traced)).lower({}, packed, x).compile()
    memory = compiled.memory_analysis()
    promised = sum(spec.size_bits(choice[spec.path]) for spec in traced.weights)
    # learned levels are in the program
    promised -= sum(16 * len(packed[path].levels) for path, q in qtensors.items() if q.codebook is not None)
    assert promised % 8 == 0
    assert memory.argument_size_in_bytes == promised // 8 + x.nbytes
    assert memory.temp_size_in_bytes < 256 * 256 * 4
    assert memory.output_size_in_bytes == x.nbytes
    held = lambda: sum(array.nbytes for array in jax.live_arrays())
    before = held()
    y = compiled({}, packed, x)
    assert held() - before == y.nbytes
