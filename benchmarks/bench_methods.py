"""TSO beside other methods and without its parts, on the quickstart's tasks, at equal budgets.

    python benchmarks/bench_methods.py                              the tables: methods and ablations, ten fresh seeds
    python benchmarks/bench_methods.py --methods tso sft --seeds 5  some methods, the first five seeds
    python benchmarks/bench_methods.py --tune                       to choose settings: development seeds and prompts
    python benchmarks/bench_methods.py --tune --top 2                only the two trials that are best on two seeds
    python benchmarks/bench_methods.py --table                      the tables from the runs that are there

A run is one method on one task with one seed: the same matrix, prompts, samples of each cell, pairs a prompt and epochs
for all methods. It trains in a process of its own and leaves one line in ``results/methods.jsonl``, and a run that is
there is not done again, so that the command goes on where it was stopped, on this machine or another. Seeds change the
matrix, the prompts and the sampling. What a cell of the matrix says to a prompt is generated once a seed and shared.

Each method runs with the settings that were best of as many trials (``TRIALS``) on the development seeds, whose prompts
for evaluation are others. The tables are made on ``SEEDS``, once.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from harness import RESULTS, ROOT, commit, table

from tso_fast import recipes
from tso_fast.cli import TASKS

SEEDS = tuple(range(100, 110))
DEVELOPMENT_SEEDS = tuple(range(200, 205))
T_QUANTILE = (math.nan, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Quantiles of Student's distribution for 95 % intervals, by degrees of freedom."""
SAMPLES = 8
WORK = ROOT / "tso-runs/bench-methods"
FILE = RESULTS / "methods.jsonl"
"""A line a run."""
Row = dict[str, Any]
Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Method:
    """``Method("plain DPO", {"loss_type": "dpo"}, {"beta": (0.1, 0.3, 1.0)})``"""

    title: str
    settings: Settings = dataclasses.field(default_factory=dict)
    """Settings that make it this method, over those of the task."""
    trials: Sequence[Settings] = ()
    """Settings to choose from; the first is the source's or the task's own."""
    best: Mapping[str, Settings] = dataclasses.field(default_factory=dict)
    """By task, chosen from the trials on the development seeds; nothing: as the task has it."""


BEST: Settings = {"pair_strategy": "best_random"}
"""The best response of a prompt is always the chosen one, where others may be better than another as well."""


def _tso(nll_weight: float, learning_rate: float) -> Settings:
    return {"loss_args": {"nll_weight": nll_weight}, "learning_rate": learning_rate}


def _trials(name: str, values: Sequence[float]) -> list[Settings]:
    """Every value of one option of the loss, with random pairs and with the best responses as the chosen ones."""
    return [{"loss_args": {name: value}, "learning_rate": 5e-4, **more} for value in values for more in ({}, BEST)]


PLAIN: Settings = {"loss_args": {}, "beta": None, "clip_chosen": None, "clip_rejected": None}
"""Takes back what the task says of the dual clip."""


def _rival(
    title: str,
    loss: str | Sequence[str],
    trials: Sequence[Settings],
    best: Mapping[str, Settings] | None = None,
    **settings: Any,
) -> Method:
    loss_type = loss if isinstance(loss, str) else list(loss)
    return Method(title, {**PLAIN, "loss_type": loss_type, **settings}, trials, best or {})


RATES: list[Settings] = [
    {"learning_rate": 5e-4, "num_train_epochs": 2},
    {"learning_rate": 5e-4, "num_train_epochs": 3},
    {"learning_rate": 2.5e-4, "num_train_epochs": 3},
    {"learning_rate": 1e-3, "num_train_epochs": 2},
    {"learning_rate": 5e-4, "num_train_epochs": 3, **BEST},
    {"learning_rate": 1e-3, "num_train_epochs": 2, **BEST},
]
BETAS = (0.1, 0.3, 1.0)
OFFLINE = {"num_iterations": 1, "reference": "initial"}

