"""Small datasets that several tests read; none may change them."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
# `nohup` and jobs in the background are deaf to these, and so would be all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

SHARED_CLIPS = Path(__file__).resolve().parents[2] / "shared" / "clips"


@pytest.fixture(scope="session")
def shared_clips() -> Path:
    """Real captioned clips beside the repository."""
    if not SHARED_CLIPS.is_dir():
        pytest.skip(f"no real clips at {SHARED_CLIPS}")
    return SHARED_CLIPS


@pytest.fixture(scope="session")
def media(tmp_path_factory) -> Path:
    """26 captioned videos and 14 images, as a collector would have them."""
    from data_pipeline.making.toy import write_toy

    folder = tmp_path_factory.mktemp("media")
    write_toy(folder, videos=26, images=14, size=(8, 32, 48), fps=8.0)
    return folder


@pytest.fixture(scope="session")
def datasets(media, tmp_path_factory) -> Path:
    """`videos` and `images` from `media` at 8x24x32 in shards of 6, with embeddings `tiny`."""
    from data_pipeline.making.build import build
    from data_pipeline.making.toy import all_toys
    from data_pipeline.text.embed import embed, make_tiny_encoder

    folder = tmp_path_factory.mktemp("datasets")
    make_tiny_encoder(folder / "encoder", [toy.caption for toy in all_toys()], width=8, seed=0)
    for kind in ("videos", "images"):
        build(media / kind, folder / kind, frames=8, height=24, width=32, shard_samples=6)
        embed(folder / kind, folder / "encoder", name="tiny", max_tokens=16)
    return folder


@pytest.fixture
def bucket(tmp_path, monkeypatch) -> Iterator[str]:
    """An empty bucket of a real server."""
    import boto3
    from moto.server import ThreadedMotoServer

    from data_pipeline.store import storage

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("T2V_CACHE", str(tmp_path / "cache"))
    storage._remote.cache_clear()
    boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="bucket")
    yield "s3://bucket"
    # The server keeps its objects in this process, from one server to the next.
    urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
    storage._remote.cache_clear()
    server.stop()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest go first, or one process would end with them alone."""
    longest = ("test_quickstart.py", "test_quickstart_pyramid_flow.py", "test_dockerfile.py")
    items.sort(key=lambda item: item.path.name not in longest)
