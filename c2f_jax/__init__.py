"""c2f_jax: speech-image retrieval, coarse to fine, in JAX and Flax.

The objectives of the paper are in ``c2f_jax.objectives`` and need jax alone. The names below are
imported when they are first used, so that ``import c2f_jax`` is fast and needs no extra.
"""

import importlib
from typing import TYPE_CHECKING, Any

from c2f_jax.errors import UserError, missing_extra

if TYPE_CHECKING:  # for editors and type checkers; _MODULE_OF_NAME says the same at run time
    from c2f_jax import objectives
    from c2f_jax.datasets.registry import load_pairs
    from c2f_jax.inference import TrainedModel
    from c2f_jax.models.c2f import C2FModel
    from c2f_jax.models.factory import create_model
    from c2f_jax.objectives.embedding_queue import EmbeddingQueue
    from c2f_jax.retrieval.encoded import EncodedSplit
    from c2f_jax.retriever import Retriever
    from c2f_jax.train import TrainResult, train_and_evaluate
    from c2f_jax.training.method import MethodConfig
    from c2f_jax.training.train_state import C2FTrainState, create_train_state

__version__ = "0.1.0"

__all__ = [
    "C2FModel",
    "C2FTrainState",
    "EmbeddingQueue",
    "EncodedSplit",
    "MethodConfig",
    "Retriever",
    "TrainResult",
    "TrainedModel",
    "UserError",
    "create_model",
    "create_train_state",
    "load_pairs",
    "objectives",
    "train_and_evaluate",
]

_MODULE_OF_NAME = {
    "C2FModel": "c2f_jax.models.c2f",
    "C2FTrainState": "c2f_jax.training.train_state",
    "EmbeddingQueue": "c2f_jax.objectives.embedding_queue",
    "EncodedSplit": "c2f_jax.retrieval.encoded",
    "MethodConfig": "c2f_jax.training.method",
    "Retriever": "c2f_jax.retriever",
    "TrainResult": "c2f_jax.train",
    "TrainedModel": "c2f_jax.inference",
    "create_model": "c2f_jax.models.factory",
    "create_train_state": "c2f_jax.training.train_state",
    "load_pairs": "c2f_jax.datasets.registry",
    "train_and_evaluate": "c2f_jax.train",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name == "objectives":
        return importlib.import_module("c2f_jax.objectives")
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_MODULE_OF_NAME[name]), name)
    except ModuleNotFoundError as error:
        line = missing_extra(f"c2f_jax.{name}", error)
        if line is None:
            raise
        raise ModuleNotFoundError(line, name=error.name) from error


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
