"""Every loss: its value and gradient against numpy in float64, its identities, and what the clip promises."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tso_fast.losses import (
    LOSSES,
    Loss,
    clipped_sides,
    dpo,
    dual_clip,
    find_loss,
    loss_options,
    resolve_loss,
    sft,
    weighted_sum,
)
from tso_fast.types import PairLogprobs, TokenLogprobs

N = 200
INF = math.inf
LEAVES = "chosen", "rejected", "extra", "chosen_terms", "rejected_terms"


def tensor(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def records(seed: int = 0, *, soft: bool = True, margin: bool = True, extra: int = 0) -> PairLogprobs:
    """Log-ratios of a few nats either way, so that at the default options all four clip states occur."""
    rng = np.random.default_rng(seed)
    ref_chosen, ref_rejected = -rng.uniform(5, 60, (2, N))
    ref_extra = -rng.uniform(5, 60, (N, extra))
    return PairLogprobs(
        chosen=tensor(ref_chosen + rng.normal(0, 6, N)).clamp(max=-0.1).requires_grad_(),
        rejected=tensor(ref_rejected + rng.normal(0, 6, N)).clamp(max=-0.1).requires_grad_(),
        ref_chosen=tensor(ref_chosen),
        ref_rejected=tensor(ref_rejected),
        num_chosen_tokens=torch.tensor(rng.integers(1, 50, N)),
        num_rejected_tokens=torch.tensor(rng.integers(1, 50, N)),
        soft_label=tensor(rng.uniform(0.5, 1, N)) if soft else None,
        margin=tensor(rng.uniform(0, 2, N)) if margin else None,
        win_rates=tensor(rng.uniform(0, 1, (N, 2))) if soft and margin else None,
        ref2_chosen=tensor(ref_chosen + rng.normal(0, 6, N)),
        ref2_rejected=tensor(ref_rejected + rng.normal(0, 6, N)),
        extra=tensor(ref_extra + rng.normal(0, 6, (N, extra))).requires_grad_(),
        ref_extra=tensor(ref_extra),
        chosen_terms=tensor(rng.normal(0, 6, N)).requires_grad_(),
        rejected_terms=tensor(rng.normal(0, 6, N)).requires_grad_(),
    )


def pair(chosen: float, rejected: float, **fields: Any) -> PairLogprobs:
    """One pair with these log-ratios against a reference of 0."""
    values = {
        "chosen": chosen,
        "rejected": rejected,
        "ref_chosen": 0.0,
        "ref_rejected": 0.0,
        "num_chosen_tokens": 1.0,
        "num_rejected_tokens": 1.0,
    } | fields
    tensors = {name: tensor([value]) for name, value in values.items()}
    tensors["chosen"].requires_grad_()
    tensors["rejected"].requires_grad_()
    return PairLogprobs(**tensors)


# ---- formulas


def sigma(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def nls(x: Any) -> Any:
    """-log sigma(x)"""
    return np.logaddexp(0, -x)


def logistic(x: Any, z: Any, dz_chosen: Any, dz_rejected: Any, *, soft: bool = True, margin: bool = True) -> Any:
    """-p log sigma(z - m) - (1 - p) log sigma(m - z) and its gradients, from those of z."""
    p, z = x.p if soft else 1.0, z - x.m if margin else z
    dz = sigma(z) - p
    return p * nls(z) + (1 - p) * nls(-z), dz * dz_chosen, dz * dz_rejected


def of_dual_clip(x: Any, beta: Any = 0.1, clip_chosen: Any = 0.5, clip_rejected: Any = 0.3, nll_weight: Any = 0) -> Any:
    w, b = beta * x.A, beta * x.B
    z = np.minimum(w, clip_chosen) - np.maximum(b, -clip_rejected)
    value, da, db = logistic(x, z, beta * (w < clip_chosen), -beta * (b > -clip_rejected))
    return value - nll_weight * x.a / x.nw, da - nll_weight / x.nw, db


def of_dpo(x: Any, beta: Any = 0.1, **which: bool) -> Any:
    return logistic(x, beta * (x.A - x.B), beta, -beta, **which)


def of_cdpo(x: Any, beta: Any = 0.1, label_smoothing: Any = 0.1) -> Any:
    p, z = 1 - label_smoothing, beta * (x.A - x.B)
    return p * nls(z) + label_smoothing * nls(-z), -beta * (p - sigma(z)), beta * (p - sigma(z))


def of_robust(x: Any, beta: Any = 0.1, label_smoothing: Any = 0.1) -> Any:
    e, z = label_smoothing, beta * (x.A - x.B)
    slope = beta * ((1 - e) * sigma(-z) + e * sigma(z)) / (1 - 2 * e)
    return ((1 - e) * nls(z) - e * nls(-z)) / (1 - 2 * e), -slope, slope


def of_ipo(x: Any, beta: Any = 0.1, average: bool = False) -> Any:
    nw, nl = (x.nw, x.nl) if average else (1, 1)
    q = x.A / nw - x.B / nl - 1 / (2 * beta)
    return q**2, 2 * q / nw, -2 * q / nl


def of_hinge(z: Any, slope: Any) -> Any:
    return np.maximum(0, 1 - z), -slope * (z < 1), slope * (z < 1)


def of_simpo(x: Any, beta: Any = 2.0, gamma: Any = 0.5) -> Any:
    u = beta * (x.a / x.nw - x.b / x.nl) - gamma
    return nls(u), -beta * sigma(-u) / x.nw, beta * sigma(-u) / x.nl


def of_orpo(x: Any, beta: Any = 0.1) -> Any:
    p, q = np.exp(x.a / x.nw), np.exp(x.b / x.nl)
    u = np.log(p / (1 - p)) - np.log(q / (1 - q))
    slope = beta * sigma(-u)
    return -x.a / x.nw + beta * nls(u), -1 / x.nw - slope / (1 - p) / x.nw, slope / (1 - q) / x.nl


def of_sppo(x: Any, beta: Any = 0.001) -> Any:
    w, b = x.A - (x.win_w - 0.5) / beta, x.B - (x.win_l - 0.5) / beta
    return w**2 / 2 + b**2 / 2, w, b


def of_nca(x: Any, beta: Any = 0.1) -> Any:
    w, b = beta * x.A, beta * x.B
    return nls(w) + nls(-w) / 2 + nls(-b) / 2, beta * (sigma(w) / 2 - sigma(-w)), beta * sigma(b) / 2


def of_bco(x: Any, beta: Any = 0.1, delta: Any = 0) -> Any:
    w, b = beta * x.A - delta, beta * x.B - delta
    return nls(w) + nls(-b), -beta * sigma(-w), beta * sigma(b)


def bump(x: Any) -> Any:
    return sigma(x) * sigma(-x)


def of_apo_zero(x: Any, beta: Any = 0.1) -> Any:
    w, b = beta * x.A, beta * x.B
    return 1 - sigma(w) + sigma(b), -beta * bump(w), beta * bump(b)


def of_apo_down(x: Any, beta: Any = 0.1) -> Any:
    w, z = beta * x.A, beta * (x.A - x.B)
    return sigma(w) + 1 - sigma(z), beta * bump(w) - beta * bump(z), beta * bump(z)


def of_dpop(x: Any, beta: Any = 0.1, lam: Any = 50.0) -> Any:
    u = beta * (x.A - x.B - lam * np.maximum(0, x.ra - x.a))
    return nls(u), -beta * sigma(-u) * (1 + lam * (x.a < x.ra)), beta * sigma(-u)


def of_bdpo(x: Any, beta: Any = 0.1, lam: Any = 0.5) -> Any:
    mixed = np.log(lam * np.exp(x.B) + 1 - lam)
    u = beta * (x.A - mixed)
    return nls(u), -beta * sigma(-u), beta * sigma(-u) * lam * np.exp(x.B - mixed)


def of_rpo_sft(x: Any, beta: Any = 0.01, eta: Any = 0.005, average: bool = False) -> Any:
    value, da, db = of_dpo(x, beta)
    weight = eta / x.nw if average else eta * beta
    return value - weight * x.a, da - weight, db


def of_mrpo(x: Any, beta: Any = 0.1, alpha: Any = -1.0, eta: Any = 0.1) -> Any:
    """As in the code: log pi_1 + log pi_2 - log(alpha pi_1 + (1 - alpha) pi_2), pi_1 clipped around pi_2."""
    one, two = np.abs(x.ra - x.rb), np.abs(x.r2a - x.r2b)
    alpha = one / (one + two) if alpha < 0 else alpha
    b_w, b_l = np.abs(x.ra + x.r2a), np.abs(x.rb + x.r2b)
    widths = (eta * b_w / (b_w + b_l), eta * b_l / (b_w + b_l)) if eta >= 0 else (-eta, -eta)
    merged = []
    for first, second, width in ((x.ra, x.r2a, widths[0]), (x.rb, x.r2b, widths[1])):
        first = np.clip(first, second * (1 + width), second * (1 - width))
        merged.append(first + second - np.log(alpha * np.exp(first) + (1 - alpha) * np.exp(second)))
    return logistic(x, beta * (x.a - merged[0] - x.b + merged[1]), beta, -beta)


def of_selm(x: Any, beta: Any = 0.01, alpha: Any = 0.001) -> Any:
    value, da, db = of_dpo(x, beta)
    return value + alpha * beta * x.E[:, 0], da, db, {"extra": np.full((N, 1), alpha * beta)}


def of_srpo(x: Any, beta: Any = 0.1, alpha: Any = 0.5) -> Any:
    l_w, w_l, w_w, l_l = x.E.T  # l after (x, w) and so on
    joint = x.p - 0.5 - beta / 2 * (x.A - x.B + w_l - l_w)
    up, down = x.p - 0.5 - beta * (w_l - l_l), 0.5 - x.p - beta * (l_w - w_w)
    value = (1 - alpha) * joint**2 + alpha / 2 * (up**2 + down**2)
    dj = -(1 - alpha) * beta * joint
    du, dd = -alpha * beta * up, -alpha * beta * down
    return value, dj, -dj, {"extra": np.stack([-dj + dd, dj + du, -dd, -du], 1)}


def of_terms(x: Any, beta: Any) -> Any:
    value, dw, dl = logistic(x, beta * (x.tw - x.tl), beta, -beta)
    return value, 0, 0, {"chosen_terms": dw, "rejected_terms": dl}


FORMULAS: dict[str, Any] = {
    "dual_clip": of_dual_clip,
    "dpo": of_dpo,
    "cdpo": of_cdpo,
    "robust": of_robust,
    "soft_ce": lambda x, beta=0.1: of_dpo(x, beta, margin=False),
    "margin_dpo": lambda x, beta=0.1: of_dpo(x, beta, soft=False),
    "ipo": of_ipo,
    "hinge": lambda x, beta=0.1: of_hinge(beta * (x.A - x.B), beta),
    "slic": lambda x, gamma=0.05: of_hinge(gamma * (x.a - x.b), gamma),
    "simpo": of_simpo,
    "orpo": of_orpo,
    "sppo": of_sppo,
    "nca": of_nca,
    "bco": of_bco,
    "apo_zero": of_apo_zero,
    "apo_down": of_apo_down,
    "dpop": of_dpop,
    "bdpo": of_bdpo,
    "rpo_sft": of_rpo_sft,
    "mrpo": of_mrpo,
    "selm": of_selm,
    "srpo": of_srpo,
    "humanline": lambda x, beta=0.1: of_terms(x, beta),
    "bmc": lambda x, beta=0.01: of_terms(x, beta),
    "inverse_q": lambda x: (x.tw + x.tl, 0, 0, {"chosen_terms": 1, "rejected_terms": 1}),
    "sft": lambda x: (-x.a / x.nw, -1 / x.nw, 0),
}
"""Value, d/d chosen, d/d rejected and other gradients of each loss, from its formula alone. A new loss needs a row."""
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "dual_clip": [
        {"beta": 0.3, "clip_chosen": 1.0, "clip_rejected": 0.2},
        {"clip_chosen": 0.0, "clip_rejected": 0.0},
        {"nll_weight": 0.7},
    ],
    "dpo": [{"beta": 0.5}],
    "cdpo": [{"label_smoothing": 0.3}],
    "robust": [{"label_smoothing": 0.3}],
    "ipo": [{"average": True}],
    "slic": [{"gamma": 1.0}],
    "simpo": [{"beta": 10.0, "gamma": 3.0}],
    "orpo": [{"beta": 2.0}],
    "sppo": [{"beta": 0.2}],
    "bco": [{"delta": 0.4}],
    "dpop": [{"lam": 0.5}],
    "bdpo": [{"lam": 0.9, "beta": 0.5}],
    "rpo_sft": [{"average": True, "beta": 0.5, "eta": 0.2}],
    "mrpo": [{"alpha": 0.3, "eta": 0.05}, {"eta": -0.2}, {"alpha": 0.0, "eta": 10.0}],
    "selm": [{"alpha": 0.5, "beta": 0.2}],
    "srpo": [{"alpha": 0.0}, {"alpha": 1.0, "beta": 0.02}],
    "humanline": [{"beta": 0.5}],
    "bmc": [{"beta": 0.5}],
}
"""Options to try beside the defaults."""


def as_numbers(r: PairLogprobs) -> Any:
    x = SimpleNamespace(**{k: v.detach().numpy() for k, v in vars(r).items() if v is not None})
    x.a, x.b, x.ra, x.rb, x.r2a, x.r2b = (
        x.chosen,
        x.rejected,
        x.ref_chosen,
        x.ref_rejected,
        x.ref2_chosen,
        x.ref2_rejected,
    )
    x.A, x.B, x.E = x.a - x.ra, x.b - x.rb, x.extra - x.ref_extra
    x.nw, x.nl, x.tw, x.tl = x.num_chosen_tokens, x.num_rejected_tokens, x.chosen_terms, x.rejected_terms
    x.p, x.m = getattr(x, "soft_label", np.ones(N)), getattr(x, "margin", np.zeros(N))
    x.win_w, x.win_l = (x.p, 1 - x.p) if r.win_rates is None else x.win_rates.T
    return x


def gradients(loss: Any, r: PairLogprobs, **options: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Value and the gradient by everything that may have one."""
    value = loss(r, **options)
    leaves = {name: getattr(r, name) for name in LEAVES}
    slopes = torch.autograd.grad(value.sum(), list(leaves.values()), materialize_grads=True)
    return value.detach(), dict(zip(leaves, slopes, strict=True))


