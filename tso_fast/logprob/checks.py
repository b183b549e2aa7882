"""Checks of the ops' arguments and the layout of their batch, on the host and before any work.

GPU values that are checked or decide what is computed are fetched in one transfer.
"""

from __future__ import annotations

import dataclasses

import torch

from tso_fast.logprob.rows import repeated


def check_plain(name: str, tensor: torch.Tensor) -> None:
    """Raises ValueError for a tensor whose memory is not a plain matrix, as the op needs.

    Examples are sharded parameters, and heads quantised by torchao or bitsandbytes. Silently making a float32 copy
    would take the memory that they save.
    """
    is_packed = hasattr(tensor, "quant_state") or hasattr(tensor, "SCB") or tensor.dtype.itemsize == 1
    if any(kind.__name__ == "DTensor" for kind in type(tensor).__mro__):
        raise ValueError(
            f"{name} is a DTensor, of which this rank holds a part; gather it once a step with "
            f"{name}.full_tensor(), or, where its rows are sharded, give {name}.to_local() and "
            "vocab_group=the group of that mesh dimension"
        )
    if is_packed or type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        kind = type(tensor).__name__ if type(tensor) not in (torch.Tensor, torch.nn.Parameter) else str(tensor.dtype)
        if name.endswith("hidden"):
            raise ValueError(f"{name} must be a plain floating-point tensor, got {kind}")
        raise ValueError(
            f"{name} is quantised ({kind}), and the op reads float16, bfloat16, float32 or float64; leave "
            "the output head out of the quantisation (llm_int8_skip_modules=['lm_head'] of bitsandbytes, "
            "filter_fn of torchao), or give its dequantised weight"
        )
    if tensor.is_meta and name.endswith("weight"):
        raise ValueError(f"{name} is on the meta device and holds no numbers; load the weights before the step")


