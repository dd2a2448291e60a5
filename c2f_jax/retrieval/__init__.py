"""Coarse-to-fine retrieval: ranking (SIC, then SIM), recall metrics, evaluation."""
