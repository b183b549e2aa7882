"""The ops as passes over chunks of rows: what a backend computes, in which order, and what is kept.

rows of a group of pairs -> reference log-probs -> policy log-probs, exponentials kept -> loss -> dhidden, dweight

With z the logits, every loss L(logprobs) has dL/dz = dL/dlogprob (onehot - softmax(z)). The exponentials of the forward
pass serve as the operand of both gradient products, so that a pass costs four products of [T, D, V]: reference, policy,
dhidden, dweight. What no longer fits into the memory budget is computed again, at the price of a fifth.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from tso_fast.types import PairLogprobs

MIB = 2**20
# Half of it is filled with pairs; only one that is longer takes more. So on a GPU a step of Llama-3-8B's head, with the
# sum of its gradient, stays under 2 GiB.
_DEFAULT_BUDGET_MIB = {"cpu": 64.0, "cuda": 1920.0}
_budget_mib: dict[str, float] = {}


def memory_budget_mib(device_type: str) -> float:
    """Memory for stored exponentials, MiB: what ``set_memory_budget_mib`` was given, else the environment variable
    ``TSO_FAST_MEMORY_BUDGET_MIB``, else 64 on CPU and 1920 on GPUs."""
    if device_type in _budget_mib:
        return _budget_mib[device_type]
    if given := os.environ.get("TSO_FAST_MEMORY_BUDGET_MIB"):
        return _checked_budget(given)
    return _DEFAULT_BUDGET_MIB.get(device_type, 1920.0)


def set_memory_budget_mib(mib: float | None, device_type: str) -> None:
    """Sets the memory for stored exponentials on ``cpu`` or ``cuda``; None: the default again.

    Larger chunks are faster: fewer passes over the gradient of the output head. A pair whose rows don't fit is computed
    twice (five products instead of four).
    """
    if mib is None:
        _budget_mib.pop(device_type, None)
    else:
        _budget_mib[device_type] = _checked_budget(mib)


def _checked_budget(mib: float | str) -> float:
    try:
        value = float(mib)
    except ValueError:
        value = -1.0
    if not value > 0:
        raise ValueError(f"the memory budget must be a number of MiB > 0, got {mib!r}")
    return value


class Backend(Protocol):
    """What computes on rows: ``cpu`` or ``triton``. Arguments are checked and contiguous, no row is ignored."""

    def bytes_per_row(self, weight_VD: torch.Tensor) -> int:
        """Bytes that a row keeps."""

    def make_room(self, num_rows: int, weight_VD: torch.Tensor) -> torch.Tensor:
        """Memory for what ``forward`` keeps of up to so many rows; free again after ``backward``."""

    def forward(
        self, hidden_TD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, targets_T: torch.Tensor, *,
        softcap: float | None, temperature: float, room: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Any]:  # fmt: skip
        """Log-probs [T] in float32 or better, and with ``room`` to keep it in what ``backward`` needs."""

    def backward(
        self, saved: Any, dlogprobs_T: torch.Tensor, *, dhidden_TD: torch.Tensor | None,
        dweight_VD: torch.Tensor | None, dweight_rest_VD: torch.Tensor | None, dbias_V: torch.Tensor | None,
        is_first: bool, is_last: bool,
    ) -> None:  # fmt: skip
        """Gradients of sum(dlogprobs_T * logprobs_T). Uses up ``saved``; a row with a zero costs nothing.

        dhidden_TD: written. dweight_VD, dweight_rest_VD: together a sum over chunks in float32 or better (see
        ``WeightSum``), overwritten when ``is_first``, rounded once into dweight_VD when ``is_last``. dbias_V, float64:
        added to, or written when ``is_first``.
        """

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
    is_grad_enabled: bool
    """Of the caller: inside of an autograd function it never is."""

    def needs(self, ctx: Any) -> tuple[bool, ...]:
        """Whether hidden, weight and bias need gradients."""
        return tuple(need and self.is_grad_enabled for need in ctx.needs_input_grad[:3])


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def bits(values: torch.Tensor) -> Any:
    """The tensor's own memory as a numpy array; numpy has no bfloat16, whose bits pass as int16."""
    values = values.detach()
    return (values.view(torch.int16) if values.dtype == torch.bfloat16 else values).numpy()


class _Rows:
    """Some rows of [T, D] tensors, without a copy where they are adjacent."""

    def __init__(self, index: torch.Tensor, span: tuple[int, int] | None) -> None:
        self.index, self.span = index, span

    def take(self, values: torch.Tensor) -> torch.Tensor:
        if self.span is not None:
            return values[self.span[0] : self.span[1]].contiguous()
        if values.device.type == "cpu":  # not by threads of torch, which would go on spinning beside those of the op
            return torch.from_numpy(bits(values)[self.index.numpy()]).view(values.dtype)
        return values.index_select(0, self.index)

    def put(self, values: torch.Tensor, out: torch.Tensor) -> None:
        """Writes the rows back to where they were taken from."""
        if values.device.type == "cpu":
            bits(out)[self.index.numpy()] = bits(values)
        else:
            out.index_copy_(0, self.index, values)


class WeightSum:
    """The weight's gradient as a sum over chunks in float32 or better, without a second tensor of that size.

    float32 and float64 weights: the result itself. bfloat16: the result is the upper half of a float32, and ``rest``
    the lower one. float16 is no part of a float32: ``rest`` is the sum. With one chunk there is no ``rest``.
    """

    def __init__(self, weight_VD: torch.Tensor, num_chunks: int) -> None:
        self.total_VD = torch.empty_like(weight_VD)
        dtype = {torch.bfloat16: torch.int16, torch.float16: torch.float32}.get(weight_VD.dtype)
        is_whole = dtype is None or num_chunks == 1
        self.rest_VD = None if is_whole else torch.empty_like(weight_VD, dtype=dtype)

    @staticmethod
    def rest_bytes(weight_VD: torch.Tensor) -> int:
        return weight_VD.numel() * {torch.bfloat16: 2, torch.float16: 4}.get(weight_VD.dtype, 0)

    def round(self) -> None:
        """What a backend does with the last chunk, for one that adds nothing."""
        if self.rest_VD is None:
            return
        for start, end in _tiles(self.total_VD.shape[0], 1024):
            total, rest = self.total_VD[start:end], self.rest_VD[start:end]
            if rest.dtype == torch.int16:
                high = total.view(torch.int16).to(torch.int32) << 16
                rest = (high | (rest.to(torch.int32) & 0xFFFF)).view(torch.float32)
            total.copy_(rest)


class _Gradients:
    """Gradients that are collected chunk by chunk."""

    def __init__(
        self, hidden_TD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, needs: Sequence[bool],
        num_chunks: int, covers_all_rows: bool,
    ) -> None:  # fmt: skip
        need_dhidden, need_dweight, need_dbias = needs
        make = torch.empty_like if covers_all_rows else torch.zeros_like
        self.dhidden_TD = make(hidden_TD, memory_format=torch.contiguous_format) if need_dhidden else None
        self.dweight = WeightSum(weight_VD, num_chunks) if need_dweight else None
        self.dbias_V = torch.empty_like(bias_V, dtype=torch.float64) if bias_V is not None and need_dbias else None
        self.bias_V = bias_V
        self.num_left, self.is_first = num_chunks, True

    def add(self, backend: Backend, saved: Any, dlogprobs_T: torch.Tensor, rows: _Rows) -> None:
        """``saved`` None: a chunk without any gradient."""
        self.num_left -= 1
        if saved is None:
            self._add_nothing(rows)
            return
        dhidden_RD = None
        if self.dhidden_TD is not None:
            if rows.span is not None:
                dhidden_RD = self.dhidden_TD[rows.span[0] : rows.span[1]]
            else:
                dhidden_RD = self.dhidden_TD.new_empty(dlogprobs_T.numel(), self.dhidden_TD.shape[1])
        backend.backward(
            saved,
            dlogprobs_T,
            dhidden_TD=dhidden_RD,
            dweight_VD=None if self.dweight is None else self.dweight.total_VD,
            dweight_rest_VD=None if self.dweight is None else self.dweight.rest_VD,
            dbias_V=self.dbias_V,
            is_first=self.is_first,
            is_last=self.num_left == 0,
        )
        self.is_first = False
        if self.dhidden_TD is not None and dhidden_RD is not None and rows.span is None:
            rows.put(dhidden_RD, self.dhidden_TD)

    def _add_nothing(self, rows: _Rows) -> None:
        if self.dhidden_TD is not None:
            self.dhidden_TD.index_fill_(0, rows.index, 0)
        if self.num_left:
            return
        if self.dweight is not None:
            self.dweight.total_VD.zero_() if self.is_first else self.dweight.round()
        if self.is_first and self.dbias_V is not None:
            self.dbias_V.zero_()

    def finished(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        assert self.num_left == 0
        dweight = None if self.dweight is None else self.dweight.total_VD
        dbias = None if self.dbias_V is None or self.bias_V is None else self.dbias_V.to(self.bias_V.dtype)
        self.dweight = None
        return self.dhidden_TD, dweight, dbias


def _tiles(size: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, size)) for start in range(0, size, max(step, 1))]


