"""Adapters that let the benchmarks of the field, MTEB and MSEB, score a run."""
