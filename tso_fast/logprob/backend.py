"""What computes on rows, and the output head that it computes with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch

from tso_fast.logprob.groups import VocabShard
from tso_fast.logprob.plan import Planner


class Backend(Planner, Protocol):
    """What computes on rows: ``reference``, ``cpu`` or ``triton``.

    Arguments are checked and contiguous, and no row is ignored.
    """

    def bytes_per_row(self, weight_VD: torch.Tensor) -> int:
        """Bytes that a row keeps."""

    def make_room(self, num_rows: int, weight_VD: torch.Tensor) -> torch.Tensor:
        """Memory for what ``forward`` keeps of up to so many rows; free again after ``backward``."""

    def forward(
        self, hidden_TD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, targets_T: torch.Tensor, *,
        softcap: float | None, temperature: float, room: torch.Tensor | None, shard: VocabShard | None = None,
    ) -> tuple[torch.Tensor, Any]:  # fmt: skip
        """Log-probs [T] in float32 or better, and with ``room`` to keep it in what ``backward`` needs.

        With ``shard`` the weight and the bias are this rank's rows of the head, and every rank of it calls this with
        the same hidden rows and targets; the log-probs are those of the whole head, the same bits on every rank.
        """

    def backward(
        self, saved: Any, dlogprobs_T: torch.Tensor, *, dhidden_TD: torch.Tensor | None,
        dweight_VD: torch.Tensor | None, dweight_rest_VD: torch.Tensor | None, dbias_V: torch.Tensor | None,
        is_first: bool, is_last: bool, may_skip: bool,
    ) -> None:  # fmt: skip
        """Gradients of sum(dlogprobs_T * logprobs_T). Uses up ``saved``.

        dhidden_TD: written; of a shard this rank's part of a sum over ranks. dweight_VD, dweight_rest_VD: together a
        sum over chunks (see ``WeightSum``), overwritten when ``is_first``, rounded once into dweight_VD when
        ``is_last``. dbias_V, float64: added to, or written when ``is_first``. may_skip: rows with a zero are to be
        expected, and should cost nothing.
        """

    def scale(self, gradient: torch.Tensor, factor: torch.Tensor) -> None:
        """Multiplies a contiguous gradient by a scalar tensor in float32 or better, in place."""

    def segment_sum(
        self, values_R: torch.Tensor, weights_R: torch.Tensor | None, cu_seqlens: torch.Tensor
    ) -> torch.Tensor:
        """Sums [S] float64 of (weighted) values over the rows cu_seqlens[s] : cu_seqlens[s + 1], in a fixed order."""

    dual_clip_epilogue: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None
    """The loss ``dual_clip`` and its gradient in few launches, or None: through autograd like every other loss."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """Everything about an output head that is no tensor to be differentiated."""

    backend: Backend
    softcap: float | None
    temperature: float
    needs: tuple[bool, bool, bool]
    """Whether hidden, weight and bias need gradients."""
    may_skip: bool = False
    """Whether rows without a gradient are to be expected."""
    shard: VocabShard | None = None
    """The ranks that hold the head together; None: this one has all of it."""

    def forward(
        self, hidden_RD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, targets_R: torch.Tensor,
        room: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Any]:  # fmt: skip
        """Log-probs of rows, and with ``room`` what their gradient needs."""
        return self.backend.forward(
            hidden_RD, weight_VD, bias_V, targets_R, softcap=self.softcap, temperature=self.temperature, room=room,
            shard=self.shard,
        )  # fmt: skip
