"""The report: numbers from run.json, tables that a pipe can take, and a page that needs nothing but itself."""

import copy
import html.parser
import io
import json
import math
import os
import re
import subprocess
import sys

import pytest
from helpers import write_rows

from tso_fast import progress
from tso_fast.errors import InputError
from tso_fast.files.run import write_state
from tso_fast.progress import WHOLE, make_console
from tso_fast.report import figures, print_summary, write_report
from tso_fast.report.summary import comparisons, summarise
from tso_fast.report.tables import make_table

NASTY = "<script>alert('x')</script> & [red]50 $ \\frac"


def evaluation(model, accuracy):
    low, high = round(accuracy - 0.04, 2), round(accuracy + 0.05, 2)
    return {"model": model, "accuracy": accuracy, "low": low, "high": high, "responses": 600, "mean_tokens": 3.0}


def judge(**changes):
    """Facts about a judge, as ``correction.beliefs`` tells them."""
    facts = {"accuracy": 0.8, "interval": [0.75, 0.84], "ties_share": 0.1, "pairs": 100, "is_given": False}
    return {**facts, "shown_first": 0.0, "longer": 0.0, "shares_errors_with": None, "curve": [], **changes}


def iteration(t, title="a loss (ours)"):
    means = {
        "loss": 0.6 - 0.01 * t,
        "rewards/chosen": 0.1,
        "rewards/rejected": -0.4,
        "clip/chosen": 0.05 * t,
        "clip/rejected": 0.5,
        "num_tokens/chosen": 2.5,
        "num_tokens/rejected": 3.5,
    }
    return [
        (
            f"iter-{t}/generate",
            {
                "responses": 90,
                "cells": ["s.v1", "m.v1"],
                "generated_tokens": 4.0 + t,
                "distinct_responses": 0.6,
                "samplers": {"controller": {"temperature": 0.5 + 0.2 * t, "num_generations": 8}},
            },
        ),
        (f"iter-{t}/score", {"verdicts": 90, "skipped_prompts": 0}),
        (
            f"iter-{t}/pairs",
            {
                "decisions": {
                    "human": {"drop": 7, "keep": 40 * t},
                    "none": {"drop": 5, "keep": 3},
                    "newer+larger": {"drop": 1000, "keep": 200, "swap": 30 + t},
                },
                "reasons": {},
                "prompts": 10,
                "prompts_with_pairs": 9,
                "used": {"keep": 19, "swap": 6},
                "abstained": 0,
                "human_chosen": 2,
                "evidence": {"method": "calibrated", "why": "2 judges voted <b>"},
                "judges": {
                    NASTY: judge(curve=[[0.1, 0.6, 40], [0.9, 0.9, 60]], shares_errors_with="b"),
                    "b": judge(curve=[[1.0, 0.7, 100]], shown_first=0.8),
                },
                "pairs": 25,
            },
        ),
        (
            f"iter-{t}/train",
            {
                "loss": title,
                "loss_options": {"clip_chosen": 0.5, "clip_rejected": 0.3},
                "first_loss": math.log(2),
                "steps": 20,
                "skipped_steps": 0,
                "means": means,
                "final": means,
                "too_long": 0,
                "generated_tokens": 4.0 + t,
                "distinct_responses": 0.6,
                "warnings": [],
            },
        ),
        (f"iter-{t}/eval", evaluation(f"tso-{t}", 0.3 + 0.1 * t)),
    ]


STAGES = [("iter-0/eval", evaluation("m.v1", 0.3)), *iteration(1), *iteration(2)]


def pair(i, prior="newer", decision="keep", prompt=NASTY, chosen=NASTY):
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": "long " * 100}],
        "score_chosen": 1.0,
        "score_rejected": 0.0,
        "margin": 0.0,
        "scale": 1.0,
        "soft_label": 1.0,
        "prompt_id": f"q{i}",
        "prompt_text": prompt,
        "answer": "5",
        "prior": prior,
        "decision": decision,
        "reason": "confirmed",
        "chosen_model": "tso-1",
        "chosen_sample": 0,
        "rejected_model": "m.v1",
        "rejected_sample": 0,
    }


