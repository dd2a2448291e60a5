"""C2F's losses in Equinox: the model is a pytree, and its momentum copy another."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from toy_pairs import toy_batch

from c2f_jax import objectives as c2f


class Model(eqx.Module):
    tokens: list[eqx.nn.Linear]  # of speech, of images
    project: list[eqx.nn.Linear]
    head: eqx.nn.MLP
    log_tau: jax.Array

    def __init__(self, key):
        k = jax.random.split(key, 5)
        self.tokens = [eqx.nn.Linear(8, 32, key=key) for key in k[:2]]
        self.project = [eqx.nn.Linear(32, 16, key=key) for key in k[2:4]]
        self.head, self.log_tau = eqx.nn.MLP(32, 2, 32, depth=1, key=k[4]), jnp.log(0.07)

    def encode(self, batch):
        x = batch["speech"], batch["image"]  # (n, T, 8)
        tokens = [jnp.tanh(jax.vmap(jax.vmap(f))(a)) for f, a in zip(self.tokens, x)]
        z = [jax.vmap(f)(jnp.mean(a, axis=1)) for f, a in zip(self.project, tokens)]
        return c2f.Pair(*(c2f.Features(c2f.l2_normalize(a), b) for a, b in zip(z, tokens)))

    def match(self, speech, image):  # two logits of one pair
        return self.head(jnp.mean(speech * (jax.nn.softmax(speech @ image.T) @ image), axis=0))


@eqx.filter_jit
def train_step(model, momentum, queues, opt_state, batch, step, optimizer):
    def loss(model):
        out = c2f.c2f_losses(
            *model.encode(batch), batch["ids"], match=jax.vmap(model.match),
            momentum=momentum.encode(batch), queues=queues, tau=jnp.exp(model.log_tau),
            alpha=c2f.alpha_at(step, 0.4, 100), key=jax.random.fold_in(jax.random.key(1), step),
        )  # fmt: skip
        return out.sic + out.sim, out

    grads, out = eqx.filter_grad(loss, has_aux=True)(model)
    updates, opt_state = optimizer.update(grads, opt_state)
    model = eqx.apply_updates(model, updates)
    old, new = (eqx.filter(m, eqx.is_inexact_array) for m in (momentum, model))
    momentum = eqx.combine(c2f.update_momentum(old, new, 0.95), momentum)  # after the optimizer
    return model, momentum, out.queues, opt_state, out


if __name__ == "__main__":
    model, batch, optimizer = Model(jax.random.key(0)), toy_batch(0), optax.adam(1e-2)
    queues = c2f.create_queues(*model.encode(batch), batch["ids"], size=128)
    state = model, model, queues, optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    for step in jnp.arange(401):  # filter_jit compiles anew for each Python int
        *state, out = train_step(*state, toy_batch(step), step, optimizer)
        if step % 100 == 0:
            print(f"step {step}: SIC {out.sic:.3f}, SIM {out.sim:.3f}")
