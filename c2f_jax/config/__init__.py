"""Configurations: options, files, what they build."""

from c2f_jax.config.default import default_config

__all__ = ["default_config"]
