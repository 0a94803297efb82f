"""Objects over http: what is asked of a server, and what is made of its answers."""

from __future__ import annotations

import threading
import time

import pytest

from modelctl.errors import ModelctlError, UnreadableError
from modelctl.storage.far import http
from modelctl.storage.far.blocks import HEAD, PART, FarSource
from modelctl.storage.far.http import http_object
from modelctl.storage.far.urls import shown

from .server import Handler, Server

DATA = bytes(n * 7 % 251 for n in range(3 << 20))


def opened_at(url: str) -> FarSource:
    return FarSource(shown(url), lambda: http_object(url))


@pytest.fixture
def opened(server: Server):
    server.files["x.bin"] = DATA
    source = opened_at(server.url + "/x.bin")
    yield source
    source.close()


def test_ranges(opened: FarSource, server: Server) -> None:
    assert opened.size == len(DATA)
    assert opened.read(5, 10) == DATA[5:15]
    assert len(server.asked) == 1
    assert opened.read(HEAD - 5, 10) == DATA[HEAD - 5 : HEAD + 5]
    assert opened.read(len(DATA) - 3, 3) == DATA[-3:]
    assert opened.read(0, len(DATA)) == DATA
    assert all(one.span is not None for one in server.asked)
    room = bytearray(1000)
    opened.read_into(1 << 20, memoryview(room))
    assert room == DATA[1 << 20 : (1 << 20) + 1000]


def test_the_end_is_read_once(opened: FarSource, server: Server) -> None:
    server.forget()
    for size in (22, 42, 900, 30_000):
        assert opened.read(len(DATA) - size, size) == DATA[-size:]
    assert len(server.asked) == 1


def test_who_reads_on_gets_ever_more(opened: FarSource, server: Server) -> None:
    server.forget()
    for at in range(HEAD, HEAD + (1 << 20), 1000):
        assert opened.read(at, 1000) == DATA[at : at + 1000]
    assert len(server.asked) < 12


def test_many_ranges_come_together(opened: FarSource, server: Server) -> None:
    server.forget()
    ranges = [(at, 100) for at in range(1 << 20, 2 << 20, 5000)]
    assert opened.read_many(ranges) == [DATA[at : at + size] for at, size in ranges]
    assert len(server.asked) == 1


def test_what_is_announced_comes_at_once_and_no_more(server: Server) -> None:
    server.files["x.bin"] = DATA * 8
    source = opened_at(server.url + "/x.bin")
    server.forget()
    running, most, lock = 0, 0, threading.Lock()

    def slowly(handler: Handler) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1

    server.turns.extend([slowly] * 100)
    begin, size = 1 << 20, 20 << 20
    source.will_read([(begin, size)])
    for at in range(begin, begin + size, 1 << 20):
        assert source.read(at, 1 << 20) == (DATA * 8)[at : at + (1 << 20)]
    assert server.sent == size
    assert len(server.asked) == size // PART
    assert most > 2


def test_no_part_is_held_when_it_was_read(server: Server) -> None:
    server.files["x.bin"] = DATA * 8
    source = opened_at(server.url + "/x.bin")
    source.will_read([(HEAD, 20 << 20)])
    for at in range(HEAD, HEAD + (20 << 20), 1 << 20):
        source.read(at, 1 << 20)
    assert all(part.data is None for plan in source._plans for part in plan._order)


def test_threads_read_what_is_announced(server: Server) -> None:
    server.files["x.bin"] = DATA * 4
    source = opened_at(server.url + "/x.bin")
    spans = [(at, 300_000) for at in range(1 << 20, 11 << 20, 300_000)]
    source.will_read(spans)
    found: dict[int, bytes] = {}

    def read(at: int, size: int) -> None:
        found[at] = source.read(at, size)

    threads = [threading.Thread(target=read, args=span) for span in spans]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert found == {at: (DATA * 4)[at : at + size] for at, size in spans}


def test_a_range_in_another_order_than_announced(server: Server) -> None:
    server.files["x.bin"] = DATA * 8
    source = opened_at(server.url + "/x.bin")
    spans = [(at, 1 << 20) for at in range(1 << 20, 21 << 20, 1 << 20)]
    source.will_read(spans)
    for at, size in reversed(spans):
        assert source.read(at, size) == (DATA * 8)[at : at + size]
        assert source.read(at, size) == (DATA * 8)[at : at + size]  # and once more


# ---------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_again(opened: FarSource, server: Server, status: int) -> None:
    server.forget()
    server.turns.extend([lambda handler: handler.say(status, b"busy")] * 3)
    assert opened.read(1 << 20, 10) == DATA[1 << 20 : (1 << 20) + 10]
    assert len(server.asked) == 4


def test_not_for_ever(opened: FarSource, server: Server) -> None:
    server.turns.extend([lambda handler: handler.say(503)] * 50)
    server.forget()
    with pytest.raises(ModelctlError, match=r"x\.bin: the server says 503 .*5 times"):
        opened.read(1 << 20, 10)
    assert len(server.asked) == http.TRIES


def test_as_long_as_the_server_wants(opened: FarSource, server: Server, monkeypatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(http.time, "sleep", slept.append)
    server.turns.append(lambda handler: handler.say(429, b"", {"Retry-After": "7"}))
    server.turns.append(lambda handler: handler.say(429, b"", {"Retry-After": "99999"}))
    opened.read(1 << 20, 10)
    assert slept == [7.0, 30.0]


def test_a_dropped_connection(opened: FarSource, server: Server) -> None:
    server.turns.append(lambda handler: handler.serve(cut=1000) or True)
    server.turns.append(lambda handler: handler.serve(cut=0) or True)
    assert opened.read(1 << 20, 900_000) == DATA[1 << 20 : (1 << 20) + 900_000]
    server.turns.extend([lambda handler: handler.serve(cut=1000) or True] * 20)
    with pytest.raises(ModelctlError, match="broke off"):
        opened.read(2 << 20, 900_000)


def test_a_connection_that_waited_too_long(opened: FarSource, server: Server, monkeypatch) -> None:
    """The server closed it: that is no try, and no pause."""
    monkeypatch.setattr(http, "TRIES", 1)

    def close_after(handler: Handler) -> bool:
        handler.serve()
        handler.close_connection = True  # without a word
        return True

    for n in range(1, 4):
        server.turns.append(close_after)
        assert opened.read(n << 19, 10) == DATA[n << 19 : (n << 19) + 10]


def test_it_changes(opened: FarSource, server: Server) -> None:
    server.etag = '"2"'
    with pytest.raises(UnreadableError, match=r'x\.bin: it changed .*ETag is "2", it was "1"'):
        opened.read(1 << 20, 10)


def test_it_becomes_longer(opened: FarSource, server: Server) -> None:
    server.files["x.bin"] = DATA + b"more"
    with pytest.raises(UnreadableError, match="it changed while it was read: it has 3,145,732"):
        opened.read(1 << 20, 10)


def test_it_becomes_shorter(opened: FarSource, server: Server) -> None:
    server.files["x.bin"] = DATA[: 1 << 20]
    with pytest.raises(UnreadableError, match="it changed while it was read"):
        opened.read(2 << 20, 10)


def test_it_changes_its_date(server: Server) -> None:
    server.etag = ""
    server.files["x.bin"] = DATA

    def dated(date: str):
        def turn(handler: Handler) -> bool:
            found = handler.headers["Range"].partition("=")[2].split("-")
            start, last = int(found[0]), min(int(found[1]), len(DATA) - 1)
            where = f"bytes {start}-{last}/{len(DATA)}"
            headers = {"Content-Range": where, "Last-Modified": date}
            return handler.say(206, DATA[start : last + 1], headers)

        return turn

    server.turns.append(dated("Mon, 01 Jan 2024 00:00:00 GMT"))
    server.turns.append(dated("Tue, 02 Jan 2024 00:00:00 GMT"))
    source = opened_at(server.url + "/x.bin")
    with pytest.raises(UnreadableError, match="it changed while it was read: its date is Tue"):
        source.read(1 << 20, 10)


def test_other_bytes_than_were_asked(opened: FarSource, server: Server) -> None:
    where = {"Content-Range": f"bytes 0-9/{len(DATA)}", "ETag": '"1"'}
    server.turns.append(lambda handler: handler.say(206, DATA[:10], where))
    with pytest.raises(UnreadableError, match="makes no sense"):
        opened.read(1 << 20, 10)


def test_compressed(server: Server) -> None:
    server.turns.append(lambda handler: handler.say(200, b"\x1f\x8b", {"Content-Encoding": "gzip"}))
    with pytest.raises(UnreadableError, match="compressed"):
        http_object(server.url + "/x.bin")


@pytest.mark.parametrize(
    ("status", "says"), [(404, "no such file there"), (403, "may not be read"), (401, "401")]
)
def test_what_is_not_there_is_asked_once(server: Server, status: int, says: str) -> None:
    server.turns.extend([lambda handler: handler.say(status)] * 9)
    with pytest.raises(ModelctlError, match=says):
        http_object(server.url + "/x.bin")
    assert len(server.asked) == 1


def test_nobody_listens(server: Server) -> None:
    server.server_close()
    with pytest.raises(ModelctlError, match=r"127\.0\.0\.1:\d+ can't be read from: .*5 tries"):
        http_object(server.url + "/x.bin")


def test_no_answer(server: Server, monkeypatch) -> None:
    monkeypatch.setattr(http, "TIMEOUT", 0.05)
    monkeypatch.setattr(http, "TRIES", 2)
    over = threading.Event()
    server.turns.extend([lambda handler: over.wait(5)] * 9)
    begun = time.monotonic()
    with pytest.raises(ModelctlError, match="no answer in time"):
        http_object(server.url + "/x.bin")
    over.set()
    assert time.monotonic() - begun < 3


def test_a_drop_at_a_time(server: Server, monkeypatch) -> None:
    """A byte before every timeout is no way to keep somebody for ever."""
    monkeypatch.setattr(http, "TIMEOUT", 0.2)
    monkeypatch.setattr(http, "SLOWEST", 1 << 30)
    monkeypatch.setattr(http, "TRIES", 1)

    def drip(handler: Handler) -> bool:
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b"x")
            handler.wfile.flush()
            time.sleep(0.02)
        return True

    server.turns.append(drip)
    begun = time.monotonic()
    with pytest.raises(ModelctlError, match="no answer in time"):
        http_object(server.url + "/x.bin")
    assert time.monotonic() - begun < 1.5