def _row_limit(backend: Backend, weight_VD: torch.Tensor) -> int:
    """Rows whose exponentials fill the memory budget."""
    rows = max(16, int(memory_budget_mib(weight_VD.device.type) * MIB) // backend.bytes_per_row(weight_VD))
    return rows // 16 * 16 if rows < 32 else rows // 32 * 32  # backends pad what they keep


def _single_chunk_limit(backend: Backend, weight_VD: torch.Tensor, need_dweight: bool) -> int:
    """Rows that are taken at once: then the weight's gradient is no sum over chunks, which takes memory."""
    limit = _row_limit(backend, weight_VD) // 2
    if need_dweight:
        limit += WeightSum.rest_bytes(weight_VD) // backend.bytes_per_row(weight_VD)
    return limit


# --------------------------------------------------------------------------------------------------- linear_logprobs


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None,
        targets_R: torch.Tensor, rows: _Rows, head: Head,
    ) -> torch.Tensor:  # fmt: skip
        backend, needs = head.backend, head.needs(ctx)
        out = targets_R.new_zeros(targets_R.numel(), dtype=acc_dtype(hidden_TD.dtype))
        ctx.rows, ctx.head, ctx.saved, ctx.is_frozen = rows, head, None, needs == (True, False, False)
        if not targets_R.numel():
            ctx.save_for_backward(hidden_TD, weight_VD, bias_V, targets_R)
            return out
        hidden_RD = rows.take(hidden_TD)
        options: dict[str, Any] = {"softcap": head.softcap, "temperature": head.temperature}
        limit = _row_limit(backend, weight_VD)
        if ctx.is_frozen:
            # The gradient of a log-prob with respect to its hidden state needs nothing from upstream: two products.
            jacobian_RD = torch.empty_like(hidden_RD, dtype=acc_dtype(hidden_TD.dtype))
            room: torch.Tensor | None = backend.make_room(min(limit, targets_R.numel()), weight_VD)
            for start, end in _tiles(targets_R.numel(), limit):
                args = hidden_RD[start:end], weight_VD, bias_V, targets_R[start:end]
                logprobs, saved = backend.forward(*args, **options, room=room)
                out[start:end] = logprobs
                backend.backward(
                    saved, torch.ones_like(out[start:end]), dhidden_TD=jacobian_RD[start:end], dweight_VD=None,
                    dweight_rest_VD=None, dbias_V=None, is_first=True, is_last=True,
                )  # fmt: skip
            ctx.save_for_backward(jacobian_RD, hidden_TD)
            return out
        num_rows = targets_R.numel()
        room = backend.make_room(num_rows, weight_VD) if any(needs) and num_rows <= limit else None
        logprobs, ctx.saved = backend.forward(hidden_RD, weight_VD, bias_V, targets_R, **options, room=room)
        out.copy_(logprobs)
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, targets_R)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dlogprobs_R,) = grads
        rows, backend = ctx.rows, ctx.head.backend
        if ctx.is_frozen and len(ctx.saved_tensors) == 2:
            jacobian_RD, hidden_TD = ctx.saved_tensors
            dhidden_TD = torch.zeros_like(hidden_TD)
            dhidden_TD.index_copy_(0, rows.index, (dlogprobs_R[:, None] * jacobian_RD).to(hidden_TD.dtype))
            return dhidden_TD, None, None, None, None, None
        hidden_TD, weight_VD, bias_V, targets_R = ctx.saved_tensors
        need_dweight = ctx.needs_input_grad[1]
        saved, ctx.saved = ctx.saved, None
        num_rows = targets_R.numel()
        limit = num_rows
        if saved is None and num_rows > _single_chunk_limit(backend, weight_VD, need_dweight):
            limit = _row_limit(backend, weight_VD)
        chunks = _tiles(num_rows, limit)
        covers_all = num_rows == hidden_TD.shape[0]
        gradients = _Gradients(hidden_TD, weight_VD, bias_V, ctx.needs_input_grad[:3], max(1, len(chunks)), covers_all)
        if not chunks:
            gradients.add(backend, None, dlogprobs_R, rows)
        room = backend.make_room(min(limit, num_rows), weight_VD) if saved is None and chunks else None
        for start, end in chunks:
            part = _Rows(
                rows.index[start:end], None if rows.span is None else (rows.span[0] + start, rows.span[0] + end)
            )
            if saved is None:
                _, saved = backend.forward(
                    part.take(hidden_TD), weight_VD, bias_V, targets_R[start:end], softcap=ctx.head.softcap,
                    temperature=ctx.head.temperature, room=room,
                )  # fmt: skip
            gradients.add(backend, saved, dlogprobs_R[start:end], part)
            saved = None
        return (*gradients.finished(), None, None, None)