def check_head(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, prefix: str = "") -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_plain(prefix + name, tensor)
    if not hidden.is_floating_point():
        raise ValueError(f"{prefix}hidden must be a floating-point tensor, got {hidden.dtype}")
    if weight.dim() != 2 or hidden.dim() < 1 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{prefix}weight must be [V, D] with D = {hidden.shape[-1] if hidden.dim() else '?'} "
            f"as in {prefix}hidden {tuple(hidden.shape)}, got {tuple(weight.shape)}"
        )
    if not weight.shape[0]:
        raise ValueError(
            f"{prefix}weight has no rows; is it a parameter that is sharded or offloaded at this moment? "
            "Gather it, or call the op where its module's forward runs"
        )
    if weight.dtype != hidden.dtype:
        raise ValueError(f"{prefix}weight is {weight.dtype} but {prefix}hidden is {hidden.dtype}; cast one of them")
    if weight.device != hidden.device:
        raise ValueError(f"{prefix}weight is on {weight.device} but {prefix}hidden is on {hidden.device}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.device != hidden.device):
        raise ValueError(
            f"{prefix}bias must be [{weight.shape[0]}] on {hidden.device}, got {tuple(bias.shape)} on {bias.device}"
        )


def to_host(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Detached copies on the CPU, with a single wait for all; tensors already on the CPU are not copied."""
    out = [None if t is None else t.detach().to("cpu", non_blocking=True) for t in tensors]
    for device in {t.device for t in tensors if t is not None and t.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return out


def check_targets(targets: torch.Tensor, hidden: torch.Tensor) -> None:
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, got {targets.dtype}")
    if targets.device != hidden.device:
        raise ValueError(f"targets are on {targets.device} but hidden is on {hidden.device}")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets must be {tuple(hidden.shape[:-1])} as hidden without its last dimension, "
            f"got {tuple(targets.shape)}"
        )


def valid_targets(targets: torch.Tensor, vocab: int, ignore_index: int) -> torch.Tensor:
    """Mask of the targets (on the host) that are not ignored. Raises ValueError if one is outside [0, V)."""
    is_valid = targets != ignore_index
    is_bad = is_valid & ((targets < 0) | (targets >= vocab))
    if is_bad.any():
        where = is_bad.nonzero()[0].tolist()
        raise ValueError(
            f"targets{where} is {targets[tuple(where)].item()}; expected 0 <= target < {vocab} "
            f"or ignore_index {ignore_index}"
        )
    return is_valid


def valid_rows(targets: torch.Tensor, vocab: int, ignore_index: int) -> torch.Tensor:
    """Indices of the flattened targets that are not ignored, on their device; on a GPU this waits once for the device.

    Raises:
        ValueError: a target is outside [0, V).
    """
    (host,) = to_host(targets)
    assert host is not None
    is_valid = valid_targets(host, vocab, ignore_index)
    return is_valid.reshape(-1).nonzero()[:, 0].to(targets.device, non_blocking=True)


def check_scalars(softcap: float | None, temperature: float) -> None:
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be > 0 or None, got {softcap!r}")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Assignment of rows to sequences, and of sequences to pairs; on the host."""

    index: torch.Tensor
    """[R] int64: rows of the flattened input that are not ignored."""
    num_tokens: list[int]
    pairs: torch.Tensor
    """[N, 2 + E] int64"""


def layout(
    targets: torch.Tensor, vocab: int, ignore_index: int, cu_seqlens: torch.Tensor | None, pairs: torch.Tensor | None
) -> Layout:
    """The layout of a batch; all arguments are on the host.

    Raises:
        ValueError: shapes do not fit, or targets or pairs are outside their range.
    """
    is_valid = valid_targets(targets, vocab, ignore_index)
    lengths = _lengths(targets, cu_seqlens)
    num_sequences = lengths.numel()
    pairs = _pairs(pairs, num_sequences)
    index = is_valid.reshape(-1).nonzero()[:, 0]
    sequence = repeated(torch.arange(num_sequences), lengths, targets.numel())[index]
    num_tokens = torch.bincount(sequence, minlength=num_sequences)
    return Layout(index=index, num_tokens=num_tokens.tolist(), pairs=pairs)


def check_no_empty_sequence(num_tokens_S: torch.Tensor, pairs_N2: torch.Tensor, ignore_index: int) -> None:
    """Raises ValueError if a sequence of a pair has no completion token."""
    if (is_empty := num_tokens_S[pairs_N2.reshape(-1)] == 0).any():
        empty = pairs_N2.reshape(-1)[is_empty][0].item()
        raise ValueError(
            f"sequence {empty} belongs to a pair but has no completion token: "
            f"every target is ignore_index ({ignore_index})"
        )


def _lengths(targets: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """Number of positions of every sequence, [S] int64."""
    if cu_seqlens is None:
        if targets.dim() != 2:
            raise ValueError(
                f"padded input needs hidden [S, L, D] and targets [S, L], got targets "
                f"{tuple(targets.shape)}; packed input needs cu_seqlens"
            )
        return torch.full((targets.shape[0],), targets.shape[1])
    if targets.dim() != 1:
        raise ValueError(f"cu_seqlens goes with packed targets [T], got {tuple(targets.shape)}")
    is_list = cu_seqlens.dim() == 1 and cu_seqlens.numel() >= 2 and not cu_seqlens.is_floating_point()
    lengths = cu_seqlens.diff() if is_list else None
    if lengths is None or (lengths < 0).any() or cu_seqlens[0] != 0 or cu_seqlens[-1] != targets.shape[0]:
        raise ValueError(
            f"cu_seqlens must be [S+1] integers that rise from 0 to T = {targets.shape[0]}, got {cu_seqlens.tolist()}"
        )
    return lengths.to(torch.int64)


def _pairs(pairs: torch.Tensor | None, num_sequences: int) -> torch.Tensor:
    if pairs is None:
        if num_sequences % 2 or not num_sequences:
            raise ValueError(
                f"without pairs the sequences are halved into chosen and rejected; {num_sequences} are "
                "no even, positive number"
            )
        return torch.arange(num_sequences).view(2, -1).T
    if pairs.dim() != 2 or pairs.shape[1] < 2 or pairs.shape[0] == 0 or pairs.dtype != torch.int64:
        raise ValueError(f"pairs must be [N, 2] int64 with N > 0, got {tuple(pairs.shape)} {pairs.dtype}")
    if (is_bad := (pairs < 0) | (pairs >= num_sequences)).any():
        row = int(is_bad.any(dim=1).nonzero()[0])
        raise ValueError(f"pairs[{row}] is {pairs[row].tolist()}; expected sequences in [0, {num_sequences})")
    return pairs


def check_tokens(name: str, values: torch.Tensor | None, targets: torch.Tensor) -> None:
    """Raises ValueError unless there is one value a target, on its device."""
    if values is None:
        return
    if values.shape != targets.shape:
        raise ValueError(f"{name} must be {tuple(targets.shape)}, got {tuple(values.shape)}")
    if values.device != targets.device:
        raise ValueError(f"{name} are on {values.device} but hidden is on {targets.device}")


def check_pair_scalars(
    name: str, values: torch.Tensor | None, shape: tuple[int, ...], low: float, high: float | None
) -> None:
    """Raises ValueError unless the scalars (on the host) are finite numbers in [low, high], of the given shape."""
    if values is None:
        return
    if values.shape != shape:
        what = (
            "one value a pair" if len(shape) == 1 else "a value for the chosen and for the rejected side of each pair"
        )
        raise ValueError(f"{name} must be {list(shape)}, {what}, got {tuple(values.shape)}")
    is_good = (values >= low) & (values <= (torch.inf if high is None else high)) & values.isfinite()
    if not is_good.all():
        row = int((~is_good).nonzero()[0, 0])
        expected = f"finite and >= {low:g}" if high is None else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name}[{row}] is {values[row].tolist()}; expected {expected}")
