"""Every setting is documented, read, checked, and survives YAML and the command line."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import write_rows

import tso_fast
from tso_fast import commands
from tso_fast.config import settings as settings_module
from tso_fast.config.checks import check
from tso_fast.config.help import GROUPS, OF_CLASS
from tso_fast.config.parse import ALIASES, parse
from tso_fast.config.settings import (
    AnnotateConfig,
    CellConfig,
    EvalConfig,
    GenerateConfig,
    JudgeConfig,
    PairsConfig,
    PlanConfig,
    ScoreConfig,
    TrainConfig,
    of_iteration,
    to_dict,
)
from tso_fast.errors import InputError, OutputError, TrainingError
from tso_fast.redact import redact, redact_arguments
from tso_fast.training.optimise import configured_loss

PACKAGE = Path(tso_fast.__file__).parent
CLASSES = [c for c in vars(settings_module).values() if dataclasses.is_dataclass(c) and isinstance(c, type)]
COMMANDS: dict[str, type] = {
    "train": TrainConfig,
    "plan": PlanConfig,
    "generate": GenerateConfig,
    "score": ScoreConfig,
    "pairs": PairsConfig,
    "eval": EvalConfig,
    "annotate": AnnotateConfig,
}
FIELDS = sorted({(c, f.name) for c in CLASSES for f in dataclasses.fields(c)}, key=lambda x: (x[0].__name__, x[1]))
CELLS = '[{"path": "a"}]'
NEEDED = {
    "train": ["--prompts", "p", "--output_dir", "o", "--cells", CELLS],
    "plan": ["--prompts", "p", "--output_dir", "o", "--cells", CELLS],
    "generate": ["--prompts", "p", "--output", "o", "--cells", CELLS],
    "score": ["--responses", "r", "--output", "o", "--verifier", "exact"],
    "pairs": ["--responses", "r", "--output", "o"],
    "eval": ["--prompts", "p", "--cells", CELLS, "--verifier", "exact"],
    "annotate": ["--run", "r"],
}


def settings(command: str, *arguments: str) -> Any:
    return parse(command, COMMANDS[command], [*NEEDED[command], *arguments])


def refusal(command: str, *arguments: str) -> str:
    with pytest.raises(InputError) as caught:
        settings(command, *arguments)
    return str(caught.value)


# ---- documented and read


def test_every_field_is_documented_beside_it() -> None:
    tree = ast.parse(Path(settings_module.__file__).read_text(encoding="utf-8"))
    documented = 0
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        assert ast.get_docstring(node), node.name
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                name = f"{node.name}.{ast.unparse(field.target)}"
                assert isinstance(after, ast.Expr), name
                assert isinstance(after.value, ast.Constant), name
                assert str(after.value.value).strip().endswith("."), name
                documented += 1
    assert documented >= len({name for _, name in FIELDS})


def attributes_read_of_configs() -> set[str]:
    """Names x in `config.x`, whatever the variable's full name, everywhere but in the settings themselves."""
    found = set()
    for file in PACKAGE.rglob("*.py"):
        if file.name == "settings.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            is_read = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
            if is_read and ast.unparse(node.value) in ("config", "self.config", "cell_config", "judging", "settings"):
                found.add(node.attr)
    return found


def test_every_field_is_read_by_something() -> None:
    config = settings("train", "--beta", "0.2", "--clip_chosen", "1", "--clip_rejected", "2")
    options = dict(configured_loss(config).options)  # read by name; test_losses turns each
    assert options == {"beta": 0.2, "clip_chosen": 1.0, "clip_rejected": 2.0}
    read = attributes_read_of_configs() | set(options)
    assert {"learning_rate", "temperature", "verifier_pattern"} <= read  # the search itself works
    assert sorted({name for _, name in FIELDS} - read) == []


