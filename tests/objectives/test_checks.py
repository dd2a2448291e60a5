"""Wrong calls of the objectives are refused: the argument, its shape and what it must be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from c2f_jax import objectives
from c2f_jax.objectives.checks import check_arrays

N, M, D = 4, 6, 3
IDS, BANK_IDS = jnp.arange(N), jnp.arange(M)
KEYS = objectives.row_keys(jax.random.key(0), IDS)
LOGITS, TARGETS = jnp.zeros((N, M)), jnp.eye(N, M)
ROWS, COLUMNS = jnp.ones(N, bool), jnp.ones(M, bool)
QUERIES, BANK = jnp.ones((N, D)), jnp.ones((M, D))
QUEUE = objectives.create_queue(5, {"id": IDS, "speech": QUERIES})
TREE = {"tokens": jnp.ones((N, 2, D)), "lengths": IDS}
PAIRS = (TREE, TREE, TREE, TREE, ROWS, ROWS)


RIGHT = {
    "similarity_logits": (QUERIES, BANK, 0.1),
    "branch_logits": (QUERIES, BANK, 0.1, 3),
    "soft_target_cross_entropy": (LOGITS, TARGETS, COLUMNS[None]),
    "sic_loss": (LOGITS, LOGITS, TARGETS, TARGETS, COLUMNS[None]),
    "sigmoid_loss": (LOGITS, TARGETS > 0, COLUMNS[None]),
    "identity_targets": (IDS, BANK_IDS, IDS, COLUMNS),
    "distillation_targets": (LOGITS, TARGETS, COLUMNS[None], 0.4),
    "alpha_at": (3, 0.4, 10),
    "sample_hard_negatives": (KEYS, LOGITS, IDS, BANK_IDS, COLUMNS),
    "assemble_pairs": PAIRS,
    "match_logit": (jnp.zeros((N, 2)),),
    "sim_loss": (jnp.zeros((N, 2)), jnp.zeros(N, int)),
    "masked_mean": (jnp.zeros(N), ROWS),
    "enqueue": (QUEUE, {"id": IDS, "speech": QUERIES}),
    "bank": (IDS, QUEUE, "id"),
    "update_momentum": ({"w": QUERIES}, {"w": QUERIES}, 0.9),
    "row_keys": (jax.random.key(0), IDS),
}
WRONG = [
    (
        "similarity_logits", 1, jnp.ones((M, D + 1)),
        r"bank has shape \(6, 4\).*float\[M, D\].*D = 3",
    ),
    ("similarity_logits", 0, jnp.ones((N, D), int), "queries has shape .* int32; it must be float"),
    ("similarity_logits", 2, jnp.ones(N), r"tau has shape \(4,\)"),
    ("branch_logits", 3, 2, "branches=2 must divide the width of the queries, 3"),
    ("soft_target_cross_entropy", 1, IDS, r"targets has shape \(4,\)"),
    ("soft_target_cross_entropy", 2, COLUMNS, r"valid has shape \(6,\).*bool\[1, M\] with n = 4"),
    ("sigmoid_loss", 1, TARGETS, "positives has shape .* float32; it must be bool"),
    ("soft_target_cross_entropy", 2, jnp.ones(M), "valid has shape .* float32; it must be bool"),
    ("sic_loss", 1, jnp.zeros((M, N)), r"logits_i2s has shape \(6, 4\)"),
    ("sic_loss", 3, jnp.eye(N), r"targets_i2s has shape \(4, 4\)"),
    ("identity_targets", 0, IDS[:, None], r"ids has shape \(4, 1\)"),
    ("identity_targets", 2, BANK_IDS, r"pair_columns has shape \(6,\)"),
    ("identity_targets", 3, ROWS, r"bank_valid has shape \(4,\)"),
    ("distillation_targets", 0, jnp.zeros((1, M)), r"targets has shape \(4, 6\).* n = 1"),
    ("distillation_targets", 3, ROWS, r"alpha has shape \(4,\)"),
    ("alpha_at", 2, None, "ramp_steps is None; it must be an int of at least 0"),
    ("alpha_at", 2, -1, "ramp_steps is -1"),
    ("sample_hard_negatives", 0, KEYS[:1], r"keys has shape \(1,\) .* \(4,\) typed keys"),
    (
        "sample_hard_negatives", 2, IDS[:, None],
        r"ids has shape \(4, 1\).*must be int\[n\] with n = 4",
    ),
    ("sample_hard_negatives", 3, IDS, r"candidate_ids has shape \(4,\)"),
    ("sample_hard_negatives", 4, LOGITS > 0, r"candidate_valid has shape \(4, 6\)"),
    (
        "assemble_pairs", 0, {"tokens": TREE["tokens"][:3]},
        r"speech\['tokens'\] has shape \(3, 2, 3\)",
    ),
    ("assemble_pairs", 3, BANK_IDS, r"negative_image has shape \(6,\); it must be \(4, \.\.\.\)"),
    ("assemble_pairs", 5, IDS, "image_valid has shape .* int32; it must be bool"),
    ("match_logit", 0, jnp.zeros((N, 1)), r"logits has shape \(4, 1\); it must be \(\.\.\., 2\)"),
    ("sim_loss", 0, jnp.zeros((N, 1)), r"logits has shape \(4, 1\)"),
    ("sim_loss", 1, jnp.zeros((N, 1), int), r"labels has shape \(4, 1\)"),
    ("masked_mean", 0, jnp.zeros((N, 1)), r"values has shape \(4, 1\)"),
    ("masked_mean", 1, jnp.full(N, 0.5), "valid has shape .* float32; it must be bool"),
    (
        "enqueue", 1, {"id": IDS[:2], "speech": QUERIES},
        r"rows\['speech'\] has shape \(4, 3\).*\(2, 3\)",
    ),
    ("enqueue", 1, {"id": IDS, "speech": QUERIES[:1]}, r"rows\['speech'\] has shape \(1, 3\)"),
    ("enqueue", 1, {"id": IDS, "speech": QUERIES[0]}, r"rows\['speech'\] has shape \(3,\)"),
    ("enqueue", 1, {"id": IDS}, "rows has the names id; they must be id, speech"),
    ("bank", 0, QUERIES, r"batch_rows has shape \(4, 3\).*entry 'id'"),
    ("bank", 2, "image", "name is 'image'; it must be one of id, speech"),
    (
        "update_momentum", 1, {"w": QUERIES[:1]},
        r"params\['w'\] has shape \(1, 3\); it must be \(4, 3\)",
    ),
    ("update_momentum", 1, {"v": QUERIES}, "key|struct|Dict|v"),
    ("update_momentum", 2, 1.5, "momentum is 1.5; it must be from 0 to 1"),
    ("update_momentum", 0, {"w": IDS}, r"\['w'\] is an array \(4,\) of int32; pass floating-point"),
    ("update_momentum", 0, {"w": KEYS}, r"of key<fry>; pass floating-point arrays alone, such as"),
    ("update_momentum", 0, {"w": jnp.tanh}, r"momentum_params\['w'\] is a .*; pass floating-point"),
    (
        "update_momentum", 0, {"w": QUERIES.astype(jnp.bfloat16)},
        "bfloat16, in which steps of 1 - m are lost",
    ),
    ("update_momentum", 2, jnp.ones(2), r"momentum has shape \(2,\)"),
    ("enqueue", 1, {"id": np.array([0, 1, 2, 2**40]), "speech": QUERIES}, "has 1099511627776"),
    ("alpha_at", 1, -0.1, "alpha is -0.1; it must be from 0 to 1"),
    ("similarity_logits", 2, -0.1, "tau is -0.1; it must be above 0"),
    ("enqueue", 1, {"id": IDS.astype(jnp.int16), "speech": QUERIES}, "type int16; .* with int32"),
    ("row_keys", 0, KEYS, r"key has shape \(4,\); it must be one key"),
    ("row_keys", 1, IDS[:, None], r"rows has shape \(4, 1\)"),
]  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_right_calls_pass(name):
    getattr(objectives, name)(*RIGHT[name])


@pytest.mark.parametrize("name, place, value, message", WRONG)
def test_wrong_calls_name_the_argument_and_what_it_must_be(name, place, value, message):
    arguments = [value if k == place else x for k, x in enumerate(RIGHT[name])]
    with pytest.raises(ValueError, match=message):
        getattr(objectives, name)(*arguments)


def test_wrong_calls_fail_while_tracing():
    with pytest.raises(ValueError, match="ids has shape"):
        jax.eval_shape(objectives.sample_hard_negatives, KEYS, LOGITS, IDS[:, None], IDS, COLUMNS)


def test_no_candidates_at_all_are_refused():
    none = jnp.zeros((0,), int), jnp.zeros((0,), bool)
    with pytest.raises(ValueError, match="at least one candidate"):
        objectives.sample_hard_negatives(KEYS, LOGITS[:, :0], IDS, *none)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_numpy_arrays_scalars_and_all_float_types_pass(dtype):
    z = np.ones((2, D), np.float32).astype(dtype)
    for tau in (0.1, 1, np.float32(0.1), jnp.float32(0.1)):
        assert objectives.similarity_logits(z, z, tau).dtype == jnp.float32


def test_raw_keys_pass():
    raw = jax.random.key_data(KEYS)
    found = objectives.sample_hard_negatives(raw, LOGITS, IDS, BANK_IDS, COLUMNS)
    typed = objectives.sample_hard_negatives(KEYS, LOGITS, IDS, BANK_IDS, COLUMNS)
    np.testing.assert_array_equal(found.columns, typed.columns)


def test_specifications_with_numbers_and_any_rest():
    assert check_arrays(x=(np.ones((2, 3, 4)), "any[n, ...]")) == {"n": 2}
    assert check_arrays(x=(np.ones((2, 3)), "float[n, 3]"), y=(2, "int[]")) == {"n": 2}
    with pytest.raises(ValueError, match="it must be float"):
        check_arrays(x=(np.ones((2, 2)), "float[n, 3]"))
    with pytest.raises(ValueError, match=r"must be any\[n, k, \.\.\.\]"):
        check_arrays(x=(np.ones(2), "any[n, k, ...]"))
