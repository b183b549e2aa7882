"""tso-fast: Self-Training with Scaled Preference Optimization (arXiv 2409.02118)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tso_fast.logprob import linear_logprobs as linear_logprobs
    from tso_fast.logprob import preference_loss as preference_loss
    from tso_fast.logprob.module import FusedLinearTSOLoss as FusedLinearTSOLoss
    from tso_fast.losses import LOSSES as LOSSES

__version__ = "0.1.0"

# Resolved on first use: importing torch takes seconds, and `tso-fast --help` must not.
_PUBLIC = {
    "linear_logprobs": "tso_fast.logprob",
    "preference_loss": "tso_fast.logprob",
    "FusedLinearTSOLoss": "tso_fast.logprob.module",
    "LOSSES": "tso_fast.losses",
}
__all__ = ["LOSSES", "FusedLinearTSOLoss", "__version__", "linear_logprobs", "preference_loss"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
