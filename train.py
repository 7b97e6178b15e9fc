"""Training: one straight loop for the three stages.

    stage 0   tokenizers VQ and KL, on an image folder                      --only vq or kl for one of them
    stage 1   prior, on a cache (data.py)                                   D2C 4.1, Eq. 3
    stage 2   generator, on a cache; prior and tokenizers frozen            D2C 4.2, Eq. 2

    python train.py --stage all --preset tiny --data IMAGES --run runs/mine     # the three, and the cache between them
    python train.py --stage 1 --preset tiny --data data/tiny --run runs/tiny    # one of them
    torchrun --nproc_per_node=8 train.py --stage 2      # defaults: --preset d2c-b --data data/cache --run runs/d2c-b

With --run write `torchrun --nproc_per_node=8 -- train.py ...`: without the two dashes torchrun takes our flag for its
own --run-path. The same command, without --fresh, resumes. A run directory gets {vq,kl,prior,generator}.pt (EMA), the
states train-N.pt (--only vq: train-0-vq.pt) and train-N.previous.pt, grids/, log.jsonl, which may repeat steps.

Global batch = images per rank and pass x ranks x --accumulate. All random numbers of step k follow from (seed, k) and
are drawn for the whole batch, of which each rank takes its rows: a run is the same on 1 and on 8 GPUs (dropout, KL's
added noise: if passes hold equally many images). SIGTERM and Ctrl-C end a run after this step or the next, saved."""
import argparse
import math
import os
import time
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import checkpoints
import fast
import generator
import prior
import sample
from data import Cache, Folder, batches, find_images, lies_in, tokenise
from diffloss import HeadBlock, tf32
from faults import Stopped, Watch, is_restart, run_script, step_unless
from fusion import FUSIONS, MapperLayer
from presets import PRESETS, sized, true_share
from runtime import (UserError, agree, all_mean, autocast, barrier, broadcast, divide, log, make_folder, passes, print0,
                     read_json, refuse, rng, setup, shard_moments, spread, unsharded, whole, write_json)
from tokenizers import Decoder, Encoder, fit_linear_path, latent_scale


# ----------------------------------------------------------------------------------------------------------- stages

KINDS = (("vq", "kl"), ("prior",), ("generator",))  # the models that each stage trains


class Stage(nn.Module):
    """What the loop needs to know of a stage. Each stage sets data and trained, and defines forward and picture.

    data      the images: len(data), data.identity, and data.batch(sample numbers) -> tensors
    trained   ModuleDict of the models that learn: what DDP, the optimizer, the EMA and the files see
    frozen    the models that do not learn: a plain dict, so that none of these see them
    about     what the weight files say besides config and weights
    forward   (step, rows, *tensors from data) -> the loss of these rows, a slice of this step's global batch
    picture   (models) -> images for a grid of samples, uint8 [B, 3, H, W]"""

    def __init__(self, args, preset, world):
        super().__init__()
        self.args, self.preset, self.world, self.device = args, preset, world, world.device
        self.recipe, self.frozen, self.about = preset.recipes[args.stage], {}, {"preset": args.preset}

    def start(self):
        """Once, before the first step of a new run."""

    def after(self, step, ema) -> dict:  # after each optimizer step; -> what to log
        return {}

    def memory(self) -> dict:  # further tensors of the state; ranks have different ones, and their mean is saved
        return {}

    def before_save(self, models):
        """Completes the EMA models before their files are written."""

    def step_rng(self, step):
        return rng(self.device, f"stage {self.args.stage}", self.args.seed, step)

    def file(self, kind):
        return os.path.join(self.args.run, f"{kind}.pt")

    def pace(self):
        """-> highest learning rate, steps of warm-up, of decay. Warm-up is in epochs; --hours shortens it."""
        args, recipe, images = self.args, self.recipe, len(self.data)
        shorter = args.steps / recipe.steps(images, args.batch) if args.hours else 1.0
        warmup = recipe.warmup * images / args.batch * shorter
        return (args.lr or recipe.lr) * args.batch / 256, warmup, recipe.decay * args.steps

    def read_cache(self):  # for stages 1 and 2: the cache; refuses other tokenizers than those that made it
        self.data = Cache(self.args.data, self.args.seed, self.recipe.balanced)
        self.classes, self.grid, self.codes = self.data.classes, self.data.header["grid"], self.data.header["codebook"]
        for kind in KINDS[0]:
            self.frozen[kind] = checkpoints.load_model(self.file(kind), kind, self.device)
            self.data.check_tokenizer(kind, self.frozen[kind], self.file(kind))
        self.about |= {"classes": self.classes, "tokenizers": {kind: self.data.header[kind] for kind in self.frozen}}
        self.shown = torch.arange(16, device=self.device) % len(self.classes)  # the classes of a grid of samples


