"""Speed: each part against its textbook form, in the same run; how it grows; what a training would cost.

    python bench.py all                                  every part below; minutes to an hour on a CPU
    python bench.py head --preset d2c-b --batch 4        one part
    python bench.py generator --preset mar-b --iterations 64 --steps 100
    python bench.py growth --preset tiny                 as batch, iterations and the number of images grow
    python bench.py cost --preset d2c-l                  memory and time of a whole training, computed and not run

The plain forms are the textbook loops of the modules, ours those of fast.py, on the same weights and noise; the tests
assert that both give the same. A machine's speed drifts, so the two take turns, A B A B, and what is printed is the median
ratio with the smallest and the largest. GFLOP are counted (torch.utils.flop_counter), and set against the rate of a
large fp32 matrix product measured in the same run. Weights are random, where zero would be faster.
"""
import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import checkpoints
import fast
import fid
import generator
import prior
import sample
from diffloss import DiffusionHead, HeadConfig
from generator import Generator, hidden_counts
from presets import PRESETS
from faults import run_script
from runtime import UserError, autocast, setup
from tokenizers import KL, VQ

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "tests"))
import reference  # noqa: E402


def random_weights(model):
    """Fills parameters that are all zero: zeros would hide differences, and may be faster."""
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.02)
    return model.eval()


def seconds(call, device):
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def matmul_rate(device):
    """FLOP/s of a fp32 product of 2048 x 2048 matrices, the best of five."""
    a, b = torch.randn(2, 2048, 2048, device=device)
    return 2 * 2048**3 / min(seconds(lambda: a @ b, device) for _ in range(5))


def peak_memory(device):
    """MB, of all that ran so far, the textbook form too: allocated on CUDA, on a CPU the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def counted(call):
    """FLOPs of one call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def compare(args, plain, ours, flops, images, what):
    """Times both in turn. The rate is measured in between, as it drifts too. Speeds are those of `images` images."""
    times, rates = [], []
    for repeat in range(args.repeats + args.warmup):
        row = [seconds(call, args.device) for call in (plain, ours)]
        if repeat >= args.warmup:
            times.append(row)
            rates.append(matmul_rate(args.device))
    a, b = (statistics.median(column) for column in zip(*times))
    ratios = sorted(x / y for x, y in times)
    rate = statistics.median(rates)
    return {"what": what, "plain_s": a, "ours_s": b, "ratio": statistics.median(ratios), "ratio_min": ratios[0],
            "ratio_max": ratios[-1], "images_per_s": images / b, "gflop": flops / 1e9, "gflop_per_s": flops / b / 1e9,
            "matmul_gflop_per_s": rate / 1e9, "share": flops / b / rate, "peak_mb": peak_memory(args.device)}


# ------------------------------------------------------------------------------------------------------------ parts
# Each yields records: what was timed, and the figures.

def bench_head(args, preset):
    """The step loop, guided, for the rows of an average iteration, and for more."""
    c, device = preset.generator, args.device
    head = random_weights(DiffusionHead(HeadConfig(c.token_dim, c.dim, c.head_depth, c.head_width))).to(device)
    per_iteration = round(c.grid**2 / args.iterations * args.batch)
    for rows in (per_iteration, 4 * per_iteration):
        z, z_null = torch.randn(2, rows, c.dim, device=device)
        noise = torch.randn(args.steps + 1, rows, c.token_dim, device=device)
        how = z, z_null, 3.0, args.steps, 1.0, noise
        yield compare(args, lambda: head.sample(*how), lambda: fast.sample_head(head, *how),
                      counted(lambda: fast.sample_head(head, *how)), rows / c.grid**2, f"{rows} rows, {args.steps} steps")


def bench_prior(args, preset):
    """All codes of a batch, guided."""
    model = random_weights(prior.Prior(preset.prior)).to(args.device)
    B, L = args.batch, preset.prior.grid**2
    classes = torch.arange(B, device=args.device)
    ours = lambda: fast.generate_codes(model, classes, 2.0)
    yield compare(args, lambda: model.generate(classes, 2.0), ours, counted(ours), B,
                  f"batch {B}, {L} codes")


def decoding(args, model, iterations):
    """-> the arguments of a guided `generate`, plain or ours, with all its random numbers."""
    c, B, device = model.config, args.batch, args.device
    counts = [c.grid**2] + hidden_counts(c.grid**2, iterations)
    noise = [torch.randn(args.steps + 1, B * (a - b), c.token_dim, device=device) for a, b in zip(counts, counts[1:])]
    codes = torch.randint(c.vocab, (B, c.grid**2), device=device)
    orders = torch.rand(B, c.grid**2, device=device).argsort(1)
    classes = torch.arange(B, device=device) % c.classes
    return classes, codes, iterations, args.steps, 3.0, "linear", 1.0, orders, noise


