"""Is a port free? Asked before what takes minutes."""

import socket


def check_port(host: str, port: int) -> None:
    """ValueError where nothing could listen there now."""
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.create_server(place[:2], family=family):
            pass
    except OSError as error:
        raise ValueError(
            f"port {port} of {host} cannot be opened ({error.strerror}); stop what listens there, or give another --port (0 takes any "
            "free one)."
        ) from error
