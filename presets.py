"""Every named size and training recipe: `--preset NAME`.

A Preset holds the component configs and, per stage, a Recipe. Grids, code tables and class counts that follow from
other entries or from the data are filled in by train.py (`classes`, `vocab`, `code_dim`). Sampling is what a run's
files recommend; sample.py's flags override it.
"""
from dataclasses import dataclass, field, replace

from generator import GeneratorConfig
from prior import PriorConfig
from tokenizers import KLConfig, VQConfig


@dataclass(frozen=True)
class Recipe:
    """AdamW with linear warm-up, then a constant rate, gradient clipping and an exponential moving average (EMA)."""
    batch: int                  # images per optimizer step, over all ranks
    epochs: float
    lr: float                   # at batch 256; scaled linearly with the batch
    warmup: float = 0.0         # epochs
    weight_decay: float = 0.02
    clip: float = 3.0           # gradient norm
    ema: float = 0.9999
    micro: int = 64             # images per rank and pass at most; more are accumulated (memory, not results)


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
    condition: str              # where the generator's codes come from in training: see train.true_share
    recipes: tuple              # of stages 0, 1, 2
    sampling: Sampling


# Sizes of D2C Table 1 and MAR Table 3; LlamaGen's tokenizer and prior. MAR's and LlamaGen's batches; D2C gives none.
BASE, LARGE = GeneratorConfig(), GeneratorConfig(dim=1024, depth=16, heads=16, head_depth=8, head_width=1280)
TOKENIZERS = Recipe(128, 40, 2e-4, weight_decay=0.05, clip=1.0)
PRIOR = Recipe(256, 300, 1e-4, weight_decay=0.05, clip=1.0)
D2C, MAR = Recipe(2048, 800, 5e-5, warmup=100, micro=32), Recipe(2048, 800, 1e-4, warmup=100, micro=32)
OFFICIAL = Preset(256, VQConfig(), KLConfig(), PriorConfig(), BASE, "resampled", (TOKENIZERS, PRIOR, D2C), Sampling())

# Tokenizers of the small presets: convolutions from half resolution on, beside a linear path of 8x8 patches.
SMALL = dict(ch=32, ch_mult=(1, 2, 2), blocks=1, unshuffle=2, linear_path=True)
TINY = Preset(
    64, VQConfig(**SMALL, z_channels=32, codebook_size=512), KLConfig(**SMALL, z_channels=32, scale=None),
    PriorConfig(dim=192, layers=6, heads=3, vocab=512, grid=8),
    GeneratorConfig("cross_attention", dim=192, depth=3, heads=3, prefix=4, token_dim=32, grid=8, head_depth=2,
                    head_width=256, batch_mul=2, dropout=0.0, queries=2, qformer_width=192, qformer_layers=2,
                    qformer_heads=3),
    "ground_truth",
    (Recipe(32, 30, 8e-3, warmup=0.5, weight_decay=0.0, clip=1.0, ema=0.999),
     Recipe(64, 40, 4e-3, warmup=1.0, weight_decay=0.05, clip=1.0, ema=0.998),
     Recipe(64, 100, 2.4e-3, warmup=1.0, ema=0.999)),
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
