"""The page of learned levels, from results made up here."""

from analysis.codebooks import page


def rounded(scheme: str, algorithm: str, part: str, bits: float, kl: float) -> dict:
    row = {"scheme": scheme, "algorithm": algorithm, "part": part, "bits_per_weight": bits}
    return row | {"kl": kl, "kl_stderr": 0.01}


def test_the_page_compares_with_the_better_fixed_table_of_the_same_width():
    rows = [
        rounded("int3_g32", "gptq", "blocks", 3.5, 0.5),
        rounded("nf3_g32", "gptq", "blocks", 3.5, 0.4),
        rounded("int4_g32", "gptq", "blocks", 4.5, 0.1),
        rounded("lut3_g32", "gptq", "blocks", 3.5045, 0.3),
        rounded("lut3_g32", "qep", "blocks", 3.5045, 0.2),
    ]
    more = [rounded("tcq3_channel", "gptq", "blocks", 3.0625, 0.2)]
    head = {"record": {"config": {"model": "tiny", "windows": 4, "window": 16}}}
    plan = {"bits_per_weight": 2.9, "budget": 2.9, "ingredient": "fine", "kl": 0.6, "kl_stderr": 0.02}
    options = {"model": "tiny", "uniform": ["int3_g32"], "fine": ["int2_g32"]}
    fixed = {"options": options, "rows": [plan | {"schemes": {"int3_g32": 3}}]}
    learned = {"options": options | {"fine": ["int2_g32", "lut2_g32"]}}
    learned["rows"] = [plan | {"kl": 0.5, "schemes": {"int3_g32": 1, "lut2_g32": 2}}]
    width = {"bits": 3, "bound": 0.015625, "own": 0.019, "best": 0.0188, "levels": 0.0345}
    text = page([learned, fixed, head | {"rows": rows}, {"widths": [width]}, head | {"rows": more}])
    assert text.count("## One scheme for all weights: tiny") == 1
    assert "| `tcq3_channel` | 3.0625 | 0.200 ± 0.010, 50 % | – |" in text
    assert text.index("`tcq3_channel`") < text.index("`int4_g32`")
    assert "| `tcq3` | 0.01562 | 0.01900 | 0.85 dB | 1.011 | 0.03450 | 3.44 dB |" in text
    assert "| scheme | bits per weight | GPTQ | QEP |" in text
    assert "| `int3_g32` | 3.5000 | 0.500 ± 0.010 | – |" in text
    assert "| `lut3_g32` | 3.5045 | 0.300 ± 0.010, 75 % | 0.200 ± 0.010 |" in text
    assert "| fixed | GPTQ | 0.600 ± 0.020 (2.900) |" in text
    assert "| fixed and learned | GPTQ | 0.500 ± 0.020 (2.900, 2 of 3 learned) |" in text
    assert text.index("| fixed | GPTQ") < text.index("| fixed and learned | GPTQ")
    assert "or also from lut2_g32." in text
