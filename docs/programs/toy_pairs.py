"""Pairs for the programs beside this file, in place of recordings and images."""

import functools

import jax


@functools.partial(jax.jit, static_argnames="n")
def toy_batch(step, n=32):
    """Draw n of 100 ids; frames and patches are noisy copies of the id's vector.

    Returns a dict of speech (n, 6, 8), image (n, 4, 8) and ids (n,).
    """
    keys = jax.random.split(jax.random.fold_in(jax.random.key(2), step), 3)
    ids = jax.random.randint(keys[0], (n,), 0, 100)
    vectors = jax.random.normal(jax.random.key(3), (100, 1, 8))[ids]
    speech = vectors + jax.random.normal(keys[1], (n, 6, 8)) / 2
    image = -vectors + jax.random.normal(keys[2], (n, 4, 8)) / 2
    return {"speech": speech, "image": image, "ids": ids}
