"""The object store against a server that fails in every way a network does."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from data_pipeline.errors import InputMissing, StorageError
from data_pipeline.store import storage
from data_pipeline.store.cache import Cache
from data_pipeline.store.s3 import Limits, ObjectChanged, ObjectStore

CONTENT = np.random.default_rng(0).bytes(400_000)
PATH = "s3://bucket/folder/object.tar"
SECRET = "canary-of-a-secret-key"
QUICK = Limits(
    connect_seconds=1.0,
    silence_seconds=0.4,
    deadline_seconds=3.0,
    min_bytes_per_second=1e6,
    grace_seconds=0.3,
    backoff_seconds=0.01,
    max_backoff_seconds=0.05,
)
# For faults that pass: a slow machine must not look like one more of them.
PATIENT = replace(QUICK, silence_seconds=1.0, deadline_seconds=30.0, min_bytes_per_second=1e5)
Fault = Callable[["Request"], None]


class Request(BaseHTTPRequestHandler):
    """A request for the one object there is; `server.faults` are what happens to the next ones."""

    protocol_version = "HTTP/1.1"
    server: "Store"

    def do_GET(self) -> None:
        self.server.ranges.append(self.headers.get("Range"))
        self.close_connection = True
        fault = self.server.faults.pop(0) if self.server.faults else answer
        try:
            fault(self)
        except (BrokenPipeError, ConnectionResetError):
            return

    def do_HEAD(self) -> None:
        self.close_connection = True
        self.send_response(200)
        self.send_header("ETag", self.server.etag)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()

    def wanted(self) -> tuple[int, int]:
        if "Range" not in self.headers:
            return 0, len(self.server.content)
        start, end = self.headers["Range"].removeprefix("bytes=").split("-")
        return int(start), int(end) + 1

    def head(self, start: int, end: int, length: int) -> None:
        self.send_response(206)
        self.send_header("ETag", self.server.etag)
        self.send_header("Content-Length", str(length))
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(self.server.content)}")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Store(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.content, self.etag = CONTENT, '"one"'
        self.faults: list[Fault] = []
        self.ranges: list[str] = []


def answer(request: Request) -> None:
    if request.headers.get("If-Match", request.server.etag) != request.server.etag:
        return refuse(412, "PreconditionFailed")(request)
    start, end = request.wanted()
    request.head(start, end, end - start)
    request.wfile.write(request.server.content[start:end])


def refuse(status: int, code: str) -> Fault:
    def fault(request: Request) -> None:
        body = f"<Error><Code>{code}</Code><Message>{SECRET}</Message></Error>".encode()
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    return fault


def cut(sent: int, length: int | None = None) -> Fault:
    """Close the connection in mid-body; `length` is a false Content-Length."""

    def fault(request: Request) -> None:
        start, end = request.wanted()
        request.head(start, end, length or end - start)
        request.wfile.write(request.server.content[start : start + sent])

    return fault


def hang(sent: int | None) -> Fault:
    """Send so many bytes of the body, or not even a header, and nothing more."""

    def fault(request: Request) -> None:
        if sent is not None:
            start, end = request.wanted()
            request.head(start, end, end - start)
            request.wfile.write(request.server.content[start : start + sent])
        time.sleep(3.0)

    return fault


def drip(request: Request) -> None:
    start, end = request.wanted()
    request.head(start, end, end - start)
    for position in range(start, min(start + 100, end)):
        request.wfile.write(request.server.content[position : position + 1])
        time.sleep(0.1)


def swap(request: Request) -> None:
    """The object becomes another one while half of it is on its way."""
    server = request.server
    start, end = request.wanted()
    request.head(start, end, end - start)
    request.wfile.write(server.content[start : start + 1000])
    server.content, server.etag = server.content[::-1], '"two"'


@pytest.fixture
def server(monkeypatch) -> Iterator[Store]:
    store = Store()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{store.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    thread = threading.Thread(target=store.serve_forever, args=(0.02,))
    thread.start()
    yield store
    store.shutdown()
    store.server_close()
    thread.join()


def read(store: ObjectStore) -> bytes:
    return store.read(PATH, store.version(PATH))


@pytest.mark.parametrize(
    ("name", "faults"),
    [
        ("throttled", [refuse(503, "SlowDown")] * 4 + [refuse(500, "InternalError")] * 2),
        ("cut", [cut(1000), cut(200_000), cut(0), cut(1)]),
        ("false length", [cut(10_000, length=10_000), cut(5_000, length=500_000)]),
        ("body hangs", [hang(70_000), hang(0)]),
        ("header hangs", [hang(None)]),
        ("drips", [drip]),
        ("one expired token", [refuse(400, "ExpiredToken")]),
    ],
)
def test_faults_that_pass_do_not_change_what_is_read(server, name, faults):
    server.faults = list(faults)
    store = ObjectStore(PATIENT)
    assert read(store) == CONTENT
    assert store.requests.retries >= len(faults)


def test_a_cut_read_goes_on_from_its_last_byte(server):
    server.faults = [cut(1000), cut(2000)]
    read(ObjectStore(PATIENT))
    assert server.ranges == ["bytes=0-399999", "bytes=1000-399999", "bytes=3000-399999"]


@pytest.mark.parametrize(
    ("faults", "error", "message"),
    [
        ([refuse(503, "SlowDown")] * 99, StorageError, r"answered SlowDown, \d times in a row"),
        ([hang(0)] * 99, StorageError, "because ReadTimeoutError"),
        ([drip] * 99, StorageError, r"because \d+ bytes came in 0 seconds"),
        ([refuse(403, "ExpiredToken")] * 2, StorageError, "access is refused .ExpiredToken."),
        ([refuse(403, "AccessDenied")] * 2, StorageError, "access is refused .AccessDenied."),
        ([refuse(404, "NoSuchKey")], InputMissing, "no such object .NoSuchKey."),
    ],
)  # fmt: skip
def test_faults_that_last_end_in_one_line_before_the_deadline(server, faults, error, message):
    server.faults = list(faults)
    begin = time.monotonic()
    with pytest.raises(error, match=message) as caught:
        read(ObjectStore(QUICK))
    assert time.monotonic() - begin < QUICK.deadline_seconds + 5.0
    assert PATH in str(caught.value)
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_whole_object_takes_one_request_and_goes_on_where_it_broke(server):
    store = ObjectStore(PATIENT)
    assert store.read_whole(PATH) == CONTENT
    server.faults = [cut(1000)]
    assert store.read_whole(PATH) == CONTENT
    assert server.ranges == [None, None, "bytes=1000-399999"]


def test_an_unreachable_store_is_told(monkeypatch, server):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="because EndpointConnectionError"):
        read(ObjectStore(QUICK))


def test_half_of_the_credentials_is_told(monkeypatch, server):
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match="PartialCredentialsError; check the AWS settings"):
        read(ObjectStore(QUICK))


def test_an_object_replaced_in_mid_read_is_read_from_the_start(server, tmp_path):
    server.faults = [swap]
    cache = Cache(ObjectStore(PATIENT), tmp_path, 10**9)
    assert cache.read(PATH, 0, len(CONTENT)) == CONTENT[::-1]
    server.faults = [swap]
    server.etag = '"one"'
    with pytest.raises(ObjectChanged):
        read(ObjectStore(QUICK))


def test_credentials_are_read_anew_once(monkeypatch, server):
    store = ObjectStore(PATIENT)
    version = store.version(PATH)
    keys = []

    def expired(request: Request) -> None:
        keys.append(request.headers["Authorization"].split("Credential=")[1].split("/")[0])
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "renewed")
        refuse(403, "ExpiredToken")(request)

    def see(request: Request) -> None:
        keys.append(request.headers["Authorization"].split("Credential=")[1].split("/")[0])
        answer(request)

    server.faults = [expired, see]
    assert store.read(PATH, version) == CONTENT
    assert keys == ["key", "renewed"]


def test_without_credentials_requests_are_anonymous(monkeypatch, server, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    signed = []

    def see(request: Request) -> None:
        signed.append("Authorization" in request.headers)
        answer(request)

    server.faults = [see]
    assert read(ObjectStore(PATIENT)) == CONTENT
    assert signed == [False]


def test_storage_reads_through_the_cache_of_this_process(monkeypatch, server, tmp_path):
    monkeypatch.setenv("T2V_CACHE", str(tmp_path))
    storage._remote.cache_clear()
    assert storage.read_range(PATH, 1000, 50) == CONTENT[1000:1050]
    assert storage.read_range(PATH, 399_990, 50) == CONTENT[-10:]
    assert storage.read_range(PATH, 500_000, 5) == b""
    assert len(server.ranges) == 1
    assert storage.local_file(PATH).read_bytes() == CONTENT == storage.read_bytes(PATH)
    storage._remote.cache_clear()
