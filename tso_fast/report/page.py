"""``report.html``: one self-contained file to read, print or send."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tso_fast.files.atomic import atomic_file
from tso_fast.files.rows import BadRows, read_pairs
from tso_fast.files.run import REPORT_FILE, Iteration
from tso_fast.progress import spelled_out
from tso_fast.report.summary import (
    COMPARISON_COLUMNS,
    VERSION_COLUMNS,
    Summary,
    comparison_rows,
    percent,
    summarise,
    version_rows,
)
from tso_fast.report.tables import COST_COLUMNS, cost_rows, judge_table
from tso_fast.types import PreferencePair

NUM_PAIRS = 8
FOLD = 280
"""Number of characters after which a text is folded."""

UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters, among them those that turn the direction of text: shown by their numbers, they do nothing."""

CSS = """
:root { --ink: #222; --soft: #666; --rule: #ddd; --chosen: #0072B2; --rejected: #D55E00; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: var(--ink);
  background: #fff; max-width: 60rem; margin: 2.5rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; font-weight: 600; margin: 2.4rem 0 .4rem; break-after: avoid; }
p, figcaption { margin: .3rem 0; }
.soft, figcaption, th { color: var(--soft); }
figcaption { font-size: .88rem; max-width: 46rem; }
figure { margin: 0; break-inside: avoid; }
svg { display: block; width: 100%; height: auto; margin-top: .4rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem 2.8rem; margin: 1.2rem 0 .4rem; }
.tiles div { max-width: 18rem; overflow-wrap: anywhere; }
.tiles b { display: block; font-size: 1.55rem; font-weight: 600; line-height: 1.25; }
.tiles span { color: var(--soft); font-size: .88rem; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; width: 100%; }
th { white-space: pre-line; font-weight: 500; text-align: right; vertical-align: bottom; }
th, td { padding: .25rem .5rem; border-bottom: 1px solid var(--rule); }
td { text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; min-width: 5rem; overflow-wrap: anywhere; }
td:first-child { white-space: normal; }
table.narrow { width: auto; }
.scroll { overflow-x: auto; }
.warnings { border-left: 3px solid #E69F00; padding: .1rem 0 .1rem .9rem; margin: 1rem 0; list-style: none; }
.pair { border-top: 1px solid var(--rule); padding: .6rem 0; break-inside: avoid; }
.pair .text { white-space: pre-wrap; overflow-wrap: anywhere; margin: .15rem 0; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: .8rem; margin-top: .3rem; }
.side { border-left: 3px solid var(--chosen); padding-left: .7rem; min-width: 0; }
.side.rejected { border-color: var(--rejected); }
.who { font-size: .82rem; color: var(--soft); }
.side .who b { color: var(--chosen); } .side.rejected .who b { color: var(--rejected); }
summary { cursor: pointer; }
details[open] summary span { display: none; }
.settings { columns: 3 16rem; column-gap: 2rem; font-size: .82rem; }
.settings div { display: flex; justify-content: space-between; gap: 1rem; border-bottom: 1px solid #eee;
  break-inside: avoid; }
.settings span { overflow-wrap: anywhere; text-align: right; min-width: 0; }
.settings .wide { column-span: all; }
@media print { body { font-size: 10pt; margin: 0; max-width: none; padding: 0; } .scroll { overflow: visible; } }
"""


def write_report(folder: str | Path, others: Sequence[str | Path] = ()) -> Path:
    """Writes ``report.html`` for a run, complete or not; ``others`` are runs to compare with.

    Raises:
        InputError: a folder is not a run.
        OutputError: the file cannot be written.
    """
    run = summarise(folder)
    file = run.folder / REPORT_FILE
    page = "\n".join(_page(run, [summarise(other) for other in others]))
    page = UNSEEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", page)
    with atomic_file(file) as handle:
        handle.write(page)
    return file


def _page(run: Summary, others: Sequence[Summary]) -> Iterable[str]:
    from tso_fast.report import figures

    title = escape(run.folder.resolve().name)
    yield f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} – tso-fast report</title><style>{CSS}</style></head><body>
