"""Which pages may use the pack's routes, without a server."""

from __future__ import annotations

import socket

import pytest

from comfy_integration.callers import check_caller
from mesh_core.errors import NotAuthorised

NAMED = ("draw.example", ".proxy.example")


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "127.0.0.1:8188"},
        {"Host": "127.0.0.1:8188", "Origin": "http://127.0.0.1:8188", "Sec-Fetch-Site": "same-origin"},
        {"Host": "localhost:8188", "Origin": "http://localhost:8188"},
        {"Host": "LOCALHOST.:8188", "Origin": "http://localhost:8188"},
        {"Host": "192.168.1.20:8188", "Origin": "http://192.168.1.20:8188"},
        {"Host": "[fd00::1]:8188", "Origin": "http://[fd00::1]:8188"},
        {"Host": "studio:8188", "Origin": "http://studio:8188"},
        {"Host": "studio.local", "Origin": "https://studio.local"},
        {"Host": "127.0.0.1:8188", "Origin": "http://127.0.0.1"},
        {"Host": "draw.example", "Origin": "https://draw.example"},
        {"Host": "127.0.0.1:8188", "Origin": "https://draw.example", "Sec-Fetch-Site": "cross-site"},
        {"Host": "x7-8188.proxy.example", "Origin": "https://x7-8188.proxy.example"},
        {"Host": f"{socket.gethostname()}:8188"},
    ],
)
def test_the_users_own_page(headers: dict[str, str]) -> None:
    check_caller(headers, NAMED)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Host": ""},
        {"Host": "evil.example:8188"},
        {"Host": "evil.example:8188", "Origin": "http://evil.example:8188"},
        {"Host": "evildraw.example", "Origin": "http://evildraw.example"},
        {"Host": "proxy.example"},
        {"Host": "draw.example.evil.example"},
        {"Host": "127.0.0.1.evil.example:8188"},
        {"Host": "localhost.evil.example"},
        {"Host": "127.0.0.1:8188@evil.example"},
        {"Host": "127.0.0.1:99999"},
        {"Host": "[::1"},
        {"Host": "127.0.0.1:8188", "Origin": "http://evil.example"},
        {"Host": "127.0.0.1:8188", "Origin": "http://127.0.0.1:5173"},
        {"Host": "127.0.0.1:8188", "Origin": "http://localhost:8188"},
        {"Host": "127.0.0.1:8188", "Origin": "null"},
        {"Host": "127.0.0.1:8188", "Origin": ""},
        {"Host": "127.0.0.1:8188", "Sec-Fetch-Site": "cross-site"},
        {"Host": "draw.example", "Origin": "https://evil.example"},
        {"Host": "evil.example\x1b[2J\r\nx", "Origin": "http://evil.example"},
    ],
)
def test_pages_of_others(headers: dict[str, str]) -> None:
    with pytest.raises(NotAuthorised) as caught:
        check_caller(headers, NAMED)
    assert "[comfy] in config.toml" in caught.value.hint
    assert (caught.value.message + caught.value.hint).isprintable()
