"""A run as one page: RUN/report.html, with all its curves and pictures inside.

    python tools/report.py runs/tiny              writes runs/tiny/report.html
    python tools/report.py runs/tiny --watch      writes it again every 30 seconds; Ctrl-C ends it

The page needs no network and runs no script. The tool reads what train.py writes and nothing else: log.jsonl, grids/
and the headers of the weight files (it loads no tensor). So it can run beside a training, or after it.
Beside each curve stands what is normal, with the figures of preset tiny (docs/experiments.md).
"""
import argparse
import base64
import html
import io
import json
import math
import os
import re
import sys
import time
from glob import escape, glob
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from faults import run_script
from runtime import UserError, write_file

STAGES = {0: ("tokenizers", ("vq", "kl")), "0-vq": ("VQ alone", ("vq",)), "0-kl": ("KL alone", ("kl",)),
          1: ("prior", ("prior",)), 2: ("generator", ("generator",))}  # as train.py names them in its log
POINTS, PICTURES, WIDTH, EVERY = 300, 6, 1024, 30  # of a curve; of a stage; pixels of a picture; seconds of --watch
TINY = {  # (step, loss) of the shipped run; its tokenizers were trained apart
    1: [(50, 6.18), (500, 4.27), (1000, 4.06), (2000, 3.93), (3000, 3.89), (4500, 3.85), (6000, 3.81), (7500, 3.76),
        (9000, 3.73)],
    2: [(50, 1.24), (250, 0.382), (500, 0.313), (1000, 0.295), (2000, 0.277), (3000, 0.272), (5000, 0.262),
        (7000, 0.251), (9000, 0.246), (9969, 0.242)]}
NORMAL = {
    0: "The loss is the sum of both tokenizers' losses, with --only that of one. Presets tiny and toy start low, "
       "because their linear path starts at principal components: the KL tokenizer of tiny alone starts at 0.12 and "
       "has 0.085 after 1,500 steps. "
       "Judge by the pictures: photographs in the first row, what VQ and KL make of them in the next rows.",
    1: "The loss is the cross-entropy of one code. It starts near ln K, because an untrained prior gives all K codes "
       "the same probability. Preset tiny (K = 512, ln K = 6.2) has 3.93 after 2,000 steps, 3.73 after 9,000.",
    2: "The diffusion loss flattens early while the pictures go on improving, so judge by the pictures. Preset tiny "
       "has 1.24 in its first 50 steps, 0.31 after 500, 0.26 after 5,000. The EMA is an average over the past steps: "
       "early in a training its pictures are worse than those of the raw weights."}
STYLE = """body { font: 15px/1.5 system-ui, sans-serif; color: #1c1e21; max-width: 980px; margin: 2em auto }
h2 { margin-top: 2em } p { max-width: 46em } .soft, figcaption { color: #6b7177 } figure { margin: 0 }
.row { display: flex; flex-wrap: wrap; gap: 16px } img { width: 310px; image-rendering: pixelated; display: block }
svg text { font-size: 12px; fill: #6b7177 } svg .name { fill: #1c1e21 } svg line { stroke: #dfe3e7 }
polyline { fill: none; stroke: #1f6fb5; stroke-width: 2 } .normal { stroke: #b4641a; stroke-dasharray: 5 4 }
svg text.normal { stroke: none; fill: #b4641a } td { padding-right: 2em; border-bottom: 1px solid #dfe3e7 }"""


# ---------------------------------------------------------------------------------------------------------- reading

def read_log(path):
    """log.jsonl -> {stage: records by step}. Of steps that a resumed or new training repeated, the last lines count."""
    stages = {}
    for line in Path(path).read_text().splitlines() if os.path.exists(path) else []:
        try:
            record = json.loads(line)
            stage, step = record["stage"], record["step"]
        except (ValueError, KeyError, TypeError):  # train.py may be writing the last line
            continue
        before = stages.setdefault(stage, [])
        while before and before[-1]["step"] >= step:
            before.pop()
        before.append(record)
    return stages


def header(path):
    """The plain values of a weights file or training state, without its tensors: {"config.dim": 192, ...}."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # MAR's files hold one
            content = torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except Exception:  # a damaged file can make the unpickler raise almost anything
        return {"file": "has no header that can be read; python checkpoints.py FILE says what it is"}
    if not isinstance(content, dict) or "format" not in content:
        return {"file": "an official file"}

    def flat(name, value):
        if isinstance(value, dict):
            return {k: v for key, inside in value.items() for k, v in flat(f"{name}.{key}", inside).items()}
        return {name[1:]: f"{len(value):,} entries" if isinstance(value, list) and len(value) > 8 else value}

    return flat("", {k: v for k, v in content.items() if k not in ("state", "raw", "ema", "optimizer", "memory")})


# ---------------------------------------------------------------------------------------------------------- drawing

def ticks(low, high, count):
    """Round numbers, 1, 2 or 5 times a power of ten apart, from low to high."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def chart(name, points, width, height, normal=(), label="", zero=False):
    """Points (step, value) as an SVG; normal: the points of a dashed curve. zero: the axis starts at 0."""
    left, top, right, bottom = 56, 24, width - 20, height - 20
    last = max(points[-1][0], 1)
    # The loss of the first steps may leave the frame: it lies far above the rest.
    values = [v for step, v in [*points, *normal] if last / 20 < step <= last] or [points[-1][1]]
    pad = (max(values) - min(values)) / 20 or abs(max(values)) / 10 or 1.0
    low, high = 0 if zero else min(values) - pad, max(values) + pad
    x, y = lambda step: left + (right - left) * step / last, lambda v: top + (bottom - top) * (high - v) / (high - low)
    line = lambda kind, pts: f'<polyline class="{kind}" points="{" ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in pts)}"/>'
    text = lambda kind, a, b, anchor, words: f'<text class="{kind}" x="{a:.0f}" y="{b:.0f}" text-anchor="{anchor}">' \
                                             f'{words}</text>'
    parts = [text("name", left, 12, "start", f"{name}: {points[-1][1]:.4g}")]
    parts += [text("normal", right, 12, "end", f"- - {label}")] if normal else []
    parts += [f'<line x1="{left}" x2="{right}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>'
              + text("", left - 6, y(v) + 4, "end", f"{v:.4g}") for v in ticks(low, high, height / 50)]
    parts += [text("", x(s), height - 4, "middle", f"{s:,}") for s in ticks(0, last, width / 150) if s == int(s)]
    n = math.ceil(len(points) / POINTS)  # neighbours become their mean
    means = [tuple(sum(v) / len(v) for v in zip(*points[i:i + n])) for i in range(0, len(points), n)]
    frame = f'<svg x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" ' \
            f'viewBox="{left} {top} {right - left} {bottom - top}">'  # what leaves it is not drawn
    return f'<svg width="{width}" height="{height}">{"".join(parts)}{frame}{line("", means)}{line("normal", normal)}' \
           "</svg></svg>"


