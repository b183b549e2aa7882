"""Trains the quickstart's model matrix, 2 sizes x 3 versions, by supervised training, and caches it between runs.

Versions are checkpoints after 35 %, 60 % and all of the training. Where a task has judges, each is a further cell: the
last version of a size, trained by DPO on pairs that somebody labelled who errs.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, get_scheduler

from tso_fast.config.settings import CellConfig, TrainConfig
from tso_fast.files.atomic import atomic_folder, write_json, write_jsonl
from tso_fast.logprob import linear_logprobs
from tso_fast.models.load import load_model, save_model
from tso_fast.models.policy import Policy
from tso_fast.models.tokens import IGNORE, encode_prompt, encode_response, pad_sequences
from tso_fast.progress import console, progress_bar
from tso_fast.quickstart import skills, writing
from tso_fast.quickstart.task import Exercise, Score, make_exercises
from tso_fast.seeds import seed_of
from tso_fast.training.batches import collate, encode_pairs
from tso_fast.training.reference import reference_logprobs
from tso_fast.types import PreferencePair, Prompt, Response

TASKS = {"skills": skills.TASK, "writing": writing.TASK}
"""By name."""

# Spaces and newlines belong to the template: the question ends with a newline, the answer starts with a space.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] | trim }}{{ eos_token }}"
    "{% else %}{{ m['content'] }}\n{% endif %}{% endfor %}"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """Shape of a tiny Llama and length of its training."""

    hidden: int
    layers: int
    ffn: int
    steps: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeTraining:
    """How the judges of a task are trained."""

    size: str = "s"
    """Whose last version they start from."""
    pairs: int = 3200
    wrong: float = 0.15
    """Share of the pairs whose label is wrong."""
    steps: int = 150
    batch_size: int = 32
    learning_rate: float = 5e-4
    beta: float = 0.3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that the matrix and its data depend on; the key of the cache."""

    seed: int
    task: str = "skills"
    sizes: dict[str, Size] = dataclasses.field(
        default_factory=lambda: {
            "s": Size(hidden=96, layers=3, ffn=256, steps=800),
            "m": Size(hidden=128, layers=4, ffn=352, steps=1200),
        }
    )
    versions: tuple[float, ...] = (0.35, 0.6, 1.0)
    demonstrations: int = 16000
    batch_size: int = 32
    learning_rate: float = 3e-3
    vocab_size: int = 384
    context: int = 128
    prompts: int = 2880
    human_share: float = 0.1
    held_out: int = 600
    development: int = 600
    judge_training: JudgeTraining = JudgeTraining()
    revision: int = 2
    """Increase it when the code below gives other results for the same numbers."""

    @property
    def key(self) -> str:
        r = random.Random("recipe")
        exercises = make_exercises(TASKS[self.task], 60, "recipe")
        shown = json.dumps([[e.kind, e.prompt, e.known, e.demonstrate(r)] for e in exercises])
        recipe = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256((recipe + shown + CHAT_TEMPLATE).encode()).hexdigest()[:16]


RECIPES = {
    "skills": Recipe(seed=0),
    "writing": Recipe(
        seed=0,
        task="writing",
        sizes={
            "s": Size(hidden=64, layers=2, ffn=176, steps=700),
            "m": Size(hidden=96, layers=3, ffn=256, steps=900),
        },
        versions=(0.15, 0.4, 1.0),
        vocab_size=512,
        prompts=1200,
        held_out=400,
        development=400,
    ),
}
"""By task; ``dataclasses.replace`` gives another seed."""