METHODS: dict[str, Method] = {
    "tso": Method(
        "TSO",
        trials=[
            _tso(0.0, 5e-4),
            _tso(1.0, 5e-4),
            _tso(1.0, 1e-3),
            _tso(0.0, 1e-3),
            {**_tso(0.0, 5e-4), **BEST},
            {**_tso(1.0, 1e-3), **BEST},
        ],
        best={"skills": _tso(1.0, 1e-3)},
    ),
    "sft": _rival("chosen-only NLL", "sft", RATES, {"skills": {"learning_rate": 1e-3, "num_train_epochs": 2}}),
    "dpo": _rival(
        "DPO, offline",
        "dpo",
        _trials("beta", BETAS),
        {"skills": {"loss_args": {"beta": 1.0}, "learning_rate": 5e-4}},
        **OFFLINE,
    ),
    "iterative_dpo": _rival("iterative DPO", "dpo", _trials("beta", BETAS)),
    "irpo": _rival("IRPO", ("dpo", "sft"), [{**t, "loss_weights": [1.0, 1.0]} for t in _trials("beta", BETAS)]),
    "simpo": _rival("SimPO", "simpo", _trials("beta", (2.0, 0.5, 5.0))),
    "ipo": _rival("IPO", "ipo", _trials("beta", BETAS)),
    "sppo": _rival("SPPO", "sppo", _trials("beta", (0.001, 0.03, 0.3))),
    "nca": _rival("NCA", "nca", _trials("beta", BETAS)),
    "dpop": _rival("DPO-Positive", "dpop", _trials("beta", BETAS)),
    "bco": _rival("BCO", "bco", _trials("beta", BETAS)),
    "orpo": _rival("ORPO", "orpo", _trials("beta", (0.1, 0.5, 2.0))),
    "humanline": _rival("humanline DPO", "humanline", _trials("beta", BETAS)),
}
"""Methods of the first table, by name."""

ABLATIONS: dict[str, Method] = {
    "without_matrix": Method("only the policy answers", {"only_cells": ["m.v3"], "policy_num_generations": 14}),
    "without_older": Method("without older versions", {"only_cells": ["m.v3", "s.v3"], "num_generations": 10}),
    "without_smaller": Method("without smaller sizes", {"only_cells": ["m.v1", "m.v2", "m.v3"], "num_generations": 5}),
    "without_correction": Method("the prior order as it is", {"evidence": "prior"}),
    "without_people": Method("without human responses", {"human_responses": False}),
    "without_scale": Method("without scale", {"scale_by": "unit"}),
    "fixed_reference": Method("reference: the first policy", {"reference": "initial"}),
    "one_iteration": Method("one iteration instead of three", {"num_iterations": 1}),
    "without_clip_chosen": Method("no bound on the chosen", {"clip_chosen": math.inf}),
    "without_clip_rejected": Method("no bound on the rejected", {"clip_rejected": math.inf}),
    "without_nll": Method("without NLL", {"loss_args": {"nll_weight": 0.0}}),
}
"""TSO without one of its parts, by name; the numbers of samples keep the budget of tokens."""

RECIPES = {f"recipe:{recipe.name}": Method(recipe.title, {"recipe": recipe.name}) for recipe in recipes.recipes()}
"""Recipes as they stand, by name, with the task's learning rate, epochs and sampling where they say nothing of it."""


def _known() -> dict[str, Method]:
    return {**METHODS, **ABLATIONS, **RECIPES}


# ------------------------------------------------------------------------------------------------------------- one run


