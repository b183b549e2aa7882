"""The commands from end to end, and what they leave behind when they cannot finish."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import read_rows, write_rows

from tso_fast import __version__, suites
from tso_fast.cli import main

Cli = Callable[..., Any]


def cells(folder: Path, *names: str) -> str:
    return json.dumps([{"path": str(folder / name), "version_rank": int(name[-1])} for name in names])


@contextlib.contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Writing on fails as on a full disk, with another word for it (EFBIG)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_error(ended: Any, status: int, *parts: str) -> None:
    assert ended.status == status, ended.err
    assert ended.out == ""
    assert "Traceback" not in ended.err
    last = ended.err.splitlines()[-1]
    assert last.startswith("error: ")
    for part in parts:
        assert part in last


# ---- what each command makes


def numbers_of(name: str, out: str) -> list[str]:
    """The numbers in the last row of the printed tables that begins with a name."""
    return [line[len(name) :].split() for line in out.splitlines() if line.startswith(f"{name} ")][-1]


def test_pairs_of_real_responses(cli: Cli, gsm8k_dev: Path, tmp_path: Path) -> None:
    """660 questions answered by a real 2 x 2 matrix; the table shows the errors of the prior that the data has."""
    output = tmp_path / "new folder/pairs.jsonl"
    ended = cli("pairs", ["--responses", gsm8k_dev, "--verifier", "numeric", "--max_pairs", 2, "--output", output])
    assert ended.status == 0, ended.err
    rules = ("human", "larger", "newer", "newer+larger", "none", "all")
    table = {rule: numbers_of(rule, ended.out) for rule in rules}
    kept, swapped, dropped = ({rule: int(row[i].replace(",", "")) for rule, row in table.items()} for i in range(3))
    assert kept["all"] + swapped["all"] + dropped["all"] == 6600
    for rule in ("human", "larger", "newer", "newer+larger"):
        assert table[rule][3] == f"{swapped[rule] / (kept[rule] + swapped[rule]):.1%}"
    assert (swapped["human"], table["newer+larger"][3], table["none"][3]) == (0, "6.2%", "-")
    rows = read_rows(output)
    by_decision = {d: sum(row["decision"] == d for row in rows) for d in ("keep", "swap")}
    prompts = len({row["prompt_id"] for row in rows})
    used = f"{by_decision['keep']} kept, {by_decision['swap']} swapped"
    assert f"used      {len(rows)} pairs of {prompts} of 660 prompts ({used})" in ended.out
    assert f"{len(rows)} pairs in {output}" in ended.err
    assert sorted(content(tmp_path)) == ["new folder/pairs.jsonl"]


@pytest.mark.slow
def test_pairs_shows_prior_corrected_and_oracle_errors(cli: Cli, gsm8k_dev: Path, tmp_path: Path) -> None:
    """Three simulated judges, 85 % right, on a real matrix; what the data know of each response is no evidence."""
    rng = np.random.default_rng(0)
    verdicts = []
    for row in read_rows(gsm8k_dev):
        correct = [r["is_correct"] for r in row["responses"]]
        for i, j in itertools.combinations(range(4), 2):
            for judge in "abc":
                right = rng.random() < (0.85 if correct[i] != correct[j] else 0.5)
                verdicts.append(
                    {
                        "prompt_id": row["id"],
                        "responses": [i, j],
                        "judge": judge,
                        "probability": float(right == (correct[i] >= correct[j])),
                    }
                )
    file, output = write_rows(tmp_path / "v.jsonl", verdicts), tmp_path / "pairs.jsonl"
    arguments = ["--responses", gsm8k_dev, "--verdicts", file, "--evidence", "calibrated", "--oracle", "is_correct"]
    ended = cli("pairs", [*arguments, "--output", output])
    assert ended.status == 0, ended.err
    pairs, prior, corrected, kept, best = numbers_of("all ordered", ended.out)
    assert (pairs, prior) == ("996", "15.7%")
    assert float(kept.rstrip("%")) > 95
    assert float(corrected.rstrip("%")) < 3.5
    assert float(corrected.rstrip("%")) == pytest.approx(float(best.rstrip("%")), abs=1.5)
    assert "evidence  calibrated: told" in ended.out
    believed, interval = numbers_of("prior: newer+larger", ended.out)[5:7]
    assert believed.endswith("%")
    low, high = map(int, interval.split("–"))
    assert low < float(believed.rstrip("%")) < high
    assert float(numbers_of("a", ended.out)[5].rstrip("%")) > 70
    same = cli("judges", [gsm8k_dev, file, "--output", tmp_path / "judges.json", "--figure", tmp_path / "judges.png"])
    assert same.status == 0, same.err
    assert numbers_of("prior: newer+larger", same.out)[5:7] == [believed, interval]
    assert "evidence  calibrated: 3 judges voted whose reliability can be estimated" in same.out
    assert "no figure: no judge has votes of several strengths" in same.err
    told = json.loads((tmp_path / "judges.json").read_text())
    assert told["judges"]["a"]["accuracy"] > 0.7
    assert all(row["best_pairs"] > row["random_pairs"] > 0 for row in told["labels"])
    assert [(s["gain"] > 0, len(s["responses"])) for s in told["suggested"]] == [(True, 2)] * 5
    first = told["suggested"][0]
    assert f"label     prompt {first['prompt_id']}, responses {first['responses'][0]} and" in same.out
    ended = cli("pairs", [*arguments, "--min_confidence", 0.9, "--output", tmp_path / "sure.jsonl"])
    _, _, corrected, kept, _ = numbers_of("all ordered", ended.out)
    assert float(corrected.rstrip("%")) < 2.5
    assert 40 < float(kept.rstrip("%")) < 95
    assert "drop: unsure" in ended.out.replace("\n", " ")


def test_generate_score_pairs_eval_read_what_the_one_before_wrote(cli: Cli, tiny_matrix: Path, tmp_path: Path) -> None:
    prompts = write_rows(tmp_path / "prompts.jsonl", read_rows(tiny_matrix / "prompts.jsonl")[:8])
    responses, verdicts, pairs, accuracies = (tmp_path / f"{name}.jsonl" for name in ("r", "v", "p", "a"))
    shared = ["--prompts", prompts, "--max_completion_length", 6, "--use_cpu"]
    matrix = ["--cells", cells(tiny_matrix, "s.v1", "m.v1", "m.v2")]

    ended = cli("generate", [*shared, *matrix, "--output", responses])
    assert ended.status == 0, ended.err
    human = sum("human_response" in row for row in read_rows(prompts))
    rows = read_rows(responses)
    assert [row["id"] for row in rows] == [row["id"] for row in read_rows(prompts)]
    made = [(r["model"], r["sample"]) for r in rows[0]["responses"] if r["model"] != "human"]
    assert made == [(name, sample) for name in ("s.v1", "m.v1", "m.v2") for sample in (0, 1)]
    assert f"{8 * 6 + human} responses to 8 prompts in {responses}" in ended.err
    again = tmp_path / "again.jsonl"
    assert cli("generate", [*shared, *matrix, "--output", again]).status == 0
    assert again.read_bytes() == responses.read_bytes()

    ended = cli("score", ["--responses", responses, "--verifier", "toy_verifier:letters", "--output", verdicts])
    assert ended.status == 0, ended.err
    scored = read_rows(verdicts)
    assert len(scored) == 8 * 6 + human
    mean = sum(v["score"] for v in scored if rows_model(rows, v) == "s.v1") / 16
    assert numbers_of("s.v1", ended.out) == ["verifier", "16", f"{mean:.3f}", "0"]

    direct = tmp_path / "direct.jsonl"
    for source, output in ((["--verdicts", verdicts], pairs), (["--verifier", "toy_verifier:letters"], direct)):
        assert cli("pairs", ["--responses", responses, *source, "--output", output]).status == 0
    assert pairs.read_bytes() == direct.read_bytes()
    assert all(row["score_chosen"] > row["score_rejected"] for row in read_rows(pairs))

    ended = cli("eval", [*shared, *matrix, "--verifier", "toy_verifier:letters", "--output", accuracies])
    assert ended.status == 0, ended.err
    results = json.loads(accuracies.read_text())
    assert [r["model"] for r in results] == ["s.v1", "m.v1", "m.v2"]
    assert all(r["low"] <= r["accuracy"] <= r["high"] and r["responses"] == 8 for r in results)
    assert all(f"{r['accuracy']:.1%}" in ended.out for r in results)


def rows_model(rows: list[dict[str, Any]], verdict: dict[str, Any]) -> str:
    row = next(row for row in rows if row["id"] == verdict["prompt_id"])
    return str(row["responses"][verdict["response"]]["model"])


# ---- bad rows


GOOD = (
    '{"id": "1", "prompt": "a", "answer": "5", "responses": [{"model": "m", "text": "5"}, {"model": "n", "text": "4"}]}'
)
NO_ANSWER = '{"id": "4", "prompt": "1 + 1?", "responses": [{"model": "m", "text": "2"}]}'


@pytest.mark.parametrize("command", ["score", "pairs"])
def test_bad_rows_raise_or_are_set_aside_and_counted(cli: Cli, tmp_path: Path, command: str) -> None:
    file, output = tmp_path / "r.jsonl", tmp_path / "out.jsonl"
    file.write_text("\n".join([GOOD, '{"id": "2", "prompt": ""}', "not json", NO_ANSWER]))
    arguments = ["--responses", file, "--verifier", "exact", "--output", output]
    assert_error(cli(command, arguments), 2, f"{file}:2: field 'prompt' is empty", "--on_bad_row skip")
    assert sorted(content(tmp_path)) == ["r.jsonl"]
    ended = cli(command, [*arguments, "--on_bad_row", "skip"])
    assert ended.status == 0, ended.err
    aside = tmp_path / "out.jsonl.skipped.jsonl"
    assert f"3 bad rows set aside in {aside}" in ended.err
    assert [row["error"].removeprefix(f"{file}:")[:2] for row in read_rows(aside)] == ["2:", "3:", "4:"]
    assert [row["row"]["id"] for row in read_rows(aside) if isinstance(row["row"], dict)] == ["2", "4"]
    assert len(read_rows(output)) == {"score": 3, "pairs": 1}[command]


def test_eval_without_an_output_still_counts_bad_rows(cli: Cli, tiny_matrix: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "2 + 3?", "answer": "5"}\n{"prompt": "no answer"}\n')
    arguments = [
        "--prompts",
        file,
        "--cells",
        cells(tiny_matrix, "s.v1"),
        "--verifier",
        "exact",
        "--use_cpu",
        "--max_completion_length",
        4,
    ]
    assert_error(cli("eval", arguments), 2, f"{file}:2: field 'answer' is missing")
    ended = cli("eval", [*arguments, "--on_bad_row", "skip"])
    assert ended.status == 0
    assert f"1 bad rows skipped, the first: {file}:2: field 'answer' is missing" in ended.err
    assert "1 prompts, verifier exact" in ended.out


def test_a_prompt_longer_than_the_context(cli: Cli, tiny_matrix: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "p.jsonl", [{"prompt": "short"}, {"prompt": "Sam adds 2 pears. " * 200}])
    output = tmp_path / "out.jsonl"
    arguments = [
        "--prompts",
        file,
        "--cells",
        cells(tiny_matrix, "s.v1"),
        "--output",
        output,
        "--use_cpu",
        "--max_completion_length",
        4,
    ]
    assert_error(cli("generate", arguments), 2, f"{file}:2: field 'prompt' has ", "exceeds the context of 512")
    ended = cli("generate", [*arguments, "--on_bad_row", "skip"])
    assert ended.status == 0
    assert len(read_rows(output)) == 1


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_a_command_without_its_engine_leaves_nothing_behind(
    cli: Cli, tiny_matrix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else find(name, *rest))
    file = write_rows(tmp_path / "p.jsonl", [{"prompt": "2 + 3?", "answer": "5"}])
    arguments = ["--prompts", file, "--cells", cells(tiny_matrix, "s.v1"), "--output", tmp_path / "out"]
    arguments += ["--use_cpu", "--generator", "vllm", "--max_completion_length", 4]
    arguments += ["--verifier", "exact"] if command == "eval" else []
    assert_error(cli(command, arguments), 2, "generator: vLLM is not installed. ")
    assert sorted(content(tmp_path)) == ["p.jsonl"]


# ---- exit statuses and messages


def test_usage(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    from tso_fast.cli import main

    for arguments, status in ((["--help"], 0), (["-h"], 0), ([], 2)):
        assert main(arguments) == status
        assert capsys.readouterr().out.startswith("usage: tso-fast COMMAND")
    assert cli("--version") == (0, f"{__version__}\n", "")


@pytest.mark.parametrize(
    ("command", "arguments", "parts"),
    [
        ("trian", [], ["unknown command 'trian'; did you mean 'train'?; expected one of train, plan"]),
        ("pairs", ["--maxpairs", "3"], ["unknown key 'maxpairs'; did you mean 'max_pairs'?"]),
        ("pairs", ["--responses", "gone.jsonl", "--output", "o"], ["gone.jsonl: no such file; expected JSONL"]),
        ("score", ["--responses", "r", "--output", "o"], ["verifier: missing; `tso-fast score` needs a judge"]),
        ("eval", ["--prompts", "p", "--cells", "[{path: a}]"], ["verifier: missing; `tso-fast eval` needs one"]),
        ("train", ["--task", "sklls"], ["task: got 'sklls'; did you mean 'skills'?; expected one of skills, writing"]),
        ("train", ["--task=", "--seed", "1"], ["task: got ''; expected one of skills, writing"]),
        ("judges", ["gone.jsonl"], ["gone.jsonl: no such file; expected JSONL"]),
        ("judges", ["a.jsonl", "b.jsonl", "c.jsonl"], ["c.jsonl"]),
        ("pairs", ["config.yaml"], ["config: 'config.yaml' is no file; expected YAML"]),
        ("report", [], ["report: got nothing, expected one run folder"]),
        ("report", ["gone"], ["gone: holds no run.json"]),
    ],
)
def test_bad_input_ends_with_2(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, arguments: list[str], parts: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_error(cli(command, arguments), 2, *parts)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_no_file_can_have(cli: Cli, tiny_matrix: Path, tmp_path: Path) -> None:
    name = "x" * 300
    rows, cell = tiny_matrix / "prompts.jsonl", cells(tiny_matrix, "s.v1")
    scored = write_rows(tmp_path / "r.jsonl", [{"prompt": "a", "responses": [{"model": "m", "text": "t"}] * 2}])
    train = ["--prompts", rows, "--verifier", "exact", "--num_iterations", 1]
    for command, arguments, status in (
        ("pairs", ["--config", name], 2),
        ("pairs", ["--responses", name, "--output", tmp_path / "o"], 2),
        ("pairs", ["--responses", scored, "--verdicts", name, "--output", tmp_path / "o"], 2),
        ("pairs", ["--responses", scored, "--output", tmp_path / name], 3),
        ("generate", ["--prompts", rows, "--cells", f"[{{path: {name}}}]", "--output", tmp_path / "o"], 2),
        ("train", [*train, "--output_dir", tmp_path / name, "--cells", cell], 3),
        ("train", [*train, "--output_dir", tmp_path / "run", "--cells", f"[{{path: {name}}}]"], 2),
        ("report", [name], 2),
        ("annotate", [name], 2),
    ):
        assert_error(cli(command, arguments), status, name[:200])


def test_two_sources_of_verdicts(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text(GOOD)
    arguments = ["--responses", tmp_path / "r.jsonl", "--verdicts", "v", "--verifier", "exact", "--output", "o"]
    assert_error(
        cli("pairs", arguments), 2, "verdicts: give either a file of verdicts or judges (a verifier is one), not both"
    )


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ('{"verifyer": 2}', "score_weights: no scorer is called 'verifyer'; the scorers are verifier"),
        ('{"verifier": 0}', "score_weights: {'verifier': 0.0} leaves no scorer"),
    ],
)
def test_weights_that_fit_no_scorer(cli: Cli, tmp_path: Path, weights: str, message: str) -> None:
    (tmp_path / "r.jsonl").write_text(GOOD)
    arguments = ["--responses", tmp_path / "r.jsonl", "--verifier", "exact", "--output", tmp_path / "o"]
    assert_error(cli("pairs", [*arguments, "--score_weights", weights]), 2, message)
    assert sorted(content(tmp_path)) == ["r.jsonl"]


def test_scores_in_the_data_named_like_a_judge(cli: Cli, tmp_path: Path) -> None:
    write_rows(
        tmp_path / "r.jsonl",
        [
            {
                "prompt": "2 + 3?",
                "answer": "5",
                "responses": [{"model": "a", "text": "5", "scores": {"verifier": 0.5}}, {"model": "b", "text": "6"}],
            }
        ],
    )
    arguments = ["--responses", tmp_path / "r.jsonl", "--verifier", "exact", "--output", tmp_path / "o"]
    assert_error(cli("pairs", arguments), 2, "the data have scores named 'verifier', and so has a judge of this run")


@pytest.mark.slow
def test_an_error_of_a_real_process_goes_to_stderr(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    arguments = ["pairs", "--responses", "r.jsonl", "--output", "o.jsonl"]
    program = "import sys; from tso_fast.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: r.jsonl:1: byte 0xe9 at column 16 is not UTF-8")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_an_interrupt_leaves_nothing_behind(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, status: int
) -> None:
    module = f"impatient_{status}"
    stops = f"os.kill(os.getppid(), signal.{name}); time.sleep(60)"  # a verifier runs in a worker
    (tmp_path / f"{module}.py").write_text(f"import os, signal, time\ndef f(*a): {stops}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "r.jsonl").write_text(GOOD)
    before = content(tmp_path)
    ended = cli("score", ["--responses", tmp_path / "r.jsonl", "--verifier", f"{module}:f", "--output", tmp_path / "o"])
    assert (ended.status, ended.out) == (status, "")
    assert "stopped" in ended.err
    assert {name: before.get(name) for name in content(tmp_path) if "__pycache__" not in name} == before


@pytest.mark.slow
def test_a_stopped_program_ends_at_once_and_in_order() -> None:
    """What was to be done at the exit is done, but no module is taken down."""
    program = (
        "import atexit, sys\n"
        "from tso_fast import cli\n"
        "class Slow:\n"
        "    def __del__(self): print('taken down')\n"
        "slow = Slow()\n"
        "def stops(arguments): print('half a line', end=''); raise KeyboardInterrupt\n"
        "atexit.register(print, ', done')\n"
        "cli.COMMANDS['env'] = stops\n"
        "sys.argv = ['tso-fast', 'env']\n"
        "sys.exit(cli.main())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (130, "half a line, done\n")
    assert done.stderr == "\nstopped; the same command goes on from here\n"


# ---- exceptions that nobody expected


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Commands that end with an exception of somebody's choice."""
    from tso_fast import commands

    def end_with(error: BaseException) -> None:
        def raises(*arguments: object) -> None:
            raise error

        for name in ("report", "pairs"):
            monkeypatch.setattr(commands, name, raises)

    return end_with


