"""One preference step at the output head: problems, float64 truth, the matmul floor, ours, the peers, the device.

A step goes from hidden states to the loss and, through ``loss.backward()``, to the gradients of hidden states and head.
Sequences are stacked [chosen; rejected]. S sequences, L positions, D hidden, V vocabulary, T completion tokens.
"""

from __future__ import annotations

import contextlib
import gc
import math
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from tso_fast import LOSSES, preference_loss
from tso_fast.types import PairLogprobs

BETA = 0.1
CLIP = 3.0  # beyond every reward that a case does not mean to clip: those are 0.8 +- 0.4
LOGIT_STD = 2.5
# The reference: hidden states and head perturbed by so much that a completion's log-ratio is 8 +- 4 nats.
REF_HIDDEN_STD, REF_WEIGHT_STD, REF_LENGTH = 0.1, 0.02, 256

GOALS = {"margin_nat": 1e-3, "dhidden": 3e-3, "dweight": 3e-3}
"""Largest allowed errors, see ``errors``."""
GPU_GOALS = GOALS | {"dweight": 3.5e-3}
"""Goals on a GPU, where dweight is a product of two rounded factors, rounded again: 2.9e-3 in emulation."""


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    what: str
    pairs: int
    length: int
    """Positions per sequence, prompt included."""
    dim: int
    vocab: int
    dtype: str = "bfloat16"
    prompt_share: float = 0.0
    """Share of every sequence that is prompt, where targets are ignored."""
    is_head_trained: bool = True
    is_head_shared: bool = False
    """Whether the reference has the policy's head."""
    is_ref_cached: bool = False
    """Whether reference log-probs are given; otherwise the step computes them from the reference's hidden states."""
    loss: str = "dpo"
    is_half_clipped: bool = False
    """Whether one side of every pair is at its bound, so that half of the sequences have zero gradient."""
    softcap: float | None = None

    @property
    def completion(self) -> int:
        return self.length - int(self.length * self.prompt_share)

    @property
    def loss_options(self) -> dict[str, float]:
        return {"beta": BETA} | ({"clip_chosen": CLIP, "clip_rejected": CLIP} if self.loss == "dual_clip" else {})

    @property
    def products(self) -> float:
        """Number of [T, D] x [D, V] products that a step needs: policy, reference, dhidden, dweight."""
        backward = (1 + self.is_head_trained) * (0.5 if self.is_half_clipped else 1)
        return 1 + (not self.is_ref_cached) + backward


@dataclass(frozen=True, kw_only=True)
class Problem:
    case: Case
    hidden: torch.Tensor
    """[S, L, D]"""
    weight: torch.Tensor
    """[V, D]"""
    ref_hidden: torch.Tensor
    ref_weight: torch.Tensor
    targets: torch.Tensor
    """[S, L] int64, -100 in the prompt."""
    ref_logprobs: torch.Tensor | None = None
    """[S] float32; None: not cached."""


@dataclass(frozen=True, kw_only=True)
class Result:
    loss: torch.Tensor
    logprobs: torch.Tensor
    """[S]"""
    ref_logprobs: torch.Tensor
    dhidden: torch.Tensor
    """[S, L, D]"""
    dweight: torch.Tensor | None
    """[V, D]; None: frozen head."""

    @property
    def grad_bytes(self) -> int:
        return sum(g.numel() * g.element_size() for g in (self.dhidden, self.dweight) if g is not None)


def make(case: Case, device: str = "cpu", seed: int = 0) -> Problem:
    """A random problem: logits of standard deviation 2.5, targets drawn from the policy's softmax, so that -log p is
    realistic."""
    g = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=g, device=device).mul_(std)

    shape = (2 * case.pairs, case.length, case.dim)
    weight_std = LOGIT_STD / math.sqrt(case.dim)
    nearness = math.sqrt(REF_LENGTH / case.completion)
    hidden, weight = normal(*shape), normal(case.vocab, case.dim, std=weight_std)
    ref_hidden = hidden + normal(*shape, std=REF_HIDDEN_STD * nearness)
    weight_VD = weight.to(dtype)
    if case.is_head_shared:
        ref_weight_VD = weight_VD
    else:
        ref_weight_VD = weight.add_(normal(*weight.shape, std=REF_WEIGHT_STD * weight_std * nearness)).to(dtype)
    del weight
    hidden_SLD = hidden.to(dtype)
    targets_SL = _sample(hidden_SLD, weight_VD, case.softcap, g)
    if case.is_half_clipped:
        ref_hidden += _away_from_targets(targets_SL, weight_VD)
    targets_SL[:, : case.length - case.completion] = -100
    return Problem(
        case=case,
        hidden=hidden_SLD,
        weight=weight_VD,
        ref_hidden=ref_hidden.to(dtype),
        ref_weight=ref_weight_VD,
        targets=targets_SL,
    )


