"""The reference: which weights, their log-probs however they are shared out, and the running mean."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from tso_fast.config.settings import CellConfig, TrainConfig
from tso_fast.files.run import Run
from tso_fast.models.load import load_model, save_model
from tso_fast.models.policy import Policy
from tso_fast.quickstart.build import Recipe, make_tokenizer
from tso_fast.training.batches import EncodedPair, completion_lengths
from tso_fast.training.reference import reference_logprobs, reference_weights, save_ema
from tso_fast.types import Weights

CPU = torch.device("cpu")


def tiny(seed: int, *, tied: bool = False) -> Any:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.3,
            tie_word_embeddings=tied,
        )
    ).eval()


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(output_dir="-", prompts="-", cells=[CellConfig(path="-")], **changes)


def test_which_weights_are_the_reference() -> None:
    new, old = Weights(Path("new"), Path("new")), Weights(Path("adapter"), Path("base"))
    matrix: Any = SimpleNamespace(policy=SimpleNamespace(weights=new), initial=SimpleNamespace(weights=old))
    found = {
        kind: [reference_weights(settings(reference=kind), matrix, Run(Path("run"), {}, None), t) for t in (1, 2, 3)]
        for kind in ("previous", "initial", "ema")
    }
    assert found["previous"] == [new] * 3
    assert found["initial"] == [new, old, old]
    means = [Weights(Path(f"run/iter-{t}/reference"), Path(f"run/iter-{t}/reference")) for t in (1, 2)]
    assert found["ema"] == [new, *means]


@pytest.mark.parametrize(("batch_size", "world"), [(32, 1), (4, 1), (1, 1), (3, 2), (2, 4), (1, 16)])
def test_reference_log_probs_do_not_depend_on_how_they_are_shared_out(batch_size: int, world: int) -> None:
    g = torch.Generator().manual_seed(0)

    def tokens(most: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 61, (int(torch.randint(1, most, (), generator=g)),), generator=g).tolist())

    pairs = [
        EncodedPair(
            prompt=tokens(9),
            chosen=tokens(8),
            rejected=tokens(12),
            scale=0.0,
            soft_label=1.0,
            margin=0.0,
            prompt_id=str(i),
        )
        for i in range(11)
    ]
    model = tiny(0)
    passes = []
    lengths = completion_lengths(pairs)
    total, flat = torch.zeros(11, 2), torch.zeros(sum(lengths))
    for rank in range(world):
        done: list[int] = []
        share: dict[str, Any] = {
            "batch_size": batch_size,
            "pad_token_id": 0,
            "device": CPU,
            "rank": rank,
            "world": world,
            "impl": "auto",
        }
        total += reference_logprobs(Policy(model), pairs, advance=done.append, **share)
        flat += reference_logprobs(Policy(model), pairs, per_token=True, **share)
        passes.append(len(done))
    assert len(set(passes)) == 1  # wrapped models need as many forward passes on every process
    for i, pair in enumerate(pairs):
        for side, completion in enumerate((pair.chosen, pair.rejected)):
            ids = torch.tensor([pair.prompt + completion])
            with torch.no_grad():
                logprobs = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
            want = logprobs[len(pair.prompt) - 1 :, 0]
            torch.testing.assert_close(total[i, side], want.sum(), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(flat.split(lengths)[2 * i + side], want, rtol=1e-5, atol=1e-5)
    assert not total.requires_grad


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("alpha", "share"), [(None, 0.6), (0.25, 0.25), (1.0, 1.0)])
def test_running_mean(tied: bool, alpha: float | None, share: float, tmp_path: Path) -> None:
    tokenizer = make_tokenizer([("a b", "1")] * 3, Recipe(seed=0))
    old, new = tiny(1, tied=tied), tiny(2, tied=tied)
    save_model(old, tokenizer, tmp_path / "old")
    config = settings(reference="ema", ref_model_mixup_alpha=alpha)
    before = Weights(tmp_path / "old", tmp_path / "old")
    save_ema(config, Policy(new), tokenizer, before, tmp_path / "mean", Accelerator(cpu=True))
    mean = load_model(tmp_path / "mean", dtype="float32", attn_implementation="sdpa", device="cpu")
    for (name, a), b, m in zip(old.named_parameters(), new.parameters(), mean.parameters(), strict=True):
        torch.testing.assert_close(m, (1 - share) * a + share * b, msg=name)
    assert share < 1 or all(torch.equal(b, m) for b, m in zip(new.parameters(), mean.parameters(), strict=True))
