"""What losses read beside a pair, one reference and labels: as training makes it, and the recipes that need it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers import encoded
from test_optimise import gradients, rows, settings, tiny
from tiny_runs import run_recipe, tiny_config

from tso_fast.config.checks import check
from tso_fast.errors import InputError
from tso_fast.files.rows import BadRows, read_candidates, read_pairs, read_verdicts
from tso_fast.files.run import Run
from tso_fast.losses import LOSSES
from tso_fast.matrix import ModelMatrix
from tso_fast.models.load import load_model, load_tokenizer
from tso_fast.models.policy import Policy
from tso_fast.models.tokens import encode_prompt
from tso_fast.training import optimise
from tso_fast.training.batches import EncodedPair, completion_lengths
from tso_fast.training.inputs import difference_marks
from tso_fast.training.reference import check_others, reference_logprobs, running_mean
from tso_fast.types import PairLogprobs, TokenLogprobs

CPU = torch.device("cpu")


def with_further(pairs: list[EncodedPair], num_extra: int) -> list[EncodedPair]:
    """Each with so many further sequences: of another pair, of its own chosen response, in other contexts."""
    out = []
    for i, pair in enumerate(pairs):
        other = pairs[i - 1]
        longer = (*pair.prompt, *pair.rejected)
        extra = (pair.prompt, other.chosen), (longer, pair.chosen), (longer, pair.rejected), (pair.prompt, pair.chosen)
        out.append(dataclasses.replace(pair, extra=extra[:num_extra]))
    return out


def token_logprobs(model: Any, context: tuple[int, ...], completion: tuple[int, ...]) -> torch.Tensor:
    ids = torch.tensor([context + completion])
    logprobs = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    return logprobs[len(context) - 1 :]


@pytest.mark.parametrize("loss", ["mrpo", "selm", "srpo", "bmc", "inverse_q", "sppo"])
def test_a_step_is_the_loss_of_what_the_pairs_hold(loss: str) -> None:
    """Against autograd through full logits, pair by pair; two processes with two passes each."""
    row, g = LOSSES[loss], torch.Generator().manual_seed(1)
    pairs = with_further(encoded(5), row.num_extra or 0)
    if "win_rates" in row.takes:
        pairs = [dataclasses.replace(pair, win_rates=(0.9, 0.1 + 0.1 * i)) for i, pair in enumerate(pairs)]
    lengths, each = completion_lengths(pairs), len(pairs[0].sequences)
    sequences = [sequence for pair in pairs for sequence in pair.sequences]
    reference = {sequence: -4 * torch.rand(len(sequence[1]), generator=g) for sequence in dict.fromkeys(sequences)}
    tokens = [reference[sequence] for sequence in sequences]
    sums = torch.stack([own.sum() for own in tokens]).reshape(-1, each)
    second = 0.9 * sums + 1
    values = [torch.randint(2, (length,), generator=g).float() for length in lengths]
    inputs: dict[str, Any] = {"ref_tokens": tokens} if row.token_term else {"ref_logprobs": sums}
    inputs |= {"ref2_logprobs": second} if "ref2_logprobs" in row.needs else {}
    inputs |= {"token_values": values} if "token_values" in row.needs else {}
    model, total = tiny(), torch.zeros(())
    for i, pair in enumerate(pairs):
        own = [token_logprobs(model, *sequence) for sequence in pair.sequences]
        of_tokens = [
            TokenLogprobs(logprobs=a, ref_logprobs=r, values=v)
            for a, r, v in zip(own, tokens[each * i :], values[each * i :], strict=False)
        ]
        terms = [row.terms(item).sum()[None] for item in of_tokens] if row.token_term else [None, None]
        found = PairLogprobs(
            chosen=own[0].sum()[None],
            rejected=own[1].sum()[None],
            ref_chosen=sums[i, :1],
            ref_rejected=sums[i, 1:2],
            num_chosen_tokens=torch.tensor([len(pair.chosen)]),
            num_rejected_tokens=torch.tensor([len(pair.rejected)]),
            soft_label=torch.tensor([pair.soft_label]),
            margin=torch.tensor([pair.margin]),
            win_rates=None if pair.win_rates is None else torch.tensor([pair.win_rates]),
            ref2_chosen=second[i, :1],
            ref2_rejected=second[i, 1:2],
            extra=torch.stack([item.sum() for item in own[2:]])[None] if each > 2 else None,
            ref_extra=sums[i : i + 1, 2:],
            chosen_terms=terms[0],
            rejected_terms=terms[1],
        )
        total = total + pair.scale * row(found)[0]
    total = total / sum(pair.scale for pair in pairs)
    want = torch.autograd.grad(total, list(model.parameters()))
    made = {"mrpo": "second_reference", "selm": "extra_from", "srpo": "revision_template", "sppo": "win_rates"}
    changes = {made.get(loss, "token_values"): "all" if loss == "sppo" else "differences"}
    got, means = gradients(pairs, inputs, 2, 2, 2, loss_type=loss, **changes)
    assert means["loss"] == pytest.approx(total.item(), rel=1e-5)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)  # labels are float32


@pytest.mark.parametrize("share_prompts", [False, True])
def test_log_probs_of_further_sequences(share_prompts: bool) -> None:
    """Two processes together have those of all sequences, whatever context they stand in; so do those of tokens."""
    pairs, model = with_further(encoded(5), 4), tiny().float()
    lengths = completion_lengths(pairs)
    share: dict[str, Any] = {"batch_size": 2, "pad_token_id": 0, "device": CPU, "world": 2, "impl": "auto"}
    share["share_prompts"] = share_prompts
    sums, tokens = torch.zeros(5, 6), torch.zeros(sum(lengths))
    for rank in range(2):
        sums += reference_logprobs(Policy(model), pairs, rank=rank, **share)
        tokens += reference_logprobs(Policy(model), pairs, rank=rank, per_token=True, **share)
    want = [token_logprobs(model, *sequence) for pair in pairs for sequence in pair.sequences]
    torch.testing.assert_close(tokens, torch.cat(want).detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums.flatten(), torch.stack([own.sum() for own in want]).detach(), rtol=1e-5, atol=1e-5)


def test_marks_are_the_tokens_that_the_other_response_lacks() -> None:
    (pair,) = encoded(1)
    pair = dataclasses.replace(pair, chosen=(5, 6, 7, 8, 2), rejected=(5, 9, 7, 2), extra=((pair.prompt, (4, 4)),))
    assert [marks.tolist() for marks in difference_marks([pair])] == [[0, 1, 0, 1, 0], [0, 1, 0, 0], [0, 0]]


# ---- a reference that follows the policy


@dataclasses.dataclass
class Seen:
    """The policy before each step, and the reference's log-probs that the step saw."""

    weights: list[list[torch.Tensor]] = dataclasses.field(default_factory=list)
    steps: list[list[int]] = dataclasses.field(default_factory=list)
    logprobs: list[torch.Tensor] = dataclasses.field(default_factory=list)


