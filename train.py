"""Training: one straight loop for the three stages.

    stage 0   tokenizers VQ and KL, on an image folder                      --only vq or kl for one of them
    stage 1   prior, on a cache (data.py)                                   D2C 4.1, Eq. 3
    stage 2   generator, on a cache; prior and tokenizers frozen            D2C 4.2, Eq. 2

    python train.py --stage 0 --preset tiny --data DIR --run runs/tiny
    python data.py --images DIR --run runs/tiny --out data/tiny
    python train.py --stage 1 --preset tiny --data data/tiny --run runs/tiny
    python train.py --stage 2 --preset tiny --data data/tiny --run runs/tiny
    torchrun --nproc_per_node=8 train.py --stage 2      # defaults: --preset d2c-b --data data/cache --run runs/d2c-b

With --run write `torchrun --nproc_per_node=8 -- train.py ...`: without the two dashes torchrun takes our flag for its
own --run-path. The same command again resumes. A run directory gets {vq,kl,prior,generator}.pt (EMA weights),
train-N.pt (what resuming needs; the one before it is train-N.previous.pt), log.jsonl, where a step that was repeated
after a stop stands twice, and every --grid-every steps a picture of samples in grids/.

Global batch = images per rank and pass x ranks x --accumulate. Every random number of step k follows from (seed, k)
for the whole global batch, of which each rank takes its rows: a run is the same on 1 and on 8 GPUs (dropout only if
the passes hold equally many images), and resumes without any generator's state. SIGTERM and Ctrl-C end it after the
step, saved.
"""
import argparse
import math
import os
import re
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
from data import Cache, Folder, ahead
from diffloss import HeadNet, tf32
from fusion import FUSIONS, Attention
from presets import PRESETS
from runtime import (Stopped, UserError, Watch, agree, all_mean, autocast, barrier, broadcast, is_restart, log, passes,
                     print0, rng, run_script, setup, shard_moments, spread, step_unless, sweep, whole)
from tokenizers import KL, VQ, Decoder, Encoder, latent_scale


# ----------------------------------------------------------------------------------------------------------- stages
# A stage is a module that builds its data and models and knows their loss:
#   data                         len() images and batch(sample numbers) -> tensors
#   trained                      the models that learn, by kind: what DDP, the optimizer, the EMA and the files see
#   about                        what their files say besides config and weights
#   condition, true_share        stage 2: which codes it trains on
#   decays(name, parameter)      does weight decay apply
#   start()                      once, before the first step of a new run
#   forward(step, rows, *batch)  loss of the rows (a slice) of this step's global batch
#   after(step, total, ema)      after each optimizer step; returns what to log
#   memory(), remember(memory)   what else resuming needs; memory() is called on all ranks
#   before_save(models)          before the EMA weights are written
#   picture(models)              images for a grid, or None

class Tokenizers(nn.Module):
    """Stage 0: both tokenizers in one loop; they share the images and nothing else."""

    def __init__(self, args, preset, world):
        super().__init__()
        self.args, self.device = args, world.device
        self.data = Folder(args.data, preset.image_size, args.seed)
        kinds = {"vq": lambda: VQ(preset.vq), "kl": lambda: KL(preset.kl)}
        self.trained = nn.ModuleDict({k: make() for k, make in kinds.items() if args.only in (None, k)})
        self.about = {"image_size": preset.image_size}
        self.decays = lambda name, p: p.ndim >= 2

    def start(self):
        """Fits the linear paths on real patches, in a new run."""
        for model in self.trained.values():
            if model.config.linear_path:
                images, = self.data.batch(range(min(2000, len(self.data))))
                # In double precision: LAPACK's last bits vary from process to process, and are then rounded away.
                model.double().fit_linear_path(images.double(), rng("cpu", "linear path", self.args.seed))
                model.float()

    def forward(self, step, rows, images):
        loss = 0.0
        if "vq" in self.trained:
            loss = loss + self.trained["vq"].loss(images)[0]
        if "kl" in self.trained:
            kl = self.trained["kl"]
            h = images.shape[-1] // kl.stride
            g = rng(self.device, "stage 0", self.args.seed, step)
            loss = loss + kl.loss(images, kl.draw(self.args.batch, h, g).rows(rows))[0]
        return loss

    def after(self, step, total, ema):
        """Every 100 steps, codes that nothing chose move onto encoded patches; until half-way, so that they settle."""
        if "vq" not in self.trained or (step + 1) % 100 or step > total / 2:
            return {}
        vq = self.trained["vq"]
        vq.usage = all_mean(vq.usage)
        images, = self.data.batch(range(step * self.args.batch, step * self.args.batch + 16))  # the same on every rank
        moved = vq.restart_dead_codes(images.to(self.device), rng("cpu", "restart", self.args.seed, step))
        broadcast(vq.codebook.weight.data)  # encoders of two ranks may differ in the last bit
        ema["vq"].codebook.weight[moved] = vq.codebook.weight[moved].detach()  # no average of two places
        return {"dead_codes": len(moved)}

    def memory(self):
        """Which codes were chosen since the last restart, on any rank."""
        return {"usage": all_mean(self.trained["vq"].usage)} if "vq" in self.trained else {}

    def remember(self, memory):
        if "usage" in memory:
            self.trained["vq"].usage.copy_(memory["usage"])

    def before_save(self, models):
        """Measures the scale of KL's latents, 1 / std."""
        if "kl" in models:
            kl, images = models["kl"], self.data.batch(range(min(1000, len(self.data))))[0]
            kl.set_scale(latent_scale(kl.encode(x.to(self.device)) for x in images.split(50)))

    def picture(self, models):
        """Rows: images, decoded codes, decoded latents."""
        images = self.data.batch(range(8))[0].to(self.device)
        rows = [images] + ([models["vq"].decode(models["vq"].encode(images))] if "vq" in models else [])
        if "kl" in models:
            kl = models["kl"]  # whose scale may not be measured yet
            rows.append(kl.to_images(kl.posterior(kl.encode(images))[0]))
        return sample.to_uint8(torch.cat(rows))


