"""Checks `tso-fast generate` on 2 bases x 3 versions, full weights and LoRA, with hf, vllm and openai, under kill -9.

    python benchmarks/check_matrix.py [--only hf vllm openai] [--keep FOLDER]

First every generator answers greedily, by a command that differs only in one key: the answers must agree. Then answers
are sampled while the engine, the driver or a server is killed: the same command must finish afterwards, without
generating stored answers again. It needs vLLM and some minutes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import psutil
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from tso_fast.quickstart.build import Recipe, make_tokenizer

NUM_PROMPTS = 60
TEXTS = [("Add 1 and 2.", "3"), ("Write Sam twice.", "Sam Sam"), ("Sort b a c.", "a b c")] * 4
CLI = [sys.executable, "-P", "-m", "tso_fast.cli"]


def make_matrix(folder: Path) -> None:
    """Makes bases `s` and `m`; s.v1, s.v3 and m.v1 are full weights, s.v2, m.v2 and m.v3 are adapters."""
    tokenizer = make_tokenizer(TEXTS, Recipe(seed=0))
    for name, layers, seed in (("s.v1", 1, 0), ("s.v3", 1, 1), ("m.v1", 2, 2)):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
        model = LlamaForCausalLM(config)
        torch.nn.init.normal_(model.lm_head.weight, std=0.3)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, base, seed in (("s.v2", "s.v1", 3), ("m.v2", "m.v1", 4), ("m.v3", "m.v1", 5)):
        torch.manual_seed(seed)
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(LlamaForCausalLM.from_pretrained(folder / base), lora).save_pretrained(folder / name)
    rows = [
        {"id": f"q{i}", "prompt": f"Add {i} and {i * 7 % 11}. Write Sam {i % 3} times."} for i in range(NUM_PROMPTS)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


SERVERS = {"s.v1": ["s.v2"], "s.v3": [], "m.v1": ["m.v2", "m.v3"]}
"""Cells of full weights, each with its own server, and the adapters on the same server."""


@contextlib.contextmanager
def served(folder: Path) -> Iterator[dict[str, tuple[int, subprocess.Popen[bytes]]]]:
    ports = {name: free_port() for name in SERVERS}
    running = {name: (port, start_server(folder, name, port)) for name, port in ports.items()}
    try:
        for port, process in running.values():
            wait_for(port, process)
        yield running
    finally:
        for _, process in running.values():  # also one that was started again
            kill_group(process.pid)


def start_server(folder: Path, name: str, port: int) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-P",
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(folder / name),
        "--served-model-name",
        name,
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
        "--dtype",
        "float32",
        "--max-model-len",
        "512",
        "--enforce-eager",
        "--distributed-executor-backend",
        "uni",
    ]
    if adapters := SERVERS[name]:
        # A slot stays free: on CPUs, rows without an adapter read the last one.
        command += [
            "--enable-lora",
            "--max-lora-rank",
            "8",
            "--max-loras",
            str(len(adapters) + 1),
            "--lora-modules",
            *(f"{adapter}={folder / adapter}" for adapter in adapters),
        ]
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    log = open(folder / f"server-{name}.log", "ab")  # noqa: SIM115 the server's
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int, process: subprocess.Popen[bytes], timeout_s: float = 300) -> None:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=2):
            return
        time.sleep(0.5)
    raise SystemExit(f"a server did not start: status {process.poll()}")


def kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def write_config(folder: Path, servers: dict[str, Any]) -> Path:
    port_of = {cell: servers[name][0] for name in servers for cell in (name, *SERVERS[name])}
    cells = [
        {
            "path": str(folder / f"{size}.v{rank}"),
            "name": f"{size}.v{rank}",
            "version_rank": rank,
            **({"base": str(folder / f"{size}.v1")} if f"{size}.v{rank}" not in SERVERS else {}),
            **({"url": f"http://127.0.0.1:{port_of[f'{size}.v{rank}']}/v1"} if servers else {}),
        }
        for size in "sm"
        for rank in (1, 2, 3)
    ]
    file = folder / "generate.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "prompts": str(folder / "prompts.jsonl"),
                "cells": cells,
                "shard_size": 5,
                "max_completion_length": 24,
                "use_cpu": True,
                "engine_timeout_s": 60,
            }
        )
    )
    return file


def command(config: Path, generator: str, output: Path, *more: str) -> list[str]:
    return [*CLI, "generate", str(config), "--generator", generator, "--output", str(output), *more]


def run(*arguments: Any) -> str:
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=900)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command(*arguments)))}\n{done.stderr[-4000:]}")
    return done.stderr


def read(output: Path) -> dict[tuple[str, str, int], tuple[int, ...]]:
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    return {(row["id"], r["model"], r["sample"]): tuple(r["token_ids"]) for row in rows for r in row["responses"]}


def stored(output: Path) -> int:
    """Number of committed rows, read from a copy, since the store is locked while in use."""
    folder = Path(f"{output}.responses")
    with tempfile.TemporaryDirectory() as copy:
        for file in folder.glob("responses.sqlite3*"):
            (Path(copy) / file.name).write_bytes(file.read_bytes())
        database = sqlite3.connect(Path(copy) / "responses.sqlite3")
        with contextlib.closing(database), contextlib.suppress(sqlite3.DatabaseError):
            return int(database.execute("SELECT count(*) FROM responses").fetchone()[0])
    return 0


def kill_while_working(arguments: list[Any], victim: str, servers: dict[str, Any]) -> dict[str, Any]:
    """Starts the command, kills a part of it once something is stored, and runs it again until it finishes."""
    output: Path = arguments[2]
    process = subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < end:
        if (before := stored(output) if output.with_name(f"{output.name}.responses").exists() else 0) > 0:
            break
        time.sleep(0.05)
    if process.poll() is not None:
        raise SystemExit(f"{victim}: over before the kill\n{process.stderr.read() if process.stderr else ''}")
    children = psutil.Process(process.pid).children(recursive=True)
    killed_at = time.monotonic()
    if victim == "driver":
        process.kill()
    elif victim == "engine":
        kill_group(next(p.pid for p in children if "tso_fast.generators.process" in p.cmdline()))
    else:
        kill_group(servers["m.v1"][1].pid)
    stderr = process.communicate(timeout=600)[1]
    ended_s = time.monotonic() - killed_at
    orphans = count_orphans(children)
    first_status, at_end = process.returncode, stored(output)
    if victim == "server":
        port = servers["m.v1"][0]
        servers["m.v1"] = (port, start_server(output.parent, "m.v1", port))
        wait_for(*servers["m.v1"])
    if first_status != 0:
        run(*arguments)
    return {
        "killed": victim,
        "stored_at_kill": before,
        "stored_at_end": at_end,
        "status": first_status,
        "seconds_to_end": round(ended_s, 1),
        "last_words": stderr.strip().splitlines()[-1][:200] if stderr else "",
        "orphans": orphans,
    }


def count_orphans(children: list[psutil.Process], timeout_s: float = 10) -> int:
    """Number of processes that outlive their driver."""
    return len(psutil.wait_procs(children, timeout=timeout_s)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["hf", "vllm", "openai"], default=["hf", "vllm", "openai"])
    parser.add_argument("--keep", type=Path, default=None, help="folder for all files; default: a temporary one")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = arguments.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(exist_ok=True)
        make_matrix(folder)
        servers = stack.enter_context(served(folder)) if "openai" in arguments.only else {}
        config = write_config(folder, servers)
        rows = []
        greedy = {}
        for generator in arguments.only:
            start = time.monotonic()
            run(config, generator, folder / f"greedy-{generator}.jsonl", "--temperature", "0", "--num_generations", "1")
            greedy[generator] = read(folder / f"greedy-{generator}.jsonl")
            first = next(iter(greedy.values()))
            same = sum(first[key] == ids for key, ids in greedy[generator].items())
            rows.append(
                [
                    generator,
                    "greedy, no kill",
                    f"{same} of {len(first)} as {arguments.only[0]}",
                    "-",
                    "-",
                    f"{time.monotonic() - start:.0f} s",
                ]
            )
            print(rows[-1], file=sys.stderr, flush=True)
        victims = {"hf": ["driver", "engine"], "vllm": ["driver", "engine"], "openai": ["driver", "server"]}
        for generator in arguments.only:
            # hf in processes of its own, so that there is one to kill.
            more = ["--num_engines", "2"] if generator == "hf" else []
            whole = folder / f"whole-{generator}.jsonl"
            run(config, generator, whole, *more)
            for victim in victims[generator]:
                output = folder / f"{victim}-{generator}.jsonl"
                facts = kill_while_working([config, generator, output, *more], victim, servers)
                got, want = read(output), read(whole)
                same = sum(got[key] == ids for key, ids in want.items())
                rows.append(
                    [
                        generator,
                        f"kill -9 of the {victim}",
                        f"{same} of {len(want)} as uninterrupted",
                        f"{facts['stored_at_kill']} stored, then {facts['stored_at_end']}",
                        f"status {facts['status']} after {facts['seconds_to_end']} s; {facts['orphans']} orphans",
                        facts["last_words"],
                    ]
                )
                print(rows[-1], file=sys.stderr, flush=True)
                if got.keys() != want.keys():
                    raise SystemExit(f"{generator}: responses are missing or too many")
        print(harness.table(["generator", "what", "responses", "store", "ended", "words"], rows))


if __name__ == "__main__":
    main()
