"""What happens to the runs of a soak, drawn from a seed."""

import os
import random
from collections import Counter
from pathlib import Path

from t2v.checkpoint.finding import list_checkpoints


class Fate:
    """The next thing to happen, by a seed and what has happened: the rarest kind comes next, so
    that each comes equally often."""

    KINDS = (
        *("kill one rank", "kill all ranks", "kill in a save", "SIGTERM"),
        *("full disk", "flipped bits", "hang"),
        *("linked step", "another's step", "blocked tracker"),
    )

    def __init__(self, seed: int, *, gap: int, save_every: int, ranks: int) -> None:
        self.seed, self.ranks = seed, ranks
        self.gap, self.save_every = gap, save_every
        self.random = random.Random(seed)

    def draw(self, step: int, attempts: int, struck: Counter) -> list[tuple[str, str, int]]:
        """(kind, T2V_FAULT, step) of what is next after a step and so many attempts, up to what
        ends the job."""
        self.random = random.Random(f"{self.seed}/{attempts}")
        order = self.random.sample(self.KINDS, len(self.KINDS))
        first, second, *_ = sorted(order, key=lambda kind: struck[kind])
        drawn = [self._draw(first, step, step)]
        if first == "full disk":
            drawn.append(self._draw(second, drawn[0][2], step))
        return drawn

    def _draw(self, kind: str, step: int, resumes_at: int) -> tuple[str, str, int]:
        rank = self.random.randrange(self.ranks)
        at = step + self.save_every + self.random.randint(self.gap // 2, self.gap * 3 // 2)
        planned, save = "", (at - resumes_at) // self.save_every + 1
        match kind:
            case "kill one rank":
                planned = f"{self.random.choice(['data', 'forward', 'step'])}:{rank}:{at}:kill"
            case "kill in a save":
                site = self.random.choice(["manifest", "rename", "retire", "write", "write"])
                rank = rank if site == "write" else 0
                planned = f"checkpoint.{site}:{rank}:{save}:kill"
            case "full disk":
                site = self.random.choice(["write", "manifest"])
                rank = rank if site == "write" else 0
                planned = f"checkpoint.{site}:{rank}:{save}:enospc"
            case "hang":
                planned = (
                    f"{self.random.choice(['data', 'forward', 'collective'])}:{rank}:{at}:hang"
                )
        return kind, planned, at


def saved_step(run_dir: Path) -> int:
    """The newest committed step."""
    good = [info.step for info in list_checkpoints(run_dir) if info.problem is None]
    return max(good, default=0)


def flip_bits(run_dir: Path, chance: random.Random) -> None:
    """Damage a file of the newest checkpoint."""
    newest = [info for info in list_checkpoints(run_dir) if info.problem is None][-1].folder
    path = chance.choice(sorted(newest.iterdir()))
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def link_away(run_dir: Path, chance: random.Random) -> None:
    """Keep the oldest step elsewhere, by a link, which is not followed when steps are removed."""
    folder = oldest_folder(run_dir)
    elsewhere = run_dir.parent / "elsewhere" / f"{folder.name}-{chance.randrange(10**9)}"
    elsewhere.parent.mkdir(exist_ok=True)
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)


def give_away(run_dir: Path, chance: random.Random) -> None:
    """Put a file of somebody else into the oldest step; where one may, the step becomes theirs."""
    folder = oldest_folder(run_dir)
    (folder / f"notes-{chance.randrange(10**9)}.txt").write_text("not the run's\n")
    if os.geteuid() == 0:
        for path in (folder, *folder.iterdir()):
            os.chown(path, 65534, 65534)


def oldest_folder(run_dir: Path) -> Path:
    """The oldest committed step that is still a folder."""
    good = [info for info in list_checkpoints(run_dir) if info.problem is None]
    return next(info.folder for info in good if not info.folder.is_symlink())


# Done to a run that was killed, before it is started again.
BETWEEN = {"flipped bits": flip_bits, "linked step": link_away, "another's step": give_away}
