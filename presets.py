"""Every named size and training recipe: `--preset NAME`.

A Preset holds the component configs and, per stage, a Recipe. Grids, code tables and class counts that follow from
other entries or from the data are filled in by train.py (`classes`, `vocab`, `code_dim`). Sampling is what a run's
files recommend; sample.py's flags override it.
"""
import re
from dataclasses import dataclass, field, replace

from generator import GeneratorConfig
from prior import PriorConfig
from runtime import UserError
from tokenizers import KLConfig, VQConfig


@dataclass(frozen=True)
class Recipe:
    """AdamW: linear warm-up, a constant rate, at the end a linear decay; gradient clipping; moving average (EMA)."""
    batch: int                  # images per optimizer step, over all ranks
    epochs: float
    lr: float                   # at batch 256; scaled linearly with the batch
    warmup: float = 0.0         # epochs
    decay: float = 0.0          # share of all steps, the last ones, over which the rate falls to zero
    balanced: bool = False      # show every class equally often (stages 1 and 2)
    weight_decay: float = 0.02
    clip: float = 3.0           # gradient norm
    ema: float = 0.9999
    micro: int = 64             # images per rank and pass at most; more are accumulated (memory, not results)

    def steps(self, images: int, batch: int) -> int:
        """Optimizer steps of the epochs over this many images."""
        return max(1, round(self.epochs * images / batch))


flag = lambda default, text: field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Sampling:
    """How a run wants to be sampled, and sample.py's flags for it.

    D2C 5.1; prior guidance is LlamaGen's, diffusion steps are MAR's.
    """
    iterations: int = flag(64, "rounds in which the generator draws all tokens")
    steps: int = flag(100, "of the diffusion head, for each token")
    anneal: str = flag("", "A:B, head steps from A in the first iteration to B in the last, instead of --steps")
    cfg: float = flag(4.0, "guidance of the generator; 1: none")
    cfg_from: float = flag(0.0, "iterations whose guidance is below it skip the null branch")
    schedule: str = flag("linear", "of the generator's guidance: linear, growing with what is drawn, or constant")
    temperature: float = flag(1.0, "of the generator: scales the noise of the head's steps")
    prior_cfg: float = flag(2.0, "guidance of the prior; 1: none")
    prior_temperature: float = flag(0.99, "of the prior: its logits are divided by it")
    top_k: int = flag(0, "the prior draws from its k likeliest codes; 0: from all")
    top_p: float = flag(1.0, "the prior draws from the fewest codes that have this probability together")
    t_max: int = flag(999, "the noisiest diffusion timestep, where the head starts; less is forgiving of errors there")


@dataclass(frozen=True)
class Preset:
    image_size: int
    vq: VQConfig
    kl: KLConfig
    prior: PriorConfig
    generator: GeneratorConfig
    condition: str              # where the generator's codes come from in training: see true_share
    recipes: tuple              # of stages 0, 1, 2
    sampling: Sampling


def true_share(condition: str) -> tuple:
    """Share of true codes among the generator's at the start and at the end of training; the prior draws the others.

    Between the two the share moves linearly. mixed is MixAR's training-inference mixture (2511.12181).
    """
    text = {"resampled": "mixed:0", "ground_truth": "mixed:1"}.get(condition, condition)
    found = re.fullmatch(r"mixed:(\d*\.?\d+)(?:-(\d*\.?\d+))?", text)
    shares = found and (float(found[1]), float(found[2] or found[1]))
    if not shares or max(shares) > 1:
        raise UserError(f"--condition must be ground_truth, resampled, mixed:P or mixed:P-Q with shares from 0 to 1, "
                        f"e.g. mixed:1-0.3, not {condition}.")
    return shares


SHARES = (0.15, 0.35, 0.5)  # of the stages in `--hours`; about as in the training of weights/tiny


def new_plan(recipes: tuple, images: int, batch: int | None, hours: float | None) -> dict:
    """For `train.py --stage all`: hours in all or None, steps of each stage, their seconds (None: not measured yet),
    and the stages that have begun."""
    steps = [recipe.steps(images, batch or recipe.batch) for recipe in recipes]
    return {"hours": hours, "steps": steps, "seconds": [None] * len(steps), "begun": []}


def fix_steps(plan: dict, stage: int, seconds: float, least: int):
    """Shortens a stage, a step of which takes `seconds`, to its share of the hours that earlier stages leave."""
    left = 3600 * plan["hours"] - sum(s or 0 for s in plan["seconds"])
    fitting = int(left * SHARES[stage] / sum(SHARES[stage:]) / seconds)
    plan["steps"][stage] = steps = min(plan["steps"][stage], max(least, fitting))
    plan["seconds"][stage] = steps * seconds


# Sizes of D2C Table 1 and MAR Table 3; LlamaGen's tokenizer and prior. MAR's and LlamaGen's batches; D2C gives none.
BASE, LARGE = GeneratorConfig(), GeneratorConfig(dim=1024, depth=16, heads=16, head_depth=8, head_width=1280)
TOKENIZERS = Recipe(128, 40, 2e-4, weight_decay=0.05, clip=1.0)
PRIOR = Recipe(256, 300, 1e-4, weight_decay=0.05, clip=1.0)
D2C, MAR = Recipe(2048, 800, 5e-5, warmup=100, micro=32), Recipe(2048, 800, 1e-4, warmup=100, micro=32)
OFFICIAL = Preset(256, VQConfig(), KLConfig(), PriorConfig(), BASE, "resampled", (TOKENIZERS, PRIOR, D2C), Sampling())

