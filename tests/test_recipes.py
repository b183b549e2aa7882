"""Recipes: each is a whole method, whatever it is laid over, and one of a user's own works alike."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_runs import run_recipe

import tso_fast.quickstart
from tso_fast.cli import main
from tso_fast.config.parse import parse
from tso_fast.config.settings import SamplerConfig, TrainConfig
from tso_fast.errors import InputError
from tso_fast.files.rows import BadRows, read_pairs
from tso_fast.files.run import Run
from tso_fast.losses import LOSSES
from tso_fast.recipes import FOLDER, METHOD, arguments, find, recipes, table
from tso_fast.training.optimise import configured_loss

NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
MADE = [
    "--cells",
    "[{path: model}]",
    "--prompts",
    "prompts.jsonl",
    "--eval_prompts",
    "held_out.jsonl",
    "--output_dir",
    "x",
]


def file_of(task: str) -> Path:
    return Path(tso_fast.quickstart.__file__).with_name(f"{task}.yaml")


def laid_over(task: str, name: str, *more: str) -> TrainConfig:
    return parse("train", TrainConfig, ["--config", str(file_of(task)), *MADE, *arguments(name), *more])


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_a_whole_method(name: str) -> None:
    """Nothing of the method of what it is laid over stays, and the loss takes what it is given."""
    settings = yaml.safe_load(find(name).path.read_text(encoding="utf-8"))
    if "samplers" in settings:
        settings["samplers"] = [SamplerConfig(**sampler) for sampler in settings["samplers"]]
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    for task in ("skills", "writing"):
        config = laid_over(task, name)
        assert {key: getattr(config, key) for key in METHOD} == {
            key: settings.get(key, defaults[key]) for key in METHOD
        }
        assert configured_loss(config).title
        assert config.verifier == ("exact" if task == "skills" else None)  # who judges is not the method's
        assert config.learning_rate == yaml.safe_load(file_of(task).read_text())["learning_rate"]


def test_heads_are_whole_and_losses_are_known() -> None:
    assert [recipe.name for recipe in recipes()] == sorted(NAMES, key=lambda name: (find(name).family, name))
    for recipe in recipes():
        assert recipe.status in ("read", "summary", "derived")
        assert recipe.family in ("matrix", "losses", "self-judging", "self-play", "sampling", "many people")
        loss = laid_over("skills", recipe.name).loss_type
        assert set([loss] if isinstance(loss, str) else loss) <= LOSSES.keys()


def test_keys_and_files_override_a_recipe(tmp_path: Path) -> None:
    assert laid_over("skills", "simpo", "--loss_args", "{beta: 3.0}").loss_args == {"beta": 3.0}
    own = tmp_path / "own.yaml"
    own.write_text(find("dpo").path.read_text(encoding="utf-8").replace("beta: 0.1", "beta: 0.7"))
    assert laid_over("skills", str(own)).loss_args == {"beta": 0.7}
    own.write_text("loss_type: dpo\n")
    with pytest.raises(InputError, match=r"own\.yaml: its head lacks or has too much of family, missing, ours"):
        find(str(own))
    with pytest.raises(InputError, match=r"recipe: got 'simp'; did you mean 'simpo'\?"):
        find("simp")


@pytest.mark.parametrize("form", [[], ["--config"]])
def test_a_recipe_is_laid_over_a_configuration(
    form: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("loss_type: ipo\nbeta: 0.4\nlearning_rate: 0.25\nprompts: p\noutput_dir: o\ncells: [{path: m}]\n")
    with pytest.raises(SystemExit):
        main(["train", *form, str(config), "--recipe", "simpo", "--seed", "7", "--print_config"])
    found = yaml.safe_load(capsys.readouterr().out)
    assert [found[key] for key in ("loss_type", "beta", "learning_rate", "seed")] == ["simpo", None, 0.25, 7]


def test_the_command_lists_and_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    told = capsys.readouterr().out
    assert all(f"  {name} " in told for name in NAMES)
    assert main(["recipes", "simpo"]) == 0
    assert capsys.readouterr().out == (FOLDER / "simpo.yaml").read_text(encoding="utf-8")
    assert main(["recipes", "simpo", "dpo"]) == 2
    assert main(["train", "--recipe", "nothing"]) == 2


@pytest.mark.slow
def test_delta_and_temporal_self_rewarding_take_sides_by_version_and_size(tmp_path: Path) -> None:
    def sides(run: Run, t: int) -> set[tuple[str, str]]:
        return {(pair.chosen.model, pair.rejected.model) for pair in read_pairs(run.iteration(t).pairs, BadRows())}

    settings: dict[str, Any] = {"store": tmp_path / "store", "max_completion_length": 40}
    temporal = sides(run_recipe("temporal_self_rewarding", tmp_path / "t", num_iterations=2, **settings), 2)
    assert {chosen for chosen, _ in temporal} == {"tso-1"}
    delta = sides(run_recipe("delta", tmp_path / "d", verifier=None, **settings), 1)
    assert {chosen for chosen, _ in delta} <= {"m.v1", "m.v2"}
    assert "s.v2" in {rejected for _, rejected in delta}


def test_the_docs_tell_of_every_recipe() -> None:
    docs = (FOLDER.parents[1] / "docs/recipes.md").read_text(encoding="utf-8")
    assert docs.endswith(f"\n{table()}"), "write what tso_fast.recipes.table() says to the end of docs/recipes.md"
