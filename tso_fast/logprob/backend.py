"""The interface of backends, which compute on rows, and the output head they compute with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch

from tso_fast.logprob.groups import VocabShard
from tso_fast.logprob.plan import Planner


class Backend(Planner, Protocol):
    """An implementation of the op on rows: ``reference``, ``cpu`` or ``triton``.

    Arguments have been checked and are contiguous, and no row is ignored.
    """

    def bytes_per_row(self, weight_VD: torch.Tensor) -> int:
        """Bytes kept per row until the backward pass."""

    def make_room(self, num_rows: int, weight_VD: torch.Tensor) -> torch.Tensor:
        """Memory in which ``forward`` keeps up to ``num_rows`` rows; can be reused after ``backward``."""

    def forward(
        self, hidden_TD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, targets_T: torch.Tensor, *,
        softcap: float | None, temperature: float, room: torch.Tensor | None, shard: VocabShard | None = None,
    ) -> tuple[torch.Tensor, Any]:  # fmt: skip
        """Log-probs [T] in float32 or better and, if there is ``room`` to keep it, the state for ``backward``.

        With ``shard``, weight and bias are this rank's rows of the head, and all of its ranks must call this with the
        same hidden rows and targets; the log-probs are those of the whole head, with the same bits on every rank.
        """

    def backward(
        self, saved: Any, dlogprobs_T: torch.Tensor, *, dhidden_TD: torch.Tensor | None,
        dweight_VD: torch.Tensor | None, dweight_rest_VD: torch.Tensor | None, dbias_V: torch.Tensor | None,
        is_first: bool, is_last: bool, may_skip: bool,
    ) -> None:  # fmt: skip
        """Gradients of sum(dlogprobs_T * logprobs_T). Uses up ``saved``.

        dhidden_TD: overwritten; with a shard, it is this rank's part of a sum over ranks. dweight_VD, dweight_rest_VD:
        together a sum over chunks (see ``WeightSum``), overwritten if ``is_first``, rounded once into dweight_VD if
        ``is_last``. dbias_V, float64: added to, or overwritten if ``is_first``. may_skip: rows with a zero gradient
        are expected and should cost nothing.
        """

    def scale(self, gradient: torch.Tensor, factor: torch.Tensor) -> None:
        """Multiplies a contiguous gradient by a scalar tensor in float32 or better, in place."""

    def segment_sum(
        self, values_R: torch.Tensor, weights_R: torch.Tensor | None, cu_seqlens: torch.Tensor
    ) -> torch.Tensor:
        """Sums [S] float64 of (weighted) values over the rows cu_seqlens[s] : cu_seqlens[s + 1], in a fixed order."""

    dual_clip_epilogue: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None
    """The loss ``dual_clip`` and its gradient in few launches; None: autograd computes it like every other loss."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """Everything about an output head except the tensors to differentiate."""

    backend: Backend
    softcap: float | None
    temperature: float
    needs: tuple[bool, bool, bool]
    """Whether hidden, weight and bias need gradients."""
    may_skip: bool = False
    """Whether to expect rows without a gradient."""
    shard: VocabShard | None = None
    """The ranks over which the head is split; None: this rank has all of it."""

    def forward(
        self, hidden_RD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, targets_R: torch.Tensor,
        room: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Any]:  # fmt: skip
        """Log-probs of rows and, with ``room``, the state for their gradient."""
        return self.backend.forward(
            hidden_RD, weight_VD, bias_V, targets_R, softcap=self.softcap, temperature=self.temperature, room=room,
            shard=self.shard,
        )  # fmt: skip
