"""From a checkpoint and prompts to files: mp4, a contact sheet, and the settings of every clip."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from data_pipeline import storage
from data_pipeline.embed import TextEncoder
from data_pipeline.embeddings import Provenance
from data_pipeline.errors import ConfigError
from data_pipeline.loader import ClassConditioning, TextConditioning
from data_pipeline.pyramid import Clip
from data_pipeline.video import encode_clip
from t2v.config import RunConfig, parse_config
from t2v.engine.compute import set_matmul_precision
from t2v.model.conditioning import Condition
from t2v.model.hpdm import build_model
from t2v.sampling import generate
from t2v.train.finding import load_weights, resolve_checkpoint
from t2v.train.manifest import read_manifest

MAX_PROMPT_CHARACTERS = 2000


def sample_checkpoint(
    checkpoint: str | Path,
    *,
    prompts: list[str],
    labels: list[int],
    out: str | Path,
    encoder: str | None,
    seed: int = 0,
    overrides: list[str] | tuple[str, ...] = (),
    clips_at_once: int = 8,
) -> Path:
    """Write one mp4 per prompt or label, contact_sheet.png and samples.json; returns the folder.

    Clip number i has seed `seed + i`. The encoder must be the one that embedded the training set.
    """
    folder = resolve_checkpoint(checkpoint)
    manifest = read_manifest(folder)
    config = with_sampling(parse_config(manifest.config, str(folder)), overrides)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    subjects, condition, null = conditions(
        config, prompts, labels, encoder, manifest.text_encoder, device
    )
    # Before hours of sampling: is it a folder?
    Path(out).mkdir(parents=True, exist_ok=True)
    set_matmul_precision(config.engine)
    model = build_model(config)
    load_weights(folder, model, weights=config.sampling.weights)
    model.to(device).eval()

    clips: list[Clip] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        steps_per_clip = sum(config.sampling.steps)
        bar = progress.add_task("sampling", total=len(subjects) * steps_per_clip)
        for first in range(0, len(subjects), clips_at_once):
            rows = torch.arange(first, min(first + clips_at_once, len(subjects)), device=device)
            advance = partial(progress.advance, bar, len(rows))
            finest = generate(
                model,
                condition=condition.rows(rows),
                null=null.rows(rows),
                seeds=[seed + row for row in rows.tolist()],
                sampling=config.sampling,
                diffusion=config.diffusion,
                progress=advance,
            )[-1]
            clips += [to_bytes(clip) for clip in finest]
    return write_samples(Path(out), folder, config, subjects, clips, seed)


def with_sampling(config: RunConfig, overrides: list[str] | tuple[str, ...]) -> RunConfig:
    """The recipe with other sampling settings; they are checked like a recipe's."""
    content = config.model_dump(mode="json")
    for override in overrides:
        key, _, text = override.partition("=")
        try:
            content["sampling"][key.removeprefix("sampling.")] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set {override}: the value is not valid YAML; quote it.") from None
    return parse_config(content, "sampling")


def conditions(
    config: RunConfig,
    prompts: list[str],
    labels: list[int],
    encoder: str | None,
    trained_with: Provenance | None,
    device: torch.device,
) -> tuple[list[str] | list[int], Condition, Condition]:
    """(what each clip shows, its condition, the null condition), one row per clip."""
    kind = config.conditioning
    subjects: list[str] | list[int]
    text = null_text = label = null_label = None
    if isinstance(kind, TextConditioning):
        subjects = check_prompts(prompts)
        if encoder is None:
            raise ConfigError(
                "--encoder: missing because the checkpoint reads text; give the folder or hub id "
                f"of the encoder that made its embeddings '{kind.encoder}'."
            )
        reader = TextEncoder(encoder, max_tokens=kind.max_tokens)
        if trained_with is None or not reader.provenance.same_encoder(trained_with):
            raise ConfigError(
                f"--encoder: {encoder} is wrong because the checkpoint was trained with another "
                f"one, {trained_with and trained_with.encoder}; give that."
            )
        text = pad_tokens(reader.encode(subjects), kind, device)
        null_text = pad_tokens(reader.encode([""] * len(subjects)), kind, device)
    elif isinstance(kind, ClassConditioning):
        subjects = labels
        bad = [value for value in labels if not 0 <= value < kind.num_classes]
        if bad or not labels:
            raise ConfigError(
                f"--label: {bad or 'none'} is wrong because the checkpoint has classes 0 to "
                f"{kind.num_classes - 1}; give --label for each clip."
            )
        label = torch.tensor(labels, device=device)
        null_label = torch.full_like(label, kind.num_classes)
    else:
        subjects = check_prompts(prompts)
    count = len(subjects)
    shared = {
        "fps": torch.full((count,), config.sampling.fps, device=device),
        "original_size": torch.tensor(config.sampling.original_size, device=device)
        .float()
        .repeat(count, 1),
    }
    tokens, mask = text or (None, None)
    null_tokens, null_mask = null_text or (None, None)
    condition = Condition(**shared, text_tokens=tokens, text_mask=mask, label=label)
    null = Condition(**shared, text_tokens=null_tokens, text_mask=null_mask, label=null_label)
    return subjects, condition, null


