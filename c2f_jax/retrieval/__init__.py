"""Coarse-to-fine retrieval: search (SIC, then SIM), recall metrics, the evaluation and its results page."""
