"""What the network is told besides pixels, and what must not leak in."""

from dataclasses import replace

import pytest
import torch

from data_pipeline.feeding.config import ClassConditioning, TextConditioning
from data_pipeline.pyramid import Pyramid
from t2v.methods.hpdm.rin import RINBlock
from t2v.network.conditioning import Condition, ConditionEmbedding
from t2v.network.layers import key_bias
from tests.tiny import class_condition

PYRAMID = Pyramid(levels=3, patch_size=(2, 6, 8), clip_size=(8, 24, 32))
STILL_PYRAMID = Pyramid(levels=2, patch_size=(2, 6, 8), clip_size=(2, 12, 16))
TEXT = TextConditioning(kind="text", encoder="tiny", width=12, max_tokens=5)
CLASSES = ClassConditioning(kind="class", num_classes=3)


def embedding(pyramid: Pyramid, conditioning: TextConditioning | ClassConditioning):
    torch.manual_seed(0)
    module = ConditionEmbedding(pyramid, conditioning, dim=16, token_dim=8)
    module.init_weights(torch.Generator().manual_seed(0))
    return module


def text_condition(lengths: list[int], seed: int = 0) -> Condition:
    generator = torch.Generator().manual_seed(seed)
    return Condition(
        fps=torch.full((len(lengths),), 24.0),
        original_size=torch.full((len(lengths), 2), 240.0),
        text_tokens=torch.randn(len(lengths), 5, 12, generator=generator),
        text_mask=torch.arange(5) < torch.tensor(lengths)[:, None],
    )


def test_padding_of_a_caption_has_no_influence():
    module = embedding(PYRAMID, TEXT)
    block = RINBlock(
        token_dim=8,
        latent_dim=8,
        latent_layers=1,
        token_head_dim=4,
        latent_head_dim=4,
        conditioning_dim=16,
    )
    condition = text_condition([2, 5])
    padded = replace(condition, text_tokens=condition.text_tokens.clone())
    padded.text_tokens[0, 2:] = 100.0
    noise, tokens, latents = torch.zeros(2, 1), torch.randn(2, 6, 8), torch.randn(2, 3, 8)
    results = []
    for told in (condition, padded):
        vector, text = module(noise, [0], told)
        bias = key_bias(told.text_mask, 6)
        results.append([vector, *block(tokens, latents, vector[:, 0], text, bias)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_a_caption_of_no_tokens_is_finite():
    vector, _ = embedding(PYRAMID, TEXT)(torch.zeros(1, 1), [0], text_condition([0]))
    assert vector.isfinite().all()


@pytest.mark.parametrize("field", ["fps", "original_size", "text_tokens"])
def test_every_part_of_the_condition_moves_the_vector(field):
    module, condition = embedding(PYRAMID, TEXT), text_condition([5])
    value = getattr(condition, field)
    other = replace(condition, **{field: value + torch.rand_like(value)})
    vectors = [module(torch.zeros(1, 1), [0], told)[0] for told in (condition, other)]
    assert not torch.allclose(*vectors)


def test_labels_move_the_vector_and_noise_levels_belong_to_their_level():
    module = embedding(PYRAMID, CLASSES)
    first, null = (module(torch.zeros(1, 3), [0, 1, 2], class_condition([c]))[0] for c in (0, 3))
    assert not torch.allclose(first, null)
    noisy = module(torch.tensor([[0.0, 1.0, 0.0]]), [0, 1, 2], class_condition([0]))[0]
    changed = (noisy != first).any(dim=2)[0]
    assert changed.tolist() == [False, True, False]


def test_a_level_is_told_its_own_frame_rate():
    """Level 1 of 3 shows every second frame: 24 fps there are 12 fps of a clip at full rate."""
    module = embedding(PYRAMID, CLASSES)
    noise = torch.zeros(1, 1)
    half = module(noise, [1], class_condition([0], fps=24.0))[0]
    full = module(noise, [2], class_condition([0], fps=12.0))[0]
    assert torch.equal(half, full)  # the level embedding starts at zero
    still = embedding(STILL_PYRAMID, CLASSES)
    both = still(torch.zeros(1, 2), [0, 1], class_condition([0]))[0]
    assert torch.equal(both[:, 0], both[:, 1])


def test_rows_repeat_conditions():
    condition = text_condition([1, 2, 3])
    rows = condition.rows(torch.tensor([2, 0, 0]))
    assert rows.label is None
    assert torch.equal(rows.text_tokens, condition.text_tokens[[2, 0, 0]])
    assert rows.text_mask.sum(1).tolist() == [3, 1, 1]
