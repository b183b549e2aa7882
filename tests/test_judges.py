"""Verifiers: what they accept, that they agree with the labels of real data, and how they fail."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import fork, read_rows, status_of, write_rows

from tso_fast.config.settings import JudgeConfig, JudgesConfig, VerifierConfig
from tso_fast.errors import InputError
from tso_fast.files.rows import BadRows, read_candidates
from tso_fast.judges import panel, verifier, worker
from tso_fast.judges.judge import Bench, Cost
from tso_fast.judges.verifier import final_number, make_verifier, verify
from tso_fast.types import Candidates, Message, Prompt, Response


def item(*texts: str, answer: str | None = "5", prompt: Any = "2 + 3?", id: str = "q") -> Candidates:  # noqa: A002
    responses = tuple(Response(model="m", text=text, sample=i) for i, text in enumerate(texts))
    return Candidates(prompt=Prompt(id=id, prompt=prompt, answer=answer, where=f"p.jsonl:{id}"), responses=responses)


def scores(candidates: Candidates, name: str, pattern: str | None = None) -> list[float | None]:
    return [v.score for v in verify([candidates], make_verifier(name, pattern), BadRows())]


# ---- real data


def test_numeric_agrees_with_every_label_of_gsm8k(gsm8k_dev: Path) -> None:
    rows = read_rows(gsm8k_dev)
    labels = [float(r["is_correct"]) for row in rows for r in row["responses"]]
    verdicts = verify(read_candidates(gsm8k_dev, BadRows()), make_verifier("numeric"), BadRows())
    humans = {i: v.score for i, v in enumerate(verdicts) if v.response == 4}
    assert [v.score for i, v in enumerate(verdicts) if i not in humans] == labels
    assert len(labels) == 2640
    assert 0.2 < sum(labels) / len(labels) < 0.6
    assert set(humans.values()) == {1.0}


def test_numeric_accepts_every_human_solution_of_gsm8k(gsm8k_train: Path) -> None:
    verdicts = verify(read_candidates(gsm8k_train, BadRows()), make_verifier("numeric"), BadRows())
    assert [v.prompt_id for v in verdicts if v.score != 1.0] == []
    assert len(verdicts) == 7473


# ---- final_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("-$1,234.50", "-1234.5"),
        ("$-5", "-5"),
        ("€ 7", "7"),
        ("7€", "7"),
        ("1,234,567", "1234567"),
        ("3.0", "3"),
        ("3.", "3"),
        (".5", "0.5"),
        ("-.5", "-0.5"),
        ("007", "7"),
        ("−5", "-5"),
        ("+7", "7"),
        ("50%", "50"),
        ("5th", "5"),
        ("(5)", "5"),
        ("**5**", "5"),
        ("x=5", "5"),
        (r"\boxed{5}", "5"),
        ("7 ÷ 2 = 3.5", "3.5"),
        ("10 - 3", "3"),
        ("20-5", "5"),
        ("= -3", "-3"),
        ("3 to -4", "-4"),
        ("48/2 = <<48/2=24>>24 clips", "24"),
        ("half: <<1/2=0.5>>", None),
        ("none", None),
        ("", None),
        ("h2o", None),
        # after a marker the first number counts, else the last one
        ("16 eggs\n#### 18", "18"),
        ("A: 26 or 27", "26"),
        ("The answer is 3, not 4.", "3"),
        ("Answer: $8.50", "8.5"),
        ("A: 1\nA: 2", "2"),
        ("#### 1,000\nDone in 3 steps", "1000"),
        ("4 apples. A: none", "4"),
        ("A:\n- 5", "5"),
        ("#### -12", "-12"),
        ("Banana: 3 of 4", "4"),
        # several numbers, as documented
        ("1/2", "2"),
        ("1 000", "0"),
        ("1.000,50", "50"),
        ("2.5e3", "2.5"),
    ],
)
def test_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


def test_any_number_is_found_in_any_dress() -> None:
    r = random.Random("numbers")
    for _ in range(2000):
        digits = r.choice([r.randrange(10), r.randrange(10**6), r.randrange(10**12)])
        value = Decimal(digits) / 10 ** r.choice([0, 0, 1, 2, 5]) * r.choice([1, 1, -1])
        plain = format(abs(value), r.choice(",f")) + r.choice(["", "", ".0" if value % 1 == 0 else "0"])
        number = (r.choice("-−") if value < 0 else "") + r.choice(["", "$", "€", "£"]) + plain
        before = r.choice(["", "He has 3 and 4.5.\n", "7 <<3+4=7>>, ", "so x = ", "\n- "])
        after = r.choice(
            [
                "{}",
                "{}.",
                "({})",
                "**{}** apples",
                "\n{}%\n",
                "\n#### {}",
                "A: {}\nIn 2 steps.",
                "The answer is {}, after 9 days.",
            ]
        )
        whole = before + after.format(number)
        assert final_number(whole) == value, whole


def test_any_text_gives_a_number_or_none() -> None:
    r = random.Random("noise")
    characters = "0123456789.,-−$€ \n#:A%eE/<>=()x٣½"
    for _ in range(5000):
        text = "".join(r.choices(characters, k=r.randrange(20)))
        assert isinstance(final_number(text), Decimal | None)
    assert final_number("9" * 10_000) == Decimal("9" * 10_000)


# ---- the built-in verifiers


def test_exact() -> None:
    assert scores(item("5", " 5\n", "5.0", "five", "", "55"), "exact") == [1, 1, 0, 0, 0, 0]
    assert scores(item("", answer=""), "exact") == [1]


def test_numeric() -> None:
    assert scores(item("5", "5.00 pears", "A: $5", "#### 50", "none", "-5"), "numeric") == [1, 1, 1, 0, 0, 0]
    assert scores(item("1234.5", answer="$1,234.50"), "numeric") == [1]


def test_regex_takes_the_last_match_or_its_first_group() -> None:
    assert scores(item("4 then 5", "5 then 4", "none"), "regex", r"\d+") == [1, 0, 0]
    assert scores(item("<a>4</a><a> 5 </a>6", "<a>4</a>5"), "regex", r"<a>(.*?)</a>") == [1, 0]
    assert scores(item("5 or"), "regex", r"5|(or)") == [0]  # the last match, with its group
    assert scores(item("or 5"), "regex", r"5|(or)") == [0]  # its group took no part


def test_a_bad_regex_names_the_key() -> None:
    with pytest.raises(InputError, match=r"verifier_pattern: '\(' is no regular expression: missing \)"):
        make_verifier("regex", "(")


@pytest.mark.parametrize(("name", "pattern"), [("exact", None), ("numeric", None), ("regex", r"\d+")])
def test_a_missing_answer_names_the_row(name: str, pattern: str | None) -> None:
    with pytest.raises(InputError, match=rf"p\.jsonl:q: field 'answer' is missing; verifier '{name}' needs it"):
        scores(item("5", answer=None), name, pattern)


def test_an_answer_that_is_no_number_is_refused_by_numeric() -> None:
    with pytest.raises(InputError, match=r"p\.jsonl:q: field 'answer' is 'five'; verifier 'numeric' expects a number"):
        scores(item("5", answer="five"), "numeric")


def test_skip_abstains_on_the_prompt_and_says_why() -> None:
    bad = BadRows("skip")
    candidates = [item("5", id="1"), item("5", "6", answer=None, id="2"), item("6", id="3")]
    verdicts = verify(candidates, make_verifier("exact"), bad)
    assert [(v.prompt_id, v.response, v.score) for v in verdicts] == [
        ("1", 0, 1),
        ("2", 0, None),
        ("2", 1, None),
        ("3", 0, 0),
    ]
    assert "field 'answer' is missing" in verdicts[1].reason
    assert [row["row"]["id"] for row in bad.rows] == ["2"]


def usable(candidates: list[Candidates], config: VerifierConfig, bad: BadRows) -> list[Candidates]:
    return panel.usable(panel.make_judges(config), candidates, bad)


def test_prompts_that_cannot_be_judged_are_known_before_generation() -> None:
    candidates = [item(id="1"), item(answer=None, id="2"), item(answer="five", id="3")]
    for name, ids in (("numeric", "1"), ("exact", "13"), ("toy_verifier:letters", "123"), (None, "123")):
        bad = BadRows("skip")
        config = VerifierConfig(verifier=name)
        assert "".join(c.prompt.id for c in usable(candidates, config, bad)) == ids
        assert len(bad.rows) == 3 - len(ids)
    with pytest.raises(InputError, match=r"p\.jsonl:2: field 'answer' is missing"):
        usable(candidates, VerifierConfig(verifier="exact"), BadRows())
    with pytest.raises(InputError, match="verifier: none of 1 prompts has an answer that 'exact' can use"):
        usable(candidates[1:2], VerifierConfig(verifier="exact"), BadRows("skip"))


# ---- a verifier from outside


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "outside.py").write_text(
        "import os, sys, time\n"
        "import numpy\n"
        "class Tensor:\n"  # what a scalar of torch has, without the seconds of its import
        "    shape = ()\n"
        "    def __init__(self, value): self.value = value\n"
        "    def item(self): return self.value\n"
        "def echo(prompt, response, answer):\n"
        "    seen.append((prompt, response, answer))\n"
        "    return eval(response)\n"
        "def check(prompt, response, answer):\n"
        "    return repr((prompt, answer)) == response\n"
        "seen = []\n"
        "threshold = 0.5\n"
    )
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit('bye')\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "typo.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return "outside:echo"


def test_a_function_gets_prompt_response_and_answer(module: str) -> None:
    conversation = (Message(role="system", content="Add."), Message(role="user", content="2 + 3?"))
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "2 + 3?"}]
    check = "outside:check"
    assert scores(item(repr((messages, None)), prompt=conversation, answer=None), check) == [1]
    assert scores(item(repr(("2 + 3?", "5"))), check) == [1]
    assert scores(item("0.25", "True", "False", "1", "-3", "None"), module) == [0.25, 1.0, 0.0, 1.0, -3.0, None]


def test_scalars_of_numpy_and_torch_are_numbers(module: str) -> None:
    texts = ("numpy.float64(0.5)", "numpy.float32(0.5)", "numpy.int64(2)", "numpy.bool_(True)", "numpy.array(0.25)")
    assert scores(item(*texts), module) == [0.5, 0.5, 2, 1, 0.25]
    assert scores(item("Tensor(0.5)", "Tensor(True)"), module) == [0.5, 1]
    assert float(verifier._score(torch.tensor(0.5))) == 0.5
    assert verifier._score(torch.tensor(True)) == 1


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ("1 / 0", r"raised ZeroDivisionError: division by zero on response '1 / 0'; expected a number, a boolean or"),
        ("'good'", r"returned 'good'; expected a finite number, a boolean or None"),
        ("float('nan')", r"returned nan; expected a finite number"),
        ("-float('inf')", r"returned -inf; expected a finite number"),
        ("1e300", r"returned 1e\+300; expected a finite number"),
        ("10 ** 400", r"returned 10+; expected a finite number"),
        ("[1.0]", r"returned \[1.0\]; expected a finite number"),
        ("numpy.array([1.0])", r"returned array\(\[1.\]\); expected a finite number"),
        ("sys.exit('bye')", r"raised SystemExit: bye on response"),
        ("os._exit(7)", r"ended its process with status 7 on response"),
        ("time.sleep(30)", r"took longer than 0.5 s on response 'time.sleep\(30\)'.*; mend it, or raise verifier_time"),
    ],
)
def test_a_function_that_fails_names_prompt_and_verifier(module: str, response: str, message: str) -> None:
    place = r"^p\.jsonl:2: verifier 'outside:echo' "
    candidates = [item("1", id="1"), item("0.5", response, id="2"), item("1", id="3")]
    with pytest.raises(InputError, match=place + message):
        verify(candidates, make_verifier(module, timeout_s=0.5), BadRows())
    bad = BadRows("skip")
    assert [v.score for v in verify(candidates, make_verifier(module, timeout_s=0.5), bad)] == [1, None, None, 1]
    assert len(bad.rows) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", "'no_such_module:f' cannot be imported: ModuleNotFoundError: No module named"),
        ("outside:absent", "'outside:absent' cannot be imported: AttributeError: module 'outside' has no"),
        ("broken:f", "'broken:f' cannot be imported: ZeroDivisionError: division by zero"),
        ("typo:f", "'typo:f' cannot be imported: SyntaxError"),
        ("leaves:f", "'leaves:f' cannot be imported: SystemExit: bye"),
        (":f", "':f' cannot be imported: ValueError: Empty module name"),
        ("outside:", "'outside:' cannot be imported: AttributeError"),
        ("outside:threshold", "'outside:threshold' is 0.5; expected a function"),
    ],
)
def test_a_function_that_is_not_there(module: str, name: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        make_verifier(name)
    assert str(caught.value).startswith(f"verifier: {message}")


def test_a_script_that_runs_the_program_when_it_is_imported_is_told_so(tmp_path: Path) -> None:
    """And does not start itself again and again."""
    write_rows(tmp_path / "r.jsonl", [{"prompt": "a", "responses": [{"model": "m", "text": "t"}]}])
    arguments = ["score", "--responses", "r.jsonl", "--output", "v.jsonl", "--verifier", "script:f"]
    script = tmp_path / "script.py"
    script.write_text(f"def f(*_): return 1.0\nimport tso_fast.cli\nraise SystemExit(tso_fast.cli.main({arguments}))\n")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert (
        "InputError: script runs tso-fast when it is imported; put the call of tso_fast.cli.main under "
        'if __name__ == "__main__":'
    ) in done.stderr


def test_a_pattern_that_hangs_is_stopped_and_the_other_rows_are_judged() -> None:
    """It holds Python's lock for years, so that no thread and no signal handler could."""
    candidates = [item("5", id="1"), item("a" * 50 + "!", id="2"), item("5", id="3")]
    check = make_verifier("regex", r"(?:a+)+$|\d", timeout_s=0.5)
    with pytest.raises(InputError, match=r"^p\.jsonl:2: verifier 'regex' took longer than 0\.5 s on response 'aaaa"):
        verify(candidates, check, BadRows())
    bad = BadRows("skip")
    assert [v.score for v in verify(candidates, check, bad)] == [1, None, 1]
    assert len(bad.rows) == 1