def cache_folder() -> Path:
    """``TSO_FAST_CACHE``, else ``tso-fast`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TSO_FAST_CACHE") or Path(base) / "tso-fast")


def prepare(config: TrainConfig, recipe: Recipe, eval_set: str = "held_out") -> None:
    """Fills in cells, prompts and evaluation prompts of a quickstart configuration; builds the matrix if needed.

    Cells that only judge answer nothing, and are older than the others, so that none of them is the policy.

    Raises:
        OutputError: the cache cannot be written; ``TSO_FAST_CACHE`` can name another folder.
    """
    folder = build(recipe)
    config.cells = [
        CellConfig(path=str(folder / f"{size}.v{rank}"), version_rank=rank)
        for size in recipe.sizes
        for rank in range(1, len(recipe.versions) + 1)
    ]
    config.cells += [
        CellConfig(path=str(folder / name), version_rank=0, num_generations=0) for name in TASKS[recipe.task].judges
    ]
    config.prompts = str(folder / "prompts.jsonl")
    config.eval_prompts = str(folder / f"{eval_set}.jsonl")


def build(recipe: Recipe) -> Path:
    """Folder of the cells, their tokenizer and the data; built once per recipe."""
    folder = cache_folder() / "quickstart" / recipe.key
    if (folder / "recipe.json").exists():
        console.print(f"model matrix: from {folder}")
        return folder
    with atomic_folder(folder) as tmp:
        exercises = _exercises(recipe)
        _write_data(exercises, recipe, tmp)
        r = random.Random(f"demonstrations {recipe.seed}")
        texts = [(exercise.prompt, exercise.demonstrate(r)) for exercise in exercises["demonstrations"]]
        tokenizer = make_tokenizer(texts, recipe)
        examples = [_encode(tokenizer, prompt, answer) for prompt, answer in texts]
        for name, size in recipe.sizes.items():
            _train_size(name, size, examples, tokenizer, recipe, tmp)
        for name, score in TASKS[recipe.task].judges.items():
            _train_judge(name, score, exercises["demonstrations"], tokenizer, recipe, tmp)
        write_json(tmp / "recipe.json", dataclasses.asdict(recipe))
    return folder


def _exercises(recipe: Recipe) -> dict[str, list[Exercise]]:
    """Exercises by set; no prompt occurs twice, within a set or across sets."""
    counts = {
        "held_out": recipe.held_out,
        "development": recipe.development,
        "prompts": recipe.prompts,
        "demonstrations": recipe.demonstrations,
    }
    seen: set[str] = set()
    out = {}
    for name, count in counts.items():
        # The held-out and development sets are the same for every seed.
        seed = name if name in ("held_out", "development") else f"{name} {recipe.seed}"
        out[name] = make_exercises(TASKS[recipe.task], count, seed, seen)
        seen |= {exercise.prompt for exercise in out[name]}
    return out


def _write_data(exercises: dict[str, list[Exercise]], recipe: Recipe, folder: Path) -> None:
    r = random.Random(f"human {recipe.seed}")
    for name in ("prompts", "held_out", "development"):
        rows = []
        for i, exercise in enumerate(exercises[name]):
            row = {"id": f"{name}-{i:04d}-{exercise.kind}", "prompt": exercise.prompt, **exercise.known}
            if name == "prompts" and r.random() < recipe.human_share:
                row["human_response"] = exercise.respond(r)
            rows.append(row)
        write_jsonl(folder / f"{name}.jsonl", rows)


def make_tokenizer(texts: list[tuple[str, str]], recipe: Recipe) -> PreTrainedTokenizerFast:
    """Byte-pair tokenizer for the task's words; digits and single letters stay single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\d| ?[A-Za-z]+|[^\sA-Za-z\d]|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=["<pad>", "<eos>", "<bos>"],
        initial_alphabet=[*map(chr, range(33, 127)), "Ġ", "Ċ"],
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{question}\n {answer}" for question, answer in texts[:4000]), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=recipe.context,
    )


Example = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of prompt and answer."""


def _encode(tokenizer: Any, prompt: str, answer: str) -> Example:
    asked = Prompt(id="", prompt=prompt)
    return encode_prompt(tokenizer, asked), encode_response(tokenizer, asked, answer)


def _train_size(name: str, size: Size, examples: list[Example], tokenizer: Any, recipe: Recipe, folder: Path) -> None:
    """Trains one size on the demonstrations' answers, and saves a version at each mark."""
    torch.manual_seed(seed_of(recipe.seed, name))
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.hidden,
            intermediate_size=size.ffn,
            num_hidden_layers=size.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=recipe.context,
            tie_word_embeddings=True,
            initializer_range=0.04,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
    )
    policy = Policy(model)
    marks = {round(size.steps * share): f"{name}.v{i}" for i, share in enumerate(recipe.versions, start=1)}

    def save(step: int) -> None:
        if step in marks:
            save_model(model, tokenizer, folder / marks[step])

    _fit(
        f"model matrix: train {name} ({sum(p.numel() for p in model.parameters()) / 1e6:.2f} M)",
        model,
        lambda index: -_mean_logprob(policy, [examples[i] for i in index], tokenizer.pad_token_id),
        _batches(len(examples), recipe.batch_size, random.Random(f"order {recipe.seed}")),
        num_steps=size.steps,
        learning_rate=recipe.learning_rate,
        after_step=save,
    )