def run_one(task: str, settings: Settings, seed: int, eval_set: str, folder: Path) -> Row:
    """Trains one method in this process and measures the policy that comes out."""
    from tso_fast.cli import quickstart_config
    from tso_fast.trainer import train

    settings = dict(settings)
    only_cells, has_people = settings.pop("only_cells", None), settings.pop("human_responses", True)
    recipe = recipes.arguments(settings.pop("recipe")) if "recipe" in settings else []
    config = quickstart_config([*recipe, "--seed", str(seed), "--output_dir", str(folder / "run")], eval_set, task)
    config = _without_idle_labels(dataclasses.replace(config, **settings))
    start_path = next(cell.path for cell in config.cells if cell.path.endswith("m.v3"))
    if only_cells is not None:
        config.cells = [
            cell for cell in config.cells if Path(cell.path).name in only_cells or not _is_of_matrix(cell.path)
        ]
    if not has_people:
        config.prompts = str(_without_people(Path(config.prompts), folder))
    config.response_store = str(folder.parent / f"store-{seed}")
    start, cpu = time.perf_counter(), time.process_time()
    run = train(config)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    stages = {item["name"]: item["info"] for item in run.state["stages"]}
    scores = [info["accuracy"] for name, info in stages.items() if name.endswith("eval")]
    generated = [info for name, info in stages.items() if name.endswith("generate")]
    trained = [info for name, info in stages.items() if name.endswith("train")]
    pairs = [info["pairs"] for name, info in stages.items() if name.endswith("pairs")]
    metrics = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in metrics if row["iteration"] == metrics[-1]["iteration"]]
    return {
        "scores": scores,
        "gain": 100 * (scores[-1] - scores[0]),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "pairs": pairs,
        "generated_tokens": sum(info["sampled_tokens"] for info in generated),
        "chosen_tokens": config.num_train_epochs
        * sum(info["means"]["num_tokens/chosen"] * count for info, count in zip(trained, pairs, strict=True)),
        "chosen_drift": last[-1]["logps/chosen"] - last[0]["logps/chosen"],
        **measure_samples(config, str(run.folder), start_path),
    }


def _without_idle_labels(config: Any) -> Any:
    """The configuration without the task's soft labels where the loss takes none, which would be refused."""
    from tso_fast.training.optimise import configured_loss

    plain = dataclasses.replace(config, soft_label_by=None)
    return config if "soft_label" in configured_loss(plain).labels else plain


def _is_of_matrix(path: str) -> bool:
    """Whether a cell answers prompts; the others only judge."""
    return re.fullmatch(r"[sm]\.v\d", Path(path).name) is not None


def _without_people(prompts: Path, folder: Path) -> Path:
    out = folder / "prompts.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in prompts.read_text(encoding="utf-8").splitlines()]
    out.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "human_response"}) + "\n" for row in rows))
    return out


def measure_samples(config: Any, final: str, start: str) -> Row:
    """Of samples of the final policy on the evaluation prompts: pass@k, KL to the start, length, distinct responses.

    The KL divergence is the mean of log pi(y) - log pi_start(y) over the samples, in nats a response.
    """
    import tempfile

    from tso_fast.answering import answer, ask
    from tso_fast.config.settings import CellConfig, evaluation_of
    from tso_fast.files.responses import ResponseStore
    from tso_fast.files.rows import BadRows, read_candidates
    from tso_fast.judges.implicit import cell_logprobs
    from tso_fast.judges.verifier import make_verifier
    from tso_fast.matrix import ModelMatrix

    matrix = ModelMatrix([CellConfig(path=final, name="final"), CellConfig(path=start, name="start")])
    settings = dataclasses.replace(
        evaluation_of(config), cells=[], prompts=config.eval_prompts, num_generations=SAMPLES, temperature=1.0
    )
    candidates = read_candidates(config.eval_prompts, BadRows())
    cells = {cell.name: cell for cell in matrix.cells}
    with tempfile.TemporaryDirectory() as scratch, ResponseStore(scratch) as store:
        asked = [ask(cells["final"], settings, None)]
        answered = list(answer(asked, candidates, matrix, settings, store, BadRows(), lambda n: None))
    assert settings.verifier is not None
    check = make_verifier(settings.verifier, settings.verifier_pattern)
    scores = [[check(item.prompt, r).score or 0.0 for r in item.responses] for item in answered]
    options = {"dtype": "float32", "attn_implementation": "auto", "device": "cpu"}
    new, old = (cell_logprobs(cells[name], answered, matrix.tokenizer, **options) for name in ("final", "start"))
    ratios = [
        a.logprob - b.logprob for x, y in zip(new, old, strict=True) for a, b in zip(x, y, strict=True) if a and b
    ]
    responses = [r for item in answered for r in item.responses]
    return {
        "sampled": mean(mean(row) for row in scores),
        "best_of_k": mean(max(row) for row in scores),
        "kl": mean(ratios),
        "tokens": mean(len(r.token_ids or ()) for r in responses),
        "distinct": mean(len({r.text for r in item.responses}) / len(item.responses) for item in answered),
    }