@pytest.mark.parametrize("command", ["generate", "score", "pairs", "eval"])
def test_a_command_reads_every_setting_it_offers(command: str, tmp_path: Path, tiny_matrix: Path) -> None:
    """Runs it with a configuration that notes which fields are asked for."""
    read: set[str] = set()

    class Noting(COMMANDS[command]):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    responses = [{"model": f"m.v{rank}", "version_rank": rank, "text": str(4 + rank)} for rank in (0, 1)]
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "2 + 3?", "answer": "5", "responses": responses}])
    values: dict[str, Any] = {
        "prompts": str(rows),
        "responses": str(rows),
        "max_completion_length": 2,
        "cells": [CellConfig(path=str(tiny_matrix / "s.v1"))],
        "use_cpu": True,
    }
    if command == "score":
        kinds = ({"kind": "llm", "max_completion_length": 2}, {"kind": "implicit"})
        values["judges"] = [JudgeConfig(cell="policy", **kind) for kind in kinds]
    elif command == "pairs":  # with comparisons and labels
        said = {"prompt_id": "row-1", "responses": [0, 1], "probability": 0.9}
        labels = write_rows(
            tmp_path / "labels.jsonl", [{**said, "judge": "human", "annotator": "ann", "probability": 1}]
        )
        verdicts = write_rows(tmp_path / "verdicts.jsonl", [{**said, "judge": "llm"}])
        values |= {
            "soft_label_by": "probability",
            "pair_strategy": "diverse",
            "labels": str(labels),
            "verdicts": str(verdicts),
        }
    fields = {f.name for f in dataclasses.fields(COMMANDS[command])}
    run: Callable[[Any], None] = getattr(commands, {"eval": "evaluate"}.get(command, command))
    for number in (1, 2, 3) if command == "pairs" else (1,):  # comparisons and labels; a verifier; no evidence
        values["output"] = str(tmp_path / f"out-{number}")
        if command != "pairs" or number == 2:
            values |= {"verifier": "exact", "verdicts": None, "soft_label_by": None, "soft_label_kappa": 1.0}
        if number == 3:
            values |= {"verifier": None, "labels": None}
        run(Noting(**{name: value for name, value in values.items() if name in fields}))
    assert sorted(fields - read) == []


# ---- unknown keys and wrong types


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option_names_the_nearest(command: str) -> None:
    assert refusal(command, "--on_bad_rows", "skip") == "unknown key 'on_bad_rows'; did you mean 'on_bad_row'?"
    assert refusal(command, "--xyzzy=1") == "unknown key 'xyzzy'"


@pytest.mark.parametrize(
    ("command", "given", "meant"),
    [
        ("train", "lr", "learning_rate"),
        ("train", "epochs", "num_train_epochs"),
        ("train", "batch_size", "per_device_train_batch_size"),
        ("train", "max_new_tokens", "max_completion_length"),
        ("train", "model_name_or_path", "cells"),
        ("train", "dataset", "prompts"),
        ("train", "output", "output_dir"),
        ("pairs", "output_dir", "output"),
    ],
)
def test_what_others_call_a_setting_is_understood(command: str, given: str, meant: str) -> None:
    assert refusal(command, f"--{given}", "1") == f"unknown key {given!r}; did you mean {meant!r}?"


def test_an_alias_stands_for_a_setting_and_is_none() -> None:
    for theirs, here in ALIASES.items():
        offering = [{f.name for f in dataclasses.fields(cls)} for cls in COMMANDS.values()]
        assert any(here in names for names in offering), here
        assert all(alias not in names for names in offering for alias in theirs.split() if here in names), theirs


def test_an_unknown_key_in_yaml_names_file_line_and_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("learning_rate: 1.0e-3\n\nlearning_rat: 1.0e-4\n")
    assert refusal("train", "--config", str(file)) == (
        f"{file}:3: unknown key 'learning_rat'; did you mean 'learning_rate'?"
    )


