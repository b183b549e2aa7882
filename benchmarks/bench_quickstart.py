"""The quickstart over several seeds, against plain DPO and chosen-only NLL at equal budget.

    python benchmarks/bench_quickstart.py                          the README's table: seeds 0 1 2, held-out prompts
    python benchmarks/bench_quickstart.py --eval_set development   to choose settings; never the held-out prompts
    python benchmarks/bench_quickstart.py -- --max_pairs 2         settings after `--` go to the loop

Every seed runs in a fresh process with an empty cache: wall time and peak memory are those of a first run. Seeds
change the matrix, the prompts and the sampling; the evaluation prompts are the same for all. The figures of a seed
are one run's; the spread over seeds is the standard deviation (n - 1).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import machine

ROOT = Path(__file__).parents[1]
LOSSES = {"dual_clip": "dual clip (TSO)", "dpo": "plain DPO", "sft": "chosen-only NLL"}


def run_one(seed: int, eval_set: str, folder: str, settings: list[str]) -> None:
    """Runs one seed with all losses in the child process; prints one JSON line."""
    from tso_fast.cli import quickstart_config
    from tso_fast.commands import train_and_compare
    from tso_fast.files.run import read_run

    start = time.perf_counter()
    output = f"{folder}/run"
    config = quickstart_config(["--seed", str(seed), "--output_dir", output, *settings], eval_set)
    compare, config.compare = config.compare, False
    train_and_compare(config)
    wall_s = time.perf_counter() - start
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    config.compare = compare
    accuracies = {}
    for run in train_and_compare(config):
        state = read_run(run)
        evaluations = [s["info"]["accuracy"] for s in state["stages"] if s["name"].endswith("eval")]
        accuracies[state["config"]["loss_type"]] = evaluations
    print(json.dumps({"seed": seed, "wall_s": wall_s, "peak_mb": peak_mb, "accuracies": accuracies}))


def child(arguments: argparse.Namespace, seed: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--one", str(seed), "--eval_set", arguments.eval_set, "--folder", folder]
        start = time.perf_counter()
        done = subprocess.run(
            [*command, "--", *arguments.settings],
            capture_output=True,
            text=True,
            env={**os.environ, "TSO_FAST_CACHE": f"{folder}/cache"},
        )
        if done.returncode:
            sys.exit(done.stderr[-4000:])
        found = done.stdout.splitlines()[-1]  # told at once: later seeds may be stopped
        print(f"seed {seed}: {time.perf_counter() - start:.0f} s: {found}", file=sys.stderr, flush=True)
        return json.loads(found)


def mean_and_spread(values: list[float], form: str) -> str:
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--eval_set", choices=["held_out", "development"], default="held_out")
    parser.add_argument("--output", help="JSON to write; default: benchmarks/results/quickstart-<eval_set>.json")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", default=[])
    arguments = parser.parse_args()
    if not arguments.settings and arguments.one is None:
        arguments.settings = ["--compare"]
    if arguments.one is not None:
        run_one(arguments.one, arguments.eval_set, arguments.folder, arguments.settings)
        return
    import torch
    import transformers

    results = [child(arguments, seed) for seed in arguments.seeds]
    num_iterations = len(next(iter(results[0]["accuracies"].values()))) - 1
    after = " | ".join(f"after {i}" for i in range(1, num_iterations + 1))
    print(f"| loss | before | {after} | gain, points |")
    print("| --- |" + " --- |" * (num_iterations + 2))
    for loss in results[0]["accuracies"]:
        runs = [[100 * a for a in r["accuracies"][loss]] for r in results]
        columns = [mean_and_spread(list(column), ".1f") for column in zip(*runs, strict=True)]
        gains = [run[-1] - run[0] for run in runs]
        print(f"| {LOSSES[loss]} | {' | '.join(columns)} | {mean_and_spread(gains, '+.1f').replace('± +', '± ')} |")
    wall, peak = [r["wall_s"] for r in results], [r["peak_mb"] for r in results]
    print(
        f"first run without --compare: {mean_and_spread(wall, '.0f')} s, peak RSS {max(peak):.0f} MiB; "
        f"{torch.get_num_threads()} threads"
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    record = {
        "command": " ".join(["python benchmarks/bench_quickstart.py", *sys.argv[1:]]),
        "commit": commit.strip(),
        "eval_set": arguments.eval_set,
        "machine": {"processor": machine()["processor"], "threads": torch.get_num_threads()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "results": results,
    }
    output = Path(arguments.output or ROOT / f"benchmarks/results/quickstart-{arguments.eval_set}.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
