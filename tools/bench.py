"""Speed: each plain loop beside its fast form, how the work grows, what a training costs, and all figures of a GPU.

    python tools/bench.py all                                  all parts but gpu; minutes to an hour on a CPU
    python tools/bench.py head --preset d2c-b --batch 4        one part
    python tools/bench.py generator --preset mar-b --iterations 64 --steps 100
    python tools/bench.py growth --preset tiny                 as batch, iterations and the number of images grow
    python tools/bench.py fusions                              parameters and FLOPs with each fusion, counted
    python tools/bench.py cost --preset d2c-l                  memory and time of a training, computed, not run
    python tools/bench.py gpu                                  8 minutes on one GPU: see gpu.py

Plain and fast (fast.py) compute the same from the same weights and random numbers, which the tests assert. The speed
of a machine drifts. The two therefore take turns, and the tool prints the median of the ratios with the smallest and
the largest. It counts FLOPs (torch.utils.flop_counter) and compares them with the rate of a large matrix product,
measured in the same run. The weights are random, because all-zero weights can run faster than real ones.
"""
import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from copy import deepcopy
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from measure import (average_draws, classes_and_codes, completed, count_flops, matmul_rate, peak_memory, random_weights,
                     seconds)
import fast
import inception
import sample
from diffloss import DiffusionHead, HeadConfig
from faults import run_script
from fusion import FUSIONS
from generator import Generator
from gpu import FORMS, bench_gpu
from presets import PRESETS
from prior import Prior
from runtime import UserError, autocast, log, setup
from tokenizers import KL, VQ


def in_turn(args, what, images, plain, ours):
    """Times both by turns. `ours` makes or reads that many images; FLOPs are those of `ours`."""
    times, rates, flops = [], [], count_flops(ours)
    for repeat in range(args.warmup + args.repeats):
        row = [seconds(call, args.device) for call in (plain, ours)]
        if repeat >= args.warmup:
            times.append(row)
            rates.append(matmul_rate(args.device))
    plain_s, fast_s = (statistics.median(column) for column in zip(*times))
    ratios, rate = sorted(a / b for a, b in times), statistics.median(rates)
    return {"what": what, "plain_s": plain_s, "fast_s": fast_s, "ratio": statistics.median(ratios),
            "ratio_min": ratios[0], "ratio_max": ratios[-1], "images_per_s": images / fast_s, "gflop": flops / 1e9,
            "share": flops / fast_s / rate, "matmul_gflop_per_s": rate / 1e9, "peak_mb": peak_memory(args.device)}


# Each part yields its figures as dictionaries: "what" was measured, and numbers, named in SHOWN.

def bench_head(args, preset):
    """The reverse steps, guided, for the tokens of an average iteration, and for four times as many."""
    c, device = preset.generator, args.device
    head = random_weights(DiffusionHead(HeadConfig(c.token_dim, c.dim, c.head_depth, c.head_width)), device)
    average = max(1, round(args.batch * c.grid**2 / args.iterations))
    for rows in (average, 4 * average):
        z, z_null = torch.randn(2, rows, c.dim, device=device)
        how = dict(cfg=3.0, steps=args.steps, noise=torch.randn(args.steps + 1, rows, c.token_dim, device=device))
        yield in_turn(args, f"{rows} rows, {args.steps} steps", rows / c.grid**2,
                      lambda: head.sample(z, z_null, **how), lambda: fast.sample_head(head, z, z_null, **how))


def bench_prior(args, preset):
    """All codes of a batch, guided."""
    model, classes = random_weights(Prior(preset.prior), args.device), torch.arange(args.batch, device=args.device)
    yield in_turn(args, f"batch {args.batch}, {preset.prior.grid**2} codes", args.batch,
                  lambda: model.generate(classes, cfg=2.0), lambda: fast.generate_codes(model, classes, cfg=2.0))


def bench_generator(args, preset):
    """The iterative decoder."""
    model = random_weights(Generator(preset.generator), args.device)
    given = classes_and_codes(model.config, args.batch, args.device)
    how = dict(iterations=args.iterations, steps=args.steps, cfg=3.0)
    yield in_turn(args, f"{model.config.fusion}, batch {args.batch}, {args.iterations} x {args.steps}", args.batch,
                  lambda: model.generate(*given, **how), lambda: fast.generate(model, *given, **how))


def bench_d2c(args, preset):
    """The paper's comparison: prior and generator, fast, beside plain MAR with four times the iterations."""
    prior, d2c, mar = (random_weights(m, args.device) for m in (
        Prior(preset.prior), Generator(preset.generator), Generator(replace(preset.generator, fusion="none"))))
    classes, _ = classes_and_codes(d2c.config, args.batch, args.device)
    many, how = min(4 * args.iterations, mar.config.grid**2), dict(steps=args.steps, cfg=3.0)

    def ours():
        codes = fast.generate_codes(prior, classes, cfg=2.0)
        fast.generate(d2c, classes, codes, args.iterations, **how)

    yield in_turn(args, f"D2C {args.iterations} x {args.steps}, MAR {many} x {args.steps}, batch {args.batch}",
                  args.batch, lambda: mar.generate(classes, None, many, **how), ours)