def gradient(loss: Any, r: PairLogprobs, **options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    value = loss(r, **options)
    slopes = torch.autograd.grad(value.sum(), (r.chosen, r.rejected), materialize_grads=True)
    return value.detach(), *slopes


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("soft", "margin"), [(False, False), (True, False), (False, True), (True, True)])
def test_value_and_gradient(name: str, soft: bool, margin: bool) -> None:
    r = records(soft=soft, margin=margin, extra=LOSSES[name].num_extra or 0)
    for options in ({}, *OPTIONS.get(name, ())):
        got, slopes = gradients(LOSSES[name], r, **options)
        want, chosen, rejected, *others = FORMULAS[name](as_numbers(r), **options)
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-11, atol=1e-12)
        expected = {"chosen": chosen, "rejected": rejected, **(others[0] if others else {})}
        for leaf, slope in slopes.items():
            wanted = np.broadcast_to(expected.get(leaf, 0), slope.shape)
            np.testing.assert_allclose(slope.numpy(), wanted, rtol=1e-10, atol=1e-12, err_msg=f"{leaf} {options}")


def test_terms_of_tokens_and_their_gradients() -> None:
    rng = np.random.default_rng(4)
    y, ref, values = -rng.uniform(0.01, 4, 50), -rng.uniform(0.01, 4, 50), rng.integers(0, 2, 50) * 1.0
    weight, ref_weight = (1 + values * np.minimum(np.exp(-x), 1.5) for x in (y, ref))
    expected = {
        "humanline": (np.clip(y - ref, -1.0, 1.5), (y - ref > -1.0) & (y - ref < 1.5)),
        "bmc": (weight * y - ref_weight * ref, weight),  # the reference has its own confidences; both are detached
        "inverse_q": ((0.1 * (y - ref) - values) ** 2, 0.2 * (0.1 * (y - ref) - values)),
    }
    assert expected.keys() == {name for name, loss in LOSSES.items() if loss.token_term is not None}
    for name, (want, slope) in expected.items():
        leaf = tensor(y).requires_grad_()
        terms = LOSSES[name].terms(TokenLogprobs(logprobs=leaf, ref_logprobs=tensor(ref), values=tensor(values)))
        np.testing.assert_allclose(terms.detach().numpy(), want, rtol=1e-12)
        np.testing.assert_allclose(torch.autograd.grad(terms.sum(), leaf)[0].numpy(), slope, rtol=1e-12)


