"""Run configs: one figure or table each."""
