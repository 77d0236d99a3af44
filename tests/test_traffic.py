"""What travels in a training step: weights between ranks, and values between host and device."""

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_pipeline.feeding.loader import Batch
from t2v.engine.world import join_world
from t2v.methods.hpdm.objective import weighted_errors
from t2v.recipe.recipe import method_of
from tests.distributed import run_distributed
from tests.tiny import noise_batch, tiny_config
from tests.training import engine_of, take_step


class Gathers(TorchDispatchMode):
    """Counts the elements that all-gathers put together."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "allgather" in str(func):
            self.elements += sum(part.numel() for part in tree_leaves(args[0]))
        return func(*args, **(kwargs or {}))


def gathered_models(micro_batches: int, reshard: bool, checkpointing: str) -> list[float]:
    """How often each of three steps gathers the whole model, padding left out of account."""
    config = tiny_config(
        engine={
            "kind": "fsdp",
            "reshard_after_forward": reshard,
            "activation_checkpointing": checkpointing,
        },
        global_batch_size=2 * micro_batches,
    )
    found = []
    with join_world(config.engine) as world:
        engine = engine_of(config, world)
        whole = sum(2 * -(-p.shape[0] // 2) * p[0].numel() for p in engine.model.parameters())
        for step in range(3):
            with Gathers() as counted:
                take_step(engine, config, step)
            found.append(counted.elements / whole)
    return found


@pytest.mark.dist
@pytest.mark.parametrize(
    ("micro_batches", "checkpointing"),
    [(3, "none"), *(pytest.param(*one, marks=pytest.mark.slow)
                    for one in ((1, "none"), (1, "blocks"), (3, "blocks")))],
)  # fmt: skip
def test_weights_are_gathered_once_a_step_at_any_number_of_micro_batches(
    micro_batches, checkpointing
):
    (found, _) = run_distributed(gathered_models, 2, micro_batches, False, checkpointing)
    assert found == [1.0, 1.0, 1.0]


@pytest.mark.slow
@pytest.mark.dist
def test_freed_weights_are_gathered_for_every_pass():
    (found, _) = run_distributed(gathered_models, 2, 2, True, "none")
    # Blocks: self-conditioning's pass, forward and backward of two micro-batches.
    assert all(2 * 2 < models <= 2 * 3 for models in found)


class Transfers(TorchFunctionMode):
    """Counts what goes from the host to the device, which is `meta` here, and what comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        made = func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        on_meta = any(tensor.is_meta for tensor in [*inputs, *outputs])
        from_host = any(not tensor.is_meta for tensor in inputs)
        by_list = name == "__getitem__" and any(isinstance(i, list) for i in tree_lists(args[1]))
        if on_meta and (from_host or by_list or name in ("tensor", "as_tensor")):
            self.sent[name] += 1
        return made


def tree_lists(index: object) -> tuple:
    """The entries of an index."""
    return index if isinstance(index, tuple) else (index,)


def test_a_micro_batch_sends_nothing_to_the_device_but_itself():
    """Reading a value back raises on `meta`, and so does a random draw: the noise is given."""
    config = tiny_config()
    method = method_of(config)
    network = method.network().to("meta")
    batch = noise_batch(config, [0, 1, 2, 3])
    shape = (4, 2, 3, *config.method.pyramid.patch_size)
    noise, sigma, chance = (torch.empty(s, device="meta") for s in (shape, (4, 2), (4,)))
    with Transfers() as transfers:
        weighted_errors(network, batch, config.method, noise, sigma, chance).sum().backward()
    assert transfers.sent == {"to": 5}  # patches, offsets, frame rate, size, label


def test_a_batch_moves_whole_but_for_its_numbers():
    names = {
        name for name in Batch.__dataclass_fields__ if name not in ("ids", "quarantined", "step")
    }
    batch = noise_batch(tiny_config(), [0, 1])
    absent = dict.fromkeys(names - set(vars(batch)))  # what this batch has none of
    told = absent | vars(batch) | {"ids": ["a", "b"], "quarantined": [], "step": 3}
    empty = {name for name, value in told.items() if value is None}
    assert {"patches", "offsets", "fps", "label"}.isdisjoint(empty)
    assert set(Batch(**told).tensors) == names - {"numbers"} - empty
