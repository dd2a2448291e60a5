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
    IdentityTargets,
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
from c2f_jax.objectives.hard_negatives import HardNegatives, sample_hard_negatives
from c2f_jax.objectives.keys import (
    Site,
    Stream,
    fold_keys,
    host_rng,
    row_keys,
    run_keys,
    step_key,
)
from c2f_jax.objectives.matching import (
    COLLAPSE_VALUE,
    SimPairs,
    assemble_pairs,
    match_logit,
    sim_loss,
)
from c2f_jax.objectives.momentum import update_momentum

__all__ = [
    "COLLAPSE_VALUE",
    "ID_POLICIES",
    "EmbeddingQueue",
    "HardNegatives",
    "IdentityTargets",
    "SimPairs",
    "Site",
    "Stream",
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
    "fold_keys",
    "host_rng",
    "identity_targets",
    "masked_mean",
    "match_logit",
    "pmean",
    "psum",
    "row_keys",
    "run_keys",
    "sample_hard_negatives",
    "sic_loss",
    "sim_loss",
    "similarity_logits",
    "soft_target_cross_entropy",
    "step_key",
    "update_momentum",
]
