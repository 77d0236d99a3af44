"""What only a GPU can show: `python -m pytest -m gpu`, or `python -m benchmarks.gpu --parts a`."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from t2v.engine.compute import determinism
from t2v.engine.device import Pace, on_device, to_host
from t2v.engine.world import join_world
from t2v.loop import open_engine, train
from t2v.network.layers import key_bias
from t2v.recipe.recipe import method_of
from tests.test_loop import (
    TRUTH,
    assert_same_tensors,
    config_of,
    dataset,
    leave_no_handlers,
    lines_of,
    tensors_at,
    train_in_parts,
)
from tests.tiny import noise_batch, tiny_config

__all__ = ["dataset", "leave_no_handlers"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
TAME = {"optimizer": {"eps": 1.0e-2}}  # keeps rounding what it is; see tests/test_engine.py


@pytest.mark.parametrize("kind", ["single", "fsdp"])
def test_bf16_trains_what_fp32_trains_to_its_rounding(dataset, tmp_path, kind):
    """With `fsdp`, one rank under NCCL, whose blocks are gathered in bf16."""
    losses = {}
    for precision in ("fp32", "bf16"):
        engine = {"kind": kind, "precision": precision}
        assert train(config_of(dataset, tmp_path / precision, engine=engine, **TAME)) == 0
        losses[precision] = [loss for _, loss in lines_of(tmp_path / precision, "loss")]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2e-2)
    assert losses["bf16"] != losses["fp32"]


@pytest.mark.parametrize("kind", ["single", "fsdp"])
def test_a_resumed_run_is_bit_for_bit_the_one_that_never_stopped(dataset, tmp_path, kind):
    engine = {"engine": {"kind": kind}}
    whole, parts = (config_of(dataset, tmp_path / name, **engine) for name in ("whole", "parts"))
    assert train(whole) == 0
    assert train_in_parts(parts, [1, 3]) == [75, 75, 0]
    assert lines_of(tmp_path / "parts", *TRUTH) == lines_of(tmp_path / "whole", *TRUTH)
    assert_same_tensors(tensors_at(tmp_path / "parts", 6), tensors_at(tmp_path / "whole", 6))


def test_batches_arrive_whole_from_the_stream_that_copies_them():
    config, device = tiny_config(), torch.device("cuda")
    batches = [loader_batch(config, [4 * number + row for row in range(4)]) for number in range(8)]
    for sent, received in zip(batches, on_device(batches, device), strict=True):
        torch.cuda._sleep(1_000_000)  # the host runs ahead of the device
        for name, tensor in received.tensors.items():
            assert tensor.is_cuda
            assert torch.equal(tensor.cpu(), sent.tensors[name]), name


def loader_batch(config, numbers):
    from data_pipeline.feeding.loader import Batch

    fields = {"latents": None, "latent_frames": None, "quarantined": []}
    return Batch(**fields | vars(noise_batch(config, numbers)) | {"ids": list(map(str, numbers))})


def test_nothing_in_a_micro_batch_waits_for_the_device():
    """After the first one, which loads kernels; the batch's own copy is not waited for either."""
    config = tiny_config()
    method = method_of(config)
    with determinism(config.engine), join_world(config.engine) as world:
        engine, pace = open_engine(config, method, world), Pace(world.device)
        for number, batch in enumerate(
            on_device([loader_batch(config, [n, n + 1]) for n in range(4)], world.device)
        ):
            torch.cuda.set_sync_debug_mode("error" if number else "default")
            try:
                losses = method.losses(engine.model, batch, seed=0, device=world.device)
                engine.backward(losses.sum(), final=number == 3)
                norm = engine.gradient_norm()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            pace.wait()
        assert to_host(norm).isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_efficient_kernel_reads_a_caption_as_the_plain_product_does(dtype):
    """And flash attention takes what has no caption, in bf16."""
    q = torch.randn(2, 4, 96, 64, device="cuda", dtype=dtype)
    kv = torch.randn(2, 4, 205, 64, device="cuda", dtype=dtype)
    mask = torch.arange(77, device="cuda") < torch.tensor([[5], [77]], device="cuda")
    bias = key_bias(mask, 128).to(dtype)[:, None, None, :205]
    attend = torch.nn.functional.scaled_dot_product_attention
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        found = attend(q, kv, kv, attn_mask=bias)
    with sdpa_kernel(SDPBackend.MATH):
        wanted = attend(q, kv, kv, attn_mask=bias)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    if dtype == torch.bfloat16:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            attend(q, kv, kv)
