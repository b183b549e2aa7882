"""How much there is to do and to keep: tokens and steps of an iteration, bytes of files and of main memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tso_fast.config.settings import CellConfig, TrainConfig
from tso_fast.errors import InputError
from tso_fast.files.rows import BadRows, read_candidates
from tso_fast.files.schedule import schedule
from tso_fast.models.load import load_tokenizer
from tso_fast.models.tokens import encode_prompt, response_ids
from tso_fast.training.batches import num_steps
from tso_fast.training.checkpoint import KEPT

STORED_BYTES = 11
"""Bytes of a token in the response store (README: 200,000 responses of 300 tokens), and about as many in the JSONL."""
PAIR_BYTES = 5
"""Bytes of a token's text in verdicts and pairs."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What is known of the prompts."""

    count: int | None
    """None: the file cannot be read here."""
    longest: int
    """Tokens of the longest prompt."""
    mean: float
    longest_response: int
    """Tokens of the longest response that came with the data; 0: none did."""
    source: str
    """Where the lengths come from."""


def prompts_of(config: TrainConfig, tokenizer_folder: Path, context: int | None, prompt_tokens: int | None) -> Prompts:
    """The prompts' number and lengths, from their file and the tokenizer where they are here.

    Args:
        context: of the models, tokens.
        prompt_tokens: what the user says that the longest prompt has.
    """
    most = context or 4096
    guess = prompt_tokens or max(1, min(config.max_length or most, most) - config.max_completion_length)
    how = "--prompt_tokens" if prompt_tokens else "max_length" if config.max_length else "the context, less a response"
    if not Path(config.prompts).exists():
        return Prompts(count=None, longest=guess, mean=guess, longest_response=0, source=how)
    rows = read_candidates(config.prompts, BadRows(config.on_bad_row), config)
    try:
        tokenizer: Any = load_tokenizer(tokenizer_folder)
    except InputError:
        return Prompts(count=len(rows), longest=guess, mean=guess, longest_response=0, source=how)
    lengths = [len(encode_prompt(tokenizer, row.prompt)) for row in rows]
    written = (len(response_ids(tokenizer, row.prompt, r)) for row in rows for r in row.responses)
    return Prompts(
        count=len(rows),
        longest=prompt_tokens or max(lengths),
        mean=sum(lengths) / len(lengths),
        longest_response=max(written, default=0),
        source="the prompts",
    )


def response_tokens(config: TrainConfig, prompts: Prompts) -> int:
    """Tokens of the longest response that is trained on."""
    sampled = max([config.max_completion_length, *(c.max_completion_length or 0 for c in config.cells)])
    most = max(sampled, prompts.longest_response)
    return most if config.max_length is None else max(1, min(most, config.max_length - prompts.longest))


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """The work of one iteration; upper bounds where it depends on what models will say."""

    prompts: int
    responses: int
    response_tokens: int
    pairs: int
    steps: int
    pairs_a_step: int
    trained_tokens: int


def work_of(config: TrainConfig, prompts: Prompts, policy: CellConfig, world: int) -> Iteration | None:
    """The work of the largest iteration; None: the number of prompts is not known."""
    if prompts.count is None:
        return None
    count = max(end - first for first, end in schedule(prompts.count, config.num_iterations))
    responses = tokens = 0
    for cell in _cells_at_the_end(config, policy):
        own = config.policy_num_generations if cell is policy and config.policy_num_generations is not None else None
        number = next(n for n in (own, cell.num_generations, config.num_generations) if n is not None)
        responses += count * number
        tokens += count * number * (cell.max_completion_length or config.max_completion_length)
    pairs = count * config.max_pairs
    shares = {
        "epochs": config.num_train_epochs,
        "micro_size": config.per_device_train_batch_size,
        "accumulation": config.gradient_accumulation_steps,
        "world": world,
    }
    length = prompts.mean + 2 * response_tokens(config, prompts)
    return Iteration(
        prompts=count,
        responses=responses,
        response_tokens=tokens,
        pairs=pairs,
        steps=num_steps(pairs, **shares),
        pairs_a_step=config.per_device_train_batch_size * config.gradient_accumulation_steps * world,
        trained_tokens=int(pairs * config.num_train_epochs * length),
    )


def _cells_at_the_end(config: TrainConfig, policy: CellConfig) -> Sequence[CellConfig]:
    """The cells of the last iteration: a trained version for each one before, as far as they are kept."""
    versions = config.num_iterations - 1
    if config.max_versions:
        versions = min(versions, config.max_versions)
    plain = CellConfig(path=policy.path)
    return [*config.cells, *[plain] * versions]


def disk_of(
    config: TrainConfig, saved: int, reference: int, checkpoint: int, work: Iteration | None, prompts: Prompts
) -> dict[str, int]:
    """Bytes of the run folder when the last iteration trains.

    Args:
        saved: bytes of a saved policy, or of its adapter.
        reference: bytes of the saved mean of references; 0: there is none.
        checkpoint: bytes of a checkpoint, over all processes.
    """
    files = {"policies, one an iteration": config.num_iterations * saved}
    if reference:
        files["references, one an iteration"] = config.num_iterations * reference
    if config.save_steps:
        files[f"checkpoints, {KEPT} kept and one being written"] = (KEPT + 1) * checkpoint
    if work is not None:
        n, texts = config.num_iterations, work.response_tokens + work.responses * prompts.mean / 4
        files["response store"] = n * work.response_tokens * STORED_BYTES
        files["responses, verdicts and pairs"] = int(n * (texts * STORED_BYTES + work.trained_tokens * PAIR_BYTES))
    return files
