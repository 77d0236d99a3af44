"""An object store: reads that survive cuts, stalls and throttling; writes that are whole.

boto3's own retries end at the response headers. Here a read goes on from the byte where it broke,
with If-Match, so that no read ever mixes two versions of an object. Endpoint, region and
credentials come from the standard AWS environment; without credentials requests are anonymous.
"""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from botocore.exceptions import ConnectionError as NoConnection
from urllib3.exceptions import HTTPError

from data_pipeline.errors import InputMissing, StorageError

Result = TypeVar("Result")

CHUNK_BYTES = 256 * 1024
MISSING = ("404", "NoSuchKey", "NoSuchBucket", "NotFound")
CHANGED = ("412", "PreconditionFailed")
THROTTLED = ("SlowDown", "RequestTimeout", "RequestTimeTooSkewed", "Throttling", "429")


@dataclass(frozen=True)
class Limits:
    """How patient a store is."""

    connect_seconds: float = 5.0
    silence_seconds: float = 5.0  # without a byte
    deadline_seconds: float = 30.0  # for one read, plus its size at the minimum rate
    min_bytes_per_second: float = 64 * 1024
    grace_seconds: float = 5.0  # of a response, before the minimum rate counts
    attempts: int = 8  # in a row without a new byte
    backoff_seconds: float = 0.2
    max_backoff_seconds: float = 10.0


@dataclass(frozen=True)
class Version:
    """What identifies the content of an object."""

    etag: str
    size: int


class ObjectChanged(Exception):
    """The object is no longer the version that was asked for."""


class ObjectStore:
    """Objects by `s3://bucket/key`."""

    def __init__(self, limits: Limits = Limits()):
        self.requests = Requests(limits)

    def version(self, path: str) -> Version:
        """Which version of an object there is."""
        head = self.requests.answer(path, lambda client: client.head_object(**_place(path)))
        return Version(head["ETag"], head["ContentLength"])

    def read(
        self, path: str, version: Version, offset: int = 0, length: int | None = None
    ) -> bytes:
        """`length` bytes (none: all) of a version from `offset`; fewer only where it ends."""
        end = version.size if length is None else min(offset + length, version.size)
        content = bytearray()
        if offset < end:
            for piece in self.requests.stream(path, version, offset, end):
                content += piece
        return bytes(content)

    def read_whole(self, path: str) -> bytes:
        """An object as it is now, by one request unless it breaks."""
        return b"".join(self.requests.stream(path, None, 0, 0))

    def download(self, path: str, version: Version, file: BinaryIO) -> None:
        """Write the whole of a version to a file."""
        if version.size:
            for piece in self.requests.stream(path, version, 0, version.size):
                file.write(piece)

    def write(self, path: str, file: BinaryIO) -> None:
        """Put a file's content; readers see the old object or the whole new one."""

        def put(client: Any) -> None:
            file.seek(0)
            transfer = TransferConfig(use_threads=False)
            client.upload_fileobj(_Unclosed(file), Config=transfer, **_place(path))

        self.requests.answer(path, put)

    def create(self, path: str, content: bytes) -> bool:
        """Put an object that must not be there yet; False where it is."""
        request = {"Body": content, "IfNoneMatch": "*"} | _place(path)
        try:
            self.requests.answer(path, lambda client: client.put_object(**request))
        except ObjectChanged:
            return False
        return True

    def remove(self, path: str) -> None:
        """Delete an object; it may be gone already."""
        self.requests.answer(path, lambda client: client.delete_object(**_place(path)))

    def exists(self, path: str) -> bool:
        """Whether there is an object at a path, or any below it."""
        try:
            self.version(path)
        except InputMissing:
            return bool(self._list(path, MaxKeys=1).get("KeyCount"))
        return True

    def list(self, folder: str) -> Iterator[str]:
        """Names of the objects directly in a folder."""
        for page in self._pages(folder):
            for entry in page.get("Contents", []):
                if name := entry["Key"].rpartition("/")[2]:
                    yield name

    def list_below(self, folder: str) -> Iterator[tuple[str, int]]:
        """(key from there, bytes) of every object below a folder, a thousand to a request."""
        skipped = len(_prefix(folder))
        for page in self._pages(folder, Delimiter=""):
            for entry in page.get("Contents", []):
                if (name := entry["Key"][skipped:]) and not name.endswith("/"):
                    yield name, entry["Size"]

    def list_folders(self, folder: str) -> Iterator[str]:
        """Names of what lies one level down and holds objects."""
        for page in self._pages(folder):
            for entry in page.get("CommonPrefixes", []):
                yield entry["Prefix"].rstrip("/").rpartition("/")[2]

    def _pages(self, folder: str, **options: Any) -> Iterator[dict]:
        page: dict = {"IsTruncated": True}
        while page["IsTruncated"]:
            token = page.get("NextContinuationToken")
            options |= {"ContinuationToken": token} if token else {}
            page = self._list(folder, **options)
            yield page

    def _list(self, folder: str, **options: Any) -> dict:
        bucket, prefix = _place(folder)["Bucket"], _prefix(folder)
        request = {"Bucket": bucket, "Prefix": prefix, "Delimiter": "/"} | options
        return self.requests.answer(folder, lambda client: client.list_objects_v2(**request))


