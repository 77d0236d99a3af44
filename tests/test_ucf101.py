"""UCF-101 as its authors pack it: split lists, labels from the class list, captions, refusals."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from data_pipeline.errors import ConfigError, DataError, InputMissing
from data_pipeline.making.build import build
from data_pipeline.making.ucf101 import class_words, list_ucf101
from data_pipeline.making.verify import verify
from data_pipeline.shards.dataset import open_dataset
from t2v.cli import main

CLASSES = ["ApplyEyeMakeup", "HandstandPushups", "YoYo"]
TRAIN = [
    ("ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi", 1),
    ("HandstandPushups/v_HandStandPushups_g08_c01.avi", 2),  # spelt so by the authors
    ("YoYo/v_YoYo_g08_c01.avi", 3),
    ("YoYo/v_YoYo_g08_c02.avi", 3),
]
TEST = ["ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi", "YoYo/v_YoYo_g01_c01.avi"]


def write_avi(path: Path, frames: int, grey: int) -> None:
    """MPEG-4 part 2 in AVI at 25 fps, marked as Xvid's, as the official files are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(25))
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        stream.codec_context.codec_tag = "XVID"
        picture = np.full((24, 32, 3), grey, np.uint8)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture
def root(tmp_path) -> Path:
    """Six videos in three classes, and the first split's lists with the authors' line ends."""
    folder, lists = tmp_path / "ucf", tmp_path / "ucf" / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    for number, file in enumerate([file for file, _ in TRAIN] + TEST):
        write_avi(folder / "UCF-101" / file, frames=12, grey=20 * number)
    classes = [f"{number} {name}" for number, name in enumerate(CLASSES, 1)]
    (lists / "classInd.txt").write_bytes(("\r\n".join(classes) + "\r\n").encode())
    train = [f"{file} {label}" for file, label in TRAIN]
    (lists / "trainlist01.txt").write_bytes(("\r\n".join(train) + "\r\n").encode())
    (lists / "testlist01.txt").write_bytes(("\r\n".join(TEST) + "\r\n").encode())
    return folder


def test_a_split_becomes_a_dataset_with_labels_and_captions(root, tmp_path):
    dataset = build(
        root, tmp_path / "train", frames=8, height=16, width=16, fps=25.0, split="train01"
    )
    assert dataset is not None
    records = [dataset.read(0, row) for row in range(dataset.info.samples)]
    assert [record.metadata["label"] for record in records] == [0, 1, 2, 2]
    assert [record.metadata["source"] for record in records] == [f"UCF-101/{f}" for f, _ in TRAIN]
    assert [record.caption for record in records] == [
        "apply eye makeup",
        "handstand pushups",
        "yo yo",
        "yo yo",
    ]
    assert (dataset.info.notes["split"], dataset.info.fps) == ("train01", 25.0)
    assert not verify(str(tmp_path / "train"), workers=1)


def test_splits_share_no_video_and_all_is_their_union(root):
    files = {
        split: {file for file, *_ in list_ucf101(str(root), split)[0]}
        for split in ("train01", "test01", "all")
    }
    assert not files["train01"] & files["test01"]
    assert files["train01"] | files["test01"] == files["all"]
    labels = {told["label"] for *_, told in list_ucf101(str(root), "test01")[0]}
    assert labels == {0, 2}  # test lists tell no number: the class list does


def test_command_line_builds_a_split(root, tmp_path, capsys):
    out = str(tmp_path / "data")
    command = ["data", "build", str(root), out, "--size", "8x16x16", "--workers", "1"]
    assert main(command) == 78
    assert "--split: missing because" in capsys.readouterr().err
    assert main([*command, "--split", "test01", "--min-seconds", "0.32"]) == 0
    assert open_dataset(out).info.samples == 2


def test_words_of_a_class():
    assert class_words("BasketballDunk") == "basketball dunk"
    assert class_words("TaiChi") == "tai chi"


def test_what_is_wrong_with_lists_is_one_line(root, tmp_path):
    def refusal(kind: type[Exception], split: str | None = "train01") -> str:
        with pytest.raises(kind) as caught:
            list_ucf101(str(root), split)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    lists = root / "ucfTrainTestlist"
    assert "'train09' is wrong" in refusal(ConfigError, "train09")
    assert "trainlist02.txt: no such list" in refusal(InputMissing, "train02")
    original = (lists / "trainlist01.txt").read_text()
    (lists / "trainlist01.txt").write_text("YoYo/v_YoYo_g08_c01.avi 2\n")
    assert "line 1: class 2 is wrong" in refusal(DataError)
    (lists / "trainlist01.txt").write_text("YoYo/v_YoYo_g99_c01.avi 3\n")
    assert "holds no such video" in refusal(InputMissing)
    (lists / "trainlist01.txt").write_text("../secret/v.avi 3\n")
    assert "folder of no class" in refusal(DataError)
    (lists / "trainlist01.txt").write_text(original + original)
    assert "line 5: " in refusal(DataError)
    (lists / "classInd.txt").write_text("1 ApplyEyeMakeup\n3 YoYo\n")
    assert "classInd.txt: line 2: '3 YoYo' is wrong" in refusal(DataError)
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match="is not UCF-101"):
        build(tmp_path / "other", tmp_path / "x", frames=8, height=16, width=16, split="train01")