def bench_generator(args, preset):
    """The iterative decoder at equal settings."""
    model = random_weights(Generator(preset.generator)).to(args.device)
    how = decoding(args, model, args.iterations)
    yield compare(args, lambda: model.generate(*how), lambda: fast.generate(model, *how),
                  counted(lambda: fast.generate(model, *how)), args.batch,
                  f"{model.config.fusion}, batch {args.batch}, {args.iterations} iterations x {args.steps}")


def bench_d2c(args, preset):
    """The paper's comparison, prior and generator at 64 iterations against MAR at 256, here in its textbook loop."""
    first = random_weights(prior.Prior(preset.prior)).to(args.device)
    second = random_weights(Generator(preset.generator)).to(args.device)
    mar = random_weights(Generator(replace(preset.generator, fusion="none"))).to(args.device)
    how, plain = decoding(args, second, args.iterations), decoding(args, mar, min(4 * args.iterations, mar.config.grid**2))

    def ours():
        codes = fast.generate_codes(first, how[0], 2.0)
        fast.generate(second, how[0], codes, *how[2:])

    yield compare(args, lambda: mar.generate(*plain), ours, counted(ours), args.batch,
                  f"D2C {how[2]} x {args.steps} against plain MAR {plain[2]} x {args.steps}, batch {args.batch}")


def mean_visible(L):
    """Tokens in sight in an average training step."""
    low = generator.GeneratorConfig.mask_min
    return L - round(L * statistics.mean(generator.mask_ratio((i + 0.5) / 100, low) for i in range(100)))


def mean_uniform(L):
    """The uniform number that gives the masking ratio of an average training step."""
    low, mean = generator.GeneratorConfig.mask_min, 1 - mean_visible(L) / L
    return min((i / 1000 for i in range(1000)), key=lambda u: abs(generator.mask_ratio(u, low) - mean))


def bench_train(args, preset):
    """Loss and gradient of the generator; plain: the head on all tokens, masked afterwards."""
    c, B, device = preset.generator, args.batch, args.device
    model, L = random_weights(Generator(replace(c, dropout=0.0))).to(device).train(), c.grid**2
    draws = model.draw(B, uniform=mean_uniform(L))
    latents, classes = torch.randn(B, L, c.token_dim, device=device), torch.arange(B, device=device) % c.classes
    codes = torch.randint(c.vocab, (B, L), device=device)

    def step(loss, *how):
        with autocast(device):
            value = loss(latents, classes, codes, *how)
        value.backward()
        model.zero_grad(set_to_none=True)

    plain = lambda: step(model.loss, draws.mask, draws.t, draws.noise, draws.null)
    ours = lambda: step(lambda *how: fast.loss(model, *how), draws)
    yield compare(args, plain, ours, counted(ours), B, f"batch {B}, {c.batch_mul} draws, {draws.hidden} of {L} hidden")


def bench_tokenise(args, preset):
    """Encoding by both tokenizers; plain: channels first."""
    images = torch.rand(args.batch, 3, preset.image_size, preset.image_size, device=args.device) * 2 - 1
    for model in (VQ(preset.vq), KL(preset.kl)):
        plain = random_weights(model).to(args.device)
        with tempfile.TemporaryDirectory() as folder:  # as data.py loads it
            kind = type(model).__name__.lower()
            checkpoints.save(os.path.join(folder, "model.pt"), kind, model.config, model.state_dict())
            ours = checkpoints.load_model(os.path.join(folder, "model.pt"), kind, args.device)
        yield compare(args, lambda: plain.encode(images), lambda: ours.encode(images),
                      counted(lambda: ours.encode(images)), args.batch, f"{kind}, {preset.image_size} pixels")


def bench_fid(args, preset):
    """Inception's features; plain: pytorch-fid's network, with batch norms and channels first."""
    images = torch.randint(256, (4 * args.batch, 3, 256, 256), dtype=torch.uint8, device=args.device)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "rule.pth")
        torch.save(reference.rule_weights(), path)
        ours = fid.Inception(path, "torch").to(args.device)  # channels last, on GPUs too, where fid.py takes the other
        plain = reference.plain_inception(path).to(args.device)
    yield compare(args, lambda: plain(images), lambda: ours(images), counted(lambda: ours(images)), len(images),
                  "features of 256 pixels")


def bench_growth(args, preset):
    """Class to picture with random weights: images/s by batch, seconds by iterations, memory by number of images."""
    models = [random_weights(m).to(args.device) for m in
              (KL(replace(preset.kl, scale=1.0)), Generator(preset.generator), VQ(preset.vq), prior.Prior(preset.prior))]
    names = [[i, str(i)] for i in range(preset.generator.classes)]
    run, s = sample.Run(*models, names, preset.sampling, args.device), preset.sampling
    draw = lambda B, n=s.iterations: seconds(lambda: sample.generate(run, [0] * B, 0, range(B),
                                                                     replace(s, iterations=n)), args.device)
    draw(1)
    for B in (1, 4, 16):
        yield {"what": f"batch {B}", "images_per_s": B / min(draw(B) for _ in range(args.repeats))}
    for n in (16, 32, 64, 256):
        if n <= preset.generator.grid**2:
            yield {"what": f"{n} iterations, batch {args.batch}", "ours_s": draw(args.batch, n)}
    for n in range(3):
        for _ in range(8):
            draw(args.batch)
        yield {"what": f"{(n + 1) * 8 * args.batch} images drawn", "peak_mb": peak_memory(args.device)}


