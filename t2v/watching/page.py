"""`t2v report`: a run as one HTML page that needs no network, read from its folder alone."""

import base64
import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from itertools import pairwise
from pathlib import Path

from PIL import Image

from data_pipeline.errors import DataError, InputMissing
from data_pipeline.media.codec import decode_clip
from data_pipeline.store.html_page import GENERATOR, write_page
from t2v.attempt.files import read_mapping, read_records
from t2v.watching.charts import COLOURS, Series, line_chart, shade, short
from t2v.watching.page_files import (
    entry,
    mean,
    number,
    points,
    read_list,
    read_metrics,
    spread,
)
from t2v.watching.page_style import SCRIPT, STYLE
from t2v.watching.side_job import committed_steps, read_state

MOST_CLIP_BYTES = 40 * 2**20  # of mp4 files in a page; base64 adds a third
MOST_STEPS, MOST_PROMPTS = 6, 12
SMALL_PIXELS = 120  # clips narrower than this are shown pixel by pixel


def write_report(run_dir: Path, out: Path) -> Path:
    """Write the page of a run; returns where it is."""
    if not (run_dir / "config.yaml").is_file() and not (run_dir / "metrics.jsonl").is_file():
        raise InputMissing(f"{run_dir}: no such run; give a run folder, which holds metrics.jsonl.")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_page(str(out), page(run_dir))
    return out


def page(run_dir: Path) -> str:
    """The whole page; whatever the run's files say stays text."""
    steps, held_out, skipped = read_metrics(run_dir / "metrics.jsonl")
    status = read_mapping(run_dir / "status.json")
    attempts = read_records(run_dir / "attempts.jsonl")
    restarts = (record for record in attempts[1:] if record.get("event") == "start")
    marks = [step for record in restarts if isinstance(step := record.get("step"), int)]
    body = [
        header(run_dir, status, steps, attempts),
        training_section(steps, marks, skipped),
        held_out_section(held_out),
        samples_section(run_dir),
        rates_section(steps, marks),
        health_section(read_records(run_dir / "quarantine.jsonl")),
        restarts_section(attempts, run_dir),
        recipe_section(run_dir),
    ]
    script_digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:; "
        f"script-src 'sha256-{script_digest}'"
    )
    name = escape(run_dir.resolve().name)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{GENERATOR}'
        f"<title>{name}</title>"
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head>\n'
        f"<body><main>\n{chr(10).join(body)}\n</main><script>{SCRIPT}</script></body></html>\n"
    )


def header(run_dir: Path, status: dict, steps: list[dict], attempts: list[dict]) -> str:
    """Name, state, progress and the numbers one looks for first."""
    last = steps[-1] if steps else {}
    state = str(status.get("state", "unknown"))
    step, total = number(status, "step"), number(status, "total_steps")
    step = number(last, "step") if step is None else step
    share = min(step / total, 1) if step is not None and total else 0
    starts = sum(record.get("event") == "start" for record in attempts)
    recent = steps[-max(len(steps) // 20, 1) :]
    told = {
        "step": f"{short(step or 0)} of {short(total)}" if total else short(step or 0),
        "loss": mean_text(recent, "loss"),
        "samples per second": mean_text(recent, "samples_per_second"),
        "MFU": percent(number(last, "mfu")),
        "goodput": percent(number(last, "goodput")),
        "waiting for data": percent(mean(recent, "data_wait_share")),
        "last checkpoint": short(value)
        if (value := number(status, "last_checkpoint")) is not None
        else "-",
        "attempts": str(starts) if starts else "-",
    }
    tiles = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in told.items())
    reason = status.get("reason")
    note = f'<p class="note">{escape(str(reason))}</p>' if reason and state == "failed" else ""
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        f'<h1>{escape(run_dir.resolve().name)}<span class="pill {escape(state)}">{escape(state)}'
        f'</span></h1><div class="soft">as of {escape(str(status.get("updated", "unknown")))}, '
        f'page written {now}</div><div class="bar"><i style="width:{share:.1%}"></i></div>{note}'
        f'<dl class="tiles">{tiles}</dl>'
    )


