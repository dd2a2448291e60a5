"""The default configuration, derived from the fields of what the options configure."""

from ml_collections import ConfigDict

from c2f_jax.config import fields
from c2f_jax.config.options import sections

LIGHT_ENCODERS = {"speech": "log_mel", "image": "vit"}


def default_config() -> ConfigDict:
    """Return every option with its default; ``config.options`` says where each is defined."""
    config = ConfigDict()
    for where, options in sections(LIGHT_ENCODERS).items():
        section = config
        for name in where.split(".") if where else ():
            if name not in section:
                section[name] = ConfigDict()
            section = section[name]
        section.update(fields.default_values(options))
    for part, name in LIGHT_ENCODERS.items():
        config.model[part].name = name
        del config.model[part].weights
    return config