def test_an_unknown_key_of_a_cell_names_it_and_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("cells:\n- path: a\n- {path: b, version: 3}\n")
    said = "cells[1]: unknown key 'version'; did you mean 'version_rank'?"
    assert refusal("train", "--config", str(file)) == f"{file}: {said}"
    assert refusal("train", "--cells", '[{"path": "a"}, {"path": "b", "version": 3}]') == said
    assert refusal("train", "--cells+={pth: a}") == "cells[0]: unknown key 'pth'; did you mean 'path'?"
    assert refusal("train", "--cells.pth", "a") == "cells[0]: unknown key 'pth'; did you mean 'path'?"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_pairs", "two"], "max_pairs: got two, expected int"),
        (["--max_pairs", "2.5"], "max_pairs: got 2.5, expected int"),
        (["--max_pairs", "null"], "max_pairs: got None, expected int"),
        (["--max_pairs"], "max_pairs: expected one argument"),
        (["--min_margin", "much"], "min_margin: got much, expected float"),
        (["--consensus", "avg"], "consensus: got avg, expected one of 'mean', 'median', 'borda', 'win_rate'"),
        (["--score_weights", "3"], "score_weights: got 3, expected dict[str, float] or null"),
        (["--score_weights", '{"a": "b"}'], "score_weights: got {'a': 'b'}, expected dict[str, float] or null"),
        (["--soft_label_kappa", "x"], "soft_label_kappa: got x, expected float or null"),
        (["--max_pairs", "0"], "max_pairs: got 0, expected an integer >= 1"),
        (["--min_margin", ".nan"], "min_margin: got nan, expected a finite number >= 0"),
        (["--seed", "-1"], "seed: got -1, expected an integer in [0, 2**32)"),
        (["--score_weights", '{"a": -1}'], "score_weights.a: got -1.0, expected a finite number >= 0"),
        (["elsewhere.jsonl"], "unrecognized arguments: elsewhere.jsonl"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_value_names_the_key(arguments: list[str], message: str) -> None:
    assert refusal("pairs", *arguments).startswith(message)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("num_iterations: two", "num_iterations: got two, expected int"),
        ("num_iterations: [1]", "num_iterations: got [1], expected int"),
        ("num_iterations: true", "num_iterations: got True, expected int"),
        ("num_iterations: null", "num_iterations: got None, expected int"),
        ("compare: 1", "compare: got 1, expected bool"),
        ("policy: 3", "policy: got 3, expected str or null"),
        ("prompts: 3", "prompts: got 3, expected str"),
        ("top_p: 1.5", "top_p: got 1.5, expected a number in (0, 1]"),
        ("adam_beta2: 1", "adam_beta2: got 1.0, expected a number in [0, 1)"),
        ("beta: 0", "beta: got 0.0, expected a finite number > 0"),
        ("clip_chosen: -1", "clip_chosen: got -1.0, expected a number >= 0"),
        ("cells: [a]", "cells[0]: got 'a', expected keys and values such as {path: FOLDER}"),
        ("cells: null", "cells: missing"),
        ("cells: [{name: a}]", "cells: path: missing"),
        ("cells: [{path: 3}]", "cells: path: got 3, expected str"),
        ("cells: [{path: a, version_rank: new}]", "cells: version_rank: got new, expected int"),
        ("cells: [{path: a, version_rank: null}]", "cells[0].version_rank: got None, expected int"),
        ("cells: [{path: a, name: ' '}]", "cells[0].name: got ' ', expected some text, or leave it out"),
        ("judges: [{kind: agreement, name: ''}]", "judges[0].name: got '', expected some text, or leave it out"),
        ("cells: [{path: a, size_b: -1}]", "cells[0].size_b: got -1.0, expected a finite number > 0"),
        ("cells: [", "broken YAML"),
        ("seed: 1\nbeta: 1\nseed: 2", "broken YAML: key 'seed' is given twice; line 1 ff."),
        ("cells: [{path: a, path: b}]", "broken YAML: key 'path' is given twice; line 3 ff."),
        ("seed: 0x_", "broken YAML: invalid literal for int"),
        ("cells: " + "[" * 3000, "brackets or lists are nested too deeply"),
        ("- a", "expected keys and values, got a list"),
        ("", "expected keys and values, got nothing"),
    ],
)
def test_a_wrong_value_in_yaml_names_the_key(tmp_path: Path, yaml: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    needed = [f"{key}: {value}" for key, value in (("prompts", "p"), ("output_dir", "o"), ("cells", CELLS))]
    file.write_text("\n".join([*(line for line in needed if not yaml.startswith(line.split(":")[0])), yaml]))
    if not yaml or yaml.startswith("-"):
        file.write_text(yaml)
    with pytest.raises(InputError) as caught:
        parse("train", TrainConfig, [str(file)])
    assert str(caught.value).removeprefix(f"{file}: ").startswith(message)


@pytest.mark.parametrize(
    ("judges", "message"),
    [
        ("[{kind: llm, modle: x}]", "judges[0]: unknown key 'modle'; did you mean 'model'?"),
        ("[llm]", "judges[0]: got 'llm', expected keys and values such as {kind: llm, cell: policy}"),
        ("[{kind: llms}]", "judges[0].kind: got 'llms', expected one of llm, implicit, agreement, verifier"),
        ("[{kind: llm}]", "judges[0].cell: got neither of cell and model"),
        ("[{kind: llm, cell: policy, num_votes: 0}]", "judges[0].num_votes: got 0, expected an integer >= 1"),
        ("[{kind: agreement}, {kind: agreement}]", "judges[1].name: 'agreement' is taken; set a name of its own"),
    ],
)
def test_a_judge_that_cannot_be(judges: str, message: str) -> None:
    """By the parser, or by the judge's class (test_judges, test_llm_judge): in any case before a file is read."""
    with pytest.raises(InputError) as caught:
        commands.train(settings("train", "--judges", judges))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("command", ["score", "pairs", "eval"])
def test_a_verifier_that_cannot_be(command: str) -> None:
    """The files that are named here are not there."""
    run: Callable[[Any], None] = getattr(commands, {"eval": "evaluate"}.get(command, command))
    for arguments, message in (
        (["--verifier", "nummeric"], "verifier: got 'nummeric', expected one of exact, numeric, regex, ifeval"),
        (["--verifier", "regex"], "verifier_pattern: it goes with verifier 'regex', and regex needs it"),
        (["--verifier", "exact", "--verifier_pattern", "a"], "verifier_pattern: it goes with verifier 'regex'"),
    ):
        with pytest.raises(InputError) as caught:
            run(settings(command, *arguments))
        assert str(caught.value).startswith(message)


def test_a_folder_may_be_called_like_a_date(tmp_path: Path) -> None:
    """Also like one that is not in the calendar."""
    file = tmp_path / "c.yaml"
    for name in ("2026-13-01", "2026-12-01", "2026-12-01 25:00:00"):
        file.write_text(f"prompts: p\noutput_dir: {name}\ncells: {CELLS}\n")
        assert parse("train", TrainConfig, [str(file)]).output_dir == name


@pytest.mark.parametrize("option", ["cells", "output_dir", "loss_args"])
def test_a_value_of_many_brackets_is_refused(option: str) -> None:
    """Unread: libyaml would overflow the stack, which no exception tells."""
    said = f"{option}: brackets or lists are nested too deeply; expected a few levels"
    assert refusal("train", f"--{option}", "[" * 3000) == said
    assert refusal("train", f"--{option}={'{a: ' * 3000}") == said


def test_a_number_beyond_all_floats_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"min_margin: 1{'0' * 400}\nresponses: r\noutput: o\n")
    for arguments in ([str(tmp_path / "c.yaml")], ["--responses", "r", "--output", "o", "--min_margin", "9" * 400]):
        with pytest.raises(InputError, match=r"number is too large|min_margin: got inf, expected"):
            parse("pairs", PairsConfig, arguments)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(InputError, match=r"^output: missing; see tso-fast pairs --help$"):
        parse("pairs", PairsConfig, ["--responses", "r"])
    with pytest.raises(InputError, match=r"^config: 'gone.yaml' is no file; expected YAML$"):
        parse("pairs", PairsConfig, ["gone.yaml"])


