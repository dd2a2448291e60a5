"""The paper's objectives as pure functions of arrays. Nothing here needs more than jax."""

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
from c2f_jax.objectives.hard_negatives import sample_hard_negatives
from c2f_jax.objectives.keys import row_keys
from c2f_jax.objectives.matching import COLLAPSE_VALUE, assemble_pairs, match_logit, sim_loss

__all__ = [
    "COLLAPSE_VALUE",
    "ID_POLICIES",
    "alpha_at",
    "assemble_pairs",
    "branch_logits",
    "distillation_targets",
    "identity_targets",
    "match_logit",
    "row_keys",
    "sample_hard_negatives",
    "sic_loss",
    "similarity_logits",
    "sim_loss",
    "soft_target_cross_entropy",
]
