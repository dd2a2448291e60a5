"""What the paper's method is made of, as values."""

import dataclasses
from dataclasses import dataclass

from c2f_jax import objectives
from c2f_jax.errors import UserError

NEGATIVE_POOLS = ("batch", "global", "queue")


@dataclass(frozen=True)
class MethodConfig:
    """What the paper's method is made of. Values are inherited from ALBEF and BLIP where the paper's are not known.

    Attributes:
      momentum: m of the momentum model; None trains without one, with online keys that receive gradient (plain
        in-batch contrastive learning; needs an empty queue and alpha = 0).
      alpha: weight of momentum distillation.
      alpha_ramp_steps: steps after the warm-up over which alpha grows from 0; 0 for none, None for one
        epoch, which the trainer knows.
      id_policy: "multi_positive", "mask" or "diagonal".
      sic_weight, sim_weight: L = sic_weight L_SIC + sim_weight L_SIM; sim_weight = 0 skips SIM altogether.
      negatives: pool of SIM's hard negatives: "batch" (own device), "global" (all devices) or "queue" (all devices and
        the token queue).
      mining_tau: temperature T of hard-negative mining, probability ~ exp(cosine / T); None for tau, as in ALBEF. A
        larger one draws easier negatives: a matcher that starts from nothing learns nothing from those that SIC, whose
        tau falls as it learns, cannot tell from the right ones either.
      warm_up_steps: steps of plain in-batch contrastive learning before the whole method (``warm_up``); 0 for
        pretrained encoders. Encoders that start from nothing change so fast that momentum keys lag behind, queued
        embeddings are told from fresh ones by their age alone, and hard negatives mean nothing yet.
      min_tau, max_tau: the temperature is clipped to this range after each update.
    """

    momentum: float | None = 0.995
    alpha: float = 0.4
    alpha_ramp_steps: int | None = 0
    id_policy: str = "multi_positive"
    sic_weight: float = 1.0
    sim_weight: float = 1.0
    negatives: str = "global"
    mining_tau: float | None = None
    warm_up_steps: int = 0
    min_tau: float = 0.001
    max_tau: float = 0.5

    def warm_up(self):
        """The method of the first ``warm_up_steps`` steps: SIC in the batch, without momentum model, queue or SIM."""
        return dataclasses.replace(self, momentum=None, alpha=0.0, sim_weight=0.0)

    def has_sim(self, step):
        """Whether SIM was trained by the end of ``step``; before, its scores are those of a random matcher."""
        return self.sim_weight > 0 and step > self.warm_up_steps

    def check(self, queue_size, token_queue_size):
        """Raise UserError for values that contradict each other."""
        if self.id_policy not in objectives.ID_POLICIES:
            raise UserError(
                f"method.id_policy={self.id_policy!r}: choose one of {', '.join(objectives.ID_POLICIES)}"
            )
        if self.negatives not in NEGATIVE_POOLS:
            raise UserError(
                f"method.negatives={self.negatives!r}: choose one of {', '.join(NEGATIVE_POOLS)}"
            )
        if not 0.0 <= self.alpha <= 1.0:
            raise UserError(f"method.alpha={self.alpha}: a weight from 0 to 1 is expected")
        if self.momentum is not None and not 0.0 <= self.momentum <= 1.0:
            raise UserError(
                f"method.momentum={self.momentum}: a value from 0 to 1, or None, is expected"
            )
        if min(self.sic_weight, self.sim_weight) < 0 or not self.sic_weight + self.sim_weight > 0:
            raise UserError(
                "method.sic_weight and method.sim_weight must not be negative, and one of them above 0"
            )
        if queue_size < 0 or token_queue_size < 0:
            raise UserError(
                f"queue_size={queue_size}, token_queue_size={token_queue_size}: sizes are 0 or more"
            )
        if self.warm_up_steps < 0:
            raise UserError(f"method.warm_up_steps={self.warm_up_steps}: 0 or more is expected")
        if self.alpha_ramp_steps is not None and self.alpha_ramp_steps < 0:
            raise UserError(
                f"method.alpha_ramp_steps={self.alpha_ramp_steps}: 0 or more, or None, is expected"
            )
        if not 0 < self.min_tau <= self.max_tau:
            raise UserError(
                f"method.min_tau={self.min_tau}, method.max_tau={self.max_tau}: temperatures above 0, the lower one "
                "first, are expected"
            )
        if self.mining_tau is not None and not self.mining_tau > 0:
            raise UserError(
                f"method.mining_tau={self.mining_tau}: a temperature above 0, or None for tau, is expected"
            )
        if self.momentum is None and (queue_size or token_queue_size or self.alpha):
            raise UserError(
                "method.momentum=None trains without a momentum model, which the queue and distillation need: "
                "set queue_size=0, token_queue_size=0 and method.alpha=0, or give method.momentum a value"
            )
        if (self.negatives == "queue") != (token_queue_size > 0):
            raise UserError(
                f"method.negatives={self.negatives!r} with token_queue_size={token_queue_size}: negatives from the "
                "queue need token_queue_size > 0, and no other pool uses it"
            )
