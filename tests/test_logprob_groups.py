"""``preference_loss`` on several ranks: the head's rows or a sequence's tokens apart, against one rank with all of it.

Ranks are forked from this process and talk by gloo. Each works through all cases of its world and leaves what it found
in a file, so that processes are started twice and not once a case.
"""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import itertools
import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tso_fast import logprob, preference_loss
from tso_fast.types import PairLogprobs

pytestmark = pytest.mark.slow
HAS_INTERPRETER = importlib.util.find_spec("triton") is not None and not torch.cuda.is_available()
IMPLS = ["reference", "cpu", *(["triton"] if HAS_INTERPRETER else [])]
V, D, S, L = 67, 8, 6, 4
VOCAB_PARTS = {2: [20, 47], 4: [1, 20, 30, 16]}
TOKEN_PARTS = {2: [1, 3], 4: [1, 0, 2, 1]}
PAIRS = torch.tensor([[0, 3], [1, 4], [2, 5], [0, 4]])


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments of a step; one token's class is so unlikely that its row is done again."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return (std * torch.randn(shape, generator=g)).to(dtype)

    hidden, weight = normal(S, L, D), normal(V, D, std=0.9)
    hidden[2, 1] *= 30
    targets = torch.randint(V, (S, L), generator=g)
    targets[2, 1] = (hidden[2, 1].double() @ weight.double().T).argmin()
    targets[3, 2:] = -100
    return {
        "hidden": hidden,
        "weight": weight,
        "targets": targets,
        "bias": normal(V),
        "pairs": PAIRS,
        "ref_hidden": hidden + 0.1 * normal(S, L, D),
        "ref_weight": weight + 0.1 * normal(V, D),
        "ref_bias": normal(V),
    }


def mean_margin(pairs: PairLogprobs) -> torch.Tensor:
    """A loss of the user's that reads token counts."""
    return pairs.rejected / pairs.num_rejected_tokens - pairs.chosen / pairs.num_chosen_tokens


SCALARS = {
    "scale": torch.tensor([1.0, 0.0, 2.0, 0.5]),
    "soft_label": torch.tensor([1.0, 0.9, 0.8, 0.7]),
    "margin": torch.tensor([0.0, 0.1, 0.2, 0.0]),
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {"loss": "dpo"},
    "bfloat16": {"dtype": torch.bfloat16, "loss": "dpo"},
    "everything": {
        "clip_chosen": 0.05,
        "clip_rejected": 0.02,
        "softcap": 6.0,
        "temperature": 1.3,
        **SCALARS,
        "token_weights": torch.linspace(0.5, 1.5, S * L).view(S, L),
    },
    "chunks": {"loss": "dpo", "rows": 16},
    "cached": {"loss": mean_margin, "ref_logprobs": torch.linspace(-30, -20, S)},
    "frozen": {"loss": "dpo", "frozen": ["weight", "bias"]},
    "head only": {"loss": "dpo", "frozen": ["hidden"]},
    "tokens": {
        "loss": "bmc",
        "token_values": (torch.arange(S * L) % 3 == 0).view(S, L),
        "token_weights": torch.linspace(0.5, 1.5, S * L).view(S, L),
    },
    "third sequence": {
        "loss": "selm",
        "pairs": torch.tensor([[0, 3, 4], [1, 4, 1], [2, 5, 0]]),
        "ref_token_logprobs": torch.linspace(-8, -4, S * L).view(S, L),
    },
}


INTERPRETED = {2: ("bfloat16", "everything", "chunks"), 4: ("everything",)}
"""The interpreter is slow, and on a GPU nothing here needs several of them."""


def runs(ranks: int) -> list[tuple[str, str]]:
    return [(impl, case) for impl in IMPLS for case in CASES if impl != "triton" or case in INTERPRETED[ranks]]


each_run = pytest.mark.parametrize(("impl", "case"), runs(2))


def step(
    case: str, impl: str, change: Callable[[dict[str, Any]], dict[str, Any]] = lambda x: x
) -> dict[str, torch.Tensor]:
    """The output and the gradients of a case; ``change`` turns its arguments into those of a rank."""
    options = dict(CASES[case])
    dtype, frozen, rows = options.pop("dtype", torch.float32), options.pop("frozen", []), options.pop("rows", None)
    given = inputs(dtype) | options
    if options.keys() & {"ref_logprobs", "ref_token_logprobs"}:
        given = {name: x for name, x in given.items() if name not in ("ref_hidden", "ref_weight", "ref_bias")}
    given = change(given)
    leaves = {name: given[name].clone().requires_grad_() for name in ("hidden", "weight", "bias") if name not in frozen}
    budget = None if rows is None else rows * V * 4 / 2**20
    logprob.set_memory_budget_mib(budget, "cpu")
    try:
        out = preference_loss(**given | leaves, impl=impl)
    finally:
        logprob.set_memory_budget_mib(None, "cpu")
    out.loss.backward()
    return {name: x.detach() for name, x in vars(out).items()} | {
        f"d{name}": leaf.grad for name, leaf in leaves.items()
    }


def vocab_part(ranks: int, rank: int, group: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    ends = list(itertools.accumulate(VOCAB_PARTS[ranks], initial=0))
    mine = slice(ends[rank], ends[rank + 1])

    def change(given: dict[str, Any]) -> dict[str, Any]:
        names = ("weight", "bias", "ref_weight", "ref_bias")
        return given | {name: given[name][mine] for name in names if name in given} | {"vocab_group": group}

    return change


def token_part(ranks: int, rank: int, group: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    ends = list(itertools.accumulate(TOKEN_PARTS[ranks], initial=0))
    mine = slice(ends[rank], ends[rank + 1])

    def change(given: dict[str, Any]) -> dict[str, Any]:
        names = ("hidden", "targets", "ref_hidden", "token_weights", "token_values", "ref_token_logprobs")
        return given | {name: given[name][:, mine] for name in names if name in given} | {"sequence_group": group}

    return change


def refused(change: Callable[[dict[str, Any]], dict[str, Any]], **wrong: Any) -> str:
    """What a call with wrong arguments on this rank says."""
    try:
        preference_loss(**change(inputs()) | wrong, loss="dpo", impl="cpu")
    except ValueError as error:
        return str(error)
    return "nothing"


def work(rank: int, ranks: int, folder: Path) -> dict[str, Any]:
    """Everything that a rank does, by name."""
    found: dict[str, Any] = {}
    world = dist.group.WORLD
    by_vocab, by_token = vocab_part(ranks, rank, world), token_part(ranks, rank, world)
    for impl, case in runs(ranks):
        found[f"vocab {impl} {case}"] = step(case, impl, by_vocab)
        found[f"tokens {impl} {case}"] = step(case, impl, by_token)
    if ranks == 4:  # both: ranks 0, 1 and 2, 3 share a head, 0, 2 and 1, 3 share sequences
        heads = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        sequences = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        for impl in IMPLS:
            head, tokens = vocab_part(2, rank % 2, heads[rank // 2]), token_part(2, rank // 2, sequences[rank % 2])
            found[f"both {impl}"] = step("everything", impl, lambda given, a=head, b=tokens: a(b(given)))
        found["outsider"] = refused(by_vocab, vocab_group=heads[1 - rank // 2])
        return found
    targets = inputs()["targets"].clone()
    targets[0, 0] = (targets[0, 0] + rank) % V
    found["targets"] = refused(by_vocab, targets=targets)
    found["scale"] = refused(by_token, scale=torch.ones(4) + rank)
    found["empty"] = refused(by_token, targets=by_token(inputs())["targets"].index_fill(0, torch.tensor(5), -100))
    found["outside"] = refused(by_vocab, targets=targets.fill_(V))
    found["name"] = refused(by_vocab, vocab_group="world")
    found["reference"] = refused(by_vocab, ref_weight=torch.zeros(V, D), ref_bias=None)
    compiled = torch.compile(lambda **given: preference_loss(**given).loss, fullgraph=True, backend="aot_eager")
    given = by_vocab(inputs())
    given["weight"].requires_grad_()
    compiled(**given, loss="dpo", impl="cpu").backward()
    found["compiled"] = given["weight"].grad
    return found


def child(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=ranks,
            timeout=datetime.timedelta(seconds=180),
        )
        found: dict[str, Any] = work(rank, ranks, folder)
    except BaseException:
        found = {"error": traceback.format_exc()}
    torch.save(found, folder / f"{rank}.part")
    (folder / f"{rank}.part").replace(folder / f"{rank}.pt")
    os._exit(0)  # no clean-up of what belongs to the process this was forked from


@pytest.fixture(scope="module", params=[2, 4])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of 2 or 4 ranks found."""
    folder, context = tmp_path_factory.mktemp("ranks"), multiprocessing.get_context("fork")
    for name in ("torch._dynamo", "torch._functorch.aot_autograd", "torch.fx.experimental.symbolic_shapes"):
        importlib.import_module(name)  # here, for the ranks would do so one by one
    processes = [context.Process(target=child, args=(rank, request.param, folder)) for rank in range(request.param)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        process.kill()
    found = [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]
    for rank in found:
        assert "error" not in rank, rank["error"]
    return found


ALONE: dict[tuple[str, str], dict[str, torch.Tensor]] = {}


def alone(case: str, impl: str) -> dict[str, torch.Tensor]:
    if (case, impl) not in ALONE:
        ALONE[case, impl] = step(case, impl)
    return ALONE[case, impl]


def assert_like(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    tolerance = {torch.bfloat16: 0.02, torch.float32: 2e-5}.get(got.dtype, 0)
    scale = want.abs().max().item() if want.is_floating_point() else 1
    torch.testing.assert_close(
        got, want, rtol=tolerance, atol=tolerance * max(scale, 1e-6), msg=lambda m: f"{name}: {m}"
    )


OUTPUTS = ["loss", "losses", "logprobs", "ref_logprobs", "num_tokens", "chosen_rewards", "rejected_rewards", "clipped"]


@each_run
def test_a_head_in_parts(world: list[dict[str, Any]], impl: str, case: str) -> None:
    if (impl, case) not in runs(len(world)):
        pytest.skip("two ranks do, the interpreter is slow")
    ranks, one = [rank[f"vocab {impl} {case}"] for rank in world], alone(case, impl)
    assert one.keys() == ranks[0].keys()
    for name in OUTPUTS:
        for rank in ranks:
            assert torch.equal(rank[name], ranks[0][name])  # the same bits, or the ranks would drift apart
        assert_like(name, ranks[0][name], one[name])
    if "dhidden" in one:
        assert all(torch.equal(rank["dhidden"], ranks[0]["dhidden"]) for rank in ranks)
        assert_like("dhidden", ranks[0]["dhidden"], one["dhidden"])
    for name in ("dweight", "dbias"):
        if name in one:
            assert_like(name, torch.cat([rank[name] for rank in ranks]), one[name])


@each_run
def test_sequences_in_parts(world: list[dict[str, Any]], impl: str, case: str) -> None:
    if (impl, case) not in runs(len(world)):
        pytest.skip("two ranks do, the interpreter is slow")
    ranks, one = [rank[f"tokens {impl} {case}"] for rank in world], alone(case, impl)
    for name in OUTPUTS:
        assert all(torch.equal(rank[name], ranks[0][name]) for rank in ranks)
        assert_like(name, ranks[0][name], one[name])
    if "dhidden" in one:
        assert_like("dhidden", torch.cat([rank["dhidden"] for rank in ranks], 1), one["dhidden"])
    for name in ("dweight", "dbias"):
        if name in one:
            assert_like(name, torch.stack([rank[name] for rank in ranks]).sum(0), one[name])


@pytest.mark.parametrize("impl", IMPLS)
def test_both_in_parts(world: list[dict[str, Any]], impl: str) -> None:
    if len(world) != 4:
        pytest.skip("two groups of two need four ranks")
    ranks, one = [rank[f"both {impl}"] for rank in world], alone("everything", impl)
    for name in OUTPUTS:
        assert_like(name, ranks[3][name], one[name])
    assert_like("dhidden", torch.cat([ranks[0]["dhidden"], ranks[2]["dhidden"]], 1), one["dhidden"])
    of_heads = [ranks[0]["dweight"] + ranks[2]["dweight"], ranks[1]["dweight"] + ranks[3]["dweight"]]
    assert_like("dweight", torch.cat(of_heads), one["dweight"])


def test_what_is_refused(world: list[dict[str, Any]]) -> None:
    if len(world) == 4:
        assert all("this rank is not in vocab_group" in rank["outsider"] for rank in world)
        return
    for rank in world:
        assert rank["targets"].startswith("the ranks of vocab_group disagree on targets: rank 0 has ")
        assert rank["scale"].startswith("the ranks of sequence_group disagree on scale: rank 0 has ")
        assert rank["empty"].startswith("sequence 5 belongs to a pair but has no completion token")
        assert rank["outside"].startswith(f"targets[0, 0] is {V}; expected 0 <= target < {V} or")
        assert rank["name"].startswith(
            "vocab_group must be a torch.distributed process group, got str; of a DeviceMesh"
        )
        assert rank["reference"].startswith("with vocab_group ref_weight must hold the same rows of its head as weight")


def test_a_head_in_parts_inside_a_compiled_function(world: list[dict[str, Any]]) -> None:
    if len(world) == 4:
        pytest.skip("two ranks do")
    got = torch.cat([rank["compiled"] for rank in world])
    assert_like("dweight", got, alone("plain", "cpu")["dweight"])
