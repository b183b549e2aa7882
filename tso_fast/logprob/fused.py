"""The ops as passes over chunks of rows: what a backend computes, in which order, and what is kept.

rows of a group of pairs -> reference log-probs -> policy log-probs, exponentials kept -> loss -> dhidden, dweight

With z the logits, every loss L(logprobs) has dL/dz = dL/dlogprob (onehot - softmax(z)). The exponentials of the forward
pass are an operand of both gradient products, so a pass costs four products of size [T, D, V]: reference, policy,
dhidden, dweight. Exponentials that do not fit into the memory budget are recomputed, which costs a fifth product.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tso_fast.logprob.backend import Head as Head
from tso_fast.logprob.gradients import Gradients, acc_dtype
from tso_fast.logprob.groups import SequenceShard
from tso_fast.logprob.plan import MIB as MIB
from tso_fast.logprob.plan import Group, Shape, plan, tiles
from tso_fast.logprob.plan import memory_budget_mib as memory_budget_mib
from tso_fast.logprob.rows import Rows, repeated
from tso_fast.logprob.sums import Sums, checked_losses
from tso_fast.types import PairLogprobs, TokenLogprobs


def _shape(
    head: Head, weight_VD: torch.Tensor, rows: Sequence[int], is_gathered: bool, can_split: bool = True
) -> Shape:
    return Shape(
        backend=head.backend,
        dim=weight_VD.shape[1],
        vocab=weight_VD.shape[0] if head.shard is None else head.shard.vocab,
        dtype=weight_VD.dtype,
        component_rows=rows,
        can_split=can_split,
        needs_dweight=head.needs[1],
        is_gathered=is_gathered,
        num_ranks=1 if head.shard is None else head.shard.num_ranks,
        device_type=weight_VD.device.type,
    )


# --------------------------------------------------------------------------------------------------- linear_logprobs


def _row_plan(head: Head, weight_VD: torch.Tensor, rows: Rows) -> list[tuple[int, int]]:
    """Chunks for rows that are independent of each other."""
    count = rows.index.numel()
    return plan(_shape(head, weight_VD, [count], rows.span is None)).groups[0].chunks


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None,
        targets_R: torch.Tensor, rows: Rows, head: Head,
    ) -> torch.Tensor:  # fmt: skip
        backend = head.backend
        out = targets_R.new_zeros(targets_R.numel(), dtype=acc_dtype(hidden_TD.dtype))
        ctx.rows, ctx.head, ctx.saved, ctx.is_frozen = rows, head, None, head.needs == (True, False, False)
        chunks = _row_plan(head, weight_VD, rows)
        if not targets_R.numel():
            ctx.save_for_backward(hidden_TD, weight_VD, bias_V, targets_R)
            return out
        hidden_RD = rows.take(hidden_TD)
        if ctx.is_frozen:
            # With a frozen head the forward pass can already compute the gradient of each log-prob by its hidden state,
            # since that needs nothing from upstream. This takes two products in total.
            jacobian_RD = torch.empty_like(hidden_RD, dtype=acc_dtype(hidden_TD.dtype))
            room: torch.Tensor | None = backend.make_room(chunks[0][1], weight_VD)
            for start, end in chunks:
                out[start:end], saved = head.forward(
                    hidden_RD[start:end], weight_VD, bias_V, targets_R[start:end], room
                )
                backend.backward(
                    saved, torch.ones_like(out[start:end]), dhidden_TD=jacobian_RD[start:end], dweight_VD=None,
                    dweight_rest_VD=None, dbias_V=None, is_first=True, is_last=True, may_skip=False,
                )  # fmt: skip
            ctx.save_for_backward(jacobian_RD, hidden_TD)
            return out
        is_kept = any(head.needs) and len(chunks) == 1
        room = backend.make_room(targets_R.numel(), weight_VD) if is_kept else None
        logprobs, ctx.saved = head.forward(hidden_RD, weight_VD, bias_V, targets_R, room)
        out.copy_(logprobs)
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, targets_R)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dlogprobs_R,) = grads
        rows, head = ctx.rows, ctx.head
        if ctx.is_frozen and len(ctx.saved_tensors) == 2:
            jacobian_RD, hidden_TD = ctx.saved_tensors
            dhidden_TD = torch.zeros_like(hidden_TD)
            dhidden_TD.index_copy_(0, rows.index, (dlogprobs_R[:, None] * jacobian_RD).to(hidden_TD.dtype))
            return dhidden_TD, None, None, None, None, None
        hidden_TD, weight_VD, bias_V, targets_R = ctx.saved_tensors
        saved, ctx.saved = ctx.saved, None
        gradients = row_gradients(hidden_TD, weight_VD, bias_V, targets_R, rows, head, dlogprobs_R, saved)
        return (*gradients, None, None, None)


def row_gradients(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, targets_R: torch.Tensor, rows: Rows,
    head: Head, dlogprobs_R: torch.Tensor, saved: Any = None,
) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    """Gradients of sum(dlogprobs * logprobs) by hidden, weight and bias; recomputes the rows if ``saved`` is None."""
    num_rows = targets_R.numel()
    chunks = [(0, num_rows)] if saved is not None else _row_plan(head, weight_VD, rows)
    covers_all = num_rows == hidden_TD.shape[0]
    gradients = Gradients(hidden_TD, weight_VD, bias_V, head.needs, max(1, len(chunks)), covers_all, head)
    if not chunks:
        gradients.add(None, dlogprobs_R, rows)
    most = max((end - start for start, end in chunks), default=0)
    room = head.backend.make_room(most, weight_VD) if saved is None and chunks else None
    for start, end in chunks:
        part = rows.part(start, end)
        if saved is None:
            _, saved = head.forward(part.take(hidden_TD), weight_VD, bias_V, targets_R[start:end], room)
        gradients.add(saved, dlogprobs_R[start:end], part)
        saved = None
    return gradients.finished()


def rows_of(index: torch.Tensor, targets_T: torch.Tensor) -> Rows:
    """The rows ``index``, which is increasing; used in place if it contains all rows."""
    return Rows(index, (0, index.numel()) if index.numel() == targets_T.numel() else None)


def linear_logprobs(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, targets_T: torch.Tensor,
    index: torch.Tensor, head: Head,
) -> torch.Tensor:  # fmt: skip
    """Log-probs [R] of the rows ``index`` [R], which is increasing; see ``tso_fast.linear_logprobs``."""
    rows = rows_of(index, targets_T)
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
    """Sequences, pairs and scalars of a preference loss; tensors are on the device, lists on the host."""

    targets_T: torch.Tensor
    """[T] targets of the flattened input, ``ignore_index`` included."""
    index: torch.Tensor
    """[R] rows that are not ignored, in the order of the sequences."""
    num_tokens: list[int]
    """Number of rows of each sequence on this rank."""
    planned_tokens: list[int]
    """Maximum over ranks of ``num_tokens``, with which all ranks plan."""
    total_tokens: list[int]
    """Number of completion tokens of each sequence over all ranks."""
    pairs: list[tuple[int, ...]]
    """Chosen, rejected and further sequences of each pair."""
    token_weights_T: torch.Tensor | None
    token_values_T: torch.Tensor | None
    """Numbers for ``token_term``."""
    scale_N: torch.Tensor | None
    soft_label_N: torch.Tensor | None
    margin_N: torch.Tensor | None
    win_rates_N2: torch.Tensor | None
    ref2_logprob_S: torch.Tensor | None
    """Sums of log-probs under a second reference."""
    loss: Callable[[PairLogprobs], torch.Tensor]
    is_per_pair: bool
    """Whether a pair's loss depends on that pair alone; False for the user's own functions, where it is unknown."""
    dual_clip: dict[str, float] | None
    """Options of ``dual_clip`` for a backend's epilogue; None: another loss, or one with an NLL."""
    token_term: Callable[[TokenLogprobs], torch.Tensor] | None = None
    """The loss's term of every token, [R]; None: it has none."""
    sequence_shard: SequenceShard | None = None
    """The ranks over which sequences are split; None: this rank has all tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Group:
    """Sequences whose loss is computed together, and this rank's rows in chunks."""

    sequences: list[int]
    pairs: list[int]
    num_rows: int
    chunks: list[tuple[int, int, Rows]]
    """(start, end) within the rows of the group, and the same rows in the input."""


