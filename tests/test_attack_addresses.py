"""Addresses and paths in a request, sent through the whole server: nothing private is reached, nothing outside a folder is read."""

import ipaddress
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from media_files import encoded, gradient
from qvl.outside.fetch import Fetcher
from qvl.serve.run import Server
from serve_doubles import body, image, picture, post, refused, running, service, video
from test_fetch import PUBLIC, hostile_urls

pytestmark = pytest.mark.no_shape_hook
TLS = b"\x16\x03"
"""How a handshake begins."""
REDIRECTS = [
    *("http://169.254.169.254/latest/meta-data", "http://[::ffff:169.254.169.254]/", "http://2852039166/", "http://localhost/"),
    *("//127.0.0.1/", "\\\\127.0.0.1\\", "http://example.org\\@127.0.0.1/", "http://example.org@127.0.0.1/", "file:///etc/passwd"),
    *("gopher://127.0.0.1/_x", "data:image/png;base64,AAAA", "http://inside.example.org/", "http://127.0.0.1:6379/", "/to/itself"),
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[Server]:
    with running(tiny_folder) as server:
        yield server


class Internet:
    """Names resolve as a system would resolve them, and every connection ends at a listener on loopback that writes down who came:
    `public` for the one address of example.org, `private` for any other."""

    def __init__(self) -> None:
        self.came: dict[str, list[bytes]] = {"public": [], "private": []}
        self.listeners = {name: socket.create_server(("127.0.0.1", 0)) for name in self.came}
        self.location = "/"
        self.turns: list[str] = []
        """What rebound.example.org resolves to, call after call."""
        for name in self.came:
            threading.Thread(target=self._answer, args=(name,), daemon=True).start()

    def close(self) -> None:
        for listener in self.listeners.values():
            listener.close()

    def resolve(self, host: str, port: int) -> list[str]:
        if host == "rebound.example.org":
            return [self.turns.pop(0)]
        if host == "example.org":
            return [PUBLIC]
        for read in (lambda: str(ipaddress.ip_address(host)), lambda: socket.inet_ntoa(socket.inet_aton(host))):
            try:
                return [read()]
            except (ValueError, OSError):
                continue
        return ["127.0.0.1"]

    def connect(self, address: tuple[str, int], seconds: float) -> socket.socket:
        name = "public" if address[0] == PUBLIC else "private"
        return socket.create_connection(self.listeners[name].getsockname(), seconds)

    def _answer(self, name: str) -> None:
        while True:
            try:
                wire, _ = self.listeners[name].accept()
            except OSError:
                return
            with wire:
                self.came[name].append(wire.recv(65536))
                wire.sendall(f"HTTP/1.1 302 Found\r\nLocation: {self.location}\r\nContent-Length: 0\r\n\r\n".encode())


@pytest.fixture
def internet(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Internet]:
    """Everything is allowed that can be: any host, plain http, no file."""
    net = Internet()
    kitchen = service(server).cook.kitchen
    monkeypatch.setattr(kitchen, "allows_addresses", True)
    fetcher = Fetcher(allow_domains=("*",), allow_http=True, resolve=net.resolve, connect=net.connect, seconds=5.0)
    monkeypatch.setattr(kitchen, "fetcher", fetcher)
    yield net
    net.close()


def ask(server: Server, url: str, part: Any = image) -> str:
    reply = post(server, {"messages": body(part(url))["messages"]}, "/tokenize")
    assert reply.status_code == 400, (url, reply.text)
    return refused(reply, reply.status_code)


def test_no_address_of_the_corpus_reaches_a_private_listener(server: Server, internet: Internet) -> None:
    urls = [url for url in hostile_urls() if "\0" not in url]
    assert len(urls) >= 150
    slowest = 0.0
    for number, url in enumerate(urls):
        start = time.monotonic()
        ask(server, url, video if number % 8 == 0 else image)
        slowest = max(slowest, time.monotonic() - start)
    print(
        f"\n{len(urls)} addresses, {len(internet.came['private'])} private connections, slowest {slowest * 1000:.0f} ms"
    )
    assert internet.came["private"] == []
    # What is left of the corpus once it is read right: example.org itself, which is public and redirects to itself.
    plain = [head for head in internet.came["public"] if not head.startswith(TLS)]
    assert all(head.startswith(b"GET /") and b"\r\nHost: example.org" in head for head in plain)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_reaches_a_private_listener(server: Server, internet: Internet, status: int) -> None:
    for target in REDIRECTS:
        internet.location = target
        ask(server, "http://example.org/start")
    assert internet.came["private"] == [] and len(internet.came["public"]) >= len(REDIRECTS)


def test_a_name_that_turns_private_between_two_looks_is_never_connected_to(server: Server, internet: Internet) -> None:
    """Rebinding: public at the check, private at the connection, and the other way round; also from hop to hop."""
    internet.location = "http://rebound.example.org/again"
    for turns in ([PUBLIC, "127.0.0.1"], ["127.0.0.1", PUBLIC], [PUBLIC, PUBLIC, "169.254.169.254"], ["10.0.0.1"]):
        internet.turns = [*turns, "127.0.0.1", "127.0.0.1"]
        ask(server, "http://rebound.example.org/a")
    assert internet.came["private"] == [] and len(internet.came["public"]) == 3


def test_with_nothing_allowed_no_name_is_even_resolved(
    server: Server, internet: Internet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service(server).cook.kitchen, "allows_addresses", False)
    monkeypatch.setattr(service(server).cook.kitchen.fetcher, "_resolve", lambda host, port: pytest.fail("resolved"))
    for url in hostile_urls()[::4]:
        ask(server, url.replace("\0", ""))
    assert internet.came == {"public": [], "private": []}


# ---- files


@pytest.fixture
def allowed(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """allowed/a.png is one colour, every file outside has another size."""
    folder = tmp_path / "allowed"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.png").write_bytes(encoded(gradient(64, 96), "PNG"))
    (folder / "sub" / "a.png").write_bytes(encoded(gradient(64, 96), "PNG"))
    (tmp_path / "secret.png").write_bytes(SECRET)
    kitchen = service(server).cook.kitchen
    monkeypatch.setattr(kitchen, "allows_files", True)
    monkeypatch.setattr(kitchen, "fetcher", Fetcher(allow_folders=(folder,)))
    return folder


SECRET = encoded(gradient(128, 128), "PNG")
"""16 tokens; a.png has 6."""


def tokens(server: Server, path: str) -> int | None:
    """Of the picture at the path; None where it is refused."""
    reply = post(server, {"messages": body(image(path))["messages"]}, "/tokenize")
    if reply.status_code == 200:
        return reply.json()["media"][0]["tokens"]
    refused(reply, 400)
    return None


def test_no_path_leads_out_of_an_allowed_folder(server: Server, allowed: Path) -> None:
    above = allowed.parent
    (allowed / "link.png").symlink_to(above / "secret.png")
    (allowed / "out").symlink_to(above)
    os.link(above / "secret.png", allowed / "hard.png")
    os.mkfifo(allowed / "pipe.png")
    assert tokens(server, f"{allowed}/a.png") == tokens(server, f"file://{allowed}/sub/a.png") == 6
    names = [
        *("../secret.png", "sub/../../secret.png", "./../secret.png", "..//secret.png", "sub/..", "link.png", "out/secret.png"),
        *("hard.png", "pipe.png", "sub", "", ".", "A.png", "a.PNG", "a.png/", "a.png/.", "a.png%00.png", "%2e%2e/secret.png"),
        *("..%2fsecret.png", "sub/%2e%2e/%2e%2e/secret.png", "a.png\n", " a.png", "a.png?x", "a.png#x"),
    ]  # fmt: skip
    paths = [f"{scheme}{folder}/{name}" for name in names for folder in (allowed,) for scheme in ("", "file://")]
    paths += [
        str(above / "secret.png"),
        f"{str(allowed).upper()}/a.png",
        f"{allowed}2/a.png",
        f"//{allowed}/../secret.png",
    ]
    paths += [
        "/proc/self/environ",
        "/proc/self/fd/0",
        "/proc/self/root" + str(above / "secret.png"),
        "/dev/zero",
        "/etc/passwd",
    ]
    paths += [
        f"file://localhost{above}/secret.png",
        f"file://evil.example{allowed}/a.png",
        f"FILE://{above}/secret.png",
    ]
    read = {path: tokens(server, path) for path in paths}
    assert {path: count for path, count in read.items() if count not in (None, 6)} == {}
    # Spellings of the one allowed file itself.
    assert {path.removeprefix("file://") for path, count in read.items() if count == 6} <= {
        f"{allowed}/a.png/",
        f"{allowed}/a.png/.",
    }


@pytest.mark.parametrize("rounds", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_file_swapped_while_it_is_looked_at_leads_nowhere(server: Server, allowed: Path, rounds: int) -> None:
    """The file, and then the folder above it, become a link to the secret and back, without a pause."""
    secret, stop = allowed.parent / "secret.png", threading.Event()
    (allowed.parent / "a.png").write_bytes(SECRET)

    def swap() -> None:
        while not stop.is_set():
            for name, target in ((allowed / "a.png", secret), (allowed / "sub", allowed.parent)):
                away = name.with_name("away")
                os.rename(name, away)
                os.symlink(target, name)
                os.unlink(name)
                os.rename(away, name)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        read = {tokens(server, f"{allowed}/{('a.png', 'sub/a.png')[i % 2]}") for i in range(rounds)}
    finally:
        stop.set()
        thread.join()
    assert read <= {None, 6}


def test_a_data_uri_is_the_way_that_stays(server: Server, internet: Internet) -> None:
    assert post(server, body(image(picture()))).status_code == 200
    assert internet.came == {"public": [], "private": []}