def test_a_verifier_that_hangs_ends_with_a_program_that_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "GRACE_S", 0.3)
    noted = tmp_path / "pid"

    def judge() -> None:
        check = make_verifier("regex", r"(a+)+$", timeout_s=0.5)
        noted.write_text(str(worker.worker._process.pid))
        check(item("").prompt, Response(model="m", text="a" * 50 + "!"))

    child = fork(judge)
    while not (noted.exists() and noted.read_text()):
        time.sleep(0.01)
    time.sleep(0.2)
    os.kill(child, signal.SIGKILL)
    assert status_of(child) == -signal.SIGKILL
    pid, deadline = int(noted.read_text()), time.monotonic() + 20
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# ---- settings of judges


def refusal(*judges: JudgeConfig, **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        panel.make_judges(JudgesConfig(judges=list(judges), **settings))
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"kind": "llms"},
            f"kind: got 'llms', expected one of {', '.join(panel.JUDGES)}, or package.module:Class; "
            "did you mean 'llm'?",
        ),
        ({"kind": "agreement", "cell": "policy"}, "cell: it has no effect on a judge of kind 'agreement'; leave it"),
        ({"kind": "agreement", "args": {"n": 1}}, "args: it has no effect on a judge of kind 'agreement'"),
        ({"kind": "agreement", "name": "human"}, "name: 'human' is reserved for labels of pairs; set another name"),
        ({"kind": "verifier"}, "verifier: missing; a judge of kind 'verifier' needs a program"),
        ({"kind": "verifier", "verifier": "nmeric"}, "verifier: got 'nmeric', expected one of exact, numeric"),
        ({"kind": "verifier", "verifier": "regex"}, "verifier_pattern: it goes with verifier 'regex', and regex needs"),
        (
            {"kind": "verifier", "verifier": "exact", "verifier_pattern": "a"},
            "verifier_pattern: it goes with verifier 'regex'",
        ),
        ({"kind": "verifier", "verifier": "no_such:f"}, "verifier: 'no_such:f' cannot be imported"),
        ({"kind": "implicit", "template": "pointwise"}, "template: it has no effect on a judge of kind 'implicit'"),
    ],
)
def test_a_judge_that_cannot_be_names_the_setting(settings: dict[str, Any], message: str) -> None:
    assert refusal(JudgeConfig(kind="agreement", name="first"), JudgeConfig(**settings)).startswith(
        f"judges[1].{message}"
    )


