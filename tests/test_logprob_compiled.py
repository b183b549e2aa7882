"""The ops inside ``torch.compile``: one node of a whole graph, and the numbers of the eager ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.library import opcheck
from transformers import LlamaConfig, LlamaForCausalLM

from tso_fast import LOSSES, linear_logprobs, preference_loss

pytestmark = pytest.mark.slow
S, L, D, V = 4, 9, 16, 67


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    targets = torch.randint(V, (S, L), generator=g)
    targets[:, :2] = -100
    return {
        "hidden": torch.randn(S, L, D, generator=g).to(dtype).requires_grad_(),
        "weight": (torch.randn(V, D, generator=g) / 2).to(dtype).requires_grad_(),
        "targets": targets,
        "bias": torch.randn(V, generator=g).to(dtype).requires_grad_(),
    }


@pytest.mark.parametrize(("impl", "kind"), [("cpu", "padded"), ("reference", "packed"), ("cpu", "frozen")])
def test_what_torch_asks_of_an_operator(impl: str, kind: str) -> None:
    """Schema, autograd registration, fake kernel and tracing with dynamic shapes, by torch's own checks."""
    given = inputs()
    needs = [kind != "frozen", True, kind == "padded"]
    if kind == "packed":
        lengths = torch.tensor([0, 9, 14, 27, 36])
        given["hidden"] = given["hidden"].detach().flatten(0, 1).requires_grad_()
        given |= {"targets": given["targets"].flatten(), "cu_seqlens": lengths}
        given["pairs"] = torch.tensor([[0, 1], [3, 2], [0, 2]])
    rows, head = (given["hidden"], given["weight"], given["targets"]), (5.0, 1.2, -100, impl)
    of_pairs = given.get("pairs"), given.get("cu_seqlens"), torch.full((S,), -20.0), None, None, None, given["bias"]
    loss = "dual_clip", "beta,clip_chosen", [0.2, 0.4], None, None, None, None, None, None, None, None
    opcheck(torch.ops.tso_fast.preference_loss.default, (*rows, *of_pairs, *loss, *head, "", "", needs))
    opcheck(torch.ops.tso_fast.linear_logprobs.default, (*rows, given["bias"], *head, needs))


class Model(torch.nn.Module):
    """A surrounding model whose last layer's output the ops take."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = torch.nn.Linear(D, D, dtype=dtype)

    def forward(self, hidden: torch.Tensor, head: dict[str, Any], options: dict[str, Any]) -> Any:
        hidden = self.layer(hidden).tanh()
        out = preference_loss(hidden, **head, ref_hidden=hidden.detach() * 1.1, **options)
        tokens = linear_logprobs(hidden, head["weight"], head["targets"], softcap=5.0)
        return 1.5 * out.loss + 0.1 * tokens.mean(), out


def run(model: Any, dtype: torch.dtype, options: dict[str, Any]) -> list[torch.Tensor]:
    given = inputs(dtype)
    hidden = given.pop("hidden")
    total, out = model(hidden, given, options)
    parameters = [hidden, given["weight"], given["bias"], *model.parameters()]
    return [total.detach(), *(x.detach() for x in vars(out).values()), *torch.autograd.grad(total, parameters)]


# One of them through inductor, the others without its C++ compiler.
@pytest.mark.parametrize(
    ("backend", "dtype", "options"),
    [
        ("inductor", torch.float32, {"loss": "dual_clip", "beta": 0.2, "clip_chosen": 0.3}),
        ("aot_eager", torch.bfloat16, {"loss": "dpo", "scale": torch.tensor([1.0, 2.0])}),
        ("aot_eager", torch.float32, {"loss": "sft", "impl": "reference"}),
        ("aot_eager", torch.float32, {"loss": "bmc", "delta": 2.0, "token_values": torch.arange(S * L).view(S, L) % 2}),
        ("aot_eager", torch.float32, {"loss": "selm", "pairs": torch.tensor([[0, 1, 2], [3, 2, 3]])}),
    ],
)
def test_a_whole_model_compiles(backend: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    torch.compiler.reset()
    model = Model(dtype)
    want = run(model, dtype, options)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for got, exact in zip(run(compiled, dtype, options), want, strict=True):
        torch.testing.assert_close(got, exact, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


class Step(torch.nn.Module):
    """A step on someone else's model: a Llama of transformers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=V, hidden_size=D, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=16, initializer_range=0.3,
        )  # fmt: skip
        self.llama: Any = LlamaForCausalLM(config)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor, ref_logprobs: torch.Tensor) -> Any:
        hidden = self.llama.model(tokens, use_cache=False).last_hidden_state
        weight = self.llama.lm_head.weight
        out = preference_loss(hidden, weight, targets, ref_logprobs=ref_logprobs, loss="dual_clip", beta=0.02)
        return out.loss, linear_logprobs(hidden, weight, targets)


def test_a_model_of_transformers_compiles_and_exports_without_a_break() -> None:
    torch.compiler.reset()
    step = Step()
    targets = inputs()["targets"]
    given = targets.clamp(min=0), targets, torch.full((S,), -20.0)
    found = []
    for model in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss, tokens = model(*given)
        found.append([loss.detach(), tokens.detach(), *torch.autograd.grad(loss, list(step.parameters()))])
    for got, want in zip(*reversed(found), strict=True):
        torch.testing.assert_close(got, want)
    length = torch.export.Dim("length", min=4, max=16)
    shapes = {"tokens": {1: length}, "targets": {1: length}, "ref_logprobs": {}}
    exported = torch.export.export(step, given, dynamic_shapes=shapes).module()
    shorter = given[0][:, :7], given[1][:, :7], given[2]
    for got, want in zip(exported(*shorter), step(*shorter), strict=True):
        torch.testing.assert_close(got, want)


def test_other_shapes_and_no_gradients_compile() -> None:
    torch.compiler.reset()
    compiled = torch.compile(
        lambda hidden, weight, targets: preference_loss(hidden, weight, targets, ref_logprobs=hidden.new_zeros(S)).loss,
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    given = inputs()
    for length in (9, 7, 5):
        cut = given["hidden"][:, :length], given["weight"], given["targets"][:, :length]
        with torch.no_grad():
            out = compiled(*cut)
            want = preference_loss(*cut, ref_logprobs=torch.zeros(S)).loss
        assert not out.requires_grad
        torch.testing.assert_close(out, want)


def test_what_is_refused_inside_a_compiled_function() -> None:
    torch.compiler.reset()
    given = inputs()

    def loss(**options: Any) -> torch.Tensor:
        return preference_loss(**given, ref_logprobs=torch.zeros(S), **options).loss

    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="unknown loss 'kto'"):
        compiled(loss="kto")
    with pytest.raises(Exception, match="the loss must be a name: a function cannot be part of an operator"):
        compiled(loss=LOSSES["dpo"])
    given["targets"] = given["targets"] + V  # what only the numbers show is said when the operator runs
    with pytest.raises(ValueError, match="expected 0 <= target < 67"):
        compiled(loss="dpo")