def make_run(folder, stages=STAGES, **config):
    """A run folder with the stages given."""
    folder.mkdir(parents=True)
    stages = [{"name": name, "info": copy.deepcopy(info), "files": []} for name, info in stages]
    settings = {
        "loss_type": "dual_clip",
        "num_iterations": 2,
        "policy": None,
        "reference": "previous",
        "seed": 3,
        "clip_chosen": 0.5,
        "clip_rejected": 0.3,
        "margin_weight": 0.0,
        "prompts": NASTY,
        "cells": [{"path": "models/m.v1", "name": None}],
        **config,
    }
    state = {
        "format": 2,
        "versions": {"tso_fast": "0.1.0", "torch": "2.9"},
        "config": settings,
        "inputs": {},
        "prompts": "",
        "mini_batches": [],
        "stages": stages,
        "manifest": {},
    }
    write_state(folder, state)
    names = {stage["name"] for stage in stages}
    with open(folder / "metrics.jsonl", "w") as metrics:
        for t in (1, 2):
            if f"iter-{t}/pairs" in names:
                (folder / f"iter-{t}").mkdir()
                rows = [
                    pair(i, prior, decision)
                    for i, (prior, decision) in enumerate([("newer", "keep"), ("newer", "swap"), ("human", "keep")] * 9)
                ]
                (folder / f"iter-{t}/pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            if f"iter-{t}/train" in names:
                means = dict(STAGES)[f"iter-{t}/train"]["means"]
                for step in (10, 20):
                    metrics.write(json.dumps({"iteration": t, "step": step, **means}) + "\n")
        metrics.write('{"iteration": 2, "st')  # cut off by a kill
    return folder


def until(stage):
    return STAGES[: [name for name, _ in STAGES].index(stage) + 1]


def titled(title):
    """The first iteration of a run with a loss of that title."""
    return [STAGES[0], *iteration(1, title)]


def without_eval():
    return [(name, info) for name, info in STAGES if not name.endswith("eval")]


class Page(html.parser.HTMLParser):
    """Checks nesting, collects tags, attributes and text."""

    VOID = ("meta", "path", "use", "rect")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def page(folder, others=()):
    text = write_report(folder, others).read_text(encoding="utf-8")
    return Page(text), text


def test_numbers(tmp_path):
    summary = summarise(make_run(tmp_path / "run"))
    start, first, second = summary.versions
    assert (start.name, start.iteration, start.accuracy, start.pairs("keep"), start.loss) == (
        "m.v1",
        0,
        0.3,
        None,
        None,
    )
    assert (first.name, first.accuracy, first.low, first.high) == ("tso-1", 0.4, 0.36, 0.45)
    assert [second.pairs(d) for d in ("keep", "swap", "drop")] == [283, 32, 1012]
    assert (second.num_used, second.used) == (25, {"keep": 19, "swap": 6})
    assert (second.clip_chosen, second.clip_rejected, second.loss) == (0.1, 0.5, 0.58)
    assert (second.chosen_tokens, second.rejected_tokens, second.generated_tokens) == (2.5, 3.5, 6.0)
    assert (second.skipped_steps, summary.warnings, len(summary.metrics)) == (0, [], 4)
    assert summary.gain == pytest.approx(20)


def test_warnings_say_what_was_left_out_and_when_a_version_got_worse(tmp_path):
    stages = copy.deepcopy(STAGES)
    infos = dict(stages)
    infos["iter-1/train"] |= {"warnings": ["the policy's responses grew"], "too_long": 3, "truncated": 2}
    infos["iter-2/pairs"]["abstained"] = 1200
    infos["iter-2/eval"]["accuracy"] = 0.35
    assert summarise(make_run(tmp_path / "run", stages)).warnings == [
        "iteration 1: the policy's responses grew",
        "iteration 1: 3 pairs were longer than the context or max_length and left out",
        "iteration 1: 2 pairs had a response cut to max_length",
        "iteration 2: 1,200 verdicts abstained",
        "tso-1 answered more held-out prompts (40.0%) than tso-2, which came after it (35.0%)",
    ]


def test_plain_output_fits_80_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    stages = copy.deepcopy(STAGES)
    dict(stages)["iter-0/eval"]["model"] = "a-very-long-name-of-a-[red]model[/]-folder"
    dict(stages)["iter-2/pairs"]["decisions"]["none"]["drop"] = 123_456_789
    run = make_run(tmp_path / "run", stages)
    others = [make_run(run / f"compare-{loss}", titled(f"another, {loss}")) for loss in ("dpo", "sft")]
    assert comparisons(run) == [str(other) for other in others]
    print_summary([str(run), *comparisons(run)])
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert all(len(line) <= 80 for line in lines if "run" not in line)  # paths stay whole
    row = next(line for line in lines if line.startswith("tso-2")).split()
    assert row == ["tso-2", "50.0%", "46.0–55.0", "283", "32", "123.46M", "25", "10.0", "50.0", "0.580"]
    assert "[red]" in out
    assert "30.0% -> tso-2 50.0%, +20.0 points (95 % intervals do not overlap)" in " ".join(out.split())
    for name in ("a loss (ours)  30.0% 50.0% 46.0–55.0  +20.0", "another, dpo   30.0% 40.0% 36.0–45.0  +10.0"):
        assert name in out
    assert f"report: {run}/report.html" in out
    assert f'from_pretrained("{run}") loads the newest policy, tso-2' in out


def test_a_pipe_gets_whole_lines():
    code = """
from tso_fast import commands
name = "a judge with a long name, " * 9
commands.stdout.print(commands.make_table("Evidence", ("voter", "what"), [(name, "1"), ("b", "")], num_labels=2), "")
for console in (commands.stdout, commands.console):
    console.print(f"reasons   {name}")
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    name = "a judge with a long name, " * 9
    lines = [
        "Evidence",
        f"{'voter':<{len(name)}} what",
        "─" * (len(name) + 5),
        f"{name} 1",
        "b",
        "",
        f"reasons   {name}",
    ]
    assert done.stdout.splitlines() == lines
    assert done.stderr.splitlines() == lines[-1:]


def test_columns_and_terminals_are_as_wide_as_they_say(monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    assert make_console().width == 90
    monkeypatch.delenv("COLUMNS")
    assert make_console().width == WHOLE
    leader, follower = os.openpty()
    with os.fdopen(leader), os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert make_console().width != WHOLE


def test_the_title_of_a_narrow_table_stays_on_its_line(capsys):
    table = make_table("A title that is longer than its table, in [brackets]", ("a", "b"), [("x", "1")], ("", ""))
    make_console().print(table, "")
    rule = "─" * 3
    assert capsys.readouterr().out == f"A title that is longer than its table, in [brackets]\na b\n{rule}\nx 1\n\n\n\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run, and its page."""
    run = make_run(tmp_path_factory.mktemp("whole") / "run")
    return run, *page(run)


def test_page_needs_nothing_else_and_escapes(whole):
    run, found, text = whole
    assert {"script", "link", "img", "iframe"}.isdisjoint(found.tags)
    assert found.tags.count("svg") == 6
    assert not re.search(r"https?://|@import", text)
    loads = [value for name, value in found.attributes if name in ("src", "href", "srcset", "data")]
    assert loads
    assert all(value.startswith("#") for value in loads)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    ids = [value for name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in loads} | set(re.findall(r"url\(#([^)]*)\)", text)) <= set(ids)
    assert text.count("&lt;script&gt;alert") >= 8  # prompts, responses, configuration
    assert NASTY in found.text
    for number in ("50.0%", "46.0–55.0", "+20.0", "1,012", "0.580", "283"):
        assert number in found.text
    assert found.tags.count("details") == 8  # the long rejected responses
    assert text.count('class="pair"') == 8
    assert sum(found.text.count(f"prior: {kind} (confirmed)") for kind in ("human · keep", "newer · swap")) >= 4
    assert not list(run.glob(".tmp-*"))


def test_what_samplers_noted(whole):
    _, found, _ = whole
    assert "temperature 0.7, num generations 8" in found.text
    assert "temperature 0.9, num generations 8" in found.text


def test_the_panel_of_judges(whole):
    _, found, text = whole
    assert "Evidence: calibrated, as 2 judges voted &lt;b&gt;." in text
    for title in ("Judges of iteration 2", "believed right", "shown first", "shares errors with"):
        assert title in found.text
    for number in ("80.0%", "75–84", "+0.8"):
        assert number in found.text
    assert found.text.count("Right votes by their strength") == 1


@pytest.mark.slow
def test_page_is_the_same_each_time(whole):
    run, _, text = whole
    assert page(run)[1] == text


@pytest.mark.slow
def test_comparison_runs(tmp_path):
    run = make_run(tmp_path / "run")
    make_run(run / "compare-other", titled("another loss"))
    found, _ = page(run, comparisons(run))
    assert found.text.count("another loss") == 2  # table and figure
    assert "+10.0" in found.text


def test_a_run_without_training_names_its_losses(tmp_path):
    run = make_run(tmp_path / "run", STAGES[:1], loss_type=["dpo", "sft"])
    assert summarise(run).loss_name == "dpo + sft"


ENDS = ("iter-0/eval", "iter-1/generate", "iter-1/pairs", "iter-1/train", "iter-1/eval", "iter-2/pairs", "iter-2/train")
INCOMPLETE = [[], *map(until, ENDS), without_eval(), without_eval()[:4]]


@pytest.mark.parametrize("stages", INCOMPLETE, ids=lambda stages: stages[-1][0] if stages else "nothing")
@pytest.mark.slow
def test_incomplete_runs(tmp_path, stages, capsys):
    run = make_run(tmp_path / "run", stages)
    found, _ = page(run)
    print_summary([str(run)])
    out = capsys.readouterr().out
    trained = sum(name.endswith("train") for name, _ in stages)
    assert ("of 2 iterations are complete" in out) == (trained < 2)
    assert ("from_pretrained" in out) == (trained > 0)
    assert ("not known" in out) == (not any(name == "iter-1/eval" for name, _ in stages))
    assert found.text.count("iterations are complete") == (trained < 2)


def test_pairs_file_that_was_removed(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "iter-2/pairs.jsonl").unlink()
    (run / "metrics.jsonl").unlink()
    found, _ = page(run)
    assert "Pairs of iteration" not in found.text
    assert found.tags.count("svg") == 4


def test_garbage_among_the_metrics_is_left_out_and_counted(tmp_path, caplog):
    run = make_run(tmp_path / "run")
    whole = summarise(run).metrics
    garbage = [b"\xff\xfe", b"[1]", b"7", b"[" * 50_000, b'{"loss": 1}', b'{"iteration": "a", "step": 1}']
    garbage += [b'{"iteration": 1, "step": 1, "loss": %s}' % loss for loss in (b'"low"', b"NaN", b"9" * 400)]
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b"\n".join(garbage) + b'\n{"iteration": 2, "st')  # a kill cut the last one
    assert summarise(run).metrics == whole
    assert f"{len(garbage)} lines are no rows of metrics" in caplog.text
    write_report(run)


