"""Scores of a dataset: whole or none, the same however they came to be, and columns of builds."""

import io
import json
import re
from pathlib import Path

import av
import numpy as np
import pytest
from moving import moving
from numbered import numbered_clip
from pyarrow import parquet
from strangers import tree

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.making import scoring
from data_pipeline.making.build import build
from data_pipeline.making.duplicates import MOST_BITS, originals
from data_pipeline.making.indexing import index
from data_pipeline.making.presets import Columns
from data_pipeline.making.scoring import open_scores, score
from data_pipeline.making.stats import measure, write_page
from data_pipeline.making.verify import verify
from data_pipeline.media.codec import encode_clip, encode_image
from data_pipeline.shards.dataset import open_dataset
from data_pipeline.shards.tar import write_tar
from data_pipeline.store import storage

SIZE = {"frames": 16, "height": 96, "width": 160}
ORIGINALS = ("moving", "fast", "still", "bars")


def again(media: bytes, crf: int) -> bytes:
    """A video that another encoder made of one, much smaller."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(media)) as source, av.open(buffer, "w", format="mp4") as muxer:
        stream = muxer.add_stream("libx264", rate=24, options={"crf": str(crf)})
        stream.width, stream.height, stream.pix_fmt = 80, 48, "yuv420p"
        for frame in source.decode(video=0):
            muxer.mux(stream.encode(frame.reformat(width=80, height=48)))
        muxer.mux(stream.encode())
    return buffer.getvalue()


@pytest.fixture(scope="module")
def videos() -> dict[str, bytes]:
    still = np.repeat(moving(0, 0, seed=1)[:1], 16, 0)
    bars = moving(1, 0, seed=2)
    bars[:, :12] = 0
    clips = {"moving": moving(0, 2), "fast": moving(5, 5, seed=3), "still": still}
    found = {name: encode_clip(clip, 24.0) for name, clip in (clips | {"bars": bars}).items()}
    return found | {"copy": again(found["moving"], 34), "zeros": bytes(400)}


@pytest.fixture
def dataset(videos, tmp_path):
    samples = [
        (name, {"mp4": media, "json": json.dumps({"caption": name}).encode()})
        for name, media in videos.items()
    ]
    folder = tmp_path / "videos"
    write_tar(str(folder / "0.tar"), samples[:2])
    write_tar(str(folder / "1.tar"), samples[2:4])
    write_tar(str(folder / "2.tar"), samples[4:])
    index(folder)
    return folder


def rows(scores) -> dict[str, dict]:
    table = parquet.read_table(storage.local_file(scores.path))
    return {row["key"]: row for row in table.to_pylist()}


def test_every_clip_has_its_scores_or_a_fault(dataset):
    found = rows(score(dataset))
    assert [row["shard"] for row in found.values()] == ["0", "0", "1", "1", "2", "2"]
    assert found["moving"]["motion"] == pytest.approx(50, rel=0.15)
    assert found["still"]["frozen"] == 15 / 16
    assert found["bars"]["crop_top"] == 12
    assert {key: row["duplicate_of"] for key, row in found.items() if row["duplicate_of"]} == {
        "copy": "0/moving"
    }
    assert [key for key, row in found.items() if row["fault"]] == ["zeros"]
    assert found["zeros"]["motion"] is found["zeros"]["hash"] is None


def test_killed_and_gone_on_by_tasks_and_workers_gives_the_same_table(dataset, monkeypatch):
    score(dataset)
    whole = tree(dataset)
    for made in [dataset / "scores.parquet", *(dataset / "scores").iterdir()]:
        made.unlink()
    (dataset / "scores").rmdir()
    calls, measured = iter(range(3)), scoring.measure_media

    def killed(*arguments):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return measured(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "measure_media", killed)
        with pytest.raises(KeyboardInterrupt):
            score(dataset)
    assert [path.name for path in (dataset / "scores").glob("*.parquet")] == ["0.parquet"]
    (dataset / "scores" / f".1.parquet.{'0' * 32}.part").write_bytes(b"half")
    assert score(dataset, task=(1, 2)) is None
    assert score(dataset, task=(0, 2), workers=2) is not None
    assert tree(dataset) == whole


def test_only_shards_that_changed_are_measured_again(dataset, videos, monkeypatch):
    score(dataset)
    write_tar(str(dataset / "1.tar"), [("new", {"mp4": videos["fast"], "txt": b"new"})])
    index(dataset)
    with pytest.raises(ConfigError, match="of other data"):
        open_scores(open_dataset(dataset))
    assert measure(dataset).scores == {}
    calls, measured = [], scoring.measure_media
    monkeypatch.setattr(
        scoring, "measure_media", lambda media, *how: calls.append(media) or measured(media, *how)
    )
    assert rows(score(dataset))["new"]["duplicate_of"] == "0/fast"
    assert calls == [videos["fast"]]


def test_files_of_others_are_not_replaced(dataset):
    theirs = dataset / "scores.parquet"
    theirs.write_bytes(b"theirs")
    with pytest.raises(ConfigError, match="no table of ours"):
        score(dataset)
    theirs.unlink()
    (dataset / "scores").mkdir()
    (dataset / "scores" / "theirs.txt").write_bytes(b"theirs")
    before = tree(dataset)
    with pytest.raises(ConfigError, match="is not empty"):
        score(dataset)
    assert tree(dataset) == before


def change_table(path: Path, change) -> None:
    table = parquet.read_table(path)
    parquet.write_table(table.from_pylist(change(table.to_pylist()), schema=table.schema), path)


def cut_pages(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[100:400] = bytes(300)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "is damaged, or no table of ours"),
        (cut_pages, "is damaged because"),
        (lambda path: change_table(path, lambda rows: rows[:-1]), "has not a row .* each sample"),
        (lambda path: change_table(path, lambda rows: rows[::-1]), "'2/zeros' is not the sample"),
        (lambda path: change_table(path, lambda rows: [r | {"black": np.inf} for r in rows]),
         "'0/moving' has numbers that no clip has"),
        (lambda path: change_table(path, lambda rows: [r | {"fault": None} for r in rows]),
         "'2/zeros' has neither numbers nor a fault"),
    ],
)  # fmt: skip
def test_scores_are_verified(dataset, tmp_path, spoil, said):
    score(dataset)
    assert not verify(dataset, decode=False)
    spoil(dataset / "scores.parquet")
    (fault,) = verify(dataset, decode=False)
    assert re.search(said, str(fault))
    assert "delete it and `t2v data score` again" in str(fault)
    if spoil is cut_pages:
        with pytest.raises(DataError, match=r"scores\.parquet: is damaged"):
            build(dataset, tmp_path / "out", **SIZE, columns=Columns(where="motion > 1"))
        assert measure(dataset).scores == {}


def test_a_build_chooses_by_scores_and_keeps_them_out_of_metadata(dataset, tmp_path):
    score(dataset)
    before = tree(dataset)
    chosen = Columns(where="motion > 1 and duplicate_of is null and crop_top = 0")
    good = build(dataset, tmp_path / "good", **SIZE, columns=chosen)
    assert [good.read(0, row).caption for row in range(good.info.samples)] == ["fast", "moving"]
    assert not {"motion", "duplicate_of", "fault"} & set(good.read(0, 0).metadata)
    assert good.info.account.not_wanted == {"row is not --where": 4}
    selected = Columns(where="frozen > 0.9", select="round(frozen, 2) AS frozen")
    told = build(dataset, tmp_path / "told", **SIZE, columns=selected)
    assert told.read(0, 0).metadata["frozen"] == 0.94
    assert tree(dataset) == before


def test_a_dataset_of_ours_is_a_source_by_its_shards_alone(dataset, tmp_path):
    small = build(dataset, tmp_path / "small", **SIZE, shard_samples=3, max_drop_rate=1.0)
    scores = score(small.path)
    assert rows(scores)["000000000000"]["duplicate_of"] is None
    chosen = Columns(where="duplicate_of is null and fault is null")
    again_ = build(small.path, tmp_path / "again", **SIZE, columns=chosen)
    captions = [again_.read(0, row).caption for row in range(again_.info.samples)]
    assert sorted(captions) == sorted(ORIGINALS)
    assert again_.info.account.passed_over == {"media in no wanted row": 1}


def test_a_condition_on_a_column_without_any_value_holds(dataset, tmp_path, videos):
    write_tar(str(tmp_path / "one" / "0.tar"), [("a", {"mp4": videos["fast"], "txt": b"a"})])
    index(tmp_path / "one")
    score(tmp_path / "one")
    chosen = Columns(where="duplicate_of is null")
    assert build(tmp_path / "one", tmp_path / "out", **SIZE, columns=chosen).info.samples == 1


def test_statistics_show_the_scores(dataset):
    score(dataset)
    stats = measure(dataset)
    told = dict(stats.rows())
    assert told["score: duplicate_of"] == "1 clips are like an earlier clip"
    assert told["score: fault"] == "1 clips are not to be read"
    page = Path(write_page(stats)).read_text()
    assert all(f"<h2>{name}</h2>" in page for name in (*scoring.NUMBERS, *scoring.SIDES))
    assert "from the lowest motion to the highest" in page
    assert "from the lowest black to the highest" not in page  # they are all alike


def test_the_ends_of_a_column_are_its_extremes(dataset):
    scores = score(dataset)
    keys = [row["key"] for row in parquet.read_table(scores.path).to_pylist()]
    assert [keys[number] for number in scores.ends("motion", 1)] == ["still", "fast"]
    assert len(scores.ends("motion", 4)) == 5  # each once; one has no motion
    assert not len(scores.ends("black", 2))


def test_images_are_scored_without_time(tmp_path):
    pictures = [moving(0, 0, seed=seed)[0] for seed in (0, 1, 0)]
    media = [encode_image(picture) for picture in pictures]
    write_tar(
        str(tmp_path / "0.tar"), [(f"{n}", {"jpg": m, "txt": b"x"}) for n, m in enumerate(media)]
    )
    index(tmp_path)
    found = rows(score(tmp_path))
    assert {row["motion"] for row in found.values()} == {None}
    assert [row["duplicate_of"] for row in found.values()] == [None, None, "0/0"]


def test_duplicates_are_those_of_all_pairs():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 256, (40, 32), np.uint8)
    family = np.repeat(hashes, 8, 0)
    for one in family[40:]:  # some bits of each differ, about as many as may
        bits = rng.choice(256, rng.integers(0, 12), replace=False)
        one ^= np.packbits(np.isin(np.arange(256), bits))
    rng.shuffle(family)
    found = originals(family)
    distance = np.bitwise_count(family[:, None] ^ family[None]).sum(-1)
    expected = np.arange(len(family))
    for one in range(len(family)):
        near = [o for o in range(one) if expected[o] == o and distance[one, o] <= MOST_BITS]
        expected[one] = min(near, default=one)
    assert (found == expected).all()
    assert 40 < len(set(found.tolist())) < len(family)  # chains exceed what is near
    assert originals(np.zeros((0, 32), np.uint8)).tolist() == []


def test_clips_that_differ_are_no_duplicates():
    media = [encode_clip(np.roll(numbered_clip(16), n, 0), 24.0) for n in (0, 1)]
    ours = [np.frombuffer(scoring.measure_media(one, "video").hash, np.uint8) for one in media]
    assert np.bitwise_count(ours[0] ^ ours[1]).sum() > MOST_BITS


def test_real_clips_are_like_their_copies_and_no_others(shared_clips):
    paths = sorted(shared_clips.glob("*.mp4"))[:8]
    media = [path.read_bytes() for path in paths]
    hashes = [scoring.measure_media(one, "video").hash for one in media]
    hashes += [scoring.measure_media(again(one, 32), "video").hash for one in media]
    found = originals(np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32))
    assert found.tolist() == 2 * list(range(len(paths)))


def test_scores_lie_beside_a_dataset_in_a_store_too(dataset, bucket, tmp_path):
    own = f"{bucket}/videos"
    for path in dataset.iterdir():
        storage.copy_to(path, f"{own}/{path.name}")
    ours, theirs = score(own), score(dataset)
    assert rows(ours) == rows(theirs)
    chosen = Columns(where="duplicate_of is null and fault is null and motion > 1")
    found = [
        build(source, out, **SIZE, columns=chosen).info.fingerprint
        for source, out in ((own, f"{bucket}/good"), (dataset, tmp_path / "good"))
    ]
    assert found[0] == found[1]