def _components(num_sequences: int, pairs: list[tuple[int, ...]]) -> list[tuple[list[int], list[int]]]:
    """Connected components as (sequences, pairs), in the order of their first sequence's first pair."""
    parent = list(range(num_sequences))

    def root(s: int) -> int:
        while parent[s] != s:
            parent[s] = parent[parent[s]]
            s = parent[s]
        return s

    for chosen, *others in pairs:
        for other in others:
            parent[root(other)] = root(chosen)
    found: dict[int, tuple[list[int], list[int]]] = {}
    for n, (chosen, *_) in enumerate(pairs):
        found.setdefault(root(chosen), ([], []))[1].append(n)
    for s in range(num_sequences):
        found.setdefault(root(s), ([], []))[0].append(s)
    return list(found.values())


def _groups(batch: Batch, head: Head, weight_VD: torch.Tensor, num_input_rows: int) -> list[_Group]:
    """The groups of a batch according to its memory plan."""
    components = _components(len(batch.num_tokens), batch.pairs)
    is_all = batch.index.numel() == num_input_rows  # then no row of the input is ignored
    planned = [sum(batch.planned_tokens[s] for s in sequences) for sequences, _ in components]
    made = plan(_shape(head, weight_VD, planned, not is_all, batch.is_per_pair))
    if len(made.groups) == 1:
        everything = list(range(len(batch.num_tokens))), list(range(len(batch.pairs)))
        return [_group(batch, everything[0], everything[1], made.groups[0], is_all)]
    groups = []
    for group in made.groups:
        chosen = [components[c] for c in group.components]
        sequences, pairs = (list(itertools.chain.from_iterable(part[side] for part in chosen)) for side in (0, 1))
        groups.append(_group(batch, sequences, pairs, group, is_all))
    return groups


