"""What a recipe says of HPDM, and what of it must fit together."""

from typing import Literal

from pydantic import model_validator

from data_pipeline.pyramid import AXES, Pyramid
from t2v.methods.hpdm.diffusion import DiffusionConfig
from t2v.methods.hpdm.network import ModelConfig
from t2v.methods.hpdm.settings import HPDMSamplingConfig
from t2v.methods.method import MethodConfig


class HPDMConfig(MethodConfig):
    """Hierarchical patch diffusion: geometry, network, noise and sampling."""

    kind: Literal["hpdm"]
    pyramid: Pyramid
    model: ModelConfig
    diffusion: DiffusionConfig
    sampling: HPDMSamplingConfig

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
        if problem := self.sampling.problem_with(pyramid, model.token_size):
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