def test_judges_have_names_of_their_own() -> None:
    twice = [JudgeConfig(kind="agreement")] * 2
    assert refusal(*twice) == "judges[1].name: 'agreement' is taken; set a name of its own"
    second = JudgeConfig(kind="verifier", verifier="exact")
    assert refusal(second, verifier="numeric") == "judges[0].name: 'verifier' is taken; set a name of its own"
    judges = panel.make_judges(JudgesConfig(verifier="numeric", judges=[dataclasses.replace(second, name="same")]))
    assert [judge.name for judge in judges] == ["verifier", "same"]


@pytest.mark.parametrize(
    ("name", "pattern", "message"),
    [
        ("nummeric", None, "verifier: got 'nummeric', expected one of exact, numeric, regex, ifeval"),
        (None, "a", "verifier_pattern: it goes with verifier 'regex', and regex needs it; got verifier None"),
        ("regex", None, "verifier_pattern: it goes with verifier 'regex', and regex needs it"),
        ("toy_verifier:letters", "a", "verifier_pattern: it goes with verifier 'regex'"),
    ],
)
def test_a_verifier_that_cannot_be_names_the_setting(name: str | None, pattern: str | None, message: str) -> None:
    assert refusal(verifier=name, verifier_pattern=pattern).startswith(message)


