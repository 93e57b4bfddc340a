"""An evaluation as one HTML page that opens from disk: figures, a curve, the images that broke.

The curve, pictures and confusion matrices come from PGD on the first images, run for the page
alone: the attacks' verdicts may be from an earlier evaluation, which kept no images.
"""

import argparse
import base64
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from utils.attacks import Budget, logits_of, percent, pgd
from utils.data import ImageSet
from utils.errors import UserError
from utils.foreign import naming
from utils.progress import Bar
from utils.run_folder import write_atomic
from utils.tables import MEDIANS

IMAGES, PICTURES, CLASSES = 500, 10, 20  # attacked for the page; shown; in a matrix one can read
FACTORS = (1 / 3, 2 / 3, 1, 1.5, 2)  # of the evaluation's radius
_MARK = '<!doctype html>\n<meta name="generator" content="LFR evaluation">\n'  # on our pages alone
# With this policy a browser loads nothing.
_HEAD = """<meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
:root { color-scheme: light dark; --paper: #f6f7f9; --card: #fff; --ink: #1b1d22; --soft: #61656e;
 --line: #e1e4ea; --blue: #2459cf; --red: #c23a2b; --PASS: #1b7a43; --WARN: #955800 }
@media (prefers-color-scheme: dark) { :root { --paper: #121316; --card: #1b1d22; --ink: #e8eaee;
 --soft: #9da2ad; --line: #30333b; --blue: #7ea6ff; --red: #ff8d7e; --PASS: #6fd39a;
 --WARN: #f0b35a } }
body { margin: auto; padding: 2.5rem 1rem 4rem; max-width: 64rem; background: var(--paper);
 color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { margin: 0; line-height: 1.25 } h2 { margin: 2.75rem 0 .75rem; font-size: 1.25rem }
p { margin: .5rem 0 1rem; max-width: 46rem } p, dt, figcaption, th { color: var(--soft) }
p, dl, figcaption, table { font-size: .9rem } strong { font-size: 1.8rem; white-space: nowrap }
.tiles { display: flex; flex-wrap: wrap; gap: 1rem } .tiles .card { flex: 1 1 8.5rem }
.grid { display: grid; gap: 1rem;
 grid-template-columns: repeat(auto-fill, minmax(min(var(--wide), 100%), 1fr)) }
.card { margin: 0; padding: min(1rem, 2.6vw); background: var(--card); overflow-x: auto;
 border: 1px solid var(--line); border-radius: .75rem } b { color: var(--hue, var(--ink)) }
table { border-collapse: collapse; white-space: nowrap; font-variant-numeric: tabular-nums }
th { font-weight: 500 } .attacks { width: 100% } .attacks td { border-top: 1px solid var(--line) }
.attacks :is(th, td) { padding: .5rem min(.7rem, 2vw); text-align: right }
.attacks :is(:first-child, :nth-child(4)) { text-align: left }
.attacks td:nth-child(3) { font-weight: 650 }
.matrix { margin: .75rem auto 0; font-size: min(.9rem, 3.2vw) } .matrix th { padding: 0 .3rem }
.matrix td { min-width: min(1.9rem, 6vw); height: 1.9rem; padding: 0; text-align: center;
 background: color-mix(in srgb, var(--hue) var(--share), transparent); border-radius: .4rem }
.matrix tr + tr th { text-align: right } .long tr:first-child th { writing-mode: vertical-rl;
 transform: rotate(180deg); text-align: left; padding: .4rem 0 }
.three { display: flex; gap: .4rem; margin-bottom: .5rem } img { width: 100%; min-width: 0;
 border-radius: .3rem } .small img { image-rendering: pixelated }
svg { display: block; max-width: 34rem; margin: auto; font-size: 10px; fill: var(--soft) }
dl { margin: 0 } dd { margin: 0 0 .75rem } code { font: .85rem ui-monospace, monospace }
</style>
"""


def check_page(path: str) -> None:
    """UserError, before the work, unless a page can be written there and replaces none but ours."""
    with naming(f"--report {path}"):
        if os.path.lexists(path):
            with open(path, "rb") as file:
                if file.read(len(_MARK)) != _MARK.encode():
                    raise UserError("exists and is no page of an evaluation; name another file")
        if not os.access(Path(path).parent, os.W_OK):
            raise UserError("its folder is missing or cannot be written to")