class Tokenizers(Stage):
    """Stage 0: both tokenizers in one loop. They share the images and nothing else."""

    def __init__(self, args, preset, world):
        super().__init__(args, preset, world)
        self.data, self.about["image_size"] = Folder(args.data, preset.image_size, args.seed), preset.image_size
        self.trained = nn.ModuleDict({kind: checkpoints.MODULES[kind](getattr(preset, kind))
                                      for kind in KINDS[0] if args.only in (None, kind)})

    def start(self):
        number = 2000 * 64**2 // self.preset.image_size**2  # of images; fewer large ones, to bound the memory
        for model in self.trained.values():
            if model.config.linear_path:
                images, = self.data.batch(range(min(number, len(self.data))))
                fit_linear_path(model, images, rng("cpu", "linear path", self.args.seed))

    def forward(self, step, rows, images):
        loss = self.trained["vq"].loss(images)[0] if "vq" in self.trained else 0.0
        if "kl" in self.trained:
            kl = self.trained["kl"]
            draws = kl.draw(self.args.batch, images.shape[-1] // kl.stride, self.step_rng(step))
            loss = loss + kl.loss(images, [x[rows] for x in draws])[0]
        return loss

    def after(self, step, ema):
        """Every 100 steps, unused codes move onto encoded patches; only until half-way, so that they can settle."""
        if "vq" not in self.trained or (step + 1) % 100 or step > self.args.steps / 2:
            return {}
        vq = self.trained["vq"]
        all_mean(vq.usage)  # in place
        images, = self.data.batch(range(step * self.args.batch, step * self.args.batch + 16))  # the same on every rank
        moved = vq.restart_dead_codes(images.to(self.device), rng("cpu", "restart", self.args.seed, step))
        broadcast(vq.codebook.weight.data)  # encodings of two ranks may differ in the last bit
        ema["vq"].codebook.weight[moved] = vq.codebook.weight[moved].detach()  # its average starts anew
        return {"dead_codes": len(moved)}

    def memory(self):  # how often each code was chosen since the last restart
        return {"usage": self.trained["vq"].usage} if "vq" in self.trained else {}

    def before_save(self, models):  # measures the scale of KL's latents
        if "kl" in models:
            images, = self.data.batch(range(min(1000, len(self.data))))
            models["kl"].set_scale(latent_scale(models["kl"].encode(x.to(self.device)) for x in images.split(50)))

    def picture(self, models):  # rows: images, decoded codes, decoded latents
        rows = [self.data.batch(range(8))[0].to(self.device)]
        if "vq" in models:
            rows.append(models["vq"].decode(models["vq"].encode(rows[0])))
        if "kl" in models:
            kl = models["kl"]  # decode() would need the scale, which is not measured yet
            rows.append(kl.to_images(kl.posterior(kl.encode(rows[0]))[0]))
        return sample.to_uint8(torch.cat(rows))


class PriorStage(Stage):
    """Stage 1: the cross-entropy of the codes."""

    def __init__(self, args, preset, world):
        super().__init__(args, preset, world)
        self.read_cache()
        self.about["tokenizers"].pop("kl")  # the prior knows codes only: latents of any kind may follow
        config = replace(preset.prior, vocab=self.codes, grid=self.grid, classes=len(self.classes))
        self.trained = nn.ModuleDict({"prior": prior.Prior(config)})

    def forward(self, step, rows, codes, moments, classes):
        model = self.trained["prior"]
        return model.loss(codes, classes, model.draw(self.args.batch, self.step_rng(step))[rows])

    def picture(self, models):
        s, generators = self.preset.sampling, [rng(self.device, "grid", i) for i in range(16)]
        codes = fast.generate_codes(models["prior"], self.shown, s.prior_cfg, s.prior_temperature, s.top_k, s.top_p,
                                    generators)
        return sample.to_uint8(self.frozen["vq"].decode(codes))


class GeneratorStage(Stage):
    """Stage 2: the diffusion loss of masked latents, given class and codes."""

    def __init__(self, args, preset, world):
        super().__init__(args, preset, world)
        self.read_cache()
        fusion, condition = args.fusion or preset.generator.fusion, args.condition or preset.condition
        self.shares, kl, path = true_share(condition), self.frozen["kl"], self.file("prior")
        if FUSIONS[fusion].reads_codes and os.path.exists(path):
            model = self.frozen["prior"] = checkpoints.load_model(path, "prior", self.device)
            names = self.classes if "classes" in model.about else len(self.classes)  # official files have no names
            wanted = {"classes": names, "vq": self.data.header["vq"], "grid": self.grid, "vocab": self.codes}
            checkpoints.refuse_other(path, model, wanted)
        elif FUSIONS[fusion].reads_codes:
            refuse([(min(self.shares) < 1, "no prior.pt yet; run stage 1 first, or use --condition ground_truth")])
            print0(f"note: {path} is not there; the codes get a random table, and no samples are shown")
            args.grid_every = 0
        code_dim = (self.frozen["prior"].config if "prior" in self.frozen else preset.prior).dim
        config = replace(preset.generator, fusion=fusion, classes=len(self.classes),
                         grid=self.data.header["latent_grid"] // kl.config.merge,  # a latent is merge x merge positions
                         token_dim=kl.config.token_dim, code_grid=self.grid, vocab=self.codes, code_dim=code_dim)
        try:
            model = generator.Generator(config)
        except ValueError as error:
            raise UserError(f"--fusion {fusion} does not fit this preset: {error}.") from None
        if "prior" in self.frozen:  # D2C embeds the codes by the prior's table
            model.fusion.copy_table(self.frozen["prior"].code_embedding.weight)
        self.trained = nn.ModuleDict({"generator": model})
        self.sampling = replace(preset.sampling, iterations=min(preset.sampling.iterations, config.grid**2))
        kl.set_scale(kl.config.scale or self.data.scale)  # if kl.pt does not know it, what data.py measured
        self.about.update(sampling=asdict(self.sampling), condition=condition, latent_scale=kl.config.scale)

    def forward(self, step, rows, codes, moments, classes):
        model, (first, last) = self.trained["generator"], self.shares
        uniform = float(torch.rand((), generator=rng("cpu", "ratio", self.args.seed, step)))  # on the host, see draw
        draws = model.draw(self.args.batch, self.step_rng(step), uniform).part(rows)
        latents = self.frozen["kl"].sample(moments, draws.posterior_noise)  # drawn anew at every step
        share = first + (last - first) * step / self.args.steps
        if "prior" in self.frozen and share < 1:
            codes = self.frozen["prior"].mixture(codes, classes, share, draws.code_uniform)
        return fast.loss(model, latents, classes, codes, draws)

    def picture(self, models):
        run = sample.Run(self.frozen["kl"], models["generator"], self.frozen["vq"], self.frozen.get("prior"),
                         self.classes, self.sampling, self.device)
        return sample.generate(run, self.shown).images


STAGES = (Tokenizers, PriorStage, GeneratorStage)
BLOCKS = (generator.Block, prior.Block)  # they hold most weights and activations: see --recompute, --shard
FORECAST = 60.0  # seconds after which a stage says how long it will take


# ------------------------------------------------------------------------------------------------------------ flags

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage", choices=("0", "1", "2", "all"), required=True)
    add("--preset", choices=PRESETS, default="d2c-b")
    add("--size", type=int, help="stages 0 and all: side of the pictures in pixels (default: the preset's)")
    add("--data", help="image folder (stages 0 and all) or cache (stages 1, 2; default: data/cache)")
    add("--run", help="run directory (default: runs/PRESET)")
    add("--only", choices=("vq", "kl"), help="stage 0: train one tokenizer")
    add("--fusion", choices=FUSIONS, help="stage 2 (default: the preset's)")
    add("--condition", help="stage 2, source of the codes (default: the preset's): ground_truth; resampled: the prior "
        "draws each code, given the true codes before it; mixed:P: each code is true with probability P, else "
        "resampled; mixed:P-Q: the probability changes from P to Q over the training")
    add("--steps", type=int, help="optimizer steps in all (default: the preset's epochs)")
    add("--hours", type=float, help="stage all: shorten the stages to this time in all, without cache, saves, grids")
    add("--batch", type=int, help="global batch (default: the preset's)")
    add("--lr", type=float, help="learning rate at batch 256 (default: the preset's)")
    add("--accumulate", type=int, help="passes per optimizer step (default: as few as the preset's pass size allows)")
    add("--seed", type=int, default=0)
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    add("--compile", action="store_true", help="torch.compile the blocks of the models")
    add("--recompute", action="store_true", help="gradient checkpointing of the blocks: less memory, more time")
    add("--log-every", type=int, default=20, help="steps")
    add("--save-every", type=int, default=500, help="steps")
    add("--grid-every", type=int, default=1000, help="steps; 0 for no pictures")
    add("--shard", action="store_true", help="divide weights, EMA and optimizer among the ranks (FSDP2): less memory")
    add("--fresh", action="store_true", help="start over; weights and states (all: everything) move to RUN/before-N")
    add("--dry-run", action="store_true", help="say what would be trained, and stop")
    args = parser.parse_args()
    all_stages, folder = args.stage == "all", args.stage in ("0", "all")
    args.run = os.path.join("runs", args.preset) if args.run is None else args.run
    bad = lambda x: x is not None and not 0 < x < math.inf
    refuse([("" in (args.data, args.run), "--data and --run take paths"), (bad(args.lr), "--lr must be above 0"),
            (args.data is None and folder, f"stage {args.stage} needs an image folder: --data DIR"),
            (folder and args.data and lies_in(args.run, args.data), "--run lies among the classes of --data; move it"),
            (args.size is not None and not folder, "--size is for stages 0 and all; a cache has its size"),
            (not 0 <= args.seed < 2**63, "--seed must be at least 0, and below 2**63"),
            (args.only and args.stage != "0", "--only vq or kl is for stage 0"),
            ((args.fusion or args.condition) and args.stage in ("0", "1"), "--fusion and --condition are for stage 2"),
            (args.condition and not FUSIONS[args.fusion or PRESETS[args.preset].generator.fusion].reads_codes,
             "--condition says where codes come from, but this fusion reads none; omit it"),
            (args.shard and (folder or "LOCAL_RANK" not in os.environ), "--shard is for stages 1 and 2 under torchrun"),
            ((args.steps or args.lr) and all_stages, "--steps and --lr are for a single stage; see --hours"),
            (bad(args.hours) or args.hours and not all_stages, "--hours H, above 0, is for stage all"),
            (args.hours and "-" in (args.condition or ""), "--hours cannot be combined with a --condition that moves"),
            (any(map(bad, (args.batch, args.accumulate, args.steps, args.log_every, args.save_every))),
             "--batch, --accumulate, --steps, --log-every and --save-every must be at least 1"),
            (args.grid_every < 0, "--grid-every must be at least 0")])
    args.stage, args.data = args.stage if all_stages else int(args.stage), args.data or os.path.join("data", "cache")
    return args


# ------------------------------------------------------------------------------------------------ build, resume, save

def build(args, world) -> Stage:
    """Makes the stage with random weights, fills in the settings that no flag gives, and prints them."""
    agree({k: v for k, v in vars(args).items() if k not in ("data", "run")}, "their flags")  # paths may differ
    torch.manual_seed(args.seed)
    stage = STAGES[args.stage](args, sized(PRESETS[args.preset], args.size), world)
    args.batch = args.batch or stage.recipe.batch
    args.steps = args.steps or stage.recipe.steps(len(stage.data), args.batch)
    stage.micro, args.accumulate = divide(args.batch, world, args.accumulate, stage.recipe.micro)
    lr, warmup, _ = stage.pace()
    print0(f"stage {args.stage}: {'+'.join(stage.trained)}, {sum(p.numel() for p in stage.trained.parameters()):,} "
           f"parameters, {len(stage.data):,} images, {args.steps:,} steps of {args.batch} = {stage.micro} images x "
           f"{world.size} ranks x {args.accumulate} passes, learning rate {lr:.2e} after {warmup:.0f} steps, on "
           f"{world.device}")
    return stage


label = lambda args: f"{args.stage}-{args.only}" if args.only else args.stage  # of a training, e.g. 1 or 0-vq
state_path = lambda args: os.path.join(args.run, f"train-{label(args)}.pt")


def settings(stage) -> dict:
    """What a resumed run must have in common with its first part."""
    args, configs = stage.args, {kind: asdict(model.config) for kind, model in stage.trained.items()}
    condition = stage.about.get("condition", "")
    moves = "-" in condition or stage.recipe.decay > 0  # then share of true codes or learning rate depend on steps
    steps = args.steps if moves and not args.hours else None
    return {**configs, "condition": condition, "steps": steps, "batch": args.batch, "seed": args.seed,
            "data": stage.data.identity, "size": stage.preset.image_size if args.stage == 0 else None}


def resume(stage):
    """-> ema, loss_of, optimizer, watch, first step: from the state, or new. loss_of: the stage, wrapped."""
    args, world = stage.args, stage.world
    fresh = args.fresh and world.rank == 0 and not is_restart()  # rank 0 moves the files
    state = checkpoints.find_state(state_path(args), f"train-{args.stage}", settings(stage),
                                   [stage.file(kind) for kind in stage.trained], fresh)
    if state is None:
        stage.start()
    else:
        stage.trained.load_state_dict(state["raw"])
        for name, tensor in stage.memory().items():
            tensor.copy_(state["memory"][name])
    stage.to(world.device)
    for tensor in stage.trained.state_dict().values():
        broadcast(tensor)  # so that EMA and weights start out the same on every rank
    ema = deepcopy(stage.trained).eval().requires_grad_(False)
    if state is not None:
        ema.load_state_dict(state["ema"])
    for module in stage.trained.modules():  # in place: parameters keep their names, and the EMA stays as it is
        if args.compile and isinstance(module, (Encoder, Decoder, *BLOCKS, HeadBlock)):
            module.compile()
        if args.recompute and isinstance(module, BLOCKS):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    loss_of = spread(stage, ema, world, args.shard, (*BLOCKS, MapperLayer))  # MapperLayer: the Q-Former's
    groups = [{"params": [], "weight_decay": decay} for decay in (stage.recipe.weight_decay, 0.0)]
    for name, p in stage.trained.named_parameters():
        groups[p.ndim < 2 or ".head." in name]["params"].append(p)  # [1]: no decay (MAR's); a frozen p gets no gradient
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=world.device.type != "mps")
    if state is not None:  # the moments alone: the state may come from another kind of device, with other settings
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state["optimizer"]["state"]})
        shard_moments(optimizer)
    return ema, loss_of, optimizer, Watch(world, state["skipped"] if state else 0), state["step"] if state else 0


