"""The page in a real browser, served by the command in a fork, as importing gradio takes seconds.

The picture in the documentation: `python tests/test_annotate_page.py docs/annotate.png`.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from helpers import fork, read_rows, status_of, write_rows

from tso_fast.cli import main

pytestmark = pytest.mark.slow
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SETTLED_S = 0.3
"""The page takes no key in the first quarter of a second of a pair."""
NAME = "#name input, #name textarea"
EVIL = (
    '<script>window.hacked = 1</script><img src="x" onerror="window.hacked = 1"> ${window.hacked = 1} {{value}} '
    "{{#if value}} @children &lt;b&gt; **bold** `code` \\u0041 $x$\n  <b>second line</b>"
)


@contextlib.contextmanager
def served(*arguments: object, **environment: str) -> Iterator[str]:
    """The address of `tso-fast annotate`, which runs meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"

        def serve() -> None:
            os.environ.update(COLUMNS="200", **environment)
            sys.stdout = sys.stderr = log.open("w", buffering=1)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os._exit(main(["annotate", *map(str, arguments)]))

        child = fork(serve)
        try:
            deadline = time.monotonic() + 60
            while not (match := re.search(r"open (http://\S+)", said := log.read_text() if log.exists() else "")):
                assert os.waitpid(child, os.WNOHANG) == (0, 0), said
                assert time.monotonic() < deadline, said
                time.sleep(0.05)
            yield match[1]
            os.kill(child, signal.SIGINT)
            status, child = status_of(child), 0
        finally:
            if child:
                with contextlib.suppress(ProcessLookupError, ChildProcessError):
                    os.kill(child, signal.SIGKILL)
                    status_of(child)
        said = log.read_text()
        assert status == 130
        assert "stopped" in said
        assert "Traceback" not in said
        assert "Warning" not in said


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'tso-fast[annotate]'")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    if BROWSER is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on the PATH")
    with api.sync_playwright() as playwright:
        flags = [*FLAGS, "--no-sandbox"] if os.getuid() == 0 else FLAGS
        browser = playwright.chromium.launch(executable_path=BROWSER, args=flags)
        yield browser
        browser.close()