def test_a_progress_bar_shows_a_title_as_it_is(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(progress, "console", make_console(file=file, force_terminal=True, width=100))
    with progress.progress_bar("evaluate [/x] :fire: [red]", 2) as advance:
        advance(2)
    assert file.getvalue().count("evaluate [/x] :fire: [red]") >= 2  # the bar, and the line that stays


@pytest.mark.parametrize(("reply", "agreed"), [("y\n", True), ("Yes\n", True), ("\n", False), ("n\n", False)])
def test_a_question_is_put_to_whoever_sits_there(monkeypatch, capsys, reply, agreed):
    monkeypatch.setattr("sys.stdin", io.StringIO(reply))
    assert not progress.confirm("delete runs/[/x]?")
    assert "delete runs/[/x]? Nobody is here to answer" in capsys.readouterr().err
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert progress.confirm("delete runs/[/x]?") == agreed


def test_characters_that_turn_text_round_are_shown_and_do_nothing(tmp_path):
    run = make_run(tmp_path / "run", seed="<i>\u202e", reference="\x1b[31m\u2066")
    write_rows(run / "iter-2/pairs.jsonl", [pair(1, chosen="safe \u202eevil\u202c שלום")])
    found, text = page(run)
    assert "safe ⟨U+202E⟩evil⟨U+202C⟩ שלום" in found.text
    assert "seed <i>⟨U+202E⟩" in found.text
    assert "⟨U+001B⟩[31m⟨U+2066⟩" in found.text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", text)


def test_curves_that_hardly_move_have_plain_axes_and_a_whole_last_point(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    rows = [{"iteration": 1, "step": n, "loss": math.log(2) + 1e-8 * n, "rewards/margins": 1e-7} for n in (1, 2, 3)]
    write_rows(run / "metrics.jsonl", rows)
    drawn = []
    monkeypatch.setattr(figures, "draw", lambda name, plot, height: drawn.append((plot, height)))
    figures.loss_and_margin(summarise(run))
    (plot, height), seen = drawn[0], []
    figures.save(io.BytesIO(), lambda figure: (plot(figure), seen.append(figure)), height, format="svg")
    axes, _ = seen[0].axes
    assert axes.get_xlim()[1] > 3.05
    assert axes.yaxis.get_major_formatter().get_offset() == ""
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert all(re.fullmatch(r"0\.\d{3,4}", label) for label in labels)
    assert len(set(labels)) == len(labels)


def test_no_run(tmp_path):
    with pytest.raises(InputError, match=r"run\.json"):
        write_report(tmp_path)


def test_import_is_light():
    code = "import sys, tso_fast.report; assert not {'matplotlib', 'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
