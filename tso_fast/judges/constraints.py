"""Constraints on the form of a response that a program can check: the 25 instruction types of IFEval.

From the definitions of Zhou et al. 2023, https://arxiv.org/abs/2311.07911 (table 1 and section 2), in their strict and
their loose reading. Where paper and prompts leave room, the reading is the one that published figures use:

- a keyword that must appear may do so inside a longer word, a forbidden one too; case does not matter;
- words are runs of letters, digits and underscores, so ``don't`` is two;
- a response of white space follows no constraint.

Differences from the published program, each because it accepts what plainly fails or the reverse:

- ``constrained_response``: just one of the three options appears (there: at least one);
- ``number_highlighted_sections``: a highlight counts once (there: ``***x***`` twice, and a bullet's own asterisk with
  the next bold text as a third);
- ``number_bullet_lists``: rules such as ``---`` and lines that open with ``*emphasis*`` are no bullets;
- ``nth_paragraph_first_word``: empty paragraphs are not counted to find the n-th, a colon or a dash ends a word, and
  curly quotation marks before it are passed over like straight ones;
- ``json_format``: ``NaN`` and ``Infinity`` are no JSON;
- ``english_capital``, ``english_lowercase``: the language is that of the lower-cased text, as the detector leaves words
  in capitals out; a text without letters is in no language (there: in any);
- keywords, section marks and postscript markers are literal texts (there: regular expressions);
- sentences are told apart by the rules at ``count_sentences`` (there: by nltk's punkt, a trained model that must be
  downloaded), words in capitals by that at ``count_capital_words``.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tso_fast.errors import InputError, did_you_mean
from tso_fast.types import Constraint


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
RELATIONS = ("at least", "less than")
LANGUAGES = _words(
    "af ar bg bn ca cs cy da de el en es et fa fi fr gu he hi hr hu id it ja kn ko lt lv mk ml mr ne nl no pa pl pt ro "
    "ru sk sl so sq sv sw ta te th tl tr uk ur vi zh-cn zh-tw"
)
"""ISO 639-1, as langdetect names them."""
NO_DETECTOR = "langdetect is not installed: pip install 'tso-fast[ifeval]'"


def _compare(count: int, relation: str, threshold: int) -> bool:
    return count < threshold if relation == "less than" else count >= threshold


# ---- languages


@functools.cache
def _detectors() -> Any:
    """langdetect's factory of detectors with its 55 profiles (0.4 s), or None where it is not installed."""
    try:
        from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory
    except ImportError:
        return None
    factory = DetectorFactory()  # our own: the module's shared one has a seed that is not ours to set
    factory.load_profile(PROFILES_DIRECTORY)
    return factory


def detect_language(text: str) -> str | None:
    """The likeliest of ``LANGUAGES``, the same in every call; None: no letters to tell by.

    langdetect draws n-grams at random, hence the seed. It is the library of the published program, pure Python, 2.5 MB
    and offline; lingua is 96 MB, and langid took Italian for Ligurian.

    Raises:
        ModuleNotFoundError: langdetect is not installed.
    """
    if (detectors := _detectors()) is None:
        raise ModuleNotFoundError(NO_DETECTOR)
    from langdetect.lang_detect_exception import LangDetectException

    detector = detectors.create()
    detector.seed = 0
    detector.append(text.lower())
    try:
        language: str = detector.detect()
    except LangDetectException:
        return None
    return language


def _response_language(text: str, *, language: str) -> bool | None:
    return None if _detectors() is None else detect_language(text) == language


def _english_capital(text: str) -> bool | None:
    # None whatever the case: a constraint that abstains only where it might hold would prefer the responses that fail.
    return None if _detectors() is None else text.isupper() and detect_language(text) == "en"


def _english_lowercase(text: str) -> bool | None:
    return None if _detectors() is None else text.islower() and detect_language(text) == "en"


# ---- words, sentences, paragraphs

_CAPITALS = re.compile(r"\w+(?:[-./]\w+)*")


def count_words(text: str) -> int:
    """Runs of letters, digits and underscores; vowel signs and joiners of other scripts are part of a run."""
    if not text.isascii():
        text = "".join(c for c in text if unicodedata.category(c)[0] != "M" and c not in "\u200c\u200d")
    return len(re.findall(r"\w+", text))


def count_capital_words(text: str) -> int:
    """Words with a capital letter and no small one: ``I``, ``NASA``, ``WELL-KNOWN``, ``U.S``, ``3D``.

    Parts at an apostrophe are words, as in nltk's tokenizer: ``I'm`` has one in capitals, ``DON'T`` two.
    """
    return sum(word.isupper() for word in _CAPITALS.findall(text))


