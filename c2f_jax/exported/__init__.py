"""Exported models: programs with their parameters, which run without this package's models.

``load`` reads what ``c2f export`` has written. It needs jax and numpy alone: no Flax, no Orbax, no
configuration.
"""

from c2f_jax.exported.loaded import Encoded, ExportedModel, load

__all__ = ["Encoded", "ExportedModel", "load"]
