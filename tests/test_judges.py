"""Verifiers: what they accept, that they agree with the labels of real data, and how they fail."""

from __future__ import annotations

import random
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from helpers import read_rows

from tso_fast.config.settings import VerifierConfig
from tso_fast.errors import InputError
from tso_fast.files.rows import BadRows, read_candidates
from tso_fast.judges.panel import judgeable
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


def test_prompts_that_cannot_be_judged_are_known_before_generation() -> None:
    candidates = [item(id="1"), item(answer=None, id="2"), item(answer="five", id="3")]
    for name, usable in (("numeric", "1"), ("exact", "13"), ("toy_verifier:letters", "123"), (None, "123")):
        bad = BadRows("skip")
        config = VerifierConfig(verifier=name)
        assert "".join(c.prompt.id for c in judgeable(candidates, config, bad)) == usable
        assert len(bad.rows) == 3 - len(usable)
    with pytest.raises(InputError, match=r"p\.jsonl:2: field 'answer' is missing"):
        judgeable(candidates, VerifierConfig(verifier="exact"), BadRows())
    with pytest.raises(InputError, match="verifier: none of 1 prompts has an answer that 'exact' can use"):
        judgeable(candidates[1:2], VerifierConfig(verifier="exact"), BadRows("skip"))


# ---- a verifier from outside


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "outside.py").write_text(
        "import numpy\n"
        "def echo(prompt, response, answer):\n"
        "    seen.append((prompt, response, answer))\n"
        "    return eval(response)\n"
        "seen = []\n"
        "threshold = 0.5\n"
    )
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "typo.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "outside:echo"
    sys.modules.pop("outside", None)


def test_a_function_gets_prompt_response_and_answer(module: str) -> None:
    conversation = (Message(role="system", content="Add."), Message(role="user", content="2 + 3?"))
    texts = ("0.25", "True", "False", "1", "-3", "None", "numpy.float64(0.5)")
    assert scores(item(*texts, prompt=conversation, answer=None), module) == [0.25, 1.0, 0.0, 1.0, -3.0, None, 0.5]
    assert scores(item("1"), module) == [1]
    seen = sys.modules["outside"].seen
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "2 + 3?"}]
    assert seen[0] == (messages, "0.25", None)
    assert seen[-1] == ("2 + 3?", "1", "5")


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
    ],
)
def test_a_function_that_fails_names_prompt_and_verifier(module: str, response: str, message: str) -> None:
    place = r"^p\.jsonl:2: verifier 'outside:echo' "
    candidates = [item("1", id="1"), item("0.5", response, id="2"), item("1", id="3")]
    with pytest.raises(InputError, match=place + message):
        verify(candidates, make_verifier(module), BadRows())
    bad = BadRows("skip")
    assert [v.score for v in verify(candidates, make_verifier(module), bad)] == [1, None, None, 1]
    assert len(bad.rows) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", "'no_such_module:f' cannot be imported: ModuleNotFoundError: No module named"),
        ("outside:absent", "'outside:absent' cannot be imported: AttributeError: module 'outside' has no"),
        ("broken:f", "'broken:f' cannot be imported: ZeroDivisionError: division by zero"),
        ("typo:f", "'typo:f' cannot be imported: SyntaxError"),
        (":f", "':f' cannot be imported: ValueError: Empty module name"),
        ("outside:", "'outside:' cannot be imported: AttributeError"),
        ("outside:threshold", "'outside:threshold' is 0.5; expected a function"),
    ],
)
def test_a_function_that_is_not_there(module: str, name: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        make_verifier(name)
    assert str(caught.value).startswith(f"verifier: {message}")