def bench_train(args, preset):
    """Loss and gradient of the generator."""
    model = random_weights(Generator(replace(preset.generator, dropout=0.0)), args.device, training=True)
    c, B, draws = model.config, args.batch, average_draws(model, args.batch)
    latents = torch.randn(B, c.grid**2, c.token_dim, device=args.device)
    given = latents, *classes_and_codes(c, B, args.device)

    def step(loss):
        with autocast(args.device):
            value = loss()
        value.backward()
        model.zero_grad(set_to_none=True)

    yield in_turn(args, f"batch {B}, {c.batch_mul} draws, {draws.masked} of {c.grid**2} masked", B,
                  lambda: step(lambda: model.loss(*given, draws.mask, draws.t, draws.noise, draws.drop)),
                  lambda: step(lambda: fast.loss(model, *given, draws)))


def bench_tokenise(args, preset):
    """Encoding by both tokenizers; fast: channels last, as checkpoints.load_model returns them."""
    images = torch.rand(args.batch, 3, preset.image_size, preset.image_size, device=args.device) * 2 - 1
    for model in (VQ(preset.vq), KL(preset.kl)):
        plain = random_weights(model, args.device)
        ours = deepcopy(plain).to(memory_format=torch.channels_last)
        yield in_turn(args, f"{type(model).__name__}, {preset.image_size} pixels", args.batch,
                      lambda: plain.encode(images), lambda: ours.encode(images))


def bench_fid(args, preset):
    """Inception's features, without gradients; fast: batch norms folded, channels last."""
    images = torch.randint(256, (4 * args.batch, 3, 256, 256), dtype=torch.uint8, device=args.device)
    plain = inception.Network()
    with tempfile.TemporaryDirectory() as folder:
        torch.save(plain.state_dict(), path := os.path.join(folder, "inception.pth"))
        plain = plain.eval().requires_grad_(False).to(args.device)
        ours = inception.Inception(path, "torch", args.device)
    yield in_turn(args, "features of 256 pixels", len(images),
                  lambda: plain(inception.resize_torch(images)), lambda: ours(images))


def bench_growth(args, preset):
    """Class to picture: images/s by batch, seconds by iterations, memory by the number of images."""
    kl, *others = (random_weights(m, args.device) for m in (
        KL(preset.kl), Generator(preset.generator), VQ(preset.vq), Prior(preset.prior)))
    kl.set_scale(1.0)
    names, s = [[i, str(i)] for i in range(preset.generator.classes)], preset.sampling
    run = sample.Run(kl, *others, names, s, args.device)
    draw = lambda B, n=s.iterations: seconds(lambda: sample.generate(
        run, torch.zeros(B, dtype=torch.long), 0, range(B), replace(s, iterations=n)), args.device)
    draw(1)
    for B in (1, 4, 16):
        yield {"what": f"batch {B}", "images_per_s": B / min(draw(B) for _ in range(args.repeats))}
    for n in (16, 32, 64, 256):
        if n <= preset.generator.grid**2:
            yield {"what": f"{n} iterations, batch {args.batch}", "seconds": draw(args.batch, n)}
    for n in range(3):
        for _ in range(8):
            draw(args.batch)
        yield {"what": f"{(n + 1) * 8 * args.batch} images drawn", "peak_mb": peak_memory(args.device)}


def training_step(config, prior_config):
    """-> FLOPs of an image in stage 2, bytes that it keeps for its backward pass, parameters; with fake tensors."""
    with FakeTensorMode():
        model, prior = Generator(replace(config, dropout=0.0)).train(), Prior(prior_config).eval()

        def step(B, keep=lambda x: x):
            draws, latents = average_draws(model, B), torch.empty(B, config.grid**2, config.token_dim)
            classes, codes = classes_and_codes(config, B, "cpu")
            drawn = prior.mixture(codes, classes, 0.0, draws.code_uniform) if model.fusion.reads_codes else codes
            with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                loss = fast.loss(model, latents, classes, drawn, draws)
            loss.backward()

        def kept_bytes(B):  # not by count_flops, whose attention keeps more than that of a training
            kept = {}

            def keep(x):
                kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
                return x

            step(B, keep)
            return sum(kept.values())

        each = kept_bytes(2) - kept_bytes(1)  # without what all images share, such as autocast's copies of the weights
        flops = count_flops(lambda: step(1))
    return flops, each, sum(p.numel() for p in model.parameters())