_CLOSERS, _OPENERS = "\"'”’»)]*_`", "\"'“‘«([*_`#"
_END = re.compile(r"(?<![.!?…])[.!?…]++[{0}]*+(?=\s|$)|[。！？｡।॥؟۔።]+[{0}」』）]*".format(re.escape(_CLOSERS)))
_LIST_MARK = re.compile(r"(?:\d{1,3}|[A-Za-z]|[ivxIVX]{1,4})")
_DOTTED = re.compile(r"[^\W\d_](?:\.[^\W\d_]{1,2})+")
_ALWAYS_ABBREVIATED = _words(
    "mr mrs ms mx dr prof rev hon gen col sgt capt lt cmdr gov sen rep messrs vs cf viz approx est fig figs vol pp "
    "dept e.g i.e"
)
_OFTEN_ABBREVIATED = _words("etc al inc ltd co corp bros jr sr st ave jan feb aug sept oct nov dec")
_STARTERS = _words(
    "a although an and as at because but for he her his how however i if in instead it its many meanwhile my no now on "
    "our she since so some that the their then there these they this those thus to we what when while who yes yet "
    "you your"
)


def _ends_sentence(text: str, match: re.Match[str], token: str) -> bool:
    marks = match.group().rstrip(_CLOSERS)
    after = text[match.end() : match.end() + 40].split()
    following = after[0].lstrip(_OPENERS) if after else ""
    if set(marks) <= {".", "…"} and marks != ".":
        return not following[:1].islower()
    if marks != ".":
        return True
    if token.lower() in _ALWAYS_ABBREVIATED:
        return not following
    if (
        (len(token) == 1 and token.isupper() and token != "I")
        or _DOTTED.fullmatch(token)
        or token.lower() in _OFTEN_ABBREVIATED
    ):
        if token.islower():  # 5 p.m., etc.
            return not following[:1].islower()
        return not following or (following[0].isupper() and re.split(r"\W", following)[0].lower() in _STARTERS)
    return True


def count_sentences(text: str) -> int:
    """Sentences by rule: a run of ``. ! ? …`` before white space ends one, as does ``。！？।؟۔`` anywhere.

    A full stop does not after a title or ``e.g.``, nor after an initial, ``U.S.``, ``Inc.`` and the like unless one of
    the usual first words follows; dots before a small letter do not. The ``1.`` or ``a.`` of a list is no sentence, but
    ends the one before. What is left without a mark counts as a sentence if it has a letter or digit. Line breaks and
    bullets mean nothing, so a heading belongs to the sentence after it, as in the published program. That one asks
    nltk's punkt, which differs: it takes ``1.`` for a sentence, knows no mark but ``. ! ?``, and learnt its 156
    abbreviations from the Wall Street Journal.
    """
    count = position = 0
    for match in _END.finditer(text):
        start = match.start()
        while start > position and not text[start - 1].isspace() and match.start() - start < 40:
            start -= 1
        token = text[start : match.start()].lstrip(_OPENERS)
        if (
            match.group() == "."
            and _LIST_MARK.fullmatch(token)
            and text[match.end() :][:40].strip()
            and (_opens_line(text, start) or not _has_word(text[position:start]))
        ):
            count += _has_word(text[position:start])
            position = match.end()
        elif _ends_sentence(text, match, token):
            count += _has_word(text[position : match.end()])
            position = match.end()
    return count + _has_word(text[position:])


def _opens_line(text: str, start: int) -> bool:
    return not text[max(0, start - 40) : start].rpartition("\n")[2].strip(" \t>#*-_")


def _has_word(text: str) -> bool:
    return re.search(r"[^\W_]", text) is not None


def _number_words(text: str, *, relation: str, num_words: int) -> bool:
    return _compare(count_words(text), relation, num_words)


def _number_sentences(text: str, *, relation: str, num_sentences: int) -> bool:
    return _compare(count_sentences(text), relation, num_sentences)


def _split(text: str, separator: str) -> list[str] | None:
    """Parts between separators; one before the first or after the last may be empty, None if another one is."""
    parts = [part.strip() for part in text.split(separator)]
    parts = parts[not parts[0] :]
    parts = parts[: len(parts) - (bool(parts) and not parts[-1])]
    return parts if all(parts) else None


def _number_paragraphs(text: str, *, num_paragraphs: int) -> bool:
    parts = _split(text, "***")
    return parts is not None and len(parts) == num_paragraphs


_FIRST_WORD = re.compile(r"[\"'“‘«]*([^\s.,?!:;\"'“”‘’«»—–]*)")


