"""Batches of patches or latents, embeddings and metadata, in an order no failure disturbs."""

import multiprocessing
import os
import signal
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from jaxtyping import BFloat16, Bool, Float32, Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from data_pipeline.errors import ConfigError, StorageError, UserError
from data_pipeline.feeding.config import CachedLatents, Conditioning, DataConfig, text_shape
from data_pipeline.feeding.mixture import Mixture, Part, told_changes
from data_pipeline.feeding.order import SourceOrder, held_out_rows
from data_pipeline.feeding.sample import Sample, SampleReader
from data_pipeline.feeding.sources import OpenSource, makers_of, open_sources
from data_pipeline.orphans import end_with
from data_pipeline.parallel import held_back
from data_pipeline.pyramid import Pyramid
from data_pipeline.shards.dataset import digest_json
from data_pipeline.stages import stage

START_SECONDS = 120.0  # for a worker to come up
POLL_SECONDS = 1.0  # between two looks at whether workers live
WORKER_LOST, WORKER_SILENT = "DataLoader worker", "DataLoader timed out"  # as torch says it
QUIET = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


Read = tuple[list[Sample], list[dict]]  # samples, and records of those they replace


@dataclass(frozen=True)
class Batch:
    """Samples of one micro-batch; the first axis of every tensor is the sample."""

    numbers: Int64[Tensor, " batch"]
    ids: list[str]
    patches: UInt8[Tensor, "batch levels frames height width 3"]  # no levels beside latents
    offsets: Int64[Tensor, "batch levels 3"]
    latents: BFloat16[Tensor, "batch channels latent_frames latent_height latent_width"] | None
    latent_frames: Int64[Tensor, " batch"] | None  # those that a sample has; zeros follow
    fps: Float32[Tensor, " batch"]
    original_size: Float32[Tensor, "batch 2"]
    text_tokens: BFloat16[Tensor, "batch tokens width"] | None
    text_mask: Bool[Tensor, "batch tokens"] | None
    label: Int64[Tensor, " batch"] | None
    quarantined: list[dict]
    step: int = 0  # that it belongs to, like all micro-batches that add up to it

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What a device needs of it; the host draws seeds from numbers, and counts frames."""
        host = ("numbers", "latent_frames")
        return {k: v for k, v in vars(self).items() if isinstance(v, Tensor) and k not in host}

    def to(self, device: torch.device) -> "Batch":
        """The batch on a GPU, by copies from pinned memory that the host does not wait for."""
        moved = {
            name: tensor.pin_memory().to(device, non_blocking=True)
            for name, tensor in self.tensors.items()
        }
        return replace(self, **moved)


class Loader:
    """Micro-batches of one rank, in the global order; its only state is how many samples were read.

    A step covers the next B samples, its micro-batch q the m samples from the q-th m of these;
    micro-batch q belongs to rank q modulo world_size.
    """

    def __init__(
        self,
        config: DataConfig,
        pyramid: Pyramid,
        conditioning: Conditioning,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        latents: CachedLatents | None = None,
    ):
        self.accumulation_steps = passes(global_batch_size, micro_batch_size, world_size)
        sources = open_sources(config, pyramid, conditioning, latents)
        self._sequences = sequences_of(sources, config, seed=seed)
        self.mixture = mixture_of(config, self._sequences)
        self.order = self.mixture.order(seed, self._sequences)
        if global_batch_size % len(self.order.pattern):
            weights = [source.weight for source in config.sources]
            raise ConfigError(
                f"data.sources: weights {weights} are wrong because a batch of "
                f"{global_batch_size} is no multiple of their sum {len(self.order.pattern)}; "
                "then no batch holds the exact mixture."
            )
        self.global_batch_size = global_batch_size
        self.fingerprint = _fingerprint(config, sources, pyramid, conditioning, seed)
        self.sources = sources
        self.text_encoder, self.autoencoder = makers_of(sources)
        self.config, self.rank, self.world_size = config, rank, world_size
        self._reader = SampleReader(
            order=self.order,
            sources=sources,
            pyramid=pyramid,
            num_classes=conditioning.num_classes,
            dropout=conditioning.dropout,
            deadline_seconds=config.decode_deadline_seconds,
        )
        self._text, self._size = text_shape(conditioning), micro_batch_size
        self._workers: list[BaseProcess] = []

    def follow(self, before: Mixture, samples: int) -> list[str]:
        """Go on after `samples` samples of another mixture, or of the same; tells, a line for each
        source, what changes."""
        self.mixture = self.mixture.after(before, samples)
        self.order = self.mixture.order(self._reader.order.seed, self._sequences)
        self._reader = replace(self._reader, order=self.order)
        return told_changes(before, self.mixture)

    def steps(
        self, start_step: int, total_steps: int, *, samples: int | None = None
    ) -> Iterator[list[Batch]]:
        """The micro-batches of each step, from `start_step` to the last. Before it, `samples` were
        read: by default what steps of this size read."""
        first = start_step * self.global_batch_size if samples is None else samples
        end = first + (total_steps - start_step) * self.global_batch_size
        starts = range(first + self.rank * self._size, end, self.world_size * self._size)
        with closing(self._batches(starts)) as batches:
            for step in range(start_step, total_steps):
                reads = (next(batches) for _ in range(self.accumulation_steps))
                yield [replace(_batch(read, self._text), step=step) for read in reads]

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers that live."""
        return [worker.pid for worker in self._workers if worker.pid and worker.is_alive()]

    def close(self) -> None:
        """End worker processes, stuck ones too."""
        for worker in self._workers:
            if worker.is_alive():
                worker.kill()
                worker.join()
        self._workers = []

    def _batches(self, starts: Sequence[int]) -> Generator[Read | UserError, None, None]:
        micro_batches = _MicroBatches(self._reader, self._size)
        if not self.config.num_workers:
            yield from (micro_batches[start] for start in starts)
            return
        patience = self.config.decode_deadline_seconds * self._size + START_SECONDS
        # Workers come from a server process that has no threads, locks or devices to inherit.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", __name__])
        loader = DataLoader(
            micro_batches,
            batch_size=None,
            sampler=starts,
            collate_fn=_as_is,
            num_workers=self.config.num_workers,
            prefetch_factor=self.config.prefetch_batches,
            timeout=POLL_SECONDS,
            worker_init_fn=partial(_begin_worker, dict(os.environ), os.getpid()),
            multiprocessing_context=context,
        )
        others = set(multiprocessing.active_children())
        with held_back(*QUIET):  # workers inherit it from their first instant
            batches = iter(loader)
        self._workers = [w for w in multiprocessing.active_children() if w not in others]
        try:
            yield from _arrivals(batches, patience)
        except RuntimeError as error:
            if not str(error).startswith((WORKER_LOST, WORKER_SILENT)):
                raise
            reason = str(error).splitlines()[0]
            raise StorageError(
                f"data: a loader process of rank {self.rank} is lost or stuck ({reason}); "
                "check memory, storage and data.decode_deadline_seconds."
            ) from error
        finally:
            del batches  # ends the workers that still listen
            self.close()