def linear_logprobs(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, targets_T: torch.Tensor,
    index: torch.Tensor, head: Head,
) -> torch.Tensor:  # fmt: skip
    """Log-probs [R] of the rows ``index`` [R], which rises; see ``tso_fast.linear_logprobs``."""
    is_all = index.numel() == targets_T.numel()
    rows = _Rows(index, (0, index.numel()) if is_all else None)
    out: torch.Tensor = _LinearLogprobs.apply(
        hidden_TD,
        weight_VD.contiguous(),
        None if bias_V is None else bias_V.contiguous(),
        rows.take(targets_T),
        rows,
        head,
    )
    return out


# --------------------------------------------------------------------------------------------------- preference_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences, pairs and scalars of a preference loss; on the device, with what the host must know in lists."""

    targets_T: torch.Tensor
    """[T] of the flattened input, ``ignore_index`` included."""
    index: torch.Tensor
    """[R] rows that count, in the order of the sequences."""
    num_tokens: list[int]
    """Rows of each sequence."""
    pairs: list[tuple[int, int]]
    token_weights_T: torch.Tensor | None
    scale_N: torch.Tensor | None
    soft_label_N: torch.Tensor | None
    margin_N: torch.Tensor | None
    loss: Callable[[PairLogprobs], torch.Tensor]
    is_per_pair: bool
    """Whether a pair's loss depends on that pair alone; unknown for a function of the user's."""
    dual_clip: dict[str, float] | None
    """The options, all of them, if that is the loss."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Group:
    """Sequences whose loss is computed together."""

    sequences: list[int]
    pairs: list[int]
    num_rows: int


def _components(num_sequences: int, pairs: list[tuple[int, int]]) -> list[tuple[list[int], list[int]]]:
    """Sequences and pairs that hang together, in the order of their first sequence's first pair."""
    parent = list(range(num_sequences))

    def root(s: int) -> int:
        while parent[s] != s:
            parent[s] = parent[parent[s]]
            s = parent[s]
        return s

    for chosen, rejected in pairs:
        parent[root(rejected)] = root(chosen)
    found: dict[int, tuple[list[int], list[int]]] = {}
    for n, (chosen, _) in enumerate(pairs):
        found.setdefault(root(chosen), ([], []))[1].append(n)
    for s in range(num_sequences):
        found.setdefault(root(s), ([], []))[0].append(s)
    return list(found.values())


