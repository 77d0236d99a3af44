"""What clips are to show: prompts or classes, checked, and as conditions of the network."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unicodedata import category

import torch
from jaxtyping import Float
from torch import Tensor

from data_pipeline.errors import ConfigError
from data_pipeline.feeding.config import ClassConditioning, TextConditioning
from data_pipeline.printable import say
from data_pipeline.text.embeddings import Provenance
from data_pipeline.text.encoder import TextEncoder
from t2v.methods.method import Method
from t2v.network.conditioning import Condition
from t2v.recipe.recipe import RunConfig, method_of
from t2v.sampling.given_frames import Given, read_given

MAX_PROMPT_CHARACTERS = 2000
MOST_CLIPS = 100_000
# Control characters, what breaks lines, and bytes of a command line that are no UTF-8.
UNSEEN = ("Cc", "Zl", "Zp", "Cs")


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line."""

    prompts: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    count: int | None = None
    negative_prompt: str | None = None
    encoder: str | None = None
    vae: str | None = None
    seed: int = 0
    levels: bool = False  # the clips of coarser levels too
    given: tuple[str, ...] = ()  # files that clips begin with: one for all, or one for each


@dataclass(frozen=True)
class Subject:
    """One clip to sample; `shows` is a prompt, a class, or None for an unconditional recipe."""

    number: int
    shows: str | int | None
    seed: int
    given: Given | None = None


def read_prompts(path: Path) -> list[str]:
    """One prompt per line; line breaks at the end of the file are no prompts."""
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text; save the prompts as UTF-8.") from None
    if lines == [""]:
        raise ConfigError(f"{path}: is wrong because it is empty; write one prompt per line.")
    for number, line in enumerate(lines, start=1):
        if problem := problem_with_prompt(line):
            raise ConfigError(f"{path}: line {number}: {problem}; correct or remove it.")
    return [line.strip() for line in lines]


def problem_with_prompt(prompt: str) -> str | None:
    """Why a text is no prompt."""
    text = prompt.strip()
    if not 1 <= len(text) <= MAX_PROMPT_CHARACTERS:
        return f"{len(text)} characters is wrong because a prompt has 1 to {MAX_PROMPT_CHARACTERS}"
    # Nobody sees them, and they change the embedding.
    hidden = next((sign for sign in text if sign != "\t" and category(sign) in UNSEEN), None)
    if hidden is not None:
        return f"{hidden!r} is wrong because a prompt is one line of text"
    return None


def subjects_of(config: RunConfig, request: Request) -> list[Subject]:
    """The clips of a request, in order; ConfigError where it does not suit the recipe."""
    kind = config.conditioning
    if request.seed < 0:
        raise ConfigError(f"--seed: {request.seed} is wrong because it is negative; use 0 or more.")
    if request.count is not None and not 1 <= request.count <= MOST_CLIPS:
        raise ConfigError(f"--count: {request.count} is wrong; give 1 to {MOST_CLIPS} clips.")
    if not isinstance(kind, TextConditioning) and request.negative_prompt is not None:
        raise ConfigError(
            "--negative-prompt: is wrong because the checkpoint reads no text; leave it out."
        )
    if request.labels and not isinstance(kind, ClassConditioning):
        raise ConfigError(
            f"--label: {list(request.labels)} is wrong because the checkpoint has no classes; "
            + ("give --prompt." if isinstance(kind, TextConditioning) else "give --count.")
        )
    if request.count is not None and kind.kind != "none":
        raise ConfigError(
            "--count: is wrong because the checkpoint is told what to show; give --prompt or "
            "--label once per clip."
        )
    if not isinstance(kind, TextConditioning) and (request.prompts or request.encoder):
        option, instead = "--prompt" if request.prompts else "--encoder", "leave it out"
        if request.prompts and isinstance(kind, ClassConditioning):
            instead = "give --label"
        raise ConfigError(f"{option}: is wrong because the checkpoint reads no text; {instead}.")
    shown: list[str | int | None]
    if isinstance(kind, ClassConditioning):
        bad = [label for label in request.labels if not 0 <= label < kind.num_classes]
        if bad or not request.labels:
            raise ConfigError(
                f"--label: {bad or 'none'} is wrong because the checkpoint has classes 0 to "
                f"{kind.num_classes - 1}; give --label for each clip."
            )
        shown = list(request.labels)
    elif isinstance(kind, TextConditioning):
        if not request.prompts:
            raise ConfigError(
                "--prompt: missing because there is nothing to sample; give one or more."
            )
        shown = list(request.prompts)
    else:
        shown = [None] * (request.count or 1)
    texts = {f"prompt {number}": text for number, text in enumerate(request.prompts, start=1)}
    if request.negative_prompt:
        texts["--negative-prompt"] = request.negative_prompt
    for name, text in texts.items():
        if problem := problem_with_prompt(text):
            raise ConfigError(f"{name}: {problem}; correct it or leave it out.")
    if request.negative_prompt is not None and not method_of(config).is_guided:
        raise ConfigError(
            "--negative-prompt: is wrong because guidance_scale 1 never looks at it; raise it with "
            "--set guidance_scale=X, or leave the prompt out."
        )
    given = given_to(len(shown), request, method_of(config))
    return [
        Subject(n, what, request.seed + n, one)
        for n, (what, one) in enumerate(zip(shown, given, strict=True))
    ]