# Tokenizers of the small presets: convolutions from half resolution on, in parallel to a linear path of 8x8 tiles.
# 8x8 codes per image; KL merges its 8x8 positions into 4x4 latents of 128 channels, which is a quarter of the work.
SMALL = dict(ch=32, ch_mult=(1, 2, 2), unshuffle=2, linear_path=True, z_channels=32)
TINY = Preset(
    64, VQConfig(**SMALL, blocks=1, codebook_size=512),
    KLConfig(**SMALL, blocks=2, lapped=True, merge=2, noise=0.6, scale=None),
    PriorConfig(dim=192, layers=6, heads=3, vocab=512, grid=8, dropout=0.2),
    GeneratorConfig("cross_attention", dim=192, depth=4, heads=3, prefix=4, token_dim=128, grid=4, code_grid=8,
                    head_depth=3, head_width=384, batch_mul=2, dropout=0.0, queries=2, qformer_width=192,
                    qformer_layers=2, qformer_heads=3),
    "ground_truth",
    (Recipe(32, 10, 8e-3, warmup=0.5, decay=0.5, weight_decay=0.0, clip=1.0, ema=0.999),
     Recipe(64, 40, 4e-3, warmup=1.0, decay=0.5, balanced=True, weight_decay=0.05, clip=1.0, ema=0.998),
     Recipe(32, 200, 4.8e-3, warmup=1.0, decay=0.3, balanced=True, ema=0.999)),
    Sampling(iterations=8, steps=25, cfg=3.0, temperature=0.9, prior_cfg=4.0, t_max=950))

# Seconds on a CPU, for the tests: everything at its smallest.
TOY = replace(
    TINY, image_size=32,
    vq=VQConfig(ch=32, ch_mult=(1, 1, 1), z_channels=16, codebook_size=64, blocks=1, unshuffle=2, linear_path=True),
    kl=KLConfig(ch=32, ch_mult=(1, 1, 1), z_channels=8, scale=None, blocks=1, unshuffle=2, linear_path=True),
    prior=PriorConfig(dim=64, layers=2, heads=2, vocab=64, grid=4, dropout=0.0),
    generator=GeneratorConfig("cross_attention", dim=64, depth=2, heads=2, prefix=4, token_dim=8, grid=4, head_depth=2,
                              head_width=64, dropout=0.0, queries=2, qformer_width=64, qformer_layers=1,
                              qformer_heads=2),
    recipes=(Recipe(16, 20, 8e-3, ema=0.99), Recipe(16, 60, 1.6e-2, ema=0.99), Recipe(16, 120, 1.6e-2, ema=0.99)),
    sampling=Sampling(iterations=8, steps=25, cfg=1.5, t_max=950))

mar = lambda p, cfg: replace(p, generator=replace(p.generator, fusion="none"), recipes=(TOKENIZERS, PRIOR, MAR),
                             sampling=Sampling(iterations=256, cfg=cfg))
d2c_l = replace(OFFICIAL, generator=LARGE)
cross = replace(OFFICIAL, generator=replace(BASE, fusion="cross_attention"))
# DisCon on VA-VAE, whose scale data.py measures. Recipes of these two: MAR's; their papers' are not known here.
VA_VAE = KLConfig(z_channels=32, decoder_attention=True, scale=None)
discon = lambda g: replace(OFFICIAL, kl=VA_VAE, generator=replace(g, fusion="prefix", token_dim=VA_VAE.z_channels),
                           condition="ground_truth", recipes=(TOKENIZERS, PRIOR, MAR))
mixar = replace(OFFICIAL, generator=replace(BASE, fusion="mask_tokens"), condition="mixed:0.5",
                recipes=(TOKENIZERS, PRIOR, MAR))
PRESETS = {
    #                                     fusion           width  blocks  parameters
    "d2c-b":        OFFICIAL,           # qformer            768   12+12  362M, prior included: D2C Table 1
    "d2c-b-cross":  cross,              # cross_attention    768   12+12  389M
    "d2c-l":        d2c_l,              # qformer           1024   16+16  633M
    "discon-b":     discon(BASE),          # prefix             768   12+12  333M
    "discon-l":     discon(LARGE),          # prefix            1024   16+16  603M
    "mixar-b":      mixar,              # mask_tokens        768   12+12  332M
    "mar-b":        mar(OFFICIAL, 2.9), # none               768   12+12  208M: MAR Table 3
    "mar-l":        mar(d2c_l, 3.0),    # none              1024   16+16  478M
    "tiny":         TINY,               # cross_attention    192     3+3  weights/tiny: 64x64 pixels, 8x8 tokens
    "toy":          TOY,                # cross_attention     64     2+2  the tests: 32x32 pixels, 4x4 tokens
}