def _groups(batch: Batch, row_limit: int, single_limit: int) -> list[_Group]:
    """Whole components, as many to a group as ``row_limit`` rows hold."""
    num_rows = sum(batch.num_tokens)
    everything = [
        _Group(sequences=list(range(len(batch.num_tokens))), pairs=list(range(len(batch.pairs))), num_rows=num_rows)
    ]
    if not batch.is_per_pair or num_rows <= single_limit:
        return everything
    groups: list[_Group] = []
    for sequences, pairs in _components(len(batch.num_tokens), batch.pairs):
        rows = sum(batch.num_tokens[s] for s in sequences)
        if groups and groups[-1].num_rows + rows <= row_limit:
            last = groups.pop()
            sequences, pairs, rows = last.sequences + sequences, last.pairs + pairs, last.num_rows + rows
        groups.append(_Group(sequences=sequences, pairs=pairs, num_rows=rows))
    return groups


class _PreferenceLoss(torch.autograd.Function):
    """Gradients are made in the forward pass, where the exponentials are; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None,
        reference: _Reference, batch: Batch, head: Head,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        needs = head.needs(ctx)
        run = _Pass(hidden_TD, weight_VD, bias_V, reference, batch, head, needs)
        for group, chunks in run.plan:
            run.group(group, chunks)
        loss = run.loss_N if batch.scale_N is None else run.loss_N * batch.scale_N
        total = (loss.sum() / run.weight_sum).to(run.out_dtype)
        if any(needs):
            assert run.gradients is not None
            ctx.save_for_backward(*run.gradients.finished())
        outputs = run.loss_N, run.logprob_S, run.ref_logprob_S
        ctx.mark_non_differentiable(*outputs)
        return (total, *outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        dloss = grads[0]
        assert dloss is not None
        # The caller may add to what it gets, so it gets copies if the graph is kept for another walk, and the tensors
        # themselves if not: the weight's gradient is large. On a GPU to look at dloss would be to wait for the device.
        keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()
        is_one = dloss.device.type == "cpu" and dloss.item() == 1
        may_give = is_one and not keeps_graph
        scaled = [g if g is None or may_give else g * dloss.to(g.dtype) for g in ctx.saved_tensors]
        return (*scaled, None, None, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Reference:
    """Either its sums of log-probs, [S], or what they are computed from."""

    logprob_S: torch.Tensor | None
    hidden_TD: torch.Tensor | None = None
    weight_VD: torch.Tensor | None = None
    bias_V: torch.Tensor | None = None


class _Pass:
    """One evaluation of a preference loss."""

    def __init__(
        self, hidden_TD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, reference: _Reference,
        batch: Batch, head: Head, needs: Sequence[bool],
    ) -> None:  # fmt: skip
        self.hidden_TD, self.weight_VD, self.bias_V = hidden_TD, weight_VD, bias_V
        self.reference, self.batch, self.head, self.backend = reference, batch, head, head.backend
        self.needs_grad = any(needs)
        device, self.out_dtype = hidden_TD.device, acc_dtype(hidden_TD.dtype)
        dtype = torch.float64  # of the sums and of the loss: a margin is the small difference of large sums
        S, N = len(batch.num_tokens), len(batch.pairs)
        self.logprob_S = torch.zeros(S, dtype=dtype, device=device)
        self.ref_logprob_S = torch.zeros(S, dtype=dtype, device=device)
        if reference.logprob_S is not None:
            self.ref_logprob_S.copy_(reference.logprob_S)
        self.loss_N = torch.zeros(N, dtype=dtype, device=device)
        if batch.scale_N is None:
            self.weight_sum = torch.full((), float(N), dtype=dtype, device=device)
        else:
            self.weight_sum = batch.scale_N.sum(dtype=dtype).clamp(min=torch.finfo(dtype).tiny)

        row_limit = _row_limit(self.backend, weight_VD)
        single_limit = _single_chunk_limit(self.backend, weight_VD, needs[1])
        groups = _groups(batch, row_limit // 2, single_limit)
        starts = [0]
        for count in batch.num_tokens:
            starts.append(starts[-1] + count)
        is_all = batch.index.numel() == hidden_TD.shape[0]  # then row r of the input is the r-th that counts
        self.plan = []
        for group in groups:
            is_adjacent = group.sequences == list(range(group.sequences[0], group.sequences[-1] + 1))
            if is_adjacent:
                begin, end = starts[group.sequences[0]], starts[group.sequences[-1] + 1]
                index, span = batch.index[begin:end], (begin, end) if is_all else None
            else:
                index = torch.cat([batch.index[starts[s] : starts[s + 1]] for s in group.sequences])
                span = None
            limit = max(row_limit, single_limit) if len(groups) == 1 else row_limit
            chunks = _tiles(group.num_rows, group.num_rows if group.num_rows <= limit else row_limit)
            parts = [
                (start, end, _Rows(index[start:end], None if span is None else (span[0] + start, span[0] + end)))
                for start, end in chunks
            ]
            self.plan.append((group, parts))
        num_chunks = sum(len(parts) for _, parts in self.plan)
        self.gradients = None
        self.room: torch.Tensor | None = None
        if self.needs_grad:
            most = max((end - start for _, parts in self.plan for start, end, _ in parts), default=0)
            self.room = self.backend.make_room(most, weight_VD)
            self.gradients = _Gradients(hidden_TD, weight_VD, bias_V, needs, max(num_chunks, 1), is_all)
            if not num_chunks:
                self.gradients.add(self.backend, None, self.loss_N, _Rows(batch.index, None))

    def _forward(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rows: _Rows,
        room: torch.Tensor | None = None,
    ) -> Any:  # fmt: skip
        options: dict[str, Any] = {"softcap": self.head.softcap, "temperature": self.head.temperature, "room": room}
        return self.backend.forward(rows.take(hidden), weight, bias, rows.take(self.batch.targets_T), **options)

    def group(self, group: _Group, chunks: list[tuple[int, int, _Rows]]) -> None:
        """Log-probs, losses and gradients of a group whose exponentials are kept only if they are one chunk."""
        device = self.logprob_S.device
        sequences = _upload(group.sequences, device)
        lengths = _upload([self.batch.num_tokens[s] for s in group.sequences], device)
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        logprob_R = torch.empty(group.num_rows, dtype=torch.float64, device=device)
        ref_logprob_R = None if self.reference.hidden_TD is None else torch.empty_like(logprob_R)
        saved = None
        for start, end, rows in chunks:
            if ref_logprob_R is not None:
                reference = self.reference.hidden_TD, self.reference.weight_VD, self.reference.bias_V
                ref_logprob_R[start:end], _ = self._forward(*reference, rows)  # type: ignore[arg-type]
            room = self.room if len(chunks) == 1 else None
            logprob_R[start:end], saved = self._forward(self.hidden_TD, self.weight_VD, self.bias_V, rows, room)

        weight_R = None
        if self.batch.token_weights_T is not None and chunks:
            weight_R = torch.cat([rows.take(self.batch.token_weights_T) for _, _, rows in chunks]).to(torch.float64)
        self.logprob_S[sequences] = self.backend.segment_sum(logprob_R, weight_R, cu_seqlens)
        if ref_logprob_R is not None:
            self.ref_logprob_S[sequences] = self.backend.segment_sum(ref_logprob_R, weight_R, cu_seqlens)
        dlogprob_S = self._losses(group, sequences, lengths)
        dlogprob_R = dlogprob_S.repeat_interleave(lengths, output_size=group.num_rows)
        if weight_R is not None:
            dlogprob_R = dlogprob_R * weight_R
        if self.gradients is None:
            return
        for start, end, rows in chunks:
            upstream = dlogprob_R[start:end]
            # Only where looking costs no wait for the device.
            is_nothing = device.type == "cpu" and not bool(upstream.any())
            if saved is None and not is_nothing:
                saved = self._forward(self.hidden_TD, self.weight_VD, self.bias_V, rows, self.room)[1]
            self.gradients.add(self.backend, None if is_nothing else saved, upstream, rows)
            saved = None

    def _losses(self, group: _Group, sequences: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Fills the losses of the group's pairs and returns the total's derivative by its sequences' log-probs."""
        batch, device = self.batch, self.logprob_S.device
        where = {s: i for i, s in enumerate(group.sequences)}
        chosen, rejected = (_upload([where[batch.pairs[n][side]] for n in group.pairs], device) for side in (0, 1))
        index = _upload(group.pairs, device)

        def of_pairs(values_N: torch.Tensor | None) -> torch.Tensor | None:
            return None if values_N is None else values_N[index].to(self.logprob_S.dtype)

        if not group.pairs:
            return self.logprob_S.new_zeros(len(group.sequences))
        logprob, ref_logprob, scale = self.logprob_S[sequences], self.ref_logprob_S[sequences], of_pairs(batch.scale_N)
        if batch.dual_clip is not None and self.backend.dual_clip_epilogue is not None:
            soft_label, margin = of_pairs(batch.soft_label_N), of_pairs(batch.margin_N)
            self.loss_N[index], dlogprob = self.backend.dual_clip_epilogue(
                logprob, ref_logprob, torch.stack([chosen, rejected], 1), scale, soft_label, margin,
                weight_sum=self.weight_sum, **batch.dual_clip,
            )  # fmt: skip
            return dlogprob
        with torch.enable_grad():
            logprob.requires_grad_()
            scalars = of_pairs(batch.soft_label_N), of_pairs(batch.margin_N)
            losses = pair_losses(batch.loss, logprob, ref_logprob, lengths, chosen, rejected, *scalars)
            total = (losses if scale is None else losses * scale).sum() / self.weight_sum
        self.loss_N[index] = losses.detach().to(self.loss_N.dtype)
        if not self.needs_grad or not total.requires_grad:
            return torch.zeros_like(logprob)
        (dlogprob,) = torch.autograd.grad(total, logprob, materialize_grads=True)
        return dlogprob