def given_to(clips: int, request: Request, method: Method) -> Sequence[Given | None]:
    """The first frames of each clip."""
    if len(request.given) not in (0, 1, clips):
        raise ConfigError(
            f"--given: {len(request.given)} files are wrong because there are {clips} clips; give "
            "one for all, or one for each."
        )
    read = [read_given(path, method) for path in request.given]
    return read * clips if len(read) == 1 else read or [None] * clips


class Conditions:
    """Conditions of subjects; a text encoder is loaded once, and checked against the one that
    embedded the training set."""

    def __init__(
        self,
        config: RunConfig,
        request: Request,
        trained_with: Provenance | None,
        device: torch.device,
    ) -> None:
        self.config, self.device = config, device
        self.null_prompt = request.negative_prompt or ""
        self.texts: dict[str, Float[Tensor, "tokens width"]] = {}
        kind, encoder = config.conditioning, request.encoder
        self.reader = None
        if not isinstance(kind, TextConditioning):
            return
        if encoder is None:
            raise ConfigError(
                "--encoder: missing because the checkpoint reads text; give the folder or hub id "
                f"of the encoder that made its embeddings '{kind.encoder}'."
            )
        layer = trained_with.layer if trained_with else None
        self.reader = TextEncoder(encoder, max_tokens=kind.max_tokens, layer=layer)
        if trained_with is None or not self.reader.provenance.same_encoder(trained_with):
            raise ConfigError(
                f"--encoder: {encoder} is wrong because the checkpoint was trained with another "
                f"one, {trained_with and trained_with.encoder}; give that."
            )

    def read(self, subjects: list[Subject]) -> None:
        """Encode the prompts of all that this process will sample, and let the encoder go."""
        if self.reader is not None:
            prompts = [self.null_prompt, *(str(subject.shows) for subject in subjects)]
            for prompt in self.reader.too_long(prompts):
                say(
                    f"prompt {prompt[:60]!r}: only its first {self.reader.max_tokens} tokens are "
                    "read; shorten it, or clips of prompts that begin alike are alike.",
                    to=sys.stderr,
                )
            self.texts = dict(zip(prompts, self.reader.encode(prompts), strict=True))
            self.reader = None

    def of(self, subjects: list[Subject]) -> tuple[Condition, Condition]:
        """(condition, null condition), one row per subject."""
        kind, sampling, count = self.config.conditioning, self.config.method.sampling, len(subjects)
        size = torch.tensor(sampling.original_size, device=self.device).float()
        shared = {
            "fps": torch.full((count,), sampling.fps, device=self.device),
            "original_size": size.repeat(count, 1),
        }
        if isinstance(kind, TextConditioning):
            told, null = (
                pad_tokens([self.texts[prompt] for prompt in prompts], kind, self.device)
                for prompts in ([str(s.shows) for s in subjects], [self.null_prompt] * count)
            )
            return Condition(**shared, **told), Condition(**shared, **null)
        if isinstance(kind, ClassConditioning):
            label = torch.tensor([subject.shows for subject in subjects], device=self.device)
            null_label = torch.full_like(label, kind.num_classes)
            return Condition(**shared, label=label), Condition(**shared, label=null_label)
        return Condition(**shared), Condition(**shared)


def pad_tokens(
    embeddings: list[Float[Tensor, "tokens width"]], kind: TextConditioning, device: torch.device
) -> dict[str, Tensor]:
    """Tokens of one shape and their mask, as the loader pads them."""
    tokens = torch.zeros(len(embeddings), kind.max_tokens, kind.width)
    mask = torch.zeros(len(embeddings), kind.max_tokens, dtype=torch.bool)
    for row, embedding in enumerate(embeddings):
        length = min(len(embedding), kind.max_tokens)
        tokens[row, :length] = embedding[:length].float()
        mask[row, :length] = True
    return {"text_tokens": tokens.to(device), "text_mask": mask.to(device)}
