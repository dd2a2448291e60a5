"""c2f_jax: speech-image retrieval, coarse to fine, in JAX and Flax.

The paper's objectives are in ``c2f_jax.objectives`` and need jax alone; names below load what they need when they are
first used.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "C2FModel": "c2f_jax.models",
    "C2FTrainState": "c2f_jax.training.train_state",
    "EmbeddingQueue": "c2f_jax.objectives.embedding_queue",
    "MethodConfig": "c2f_jax.training.method",
    "UserError": "c2f_jax.errors",
    "create_model": "c2f_jax.models",
    "create_train_state": "c2f_jax.training.train_state",
    "load_pairs": "c2f_jax.datasets.registry",
    "train_and_evaluate": "c2f_jax.train",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return __all__
