"""Work in time passes through; work that is stuck in C ends as a bad sample."""

import ctypes
import threading
import time

import numpy as np
import pytest
from test_loader import NONE, config, make

from data_pipeline.errors import DataError
from data_pipeline.feeding import sample
from data_pipeline.shards import pixels
from data_pipeline.store.deadline import within


def test_what_work_returns_or_raises_passes_through():
    assert within(5.0, lambda: 7) == 7
    with pytest.raises(DataError, match="too short"):
        within(5.0, lambda: (_ for _ in ()).throw(DataError("is too short")))
    with pytest.raises(KeyboardInterrupt):
        within(5.0, lambda: (_ for _ in ()).throw(KeyboardInterrupt))


def stuck(seconds: int = 3) -> None:
    ctypes.CDLL(None).sleep(seconds)


def test_work_stuck_in_c_is_given_up_in_time():
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"stuck in decoding, for more than 0\.1 seconds"):
        within(0.1, stuck)
    assert time.monotonic() - begin < 1.0
    assert any(thread.name == "decode" and thread.daemon for thread in threading.enumerate())


def test_a_sample_that_sticks_its_decoder_is_replaced(datasets, monkeypatch):
    data = config(datasets / "videos", decode_deadline_seconds=0.5)
    (expected,) = next(make(data, conditioning=NONE, micro=12).steps(0, 1))
    decode = pixels.decode_patches
    poisoned = []

    def sticky(media: bytes, *arguments, **options) -> np.ndarray:
        poisoned.append(media) if not poisoned else None
        if media == poisoned[0]:
            stuck()
        return decode(media, *arguments, **options)

    monkeypatch.setattr(pixels, "decode_patches", sticky)
    monkeypatch.setattr(sample, "GRACE_SECONDS", 0.5)
    (batch,) = next(make(data, conditioning=NONE, micro=12).steps(0, 1))
    (record,) = batch.quarantined
    assert record == {"n": 0, "id": expected.ids[0], "reason": record["reason"]}
    assert "is stuck in decoding" in record["reason"]
    assert batch.ids[0] != expected.ids[0]
    assert batch.ids[1:] == expected.ids[1:]
