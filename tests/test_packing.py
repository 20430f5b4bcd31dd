"""Bit streams of codes."""

import numpy as np
import pytest

from mpq.export import packing
from mpq.export.packing import pack, packed_size, unpack
from mpq.types import MpqError

WIDTHS = range(2, 9)


def oracle(codes, bits, smallest):
    """One Python integer holds the whole stream."""
    stream = sum((int(code) - smallest) << (i * bits) for i, code in enumerate(codes))
    return np.frombuffer(stream.to_bytes(packed_size(len(codes), bits), "little"), np.uint8)


@pytest.mark.parametrize("bits", WIDTHS)
class TestEveryWidth:
    @pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
    def test_all_pairs_of_codes_come_back(self, bits, signed):
        smallest = -(2 ** (bits - 1)) if signed else 0
        if bits == 8 and not signed:
            smallest = -128  # int8 holds no other 8-bit range
        values = np.arange(smallest, smallest + 2**bits, dtype=np.int16).astype(np.int8)
        codes = np.stack(np.meshgrid(values, values), axis=-1).reshape(-1)
        stream = pack(codes, bits, smallest)
        assert stream.dtype == np.uint8
        np.testing.assert_array_equal(unpack(stream, codes.size, bits, smallest), codes)

    def test_every_length_equals_the_definition(self, bits):
        smallest = -(2 ** (bits - 1))
        for count in range(26):
            codes = np.random.default_rng(count).integers(smallest, -smallest, count).astype(np.int8)
            stream = pack(codes, bits, smallest)
            assert stream.size == packed_size(count, bits) == (count * bits + 7) // 8
            np.testing.assert_array_equal(stream, oracle(codes, bits, smallest))
            np.testing.assert_array_equal(unpack(stream, count, bits, smallest), codes)

    def test_chunks_join_without_a_seam(self, bits, monkeypatch):
        smallest = -(2 ** (bits - 1))
        codes = np.random.default_rng(0).integers(smallest, -smallest, (5, 21)).astype(np.int8)
        whole = pack(codes, bits, smallest)
        monkeypatch.setattr(packing, "_CHUNK", 16)
        np.testing.assert_array_equal(pack(codes, bits, smallest), whole)
        np.testing.assert_array_equal(unpack(whole, codes.size, bits, smallest), codes.reshape(-1))

    def test_codes_outside_the_range_are_refused(self, bits):
        smallest = -(2 ** (bits - 1)) + 1  # one above int8's own, so that both sides can be left
        for wrong in (smallest - 1, *([smallest + 2**bits] if bits < 8 else [])):
            with pytest.raises(MpqError, match=f"code {wrong} does not fit into {bits} bits"):
                pack(np.array([0, wrong], np.int8), bits, smallest)

    def test_a_stream_of_another_length_is_refused(self, bits):
        with pytest.raises(MpqError, match="truncated"):
            unpack(np.zeros(packed_size(9, bits) - 1, np.uint8), 9, bits, 0)


def test_four_bit_codes_lie_low_nibble_first():
    np.testing.assert_array_equal(pack(np.array([1, 2, 15], np.int8), 4, 0), [0x21, 0x0F])
