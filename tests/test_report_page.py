"""The report: everything of a run folder is in it as text, and a real browser plays it."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import InputMissing
from data_pipeline.media.codec import encode_clip
from t2v.recipe.recipe import dump_config
from t2v.watching.page import bin_names, page, video, write_report
from t2v.watching.page_files import condensed, spread
from tests.tiny import tiny_config

EVIL = "<script>document.title = 'owned'</script><img src=x onerror=alert(1)>"
CLOSING = "</pre></script></style><b>bold"


def moving_clip(seed: int) -> bytes:
    """A second of a bright square that moves, as our encoder writes it."""
    clip = np.random.default_rng(seed).integers(0, 40, (24, 48, 64, 3), dtype=np.uint8)
    for number, frame in enumerate(clip):
        frame[16:32, number : number + 16] = (240, 180, 40)
    return encode_clip(clip, 24.0)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A run folder with something in every file, and markup wherever text may stand."""
    folder = tmp_path_factory.mktemp("runs") / "a & <b>run"
    folder.mkdir()
    held_out = {"every_steps": 10, "bins": 4, "sources": [{"path": CLOSING}]}
    config = tiny_config(held_out=held_out)
    (folder / "config.yaml").write_text(dump_config(config))
    lines: list[dict] = []
    for step in range(1, 61):
        loss = 1 + 2 / step
        lines.append(
            {
                "step": step, "loss": 2 * loss, "loss_level_0": loss,
                "loss_level_1": None if step == 30 else loss / 2, "grad_norm": 1 / step,
                "samples_per_second": 90.0, "data_wait_share": 0.01, "step_seconds": 0.1,
                "mfu": 0.41, "goodput": 0.97, "checkpoint_seconds": 0.0, "host_memory_gib": 1.5,
            }
        )  # fmt: skip
        if step % 10 == 0:
            of_bins = [loss * n for n in (1, 2, 3, 4)]
            lines.append(
                {
                    "step": step, "held_out_loss": 5 * loss, "held_out_level_0": 2.5 * loss,
                    "held_out_level_1": 2.5 * loss, "held_out_level_0_bins": of_bins,
                    "held_out_level_1_bins": [*of_bins[:3], None], "held_out_samples": 8,
                    "held_out_weights": "ema", "held_out_bin_axis": EVIL,
                    "held_out_bin_edges": [0.25, 1.0, 40],
                }
            )  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 61, "lo')
    status = {"state": "failed", "reason": EVIL, "step": 60, "total_steps": 100, "updated": "now"}
    (folder / "status.json").write_text(json.dumps(status | {"last_checkpoint": 50}))
    attempts = [
        {"attempt": 1, "event": "start", "at": "t0", "host": EVIL, "world_size": 2, "step": 0},
        {"attempt": 1, "event": "end", "at": "t1", "state": "failed", "exit_code": 74, "step": 33},
        {"attempt": 2, "event": "start", "at": "t2", "host": "node", "world_size": 2, "step": 30},
    ]
    (folder / "attempts.jsonl").write_text("".join(json.dumps(a) + "\n" for a in attempts))
    (folder / "failure.md").write_text(f"# What failed\n\n{CLOSING} on rank 3")
    bad = [{"n": n, "id": "0/1/2", "reason": f"{EVIL} is no video"} for n in range(3)]
    (folder / "quarantine.jsonl").write_text("".join(json.dumps(b) + "\n" for b in bad))
    for step in (20, 40, 60):
        samples = folder / "samples" / f"step-{step:08d}"
        samples.mkdir(parents=True)
        records = [{"prompt": EVIL, "file": "0000.mp4"}, {"prompt": "a panda", "file": "0001.mp4"}]
        (samples / "samples.json").write_text(json.dumps(records))
        for number in range(2):
            (samples / f"{number:04d}.mp4").write_bytes(moving_clip(step + number))
    (folder / "samples" / "step-00000060" / "0001.mp4").write_bytes(b"no video")
    (folder / "samples" / "state.json").write_text(
        json.dumps({"state": "failed", "step": 60, "reason": EVIL})
    )
    return folder


def test_whatever_a_run_says_stays_text_and_nothing_is_fetched(run_dir):
    text = page(run_dir)
    assert EVIL not in text
    assert CLOSING not in text
    assert text.count("<script>") == 1
    assert "&lt;script&gt;document.title" in text
    assert "default-src 'none'" in text
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert not re.search(r"url\(|@import|https?://", text)


def test_every_part_of_the_run_is_told(run_dir):
    text = page(run_dir)
    for said in (
        "60 of 100", "41.0%", "97.0%", "Level 1 by noise", "3 samples could not be used",
        "no end", "step 20", "damaged", "token_head_dim: 8", "Dotted lines are restarts",
        "on rank 3", "&gt; &lt; 0.25", "&gt; 0.25 to 1", "&gt; 1 to 40", "&gt; &gt; 40",
    ):  # fmt: skip
        assert said in text, said
    assert text.count("<video") == 5