# ---- identities and traps


def same(one: Any, other: Any, r: PairLogprobs, rtol: float = 1e-12) -> None:
    """Two losses agree in value and gradients."""
    (value, slopes), (want, wanted) = gradients(one, r), gradients(other, r)
    torch.testing.assert_close(value, want, rtol=rtol, atol=rtol)
    for name, slope in slopes.items():
        torch.testing.assert_close(slope, wanted[name], rtol=rtol, atol=rtol)


def bound(name: str, **options: Any) -> Loss:
    return resolve_loss(name, options)


def test_limits_that_are_dpo() -> None:
    r = records(6, extra=1)
    plain, bare = bound("dpo", beta=0.2), records(6, soft=False, margin=False, extra=1)
    same(bound("dual_clip", beta=0.2, clip_chosen=INF, clip_rejected=INF), plain, r)
    same(bound("rpo_sft", beta=0.2, eta=0.0), plain, r)
    same(bound("selm", beta=0.2, alpha=0.0), plain, r)
    same(bound("bdpo", beta=0.2, lam=1.0), plain, bare)
    same(bound("bdpo", beta=0.2, lam=1 - 1e-13), plain, bare, rtol=1e-6)
    same(bound("dpop", beta=0.2, lam=0.0), plain, bare)
    same(bound("robust", beta=0.2, label_smoothing=0.0), plain, bare)
    same(bound("cdpo", beta=0.2, label_smoothing=0.0), plain, bare)
    same(bound("soft_ce", beta=0.2), plain, bare)
    same(bound("soft_ce", beta=0.2), plain, records(6, margin=False))
    same(bound("margin_dpo", beta=0.2), plain, records(6, soft=False))
    equal = dataclasses.replace(r, ref2_chosen=r.ref_chosen, ref2_rejected=r.ref_rejected)
    for alpha in (-1.0, 0.0, 0.3, 1.0):
        same(bound("mrpo", beta=0.2, alpha=alpha), plain, equal)
    # Sums of unclamped terms are log-ratios.
    terms = dataclasses.replace(r, chosen_terms=r.chosen - r.ref_chosen, rejected_terms=r.rejected - r.ref_rejected)
    for name in ("humanline", "bmc"):
        for got, want in zip(gradient(bound(name, beta=0.2), terms), gradient(plain, r), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_symmetries() -> None:
    r = records(7, soft=False, margin=False)
    swapped = dataclasses.replace(
        r, chosen=r.rejected, rejected=r.chosen, ref_chosen=r.ref_rejected, ref_rejected=r.ref_chosen
    )
    half = bound("cdpo", label_smoothing=0.5)
    torch.testing.assert_close(half(r), half(swapped))
    label = tensor(np.random.default_rng(0).uniform(0, 1, N))
    soft, flipped = (dataclasses.replace(x, soft_label=y) for x, y in ((r, label), (swapped, 1 - label)))
    for name in ("soft_ce", "dpo", "sppo"):
        torch.testing.assert_close(LOSSES[name](soft), LOSSES[name](flipped))
    e = 0.2  # robust DPO undoes flips of this probability
    robust = bound("robust", label_smoothing=e)
    torch.testing.assert_close((1 - e) * robust(r) + e * robust(swapped), dpo(r))


def test_lengths_enter_the_losses_of_means_and_no_other() -> None:
    r = records(8, extra=4)
    longer = dataclasses.replace(
        r, num_chosen_tokens=2 * r.num_chosen_tokens, num_rejected_tokens=3 * r.num_rejected_tokens
    )
    doubled = {k: 2 * v for k, v in vars(r).items() if v is not None and k not in ("soft_label", "margin", "win_rates")}
    doubled = dataclasses.replace(r, **{k: v for k, v in doubled.items() if "ref2" not in k and "terms" not in k})
    changed = set()
    for name, loss in LOSSES.items():
        record = dataclasses.replace(r, extra=r.extra[:, :1], ref_extra=r.ref_extra[:, :1]) if name == "selm" else r
        others = {k: getattr(longer, k) for k in ("num_chosen_tokens", "num_rejected_tokens")}
        if not torch.equal(loss(record), loss(dataclasses.replace(record, **others))):
            changed.add(name)
    assert {"simpo", "orpo", "sft"} <= changed
    assert not changed & {"dual_clip", "dpo", "ipo", "hinge", "slic", "rpo_sft", "selm", "srpo"}
    # Twice the log-probs on twice the tokens: the same means.
    for loss in (LOSSES["simpo"], LOSSES["orpo"], bound("ipo", average=True), sft):
        torch.testing.assert_close(loss(doubled), loss(r))
    equal = dataclasses.replace(r, num_chosen_tokens=torch.full((N,), 4), num_rejected_tokens=torch.full((N,), 4))
    torch.testing.assert_close(bound("ipo", average=True, beta=0.4)(equal), bound("ipo", beta=0.1)(equal) / 16)


def test_a_reference_is_needed_by_those_that_say_so() -> None:
    """SLiC is not the hinge loss: it has no reference."""
    r = records(9, extra=4)
    nan = torch.full((N,), math.nan, dtype=torch.float64)
    lost = dataclasses.replace(r, ref_chosen=nan, ref_rejected=nan)
    free = {n for n, loss in LOSSES.items() if n != "selm" and not loss.token_term and loss(lost).isfinite().all()}
    assert free == {n for n, loss in LOSSES.items() if not loss.needs_reference} >= {"slic", "simpo", "orpo", "sft"}
    zero = dataclasses.replace(r, ref_chosen=0 * nan.nan_to_num(), ref_rejected=0 * nan.nan_to_num())
    same(bound("slic", gamma=0.1), bound("hinge", beta=0.1), zero)


def test_labels_move_those_that_say_so() -> None:
    for name, loss in LOSSES.items():
        r = dataclasses.replace(records(10, soft=False, margin=False, extra=loss.num_extra or 0))
        given = {"soft_label": torch.full((N,), 0.7, dtype=torch.float64), "margin": torch.ones(N, dtype=torch.float64)}
        moved = {k for k, v in given.items() if not torch.equal(loss(r), loss(dataclasses.replace(r, **{k: v})))}
        assert moved == loss.labels, name


def test_losses_of_one_name_that_differ() -> None:
    r = records(11, soft=False, margin=False)
    a, b, nw = r.chosen - r.ref_chosen, r.rejected - r.ref_rejected, r.num_chosen_tokens
    # TRL's sppo_hard has no 1/2.
    torch.testing.assert_close(2 * LOSSES["sppo"](r), (a - 0.5 / 0.001) ** 2 + (b + 0.5 / 0.001) ** 2)
    # RPO's two forms differ by the scale of their NLL.
    summed, mean = (bound("rpo_sft", beta=0.1, eta=0.2, average=x)(r) - dpo(r) for x in (False, True))
    torch.testing.assert_close(summed, mean * 0.1 * nw)
    # The third sequence of SELM may be the chosen one: its gradient folds into that of the chosen one.
    folded = dataclasses.replace(r, extra=r.chosen[:, None], ref_extra=r.ref_chosen[:, None])
    torch.testing.assert_close(gradient(LOSSES["selm"], folded)[1], gradient(bound("dpo", beta=0.01), r)[1] + 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_bounds_dual_clip_is_dpo_bit_for_bit(dtype: torch.dtype) -> None:
    r = records(2)
    given = {k: v.detach() for k, v in vars(r).items() if v is not None}
    r = PairLogprobs(**{k: v.to(dtype).requires_grad_(k in ("chosen", "rejected")) for k, v in given.items()})
    clipped = gradient(dual_clip, r, beta=0.2, clip_chosen=INF, clip_rejected=INF)
    assert all(torch.equal(x, y) for x, y in zip(clipped, gradient(dpo, r, beta=0.2), strict=True))
    # A bound that nothing reaches is no bound either.
    assert all(
        torch.equal(x, y)
        for x, y in zip(clipped, gradient(dual_clip, r, beta=0.2, clip_chosen=1e6, clip_rejected=1e6), strict=True)
    )


# Rewards of (chosen, rejected) at beta 1 with bounds 0.5 and 0.25: beyond, exactly at, and just inside each bound.
@pytest.mark.parametrize(
    ("chosen", "rejected", "moves"),
    [
        (0.6, 0.1, (False, True)),
        (0.5, 0.1, (False, True)),
        (np.nextafter(0.5, 0), 0.1, (True, True)),
        (0.1, -0.3, (True, False)),
        (0.1, -0.25, (True, False)),
        (0.1, np.nextafter(-0.25, 0), (True, True)),
        (0.5, -0.25, (False, False)),
        (-9.0, 9.0, (True, True)),  # one-sided: what fell is pulled up, what rose is pushed down
        (-9.0, -9.0, (True, False)),
        (9.0, 9.0, (False, True)),
    ],
)
@pytest.mark.parametrize("soft_label", [1.0, 0.7])
def test_a_side_moves_until_it_reaches_its_bound(
    chosen: float, rejected: float, moves: tuple[bool, bool], soft_label: float
) -> None:
    r = pair(chosen, rejected, soft_label=soft_label)
    bounds = {"clip_chosen": 0.5, "clip_rejected": 0.25}
    _, *slopes = gradient(dual_clip, r, beta=1.0, **bounds)
    assert tuple(bool(slope != 0) for slope in slopes) == moves
    assert clipped_sides(r.chosen, r.rejected, **bounds)[0].tolist() == [not m for m in moves]


def test_a_fallen_chosen_response_is_pulled_up_as_in_dpo() -> None:
    r = pair(-30.0, -0.5)
    _, pull, _ = gradient(dual_clip, r)
    assert pull < 0  # descent raises the log-prob
    assert torch.equal(pull, gradient(dpo, r)[1])


def test_no_pair_dominates() -> None:
    """z stays below c_w + c_l however far the rewards run."""
    for chosen, rejected in ((1e6, -1e6), (6.0, -4.0)):
        loss = dual_clip(pair(chosen, rejected), clip_chosen=0.5, clip_rejected=0.3)
        assert loss.item() == pytest.approx(math.log1p(math.exp(-0.8)), abs=1e-12)


def test_policy_equal_to_reference_gives_ln_2() -> None:
    for name in ("dual_clip", "dpo"):
        for soft_label in (1.0, 0.6):
            assert LOSSES[name](pair(0.0, 0.0, soft_label=soft_label)).item() == pytest.approx(math.log(2), abs=1e-15)
    assert dual_clip(pair(0.0, 0.0, margin=0.5)).item() == pytest.approx(math.log1p(math.exp(0.5)), abs=1e-12)


@pytest.mark.parametrize("field", ["chosen", "rejected", "ref_chosen", "ref_rejected", "soft_label", "margin"])
def test_nan_in_nan_out(field: str) -> None:
    r = pair(0.1, -0.1, soft_label=1.0, margin=0.0)
    r = dataclasses.replace(r, **{field: torch.full_like(r.chosen, math.nan)})
    assert dual_clip(r).isnan().all()
    assert dpo(r).isnan().all()
    assert sft(r).isnan().all() == (field == "chosen")


def test_far_from_zero_nothing_overflows() -> None:
    for name in ("dual_clip", "dpo"):
        for chosen, rejected in ((1e30, -1e30), (-1e30, 1e30)):
            value, *slopes = gradient(LOSSES[name], pair(chosen, rejected, soft_label=0.9))
            assert value.isfinite()
            assert all(slope.isfinite() for slope in slopes)


@pytest.mark.parametrize("loss", [dual_clip, dpo])
@pytest.mark.parametrize("beta", [0.0, -0.1, INF, math.nan])
def test_beta_out_of_range(loss: Any, beta: float) -> None:
    with pytest.raises(ValueError, match="beta must be a finite number > 0, got"):
        loss(pair(0.0, 0.0), beta=beta)


@pytest.mark.parametrize("name", ["clip_chosen", "clip_rejected"])
@pytest.mark.parametrize("bound", [-0.1, math.nan])
def test_bound_out_of_range(name: str, bound: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a number >= 0"):
        dual_clip(pair(0.0, 0.0), **{name: bound})


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown loss 'dual-clip'; known: apo_down, .*, sft, .*, or package"):
        resolve_loss("dual-clip", {})
    with pytest.raises(
        ValueError, match=r"'dual_clip' has no option 'betta'; its options: beta, clip_chosen, clip_rej"
    ):
        resolve_loss("dual_clip", {"betta": 0.1})
    with pytest.raises(ValueError, match=r"'sft' has no option 'beta'; its options: none"):
        resolve_loss("sft", {"beta": 0.1})
    assert loss_options("dual_clip") == {"beta": 0.1, "clip_chosen": 0.5, "clip_rejected": 0.3, "nll_weight": 0.0}
    assert loss_options("humanline") == {"beta": 0.1, "log_epsilon_P": -1.0, "log_epsilon_R": 1.5}


def test_resolve_binds_options_of_names_and_functions() -> None:
    r = records(3)
    assert torch.equal(resolve_loss("dpo", {"beta": 0.7})(r), dpo(r, beta=0.7))
    assert torch.equal(resolve_loss(dpo, {"beta": 0.7})(r), dpo(r, beta=0.7))
    assert resolve_loss("dpo", {}) is LOSSES["dpo"]
    assert resolve_loss(dpo, {}).function is dpo
    assert not resolve_loss(dpo, {}).is_per_pair  # nothing is known of a bare function


def test_a_row_is_its_function_and_what_others_must_know() -> None:
    for name, loss in LOSSES.items():
        r = records(3, extra=loss.num_extra or 0)
        assert torch.equal(loss(r), loss.function(r)), name
        assert loss.title
        assert loss.function.__doc__


def test_an_option_of_a_token_term_is_an_option_of_its_loss() -> None:
    tokens = TokenLogprobs(logprobs=tensor([-1.0, -3.0]), ref_logprobs=tensor([-4.0, -1.0]), values=None)
    loss = resolve_loss("humanline", {"log_epsilon_R": 2.5, "beta": 0.3})
    assert loss.terms(tokens).tolist() == [2.5, -1.0]
    torch.testing.assert_close(loss(records(3)), LOSSES["humanline"](records(3), beta=0.3))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cdpo", {"label_smoothing": 0.6}, r"label_smoothing must be in \[0, 0.5\], got 0.6"),
        ("robust", {"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        ("bdpo", {"lam": 0.0}, r"lam must be in \(0, 1\], got 0.0"),
        ("dpop", {"lam": -1.0}, "lam must be a finite number >= 0, got -1.0"),
        ("dual_clip", {"nll_weight": INF}, "nll_weight must be a finite number >= 0, got inf"),
        ("bco", {"delta": INF}, "delta must be a finite number"),
        ("mrpo", {"alpha": 2.0}, "alpha must be <= 1"),
        ("srpo", {"alpha": 2.0}, r"alpha must be in \[0, 1\]"),
        ("humanline", {"log_epsilon_P": 2.0}, "log_epsilon_P must be < log_epsilon_R"),
        ("inverse_q", {"beta": 0.0}, "beta must be a finite number > 0"),
    ],
)
def test_an_option_out_of_range(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_loss(name, options)


def test_a_missing_input_is_named() -> None:
    for name, field in (("mrpo", "ref2_chosen"), ("selm", "extra"), ("humanline", "chosen_terms")):
        with pytest.raises(ValueError, match=f"{name} needs PairLogprobs.{field}, got None"):
            LOSSES[name](pair(0.0, 0.0))
    with pytest.raises(ValueError, match=r"srpo needs extra and ref_extra \[N, 4\], .* got \(200, 1\)"):
        LOSSES["srpo"](records(extra=1))


def test_a_loss_from_elsewhere_is_found_by_its_address() -> None:
    assert find_loss("tso_fast.losses:dpo").function is dpo
    for address, message in (
        ("nowhere.at_all:loss", "cannot be imported: ModuleNotFoundError"),
        ("tso_fast.losses:nothing", "cannot be imported: AttributeError"),
        ("tso_fast.losses:__doc__", "expected a function or a tso_fast.losses.Loss"),
    ):
        with pytest.raises(ValueError, match=message):
            find_loss(address)


def test_a_weighted_sum_is_the_sum_of_its_losses() -> None:
    r = records(5)
    total = weighted_sum(["dual_clip", "sft"], [1.0, 0.3], {"beta": 0.2, "dual_clip": {"clip_chosen": 0.7}})
    want = dual_clip(r, beta=0.2, clip_chosen=0.7) + 0.3 * sft(r)
    torch.testing.assert_close(total(r), want, rtol=1e-12, atol=0)
    assert total.title == "dual clip (TSO) + 0.3 x chosen-only NLL"
    assert total.needs_reference
    assert total.takes_labels
    assert loss_options(total) == {"beta": 0.2, "clip_chosen": 0.7, "clip_rejected": 0.3, "nll_weight": 0.0}
    assert weighted_sum(["dpo"], None, {"beta": 0.2})(r).equal(dpo(r, beta=0.2))
    assert not weighted_sum(["sft"], [2.0], {}).needs_reference
    # NLL inside dual_clip is NLL beside it.
    same(bound("dual_clip", nll_weight=0.3), weighted_sum(["dual_clip", "sft"], [1.0, 0.3], {}), r)


def test_a_weighted_sum_needs_what_its_losses_need() -> None:
    total = weighted_sum(
        ["humanline", "sppo", "selm"], None, {"humanline": {"log_epsilon_R": 2.0}, "sppo": {"beta": 1}}
    )
    assert (total.num_extra, total.takes, total.labels) == (1, {"win_rates"}, {"soft_label", "margin"})
    tokens = TokenLogprobs(logprobs=tensor([-1.0]), ref_logprobs=tensor([-4.0]), values=None)
    assert total.terms(tokens).item() == 2.0
    r = records(5, extra=1)
    want = LOSSES["humanline"](r) + LOSSES["sppo"](r, beta=1.0) + LOSSES["selm"](r)
    torch.testing.assert_close(total(r), want)
    assert weighted_sum(["soft_ce", "sft"], None, {}).takes_labels == "soft_label"
    assert weighted_sum(["soft_ce", "margin_dpo"], None, {}).takes_labels is True


@pytest.mark.parametrize(
    ("names", "weights", "options", "message"),
    [
        ([], None, {}, "got the losses none; expected one or more, each once"),
        (["dpo", "dpo"], None, {}, "got the losses dpo, dpo; expected one or more, each once"),
        (["dpo", "sft"], [1.0], {}, "loss_weights has 1 items for 2 losses"),
        (["dpo", "sft"], None, {"clip_chosen": 1}, "none of the losses has the option 'clip_chosen'"),
        (["dpo", "sft"], None, {"sft": {"beta": 1}}, "'sft' has no option 'beta'"),
        (["dpo", "nmae"], None, {}, "unknown loss 'nmae'"),
        (["dpo"], None, {"beta": 0}, "beta must be a finite number > 0"),
        (["humanline", "bmc"], None, {}, "humanline DPO and BMC each have a term of tokens; a sum can have one"),
        (["selm", "srpo"], None, {}, "SELM and SRPO each have further sequences of their own"),
    ],
)
def test_a_weighted_sum_that_cannot_be(names: Any, weights: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weighted_sum(names, weights, options)


def test_odds_of_a_certain_answer_are_finite() -> None:
    """A trained policy's probability can round to 1."""
    logprobs = torch.tensor([-1e-30, 0.0, -1e-9], dtype=torch.float64)
    chosen, rejected = (x.requires_grad_() for x in (logprobs, logprobs.flip(0).clone()))
    one = torch.ones(3, dtype=torch.float64)
    r = PairLogprobs(chosen=chosen, rejected=rejected, ref_chosen=one, ref_rejected=one, num_chosen_tokens=one,
                     num_rejected_tokens=one)  # fmt: skip
    for found in gradient(LOSSES["orpo"], r):
        assert found.isfinite().all()
