"""D2C against MAR on the same tokenizers: quality over training time and over sampling time. docs/experiments.md.

    python tools/curves.py OUT RUN CACHE PICTURES [--seeds 0 1 2]     # trains, measures, prints a table
    python tools/curves.py OUT --plot FILE.svg                        # draws what is measured, and prints the table

Both methods are the preset tiny, with its fusion (D2C) and with fusion `none` (MAR). They share the tokenizers of RUN
and the CACHE that these made; D2C also takes the prior of RUN, whose training is not counted. A training stops after
each of SECONDS of CPU time, is measured on a folder of PICTURES outside the cache, and goes on. At the end it is
measured once for each of ITERATIONS. Fréchet (pixels) is that of compare.py. CPU seconds per picture include prior and
decoder. The same command again goes on.
"""
import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from compare import PRESETS, data, frechet, held_out, once, sample, save_pictures, train_for, train_generator
from faults import run_script
from report import ticks
from runtime import UserError, write_file

SECONDS, ITERATIONS = (120, 240, 480), (2, 4, 8, 16)
METHODS = {"none": "MAR", PRESETS["tiny"].generator.fusion: "D2C"}
COLOURS = {"MAR": "#b4641a", "D2C": "#1f6fb5"}


def measure(path, images, classes, iterations):
    """Samples of the run PATH with so many iterations -> their figures. The pictures go to PATH/pictures-N."""
    run, pictures, start = sample.load_run(path), [], time.process_time()
    for part in torch.arange(len(images)).split(110):
        pictures.append(sample.generate(run, classes[part], indices=part.tolist(), iterations=iterations).images)
    cpu, pictures = (time.process_time() - start) / len(images), torch.cat(pictures)
    save_pictures(pictures, classes, run, f"{path}/pictures-{iterations}")
    return {"steps": run.generator.about["step"], "iterations": iterations, "cpu": cpu,
            "frechet": frechet(pictures, images)}


def train_and_measure(file, path, base, cache, images, classes, preset, fusion, seed, seconds, iterations):
    """-> {"training": figures after each of seconds, "sampling": figures for each of iterations}."""
    usual, training, before = PRESETS[preset].sampling.iterations, [], 0
    for now in seconds:
        train_generator(file, path, base, cache, now - before, preset, "--fusion", fusion, "--seed", seed)
        training.append({"seconds": now, **measure(path, images, classes, usual)})
        before = now
    sampling = [training[-1] if n == usual else measure(path, images, classes, n) for n in iterations]
    return {"training": training, "sampling": sampling}


def read(out):
    """OUT -> {method: [what train_and_measure returned for each seed]}."""
    found = {name: [json.loads(file.read_text()) for file in sorted(Path(out).glob(f"{fusion}-*/result.json"))]
             for fusion, name in METHODS.items()}
    if not all(found.values()):
        raise UserError(f"{out} holds no finished training of each method; train with OUT RUN CACHE PICTURES first.")
    return found


def curve(runs, part, x):
    """One method's figures -> [(x, Fréchet distance of each seed)], one per point of the curve. x: a key of figures."""
    return [(np.mean([f[x] for f in point]), [f["frechet"] for f in point]) for point in zip(*(r[part] for r in runs))]


def print_table(found):
    for part, key in (("training", "seconds"), ("sampling", "iterations")):
        print(f"\n| method | {key} | steps | CPU s per picture | Fréchet (pixels) |\n|---|---|---|---|---|")
        for name, runs in found.items():
            for point in zip(*(run[part] for run in runs)):
                mean = {k: np.mean([f[k] for f in point]) for k in point[0]}
                spread = f" ± {np.std([f['frechet'] for f in point], ddof=1):.0f}" if len(point) > 1 else ""
                print(f"| {name} | {mean[key]:.0f} | {mean['steps']:,.0f} | {mean['cpu']:.3f} | "
                      f"{mean['frechet']:.0f}{spread} |")


def panel(found, part, x, label, left, width, height):
    """One chart as SVG: the mean of the seeds as a line, each seed as a dot."""
    curves = {name: curve(runs, part, x) for name, runs in found.items()}
    far = 1.05 * max(a for points in curves.values() for a, _ in points)
    high = 1.1 * max(v for points in curves.values() for _, values in points for v in values)
    right, top, bottom = left + width - 70, 30, height - 40
    at = lambda a, v: (left + (right - left) * a / far, bottom - (bottom - top) * v / high)
    text = lambda a, b, anchor, words, colour="#6b7177": f'<text x="{a:.0f}" y="{b:.0f}" text-anchor="{anchor}" ' \
                                                         f'fill="{colour}">{words}</text>'
    parts = [text((left + right) / 2, height - 6, "middle", label), text(left, 14, "start", "Fréchet distance (pixels)")]
    for v in ticks(0, high, 5):
        a, b = at(0, v)
        parts.append(f'<line x1="{left}" x2="{right}" y1="{b:.1f}" y2="{b:.1f}" stroke="#dfe3e7"/>'
                     + text(left - 6, b + 4, "end", f"{v:g}"))
    parts += [text(at(s, 0)[0], bottom + 16, "middle", f"{s:g}") for s in ticks(0, far, 5)]
    for name, points in curves.items():
        means = [at(a, np.mean(values)) for a, values in points]
        parts.append(f'<polyline fill="none" stroke="{COLOURS[name]}" stroke-width="2" points="'
                     + " ".join(f"{a:.1f},{b:.1f}" for a, b in means) + '"/>')
        parts += ['<circle cx="{:.1f}" cy="{:.1f}" r="3" fill="{}"/>'.format(*at(a, v), COLOURS[name])
                  for a, values in points for v in values]
        parts.append(text(means[-1][0] + 8, means[-1][1] + 4, "start", name, COLOURS[name]))
    return "".join(parts)


def plot(found):
    """-> an SVG of two charts."""
    return ('<svg xmlns="http://www.w3.org/2000/svg" width="960" height="320" font-family="sans-serif" font-size="12">'
            '<rect width="960" height="320" fill="white"/>'
            + panel(found, "training", "seconds", "CPU seconds of training", 60, 440, 320)
            + panel(found, "sampling", "cpu", "CPU seconds per picture, by iterations", 540, 420, 320) + "</svg>")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", metavar="OUT")
    parser.add_argument("given", nargs="*", metavar="RUN CACHE PICTURES")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--plot", metavar="FILE.svg")
    args = parser.parse_args()
    if not args.out or len(args.given) != (0 if args.plot else 3):
        raise UserError("give OUT RUN CACHE PICTURES, or OUT --plot FILE.svg; --help explains both.")
    if args.given:
        base, cache, folder = args.given
        images, classes = held_out(folder, data.read_header(cache)["classes"], PRESETS["tiny"].image_size)
        for seed in args.seeds:
            for fusion in METHODS:
                path = f"{args.out}/{fusion}-{seed}"
                once(path, lambda: train_and_measure(os.path.abspath(__file__), path, base, cache, images, classes,
                                                     "tiny", fusion, seed, SECONDS, ITERATIONS))
    found = read(args.out)
    if args.plot:
        write_file(args.plot, lambda file: file.write(plot(found).encode()))
    print_table(found)


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        train_for(*sys.argv[2:])
    run_script(main)
