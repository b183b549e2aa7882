"""Who may talk to the annotation page: no other site, no other user of the machine, nobody who guesses."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tso_fast.annotate.guard import MOST_WRONG, WINDOW_S, Guard, Password


async def inside(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"the page"})


def make(**changes: Any) -> Guard:
    options = {"host": "127.0.0.1", "port": 7860, "public_name": None, "has_token": False, **changes}
    return Guard(inside, **options)


def ask(guard: Guard, query: str = "", kind: str = "http", **headers: str) -> tuple[int | str, dict[str, str]]:
    """Status and headers of an answer; of a websocket that is refused its message's type."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": kind,
        "path": "/",
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    asyncio.run(guard(scope, None, send))
    first = sent[0]
    return first.get("status", first["type"]), {k.decode(): v.decode() for k, v in first.get("headers", [])}


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:7860", 200),
        ("localhost:7860", 200),
        ("LOCALHOST", 200),
        ("[::1]:7860", 200),
        ("192.168.1.5:7860", 200),  # nobody can point an address elsewhere
        ("labels.example", 200),
        ("evil.example", 403),  # a name that its owner points to 127.0.0.1
        ("localhost.evil.example:7860", 403),
        ("[::1", 403),
        ("", 403),
    ],
)
def test_only_names_of_its_own(host: str, status: int) -> None:
    assert ask(make(public_name="labels.example"), host=host)[0] == status
    if status == 403:
        assert ask(make(), kind="websocket", host=host)[0] == "websocket.close"


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:7860", 200),
        ("https://localhost:7860", 200),  # behind a proxy
        ("http://evil.example", 403),
        ("http://localhost:9999", 403),  # another server of the same machine
        ("null", 403),
    ],
)
def test_only_requests_of_its_own_page(origin: str, status: int) -> None:
    assert ask(make(), host="localhost:7860", origin=origin)[0] == status


def test_the_token_of_the_address_becomes_a_cookie() -> None:
    guard = make(has_token=True)
    host = {"host": "localhost:7860"}
    assert ask(guard, **host)[0] == 403
    assert ask(guard, "token=wrong", **host)[0] == 403
    assert ask(guard, cookie="tso_fast_token_7860=wrong", **host)[0] == 403
    status, headers = ask(guard, f"token={guard.token}", **host)
    assert (status, headers["location"]) == (303, "/")  # the token leaves the address
    cookie, *flags = headers["set-cookie"].split("; ")
    assert {"HttpOnly", "SameSite=Strict"} <= set(flags)
    assert ask(guard, cookie=f"other=1; {cookie}", **host)[0] == 200
    assert ask(make(has_token=True), cookie=cookie, **host)[0] == 403  # of another server
    assert ask(guard, cookie=cookie, host="evil.example")[0] == 403


def test_a_password_cannot_be_guessed_at_will() -> None:
    now = [0.0]
    password = Password("open sesame", clock=lambda: now[0])
    assert password.is_right("open sesame")
    assert [password.is_right(f"guess {k}") for k in range(MOST_WRONG)] == [False] * MOST_WRONG
    assert not password.is_right("open sesame")
    now[0] = WINDOW_S + 1
    assert password.is_right("open sesame")
    assert not password.is_right("pässwort")
