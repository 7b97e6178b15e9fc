"""Training: one straight loop for the three stages.

    stage 0   tokenizers VQ and KL, on an image folder                      --only vq or kl for one of them
    stage 1   prior, on a cache (data.py)                                   D2C 4.1, Eq. 3
    stage 2   generator, on a cache; prior and tokenizers frozen            D2C 4.2, Eq. 2

    python train.py --stage all --preset tiny --data IMAGES --run runs/mine     # the three, and the cache between them
    python train.py --stage 1 --preset tiny --data data/tiny --run runs/tiny    # one of them
    torchrun --nproc_per_node=8 train.py --stage 2      # defaults: --preset d2c-b --data data/cache --run runs/d2c-b

With --run write `torchrun --nproc_per_node=8 -- train.py ...`: without the two dashes torchrun takes our flag for its
own --run-path. The same command again resumes. A run directory gets {vq,kl,prior,generator}.pt (EMA weights), states
train-N.pt and train-N.previous.pt, log.jsonl (steps repeated after a stop stand in it twice), and samples in grids/.

Global batch = images per rank and pass x ranks x --accumulate. All random numbers of step k follow from (seed, k) and
are drawn for the whole global batch, of which each rank takes its rows. So a run is the same on 1 and on 8 GPUs (its
dropout only if the passes hold equally many images). SIGTERM and Ctrl-C end a run after the step, saved.
"""
import argparse
import math
import os
import signal
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
from data import Cache, Folder, batches, find_images, tokenise
from diffloss import HeadNet, tf32
from faults import Stopped, Watch, is_restart, run_script, step_unless
from fusion import FUSIONS, Attention
from presets import PRESETS, fix_steps, new_plan, true_share
from runtime import (UserError, agree, all_mean, autocast, barrier, broadcast, divide, log, make_folder, passes, print0,
                     read_json, read_log, refuse, rng, setup, shard_moments, spread, unsharded, whole, write_json)
from tokenizers import KL, VQ, Decoder, Encoder, latent_scale


# ----------------------------------------------------------------------------------------------------------- stages

class Stage(nn.Module):
    """What the loop needs to know of a stage. Each stage sets `data` and `trained` and defines `forward`.

    data      the images: len(data), data.identity, and data.batch(sample numbers) -> tensors
    trained   ModuleDict of the models that learn, by kind: what DDP, the optimizer, the EMA and the files see
    frozen    the models that do not learn: a plain dict, so that none of these see them
    about     what the weight files say besides config and weights
    """

    def __init__(self, args, preset, world):
        super().__init__()
        self.args, self.preset, self.world, self.device = args, preset, world, world.device
        self.recipe, self.frozen, self.about = preset.recipes[args.stage], {}, {"preset": args.preset}

    def forward(self, step, rows, *batch):
        """The loss of these rows (a slice) of this step's global batch. batch: their tensors from `data`."""

    def decays(self, name, parameter):  # does weight decay apply to this parameter?
        return parameter.ndim >= 2

    def start(self):
        """Once, before the first step of a new run."""

    def after(self, step, ema) -> dict:  # after each optimizer step; -> what to log
        return {}

    def memory(self) -> dict:  # further tensors that resuming needs; they differ by rank, and their mean is saved
        return {}

    def before_save(self, models):
        """Completes the EMA models before their files are written."""

    def picture(self, models):
        """-> images for a grid, uint8 [B, 3, H, W], or None."""

    def rng(self, step):
        return rng(self.device, f"stage {self.args.stage}", self.args.seed, step)

    def file(self, kind):
        return os.path.join(self.args.run, f"{kind}.pt")

    def read_cache(self):
        """For stages 1 and 2: opens the cache and loads the tokenizers that made it."""
        self.data = Cache(self.args.data, self.args.seed, self.recipe.balanced)
        self.classes, self.grid, self.codes = self.data.classes, self.data.header["grid"], self.data.header["codebook"]
        for kind in ("vq", "kl"):
            self.frozen[kind] = checkpoints.load_model(self.file(kind), kind, self.device)
            self.data.check_tokenizer(kind, self.frozen[kind], self.file(kind))
        self.about |= {"classes": self.classes, "tokenizers": {k: self.data.header[k] for k in ("vq", "kl")}}
        self.shown = torch.arange(16, device=self.device) % len(self.classes)  # the classes of a grid of samples


