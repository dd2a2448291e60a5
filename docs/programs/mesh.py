"""C2F's losses on 8 devices, twice: jit with explicitly sharded arrays, and shard_map."""

import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from plain_jit import OPTIMIZER, encode, init, match
from toy_pairs import toy_batch

from c2f_jax import objectives as c2f


def train_step(params, momentum, queues, opt_state, batch, step, axis_name=None):
    def loss(params):
        out = c2f.c2f_losses(
            *encode(params, batch), batch["ids"], match=lambda *pairs: match(params, *pairs),
            momentum=encode(momentum, batch), queues=queues,
            tau=jnp.exp(params["log_tau"]), alpha=c2f.alpha_at(step, 0.4, 100),
            # The same key on all devices: each row of the global batch makes its own from it.
            key=jax.random.fold_in(jax.random.key(1), step), axis_name=axis_name,
        )  # fmt: skip
        return out.sic + out.sim, out

    grads, out = jax.grad(loss, has_aux=True)(params)
    # jax has combined the gradients of all devices. pmap does not: average them with c2f.pmean.
    updates, opt_state = OPTIMIZER.update(grads, opt_state)
    params = optax.apply_updates(params, updates)
    momentum = c2f.update_momentum(momentum, params, 0.95)  # after the optimizer
    return params, momentum, out.queues, opt_state, out


explicit = jax.jit(train_step)  # the sharding of the batch is part of its type


def mapped(*args):
    step = functools.partial(train_step, axis_name="data")
    specs = P(), P(), P(), P(), P("data"), P()
    return jax.shard_map(step, in_specs=specs, out_specs=P())(*args)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)  # where there is no accelerator
    jax.set_mesh(jax.make_mesh((jax.device_count(),), ("data",)))

    params, batch = jax.jit(init)(jax.random.key(0)), toy_batch(0)
    queues = c2f.create_queues(*encode(params, batch), batch["ids"], size=128)
    for run in (explicit, jax.jit(mapped)):
        state = params, params, queues, OPTIMIZER.init(params)
        for step in range(201):
            *state, out = run(*state, jax.device_put(toy_batch(step), P("data")), step)
            if step % 100 == 0:
                print(f"step {step}: SIC {out.sic:.3f}, SIM {out.sim:.3f}")