class OnCache(nn.Module):
    """What stages 1 and 2 share: the cache, and the tokenizers that made it."""

    def __init__(self, args, preset, world):
        super().__init__()
        self.args, self.device = args, world.device
        self.data = Cache(args.data, args.seed)
        self.class_names, self.grid = self.data.classes, self.data.header["grid"]
        self.sampling = replace(preset.sampling, iterations=min(preset.sampling.iterations, self.grid**2))
        self.frozen = {}  # a plain dict: these models stay in eval mode, out of DDP, the optimizer and the files
        for kind in ("vq", "kl"):
            self.load_frozen(kind)
            self.data.check_tokenizer(kind, self.frozen[kind], os.path.join(args.run, f"{kind}.pt"))
        self.about = {"classes": self.class_names, "tokenizers": {k: self.data.header[k] for k in ("vq", "kl")}}

    def load_frozen(self, kind):
        self.frozen[kind] = checkpoints.load_model(os.path.join(self.args.run, f"{kind}.pt"), kind, self.device)

    def start(self):
        pass

    def after(self, step, total, ema):
        return {}

    def memory(self):
        return {}

    def remember(self, memory):
        pass

    def before_save(self, models):
        pass

    def shown(self):
        """Sixteen classes for a grid of samples."""
        return torch.arange(16, device=self.device) % len(self.class_names)


class PriorStage(OnCache):
    """Stage 1: cross-entropy of the codes."""

    def __init__(self, args, preset, world):
        super().__init__(args, preset, world)
        c = replace(preset.prior, vocab=self.data.header["codebook"], grid=self.grid, classes=len(self.class_names))
        self.trained = nn.ModuleDict({"prior": prior.Prior(c)})
        self.decays = lambda name, p: p.ndim >= 2

    def forward(self, step, rows, codes, moments, classes):
        model = self.trained["prior"]
        null = model.draw(self.args.batch, rng(self.device, "stage 1", self.args.seed, step))
        return model.loss(codes, classes, null[rows])

    def picture(self, models):
        s, generators = self.sampling, [rng(self.device, "grid", i) for i in range(16)]
        codes = models["prior"].generate(self.shown(), s.prior_cfg, s.prior_temperature, top_k=s.top_k, top_p=s.top_p,
                                         generator=generators)
        return sample.to_uint8(self.frozen["vq"].decode(codes))