def crash_file(ended: Any) -> Path:
    found = re.search(r"its traceback is in (\S+crash-\S+\.txt);", ended.err)
    assert found is not None, ended.err
    return Path(found[1])


def test_an_unexpected_exception_leaves_its_traceback_in_the_run_folder(
    cli: Cli, tmp_path: Path, faulty: Callable[[BaseException], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-precious-key")
    (tmp_path / "run.json").write_text("{}")
    faulty(KeyError("http://me:hunter2@host/v1?api_key=abc sk-precious-key\nand a second line"))
    ended = cli("report", [tmp_path])
    assert_error(ended, 1, "KeyError: ", "the same command goes on", "please report it with that file")
    assert ended.err.count("\n") == 1
    file = crash_file(ended)
    assert file.parent == tmp_path
    text = file.read_text()
    assert text.startswith(f"tso-fast report {tmp_path}\nPython 3.")
    assert "Traceback (most recent call last)" in text
    assert "in raises" in text
    for secret in ("hunter2", "abc", "sk-precious-key"):
        assert secret not in text + ended.err


def test_an_unexpected_exception_without_a_run_folder_goes_to_a_temporary_file(
    cli: Cli, tmp_path: Path, faulty: Callable[[BaseException], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for error, said in ((RecursionError("deep"), "please report it"), (MemoryError(), "memory ran out: lower")):
        faulty(error)
        ended = cli("pairs", ["--responses", "r", "--output", "o"])
        assert_error(ended, 1, type(error).__name__, said)
        assert crash_file(ended).parent == tmp_path
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    assert_error(cli("pairs", ["--responses", "r", "--output", "o"]), 1, "its traceback could not be written")


@pytest.mark.slow
def test_a_reader_that_has_enough_ends_a_command_quietly() -> None:
    command = [sys.executable, "-c", "import sys; from tso_fast.cli import main; sys.exit(main(['--help']))"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


# ---- outputs that are there, or cannot be written


@pytest.mark.parametrize("command", ["generate", "score", "pairs", "eval"])
def test_an_output_that_exists_is_refused_and_kept(cli: Cli, tmp_path: Path, command: str) -> None:
    """Before any work: the cells are not even looked for."""
    (tmp_path / "r.jsonl").write_text(GOOD)
    (tmp_path / "out.jsonl").write_text("precious\n")
    name = "--prompts" if command in ("generate", "eval") else "--responses"
    arguments = [name, tmp_path / "r.jsonl", "--output", tmp_path / "out.jsonl"]
    arguments += ["--cells", '[{"path": "gone"}]'] if name == "--prompts" else []
    arguments += [] if command == "generate" else ["--verifier", "exact"]
    before = content(tmp_path)
    assert_error(cli(command, arguments), 2, f"output: {tmp_path}/out.jsonl exists already; choose another name")
    assert content(tmp_path) == before
    for output, reason in ((tmp_path / "r.jsonl/out", "r.jsonl is no folder"), (Path("/proc/out.jsonl"), "")):
        arguments[3] = output
        assert_error(cli(command, arguments), 3, f"cannot write {output}", reason, "Everything complete before is kept")
        assert content(tmp_path) == before


def test_a_read_only_file_system(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text(GOOD)
    with mounted(tmp_path / "ro", "ro,size=64k") as folder:
        ended = cli("score", ["--responses", tmp_path / "r.jsonl", "--verifier", "exact", "--output", folder / "o"])
    assert_error(ended, 3, f"cannot write {folder}/", "Read-only file system")


def ended_on_a_full_disk(cli: Cli, gsm8k_dev: Path, folder: Path) -> tuple[Any, bool]:
    """How a command ends whose output does not fit, and whether the folder is as it was before."""
    few = folder.parent / "few.jsonl"
    arguments = ["--verifier", "numeric", "--output"]
    assert cli("pairs", ["--responses", few, *arguments, folder / "few.jsonl"]).status == 0
    before = content(folder)
    ended = cli("pairs", ["--responses", gsm8k_dev, *arguments, folder / "all.jsonl"])
    return ended, content(folder) == before


def test_a_full_disk(cli: Cli, gsm8k_dev: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "few.jsonl", read_rows(gsm8k_dev)[:3])
    with mounted(tmp_path / "small", "size=64k") as folder:
        ended, is_kept = ended_on_a_full_disk(cli, gsm8k_dev, folder)
        said = f"cannot write {folder}/all.jsonl: No space left on device", "mend the cause (space, permissions)"
        assert_error(ended, 3, *said)
        assert is_kept


def test_a_file_that_cannot_grow(cli: Cli, gsm8k_dev: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "few.jsonl", read_rows(gsm8k_dev)[:3])
    (tmp_path / "out").mkdir()
    with files_no_larger_than(64 * 1024):
        ended, is_kept = ended_on_a_full_disk(cli, gsm8k_dev, tmp_path / "out")
    said = f"cannot write {tmp_path}/out/all.jsonl: File too large", "mend the cause (space, permissions)"
    assert_error(ended, 3, *said)
    assert is_kept


@pytest.mark.slow
def test_a_disk_that_fills_while_training(cli: Cli, tiny_matrix: Path, tmp_path: Path) -> None:
    """The weights do not fit, the stages before them are kept, and the same command finishes once there is room."""
    run = tmp_path / "run"
    arguments = [
        "--prompts",
        tiny_matrix / "prompts.jsonl",
        "--cells",
        cells(tiny_matrix, "s.v2", "m.v2"),
        "--output_dir",
        run,
        "--verifier",
        "toy_verifier:letters",
        "--num_iterations",
        1,
        "--use_cpu",
        "--max_completion_length",
        8,
        "--save_steps",
        1,
    ]
    for limit, unwritten in ((60_000, "responses.sqlite3"), (150_000, "iter-1/checkpoint")):
        with files_no_larger_than(limit):
            ended = cli("train", arguments)
        assert ended.status == 3, ended.err
        assert "Traceback" not in ended.err
        assert f"cannot write {run}/{unwritten}" in ended.err.splitlines()[-1]
        assert [*run.rglob(".tmp-*")] == []
    kept = {name: data for name, data in content(run).items() if name.startswith("iter-1/") and name.endswith(".jsonl")}
    assert {Path(name).name for name in kept} >= {"responses.jsonl", "verdicts.jsonl", "pairs.jsonl"}
    ended = cli("train", arguments)
    assert ended.status == 0, ended.err
    after = content(run)
    assert {name: after.get(name) for name in kept} == kept
    assert "model.safetensors" in after
    shutil.rmtree(run)


def test_bench_lists_the_suites_and_becomes_the_one_that_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    became: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, arguments: became.append([program, *arguments]))
    assert main(["bench"]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert listed == {path.stem.removeprefix("bench_") for path in suites.FOLDER.glob("bench_*.py")}
    assert main(["bench", "methods", "--table"]) == 0
    assert became == [[sys.executable, sys.executable, str(suites.FOLDER / "bench_methods.py"), "--table"]]
    assert main(["bench", "method"]) == 2
    monkeypatch.setattr(suites, "FOLDER", tmp_path)
    assert main(["bench"]) == 2
    told = capsys.readouterr().err
    assert "did you mean 'methods'" in told
    assert "clone it" in told
