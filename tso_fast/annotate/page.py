"""The page: two responses side by side, one key or button per label. The only module that imports gradio.

Everything from the data is shown as plain text. The page loads nothing from other servers; its Content-Security-Policy
enforces this.
"""

from __future__ import annotations

import html
import itertools
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from tso_fast.annotate.agreement import Agreement
from tso_fast.annotate.desk import Desk, Task, View
from tso_fast.annotate.guard import Guard, Password
from tso_fast.errors import InputError, OutputError
from tso_fast.progress import console

HERE = Path(__file__).parent
LONGEST_NAME = 60
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self'; form-action 'self'; "
    "frame-ancestors 'none'; object-src 'none'"
)
SAID = {"left": "A is better", "right": "B is better", "tie": "a tie", "bad": "a bad pair"}
SYSTEM_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Liberation Sans", "sans-serif"]
SYSTEM_MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "DejaVu Sans Mono", "monospace"]

_turns = itertools.count(1)


# ---- what is shown


def plain(text: str) -> str:
    """Text escaped for HTML and for gradio's templates."""
    return "".join(f"&#{ord(c)};" if c in "{}$@`\\" else c for c in html.escape(text))


def show(view: View, annotator: str, notice: str = "", is_error: bool = False) -> str:
    """HTML above the buttons; ``data-key`` names the pair, ``data-turn`` numbers each time it is shown."""
    task = view.task
    body = _done(view) if task is None else _task(task)
    kind = "notice error" if is_error else "notice"
    return (
        f'<div class="tso" data-turn="{next(_turns)}" data-key="{task.key if task else ""}">'
        f'{_progress(view, annotator)}{body}<div class="{kind}" role="status">{plain(notice)}</div></div>'
    )


def _progress(view: View, annotator: str) -> str:
    share = view.labelled / view.total if view.total else 1.0
    yours = (
        f"<b>{view.own}</b> by {plain(annotator)}" if view.own != view.labelled or view.people > 1 else plain(annotator)
    )
    return (
        f'<div class="progress"><span id="count"><b>{view.labelled}</b> / {view.total} labelled</span>'
        f'<span class="track" role="progressbar" aria-valuemin="0" aria-valuemax="{view.total}" '
        f'aria-valuenow="{view.labelled}" aria-label="pairs labelled"><i style="width: {share:.2%}"></i></span>'
        f'<span id="who">{yours}</span></div>'
    )


def _text(text: str) -> str:
    return f'<div class="text">{plain(text)}</div>' if text.strip() else '<div class="text empty">(empty)</div>'


def _task(task: Task) -> str:
    messages = task.candidates.prompt.messages
    if len(messages) == 1 and messages[0].role == "user":
        turns = f"<h2>Prompt</h2>{_text(messages[0].content)}"
    else:
        turns = "".join(
            f'<div class="turn"><h2>{plain(m.role.capitalize())}</h2>{_text(m.content)}</div>' for m in messages
        )
    cards = "".join(
        f'<article class="card" id="{side}-response"><h2><span>{letter}</span>Response</h2>'
        f"{_text(task.candidates.responses[i].text)}</article>"
        for side, letter, i in zip(("left", "right"), "AB", task.shown, strict=True)
    )
    return f'<section class="card prompt">{turns}</section><section class="pair">{cards}</section>'


def _done(view: View) -> str:
    what = (
        "There is no pair of different responses to label."
        if not view.total
        else f"{view.labelled} of {view.total} pairs have a label, {view.own} of them yours."
    )
    return f'<section class="card done"><h1>Nothing is left for you</h1><p>{what} Thank you.</p></section>'


