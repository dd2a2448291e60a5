"""The options of the paper's method."""

import dataclasses
from dataclasses import dataclass, field

from c2f_jax.errors import UserError
from c2f_jax.objectives import ID_POLICIES, NEGATIVE_POOLS


@dataclass(frozen=True)
class MethodConfig:
    """Options of the method; defaults are from ALBEF and BLIP where the paper's are unknown.

    Attributes:
      momentum: m of the momentum model. None trains without one: keys are then the online
        embeddings and receive gradient (plain in-batch contrastive learning), which needs empty
        queues and ``alpha`` 0.
      alpha: weight of momentum distillation.
      alpha_ramp_steps: steps after the warm-up over which alpha grows from 0. 0 for no ramp; None
        for one epoch, which the trainer fills in.
      id_policy: which bank columns with a query's image id are positives; see
        ``objectives.identity_targets``.
      sim_weight: w in L = L_SIC + w L_SIM; 0 leaves SIM out.
      negatives: where SIM's hard negatives come from: "batch" (the same device), "global" (all
        devices) or "queue" (all devices and the token queue).
      mining_rows: rows of the global batch that share candidates, whatever the devices; divides a
        larger batch. Their tokens are all that travels to a device, so that memory and traffic do
        not grow with the batch. None for the whole batch.
      mining_tau: temperature T of hard-negative mining, probability ~ exp(cosine / T); None for
        tau, as in ALBEF. A higher one draws easier negatives. A matcher trained from scratch needs
        it: as tau falls, the draws become pairs that SIC cannot tell apart either.
      warm_up_steps: steps of plain in-batch contrastive learning before the whole method; 0 for
        pretrained encoders. Encoders trained from scratch change so fast that momentum keys lag
        behind, the model can tell queued embeddings from fresh ones by age alone, and the
        similarities are still too poor to mine with.
      min_tau: lowest temperature; tau is clipped after each update.
      max_tau: highest temperature.
    """

    momentum: float | None = field(default=0.995, metadata={"min": 0.0, "max": 1.0})
    alpha: float = field(default=0.4, metadata={"min": 0.0, "max": 1.0})
    alpha_ramp_steps: int | None = field(default=None, metadata={"min": 0})
    id_policy: str = field(default="multi_positive", metadata={"choices": ID_POLICIES})
    sim_weight: float = field(default=1.0, metadata={"min": 0.0})
    negatives: str = field(default="global", metadata={"choices": NEGATIVE_POOLS})
    mining_rows: int | None = field(default=None, metadata={"min": 1})
    mining_tau: float | None = field(default=None, metadata={"above": 0.0})
    warm_up_steps: int = field(default=0, metadata={"min": 0})
    min_tau: float = field(default=0.001, metadata={"above": 0.0})
    max_tau: float = field(default=0.5, metadata={"above": 0.0})

    def warm_up(self) -> "MethodConfig":
        """Return the method of the warm-up: SIC in the batch and nothing else."""
        return dataclasses.replace(self, momentum=None, alpha=0.0, sim_weight=0.0)

    def has_sim(self, step: int) -> bool:
        """Return whether SIM has been trained by the end of a step; before, it scores at random."""
        return self.sim_weight > 0 and step > self.warm_up_steps

    def check(self, batch_size: int, queue_size: int, token_queue_size: int) -> None:
        """Check that the options agree with each other and with the sizes of batch and queues.

        Args:
          batch_size: rows of the global batch.
          queue_size: slots of the embedding queue.
          token_queue_size: slots of the token queue.

        Raises:
          UserError: two options contradict each other.
        """
        if self.min_tau > self.max_tau:
            raise UserError(
                f"method.min_tau={self.min_tau} must be at most method.max_tau={self.max_tau}"
            )
        if self.momentum is None and (queue_size or token_queue_size or self.alpha):
            raise UserError(
                "method.momentum=None trains without a momentum model, which the queue and "
                "distillation need: set queue_size=0, token_queue_size=0 and method.alpha=0, or "
                "give method.momentum a value"
            )
        if (self.negatives == "queue") != (token_queue_size > 0):
            raise UserError(
                f"method.negatives={self.negatives!r} with token_queue_size={token_queue_size}: "
                "negatives from the queue need token_queue_size > 0, and no other pool uses it"
            )
        rows = self.mining_rows
        if rows is not None and rows < batch_size and batch_size % rows:
            raise UserError(
                f"method.mining_rows={rows} does not divide batch_size={batch_size}: use "
                f"{max(d for d in range(1, rows) if not batch_size % d)}, or None for the whole "
                "batch"
            )
