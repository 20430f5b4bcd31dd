"""The coordinate network of `experiments/terrain.py` as a MODEL: how any Flax module enters the pipeline."""

from pathlib import Path

from experiments.terrain import load_model

MODEL = load_model(Path(__file__).resolve().parents[1] / "assets" / "terrain")