<h1>{title}</h1>
<p class="soft">tso-fast {escape(str(run.libraries.get("tso_fast", "")))} · {escape(run.loss_name)} · reference:
{escape(str(run.config.get("reference")))} · {escape(run.progress)} · seed {escape(str(run.config.get("seed")))}</p>"""
    yield _tiles(run)
    if run.warnings:
        yield '<ul class="warnings">' + "".join(f"<li>{escape(w)}</li>" for w in run.warnings) + "</ul>"
    yield "<h2>Versions</h2>" + _table(VERSION_COLUMNS, version_rows(run))
    yield """<p class="soft">Kept, swapped, dropped: candidate pairs. Used: pairs selected for training. Clip and loss:
means over the iteration.</p>"""
    if others:
        yield "<h2>The same loop by loss</h2>" + _table(COMPARISON_COLUMNS, comparison_rows([run, *others]), "narrow")
    for heading, svg, caption in (
        (
            "Accuracy",
            figures.accuracy(run, others),
            "Greedy answers to held-out prompts by each version of the policy; bars are 95 % intervals (Wilson).",
        ),
        (
            "Evaluation correction",
            figures.decisions(run),
            "All pairs of candidate responses by the rule that gave their prior order (human over model, newer over "
            "older, larger over smaller), and what the evidence made of it. Kept: confirmed; swapped: contradicted; "
            "dropped: a tie or the same text. Without a prior the evidence alone decides. Above the bars: pairs.",
        ),
        (
            "Loss and reward margin",
            figures.loss_and_margin(run),
            "Means between log rows. Each iteration starts at its own reference.",
        ),
        (
            "Rewards and clipping",
            figures.rewards_and_clips(run),
            "Rewards before clipping, of chosen and rejected responses, since the iteration's reference. In dual clip "
            "a clipped response has no gradient: a chosen one is preferred enough, a rejected one rejected enough.",
        ),
        (
            "Lengths",
            figures.lengths(run),
            "Mean tokens of the responses in the iteration's pairs, and of what the policy generated at its start.",
        ),
    ):
        if svg is not None:
            yield _figure(heading, svg, caption)
    yield from _samplers(run)
    yield from _judges(run)
    yield from _pairs(run)
    yield "<h2>Configuration</h2>" + _settings(run.config)
    yield "<h2>Software</h2>" + _settings(run.libraries)
    yield "</body></html>\n"


def _tiles(run: Summary) -> str:
    tiles = [
        (percent(v.accuracy), f"{when}: {v.name}, {v.interval}")
        for when, v in (("before", run.before), ("after", run.after))
        if v is not None
    ]
    if run.gain is not None:
        tiles.append((f"{run.gain:+.1f}", "points gained"))
    if used := sum(v.num_used or 0 for v in run.versions):
        tiles.append((f"{used:,}", "pairs selected, all iterations"))
    return (
        '<div class="tiles">' + "".join(f"<div><b>{b}</b><span>{escape(s)}</span></div>" for b, s in tiles) + "</div>"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _samplers(run: Summary) -> Iterable[str]:
    """What samplers noted, iteration by iteration."""
    rows = [
        (str(version.iteration), name, spelled_out(info))
        for version in run.versions
        for name, info in version.samplers.items()
    ]
    if rows:
        yield "<h2>Samplers</h2>"
        yield _table(("iteration", "sampler", "noted"), rows)


def _judges(run: Summary) -> Iterable[str]:
    """The panel of the newest iteration: how evidence was combined, each judge's reliability, and what models cost.

    Empty for a single verifier, which has nothing to compare.
    """
    from tso_fast.report import figures

    last = max((v for v in run.versions if v.judges), key=lambda v: v.iteration, default=None)
    if last is None or (len(last.judges) < 2 and not last.costs):
        return
    yield f"<h2>Judges of iteration {last.iteration}</h2>"
    if last.evidence:
        yield f"<p>Evidence: {escape(last.evidence['method'])}, as {escape(last.evidence['why'])}.</p>"
    yield _table(*judge_table(last.judges))
    yield """<p class="soft">With the rest: correlation of ranks with those of the other judges. Believed right: share