def picture(path):
    """A grid as an image that holds its data; a wide one is made smaller."""
    step, file = int(re.search(r"(\d+)\.png$", path)[1]), io.BytesIO()
    with Image.open(path) as image:
        image.reduce(math.ceil(image.width / WIDTH)).save(file, "png")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<figure><img src="data:image/png;base64,{data}"><figcaption>step {step:,}</figcaption></figure>'


# ------------------------------------------------------------------------------------------------------------- page

def section(stage, records, grids, headers):
    """One stage: where it is, what is normal, curves, pictures from the first to the last."""
    name, kinds = STAGES[stage]
    curve = lambda key: [(r["step"], r[key]) for r in records if r.get(key) is not None]
    normal, label, codes = (), "", headers.get("vq", {}).get("config.codebook_size")
    if "tiny" in (headers.get(kind, {}).get("preset") for kind in kinds):
        normal, label = TINY.get(stage, ()), "preset tiny"
    elif stage == 1 and codes:
        normal, label = [(step, math.log(codes)) for step in (0, records[-1]["step"])], f"untrained: ln {codes:,}"
    charts = [chart("loss", curve("loss"), 960, 260, normal, label)] if curve("loss") else []
    charts += [chart(title, curve(key), 309, 130, zero=True) for key, title in
               (("lr", "learning rate"), ("images_per_s", "images/s"), ("skipped", "skipped steps")) if curve(key)]
    grids = [g for g in grids if int(Path(g).stem[-7:]) <= records[-1]["step"]]  # not beyond the log
    shown = dict.fromkeys(grids[round(i * (len(grids) - 1) / (PICTURES - 1))] for i in range(PICTURES)) if grids else ()
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(records[-1].get("time", 0)))
    caption = "Pictures by the raw weights in the upper half, by the EMA in the lower:" if shown else ""
    return f'<h2>Stage {stage}: {name}</h2><p>Step {records[-1]["step"]:,}, {when}. ' \
           f'<span class="soft">{NORMAL[int(str(stage)[0])]}</span></p><div class="row">{"".join(charts)}</div>' \
           f'<p class="soft">{caption}</p><div class="row">{"".join(map(picture, shown))}</div>'


def page(run, watched=False):
    """The page of a run directory. watched: a browser loads it again every 30 seconds."""
    stages = read_log(os.path.join(run, "log.jsonl"))
    if not os.path.isdir(run) or not stages and not watched:
        raise UserError(f"{run} has no log of a training; give the directory that train.py got as --run.")
    headers = {Path(file).stem: header(file) for file in sorted(glob(os.path.join(escape(run), "*.pt")))}
    grids = lambda stage: sorted(glob(os.path.join(escape(run), "grids", f"stage{stage}-[0-9]*.png")))
    sections = [section(stage, stages[stage], grids(stage), headers) for stage in STAGES if stage in stages]
    row = lambda key, value: f"<tr><td>{html.escape(key)}<td>{html.escape(str(value))}"
    tables = [f"<details><summary>{html.escape(name)}.pt</summary><table>{''.join(map(row, values, values.values()))}"
              "</table></details>" for name, values in headers.items()]
    return f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(run)}</title>' \
           f'{f"<meta http-equiv=refresh content={EVERY}>" if watched else ""}<style>{STYLE}</style>' \
           f'<h1>{html.escape(run)}</h1><p class="soft">Written {time.strftime("%Y-%m-%d %H:%M:%S")} by ' \
           f'tools/report.py.</p>{"".join(sections)}<h2>Settings</h2>{"".join(tables)}</html>'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run directory, e.g. runs/tiny")
    parser.add_argument("--watch", action="store_true", help=f"write the page again every {EVERY} seconds")
    args = parser.parse_args()
    out = os.path.join(args.run, "report.html")
    while True:
        text = page(args.run, args.watch)
        write_file(out, lambda file: file.write(text.encode()))
        print(f"{out} written", flush=True)
        if not args.watch:
            break
        time.sleep(EVERY)


if __name__ == "__main__":
    run_script(main)