def below(view: View | None) -> str:
    """HTML below the buttons: keys, and the agreement so far, which is hidden until the annotator has labelled a pair
    so that it cannot influence them."""
    keys = (
        '<span class="keys"><kbd>A</kbd> <kbd>1</kbd> <kbd>←</kbd> &nbsp; <kbd>B</kbd> <kbd>2</kbd> <kbd>→</kbd> '
        "&nbsp; tie <kbd>T</kbd> <kbd>0</kbd> &nbsp; bad <kbd>X</kbd> &nbsp; undo <kbd>U</kbd> <kbd>⌫</kbd></span>"
    )
    rows = (
        ""
        if view is None
        else "".join(
            f"<tr><td>{name}</td><td>{found.raw:.0%} equal</td>"
            f"<td>α {'–' if found.alpha is None else f'{found.alpha:.2f}'}</td><td>{found.pairs} pairs</td></tr>"
            for name, found in _agreements(view)
            if found is not None
        )
    )
    agreement = (
        f"<details id='agreement'><summary>Agreement so far</summary><table>{rows}</table></details>" if rows else ""
    )
    return f'<div class="below">{agreement}{keys}</div>'


def _agreements(view: View) -> list[tuple[str, Agreement | None]]:
    if view.own == 0:
        return []
    return [("Between people", view.among_people), ("You and the judges' majority", view.with_judges)]


# ---- what happens