def training_section(steps: list[dict], marks: list[int], skipped: int) -> str:
    """Training loss of each part, gradient norm and learning rate."""
    parts = [name for name in (steps[-1] if steps else {}) if name.startswith("loss_")]
    losses = [
        Series(
            name.removeprefix("loss_").replace("_", " "),
            points(steps, name),
            COLOURS[n % 8],
            noisy=True,
        )
        for n, name in enumerate(parts)
    ]
    charts = [
        line_chart("Training loss by part", losses, marks=marks),
        line_chart(
            "Gradient norm",
            [Series("norm", points(steps, "grad_norm"), COLOURS[5], noisy=True)],
            marks=marks,
        ),
    ]
    note = f'<p class="note">{skipped} steps without a finite gradient were skipped.</p>'
    dotted = '<p class="soft">Dotted lines are restarts.</p>' if marks else ""
    return section("Training", (note if skipped else "") + pair(charts) + dotted)


def held_out_section(lines: list[dict]) -> str:
    """Held-out loss over steps, and of each part by bins of noise."""
    if not lines:
        return section(
            "Held-out loss", '<p class="none">Not measured; the recipe has no held_out.</p>'
        )
    last = lines[-1]
    parts = [
        name.removeprefix("held_out_").removesuffix("_bins")
        for name in last
        if name.startswith("held_out_") and name.endswith("_bins")
    ]
    charts = [
        line_chart(
            "Held-out loss by part",
            [
                Series(part.replace("_", " "), points(lines, f"held_out_{part}"), COLOURS[n % 8])
                for n, part in enumerate(parts)
            ],
        )
    ]
    for part in parts:
        key = f"held_out_{part}_bins"
        names = bin_names(last, key)
        series = [
            Series(
                name,
                [(line["step"], entry(line.get(key), n)) for line in lines],
                shade(n / max(len(names) - 1, 1)),
            )
            for n, name in enumerate(names)
        ]
        charts.append(line_chart(f"{part.replace('_', ' ').capitalize()} by noise", series))
    samples, weights = last.get("held_out_samples"), last.get("held_out_weights")
    told = f"{samples} samples that training never sees, always the same, at fixed noise; "
    kind = {"ema": "averaged", "raw": "raw"}.get(str(weights), str(weights))
    return section(
        "Held-out loss", f'<p class="soft">{escape(f"{told}{kind} weights.")}</p>' + pair(charts)
    )


def bin_names(line: dict, key: str) -> list[str]:
    """The range of noise of each bin of a part, as a held-out line tells it; else its number."""
    bins = len(line[key]) if isinstance(line[key], list) else 0
    if bins == 1:
        return ["all"]
    told = [entry(line.get("held_out_bin_edges"), n) for n in range(bins - 1)]
    edges = [f"{edge:.2g}" for edge in told if edge is not None]
    if len(edges) < len(told) or not edges:
        return [f"bin {n}" for n in range(bins)]
    between = [f"{low} to {high}" for low, high in pairwise(edges)]
    axis = line.get("held_out_bin_axis")
    return [f"{axis} {name}" for name in (f"< {edges[0]}", *between, f"> {edges[-1]}")]


def samples_section(run_dir: Path) -> str:
    """Clips by prompt and step, as playable video."""
    folder = run_dir / "samples"
    steps = spread(committed_steps(folder, "samples.json"), MOST_STEPS)
    state = read_state(run_dir)
    note = ""
    if state.get("state") == "failed":
        told = f"step {state.get('step')} was not sampled because {state.get('reason')}"
        note = f'<p class="note">{escape(told)}</p>'
    if not steps:
        return section("Samples", note + '<p class="none">No samples yet.</p>')
    rows: dict[str, dict[int, Path]] = {}
    for step in steps:
        of_step = folder / f"step-{step:08d}"
        for record in read_list(of_step / "samples.json"):
            subject, file = record.get("prompt"), Path(str(record.get("file"))).name
            name = f"class {subject}" if isinstance(subject, int) else str(subject)
            rows.setdefault(name, {}).setdefault(step, of_step / file)
    budget, left_out, cells = MOST_CLIP_BYTES, max(len(rows) - MOST_PROMPTS, 0), []
    for subject, of_steps in list(rows.items())[:MOST_PROMPTS]:
        row = [f"<td>{escape(subject)}</td>"]
        for step in steps:
            path = of_steps.get(step)
            content = path.read_bytes() if path is not None and path.is_file() else b""
            if len(content) > budget:
                left_out, content = left_out + 1, b""
            budget -= len(content)
            row.append(f"<td>{video(content)}</td>")
        cells.append(f"<tr>{''.join(row)}</tr>")
    head = "".join(f"<th>step {short(step)}</th>" for step in steps)
    more = f'<p class="soft">{left_out} prompts or clips are left out.</p>' if left_out else ""
    table = f'<table class="clips"><tr><th></th>{head}</tr>{"".join(cells)}</table>'
    return section(
        'Samples <button id="all" type="button">pause all</button>',
        f'{note}<div class="scroll">{table}</div>{more}',
    )


