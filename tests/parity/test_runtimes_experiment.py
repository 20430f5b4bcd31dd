"""`experiments.runtimes` on a tiny model."""

import dataclasses

import numpy as np
import pytest

from experiments import runtimes
from experiments.runtimes import Options, Runtimes
from mpq.files import read_json
from mpq.types import MpqError
from tests import tiny

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> Options:
    root = tmp_path_factory.mktemp("runtimes")
    return Options(
        **tiny.model_and_texts(root),
        out=root / "tiny.json",
        quantizers=("rtn",),
        widths=("4_32",),
        schemes=("int2_g16", "int4_g16", "fp16"),
        windows=8,
        window=16,
        batch_size=4,
    )


def test_a_row_has_both_files_and_ours_is_no_larger(options):
    runtimes.main(options)
    (row,) = read_json(options.out, "results")["rows"]
    assert row["our_bytes"] <= row["their_bytes"]
    assert row["our_kl"] > 0
    assert row["their_kl"] > 0
    assert min(row["their_seconds"], row["our_seconds"], row["float_seconds"]) > 0
    assert sum(row["schemes"].values()) == 15
    before = options.out.read_bytes()
    runtimes.main(options)
    assert options.out.read_bytes() == before


def test_the_graph_that_both_start_from_is_the_model(options, tmp_path):
    made = Runtimes(options, tmp_path)
    kl, stderr = made.kl(runtimes.runner(made.base()))
    # The embedding, which is the head too, is in float16: logits of 8 are off by 8 * 2^-12, KL by half its square.
    assert 0 <= kl < 1e-5
    assert np.isfinite(stderr)


def test_an_unknown_quantizer(options, tmp_path):
    with pytest.raises(MpqError) as caught:
        runtimes.main(dataclasses.replace(options, quantizers=("awq",)))
    assert str(caught.value) == "unknown quantizer 'awq': the valid ones are rtn, rtn_symmetric, hqq"
