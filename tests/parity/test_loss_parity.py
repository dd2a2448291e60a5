"""SIC, momentum distillation, SIM and the sigmoid loss, with their gradients, against PyTorch.

The PyTorch side is written from the equations with PyTorch's own losses. It gets the negatives that
``c2f_losses`` mined, and nothing else of it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from c2f_jax import objectives as c2f

torch = pytest.importorskip("torch")
F = torch.nn.functional
pytestmark = pytest.mark.slow

N, K, D, C = 8, 12, 6, 5
WRITTEN = 7  # slots of the queue; the others hold zeros and id 0, which row 0 has too
IDS = np.array([0, 1, 2, 1, 3, 4, 0, 5], np.int32)
BASE = {
    "tau": 0.2,
    "alpha": 0.4,
    "id_policy": "multi_positive",
    "momentum": True,
    "rows": N,
    "m": 1,
}
CASES = {
    "in batch": {"alpha": 0.0, "momentum": False},
    "no distillation": {"alpha": 0.0},
    "distillation": {},
    "targets of the momentum model alone": {"alpha": 1.0},
    "cold": {"tau": 0.02},
    "mask": {"id_policy": "mask"},
    "diagonal": {"id_policy": "diagonal"},
    "padded": {"rows": 6},
    "padded, in batch": {"rows": 6, "alpha": 0.0, "momentum": False},
    "three negatives": {"m": 3},
    "sigmoid": {"alpha": 0.0, "sigmoid_bias": -2.0},
}


def numbers(case, dtype):
    """Inputs as numpy arrays: what has a gradient, and what has none."""
    rng = np.random.default_rng(list(CASES).index(case))
    rows = lambda *shape: rng.normal(size=shape).astype(dtype)  # noqa: E731
    unit = lambda *shape: (x := rows(*shape)) / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    online = {
        "z_speech": rows(N, D),  # of any length
        "z_image": rows(N, D),
        "t_speech": rows(N, C),
        "t_image": rows(N, C),
        "weight": rows(C, C),
        "tau": np.asarray((BASE | CASES[case])["tau"], dtype),
    }
    fixed = {name: unit(N, D) for name in ("k_speech", "k_image")}
    for name in ("q_speech", "q_image"):
        fixed[name] = unit(K, D) * (np.arange(K) < WRITTEN)[:, None].astype(dtype)
    fixed["q_ids"] = np.where(np.arange(K) < WRITTEN, rng.integers(0, 9, K), 0).astype(np.int32)
    return online, fixed


def ours(case, online, fixed):
    """SIC, SIM, the gradients of their sum, and the pairs that match was given."""
    options = BASE | CASES[case]
    pairs = []
    row = jnp.arange(N)
    valid = None if options["rows"] == N else row < options["rows"]
    momentum = queues = None
    if options["momentum"]:
        momentum = c2f.Pair(c2f.Features(fixed["k_speech"]), c2f.Features(fixed["k_image"]))
        entries = {"speech": fixed["q_speech"], "image": fixed["q_image"], "id": fixed["q_ids"]}
        entries = {name: jnp.asarray(rows) for name, rows in entries.items()}
        queue = c2f.EmbeddingQueue(entries, jnp.int32(WRITTEN), jnp.int32(WRITTEN))
        queues = c2f.Queues(queue, c2f.create_queues(*momentum, jnp.asarray(IDS), size=0).tokens)

    def losses(online):
        def match(speech, image):
            pairs.append((np.asarray(speech[1]), np.asarray(image[1])))
            score = jnp.sum((speech[0] @ online["weight"]) * image[0], axis=-1)
            return jnp.stack([jnp.zeros_like(score), score], axis=-1)

        out = c2f.c2f_losses(
            c2f.Features(online["z_speech"], tokens=(online["t_speech"], row)),
            c2f.Features(online["z_image"], tokens=(online["t_image"], row)),
            jnp.asarray(IDS),
            tau=online["tau"],
            key=jax.random.key(3),
            match=match,
            momentum=momentum,
            queues=queues,
            alpha=options["alpha"],
            row_valid=valid,
            id_policy=options["id_policy"],
            negatives_per_row=options["m"],
            sigmoid_bias=options.get("sigmoid_bias"),
        )
        return out.sic + out.sim, (out.sic, out.sim)

    (_, values), gradients = jax.value_and_grad(losses, has_aux=True)(jax.device_put(online))
    return [float(x) for x in values], gradients, pairs[0]


def theirs(case, online, fixed, pairs):
    """The same in PyTorch, from the real rows alone."""
    options = BASE | CASES[case]
    n, alpha = options["rows"], options["alpha"]
    x = {name: torch.tensor(value, requires_grad=True) for name, value in online.items()}
    fixed = {name: torch.tensor(value) for name, value in fixed.items()}
    ids = torch.tensor(IDS[:n])
    z = {side: F.normalize(x[f"z_{side}"][:n], dim=1) for side in ("speech", "image")}
    bank, bank_ids = dict(z), ids
    if options["momentum"]:
        keys = {side: fixed[f"k_{side}"][:n] for side in z}
        bank = {side: torch.cat([keys[side], fixed[f"q_{side}"][:WRITTEN]]) for side in z}
        bank_ids = torch.cat([ids, fixed["q_ids"][:WRITTEN]])

    same = ids[:, None] == bank_ids
    own = torch.zeros_like(same)
    own.fill_diagonal_(True)
    positive = same if options["id_policy"] == "multi_positive" else own
    hidden = (same & ~own) if options["id_policy"] == "mask" else torch.zeros_like(same)

    sides = []
    for side, other in (("speech", "image"), ("image", "speech")):
        logits = z[side] @ bank[other].T / x["tau"]
        if "sigmoid_bias" in options:
            labels = torch.where(positive, 1.0, -1.0)
            sides.append(-F.logsigmoid(labels * (logits + options["sigmoid_bias"])).sum(1).mean())
            continue
        target = positive.to(logits.dtype) / positive.sum(1, keepdim=True)
        if options["momentum"]:
            with torch.no_grad():
                soft = keys[side] @ bank[other].T / x["tau"]
                soft = soft.masked_fill(hidden, -torch.inf).softmax(1)
                target = alpha * soft + (1 - alpha) * target
        # Of hidden columns neither the softmax nor the target takes anything.
        logits = logits.masked_fill(hidden, -1e30)
        sides.append(F.cross_entropy(logits, target))
    sic = sum(sides) / 2

    speech, image = (torch.tensor(rows).long() for rows in pairs)
    labels = torch.zeros(len(speech), dtype=torch.long)
    labels[:N] = 1
    score = ((x["t_speech"][speech] @ x["weight"]) * x["t_image"][image]).sum(1)
    # The rows of padding, and the negatives of those rows, count nowhere.
    rows = torch.arange(N).repeat(3)
    if options["m"] > 1:
        mined = N * options["m"]
        rows = torch.cat([torch.arange(N), speech[N : N + mined], image[N + mined :]])
    kept = rows < n
    both = torch.stack([torch.zeros_like(score), score], 1)[kept]
    sim = F.cross_entropy(both, labels[kept])
    (sic + sim).backward()
    return [sic.item(), sim.item()], {name: value.grad for name, value in x.items()}


@pytest.mark.parametrize("x64, bound", [(False, 5e-6), (True, 1e-10)])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients(case, x64, bound):
    with jax.enable_x64(x64):
        online, fixed = numbers(case, np.float64 if x64 else np.float32)
        values, gradients, pairs = ours(case, online, fixed)
        gradients = jax.tree.map(np.asarray, gradients)
    # PyTorch runs in float64 in both cases.
    online, fixed = (
        {k: v if v.dtype == np.int32 else v.astype(np.float64) for k, v in part.items()}
        for part in (online, fixed)
    )
    expected, slopes = theirs(case, online, fixed, pairs)
    np.testing.assert_allclose(values, expected, rtol=bound)
    for name, slope in slopes.items():
        scale = np.abs(slope.numpy()).max()
        assert scale > 1e-3, f"{name} has a gradient"
        np.testing.assert_allclose(
            gradients[name], slope.numpy(), atol=10 * bound * scale, err_msg=name
        )


def test_mined_negatives_are_drawn_as_multinomial_would():
    """Over many keys, how often each row is mined: the softmax of the similarities without those
    of the same id, as ALBEF gives it to torch.multinomial."""
    online, fixed = numbers("no distillation", np.float32)
    z = {
        side: F.normalize(torch.tensor(online[f"z_{side}"]), dim=1) for side in ("speech", "image")
    }
    draws, row = 4000, jnp.arange(N)

    def mined(key):
        kept = []

        def match(speech, image):
            kept.append((speech[N:], image[N:]))
            return jnp.zeros((len(speech), 2))

        c2f.c2f_losses(
            c2f.Features(online["z_speech"], tokens=row),
            c2f.Features(online["z_image"], tokens=row),
            jnp.asarray(IDS), tau=0.5, key=key, match=match,
        )  # fmt: skip
        return kept[0]

    speech, image = jax.vmap(mined)(jax.random.split(jax.random.key(0), draws))
    for chosen, logits in (
        (image[:, :N], z["speech"] @ z["image"].T / 0.5),
        (speech[:, N:], z["image"] @ z["speech"].T / 0.5),
    ):
        other = torch.tensor(IDS)[:, None] != torch.tensor(IDS)
        weights = logits.softmax(1) * other
        expected = (draws * weights / weights.sum(1, keepdim=True)).numpy()
        found = np.stack([np.bincount(chosen[:, i], minlength=N) for i in range(N)])
        assert (found[~other.numpy()] == 0).all()
        squares = (found - expected) ** 2 / np.maximum(expected, 1e-9) * other.numpy()
        # 6 rows have 5 or 6 degrees of freedom; 30 is exceeded once in 20,000 rows.
        assert squares.sum(1).max() < 30, squares.sum(1)


def test_momentum_and_queue_over_twenty_steps():
    rng = np.random.default_rng(0)
    average = {"a": rng.normal(size=(3, 4)).astype(np.float32)}
    expected = [torch.tensor(average["a"])]
    slots, ids = torch.zeros(K, D), torch.zeros(K, dtype=torch.int32)
    rows = lambda: rng.normal(size=(5, D)).astype(np.float32)  # noqa: E731
    first = c2f.Features(rows()), c2f.Features(rows())
    queues, cursor = c2f.create_queues(*first, jnp.arange(5), size=K), 0
    for step in range(20):
        params = {"a": rng.normal(size=(3, 4)).astype(np.float32)}
        average = c2f.update_momentum(average, params, 0.9)
        torch._foreach_lerp_(expected, [torch.tensor(params["a"])], 0.1)

        features, step_ids = (
            c2f.Pair(c2f.Features(rows()), c2f.Features(rows())),
            np.arange(5) + step,
        )
        queues = c2f.c2f_losses(
            *features, jnp.asarray(step_ids, jnp.int32), tau=0.1, key=jax.random.key(step),
            momentum=features, queues=queues,
        ).queues  # fmt: skip
        where = (cursor + torch.arange(5)) % K
        slots[where] = F.normalize(torch.tensor(np.asarray(features.speech.embedding)), dim=1)
        ids[where] = torch.tensor(step_ids, dtype=torch.int32)
        cursor = (cursor + 5) % K
    np.testing.assert_allclose(average["a"], expected[0].numpy(), rtol=1e-5, atol=1e-6)
    queue = queues.embeddings
    np.testing.assert_allclose(queue.entries["speech"], slots.numpy(), atol=1e-6)
    np.testing.assert_array_equal(queue.entries["id"], ids.numpy())
    assert int(queue.count) == K
