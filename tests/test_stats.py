"""The numbers of a dataset are those of its samples."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from data_pipeline.making.indexing import index
from data_pipeline.making.stats import measure, write_page
from data_pipeline.shards.tar import write_tar


def test_numbers_are_those_of_the_samples(media, datasets):
    stats = measure(datasets / "videos")
    captions = [
        json.loads(line)["caption"]
        for line in (media / "videos" / "captions.jsonl").read_text().splitlines()
    ]
    assert (stats.samples, stats.shards, stats.read, stats.unreadable) == (26, 5, 26, 0)
    assert sorted(stats.caption_words) == sorted(len(caption.split()) for caption in captions)
    assert stats.distinct_captions == len(set(captions))
    assert stats.resolutions == {"48x32": 26}
    assert stats.hours == pytest.approx(26 / 3600)
    assert (
        0
        < stats.media_bytes
        < sum(path.stat().st_size for path in (datasets / "videos/shards").glob("*.tar"))
    )
    assert measure(datasets / "images").seconds == []


def test_foreign_media_are_probed(shared_clips, tmp_path):
    samples = [(path.stem, {path.suffix[1:]: path.read_bytes(), "txt": b"odd"})
               for path in sorted((shared_clips / "odd").iterdir())]  # fmt: skip
    write_tar(str(tmp_path / "0.tar"), [*samples, ("zeros", {"mp4": bytes(400), "txt": b""})])
    index(tmp_path)
    stats = measure(tmp_path)
    assert stats.unreadable == 1
    assert stats.resolutions["1280x720"] == 3
    assert stats.resolutions["270x480"] == 1
    assert max(stats.seconds) == pytest.approx(5.0)
    assert "no pictures" in Path(write_page(stats)).read_text()


def test_the_page_stands_alone_and_escapes_what_others_wrote(datasets, tmp_path):
    own = shutil.copytree(datasets / "images", tmp_path / "images")
    manifest = own / "dataset.json"
    content = json.loads(manifest.read_text()) | {"notes": {"licence": "<script>alert(1)</script>"}}
    manifest.write_text(json.dumps(content))
    page = Path(write_page(measure(own))).read_text()
    tags: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append(tag)
    parser.feed(page)
    assert {"table", "svg", "img"} <= set(tags)
    assert "script" not in tags
    assert not re.search(r'(src|href)="(?!data:)', page)
