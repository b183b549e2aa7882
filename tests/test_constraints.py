"""IFEval's constraints: each type by hand, all of the published prompts, and how rows and the verifier carry them."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers import read_rows, write_rows

from tso_fast.config.settings import VerifierConfig
from tso_fast.errors import InputError
from tso_fast.files.rows import BadRows, candidates_row, parse_candidates, prompt_row, read_candidates
from tso_fast.judges import constraints, panel
from tso_fast.judges.constraints import (
    LANGUAGES,
    TYPES,
    count_capital_words,
    count_sentences,
    count_words,
    holds,
    loose_variants,
)
from tso_fast.judges.verifier import make_verifier, verify
from tso_fast.types import Candidates, Constraint, Prompt, Response

WITH_LANGUAGE = ("change_case:english_capital", "change_case:english_lowercase", "language:response_language")
ENGLISH = "the quick brown fox jumps over the lazy dog and then it sleeps in the warm sun for a while"
LANGUAGE_SAMPLES = {
    "ar": "سأجيب على هذا السؤال باللغة العربية.",
    "bg": "Ще отговоря на този въпрос на български.",
    "bn": "আমি বাংলায় উত্তর দেব",
    "de": "Ich werde diese Frage auf Deutsch beantworten.",
    "fa": "من به زبان فارسی پاسخ خواهم داد.",
    "fi": "Vastaan tähän kysymykseen suomeksi.",
    "gu": "હું ગુજરાતીમાં જવાબ આપીશ",
    "hi": "मुझे हिंदी में उत्तर देना है।",
    "it": "Risponderò a questa domanda in italiano.",
    "kn": "ನಾನು ಕನ್ನಡದಲ್ಲಿ ಉತ್ತರಿಸುತ್ತೇನೆ",
    "ko": "저는 한국어로 대답하겠습니다.",
    "mr": "मला मराठीत उत्तर द्यायचे आहे.",
    "ne": "म नेपालीमा जवाफ दिन्छु।",
    "pa": "ਮੈਂ ਪੰਜਾਬੀ ਵਿੱਚ ਜਵਾਬ ਦੇਵਾਂਗਾ",
    "pt": "Vou responder a esta pergunta em português.",
    "ru": "Я отвечу на этот вопрос по-русски.",
    "sw": "Nitajibu swali hili kwa lugha ya Kiswahili.",
    "ta": "நான் தமிழில் பதிலளிப்பேன்",
    "te": "నేను తెలుగులో సమాధానం ఇస్తాను",
    "th": "ฉันจะตอบคำถามนี้เป็นภาษาไทย",
    "ur": "میں اس سوال کا جواب اردو میں دوں گا۔",
    "vi": "Tôi sẽ trả lời bằng tiếng Việt.",
}


def of(id: str, **kwargs: Any) -> Constraint:  # noqa: A002
    return Constraint(id=id, kwargs=kwargs)


# ---- each type by hand


class Case(NamedTuple):
    constraint: Constraint
    true: tuple[str, ...]
    false: tuple[str, ...]


at_least, less_than = {"relation": "at least"}, {"relation": "less than"}
CASES = [
    Case(
        of("length_constraints:number_words", num_words=3, **at_least),
        ("a b c", "a, b - c", "don't go", "x\n\ny\tz", "één twee drie", "यह बहुत अच्छा"),
        ("a b", "well-known", "... - !"),
    ),
    Case(of("length_constraints:number_words", num_words=3, **less_than), ("a b", "हिंदी में"), ("a b c", "don't go")),
    Case(
        of("length_constraints:number_sentences", num_sentences=2, **at_least),
        ("One. Two.", "One! two", "One?\nTwo", "He left… She stayed."),
        ("One.", "one two", "Dr. Smith left.", "3.5 is ok"),
    ),
    Case(
        of("length_constraints:number_sentences", num_sentences=2, **less_than), ("One.", "one", "..."), ("One. Two.",)
    ),
    Case(
        of("length_constraints:number_paragraphs", num_paragraphs=2),
        ("a\n***\nb", "a *** b", "***\na\n***\nb\n***\n", "a***b"),
        ("a\n\nb", "a\n***\n***\nb", "a******b", "a\n***", "a\n***\nb\n***\nc", "***"),
    ),
    Case(
        of("length_constraints:nth_paragraph_first_word", num_paragraphs=2, nth_paragraph=2, first_word="Elm"),
        (
            "a\n\nelm tree",
            "a\n\n\n\nELM",
            'a\n\n"Elm," he said',
            "a\n\n“Elm: yes”",
            "\n\na\n\n  elm.\n\n",
            "a\n\nelm—x",
        ),
        ("elm\n\na", "a\nelm", "a\n\nelms", "a\n\nelm-tree", "a\n\nb\n\nelm", "elm", "a\n\n**elm**", "a\n\n!!"),
    ),
    Case(
        of("length_constraints:nth_paragraph_first_word", num_paragraphs=1, nth_paragraph=2, first_word="a"), (), ("a",)
    ),
    Case(
        of("detectable_format:number_bullet_lists", num_bullets=2),
        (
            "* a\n* b",
            "- a\n  - b",
            "text\n* a\n\n- b\ntext",
            "*a\n*b",
            "* a\n---\n* b",
            "* *x* y\n- **z**",
            "* a\n*b* c\n- d",
        ),
        ("* a", "* a\n* b\n* c", "a * b\n* c", "**a**\n**b**", "• a\n• b", "*a* x\n*b* y", "---\n***", "1. a\n2. b"),
    ),
    Case(
        of("detectable_format:number_highlighted_sections", num_highlights=2),
        ("*a* and *b*", "**a** b **c d**", "* *a* **b**", "***a*** _x_ *é*", '"*a*"\n*b*'),
        ("*a*", "***a***", "** ** * *", "*a\nb* c", "* one **two**", "_a_ _b_", "****", "** ****"),
    ),
    Case(
        of("detectable_format:multiple_sections", section_spliter="Section", num_sections=2),
        ("Section 1\na\nSection 2\nb", "**Section 1** Section 2", "Section1 Section\n2 Section 3"),
        ("Section 1", "SECTION 1\nSECTION 2", "Section A Section B", "Sections 1 2"),
    ),
    Case(
        of("detectable_format:multiple_sections", section_spliter="Part (", num_sections=1), ("Part ( 1)",), ("Part 1",)
    ),
    Case(
        of("detectable_format:title"),
        ("<<a>>", "x\n <<Big Title>> y", "<<<a>>>", "<<名>>", "<< <<a>>"),
        ("<a>", "<<>>", "<< >>", "<<a\nb>>", "a>> <<b", "<<a>", "<<", "<<a\n>>", "x << y\nz >> w"),
    ),
    Case(
        of("detectable_format:json_format"),
        (
            '{"a": {"b": [1, null, {"c": "é"}]}}',
            "[]",
            '```json\n{"a": 1}\n```',
            '```JSON\n{"a": 1}\n```',
            "```\n[1]\n```",
            ' \n{"a": "```"}\n',
            '"text"',
            '```json\n{"a": 1}',
        ),
        (
            "{a: 1}",
            "{'a': 1}",
            'Here:\n{"a": 1}',
            '{"a": 1} done',
            "{",
            "```json\n```",
            "NaN",
            '{"a": Infinity}',
            "[" * 10**5,
            "9" * 5000,
            '```python\n{"a": 1}\n```',
        ),
    ),
    Case(
        of("detectable_format:constrained_response"),
        (
            "My answer is yes.",
            " I think so. My answer is maybe.\n",
            '"My answer is no."',
            "My answer is no. My answer is no.",
        ),
        ("My answer is yes", "my answer is yes.", "yes", "My answer is yes. My answer is no."),
    ),
    Case(
        of("detectable_content:number_placeholders", num_placeholders=2),
        ("[a] [b c]", "[name][পণ্য]", "[[a] [b]]", "[x](y) [z]"),
        ("[a]", "[a\nb] [c]", "(a) (b)", "] [ ] [", "[a [b]"),
    ),
    Case(
        of("detectable_content:postscript", postscript_marker="P.S."),
        ("x\n\nP.S. y", "x p.s. y", "P. S. y", "P.P.S. y"),
        ("PS y", "P.S y", "p s", "postscript"),
    ),
    Case(
        of("detectable_content:postscript", postscript_marker="P.P.S"),
        ("x\nP.P.S y", "p.p.s. y", "P. P. S", "x P.P.S: y"),
        ("P.S. y", "PPS y", "P.P. y"),
    ),
    Case(of("detectable_content:postscript", postscript_marker="N.B."), ("n.b. x",), ("nabs", "NB")),
    Case(
        of("keywords:existence", keywords=["cat", "C++"]),
        ("Category and c++", "CAT\nC++11"),
        ("cat", "C++", "c at c++", "cat C+", "ca\nt C++"),
    ),
    Case(
        of("keywords:frequency", keyword="war", frequency=2, **at_least),
        ("War and war", "warwar", "toward WAR"),
        ("war", "w a r war", "w\nar war"),
    ),
    Case(of("keywords:frequency", keyword="a.b", frequency=1, **less_than), ("axb", "none"), ("A.B", "xa.bx")),
    Case(
        of("keywords:forbidden_words", forbidden_words=["rock", "C++"]),
        ("rocky road", "bedrock", "rock_x", "C", "roc k", "C+ +"),
        ("Rock!", "x\nROCK", "rock-hard", "'rock'", "I like c++."),
    ),
    Case(of("keywords:forbidden_words", forbidden_words=["été"]), ("l'étés", "ete"), ("l'Été", "été.")),
    Case(
        of("keywords:letter_frequency", letter="q", let_frequency=2, let_relation="at least"),
        ("Qq", "q\nq q"),
        ("q", "o"),
    ),
    Case(of("keywords:letter_frequency", letter="Q", let_frequency=2, let_relation="less than"), ("q", "x"), ("qQ",)),
    Case(
        of("keywords:letter_frequency", letter="#", let_frequency=2, let_relation="at least"), ("#a #b", "##"), ("#a",)
    ),
    Case(of("punctuation:no_comma"), ("a b.", "a; b", "a، b", "a，b"), ("a, b", ",", "1,000")),
    Case(of("startend:quotation"), ('"a"', ' \n"a"\n', '""', '"a" b "c"'), ('"', '"a', 'a"', "'a'", "“a”", '"a".')),
    Case(
        of("startend:end_checker", end_phrase="Hope you agree with me."),
        ("x. Hope you agree with me.", "HOPE YOU AGREE WITH ME. \n", '"x. Hope you agree with me."'),
        ("Hope you agree with me", "Hope you agree with me. Bye", "Hope you  agree with me.", "me."),
    ),
    Case(
        of("combination:repeat_prompt", prompt_to_repeat="Write a poem. "),
        ("Write a poem. Roses", "\n write a POEM.", "Write a poem.Roses"),
        ("Sure! Write a poem.", "Write a poem", '"Write a poem."'),
    ),
    Case(
        of("combination:two_responses"),
        ("a\n******\nb", "a****** b", "******a******b******"),
        ("a", "a******a", "a ****** A******b", "a******", "******", "a***b", "a************b", "a ****** a "),
    ),
    Case(
        of("change_case:capital_word_frequency", capital_frequency=2, capital_relation="at least"),
        ("I am in the UK.", "**RUBRIC** A", "NASA's ÉTÉ", "DON'T"),
        ("Hello World", "HELLO", "x 3 4 5", "WELL-KNOWN"),
    ),
    Case(
        of("change_case:capital_word_frequency", capital_frequency=1, capital_relation="less than"),
        ("Hello there", "123", "यह"),
        ("NO", "U.S. policy", "I'm"),
    ),
    Case(
        of("change_case:english_capital"),
        (ENGLISH.upper(), ENGLISH.upper() + " 1, 2!"),
        (ENGLISH, ENGLISH.upper() + " x", LANGUAGE_SAMPLES["de"].upper(), "123", "!!!", LANGUAGE_SAMPLES["hi"]),
    ),
    Case(
        of("change_case:english_lowercase"),
        (ENGLISH, ENGLISH + "\n\n1, 2!"),
        (ENGLISH.upper(), ENGLISH + " I", LANGUAGE_SAMPLES["de"].lower(), "123", LANGUAGE_SAMPLES["hi"]),
    ),
    Case(
        of("language:response_language", language="de"),
        (LANGUAGE_SAMPLES["de"], LANGUAGE_SAMPLES["de"].upper()),
        (ENGLISH, "123", "...", "https://example.org"),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.constraint.id)
def test_by_hand(case: Case) -> None:
    if case.constraint.id in WITH_LANGUAGE:
        pytest.importorskip("langdetect")
    assert [text for text in case.true if holds(case.constraint, text) is not True] == []
    assert [text for text in case.false if holds(case.constraint, text) is not False] == []


@pytest.mark.parametrize("text", ["", " ", "\n\t \u2003"])
def test_white_space_follows_no_constraint(text: str) -> None:
    assert [case.constraint for case in CASES if holds(case.constraint, text) is not False] == []
    assert [case.constraint for case in CASES if holds(case.constraint, text, loose=True) is not False] == []


def test_every_type_has_cases() -> None:
    assert {case.constraint.id for case in CASES} == set(TYPES)
    assert len(TYPES) == 25


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("...", 0),
        ("One", 1),
        ("One.", 1),
        ("One. Two. Three", 3),
        ("What?! No... Yes!", 3),
        ("one. two.", 2),
        ("Well... maybe so.", 1),
        ("Well… Maybe.", 2),
        ("It costs 3.50 at example.com today.", 1),
        ("Mr. and Mrs. Smith met Dr. J. R. Jones, e.g. at 5 p.m. on Monday.", 1),
        ("He left at 5 p.m. Then she came.", 2),
        ("The U.S. Army came. It left the U.S. The end.", 3),
        ("So do I. You too.", 2),
        ("Acme Inc. makes tea.", 1),
        ("Apples, pears, etc. They rot.", 2),
        ('He said "Go." Then he left.', 2),
        ("**Bold.** Next.", 2),
        ("(One.) Two.", 2),
        ("1. Cut it.\n2. Glue it.", 2),
        ("1. tea\n2. milk\n3. jam", 3),
        ("Buy:\n1. tea\n2. milk", 3),
        ("1. Cut. 2. Glue.", 2),
        ("a) x\nb) y", 1),
        ("- tea\n- milk", 1),
        ("# Title\n\nText.", 1),
        ("It was in 1990. It was cold.", 2),
        ("你好。再见！好吗？", 3),
        ("यह अच्छा है। वह नहीं।", 2),
        ("میں ٹھیک ہوں۔ آپ؟", 2),
        ("Is it 5.", 1),
        ("No. Never.", 2),
    ],
)
def test_count_sentences(text: str, count: int) -> None:
    assert count_sentences(text) == count


def test_counts_of_words() -> None:
    assert count_words("don't stop_it 3.5 हिंदी में می‌روم naïve") == 9
    assert count_words("naïve") == count_words("nai\u0308ve") == 1
    assert count_capital_words("I'M at NASA, U.S. and 3D-TV; Not This") == 5


def test_the_loose_reading_leaves_out_first_line_last_line_and_asterisks() -> None:
    text = "Sure!\n**elm**\nBye"
    assert list(loose_variants(text)) == [
        "Sure!\n**elm**\nBye",
        "Sure!\nelm\nBye",
        "**elm**\nBye",
        "elm\nBye",
        "Sure!\n**elm**",
        "Sure!\nelm",
        "**elm**",
        "elm",
    ]
    word = of("length_constraints:nth_paragraph_first_word", num_paragraphs=1, nth_paragraph=1, first_word="elm")
    quotation, no_comma = of("startend:quotation"), of("punctuation:no_comma")
    for constraint, response in (
        (word, text),
        (quotation, 'Here:\n"x"'),
        (quotation, '"x"\nDone'),
        (no_comma, "Yes,\nx"),
    ):
        assert holds(constraint, response) is False
        assert holds(constraint, response, loose=True) is True
    assert holds(no_comma, "Yes,\nx, y\nz,", loose=True) is False
    assert holds(no_comma, "a,", loose=True) is False  # what is left out leaves nothing
    assert holds(no_comma, "a", loose=True) is True


# ---- languages


def test_languages_are_those_of_the_detector() -> None:
    pytest.importorskip("langdetect")
    assert set(constraints._detectors().langlist) == LANGUAGES
    assert {code for code, text in LANGUAGE_SAMPLES.items() if constraints.detect_language(text) != code} == set()


@pytest.mark.slow
def test_the_detected_language_is_the_same_in_every_call() -> None:
    langdetect = pytest.importorskip("langdetect")
    short = ["hello", "no", "chat", "plan", "test data", "a b c", "ok va bene"]
    first = [constraints.detect_language(text) for text in short]
    for _ in range(20):
        random.seed()
        assert [constraints.detect_language(text) for text in short] == first
    assert langdetect.DetectorFactory.seed is None  # which other users of the library may rely on


@pytest.fixture
def no_langdetect(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(sys.modules, "langdetect", None)
    monkeypatch.setitem(sys.modules, "langdetect.detector_factory", None)
    constraints._detectors.cache_clear()
    yield
    constraints._detectors.cache_clear()


def test_without_a_detector_constraints_on_languages_abstain(no_langdetect: None) -> None:
    told = [of("punctuation:no_comma"), of("startend:quotation")]
    untold = [of("language:response_language", language="de"), of("change_case:english_capital")]
    for text in (ENGLISH, ENGLISH.upper(), LANGUAGE_SAMPLES["de"]):
        assert [holds(c, text, loose=loose) for c in untold for loose in (False, True)] == [None] * 4
    with pytest.raises(ModuleNotFoundError, match=r"langdetect is not installed: pip install 'tso-fast\[ifeval\]'"):
        constraints.detect_language("x")
    both, none = verdicts(asked(*told, *untold), "a"), verdicts(asked(*untold), "a", " ")
    assert both == [
        (
            0.5,
            "failed: startend:quotation; not told: language:response_language, change_case:english_capital "
            "(langdetect is not installed: pip install 'tso-fast[ifeval]')",
        )
    ]
    assert [score for score, _ in none] == [None, 0.0]


# ---- the published prompts


@pytest.fixture(scope="module")
def published(ifeval: Path) -> list[Constraint]:
    return [c for item in read_candidates(ifeval, BadRows()) for c in item.prompt.constraints]


def test_the_published_file_is_read_unchanged(ifeval: Path, tmp_path: Path) -> None:
    rows, items = read_rows(ifeval), read_candidates(ifeval, BadRows())
    assert [[c.id for c in item.prompt.constraints] for item in items] == [row["instruction_id_list"] for row in rows]
    assert [[c.kwargs for c in item.prompt.constraints] for item in items] == [row["kwargs"] for row in rows]
    assert (len(items), sum(len(item.prompt.constraints) for item in items)) == (541, 834)
    again = read_candidates(write_rows(tmp_path / "again.jsonl", map(candidates_row, items)), BadRows())
    assert [item.prompt.constraints for item in again] == [item.prompt.constraints for item in items]


@pytest.mark.slow
def test_any_text_is_judged(published: list[Constraint]) -> None:
    r = random.Random("constraints")
    pieces = [
        *"aZ éß.,!?*-#<>[]\"'`{}:1\n\n\n 。।\u200c\U0001f600\u0301\ud7ff\x00",
        "***",
        "******",
        "<<",
        ">>",
        "```json",
        "P.S.",
        "\r\n",
        "SECTION 1",
        "My answer is yes.",
        "e.g.",
        "U.S.",
        ENGLISH,
        *LANGUAGE_SAMPLES.values(),
    ]
    abstains = {True, False, None} if constraints._detectors() is None else {True, False}
    for constraint in published:
        for _ in range(3):
            own = [str(v) for v in constraint.kwargs.values()]
            text = "".join(r.choices(pieces + own, k=r.choice([0, 1, 3, 30])))
            strict, loose = holds(constraint, text), holds(constraint, text, loose=True)
            assert {strict, loose} <= abstains
            assert not (strict is True and loose is False), (constraint, text)  # the first variant is the text itself


def test_long_texts_take_no_quadratic_time(published: list[Constraint]) -> None:
    one_each = {c.id: c for c in published if c.id not in WITH_LANGUAGE}
    for text in (
        "a" * 10**5,
        "." * 10**5 + "x",
        "* " + "a " * 50_000,
        "*" * 10**5,
        "<<" * 50_000,
        "[" * 10**5,
        " \n" * 50_000 + "x",
        "-" * 10**5 + "x",
        "- " * 50_000 + "x",
        ". " * 50_000,
        "```" * 30_000,
        '"' * 10**5,
        "1. " * 30_000,
        "<<>>" * 25_000,
    ):
        for constraint in one_each.values():
            start = time.process_time()
            holds(constraint, text)
            assert time.process_time() - start < 2, (constraint.id, text[:10])


def _words(n: int) -> str:
    return " ".join(f"w{i}" for i in range(n))


def _numbered(relation: str, threshold: int, unit: str) -> tuple[str, str]:
    """Texts with just enough of a unit, and one too few, or for "less than" one too many."""
    many, few = unit * threshold, unit * (threshold - 1) or "..."
    return (many, few) if relation == "at least" else (few, many)


# By type: keyword arguments -> a response that follows the constraint, and a change of it that does not.
MADE: dict[str, Callable[..., tuple[str, str]]] = {
    "length_constraints:number_words": lambda relation, num_words: _numbered(relation, num_words, "word "),
    "length_constraints:number_sentences": lambda relation, num_sentences: _numbered(
        relation, num_sentences, "It is one. "
    ),
    "length_constraints:number_paragraphs": lambda num_paragraphs: (
        "\n***\n".join("p" * num_paragraphs),
        "\n***\n".join("p" * (num_paragraphs + 1)),
    ),
    "length_constraints:nth_paragraph_first_word": lambda num_paragraphs, nth_paragraph, first_word: tuple(
        "\n\n".join(f"{word} here" if i == nth_paragraph else f"par {i}" for i in range(1, num_paragraphs + 1))
        for word in (first_word.title(), first_word + "s")
    ),
    "detectable_format:number_bullet_lists": lambda num_bullets: ("* b\n" * num_bullets, "* b\n" * (num_bullets + 1)),
    "detectable_format:number_highlighted_sections": lambda num_highlights: (
        "*b* " * num_highlights,
        "x" + "*b* " * (num_highlights - 1),
    ),
    "detectable_format:multiple_sections": lambda section_spliter, num_sections: tuple(
        "\n".join(f"{section_spliter} {i}: x" for i in range(n)) or "x" for n in (num_sections, num_sections - 1)
    ),
    "detectable_format:title": lambda: ("<<Title>>\nx", "<<Title>\nx"),
    "detectable_format:json_format": lambda: ('```json\n{"a": 1}\n```', '```json\n{"a": 1\n```'),
    "detectable_format:constrained_response": lambda: ("My answer is no.", "My answer is none."),
    "detectable_content:number_placeholders": lambda num_placeholders: (
        "[b] " * num_placeholders,
        "x" + "[b] " * (num_placeholders - 1),
    ),
    "detectable_content:postscript": lambda postscript_marker: (
        f"x\n\n{postscript_marker} y",
        f"x\n\n{postscript_marker[:-3]} y",
    ),
    "keywords:existence": lambda keywords: (" ".join(keywords).upper(), "x " + " ".join(keywords[1:])),
    "keywords:frequency": lambda relation, keyword, frequency: _numbered(relation, frequency, keyword + " "),
    "keywords:forbidden_words": lambda forbidden_words: (
        " ".join(f"x{w}" for w in forbidden_words),
        f"x {forbidden_words[-1].upper()}.",
    ),
    "keywords:letter_frequency": lambda let_relation, letter, let_frequency: _numbered(
        let_relation, let_frequency, letter.upper()
    ),
    "punctuation:no_comma": lambda: ("x y.", "x, y."),
    "startend:quotation": lambda: ('"x"', '"x".'),
    "startend:end_checker": lambda end_phrase: (f"x {end_phrase}", f"x {end_phrase} y"),
    "combination:repeat_prompt": lambda prompt_to_repeat: (
        f"{prompt_to_repeat}\n\nx",
        f"Sure. {prompt_to_repeat}\n\nx",
    ),
    "combination:two_responses": lambda: ("a\n******\nb", "a\n******\nb\n******\nc"),
    "change_case:capital_word_frequency": lambda capital_relation, capital_frequency: _numbered(
        capital_relation, capital_frequency, "UP "
    ),
    "change_case:english_capital": lambda: (ENGLISH.upper(), ENGLISH.upper() + "s"),
    "change_case:english_lowercase": lambda: (ENGLISH, ENGLISH + "S"),
    "language:response_language": lambda language: (LANGUAGE_SAMPLES[language] * 2, ENGLISH),
}


def test_a_response_made_for_each_published_constraint_passes_and_a_change_of_it_fails(
    published: list[Constraint],
) -> None:
    pytest.importorskip("langdetect")
    assert {c.id for c in published} == set(MADE) == set(TYPES)
    for constraint in published:
        good, broken = MADE[constraint.id](**constraint.kwargs)
        assert holds(constraint, good) is True, (constraint, good)
        assert holds(constraint, broken) is False, (constraint, broken)


# ---- rows


def parsed(**row: Any) -> tuple[Constraint, ...]:
    return parse_candidates({"prompt": "x", **row}, "p.jsonl:3", "q").prompt.constraints


def test_both_layouts_are_read_and_one_is_written() -> None:
    want = (of("punctuation:no_comma"), of("length_constraints:number_words", relation="at least", num_words=3))
    kwargs = [None, {"relation": "at least", "num_words": 3, "num_bullets": None, "keywords": None}]
    ids = [c.id for c in want]
    assert parsed(instruction_id_list=ids, kwargs=kwargs) == want
    assert parsed(constraints=[{"id": i, "kwargs": k} for i, k in zip(ids, kwargs, strict=True)]) == want
    assert parsed(constraints=[{"id": "punctuation:no_comma"}]) == want[:1]
    row = prompt_row(Prompt(id="q", prompt="x", constraints=want))
    assert row["constraints"] == [{"id": c.id, "kwargs": c.kwargs} for c in want]
    assert "constraints" not in prompt_row(Prompt(id="q", prompt="x"))
    assert parsed() == parsed(constraints=[]) == parsed(instruction_id_list=[]) == parsed(kwargs={"of": "others"}) == ()
    assert len({Prompt(id="q", prompt="x", constraints=want)}) == 1


WORDS, LETTERS = "length_constraints:number_words", "keywords:letter_frequency"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"constraints": "title"}, "'constraints' is a string (\"title\"); expected a list of constraints"),
        ({"constraints": ["title"]}, "'constraints[0]' is a string (\"title\"); expected an object with 'id'"),
        (
            {"constraints": [{"kwargs": {}}]},
            "'constraints[0].id' is null; expected a string such as 'punctuation:no_comma'",
        ),
        ({"constraints": [{"id": ["a"]}]}, "'constraints[0].id' is a list"),
        ({"constraints": [{"id": WORDS, "kwargs": 3}]}, "'constraints[0].kwargs' is a number (3); expected an object"),
        ({"instruction_id_list": [None], "kwargs": [{}]}, "'instruction_id_list[0]' is null"),
        ({"instruction_id_list": [WORDS], "kwargs": ["a"]}, "'kwargs[0]' is a string (\"a\"); expected an object"),
        ({"instruction_id_list": [WORDS]}, "'kwargs' is missing; expected a list of objects"),
        ({"instruction_id_list": [WORDS], "kwargs": []}, "'kwargs' has 0 items; expected 1"),
        ({"instruction_id_list": [], "constraints": []}, "'constraints' is given beside 'instruction_id_list'"),
    ],
)
def test_a_bad_form_names_file_line_and_field(row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        parsed(**row)
    assert str(caught.value).startswith(f"p.jsonl:3: field {message}")


def test_types_and_arguments_are_not_the_reader_s_business() -> None:
    assert parsed(constraints=[{"id": "my:own", "kwargs": {"n": 1, "m": None}}]) == (of("my:own", n=1),)
    assert parsed(instruction_id_list=["my:own"], kwargs=[None]) == (of("my:own"),)


# ---- types and arguments

COMMA = of("punctuation:no_comma")


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (
            of("punctuation:no_coma"),
            "got 'punctuation:no_coma', expected one of IFEval's 25 instruction types, such as "
            "'punctuation:no_comma'; did you mean 'punctuation:no_comma'?",
        ),
        (of("no_comma"), "got 'no_comma', expected one of IFEval's 25"),
        (of(WORDS, num_words=3), f"argument 'relation' of {WORDS!r} is missing; expected 'at least' or 'less than'"),
        (
            of(WORDS, num_word=3),
            f"{WORDS!r} has no argument 'num_word'; expected relation, num_words; did you mean 'num_words'?",
        ),
        (of("startend:quotation", n=3), "'startend:quotation' has no argument 'n'; expected none"),
        (
            of(WORDS, relation="at most", num_words=3),
            f"argument 'relation' of {WORDS!r} is 'at most'; expected 'at least' or 'less than'",
        ),
        (
            of(WORDS, relation="at least", num_words="3"),
            f"argument 'num_words' of {WORDS!r} is '3'; expected an integer",
        ),
        (of(WORDS, relation="at least", num_words=True), f"argument 'num_words' of {WORDS!r} is True; expected"),
        (of(WORDS, relation="at least", num_words=-1), f"argument 'num_words' of {WORDS!r} is -1; expected"),
        (of(WORDS, relation=["at least"], num_words=1), f"argument 'relation' of {WORDS!r} is ['at least']; expected"),
        (
            of(LETTERS, letter="ab", let_frequency=1, let_relation="at least"),
            f"argument 'letter' of {LETTERS!r} is 'ab'; expected one character",
        ),
        (
            of("keywords:existence", keywords=["a", " "]),
            "argument 'keywords' of 'keywords:existence' is ['a', ' ']; ex",
        ),
        (
            of("keywords:existence", keywords=[]),
            "argument 'keywords' of 'keywords:existence' is []; expected a list of",
        ),
        (
            of("language:response_language", language="English"),
            "argument 'language' of 'language:response_language' is 'English'; expected a language such as 'en'",
        ),
    ],
)
def test_a_constraint_that_cannot_be_is_a_bad_row(constraint: Constraint, message: str) -> None:
    """Known to the judge before anything is generated, and again when it judges."""
    place, judges = "p.jsonl:1: constraint 2 of 2: ", panel.make_judges(VerifierConfig(verifier="ifeval"))
    items = [Candidates(prompt=asked(COMMA, *more, id=i), responses=()) for i, more in (("1", [constraint]), ("2", []))]
    with pytest.raises(InputError) as caught:
        panel.usable(judges, items, BadRows())
    assert str(caught.value).startswith(place + message)
    bad = BadRows("skip")
    assert [item.prompt.id for item in panel.usable(judges, items, bad)] == ["2"]
    assert [(row["row"]["id"], row["error"][: len(place)]) for row in bad.rows] == [("1", place)]
    with pytest.raises(InputError, match="constraint 2 of 2"):
        verdicts(items[0].prompt, "a text")


# ---- the verifier


def asked(*given: Constraint, id: str = "q") -> Prompt:  # noqa: A002
    return Prompt(id=id, prompt="x", constraints=given, where=f"p.jsonl:{id}")


def verdicts(prompt: Prompt, *texts: str, name: str = "ifeval") -> list[tuple[float | None, str]]:
    item = Candidates(
        prompt=prompt, responses=tuple(Response(model="m", text=t, sample=i) for i, t in enumerate(texts))
    )
    return [(v.score, v.reason) for v in verify([item], make_verifier(name), BadRows())]


def test_the_score_is_the_share_of_the_constraints_and_the_reason_names_the_others() -> None:
    prompt = asked(
        of("punctuation:no_comma"),
        of("startend:quotation"),
        of("detectable_format:title"),
        of(WORDS, num_words=2, **at_least),
    )
    got = verdicts(prompt, '"<<a>> b"', "<<a, b>>", "", 'Yes,\n"<<a>> b"')
    assert got[0] == (1.0, "")
    assert got[1] == (0.5, "failed: punctuation:no_comma, startend:quotation")
    assert got[2] == (0.0, f"failed: punctuation:no_comma, startend:quotation, detectable_format:title, {WORDS}")
    assert got[3][0] == 0.5
    assert verdicts(prompt, 'Yes,\n"<<a>> b"', name="ifeval_loose") == [(1.0, "")]


def test_a_prompt_without_constraints_is_a_bad_row() -> None:
    message = (
        r"p\.jsonl:q: field 'constraints' is missing; verifier 'ifeval' needs it, or IFEval's 'instruction_id_list'"
    )
    with pytest.raises(InputError, match=message):
        verdicts(asked(), "x")
    bad = BadRows("skip")
    items = [
        Candidates(prompt=asked(*c, id=i), responses=()) for i, c in (("1", [of("startend:quotation")]), ("2", []))
    ]
    for name in ("ifeval", "ifeval_loose"):
        judges = panel.make_judges(VerifierConfig(verifier=name))
        assert [c.prompt.id for c in panel.usable(judges, items, bad)] == ["1"]
    assert [row["row"]["id"] for row in bad.rows] == ["2", "2"]
    with pytest.raises(InputError, match="verifier: none of 1 prompts has constraints that 'ifeval' can use"):
        panel.usable(panel.make_judges(VerifierConfig(verifier="ifeval")), items[1:], BadRows("skip"))


def test_score_judges_responses_to_the_published_prompts(ifeval: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    rows = read_rows(ifeval)[:40]
    for row in rows:
        row["responses"] = [{"model": "m", "text": "A text, plain."}, {"model": "m", "text": row["prompt"]}]
    responses, output = write_rows(tmp_path / "r.jsonl", rows), tmp_path / "v.jsonl"
    done = cli("score", ["--responses", responses, "--verifier", "ifeval", "--output", output])
    assert done.status == 0, done.err
    got = read_rows(output)
    assert len(got) == 80
    assert {row["judge"] for row in got} == {"verifier"}
    assert all("failed" in row["reason"] for row in got if row["score"] is not None and row["score"] < 1)
