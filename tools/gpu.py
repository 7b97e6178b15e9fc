"""All figures of a GPU in one run of 8 minutes: `python tools/bench.py gpu`, which prints and saves each as it comes.

The models are a preset (D2C) and the same generator without codes and with four times the iterations (MAR), at random
weights. Measured are images per second by batch and form (plain, fast, with CUDA graphs, compiled), the share of the
card's bf16 rate in a large matrix product, images per second and peak memory of training, and MAR's time over D2C's.

A whole decoding of n iterations x S steps would take too long. Two short measurements give its time:

    a step    of the head alone: a loop of 25 steps less one of 5, for every number of tokens that an iteration draws
    the rest  32 iterations with one step each, less these steps

The whole is n / 32 * rest + S * (one step of each of the n iterations). Time is linear in the steps, and the average
iteration sees the same share of the tokens whatever n is (within 3% of the rows). One whole decoding is timed beside
its estimate. The prior is timed whole, the KL decoder on at most 8 images at once.
"""
import gc
import time
from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch.utils.checkpoint import checkpoint

from measure import average_draws, classes_and_codes, count_flops, matmul_rate, peak_memory, random_weights, seconds
import fast
from diffloss import DiffusionHead, tf32
from generator import Block, Generator, masked_counts
from prior import Prior
from runtime import autocast
from tokenizers import KL

SHORT, FEW, MORE = 32, 5, 25  # iterations; steps
FORMS = ("fast", "plain", "graphs", "compiled")  # compiled comes last: it holds for the rest of the process


@lru_cache
def functions(form):
    """-> what draws codes from a prior, latents from a generator, tokens from a head."""
    if form == "plain":
        return Prior.generate, Generator.generate, DiffusionHead.sample
    if form == "compiled":
        torch._dynamo.config.cache_size_limit = 64  # both models, all batches; 8 by default, then it compiles no more
        fast.compile_blocks()
    graphs = fast.Graphs() if form == "graphs" else None
    return fast.generate_codes, partial(fast.generate, graphs=graphs), partial(fast.sample_head, graphs=graphs)


# ------------------------------------------------------------------------------------------------- cost of sampling
# `cost(call)` is the seconds or the FLOPs of a call. All images are guided.

def cost_of_a_step(cost, sample_head, model, B, iterations):
    """One step of the head in every iteration, all iterations together."""
    L, D = model.config.grid**2, model.config.dim
    masked = [L, *masked_counts(L, iterations)]
    tokens = [a - b for a, b in zip(masked, masked[1:])]  # of an image, drawn in each iteration
    step = {}
    for n in set(tokens):
        z, z_null = torch.randn(2, B * n, D, device=model.mask_token.device)
        few, more = (cost(lambda: sample_head(model.head, z, z_null, 3.0, steps)) for steps in (FEW, MORE))
        step[n] = max(0, more - few) / (MORE - FEW)
    return sum(step[n] for n in tokens)


def cost_of_decoding(cost, form, model, B, iterations, steps):
    """The generator's loop, estimated as the head of this file says."""
    _, generate, sample_head = functions(form)
    given, short = classes_and_codes(model.config, B, model.mask_token.device), min(SHORT, iterations)
    rest = cost(lambda: generate(model, *given, short, 1, 3.0))
    rest -= cost_of_a_step(cost, sample_head, model, B, short)
    return rest * iterations / short + steps * cost_of_a_step(cost, sample_head, model, B, iterations)


