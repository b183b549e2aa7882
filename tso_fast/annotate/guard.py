"""Who may talk to the page: requests from this page alone, by people who have its address or the password.

A web page elsewhere can make its reader's browser send requests to this server: across sites, or under a name that it
points here (DNS rebinding). So a request must name this server as its host, and as its origin where it has one.
Without a password it must also carry the token of the printed address, as with Jupyter: other users of the machine
reach the port.
"""

from __future__ import annotations

import hmac
import http.cookies
import ipaddress
import secrets
import socket
import time
import urllib.parse
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

MOST_WRONG, WINDOW_S = 20, 60.0
"""Wrong passwords after which all are refused, until fewer were given in the window before."""


class Guard:
    """An ASGI application that passes on what may reach the application inside.

    Args:
        host: what is listened on.
        public_name: another name under which the page is reached, such as that of a proxy.
        has_token: whether the token is asked for.
    """

    def __init__(self, app: Any, host: str, port: int, public_name: str | None, has_token: bool) -> None:
        self.app = app
        self.names = {name.lower() for name in ("localhost", host, socket.gethostname(), public_name or "") if name}
        self.cookie = f"tso_fast_token_{port}"
        self.token = secrets.token_urlsafe(24) if has_token else None

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        query = dict(urllib.parse.parse_qsl(scope.get("query_string", b"").decode("latin-1")))
        if (reason := self._refusal(headers)) is not None:
            await _answer(scope, send, 403, reason)
        elif self._is_token(query.get("token", "")):
            cookie = f"{self.cookie}={self.token}; Path=/; HttpOnly; SameSite=Strict"
            await _answer(scope, send, 303, "", {"location": scope["path"], "set-cookie": cookie})
        elif self.token is not None and not self._is_token(self._cookie_of(headers)):
            await _answer(scope, send, 403, "Open the address that `tso-fast annotate` printed; it ends with a token.")
        else:
            await self.app(scope, receive, send)

    def _refusal(self, headers: Mapping[str, str]) -> str | None:
        """Why the headers are not those of a request from this page; None: they are."""
        host = headers.get("host", "")
        if not self._is_own(host):
            return f"This server is not called {host!r}. If it is, say so: --public_name."
        origin = headers.get("origin")
        if origin is not None and urllib.parse.urlsplit(origin).netloc.lower() != host.lower():
            return "Requests from other sites are refused."
        return None

    def _is_own(self, host: str) -> bool:
        """Whether a Host header names this server; addresses are nobody's to point elsewhere."""
        try:
            name = (urllib.parse.urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self.names
        return True

    def _cookie_of(self, headers: Mapping[str, str]) -> str:
        try:
            found = http.cookies.SimpleCookie(headers.get("cookie", "")).get(self.cookie)
        except http.cookies.CookieError:
            return ""
        return "" if found is None else found.value

    def _is_token(self, given: str) -> bool:
        return self.token is not None and hmac.compare_digest(given.encode(), self.token.encode())


async def _answer(
    scope: Any, send: Callable[[Any], Awaitable[None]], status: int, text: str, headers: Mapping[str, str] | None = None
) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    sent = {"content-type": "text/plain; charset=utf-8", **(headers or {})}
    lines = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in sent.items()]
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": text.encode()})


class Password:
    """A password that cannot be tried at will: ``MOST_WRONG`` wrong ones in a minute close the door for a while."""

    def __init__(self, password: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._password, self._clock = password, clock
        self._wrong: deque[float] = deque()

    def is_right(self, given: str) -> bool:
        now = self._clock()
        while self._wrong and now - self._wrong[0] > WINDOW_S:
            self._wrong.popleft()
        if len(self._wrong) >= MOST_WRONG:
            return False
        if hmac.compare_digest(given.encode(), self._password.encode()):
            return True
        self._wrong.append(now)
        return False