# ---- options without an effect


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("pairs", ["--score_weights.a", "1", "--consensus", "median"], "score_weights: they have no effect"),
        (
            "pairs",
            ["--score_weights.a", "1", "--evidence", "calibrated"],
            "score_weights: they have no effect on calib",
        ),
        (
            "pairs",
            ["--judge_reliability.a", "0.9", "--evidence", "prior"],
            "judge_reliability: it has no effect with evidence 'prior'",
        ),
        ("pairs", ["--soft_label_kappa", "1", "--soft_label_by", "win_rate"], "soft_label_kappa: it has no effect"),
        ("pairs", ["--soft_label_by", "score_share"], "soft_label_score: got None with soft_label_by 'score_share'"),
        ("pairs", ["--soft_label_score", "visits"], "soft_label_score: got 'visits' with soft_label_by None"),
        ("pairs", ["--diversity_band", "1"], "diversity_band: it has no effect with pair_strategy 'random'"),
        ("pairs", ["--diversity_ngram", "2"], "diversity_ngram: it has no effect with pair_strategy 'random'"),
        ("pairs", ["--acceptance_beta", "1"], "acceptance_beta: it has no effect without accepted_responses"),
        ("pairs", ["--score_normalize", "z", "--consensus", "borda"], "score_normalize: 'z' has no effect"),
        ("pairs", ["--score_normalize", "rank", "--consensus", "win_rate"], "score_normalize: 'rank' has no effect"),
        ("score", ["--consensus", "median"], "unknown key 'consensus'"),
        ("eval", ["--score_normalize", "z"], "unknown key 'score_normalize'"),
        ("eval", ["--top_p", "0.9"], "top_p: 0.9 has no effect with temperature 0"),
        ("eval", ["--num_generations", "0"], "num_generations: got 0, expected an integer >= 1"),
        ("generate", ["--num_generations", "0"], "num_generations: got 0, expected an integer >= 1"),
        ("generate", ["--temperature", "0", "--top_k", "5"], "top_k: 5 has no effect with temperature 0"),
        ("train", ["--ref_model_mixup_alpha", "0.5"], "ref_model_mixup_alpha: it has no effect with reference"),
        ("train", ["--reference", "ema", "--ref_model_mixup_alpha", "0"], "ref_model_mixup_alpha: got 0.0, expected"),
        ("train", ["--lr_scheduler_type", "constant", "--warmup_steps", "5"], "warmup_steps: 5 has no effect with"),
        ("train", ["--eval_prompts", "e"], "eval_prompts: evaluation needs a verifier"),
        (
            "train",
            ["--extra_from", "human", "--judges", "[{kind: llm, cell: policy, trains: true}]"],
            "extra_from: 'human' has no response among judgments",
        ),
        ("train", ["--verifier", "exact", "--eval_prompts", "p"], "eval_prompts: p is the training file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_option_without_effect_is_refused(command: str, arguments: list[str], message: str) -> None:
    assert refusal(command, *arguments).startswith(message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_type": "dpo", "clip_chosen": 1.0}, "loss_type: loss 'dpo' has no option 'clip_chosen'"),
        ({"loss_type": "sft", "beta": 0.1}, "loss_type: loss 'sft' has no option 'beta'"),
        ({"report_to": "tensorbord"}, "report_to 'tensorbord' or bf16 False cannot be used: Unsupported logging"),
    ],
    ids=str,
)
def test_training_refuses_what_it_could_not_use_before_any_work(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    from tso_fast.trainer import train

    config = TrainConfig(output_dir=str(tmp_path / "run"), prompts="p", cells=[], use_cpu=True, **change)
    with pytest.raises(InputError) as caught:
        train(config)
    assert str(caught.value).startswith(message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verifier": "no_such_module:f"}, "verifier: 'no_such_module:f' cannot be imported"),
        ({"verifier": "regex", "verifier_pattern": "("}, "verifier_pattern: '(' is no regular expression"),
        ({"verifier": "numeric"}, "field 'answer' is 'Paris'; verifier 'numeric' expects a number"),
        ({"policy": "m.v9"}, "policy: got 'm.v9', expected one of the cells s.v1"),
        ({"judges": [{"kind": "llm", "cell": "m.v9"}]}, "judge llm: cell: no cell is called 'm.v9'"),
        ({"judges": [{"kind": "implicit", "reference": "m.v9"}]}, "judges: 'implicit' asks for cell 'm.v9'; the cells"),
        (
            {"judges": [{"kind": "llm", "model": CellConfig(path="no/model")}]},
            "judge llm: model: path 'no/model' is no folder",
        ),
        ({"judges": [{"kind": "llm", "cell": "policy", "template": "pair"}]}, "template"),
        ({"judges": [{"kind": "verifier", "verifier": "no_such:f"}]}, "verifier: 'no_such:f' cannot be imported"),
        ({"num_iterations": 3}, "num_iterations: got 3, but there are only 1 prompts"),
        ({"cells": [{"path": "s.v1", "name": "tso-1"}]}, "cells: the name 'tso-1' will be that of a trained version"),
    ],
    ids=str,
)
def test_training_looks_at_judge_data_and_cells_before_any_work(
    tmp_path: Path, tiny_matrix: Path, change: dict[str, Any], message: str
) -> None:
    from tso_fast.trainer import train

    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": "capital of France?", "answer": "Paris"}])
    change = {"num_iterations": 1, **change}
    change["judges"] = [JudgeConfig(**judge) for judge in change.get("judges", [])]
    cells = change.pop("cells", [{"path": "s.v1"}])
    config = TrainConfig(
        output_dir=str(tmp_path / "run"),
        prompts=str(prompts),
        cells=[CellConfig(**{**c, "path": str(tiny_matrix / c["path"])}) for c in cells],
        max_completion_length=4,
        use_cpu=True,
        **change,
    )
    with pytest.raises(InputError) as caught:
        train(config)
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "module", "message"),
    [
        ({"generator": "vllm"}, "vllm", "generator: vLLM is not installed."),
        ({"executor": "ray"}, "ray", "executor: ray is not installed; pip install 'tso-fast[ray]'"),
    ],
)
def test_a_start_without_its_engine_leaves_nothing_behind(
    tmp_path: Path, tiny_matrix: Path, monkeypatch: pytest.MonkeyPatch, change: Any, module: str, message: str
) -> None:
    from tso_fast.trainer import train

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else find(name, *rest))
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": "2 + 3?", "answer": "5"}])
    config = TrainConfig(
        output_dir=str(tmp_path / "run"),
        prompts=str(prompts),
        cells=[CellConfig(path=str(tiny_matrix / "s.v1"))],
        verifier="exact",
        num_iterations=1,
        use_cpu=True,
        **change,
    )
    with pytest.raises(InputError) as caught:
        train(config)
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "run").exists()


