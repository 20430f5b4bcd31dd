"""Results to figures, tables and a report. Reads what a run wrote; computes no model and imports no JAX.

`python -m analysis FOLDER` draws everything of a run folder again.
"""