# ---- a judge from outside


def own(which: str = "Shortest", **settings: Any) -> JudgeConfig:
    return JudgeConfig(kind=f"toy_judge:{which}", **settings)


def ask(*judges: JudgeConfig, **bench: Any) -> Any:
    made = panel.make_judges(JudgesConfig(judges=list(judges)))
    candidates = [item("5", "five", answer=None, id="1"), item("5", "55", id="2")]
    return panel.ask(made, candidates, Bench(**{"bad": BadRows(), **bench}))


def test_a_class_judges_beside_the_others() -> None:
    lenient = JudgeConfig(kind="verifier", name="lenient", verifier="toy_verifier:letters")
    found, costs = ask(own(), own(name="short", args={"longest": 1}), lenient)
    assert [(v.judge, v.prompt_id, v.response) for v in found] == [
        (name, prompt, i) for name in ("toy_judge:Shortest", "short", "lenient") for prompt in "12" for i in (0, 1)
    ]
    assert [v.score for v in found][:8] == [-1, -4, -1, -2, -1, None, -1, None]
    assert costs == {}
    (judge,) = panel.make_judges(JudgesConfig(judges=[own()]))
    assert panel.num_steps([judge], [item("5")] * 3) == 3


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        (
            own(args={"longst": 1}),
            "args.longst: judge 'toy_judge:Shortest' has no such argument; expected longest; did",
        ),
        (own(args={"longest": 0}), "args.longest: got 0, expected an integer >= 1"),
        (own(cell="policy"), "cell: it has no effect on a judge of kind 'toy_judge:Shortest'; leave it out"),
        (
            own("Silent"),
            "kind: 'toy_judge:Silent' has no 'judge'; expected a class that inherits tso_fast.judges.judge",
        ),
        (own("Absent"), "kind: 'toy_judge:Absent' cannot be imported: AttributeError: module 'toy_judge' has no"),
        (own("function"), "kind: 'toy_judge:function' is <function function at"),
        (own("Bench"), "kind: 'toy_judge:Bench' has no 'takes'"),
        (JudgeConfig(kind="no_such:Judge"), "kind: 'no_such:Judge' cannot be imported: ModuleNotFoundError: No module"),
    ],
    ids=lambda value: value.kind if isinstance(value, JudgeConfig) else "",
)
def test_a_class_that_is_no_judge(judge: JudgeConfig, message: str) -> None:
    assert refusal(judge).startswith(f"judges[0].{message}")