def _nth_paragraph_first_word(text: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
    if len(paragraphs) != num_paragraphs or nth_paragraph > num_paragraphs:
        return False
    found = _FIRST_WORD.match(paragraphs[nth_paragraph - 1])
    return found is not None and found[1].lower() == first_word.strip().lower()


# ---- keywords and letters


def _appearances(text: str, keyword: str) -> int:
    return len(re.findall(re.escape(keyword), text, re.IGNORECASE))


def _existence(text: str, *, keywords: Sequence[str]) -> bool:
    return all(_appearances(text, keyword) for keyword in keywords)


def _frequency(text: str, *, keyword: str, frequency: int, relation: str) -> bool:
    return _compare(_appearances(text, keyword.strip()), relation, frequency)


def _forbidden_words(text: str, *, forbidden_words: Sequence[str]) -> bool:
    # Not \b, which a keyword such as "C++" would turn into its opposite.
    return not any(re.search(rf"(?<!\w){re.escape(w)}(?!\w)", text, re.IGNORECASE) for w in forbidden_words)


def _letter_frequency(text: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compare(text.lower().count(letter.lower()), let_relation, let_frequency)


def _capital_word_frequency(text: str, *, capital_frequency: int, capital_relation: str) -> bool:
    return _compare(count_capital_words(text), capital_relation, capital_frequency)


def _no_comma(text: str) -> bool:
    return "," not in text


# ---- format

_HIGHLIGHT = re.compile(r"(?<!\*)(\*{1,3})(?!\*)[^\S\n]*[^\s*][^\n*]*\1(?!\*)")
_BULLET = re.compile(r"[ \t]*(?:\*(?:\s.*\S|[^\s*][^*]*$)|-(?!(?:[ \t]*-)+[ \t]*$))")
_FENCE = re.compile(r"```(?:json)?(.*?)(?:```)?", re.DOTALL | re.IGNORECASE)


def _number_highlighted_sections(text: str, *, num_highlights: int) -> bool:
    return sum(1 for _ in _HIGHLIGHT.finditer(text)) >= num_highlights


def _number_bullet_lists(text: str, *, num_bullets: int) -> bool:
    return sum(_BULLET.match(line) is not None for line in text.split("\n")) == num_bullets


def _multiple_sections(text: str, *, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", text)) >= num_sections


def _title(text: str) -> bool:
    # The widest <<...>> of a line; one regular expression would take quadratic time.
    return any(
        text[text.find("<<") : text.rfind(">>")].strip("<> \t")
        for text in text.split("\n")
        if -1 < text.find("<<") < text.rfind(">>")
    )


def _constrained_response(text: str) -> bool:
    return sum(option in text for option in OPTIONS) == 1


def _not_json(name: str) -> None:
    raise ValueError(name)


def _json_format(text: str) -> bool:
    text = text.strip()
    if fenced := _FENCE.fullmatch(text):
        text = fenced[1]
    try:
        json.loads(text, parse_constant=_not_json)
    except (ValueError, RecursionError):
        return False
    return True


def _number_placeholders(text: str, *, num_placeholders: int) -> bool:
    return len(re.findall(r"\[[^\[\]\n]*\]", text)) >= num_placeholders


_POSTSCRIPTS = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}


def _postscript(text: str, *, postscript_marker: str) -> bool:
    marker = postscript_marker.strip()
    return re.search(_POSTSCRIPTS.get(marker) or re.escape(marker), text, re.IGNORECASE) is not None


# ---- beginning, end, combination


def _quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _end_checker(text: str, *, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _repeat_prompt(text: str, *, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _two_responses(text: str) -> bool:
    parts = _split(text, "******")
    return parts is not None and len(parts) == 2 and parts[0] != parts[1]


# ---- the table


class Kind(NamedTuple):
    """What a keyword argument of a constraint may be."""

    expected: str
    fits: Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


_COUNT = Kind("an integer >= 0", lambda value: type(value) is int and value >= 0)
_POSITION = Kind("an integer >= 1", lambda value: type(value) is int and value >= 1)
_RELATION = Kind("'at least' or 'less than'", lambda value: value in RELATIONS)
_TEXT = Kind("a string that is not blank", _is_text)
_TEXTS = Kind("a list of strings, none blank", lambda v: isinstance(v, list) and v != [] and all(map(_is_text, v)))
_LETTER = Kind("one character", lambda value: _is_text(value) and len(value.strip()) == 1 == len(value))
_LANGUAGE = Kind("a language such as 'en', 'hi' or 'zh-cn'", lambda v: isinstance(v, str) and v in LANGUAGES)


class Type(NamedTuple):
    """``holds(text, **kwargs)`` of a response that is not blank; None: it cannot be told here."""

    holds: Callable[..., bool | None]
    kwargs: Mapping[str, Kind]


TYPES: dict[str, Type] = {
    "change_case:capital_word_frequency": Type(
        _capital_word_frequency, {"capital_frequency": _COUNT, "capital_relation": _RELATION}
    ),
    "change_case:english_capital": Type(_english_capital, {}),
    "change_case:english_lowercase": Type(_english_lowercase, {}),
    "combination:repeat_prompt": Type(_repeat_prompt, {"prompt_to_repeat": _TEXT}),
    "combination:two_responses": Type(_two_responses, {}),
    "detectable_content:number_placeholders": Type(_number_placeholders, {"num_placeholders": _COUNT}),
    "detectable_content:postscript": Type(_postscript, {"postscript_marker": _TEXT}),
    "detectable_format:constrained_response": Type(_constrained_response, {}),
    "detectable_format:json_format": Type(_json_format, {}),
    "detectable_format:multiple_sections": Type(_multiple_sections, {"section_spliter": _TEXT, "num_sections": _COUNT}),
    "detectable_format:number_bullet_lists": Type(_number_bullet_lists, {"num_bullets": _COUNT}),
    "detectable_format:number_highlighted_sections": Type(_number_highlighted_sections, {"num_highlights": _COUNT}),
    "detectable_format:title": Type(_title, {}),
    "keywords:existence": Type(_existence, {"keywords": _TEXTS}),
    "keywords:forbidden_words": Type(_forbidden_words, {"forbidden_words": _TEXTS}),
    "keywords:frequency": Type(_frequency, {"keyword": _TEXT, "frequency": _COUNT, "relation": _RELATION}),
    "keywords:letter_frequency": Type(
        _letter_frequency, {"letter": _LETTER, "let_frequency": _COUNT, "let_relation": _RELATION}
    ),
    "language:response_language": Type(_response_language, {"language": _LANGUAGE}),
    "length_constraints:nth_paragraph_first_word": Type(
        _nth_paragraph_first_word, {"num_paragraphs": _POSITION, "nth_paragraph": _POSITION, "first_word": _TEXT}
    ),
    "length_constraints:number_paragraphs": Type(_number_paragraphs, {"num_paragraphs": _POSITION}),
    "length_constraints:number_sentences": Type(_number_sentences, {"relation": _RELATION, "num_sentences": _COUNT}),
    "length_constraints:number_words": Type(_number_words, {"relation": _RELATION, "num_words": _COUNT}),
    "punctuation:no_comma": Type(_no_comma, {}),
    "startend:end_checker": Type(_end_checker, {"end_phrase": _TEXT}),
    "startend:quotation": Type(_quotation, {}),
}


def check_constraint(constraint: Constraint) -> None:
    """Checks its type, and its arguments against what the type takes.

    Raises:
        InputError: no such type; an argument that is missing, unknown or does not fit.
    """
    known = TYPES.get(constraint.id)
    if known is None:
        raise InputError(
            f"got {constraint.id!r:.60}, expected one of IFEval's {len(TYPES)} instruction types, such as "
            f"'punctuation:no_comma'{did_you_mean(constraint.id, TYPES)}"
        )
    for key, value in constraint.kwargs.items():
        if (kind := known.kwargs.get(key)) is None:
            takes = ", ".join(known.kwargs) or "none"
            near = did_you_mean(key, known.kwargs)
            raise InputError(f"{constraint.id!r} has no argument {key!r}; expected {takes}{near}")
        if not kind.fits(value):
            raise InputError(f"argument {key!r} of {constraint.id!r} is {value!r:.60}; expected {kind.expected}")
    for key, kind in known.kwargs.items():
        if key not in constraint.kwargs:
            raise InputError(f"argument {key!r} of {constraint.id!r} is missing; expected {kind.expected}")


def loose_variants(text: str) -> Iterator[str]:
    """The eight readings of section 2.2: the first line, the last or both left out, or none, with and without ``*``."""
    lines = text.split("\n")
    for kept in (lines, lines[1:], lines[:-1], lines[1:-1]):
        variant = "\n".join(kept).strip()
        yield variant
        yield variant.replace("*", "")


def holds(constraint: Constraint, text: str, *, loose: bool = False) -> bool | None:
    """Whether the text follows the constraint, in the loose reading if any of its variants does.

    None: it cannot be told, as the constraint is about a language and langdetect is not installed (``NO_DETECTOR``).
    """
    check = TYPES[constraint.id].holds
    verdicts = [
        check(variant, **constraint.kwargs)
        for variant in (loose_variants(text) if loose else (text,))
        if variant.strip()
    ]
    if True in verdicts:
        return True
    return None if None in verdicts else False