def save(stage, ema, optimizer, watch, step):
    """Writes the EMA weights and the training state. All ranks must call it."""
    memory = {name: all_mean(tensor) for name, tensor in stage.memory().items()}
    states = whole({"raw": stage.trained.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()})
    if stage.world.rank > 0:
        return
    stage.before_save(ema)
    for kind, model in ema.items():
        weights = {k.removeprefix(f"{kind}."): v for k, v in states["ema"].items() if k.startswith(f"{kind}.")}
        checkpoints.save(stage.file(kind), kind, model.config, weights, step=step, **stage.about)
    checkpoints.save_state(state_path(stage.args), f"train-{stage.args.stage}", settings(stage), step=step,
                           memory=memory, skipped=int(watch.skipped), **states)


def show(stage, ema, step):
    """Writes a grid of samples: raw weights above, EMA below. All ranks must call it."""
    stage.trained.eval()
    pictures = []
    for models in (stage.trained, ema):
        models = unsharded(models, checkpoints.MODULES)
        try:
            pictures += [stage.picture(models)] if stage.world.rank == 0 else []
        except UserError as error:  # raw weights of the first steps may give values that are no picture
            print0(f"no picture at step {step}: {error}")
    stage.trained.train()
    if pictures:
        path = os.path.join(stage.args.run, "grids", f"stage{label(stage.args)}-{step:07d}.png")
        sample.save_picture(sample.grid(torch.cat(pictures), 8), path)


