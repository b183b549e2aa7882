"""The loop on small real models: what it writes, what it refuses, and that its parts mean what they say."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import re
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import make_adapter, write_rows
from safetensors.torch import load_file
from tiny_runs import SMALL, tiny_config
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tso_fast import interrupts
from tso_fast.cli import main
from tso_fast.commands import train as train_command
from tso_fast.commands import train_and_compare
from tso_fast.config.settings import CellConfig, JudgeConfig, SamplerConfig, TrainConfig
from tso_fast.correction.make_pairs import make_pairs
from tso_fast.errors import InputError, Paused, TrainingError
from tso_fast.files.labels import LabelFile, make_label
from tso_fast.files.rows import BadRows, pair_row, read_candidates, read_verdicts
from tso_fast.files.run import LABELS_FILE, read_run
from tso_fast.judges import implicit
from tso_fast.quickstart.build import make_tokenizer
from tso_fast.report import write_report
from tso_fast.trainer import train

pytestmark = pytest.mark.slow


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Runs of this module share a store: what the same cells answer to the same prompts is generated once."""
    return tiny_config(tmp_path_factory.mktemp("trainer"))


@pytest.fixture(scope="module")
def few(base: TrainConfig) -> TrainConfig:
    """One iteration over a third of the prompts."""
    file = Path(base.output_dir).with_name("few.jsonl")
    write_rows(file, rows_of(Path(base.prompts))[:8])
    return dataclasses.replace(base, prompts=str(file), num_iterations=1, eval_prompts=None)


@pytest.fixture(scope="module")
def run(base: TrainConfig) -> Path:
    train(dataclasses.replace(base, report_to="tensorboard"))
    return Path(base.output_dir)


