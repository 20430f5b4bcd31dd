"""Numbers, schemes and findings as people read them."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.axes import round_ticks
from analysis.findings import headline, next_scheme_note, verdict
from analysis.load import Comparison, TableInfo
from analysis.text import code_width, effective_bits, layers_and_roles, megabytes, significant, thin, with_error
from tests.analysis_cases import parsed


@pytest.fixture(scope="module")
def result():
    return parsed()


class TestText:
    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (0.0312, "0.0312"),
            (12.345, "12.3"),
            (9.999, "10.0"),
            (1234567, "1230000"),
            (0.000123, "0.000123"),
            (4.1e-6, "4.10e-6"),
            (-0.5, "−0.500"),
            (0, "0"),
            (None, "–"),
            (math.nan, "–"),
            (math.inf, "–"),
        ],
    )
    def test_significant(self, value, text):
        assert significant(value) == text

    @pytest.mark.parametrize(
        ("value", "error", "text"),
        [
            (0.03123, 0.00212, "0.0312 ± 0.0021"),
            (-0.0312, 0.0104, "−0.031 ± 0.010"),
            (123.4, 12.0, "123 ± 12"),
            (12345.0, 678.0, "12345 ± 678"),
            (1.0, 0.0996, "1.00 ± 0.10"),  # the error rounds up into the next decade
            (-0.0001, 0.1, "0.00 ± 0.10"),  # no minus zero
            (-3.2e-8, 1.1e-8, "−3.2e-8 ± 1.1e-8"),
            (0.5, None, "0.500"),
            (0.5, 0.0, "0.500"),
            (None, 0.1, "–"),
        ],
    )
    def test_with_error(self, value, error, text):
        assert with_error(value, error) == text

    @pytest.mark.parametrize(
        ("path", "expected"),
        [
            ("layers.3.mlp.up_proj.kernel", ("3", "mlp.up_proj")),
            ("layers.mlp.up_proj.kernel[3]", ("3", "mlp.up_proj")),
            ("layers.mlp.experts.kernel[3, 1]", ("3", "mlp.experts[1]")),
            ("layers.3.mlp.experts.up_proj.kernel[1]", ("3", "mlp.experts.up_proj[1]")),
            ("model/layers/12/attn/q/weight", ("12", "attn.q")),
            ("embed_tokens.embedding", (None, "embed_tokens")),
            ("kernel", (None, "kernel")),
        ],
    )
    def test_layer_and_role(self, path, expected):
        assert layers_and_roles([path]) == {path: expected}

    def test_layers_of_several_lists_are_told_apart(self):
        paths = ["conv1.kernel", "layer1.0.conv1.kernel", "layer1.1.conv1.kernel", "layer2.0.conv1.kernel"]
        assert list(layers_and_roles(paths).values()) == [
            (None, "conv1"),
            ("layer1.0", "conv1"),
            ("layer1.1", "conv1"),
            ("layer2.0", "conv1"),
        ]

    def test_weights_of_like_names_have_places_of_their_own(self):
        paths = ["a.0.x.kernel", "b.0.x.kernel", "a.0.x.1.kernel", "a.0.x.kernel[1]", "a.0.kernel", "0.kernel", "x[2]"]
        places = layers_and_roles(paths)
        assert len(set(places.values())) == len(paths)

    @pytest.mark.parametrize(
        ("scheme", "width", "effective"),
        [
            ("int3_g64", 3, 3.25),
            ("int4_g32_zp", 4, 4.625),
            ("nf4_g64", 4, 4.25),
            ("int8_channel", 8, 8.0),
            ("fp8_e4m3_g64", 8, 8.25),
            ("fp4_g16_sfp8", 4, 4.5),
            ("fp4_g32_se8m0", 4, 4.25),
            ("int4_g32_zp_sfloat32", 4, 5.125),
            ("int4_g64_sbfloat16", 4, 4.25),
            ("int8_tensor", 8, 8.0),
            ("bf16", 16, 16.0),
            ("q4_k", 4, 4.0),
            ("strange", 0, 0.0),
        ],
    )
    def test_schemes(self, scheme, width, effective):
        assert (code_width(scheme), effective_bits(scheme)) == (width, effective)

    def test_megabytes(self):
        assert (megabytes(4_056_000), megabytes(812_300)) == ("4.06 MB", "812 kB")

    @given(st.lists(st.floats(0, 100), min_size=1, max_size=60).map(sorted), st.integers(3, 40))
    def test_thinning_keeps_both_ends_and_the_limit(self, values, limit):
        kept = thin(values, limit)
        assert kept == sorted(set(kept))
        assert (kept[0], kept[-1]) == (0, len(values) - 1)
        assert len(kept) <= max(limit, 1) or len(values) <= limit
        assert len(kept) == len(values) or len(values) > limit

    @given(st.floats(1e-6, 1e6), st.floats(1.3, 1e7))
    def test_ticks_are_few_inside_and_ascending(self, low, ratio):
        ticks = round_ticks(low, low * ratio)
        assert len(ticks) <= 9
        assert ticks == sorted(ticks)
        # Equal steps are multiples of a step; one may miss an end by a rounding.
        assert all(low * (1 - 1e-12) <= tick <= low * ratio * (1 + 1e-12) for tick in ticks)
        assert len(ticks) >= 2 or ratio < 2.6 or ratio > 4


class TestFindings:
    def compare(self, **changes):
        return dataclasses.replace(Comparison("p", "b", 3.0, -0.1, 0.01, -10.0), **changes)

    @pytest.mark.parametrize(
        ("changes", "word"),
        [
            ({}, "better"),
            ({"z": 2.0}, "worse"),
            ({"z": -1.99}, "no difference shown"),
            ({"z": None}, "error unknown"),
            ({"baseline": None}, "no baseline fits"),
        ],
    )
    def test_verdict_at_two_standard_errors(self, changes, word):
        assert verdict(self.compare(**changes)) == word

    def test_headline_speaks_of_the_middle_budget(self, result):
        plan, baseline = result.plan("mixed@3.5bpw", "gptq"), result.plan("int3_g64", "gptq")
        text = headline(result)
        assert f"At {plan.bits_per_weight:.2f} bits per weight" in text
        assert f"loses {with_error(plan.kl, plan.kl_stderr)} nats per token" in text
        assert f"int3_g64, loses {with_error(baseline.kl, baseline.kl_stderr)}. Mixing is better by" in text

    @pytest.mark.parametrize(
        ("z", "words"), [(5.0, "Mixing is worse by"), (0.5, "none is shown"), (None, "standard error is not known")]
    )
    def test_headline_is_honest(self, result, z, words):
        changed = tuple(dataclasses.replace(c, z=z) for c in result.comparisons)
        assert words in headline(dataclasses.replace(result, comparisons=changed))

    def test_headline_without_a_baseline(self, result):
        text = headline(dataclasses.replace(result, comparisons=()))
        assert "mixed@3.0bpw loses 0.0983 ± 0.0049" in text
        assert "no uniform scheme fits" in text

    @pytest.mark.parametrize(
        ("losses", "errors", "scheme", "expected"),
        [
            ((0.10, 0.05), (0.01, 0.01), "int3_g64", None),  # falls by 3.5 errors
            ((0.10, 0.08), (0.01, 0.01), "int3_g64", "int4_g64"),  # by 1.4
            ((0.10, 0.12), (0.0, 0.0), "int3_g64", "int4_g64"),  # more bits are predicted to lose more
            ((0.10, 0.05), (None, None), "int3_g64", None),
            ((0.10, 0.05), (0.01, 0.01), "int4_g64", None),  # there is none larger
            ((0.10, 0.05), (0.01, 0.01), "int9_g64", None),
        ],
    )
    def test_next_scheme(self, losses, errors, scheme, expected):
        # Columns in the order of the table, which need not be that of the sizes.
        table = TableInfo(("w",), ("int4_g64", "int3_g64"), (losses[::-1],), (errors[::-1],))
        assert next_scheme_note(table, "w", scheme) == expected