def _group(batch: Batch, sequences: list[int], pairs: list[int], planned: Group, is_all: bool) -> _Group:
    starts = [0]
    for count in batch.num_tokens:
        starts.append(starts[-1] + count)
    is_adjacent = sequences == list(range(sequences[0], sequences[-1] + 1)) if sequences else True
    if is_adjacent:
        begin, end = (starts[sequences[0]], starts[sequences[-1] + 1]) if sequences else (0, 0)
        rows = Rows(batch.index[begin:end], (begin, end) if is_all else None)
    else:
        rows = Rows(torch.cat([batch.index[starts[s] : starts[s + 1]] for s in sequences]), None)
    num_rows = rows.index.numel()
    chunks = [(start, end, rows.part(start, end)) for start, end in tiles(num_rows, planned.chunk_rows)]
    return _Group(sequences=sequences, pairs=pairs, num_rows=num_rows, chunks=chunks)


class _PreferenceLoss(torch.autograd.Function):
    """Computes gradients in the forward pass, where the exponentials are; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None,
        reference: Reference, batch: Batch, head: Head,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        total, (losses, logprobs, ref_logprobs), gradients = run_pass(
            hidden_TD, weight_VD, bias_V, reference, batch, head
        )
        ctx.backend = head.backend
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(losses, logprobs, ref_logprobs)
        return total, losses, logprobs, ref_logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        dloss = grads[0]
        assert dloss is not None
        # The caller may add to the gradients in place, so it gets copies if the graph is kept for another backward
        # pass; otherwise it gets the tensors themselves, since the weight's gradient is large.
        keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()
        scaled = [g if g is None or not keeps_graph else g.clone() for g in ctx.saved_tensors]
        # On a GPU, reading dloss would wait for the device.
        if dloss.device.type != "cpu" or dloss.item() != 1:
            for gradient in scaled:
                if gradient is not None:
                    ctx.backend.scale(gradient, dloss)
        return (*scaled, None, None, None)


def run_pass(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, reference: Reference, batch: Batch,
    head: Head,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor | None, ...]]:  # fmt: skip
    """The loss; float64 losses [N] and log-prob sums [S] of policy and reference; and the gradients of the loss."""
    run = _Pass(hidden_TD, weight_VD, bias_V, reference, batch, head)
    for group in run.groups:
        run.group(group)
    loss = run.loss_N if batch.scale_N is None else run.loss_N * batch.scale_N
    total = (loss.sum() / run.weight_sum).to(acc_dtype(hidden_TD.dtype))
    gradients = (None, None, None) if run.gradients is None else run.gradients.finished()
    return total, (run.loss_N, run.logprob_S, run.ref_logprob_S), gradients


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """The reference: its sums of log-probs, [S], its log-probs of tokens, [T], or the tensors to compute them from."""

    logprob_S: torch.Tensor | None
    logprob_T: torch.Tensor | None = None
    hidden_TD: torch.Tensor | None = None
    weight_VD: torch.Tensor | None = None
    bias_V: torch.Tensor | None = None


class _Pass:
    """One evaluation of a preference loss."""

    def __init__(
        self, hidden_TD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, reference: Reference,
        batch: Batch, head: Head,
    ) -> None:  # fmt: skip
        self.hidden_TD, self.weight_VD, self.bias_V = hidden_TD, weight_VD, bias_V
        self.reference, self.batch, self.head, self.backend = reference, batch, head, head.backend
        self.needs_grad = any(head.needs)
        device = hidden_TD.device
        dtype = torch.float64  # for sums and loss, since a margin is a small difference of large sums
        S, N = len(batch.num_tokens), len(batch.pairs)
        self.logprob_S = torch.zeros(S, dtype=dtype, device=device)
        self.ref_logprob_S = torch.zeros(S, dtype=dtype, device=device)
        self.term_S = None if batch.token_term is None else torch.zeros_like(self.logprob_S)
        if reference.logprob_S is not None:
            self.ref_logprob_S.copy_(reference.logprob_S)
        self.loss_N = torch.zeros(N, dtype=dtype, device=device)
        if batch.scale_N is None:
            self.weight_sum = torch.full((), float(N), dtype=dtype, device=device)
        else:
            self.weight_sum = batch.scale_N.sum(dtype=dtype).clamp(min=torch.finfo(dtype).tiny)
        self.groups = _groups(batch, head, weight_VD, hidden_TD.shape[0])
        self.gradients: Gradients | None = None
        self.room: torch.Tensor | None = None
        if self.needs_grad:
            lengths = [end - start for group in self.groups for start, end, _ in group.chunks]
            self.room = self.backend.make_room(max(lengths, default=0), weight_VD)
            is_all = batch.index.numel() == hidden_TD.shape[0]
            self.gradients = Gradients(hidden_TD, weight_VD, bias_V, head.needs, max(len(lengths), 1), is_all, head)
            if not lengths:
                self.gradients.add(None, self.loss_N, Rows(batch.index, None))

    def _forward(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rows: Rows,
        room: torch.Tensor | None = None,
    ) -> Any:  # fmt: skip
        return self.head.forward(rows.take(hidden), weight, bias, rows.take(self.batch.targets_T), room)

    def group(self, group: _Group) -> None:
        """Computes log-probs, losses and gradients of a group; keeps exponentials only if it is a single chunk."""
        device = self.logprob_S.device
        sequences = _upload(group.sequences, device)
        lengths = _upload([self.batch.num_tokens[s] for s in group.sequences], device)
        logprob_R = torch.empty(group.num_rows, dtype=torch.float64, device=device)
        ref_logprob_R = None if self.reference.hidden_TD is None else torch.empty_like(logprob_R)
        saved = None
        for start, end, rows in group.chunks:
            if ref_logprob_R is not None:
                reference = self.reference.hidden_TD, self.reference.weight_VD, self.reference.bias_V
                ref_logprob_R[start:end], _ = self._forward(*reference, rows)  # type: ignore[arg-type]
            room = self.room if len(group.chunks) == 1 else None
            logprob_R[start:end], saved = self._forward(self.hidden_TD, self.weight_VD, self.bias_V, rows, room)

        weight_R = _of_rows(self.batch.token_weights_T, group)
        if ref_logprob_R is None:
            ref_logprob_R = _of_rows(self.reference.logprob_T, group)
        term_R, dterm_R = self._terms(group, logprob_R, ref_logprob_R)
        self._sum(sequences, lengths, weight_R, logprob_R, ref_logprob_R, term_R)
        dlogprob_S, dterm_S = self._losses(group, sequences)
        dlogprob_R = repeated(dlogprob_S, lengths, group.num_rows)
        if dterm_R is not None and dterm_S is not None:
            dlogprob_R = dlogprob_R + repeated(dterm_S, lengths, group.num_rows) * dterm_R
        if weight_R is not None:
            dlogprob_R = dlogprob_R * weight_R
        if self.gradients is None:
            return
        for start, end, rows in group.chunks:
            upstream = dlogprob_R[start:end]
            # Checked only on a CPU, where it does not wait for the device.
            is_nothing = device.type == "cpu" and not bool(upstream.any())
            if saved is None and not is_nothing:
                saved = self._forward(self.hidden_TD, self.weight_VD, self.bias_V, rows, self.room)[1]
            self.gradients.add(None if is_nothing else saved, upstream, rows)
            saved = None

    def _terms(
        self, group: _Group, logprob_R: torch.Tensor, ref_logprob_R: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The loss's terms of the group's tokens, and their derivatives by the log-probs; None if it has none."""
        if self.batch.token_term is None:
            return None, None
        with torch.enable_grad():
            logprobs = logprob_R.detach().requires_grad_()
            values_R = _of_rows(self.batch.token_values_T, group)
            terms = self.batch.token_term(TokenLogprobs(logprobs=logprobs, ref_logprobs=ref_logprob_R, values=values_R))
            total = terms.sum()
        if terms.shape != logprob_R.shape:
            raise ValueError(f"the loss's token_term must return one value a token, [{logprob_R.numel()}], got "
                             f"{tuple(terms.shape)}")  # fmt: skip
        if not terms.requires_grad:
            return terms, torch.zeros_like(terms)
        (slopes,) = torch.autograd.grad(total, logprobs)
        return terms.detach(), slopes

    def _sum(
        self, sequences: torch.Tensor, lengths: torch.Tensor, weight_R: torch.Tensor | None, logprob_R: torch.Tensor,
        ref_logprob_R: torch.Tensor | None, term_R: torch.Tensor | None,
    ) -> None:  # fmt: skip
        """Fills in the sums of log-probs and terms of some sequences, over all ranks that have their tokens."""
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        values = [x for x in (logprob_R, ref_logprob_R, term_R) if x is not None]
        sums = torch.stack([self.backend.segment_sum(x, weight_R, cu_seqlens) for x in values])
        if self.batch.sequence_shard is not None:
            sums = self.batch.sequence_shard.sum(sums)
        self.logprob_S[sequences] = sums[0]
        if ref_logprob_R is not None:
            self.ref_logprob_S[sequences] = sums[1]
        if self.term_S is not None:
            self.term_S[sequences] = sums[-1]

    def _losses(self, group: _Group, sequences: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Fills in the losses of the group's pairs and returns the derivatives of the total loss by the log-probs and
        the terms of its sequences."""
        batch, device = self.batch, self.logprob_S.device
        if not group.pairs:
            return self.logprob_S.new_zeros(len(group.sequences)), None
        where = {s: i for i, s in enumerate(group.sequences)}
        pairs = zip(*(batch.pairs[n] for n in group.pairs), strict=True)
        columns = [_upload([where[s] for s in column], device) for column in pairs]
        index = _upload(group.pairs, device)

        def of_pairs(values_N: torch.Tensor | None) -> torch.Tensor | None:
            return None if values_N is None else values_N[index].to(self.logprob_S.dtype)

        logprob, ref_logprob, scale = self.logprob_S[sequences], self.ref_logprob_S[sequences], of_pairs(batch.scale_N)
        if batch.dual_clip is not None and self.backend.dual_clip_epilogue is not None:
            soft_label, margin = of_pairs(batch.soft_label_N), of_pairs(batch.margin_N)
            self.loss_N[index], dlogprob = self.backend.dual_clip_epilogue(
                logprob, ref_logprob, torch.stack(columns, 1), scale, soft_label, margin,
                weight_sum=self.weight_sum, **batch.dual_clip,
            )  # fmt: skip
            return dlogprob, None
        term = None if self.term_S is None else self.term_S[sequences]
        leaves = [x.requires_grad_() for x in (logprob, term) if x is not None]
        with torch.enable_grad():
            sums = Sums(
                logprob=logprob,
                ref_logprob=ref_logprob,
                ref2_logprob=None if batch.ref2_logprob_S is None else batch.ref2_logprob_S[sequences].to(logprob),
                term=term,
                num_tokens=_upload([batch.total_tokens[s] for s in group.sequences], device),
            )
            scalars = of_pairs(batch.soft_label_N), of_pairs(batch.margin_N), of_pairs(batch.win_rates_N2)
            losses = checked_losses(batch.loss(sums.of_pairs(columns, *scalars)), len(group.pairs))
            total = (losses if scale is None else losses * scale).sum() / self.weight_sum
        self.loss_N[index] = losses.detach().to(self.loss_N.dtype)
        if not self.needs_grad or not total.requires_grad:
            return torch.zeros_like(logprob), None
        dlogprob, *dterm = torch.autograd.grad(total, leaves, materialize_grads=True)
        return dlogprob, dterm[0] if dterm else None


def _of_rows(values_T: torch.Tensor | None, group: _Group) -> torch.Tensor | None:
    """The values of a group's rows, [R] float64."""
    if values_T is None:
        return None
    parts = [rows.take(values_T) for _, _, rows in group.chunks]
    return torch.cat(parts).to(torch.float64) if parts else values_T.new_zeros(0, dtype=torch.float64)


def _upload(values: list[int], device: torch.device) -> torch.Tensor:
    """The values on the device, without waiting for it as torch.tensor(values, device=device) would."""
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)


def make_reference(
    logprob_S: torch.Tensor | None, logprob_T: torch.Tensor | None, hidden_TD: torch.Tensor | None,
    weight_VD: torch.Tensor | None, bias_V: torch.Tensor | None,
) -> Reference:  # fmt: skip
    """The reference, with all tensors detached."""

    def detached(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.detach().contiguous()

    return Reference(
        logprob_S=logprob_S,
        logprob_T=None if logprob_T is None else logprob_T.detach(),
        hidden_TD=None if hidden_TD is None else hidden_TD.detach(),
        weight_VD=detached(weight_VD),
        bias_V=detached(bias_V),
    )


def preference_loss(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, *, reference: Reference,
    batch: Batch, head: Head,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Loss; float64 losses [N] and log-prob sums [S] of policy and reference. See ``tso_fast.preference_loss``."""
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] = _PreferenceLoss.apply(
        hidden_TD, weight_VD.contiguous(), None if bias_V is None else bias_V.contiguous(), reference, batch, head
    )
    return out
