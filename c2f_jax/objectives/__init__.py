"""The paper's objectives as pure functions of arrays. Nothing here needs more than jax."""

from c2f_jax.objectives.collectives import all_gather, axis_index, masked_mean, pmean, psum
from c2f_jax.objectives.contrastive import (
    branch_logits,
    sic_loss,
    similarity_logits,
    soft_target_cross_entropy,
)
from c2f_jax.objectives.distillation import (
    ID_POLICIES,
    alpha_at,
    distillation_targets,
    identity_targets,
)
from c2f_jax.objectives.embedding_queue import (
    EmbeddingQueue,
    bank,
    bank_valid,
    create_queue,
    enqueue,
)
from c2f_jax.objectives.hard_negatives import sample_hard_negatives
from c2f_jax.objectives.keys import row_keys
from c2f_jax.objectives.matching import COLLAPSE_VALUE, assemble_pairs, match_logit, sim_loss
from c2f_jax.objectives.momentum import update_momentum

__all__ = [
    "COLLAPSE_VALUE",
    "EmbeddingQueue",
    "ID_POLICIES",
    "all_gather",
    "alpha_at",
    "assemble_pairs",
    "axis_index",
    "bank",
    "bank_valid",
    "branch_logits",
    "create_queue",
    "distillation_targets",
    "enqueue",
    "identity_targets",
    "masked_mean",
    "match_logit",
    "pmean",
    "psum",
    "row_keys",
    "sample_hard_negatives",
    "sic_loss",
    "similarity_logits",
    "sim_loss",
    "soft_target_cross_entropy",
    "update_momentum",
]
