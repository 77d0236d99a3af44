"""Which path attention takes is chosen: fused kernels take what they are given, as it is."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from t2v.engine.compute import autocast
from t2v.network.layers import Attention, key_bias
from t2v.recipe.recipe import method_of
from tests.test_graphs import batch_of, built, small
from tests.tiny_flow import TEXT, flow_config, noise_batch

TOKENS, LENGTHS = 21, [0, 3, 5]  # 26 keys: no multiple of what kernels want
MASK = torch.arange(5) < torch.tensor(LENGTHS)[:, None]


def reading() -> tuple[Attention, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return Attention(16, 24, 32, 8), torch.randn(3, 7, 16), torch.randn(3, TOKENS + 5, 24)


def gradients(attention: Attention, output: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(output.square().sum(), list(attention.parameters())))


def test_a_caption_is_read_as_if_its_padding_were_not_there():
    attention, x, context = reading()
    together = attention(x, context, key_bias(MASK, TOKENS))
    for row, length in enumerate(LENGTHS):
        alone = attention(x[row : row + 1], context[row : row + 1, : TOKENS + length])
        torch.testing.assert_close(together[row : row + 1], alone)


def test_a_bias_has_the_bits_of_the_mask_it_stands_for(monkeypatch):
    attention, x, context = reading()
    seen = torch.cat([MASK.new_ones(3, TOKENS), MASK], dim=1)[:, None, None]
    found = attention(x, context, key_bias(MASK, TOKENS))
    found = [found, *gradients(attention, found)]
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v, attn_mask: fused(q, k, v, seen)
    )
    masked = attention(x, context)
    wanted = [masked, *gradients(attention, masked)]
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


HPDM = [small(name) for name in ("base_36x64", "t2v_64x288x512")]
RECIPES = [*HPDM, flow_config(conditioning=TEXT)]
WAYS = [{}, {"bf16_attention": True}, {"precision": "bf16"}]


def attended(config, monkeypatch, **engine) -> tuple[list[tuple], torch.Tensor]:
    """What scaled_dot_product_attention is given in a forward pass, and the losses."""
    calls, fused = [], F.scaled_dot_product_attention

    def noted(q, k, v, attn_mask=None):
        calls.append((q, k, v, attn_mask))
        return fused(q, k, v, attn_mask)

    engine = {"precision": "tf32", "compile": False, "activation_checkpointing": "none"} | engine
    network, method = built(config, **engine), method_of(config)
    batch = (batch_of if config.method.kind == "hpdm" else noise_batch)(config, [0, 1])
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", noted)
        with autocast(config.engine.model_copy(update=engine), torch.device("cpu")):
            losses = method.losses(network, batch, seed=0, device=torch.device("cpu"))
    return calls, losses


@pytest.mark.parametrize("engine", WAYS, ids=str)
@pytest.mark.parametrize("config", RECIPES, ids=lambda config: config.name)
def test_fused_kernels_take_queries_keys_and_bias_as_they_are(config, engine, monkeypatch):
    """Of one precision, with a bias whose rows start where a GPU's kernel wants them or with none:
    no mask of booleans, no copy, and never the scores of all queries and keys in memory. Only what
    reads a caption behind a patch's tokens has a bias."""
    calls, _ = attended(config, monkeypatch, **engine)
    reading = 0
    if config.method.kind == "hpdm":
        reading = method_of(config).network().grid.count + config.conditioning.max_tokens
    assert {k.shape[2] for _, k, _, bias in calls if bias is not None} == {reading} - {0}
    for q, k, v, bias in calls:
        assert (bias is not None) == (k.shape[2] == reading)
        assert {x.dtype for x in (q, k, v)} == {torch.bfloat16 if engine else torch.float32}
        assert torch._fused_sdp_choice(q, k, v, bias) != SDPBackend.MATH.value
        if bias is not None:
            assert bias.dtype == q.dtype
            *rows, last = bias.stride()
            assert (last, [stride % 16 for stride in rows]) == (1, [0, 0, 0])


@pytest.mark.parametrize("config", RECIPES, ids=lambda config: config.name)
def test_attention_in_bf16_is_attention_to_the_rounding_of_bf16(config, monkeypatch):
    exact = attended(config, monkeypatch)[1]
    rounded = attended(config, monkeypatch, bf16_attention=True)[1]
    assert rounded.dtype == exact.dtype
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=2e-2, atol=0)
