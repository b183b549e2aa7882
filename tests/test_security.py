"""Promises of SECURITY.md that no other test holds; and each that it names has the test that it names."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import write_rows
from test_cli import assert_error, cells

from tso_fast.config.parse import parse
from tso_fast.config.settings import AnnotateConfig, PairsConfig
from tso_fast.errors import InputError
from tso_fast.files.rows import BadRows
from tso_fast.matrix import check_fits
from tso_fast.models.load import load_tokenizer
from tso_fast.types import Candidates, Prompt

ROOT = Path(__file__).parents[1]


def test_every_promise_names_a_test_that_is_there() -> None:
    named = re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", (ROOT / "SECURITY.md").read_text(encoding="utf-8"))
    assert len(named) > 15
    for file, name in named:
        functions = {f.name for f in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(f, ast.FunctionDef)}
        assert not name or name in functions, f"{file}::{name}"


# ---- no code from data


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_a_folder_of_a_model_is_not_run(tiny_matrix: Path, cli: Any, tmp_path: Path, file: str) -> None:
    cell, marker = Path(shutil.copytree(tiny_matrix / "s.v1", tmp_path / "cell.v1")), tmp_path / "ran"
    for name in ("configuration_x.py", "modeling_x.py", "tokenization_x.py"):
        (cell / name).write_text(f"open({str(marker)!r}, 'w')\nclass X: pass\n")
    config = json.loads((cell / file).read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_x.X",
        "AutoModelForCausalLM": "modeling_x.X",
        "AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"],
    }
    (cell / file).write_text(json.dumps(config))
    output = tmp_path / "responses.jsonl"
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": "2 + 3?"}])
    arguments = ["--prompts", prompts, "--cells", cells(tmp_path, "cell.v1"), "--output", output]
    ended = cli("generate", [*arguments, "--generator", "hf", "--max_completion_length", 2])
    assert ended.status == 0, ended.err
    assert output.exists()
    assert not marker.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append.__self__.clear() }}{{ messages.append(1) }}",
    ],
)
def test_a_chat_template_reaches_nothing_but_its_messages(tiny_matrix: Path, tmp_path: Path, template: str) -> None:
    tokenizer, marker = load_tokenizer(tiny_matrix / "s.v1"), tmp_path / "ran"
    tokenizer.chat_template = template.replace("MARKER", str(marker))
    item = Candidates(prompt=Prompt(id="p", prompt="2 + 3?", where="p.jsonl:1"), responses=())
    with pytest.raises(InputError, match=r"p\.jsonl:1: field 'prompt' is refused by the chat template: .* is unsafe"):
        check_fits([item], tokenizer, 64, 16, BadRows())
    assert not marker.exists()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/object/new:os.system", "!!python/name:x"])
def test_a_configuration_makes_no_objects(tmp_path: Path, tag: str) -> None:
    file, marker = tmp_path / "c.yaml", tmp_path / "ran"
    file.write_text(f"responses: {tag} ['touch {marker}']\noutput: o\n")
    for arguments in ([str(file)], ["--responses", f"{tag} ['touch {marker}']", "--output", "o"]):
        try:
            config = parse("pairs", PairsConfig, arguments)
        except InputError:
            continue
        assert isinstance(config.responses, str)  # the text as it is
    assert not marker.exists()


# ---- no network

ALONE = """
import sys
def refuse(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        asked = str(arguments[0])
    elif event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
        asked = str(arguments[1][0])
    elif event == "socket.bind" and isinstance(arguments[1], tuple):
        asked = str(arguments[1][0]) or "everywhere"
    else:
        return
    if asked not in ("127.0.0.1", "::1", "localhost", "None"):
        print("the network was asked:", event, asked, file=sys.stderr)
        raise SystemExit(99)
sys.addaudithook(refuse)
from tso_fast.cli import main
if __name__ == "__main__":
    sys.exit(main())
"""
"""The program, which ends if it looks for anything beyond this machine, or listens for it."""


@pytest.mark.slow
def test_a_run_asks_nothing_of_the_network(tiny_matrix: Path, tmp_path: Path) -> None:
    (tmp_path / "alone.py").write_text(ALONE)
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    arguments = ["--prompts", tiny_matrix / "prompts.jsonl", "--cells", cells(tiny_matrix, "s.v1"), "--use_cpu"]
    arguments += ["--output_dir", tmp_path / "run", "--verifier", "exact", "--num_iterations", 1]
    arguments += ["--max_completion_length", 4, "--save_steps", 1]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "alone.py"), "train", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=300,
    )
    assert "the network was asked" not in done.stderr
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run/report.html").exists()


def test_the_page_listens_to_this_machine() -> None:
    assert AnnotateConfig(run="x").host == "127.0.0.1"


def test_a_model_that_is_no_folder_is_not_looked_for_elsewhere(cli: Callable[..., Any], tmp_path: Path) -> None:
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": "a"}])
    ended = cli("generate", ["--prompts", prompts, "--cells", "[{path: gpt2}]", "--output", tmp_path / "o"])
    assert_error(ended, 2, "path 'gpt2' is no folder; expected a local Hugging Face model")