class GeneratorStage(OnCache):
    """Stage 2: the diffusion loss of hidden latents, given class and codes."""

    def __init__(self, args, preset, world):
        super().__init__(args, preset, world)
        vq, kl = self.frozen["vq"], self.frozen["kl"]
        self.condition = args.condition or preset.condition
        config = preset.generator if args.fusion is None else replace(preset.generator, fusion=args.fusion)
        self.true_share = true_share(self.condition)
        has_prior = os.path.exists(os.path.join(args.run, "prior.pt"))
        reads_codes = FUSIONS[config.fusion].reads_codes
        if reads_codes and not has_prior and min(self.true_share) < 1:
            raise UserError(f"{args.run} has no prior.pt yet; run stage 1 first, or use --condition ground_truth.")
        if reads_codes and has_prior:
            self.load_frozen("prior")
            p, wanted = self.frozen["prior"].config, (self.grid, vq.config.codebook_size, len(self.class_names))
            if (p.grid, p.vocab, p.classes) != wanted:
                raise UserError(f"{args.run}/prior.pt has grid, codes and classes {(p.grid, p.vocab, p.classes)}, the "
                                f"cache {wanted}; train a prior on this cache (stage 1).")
            for what, mine in self.about.items():  # classes, tokenizers; official files do not say
                if self.frozen["prior"].about.get(what, mine) != mine:
                    raise UserError(f"{args.run}/prior.pt was trained with other {what} than the cache has; train a "
                                    "prior on this cache (stage 1, --fresh).")
        elif reads_codes:
            print0(f"note: {args.run} has no prior.pt; the codes get a random table, and no samples are shown")
        code_dim = self.frozen["prior"].config.dim if "prior" in self.frozen else preset.prior.dim
        config = replace(config, grid=self.grid // kl.config.merge, code_grid=self.grid, classes=len(self.class_names), vocab=vq.config.codebook_size,
                         code_dim=code_dim, token_dim=kl.config.token_dim)
        model = generator.Generator(config)
        if "prior" in self.frozen:  # D2C embeds the codes by the prior's table; without one it stays random
            model.fusion.copy_table(self.frozen["prior"].code_embedding.weight)
        self.trained = nn.ModuleDict({"generator": model})
        self.decays = lambda name, p: p.ndim >= 2 and ".head." not in name  # MAR decays nothing in the head
        if kl.config.scale is None:  # a file that does not know its scale: take what data.py measured
            kl.set_scale(self.data.scale)
        if abs(self.data.scale / kl.config.scale - 1) > 0.05:
            print0(f"note: the cache's latent scale is {self.data.scale:.4f}; training with kl.pt's {kl.config.scale:.4f}")
        self.about.update(sampling=asdict(self.sampling), condition=self.condition, latent_scale=kl.config.scale)

    def forward(self, step, rows, codes, moments, classes):
        model = self.trained["generator"]
        u = float(torch.rand((), generator=rng("cpu", "ratio", self.args.seed, step)))
        draws = model.draw(self.args.batch, rng(self.device, "stage 2", self.args.seed, step), u).rows(rows)
        latents = self.frozen["kl"].sample(moments, draws.posterior)
        first, last = self.true_share
        share = first + (last - first) * step / self.args.steps
        if model.fusion.reads_codes and share < 1:
            codes = self.frozen["prior"].mixture(codes, classes, share, draws.codes)
        return fast.loss(model, latents, classes, codes, draws)

    def picture(self, models):
        run = sample.Run(self.frozen["kl"], models["generator"], self.frozen["vq"], self.frozen.get("prior"),
                         self.class_names, self.sampling, self.device)
        if models["generator"].fusion.reads_codes and run.prior is None:
            return None  # nothing to draw codes from yet
        return sample.generate(run, self.shown()).images


def true_share(condition: str) -> tuple:
    """Share of true codes among the generator's at the start and at the end of training; the others are the prior's.

    Between the two it moves linearly. mixed is MixAR's training-inference mixture (2511.12181).
    """
    text = {"resampled": "mixed:0", "teacher_forced": "mixed:0", "ground_truth": "mixed:1"}.get(condition, condition)
    found = re.fullmatch(r"mixed:(\d*\.?\d+)(?:-(\d*\.?\d+))?", text)
    shares = found and (float(found[1]), float(found[2] or found[1]))
    if not shares or max(shares) > 1:
        raise UserError(f"--condition must be ground_truth, teacher_forced, mixed:P or mixed:P-Q with shares from 0 to "
                        f"1, e.g. mixed:1-0.3, not {condition}.")
    return shares


STAGES = {0: Tokenizers, 1: PriorStage, 2: GeneratorStage}
BLOCKS = (generator.Block, prior.Block)           # what --recompute forgets
SHARDED = (*BLOCKS, Attention)                    # what --shard puts together one by one
COMPILED = (Encoder, Decoder, *BLOCKS, HeadNet)   # what --compile compiles