def test_clips_are_what_browsers_play():
    import av

    with av.open(__import__("io").BytesIO(moving_clip(0))) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert context.profile in ("High", "Main", "Constrained Baseline", "Baseline")
    assert video(b"") == '<span class="soft">none</span>'


def test_a_run_that_has_only_begun_has_a_page_and_no_run_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(InputMissing, match="no such run"):
        write_report(tmp_path / "run", tmp_path / "x.html")
    (tmp_path / "run" / "config.yaml").write_text("not: [a recipe")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (tmp_path / "run" / "status.json").write_text("{")
    written = write_report(tmp_path / "run", tmp_path / "deep" / "x.html")
    assert "no values yet" in written.read_text()


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 7, "held_out_loss": 1, "held_out_level_0": null, "held_out_level_0_bins": null}',
        '{"step": 7, "held_out_loss": 1, "held_out_level_0": "x", "held_out_level_0_bins": 3}',
        '{"step": 7, "held_out_loss": 1, "held_out_level_0_bins": [1, 2], "held_out_bin_edges": 5}',
        '{"step": 7, "loss": 1' + 400 * "0" + "}",
        '{"step": 7, "loss": NaN, "mfu": [], "samples_per_second": {}}',
    ],
)
def test_lines_that_say_nothing_do_not_hide_the_page(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text('{"step": 6, "loss": 1.0}\n' + line + "\n")
    assert "<h2>Held-out loss</h2>" in page(tmp_path)


@pytest.mark.parametrize(
    ("bins", "edges", "names"),
    [
        ([1.0], [], ["all"]),
        ([1.0, 2.0], [0.5], ["time < 0.5", "time > 0.5"]),
        ([1.0, 2.0, 3.0], [0.25, 0.75], ["time < 0.25", "time 0.25 to 0.75", "time > 0.75"]),
        ([1.0, 2.0, 3.0], [0.25, None], ["bin 0", "bin 1", "bin 2"]),
        ([1.0, 2.0, 3.0], None, ["bin 0", "bin 1", "bin 2"]),
        (None, [0.5], []),
    ],
)
def test_a_bin_is_named_by_its_edges_or_its_number(bins, edges, names):
    line = {"held_out_a_bins": bins, "held_out_bin_axis": "time", "held_out_bin_edges": edges}
    assert bin_names(line, "held_out_a_bins") == names


@pytest.mark.parametrize("count", [1, 99, 100, 101, 1000, 12_345])
def test_very_many_lines_become_means_of_neighbours(count):
    lines = [{"step": n, "loss": float(n % 5), "name": "x"} for n in range(1, count + 1)]
    few = condensed(iter(lines), 100)
    assert len(few) <= 101
    assert (few[-1]["step"], few == lines) == (count, count < 100)
    assert all(list(line) == ["step", "loss", "name"] for line in few)
    gaps = [line["step"] for line in few]
    before = [0, *gaps[:-1]]
    weighted = sum(
        line["loss"] * (end - start) for line, start, end in zip(few, before, gaps, strict=True)
    )
    assert weighted == pytest.approx(sum(line["loss"] for line in lines))


def test_steps_shown_are_spread_from_first_to_last():
    assert spread([1, 2, 3], 6) == [1, 2, 3]
    shown = spread(list(range(100, 2000, 100)), 6)
    assert (len(shown), shown[0], shown[-1]) == (6, 100, 1900)
    assert shown == sorted(set(shown))


@pytest.fixture(scope="module")
def browser():
    """A real Chromium without a window."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium and chromedriver here; apt-get install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--disable-gpu", "--window-size=1200,1600"):
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()


def test_a_real_browser_opens_the_page_and_plays_its_clips(run_dir, tmp_path, browser):
    from selenium.webdriver.support.ui import WebDriverWait

    written = write_report(run_dir, tmp_path / "report.html")
    browser.get(written.as_uri())
    assert browser.title == "a & <b>run"
    first = browser.find_element("css selector", "video")
    browser.execute_script("arguments[0].scrollIntoView()", first)
    clip = "document.querySelector('video')"
    WebDriverWait(browser, 30).until(
        lambda chrome: chrome.execute_script(f"return {clip}.currentTime > 0.1")
    )
    state = f"return [{clip}.paused, {clip}.videoWidth, {clip}.duration, {clip}.error]"
    assert browser.execute_script(state) == [False, 64, pytest.approx(1.0, abs=0.1), None]
    browser.find_element("id", "all").click()
    WebDriverWait(browser, 10).until(
        lambda chrome: chrome.execute_script(
            "return [...document.querySelectorAll('video')].every(clip => clip.paused)"
        )
    )
    widths = "return [document.documentElement.scrollWidth, window.innerWidth]"
    page_width, window_width = browser.execute_script(widths)
    assert page_width <= window_width
    problems = [entry for entry in browser.get_log("browser") if entry["level"] != "DEBUG"]
    assert problems == []
    assert browser.execute_script("return document.images.length") == 5  # EVIL's is no image