@pytest.mark.parametrize(
    "verdict",
    [
        {"prompt_id": "3"},
        {"response": 2},
        {"response": -1},
        {"judge": "other"},
        {"score": float("nan")},
        {"score": "1"},
    ],
    ids=str,
)
def test_a_verdict_that_cannot_be_is_refused(verdict: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"^judge 'toy_judge:Careless' gave Verdict\(.*\); expected its own name"):
        ask(own("Careless", args=verdict))
    assert len(ask(own("Careless", args={"score": None}))[0]) == 1


def test_programs_are_asked_before_models() -> None:
    """What they refuse should cost nothing; verdicts keep the order of the judges."""
    first, second = own("Model", name="a"), JudgeConfig(kind="verifier", name="b", verifier="exact")
    told: list[int] = []
    with pytest.raises(InputError, match="field 'answer' is missing"):
        ask(first, second, advance=told.append)
    assert told == []
    found, _ = ask(first, second, bad=BadRows("skip"), advance=told.append)
    assert told == [1, 1]
    assert [v.judge for v in found] == ["a"] * 4 + ["b"] * 4
    judges = panel.make_judges(JudgesConfig(judges=[second, first]))
    assert panel.needs_models(judges)
    with pytest.raises(InputError, match=r"judges: 'a' is a model, which this command does not run; run `tso-fast sc"):
        panel.refuse_models(judges)