def test_closed_while_somebody_waits(opened: FarSource, server: Server) -> None:
    over, failed = threading.Event(), []

    def read() -> None:
        try:
            opened.read(1 << 20, 10)
        except ModelctlError as e:
            failed.append(e)

    server.turns.append(lambda handler: over.wait(10))
    thread = threading.Thread(target=read)
    thread.start()
    while len(server.asked) < 2:
        time.sleep(0.005)
    opened.close()
    thread.join(3)
    over.set()
    assert failed
    assert not thread.is_alive()


# ---------------------------------------------------------------------- without ranges


def test_a_small_file_without_ranges(server: Server) -> None:
    server.ranges = False
    server.files["x.bin"] = DATA[:600_000]
    source = opened_at(server.url + "/x.bin")
    assert source.read(500_000, 10) == DATA[500_000:500_010]
    assert len(server.asked) == 2


def test_a_large_file_without_ranges(server: Server) -> None:
    server.ranges = False
    server.files["x.bin"] = DATA * 12
    with pytest.raises(UnreadableError, match=r"only whole, 37,748,736 bytes") as caught:
        http_object(server.url + "/x.bin")
    assert "| modelctl COMMAND -" in str(caught.value.hint)
    assert server.sent < 16 << 20  # what buffers on the way take, of 36 MiB


def test_an_empty_file(server: Server) -> None:
    server.files["x.bin"] = b""
    for ranges in (True, False):
        server.ranges = ranges
        assert http_object(server.url + "/x.bin").size == 0