# ---- precedence and round trips


def test_the_command_line_wins_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("learning_rate: 1e-4\nnum_iterations: 7\ncompare: true\ncells:\n- {path: y, version_rank: 2}\n")
    config = parse("train", TrainConfig, [str(file), "--prompts=p", "--output_dir=o", "--num_iterations", "9"])
    assert (config.learning_rate, config.num_iterations, config.compare) == (1e-4, 9, True)
    assert config.cells == [CellConfig(path="y", version_rank=2)]
    assert config.top_p == TrainConfig.top_p
    later = parse("train", TrainConfig, ["--num_iterations=9", "--config", str(file), "--prompts=p", "--output_dir=o"])
    assert later.num_iterations == 7  # the last one given wins


def test_a_switch_needs_no_value() -> None:
    config = settings("train", "--compare", "--use_cpu", "--bf16=false", "--disable_dropout", "false")
    assert (config.compare, config.use_cpu, config.bf16, config.disable_dropout) == (True, True, False, False)


TURNED = {
    "train": [
        "--clip_chosen",
        ".inf",
        "--learning_rate",
        "3e-7",
        "--score_weights",
        '{"verifier": 2, "a:b": 0.5}',
        "--cells+={path: b, name: 'B: new', size_b: 0.5, version_rank: 3}",
        "--compare",
    ],
    "plan": ["--gpu_memory_gb", "40"],
    "generate": ["--top_k", "3"],
    "score": ["--verifier", "regex", "--verifier_pattern", r"'#### (\d+): \"'"],
    "pairs": ["--soft_label_kappa", "0.5"],
    "eval": ["--max_completion_length", "9"],
    "annotate": ["--overlap", "0.25"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_printed_configuration_gives_the_same_one(command: str, tmp_path: Path, cli: Callable[..., Any]) -> None:
    arguments = [*NEEDED[command], *TURNED[command]]
    ended = cli(command, [*arguments, "--print_config"])
    assert (ended.status, ended.err) == (0, "")
    (tmp_path / "c.yaml").write_text(ended.out)
    again = parse(command, COMMANDS[command], [str(tmp_path / "c.yaml")])
    assert again == parse(command, COMMANDS[command], arguments)
    assert again != parse(command, COMMANDS[command], NEEDED[command])


SECRETS = (
    "http://me:pass@word@host:8000/v1?x=1&api_key=abc#z and ray://u:p@head:1, {'api_key': 'k y', \"token\": \"t\"}"
)


def test_secrets_are_hidden_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-12345678")
    monkeypatch.setenv("HF_TOKEN", "short")
    assert redact(SECRETS) == (
        "http://***@host:8000/v1?x=1&api_key=***#z and ray://***@head:1, {'api_key': '***', \"token\": \"***\"}"
    )
    assert redact("Bearer sk-12345678 is wrong, in short") == "Bearer *** is wrong, in short"
    assert (
        redact("max_tokens: 3, see https://host/a@b and me@host") == "max_tokens: 3, see https://host/a@b and me@host"
    )
    given = "annotate --password x --password=y --url http://a:b@c --seed 1"
    hidden = "annotate --password *** --password=*** --url http://***@c --seed 1"
    assert redact_arguments(given.split()) == hidden.split()
    judge = JudgeConfig(kind="mine:Judge", args={"api_key": "a", "deep": [{"password": "b"}], "max_tokens": 3})
    own = CellConfig(path="a", url="http://me:pw@host/v1")
    shown = to_dict(TrainConfig(output_dir="o", prompts="p", cells=[own], judges=[judge], ray_address="ray://u:p@h:1"))
    assert shown["judges"][0]["args"] == {"api_key": "***", "deep": [{"password": "***"}], "max_tokens": 3}
    assert (shown["cells"][0]["url"], shown["ray_address"]) == ("http://***@host/v1", "ray://***@h:1")


def test_infinity_reaches_run_json_as_text() -> None:
    assert to_dict(settings("train", "--clip_chosen", ".inf"))["clip_chosen"] == "inf"


# ---- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_every_setting_with_its_text(command: str, cli: Callable[..., Any]) -> None:
    ended = cli(command, ["--help"])
    assert (ended.status, ended.err) == (0, "")
    assert f"tso-fast {command}" in ended.out
    for field in dataclasses.fields(COMMANDS[command]):
        assert f"--{field.name} " in ended.out, field.name
    assert "sets it aside and counts it" in " ".join(ended.out.split())


def groups_of(out: str) -> dict[str, list[str]]:
    """Settings by the title that they stand under."""
    found: dict[str, list[str]] = {}
    for line in out.splitlines():
        if re.fullmatch(r"[A-Z][a-z ]+:", line):
            found[line] = []
        elif setting := re.match(r"  --(\w+)", line):
            found[[*found][-1]].append(setting[1])
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_what_is_needed_first_and_the_rest_by_stage(command: str, cli: Callable[..., Any]) -> None:
    out = cli(command, ["--help"]).out
    assert out.index("\n\n") < 500
    assert len(out.partition("\n\n")[0].splitlines()) == 5
    groups = groups_of(out)
    assert next(iter(groups)) == "Most needed:"
    assert all(groups.values())
    listed = [name for names in groups.values() for name in names]
    assert sorted(listed) == sorted(f.name for f in dataclasses.fields(COMMANDS[command]))  # each once
    required = {f.name for f in dataclasses.fields(COMMANDS[command]) if f.default is dataclasses.MISSING}
    assert required <= set(groups["Most needed:"])


def test_help_of_training_has_a_group_for_each_stage(cli: Callable[..., Any]) -> None:
    out = cli("train", ["-h"]).out
    groups = groups_of(out)
    assert len(groups["Most needed:"]) == 10
    assert [*groups][1:] == [f"{title}:" for title in GROUPS.values()]
    assert {"beta", "clip_chosen", "reference"} <= set(groups["Loss:"])
    assert {base.__name__ for cls in COMMANDS.values() for base in cls.__mro__ if dataclasses.is_dataclass(base)} <= {
        *OF_CLASS,
        "AnsweringConfig",
    }
    assert max(map(len, out.splitlines())) <= 120


def test_help_of_a_group_a_setting_and_the_items_of_a_list(cli: Callable[..., Any]) -> None:
    (title,) = groups_of(cli("train", ["--help", "engine"]).out)
    assert title == "Engine:"
    one = cli("train", ["--help", "beta"]).out
    assert groups_of(one) == {"Loss:": ["beta"]}
    cells = cli("train", ["--help", "cells"]).out
    assert all(f"  {f.name} " in cells for f in dataclasses.fields(CellConfig))
    ended = cli("train", ["--help", "los"])
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith(
        "error: help: got 'los'; did you mean 'loss'?; expected a setting or one of what, matrix"
    )


def test_help_loads_nothing_heavy() -> None:
    """Which is what keeps it under half a second."""
    program = (
        "import sys; from tso_fast.cli import main; status = main(['--help']); "
        "heavy = {'torch', 'transformers', 'jsonargparse', 'numpy', 'rich', 'yaml'} & set(sys.modules); "
        "sys.exit(f'status {status}, loaded {heavy}' if status or heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: tso-fast COMMAND")


def test_errors_are_of_three_kinds() -> None:
    """2 bad input, 3 the rest: what callers of the Python functions catch."""
    assert issubclass(InputError, ValueError)
    assert issubclass(OutputError, OSError)
    assert issubclass(TrainingError, RuntimeError)


def test_defaults_pass_their_own_checks() -> None:
    for command in COMMANDS:
        check(settings(command))


# ---- settings that differ by iteration


def test_an_entry_an_iteration_and_the_last_one_for_all_that_follow() -> None:
    config = settings("train", "--by_iteration", "[{temperature: 0.5, beta: 1}, {}]")
    found = [(of_iteration(config, t).temperature, of_iteration(config, t).beta) for t in (1, 2, 3)]
    assert found == [(0.5, 1), (1.0, None), (1.0, None)]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("[{temprature: 1}]", "by_iteration[0].temprature: it cannot differ by iteration; did you mean 'temperature'?"),
        ("[{}, {temperature: hot}]", "by_iteration[1].temperature: got 'hot', expected float"),
        ("[{max_pairs: 0}]", "by_iteration[0].max_pairs: got 0, expected an integer >= 1"),
        ("[{temperature: 0, top_k: 5}]", "by_iteration[0]: top_k: 5 has no effect with temperature 0"),
    ],
)
def test_an_entry_is_checked_as_settings_are(entries: str, message: str) -> None:
    assert message in refusal("train", "--by_iteration", entries)