def video(content: bytes) -> str:
    """A clip as a player, and as a picture for paper."""
    if not content:
        return '<span class="soft">none</span>'
    try:
        clip = decode_clip(content)
    except DataError:
        return '<span class="soft">damaged</span>'
    buffer = io.BytesIO()
    Image.fromarray(clip[len(clip) // 2]).save(buffer, "PNG")
    small = ' class="small"' if clip.shape[2] < SMALL_PIXELS else ""
    still = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    source = f"data:video/mp4;base64,{base64.b64encode(content).decode()}"
    return (
        f'<video{small} src="{source}" poster="{still}" muted loop playsinline></video>'
        f'<img{small} src="{still}" alt="">'
    )


def rates_section(steps: list[dict], marks: list[int]) -> str:
    """Speed, what it waits for, and memory."""

    def chart(title: str, **named: str) -> str:
        series = [
            Series(name.replace("_", " "), points(steps, key), COLOURS[n], noisy=True)
            for n, (name, key) in enumerate(named.items())
            if any(number(line, key) is not None for line in steps)
        ]
        return line_chart(title, series, marks=marks, from_zero=True)

    charts = [
        chart("Samples per second", samples="samples_per_second"),
        chart(
            "Shares of time and of the device's peak",
            waiting_for_data="data_wait_share", goodput="goodput", MFU="mfu",
        ),
        chart("Seconds", per_step="step_seconds", held_up_by_checkpoints="checkpoint_seconds"),
        chart("Memory of rank 0, GiB", GPU="gpu_memory_gib", host="host_memory_gib"),
    ]  # fmt: skip
    return section("Rates", pair(charts))


def health_section(records: list[dict]) -> str:
    """Samples that could not be used, by reason."""
    if not records:
        return section("Data", '<p class="none">No sample had to be replaced.</p>')
    reasons = Counter(str(record.get("reason")) for record in records).most_common(12)
    rows = [[str(count), reason] for reason, count in reasons]
    told = f"<p>{len(records):,} samples could not be used and were replaced.</p>"
    return section("Data", told + table(("samples", "reason"), rows))


def restarts_section(attempts: list[dict], run_dir: Path) -> str:
    """Each attempt: when, from where, and how it ended; the last failure's own page."""
    ends = {r.get("attempt"): r for r in attempts if r.get("event") == "end"}
    starts = [record for record in attempts if record.get("event") == "start"]
    if not starts:
        return section("Attempts", '<p class="none">No record of attempts.</p>')
    rows = []
    for start in starts[-50:]:
        end = ends.get(start.get("attempt"), {})
        cells = (
            start.get("attempt"), start.get("at"), start.get("host"), start.get("world_size"),
            start.get("engine"), start.get("step"), end.get("step"), end.get("state", "no end"),
            end.get("exit_code"), end.get("reason"),
        )  # fmt: skip
        rows.append(["" if cell is None else str(cell) for cell in cells])
    head = ("", "began", "host", "ranks", "engine", "from", "to", "ended as", "code", "reason")
    content = f'<div class="scroll">{table(head, rows)}</div>' + file_text(run_dir / "failure.md")
    return section("Attempts", content, "long")


def recipe_section(run_dir: Path) -> str:
    """The resolved recipe."""
    content = file_text(run_dir / "config.yaml")
    return section("Recipe", content or '<p class="none">No config.yaml.</p>', "long")


def file_text(path: Path) -> str:
    """A text file to unfold, if there is one."""
    if not path.is_file():
        return ""
    text = escape(path.read_text(encoding="utf-8", errors="replace"))
    return f"<details><summary>{escape(path.name)}</summary><pre>{text}</pre></details>"


def section(title: str, content: str, kind: str = "") -> str:
    return f'<section class="{kind}"><h2>{title}</h2>{content}</section>'


def pair(figures: Iterable[str]) -> str:
    return f'<div class="pair">{"".join(figures)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are text, never markup."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<table><tr>{top}</tr>{body}</table>"


def mean_text(lines: list[dict], key: str) -> str:
    value = mean(lines, key)
    return "-" if value is None else short(value)


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