# ------------------------------------------------------------------------------------------------------------- loop

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=(0, 1, 2), required=True)
    parser.add_argument("--preset", choices=PRESETS, default="d2c-b")
    parser.add_argument("--data", help="image folder (stage 0) or cache (stages 1, 2; default: data/cache)")
    parser.add_argument("--run", help="run directory (default: runs/PRESET)")
    parser.add_argument("--only", choices=("vq", "kl"), help="stage 0: train one tokenizer")
    parser.add_argument("--fusion", choices=FUSIONS, help="stage 2 (default: the preset's)")
    parser.add_argument("--condition", help="stage 2: ground_truth; teacher_forced, codes drawn by the prior given the "
                        "true past; mixed:0.7, each true with this probability; mixed:1-0.3, falling over the training")
    parser.add_argument("--steps", type=int, help="optimizer steps in all (default: the preset's epochs)")
    parser.add_argument("--batch", type=int, help="global batch (default: the preset's)")
    parser.add_argument("--lr", type=float, help="learning rate at batch 256 (default: the preset's)")
    parser.add_argument("--accumulate", type=int, help="passes per optimizer step (default: as few as the "
                        "preset's limit of images per pass allows)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks of the models")
    parser.add_argument("--recompute", action="store_true", help="keep no activations of the Transformer blocks but "
                        "compute them again in the backward pass (gradient checkpointing): less memory, more time")
    parser.add_argument("--log-every", type=int, default=20, help="steps")
    parser.add_argument("--save-every", type=int, default=500, help="steps")
    parser.add_argument("--grid-every", type=int, default=1000, help="steps; 0 for no pictures")
    parser.add_argument("--shard", action="store_true", help="stages 1 and 2: divide weights, EMA and optimizer among "
                        "the ranks (FSDP2), for models that fit on one GPU but whose training does not")
    parser.add_argument("--fresh", action="store_true", help="start over; what the stage has made so far is moved to "
                        "RUN/before-N")
    parser.add_argument("--dry-run", action="store_true", help="say what would be trained, and stop")
    args = parser.parse_args()
    args.run = args.run or os.path.join("runs", args.preset)
    if args.data is None and args.stage == 0:
        raise UserError("stage 0 trains on an image folder: give --data DIR.")
    if not 0 <= args.seed < 2**63:
        raise UserError("--seed must be at least 0, and below 2**63.")
    if args.only and args.stage != 0:
        raise UserError("--only vq or kl is for stage 0.")
    if (args.fusion or args.condition) and args.stage != 2:
        raise UserError("--fusion and --condition are for stage 2.")
    if args.shard and (args.stage == 0 or "LOCAL_RANK" not in os.environ):
        raise UserError("--shard is for stages 1 and 2 under torchrun.")
    args.data = args.data or os.path.join("data", "cache")
    return args