def build(desk: Desk, annotator: str | None, has_login: bool) -> Any:
    """The gradio application, not yet served. If there is a login, the annotator's name comes from it."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    import gradio as gr

    may_leave = annotator is None and not has_login
    hidden, shown = gr.update(visible=False), gr.update(visible=True)

    def render(name: str, notice: str = "", is_error: bool = False) -> list[Any]:
        view = desk.view(name)
        on = gr.update(interactive=view.task is not None)
        return [
            name,
            hidden,
            shown,
            show(view, name, notice, is_error),
            below(view),
            on,
            on,
            on,
            on,
            gr.update(interactive=view.own > 0),
        ]

    def ask(notice: str = "") -> list[Any]:
        return ["", gr.update(visible=True), hidden, "", notice, *[gr.skip()] * 5]

    def open_page(stored: Any, request: gr.Request) -> list[Any]:
        name = annotator or request.username or (stored if isinstance(stored, str) else "")
        return render(name) if name else ask()

    # gradio finds the request argument by its type, and cannot resolve the name since gradio is imported only here.
    open_page.__annotations__["request"] = gr.Request

    def start(name: str) -> list[Any]:
        name = " ".join(name.split())
        if not name or len(name) > LONGEST_NAME:
            gr.Warning(f"Please enter a name of 1 to {LONGEST_NAME} characters.")
            return [*ask(), gr.skip()]
        return [*render(name), name]

    def leave() -> list[Any]:
        return [*ask(), ""]

    def choose(choice: str) -> Callable[[str, str], list[Any]]:
        def act(name: str, key: str) -> list[Any]:
            if not name:
                return ask()
            try:
                is_new = desk.label(name, key, choice)
            except OutputError as error:
                return render(name, f"Not saved: {error}", is_error=True)
            return render(
                name,
                f"Saved: {SAID[choice]}. Undo takes it back."
                if is_new
                else "That pair had been answered already; here is the next.",
            )

        return act

    def undo(name: str) -> list[Any]:
        if not name:
            return ask()
        try:
            is_done = desk.undo(name)
        except OutputError as error:
            return render(name, f"Not taken back: {error}", is_error=True)
        return render(name, "Taken back; here is that pair again." if is_done else "There is nothing to take back.")

    with gr.Blocks(title="Which response is better?", analytics_enabled=False) as page:
        name = gr.State("")
        stored = gr.BrowserState("", storage_key="tso-fast-annotator", secret="tso-fast")  # a name is no secret
        key = gr.Textbox(visible=False)
        with gr.Column(visible=False, elem_id="name-form") as form:
            typed = gr.Textbox(
                label="Your name",
                info="It stands with your labels, and brings you back to your place.",
                max_lines=1,
                autofocus=True,
                elem_id="name",
            )
            go = gr.Button("Start", variant="primary", elem_id="start")
        with gr.Column(visible=False, elem_id="work") as work:
            above = gr.HTML(elem_id="desk", padding=False)
            with gr.Row(elem_id="choices"):
                left = gr.Button("A is better", variant="primary", elem_id="left-button")
                tie = gr.Button("Tie", elem_id="tie-button")
                bad = gr.Button("Bad pair", elem_id="bad-button")
                take_back = gr.Button("Undo", elem_id="undo-button")
                right = gr.Button("B is better", variant="primary", elem_id="right-button")
            under = gr.HTML(elem_id="under", padding=False)
            if may_leave:
                away = gr.Button("Another name", elem_id="leave", size="sm")
        outputs = [name, form, work, above, under, left, tie, bad, right, take_back]
        direct: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        page.load(open_page, stored, outputs, **direct)
        gr.on([typed.submit, go.click], start, typed, [*outputs, stored], **direct)
        if may_leave:
            away.click(leave, None, [*outputs, stored], **direct)
        # The page sends the key of the pair it shows, since the server's current pair may be another by now.
        shown_key = "(name) => [name, document.querySelector('[data-turn]')?.dataset.key ?? '']"
        for choice, button in (("left", left), ("tie", tie), ("bad", bad), ("right", right)):
            button.click(choose(choice), [name, key], outputs, js=shown_key, **direct)
        take_back.click(undo, name, outputs, **direct)
    return page


# ---- serving


def serve(
    desk: Desk, annotator: str | None, host: str, port: int, password: str | None, public_name: str | None = None
) -> None:
    """Serves the page until it is interrupted.

    Args:
        public_name: another name under which the page is reached, see ``guard.Guard``.

    Raises:
        InputError: gradio is missing, or the host and port cannot be listened on.
    """
    with _listen(host, port) as listening:
        try:
            import fastapi
            import gradio as gr
            import uvicorn
        except ImportError as error:
            raise InputError(
                f"annotate: the page needs gradio, which cannot be imported ({error}): pip install 'tso-fast[annotate]'"
            ) from error
        address = listening.getsockname()[:2]
        app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        page = build(desk, annotator, has_login=password is not None)
        login = None if password is None else Password(password)
        gr.mount_gradio_app(
            app,
            page,
            path="/",
            server_name=address[0],
            server_port=address[1],
            ssr_mode=False,
            auth=None if login is None else lambda name, given: _is_let_in(name, given, login),
            pwa=False,
            auth_message="Your name, which stands with your labels, and the password.",
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            max_file_size="1kb",
            mcp_server=False,
            show_error=False,
            theme=gr.themes.Default(primary_hue="blue", neutral_hue="gray", font=SYSTEM_FONTS, font_mono=SYSTEM_MONO),
            # Not css=...: gradio would prefix every selector with its own class.
            head="".join(
                f"<{tag}>{(HERE / name).read_text(encoding='utf-8')}</{tag}>"
                for tag, name in (("style", "page.css"), ("script", "page.js"))
            ),
        )
        guarded = Guard(_with_policy(app), host, address[1], public_name, has_token=password is None)
        shown_host = f"[{host}]" if ":" in host else host
        token = "" if guarded.token is None else f"?token={guarded.token}"
        for line in (
            f"labels go to {desk.labels.path}",
            f"open http://{shown_host}:{address[1]}/{token} - stop with Ctrl-C; every label is on disk",
        ):
            console.print(line, soft_wrap=True)
        server = uvicorn.Server(uvicorn.Config(guarded, log_level="critical", timeout_graceful_shutdown=1))
        server.run(sockets=[listening])


def _is_let_in(name: str, given: str, password: Password) -> bool:
    return 0 < len(name) <= LONGEST_NAME and password.is_right(given)


def _listen(host: str, port: int) -> socket.socket:
    listening = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except OSError as error:
        if listening is not None:
            listening.close()
        raise InputError(
            f"port: cannot listen on {host}:{port}: {error.strerror or error}; give another --port, or 0 for a free one"
        ) from error
    return listening


def _with_policy(app: Any) -> Any:
    """The application with POLICY on each of its responses: the page talks to this server only."""
    headers = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]

    async def outer(scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        async def add(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *headers]}
            await send(message)

        await app(scope, receive, add)

    return outer