def read_prompts(path: Path) -> list[str]:
    """One prompt per line; empty lines are passed over."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text; save the prompts as UTF-8.") from None
    return [line for line in lines if line.strip()]


def check_prompts(prompts: list[str]) -> list[str]:
    """The prompts, if there are any and each is text of reasonable length."""
    if not prompts:
        raise ConfigError("--prompt: missing because there is nothing to sample; give one or more.")
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip() or len(prompt) > MAX_PROMPT_CHARACTERS:
            raise ConfigError(
                f"prompt {number}: {len(prompt)} characters is wrong because a prompt has 1 to "
                f"{MAX_PROMPT_CHARACTERS}; shorten it or remove the line."
            )
    return prompts


def pad_tokens(
    embeddings: list[Float[Tensor, "tokens width"]], kind: TextConditioning, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(tokens, mask) of one shape, as the loader pads them."""
    tokens = torch.zeros(len(embeddings), kind.max_tokens, kind.width)
    mask = torch.zeros(len(embeddings), kind.max_tokens, dtype=torch.bool)
    for row, embedding in enumerate(embeddings):
        length = min(len(embedding), kind.max_tokens)
        tokens[row, :length] = embedding[:length].float()
        mask[row, :length] = True
    return tokens.to(device), mask.to(device)


def to_bytes(clip: Float[Tensor, "channels frames height width"]) -> Clip:
    """[-1, 1] -> bytes, channels last."""
    pixels = ((clip.float().cpu() + 1) * 127.5).round().clamp(0, 255)
    return rearrange(pixels, "c t h w -> t h w c").to(torch.uint8).numpy()


def write_samples(
    out: Path,
    checkpoint: Path,
    config: RunConfig,
    subjects: list[str] | list[int],
    clips: list[Clip],
    seed: int,
) -> Path:
    """mp4 files, contact_sheet.png and, last, samples.json."""
    out.mkdir(parents=True, exist_ok=True)
    records = []
    for number, (subject, clip) in enumerate(zip(subjects, clips, strict=True)):
        file = f"{number:04d}.mp4"
        storage.write_atomic(str(out / file), encode_clip(clip, config.sampling.fps or 1.0))
        records.append(
            {
                "prompt": subject,
                "file": file,
                "seed": seed + number,
                "checkpoint": str(checkpoint),
                "settings": config.sampling.model_dump(mode="json"),
            }
        )
    contact_sheet(clips).save(out / "contact_sheet.png")
    storage.write_atomic(str(out / "samples.json"), json.dumps(records, indent=1).encode())
    return out


def contact_sheet(clips: list[Clip], frames: int = 4, min_height: int = 72) -> Image.Image:
    """Four frames of every clip in a row, two clips side by side."""
    strips = []
    for clip in clips:
        chosen = clip[np.linspace(0, len(clip) - 1, min(frames, len(clip))).round().astype(int)]
        strips.append(np.pad(rearrange(chosen, "t h w c -> h (t w) c"), ((1, 1), (1, 1), (0, 0))))
    if len(strips) % 2:
        strips.append(np.zeros_like(strips[0]))
    rows = [np.concatenate(strips[i : i + 2], axis=1) for i in range(0, len(strips), 2)]
    sheet = Image.fromarray(np.concatenate(rows))
    zoom = max(1, round(min_height / clips[0].shape[1]))
    return sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.Resampling.NEAREST)