def main():
    args = parse_args()
    world, preset = setup(args.device), PRESETS[args.preset]
    recipe = preset.recipes[args.stage]
    recipe = replace(recipe, **{k: v for k in ("batch", "lr") if (v := getattr(args, k)) is not None})
    args.batch, per_rank = recipe.batch, recipe.batch // world.size
    if args.accumulate is None:
        counts = range(1, max(1, per_rank) + 1)
        args.accumulate = next((n for n in counts if per_rank % n == 0 and per_rank // n <= recipe.micro), 1)
    if min(args.batch, args.accumulate, args.log_every, args.save_every, 1 if args.steps is None else args.steps) < 1:
        raise UserError("--batch, --accumulate, --steps, --log-every and --save-every must be at least 1.")
    if args.grid_every < 0:
        raise UserError("--grid-every must be at least 0.")
    if not 0 < recipe.lr < math.inf:
        raise UserError("--lr must be above 0.")
    if args.batch % (world.size * args.accumulate):
        raise UserError(f"a batch of {args.batch} does not divide into {world.size} ranks x {args.accumulate} passes; "
                        f"change --batch.")
    micro = args.batch // (world.size * args.accumulate)

    agree({k: v for k, v in vars(args).items() if k not in ("data", "run")}, "their flags")  # paths may differ by node
    if not args.dry_run:
        try:
            os.makedirs(args.run, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the run directory {args.run}: {error.strerror}.") from None
    torch.manual_seed(args.seed)
    stage = STAGES[args.stage](args, preset, world)
    if args.steps is None:
        args.steps = max(1, round(recipe.epochs * len(stage.data) / args.batch))
    steps = args.steps
    warmup = recipe.warmup * len(stage.data) / args.batch  # steps
    lr = recipe.lr * args.batch / 256
    names = "+".join(stage.trained)
    count = sum(p.numel() for p in stage.trained.parameters())
    print0(f"stage {args.stage}: {names}, {count:,} parameters, {len(stage.data):,} images, {steps:,} steps of "
           f"{args.batch} = {micro} images x {world.size} ranks x {args.accumulate} passes, "
           f"learning rate {lr:.2e} after {warmup:.0f} steps, on {world.device}")
    if args.dry_run:
        return

    state_path = os.path.join(args.run, f"train-{args.stage}{'-' + args.only if args.only else ''}.pt")
    weights = [os.path.join(args.run, f"{kind}.pt") for kind in stage.trained]
    if world.rank == 0:
        sweep(args.run)
        if args.fresh and not is_restart():
            checkpoints.set_aside([state_path, checkpoints.previous(state_path), *weights])
    barrier()
    state = checkpoints.newest(state_path)
    first = state.get("step") if state else 0
    agree(first, "the step to resume at")
    if state is None and world.rank == 0:
        checkpoints.set_aside(weights)  # which another training made
    # What a resumed run must have in common with this one. KL's scale is measured along the way, so it is no setting.
    configs = {kind: asdict(replace(m.config, scale=None) if kind == "kl" else m.config) for kind, m in stage.trained.items()}
    configs.update(condition=getattr(stage, "condition", None), batch=args.batch, seed=args.seed,
                   data=stage.data.identity)
    if len(set(getattr(stage, "true_share", ()))) > 1:  # a share that falls with the step depends on their number
        configs["steps"] = steps

    def saved(k):  # a field that a config did not have yet had its default
        value = state["configs"].get(k)
        return {**asdict(type(stage.trained[k].config)()), **value} if isinstance(value, dict) else value

    if state is None:
        stage.start()
    elif state.get("kind") != f"train-{args.stage}":
        raise UserError(f"{state_path} is no training state of stage {args.stage}; remove it or choose another --run.")
    elif changed := [k for k in configs if saved(k) != configs[k]]:
        raise UserError(f"{state_path} was trained with other settings ({', '.join(changed)}); choose another --run.")
    stage.to(world.device)
    if state is not None:
        stage.trained.load_state_dict(state["raw"])
        stage.remember(state.get("memory", {}))  # which the first version did not save
    for tensor in stage.trained.state_dict().values():
        broadcast(tensor)  # the EMA below starts out the same on every rank, as the weights do
    ema = deepcopy(stage.trained).eval().requires_grad_(False)
    if state is not None:
        ema.load_state_dict(state["ema"])
    if args.compile:  # in place: names of parameters stay, the EMA stays as it is
        for module in stage.trained.modules():
            if isinstance(module, COMPILED):
                module.compile()
    if args.recompute:
        for module in stage.trained.modules():
            if isinstance(module, BLOCKS):
                module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    loss_of = spread(stage, ema, world, args.shard, SHARDED)  # what the loop calls; `stage` stays unwrapped
    learning = [(n, p) for n, p in stage.trained.named_parameters() if p.requires_grad]
    groups = [{"params": [p for n, p in learning if stage.decays(n, p)], "weight_decay": recipe.weight_decay},
              {"params": [p for n, p in learning if not stage.decays(n, p)], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=world.device.type != "mps")
    if state is not None:
        for group in state["optimizer"]["param_groups"]:
            group["fused"] = world.device.type != "mps"  # else loading takes the word of a file from another device
        optimizer.load_state_dict(state["optimizer"])
        if args.shard:
            shard_moments(optimizer)
        print0(f"resuming {state_path} at step {first:,}")
    watch = Watch(world, state.get("skipped", 0) if state else 0)
    del state  # gigabytes

    def plain(models):
        """The models as rank 0 can use them alone. For all ranks to call: under --shard each has a share only."""
        if not args.shard:
            return models
        state = whole(models.state_dict())
        if world.rank > 0:
            return None
        models = nn.ModuleDict({kind: checkpoints.MODULES[kind](m.config) for kind, m in models.items()})
        models.load_state_dict(state)
        return models.to(world.device).eval()

    def save(step):
        memory, weights = stage.memory(), plain(ema)
        parts = {"raw": stage.trained, "ema": ema, "optimizer": optimizer}
        states = whole({name: part.state_dict() for name, part in parts.items()})
        if world.rank > 0:
            return
        stage.before_save(weights)
        for kind, model in weights.items():
            checkpoints.save(os.path.join(args.run, f"{kind}.pt"), kind, model.config, model.state_dict(), step=step,
                             preset=args.preset, **stage.about)
        checkpoints.write(state_path, {
            "format": checkpoints.FORMAT, "kind": f"train-{args.stage}", "step": step, "configs": configs,
            "memory": memory, "skipped": watch.reported, **states}, kept=checkpoints.previous(state_path))

    def show(step):
        """A grid of samples: raw weights above, EMA below."""
        stage.trained.eval()
        pictures = []
        for models in (plain(stage.trained), plain(ema)):
            if world.rank > 0:
                continue
            try:
                pictures.append(stage.picture(models))
            except UserError as error:  # raw weights of the first steps may give values that are no picture
                print0(f"no picture at step {step}: {error}")
        stage.trained.train()
        pictures = [p for p in pictures if p is not None]
        if pictures:
            path = os.path.join(args.run, "grids", f"stage{args.stage}-{step:07d}.png")
            sample.save_picture(sample.grid(torch.cat(pictures), 8), path)

    def rows(k):  # of the global batch, for this rank's k-th pass
        start = (k * world.size + world.rank) * micro
        return slice(start, start + micro)

    order = ((step, k) for step in range(first, steps) for k in range(args.accumulate))
    numbers = lambda step, k: range(step * args.batch, (step + 1) * args.batch)[rows(k)]
    pin = lambda x: x.pin_memory() if world.device.type == "cuda" else x  # copies to the GPU then need no waiting
    batches = ahead(lambda where: [pin(x) for x in stage.data.batch(numbers(*where))], order)
    bar = tqdm(total=steps, initial=first, disable=world.rank > 0, desc=f"stage {args.stage}", unit=" steps",
               mininterval=1)
    seen, clock, notes = 0, time.time(), {}
    stage.trained.train()
    for step in range(first, steps):
        rate = lr * min(1.0, (step + 1) / (warmup + 1))
        for group in optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=world.device)
        for k in range(args.accumulate):
            # dropout: a seed of its own for every step and pass; equal passes on any number of ranks draw the same
            torch.manual_seed(rng("cpu", "dropout", args.seed, step, rows(k).start).initial_seed())
            batch = [x.to(world.device, non_blocking=world.device.type == "cuda") for x in next(batches)]
            with passes(loss_of, last=k == args.accumulate - 1), autocast(world.device):
                loss = loss_of(step, rows(k), *batch) / args.accumulate
            with tf32():  # gradients of the head's first and last layer too; their values are not amplified
                loss.backward()
            total += loss.detach()
        norms = [nn.utils.clip_grad_norm_(model.parameters(), recipe.clip) for model in stage.trained.values()]
        step_unless(watch.bad(total, norms), optimizer)  # a step that is not finite changes no weights
        optimizer.zero_grad(set_to_none=True)
        decay = min(recipe.ema, (1 + step) / (10 + step))  # 0.9999 alone: 90% random start after 1,000 steps
        with torch.no_grad():  # without it the EMA would keep the graph of every step so far
            torch._foreach_lerp_(list(ema.parameters()), list(stage.trained.parameters()), 1 - decay)
        notes.update(stage.after(step, steps, ema))
        seen += 1
        done, stop = step + 1, watch.asked_to_stop()
        save_now = done % args.save_every == 0 or done == steps or stop
        if done % args.log_every == 0 or save_now:  # besides saves and pictures, what waits for the device
            loss, skipped, bad_in_row = watch.report()
            speed = seen * args.batch / (time.time() - clock)
            bar.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} images/s", refresh=False)
            if world.rank == 0:
                log(os.path.join(args.run, "log.jsonl"), stage=args.stage, step=done, loss=loss, lr=rate,
                    grad_norm=float(watch.norm), skipped=skipped, images_per_s=round(speed, 1), **notes)
            seen, clock, notes = 0, time.time(), {}
            # not while it is open whether this run recovers
            save_now = save_now and (not bad_in_row or done == steps or stop)
        before = time.time()
        if save_now:
            save(done)
        if stop:
            bar.close(), barrier()  # rank 0 has saved
            raise Stopped(stop, f"{signal.Signals(stop).name}: stopped after step {done:,}, which is saved; the same "
                          "command goes on from there")
        if args.grid_every and (done % args.grid_every == 0 or done == steps):
            show(done)
        clock += time.time() - before  # so that images/s is that of training
        bar.update()
    bar.close()
    barrier()
    print0(f"{args.run}: {', '.join(k + '.pt' for k in stage.trained)} after {max(first, steps):,} steps")


if __name__ == "__main__":
    run_script(main)
