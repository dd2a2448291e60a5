"""The paper's objectives as pure functions of arrays. Nothing here needs more than jax."""

from c2f_jax.objectives.average import Average
from c2f_jax.objectives.collectives import (
    all_gather,
    axis_index,
    masked_mean,
    pmean,
    psum,
    row_numbers,
    take_rows,
)
from c2f_jax.objectives.contrastive import (
    branch_logits,
    l2_normalize,
    sic_loss,
    sigmoid_loss,
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
    Queues,
    bank,
    bank_valid,
    create_queue,
    create_queues,
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
from c2f_jax.objectives.losses import C2FLosses, c2f_losses
from c2f_jax.objectives.matching import (
    COLLAPSE_VALUE,
    SimPairs,
    assemble_pairs,
    match_logit,
    sim_loss,
)
from c2f_jax.objectives.momentum import update_momentum
from c2f_jax.objectives.negative_pool import NEGATIVE_POOLS
from c2f_jax.objectives.pairs import Directions, Features, Pair

__all__ = [
    "COLLAPSE_VALUE",
    "ID_POLICIES",
    "NEGATIVE_POOLS",
    "Average",
    "C2FLosses",
    "Directions",
    "EmbeddingQueue",
    "Features",
    "HardNegatives",
    "IdentityTargets",
    "Pair",
    "Queues",
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
    "c2f_losses",
    "create_queue",
    "create_queues",
    "distillation_targets",
    "enqueue",
    "fold_keys",
    "host_rng",
    "identity_targets",
    "l2_normalize",
    "masked_mean",
    "match_logit",
    "pmean",
    "psum",
    "row_keys",
    "row_numbers",
    "run_keys",
    "sample_hard_negatives",
    "sic_loss",
    "sigmoid_loss",
    "sim_loss",
    "similarity_logits",
    "soft_target_cross_entropy",
    "step_key",
    "take_rows",
    "update_momentum",
]
