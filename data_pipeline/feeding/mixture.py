"""What a run mixes, and where each source's own sequence goes on once that has changed."""

from collections import defaultdict
from collections.abc import Sequence

from pydantic import Field

from data_pipeline.feeding.order import GlobalOrder, SourceOrder, mixture_pattern
from data_pipeline.strict import Strict


class Part(Strict):
    """One source of a mixture."""

    path: str
    sequence: str = Field(description="digest of all that decides the order of its samples")
    samples: int = Field(ge=1, description="of one pass")
    weight: int = Field(ge=0, description="0: it was read once, and is no longer")
    start: int = Field(ge=0, description="index in its own sequence as the mixture begins")


class Mixture(Strict):
    """The sources of a run from a sample number on; a checkpoint keeps it."""

    since: int = Field(default=0, ge=0, description="the sample number at which it begins")
    parts: tuple[Part, ...] = Field(strict=False)

    def order(self, seed: int, sequences: Sequence[SourceOrder]) -> GlobalOrder:
        """The global order of this mixture, over the sequences of its sources."""
        read = [part for part in self.parts if part.weight]
        weights, starts = [part.weight for part in read], [part.start for part in read]
        return GlobalOrder(seed, sequences, weights, since=self.since, starts=starts)

    def after(self, before: "Mixture", sample: int) -> "Mixture":
        """This mixture as it follows another one at a sample number: what is in both goes on where
        it was, so that nothing is repeated or left out. What is no longer read is remembered."""
        if self._shares == before._shares:
            return self.model_copy(update={"since": before.since, "parts": before.parts})
        left: dict[str, list[Part]] = defaultdict(list)
        for part in before.at(sample).parts:
            left[part.sequence].append(part)
        parts = []
        for part in self.parts:
            known = left[part.sequence].pop(0).start if left[part.sequence] else 0
            parts.append(part.model_copy(update={"start": known}))
        gone = [p.model_copy(update={"weight": 0}) for some in left.values() for p in some]
        return Mixture(since=sample, parts=tuple(parts + gone))

    def at(self, sample: int) -> "Mixture":
        """The same mixture, told from a later sample number; a whole number of its periods on."""
        read = [part.weight for part in self.parts if part.weight]
        shares = dict(enumerate(mixture_pattern(read).count(place) for place in range(len(read))))
        periods, rest = divmod(sample - self.since, sum(shares.values()))
        assert rest == 0, "every batch holds whole periods"
        parts, place = [], 0
        for part in self.parts:
            if part.weight:
                part = part.model_copy(update={"start": part.start + periods * shares[place]})
                place += 1
            parts.append(part)
        return Mixture(since=sample, parts=tuple(parts))

    @property
    def _shares(self) -> list[tuple[str, int]]:
        """All that decides who is read, and how often."""
        return [(part.sequence, part.weight) for part in self.parts if part.weight]


def told_changes(before: Mixture, now: Mixture) -> list[str]:
    """What becomes of each source where `now` follows `before`, a line each."""
    if now.parts == before.parts:
        return []
    old = {part.sequence: part for part in before.parts if part.weight}
    paths = {part.path for part in old.values()}
    lines = []
    for part in now.parts:
        epoch, place = divmod(part.start, part.samples)
        goes_on = f"goes on at sample {place} of {part.samples} in its pass {epoch + 1}"
        if not part.weight:
            if part.sequence in old:
                lines.append(f"{part.path}: is no longer read, after {part.start} samples")
        elif part.sequence in old:
            weights = f"{old[part.sequence].weight} -> {part.weight}"
            lines.append(f"{part.path}: {goes_on}, nothing repeated or skipped; weight {weights}")
        elif part.start:
            lines.append(f"{part.path}: is read again and {goes_on}; weight {part.weight}")
        elif part.path in paths:
            lines.append(
                f"{part.path}: has other contents or another split than before, so its order is "
                "new; samples seen before may come again"
            )
        else:
            lines.append(f"{part.path}: is new and begins at its first; weight {part.weight}")
    return lines