class Reader:
    """A person at a browser of their own; everything the page loads and says is kept."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.address = address.partition("?")[0]
        self.loaded, self.problems, self.bodies = [], [], []
        self.page = browser.new_context(**options).new_page()
        self.page.on("request", lambda request: self.loaded.append(request.url))
        self.page.on("requestfailed", lambda request: self.problems.append(f"{request.url}: {request.failure}"))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", self._note)
        self.page.on("response", self._keep)
        self.page.goto(address)

    def _note(self, message: Any) -> None:
        if message.type == "error":
            self.problems.append(message.text)

    def _keep(self, response: Any) -> None:
        if response.headers.get("content-type", "").startswith(("application/json", "text/html", "text/event-stream")):
            with contextlib.suppress(Exception):
                self.bodies.append(response.text())

    def name(self, name: str) -> Reader:
        self.page.fill(NAME, name)
        self.page.keyboard.press("Enter")
        self.page.wait_for_selector("#left-response, .done")
        return self

    @property
    def turn(self) -> str:
        return str(self.page.get_attribute("[data-turn]", "data-turn"))

    @property
    def shown(self) -> tuple[str, str]:
        left, right = (self.page.inner_text(f"#{side}-response .text") for side in ("left", "right"))
        return left, right

    @property
    def count(self) -> str:
        return str(self.page.inner_text("#count"))

    def act(self, do: Callable[[], object]) -> None:
        turn = self.turn
        time.sleep(SETTLED_S)
        do()
        self.page.wait_for_function("turn => document.querySelector('[data-turn]')?.dataset.turn != turn", arg=turn)

    def press(self, key: str) -> None:
        self.act(lambda: self.page.keyboard.press(key))

    def click(self, button: str) -> None:
        self.act(lambda: self.page.click(f"#{button}-button"))

    def close(self, may_fail: str | None = None) -> None:
        """Nothing came from elsewhere, and the browser found nothing wrong."""
        foreign = [url for url in self.loaded if not url.startswith((self.address, "data:", "blob:"))]
        problems = [p for p in self.problems if may_fail is None or not re.search(may_fail, p)]
        self.page.context.close()
        assert foreign == []
        assert [p for p in problems if "net::ERR_ABORTED" not in p] == []  # what a reload broke off


def responses_file(folder: Path, prompts: int) -> Path:
    rows = [
        {
            "id": f"q{p}",
            "prompt": f"Question {p}?",
            "answer": "the-hidden-answer",
            "responses": [
                {
                    "model": f"secret-model-{k}",
                    "version": f"secret-version-{k}",
                    "version_rank": k,
                    "size_b": 61.25,
                    "text": f"Reply {k} to question {p}\n  with a second line.",
                    "scores": {"secret-judge": float(k)},
                }
                for k in range(2)
            ],
        }
        for p in range(prompts)
    ]
    return write_rows(folder / "responses.jsonl", rows)


def rows_of(file: Path) -> list[dict[str, Any]]:
    return read_rows(file.with_name("responses.labels.jsonl"))


def better(row: dict[str, Any]) -> str | None:
    """The text that a label prefers."""
    if row["probability"] in (None, 0.5):
        return None
    k = row["responses"][0 if row["probability"] == 1 else 1]
    return f"Reply {k} to question {row['prompt_id'][1:]}"


def test_a_day_of_two_annotators(browser: Any, tmp_path: Path) -> None:
    file = responses_file(tmp_path, 40)
    with served(file, "--port", 0, "--overlap", 0) as address:
        ada = Reader(browser, address)
        ada.page.click(NAME)
        ada.page.keyboard.type("abtxu 012")  # letters in a field are letters
        assert ada.page.input_value(NAME) == "abtxu 012"
        ada.name("Ada")
        assert ada.count == "0 / 40 labelled"
        assert not ada.page.query_selector("#agreement")
        keys = ["a", "1", "ArrowLeft", "b", "2", "ArrowRight", "t", "0", "x"]
        expected: list[tuple[str | None, Any]] = []
        for press, value in [
            *((lambda key=key: ada.press(key), key) for key in keys),
            *((lambda name=name: ada.click(name), name) for name in ("left", "right", "tie", "bad")),
        ]:
            left, right = ada.shown
            text = (
                left
                if value in ("a", "1", "ArrowLeft", "left")
                else right
                if value in ("b", "2", "ArrowRight", "right")
                else None
            )
            expected.append((text and text.partition("\n")[0], None if value in ("x", "bad") else 0.5))
            press()
        assert ada.count == "13 / 40 labelled"
        rows = rows_of(file)
        assert [better(row) for row in rows] == [text for text, _ in expected]
        assert [row["probability"] for row, (text, _) in zip(rows, expected, strict=True) if text is None] == [
            value for text, value in expected if text is None
        ]
        assert {row["annotator"] for row in rows} == {"Ada"}
        assert all(row["seconds"] > 0 and row["time"] for row in rows)
        ada.page.click("#agreement summary")
        assert "You and the judges' majority" in ada.page.inner_text("#agreement")

        seen = ada.shown  # undo, several steps, by key and button
        ada.press("u")
        ada.press("Backspace")
        ada.click("undo")
        assert ada.count == "10 / 40 labelled"
        assert [row.get("withdrawn", False) for row in rows_of(file)[13:]] == [True] * 3
        for key in ("a", "t", "x"):
            ada.press(key)
        assert ada.shown == seen

        time.sleep(SETTLED_S)  # two presses for one pair are one label
        turn, before = ada.turn, len(rows_of(file))
        ada.page.evaluate("""for (const key of 'aaa')
            document.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}))""")
        ada.page.wait_for_function("turn => document.querySelector('[data-turn]').dataset.turn != turn", arg=turn)
        ada.page.keyboard.press("a")
        time.sleep(SETTLED_S)
        assert len(rows_of(file)) == before + 1

        seen, count = ada.shown, ada.count  # a reload comes back to the same pair, sides included
        ada.page.reload()
        ada.page.wait_for_selector("#left-response")
        assert (ada.shown, ada.count) == (seen, count)

        bob = Reader(browser, address).name("Bob")
        assert bob.count == "14 / 40 labelled"
        assert bob.shown[0].splitlines()[0][-3:] != ada.shown[0].splitlines()[0][-3:]  # another question
        bob.press("b")
        ada.press("a")
        assert [row["annotator"] for row in rows_of(file)[-2:]] == ["Bob", "Ada"]
        assert "15 by Ada" in ada.page.inner_text("#who")

        content = "".join([*ada.bodies, *bob.bodies, ada.page.content(), bob.page.content()])
        assert "with a second line" in content
        for word in ("secret-model", "secret-version", "secret-judge", "the-hidden-answer", "61.25"):
            assert word not in content
        seen, port = [bob.shown, ada.shown], urllib.parse.urlsplit(address).port
        bob.close()
        ada.close()
    with served(file, "--port", port, "--overlap", 0) as address:
        bob, ada = Reader(browser, address).name("Bob"), Reader(browser, address).name("Ada")
        assert [bob.shown, ada.shown] == seen
        assert ada.count == "16 / 40 labelled"
        ada.press("u")
        assert ada.count == "15 / 40 labelled"
        ada.close()
        bob.close()


def test_behind_a_password_what_the_data_say_is_text(browser: Any, tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be <b>brief</b>."}, {"role": "user", "content": EVIL}]
    responses = [{"model": "m", "text": text} for text in (EVIL, "x" * 3000)]
    file = write_rows(tmp_path / "responses.jsonl", [{"prompt": messages, "responses": responses}])
    with served(file, "--port", 0, TSO_FAST_PASSWORD="open sesame") as address:
        reader = Reader(browser, address, viewport={"width": 400, "height": 800})
        page = reader.page
        name, password = "input:not([type=password]), textarea", "input[type=password]"
        page.wait_for_selector(password)
        assert "brief" not in page.content()
        for given in ("wrong", "open sesame"):
            page.locator(name).first.fill("<i>Eve</i>")
            page.fill(password, given)
            page.keyboard.press("Enter")
            if given == "wrong":
                page.wait_for_selector("text=Incorrect")
        page.wait_for_selector("#left-response")
        assert EVIL in reader.shown
        assert page.inner_text(".prompt").split("\n", 2) == ["System", "Be <b>brief</b>.", f"User\n{EVIL}"]
        assert page.inner_text("#who") == "<i>Eve</i>"
        assert page.evaluate("window.hacked") is None
        assert not page.query_selector("#leave")  # the name is that of the login
        assert page.evaluate("document.querySelectorAll('#desk script, #desk img, #desk b b').length") == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        for button in ("left", "right", "tie", "bad", "undo"):
            box = page.locator(f"#{button}-button").bounding_box()
            assert box["height"] >= 40
            assert 0 <= box["x"] < box["x"] + box["width"] <= 400
            assert box["y"] + box["height"] <= 800
        reader.click("left")
        assert "Nothing is left for you" in page.inner_text("#desk")
        assert rows_of(file)[0]["annotator"] == "<i>Eve</i>"
        page.keyboard.press("a")
        reader.press("u")
        assert EVIL in reader.shown
        reader.close(may_fail=r"status of 40[01]")  # the refused password


def picture(browser: Any, path: Path, scheme: str = "light", width: int = 1280) -> None:
    """The page with real data and some labels of two people; `scheme` light or dark."""
    data = Path(__file__).resolve().parents[2] / "shared/data/gsm8k_matrix/matrix_dev.jsonl.gz"
    with tempfile.TemporaryDirectory() as folder, gzip.open(data, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(60), strict=False)]
        for row in rows:
            for response in row["responses"]:
                response["scores"] = {"verifier": float(response.pop("is_correct"))}
        file = write_rows(Path(folder) / "responses.jsonl", rows)
        with served(file, "--port", 0, "--max_pairs", 200, "--overlap", 0.5) as address:
            answers = {row["prompt"]: row["answer"] for row in rows}
            for name, slips in (("Grace", (3,)), ("Ada", (8,))):
                reader = Reader(browser, address, viewport={"width": width, "height": 800}, color_scheme=scheme)
                reader.name(name)
                for k in range(12):
                    answer = answers[reader.page.inner_text(".prompt .text")]
                    left, right = (text.rstrip().endswith(f" {answer}") for text in reader.shown)
                    reader.press("t" if left == right or k in slips else "a" if left else "b")
            reader.page.click("#agreement summary")
            reader.page.screenshot(path=path)
            reader.close()


if __name__ == "__main__":
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser_ = playwright.chromium.launch(executable_path=BROWSER, args=[*FLAGS, "--no-sandbox"])
        picture(browser_, Path(sys.argv[1]), *sys.argv[2:3], *map(int, sys.argv[3:4]))
        browser_.close()