class Tokenizers(Stage):
    """Stage 0: both tokenizers in one loop. They share the images and nothing else."""

    def __init__(self, args, preset, world):
        super().__init__(args, preset, world)
        self.data = Folder(args.data, preset.image_size, args.seed)
        models = (("vq", VQ, preset.vq), ("kl", KL, preset.kl))
        self.trained = nn.ModuleDict({k: make(c) for k, make, c in models if args.only in (None, k)})
        self.about["image_size"] = preset.image_size

    def start(self):
        """Fits the linear paths in double precision: LAPACK's last bits vary, and are then rounded away."""
        for model in self.trained.values():
            if model.config.linear_path:
                images, = self.data.batch(range(min(2000, len(self.data))))
                model.double().fit_linear_path(images.double(), rng("cpu", "linear path", self.args.seed))
                model.float()

    def forward(self, step, rows, images):
        loss = self.trained["vq"].loss(images)[0] if "vq" in self.trained else 0.0
        if "kl" in self.trained:
            kl = self.trained["kl"]
            draws = kl.draw(self.args.batch, images.shape[-1] // kl.stride, self.rng(step))
            loss = loss + kl.loss(images, [x[rows] for x in draws])[0]
        return loss

    def after(self, step, ema):
        """Every 100 steps, codes that nothing chose move onto encoded patches; until half-way, so that they settle."""
        if "vq" not in self.trained or (step + 1) % 100 or step > self.args.steps / 2:
            return {}
        vq = self.trained["vq"]
        vq.usage = all_mean(vq.usage)
        images, = self.data.batch(range(step * self.args.batch, step * self.args.batch + 16))  # the same on every rank
        moved = vq.restart_dead_codes(images.to(self.device), rng("cpu", "restart", self.args.seed, step))
        broadcast(vq.codebook.weight.data)  # encoders of two ranks may differ in the last bit
        ema["vq"].codebook.weight[moved] = vq.codebook.weight[moved].detach()  # not the mean of two places
        return {"dead_codes": len(moved)}

    def memory(self):  # how often each code was chosen since the last restart
        return {"usage": self.trained["vq"].usage} if "vq" in self.trained else {}

    def before_save(self, models):
        """Measures the scale of KL's latents."""
        if "kl" in models:
            images, = self.data.batch(range(min(1000, len(self.data))))
            models["kl"].set_scale(latent_scale(models["kl"].encode(x.to(self.device)) for x in images.split(50)))

    def picture(self, models):
        """Rows: images, decoded codes, decoded latents."""
        images = self.data.batch(range(8))[0].to(self.device)
        rows = [images] + ([models["vq"].decode(models["vq"].encode(images))] if "vq" in models else [])
        if "kl" in models:
            kl = models["kl"]  # decode() would need the scale, which is not measured yet
            rows.append(kl.to_images(kl.posterior(kl.encode(images))[0]))
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
        return model.loss(codes, classes, model.draw(self.args.batch, self.rng(step))[rows])

    def picture(self, models):
        s, generators = self.preset.sampling, [rng(self.device, "grid", i) for i in range(16)]
        codes = fast.generate_codes(models["prior"], self.shown, s.prior_cfg, s.prior_temperature, top_k=s.top_k,
                                    top_p=s.top_p, generator=generators)
        return sample.to_uint8(self.frozen["vq"].decode(codes))


class GeneratorStage(Stage):
    """Stage 2: the diffusion loss of hidden latents, given class and codes."""

    def __init__(self, args, preset, world):
        super().__init__(args, preset, world)
        self.read_cache()
        fusion, condition = args.fusion or preset.generator.fusion, args.condition or preset.condition
        self.true_share, kl, path = true_share(condition), self.frozen["kl"], self.file("prior")
        if FUSIONS[fusion].reads_codes and os.path.exists(path):
            model = self.frozen["prior"] = checkpoints.load_model(path, "prior", self.device)
            names = self.classes if "classes" in model.about else len(self.classes)  # official files have no names
            wanted = {"classes": names, "vq": self.data.header["vq"], "grid": self.grid, "vocab": self.codes}
            checkpoints.refuse_other(path, model, wanted)
        elif FUSIONS[fusion].reads_codes:
            refuse([(min(self.true_share) < 1,
                     f"{args.run} has no prior.pt yet; run stage 1 first, or use --condition ground_truth")])
            print0(f"note: {path} is not there; the codes get a random table, and no samples are shown")
        code_dim = (self.frozen["prior"].config if "prior" in self.frozen else preset.prior).dim
        config = replace(preset.generator, fusion=fusion, grid=self.grid // kl.config.merge, code_grid=self.grid,
                         classes=len(self.classes), vocab=self.codes, code_dim=code_dim, token_dim=kl.config.token_dim)
        try:
            model = generator.Generator(config)
        except ValueError as error:
            raise UserError(f"--fusion {fusion} does not fit this preset: {error}.") from None
        if "prior" in self.frozen:  # D2C embeds the codes by the prior's table; without a prior the table stays random
            model.fusion.copy_table(self.frozen["prior"].code_embedding.weight)
        self.trained = nn.ModuleDict({"generator": model})
        self.sampling = replace(preset.sampling, iterations=min(preset.sampling.iterations, config.grid**2))
        if kl.config.scale is None:  # a file that does not know its scale: take the one that data.py measured
            kl.set_scale(self.data.scale)
        self.about.update(sampling=asdict(self.sampling), condition=condition, latent_scale=kl.config.scale)

    def decays(self, name, parameter):
        return parameter.ndim >= 2 and ".head." not in name  # MAR decays nothing in the head

    def forward(self, step, rows, codes, moments, classes):
        model, (first, last) = self.trained["generator"], self.true_share
        ratio = float(torch.rand((), generator=rng("cpu", "ratio", self.args.seed, step)))
        draws = model.draw(self.args.batch, self.rng(step), ratio).rows(rows)
        latents = self.frozen["kl"].sample(moments, draws.posterior)  # drawn anew at every step
        share = first + (last - first) * step / self.args.steps
        if "prior" in self.frozen and share < 1:
            codes = self.frozen["prior"].mixture(codes, classes, share, draws.codes)
        return fast.loss(model, latents, classes, codes, draws)

    def picture(self, models):
        if models["generator"].fusion.reads_codes and "prior" not in self.frozen:
            return None  # no prior that could draw codes
        run = sample.Run(self.frozen["kl"], models["generator"], self.frozen["vq"], self.frozen.get("prior"),
                         self.classes, self.sampling, self.device)
        return sample.generate(run, self.shown).images


STAGES = {0: Tokenizers, 1: PriorStage, 2: GeneratorStage}
BLOCKS = (generator.Block, prior.Block)                                # --recompute forgets their activations
MINUTE = 60.0                                                          # when a stage says how long it will take
COMPILED = (Encoder, Decoder, *BLOCKS, HeadNet)                        # --compile compiles these


# ------------------------------------------------------------------------------------------------------------ flags

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage", choices=("0", "1", "2", "all"), required=True)
    add("--preset", choices=PRESETS, default="d2c-b")
    add("--data", help="image folder (stages 0 and all) or cache (stages 1, 2; default: data/cache)")
    add("--run", help="run directory (default: runs/PRESET)")
    add("--only", choices=("vq", "kl"), help="stage 0: train one tokenizer")
    add("--fusion", choices=FUSIONS, help="stage 2 (default: the preset's)")
    add("--condition", help="stage 2, where the codes come from (default: the preset's): ground_truth; resampled, each "
        "code drawn by the prior given the true codes before it; mixed:0.7, each code true with this probability, else "
        "resampled; mixed:1-0.3, a probability that moves over the training")
    add("--steps", type=int, help="optimizer steps in all (default: the preset's epochs)")
    add("--hours", type=float, help="stage all: shorten the stages to about this time in all, without the cache")
    add("--batch", type=int, help="global batch (default: the preset's)")
    add("--lr", type=float, help="learning rate at batch 256 (default: the preset's)")
    add("--accumulate", type=int, help="passes per optimizer step (default: as few as the preset's limit of images per "
        "pass allows)")
    add("--seed", type=int, default=0)
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    add("--compile", action="store_true", help="torch.compile the blocks of the models")
    add("--recompute", action="store_true", help="keep no activations of the Transformer blocks but compute them again "
        "in the backward pass (gradient checkpointing): less memory, more time")
    add("--log-every", type=int, default=20, help="steps")
    add("--save-every", type=int, default=500, help="steps")
    add("--grid-every", type=int, default=1000, help="steps; 0 for no pictures")
    add("--shard", action="store_true", help="stages 1 and 2: divide weights, EMA and optimizer among the ranks "
        "(FSDP2), for models that fit on one GPU but whose training does not")
    add("--fresh", action="store_true", help="start over; what the stage has made (all: RUN) is moved to RUN/before-N")
    add("--dry-run", action="store_true", help="say what would be trained, and stop")
    args = parser.parse_args()
    args.stage, args.until = args.stage if args.stage == "all" else int(args.stage), None
    counts, one = [args.batch, args.accumulate, args.log_every, args.save_every, args.steps], args.stage != "all"
    refuse([(args.data is None and args.stage in (0, "all"), f"stage {args.stage} needs an image folder: --data DIR"),
            (not 0 <= args.seed < 2**63, "--seed must be at least 0, and below 2**63"),
            (args.only and args.stage != 0, "--only vq or kl is for stage 0"),
            ((args.fusion or args.condition) and args.stage in (0, 1), "--fusion and --condition are for stage 2"),
            (args.shard and (args.stage in (0, "all") or "LOCAL_RANK" not in os.environ),
             "--shard is for stages 1 and 2 under torchrun"),
            ((args.steps or args.lr) and not one, "--steps and --lr are for a single stage; see --hours"),
            (args.hours is not None and (one or not 0 < args.hours < math.inf), "--hours H, above 0, is for stage all"),
            (args.hours and "-" in (args.condition or ""), "--hours cannot be combined with a --condition that moves"),
            (any(n is not None and n < 1 for n in counts),
             "--batch, --accumulate, --steps, --log-every and --save-every must be at least 1"),
            (args.grid_every < 0, "--grid-every must be at least 0"),
            (args.lr is not None and not 0 < args.lr < math.inf, "--lr must be above 0")])
    args.run, args.data = args.run or os.path.join("runs", args.preset), args.data or os.path.join("data", "cache")
    return args


# ------------------------------------------------------------------------------------------------ build, resume, save

def build(args, world) -> Stage:
    """Makes the stage with random weights, fills in the settings that no flag gives, and prints them."""
    if args.condition == "teacher_forced":
        print0("note: --condition teacher_forced is now called resampled")
        args.condition = "resampled"
    recipe = PRESETS[args.preset].recipes[args.stage]
    args.batch = args.batch or recipe.batch
    micro, args.accumulate = divide(args.batch, world, args.accumulate, recipe.micro)
    agree({k: v for k, v in vars(args).items() if k not in ("data", "run")}, "their flags")  # paths may differ by node
    if not args.dry_run:
        make_folder(args.run)
    torch.manual_seed(args.seed)
    stage = STAGES[args.stage](args, PRESETS[args.preset], world)
    epochs = recipe.steps(len(stage.data), args.batch)
    args.steps = args.steps or epochs
    stage.lr, stage.decay, stage.micro = (args.lr or recipe.lr) * args.batch / 256, recipe.decay * args.steps, micro
    stage.warmup = recipe.warmup * len(stage.data) / args.batch * (args.steps / epochs if args.hours else 1.0)  # steps
    print0(f"stage {args.stage}: {'+'.join(stage.trained)}, {sum(p.numel() for p in stage.trained.parameters()):,} "
           f"parameters, {len(stage.data):,} images, {args.steps:,} steps of {args.batch} = {micro} images x "
           f"{world.size} ranks x {args.accumulate} passes, learning rate {stage.lr:.2e} after {stage.warmup:.0f} "
           f"steps, on {world.device}")
    return stage


def state_path(args):
    return os.path.join(args.run, f"train-{args.stage}{'-' + args.only if args.only else ''}.pt")


def settings(stage) -> dict:
    """What a resumed run must have in common with its first part."""
    args, configs = stage.args, {kind: asdict(model.config) for kind, model in stage.trained.items()}
    configs.get("kl", {}).pop("scale", None)  # it is measured along the way
    condition = stage.about.get("condition", "")
    moves = ("-" in condition or stage.decay > 0) and not args.hours  # then true share or rate depend on the steps
    return {**configs, "condition": condition, "steps": args.steps if moves else None, "batch": args.batch,
            "seed": args.seed, "data": stage.data.identity}


def resume(stage):
    """-> the EMA, what the loop calls for the loss, optimizer, watch and first step: from the state, or new."""
    args, world = stage.args, stage.world
    fresh = args.fresh and world.rank == 0 and not is_restart()
    state = checkpoints.find_state(state_path(args), f"train-{args.stage}", settings(stage),
                                   [stage.file(kind) for kind in stage.trained], fresh)
    if state is None:
        stage.start()
    stage.to(world.device)
    if state is not None:
        stage.trained.load_state_dict(state["raw"])
        for name, tensor in stage.memory().items():
            tensor.copy_(state["memory"][name])
    for tensor in stage.trained.state_dict().values():
        broadcast(tensor)  # so that EMA and weights start out the same on every rank
    ema = deepcopy(stage.trained).eval().requires_grad_(False)
    if state is not None:
        ema.load_state_dict(state["ema"])
    for module in stage.trained.modules():  # in place: parameters keep their names, and the EMA stays as it is
        if args.compile and isinstance(module, COMPILED):
            module.compile()
        if args.recompute and isinstance(module, BLOCKS):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    loss_of = spread(stage, ema, world, args.shard, (*BLOCKS, Attention))  # `stage` itself stays unwrapped
    groups = [{"params": [], "weight_decay": decay} for decay in (stage.recipe.weight_decay, 0.0)]
    for name, p in stage.trained.named_parameters():
        groups[0 if stage.decays(name, p) else 1]["params"].append(p)
    fused = world.device.type != "mps"
    optimizer = torch.optim.AdamW(groups, lr=stage.lr, betas=(0.9, 0.95), fused=fused)
    if state is None:
        return ema, loss_of, optimizer, Watch(world), 0
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = fused  # the file may come from another kind of device
    optimizer.load_state_dict(state["optimizer"])
    shard_moments(optimizer)
    return ema, loss_of, optimizer, Watch(world, state["skipped"]), state["step"]


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
                           memory=memory, skipped=watch.reported, **states)


