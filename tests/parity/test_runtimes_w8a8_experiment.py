"""`experiments.runtimes_w8a8` on a tiny model."""

import dataclasses

import pytest

from experiments import runtimes_w8a8
from experiments.runtimes_w8a8 import Options
from mpq.files import read_json
from mpq.types import MpqError
from tests import tiny

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> Options:
    root = tmp_path_factory.mktemp("runtimes")
    of_text = {"windows": 4, "test_windows": 4, "window": 16, "batch_size": 4, "repeats": 2}
    return Options(**tiny.model_and_texts(root), out=root / "tiny.json", quantizers=("dynamic_by_channel",), **of_text)


def test_a_row_has_both_files(options):
    runtimes_w8a8.main(options)
    (row,) = read_json(options.out, "results")["rows"]
    for side in ("their", "our"):
        assert row[f"{side}_bytes"] > 0
        assert 0 < row[f"{side}_kl"] < 1
        assert row[f"{side}_seconds"] > 0
    before = options.out.read_bytes()
    runtimes_w8a8.main(options)
    assert options.out.read_bytes() == before


def test_an_unknown_quantizer(options):
    with pytest.raises(MpqError) as caught:
        runtimes_w8a8.main(dataclasses.replace(options, quantizers=("awq",)))
    assert str(caught.value) == (
        "unknown quantizer 'awq': the valid ones are dynamic, dynamic_by_channel, static, static_by_channel, "
        "static_products, static_products_by_channel"
    )
