"""What all encoders share: a transformer under a [CLS], pooling, branches."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from c2f_jax.models.layers import Transformer, length_mask
from c2f_jax.objectives.keys import Site, fold_keys

POOLINGS = ("cls", "mean")


class TransformerEncoder(nn.Module):
    """What all encoders share: the attributes of their transformer, and the transformer itself.

    Attributes:
      width: W of the tokens.
      depth, heads, mlp_ratio, dropout_rate: of the transformer.
      dtype: compute type; parameters are float32.
      attention: attention implementation, "xla" or "cudnn".
      remat: recompute each block's activations in the backward pass instead of keeping them.
    """

    width: int = 128
    depth: int = 4
    heads: int = 4
    mlp_ratio: float = 4.0
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    attention: str = "xla"
    remat: bool = False

    def _transformer(self, name="transformer", **attributes):
        """The ``Transformer`` of these attributes and others given."""
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
    """An encoder whose first output token speaks for all of them: SIC projects it, SIM decides by it.

    Attributes:
      pooling: what that token is: "cls", the output of the learnt [CLS], as in the paper, or "mean", the mean of all
        valid outputs, [CLS] among them, which has not to learn first where to look.
      others: as in ``TransformerEncoder``.
    """

    pooling: str = "cls"

    def _pooled(self, x, lengths):
        """(n, T, W) tokens, [CLS] first, (n,) valid ones -> the same with the first one as ``pooling`` says."""
        return (
            x
            if self.pooling == "cls"
            else jnp.concatenate([mean_token(x, lengths), x[:, 1:]], axis=1)
        )


class BranchedEncoder(PooledEncoder):
    """An encoder of one modality: M transformers side by side on the same input, each with a first token of its own.

    Attributes:
      branches: M.
      others: as in ``PooledEncoder``.

    Source: Lee et al. 2015 ("Why M Heads are Better than One"), there called TreeNets.
    """

    branches: int = 1

    def _encode(self, x, lengths, keys):
        """(n, T, W) tokens, [CLS] first, (n,) valid ones -> (n, T, M W), the branches' tokens in one."""
        outputs = []
        for branch in range(self.branches):
            transformer = self._transformer(numbered("transformer", branch))
            y = transformer(x, lengths, fold_keys(keys, Site.BRANCH, branch))
            outputs.append(self._pooled(y, lengths))
        return jnp.concatenate(outputs, axis=-1)


def numbered(name, branch):
    """The name of a branch's module; the first one is called as if there were no other."""
    return f"{name}_{branch}" if branch else name


def mean_token(tokens, lengths):
    """(n, T, W), (n,) -> (n, 1, W), the means of the valid tokens."""
    valid = length_mask(lengths, tokens.shape[1])[..., None]
    total = jnp.sum(jnp.where(valid, tokens, 0), axis=1, keepdims=True, dtype=jnp.float32)
    return (total / jnp.maximum(lengths, 1)[:, None, None]).astype(tokens.dtype)


def prepend_cls(module, tokens):
    """Put ``module``'s learnt [CLS] parameter before (n, T, W) tokens -> (n, T + 1, W)."""
    cls = module.param("cls", nn.initializers.normal(0.02), (1, 1, tokens.shape[-1]))
    cls = jnp.broadcast_to(cls, (tokens.shape[0], 1, tokens.shape[-1])).astype(tokens.dtype)
    return jnp.concatenate([cls, tokens], axis=1)
