"""The sockets between ranks: whole messages, ends that are noticed, strangers turned away."""

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest

from minisgl.core.batch import Batch, Chunk
from minisgl.ranks.channel import Channel, Dispatch, Sample, Stop, ToRank
from minisgl.ranks.meeting import Listener, connect_to_listener, split_address

SECONDS = 10  # a single stranger may not take as long


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    left, right = map(Channel, socket.socketpair())
    yield left, right
    left.close()
    right.close()


def test_messages_arrive_whole_and_in_order(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    big = Batch(3, [Chunk(1, 0, 2, 0, 200_000, list(range(200_000)), 0, [4, 5], True)], 0)
    sent = [Sample(1), Dispatch(big), Stop()]

    def send() -> None:
        for message in sent:
            left.send(msgspec.msgpack.encode(message))

    thread = threading.Thread(target=send)  # a large message does not fit the socket's buffer
    thread.start()
    received = [right.receive(timeout=30) for _ in sent]
    thread.join()
    assert [msgspec.msgpack.decode(data or b"", type=ToRank) for data in received] == sent
    assert right.receive(timeout=0.01) is None


def test_a_part_of_a_message_is_kept_until_the_rest_comes() -> None:
    raw, other = socket.socketpair()
    channel = Channel(other)
    with raw, other:
        raw.sendall(b"\x03\0\0\0ab")
        assert channel.receive(timeout=0.01) is None
        raw.sendall(b"c\x01\0\0\0d")
        assert channel.receive(timeout=30) == b"abc"
        assert channel.receive(timeout=30) == b"d"


def test_an_end_is_noticed_by_who_waits(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    threading.Timer(0.05, left.shut).start()
    with pytest.raises(EOFError):
        right.receive(timeout=30)
    left.shut()
    left.close()
    with pytest.raises(OSError, match="pipe"):
        right.send(b"x")


def come(listener: Listener) -> tuple[int, Channel]:
    deadline = time.monotonic() + SECONDS
    while (came := listener.accept(timeout=0.1)) is None:
        assert time.monotonic() < deadline
    return came


@pytest.fixture
def listener() -> Iterator[Listener]:
    with contextlib.closing(Listener("127.0.0.1")) as listener:
        yield listener


def test_a_listener_lets_in_who_knows_the_key(listener: Listener) -> None:
    rank = connect_to_listener(listener.address, 7, listener.key)
    number, channel = come(listener)
    assert number == 7
    channel.send(b"hello")
    assert rank.receive(timeout=30) == b"hello"
    for end in (rank, channel):  # sent data that nobody hears stops the kernel's questions
        with socket.socket(fileno=os.dup(end.fileno())) as same:
            assert same.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 20_000
    long = b"x" * 1000  # what a guest may not send
    rank.send(long)
    assert channel.receive(timeout=30) == long
    assert listener.accept(timeout=0.01) is None


NOT_A_STRING = msgspec.msgpack.encode(["hello", 1, "k\u00e9y"])


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n" + b"\0" * 2**16,
        b"\x03\0\0\0\xc1\xc1\xc1",
        struct.pack("<I", len(NOT_A_STRING)) + NOT_A_STRING,
        b"",
    ],
)
def test_a_listener_sends_strangers_away(listener: Listener, said: bytes) -> None:
    stranger = connect_to_listener(listener.address, 1, b"wrong")
    with socket.create_connection(split_address(listener.address)) as noise:
        noise.sendall(said)
        noise.shutdown(socket.SHUT_WR)
        for _ in range(10):  # they knock and speak, and one of them for long
            assert listener.accept(timeout=0.02) is None
        noise.settimeout(30)
        with contextlib.suppress(ConnectionResetError):  # where it had more to say
            assert noise.recv(1) == b""
    with pytest.raises((EOFError, OSError)):
        stranger.receive(timeout=30)


def test_strangers_who_say_nothing_hold_nobody_up(listener: Listener) -> None:
    with contextlib.ExitStack() as stack:
        strangers = [
            stack.enter_context(socket.create_connection(split_address(listener.address)))
            for _ in range(20)
        ]
        for stranger in strangers[::2]:
            stranger.sendall(b"\x10\0\0\0par")
        rank = connect_to_listener(listener.address, 3, listener.key)
        number, channel = come(listener)
        assert number == 3
        rank.send(b"here")
        assert channel.receive(timeout=30) == b"here"
        listener.close()
        for stranger in strangers:
            stranger.settimeout(30)
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(1) == b""


@pytest.mark.parametrize(
    ("address", "parts"),
    [("node0:29500", ("node0", 29500)), ("[::1]:1", ("::1", 1)), ("10.0.0.1:80", ("10.0.0.1", 80))],
)
def test_addresses_are_split(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts
