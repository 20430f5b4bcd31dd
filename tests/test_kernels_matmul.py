"""`quantized_matmul`: the contract's rounding, shapes and derivative, what it refuses, and which backend it takes."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from kernels_pallas import BACKENDS, NF4, KernelError, compat, quantized_matmul
from kernels_pallas.backend import Problem
from kernels_pallas.cases import SPEED, Case, draw
from kernels_pallas.cpu import chunk
from kernels_pallas.devices import device
from kernels_pallas.dispatch import choose, roofline
from kernels_pallas.matmul import describe
from kernels_pallas.native_build import library
from kernels_pallas.reference import quantize_tokens
from kernels_pallas.tables import Entry, nearest
from kernels_pallas.tpu import legal, tiles
from tests.kernel_cases import bound, oracle

CASE = Case(4, 40, 6, 4, 16, zeros=True, x_dtype="float32")
PROBLEM = Problem(16, 4096, 4096, 1, 4, 128, "tpu", False, False, "bfloat16", None)


def test_tokens_are_rounded_to_the_nearest_of_255_steps():
    x = np.random.default_rng(0).normal(size=(5, 33)).astype(np.float32)
    x[3] = 0
    codes, scale = map(np.asarray, jax.jit(quantize_tokens)(x))
    largest = np.abs(x).max(-1, keepdims=True)
    np.testing.assert_array_equal(np.abs(codes).max(-1), [127, 127, 127, 0, 127])
    np.testing.assert_allclose(scale, np.where(largest > 0, largest.astype(np.float64) / 127, 1), rtol=2**-23)
    # Half a step, and the roundings of the quotient and of the product, each at most 127 steps times 2^-24.
    assert (np.abs(codes * scale.astype(np.float64) - x) <= scale * (0.5 + 127 * 2.0**-22)).all()


def test_powers_of_two_are_scales_to_the_bit():
    x = np.exp2(np.arange(-20, 20))[:, None] * np.array([127, -3, 64])
    codes, scale = map(np.asarray, jax.jit(quantize_tokens)(x.astype(np.float32)))
    np.testing.assert_array_equal(scale[:, 0], np.exp2(np.arange(-20, 20)))
    np.testing.assert_array_equal(codes, np.broadcast_to([127, -3, 64], codes.shape))


class TestTheDerivative:
    """`dx = dy @ w^T`, also through rounded activations; weights have none."""

    @pytest.mark.parametrize("activation_bits", [None, 8])
    def test_is_that_of_the_dequantized_weight(self, activation_bits):
        x, packed, arrays = draw(CASE, "cpu", 0, exact=False)
        dy = np.random.default_rng(1).normal(size=(CASE.m, CASE.n)).astype(np.float32)
        run = functools.partial(quantized_matmul, activation_bits=activation_bits, backend="cpu")
        (dx,) = jax.jit(lambda x, p, dy: jax.vjp(lambda x: run(x, p), x)[1](dy))(x, packed, dy)
        identity = np.eye(CASE.k)
        w, magnitude = oracle(dataclasses.replace(CASE, m=CASE.k), identity, arrays)
        # A row of w is rounded three times, and n products are added up.
        assert (np.abs(dx - dy @ w.T) <= (CASE.n + 4) * 2.0**-23 * (np.abs(dy) @ magnitude.T)).all()

    def test_is_zero_for_a_weight(self):
        x, packed, _ = draw(CASE, "plain", 0, exact=False)
        loss = lambda scales: quantized_matmul(x, dataclasses.replace(packed, scales=scales)).sum()
        np.testing.assert_array_equal(jax.jit(jax.grad(loss))(packed.scales), 0)


def test_leading_axes_and_the_output_dtype():
    x, packed, _ = draw(CASE, "plain", 0, exact=True)
    run = jax.jit(quantized_matmul, static_argnames="out_dtype")
    flat = np.asarray(run(x, packed))
    np.testing.assert_array_equal(np.asarray(run(np.asarray(x).reshape(2, 2, -1), packed)).reshape(4, -1), flat)
    np.testing.assert_array_equal(run(np.asarray(x)[0], packed), flat[0])
    like = functools.partial(jax.eval_shape, functools.partial(quantized_matmul, out_dtype=jnp.float16))
    assert like(x, packed) == jax.ShapeDtypeStruct((4, CASE.n), jnp.float16)
    assert like(jax.ShapeDtypeStruct((0, CASE.k), x.dtype), packed).shape == (0, CASE.n)
    assert jax.eval_shape(quantized_matmul, x.astype(jnp.bfloat16), packed).dtype == jnp.bfloat16


@pytest.mark.parametrize("layout", ["plain", "cpu"])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_codes_that_were_rounded_before_are_multiplied_as_they_are(layout, batch):
    case = dataclasses.replace(CASE, batch=batch, activation_bits=8)
    _, packed, arrays = draw(case, layout, 0, exact=False)
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (*batch, case.m, case.k)).astype(np.int8)
    scale = rng.uniform(0.5, 2, (*batch, case.m, 1)).astype(np.float32)
    got = jax.jit(quantized_matmul)(codes, packed, activation_scale=scale)
    want, magnitude = oracle(case, codes * scale.astype(np.float64), arrays)
    assert got.dtype == jnp.float32
    assert (np.abs(got - want) <= bound(case, magnitude)).all()


class TestRefusals:
    def refused(self, match, case=CASE, layout="plain", x=None, **options):
        own, packed, _ = draw(case, layout, 0, exact=True)
        with pytest.raises(KernelError, match=match):
            quantized_matmul(own if x is None else x, packed, **options)

    def test_activations_of_another_dtype(self):
        allowed = "^x is int32: allowed are float32, bfloat16, float16, and int8 codes with their scales$"
        self.refused(allowed, x=jnp.zeros((4, 40), jnp.int32))

    def test_codes_without_scales_and_scales_without_codes(self):
        self.refused(
            "^x is int8 without a scale of activations: int8 codes and their scales go together$",
            x=jnp.zeros((4, 40), jnp.int8),
        )
        self.refused("^x is float32 with a scale of activations: int8 codes and", activation_scale=jnp.ones((4, 1)))

    def test_activations_of_other_bits(self):
        self.refused("activations of 4 bits: allowed are 8", activation_bits=4)

    def test_shapes(self):
        self.refused(r"x is \[4, 41\].*allowed is \[..., 40\]", x=jnp.zeros((4, 41)))
        self.refused(r"x is \[\]", x=jnp.zeros(()))
        batched = dataclasses.replace(CASE, batch=(3,))
        for shape in ((2, 4, 40), (3, 40), (3, 1, 4, 40)):
            self.refused(r"allowed is \[3, m, 40\]", batched, x=jnp.zeros(shape))

    def test_an_unknown_backend(self):
        self.refused("unknown backend 'gpu': allowed is auto, reference, cpu", backend="gpu")

    def test_another_layout(self):
        self.refused("backend 'cpu' cannot compute this matmul: it reads layout cpu, not 'plain'", backend="cpu")

    def test_another_platform(self):
        case = Case(2, 128, 8, 4)
        self.refused("it runs on tpu, not on cpu: use backend='auto'", case, "tpu", backend="tpu")
        self.refused("it runs on cpu, not on cuda", CASE, "cpu", backend="cpu", platform="gpu")

    def test_a_tpu_kernel_on_nothing(self):
        nothing = jnp.zeros((0, 128), jnp.bfloat16)
        self.refused("it has no tokens", Case(2, 128, 8, 4), "tpu", x=nothing, backend="tpu", platform="tpu")

    def test_what_cannot_be_interpreted(self):
        self.refused("it has no kernel to interpret", CASE, "cpu", backend="cpu", interpret=True)

    def test_what_the_hopper_kernel_does_not_take(self):
        on = functools.partial(self.refused, layout="hopper", backend="hopper", platform="cuda")
        on("its activations are float32, allowed are bfloat16 and those", Case(2, 128, 8, 4, x_dtype="float32"))
        on("values of a table have no integer product", Case(2, 128, 8, 4, nf4=True), activation_bits=8)
        on("it has 4097 tokens, allowed are 1 to 4096", Case(4097, 128, 8, 4))

    def test_what_the_library_does_not_take_from_an_unpacked_weight(self):
        on = functools.partial(self.refused, layout="plain", backend="dense", platform="cuda")
        on("it rounds weights to bfloat16, and the activations are float32", Case(2, 128, 8, 4, x_dtype="float32"))
        on("it adds up rows of 2 groups in one integer", Case(2, 128, 8, 4, 64), activation_bits=8)
        on("values of a table have no integer product", Case(2, 128, 8, 4, nf4=True), activation_bits=8)

    def test_what_pack_would_not_make(self):
        x, packed, _ = draw(CASE, "plain", 0, exact=True)
        of = functools.partial(dataclasses.replace, packed)
        allowed = "in layout 'plain' are uint8[20, 6]: allowed are uint8"
        whole = f"codes of a weight [40, 6] of 8 bits {allowed}[40, 6]; use what `pack` returns"
        for odd, match in (
            (of(layout="gpu"), "^unknown layout 'gpu': allowed is plain, cpu, tpu, hopper$"),
            (
                of(bits=9),
                "^layout 'plain' does not hold this weight: it has 9 bits, allowed are 1, 2, 3, 4, 5, 6, 7, 8$",
            ),
            (of(bits=8), f"^{re.escape(whole)}$"),
            (of(layout="cpu"), r"codes of a .* in layout 'cpu' are uint8\[20, 6\]: allowed are uint8\[2, 6, 16\]"),
            (
                of(layout="hopper"),
                "^layout 'hopper' does not hold this weight: its groups have 16 rows, allowed are 32, 64",
            ),
            (
                of(group_size=8),
                r"^scales of .* are float32\[3, 6\]: allowed are floats\[5, 6\]; use what `pack` returns$",
            ),
            (
                of(scales=packed.scales.astype(jnp.int32)),
                r"^scales of .* are int32\[3, 6\]: allowed are floats\[3, 6\]",
            ),
            (of(zeros=packed.scales), r"^zeros of .* are float32\[3, 6\]: allowed are uint8\[3, 3\]"),
        ):
            with pytest.raises(KernelError, match=match):
                quantized_matmul(x, odd)

    @pytest.mark.parametrize("scale", [jnp.ones(6), jnp.ones((3, 1)), jnp.ones((1, 4, 1)), jnp.ones((4, 1), jnp.int32)])
    def test_scales_of_activations(self, scale):
        match = (
            rf"^scales of activations are {scale.dtype}{re.escape(str(list(scale.shape)))}: allowed are floats that "
        )
        self.refused(match + r"broadcast to \[4, 1\]$", x=jnp.zeros((4, 40), jnp.int8), activation_scale=scale)

    def test_tiles(self):
        case = Case(2, 128, 8, 4)
        match = r"^backend 'tpu' has no tiles \[8, 100, 100\] for this matmul: leave `config` out for \["
        self.refused(match, case, "tpu", backend="tpu", config=(8, 100, 100), interpret=True)

    def test_an_unknown_platform(self):
        self.refused("^unknown platform 'abacus': allowed is cpu, tpu, cuda$", platform="abacus")

    def test_a_table_with_rounded_activations(self):
        case = Case(2, 16, 4, 4, 8, nf4=True)
        for layout, backend in (("plain", "auto"), ("plain", "reference"), ("cpu", "cpu")):
            match = "values of a table have no integer product"
            self.refused(match, case, layout, backend=backend, activation_bits=8)


class TestTheChoice:
    entries = (
        Entry(PROBLEM, "tpu", (16, 1024, 512), "measured", 20.0),
        Entry(dataclasses.replace(PROBLEM, m=256), "reference", (), "measured", 90.0),
        Entry(dataclasses.replace(PROBLEM, group_size=256), "tpu", (16, 128, 256), "measured", 1.0),
        Entry(dataclasses.replace(PROBLEM, bits=8), "cpu", (), "measured", 1.0),
    )

    def test_an_entry_of_the_table_decides(self):
        assert choose(PROBLEM, "tpu", self.entries) == ("tpu", (16, 1024, 512))

    def test_the_nearest_of_the_same_kind_decides_where_none_fits(self):
        assert nearest(dataclasses.replace(PROBLEM, m=40), self.entries) is self.entries[0]
        assert choose(dataclasses.replace(PROBLEM, m=100), "tpu", self.entries) == ("reference", ())

    def test_tiles_that_do_not_divide_are_left_aside(self):
        odd = dataclasses.replace(PROBLEM, n=3712)
        assert choose(odd, "tpu", self.entries) == ("tpu", tiles(odd))

    def test_bytes_and_operations_decide_where_the_table_is_silent(self):
        far = dataclasses.replace(PROBLEM, k=128)
        assert nearest(far, self.entries) is None
        assert choose(PROBLEM, "tpu", ()) == ("tpu", tiles(PROBLEM))
        here = "cpu" if isinstance(library(), str) else "native"
        assert choose(dataclasses.replace(PROBLEM, layout="cpu", m=512), "cpu", ())[0] == here

    def test_a_kernel_that_is_predicted_to_be_slower_than_dequantizing_first_is_not_taken(self):
        """Sums of every group cost more than the whole weight in float32 where tokens are many."""
        many = dataclasses.replace(PROBLEM, m=4096, activation_bits=8)
        predicted = {name: BACKENDS[name].seconds(many, device("tpu", "tpu")) for name in ("tpu", "reference")}
        assert predicted["reference"] < predicted["tpu"]
        assert choose(many, "tpu", ()) == ("reference", ())
        assert choose(dataclasses.replace(many, m=16), "tpu", ())[0] == "tpu"

    def test_entries_of_backends_that_cannot_run_here_are_not_taken(self):
        assert choose(dataclasses.replace(PROBLEM, bits=8), "tpu", self.entries)[0] == "tpu"
        assert choose(PROBLEM, "cuda", self.entries)[0] == "reference"

    def test_a_prediction_is_never_below_the_roofline(self):
        for case in SPEED:
            for layout, platform in (("cpu", "cpu"), ("tpu", "tpu")):
                x = jax.ShapeDtypeStruct((case.m, case.k), case.x_dtype)
                problem = dataclasses.replace(PROBLEM, m=case.m, bits=case.bits, layout=layout, x_dtype=str(x.dtype))
                limit = roofline(problem, platform)
                assert 0 < limit <= min(b.seconds(problem, device(platform, platform)) for b in BACKENDS.values())


class TestTpuTiles:
    def test_are_legal_and_large(self):
        for m, k, n, bits, group in ((1, 4096, 11008, 4, 128), (300, 300, 7, 8, None), (16, 28672, 8192, 2, 256)):
            problem = dataclasses.replace(PROBLEM, m=m, k=k, n=n, bits=bits, group_size=group)
            chosen = tiles(problem)
            assert legal(problem, chosen)
            assert chosen[1] * chosen[2] >= min(2**20, -(-k // 128) * -(-n // 128) * 128**2)

    @pytest.mark.parametrize(
        "config", [(), (8, 128, 128), (16, 100, 128), (16, 128, 96), (16, 384, 128), (16, 4096, 4096)]
    )
    def test_others_are_not(self, config):
        assert not legal(PROBLEM, config)

    def test_a_group_is_not_cut_unevenly(self):
        assert legal(dataclasses.replace(PROBLEM, k=768, group_size=256), (16, 128, 128))
        assert not legal(dataclasses.replace(PROBLEM, k=768, group_size=256), (16, 128, 384))

    @pytest.mark.parametrize(
        ("group_size", "config"), [(256, (16, 128, 128)), (128, (16, 128, 256)), (32, (16, 128, 256))]
    )
    def test_many_tiles_make_one_matmul(self, group_size, config):
        """Groups longer and shorter than a tile of rows, and than a dot takes; two tiles along every axis."""
        case = Case(20, 500, 200, 4, group_size)
        x, packed, arrays = draw(case, "tpu", 0, exact=True)
        assert legal(describe(x, packed, None), config)
        run = jax.jit(lambda x, p: BACKENDS["tpu"](x, p, None, config=config, interpret=True))
        want, magnitude = oracle(case, x, arrays)
        assert (np.abs(run(x, packed) - want) <= bound(case, magnitude)).all()
        np.testing.assert_array_equal(run(x, packed), want)


class TestManyTokensOnTpus:
    """Scales before the product: the weight is rounded to bfloat16 once."""

    def test_is_taken_where_it_is_less_work(self):
        many = dataclasses.replace(PROBLEM, m=256)
        assert tiles(many)[3:] == (1,)
        assert legal(many, tiles(many))
        for few in (PROBLEM, dataclasses.replace(many, x_dtype="float32"), dataclasses.replace(many, group_size=None)):
            assert len(tiles(few)) == 3
        assert not legal(dataclasses.replace(many, activation_bits=8), (32, 128, 128, 1))
        assert not legal(many, (16, 128, 128, 2))

    @pytest.mark.parametrize(
        ("k", "group_size", "config"),
        [(500, 128, (16, 128, 256, 1)), (512, 256, (32, 256, 128, 1)), (500, 64, (16, 128, 256, 1))],
    )
    def test_equals_the_oracle_but_for_that_rounding(self, k, group_size, config):
        case = Case(20, k, 200, 4, group_size)
        run = jax.jit(lambda x, p: BACKENDS["tpu"](x, p, None, config=config, interpret=True))
        x, packed, arrays = draw(case, "tpu", 0, exact=True)
        assert legal(describe(x, packed, None), config)
        np.testing.assert_array_equal(run(x, packed), oracle(case, x, arrays)[0])  # powers of two round nothing
        x, packed, arrays = draw(case, "tpu", 0, exact=False)
        want, magnitude = oracle(case, x, arrays)
        off = np.abs(run(x, packed) - want)
        assert (off <= bound(case, magnitude) + 2.0**-8 * magnitude).all()  # twice the unit roundoff of bfloat16
        assert (off > bound(case, magnitude)).any()
        assert compat.races_found() is False


def test_nf4_lowers_for_tpus_through_the_reference():
    x, packed, _ = draw(Case(5, 384, 256, 4, 128, nf4=True), "plain", 0, exact=False)
    lowered = export.export(jax.jit(functools.partial(quantized_matmul, platform="tpu")), platforms=["tpu"])(x, packed)
    assert lowered.out_avals[0].shape == (5, 256)


@pytest.mark.parametrize(
    "case",
    [
        Case(200, 512, 256, 4, 128),
        Case(5, 384, 256, 2, 128),
        Case(5, 384, 256, 4, 128, zeros=True),
        Case(1, 2048, 2048, 8),
        Case(5, 384, 256, 4, 32),
        Case(200, 512, 256, 4, 16),
        Case(5, 384, 256, 2, 64, activation_bits=8),
        Case(40, 384, 256, 8, 128, activation_bits=8),
        Case(1, 384, 256, 4, activation_bits=8, batch=(2,)),
        Case(1, 384, 256, 4, 128, x_dtype="float32"),
    ],
    ids=str,
)
def test_tpu_kernels_lower_without_a_tpu(case):
    """To Mosaic, by rules that interpretation does not know: blocks, memory spaces, operations."""
    x, packed, _ = draw(case, "tpu", 0, exact=True)
    run = functools.partial(quantized_matmul, activation_bits=case.activation_bits, backend="tpu", platform="tpu")
    lowered = export.export(jax.jit(run), platforms=["tpu"])(x, packed)
    assert "tpu_custom_call" in lowered.mlir_module()
    assert lowered.out_avals[0].shape == (*case.batch, case.m, case.n)


@pytest.mark.parametrize(
    ("backend", "case"),
    [
        ("hopper", Case(5, 384, 256, 4, 128, zeros=True)),
        ("hopper", Case(64, 512, 128, 2, 256)),
        ("hopper", Case(1, 384, 130, 8)),
        ("hopper", Case(200, 512, 128, 4, 128, activation_bits=8)),
        ("hopper", Case(16, 512, 128, 4, 128, nf4=True)),
        ("hopper", Case(5, 300, 250, 4, 64, zeros=True)),
        ("hopper", Case(9, 500, 128, 2, 32)),
        ("hopper", Case(9, 256, 128, 4, 32, activation_bits=8)),
        ("hopper", Case(4, 256, 128, 4, 128, batch=(3,))),
        ("hopper", Case(4, 256, 128, 4, 128, activation_bits=8, batch=(2, 2))),
        ("dense", Case(300, 512, 128, 4, 128, nf4=True)),
        ("dense", Case(300, 512, 128, 4, 32)),
        ("dense", Case(300, 512, 128, 4, activation_bits=8)),
    ],
    ids=str,
)
def test_kernels_for_hopper_lower_without_a_gpu(backend, case):
    """To Mosaic GPU: layouts of registers, swizzles of shared memory, barriers."""
    x, packed, _ = draw(case, "hopper", 0, exact=True)
    run = functools.partial(quantized_matmul, backend=backend, platform="cuda", activation_bits=case.activation_bits)
    lowered = export.export(jax.jit(run), platforms=["cuda"])(x, packed)
    kernels = lowered.mlir_module().count("custom_call @mosaic_gpu")
    assert kernels == (2 if backend == "hopper" and case.activation_bits and not case.zeros else 1)
    assert "stablehlo.while" not in lowered.mlir_module()  # experts are not computed one after the other
    assert lowered.out_avals[0].shape == (*case.batch, case.m, case.n)


def test_weights_are_arguments_and_nothing_compiles_twice():
    x, packed, _ = draw(CASE, "cpu", 0, exact=True)
    other = draw(CASE, "cpu", 5, exact=True)[1]
    run = jax.jit(lambda x, p: quantized_matmul(x, p))  # a function of its own: jits of one function share a cache
    assert not np.array_equal(run(x, packed), run(x, other))
    assert run._cache_size() == 1


def test_the_cpu_multiplies_int8_by_two_rows_or_more():
    """The fast dot of XLA on CPUs takes int8 operands of two rows, unpacked behind a barrier."""
    case = Case(1, 64, 8, 4, 32, activation_bits=8)
    x, packed, _ = draw(case, "cpu", 0, exact=True)
    text = jax.jit(functools.partial(quantized_matmul, activation_bits=8, backend="cpu")).lower(x, packed).as_text()
    assert "(tensor<2x32xi8>, tensor<8x32xi8>) -> tensor<2x8xi32>" in text
    assert "optimization_barrier" in text


def test_the_cpu_unpacks_chunks_that_divide_a_segment():
    for segment, size in ((4096, 256), (2048, 256), (128, 128), (300, 150), (96, 96), (509, 509), (1, 1)):
        assert chunk(segment) == size


def test_the_table_of_nf4_has_an_exact_zero():
    assert NF4[7] == 0
    assert list(NF4) == sorted(NF4)
