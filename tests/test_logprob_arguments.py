"""What the ops refuse: checked on the host before a backend is asked, so one of them stands for all.

That the backends take what passes is in test_logprob.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tso_fast import linear_logprobs, logprob, preference_loss

IGNORE = -100
H, W = torch.zeros(4, 3, 8), torch.zeros(11, 8)
T = torch.ones(4, 3, dtype=torch.int64)
EMPTY = T.clone()
EMPTY[2] = IGNORE
OUTSIDE = T.clone()
OUTSIDE[1, 2] = 11
NEGATIVE = T.clone()
NEGATIVE[0, 1] = -1
LP = torch.zeros(4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": H.long()}, "hidden must be a floating-point tensor, got torch.int64"),
        ({"weight": torch.zeros(11, 7)}, r"weight must be \[V, D\] with D = 8 .*got \(11, 7\)"),
        ({"weight": torch.zeros(8)}, r"weight must be \[V, D\]"),
        ({"hidden": torch.tensor(1.0)}, r"weight must be \[V, D\] with D = \?"),
        ({"weight": W.bfloat16()}, "weight is torch.bfloat16 but hidden is torch.float32"),
        ({"weight": W.to("meta")}, "weight is on the meta device and holds no numbers; load the weights"),
        ({"weight": W[:0]}, "weight has no rows; is it a parameter that is sharded or offloaded"),
        ({"weight": W.to(torch.float8_e4m3fn)}, r"weight is quantised \(torch.float8_e4m3fn\), and the op reads"),
        ({"weight": W.to(torch.int8)}, r"weight is quantised \(torch.int8\).*leave the output head out"),
        ({"bias": torch.zeros(10)}, r"bias must be \[11\] on cpu, got \(10,\)"),
        ({"bias": torch.zeros(11, device="meta")}, r"bias must be \[11\] on cpu, got \(11,\) on meta"),
        ({"targets": T.int()}, "targets must be int64, got torch.int32"),
        ({"targets": T.to("meta")}, "targets are on meta but hidden is on cpu"),
        ({"targets": T[:, :2]}, r"targets must be \(4, 3\).*got \(4, 2\)"),
        ({"targets": OUTSIDE}, r"targets\[1, 2\] is 11; expected 0 <= target < 11 or ignore_index -100"),
        ({"targets": NEGATIVE}, r"targets\[0, 1\] is -1"),
        ({"softcap": 0.0}, "softcap must be > 0 or None, got 0.0"),
        ({"softcap": math.nan}, "softcap must be > 0"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"temperature": -1.0}, "temperature must be > 0"),
        ({"impl": "fast"}, "unknown impl 'fast'; known: auto, reference"),
    ],
)
def test_what_both_ops_refuse(change: dict[str, Any], message: str) -> None:
    given = {"hidden": H, "weight": W, "targets": T, "impl": "reference", **change}
    with pytest.raises(ValueError, match=message):
        linear_logprobs(**given)
    with pytest.raises(ValueError, match=message):
        preference_loss(**given, ref_logprobs=LP)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": EMPTY}, "sequence 2 belongs to a pair but has no completion token"),
        ({"hidden": H[:3], "targets": T[:3]}, "3 are no even, positive number"),
        ({"hidden": H[:0], "targets": T[:0]}, "0 are no even, positive number"),
        ({"hidden": H[0], "targets": T[0]}, "packed input needs cu_seqlens"),
        ({"pairs": torch.tensor([0, 1])}, r"pairs must be \[N, 2\] int64 with N > 0, got \(2,\)"),
        ({"pairs": torch.zeros(0, 2, dtype=torch.int64)}, r"pairs must be \[N, 2\]"),
        ({"pairs": torch.zeros(1, 2, dtype=torch.int32)}, r"pairs must be .*torch.int32"),
        ({"pairs": torch.tensor([[0, 1], [2, 4]])}, r"pairs\[1\] is \[2, 4\]; expected sequences in \[0, 4\)"),
        ({"pairs": torch.tensor([[-1, 1]])}, r"pairs\[0\] is \[-1, 1\]"),
        ({"cu_seqlens": torch.tensor([0, 12])}, "cu_seqlens goes with packed targets"),
        ({"scale": torch.tensor([1.0, -0.5])}, r"scale\[1\] is -0.5; expected finite and >= 0"),
        ({"scale": torch.tensor([math.inf, 1])}, r"scale\[0\] is inf"),
        ({"scale": torch.ones(3)}, r"scale must be \[2\], one value a pair, got \(3,\)"),
        ({"soft_label": torch.tensor([0.5, 1.01])}, r"soft_label\[1\] is 1.0\d*; expected in \[0, 1\]"),
        ({"soft_label": torch.tensor([math.nan, 1.0])}, r"soft_label\[0\] is nan"),
        ({"margin": torch.tensor([0.0, -1.0])}, r"margin\[1\] is -1.0; expected finite and >= 0"),
        ({"token_weights": torch.ones(4, 2)}, r"token_weights must be \(4, 3\), got \(4, 2\)"),
        ({"ref_logprobs": torch.zeros(3)}, r"ref_logprobs must be \[4\], one sum a sequence, got \(3,\)"),
        ({"ref_logprobs": None}, "exactly one of ref_logprobs, ref_hidden and ref_token_logprobs: none was given"),
        ({"ref_hidden": H}, "ref_token_logprobs: ref_logprobs and ref_hidden were given"),
        ({"ref_weight": W}, "ref_weight and ref_bias have no effect without ref_hidden"),
        ({"ref_bias": torch.zeros(11)}, "ref_weight and ref_bias have no effect without ref_hidden"),
        ({"ref_token_logprobs": T.float()}, "ref_token_logprobs: ref_logprobs and ref_token_logprobs were given"),
        ({"ref_logprobs": None, "ref_token_logprobs": LP}, r"ref_token_logprobs must be \(4, 3\), got \(4,\)"),
        ({"loss": "humanline"}, "humanline DPO needs the reference's log-prob of each token, and ref_logprobs has"),
        ({"loss": "mrpo"}, "MRPO needs ref2_logprobs, which was not given"),
        ({"loss": "mrpo", "ref2_logprobs": LP[:3]}, r"ref2_logprobs must be \[4\], one sum a sequence, got \(3,\)"),
        ({"ref2_logprobs": LP}, r"ref2_logprobs has no effect on dual clip \(TSO\); leave it out"),
        ({"win_rates": torch.ones(2, 2)}, "win_rates has no effect on dual clip"),
        ({"loss": "sppo", "win_rates": torch.ones(2)}, r"win_rates must be \[2, 2\], a value for the chosen and"),
        ({"loss": "sppo", "win_rates": torch.tensor([[0.0, 1.0], [1.0, 1.5]])}, r"win_rates\[1\] is \[1.0, 1.5\]; exp"),
        ({"token_values": T}, "token_values has no effect on dual clip"),
        ({"loss": "bmc", "ref_logprobs": None, "ref_hidden": H}, "BMC needs token_values, which was not given"),
        ({"loss": "selm"}, r"pairs must be \[N, 3\] int64 for SELM: chosen, rejected and 1 further seq.*, got none"),
        ({"loss": "selm", "pairs": torch.tensor([[0, 1]])}, r"pairs must be \[N, 3\] .*, got \(1, 2\)"),
        ({"pairs": torch.tensor([[0, 1, 2]])}, r"pairs must be \[N, 2\] int64 for dual clip .* no further sequences"),
        ({"ref_logprobs": None, "ref_hidden": H[:2]}, r"ref_hidden must be \(4, 3, 'D'\) like hidden"),
        ({"ref_logprobs": None, "ref_hidden": H[..., :5]}, r"ref_weight must be \[V, D\] with D = 5"),
        ({"ref_logprobs": None, "ref_hidden": H.bfloat16()}, "ref_weight is torch.float32 but ref_hidden is torch.bfl"),
        ({"ref_logprobs": None, "ref_hidden": H, "ref_weight": W[:7]}, r"target.*is 9.*expected 0 <= target < 7"),
        ({"loss": "kto"}, "unknown loss 'kto'; known: apo_down, apo_zero"),
        ({"clip": 1.0}, "'dual_clip' has no option 'clip'; its options: beta, clip_chosen, clip_rejected"),
        ({"beta": -0.1}, "beta must be a finite number > 0, got -0.1"),
    ],
)
def test_what_preference_loss_refuses(change: dict[str, Any], message: str) -> None:
    targets = torch.full_like(T, 9) if "ref_weight" in change else T
    given = {"hidden": H, "weight": W, "targets": targets, "ref_logprobs": LP, "impl": "reference", **change}
    with pytest.raises(ValueError, match=message):
        preference_loss(**given)


@pytest.mark.parametrize(
    "cu_seqlens",
    [[0, 6], [1, 6, 12], [0, 8, 6, 12], [0], 12, [[0, 12]], [0.0, 6.0, 12.0], [0, 6, 13]],
    ids=str,
)
def test_bad_cu_seqlens(cu_seqlens: Any) -> None:
    with pytest.raises(ValueError, match=r"cu_seqlens must be \[S\+1\] integers that rise from 0 to T = 12"):
        preference_loss(
            H.reshape(12, 8), W, T.reshape(12), cu_seqlens=torch.tensor(cu_seqlens), ref_logprobs=LP, impl="reference"
        )


@pytest.mark.parametrize("budget", [0, -1.0, math.nan, "much"])
def test_a_memory_budget_is_a_positive_number(budget: Any) -> None:
    with pytest.raises(ValueError, match="memory budget must be a number of MiB > 0"):
        logprob.set_memory_budget_mib(budget, "cpu")
