"""The one way a name becomes bytes: nothing is reachable until a domain or a folder is allowed."""

import http.client
import ipaddress
import os
import re
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar, cast
from urllib.parse import urljoin, urlsplit

from qvl.outside.files import file_uri_path, open_below, open_data_uri
from qvl.outside.media import MediaError

Resolver = Callable[[str, int], list[str]]
"""A host name and port to IP addresses as text."""

Connector = Callable[[tuple[str, int], float], socket.socket]
"""An (address, port) and a time limit to a connected socket."""

_T = TypeVar("_T")

_URL = re.compile(r"https?://[A-Za-z0-9\-._~:/?\[\]!$&'()*+,;=%]+", re.IGNORECASE)
_HOST = re.compile(r"(?=.{1,253}$)([a-z0-9]([a-z0-9\-]{0,61}[a-z0-9])?)(\.[a-z0-9]([a-z0-9\-]{0,61}[a-z0-9])?)*")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def _host_and_port(entry: str) -> tuple[str, int | None]:
    name, colon, port = entry.partition(":")
    is_port = port.isascii() and port.isdigit() if colon else True
    if not is_port or not (name == "*" or _HOST.fullmatch(name.removeprefix("*."))):
        raise ValueError(
            f"{entry!r} is no domain that can be allowed; write a host name such as cdn.example.org, *.example.org or host:8443."
        )
    return name, int(port) if colon else None


