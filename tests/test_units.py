import pytest

from mpq.types import MpqError
from mpq.units import bpw_to_bits, format_bits, format_bpw, parse_size


@pytest.mark.parametrize(
    ("size", "size_bytes"),
    [
        (1, 1),
        (4_000_000, 4_000_000),
        ("4000000", 4_000_000),
        ("4MB", 4_000_000),
        ("4 mb", 4_000_000),
        ("1.1MB", 1_100_000),  # the double 1.1 * 1e6 is 1100000.0000000002, and 1.1 * 1e3 would round down elsewhere
        ("0.29kB", 290),  # floor(0.29 * 1000) in floats is 290, of 0.57 it is 569
        ("0.57kB", 570),
        ("1.5MiB", 1_572_864),
        ("2KiB", 2048),
        ("1GiB", 2**30),
        ("3TB", 3 * 10**12),
        (".5kB", 500),
        ("7 B", 7),
        ("1.9B", 1),
    ],
)
def test_sizes(size, size_bytes):
    assert parse_size(size) == 8 * size_bytes


@pytest.mark.parametrize("size", ["", "MB", "4 XB", "four MB", "-4MB", "1e6", "4MB5", "nan"])
def test_text_that_is_no_size(size):
    with pytest.raises(MpqError, match="is not a number with a unit of B, kB, MB, GB"):
        parse_size(size)


@pytest.mark.parametrize("size", [0, -3, "0MB", "0.5B"])
def test_sizes_are_positive(size):
    with pytest.raises(MpqError, match="not positive"):
        parse_size(size)


@pytest.mark.parametrize("size", [4.0, True, None])
def test_sizes_are_int_or_text(size):
    with pytest.raises(MpqError, match="neither whole bytes nor text"):
        parse_size(size)


def test_bits_per_weight():
    assert bpw_to_bits(3.3, 10) == 33  # the double below 3.3 would give 32
    assert bpw_to_bits(3.25, 4096) == 13312
    assert bpw_to_bits(4, 7) == 28
    assert bpw_to_bits(2.999, 1000) == 2999
    assert bpw_to_bits(0.3, 3) == 0


@pytest.mark.parametrize("bpw", [0, -1.0, float("nan"), float("inf"), True, "3"])
def test_bits_per_weight_are_positive_numbers(bpw):
    with pytest.raises(MpqError, match="not a positive number"):
        bpw_to_bits(bpw, 10)


def test_text_forms():
    assert format_bits(8 * 999) == "999 bytes"
    assert format_bits(8 * 1_234_567) == "1234567 bytes (1.23 MB)"
    assert format_bits(9) == "2 bytes"
    assert format_bits(8 * 5 * 10**12) == "5000000000000 bytes (5.00 TB)"
    assert format_bpw(7, 2) == "3.5000 bpw"
