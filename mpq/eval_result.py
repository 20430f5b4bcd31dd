"""What an evaluation found."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """One evaluation of a model on a dataset. Standard errors are over documents, not over single outputs.

    Attributes:
      quality, quality_stderr: the task's own measure, `quality_name`; NaN where the data has no labels.
      nll, nll_stderr: mean loss against the labels, nats per output; None where the task or the data has none.
      kl, kl_stderr: KL(reference || model), nats per output; None without a reference.
      agreement, agreement_stderr: the task's `agreement_name`; None without a reference.
      num_documents, num_outputs: what they were measured on.
      data_digest: of the dataset.
    """

    quality_name: str
    quality: float
    quality_stderr: float
    nll: float | None
    nll_stderr: float | None
    kl: float | None
    kl_stderr: float | None
    agreement_name: str
    agreement: float | None
    agreement_stderr: float | None
    num_documents: int
    num_outputs: int
    data_digest: str

    def to_json(self) -> dict[str, Any]:
        """Plain values under the names of the task: `perplexity`, `top1_agreement`; None for NaN and infinity."""
        short = self.agreement_name.removesuffix("_agreement")
        body = {
            self.quality_name: self.quality,
            f"{self.quality_name}_stderr": self.quality_stderr,
            "nll": self.nll,
            "nll_stderr": self.nll_stderr,
            "kl": self.kl,
            "kl_stderr": self.kl_stderr,
            self.agreement_name: self.agreement,
            f"{short}_stderr": self.agreement_stderr,
            "num_documents": self.num_documents,
            "num_outputs": self.num_outputs,
        }
        return {key: None if isinstance(v, float) and not np.isfinite(v) else v for key, v in body.items()}