def _train_judge(
    name: str, score: Score, exercises: list[Exercise], tokenizer: Any, recipe: Recipe, folder: Path
) -> None:
    """Trains the last version of a size by DPO on pairs of demonstrations that ``score`` orders, not always rightly."""
    settings = recipe.judge_training
    model = load_model(
        folder / f"{settings.size}.v{len(recipe.versions)}", dtype="float32", attn_implementation="sdpa", device="cpu"
    )
    policy = Policy(model)
    pairs = encode_pairs(tokenizer, _labelled(name, score, exercises, recipe), recipe.context).pairs
    pad, cpu = tokenizer.pad_token_id, torch.device("cpu")
    to_batch = functools.partial(collate, pairs, pad_token_id=pad, device=cpu)
    ref_logprobs = reference_logprobs(
        policy, pairs, batch_size=256, pad_token_id=pad, device=cpu, rank=0, world=1, impl="auto"
    )
    _fit(
        f"model matrix: train the judge {name}",
        model,
        lambda index: (
            policy(to_batch(index, ref_logprobs=ref_logprobs), impl="auto", loss="dpo", beta=settings.beta).loss
        ),
        _batches(len(pairs), settings.batch_size, random.Random(f"judge {name} {recipe.seed}")),
        num_steps=settings.steps,
        learning_rate=settings.learning_rate,
    )
    save_model(model, tokenizer, folder / name)


def _labelled(name: str, score: Score, exercises: list[Exercise], recipe: Recipe) -> list[PreferencePair]:
    """Pairs of demonstrations that ``score`` orders; some of the labels are wrong."""
    settings = recipe.judge_training
    r = random.Random(f"pairs {name} {recipe.seed}")
    out: list[PreferencePair] = []
    for exercise in itertools.cycle(exercises):
        texts = sorted((exercise.demonstrate(r) for _ in range(2)), key=lambda text: score(exercise, text))
        if score(exercise, texts[0]) == score(exercise, texts[1]):
            continue
        if r.random() < settings.wrong:
            texts.reverse()
        rejected, chosen = (Response(model="demonstration", text=text) for text in texts)
        out.append(
            PreferencePair(
                prompt=Prompt(id="", prompt=exercise.prompt),
                chosen=chosen,
                rejected=rejected,
                score_chosen=None,
                score_rejected=None,
            )
        )
        if len(out) == settings.pairs:
            break
    return out


def _batches(count: int, size: int, r: random.Random) -> Iterator[list[int]]:
    """Batches of examples by number, epoch after epoch; what an epoch leaves over is not used."""
    while True:
        order = r.sample(range(count), count)
        while len(order) >= size:
            yield [order.pop() for _ in range(size)]


def _fit(
    title: str,
    model: PreTrainedModel,
    loss_of: Callable[[list[int]], torch.Tensor],
    batches: Iterator[list[int]],
    *,
    num_steps: int,
    learning_rate: float,
    after_step: Callable[[int], None] = lambda step: None,
) -> None:
    """AdamW on the loss of each batch."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98), fused=True
    )
    scheduler = get_scheduler("cosine_with_min_lr", optimizer, 50, num_steps, {"min_lr_rate": 0.1})
    with progress_bar(title, num_steps) as advance:
        for step, index in enumerate(itertools.islice(batches, num_steps), start=1):
            loss_of(index).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            advance(1)
            after_step(step)


def _mean_logprob(policy: Policy, batch: list[Example], pad: int) -> torch.Tensor:
    ids, mask, targets = pad_sequences(batch, pad)
    logprobs = linear_logprobs(policy.hidden(ids, mask), policy.head.weight, targets)
    return logprobs.sum() / (targets != IGNORE).sum()
