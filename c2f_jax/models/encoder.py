"""What all encoders share: a transformer with a [CLS], pooling, and the ensemble of branches."""

import math
from collections.abc import Sequence
from dataclasses import field
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from c2f_jax.models.layers import Dense, Transformer, length_mask
from c2f_jax.objectives.contrastive import l2_normalize
from c2f_jax.objectives.keys import Site, fold_keys

POOLINGS = ("cls", "mean")


class NetworkOutput(NamedTuple):
    """The output of a published network for a batch.

    Attributes:
      tokens: (n, T, W).
      lengths: (n,) int32, valid tokens.
      hidden: depth + 1 hidden states (n, T, W), the input of the first block first.
    """

    tokens: jax.Array
    lengths: jax.Array
    hidden: tuple[jax.Array, ...]


class TransformerEncoder(nn.Module):
    """A transformer and its attributes, which all encoders and published networks share.

    The attributes are the options of a configuration; their metadata are the range of each.

    Attributes:
      width: W of the tokens; a multiple of ``heads``.
      depth: number of blocks.
      heads: attention heads.
      mlp_ratio: hidden width of each MLP over W.
      dropout_rate: rate after the input and after each sub-layer.
      dtype: compute type; parameters are float32.
      attention: attention implementation, "xla" or "cudnn".
      remat: recompute each block's activations in the backward pass instead of keeping them.
    """

    width: int = field(default=96, metadata={"min": 1})
    depth: int = field(default=4, metadata={"min": 0})
    heads: int = field(default=4, metadata={"min": 1})
    mlp_ratio: float = field(default=4.0, metadata={"above": 0})
    dropout_rate: float = field(default=0.0, metadata={"min": 0, "below": 1})
    dtype: DTypeLike = jnp.float32
    attention: str = "xla"
    remat: bool = False

    def _transformer(self, name: str = "transformer", **attributes: Any) -> Transformer:
        """Return the ``Transformer`` of these attributes and others given."""
        return Transformer(
            self.depth,
            self.heads,
            self.mlp_ratio,
            dropout_rate=self.dropout_rate,
            dtype=self.dtype,
            attention=self.attention,
            remat=self.remat,
            name=name,
            **attributes,
        )


class PooledEncoder(TransformerEncoder):
    """An encoder whose first output token stands for all: SIC projects it, SIM classifies it.

    Attributes:
      pooling: what that token is. "cls" is the output of the learned [CLS], as in the paper; "mean"
        is the mean of all valid outputs, [CLS] among them, which need not first learn where to
        look.
    """

    pooling: str = field(default="cls", metadata={"choices": POOLINGS})

    def _pooled(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        """Make the first token what ``pooling`` says: (n, T, W) tokens, (n,) -> (n, T, W)."""
        if self.pooling == "cls":
            return x
        return jnp.concatenate([mean_token(x, lengths), x[:, 1:]], axis=1)


class BranchedEncoder(PooledEncoder):
    """An encoder of one modality, with an ensemble of M transformers on the same input.

    The paper has M = 1. Each branch has its first token, its projection and its SIC loss.

    Attributes:
      branches: M.

    Reference:
      Lee et al. 2015 ("Why M Heads are Better than One"), there called TreeNets.
    """

    branches: int = 1

    def _encode(self, x: jax.Array, lengths: jax.Array, keys: jax.Array | None) -> jax.Array:
        """Run the branches: (n, T, W) tokens with [CLS] first, (n,) -> (n, T, M W)."""
        # Each branch draws its own dropout masks; its tokens take W of the M W features.
        outputs = []
        for branch in range(self.branches):
            transformer = self._transformer(_numbered("transformer", branch))
            y, _ = transformer(x, lengths, fold_keys(keys, Site.BRANCH, branch))
            outputs.append(self._pooled(y, lengths))
        return jnp.concatenate(outputs, axis=-1)


def branch_projections(name: str, size: int, branches: int) -> list[nn.Module]:
    """Return the M maps W -> D from the branches' first tokens to their embeddings.

    Args:
      name: name of the first branch's module; the others have numbers.
      size: D.
      branches: M.
    """
    return [Dense(size, name=_numbered(name, branch)) for branch in range(branches)]


def project(projections: Sequence[nn.Module], token: jax.Array) -> jax.Array:
    """Project and L2-normalize the first token: z = P h / |P h|.

    Args:
      projections: P of each of the M branches.
      token: (n, M W), the branches' first tokens h.

    Returns:
      (n, M D) float32. With M > 1 each branch's z is divided by sqrt(M), so that a cosine is the
      mean of the branches' cosines.
    """
    # In float32 whatever the compute type: similarities are divided by a small tau.
    parts = jnp.split(token.astype(jnp.float32), len(projections), axis=-1)
    # (n, W) . (W, D) -> (n, D) for each branch
    projected = []
    for projection, part in zip(projections, parts, strict=True):
        projected.append(projection(part))
    z = l2_normalize(jnp.stack(projected, axis=1))  # (n, M, D)
    return z.reshape(z.shape[0], -1) / math.sqrt(len(projections))


def mean_token(tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """Return the means of the valid tokens: (n, T, W), (n,) -> (n, 1, W)."""
    valid = length_mask(lengths, tokens.shape[1])[..., None]
    # Summed in float32: in bfloat16 the last of many tokens would be lost.
    total = jnp.sum(jnp.where(valid, tokens, 0), axis=1, keepdims=True, dtype=jnp.float32)
    return (total / jnp.maximum(lengths, 1)[:, None, None]).astype(tokens.dtype)


def prepend_cls(module: nn.Module, tokens: jax.Array) -> jax.Array:
    """Put ``module``'s learned [CLS] parameter before the tokens: (n, T, W) -> (n, T + 1, W)."""
    cls = module.param("cls", nn.initializers.normal(0.02), (1, 1, tokens.shape[-1]))
    cls = jnp.broadcast_to(cls, (tokens.shape[0], 1, tokens.shape[-1])).astype(tokens.dtype)
    return jnp.concatenate([cls, tokens], axis=1)


def _numbered(name: str, branch: int) -> str:
    """Return the name of a branch's module; the first is named as if it were the only one."""
    return f"{name}_{branch}" if branch else name