def _picture(image: Tensor, what: str) -> str:
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).squeeze(2).cpu().numpy()
    Image.fromarray(pixels).save(stream := io.BytesIO(), "PNG")
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<img alt="{what}" src="data:image/png;base64,{data}">'


def _curve(radii: Sequence[float], accuracies: Sequence[float], epsilon: float) -> str:
    def place(radius: float, accuracy: float) -> tuple[float, float]:
        return round(32 + 270 * radius / (radii[-1] or 1), 1), round(185 - 1.65 * accuracy, 1)

    parts, points = [], [*map(place, radii, accuracies)]
    line = " ".join(f"{x},{y}" for x, y in points)
    for level in (0, 25, 50, 75, 100):
        x, y = place(0, level)
        parts.append(f'''<path d="M{x} {y}H335" stroke="var(--line)"/>
<text x="{x - 6}" y="{y + 3.5}" text-anchor="end">{level}</text>''')
    middle = place(epsilon, 0)[0]
    parts.append(f'''<path d="M{middle} 12V185" stroke="var(--soft)" stroke-dasharray="3"/>
<polyline points="{line}" fill="none" stroke="var(--blue)" stroke-width="2"/>''')
    for (x, y), radius, accuracy in zip(points, radii, accuracies):
        parts.append(f'''<circle cx="{x}" cy="{y}" r="3" fill="var(--blue)"/>
<text x="{x + 4}" y="{y - 6}" fill="var(--ink)">{accuracy:.1f}</text>
<text x="{x}" y="200" text-anchor="middle">{radius:.3g}</text>''')
    return f'<svg viewBox="0 0 340 205" role="img" aria-label="curve">{"".join(parts)}</svg>'


def _matrix(title: str, y: Tensor, found: Tensor, names: Sequence[str]) -> str:
    size, short = len(names), [name if len(name) < 16 else f"{name[:15]}…" for name in names]
    counts = torch.bincount(y * size + found, minlength=size**2).view(size, size)
    shares = 50 * (counts / counts.sum(1, keepdim=True).clamp_min(1)).sqrt()
    heads = [f"<th>{escape(name)}</th>" for name in short]
    lines = [f"<th></th>{''.join(heads)}"]
    for label, head in enumerate(heads):
        line = [
            f'<td style="--hue: var(--{"blue" if column == label else "red"}); '
            f'--share: {shares[label, column]:.0f}%">{count or ""}</td>'
            for column, count in enumerate(counts[label].tolist())
        ]
        lines.append(head + "".join(line))
    kind = "matrix long" if max(map(len, short)) > 3 else "matrix"
    return f"""<figure class="card"><figcaption><b>{title}</b>: rows true, columns predicted
</figcaption><table class="{kind}"><tr>{"</tr><tr>".join(lines)}</tr></table></figure>"""