def show(stage, ema, step):
    """Writes a grid of samples: raw weights above, EMA below. All ranks must call it."""
    stage.trained.eval()
    pictures = []
    for models in (stage.trained, ema):
        models = unsharded(models, checkpoints.MODULES) if stage.args.shard else models
        try:
            pictures += [stage.picture(models)] if stage.world.rank == 0 else []
        except UserError as error:  # raw weights of the first steps may give values that are no picture
            print0(f"no picture at step {step}: {error}")
    stage.trained.train()
    if pictures := [p for p in pictures if p is not None]:
        path = os.path.join(stage.args.run, "grids", f"stage{stage.args.stage}-{step:07d}.png")
        sample.save_picture(sample.grid(torch.cat(pictures), 8), path)


# ------------------------------------------------------------------------------------------------------------- loop

def loop(stage, ema, loss_of, optimizer, watch, first):
    """All steps of a stage, from step `first` to the last."""
    args, device, rank = stage.args, stage.device, stage.world.rank
    last = args.until or args.steps
    data = batches(stage.data, stage.world, args.batch, stage.micro, first, last)
    seen, clock, notes, told = 0, time.time(), {}, time.time() + MINUTE
    bar = tqdm(total=last, initial=first, disable=rank > 0, desc=f"stage {args.stage}", unit=" steps", mininterval=1)
    stage.trained.train()
    for step in range(first, last):
        rate = stage.lr * min(1.0, (step + 1) / (stage.warmup + 1), (args.steps - step) / (stage.decay + 1))
        for group in optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=device)
        for k in range(args.accumulate):
            rows, batch = next(data)
            # dropout has a seed for each step and pass, so that any number of ranks with equal passes draws the same
            torch.manual_seed(rng("cpu", "dropout", args.seed, step, rows.start).initial_seed())
            with passes(loss_of, last=k == args.accumulate - 1), autocast(device):
                loss = loss_of(step, rows, *batch) / args.accumulate
            with tf32():  # gradients of the head's first and last layer too; their values are not amplified
                loss.backward()
            total += loss.detach()
        norms = [nn.utils.clip_grad_norm_(model.parameters(), stage.recipe.clip) for model in stage.trained.values()]
        step_unless(watch.bad(total, norms), optimizer)  # a step that is not finite changes no weights
        optimizer.zero_grad(set_to_none=True)
        decay = min(stage.recipe.ema, (1 + step) / (10 + step))  # 0.9999 alone: 90% random start after 1,000 steps
        with torch.no_grad():  # without it the EMA would keep the graph of every step so far
            torch._foreach_lerp_(list(ema.parameters()), list(stage.trained.parameters()), 1 - decay)
        notes.update(stage.after(step, ema))
        seen, done, stop = seen + 1, step + 1, watch.asked_to_stop()
        save_now = done % args.save_every == 0 or done == last or stop
        if done % args.log_every == 0 or save_now:  # only here, in saves and in pictures the host waits for the device
            loss, skipped, bad_in_row = watch.report()
            speed = seen * args.batch / (time.time() - clock)
            bar.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} images/s", refresh=False)
            if rank == 0:
                log(os.path.join(args.run, "log.jsonl"), stage=args.stage, step=done, loss=loss, lr=rate,
                    grad_norm=float(watch.norm), skipped=skipped, images_per_s=round(speed, 1), **notes)
            seen, clock, notes = 0, time.time(), {}
            if time.time() > told:
                print0(f"stage {args.stage}: about {(args.steps - done) * args.batch / speed / 3600:.2f} hours to go")
                told = math.inf
            save_now = save_now and (not bad_in_row or done == last or stop)  # first see whether it recovers
        before = time.time()
        if save_now:
            save(stage, ema, optimizer, watch, done)
        if stop:
            bar.close(), barrier()  # rank 0 has saved
            raise Stopped(stop, f"{signal.Signals(stop).name}: stopped after step {done:,}, which is saved; the same "
                          "command goes on from there")
        if args.grid_every and (done % args.grid_every == 0 or done == args.steps):
            show(stage, ema, done)
        clock += time.time() - before  # saves and pictures do not count in images/s
        bar.update()
    bar.close(), watch.close(), barrier()


