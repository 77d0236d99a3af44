"""The look and the one small script of a run's report."""

STYLE = """
:root { --ink: #1c2430; --soft: #5c6673; --line: #dfe3e8; --paper: #fff; --back: #f5f6f8;
  --accent: #0b5fa5; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 2px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 12px; }
.soft, figcaption small, .none { color: var(--soft); }
.pill { display: inline-block; padding: 1px 10px; border-radius: 99px; font-size: 13px;
  font-weight: 600; vertical-align: 5px; margin-left: 8px; background: #e8edf3; }
.pill.done { background: #d9efe4; color: #0a5c3f; }
.pill.running, .pill.starting { background: #dcebf8; color: #0a4a80; }
.pill.failed { background: #f9dfdc; color: #8a1f14; }
.pill.preempted { background: #fbeccf; color: #6f4c00; }
.bar { height: 6px; border-radius: 3px; background: var(--line); margin: 14px 0 18px; }
.bar i { display: block; height: 100%; border-radius: 3px; background: var(--accent); }
.tiles { display: grid; gap: 10px; margin: 0 0 22px; padding: 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 240px), 1fr)); }
.tiles div { background: var(--paper); border: 1px solid var(--line); border-radius: 8px;
  padding: 10px 14px; }
.tiles dt { color: var(--soft); font-size: 13px; }
.tiles dd { margin: 0; font-size: 20px; font-variant-numeric: tabular-nums; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 18px 20px; margin: 0 0 18px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr));
  gap: 22px 28px; }
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 2px 0 6px;
  padding: 0; font-size: 13px; color: var(--soft); font-variant-numeric: tabular-nums; }
.legend i { display: inline-block; width: 14px; height: 4px; border-radius: 2px;
  margin-right: 6px; vertical-align: 3px; }
.legend b { color: var(--ink); font-weight: 600; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 11px; fill: #5c6673; }
svg path { fill: none; stroke-width: 1.7; stroke-linejoin: round; stroke-linecap: round; }
svg .pale { opacity: 0.28; stroke-width: 1; }
svg .grid { stroke: #e6e9ed; }
svg .mark { stroke: #9aa3ad; stroke-dasharray: 2 3; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td.number { text-align: right; }
.clips td { border: 0; padding: 4px 8px 8px 0; }
.clips td:first-child { min-width: 130px; max-width: 220px; padding-right: 16px; }
.clips video, .clips img { display: block; width: 176px; border-radius: 5px; background: #e8ebef;
  cursor: pointer; }
.clips .small { image-rendering: pixelated; }
.clips img { display: none; }
.note { background: #fdf4e3; border-left: 3px solid #d99a2b; padding: 8px 12px; margin: 0 0 12px;
  overflow-wrap: anywhere; }
button { font: inherit; font-size: 13px; padding: 3px 12px; margin-left: 10px; cursor: pointer;
  border: 1px solid var(--line); border-radius: 6px; background: var(--paper); }
pre { overflow-x: auto; background: var(--back); padding: 12px; border-radius: 6px;
  font: 13px/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }
summary { cursor: pointer; font-weight: 600; }
@media print {
  body, section, .tiles div { background: #fff; }
  main { max-width: none; padding: 0; }
  section { break-inside: avoid; border: 0; padding: 8px 0; }
  section.long { break-inside: auto; }
  button, .clips video { display: none; }
  .clips img { display: block; }
}
"""

# Clips in view play; a click on one stops or starts it, the button all of them.
SCRIPT = """
const clips = [...document.querySelectorAll('video')];
const calm = matchMedia('(prefers-reduced-motion: reduce)').matches;
const button = document.querySelector('#all');
let paused = calm;
const start = clip => clip.play().catch(() => {});
const watch = new IntersectionObserver(entries => {
  for (const { target, isIntersecting } of entries)
    isIntersecting && !paused ? start(target) : target.pause();
});
for (const clip of clips) {
  watch.observe(clip);
  clip.addEventListener('click', () => clip.paused ? start(clip) : clip.pause());
}
const label = () => { if (button) button.textContent = paused ? 'play all' : 'pause all'; };
if (button) button.addEventListener('click', () => {
  paused = !paused;
  clips.forEach(clip => paused ? clip.pause() : start(clip));
  label();
});
label();
"""
