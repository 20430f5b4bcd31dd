"""Configs, benchmarks and the training of the reference model: what is run, never imported by `mpq`."""
