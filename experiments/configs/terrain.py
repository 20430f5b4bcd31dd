"""Regression: compress an elevation map that is stored as the weights of a coordinate network.

Run:      mpq run experiments/configs/terrain.py            (from the repository's root; under a minute on two cores)
Model:    experiments/assets/terrain, 49,793 parameters, made by `python -m experiments.terrain`.
Results:  experiments/results/terrain
"""

import mpq

CONFIG = mpq.RunConfig(
    name="terrain",
    model="experiments/configs/terrain_model.py",
    data="experiments/assets/terrain/data.npz",
    schemes=("int2_g64", "int3_g64", "int4_g64", "int6_g64", "int8_channel", "bf16"),
    metrics=("kl", "fisher", "hessian_trace"),
    allocate_by="kl",
    budgets=("4.0bpw", "int4_g64", "5.0bpw", "int6_g64"),
    hand_out="5.0bpw",
    batch_size=512,
    calibration_windows=4096,
    sensitivity_windows=(("kl", 4096), ("fisher", 4096), ("hessian_trace", 1024)),
    selection_windows=4096,
    test_windows=16384,
    windows_per_document=None,
)
