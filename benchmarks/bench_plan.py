"""What `tso-fast plan` says that a process holds while it trains, against what it holds.

    python benchmarks/bench_plan.py                    every case, some 6 minutes on two cores
    python benchmarks/bench_plan.py --only full lora

A Llama of 58 million parameters (hidden 512, 8 layers, vocabulary 32000), 2 pairs of 64 + 2 x 64 tokens a pass unless
told. Each case is a fresh process, or two that talk by gloo. Measured is the resident size of the first process, looked
at every millisecond from outside, beyond what it was before the model was loaded and after a tiny one had been trained,
so that the libraries are there. glibc returns what is freed at once (MALLOC_MMAP_THRESHOLD_): what it would keep for
later is no need of training, and depends on the order of what came before.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import RESULTS, commit, machine, table, versions, write_json

SHAPE = {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
         "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 1024}  # fmt: skip
TINY = {**SHAPE, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 64}  # fmt: skip
PROMPT, RESPONSE, STEPS = 64, 64, 4
LONG = {"per_device_train_batch_size": 8}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "full": (1, {}),
    "sharded over 2": (2, {"shard": "full"}),
    "lora": (1, {"peft": "lora"}),
    "full, 8 pairs": (1, LONG),
    "full, 8 pairs, checkpointing": (1, {**LONG, "gradient_checkpointing": True}),
    "lora, 8 pairs": (1, {**LONG, "peft": "lora"}),
    "accumulated": (1, {"gradient_accumulation_steps": 2}),
    "bf16": (1, {"bf16": True}),
    "adamw_bf16": (1, {"optim": "adamw_bf16", "dtype": "bfloat16"}),
    "replicas on 2": (2, {}),
    "sharded over 2, bf16": (2, {"shard": "full", "bf16": True}),
}
"""Processes and settings."""
GOAL = 0.15
QUIET = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}


def settings_of(name: str, folder: Path) -> Any:
    from tso_fast.config.settings import CellConfig, TrainConfig

    return TrainConfig(
        output_dir="",
        prompts="-",
        cells=[CellConfig(path=str(folder))],
        use_cpu=True,
        **{"per_device_train_batch_size": 2, **CASES[name][1]},
    )


# ------------------------------------------------------------------------------------------------------- in a process


def train(name: str, folder: Path) -> None:
    """Trains a tiny model, says that it is ready, waits for an answer, and trains the case's."""
    import torch

    from tso_fast.training.optimise import make_accelerator

    torch.set_num_threads(1)
    config = settings_of(name, folder)
    accelerator = make_accelerator(config, str(folder))
    _train(config, folder / "tiny", accelerator)
    accelerator.wait_for_everyone()
    print("ready", flush=True)
    sys.stdin.readline()
    _train(config, folder / "model", accelerator)
    print("done", flush=True)
    sys.stdin.readline()


def _train(config: Any, path: Path, accelerator: Any) -> None:
    import numpy as np
    from transformers import AutoConfig

    from tso_fast.files.run import Run
    from tso_fast.training.batches import EncodedPair
    from tso_fast.training.load import load_policy
    from tso_fast.training.optimise import optimise
    from tso_fast.types import Weights

    r, vocab = np.random.default_rng(0), AutoConfig.from_pretrained(path).vocab_size
    count = STEPS * config.per_device_train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(r.integers(3, vocab, n).tolist())

    pairs = [
        EncodedPair(prompt=tokens(PROMPT), chosen=tokens(RESPONSE), rejected=tokens(RESPONSE), scale=1.0,
                    soft_label=1.0, margin=0.0, prompt_id=str(i))
        for i in range(count)
    ]  # fmt: skip
    policy = load_policy(config, Weights(path, path), accelerator, has_adapter=config.peft == "lora")
    with tempfile.TemporaryDirectory() as run:
        files = Run(Path(run), {}, None).iteration(1)
        optimise(policy, pairs, config, files=files, accelerator=accelerator, reference=None, pad_token_id=0)


# ----------------------------------------------------------------------------------------------------------- outside


@contextlib.contextmanager
def processes(name: str, folder: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """The processes of a case; none is left behind."""
    count = CASES[name][0]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "--child", name, str(folder)]
    children = []
    with tempfile.TemporaryFile("w+") as errors:
        for rank in range(count):
            world = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count,
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if count > 1 else {}  # fmt: skip
            env = {**os.environ, **QUIET, **{key: str(value) for key, value in world.items()}}
            children.append(
                subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=env
                )
            )
        try:
            yield children
        except Exception as error:
            errors.seek(0)
            raise RuntimeError(errors.read()[-2000:]) from error
        finally:
            for child in children:
                child.kill()
                child.wait()


def measure(name: str, folder: Path) -> int:
    """Most bytes that the first process of a case takes beyond what it took when it was ready."""
    with processes(name, folder) as children:
        for child in children:
            _wait_for(child, "ready")
        before = most = _resident(children[0].pid)
        for child in children:
            _answer(child)
        while not select.select([children[0].stdout], [], [], 0.001)[0]:
            most = max(most, _resident(children[0].pid))
        _wait_for(children[0], "done")
        for child in children:
            _answer(child)
            child.wait()
    return most - before


def _wait_for(child: subprocess.Popen[str], word: str) -> None:
    assert child.stdout is not None
    if not any(line.strip() == word for line in child.stdout):
        raise RuntimeError(word)


def _answer(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def predict(name: str, folder: Path) -> Any:
    from transformers import LlamaConfig

    from tso_fast.planning.memory import Batch, Model, World, plan_training
    from tso_fast.types import Weights

    return plan_training(
        Model(config=LlamaConfig(**SHAPE), weights=Weights(folder, folder)),
        settings_of(name, folder),
        World(per_node=CASES[name][0], device="cpu"),
        Batch(prompt=PROMPT, response=RESPONSE),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--output", type=Path, default=RESULTS / "plan-cpu.json")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        train(given.child[0], Path(given.child[1]))
        return
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        from transformers import AutoModelForCausalLM, LlamaConfig

        folder = Path(temporary)
        for kind, shape in (("model", SHAPE), ("tiny", TINY)):
            AutoModelForCausalLM.from_config(LlamaConfig(**shape)).save_pretrained(folder / kind)
        for name in given.only:
            planned, measured = predict(name, folder / "model"), measure(name, folder)
            rows.append({"case": name, "planned": planned.most, "measured": measured, "ratio": planned.most / measured,
                         "parts": dict(planned.parts)})  # fmt: skip
            print(f"{name}: planned {planned.most / 2**20:.0f} MiB, measured {measured / 2**20:.0f}", flush=True)
    cells = [
        [row["case"], f"{row['planned'] / 2**20:.0f}", f"{row['measured'] / 2**20:.0f}",
         f"{row['ratio']:.2f}{'' if abs(row['ratio'] - 1) <= GOAL else ' **'}"]
        for row in rows
    ]  # fmt: skip
    print(table(["case", "planned, MiB", "measured, MiB", "planned / measured, within 15 %"], cells))
    facts = {
        "machine": machine(),
        "versions": versions("torch", "transformers", "accelerate", "peft"),
        "commit": commit(),
    }
    write_json(given.output, {**facts, "cases": rows})
    if any(abs(row["ratio"] - 1) > GOAL for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
