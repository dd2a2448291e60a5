"""Configurations: their options, their files, and the experiments they describe."""

from c2f_jax.config.default import default_config

__all__ = ["default_config"]