def test_a_class_on_the_command_line(tmp_path: Path, cli: Callable[..., Any]) -> None:
    responses = [{"model": "m", "text": "5"}, {"model": "n", "text": "five"}]
    rows = write_rows(tmp_path / "r.jsonl", [{"prompt": "2 + 3?", "responses": responses}])
    judge = "{kind: 'toy_judge:Shortest', name: short, args: {longest: 3}}"
    done = cli("score", ["--responses", rows, "--judges", f"[{judge}]", "--output", tmp_path / "v.jsonl"])
    assert done.status == 0, done.err
    assert [(row["judge"], row["score"]) for row in read_rows(tmp_path / "v.jsonl")] == [("short", -1), ("short", None)]
    assert "judge " in done.err  # its progress
    for command in ("score", "pairs"):  # before a file is read
        arguments = ["--responses", "gone", "--output", tmp_path / "o", "--judges", "[{kind: 'toy_judge:Shortes'}]"]
        done = cli(command, arguments)
        assert done.status == 2
        assert done.err.startswith("error: judges[0].kind: 'toy_judge:Shortes' cannot be imported")


def test_the_cost_of_a_judge_as_a_row() -> None:
    row = Cost(judge="a", results=60, decided=60, disagreements=60, first_shown=120).to_dict()
    assert (row["disagreement"], row["first_shown_share"], row["abstentions"]) == (1.0, 1.0, 0)
    assert row["bias"].startswith("judge a contradicts itself between the two orders in 60 of 60")