class Requests:
    """Requests of a process to a store, each tried until it is answered or hopeless."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.retries = 0
        self._client: Any = None

    def stream(self, path: str, version: Version | None, start: int, end: int) -> Iterator[bytes]:
        """The bytes from `start` to `end`, over as many requests as it takes; no version: all of
        the one that the first answer is of."""
        attempts = _Attempts(self, path, self._deadline(end - start))
        while version is None or start < end:
            arrived, wanted = 0, _place(path)
            if version:
                wanted |= {"Range": f"bytes={start}-{end - 1}", "IfMatch": version.etag}
            try:
                response = self._connected().get_object(**wanted)
                if version is None:
                    version = Version(response["ETag"], response["ContentLength"])
                    end, attempts.deadline = version.size, self._deadline(version.size)
                for piece in self._body(response["Body"], end - start, attempts.deadline):
                    arrived += len(piece)
                    start += len(piece)
                    yield piece
                reason = "the connection was cut"
            except TimeoutError as error:
                reason = str(error)
            except (ClientError, BotoCoreError, HTTPError, OSError) as error:
                reason = self._reason(path, error, attempts)
            if version is None or start < end:
                attempts.failed(reason, progress=arrived > 0)

    def _deadline(self, size: int) -> float:
        """Until when so many bytes are to be there."""
        limits = self.limits
        return time.monotonic() + limits.deadline_seconds + size / limits.min_bytes_per_second

    def _body(self, body: Any, wanted: int, deadline: float) -> Iterator[bytes]:
        """What a response brings, never more than wanted; TimeoutError where it is too slow."""
        limits, begin, arrived = self.limits, time.monotonic(), 0
        try:
            while arrived < wanted:
                # Not body.read, which a server that drips bytes would hold for hours.
                piece = body._raw_stream.read1(min(CHUNK_BYTES, wanted - arrived))
                if not piece:
                    return
                arrived += len(piece)
                now = time.monotonic()
                least = (now - begin - limits.grace_seconds) * limits.min_bytes_per_second
                if arrived < min(least, wanted) or (now > deadline and arrived < wanted):
                    raise TimeoutError(f"{arrived} bytes came in {now - begin:.0f} seconds")
                yield piece
        finally:
            body.close()

    def answer(self, path: str, request: Callable[[Any], Result]) -> Result:
        """A request that brings no stream, tried until it is answered."""
        attempts = _Attempts(self, path, time.monotonic() + self.limits.deadline_seconds)
        while True:
            try:
                return request(self._connected())
            except (ClientError, BotoCoreError, Boto3Error, HTTPError, OSError) as error:
                attempts.failed(self._reason(path, error, attempts), progress=False)

    def _reason(self, path: str, error: Exception, attempts: "_Attempts") -> str:
        """Why a request failed, if trying again can help; else raises what it means.

        Messages of boto3 may quote addresses and headers, so only codes and types are told.
        """
        if not isinstance(error, ClientError):
            if isinstance(error, (HTTPClientError, NoConnection, HTTPError, OSError, Boto3Error)):
                return type(error).__name__
            raise StorageError(
                f"{path}: cannot be reached because of {type(error).__name__}; "
                "check the AWS settings of this environment."
            ) from None
        code = error.response["Error"].get("Code", "")
        status = error.response["ResponseMetadata"].get("HTTPStatusCode", 0)
        if code in MISSING or status == 404:
            raise InputMissing(f"{path}: no such object ({code}); check the path.") from None
        if code in CHANGED or status == 412:
            raise ObjectChanged from None
        if status in (400, 401, 403) and code not in THROTTLED:
            if attempts.may_renew:
                attempts.may_renew, self._client = False, None
                return f"credentials refused ({code})"
            raise StorageError(
                f"{path}: access is refused ({code}), also with credentials read anew; "
                "renew them or ask for the right to this key."
            ) from None
        if status >= 500 or status == 429 or code.startswith(THROTTLED):
            return f"the store answered {code or status}"
        raise StorageError(f"{path}: the store refused ({code or status}); check it.") from None

    def _connected(self) -> Any:
        """The client; made anew after credentials were refused."""
        if self._client is None:
            session = boto3.session.Session()
            signing = {} if session.get_credentials() else {"signature_version": UNSIGNED}
            self._client = session.client(
                "s3",
                region_name=session.region_name or "us-east-1",
                config=Config(
                    connect_timeout=self.limits.connect_seconds,
                    read_timeout=self.limits.silence_seconds,
                    retries={"total_max_attempts": 1},
                    **signing,
                ),
            )
        return self._client


class _Attempts:
    """When to try again, and when to give up."""

    def __init__(self, requests: Requests, path: str, deadline: float):
        self.requests, self.path, self.deadline = requests, path, deadline
        self.may_renew = True
        self._begin, self._in_a_row = time.monotonic(), 0

    def failed(self, reason: str, *, progress: bool) -> None:
        """Wait for the next attempt (full jitter); StorageError where there is none left."""
        limits = self.requests.limits
        self._in_a_row = 1 if progress else self._in_a_row + 1
        ceiling = limits.backoff_seconds * 2 ** (self._in_a_row - 1)
        pause = random.uniform(0.0, min(ceiling, limits.max_backoff_seconds))
        if self._in_a_row >= limits.attempts or time.monotonic() + pause >= self.deadline:
            raise StorageError(
                f"{self.path}: cannot be read or written because {reason}, {self._in_a_row} times "
                f"in a row, after {time.monotonic() - self._begin:.0f} seconds; "
                "check the store and the network."
            ) from None
        self.requests.retries += 1
        time.sleep(pause)


class _Unclosed:
    """A file that an upload may read, but not close."""

    def __init__(self, file: BinaryIO):
        self.read, self.seek, self.tell = file.read, file.seek, file.tell

    def close(self) -> None:
        """Leave it open: the next attempt reads it again."""


def _prefix(folder: str) -> str:
    """What keys in a folder begin with."""
    key = _place(folder)["Key"]
    return f"{key.rstrip('/')}/" if key else ""


def _place(path: str) -> dict[str, str]:
    """Bucket and key, as requests take them."""
    bucket, _, key = path.removeprefix("s3://").partition("/")
    return {"Bucket": bucket, "Key": key}
