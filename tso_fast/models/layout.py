"""How sequences lie in the rows that a model computes: padded, or with a prompt once for all of its responses.

A shared row is prompt + response + response + ..., or several of those one after the other. Positions of each response
go on after its prompt's, and a mask lets it see its prompt and itself, not the other responses. Rows are about as long
as the longest prompt with its responses, so that little is padding and attention, quadratic in a row, stays cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tso_fast.models.tokens import IGNORE, pad_sequences

Sequences = Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
"""(prompt, response) token ids."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sequences in rows. Of S sequences in B rows of L tokens, C is the longest response's length."""

    input_ids: torch.Tensor
    """[B, L] int64."""
    attention_mask: torch.Tensor
    """[B, L] int64, 1 for tokens."""
    targets: torch.Tensor
    """[S, L] padded, or [S, C] shared, int64: what is predicted; -100 elsewhere."""
    position_ids: torch.Tensor | None = None
    """[B, L] int64; None: padded."""
    groups: torch.Tensor | None = None
    """[B, L] int64: the prompt that a token belongs to, -1 for padding."""
    branches: torch.Tensor | None = None
    """[B, L] int64: 0 in prompts, the number of the response in responses."""
    rows: torch.Tensor | None = None
    """[S, C] int64: where in the flattened [B * L] hidden states the targets are predicted from."""

    def to(self, device: torch.device | str) -> Layout:
        tensors = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return Layout(**tensors)


def padded(sequences: Sequences, pad_token_id: int) -> Layout:
    """Each sequence in a row of its own."""
    ids, mask, targets = pad_sequences(sequences, pad_token_id)
    return Layout(input_ids=ids, attention_mask=mask, targets=targets)


def shared(sequences: Sequences, pad_token_id: int) -> Layout:
    """Each prompt once, before all of its responses. The last token of a response is only a target."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, (prompt, _) in enumerate(sequences):
        groups.setdefault(prompt, []).append(i)
    lengths = [len(p) + sum(len(sequences[i][1]) - 1 for i in members) for p, members in groups.items()]
    places, num_rows = _places(lengths)
    width, longest = max(lengths), max(len(response) for _, response in sequences)
    shape = num_rows, width
    ids, mask = torch.full(shape, pad_token_id), torch.zeros(shape, dtype=torch.int64)
    position, group, branch = torch.zeros_like(mask), torch.full_like(mask, -1), torch.zeros_like(mask)
    rows = torch.zeros(len(sequences), longest, dtype=torch.int64)
    targets = torch.full_like(rows, IGNORE)
    for g, ((prompt, members), (row, start), length) in enumerate(zip(groups.items(), places, lengths, strict=True)):
        place, end = row * width + start, start + length
        mask[row, start:end], group[row, start:end] = 1, g
        ids[row, start : start + len(prompt)] = torch.tensor(prompt)
        position[row, start : start + len(prompt)] = torch.arange(len(prompt))
        at = len(prompt)
        for b, i in enumerate(members, start=1):
            response = sequences[i][1]
            inner, n = slice(start + at, start + at + len(response) - 1), len(response)
            ids[row, inner] = torch.tensor(response[:-1], dtype=torch.int64)
            position[row, inner] = torch.arange(len(prompt), len(prompt) + n - 1)
            branch[row, inner] = b
            rows[i, :n] = torch.arange(place + at - 1, place + at + n - 1)
            rows[i, 0] = place + len(prompt) - 1
            targets[i, :n] = torch.tensor(response)
            at += n - 1
    return Layout(
        input_ids=ids,
        attention_mask=mask,
        targets=targets,
        position_ids=position,
        groups=group,
        branches=branch,
        rows=rows,
    )


def _places(lengths: Sequence[int]) -> tuple[list[tuple[int, int]], int]:
    """Row and start of each group, the longest first into the first row with room, and the number of rows."""
    width, filled = max(lengths), [0]
    places = [(0, 0)] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, used in enumerate(filled) if used + lengths[i] <= width), len(filled))
        if row == len(filled):
            filled.append(0)
        places[i] = row, filled[row]
        filled[row] += lengths[i]
    return places, len(filled)


def attention_mask(layout: Layout, config: Any, dtype: torch.dtype) -> Any:
    """What a model of transformers takes as ``attention_mask``: as it is for padded rows, else [B, 1, L, L].

    A model with layers of several kinds takes one for each kind.

    Args:
        config: the text configuration of the model.
        dtype: of the model's activations; eager attention adds the mask, others take it as it is.
    """
    if layout.groups is None or layout.branches is None or layout.position_ids is None:
        return layout.attention_mask
    group, branch, position = layout.groups, layout.branches, layout.position_ids
    order = torch.arange(group.shape[1], device=group.device)
    sees = (group[:, :, None] == group[:, None, :]) & (order[:, None] >= order)
    sees &= (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    window = getattr(config, "sliding_window", None)
    near = sees if window is None else sees & (position[:, :, None] - position[:, None, :] < window)
    kinds = set(getattr(config, "layer_types", None) or ())
    if "sliding_attention" in kinds:
        return {
            "full_attention": _as_taken(sees, config, dtype),
            "sliding_attention": _as_taken(near, config, dtype),
        }
    return _as_taken(sees if kinds else near, config, dtype)


def _as_taken(sees: torch.Tensor, config: Any, dtype: torch.dtype) -> torch.Tensor:
    mask = sees[:, None]
    if config._attn_implementation != "eager":
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