def system_resolver(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


class HostRefused(MediaError):
    """The host is not allowed, not public, or not known. Which of the three is nobody's business but the machine's owner's."""


class Fetcher:
    """Opens http(s) addresses, data URIs and local files, each only if allowed.

    `allow_domains`: exact host names, `*.example.org` for every name below it, `*` for any public host; `host:8443` for another port.
    `allow_folders`: files below these, reached without symbolic or hard links. Both are empty unless given. Data URIs carry their own bytes
    and only meet `max_bytes`. Plain http needs `allow_http`. `seconds` covers a whole fetch, redirects included.

    An address is parsed once, its host resolved once, every answer must be public, and the connection goes to that answer, so a second
    look-up or a second parser cannot lead elsewhere (CVE-2026-24779). Each redirect starts over.
    """

    def __init__(
        self,
        *,
        allow_domains: tuple[str, ...] = (),
        allow_folders: tuple[Path | str, ...] = (),
        allow_http: bool = False,
        max_bytes: int = 64 * 1024**2,
        seconds: float = 20.0,
        max_redirects: int = 3,
        resolve: Resolver = system_resolver,
        connect: Connector = socket.create_connection,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.allow_domains = tuple(d.lower() for d in allow_domains)
        self._allowed = tuple(map(_host_and_port, self.allow_domains))
        self.allow_folders = tuple(Path(f).resolve(strict=True) for f in allow_folders)
        self.allow_http = allow_http
        self.max_bytes = max_bytes
        self.seconds = seconds
        self.max_redirects = max_redirects
        self._resolve = resolve
        self._connect = connect
        self._tls = tls or ssl.create_default_context()

    def open(self, source: str) -> BinaryIO:
        """A file at its start, to be closed by the caller. ValueError with one sentence if the source is not allowed or does not come."""
        if source[:5].lower() == "data:":
            return open_data_uri(source, self.max_bytes)
        if source[:7].lower() == "file://":
            return self._open_file(file_uri_path(source))
        if "://" in source[:32] and not source.startswith("/"):
            return self._open_url(source)
        return self._open_file(source)

    def _open_url(self, url: str) -> BinaryIO:
        deadline = time.monotonic() + self.seconds
        for _ in range(self.max_redirects + 1):
            answer = self._one_hop(url, deadline)
            if not isinstance(answer, str):
                return answer
            if url[:6].lower() == "https:" and answer[:6].lower() != "https:":
                raise MediaError("the address redirects from https to an unprotected one; give the final address.")
            url = answer
        raise MediaError(f"the address redirects more than {self.max_redirects} times; give the final address.")

    def _one_hop(self, url: str, deadline: float) -> BinaryIO | str:
        """The file, or the address it redirects to."""
        scheme, host, port, path = self._checked(url)
        address = self._public_address(host, port, deadline)
        with self._connection(scheme, host, port, address, deadline) as connection:
            try:
                connection.putrequest("GET", path, skip_host=True, skip_accept_encoding=True)
                connection.putheader("Host", host if port in (80, 443) else f"{host}:{port}")
                connection.putheader("Accept", "image/*, video/*, application/pdf")
                connection.putheader("Accept-Encoding", "identity")
                connection.putheader("User-Agent", "qvl")
                connection.endheaders()
                response = connection.getresponse()
                if response.status in (301, 302, 303, 307, 308):
                    return urljoin(url, response.getheader("Location") or "")
                if response.status != 200:
                    raise MediaError(f"{host} answered {response.status} instead of the file; check the address.")
                if (response.getheader("Content-Encoding") or "identity").lower() != "identity":
                    raise MediaError(
                        f"{host} sent the file compressed although it was asked not to; give another address."
                    )
                return self._body(response, host, deadline)
            except MediaError:
                raise
            except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
                # AttributeError: the deadline's timer closed the socket under http.client.
                if time.monotonic() >= deadline:
                    raise MediaError(
                        f"{host} took longer than {self.seconds:g} seconds; try again or send the file itself."
                    ) from error
                raise MediaError(f"the connection to {host} failed; check the address.") from error

    @contextmanager
    def _connection(
        self, scheme: str, host: str, port: int, address: str, deadline: float
    ) -> Iterator[http.client.HTTPConnection]:
        """To the one address, named and certified as the host, cut off at the deadline even if bytes keep dripping in."""
        left = max(0.001, deadline - time.monotonic())
        connection = http.client.HTTPConnection(host, port, timeout=left)
        try:
            wire = self._connect((address, port), left)
            if scheme == "https":
                wire = self._tls.wrap_socket(wire, server_hostname=host, do_handshake_on_connect=False)
            timer = threading.Timer(deadline - time.monotonic(), _shut, args=(wire,))
            timer.daemon = True
            timer.start()
            try:
                if isinstance(wire, ssl.SSLSocket):
                    wire.do_handshake()
                connection.sock = wire
                yield connection
            finally:
                timer.cancel()
                wire.close()
        except ssl.SSLCertVerificationError as error:
            raise MediaError(f"the certificate of {host} is not valid; check the address.") from error
        except OSError as error:
            raise MediaError(f"the connection to {host} failed or took too long; check the address.") from error
        finally:
            connection.close()

    def _checked(self, url: str) -> tuple[str, str, int, str]:
        if not _URL.fullmatch(url):
            raise MediaError(
                "the address is not a plain http(s) address; percent-encode it and leave out user names and fragments."
            )
        parts = urlsplit(url)
        host = (parts.hostname or "").lower()
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise MediaError("the address has an invalid port.") from error
        if not _HOST.fullmatch(host):
            raise MediaError("the address names no plain host; write a domain name (punycode for other alphabets).")
        if not self._allows(host, port):
            allowed = "none is" if not self.allow_domains else "only " + ", ".join(self.allow_domains)
            raise HostRefused(
                f"fetching from {host} is not allowed ({allowed}); send the file itself or have the domain allowed."
            )
        if parts.scheme == "http" and not self.allow_http:
            raise MediaError("plain http is not allowed; use https.")
        return parts.scheme, host, port, (parts.path or "/") + (f"?{parts.query}" if parts.query else "")

    def _allows(self, host: str, port: int) -> bool:
        for name, allowed_port in self._allowed:
            if port not in ((80, 443) if allowed_port is None else (allowed_port,)):
                continue
            if name == "*" or name == host or (name.startswith("*.") and host.endswith(name[1:])):
                return True
        return False

    def _public_address(self, host: str, port: int, deadline: float) -> str:
        try:
            addresses = _within(max(0.0, deadline - time.monotonic()), lambda: self._resolve(host, port))
        except (OSError, UnicodeError) as error:
            raise HostRefused(f"the host {host} cannot be found; check the address.") from error
        if not addresses or not all(is_public(a) for a in addresses):
            raise HostRefused(f"the host {host} is not on the public internet; send the file itself.")
        return addresses[0]

    def _body(self, response: http.client.HTTPResponse, host: str, deadline: float) -> BinaryIO:
        too_big = MediaError(
            f"the file at {host} is larger than the {self.max_bytes:,} bytes allowed; send a smaller one."
        )
        promised = response.getheader("Content-Length")
        if promised is not None and int(promised) > self.max_bytes:
            raise too_big
        file = cast(BinaryIO, tempfile.SpooledTemporaryFile(max_size=8 * 1024**2))  # noqa: SIM115 - the caller closes it
        got = 0
        while chunk := response.read1(64 * 1024):
            got += len(chunk)
            if got > self.max_bytes:
                raise too_big
            if time.monotonic() >= deadline:
                raise TimeoutError
            file.write(chunk)
        if time.monotonic() >= deadline or (promised is not None and got != int(promised)):
            raise ConnectionError  # the timer or the server cut it short
        file.seek(0)
        return file

    def _open_file(self, name: str) -> BinaryIO:
        refusal = MediaError(
            "the path is not below an allowed folder; send the file itself or have its folder allowed."
        )
        if "\0" in name or not os.path.isabs(name) or ".." in Path(name).parts:
            raise refusal
        for folder in self.allow_folders:
            if Path(name).is_relative_to(folder) and Path(name) != folder:
                return open_below(folder, Path(name).relative_to(folder).parts, self.max_bytes)
        raise refusal


def is_public(address: str) -> bool:
    """Whether the address is on the public internet, looking through the ways IPv6 can carry an IPv4 address."""
    try:
        ip = ipaddress.ip_address(address.split("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if ip in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        if (
            ip.sixtofour is not None or ip.teredo is not None or ip.is_site_local
        ):  # tunnels to anywhere; no server lives there
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _shut(wire: socket.socket) -> None:
    try:
        wire.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # closed already: the fetch was done


def _within(seconds: float, call: Callable[[], _T]) -> _T:
    """The call's result, or TimeoutError. The system's name resolver takes no time limit, so it waits in a thread of its own."""
    results: list[_T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError
    return results[0]