def test_run_folder_loads_and_holds_the_newest_policy(run: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(run)
    AutoTokenizer.from_pretrained(run)
    newest = load_file(run / "iter-2/policy/model.safetensors")
    assert all(torch.equal(value, newest[name]) for name, value in model.state_dict().items() if name in newest)
    old = load_file(run / "iter-1/policy/model.safetensors")
    assert any(not torch.equal(newest[name], old[name]) for name in newest)


def test_tensorboard_gets_the_metrics_with_steps_that_go_on(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = rows_of(run / "metrics.jsonl")
    length = {t: max(row["step"] for row in rows if row["iteration"] == t) for t in (1, 2)}
    steps = [row["step"] + (length[1] if row["iteration"] == 2 else 0) for row in rows]
    (file,) = (run / "tso-fast").glob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    for name in ("loss", "rewards/margins", "clip/chosen", "grad_norm"):
        seen = events.Scalars(name)
        assert [event.step for event in seen] == steps
        assert [event.value for event in seen] == pytest.approx([row[name] for row in rows], rel=1e-5)


def test_manifest_lists_every_stage_in_order(run: Path) -> None:
    names = [stage["name"] for stage in read_run(run)["stages"]]
    per_iteration = ["generate", "score", "pairs", "train", "eval"]
    assert names == ["iter-0/eval"] + [f"iter-{t}/{name}" for t in (1, 2) for name in per_iteration]


def test_every_response_is_of_a_cell_or_a_person_and_new_versions_join(run: Path) -> None:
    for t, cells in ((1, {"s.v2", "m.v1", "m.v2"}), (2, {"s.v2", "m.v1", "m.v2", "tso-1"})):
        seen = {r["model"] for row in rows_of(run / f"iter-{t}/responses.jsonl") for r in row["responses"]}
        assert seen - {"human"} == cells


def test_mini_batches_are_disjoint_and_complete(run: Path, base: TrainConfig) -> None:
    batches = [{row["id"] for row in rows_of(run / f"iter-{t}/responses.jsonl")} for t in (1, 2)]
    assert not batches[0] & batches[1]
    assert batches[0] | batches[1] == {row["id"] for row in rows_of(Path(base.prompts))}


def test_metrics_carry_trl_names_and_a_first_loss_of_ln_2(run: Path) -> None:
    rows = rows_of(run / "metrics.jsonl")
    for t in (1, 2):
        first = next(row for row in rows if row["iteration"] == t)
        assert first["step"] == 1
        assert first["loss"] == pytest.approx(0.693147, abs=1e-4)
        assert first["rewards/chosen"] == pytest.approx(0, abs=1e-4)
        assert {
            "rewards/rejected",
            "rewards/margins",
            "rewards/accuracies",
            "logps/chosen",
            "logps/rejected",
            "clip/chosen",
            "clip/rejected",
            "grad_norm",
            "learning_rate",
        } <= set(first)


def test_same_seed_same_bytes_other_seed_other_bytes(run: Path, base: TrainConfig, tmp_path: Path) -> None:
    train(dataclasses.replace(base, output_dir=str(tmp_path / "again"), response_store=None))
    train(dataclasses.replace(base, output_dir=str(tmp_path / "other"), seed=1, num_iterations=1))
    weights = [(folder / "model.safetensors").read_bytes() for folder in (run, tmp_path / "again", tmp_path / "other")]
    assert weights[0] == weights[1] != weights[2]


def test_a_finished_run_is_not_trained_again(run: Path, base: TrainConfig) -> None:
    before = {p: p.stat().st_mtime_ns for p in run.rglob("iter-*/**/*") if p.is_file()}
    train(base)
    assert {p: p.stat().st_mtime_ns for p in run.rglob("iter-*/**/*") if p.is_file()} == before


def test_resume_refuses_another_configuration_by_key(base: TrainConfig, run: Path) -> None:
    with pytest.raises(InputError, match=r"beta: the run has None, given 0\.2"):
        train(dataclasses.replace(base, beta=0.2))


def test_resume_refuses_changed_prompts(base: TrainConfig, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(Path(base.prompts).read_text())
    changed = dataclasses.replace(base, output_dir=str(tmp_path / "run"), prompts=str(prompts), num_iterations=1)
    train(changed)
    prompts.write_text("".join(prompts.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(InputError, match="prompts: its content changed"):
        train(changed)


def test_resume_refuses_another_template(few: TrainConfig, tmp_path: Path) -> None:
    """Of a sampler; one that comes with the package is as the release has it."""
    template = tmp_path / "again.txt"
    template.write_text("{prompt} {response}")
    own = SamplerConfig(kind="revise", template=str(template), max_completion_length=2)
    settings = dataclasses.replace(few, output_dir=str(tmp_path / "run"), samplers=[own])
    train(settings)
    template.write_text("{response} {prompt}")
    with pytest.raises(InputError, match=r"samplers\.revise\.template: its content changed"):
        train(settings)


def test_a_finished_run_goes_on_with_more_prompts_and_more_iterations(
    base: TrainConfig, few: TrainConfig, tmp_path: Path
) -> None:
    """What is done stays as it is; new prompts are answered first, then the mini-batches come again."""
    rows = rows_of(Path(base.prompts))
    prompts = write_rows(tmp_path / "prompts.jsonl", rows[:8])
    settings = dataclasses.replace(few, output_dir=str(tmp_path / "run"), prompts=str(prompts))
    train(settings)

    def done() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in (tmp_path / "run/iter-1").rglob("*") if p.is_file()}

    before = done()
    write_rows(prompts, rows[:14])
    with pytest.raises(InputError, match=r"1 iterations have begun and 6 prompts were in none .*at least 2"):
        train(settings)
    train(dataclasses.replace(settings, num_iterations=2))
    train(dataclasses.replace(settings, num_iterations=3))
    assert done() == before
    batches = [[row["id"] for row in rows_of(tmp_path / f"run/iter-{t}/responses.jsonl")] for t in (1, 2, 3)]
    ids = [row["id"] for row in rows]
    assert batches == [ids[:8], ids[8:14], ids[:8]]
    third = rows_of(tmp_path / "run/iter-3/responses.jsonl")
    assert {r["model"] for row in third for r in row["responses"]} >= {"m.v2", "tso-1", "tso-2"}
    newest = (tmp_path / "run/iter-3/policy/model.safetensors").read_bytes()
    assert (tmp_path / "run/model.safetensors").read_bytes() == newest
    assert read_run(tmp_path / "run")["config"]["num_iterations"] == 3
    assert "3 of 3 iterations" in write_report(tmp_path / "run").read_text(encoding="utf-8")


def test_a_run_goes_on_with_another_engine_at_another_place(few: TrainConfig, tmp_path: Path) -> None:
    """Cells, prompts and the run itself were moved, and the batch of generation is smaller; the password of a server
    stands in no file."""
    url = "http://me:hunter2@127.0.0.1:1/v1?api_key=hunter3"
    cells = [dataclasses.replace(cell, url=url) for cell in few.cells]
    settings = dataclasses.replace(few, output_dir=str(tmp_path / "run"), cells=cells, report_to="tensorboard")
    train(settings)
    cells = []
    for cell in few.cells:
        shutil.copytree(cell.path, tmp_path / "moved" / Path(cell.path).name)
        cells.append(dataclasses.replace(cell, path=str(tmp_path / "moved" / Path(cell.path).name)))
    prompts = shutil.copyfile(few.prompts, tmp_path / "moved/prompts.jsonl")
    (tmp_path / "run").rename(tmp_path / "other")
    train(
        dataclasses.replace(
            settings,
            output_dir=str(tmp_path / "other"),
            cells=cells,
            prompts=str(prompts),
            generation_batch_size=3,
            shard_size=5,
            num_iterations=2,
        )
    )
    assert (tmp_path / "other/iter-2/policy").is_dir()
    write_report(tmp_path / "other")
    files = [file for file in (tmp_path / "other").rglob("*") if file.is_file()]
    assert {"run.json", "report.html"} <= {file.name for file in files}
    assert any("tfevents" in file.name for file in files)
    assert [file for file in files if b"hunter" in file.read_bytes()] == []


def test_names_that_look_like_markup_are_printed_as_they_are(
    few: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [dataclasses.replace(c, name=n) for c, n in zip(few.cells, ("[bold]", "a[lr=1e-3]", ":fire:"), strict=True)]
    held_out = str(write_rows(tmp_path / "held_out.jsonl", rows_of(Path(few.prompts))[:2]))
    run = tmp_path / "[/x]"
    config = dataclasses.replace(few, output_dir=str(run), cells=cells, eval_prompts=held_out, policy="a[lr=1e-3]")
    train_command(config)
    train_command(config)
    out, err = capsys.readouterr()
    assert "iteration 0: evaluate a[lr=1e-3] " in err
    assert re.search(r"iteration 0: a\[lr=1e-3\] (answers|scores) ", err)  # as graded scores are 0 and 1, or not
    assert f"{run}: going on after iter-1/eval" in err
    assert "gain: a[lr=1e-3] " in out
    assert f'from_pretrained("{run}") loads the newest policy, tso-1' in out


def test_a_damaged_file_is_found_and_its_stage_done_again(
    base: TrainConfig, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    again = dataclasses.replace(base, output_dir=str(tmp_path / "run"))
    train(again)
    whole = (tmp_path / "run/model.safetensors").read_bytes()
    file = tmp_path / "run/iter-2/pairs.jsonl"
    content = bytearray(file.read_bytes())
    content[10] ^= 1
    file.write_bytes(content)
    train(again)
    assert "iter-2/pairs is damaged" in caplog.text
    assert "sha256" in caplog.text
    assert (tmp_path / "run/model.safetensors").read_bytes() == whole
    assert file.read_bytes() == (run / "iter-2/pairs.jsonl").read_bytes()


def test_a_folder_that_is_no_run_is_left_alone(base: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(InputError, match="not empty"):
        train(dataclasses.replace(base, output_dir=str(tmp_path)))
    assert [p.name for p in tmp_path.iterdir() if p.name != ".lock"] == ["thesis.txt"]


def test_two_processes_cannot_share_a_run(base: TrainConfig, run: Path) -> None:
    import fcntl

    with open(run / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="in use by another process"):
            train(base)


@pytest.mark.parametrize(("save_steps", "stop_in"), [(1, 3), (0, 2)], ids=["killed", "signalled"])
def test_an_interrupted_training_goes_on_bitwise(
    base: TrainConfig, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_steps: int, stop_in: int
) -> None:
    """Killed in iteration 1's third step, each being saved, or told to stop in its second, which is finished and saved.

    The steps before are not made again, and the weights are equal.
    """
    import tso_fast.training.optimise as optimization

    settings = dataclasses.replace(
        base, output_dir=str(tmp_path / "run"), per_device_train_batch_size=1, save_steps=save_steps
    )
    train(dataclasses.replace(settings, output_dir=str(tmp_path / "whole")))
    real, calls = optimization.backward, itertools.count(1)

    def stop(*args, **kwargs):  # type: ignore[no-untyped-def]
        if next(calls) == stop_in:
            if save_steps:
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(optimization, "backward", stop)
    with pytest.raises(KeyboardInterrupt), interrupts.handled():
        train(settings)
    steps: list[int] = []
    monkeypatch.setattr(optimization, "backward", lambda *a, **k: (steps.append(1), real(*a, **k))[1])
    train(settings)
    total = sum(s["info"]["steps"] for s in read_run(tmp_path / "run")["stages"] if s["name"].endswith("train"))
    assert len(steps) == total - 2
    assert (tmp_path / "run/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_accumulation_gives_the_trajectory_of_one_batch(base: TrainConfig, tmp_path: Path) -> None:
    scaled = dataclasses.replace(base, scale_by="gap", num_iterations=1, num_train_epochs=2)
    train(dataclasses.replace(scaled, output_dir=str(tmp_path / "4"), per_device_train_batch_size=4))
    train(
        dataclasses.replace(
            scaled, output_dir=str(tmp_path / "2x2"), per_device_train_batch_size=2, gradient_accumulation_steps=2
        )
    )
    one, two = (rows_of(tmp_path / name / "metrics.jsonl") for name in ("4", "2x2"))
    assert len(one) == len(two) > 1
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "rewards/margins", "grad_norm", "logps/chosen", "clip/chosen"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), key


def train_afresh(settings: TrainConfig) -> None:
    """In a fork, which holds what Accelerate knows of the process that it comes from."""
    AcceleratorState._reset_state(reset_partial_state=True)
    train(settings)


@pytest.fixture
def signal_handlers() -> Iterator[None]:
    """The launcher sets its own, and leaves them to whoever comes next in this process."""
    names = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {name: signal.getsignal(name) for name in names}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


@pytest.mark.usefixtures("signal_handlers")
def test_two_processes_give_the_trajectory_of_one(few: TrainConfig, tmp_path: Path) -> None:
    """Torch's own launcher, gloo, DDP: the same pairs in a step, the same loss, gradient and metrics."""
    settings = dataclasses.replace(few, scale_by="gap", num_train_epochs=3)
    train(dataclasses.replace(settings, output_dir=str(tmp_path / "one"), per_device_train_batch_size=4))
    two = dataclasses.replace(settings, output_dir=str(tmp_path / "two"), per_device_train_batch_size=2)
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id="two",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        start_method="fork",  # what this process has imported need not be imported twice more
        max_restarts=0,
    )
    elastic_launch(launch, train_afresh)(two)
    ours, theirs = (rows_of(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert len(ours) == len(theirs) > 2
    for a, b in zip(ours, theirs, strict=True):
        for key in ("loss", "rewards/margins", "grad_norm", "logps/chosen", "clip/rejected"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize(("reference", "in_4bit"), [("previous", True), ("initial", False)])
def test_an_adapter_is_trained_and_joins_the_matrix(
    base: TrainConfig, tmp_path: Path, reference: str, in_4bit: bool
) -> None:
    """The weights under it stay as they are, the second iteration goes on with it, and both answer as cells."""
    settings = dataclasses.replace(
        base, output_dir=str(tmp_path / "run"), peft="lora", lora_r=4, learning_rate=1e-2, reference=reference,
        load_in_4bit=in_4bit,
    )  # fmt: skip
    train(settings)
    policies = [tmp_path / f"run/iter-{t}/policy" for t in (1, 2)]
    first, second = (load_file(policy / "adapter_model.safetensors") for policy in policies)
    assert first.keys() == second.keys()
    assert all(".lora_A." in name or ".lora_B." in name for name in first)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert all(value.any() for name, value in first.items() if ".lora_B." in name)
    config = json.loads((policies[1] / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(Path(base.cells[2].path).resolve())
    assert {path.name for path in policies[0].iterdir()} >= {"adapter_config.json", "tokenizer.json"}
    assert not (policies[0] / "model.safetensors").exists()
    assert (tmp_path / "run/adapter_model.safetensors").read_bytes() == (
        policies[1] / "adapter_model.safetensors"
    ).read_bytes()
    stages = {stage["name"]: stage["info"] for stage in read_run(tmp_path / "run")["stages"]}
    assert stages["iter-2/generate"]["cells"][-1] == "tso-1"
    rows = [row for row in rows_of(tmp_path / "run/metrics.jsonl") if row["iteration"] == 2]
    away = abs(rows[0]["rewards/chosen"]) + abs(rows[0]["rewards/rejected"])
    assert (away > 1e-5) == (reference == "initial")  # the adapter as it stood, or none
    assert (stages["iter-2/train"]["first_loss"] is None) == (reference == "initial")


@pytest.mark.parametrize("reference", ["initial", "ema"])
def test_reference_policies(base: TrainConfig, tmp_path: Path, reference: str) -> None:
    """iter-2's reference log-probs are those of the weights that the setting names."""
    settings = dataclasses.replace(base, output_dir=str(tmp_path / "run"), reference=reference)
    train(settings)
    second = [row for row in rows_of(tmp_path / "run/metrics.jsonl") if row["iteration"] == 2]
    assert abs(second[0]["rewards/chosen"]) + abs(second[0]["rewards/rejected"]) > 1e-5  # not its own reference
    if reference == "ema":
        mean = load_file(tmp_path / "run/iter-1/reference/model.safetensors")
        policy = load_file(tmp_path / "run/iter-1/policy/model.safetensors")
        initial = load_file(Path(base.cells[2].path) / "model.safetensors")
        for name, value in mean.items():
            assert torch.allclose(value, 0.6 * policy[name] + 0.4 * initial[name], atol=1e-6)


def test_an_iteration_has_settings_of_its_own(base: TrainConfig, tmp_path: Path) -> None:
    entries: list[dict[str, Any]] = [{"loss_type": "sft", "num_generations": 1}, {"max_pairs": 2}]
    settings = dataclasses.replace(base, output_dir=str(tmp_path), eval_prompts=None, beta=0.2, clip_chosen=0.4)
    with pytest.raises(ValueError, match="loss 'sft' has no option 'beta'"):
        train(dataclasses.replace(settings, by_iteration=entries))
    entries[0] |= {"beta": None, "clip_chosen": None}
    state = train(dataclasses.replace(settings, by_iteration=entries)).state
    infos = {stage["name"]: stage["info"] for stage in state["stages"]}
    assert [infos[f"iter-{t}/train"]["loss"] for t in (1, 2)] == ["chosen-only NLL", "dual clip (TSO)"]
    first, second = (rows_of(tmp_path / f"iter-{t}/responses.jsonl")[0]["responses"] for t in (1, 2))
    assert (len(first), len(second)) == (3, 8)  # of 3 cells once, of 4 cells twice; the first prompts have no person
    paired = [Counter(row["prompt_id"] for row in rows_of(tmp_path / f"iter-{t}/pairs.jsonl")) for t in (1, 2)]
    assert [max(counts.values()) for counts in paired] == [1, 2]


def test_compare_runs_dpo_and_sft_with_the_same_settings(base: TrainConfig, tmp_path: Path) -> None:
    # A low bound, so that the clip is reached and dual_clip is not dpo.
    settings = dataclasses.replace(base, output_dir=str(tmp_path / "run"), compare=True, clip_rejected=0.001)
    folders = train_and_compare(settings)
    assert [Path(f).name for f in folders] == ["run", "compare-dpo", "compare-sft"]
    states = [read_run(f) for f in folders]
    assert [s["config"]["loss_type"] for s in states] == ["dual_clip", "dpo", "sft"]
    # Before the first update all three see the same responses.
    assert len({(Path(f) / "iter-1/pairs.jsonl").read_bytes() for f in folders}) == 1
    assert len({(Path(f) / "model.safetensors").read_bytes() for f in folders}) == 3


def test_an_option_that_the_loss_does_not_take_is_refused_before_work(base: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="loss 'dpo' has no option 'clip_chosen'"):
        train(dataclasses.replace(base, output_dir=str(tmp_path / "run"), loss_type="dpo", clip_chosen=1.0))
    assert not (tmp_path / "run").exists()


def test_no_pair_at_all_stops_with_the_reasons(base: TrainConfig, tmp_path: Path) -> None:
    settings = dataclasses.replace(base, output_dir=str(tmp_path / "run"), min_margin=10.0)
    with pytest.raises(TrainingError, match=r"none of 12 prompts gave a pair: [^{}]*drop: tie \d+[^{}]*\. See"):
        train(settings)
    assert (tmp_path / "run/iter-1/responses.jsonl").exists()


def test_a_raising_verifier_names_the_prompt_and_keeps_the_responses(base: TrainConfig, tmp_path: Path) -> None:
    settings = dataclasses.replace(
        base, output_dir=str(tmp_path / "run"), verifier="toy_verifier:breaks", eval_prompts=None
    )
    with pytest.raises(InputError, match="raised RuntimeError: out of patience"):
        train(settings)
    assert (tmp_path / "run/iter-1/responses.jsonl").exists()


def test_scores_that_come_with_the_data_need_no_verifier_and_no_generation(base: TrainConfig, tmp_path: Path) -> None:
    """Responses made and scored elsewhere are enough to train on."""
    rows = rows_of(Path(base.prompts))
    for i, row in enumerate(rows):
        row.pop("human_response", None)
        row["responses"] = [
            {"model": "other", "text": f" {j}", "scores": {"elsewhere": float(j == i % 3)}} for j in range(3)
        ]
    prompts = tmp_path / "scored.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(
        dataclasses.replace(
            base,
            output_dir=str(tmp_path / "run"),
            prompts=str(prompts),
            verifier=None,
            eval_prompts=None,
            num_generations=0,
        )
    )
    pairs = rows_of(tmp_path / "run/iter-1/pairs.jsonl")
    assert len(pairs) == 12
    index = {row["id"]: i for i, row in enumerate(rows)}
    assert all(p["chosen"][0]["content"] == f" {index[p['prompt_id']] % 3}" for p in pairs)


def test_gsm8k_with_human_solutions_from_a_config_file(
    gsm8k_train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real questions and human solutions, two full iterations, from the command line."""
    with gzip.open(gsm8k_train, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, 48)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:40]))
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[40:]))
    recipe = dataclasses.replace(SMALL, vocab_size=500, context=768)
    tokenizer = make_tokenizer([(row["prompt"], row["human_response"]) for row in rows], recipe)
    cells = []
    for i, (name, layers) in enumerate((("small", 1), ("large", 2), ("large-new", 2))):
        torch.manual_seed(i)
        shape = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=768,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        LlamaForCausalLM(shape).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        cells.append(f"- {{path: {tmp_path / name}, version_rank: {int(name.endswith('new'))}}}")
    (tmp_path / "config.yaml").write_text(
        "cells:\n"
        + "\n".join(cells)
        + f"\nprompts: {tmp_path}/prompts.jsonl\neval_prompts: {tmp_path}/held_out.jsonl\n"
        f"output_dir: {tmp_path}/run\nverifier: numeric\nnum_iterations: 2\nnum_generations: 1\n"
        "max_completion_length: 24\nlogging_steps: 1\nlearning_rate: 1.0e-3\n"
        "use_cpu: true\nper_device_train_batch_size: 4\n"
    )
    status = main(["train", str(tmp_path / "config.yaml"), "--max_pairs", "2"])
    out = capsys.readouterr()
    assert status == 0, out.err
    pairs = rows_of(tmp_path / "run/iter-2/pairs.jsonl")
    assert len(pairs) > 20
    human = {row["prompt"]: row["human_response"] for row in rows}
    assert all(p["chosen"][0]["content"] == human[p["prompt_text"]] for p in pairs if p["chosen_model"] == "human")
    assert sum(p["chosen_model"] == "human" for p in pairs) > 0.9 * len(pairs)
    first, last = (next(r for r in rows_of(tmp_path / "run/metrics.jsonl") if r["iteration"] == t) for t in (1, 2))
    assert first["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert last["rewards/accuracies"] >= 0
    assert "report" in out.out
    assert (tmp_path / "run/report.html").exists()


def test_an_adapter_can_be_the_policy(base: TrainConfig, tmp_path: Path) -> None:
    """It is merged; what is trained and saved are full weights, and the reference starts as the same model."""
    newest = Path(base.cells[-1].path)
    adapter = make_adapter(newest, tmp_path / "lora", strength=1)
    cells = [*base.cells, CellConfig(path=str(adapter), version_rank=9)]
    for reference in ("initial", "ema"):
        config = dataclasses.replace(
            base,
            output_dir=str(tmp_path / reference),
            cells=cells,
            reference=reference,
            num_iterations=2,
            eval_prompts=None,
        )
        train(config)
        first = next(r for r in rows_of(tmp_path / reference / "metrics.jsonl") if r["iteration"] == 1)
        assert first["loss"] == pytest.approx(0.693147, abs=1e-4)
        trained = load_file(tmp_path / reference / "iter-1/policy/model.safetensors")
        before = load_file(newest / "model.safetensors")
        assert trained.keys() == before.keys()
        assert all(not torch.equal(trained[name], before[name]) for name in trained if "q_proj" in name)
        responses = rows_of(tmp_path / reference / "iter-2/responses.jsonl")[0]["responses"]
        assert {r["model"] for r in responses} >= {"lora", "tso-1"}


def test_settings_of_generation_are_really_used(few: TrainConfig, tmp_path: Path) -> None:
    """Each changes what the cells answer; those of the optimiser are turned in test_optimise."""
    changing = {
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.5,
        "num_generations": 3,
        "policy_num_generations": 3,
        "policy": "m.v1",
    }
    own_store = dataclasses.replace(few, response_store=None)

    def made(name: str, **changes: Any) -> list[bytes]:
        folder = tmp_path / name
        train(dataclasses.replace(own_store, output_dir=str(folder), **changes))
        return [(folder / file).read_bytes() for file in ("iter-1/responses.jsonl", "model.safetensors")]

    before = made("base")
    for name, value in changing.items():
        assert made(name, **{name: value}) != before, name
    assert made("batch", generation_batch_size=3)[1] == before[1]  # responses have log-probs, whose last bits differ


def test_settings_of_pairing_are_really_used(base: TrainConfig, run: Path) -> None:
    candidates = read_candidates(run / "iter-1/responses.jsonl", BadRows())
    verdicts = read_verdicts(run / "iter-1/verdicts.jsonl", candidates, BadRows())
    for item in candidates:  # few responses of these models end
        whole = tuple(dataclasses.replace(r, finish_reason="stop") for r in item.responses)
        candidates[candidates.index(item)] = dataclasses.replace(item, responses=whole)

    def made(**changes: Any) -> list[dict]:
        settings = dataclasses.replace(base, **changes)
        return [pair_row(pair) for pair in make_pairs(candidates, verdicts, settings, settings, settings.seed)[0]]

    gap, before = made(scale_by="gap"), made()
    for changes in (
        {"max_pairs": 2},
        {"scale_by": "gap"},
        {"margin_weight": 1.0},
        {"soft_label_kappa": 1.0},
        {"pair_strategy": "best_worst"},
        {"seed": 1},
    ):
        assert made(**changes) != before, changes
    assert made(scale_by="gap", score_normalize="z") != gap


# ---- judges and people in the loop


def test_every_kind_of_judge_in_the_loop(base: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    impls, original = set(), implicit.cell_logprobs
    monkeypatch.setattr(
        implicit,
        "cell_logprobs",
        lambda *args, impl, **options: impls.add(impl) or original(*args, impl=impl, **options),
    )
    compare, rate = tmp_path / "compare.txt", tmp_path / "rate.txt"  # short: the context is 128 tokens
    compare.write_text("{prompt} {first} {second} A B")
    rate.write_text("{prompt} {response} 1")
    judges = [
        JudgeConfig(kind="llm", cell="policy", template=str(compare), pairs="baseline", max_completion_length=2),
        JudgeConfig(kind="llm", name="rater", cell="policy", template=str(rate), max_completion_length=4),
        JudgeConfig(kind="implicit", cell="policy", reference="m.v1", length_normalized=True),
        JudgeConfig(kind="agreement"),
        JudgeConfig(kind="verifier", name="lenient", verifier="toy_verifier:letters"),
    ]
    config = dataclasses.replace(
        base,
        output_dir=str(tmp_path / "run"),
        num_iterations=1,
        judges=judges,
        evidence="calibrated",
        soft_label_by="probability",
        impl="reference",
        eval_prompts=None,
    )
    train(config)
    assert impls == {"reference"}
    rows = rows_of(tmp_path / "run/iter-1/verdicts.jsonl")
    assert {row["judge"] for row in rows} == {"verifier", "llm", "rater", "implicit", "agreement", "lenient"}
    compared = [row for row in rows if row["judge"] == "llm"]
    assert all(len(row["responses"]) == 2 for row in compared)
    info = {stage["name"]: stage["info"] for stage in read_run(tmp_path / "run")["stages"]}
    cost = info["iter-1/score"]["costs"]["llm"]
    assert cost["results"] == len(compared)
    assert cost["requests"] >= cost["new_requests"] > 0
    judged = info["iter-1/pairs"]["judges"]
    assert judged["verifier"]["is_given"]
    assert not judged["lenient"]["is_given"]
    assert {"implicit", "agreement", "prior: newer"} <= set(judged)
    assert all(0.5 <= row["soft_label"] <= 1 for row in rows_of(tmp_path / "run/iter-1/pairs.jsonl"))
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "Judges of iteration 1" in page
    assert "<td>prior: newer</td>" in page
    assert "First shown" in page
    # What was judged once is in the store.
    again = dataclasses.replace(config, output_dir=str(tmp_path / "again"))
    train(again)
    info = {stage["name"]: stage["info"] for stage in read_run(tmp_path / "again")["stages"]}
    assert info["iter-1/score"]["costs"]["llm"]["new_requests"] == 0
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "run/model.safetensors").read_bytes()


def test_held_out_prompts_need_only_the_verifier(base: TrainConfig, tmp_path: Path) -> None:
    """Constraints of a second judge are asked of the training prompts alone."""
    rows = [{**row, "constraints": [{"id": "punctuation:no_comma"}]} for row in rows_of(Path(base.prompts))]
    write_rows(tmp_path / "prompts.jsonl", rows)
    config = dataclasses.replace(
        base,
        output_dir=str(tmp_path / "run"),
        prompts=str(tmp_path / "prompts.jsonl"),
        judges=[JudgeConfig(kind="verifier", name="commas", verifier="ifeval")],
        num_iterations=1,
    )
    train(config)
    scores = [row["score"] for row in rows_of(tmp_path / "run/iter-1/verdicts.jsonl") if row["judge"] == "commas"]
    assert set(scores) <= {0.0, 1.0}
    assert len(scores) > 50


def test_a_run_waits_for_people_and_goes_on_with_their_labels(base: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(base, output_dir=str(tmp_path / "run"), annotate=True, eval_prompts=None)
    for t in (1, 2):
        with pytest.raises(Paused, match=rf"iteration {t} waits for people: .*tso-fast annotate .*run"):
            train(config)
        folder = tmp_path / f"run/iter-{t}"
        assert not (folder / "pairs.jsonl").exists()
        candidates = read_candidates(folder / "responses.jsonl", BadRows())
        labels = LabelFile(folder / LABELS_FILE, candidates)
        for item in candidates:  # somebody with strange taste: the worst is best
            for i, j in itertools.combinations(range(len(item.responses)), 2):
                labels.append(make_label(item, (i, j), "ann", 0.0))
    train(config)
    pairs = rows_of(tmp_path / "run/iter-2/pairs.jsonl")
    assert pairs
    assert {row["reason"] for row in pairs} <= {"human: confirmed", "human: contradicted", "human alone"}
    assert (tmp_path / "run/model.safetensors").exists()