# ------------------------------------------------------------------------------------------------------------- loop

def loop(stage, ema, loss_of, optimizer, watch, first, replan):
    """All steps of a stage, from step `first` to the last. replan: as in `train`."""
    args, device = stage.args, stage.device
    data = batches(stage.data, stage.world, args.batch, stage.micro, first, args.steps)  # replan may lower args.steps
    done, logged, clock, notes, forecast_at = first, first, time.time(), {}, time.time() + FORECAST
    bar = tqdm(total=args.steps, initial=first, desc=f"stage {args.stage}", unit=" steps", mininterval=1,
               disable=stage.world.rank > 0)
    stage.trained.train()
    while done < args.steps:
        step, done = done, done + 1
        lr, warmup, decay = stage.pace()
        for group in optimizer.param_groups:
            group["lr"] = rate = lr * min(1.0, (step + 1) / (warmup + 1), (args.steps - step) / (decay + 1))
        total = torch.zeros((), device=device)
        for k in range(args.accumulate):
            rows, batch = next(data)
            # dropout has a seed for each step and pass, so that any number of ranks with equal passes draws the same
            torch.manual_seed(rng("cpu", "dropout", args.seed, step, rows.start).initial_seed())
            with passes(loss_of, last=k == args.accumulate - 1), autocast(device):
                loss = loss_of(step, rows, *batch) / args.accumulate
            with tf32():  # TF32 on: gradients bear it in all layers, also where diffloss.py turns it off
                loss.backward()
            total += loss.detach()
        norms = [nn.utils.clip_grad_norm_(model.parameters(), stage.recipe.clip) for model in stage.trained.values()]
        step_unless(watch.bad(total, norms), optimizer)  # a step that is not finite changes no weights
        optimizer.zero_grad(set_to_none=True)
        kept = min(stage.recipe.ema, (1 + step) / (10 + step))  # 0.9999 alone keeps 90% of the start at 1,000
        with torch.no_grad():  # without it the EMA would keep the graph of every step so far
            torch._foreach_lerp_(list(ema.parameters()), list(stage.trained.parameters()), 1 - kept)
        notes.update(stage.after(step, ema))
        due, stop = done % args.save_every == 0, watch.asked_to_stop()
        if done % args.log_every == 0 or due or stop or done == args.steps:  # here the host waits for the device
            loss, skipped, bad_in_row = watch.report()
            speed = (done - logged) * args.batch / (time.time() - clock)
            bar.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} images/s", refresh=False)
            log(os.path.join(args.run, "log.jsonl"), stage=label(args), step=done, loss=loss, lr=rate,
                grad_norm=float(watch.norm), skipped=skipped, images_per_s=round(speed, 1), **notes)
            logged, clock, notes = done, time.time(), {}
            if replan and done >= min(first + 3 * args.log_every, args.steps):  # not by the first speed, too low
                seconds = all_mean(torch.tensor(args.batch / speed, device=device))  # of a step, the same on every rank
                args.steps = bar.total = replan(float(seconds), done)
                replan = None
            if time.time() > forecast_at:
                print0(f"stage {args.stage}: about {(args.steps - done) * args.batch / speed / 3600:.2f} hours to go")
                forecast_at = math.inf
            due = due and not bad_in_row  # keep the save from before the trouble
        before, last = time.time(), done == args.steps  # replan may have changed it
        if due or stop or last:
            save(stage, ema, optimizer, watch, done)
        if stop:
            bar.close(), barrier()  # rank 0 has saved
            raise Stopped(stop, f"stopped after step {done:,}, which is saved; run it again, without --fresh")
        if args.grid_every and (done % args.grid_every == 0 or last):
            show(stage, ema, done)
        clock += time.time() - before  # saves and pictures do not count in images/s
        watch.signal or bar.update()  # after Ctrl-C its reader (tee) may be gone, and the save is yet to come
    bar.close(), watch.close(), barrier()