# ----------------------------------------------------------------------------------------------------------- many runs


@dataclasses.dataclass(frozen=True)
class Job:
    """One run that is to be done."""

    task: str
    name: str
    seed: int
    eval_set: str
    settings: Settings

    @property
    def key(self) -> str:
        return json.dumps([self.task, self.eval_set, self.name, self.seed, self.settings], sort_keys=True)

    def result(self) -> Row | None:
        return _results().get(self.key)


def _results() -> dict[str, Row]:
    """Runs that are done, by the keys of their jobs; read again when another process has added one."""
    return _read_results(FILE.stat().st_size if FILE.exists() else 0)


@functools.lru_cache(maxsize=1)
def _read_results(size: int) -> dict[str, Row]:
    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()] if size else []
    return {Job(r["task"], r["name"], r["seed"], r["eval_set"], r["settings"]).key: r for r in rows}


def jobs_of(arguments: argparse.Namespace) -> list[Job]:
    """All runs of the command: seed by seed, so that what is there early compares all methods."""
    known = _known()
    names = arguments.methods or [*METHODS, *ABLATIONS]
    if arguments.recipes:
        of_recipes = list(RECIPES) if arguments.recipes == ["all"] else [f"recipe:{name}" for name in arguments.recipes]
        names = [*(arguments.methods or ("tso", "sft")), *of_recipes]
    seeds = (DEVELOPMENT_SEEDS if arguments.tune else SEEDS)[: arguments.seeds]
    eval_set = "development" if arguments.tune else "held_out"
    out = []
    for task in arguments.tasks:
        for seed in seeds:
            for name in names:
                method = known[name]
                choices = method.trials or [{}] if arguments.tune else [method.best.get(task, {})]
                of_seed = [
                    Job(task, name, seed, eval_set, {**method.settings, **choice, **arguments.extra})
                    for choice in choices
                ]
                out += best_of(of_seed, seeds[:2], arguments.top) if arguments.top else of_seed
    return out


def best_of(trials: Sequence[Job], seeds: Sequence[int], count: int) -> list[Job]:
    """The trials whose gain on two seeds is largest, all of them on these seeds themselves (successive halving)."""
    if trials[0].seed in seeds:
        return list(trials)

    def gain(trial: Job) -> float:
        found = [dataclasses.replace(trial, seed=seed).result() for seed in seeds]
        return mean(result["gain"] if result else -math.inf for result in found)

    return sorted(trials, key=gain, reverse=True)[:count]


def run_all(jobs: Sequence[Job], processes: int) -> None:
    """Runs what is not there yet, several seeds at a time with a thread each.

    The runs of a seed share its matrix and its responses, which one process at a time may write.
    """
    waiting: dict[tuple[str, int], list[Job]] = {}
    for job in jobs:
        if job.result() is None:
            waiting.setdefault((job.task, job.seed), []).append(job)
    print(f"{sum(map(len, waiting.values()))} runs to do, {processes} at a time", flush=True)
    with ThreadPool(processes) as pool:
        pool.map(_run_seed, waiting.values(), chunksize=1)


def _run_seed(jobs: Sequence[Job]) -> None:
    for job in jobs:
        print(_run(job), flush=True)


def _run(job: Job) -> str:
    """Runs one job in a process of its own; says what came of it."""
    command = [sys.executable, __file__, "--one", json.dumps(dataclasses.astuple(job))]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    took = f"{time.perf_counter() - start:.0f} s"
    if done.returncode:
        return f"{job.name}, seed {job.seed}: failed after {took}: {done.stderr.strip().splitlines()[-1:]}"
    return f"{job.name}, seed {job.seed}: {json.loads(done.stdout.splitlines()[-1])['gain']:+.1f} points, {took}"


