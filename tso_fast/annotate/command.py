"""``tso-fast annotate``: finds the files, then serves the page, or exports or imports labels."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path

from tso_fast.annotate.desk import Desk
from tso_fast.annotate.exchange import LABEL_STUDIO_CONFIG, export_labels, import_labels
from tso_fast.config.settings import AnnotateConfig, EvidenceConfig
from tso_fast.correction.beliefs import believe
from tso_fast.errors import InputError
from tso_fast.files.atomic import check_writable
from tso_fast.files.labels import LabelFile
from tso_fast.files.rows import BadRows, read_candidates, read_verdicts
from tso_fast.files.run import RUN_FILE, Iteration, iterations
from tso_fast.progress import console

PASSWORD = "TSO_FAST_PASSWORD"


@dataclass(frozen=True, kw_only=True)
class Files:
    """Files that one run of the command reads and writes."""

    responses: Path
    verdicts: Path | None
    labels: Path


def find_files(config: AnnotateConfig) -> Files:
    """The files of one iteration of a run folder, or those next to a file of responses.

    Raises:
        InputError: ``config.run`` is neither a run folder nor a file of responses.
    """
    run = Path(config.run)
    given = None if config.verdicts is None else Path(config.verdicts)
    if os.path.isfile(run):
        if config.iteration is not None:
            raise InputError(f"iteration: it has no effect on {run}, which is a file; leave it out")
        stem = re.sub(r"\.jsonl(\.gz)?$", "", run.name)
        found = Files(responses=run, verdicts=given, labels=run.with_name(f"{stem}.labels.jsonl"))
    else:
        iteration = _iteration(run, config.iteration)
        verdicts = given or (iteration.verdicts if iteration.verdicts.is_file() else None)
        found = Files(responses=iteration.responses, labels=iteration.labels, verdicts=verdicts)
    if config.labels is None:
        return found
    return Files(responses=found.responses, verdicts=found.verdicts, labels=Path(config.labels))


def _iteration(run: Path, number: int | None) -> Iteration:
    known = {iteration.number: iteration for iteration in iterations(run) if iteration.responses.is_file()}
    if not known:
        what = (
            "has no iteration with responses yet"
            if os.path.isfile(run / RUN_FILE)
            else "is neither a run folder nor a file of responses"
        )
        raise InputError(f"run: {run} {what}; expected the output_dir of `tso-fast train`, or JSONL of responses")
    if number is not None and number not in known:
        raise InputError(
            f"iteration: {run} has no responses of iteration {number}; expected one of {', '.join(map(str, known))}"
        )
    return known[max(known) if number is None else number]


def annotate(config: AnnotateConfig) -> None:
    files = find_files(config)
    if config.import_from is None and config.export_to is None and importlib.util.find_spec("gradio") is None:
        raise InputError("annotate: the page needs gradio, which is not installed: pip install 'tso-fast[annotate]'")
    bad = BadRows(config.on_bad_row)
    candidates = read_candidates(files.responses, bad, config)
    verdicts = (
        []
        if files.verdicts is None
        else read_verdicts(files.verdicts, candidates, bad, may_be_empty=True, on_unknown_field=config.on_unknown_field)
    )
    beliefs = believe(candidates, verdicts, EvidenceConfig())
    labels = LabelFile(files.labels, candidates)
    desk = Desk(beliefs, labels, seed=config.seed, overlap=config.overlap, max_pairs=config.max_pairs)
    if config.export_to is not None:
        output = Path(config.export_to)
        if os.path.exists(output):
            raise InputError(f"export_to: {output} exists already; choose another name or remove it")
        check_writable(output)
        count = export_labels(output, config.format, candidates, desk.queue, labels, config.seed)
        _say(f"{count} labels in {output}")
        if config.format == "label_studio":
            _say(f"labelling configuration for the project:\n{LABEL_STUDIO_CONFIG}")
    elif config.import_from is not None:
        source = Path(config.import_from)
        count, new = import_labels(
            source, config.format, candidates, labels, config.annotator, bad, config.on_unknown_field
        )
        rest = f"; the other {count - new} were there already, or older than what was said here" if new < count else ""
        _say(f"{new} of {count} labels of {source} added to {files.labels}{rest}")
    if bad.rows:
        _say(f"{len(bad.rows)} bad rows skipped, the first: {bad.rows[0]['error']}")
    if config.export_to is None and config.import_from is None:
        from tso_fast.annotate.page import serve

        password = config.password or os.environ.get(PASSWORD) or None
        if password is None and not _is_loopback(config.host):
            _say(
                f"warning: {config.host} can be reached from other machines, and whoever sees the page's address can "
                f"label; set {PASSWORD}"
            )
        serve(desk, config.annotator, config.host, config.port, password, config.public_name)


def _say(text: str) -> None:
    console.print(text, soft_wrap=True)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