class Bench:
    """The models, what is known about them so far, and one method for each kind of figure."""

    def __init__(self, args, preset):
        self.device, self.steps, self.batch = args.device, args.steps, preset.recipes[2].micro
        self.kl, prior = random_weights(KL(preset.kl), self.device), random_weights(Prior(preset.prior), self.device)
        self.kl.set_scale(1.0)
        config = preset.generator
        d2c, mar = (random_weights(Generator(c), self.device) for c in (config, replace(config, fusion="none")))
        many = min(4 * args.iterations, config.grid**2)
        self.models = {"D2C": (d2c, prior, args.iterations), "MAR": (mar, None, many)}
        self.flops, self.time = {}, {}

    def seconds(self, call):
        with autocast(self.device):
            call()  # the first call takes memory, compiles and records
            return seconds(call, self.device)

    def count(self, call):
        with autocast(self.device):
            return count_flops(call)

    def product(self):
        on_gpu = self.device.type == "cuda"  # on a CPU the models compute in fp32
        self.rate = matmul_rate(self.device, *((torch.bfloat16, 8192) if on_gpu else (torch.float32, 512)))
        return {"matmul_gflop_per_s": self.rate / 1e9}

    def images(self, cost, name, form, B):
        """Seconds or FLOPs of B images from class to picture."""
        model, prior, iterations = self.models[name]
        classes, _ = classes_and_codes(model.config, B, self.device)
        latents = torch.randn(min(B, 8), model.config.grid**2, model.config.token_dim, device=self.device)
        codes = cost(lambda: functions(form)[0](prior, classes, cfg=2.0)) if prior else 0
        pixels = cost(lambda: self.kl.decode(latents)) * B / len(latents)
        return codes + cost_of_decoding(cost, form, model, B, iterations, self.steps) + pixels

    def sampling(self, name, form, B):
        counted = name, "plain" if form == "plain" else "fast"
        if counted not in self.flops:
            self.flops[counted] = self.images(self.count, *counted, 1)
        time_ = self.time[name, form, B] = self.images(self.seconds, name, form, B)
        flops = B * self.flops[counted]
        return {"images_per_s": B / time_, "seconds": time_, "gflop": flops / 1e9, "share": flops / time_ / self.rate}

    def ratio(self, form, B):
        return {"ratio": self.time["MAR", form, B] / self.time["D2C", form, B]}

    def whole(self, B):
        """A whole decoding of D2C, and its estimate."""
        model, _, n = self.models["D2C"]
        given = classes_and_codes(model.config, B, self.device)
        with autocast(self.device):
            whole = seconds(lambda: fast.generate(model, *given, n, self.steps, 3.0), self.device)
        return {"seconds": whole, "estimate_s": cost_of_decoding(self.seconds, "fast", model, B, n, self.steps)}

    def training(self, name, recompute):
        """Optimizer steps of stage 2 on random images, with the prior's pass and the EMA."""
        original, prior, _ = self.models[name]
        B, c = self.batch, original.config
        gc.collect()  # of the training before this one
        kept = sum(p.numel() * 4 for p in prior.parameters()) if prior else 0  # a training has the prior, too
        others = (torch.cuda.memory_allocated() - kept) / 1e6
        model = random_weights(Generator(c), self.device, training=True)
        for block in (m for m in model.modules() if recompute and isinstance(m, Block)):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        learning = [p for p in model.parameters() if p.requires_grad]
        optimizer, ema = torch.optim.AdamW(learning, lr=1e-6, fused=True), [p.detach().clone() for p in learning]
        latents = torch.randn(B, c.grid**2, c.token_dim, device=self.device)
        classes, codes = classes_and_codes(c, B, self.device)

        def step():
            draws = average_draws(model, B)
            with autocast(self.device):
                drawn = prior.mixture(codes, classes, 0.0, draws.code_uniform) if prior else codes
                loss = fast.loss(model, latents, classes, drawn, draws)
            with tf32():
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                torch._foreach_lerp_(ema, learning, 1e-4)

        step()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        fastest = min(seconds(step, self.device) for _ in range(3))
        return {"images_per_s": B / fastest, "peak_mb": peak_memory(self.device) - others}


# -------------------------------------------------------------------------------------------------------------- run

def figures(bench, batches, forms):
    """-> (what, function that measures it), the most wanted first."""
    yield "matrix product (bf16; fp32 on a CPU)", bench.product
    for form in forms:
        for B in batches:
            for name in bench.models:
                yield f"{name}, {form}, batch {B}", partial(bench.sampling, name, form, B)
            yield f"MAR's time over D2C's, {form}, batch {B}", partial(bench.ratio, form, B)
        if form == forms[0]:
            for name in bench.models:
                for recompute in (True, False):
                    text = f"{name}, training, passes of {bench.batch}{', --recompute' if recompute else ''}"
                    yield text, partial(bench.training, name, recompute)
            yield f"D2C, decoding of {min(8, max(batches))}, whole", partial(bench.whole, min(8, max(batches)))


def bench_gpu(args, preset):
    """Yields the figures. One that fails says why; none starts after args.minutes."""
    bench, deadline = Bench(args, preset), time.monotonic() + 60 * args.minutes
    for what, measure in figures(bench, args.batches, args.forms):
        if time.monotonic() > deadline:
            yield {"what": what, "error": f"not measured: the {args.minutes:g} minutes are over"}
            continue
        try:
            yield {"what": what, **measure()}
        except Exception as error:  # out of memory, say; the other figures still count
            first_line = str(error).partition("\n")[0]
            yield {"what": what, "error": f"{type(error).__name__}: {first_line}"}