def follow(
    folder: Path, patch: pytest.MonkeyPatch, *, stop_at: int = 0, before: int = 0, **changes: Any
) -> tuple[Seen, Any, Any]:
    """Trains on 12 pairs, six steps an epoch, and gives what was seen, the final weights and the final mean."""
    config = settings(folder, per_device_train_batch_size=2, logging_steps=1, num_train_epochs=1, **changes)
    policy, seen, real = Policy(tiny().float()), Seen(), optimise.backward

    def backward(run: Any, step: Any, *rest: Any) -> None:
        seen.weights.append([p.detach().clone() for p in policy.parameters()])
        seen.steps.append(step.all_index)
        if "ref_logprobs" in run.inputs:
            seen.logprobs.append(run.inputs["ref_logprobs"][step.all_index].clone())
        if len(seen.steps) == stop_at:
            raise ZeroDivisionError
        real(run, step, *rest)

    patch.setattr(optimise, "backward", backward)
    accelerator = Accelerator(cpu=True)
    mean = running_mean(config, policy, None, accelerator)
    try:
        with Run.open(folder, {}, {}, {}) as run:
            optimise.optimise(
                policy, encoded(12), config, files=run.iteration(1), accelerator=accelerator, reference=None, mean=mean,
                pad_token_id=0, steps_before=before,
            )  # fmt: skip
    finally:
        patch.setattr(optimise, "backward", real)
    return seen, [p.detach() for p in policy.parameters()], mean