def train(args, world, replan=None):
    """One stage. replan(seconds of a step, steps done) -> steps in all; called once, when some steps were measured."""
    stage = build(args, world)
    if args.dry_run:
        return
    make_folder(args.run)
    *learner, first = resume(stage)
    if first == 0:
        print0(f"python tools/report.py {args.run} --watch    # this training as a page: {args.run}/report.html")
    loop(stage, *learner, first, replan)
    print0(f"{args.run}: {' and '.join(stage.trained)} after {max(first, args.steps):,} steps")


# ------------------------------------------------------------------------------------------------------- all stages

SHARES = (0.23, 0.42, 0.35)  # of the stages in --hours; about as in the training of weights/tiny


def fix_steps(path: str, plan: dict, stages: list, per_step: float, least: int) -> int:
    """stages: those left. Gives the first of them its share of the hours that are left, and writes the plan.

    per_step: seconds of a step, measured on this stage's first ones. least: steps done. -> its steps in all."""
    left, stage = 3600 * plan["hours"] - sum(s or 0 for s in plan["seconds"]), stages[0]
    fitting = int(left * SHARES[stage] / sum(SHARES[n] for n in stages) / per_step)
    plan["steps"][stage] = steps = min(plan["steps"][stage], max(least, fitting))
    plan["seconds"][stage] = steps * per_step
    write_json(path, plan)
    print0(f"stage {stage}: {steps:,} steps fit into the hours")
    return steps