def training_step(config: generator.GeneratorConfig, teacher: prior.PriorConfig):
    """-> FLOPs of an image in stage 2, bytes kept for its backward pass, parameters; with fake tensors, run nowhere."""
    kept = {}

    def keep(x):
        if not isinstance(x, nn.Parameter):
            kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        model, L = Generator(replace(config, dropout=0.0)).train(), config.grid**2
        classes = torch.zeros(1, dtype=torch.long)
        codes = classes.expand(1, L)
        if model.fusion.reads_codes:
            prior.Prior(teacher).eval().resample(codes, classes, torch.rand(1, L))
        latents, draws = torch.empty(1, L, config.token_dim), model.draw(1, uniform=mean_uniform(L))
        with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = fast.loss(model, latents, classes, codes, draws)
        loss.backward()
    return counter.get_total_flops(), sum(kept.values()), sum(p.numel() for p in model.parameters())


def bench_cost(args, preset):
    """Stage 2 on ImageNet for the recipe's epochs, computed from counts. The rate is that of MAR's authors, who state
    1d11h on 16 H100 for 400 epochs of MAR-L with a head of 3 x 1024 (LTH14/mar, README)."""
    images, mar = 1_281_167, replace(PRESETS["mar-l"].generator, head_depth=3, head_width=1024)
    rate = training_step(mar, preset.prior)[0] * images * 400 / (35 * 16 * 3600)
    flops, kept, weights = training_step(preset.generator, preset.prior)
    epochs = preset.recipes[2].epochs
    hours = flops * images * epochs / rate / 3600
    yield {"what": f"{epochs:g} epochs of {preset.generator.fusion}, computed: {flops / 1e9:.0f} GFLOP an image and "
                   f"step, {hours:,.0f} H100-hours at the {rate / 1e12:.0f} TFLOP/s of MAR's authors; "
                   f"{weights * 20 / 1e9:.1f} GB for weights, gradients, Adam and EMA, and {kept / 1e6:,.0f} MB an "
                   f"image of the pass (bf16)"}


PARTS = {name.removeprefix("bench_"): f for name, f in list(globals().items()) if name.startswith("bench_")}


def show(part, record):
    """One line: the figures that this record has."""
    r, text = record, f"{part:10} {record['what']}:"
    if "ratio" in r:
        text += f" plain {r['plain_s']:.2f} s, ours {r['ours_s']:.2f} s, {r['ratio']:.2f}x " \
                f"({r['ratio_min']:.2f} to {r['ratio_max']:.2f}); {r['gflop']:,.0f} GFLOP, {r['gflop_per_s']:.0f}/s, " \
                f"{r['share']:.0%} of a matmul's {r['matmul_gflop_per_s']:.0f}/s;"
    elif "ours_s" in r:
        text += f" {r['ours_s']:.2f} s;"
    text += f" {r['images_per_s']:.3g} images/s;" if "images_per_s" in r else ""
    text += f" peak {r['peak_mb']:,.0f} MB" if "peak_mb" in r else ""
    print(text.rstrip(";:"), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--preset", choices=PRESETS, default="d2c-b")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--batch", type=int, default=4, help="images")
    parser.add_argument("--iterations", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3, help="of each A B, after --warmup of them")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="append the records to FILE, one a line")
    args = parser.parse_args()
    if min(args.batch, args.steps, args.repeats) < 1 or args.warmup < 0:
        raise UserError("--batch, --steps and --repeats must be at least 1, --warmup at least 0.")
    preset = PRESETS[args.preset]
    if not 1 <= args.iterations <= preset.generator.grid**2:
        raise UserError(f"--iterations must be between 1 and {preset.generator.grid**2}.")
    if args.part == "all":  # a process each: peak memory is a process's
        rest = [a for a in sys.argv[1:] if a != "all"]
        for part in PARTS:
            if code := subprocess.run([sys.executable, __file__, part, *rest]).returncode:
                sys.exit(code)
        return
    args.device = setup(args.device).device
    torch.manual_seed(0)
    with nullcontext() if args.part in ("train", "cost") else torch.inference_mode():
        for record in PARTS[args.part](args, preset):
            show(args.part, record)
            if args.json:
                with open(args.json, "a") as f:
                    f.write(json.dumps({"part": args.part, "preset": args.preset, "device": str(args.device),
                                        "threads": torch.get_num_threads(), "machine": platform.platform(),
                                        "torch": torch.__version__, **record}) + "\n")


if __name__ == "__main__":
    run_script(main)