def _sample(hidden: torch.Tensor, weight: torch.Tensor, softcap: float | None, g: torch.Generator) -> torch.Tensor:
    """Targets sampled by Gumbel-max, some rows at a time."""
    targets = []
    for rows in hidden.flatten(0, 1).split(256):
        logits = _cap((rows @ weight.T).float(), softcap)
        noise = torch.rand(logits.shape, generator=g, device=logits.device).clamp_(1e-12, 1 - 1e-7)
        targets.append(logits.sub_(noise.log_().neg_().log_()).argmax(-1))
    return torch.cat(targets).view(hidden.shape[:-1])


def _away_from_targets(targets_SL: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
    """Shift of the reference's hidden states that clips one side of every pair: in even pairs the chosen side (less
    likely under the reference), in odd pairs the rejected side (more likely under the reference)."""
    weight_SLD = weight_VD[targets_SL].float()
    chosen, rejected = torch.arange(targets_SL.shape[0], device=targets_SL.device).chunk(2)
    sign_S = targets_SL.new_zeros(targets_SL.shape[0], dtype=torch.float32)
    sign_S[chosen[::2]], sign_S[rejected[1::2]] = -1, 1
    nats = 200 / targets_SL.shape[1]
    return nats * sign_S[:, None, None] * weight_SLD / weight_SLD.square().sum(-1, keepdim=True)


def _cap(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


# ------------------------------------------------------------------------------------------------------------- truth


@dataclass(frozen=True, kw_only=True)
class Truth:
    """The exact results, float64."""

    loss: torch.Tensor
    logprobs: torch.Tensor
    """[S]"""
    ref_logprobs: torch.Tensor
    dlogprobs: torch.Tensor
    """[S] gradient of the loss by each sequence's log-prob."""
    dhidden: torch.Tensor
    """[S, L, D]"""
    dweight: torch.Tensor | None


def solve(problem: Problem, block: int = 512) -> tuple[Problem, Truth]:
    """The problem, with cached log-probs if its case has them, and its analytic float64 result for rounded inputs."""
    case = problem.case
    is_valid = problem.targets != -100
    sequence_T = is_valid.nonzero()[:, 0]
    targets_T = problem.targets[is_valid]
    num_sequences = is_valid.shape[0]

    def logprobs(hidden_T: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sums, lse = torch.zeros(num_sequences, dtype=torch.float64, device=weight.device), []
        for rows, targets, owner in _blocks(block, hidden_T, targets_T, sequence_T):
            logits = _cap(rows.double() @ weight.T, case.softcap)
            lse.append(logits.logsumexp(-1))
            sums.index_add_(0, owner, logits.gather(1, targets[:, None])[:, 0] - lse[-1])
        return sums, torch.cat(lse)

    ref_S, _ = logprobs(problem.ref_hidden[is_valid], problem.ref_weight.double())
    if case.is_ref_cached:
        problem = replace(problem, ref_logprobs=ref_S.float())
        ref_S = ref_S.float().double()
    hidden_TD, weight = problem.hidden[is_valid], problem.weight.double()
    logprobs_S, lse_T = logprobs(hidden_TD, weight)
    logprobs_S.requires_grad_()
    loss = _mean_loss(case, logprobs_S, ref_S)
    (dlogprobs_S,) = torch.autograd.grad(loss, logprobs_S)
    assert (dlogprobs_S == 0).sum() == (case.pairs if case.is_half_clipped else 0), "other sides are clipped than meant"

    dhidden_TD, dweight_VD = [], torch.zeros_like(weight) if case.is_head_trained else None
    for rows, targets, scale, lse in _blocks(block, hidden_TD, targets_T, dlogprobs_S[sequence_T], lse_T):
        logits = _cap(rows.double() @ weight.T, case.softcap)
        dlogits = logits.sub(lse[:, None]).exp_().mul_(-scale[:, None])
        dlogits.scatter_add_(1, targets[:, None], scale[:, None])
        if case.softcap is not None:
            dlogits *= 1 - (logits / case.softcap) ** 2
        dhidden_TD.append(dlogits @ weight)
        if dweight_VD is not None:
            dweight_VD.addmm_(dlogits.T, rows.double())
    dhidden_SLD = torch.zeros(problem.hidden.shape, dtype=torch.float64, device=weight.device)
    dhidden_SLD[is_valid] = torch.cat(dhidden_TD)
    return problem, Truth(
        loss=loss.detach(),
        logprobs=logprobs_S.detach(),
        ref_logprobs=ref_S,
        dlogprobs=dlogprobs_S,
        dhidden=dhidden_SLD,
        dweight=dweight_VD,
    )


def _blocks(size: int, *tensors: torch.Tensor) -> Any:
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def _mean_loss(case: Case, logprobs_S: torch.Tensor, ref_logprobs_S: torch.Tensor) -> torch.Tensor:
    (chosen, rejected), (ref_chosen, ref_rejected) = logprobs_S.chunk(2), ref_logprobs_S.chunk(2)
    num_tokens = torch.full((case.pairs,), case.completion, device=chosen.device)
    pairs = PairLogprobs(
        chosen=chosen,
        rejected=rejected,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
        num_chosen_tokens=num_tokens,
        num_rejected_tokens=num_tokens,
    )
    return LOSSES[case.loss](pairs, **case.loss_options).mean()


def errors(result: Result, truth: Truth) -> dict[str, float]:
    """Errors by name. ``loss``: relative. ``dhidden``, ``dweight``: relative, Frobenius. ``margin_nat``: largest error
    over pairs of the chosen minus the rejected log-ratio to the reference. ``logprob_nat``: largest over sequences.
    """

    def relative(got: torch.Tensor, exact: torch.Tensor) -> float:
        difference = got.double().sub_(exact) if got.dtype != torch.float64 else got - exact
        return float(difference.norm() / exact.norm())

    def margins(x: Result | Truth) -> torch.Tensor:
        chosen, rejected = (x.logprobs.double() - x.ref_logprobs.double()).chunk(2)
        return chosen - rejected

    found = {
        "loss": relative(result.loss, truth.loss),
        "margin_nat": float((margins(result) - margins(truth)).abs().max()),
        "logprob_nat": float((result.logprobs.double() - truth.logprobs).abs().max()),
        "dhidden": relative(result.dhidden, truth.dhidden),
    }
    if truth.dweight is not None and result.dweight is not None:
        found["dweight"] = relative(result.dweight, truth.dweight)
    return found


def misses(found: dict[str, float], goals: dict[str, float] = GOALS) -> list[str]:
    """Errors beyond their goal, including NaN."""
    return [f"{name} {found[name]:.1e} > {goal:g}" for name, goal in goals.items() if not found.get(name, 0) <= goal]


def error_cells(entry: dict[str, Any]) -> list[str]:
    """Table cells with the margin error and the larger gradient error of a provider; ours are marked beyond a goal."""
    found = entry["errors"]
    gradient = max((found[name] for name in ("dhidden", "dweight") if name in found), key=lambda x: (x != x, x))
    is_missed = [any(miss.startswith(start) for miss in entry.get("misses", [])) for start in ("margin_nat", "d")]
    return [
        f"{value:.1e}" + (" **wrong**" if is_wrong else "")
        for value, is_wrong in zip((found["margin_nat"], gradient), is_missed, strict=True)
    ]


# ------------------------------------------------------------------------------------------------------------- floor


class Floor:
    """Only the products: ``torch.mm`` into preallocated outputs, completion rows only, ``rows`` at a time.

    dhidden and dweight skip sequences with zero gradient, as a perfect op would.
    """

    def __init__(self, problem: Problem, truth: Truth, rows: int) -> None:
        is_valid = problem.targets != -100
        is_active = is_valid & (truth.dlogprobs != 0)[:, None]
        self.case, self.rows = problem.case, rows
        self.weight, self.ref_weight = problem.weight, problem.ref_weight
        self.hidden, self.ref_hidden = problem.hidden[is_valid], problem.ref_hidden[is_valid]
        self.active = problem.hidden[is_active] if problem.case.is_half_clipped else self.hidden
        self.logits = self.hidden.new_empty(rows, self.case.vocab)
        self.dlogits = torch.empty_like(self.logits).normal_(std=1e-4)
        self.dhidden = torch.empty_like(self.active)
        self.dweight = torch.empty_like(self.weight) if self.case.is_head_trained else None

    def __call__(self) -> None:
        if not self.case.is_ref_cached:
            for rows in self.ref_hidden.split(self.rows):
                torch.mm(rows, self.ref_weight.T, out=self.logits[: rows.shape[0]])
        for rows in self.hidden.split(self.rows):
            torch.mm(rows, self.weight.T, out=self.logits[: rows.shape[0]])
        is_first = True
        for rows, dhidden in _blocks(self.rows, self.active, self.dhidden):
            dlogits = self.dlogits[: rows.shape[0]]
            torch.mm(dlogits, self.weight, out=dhidden)
            if self.dweight is None:
                continue
            if is_first:
                torch.mm(dlogits.T, rows, out=self.dweight)
            else:
                self.dweight.addmm_(dlogits.T, rows)
            is_first = False


def floors(problem: Problem, truth: Truth) -> dict[str, Floor]:
    """Floors with all rows at once, and with a pair at a time; the faster one counts."""
    case = problem.case
    return {
        "floor": Floor(problem, truth, 2 * case.pairs * case.completion),
        "floor by pair": Floor(problem, truth, 2 * case.completion),
    }


# --------------------------------------------------------------------------------------------------- ours, the peers


@dataclass(frozen=True, kw_only=True)
class Provider:
    label: str
    run: Callable[[Problem], Result]
    package: str | None = None
    """Module that must be installed; None: torch is enough."""
    unsupported: Callable[[Case], str | None] = lambda case: None
    is_compiled: bool = False
    is_ours: bool = False


def ours(impl: str) -> Provider:
    def run(problem: Problem) -> Result:
        case = problem.case
        hidden, weight = _leaves(problem)
        if problem.ref_logprobs is not None:
            reference = {"ref_logprobs": problem.ref_logprobs}
        else:
            reference = {"ref_hidden": problem.ref_hidden}
            if not case.is_head_shared:
                reference["ref_weight"] = problem.ref_weight
        out = preference_loss(
            hidden,
            weight,
            problem.targets,
            **reference,
            loss=case.loss,
            softcap=case.softcap,
            impl=impl,
            **case.loss_options,
        )
        out.loss.backward()
        return _result(out.loss, out.logprobs, out.ref_logprobs, hidden, weight)

    return Provider(label=f"tso-fast, impl={impl}", run=run, is_ours=True)


def per_token(
    label: str, logprobs: Callable[[Problem, torch.Tensor, torch.Tensor], torch.Tensor], **options: Any
) -> Provider:
    """A peer that computes log-probs of tokens, [S, L] and 0 where ignored; a few torch calls add the loss."""

    def run(problem: Problem) -> Result:
        hidden, weight = _leaves(problem)
        ref_S = problem.ref_logprobs
        if ref_S is None:
            with torch.no_grad():
                ref_S = logprobs(problem, problem.ref_hidden, problem.ref_weight).float().sum(-1)
        policy_S = logprobs(problem, hidden, weight).float().sum(-1)
        loss = _mean_loss(problem.case, policy_S, ref_S)
        loss.backward()
        return _result(loss, policy_S, ref_S, hidden, weight)

    return Provider(label=label, run=run, **options)


def _leaves(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Fresh leaf tensors for hidden states and head, without gradients."""
    weight = problem.weight.detach().requires_grad_(problem.case.is_head_trained)
    return problem.hidden.detach().requires_grad_(), weight


def _result(loss: Any, logprobs: Any, ref_logprobs: Any, hidden: torch.Tensor, weight: torch.Tensor) -> Result:
    assert hidden.grad is not None
    return Result(
        loss=loss.detach(),
        logprobs=logprobs.detach(),
        ref_logprobs=ref_logprobs.detach(),
        dhidden=hidden.grad,
        dweight=weight.grad,
    )


def _no_softcap(case: Case) -> str | None:
    return "no softcap" if case.softcap is not None else None


def _naive(problem: Problem, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    targets = problem.targets
    logits = _cap(hidden @ weight.T, problem.case.softcap)
    picked = F.log_softmax(logits.float(), -1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return picked * (targets != -100)


def _liger_dpo(compiled: bool) -> Provider:
    def run(problem: Problem) -> Result:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        hidden, weight = _leaves(problem)
        fused = LigerFusedLinearDPOLoss(beta=BETA, compiled=compiled)
        loss, aux = fused(weight, hidden, problem.targets, None, problem.ref_hidden, problem.ref_weight)
        loss.backward()
        logprobs, rewards = torch.cat(aux[:2]), torch.cat(aux[5:7])
        return _result(loss, logprobs, logprobs - rewards / BETA, hidden, weight)

    def unsupported(case: Case) -> str | None:
        if case.is_ref_cached:
            return "no cached reference"
        return "no dual clip" if case.loss != "dpo" else _no_softcap(case)

    mode = "compiled" if compiled else "eager"
    return Provider(
        label=f"Liger DPO, {mode}", run=run, package="liger_kernel", unsupported=unsupported, is_compiled=compiled
    )


def _liger_scaled(problem: Problem, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    targets = problem.targets
    nll = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden.flatten(0, 1), weight, targets.flatten())
    return -nll.view(targets.shape)


def _cce(impl: str) -> Callable[[Problem, torch.Tensor, torch.Tensor], torch.Tensor]:
    def logprobs(problem: Problem, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        from cut_cross_entropy import linear_cross_entropy

        softcap = problem.case.softcap
        return -linear_cross_entropy(hidden, weight, problem.targets, softcap=softcap, reduction="none", impl=impl)

    return logprobs


def _trl(problem: Problem, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Log-probs as TRL's fused head computes them, without the entropy and other metrics of its trainer."""
    from trl.kernels import ChunkedLogProbFunction

    targets = problem.targets
    if hidden.is_cuda:
        rows = (targets.flatten() != -100).nonzero()[:, 0]
    else:
        rows = torch.arange(targets.numel())  # TRL gathers the completion rows on accelerators only
    labels = targets.flatten()[rows].clamp(min=0)
    picked = ChunkedLogProbFunction.apply(
        hidden.flatten(0, 1)[rows], weight, None, labels, 1.0, 32768, problem.case.softcap, 1.0, ("log_probs",)
    )[0]
    all_rows = picked.new_zeros(targets.numel()).index_copy(0, rows, picked).view(targets.shape)
    return all_rows.masked_fill(targets == -100, 0)


def _torch_lce(problem: Problem, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Log-probs by torch's linear cross-entropy, with the fastest of the options tried; automatic chunks are several
    times slower."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise ImportError(f"torch {torch.__version__} has no fused linear_cross_entropy")
    targets = problem.targets
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512, acc_policy="compact")
    nll = F.linear_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten(), reduction="none", options=options)
    return -nll.view(targets.shape)


def _quack(problem: Problem, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Log-probs by quack's head that keeps the logits, since its chunked head returns only means and sums."""
    from quack.linear_cross_entropy import linear_cross_entropy_func

    targets = problem.targets
    nll = linear_cross_entropy_func(
        hidden.flatten(0, 1), weight, None, targets.flatten(), reduction="none", inplace_backward=hidden.requires_grad
    )
    return -nll.view(targets.shape)


def _cce_provider(label: str, impl: str) -> Provider:
    return per_token(label, _cce(impl), package="cut_cross_entropy", is_compiled=True)


PEERS: dict[str, Provider] = {
    "naive": per_token("plain torch", _naive),
    "liger": _liger_dpo(compiled=False),
    "liger_compiled": _liger_dpo(compiled=True),
    "liger_scaled": per_token("Liger scaled CE", _liger_scaled, package="liger_kernel", unsupported=_no_softcap),
    "cce": _cce_provider("CCE", "cce"),
    "cce_kahan": _cce_provider("CCE, Kahan full C", "cce_kahan_full_c"),
    "cce_compile": _cce_provider("CCE, torch_compile", "torch_compile"),
    "trl": per_token("TRL fused head", _trl, package="trl"),
    "torch_lce": per_token("torch linear_cross_entropy", _torch_lce, unsupported=_no_softcap),
    "quack": per_token("quack, logits held", _quack, package="quack", unsupported=_no_softcap),
}


def attempt(provider: Provider, problem: Problem, device: Device | None = None) -> Result | str:
    """The result, or a short reason why there is none; waits for the device, so that GPU errors count too."""
    if reason := provider.unsupported(problem.case):
        return reason
    device = device or device_of(problem.hidden)
    try:
        result = provider.run(problem)
        device.synchronize()
        return result
    except ImportError as error:
        reason = f"not installed: {error}"
    except torch.OutOfMemoryError:
        reason = "out of memory"
    except Exception as error:  # a peer's failure must not cost the other rows
        if provider.is_ours and "is not available" in str(error):
            reason = f"not available: {error}"
        else:
            reason = f"failed: {type(error).__name__}: {error}"
    # Outside the handlers: the exception's frames hold tensors.
    with contextlib.suppress(RuntimeError):  # of a device that is lost
        device.empty_cache()
    return " ".join(reason.split())[:300]


# ------------------------------------------------------------------------------------------------------------ device


class Device:
    """The operations that measuring needs from a device; this class is the CPU."""

    name = "cpu"

    def synchronize(self) -> None:
        """Waits until all work is done; raises errors that occurred meanwhile."""

    def empty_cache(self) -> None:
        gc.collect()

    def seconds(self, call: Callable[[], Any]) -> float:
        """Seconds of one call, host time included; its result is freed after the clock stops."""
        before = time.perf_counter()
        result = call()
        after = time.perf_counter()
        del result
        return after - before

    def ms(self, call: Callable[[], Any], repeat: int = 1) -> float:
        """Median milliseconds of a kernel's call, after warm-up."""
        return 1e3 * self.seconds(call)

    def peak_bytes(self, call: Callable[[], Any]) -> tuple[Any, int | None]:
        """The call's result, and the rise of memory during the call; None: unknown."""
        return call(), None

    def float32_product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Product of 16-bit matrices, not rounded to 16 bits."""
        return a.float() @ b.float()

    def facts(self) -> dict[str, Any]:
        return {}

    def watch(self, call: Callable[[], Any], seconds: float) -> list[dict[str, float]]:
        """Power and clocks while ``call`` is repeated for some seconds."""
        call()
        return []


class Cuda(Device):
    """The first GPU."""

    name = "cuda"
    l2_bytes = 256 * 2**20
    """Bytes written before every measured call: several times the largest L2 cache."""

    def __init__(self) -> None:
        self.l2: torch.Tensor | None = None

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def empty_cache(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def seconds(self, call: Callable[[], Any]) -> float:
        if self.l2 is None:
            self.l2 = torch.empty(self.l2_bytes, dtype=torch.uint8, device="cuda")
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.l2.zero_()
        start.record()
        result = call()
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end) / 1e3

    def ms(self, call: Callable[[], Any], repeat: int = 7) -> float:
        for _ in range(2):
            call()
        return 1e3 * sorted(self.seconds(call) for _ in range(repeat))[repeat // 2]

    def peak_bytes(self, call: Callable[[], Any]) -> tuple[Any, int | None]:
        self.synchronize()
        self.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        self.synchronize()
        return result, torch.cuda.max_memory_allocated() - before

    def float32_product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.mm(a, b, out_dtype=torch.float32)

    def facts(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(0)
        facts = {
            "gpu": properties.name,
            "gpu_count": torch.cuda.device_count(),
            "capability": list(torch.cuda.get_device_capability(0)),
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
        query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(_nvidia_smi(query), capture_output=True, text=True, timeout=20)
            facts |= dict(zip(query.split(","), map(str.strip, done.stdout.split(",")), strict=False))
        return facts

    def watch(self, call: Callable[[], Any], seconds: float) -> list[dict[str, float]]:
        names = ("power_w", "sm_mhz", "celsius")
        try:
            query = _nvidia_smi("power.draw,clocks.sm,temperature.gpu", "nounits")
            watcher = subprocess.Popen(
                [*query, "-lms", "200"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        except OSError:
            return []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            call()
            self.synchronize()
        watcher.terminate()
        samples = []
        for line in watcher.communicate(timeout=10)[0].splitlines():
            with contextlib.suppress(ValueError):  # a field that this card does not tell
                samples.append(dict(zip(names, map(float, line.split(",")), strict=True)))
        return samples


def _nvidia_smi(query: str, *formats: str) -> list[str]:
    return ["nvidia-smi", "--id=0", f"--query-gpu={query}", f"--format={','.join(['csv', 'noheader', *formats])}"]


def device_of(tensor: torch.Tensor) -> Device:
    return Cuda() if tensor.is_cuda else Device()
