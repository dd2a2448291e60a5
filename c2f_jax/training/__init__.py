"""The training step and what it needs."""
