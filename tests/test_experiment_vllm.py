"""`experiments.vllm_cpu` without vLLM: the folders that it gives to it."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import vllm_cpu
from experiments.distillation import windows_of
from experiments.vllm_cpu import INPUTS, Options, plan_of
from mpq.models import load
from mpq.types import MpqError
from tests import tiny


@pytest.mark.parametrize("name", INPUTS)
def test_static_ranges_of_a_text(name, tmp_path):
    given = tiny.model_and_texts(tmp_path)
    model = load(str(given["model"]))
    data = windows_of(model, Path(given["data"]), 8, 16)
    made, params, rounded = plan_of(model, name, data, tmp_path / "made")
    (group,) = json.loads((made / "config.json").read_text())["quantization_config"]["config_groups"].values()
    assert group["input_activations"]["dynamic"] is False
    assert group["input_activations"]["symmetric"] == (name == "W8A8, static")
    x = data.inputs[:2]
    plain, got = (np.asarray(m.apply(params, x)) for m in (model, rounded))
    assert 0 < (got - plain).std() < 0.2 * plain.std()  # rounding to 8 bits shows, and leaves most of it


def test_an_unknown_plan(tmp_path):
    missing = tmp_path / "x"
    with pytest.raises(MpqError) as caught:
        vllm_cpu.main(Options(missing, missing, missing, missing, plans=("W2A2",)))
    assert str(caught.value) == f"unknown plan 'W2A2': the valid ones are {', '.join(vllm_cpu.PLANS)}"
