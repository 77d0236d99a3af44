"""What a recipe says of HPDM, and what of it must fit together."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from data_pipeline.pyramid import AXES, Pyramid
from t2v.methods.hpdm.diffusion import DiffusionConfig
from t2v.methods.hpdm.network import ModelConfig
from t2v.methods.hpdm.settings import HPDMSamplingConfig, problem_with, problem_with_latents
from t2v.methods.method import MethodConfig

MOST_SIZES = 4  # of a latent budget: blocks are compiled anew for each


class HPDMConfig(MethodConfig):
    """Hierarchical patch diffusion: geometry, network, noise and sampling."""

    kind: Literal["hpdm"]
    pyramid: Pyramid
    model: ModelConfig
    diffusion: DiffusionConfig
    sampling: HPDMSamplingConfig
    latent_budget: list[Annotated[int, Field(ge=1)]] | None = Field(
        default=None,
        min_length=1,
        description="numbers of latents, of which each step draws one, leaving out the others at "
        "the tail, so that sampling may use fewer; none: all, always",
    )

    @property
    def view(self) -> Pyramid:
        """A batch shows one patch per level."""
        return self.pyramid

    @model_validator(mode="after")
    def _refuse_what_does_not_fit_together(self) -> "HPDMConfig":
        pyramid, model = self.pyramid, self.model
        for axis, patch, token in zip(AXES, pyramid.patch_size, model.token_size, strict=True):
            if patch % token:
                low = max(patch // token, 1) * token
                raise ValueError(
                    f"pyramid.patch_size: {patch} ({axis}) is wrong because it is no multiple of "
                    f"model.token_size {token}; use {low} or {low + token}"
                )
        blocks = model.levels_per_block
        if blocks[-1] != pyramid.levels or sorted(blocks) != blocks or blocks[0] < 1:
            raise ValueError(
                f"model.levels_per_block: {blocks} is wrong because it does not rise from at least "
                f"1 to pyramid.levels = {pyramid.levels}; let its last entry cover every level"
            )
        budget = self.latent_budget or [model.num_latents]
        if max(budget) != model.num_latents:
            raise ValueError(
                f"latent_budget: {budget} is wrong because its largest number is not that of "
                f"model.num_latents {model.num_latents}, which all else counts on; add it"
            )
        if len(sizes := sorted(set(budget))) > MOST_SIZES:
            raise ValueError(
                f"latent_budget: {sizes} is wrong because blocks are compiled for each of "
                f"{len(sizes)} sizes; give at most {MOST_SIZES}"
            )
        problem = problem_with(self.sampling, pyramid, model.token_size)
        if problem := problem or problem_with_latents(self.sampling, min(budget), max(budget)):
            raise ValueError(f"sampling.{problem}")
        for width, head, name in (
            (model.token_dim, model.token_head_dim, "token"),
            (model.latent_dim, model.latent_head_dim, "latent"),
        ):
            if width % head:
                raise ValueError(
                    f"model.{name}_head_dim: {head} is wrong because it does not divide "
                    f"{name}_dim {width}; choose a divisor"
                )
        return self