def train(args, world):
    """One stage."""
    stage = build(args, world)
    if args.dry_run:
        return
    *learner, first = resume(stage)
    loop(stage, *learner, first)
    print0(f"{args.run}: {' and '.join(stage.trained)} after {max(first, args.until or args.steps):,} steps")


# ------------------------------------------------------------------------------------------------------- all stages

KINDS = (("vq", "kl"), ("prior",), ("generator",))  # what the stages train


def train_all(args, world):
    """--stage all: tokenizers, cache, prior, generator and a picture of every class. Run again, it continues."""
    inside = lambda name: os.path.join(args.run, name)
    if args.fresh and not args.dry_run and world.rank == 0 and os.path.isdir(args.run) and not is_restart():
        checkpoints.set_aside([inside(name) for name in os.listdir(args.run) if not name.startswith("before-")])
    barrier()
    args.fresh, recipes = False, PRESETS[args.preset].recipes
    plan = read_json(inside("plan.json")) or new_plan(recipes, len(find_images(args.data)[0]), args.batch, args.hours)
    agree(plan, "the plan")
    refuse([(args.hours and args.hours != plan["hours"], f"{inside('plan.json')} is for other --hours; see --fresh")])
    args.hours = plan["hours"]
    print0("steps: " + ", ".join(f"{n:,} of {' and '.join(kinds)}" for n, kinds in zip(plan["steps"], KINDS))
           + f"; fewer if {args.hours} hours are too short" * bool(args.hours))
    if args.dry_run:
        return
    for n, kinds in enumerate(KINDS):
        mine = argparse.Namespace(**{**vars(args), "stage": n, "steps": plan["steps"][n]})
        mine.data = inside("cache") if n else args.data
        if n == 1:
            tokenise(args.data, args.run, mine.data, world)
        missing = [f"{kind}.pt" for kind in kinds if not os.path.exists(inside(f"{kind}.pt"))]
        if len(missing) < len(kinds) and n not in plan["begun"] and not os.path.exists(state_path(mine)):
            refuse([(missing, f"{args.run} has no {''.join(missing)}; train it first, with --stage 0 --only")])
            print0(f"stage {n} is skipped: {args.run} has the {' and '.join(kinds)} of another training")
            continue
        plan["begun"] = sorted({*plan["begun"], n})
        write_json(inside("plan.json"), plan)
        if args.hours and plan["seconds"][n] is None:  # train the first steps and measure them
            mine.until = min(3 * args.log_every, mine.steps)
            train(mine, world)
            fix_steps(plan, n, mine.batch / read_log(inside("log.jsonl"), stage=n)[-1]["images_per_s"], mine.until)
            write_json(inside("plan.json"), plan)  # a later start then ends where this one would
            mine.steps, mine.until = plan["steps"][n], None
        train(mine, world)
    if world.rank == 0 and not os.path.exists(inside("samples.png")):
        run = sample.load_run(args.run, world.device)
        each = max(1, min(8, 64 // len(run.classes)))  # pictures of a class; if several, they are a row
        parts = torch.arange(each * len(run.classes)).split(16)
        images = torch.cat([sample.generate(run, i // each, indices=i.tolist()).images for i in parts])
        sample.save_picture(sample.grid(images, each if each > 1 else math.isqrt(len(images))), inside("samples.png"))
    barrier()
    print0(f"{inside('samples.png')} shows every class. More: python sample.py --run {args.run} --class all")


def main():
    args = parse_args()
    (train_all if args.stage == "all" else train)(args, setup(args.device))


if __name__ == "__main__":
    run_script(main)