of right votes, estimated from agreement and human labels, with its 95 % interval. Shown first: log-odds by which a
judge prefers the response that it saw first, whatever the responses. Longer: how much more often than its other votes
explain it prefers the longer response, a mean of signs. Shares errors with: a judge that it agrees with more often than
independent judges would; the two count as little more than one.</p>"""
    if (plot := figures.judges(last.judges)) is not None:
        yield _figure(
            "Right votes by their strength",
            figures.draw("judges", *plot),
            "Believed share of right votes among those of like strength. The strength is the gap of two scores, or the "
            "distance of a stated probability from one half.",
        )
    if last.costs:
        yield _table(COST_COLUMNS, cost_rows(last.costs))
        yield """<p class="soft">Contradictions: pairs on which the two orders disagree; they are ties. First shown: how
often the response shown first is preferred; 50 % without bias.</p>"""


def _figure(heading: str, svg: str, caption: str) -> str:
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(heading)}"', 1)
    return f"<figure><h2>{heading}</h2><figcaption>{caption}</figcaption>{svg}</figure>"


def _pairs(run: Summary) -> Iterable[str]:
    iteration = max((v.iteration for v in run.versions if v.used), default=0)
    file = Iteration(run.folder, iteration).pairs
    if not iteration or not file.is_file():
        return
    yield (
        f'<h2>Pairs of iteration {iteration}</h2><p class="soft">A sample over priors and decisions; all are in '
        f"{escape(file.relative_to(run.folder).as_posix())}.</p>"
    )
    for pair in _sample(read_pairs(file, BadRows("skip"))):
        about = f"prior: {pair.prior} · {pair.decision} ({pair.reason})"
        if pair.prompt.answer is not None:
            about += f" · answer: {pair.prompt.answer}"
        yield f'<div class="pair"><div class="who">{escape(about)}</div>{_text(pair.prompt.text)}<div class="sides">'
        for side, response, score in (
            ("chosen", pair.chosen, pair.score_chosen),
            ("rejected", pair.rejected, pair.score_rejected),
        ):
            scored = "" if score is None else f" · score {score:.3g}"
            yield (
                f'<div class="side {side}"><div class="who"><b>{side}</b> · {escape(response.model)}{scored}</div>'
                f"{_text(response.text)}</div>"
            )
        yield "</div></div>"


def _sample(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """A few pairs, taking kinds (prior, decision) in turn and preferring prompts that are not yet shown."""
    kinds: dict[tuple[str, str], list[PreferencePair]] = {}
    for pair in pairs:
        kinds.setdefault((pair.prior, pair.decision), []).append(pair)
    sample: list[PreferencePair] = []
    while len(sample) < min(NUM_PAIRS, len(pairs)):
        for _, group in sorted(kinds.items()):
            if group and len(sample) < NUM_PAIRS:
                seen = {pair.prompt.id for pair in sample}
                fresh = next((i for i, pair in enumerate(group) if pair.prompt.id not in seen), 0)
                sample.append(group.pop(fresh))
    return sample


def _text(text: str) -> str:
    if len(text) <= FOLD:
        return f'<div class="text">{escape(text)}</div>'
    start = f"{escape(text[:FOLD].rsplit(' ', 1)[0])} …"
    return f'<details class="text"><summary><span>{start}</span></summary>{escape(text)}</details>'


def _settings(values: Mapping[str, Any]) -> str:
    short: list[str] = []
    wide: list[str] = []
    for key, value in values.items():
        for item in value if isinstance(value, list) else [value]:  # one row per cell of the matrix
            if isinstance(item, dict):
                text = ", ".join(f"{k}: {v}" for k, v in item.items() if v is not None)
            else:
                text = item if isinstance(item, str) else json.dumps(item)
            is_wide = isinstance(item, dict) or len(text) > 40
            row = f"<div{' class=wide' * is_wide}>{escape(key)}<span>{escape(text)}</span></div>"
            (wide if is_wide else short).append(row)
    return f'<div class="settings">{"".join(short + wide)}</div>'
