"""torch's NAdam for fairseq-train, as a control of trial.py: `--user-dir recipes/translation/nadam`.

Its update looks ahead along Adam's momentum, as Nesterov's does, by a length that nothing fixes.
"""

from __future__ import annotations

from typing import Any

from fairseq.optim import register_optimizer
from fairseq.optim.adam import FairseqAdam, FairseqAdamConfig
from torch.optim import NAdam

import fairseq_asam.tasks  # noqa: F401  all that --user-dir fairseq_asam brings


@register_optimizer("nadam", dataclass=FairseqAdamConfig)
class FairseqNAdam(FairseqAdam):
    """NAdam with the flags of fairseq's Adam, whose weight decay is decoupled too."""

    def __init__(self, cfg: Any, params: Any) -> None:
        super().__init__(cfg, params)
        self._optimizer = NAdam(params, **self.optimizer_config, decoupled_weight_decay=True)
