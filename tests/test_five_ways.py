"""The commands of docs/data.md for what people have, run as they stand there on miniatures."""

import json
import re
import shlex
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from numbered import numbered_video, write_csv, write_lines
from test_foreign_shards import pack
from test_import_embeddings import npy

from data_pipeline.shards.dataset import open_dataset
from data_pipeline.text.encoder import TextEncoder
from t2v.cli import main

DOCS = Path(__file__).parent.parent / "docs" / "data.md"
VIDEO = numbered_video(24)


def commands() -> list[list[str]]:
    section = DOCS.read_text().partition("## Five ways in")[2]
    block = re.search(r"```\n(.*?)```", section, re.DOTALL)
    assert block
    lines = block.group(1).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line]


def video2dataset(folder: Path) -> None:
    for shard in range(2):
        members: dict[str, bytes] = {}
        for number in range(2):
            key, score = f"0000{shard}000{number}", 0.1 + 0.2 * number
            told = {"caption": f"clip {key}", "similarity": score, "key": key, "status": "success",
                    "url": "u", "clips": [[0.0, 1.0]], "yt_meta_dict": {"info": {"title": None}},
                    "video_metadata": {"streams": [{"codec_type": "video"}]}}  # fmt: skip
            members |= {f"{key}.mp4": VIDEO, f"{key}.json": json.dumps(told).encode(),
                        f"{key}.txt": f"clip {key}".encode()}  # fmt: skip
        pack(folder / f"0000{shard}.tar", members)
        (folder / f"0000{shard}.parquet").write_bytes(b"PAR1")
        (folder / f"0000{shard}_stats.json").write_text('{"successes": 2}')


def own_embeddings(folder: Path, encoder: Path) -> None:
    prompts = ["a red circle", "a blue square"]
    reader = TextEncoder(encoder, max_tokens=16)
    members: dict[str, bytes] = {}
    for number, tokens in enumerate(reader.encode(prompts)):
        told = json.dumps({"prompt": prompts[number]}).encode()
        members |= {f"{number}.mp4": VIDEO, f"{number}.json": told,
                    f"{number}.t5.npy": npy(tokens.float().numpy().astype(np.float16))}  # fmt: skip
    pack(folder / "0.tar", members)


@pytest.fixture
def here(tmp_path, datasets, monkeypatch) -> Path:
    video2dataset(tmp_path / "video2dataset_shards")
    (tmp_path / "openvid_zips").mkdir()
    with zipfile.ZipFile(tmp_path / "openvid_zips" / "OpenVid_part0.zip", "w") as archive:
        archive.writestr("videos/celebv_a.mp4", VIDEO)
        archive.writestr("videos/celebv_b.mp4", VIDEO)
    write_csv(tmp_path / "OpenVid-1M.csv", [
        {"video": f"celebv_{name}.mp4", "caption": f"a face, {name}", "aesthetic score": 5.1,
         "motion score": 2.0, "temporal consistency score": 0.99, "camera motion": "static",
         "frame": 24, "fps": 24.0, "seconds": 1.0} for name in "ab"
    ])  # fmt: skip
    (tmp_path / "youtube").mkdir()
    (tmp_path / "youtube" / "--C66yU3LjM.mp4").write_bytes(VIDEO)
    write_csv(tmp_path / "panda70m_training.csv", [
        {"videoID": "--C66yU3LjM", "url": "https://www.youtube.com/watch?v=--C66yU3LjM",
         "timestamp": "[['0:00:00.000', '0:00:00.400'], ['0:00:00.500', '0:00:00.900']]",
         "caption": str(["bars A", "bars' B"]), "matching_score": "[0.4, 0.5]"},
        {"videoID": "gone", "url": "u", "timestamp": "[['0:00:00.000', '0:00:00.400']]",
         "caption": "['gone']", "matching_score": "[0.4]"},
    ])  # fmt: skip
    write_lines(tmp_path / "InternVid.jsonl", [
        {"YoutubeID": "--C66yU3LjM", "Start_timestamp": start, "End_timestamp": end,
         "Caption": caption, "Aesthetic_Score": score, "UMT_Score": 0.4}
        for start, end, caption, score in (("00:00:00.000", "00:00:00.400", "first", 4.5),
                                           ("00:00:00.500", "00:00:00.900", "ugly", 3.5))
    ])  # fmt: skip
    own_embeddings(tmp_path / "own_shards", datasets / "encoder")
    shutil.copytree(datasets / "encoder", tmp_path / "t5_folder")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def captions(folder: str) -> list[str]:
    dataset = open_dataset(folder)
    places = [(s, r) for s, n in enumerate(dataset.shard_sizes.tolist()) for r in range(n)]
    return [dataset.read_told(*place)[1].first for place in places]


def test_every_command_takes_in_what_it_is_for(here, capsys):
    for words in commands():
        assert words[0] == "t2v"
        assert main([*words[1:], *(["--workers", "1"] if words[2] == "build" else [])]) == 0, words
    as_they_are = open_dataset("video2dataset_shards")
    assert as_they_are.info.samples == 4
    passed_over = {"file of type .json": 2, "file of type .parquet": 2}
    assert as_they_are.info.account.passed_over == passed_over
    cut = [f"clip 0000{shard}0001" for shard in (0, 1) for _ in range(3)]
    assert captions("data/again") == cut
    assert captions("data/openvid") == ["a face, a", "a face, b"]
    assert captions("data/panda") == ["bars A", "bars' B"]
    panda, internvid = open_dataset("data/panda"), open_dataset("data/internvid")
    assert panda.read_told(0, 1)[0]["start_seconds"] == 0.5
    assert panda.info.account.not_wanted == {"no such file": 1}
    assert captions("data/internvid") == ["first"]
    assert internvid.info.account.not_wanted == {"row is not --where": 1}
    assert "2 encoded again, all equal" in capsys.readouterr().out