# ---------------------------------------------------------------------- redirects and secrets


def test_a_redirect_is_followed_and_remembered(server: Server, other: Server) -> None:
    other.files["far.bin"] = DATA
    server.turns.extend(
        [lambda handler: handler.say(302, b"", {"Location": other.url + "/far.bin?sig=1"})] * 9
    )
    source = opened_at(server.url + "/x.bin")
    assert source.read(1 << 20, 10) == DATA[1 << 20 : (1 << 20) + 10]
    assert len(server.asked) == 1
    assert [one.path for one in other.asked] == ["/far.bin?sig=1"] * 2
    assert source.name == server.url + "/x.bin"


def test_where_it_led_to_is_no_longer_valid(server: Server, other: Server) -> None:
    other.files["far.bin"] = DATA
    server.turns.extend(
        [lambda handler: handler.say(302, b"", {"Location": other.url + "/far.bin"})] * 9
    )
    source = opened_at(server.url + "/x.bin")
    other.turns.append(lambda handler: handler.say(403, b"expired"))
    assert source.read(1 << 20, 10) == DATA[1 << 20 : (1 << 20) + 10]
    assert len(server.asked) == 2


def test_who_asks_is_told_to_nobody_else(server: Server, other: Server) -> None:
    other.files["far.bin"] = DATA
    server.turns.append(lambda h: h.say(302, b"", {"Location": server.url + "/again.bin"}))
    server.turns.append(lambda h: h.say(302, b"", {"Location": other.url + "/far.bin"}))
    url = server.url.replace("//", "//me:pass%20word@") + "/x.bin"
    source = opened_at(url)
    assert source.read(0, 4) == DATA[:4]
    assert [one.headers.get("authorization") for one in server.asked] == [
        "Basic bWU6cGFzcyB3b3Jk",
        "Basic bWU6cGFzcyB3b3Jk",
    ]
    assert all("authorization" not in one.headers for one in other.asked)
    assert other.asked


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://127.0.0.1/x"])
def test_a_redirect_to_elsewhere(server: Server, to: str) -> None:
    server.turns.append(lambda handler: handler.say(302, b"", {"Location": to}))
    with pytest.raises(ModelctlError, match="not followed: it leads to a"):
        http_object(server.url + "/x.bin")


def test_a_redirect_without_end(server: Server) -> None:
    server.turns.extend([lambda handler: handler.say(302, b"", {"Location": "/x.bin"})] * 99)
    with pytest.raises(ModelctlError, match="it leads on and on"):
        http_object(server.url + "/x.bin")
    assert len(server.asked) < 20


@pytest.mark.parametrize("status", [404, 403, 500])
def test_no_secret_in_an_error(server: Server, status: int) -> None:
    server.turns.extend([lambda handler: handler.say(status)] * 9)
    url = server.url.replace("//", "//me:hunter2@") + "/x.bin?X-Amz-Signature=hunter2#hunter2"
    with pytest.raises(ModelctlError) as caught:
        http_object(url)
    assert "hunter2" not in f"{caught.value} {caught.value.hint} {caught.value.as_dict()}"
    assert caught.value.__cause__ is None
    assert "X-Amz-Signature=hunter2" in server.asked[0].path


def test_by_a_proxy(server: Server, monkeypatch) -> None:
    server.files["http://far.test/x.bin"] = DATA
    monkeypatch.setenv("http_proxy", server.url.replace("//", "//me:pass@"))
    source = opened_at("http://far.test/x.bin")
    assert source.read(1 << 20, 10) == DATA[1 << 20 : (1 << 20) + 10]
    assert server.asked[0].headers["proxy-authorization"] == "Basic bWU6cGFzcw=="
    assert server.asked[0].headers["host"] == "far.test"


def test_no_host() -> None:
    for url in ("http:///x.bin", "http://[::1/x", "http://h:port/x"):
        with pytest.raises(ModelctlError, match="no URL with a host"):
            http_object(url)