def sums_under(weights: list[torch.Tensor], pairs: list[EncodedPair]) -> torch.Tensor:
    model = tiny().float()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), weights, strict=True):
            parameter.copy_(value)
    return reference_logprobs(
        Policy(model), pairs, batch_size=8, pad_token_id=0, device=CPU, rank=0, world=1, impl="auto"
    )


@pytest.mark.parametrize("loss", ["dpo", "humanline"])
def test_a_reference_that_is_the_policy_every_other_step(
    loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, mean = follow(tmp_path, monkeypatch, ref_model_sync_steps=2, loss_type=loss)
    assert mean is None  # no weights are kept
    rewards = [abs(row["rewards/chosen"]) for row in rows(tmp_path)]
    assert max(rewards[0::2]) < 1e-6 < 1e-3 < max(rewards[1::2])


@pytest.mark.parametrize(("reference", "counted"), [("previous", 0), ("ema", 3)])
def test_a_reference_that_is_a_mean_over_steps(
    reference: str, counted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixed every second step, used from every fourth, after three in iterations before; the policy is not changed."""
    changes = {"ref_model_sync_steps": 4, "ref_model_mixup_steps": 2, "ref_model_mixup_alpha": 0.25}
    seen, last, mean = follow(tmp_path, monkeypatch, before=3, reference=reference, **changes)
    pairs, running = encoded(12), seen.weights[0]
    compared = running
    for number, (index, logprobs) in enumerate(zip(seen.steps, seen.logprobs, strict=True), start=1):
        want = sums_under(compared, [pairs[i] for i in index])
        torch.testing.assert_close(logprobs, want, rtol=1e-5, atol=1e-5)
        now = [*seen.weights, last][number]
        if (counted + number) % 2 == 0:
            running = [torch.lerp(a, b, 0.25) for a, b in zip(running, now, strict=True)]
        compared = running if (counted + number) % 4 == 0 else compared
    for own, want in zip(mean.weights.values(), running, strict=True):
        torch.testing.assert_close(own, want)


@pytest.mark.parametrize("changes", [{}, {"ref_model_mixup_alpha": 0.25, "ref_model_mixup_steps": 1}], ids=str)
def test_a_run_that_was_killed_goes_on_with_the_reference_that_it_had(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {"ref_model_sync_steps": 3, "save_steps": 4, **changes}
    whole, weights, mean = follow(tmp_path / "whole", monkeypatch, **common)
    with pytest.raises(ZeroDivisionError):
        follow(tmp_path / "cut", monkeypatch, stop_at=6, **common)  # two steps after the reference moved
    seen, again, same = follow(tmp_path / "cut", monkeypatch, **common)
    assert len(seen.steps) == 2
    assert torch.equal(seen.logprobs[-1], whole.logprobs[-1])
    assert all(torch.equal(a, b) for a, b in zip(again, weights, strict=True))
    if mean is not None:
        assert all(torch.equal(same.weights[name], value) for name, value in mean.weights.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "initial", "ref_model_sync_steps": 2}, "ref_model_sync_steps: reference 'initial' never"),
        ({"ref_model_mixup_steps": 2}, "ref_model_mixup_steps: it has no effect"),
        ({"ref_model_sync_steps": 4, "ref_model_mixup_steps": 2}, "ref_model_mixup_steps: it has no effect"),
        (
            {"reference": "ema", "ref_model_sync_steps": 2, "ref_model_mixup_steps": 3},
            "ref_model_mixup_steps: got 3, expected at most ref_model_sync_steps, 2",
        ),
        (
            {"peft": "lora", "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5},
            "ref_model_mixup_alpha: the mean of two adapters",
        ),
        ({"token_values": "rewards"}, "token_reward_cell: it goes with token_values 'rewards'"),
        (
            {"token_values": "rewards", "token_reward_cell": "m", "ref_model_sync_steps": 2},
            "ref_model_sync_steps: rewards of tokens",
        ),
        ({"revision_template": "{prompt}"}, "revision_template: got '{prompt}', expected {response}"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check(settings(**changes))


# ---- recipes


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


class Made:
    """What training made of the pairs of each iteration."""

    def __init__(self) -> None:
        self.inputs: list[dict[str, Any]] = []
        self.pairs: list[list[EncodedPair]] = []


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    found, real = Made(), optimise.make_inputs

    def make_inputs(loss: Any, pairs: Any, *rest: Any) -> Any:
        inputs, logprobs = real(loss, pairs, *rest)
        found.inputs.append(inputs)
        found.pairs.append(pairs)
        return inputs, logprobs

    monkeypatch.setattr(optimise, "make_inputs", make_inputs)
    return found


def cell_model(name: str) -> Any:
    (path,) = [cell.path for cell in tiny_config(Path()).cells if Path(cell.path).name == name]
    return load_model(Path(path), dtype="float32", attn_implementation="sdpa", device="cpu")


def first_row(run: Run) -> dict[str, Any]:
    return rows(run.folder)[0]


def test_win_rates_are_those_of_the_policys_samples(tmp_path: Path, store: Path) -> None:
    """SPO's and SPPO's: over the others, and over all; the first loss is that of log-ratios of 0."""
    runs = {
        name: run_recipe(name, tmp_path / name, store=store, num_iterations=1, evidence="consensus")
        for name in ("spo_minimax", "sppo")
    }
    for name, run in runs.items():
        files = run.iteration(1)
        candidates = read_candidates(files.responses, BadRows())
        score = {(v.prompt_id, v.response): v.score for v in read_verdicts(files.verdicts, candidates, BadRows())}
        places = {(c.prompt.id, r.model, r.sample): i for c in candidates for i, r in enumerate(c.responses)}
        of_prompt = {c.prompt.id: [score[c.prompt.id, i] for i in range(len(c.responses))] for c in candidates}
        for pair in read_pairs(files.pairs, BadRows()):
            assert {pair.chosen.model, pair.rejected.model} <= {"m.v2", "human"}
            scores = of_prompt[pair.prompt.id]
            for rate, side in zip(pair.win_rates or (), (pair.chosen, pair.rejected), strict=True):
                own = scores[places[pair.prompt.id, side.model, side.sample]]
                wins = sum((own > other) + (own == other) / 2 for other in scores)
                want = (wins - 0.5) / (len(scores) - 1) if name == "spo_minimax" else wins / len(scores)
                assert rate == pytest.approx(want, abs=1e-6)
    assert first_row(runs["spo_minimax"])["loss"] > first_row(runs["sppo"])["loss"] > 1000


def test_mrpo_merges_the_policy_before_and_the_first_one(tmp_path: Path, store: Path, made: Made) -> None:
    run_recipe("mrpo", tmp_path, store=store, num_iterations=2)
    first, second = made.inputs
    assert torch.equal(first["ref2_logprobs"], first["ref_logprobs"])
    initial = Policy(cell_model("m.v2"))
    want = reference_logprobs(
        initial, made.pairs[1], batch_size=8, pad_token_id=0, device=CPU, rank=0, world=1, impl="auto"
    )
    torch.testing.assert_close(second["ref2_logprobs"], want, rtol=1e-4, atol=1e-4)
    assert (second["ref_logprobs"] - want).abs().max() > 1e-3


def test_selm_leads_away_from_the_greedy_response(tmp_path: Path, store: Path, made: Made) -> None:
    run = run_recipe("selm", tmp_path, store=store, num_iterations=1)
    pairs = read_pairs(run.iteration(1).pairs, BadRows())
    model, tokenizer = cell_model("m.v2"), load_tokenizer(Path(tiny_config(Path()).cells[0].path))
    for pair in pairs[:4]:
        (greedy,) = pair.extra
        context = encode_prompt(tokenizer, pair.prompt)
        for token in greedy.token_ids or ():
            logits = model(torch.tensor([context])).logits[0, -1]
            assert logits[token] >= logits.max() - 1e-4
            context = (*context, token)
    assert "greedy" in {side.model for pair in pairs for side in (pair.chosen, pair.rejected)}  # it takes part
    assert made.inputs[0]["ref_logprobs"].shape == (len(pairs), 3)
    assert first_row(run)["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_srpo_puts_each_response_after_the_other_and_itself(tmp_path: Path, store: Path, made: Made) -> None:
    run = run_recipe("srpo", tmp_path, store=store)
    (pairs,) = made.pairs
    pair = pairs[0]
    (after_w, l1), (after_l, w1), (same_w, w2), (same_l, l2) = pair.extra
    assert (l1, w1, w2, l2) == (pair.rejected, pair.chosen, pair.chosen, pair.rejected)
    assert (after_w, after_l) == (same_w, same_l)
    tokenizer = load_tokenizer(Path(tiny_config(Path()).cells[0].path))
    first = read_pairs(run.iteration(1).pairs, BadRows())[0]
    for context, response in ((after_w, first.chosen), (after_l, first.rejected)):
        text = tokenizer.decode(context)
        assert first.prompt.text in text
        assert f"An answer: {response.text.strip()}\n\nA better one:" in text
    assert first_row(run)["loss"] == pytest.approx(0.25, abs=1e-3)  # all log-ratios are 0, and P is 1


def test_bmc_marks_what_chosen_and_rejected_do_not_share(tmp_path: Path, store: Path, made: Made) -> None:
    run = run_recipe("bmc", tmp_path, store=store, samplers=None, evidence_from=None)
    marks = made.inputs[0]["token_values"]
    for i, pair in enumerate(made.pairs[0]):
        shared = [
            [token for token, mark in zip(side, own.tolist(), strict=True) if not mark]
            for side, own in zip((pair.chosen, pair.rejected), marks[2 * i : 2 * i + 2], strict=True)
        ]
        assert shared[0] == shared[1]
    assert 0 < sum(own.sum() for own in marks) < sum(map(len, marks))
    assert first_row(run)["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_inverse_q_learns_the_log_ratios_of_the_largest_cell(tmp_path: Path, store: Path, made: Made) -> None:
    run = run_recipe("inverse_q", tmp_path, store=store, policy="s.v2", num_train_epochs=4)
    pair, rewards = made.pairs[0][0], made.inputs[0]["token_values"][0]
    with torch.no_grad():
        large, own = (token_logprobs(cell_model(name), pair.prompt, pair.chosen) for name in ("m.v2", "s.v2"))
    torch.testing.assert_close(rewards, 0.1 * (large - own), rtol=1e-3, atol=1e-4)
    losses = [row["loss"] for row in rows(run.folder)]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_names_of_other_weights() -> None:
    base = tiny_config(Path())
    matrix = ModelMatrix(base.cells, "s.v2")
    for name, message in (("m.v3", r"got 'm.v3'; did you mean 'm.v\d'\?"), ("s.v2", "'s.v2' is the policy, which")):
        with pytest.raises(InputError, match=f"token_reward_cell: {message}"):
            check_others(dataclasses.replace(base, token_values="rewards", token_reward_cell=name), matrix)
    check_others(dataclasses.replace(base, second_reference="initial", token_reward_cell="largest"), matrix)


def test_a_mean_over_steps_goes_on_in_the_next_iteration(tmp_path: Path, store: Path, made: Made) -> None:
    """Any recipe with such a reference; the mean is saved after an iteration, and the next one compares with it."""
    follow = {"reference": "ema", "ref_model_sync_steps": 2, "ref_model_mixup_steps": 1, "ref_model_mixup_alpha": 0.5}
    run = run_recipe("dpo", tmp_path, store=store, num_iterations=2, num_train_epochs=2, **follow)
    mean = Policy(load_model(run.iteration(1).reference, dtype="float32", attn_implementation="sdpa", device="cpu"))
    policy = load_model(run.iteration(1).policy, dtype="float32", attn_implementation="sdpa", device="cpu")
    assert not all(torch.equal(a, b) for a, b in zip(mean.model.parameters(), policy.parameters(), strict=True))
    assert made.inputs[1]["ref_logprobs"].any()
    assert run.iteration(1).reference.is_dir()
