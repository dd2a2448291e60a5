"""C2F's losses in plain JAX: parameters in a dict, jit, optax; negatives from a token queue."""

import jax
import jax.numpy as jnp
import optax
from toy_pairs import toy_batch

from c2f_jax import objectives as c2f

OPTIMIZER = optax.adam(1e-2)


def init(key):
    shapes = {"speech": (8, 32), "image": (8, 32), "project": (2, 32, 16), "match": (32, 2)}
    keys = jax.random.split(key, len(shapes))
    params = {name: jax.random.normal(k, shapes[name]) / 6 for name, k in zip(shapes, keys)}
    return params | {"bias": jnp.zeros(2), "log_tau": jnp.log(0.07)}


def encode(params, batch):
    features = []
    for name, projection in zip(("speech", "image"), params["project"]):
        tokens = jnp.tanh(batch[name] @ params[name])  # (n, T, 32)
        z = c2f.l2_normalize(jnp.mean(tokens, axis=1) @ projection)
        features.append(c2f.Features(z, tokens))
    return c2f.Pair(*features)


def match(params, speech, image):  # two logits for each pair
    attended = jax.nn.softmax(speech @ image.mT) @ image
    return jnp.mean(speech * attended, axis=1) @ params["match"] + params["bias"]


@jax.jit
def train_step(params, momentum, queues, opt_state, batch, step):
    def loss(params):
        out = c2f.c2f_losses(
            *encode(params, batch), batch["ids"], match=lambda *pairs: match(params, *pairs),
            momentum=encode(momentum, batch), queues=queues, negatives="queue",
            tau=jnp.exp(params["log_tau"]), alpha=c2f.alpha_at(step, 0.4, 100),
            key=jax.random.fold_in(jax.random.key(1), step),
        )  # fmt: skip
        return out.sic + out.sim, out

    grads, out = jax.grad(loss, has_aux=True)(params)
    updates, opt_state = OPTIMIZER.update(grads, opt_state)
    params = optax.apply_updates(params, updates)
    momentum = c2f.update_momentum(momentum, params, 0.95)  # after the optimizer
    return params, momentum, out.queues, opt_state, out


if __name__ == "__main__":
    params, batch = jax.jit(init)(jax.random.key(0)), toy_batch(0)
    queues = c2f.create_queues(*encode(params, batch), batch["ids"], size=128, token_size=64)
    state = params, params, queues, OPTIMIZER.init(params)
    for step in range(401):
        *state, out = train_step(*state, toy_batch(step), step)
        if step % 100 == 0:
            print(f"step {step}: SIC {out.sic:.3f}, SIM {out.sim:.3f}")