def passes(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-batches of each process per step; ConfigError where they do not share it evenly."""
    per_pass = micro_batch_size * world_size
    if global_batch_size % per_pass:
        raise ConfigError(
            f"global_batch_size: value {global_batch_size} is wrong because {world_size} "
            f"processes of micro_batch_size {micro_batch_size} read {per_pass} samples at a "
            "time; make it a multiple."
        )
    return global_batch_size // per_pass


class _MicroBatches(TorchDataset):
    """A micro-batch by the number of its first sample."""

    def __init__(self, reader: SampleReader, size: int):
        self.reader, self.size = reader, size

    def __getitem__(self, index: int) -> Read | UserError:
        """The samples, or the error that ends the run: returned, it arrives as what it is."""
        try:
            read = [self.reader.read(n) for n in range(index, index + self.size)]
        except UserError as error:
            return error
        return [sample for sample, _ in read], [record for _, bad in read for record in bad]


def _batch(read: Read | UserError, text: tuple[int, int] | None) -> Batch:
    if isinstance(read, UserError):
        raise read
    with stage("collate"):
        return collate(*read, text)


def collate(samples: Sequence[Sample], bad: list[dict], text: tuple[int, int] | None) -> Batch:
    """A micro-batch of samples; texts are cut or zero-padded to `text` = (tokens, width)."""
    text_tokens = text_mask = label = latents = latent_frames = None
    if cached := [sample.latents for sample in samples if sample.latents is not None]:
        latents, latent_frames = _stack_latents(cached)
    if text:
        text_tokens = torch.zeros(len(samples), *text, dtype=torch.bfloat16)
        text_mask = torch.zeros(len(samples), text[0], dtype=torch.bool)
        for row, sample in enumerate(samples):
            assert sample.text is not None
            tokens = torch.from_numpy(sample.text[: text[0]])
            text_tokens[row, : len(tokens)] = tokens.view(torch.bfloat16)
            text_mask[row, : len(tokens)] = True
    if samples[0].label is not None:
        label = torch.tensor([sample.label for sample in samples])
    return Batch(
        numbers=torch.tensor([sample.number for sample in samples]),
        ids=[sample.id for sample in samples],
        patches=torch.from_numpy(np.stack([sample.patches for sample in samples])),
        offsets=torch.from_numpy(np.stack([sample.offsets for sample in samples])),
        latents=latents,
        latent_frames=latent_frames,
        fps=torch.tensor([sample.fps for sample in samples], dtype=torch.float32),
        original_size=torch.tensor([s.original_size for s in samples], dtype=torch.float32),
        text_tokens=text_tokens,
        text_mask=text_mask,
        label=label,
        quarantined=bad,
    )


def _stack_latents(cached: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Latents as one tensor, and how many frames of each are its own: images have one."""
    frames = [latents.shape[1] for latents in cached]
    channels, _, height, width = cached[0].shape
    stacked = torch.zeros(len(cached), channels, max(frames), height, width, dtype=torch.bfloat16)
    for row, latents in enumerate(cached):
        stacked[row, :, : frames[row]] = torch.from_numpy(latents).view(torch.bfloat16)
    return stacked, torch.tensor(frames)


def _arrivals(batches: Iterator[Read | UserError], patience: float) -> Iterator[Read | UserError]:
    """What workers send, in order; silence is an error once it has lasted `patience` seconds."""
    since = time.monotonic()
    while True:
        try:
            yield next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            is_silence = str(error).startswith(WORKER_SILENT)
            if not is_silence or time.monotonic() - since > patience:
                raise
            continue
        since = time.monotonic()


def sequences_of(
    sources: Sequence[OpenSource], config: DataConfig, *, seed: int
) -> list[SourceOrder]:
    """Each dataset's own sequence; held-out samples have no place in it."""
    orders = []
    for source in sources:
        sizes = source.dataset.shard_sizes
        trained = sizes - held_out_rows(sizes, config.held_out_share)
        if not trained.sum():
            raise ConfigError(
                f"data.held_out_share: {config.held_out_share} is wrong because it leaves no "
                f"sample of {source.dataset.path} to train on; lower it."
            )
        fingerprint = source.dataset.info.fingerprint
        orders.append(
            SourceOrder(fingerprint, trained.tolist(), seed=seed, block_shards=config.block_shards)
        )
    return orders


def mixture_of(config: DataConfig, sequences: Sequence[SourceOrder]) -> Mixture:
    """What a recipe mixes, as a run that begins with it does."""
    parts = (
        Part(
            path=source.path,
            sequence=sequence.digest,
            samples=sequence.samples,
            weight=source.weight,
            start=0,
        )
        for source, sequence in zip(config.sources, sequences, strict=True)
    )
    return Mixture(parts=tuple(parts))


def _fingerprint(
    config: DataConfig,
    sources: Sequence[OpenSource],
    pyramid: Pyramid,
    conditioning: Conditioning,
    seed: int,
) -> str:
    """Digest of all that decides what sample n is and how it looks."""
    split = {"held_out_share": config.held_out_share} if config.held_out_share else {}
    cached = [source.latents.info.fingerprint for source in sources if source.latents]
    return digest_json(
        {
            **split,
            **({"latents": cached} if cached else {}),
            "seed": seed,
            "datasets": [source.dataset.info.fingerprint for source in sources],
            "embeddings": [s.embeddings and s.embeddings.info.fingerprint for s in sources],
            "weights": [source.weight for source in config.sources],
            "block_shards": config.block_shards,
            "pyramid": pyramid.model_dump(),
            "conditioning": conditioning.model_dump(),
        }
    )


def _begin_worker(environment: dict[str, str], owner: int, _worker: int) -> None:
    """Workers have the environment of now, not of when their server process started, and end with
    the rank that reads what they send.

    Stopping is the run's decision: a worker that died of a signal would turn it into a crash.
    Signals are blocked first, for threads begin with what their maker blocks.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, QUIET)
    end_with(owner)
    os.environ.update(environment)


def _as_is(read: Any) -> Any:
    return read
