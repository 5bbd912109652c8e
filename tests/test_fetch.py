"""Fetching: nothing unless allowed, never a private address, never outside a folder, never more bytes or time than said."""

import base64
import io
import ipaddress
import os
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qvl.outside.fetch import Fetcher, is_public
from qvl.outside.files import open_data_uri

PUBLIC = "93.184.216.34"
Handler = Callable[[bytes, socket.socket], None]


@contextmanager
def server(handler: Handler, tls: ssl.SSLContext | None = None) -> Iterator[int]:
    """A listener on this machine that hands each request's head to the handler; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    wire, _ = listener.accept()
                    if tls:
                        wire = tls.wrap_socket(wire, server_side=True)
                    with wire:
                        head = b""
                        while b"\r\n\r\n" not in head and (more := wire.recv(65536)):
                            head += more
                        handler(head, wire)
                except OSError:
                    if listener.fileno() < 0:
                        return

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]


def says(text: str, body: bytes = b"") -> Handler:
    def handler(head: bytes, wire: socket.socket) -> None:
        del head
        wire.sendall(text.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)

    return handler


def to(port: int, seen: list[Any] | None = None) -> Any:
    """Connects wherever it is told, but really to our listener."""

    def connect(address: tuple[str, int], seconds: float) -> socket.socket:
        if seen is not None:
            seen.append(address)
        return socket.create_connection(("127.0.0.1", port), seconds)

    return connect


def fetcher(port: int = 1, seen: list[Any] | None = None, resolve: Any = None, **changes: Any) -> Fetcher:
    options = {"allow_domains": ("example.org",), "allow_http": True, "seconds": 5.0} | changes
    return Fetcher(resolve=resolve or (lambda host, port: [PUBLIC]), connect=to(port, seen), **options)


# Allowed.


@pytest.mark.parametrize(
    "entry", ["https://cdn.example.org", "example.org/a", "example.org:https", "", "*.", "a b", "example.org:"]
)
def test_a_domain_that_could_never_match_is_refused_at_once(entry: str) -> None:
    with pytest.raises(ValueError, match=r"is no domain that can be allowed; write a host name such as cdn\.example"):
        Fetcher(allow_domains=("good.example.org", entry))


def test_nothing_is_reachable_unless_allowed(tmp_path: Path) -> None:
    closed = Fetcher(resolve=lambda host, port: pytest.fail("resolved"), connect=lambda *_: pytest.fail("connected"))
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"fetching from example.org is not allowed \(none is\)"):
        closed.open("https://example.org/a.png")
    with pytest.raises(ValueError, match="not below an allowed folder"):
        closed.open(str(tmp_path / "a.png"))


def test_a_file_comes_from_an_allowed_domain_at_the_address_that_was_checked() -> None:
    heads: list[bytes] = []
    seen: list[Any] = []
    answer = says("HTTP/1.1 200 OK\nContent-Length: 5", b"hello")

    def handler(head: bytes, wire: socket.socket) -> None:
        heads.append(head)
        answer(head, wire)

    with server(handler) as port, fetcher(port, seen).open("http://example.org/a%20b.png?size=1") as file:
        assert file.read() == b"hello"
    assert seen == [(PUBLIC, 80)]
    assert heads[0].startswith(b"GET /a%20b.png?size=1 HTTP/1.1\r\nHost: example.org\r\n")


def test_https_checks_the_certificate_against_the_name(tmp_path: Path) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subject = ["-subj", "/CN=example.org", "-addext", "subjectAltName=DNS:example.org"]
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-keyout",
        key,
        "-out",
        cert,
        *subject,
    ]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("the openssl command is needed to make a certificate")
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(cert, key)
    trusting = ssl.create_default_context(cafile=str(cert))
    with server(says("HTTP/1.1 200 OK\nContent-Length: 5", b"hello"), ours) as port:
        assert fetcher(port, tls=trusting, allow_http=False).open("https://example.org/").read() == b"hello"
        with pytest.raises(ValueError, match=r"certificate of example\.org is not valid"):
            fetcher(port).open("https://example.org/")
        with pytest.raises(ValueError, match=r"certificate of other\.org is not valid"):
            fetcher(port, tls=trusting, allow_domains=("other.org",)).open("https://other.org/")


@pytest.mark.parametrize(
    "allowed, host, answer",
    [
        ("example.org", "example.org", True),
        ("example.org", "www.example.org", False),
        ("example.org", "badexample.org", False),
        ("example.org", "example.org.evil.net", False),
        ("*.example.org", "img.example.org", True),
        ("*.example.org", "example.org", False),
        ("*.example.org", "badexample.org", False),
        ("EXAMPLE.org", "Example.ORG", True),
        ("*", "anything.net", True),
        ("example.org:8080", "example.org:8080", True),
        ("example.org:8080", "example.org", False),
        ("example.org", "example.org:8080", False),
        ("*", "example.org:22", False),
    ],
)
def test_domains_are_allowed_by_name_and_port(allowed: str, host: str, answer: bool) -> None:
    with server(says("HTTP/1.1 200 OK\nContent-Length: 2", b"ok")) as port:
        client = fetcher(port, allow_domains=(allowed,))
        if answer:
            assert client.open(f"http://{host}/a").read() == b"ok"
        else:
            with pytest.raises(ValueError, match="is not allowed"):
                client.open(f"http://{host}/a")


def test_plain_http_needs_permission() -> None:
    with pytest.raises(ValueError, match="plain http is not allowed; use https"):
        fetcher(allow_http=False).open("http://example.org/a")


# Not to be fooled.

INSIDE = [
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1",
    "169.254.169.254", "100.64.0.1", "100.100.100.200", "192.0.0.1", "192.0.2.1", "198.18.0.1", "203.0.113.1",
    "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0",
    "fc00::1", "fd00:ec2::254", "ff02::1", "2001:db8::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
    "::ffff:169.254.169.254", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::",
    "2002:a9fe:a9fe::", "64:ff9b:1::1", "2001:0:7f00:1::", "100::1", "fec0::1", "", "localhost",
    "not an address",
]  # fmt: skip


@pytest.mark.parametrize("address", INSIDE)
def test_addresses_inside_are_known(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", [PUBLIC, "1.1.1.1", "8.8.8.8", "2606:4700:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"]
)
def test_addresses_outside_are_known(address: str) -> None:
    assert is_public(address)


def hostile_urls() -> list[str]:
    """Spellings that some parser somewhere reads as an inside host."""
    hosts = [
        "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001", "127.1", "127.0.1", "0", "0x0",
        "127.0.0.1.", "localhost", "localhost.", "LOCALHOST", "localhost.localdomain", "ip6-localhost", "[::1]",
        "[::]", "[::ffff:127.0.0.1]", "[0:0:0:0:0:ffff:7f00:1]", "[fe80::1%25eth0]", "①②⑦.⓪.⓪.①", "127。0。0。1",
        "ｌｏｃａｌｈｏｓｔ", "example.org@127.0.0.1", "127.0.0.1\\@example.org", "example.org\\@127.0.0.1",  # noqa: RUF001
        "example.org%2f@127.0.0.1", "127.0.0.1%23.example.org", "127.0.0.1#.example.org", "127.0.0.1?.example.org",
        "127.0.0.1/.example.org", "example.org:80@127.0.0.1", "user:pass@example.org", "@127.0.0.1",
        "example.org%00.127.0.0.1", "exa\tmple.org", "exa mple.org", "example.org\r\nHost: 127.0.0.1",
        "example.org%0d%0aHost:127.0.0.1", "example..org", ".example.org", "-example.org", "example.org.",
        "exämple.org", "169.254.169.254", "metadata.google.internal", "127.0.0.1:80:80", "example.org:99999",
        "example.org:-1", "example.org:0x50", "example.org:", "[example.org]", "ex_ample.org",
        "example.org;127.0.0.1", "example.org,127.0.0.1", "",
    ] + [f"[{a}]" if ":" in a else a for a in INSIDE if a and a[0] in "0123456789:f" and "%" not in a]  # fmt: skip
    urls = [f"{scheme}://{host}/latest/meta-data" for host in hosts for scheme in ("http", "https")]
    urls += [
        "http:/127.0.0.1/",
        "http:127.0.0.1",
        "//127.0.0.1/",
        "http:\\\\127.0.0.1\\",
        "\\\\127.0.0.1\\share",
        "file://127.0.0.1/etc/passwd",
    ]
    urls += [
        f"{scheme}://example.org/a"
        for scheme in ("ftp", "gopher", "dict", "ldap", "jar", "unix", "ws", "blob", "javascript", "hTTp+unix")
    ]
    urls += [
        "http://",
        "http:///etc/passwd",
        "://example.org",
        " http://example.org/",
        "http://example.org/\n",
        "http://example.org/ a",
        "\0http://a",
    ]
    return urls


def test_no_spelling_leads_inside() -> None:
    urls = hostile_urls()
    assert len(urls) >= 150
    seen: list[Any] = []

    def resolve(host: str, port: int) -> list[str]:
        # As the system would: numbers in any notation, and names of this machine, lead inside; example.org is a real site.
        if host == "example.org":
            return [PUBLIC]
        try:
            return [str(ipaddress.ip_address(host))]
        except ValueError:
            pass
        try:
            return [socket.inet_ntoa(socket.inet_aton(host))]
        except OSError:
            return ["127.0.0.1"]

    for allowed in (("*",), ("example.org",)):
        client = fetcher(1, seen, resolve, allow_domains=allowed, allow_folders=())
        for url in urls:
            try:
                client.open(url)
            except ValueError as error:
                assert "\n" not in str(error), url
            else:
                raise AssertionError(f"{url!r} was opened")
    assert {address for address, _ in seen} <= {PUBLIC}


def test_a_name_with_one_inside_address_is_refused() -> None:
    client = fetcher(resolve=lambda host, port: [PUBLIC, "10.0.0.1"])
    with pytest.raises(ValueError, match=r"example\.org is not on the public internet"):
        client.open("http://example.org/")


def test_a_name_is_resolved_once_so_that_it_cannot_change_between_check_and_connection() -> None:
    answers = iter([[PUBLIC], ["127.0.0.1"]])
    seen: list[Any] = []
    with server(says("HTTP/1.1 200 OK\nContent-Length: 2", b"ok")) as port:
        assert fetcher(port, seen, lambda host, port: next(answers)).open("http://example.org/").read() == b"ok"
    assert seen == [(PUBLIC, 80)] and next(answers) == ["127.0.0.1"]


@pytest.mark.parametrize(
    "target, sentence",
    [
        ("http://169.254.169.254/latest", "not allowed"),
        ("http://inside.example.org/", "not on the public internet"),
        ("http://other.org/", "not allowed"),
        ("//127.0.0.1/", "not allowed"),
        ("file:///etc/passwd", "not a plain http"),
        ("gopher://example.org/", "not a plain http"),
        ("http://example.org\\@127.0.0.1/", "not a plain http"),
        ("/again", "redirects more than 3 times"),
    ],
)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_every_redirect_is_checked_like_a_first_address(target: str, sentence: str, status: int) -> None:
    def resolve(host: str, port: int) -> list[str]:
        return ["10.0.0.1"] if host == "inside.example.org" else [PUBLIC]

    with server(says(f"HTTP/1.1 {status} Go\nLocation: {target}\nContent-Length: 0")) as port:
        client = fetcher(port, resolve=resolve, allow_domains=("example.org", "*.example.org"))
        with pytest.raises(ValueError, match=sentence):
            client.open("http://example.org/start")


def test_a_redirect_within_the_rules_is_followed() -> None:
    def handler(head: bytes, wire: socket.socket) -> None:
        answer = "302 Found\nLocation: /there\nContent-Length: 0" if b"/start" in head else "200 OK\nContent-Length: 5"
        says(f"HTTP/1.1 {answer}", b"" if b"/start" in head else b"there")(head, wire)

    with server(handler) as port:
        assert fetcher(port).open("http://example.org/start").read() == b"there"


# Bytes and time.


@pytest.mark.parametrize(
    "text, body, sentence",
    [
        ("HTTP/1.1 200 OK\nContent-Length: 5000000000", b"", "larger than the 1,000 bytes allowed"),
        ("HTTP/1.1 200 OK", bytes(1001), "larger than the 1,000 bytes allowed"),
        (
            "HTTP/1.1 200 OK\nTransfer-Encoding: chunked",
            b"7d1\r\n" + bytes(2001) + b"\r\n0\r\n\r\n",
            "larger than the 1,000 bytes",
        ),
        ("HTTP/1.1 200 OK\nContent-Length: 100", b"short", "connection to example.org failed"),
        ("HTTP/1.1 200 OK\nContent-Length: nonsense", b"", "connection to example.org failed"),
        ("HTTP/1.1 200 OK\nContent-Encoding: gzip\nContent-Length: 1", b"x", "compressed although it was asked not to"),
        ("HTTP/1.1 404 Not Found\nContent-Length: 0", b"", "answered 404 instead of the file"),
        ("SSH-2.0-OpenSSH", b"", "connection to example.org failed"),
        ("HTTP/1.1 200 OK\n" + "\n".join(f"X-{i}: 1" for i in range(500)), b"", "connection to example.org failed"),
    ],
)
def test_answers_that_are_not_the_file_are_refused(text: str, body: bytes, sentence: str) -> None:
    with server(says(text, body)) as port, pytest.raises(ValueError, match=sentence):
        fetcher(port, max_bytes=1000).open("http://example.org/a")


@pytest.mark.parametrize("where", ["head", "body", "nothing"])
def test_a_server_that_drips_is_cut_off(where: str) -> None:
    def handler(head: bytes, wire: socket.socket) -> None:
        del head
        if where == "body":
            wire.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        elif where == "head":
            wire.sendall(b"HTTP/1.1 200 OK\r\nX: ")
        for _ in range(200):
            time.sleep(0.05)
            if where != "nothing":
                wire.sendall(b"x")

    with server(handler) as port, pytest.raises(ValueError, match=r"took longer than 0\.5 seconds"):
        fetcher(port, seconds=0.5).open("http://example.org/a")


def test_a_name_server_that_hangs_is_cut_off() -> None:
    client = fetcher(resolve=lambda host, port: time.sleep(30) or [PUBLIC], seconds=0.3)
    with pytest.raises(ValueError, match=r"example\.org cannot be found"):
        client.open("http://example.org/a")


# Data URIs.


def test_a_data_uri_is_its_own_bytes() -> None:
    assert Fetcher().open("data:image/png;base64," + base64.b64encode(b"abc").decode()).read() == b"abc"
    assert open_data_uri("DATA:Video/MP4;base64,YWJj", 3).read() == b"abc"


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("data:text/html;base64,YWJj", "must begin with"),
        ("data:image/png,abc", "must begin with"),
        ("data:image/png;base64,YW Jj", "not valid base64"),
        ("data:image/png;base64,YWJ", "not valid base64"),
        ("data:image/png;base64,\u00e4\u00e4\u00e4\u00e4", "not valid base64"),
        ("data:image/png;base64," + "A" * 2000, "more than the 1,000 bytes allowed"),
    ],
)
def test_other_data_uris_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Fetcher(max_bytes=1000).open(text)


# Files.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """allowed/ with a picture and a subfolder; secret.txt beside it; every kind of way out."""
    allowed = tmp_path / "allowed"
    (allowed / "sub").mkdir(parents=True)
    (allowed / "a b.png").write_bytes(b"picture")
    (allowed / "sub" / "c.png").write_bytes(b"deep")
    (allowed / "big.png").write_bytes(bytes(2000))
    (tmp_path / "secret.txt").write_bytes(b"secret")
    (tmp_path / "allowed2").mkdir()
    (tmp_path / "allowed2" / "a.png").write_bytes(b"secret")
    (allowed / "link.png").symlink_to(tmp_path / "secret.txt")
    (allowed / "inner_link.png").symlink_to(allowed / "a b.png")
    (allowed / "out").symlink_to(tmp_path)
    os.link(tmp_path / "secret.txt", allowed / "hard.png")
    os.mkfifo(allowed / "pipe.png")
    return allowed


def test_files_below_an_allowed_folder_are_opened(folder: Path) -> None:
    client = Fetcher(allow_folders=(folder,))
    assert client.open(str(folder / "a b.png")).read() == b"picture"
    assert client.open((folder / "a b.png").as_uri()).read() == b"picture"
    assert client.open("file://localhost" + str(folder / "sub" / "c.png")).read() == b"deep"


@pytest.mark.parametrize(
    "name",
    [
        "../secret.txt", "sub/../../secret.txt", "./../secret.txt", "../allowed2/a.png", "link.png", "inner_link.png", "out/secret.txt",
        "hard.png", "pipe.png", "sub", "", ".", "missing.png", "a b.png/", "a b.png/x", "a b.png\0.txt", "big.png", "%2e%2e/secret.txt",
    ],
)  # fmt: skip
def test_no_way_leads_out_of_the_folder(folder: Path, name: str) -> None:
    client = Fetcher(allow_folders=(folder,), max_bytes=1000)
    for source in (f"{folder}/{name}", f"file://{folder}/{name}"):
        if name == "a b.png/":
            continue
        with pytest.raises(ValueError) as caught:
            client.open(source)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "/proc/self/environ",
        "/dev/zero",
        "etc/passwd",
        "~/.ssh/id_rsa",
        "file:///etc/passwd",
        "/proc/self/fd/0",
    ],
)
def test_other_files_are_refused(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match="not below an allowed folder"):
        Fetcher(allow_folders=(folder,)).open(name)


def test_a_folder_swapped_for_a_link_while_we_look_leads_nowhere(folder: Path) -> None:
    client = Fetcher(allow_folders=(folder,))
    (folder.parent / "c.png").write_bytes(b"secret")
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            os.rename(folder / "sub", folder / "sub_away")
            os.symlink(folder.parent, folder / "sub")
            os.unlink(folder / "sub")
            os.rename(folder / "sub_away", folder / "sub")

    thread = threading.Thread(target=swap)
    thread.start()
    read = []
    for _ in range(500):
        try:
            with client.open(str(folder / "sub" / "c.png")) as file:
                read.append(file.read())
        except ValueError:
            continue
    stop.set()
    thread.join()
    assert set(read) <= {b"deep"}


def test_what_a_fetcher_opens_can_be_decoded() -> None:
    from media_files import encoded, gradient
    from qvl.prompt.image import load_image

    data = encoded(gradient(4, 6), "PNG")
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    assert load_image(Fetcher().open(uri)).shape == (3, 4, 6)
    assert load_image(io.BytesIO(data)).shape == (3, 4, 6)