def train_all(args, world):
    """--stage all: tokenizers, cache, prior, generator and a picture of every class. Run again, it continues."""
    inside, preset = lambda name: os.path.join(args.run, name), sized(PRESETS[args.preset], args.size)
    true_share(args.condition or preset.condition)  # refuses a wrong --condition now, and not hours later
    if args.fresh and not args.dry_run and world.rank == 0 and not is_restart() and os.path.isdir(args.run):
        there = [inside(name) for name in os.listdir(args.run) if not name.startswith("before-")]
        checkpoints.set_aside([path for path in there if not lies_in(args.data, path)])  # photographs stay
    barrier()
    args.fresh, plan = False, (None if args.fresh and args.dry_run else read_json(inside("plan.json")))
    if plan is None:  # of each stage its steps, and its seconds (fix_steps); begun: by this command
        images = len(find_images(args.data)[0])
        steps = [recipe.steps(images, args.batch or recipe.batch) for recipe in preset.recipes]
        plan = {"hours": args.hours, "batch": args.batch, "steps": steps, "seconds": [None] * 3, "begun": []}
    agree(plan, "the plan")
    refuse([(args.hours and args.hours != plan["hours"], f"{inside('plan.json')} is for other --hours; see --fresh"),
            (args.batch != plan.get("batch", args.batch), f"{inside('plan.json')} is for another --batch; see --fresh"),
            (plan["hours"] and "-" in (args.condition or ""), "the --hours of plan.json exclude --condition P-Q")])
    args.hours = plan["hours"]
    stages = [0, 1, 2] if FUSIONS[args.fusion or preset.generator.fusion].reads_codes else [0, 2]
    print0("steps: " + ", ".join(f"{plan['steps'][n]:,} of {' and '.join(KINDS[n])}" for n in stages)
           + (f"; fewer if {args.hours} hours are too short" if args.hours else ""))
    if args.dry_run:
        return
    for i, n in enumerate(stages):
        source = inside("cache") if n else args.data
        mine = argparse.Namespace(**{**vars(args), "stage": n, "steps": plan["steps"][n], "data": source})
        if i == 1:  # between tokenizers and the rest; makes only what is missing
            tokenise(args.data, args.run, source, world, args.size)
        missing = [kind for kind in KINDS[n] if not os.path.exists(inside(f"{kind}.pt"))]
        ours = n in plan["begun"] or os.path.exists(state_path(mine))
        if not ours and len(missing) < len(KINDS[n]):  # the user brought weights; one of two is a mistake
            refuse((kind, f"{args.run} has no {kind}.pt; train it first: --stage 0 --only {kind}") for kind in missing)
            print0(f"stage {n} is skipped: {args.run} has the {' and '.join(KINDS[n])} of another training")
            continue
        plan["begun"] = sorted({*plan["begun"], n})
        write_json(inside("plan.json"), plan)
        measure = args.hours and plan["seconds"][n] is None
        train(mine, world, partial(fix_steps, inside("plan.json"), plan, stages[i:]) if measure else None)
    if world.rank == 0 and not os.path.exists(inside("samples.png")):
        run = sample.load_run(args.run, world.device)
        each = max(1, min(8, 64 // len(run.classes)))  # pictures of a class; if several, they are a row
        parts = torch.arange(each * len(run.classes)).split(16)
        images = torch.cat([sample.generate(run, i // each, indices=i.tolist()).images for i in parts])
        sample.save_picture(sample.grid(images, each if each > 1 else math.isqrt(len(images))), inside("samples.png"))
    barrier()
    print0(f"{inside('samples.png')} shows every class. More: python sample.py --run {args.run} --class NAME")


def main():
    args = parse_args()
    (train_all if args.stage == "all" else train)(args, setup(args.device))


if __name__ == "__main__":
    run_script(main)