def bench_fusions(args, preset):
    """Parameters, and FLOPs of the guided decoding of one image, with each fusion, counted with fake tensors."""
    for fusion in FUSIONS:
        with FakeTensorMode():
            model = Generator(replace(preset.generator, fusion=fusion)).eval()
            total = sum(p.numel() for p in model.parameters())
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            model.requires_grad_(False)
            given = classes_and_codes(model.config, 1, "cpu")
            null = fast.prepare_null(model)  # computed once per run, so not counted
            one, two = (count_flops(lambda: fast.generate(model, *given, args.iterations, steps, 3.0, null=null))
                        for steps in (1, 2))
        yield {"what": fusion, "parameters_m": total / 1e6, "trained_m": trained / 1e6,
               "gflop": (one + (args.steps - 1) * (two - one)) / 1e9}  # FLOPs are linear in the steps


def bench_cost(args, preset):
    """Stage 2 on ImageNet for the recipe's epochs, computed from counts and from the rate that MAR's authors reached:
    they state 1d11h on 16 H100 for 400 epochs of MAR-L with a head of 3 x 1024 (LTH14/mar, README)."""
    images, mar = 1_281_167, replace(PRESETS["mar-l"].generator, head_depth=3, head_width=1024)
    rate = training_step(mar, preset.prior)[0] * images * 400 / (35 * 16 * 3600)
    flops, kept, weights = training_step(preset.generator, preset.prior)
    epochs = preset.recipes[2].epochs
    yield {"what": f"{epochs:g} epochs of {preset.generator.fusion}, at the {rate / 1e12:.0f} TFLOP/s of MAR's authors",
           "gflop": flops / 1e9, "h100_hours": flops * images * epochs / rate / 3600,
           "state_gb": weights * (4 + 4 + 8 + 4) / 1e9,  # weights, gradients, Adam, EMA
           "pass_mb": kept / 1e6}


# ----------------------------------------------------------------------------------------------------- command line

PARTS = {"head": bench_head, "prior": bench_prior, "generator": bench_generator, "d2c": bench_d2c, "train": bench_train,
         "tokenise": bench_tokenise, "fid": bench_fid, "growth": bench_growth, "fusions": bench_fusions,
         "cost": bench_cost, "gpu": bench_gpu}
SHOWN = {
    "parameters_m": "{:.1f}M parameters", "trained_m": "{:.1f}M trained",
    "plain_s": "plain {:.2f} s", "fast_s": "fast {:.2f} s",
    "ratio": "ratio {:.2f}", "ratio_min": "smallest {:.2f}", "ratio_max": "largest {:.2f}",
    "seconds": "{:.2f} s", "estimate_s": "estimate {:.2f} s",
    "images_per_s": "{:.3g} images/s", "gflop": "{:,.5g} GFLOP", "share": "{:.0%} of a matrix product's rate",
    "matmul_gflop_per_s": "{:,.0f} GFLOP/s", "h100_hours": "{:,.0f} H100-hours",
    "state_gb": "{:.1f} GB for weights, gradients, Adam and EMA", "pass_mb": "{:,.0f} MB per image of a pass in bf16",
    "peak_mb": "peak {:,.0f} MB", "error": "{}"}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--preset", choices=PRESETS, default="d2c-b")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--batch", type=int, default=4, help="images")
    parser.add_argument("--iterations", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each of the two")
    parser.add_argument("--warmup", type=int, default=1, help="untimed runs before")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 256], help="gpu: batches of sampling")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="gpu: forms of the loops")
    parser.add_argument("--minutes", type=float, default=8.0, help="gpu: no figure starts later")
    parser.add_argument("--json", metavar="FILE", help="append the figures to FILE, one a line (gpu: gpu.jsonl)")
    args = parser.parse_args()
    if min(args.batch, args.steps, args.repeats, *args.batches) < 1 or args.warmup < 0:
        raise UserError("--batch, --batches, --steps and --repeats must be at least 1, --warmup at least 0.")
    tokens = PRESETS[args.preset].generator.grid**2
    if not 1 <= args.iterations <= tokens:
        raise UserError(f"--iterations must be between 1 and the {tokens} tokens of {args.preset}.")
    args.json = args.json or ("gpu.jsonl" if args.part == "gpu" else None)
    return args


def main():
    args = parse_args()
    if args.part == "all":  # a process each: peak memory is a process's
        rest = [a for a in sys.argv[1:] if a != "all"]
        for part in PARTS:
            if part != "gpu" and (code := subprocess.run([sys.executable, __file__, part, *rest]).returncode):
                sys.exit(code)
        return
    args.device = setup(args.device).device
    torch.manual_seed(0)
    card = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else platform.machine()
    about = {"part": args.part, "preset": args.preset, "device": str(args.device), "card": card,
             "torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.platform()}
    for figure in PARTS[args.part](args, completed(PRESETS[args.preset])):
        numbers = ", ".join(text.format(figure[name]) for name, text in SHOWN.items() if name in figure)
        print(f"{args.part:9} {figure['what']}: {numbers}", flush=True)
        if args.json:
            log(args.json, **about, **figure)


if __name__ == "__main__":
    run_script(main)
