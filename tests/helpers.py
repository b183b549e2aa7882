"""JSONL for tests, not by the code under test."""

from __future__ import annotations

import functools
import gzip
import itertools
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

Row = dict[str, Any]

SHAPE = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""What the configurations of most architectures take for a model of some thousand parameters."""


def write_rows(path: Path, rows: Iterable[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[Row]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def make_adapter(base: Path, folder: Path, seed: int = 0, rank: int = 4, strength: int = 2) -> Path:
    """A LoRA adapter of random weights, made by peft; ``strength`` is lora_alpha / rank."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=int(strength * rank),
        target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


def corrected(item: Any, scores: Any, config: Any) -> Any:
    """Decisions on all pairs of a prompt of which nothing but consensus scores is known."""
    from tso_fast.correction.decide import correct, from_scores
    from tso_fast.correction.evidence import compared_of, score_matrix, votes_of

    votes = votes_of([item], score_matrix([item], []), compared_of([item], []))
    return correct([item], votes, from_scores(votes, np.asarray(scores, dtype=np.float64)), config)


def used(decided: Any) -> list[Any]:
    """The pairs that were not dropped."""
    return decided.pairs(np.flatnonzero(decided.is_used))


def fork(do: Callable[[], object]) -> int:
    """The id of a child that does it and ends; a fork, as a new interpreter takes seconds to import what it needs."""
    sys.stdout.flush()
    sys.stderr.flush()
    if (pid := os.fork()) == 0:
        status = 1
        try:
            do()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return pid


def status_of(child: int) -> int:
    """Of a fork, once it has ended; negative: the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def interrupt_store(monkeypatch: Any, at: int) -> None:
    """Lets a response store be interrupted, as by Ctrl-C, when it is to add for the ``at``-th time."""
    from tso_fast.files.responses import ResponseStore

    add, calls = ResponseStore.add, itertools.count(1)

    def failing(self: ResponseStore, rows: Any) -> None:
        if next(calls) == at:
            raise KeyboardInterrupt
        add(self, rows)

    monkeypatch.setattr(ResponseStore, "add", failing)


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.nbytes)
        return out


def encoded(n: int, seed: int = 0) -> list[Any]:
    """Pairs of unequal lengths, scales (some 0), soft labels and margins."""
    from tso_fast.training.batches import EncodedPair

    r = np.random.default_rng(seed)

    def tokens(most: int) -> tuple[int, ...]:
        return tuple(r.integers(3, 61, r.integers(1, most)).tolist())

    return [
        EncodedPair(
            prompt=tokens(9),
            chosen=(*tokens(8), 2),
            rejected=(*tokens(12), 2),
            prompt_id=str(i),
            scale=float(r.choice([0.0, 0.25, 1.0, 2.5])) if i else 1.0,
            soft_label=float(r.uniform(0.6, 1)),
            margin=float(r.choice([0.0, 0.2])),
        )
        for i in range(n)
    ]


def ranks(world: int, work: Callable[[int], object], *, per_node: int | None = None) -> None:
    """Runs ``work(rank)`` in ``world`` forks that know of each other as after torchrun, and waits for all of them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def child(rank: int) -> None:
        local = per_node or world
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(world),
            LOCAL_RANK=str(rank % local),
            LOCAL_WORLD_SIZE=str(local),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        torch.set_num_threads(1)
        work(rank)

    children = [fork(functools.partial(child, rank)) for rank in range(world)]
    statuses = [status_of(pid) for pid in children]
    assert statuses == [0] * world, statuses
