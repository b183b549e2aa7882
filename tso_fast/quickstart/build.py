"""Trains the quickstart's model matrix, 2 sizes x 3 versions, by supervised training, and caches it between runs.

Versions are checkpoints after 35 %, 60 % and all of the training.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_scheduler

from tso_fast.config.settings import CellConfig, TrainConfig
from tso_fast.files.atomic import atomic_folder, write_json, write_jsonl
from tso_fast.logprob import linear_logprobs
from tso_fast.models.load import save_model
from tso_fast.models.policy import Policy
from tso_fast.models.tokens import IGNORE, encode_prompt, encode_response, pad_sequences
from tso_fast.progress import console, progress_bar
from tso_fast.quickstart.task import Task, demonstrate, make_tasks
from tso_fast.seeds import seed_of
from tso_fast.types import Prompt

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
class Recipe:
    """Everything that the matrix and its data depend on; the key of the cache."""

    seed: int
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
    human_share: float = 0.25
    held_out: int = 600
    development: int = 600
    revision: int = 1
    """Increase it when the code below gives other results for the same numbers."""

    @property
    def key(self) -> str:
        tasks = json.dumps([dataclasses.asdict(t) for t in make_tasks(60, "recipe")])
        recipe = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256((recipe + tasks + CHAT_TEMPLATE).encode()).hexdigest()[:16]


def cache_folder() -> Path:
    """``TSO_FAST_CACHE``, else ``tso-fast`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TSO_FAST_CACHE") or Path(base) / "tso-fast")


def prepare(config: TrainConfig, recipe: Recipe, eval_set: str = "held_out") -> None:
    """Fills in cells, prompts and evaluation prompts of a quickstart configuration; builds the matrix if needed.

    Raises:
        OutputError: the cache cannot be written; ``TSO_FAST_CACHE`` can name another folder.
    """
    folder = build(recipe)
    config.cells = [
        CellConfig(path=str(folder / f"{size}.v{rank}"), version_rank=rank)
        for size in recipe.sizes
        for rank in range(1, len(recipe.versions) + 1)
    ]
    config.prompts = str(folder / "prompts.jsonl")
    config.eval_prompts = str(folder / f"{eval_set}.jsonl")


def build(recipe: Recipe) -> Path:
    """Folder of the cells, their tokenizer and the data; built once per recipe."""
    folder = cache_folder() / "quickstart" / recipe.key
    if (folder / "recipe.json").exists():
        console.print(f"model matrix: from {folder}", highlight=False)
        return folder
    with atomic_folder(folder) as tmp:
        tasks = _tasks(recipe)
        _write_data(tasks, recipe, tmp)
        r = random.Random(f"demonstrations {recipe.seed}")
        texts = [(task.question, demonstrate(task, r)) for task in tasks["demonstrations"]]
        tokenizer = make_tokenizer(texts, recipe)
        prompts = [Prompt(id="", prompt=question) for question, _ in texts]
        examples = [
            (encode_prompt(tokenizer, prompt), encode_response(tokenizer, prompt, answer))
            for prompt, (_, answer) in zip(prompts, texts, strict=True)
        ]
        for name, size in recipe.sizes.items():
            _train_size(name, size, examples, tokenizer, recipe, tmp)
        write_json(tmp / "recipe.json", dataclasses.asdict(recipe))
    return folder


def _tasks(recipe: Recipe) -> dict[str, list[Task]]:
    """Tasks by set; no question occurs twice, within a set or across sets."""
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
        out[name] = make_tasks(count, seed, seen)
        seen |= {task.question for task in out[name]}
    return out


def _write_data(tasks: dict[str, list[Task]], recipe: Recipe, folder: Path) -> None:
    r = random.Random(f"human {recipe.seed}")
    for name in ("prompts", "held_out", "development"):
        rows = []
        for i, task in enumerate(tasks[name]):
            row = {"id": f"{name}-{i:04d}-{task.skill}", "prompt": task.question, "answer": task.answer}
            if name == "prompts" and r.random() < recipe.human_share:
                row["human_response"] = task.answer
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
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=0.01, betas=(0.9, 0.98), fused=True
    )
    scheduler = get_scheduler("cosine_with_min_lr", optimizer, 50, size.steps, {"min_lr_rate": 0.1})
    marks = {round(size.steps * share): f"{name}.v{i}" for i, share in enumerate(recipe.versions, start=1)}
    r = random.Random(f"order {recipe.seed}")
    order: list[int] = []
    title = f"model matrix: train {name} ({sum(p.numel() for p in model.parameters()) / 1e6:.2f} M)"
    with progress_bar(title, size.steps) as advance:
        for step in range(1, size.steps + 1):
            if len(order) < recipe.batch_size:
                order = r.sample(range(len(examples)), len(examples))
            batch = [examples[order.pop()] for _ in range(recipe.batch_size)]
            loss = -_mean_logprob(policy, batch, tokenizer.pad_token_id)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            advance(1)
            if step in marks:
                save_model(model, tokenizer, folder / marks[step])


def _mean_logprob(policy: Policy, batch: list[Example], pad: int) -> torch.Tensor:
    ids, mask, targets = pad_sequences(batch, pad)
    logprobs = linear_logprobs(policy.hidden(ids, mask), policy.head.weight, targets)
    return logprobs.sum() / (targets != IGNORE).sum()
