"""Coarse-to-fine retrieval: ranking (SIC, then SIM), recall metrics, the evaluation and its results page."""
