"""Guidance away from what an older checkpoint says."""

import json
import shutil

import pytest
import torch
import yaml
from torch import Tensor

from t2v.cli import main
from t2v.methods.hpdm.cost import sampling_flops
from t2v.methods.hpdm.network import HPDM
from t2v.methods.hpdm.sampling import generate
from t2v.recipe.recipe import RunConfig, method_of
from tests.test_budgets import counted
from tests.test_sampling import gentle_model, sample, three_levels
from tests.tiny import THREE_LEVELS, class_condition, tiny_content

SETTINGS = {"steps": [2, 2, 1], "overlap": ["", "w", ""], "guide_checkpoint": "older"}


def guided(
    model: HPDM, guide: HPDM, config: RunConfig, labels: tuple[int, ...] = (1, 0)
) -> list[Tensor]:
    return generate(
        model,
        guide=guide,
        condition=class_condition(list(labels)),
        null=class_condition([3] * len(labels)),
        seeds=list(range(len(labels))),
        sampling=config.method.sampling,
        diffusion=config.method.diffusion,
    )


def two_models() -> tuple[HPDM, HPDM]:
    model, guide = (gentle_model(three_levels()) for _ in range(2))
    with torch.no_grad():
        for number, parameter in enumerate(guide.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(0.05 * noise)
    return model, guide


@pytest.mark.parametrize(("guide", "labels"), [("prompt", [1, 0]), ("null", [3, 3])])
def test_guidance_of_0_is_the_guides_own_clip(guide, labels):
    """Features of finished levels and latents of earlier steps included."""
    model, older = two_models()
    config = three_levels(**SETTINGS, guide=guide, guidance_scale=0.0)
    found = guided(model, older, config)
    plain = three_levels(steps=SETTINGS["steps"], overlap=SETTINGS["overlap"])
    own, others = (sample(network, plain, labels, [0, 1]) for network in (older, model))
    for one, other, alien in zip(found, own, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
        assert float((one - alien).abs().max()) > 1e-2


def test_a_guide_that_is_the_model_leads_nowhere():
    model, _ = two_models()
    config = three_levels(**SETTINGS, guide="prompt", guidance_scale=3.0)
    plain = three_levels(steps=SETTINGS["steps"], overlap=SETTINGS["overlap"])
    found = guided(model, gentle_model(three_levels()), config)
    for one, other in zip(found, sample(model, plain, [1, 0], [0, 1]), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("guide", ["null", "prompt"])
def test_the_operations_of_both_networks_are_forecast(guide):
    config = three_levels(**SETTINGS, guide=guide, guidance_scale=[2.0, 1.0, 2.0], tile_batch=500)
    model, older = two_models()
    older.requires_grad_(False)
    taken = counted(model, lambda: guided(model, older, config, (1,)))
    with torch.device("meta"):
        network = method_of(config).network()
    method = config.method
    told = sampling_flops(network, method.sampling, method.diffusion, config.conditioning)
    assert sum(told) == taken


def test_the_command_guides_by_an_older_step_and_by_no_other_network(datasets, tmp_path, capsys):
    content = tiny_content(
        **THREE_LEVELS | {"sampling": {"steps": [2, 1, 1], "overlap": ""}},
        total_steps=4,
        run_dir=str(tmp_path / "run"),
        checkpoint={"every_steps": 2},
        data={"sources": [{"path": str(datasets / "videos")}]},
    ) | {"conditioning": {"kind": "none"}}
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(content))
    assert main(["train", str(recipe)]) == 0
    wider = ["run_dir=" + str(tmp_path / "wider"), "method.model.token_dim=24"]
    assert main(["train", str(recipe), "total_steps=1", *wider]) == 0
    older = tmp_path / "older"
    shutil.copytree(run / "checkpoints" / "step-00000002", older / "step-00000002")

    def keys(name: str, guide: str, *more: str) -> list[str]:
        told = ("guide=prompt", "guidance_scale=2", f"guide_checkpoint={guide}", *more)
        out = tmp_path / name
        settings = [f"--set={one}" for one in told]
        code = main(["sample", str(run), "--count=1", f"--out={out}", *settings])
        assert code == (78 if name == "refused" else 0)
        written = out / "samples.json"
        return [one["key"] for one in json.loads(written.read_text())] if code == 0 else []

    # A clip follows from the weights that guide it, by whatever path they are told.
    by_step = keys("step", str(older / "step-00000002"))
    assert keys("folder", str(older)) == by_step
    shutil.copytree(run / "checkpoints" / "step-00000004", older / "step-00000004")
    assert keys("later", str(older)) != by_step
    capsys.readouterr()
    keys("refused", str(tmp_path / "wider"))
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "is another network (method.model.token_dim: 24 -> 16); give an older" in line
