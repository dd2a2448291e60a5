"""C2F's losses in Flax NNX: modules for encoders and matcher, momentum copy, queue."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from toy_pairs import toy_batch

from c2f_jax import objectives as c2f


class Encoder(nnx.Module):
    def __init__(self, rngs):
        self.tokens = nnx.Linear(8, 32, rngs=rngs)
        self.project = nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x):  # (n, T, 8)
        tokens = jnp.tanh(self.tokens(x))
        return c2f.Features(c2f.l2_normalize(self.project(jnp.mean(tokens, axis=1))), tokens)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.speech, self.image = Encoder(rngs), Encoder(rngs)
        self.attention = nnx.MultiHeadAttention(2, 32, decode=False, rngs=rngs)
        self.head, self.log_tau = nnx.Linear(32, 2, rngs=rngs), nnx.Param(jnp.log(0.07))

    def encode(self, batch):
        return c2f.Pair(self.speech(batch["speech"]), self.image(batch["image"]))

    def match(self, speech, image):  # two logits for each pair
        return self.head(jnp.mean(speech * self.attention(speech, image), axis=1))


@nnx.jit
def train_step(model, momentum, optimizer, queues, batch, step):
    def loss(model):
        out = c2f.c2f_losses(
            *model.encode(batch), batch["ids"], match=model.match,
            momentum=momentum.encode(batch), queues=queues, tau=jnp.exp(model.log_tau[...]),
            alpha=c2f.alpha_at(step, 0.4, 100), key=jax.random.fold_in(jax.random.key(1), step),
        )  # fmt: skip
        return out.sic + out.sim, out

    grads, out = nnx.grad(loss, has_aux=True)(model)
    optimizer.update(model, grads)
    old, new = (nnx.state(m, nnx.Param) for m in (momentum, model))  # after the optimizer
    nnx.update(momentum, c2f.update_momentum(old, new, 0.95))
    return out.queues, out


if __name__ == "__main__":
    model, momentum = Model(nnx.Rngs(0)), Model(nnx.Rngs(0))  # the same twice
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    queues = c2f.create_queues(*model.encode(toy_batch(0)), toy_batch(0)["ids"], size=128)
    for step in range(401):
        queues, out = train_step(model, momentum, optimizer, queues, toy_batch(step), step)
        if step % 100 == 0:
            print(f"step {step}: SIC {out.sic:.3f}, SIM {out.sim:.3f}")
