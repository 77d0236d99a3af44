"""What a recipe's network costs per sample: parameters, floating-point operations, kept bytes.

Nothing is allocated: operations are counted on the meta device, bytes on fake tensors, whose
attention keeps as little as a GPU's fused kernels do.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from t2v.engine.compute import PRODUCTS, round_attention
from t2v.engine.config import EngineConfig
from t2v.methods.method import Method
from t2v.network.flops import flops_of
from t2v.network.network import Network
from t2v.recipe.recipe import RunConfig, method_of


@dataclass(frozen=True)
class Footprint:
    """One sample's cost; bytes are those that the forward pass keeps for the backward pass."""

    parameters: dict[str, int]
    largest_block_parameters: int
    forward_flops: int
    kept_bytes: int
    kept_between_blocks_bytes: int
    kept_by_largest_block_bytes: int
    kept_products_bytes: int
    largest_tensor_bytes: int
    method: dict[str, Any]  # what it tells of itself


def measure(config: RunConfig) -> Footprint:
    """The footprint of a recipe, whatever its engine and batch size; taken once per network."""
    network = config.model_dump_json(include={"method", "conditioning"})
    key = network, config.engine.precision, config.engine.bf16_attention
    if key not in _measured:
        _measured[key] = _measure(method_of(config), config.engine)
    return _measured[key]


_measured: dict[tuple[str, str, bool], Footprint] = {}


def _measure(method: Method, engine: EngineConfig) -> Footprint:
    with torch.device("meta"):
        model = method.network()
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    kept = kept_storages(method, engine)
    products = kept.pop("products")
    outside, inputs = kept.pop("outside"), kept.pop("inputs")
    between = outside | inputs
    every = outside | {key: size for block in kept.values() for key, size in block.items()}
    by_block = [
        sum(size for key, size in block.items() if key not in between) for block in kept.values()
    ]
    return Footprint(
        parameters=parameters_by_kind(method, model),
        largest_block_parameters=max(blocks),
        forward_flops=forward_flops(method),
        kept_bytes=sum(every.values()),
        kept_between_blocks_bytes=sum(between.values()),
        kept_by_largest_block_bytes=max(by_block),
        kept_products_bytes=sum(size for key, size in products.items() if key not in between),
        largest_tensor_bytes=max(every.values()),
        method=method.facts(),
    )


def training_tflop(method: Method) -> float:
    """TFLOP of one sample in training: backward counts as two forwards."""
    return (3 + method.passes_without_gradient) * forward_flops(method) / 1e12


def forward_flops(method: Method) -> int:
    """Floating-point operations of an average sample's forward pass."""
    with torch.device("meta"):
        flops = flops_of(method.network(), method.inputs())
    return round(flops * method.mean_compute)


def parameters_by_kind(method: Method, model: Network) -> dict[str, int]:
    """Number of parameters by what they are for."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[method.kind_of(name)] += parameter.numel()
    return dict(counts)


class KeptStorages:
    """Bytes of each storage kept for backward: by each block, outside of blocks, and, whether kept
    or not, of the blocks' inputs and of the products in them. Parameters do not count."""

    def __init__(self, model: Network) -> None:
        self.bytes: dict[str, dict[int, int]] = {"outside": {}, "inputs": {}, "products": {}}
        self._place = "outside"
        self._own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._alive: list[Tensor] = []  # a storage's address names it only as long as it lives
        for number, block in enumerate(model.blocks):
            block.register_forward_pre_hook(partial(self._enter, f"block {number}"))
            block.register_forward_hook(self._leave)

    def keep(self, tensor: Tensor) -> Tensor:
        """Autograd keeps a tensor."""
        self._note(tensor, self._place)
        return tensor

    def product(self, tensor: Tensor) -> None:
        """An operation that selective recomputation does not repeat has made a tensor."""
        if self._place != "outside":
            self._note(tensor, "products")

    def _note(self, tensor: Tensor, place: str) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own:
            self._alive.append(tensor)
            self.bytes[place][storage._cdata] = storage.nbytes()

    def _enter(self, name: str, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        for tensor in tree_iter(inputs):
            if isinstance(tensor, Tensor):
                self._note(tensor, "inputs")
        self._place = name
        self.bytes[name] = {}

    def _leave(self, *_: object) -> None:
        self._place = "outside"


class Products(TorchDispatchMode):
    """Tells of everything that the operations kept by selective recomputation make."""

    def __init__(self, tell: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.tell = tell

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in PRODUCTS:
            for tensor in tree_iter(made):
                if isinstance(tensor, Tensor):
                    self.tell(tensor)
        return made


def kept_storages(method: Method, engine: EngineConfig) -> dict[str, dict[int, int]]:
    """What a forward pass keeps of one sample, in the precision it computes in."""
    halved = engine.precision == "bf16"
    with FakeTensorMode():
        model = method.network()
        round_attention(model.blocks, engine)
        if halved:
            for parameter in model.blocks.parameters():
                parameter.data = parameter.data.bfloat16()
        kept = KeptStorages(model)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=halved),
            saved_tensors_hooks(kept.keep, lambda tensor: tensor),
            Products(kept.product),
        ):
            model(**method.inputs())
    return kept.bytes
