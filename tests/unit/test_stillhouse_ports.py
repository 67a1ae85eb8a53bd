"""Which port a local stack takes, before anything of it listens."""

import socket

import pytest

from stillhouse.processes import LocalError, claim_port, free_port


def test_two_that_start_at_once_do_not_choose_one_port() -> None:
    port = free_port()
    first = claim_port(port)
    assert first is not None
    assert claim_port(port) is None
    assert claim_port(port, "0.0.0.0") is None
    first.close()
    again = claim_port(port)
    assert again is not None
    again.close()


def test_a_claim_leaves_the_port_to_the_server_and_sees_other_servers() -> None:
    port = free_port()
    claim = claim_port(port)
    assert claim is not None
    with claim, socket.create_server(("127.0.0.1", port)):
        pass
    with socket.create_server(("127.0.0.1", port)):
        assert claim_port(port) is None


def test_an_address_that_is_not_ours() -> None:
    with pytest.raises(LocalError, match="Choose an address with --host"):
        claim_port(free_port(), "192.0.2.1")
