"""Evaluation by a protocol, with stand-in networks that are random: what scores are laws of."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from data_pipeline.errors import ConfigError
from data_pipeline.feeding.config import NoConditioning, TextConditioning
from data_pipeline.media.codec import decode_clip
from data_pipeline.pyramid import level_clip
from t2v.cli import main
from t2v.evaluation.clips import bring_to, open_generated, open_real, window
from t2v.evaluation.conditions import request_for
from t2v.evaluation.protocol import Protocol, View, dump_protocol, load_protocol
from t2v.recipe.reading import parse
from t2v.recipe.recipe import load_config
from tests.distributed import run_distributed
from tests.frame_network import SIDE, write_frame_network
from tests.scenes import (
    CLIPS,
    SIZE,
    home,
    result_of,
    rules,
    run_evaluate,
    scene,
    write_rules,
    write_samples,
)
from tests.stand_ins import (
    write_clip_model,
)
from tests.tiny import tiny_config, tiny_content

__all__ = ["home"]
CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def test_protocol_is_read_back_equal_and_known_by_what_it_says(home, tmp_path):
    path = write_rules(tmp_path / "p.yaml", rules(home))
    protocol = load_protocol(path)
    (tmp_path / "q.yaml").write_text(dump_protocol(protocol))
    assert load_protocol(tmp_path / "q.yaml") == protocol
    elsewhere = load_protocol(path, ["i3d.path=elsewhere.pt", "real.dataset=other"])
    assert elsewhere.fingerprint == protocol.fingerprint
    for change in ("fps=9.0", "generated.clips=40", "codec=h264", "views.0.stride=1",
                   "uncertainty.seed=1", "i3d.resolution=24", "real.seed=1"):  # fmt: skip
        other = load_protocol(path, [change])
        assert (other.fingerprint == protocol.fingerprint) == (other == protocol), change


def test_shipped_protocols_are_whole_and_fit_their_recipes():
    recipes = {"ucf101": "ucf101_s.yaml", "t2v": "t2v_64x288x512.yaml"}
    paths = sorted((CONFIGS / "evaluation").glob("*.yaml"))
    assert len(paths) == 4
    for path in paths:
        protocol = load_protocol(path)
        config = load_config(CONFIGS / recipes[path.name.partition("_")[0]])
        assert protocol.name == path.stem
        assert protocol.fps == config.method.sampling.fps
        for view in protocol.views:
            level = config.method.pyramid.levels - 1 if view.level is None else view.level
            assert view.size == config.method.pyramid.size(level)


def test_distance_between_halves_is_near_zero_and_rises_with_noise(home, tmp_path):
    """Of a network that sees single frames: no distance that could be published."""
    network = write_frame_network(tmp_path / "frames.pt")
    content = rules(home, i3d={"path": str(network), "resolution": SIDE})
    content["views"][0] |= {"metrics": ["fvd", "mmd"]}
    protocol = write_rules(tmp_path / "p.yaml", content)
    values, kernel_distances = [], []
    for noise in (0.0, 12.0, 24.0, 48.0):
        folder = write_samples(tmp_path / f"noise{noise}", range(500, 500 + CLIPS), noise)
        assert run_evaluate(folder, protocol, tmp_path / f"out{noise}") == 0
        found = result_of(tmp_path / f"out{noise}")["views"]["whole"]
        values.append(found["fvd"]["value"])
        kernel_distances.append(found["mmd"]["value"])
    assert values == sorted(values)
    assert kernel_distances[1:] == sorted(kernel_distances[1:])
    assert abs(kernel_distances[0]) < 0.05 * kernel_distances[-1]
    # Two halves of one set differ by less than a twentieth of what noise makes of them.
    assert values[0] < 0.05 * values[-1]
    known = write_samples(tmp_path / "same", range(CLIPS))
    assert run_evaluate(known, protocol, tmp_path / "out") == 0
    # The dataset encodes its clips once more, nothing else is different.
    assert result_of(tmp_path / "out")["views"]["whole"]["fvd"]["value"] < values[0]


@pytest.mark.dist
@pytest.mark.slow
def test_any_number_of_processes_gives_the_same_result(home, tmp_path):
    changes = {"c3d": {"path": str(home / "c3d.pt"), "splits": 3}, "codec": "h264"}
    content = rules(home, **changes)
    content["views"][0] |= {"metrics": ["fvd", "inception_score"], "frames": 2}
    protocol = write_rules(tmp_path / "p.yaml", content)
    assert run_evaluate(home / "other", protocol, tmp_path / "one") == 0
    more = ("--cache", str(tmp_path / "cache of two"), "--workers", "2")
    arguments = (home / "other", protocol, tmp_path / "two", *more)
    assert run_distributed(run_evaluate, 2, *arguments) == [0, 0]
    assert result_of(tmp_path / "two") == result_of(tmp_path / "one")


def test_what_was_measured_is_kept_and_damage_is_measured_again(home, tmp_path):
    content = rules(home)
    content["generated"]["clips"] = 20
    protocol = write_rules(tmp_path / "p.yaml", content)
    assert run_evaluate(home / "other", protocol, tmp_path / "out") == 0
    before = result_of(tmp_path / "out")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    files = [path for path in kept if path.is_file()]
    assert len(files) == 3 + 2  # chunks of 16: 48 real clips, 20 generated ones
    damaged = files[0]
    damaged.write_bytes(damaged.read_bytes()[:-4])
    assert run_evaluate(home / "other", protocol, tmp_path / "out") == 0
    assert result_of(tmp_path / "out") == before
    changed = [path for path in files if path.stat().st_mtime_ns != kept[path]]
    assert changed == [damaged]
    # More clips of the same set: chunks that are whole are not measured again.
    content["generated"]["clips"] = CLIPS
    assert run_evaluate(home / "other", write_rules(protocol, content), tmp_path / "more") == 0
    assert sum(path.is_file() for path in (tmp_path / "cache").rglob("*")) == 5 + 2


def test_results_of_other_protocols_are_not_compared(home, tmp_path, capsys):
    protocol = write_rules(tmp_path / "p.yaml", rules(home))
    for out, target, more in (
        ("a", home / "other", ()),
        ("b", write_samples(tmp_path / "noisy", range(CLIPS), 20.0), ()),
        ("c", home / "other", ("--set", "generated.clips=40")),
    ):
        assert run_evaluate(target, protocol, tmp_path / out, *more) == 0
    # The protocol that was written down is the same one, with its digests.
    assert run_evaluate(home / "other", tmp_path / "a" / "protocol.yaml", tmp_path / "d") == 0
    assert result_of(tmp_path / "d") == result_of(tmp_path / "a")
    capsys.readouterr()
    assert main(["scores", str(tmp_path / "a"), str(tmp_path / "b" / "result.json")]) == 0
    table = capsys.readouterr().out
    for out in ("a", "b"):
        value = result_of(tmp_path / out)["views"]["whole"]["fvd"]["value"]
        assert f"{value:.4g} ±" in table
    assert main(["scores", str(tmp_path / "a"), str(tmp_path / "c")]) == 78
    error = capsys.readouterr().err.strip()
    assert "their protocols differ (generated.clips 48 and 40)" in error
    assert "\n" not in error


def test_few_clips_for_the_dimensions_are_told(home, tmp_path, capsys):
    content = rules(home)
    content["generated"]["clips"] = 6  # of 8 dimensions
    assert run_evaluate(
        home / "other", write_rules(tmp_path / "p.yaml", content), tmp_path / "out"
    ) == 0  # fmt: skip
    told = result_of(tmp_path / "out")
    assert not told["views"]["whole"]["fvd"]["full_rank"]
    assert "no full rank with 6 clips" in capsys.readouterr().out
    assert any("no full rank" in caveat for caveat in told["caveats"])


def test_real_and_generated_clips_come_to_a_view_alike():
    rng = np.random.default_rng(0)
    clip = rng.integers(0, 256, (8, 24, 32, 3), dtype=np.uint8)
    pyramid = tiny_config(
        pyramid={"levels": 3, "clip_size": [8, 24, 32]}, model={"levels_per_block": [1, 2, 3]},
        sampling={"steps": [1, 1, 1]},
    ).method.pyramid  # fmt: skip
    for level in range(3):
        view = View(name="v", level=level, size=pyramid.size(level), frames=1, metrics=["seam"])
        assert np.array_equal(bring_to(clip, view, "clip"), level_clip(clip, pyramid, level))
    view = View(name="v", size=(8, 24, 32), frames=3, stride=2, metrics=["seam"])
    assert np.array_equal(window(clip, view, "first", rng), clip[[0, 2, 4]])
    assert np.array_equal(window(clip, view, "center", rng), clip[[1, 3, 5]])
    starts = {int((clip == window(clip, view, "random", rng)[0]).all((1, 2, 3)).argmax())
              for _ in range(60)}  # fmt: skip
    assert starts == {0, 1, 2, 3}


def test_a_run_shows_what_real_clips_show_as_often(home):
    dataset = open_real(parse(Protocol, rules(home), "p"), "p").dataset
    few, many = (
        parse(Protocol, rules(home, generated={"clips": clips, "seed": 3}), "p")
        for clips in (20, 3000)
    )
    classes = tiny_config().conditioning
    labels = request_for(many, dataset, classes).labels
    assert request_for(few, dataset, classes).labels == labels[:20]
    # 3000 draws of three classes, each as often: within four deviations.
    assert abs(np.bincount(labels) - 1000).max() < 4 * (3000 * 2 / 9) ** 0.5
    text = TextConditioning(kind="text", encoder="tiny", width=8, max_tokens=8)
    asked = request_for(few, dataset, text)
    assert asked.prompts == tuple(f"scene {label}" for label in labels[:20])
    assert (asked.labels, asked.count, asked.seed, asked.levels) == ((), None, 3, False)
    assert request_for(few, dataset, NoConditioning(kind="none")).count == 20


def test_fewer_real_clips_are_the_first_of_more(home):
    def places(count: int) -> list[tuple[int, int]]:
        content = rules(home, real={"dataset": str(home / "real"), "clips": count, "seed": 4})
        return open_real(parse(Protocol, content, "p"), "p").places

    assert places(10) == places(30)[:10]
    assert len(set(places(CLIPS))) == CLIPS
    assert places(10) != sorted(places(10))


def test_text_score_is_clips_own_cosine(home, tmp_path):
    from transformers import AutoTokenizer, CLIPModel

    from t2v.evaluation.clips import Shown
    from t2v.evaluation.measures import CLIP_MEAN, CLIP_STD, TextAgreement
    from t2v.evaluation.protocol import CLIPText

    folder = write_clip_model(tmp_path / "clip", ["scene", "0", "1", "2"])
    measure = TextAgreement(CLIPText(path=str(folder), frames=2), torch.device("cpu"))
    clips = [np.repeat(np.repeat(scene(n)[:, :8, :8], 2, 1), 2, 2) for n in range(2)]  # 16x16
    shown = [Shown(clip, f"scene {n}") for n, clip in enumerate(clips)]
    with pytest.raises(ConfigError, match="a clip has no prompt; leave the metric out"):
        measure.of([Shown(clips[0], None)])
    found = measure.of(shown)
    model, tokenizer = CLIPModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    mean, std = (torch.tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    for row, clip in enumerate(shown):
        frames = torch.from_numpy(clip.clip[[0, 3]]).movedim(-1, 1).float() / 255
        with torch.no_grad():
            theirs = model(**tokenizer([clip.caption], return_tensors="pt"),
                           pixel_values=(frames - mean) / std)  # fmt: skip
        cosine = theirs.logits_per_image[:, 0] / model.logit_scale.detach().exp()
        assert found[row, 0] == pytest.approx(100 * float(cosine.mean()), abs=1e-3)
    weights = folder / "model.safetensors"
    some = {name: w for name, w in load_file(weights).items() if "visual_projection" not in name}
    save_file(some, weights, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 of its weights are missing .*visual_projection"):
        TextAgreement(measure.spec, torch.device("cpu")).of(shown)


@pytest.fixture(scope="module")
def run(home) -> Path:
    """A run of one step of a recipe with classes and two levels."""
    content = tiny_content(
        total_steps=1,
        run_dir=str(home / "run"),
        data={"sources": [{"path": str(home / "real")}]},
        sampling={"steps": [1, 1], "overlap": "w", "weights": "raw", "fps": 8.0},
    )
    (home / "recipe.yaml").write_text(yaml.safe_dump(content))
    assert main(["train", str(home / "recipe.yaml")]) == 0
    return home / "run"


def test_a_run_is_sampled_and_judged_at_each_level(home, run, tmp_path):
    views = [
        {"name": "coarse", "level": 0, "size": [2, 6, 8], "frames": 2, "metrics": ["fvd"]},
        {"name": "fine", "level": 1, "size": list(SIZE), "frames": 4, "metrics": ["fvd", "seam"]},
        {"name": "first", "size": list(SIZE), "frames": 2, "metrics": ["fvd"]},
    ]
    content = rules(home, views=views, generated={"clips": 4, "seed": 2})
    protocol = write_rules(tmp_path / "p.yaml", content)
    assert run_evaluate(run, protocol, tmp_path / "out") == 0
    result, samples = result_of(tmp_path / "out"), tmp_path / "out" / "samples"
    records = json.loads((samples / "samples.json").read_text())
    assert [record["seed"] for record in records] == [2, 3, 4, 5]
    assert {record["prompt"] for record in records} <= {0, 1, 2}
    assert [view for view in result["views"]] == ["coarse", "fine", "first"]
    assert set(result["views"]["fine"]["seam"]["axes"]) == {"frames", "height", "width"}
    assert (result["generated"]["step"], result["generated"]["clips"]) == (1, 4)
    # Each view looks at its own level's file.
    clips = open_generated(samples, parse(Protocol, content, "p"))
    coarse = parse(Protocol, content, "p").views[0]
    file = samples / records[0]["levels"]["0"]["file"]
    assert np.array_equal(clips.read(0, coarse, "as_stored").clip, decode_clip(file.read_bytes()))
    # A second evaluation finds the clips there, and says the same.
    made = {path: path.stat().st_mtime_ns for path in samples.glob("*.mp4")}
    assert run_evaluate(run, protocol, tmp_path / "out") == 0
    assert made == {path: path.stat().st_mtime_ns for path in samples.glob("*.mp4")}
    assert result_of(tmp_path / "out") == result
