"""Packed weights: every width, layout and shape comes back, and takes the bytes that it should."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import LAYOUTS, NF4, KernelError, dequantize, pack, relayout, unpack
from kernels_pallas.bits import pack_bits, packed_rows, planes, unpack_bits
from kernels_pallas.layouts import Spec
from mpq.formats import FORMATS, parse_scheme
from mpq.formats.codebook import NF4_LEVELS

WIDTHS = range(1, 9)


def weight(bits, k, n, group_size, batch=(), zeros=True, levels=None, seed=0, columns=None):
    """Logical arrays of a random weight; every code appears if there are rows enough."""
    rng = np.random.default_rng(seed)
    lowest, count = (0, len(levels)) if levels else (-(2 ** (bits - 1)), 2**bits)
    shape = (*batch, 1 if group_size is None else math.ceil(k / group_size), columns or n)
    codes = rng.permutation(np.arange(math.prod(batch) * k * n) % count + lowest).astype(np.int8).reshape(*batch, k, n)
    points = rng.integers(lowest, lowest + count, (*shape[:-1], n)).astype(np.int8) if zeros and not levels else None
    return codes, rng.uniform(0.5, 2, shape).astype(np.float32), points


def logical(packed):
    """What `unpack` says, on the host: compiled it runs in `tests/conformance`."""
    return unpack(jax.tree.map(np.asarray, packed))


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_array_equal(np.asarray(a), b)


@pytest.mark.parametrize("bits", WIDTHS)
class TestPlanes:
    def test_a_stream_equals_its_definition(self, bits):
        """One Python integer a byte, written from the documented positions of every bit."""
        codes = np.random.default_rng(bits).integers(0, 2**bits, (11, 2)).astype(np.uint8)
        want = []
        for column in codes.T.tolist():
            shift, stream = 0, []
            for width in planes(bits):
                per_byte = 8 // width
                rows = [0] * math.ceil(len(column) / per_byte)
                for i, code in enumerate(column):
                    rows[i // per_byte] |= ((code >> shift) % 2**width) << (i % per_byte * width)
                stream, shift = stream + rows, shift + width
            want.append(stream)
        np.testing.assert_array_equal(pack_bits(codes, bits), np.array(want, np.uint8).T)

    def test_every_length_comes_back(self, bits):
        for rows in (1, 7, 8, 9, 26):
            codes = (np.arange(rows * 3) % 2**bits).astype(np.uint8).reshape(rows, 3)
            packed = pack_bits(codes, bits)
            assert packed.shape == (packed_rows(rows, bits), 3)
            assert 0 <= 8 * packed_rows(rows, bits) - rows * bits <= 7 * len(planes(bits))
            np.testing.assert_array_equal(unpack_bits(packed, bits, rows), codes)


@pytest.mark.parametrize("bits", [0, 9])
def test_other_widths_are_refused(bits):
    with pytest.raises(KernelError, match="1 to 8 are allowed"):
        planes(bits)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_code_and_shape_comes_back(layout):
    """Every width, table, grouping, odd size and batch that the layout holds."""
    held = 0
    for bits in WIDTHS:
        for levels in (None, NF4) if bits == 4 else (None,):
            for k, n, group_size, batch in (
                (130, 5, 128, ()),
                (37, 9, 8, (2, 3)),
                (65, 7, None, (2,)),
                (1, 1, None, ()),
            ):
                if LAYOUTS[layout].refuses(Spec(k, n, bits, group_size, levels)) is None:
                    want = weight(bits, k, n, group_size, batch, levels=levels)
                    packed = pack(*want, bits=bits, group_size=group_size, layout=layout, levels=levels)
                    assert packed.batch_shape == batch
                    assert_same(logical(packed), want)
                    held += 1
    assert held >= 6


def test_one_scale_for_all_columns_comes_back():
    codes, scales, _ = weight(4, 20, 6, 8, zeros=False, columns=1)
    packed = pack(codes, scales, bits=4, group_size=8)
    assert_same(logical(packed), (codes, scales, None))
    np.testing.assert_array_equal(jax.jit(dequantize)(packed), codes * np.repeat(scales, 8, 0)[:20])


def test_relayout_goes_round():
    want = weight(4, 256, 24, 128)
    packed = pack(*want, bits=4, group_size=128)
    for layout in ("cpu", "tpu", "hopper", "plain"):
        packed = relayout(packed, layout)
        assert packed.layout == layout
    assert_same(logical(packed), want)


def test_a_packed_weight_is_a_pytree():
    packed = pack(*weight(3, 16, 4, 8), bits=3, group_size=8)
    assert len(jax.tree.leaves(packed)) == 3
    twice = jax.tree.map(lambda a: jnp.stack([a, a]), packed)
    assert twice.batch_shape == (2,)
    np.testing.assert_array_equal(jax.jit(dequantize)(twice)[1], jax.jit(dequantize)(packed))


@pytest.mark.parametrize(
    "text", ["int8_channel", "int4_g64_zp", "int3_g32_sbfloat16", "int2_g64", "int5_channel_zp", "nf4_g64"]
)
def test_a_plain_weight_takes_the_bits_of_its_scheme(text):
    """To the bit where k fills bytes; else a packed column ends in at most 7 bits a plane, which a stream has not."""
    scheme = parse_scheme(text)
    levels, zeros = (NF4, False) if text.startswith("nf4") else (None, scheme.zero_point)
    for k, n in ((256, 64), (67, 16)):
        codes, scales, points = weight(scheme.format.bits, k, n, scheme.group_size, zeros=zeros, levels=levels)
        scales = scales.astype(scheme.scale_dtype)
        packed = pack(codes, scales, points, bits=scheme.format.bits, group_size=scheme.group_size, levels=levels)
        padding = packed.size_bits - scheme.size_bits(k, n)
        assert 0 <= padding <= 7 * len(planes(scheme.format.bits)) * n * (k % 8 != 0)


def test_the_cpu_layout_takes_the_same_bits_where_segments_are_whole():
    codes, scales, _ = weight(4, 256, 64, 64, zeros=False)
    sizes = {layout: pack(codes, scales, bits=4, group_size=64, layout=layout).size_bits for layout in ("plain", "cpu")}
    assert sizes["cpu"] == sizes["plain"] == 256 * 64 * 4 + 4 * 64 * 32


def test_the_accelerators_layouts_take_the_same_bits_but_for_scales_in_float32_where_tiles_are_whole():
    codes, scales, _ = weight(4, 256, 128, 128, zeros=False)
    scheme = parse_scheme("int4_g128")
    for layout in ("tpu", "hopper"):
        packed = pack(codes, scales.astype(scheme.scale_dtype), bits=4, group_size=128, layout=layout)
        assert packed.size_bits == 256 * 128 * 4 + 2 * 128 * 32 == scheme.size_bits(256, 128) + 2 * 128 * 16


def test_the_table_is_that_of_the_library():
    assert NF4 == NF4_LEVELS == FORMATS["nf4"].levels


class TestRefusals:
    codes, scales, zeros = weight(4, 16, 4, 8)

    def refused(self, match, codes=None, scales=None, zeros=None, **options):
        arrays = [given if given is not None else own for given, own in ((codes, self.codes), (scales, self.scales))]
        with pytest.raises(KernelError, match=match):
            pack(*arrays, zeros, **{"bits": 4, "group_size": 8, **options})

    def test_an_unknown_layout(self):
        self.refused("unknown layout 'gpu': allowed is plain, cpu, tpu, hopper", layout="gpu")

    def test_codes_of_another_dtype_or_rank(self):
        self.refused(r"codes are int32\[16, 4\]", codes=self.codes.astype(np.int32))
        self.refused(r"codes are int8\[4\]", codes=self.codes[0])

    def test_codes_of_no_bits_or_too_many(self):
        for bits in (0, 9):
            self.refused(f"codes of {bits} bits cannot be packed", bits=bits)

    def test_a_group_of_nothing(self):
        self.refused("a group of 0 rows", group_size=0)

    def test_scales_that_do_not_fit(self):
        self.refused(r"scales are float32\[1, 4\]: allowed are floats\[2, 4\]", scales=self.scales[:1])
        self.refused("scales are int8", scales=self.zeros)

    def test_zero_points_that_do_not_fit(self):
        self.refused(r"zero points are int8\[1, 4\]", zeros=self.zeros[:1])
        self.refused("zero points are float32", zeros=self.scales)
        self.refused("zero points are int8", zeros=self.zeros, codes=abs(self.codes // 2), levels=NF4)

    def test_more_levels_than_codes(self):
        self.refused("16 levels for codes of 3 bits: allowed are 8", bits=3, levels=NF4)

    def test_codes_and_zero_points_out_of_range(self):
        self.refused("code 8 does not fit into 4 bits: allowed is -8 to 7", codes=self.codes + np.int8(1))
        self.refused("zero point 9 does not fit", zeros=np.full_like(self.zeros, 9))
        self.refused("code -8 does not fit into 4 bits: allowed is 0 to 15", levels=NF4)

    @pytest.mark.parametrize(
        ("layout", "options", "reason"),
        [
            ("cpu", {"bits": 5}, "it has 5 bits, allowed are 8, 4, 2"),
            ("tpu", {"levels": NF4}, "its values come from a table"),
            ("tpu", {}, "its groups have 8 rows, allowed are"),
            ("hopper", {}, "its groups have 8 rows, allowed are"),
            ("hopper", {"bits": 3}, "it has 3 bits, allowed are 8, 4, 2"),
        ],
    )
    def test_what_a_layout_does_not_hold(self, layout, options, reason):
        codes = np.zeros_like(self.codes)
        self.refused(f"layout '{layout}' does not hold this weight: {reason}", codes=codes, layout=layout, **options)


def test_a_packed_weight_is_frozen():
    packed = pack(*weight(4, 8, 2, None), bits=4, group_size=None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        packed.k = 3  # pyright: ignore[reportAttributeAccessIssue]