def pair_losses(
    loss: Callable[[PairLogprobs], torch.Tensor], logprob_S: torch.Tensor, ref_logprob_S: torch.Tensor,
    num_tokens_S: torch.Tensor, chosen_N: torch.Tensor, rejected_N: torch.Tensor, soft_label_N: torch.Tensor | None,
    margin_N: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Losses [N] of the pairs (chosen, rejected) of sequences. Raises ValueError if they are not one value a pair."""
    losses = loss(
        PairLogprobs(
            chosen=logprob_S[chosen_N],
            rejected=logprob_S[rejected_N],
            ref_chosen=ref_logprob_S[chosen_N],
            ref_rejected=ref_logprob_S[rejected_N],
            num_chosen_tokens=num_tokens_S[chosen_N],
            num_rejected_tokens=num_tokens_S[rejected_N],
            soft_label=None if soft_label_N is None else soft_label_N.to(logprob_S),
            margin=None if margin_N is None else margin_N.to(logprob_S),
        )
    )
    if losses.shape != chosen_N.shape:
        raise ValueError(f"the loss must return one value a pair, [{chosen_N.numel()}], got {tuple(losses.shape)}")
    return losses


def _upload(values: list[int], device: torch.device) -> torch.Tensor:
    """Without waiting for the device, as torch.tensor(values, device=device) would."""
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)


def preference_loss(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, *,
    ref_logprob_S: torch.Tensor | None, ref_hidden_TD: torch.Tensor | None, ref_weight_VD: torch.Tensor | None,
    ref_bias_V: torch.Tensor | None, batch: Batch, head: Head,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Loss; in float64 losses [N] and sums [S] of policy and reference. See ``tso_fast.preference_loss``."""

    def detached(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.detach().contiguous()

    reference = _Reference(
        logprob_S=ref_logprob_S,
        hidden_TD=None if ref_hidden_TD is None else ref_hidden_TD.detach(),
        weight_VD=detached(ref_weight_VD),
        bias_V=detached(ref_bias_V),
    )
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] = _PreferenceLoss.apply(
        hidden_TD, weight_VD.contiguous(), None if bias_V is None else bias_V.contiguous(), reference, batch, head
    )
    return out
