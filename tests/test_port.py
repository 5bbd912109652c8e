"""A port that is taken is told before anything is loaded."""

import socket

import pytest

from qvl.outside.port import check_port


def test_a_taken_port_is_refused_and_a_free_one_is_not_held() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {port} of 127.0.0.1 cannot be opened .* give another --port"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)  # the first look left nothing behind
    check_port("localhost", 0)