@torch.no_grad()
def write_page(
    args: argparse.Namespace,
    network: nn.Module,
    data: ImageSet,
    budget: Budget,
    report: Mapping[str, Any],
    rows: Sequence[Sequence[str]],
) -> None:
    """Attack the first images with PGD's budget and write the page to ``args.report``.

    ``report`` is what the JSON report holds, ``rows`` are the cells of the printed table.
    """
    data = data.head(IMAGES)
    x, y = data.float_images(), data.labels
    parts = torch.arange(len(x)).split(args.test_batch)
    clean = torch.cat([logits_of(network, x[i]) for i in parts]).argmax(1)
    radii, accuracies, x_adv = [0.0], [percent(int((clean == y).sum()), len(x))], x
    for factor in Bar(FACTORS, desc="report"):
        radius, step = factor * budget.epsilon, factor * budget.step_size
        own = replace(budget, epsilon=radius, step_size=step)
        found = [pgd(network, x[i], y[i], own, seed=args.seed, index=i) for i in parts]
        radii.append(radius)
        accuracies.append(percent(sum(int(part.robust.sum()) for part in found), len(x)))
        x_adv = torch.cat([part.x_adv for part in found]) if factor == 1 else x_adv
    attacked = torch.cat([logits_of(network, x_adv[i]) for i in parts]).argmax(1)
    others = range(data.num_classes, 1 + int(torch.cat((clean, attacked)).max()))
    names = [*data.classes, *map(str, others)]  # a network may know more classes than the data

    how = f"under PGD ({budget}) on the first {len(x)} images, run for this page"
    broken, figures = ((clean == y) & (attacked != y)).nonzero()[:, 0].tolist(), []
    for i in broken[:PICTURES]:
        change, (true, wrong) = x_adv[i] - x[i], (escape(names[part[i]]) for part in (y, attacked))
        largest = float(change.abs().max())
        shown = {"image": x[i], "attacked": x_adv[i], "change": 0.5 + 0.5 * change / largest}
        pictures = "".join(_picture(picture, what) for what, picture in shown.items())
        figures.append(f"""<figure class="card"><div class="three">{pictures}</div><figcaption>
<b>{true}</b> → <b style="--hue: var(--red)">{wrong}</b><br>image {i}, changed by up to
{largest:.3f}</figcaption></figure>""")
    matrices = f"<p>Left out: {len(names)} classes are too many to read.</p>"
    if len(names) <= CLASSES:
        pair = _matrix("Clean", y, clean, names) + _matrix("Under PGD", y, attacked, names)
        matrices = f'<p>Clean and {how}.</p><div class="grid" style="--wide: 27rem">{pair}</div>'
    checks = [
        f'<dt><b style="--hue: var(--{check["verdict"]}, var(--soft))">{check["verdict"]}</b> '
        f"{escape(check['name'])}</dt><dd>{escape(check['text'])}</dd>"
        for check in report.get("sanity", ())
        if report.get("sanity_budget") == str(budget)  # an earlier evaluation may have had another
    ]
    masking = f'<h2>Signs of masked gradients</h2><dl class="card">{"".join(checks)}</dl>'
    worst = min(report["attacks"], key=lambda name: report["attacks"][name]["robust_accuracy"])
    facts = {key: report[key] for key in ("command", "seed", "checkpoint_sha256", "data_sha256")}
    facts["versions"] = ", ".join(" ".join(pair) for pair in report["versions"].items())
    title = escape(f"{type(network).__name__} on {data.name}")
    head, *body = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    page = f"""{_MARK}{_HEAD}<title>{title}</title><h1>{title}</h1>
<p>{escape(str(report["model_path"] or args.network))}</p><div class="tiles">
<div class="card"><strong>{report["clean_accuracy"]:.2f} %</strong><br>clean</div>
<div class="card"><strong>{report["attacks"][worst]["robust_accuracy"]:.2f} %</strong><br>robust,
{worst}</div><div class="card"><strong>{report["num_examples"]:,}</strong><br>of
{report["test_set"]:,} {report["split"]} images</div></div>
<h2>Attacks</h2><div class="card"><table class="attacks">
<tr>{"</tr><tr>".join((head.replace("td>", "th>"), *body))}</tr></table></div>
<p>A misclassified clean image counts as not robust.
{MEDIANS if "L0" in rows[0] else ""}</p>
<h2>Accuracy by radius</h2><div class="card">{_curve(radii, accuracies, budget.epsilon)}</div>
<p>Accuracy in percent by {budget.norm} radius, {how}. The steps grow with the radius. Dashed: the
radius of the evaluation.</p>
<h2>Images that broke</h2><p>{len(broken)} images were right clean and are wrong {how}. The first
{len(figures)}, with the attacked image and the change, scaled to reach black or white:</p>
<div class="grid{" small" * (x.shape[3] < 100)}" style="--wide: 17rem">{"".join(figures)}</div>
<h2>Confusion</h2>{matrices}{masking if checks else ""}<h2>How to repeat it</h2><dl class="card">
{"".join(f"<dt>{k}</dt><dd><code>{escape(str(v))}</code></dd>" for k, v in facts.items())}</dl>
"""
    write_atomic(args.report, page.encode("utf-8", "replace"))  # file names may be no UTF-8