def child(task: str, name: str, seed: int, eval_set: str, settings: Settings) -> None:
    """One run in a process of its own; its folder is removed, its figures stay."""
    import shutil
    import tempfile

    root = WORK / task / "stores"
    root.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=root))
    try:
        result = run_one(task, settings, seed, eval_set, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    job = {"task": task, "name": name, "seed": seed, "eval_set": eval_set, "settings": settings, "commit": commit()}
    with open(FILE, "a", encoding="utf-8") as lines:
        lines.write(json.dumps({**job, **{key: _rounded(value) for key, value in result.items()}}) + "\n")
    print(json.dumps(result))


def _rounded(value: Any) -> Any:
    """Numbers at five digits, which is more than they are good for."""
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


# -------------------------------------------------------------------------------------------------------------- tables


def interval(values: Sequence[float]) -> str:
    """Mean with its 95 % interval by Student's distribution."""
    if len(values) < 2:
        return f"{values[0]:+.1f}" if values else "-"
    degrees = min(len(values) - 1, len(T_QUANTILE) - 1)
    half = T_QUANTILE[degrees] * stdev(values) / math.sqrt(len(values))
    return f"{mean(values):+.1f} ± {half:.1f}"


COLUMNS = ("seeds", "after, %", "gain", "TSO is ahead by", "sampled, %", f"best of {SAMPLES}, %", "KL", "tokens",
           "distinct", "chosen drift", "s")  # fmt: skip


def tables(jobs: Iterable[Job]) -> str:
    """One table for each task: mean and 95 % interval over seeds, and differences to TSO on the same seeds."""
    by_task: dict[str, dict[tuple[str, str], dict[int, Row]]] = {}
    for job in jobs:
        if (result := job.result()) is not None:
            key = job.name, json.dumps(job.settings, sort_keys=True)
            by_task.setdefault(job.task, {}).setdefault(key, {})[job.seed] = result
    return "\n\n".join(f"{task}\n\n{_table(rows)}" for task, rows in by_task.items())


def _table(runs: Mapping[tuple[str, str], Mapping[int, Row]]) -> str:
    known = _known()
    of_tso = [of_seeds for (name, _), of_seeds in runs.items() if name == "tso"]
    ours = max(of_tso, key=lambda found: (len(found), mean(row["gain"] for row in found.values())), default={})
    counts: dict[str, int] = {}
    for name, _ in runs:
        counts[name] = counts.get(name, 0) + 1
    rows = []
    for (name, settings), of_seeds in runs.items():
        found = list(of_seeds.values())
        ahead = [ours[seed]["gain"] - row["gain"] for seed, row in of_seeds.items() if seed in ours and name != "tso"]
        title = known[name].title + (f" {settings}" if counts[name] > 1 else "")
        means = {key: mean(row[key] for row in found) for key in ("sampled", "best_of_k", "kl", "tokens", "distinct",
                                                                  "chosen_drift", "seconds")}  # fmt: skip
        rows.append([
            title, str(len(found)), f"{100 * mean(row['scores'][-1] for row in found):.1f}",
            interval([row["gain"] for row in found]), interval(ahead), f"{100 * means['sampled']:.1f}",
            f"{100 * means['best_of_k']:.1f}", f"{means['kl']:.2f}", f"{means['tokens']:.1f}",
            f"{means['distinct']:.2f}", f"{means['chosen_drift']:+.2f}", f"{means['seconds']:.0f}",
        ])  # fmt: skip
    return table(["method", *COLUMNS], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *ABLATIONS], metavar="METHOD", help="default: all")
    parser.add_argument("--recipes", nargs="+", help="names of recipes, or all", metavar="RECIPE",
                        choices=["all", *(recipe.name for recipe in recipes.recipes())])  # fmt: skip
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, help="how many of the seeds; default: all")
    parser.add_argument("--tune", action="store_true", help="every trial of each method, on development seeds")
    parser.add_argument("--top", type=int, help="with --tune: trials of a method that go on after two seeds")
    parser.add_argument("--extra", type=json.loads, default={}, help="JSON of settings for every run")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at once, each with one thread")
    parser.add_argument("--table", action="store_true", help="print the tables of the runs that are there")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        child(*arguments.one)
        return
    jobs = jobs_of(arguments)
    if not arguments.table:
        run_all(jobs, arguments.processes)
    print(tables(jobs))


if __name__ == "__main__":
    main()
