"""The same, faster: exact rewrites of the loops of prior.py, diffloss.py and generator.py.

    fast.generate_codes(prior, classes, ...)             = prior.generate(classes, ...)
    fast.sample_head(head, z, ...)                       = head.sample(z, ...)
    fast.generate(generator, classes, codes, ...)        = generator.generate(classes, codes, ...)
    fast.loss(generator, latents, classes, codes, draws) = generator.loss(latents, classes, codes, with these draws)

Equal up to rounding, which the tests assert for every fusion. sample.py and train.py call these functions; `sample.py
--plain` calls the plain ones. Read the plain ones first. Each heading below names one idea: why it is exact, and what
it saves. Ratios are plain time over fast time, measured on two CPU cores with `python tools/bench.py`.
"""
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.nn import functional as F

from diffloss import T, Schedule, spaced_timesteps, tf32
from generator import make_plan
from prior import choose, rotate, uniform_numbers


# ------------------------------------------------------------------------------------------- products of few rows
# A step of the prior or of the head has one row for each image or token, two with guidance. For 3 to about 48 rows
# the CPU's library (MKL) first copies the weight matrix W into another layout, which takes longer than the product.
# It does not copy W for (W x^T)^T, nor, up to 8 rows, for W cut into 32 parts as a batch. The sums are the same
# numbers in another order. 1.2 to 2 times as fast; the bounds were measured on one kind of CPU.

def linear(layer, x):
    """layer(x) of a torch.nn.Linear, for few rows on a CPU in the faster order."""
    W, rows = layer.weight, x.shape[:-1].numel()
    if not (x.is_cpu and 3 <= rows <= 48 and W.numel() >= 2**19 and len(W) % 32 == 0):
        return layer(x)
    flat = x.reshape(rows, -1)
    if rows > 8:
        y = (W @ flat.T).T.contiguous()
    else:
        y = flat @ W.view(32, -1, W.shape[1]).mT                                     # [32, rows, out/32]
        y = y.transpose(0, 1).reshape(rows, -1)
    y = y if layer.bias is None else y.add_(layer.bias)
    return y.view(*x.shape[:-1], -1)


# ------------------------------------------------------------------------------------------------------- the prior
# The plain cache grows by torch.cat: step i copies the keys and values of all i positions. Here memory for all
# positions is taken once, a step writes its own row, and attention reads the filled part. Same keys, same values.

@torch.no_grad()
def generate_codes(prior, classes, cfg=1.0, temperature=1.0, top_k=0, top_p=1.0, generator=None, given=None,
                   watch=None):
    """Prior.generate: same arguments, same codes."""
    c, B, L, device = prior.config, len(classes), prior.config.grid**2, classes.device
    uniform, guided = uniform_numbers(B, L, generator, device), cfg != 1
    if guided:
        classes = torch.cat([classes, torch.full_like(classes, c.classes)])
    x, codes = prior.class_embedding(classes), torch.empty(B, L, dtype=torch.long, device=device)    # x [B or 2B, D]
    caches = [None] * c.layers
    for i in range(L):
        for n, block in enumerate(prior.blocks):
            qkv = linear(block.wqkv, block.attention_norm(x)).view(len(x), 3, c.heads, 1, -1)
            qk, v = rotate(qkv[:, :2], prior.rope[i:i + 1]), qkv[:, 2]               # queries and keys turn together
            if i == 0:
                caches[n] = v.new_empty(2, len(x), c.heads, L, v.shape[-1])
            keys, values = caches[n]
            keys[:, :, i], values[:, :, i] = qk[:, 1, :, 0], v[:, :, 0]
            y = F.scaled_dot_product_attention(qk[:, 0], keys[:, :, :i + 1], values[:, :, :i + 1])
            x = x + linear(block.wo, y.flatten(1))
            h = block.ffn_norm(x)
            x = x + linear(block.w2, F.silu(linear(block.w1, h)) * linear(block.w3, h))
        logits = linear(prior.output, prior.norm(x)).float()
        codes[:, i] = choose(logits, cfg, temperature, top_k, top_p, uniform[:, i])
        if given is not None:
            codes[:, i] = torch.where(given[:, i] < 0, codes[:, i], given[:, i])
        x = prior.code_embedding(codes[:, i].repeat(2 if guided else 1))
        if watch:
            watch()
    return codes


# --------------------------------------------------------------------------------------- the diffusion head's loop
# The plain loop asks net(x, t, z) at every step, but most of the network does not see x. Embedding of all timesteps:
# one table. Projection of z: once. The adaLN projections of SiLU(time + z) are three fifths of the arithmetic; every
# (step, token) needs its own, because SiLU(a + b) does not split, but one product for several steps reads the weights
# once. The loop that remains is the blocks' two layers. All coefficients are numbers on the host.

ROWS = 1024  # steps x tokens of one adaLN product, about: a row takes (3 * depth + 2) * width floats


@lru_cache
def respaced(steps, t_max) -> Schedule:
    return Schedule(spaced_timesteps(steps, t_max))


def modulations(net, y):
    """y [..., width] -> (shift, 1 + scale, gate) of each block, then (shift, 1 + scale) of the output."""
    y, out = F.silu(y), []
    with tf32():
        for layer in [*(block.modulation for block in net.blocks), net.output_modulation]:
            parts = layer(y).unflatten(-1, (-1, y.shape[-1])).unbind(-2)
            parts[1].add_(1)  # where it lies
            out.append(parts)
    return out


def body(net, x, modulations, i):
    """The rest of HeadNet.forward, with step i of the modulations. addcmul(a, b, c) is a + b * c."""
    x = net.input(x)                                                                 # [N or 2N, width]
    with tf32():
        for block, (shift, scale, gate) in zip(net.blocks, modulations):
            h = torch.addcmul(shift[i], block.norm(x), scale[i])
            h = linear(block.mlp[2], F.silu(linear(block.mlp[0], h)))
            x = torch.addcmul(x, gate[i], h)
    shift, scale = modulations[-1]
    return net.output(torch.addcmul(shift[i], F.layer_norm(x, x.shape[-1:], eps=1e-6), scale[i]))


@torch.no_grad()
def sample_head(head, z, z_null=None, cfg=1.0, steps=100, temperature=1.0, noise=None, generator=None, t_max=T - 1,
                graphs=None):
    """DiffusionHead.sample: same arguments, same tokens. graphs: a Graphs, on CUDA."""
    N, C, s = len(z), head.config.token_dim, respaced(steps, t_max)
    guided = z_null is not None and cfg != 1
    if noise is None:
        noise = torch.randn(steps + 1, N, C, generator=generator, device=z.device)
    with torch.autocast(z.device.type, enabled=False):
        z = (torch.cat([z, z_null]) if guided else z).float()                        # [N or 2N, D]
        times = head.net.embed_time(torch.tensor(s.timesteps, device=z.device))      # [S, width]
        cfg = torch.tensor(float(cfg), device=z.device)  # a tensor: a CUDA graph reads it anew for each iteration
        loop = lambda *tensors: reverse(head, s, temperature, *tensors)
        if graphs is None:
            return loop(z, times, noise, cfg)
        return graphs((N, guided, steps, t_max, temperature), loop, z, times, noise, cfg)


def reverse(head, s: Schedule, temperature, z, times, noise, cfg):
    """The reverse steps. z [N, D], or [2N, D] with the null branch behind; times [S, width]; noise [S+1, N, C]."""
    net, N, C, S = head.net, noise.shape[1], noise.shape[2], len(times)
    cond, together = net.cond(z), max(1, ROWS // len(z))                             # [N or 2N, width]; steps ahead
    x = noise[0]
    for k, i in enumerate(reversed(range(S))):
        if k % together == 0:  # for the steps i, i - 1, ..., first
            first = max(0, i + 1 - together)
            ahead = modulations(net, times[first:i + 1, None] + cond)                # each [steps, N or 2N, width]
        out = body(net, x.repeat(len(z) // N, 1), ahead, i - first)
        eps, v = out[:N].chunk(2, dim=-1)
        if len(z) > N:
            null = out[N:, :C]
            eps = null + cfg * (eps - null)
        x = s.mean_x0[i] * (s.x_from_xt[i] * x - s.x_from_eps[i] * eps) + s.mean_xt[i] * x
        if i > 0:
            logvar = head.log_variance(v, s.max_logvar[i], s.min_logvar[i])
            x = x + (0.5 * logvar).exp() * noise[k + 1] * temperature
    return x


# ----------------------------------------------------------------------------------------------------- CUDA graphs
# The step loop launches thousands of small kernels, and a launch takes longer than the kernel's work. A graph records
# the launches once and replays them all with one call. Same kernels, same results.

class Graphs:
    """CUDA graphs of functions of tensors, one per key: `graphs(key, function, *inputs)` is function(*inputs).

    The key must hold everything that the function depends on besides the values of the inputs. A graph reads weights
    at the addresses that it recorded: training in place is seen, a parameter moved to new memory is not.
    """

    def __init__(self):
        self.recorded = {}

    def record(self, function, inputs):
        """-> a function that replays function(*inputs) on the memory of this call, and the output that it writes."""
        if not self.recorded:
            self.pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function(*inputs)  # libraries set themselves up at their first call, which must not be recorded
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            out = function(*inputs)
        return graph.replay, out

    def __call__(self, key, function, *inputs):
        if key not in self.recorded:
            kept = [x.clone() for x in inputs]
            self.recorded[key] = kept, *self.record(function, kept)
        kept, replay, out = self.recorded[key]
        for mine, given in zip(kept, inputs):
            mine.copy_(given)
        replay()
        return out.clone()  # the next graph may use the same memory


# --------------------------------------------------------------------------------------------------- the generator
# 1. Order of generation. Attention knows positions only from the tables added to its rows, so rows may stand in any
#    order. Here visible tokens stand first, then the tokens drawn next, then the others: every selection is a slice
#    of the front, where the plain loop searches a mask, for which a GPU must wait.
# 2. Fusion once. The codes of an image do not change, so what the fusion makes of them, and the keys and values that
#    cross-attention makes of that, are computed once per image instead of once per iteration; for the null branch,
#    which is the same for all images, once per run.
# 3. Last block. After the last decoder block only the tokens drawn now are used. The block computes keys and values of
#    all rows, but queries and MLP of these tokens only.
# Training uses the first idea, and the head sees hidden tokens only.

class Prepared(NamedTuple):
    """A fusion.Fused, and keys and values [2, B, H, codes, D/H] (or None) for every block's cross-attention."""
    prefix: torch.Tensor
    mask_codes: torch.Tensor | None
    encoder: list
    decoder: list


def prepare(model, classes, codes) -> Prepared:
    fused = model.fuse(classes, codes)
    read = lambda blocks: [None if fused.context is None else b.cross.attention.keys_values(fused.context)
                           for b in blocks]
    return Prepared(fused.prefix, fused.mask_codes, read(model.encoder_blocks), read(model.decoder_blocks))


def null_condition(model) -> Prepared:
    """The Prepared of one null image. It serves all images of a run: `generate` takes it as `null`."""
    c, device = model.config, model.mask_token.device
    codes = torch.zeros(1, c.codes, dtype=torch.long, device=device)  # the fake code replaces them
    return prepare(model, torch.full((1,), c.classes, device=device), codes)


def with_null(images: Prepared, null: Prepared) -> Prepared:
    """B images, and B times the null image behind them."""
    join = lambda a, b, dim: None if a is None else torch.cat([a, b.expand(*a.shape)], dim)
    blocks = lambda a, b: [join(x, y, 1) for x, y in zip(a, b)]
    return Prepared(join(images.prefix, null.prefix, 0), join(images.mask_codes, null.mask_codes, 0),
                    blocks(images.encoder, null.encoder), blocks(images.decoder, null.decoder))


def rows_at(x, where):
    """x [B or 1, L, D], where [B, n] positions -> [B, n, D]."""
    return x.expand(len(where), -1, -1).gather(1, where[..., None].expand(-1, -1, x.shape[-1]))


def encoder_rows(model, prefix, latents, visible):
    """latents [B, V, C] at positions visible [B, V] -> the encoder's input [B, P+V, D]."""
    P, table = model.fusion.slots, model.encoder_positions
    x = model.latent_in(latents) + rows_at(table[:, P:], visible)
    return model.encoder_in_norm(torch.cat([prefix + table[:, :P], x], dim=1))


def decoder_rows(model, encoded, mask_codes, order):
    """encoded [B, P+V, D], order [B, L] with the V visible positions first -> the decoder's input [B, P+L, D]."""
    P, table = model.fusion.slots, model.decoder_positions
    hidden = order[:, encoded.shape[1] - P:]
    tokens = model.mask_token if mask_codes is None else model.mask_token + mask_codes
    tokens = rows_at(tokens.expand(-1, order.shape[1], -1), hidden)                  # [B, L-V, D]
    x = torch.cat([model.decoder_in(encoded), tokens], dim=1)
    return x + torch.cat([table[:, :P].expand(len(x), -1, -1), rows_at(table[:, P:], order)], dim=1)


def run_block(block, x, keys_values=None, rows=slice(None)):
    """generator.Block.forward in eval mode: x [B, T, D] -> [B, T', D] for the T' asked rows."""
    B, T, D = x.shape
    q, k, v = block.qkv(block.norm1(x)).view(B, T, 3, block.heads, -1).permute(2, 0, 3, 1, 4)       # [B, H, T, D/H]
    y = F.scaled_dot_product_attention(q[:, :, rows], k, v)
    x = x[:, rows] + block.proj(y.transpose(1, 2).flatten(2))
    if keys_values is not None:
        x = x + block.cross.attention.attend(block.cross.norm(x), keys_values)
    return x + block.fc2(F.gelu(block.fc1(block.norm2(x))))


def compile_blocks():
    """Compiles run_block with torch.compile, for all later calls of `generate`."""
    global run_block
    run_block = torch.compile(run_block)


def hidden_state(model, latents, order, start, end, prepared):
    """z [B, end - start, D] of the positions order[:, start:end], given latents [B, start, C] of those before them."""
    P = model.fusion.slots
    x = encoder_rows(model, prepared.prefix, latents, order[:, :start])
    for block, keys_values in zip(model.encoder_blocks, prepared.encoder):
        x = run_block(block, x, keys_values)
    x = decoder_rows(model, model.encoder_norm(x), prepared.mask_codes, order)
    for block, keys_values in zip(model.decoder_blocks[:-1], prepared.decoder):
        x = run_block(block, x, keys_values)
    x = run_block(model.decoder_blocks[-1], x, prepared.decoder[-1], slice(P + start, P + end))
    return model.decoder_norm(x) + rows_at(model.output_positions, order[:, start:end])


@torch.no_grad()
def generate(model, classes, codes, iterations=64, steps=100, cfg=4.0, schedule="linear", temperature=1.0,
             orders=None, noise=None, generator=None, t_max=T - 1, cfg_from=0.0, start=None, watch=None, null=None,
             graphs=None):
    """Generator.generate: same arguments, same latents. null: null_condition(model); graphs: see sample_head."""
    B, L, C = len(classes), model.config.grid**2, model.config.token_dim
    plan = make_plan(B, L, iterations, steps, cfg, schedule, cfg_from, orders, generator, start, classes.device)
    # Positions in the order of generation, and within an iteration in raster order, which the rows of noise follow:
    # iteration k sees order[:, :bounds[k]] and draws order[:, bounds[k]:bounds[k+1]].
    bounds = [plan.kept] + [L - m for m in plan.hidden]
    parts = zip([0] + bounds, bounds)
    order = torch.cat([plan.orders.flip(1)[:, a:b].sort(1).values for a, b in parts], dim=1)           # [B, L]
    raster = order.argsort(1)                                                        # the way back

    images = prepare(model, classes, codes)
    both = with_null(images, null or null_condition(model)) if any(g != 1 for g in plan.cfg) else None
    x = torch.zeros(B, L, C, device=classes.device)                                  # in the order of generation
    if start is not None:
        x[:, :plan.kept] = rows_at(start[0], order[:, :plan.kept])
    for k, (a, b) in enumerate(zip(bounds, bounds[1:])):
        prepared, branches = (both, 2) if plan.cfg[k] != 1 else (images, 1)          # both branches in one batch
        z = hidden_state(model, x[:, :a].repeat(branches, 1, 1), order.repeat(branches, 1), a, b, prepared)
        z, z_null = z.flatten(0, 1).split(B * (b - a)) if branches == 2 else (z.flatten(0, 1), None)
        e = plan.noise(k, C) if noise is None else noise[k]
        drawn = sample_head(model.head, z, z_null, plan.cfg[k], plan.steps[k], temperature, e, None, t_max, graphs)
        x[:, a:b] = drawn.view(B, b - a, C)
        if watch:
            watch(rows_at(x, raster))
    return rows_at(x, raster)


def loss(model, latents, classes, codes, draws):
    """Generator.loss(latents, classes, codes, draws.mask, draws.t, draws.noise, draws.null) for training: the host
    knows the number of hidden tokens, draws.hidden, so it never waits for the device."""
    B, L, C = latents.shape
    M, n, P = len(draws.t), draws.hidden, model.fusion.slots
    order = draws.mask.argsort(dim=1, stable=True)                                   # [B, L], visible positions first
    visible, hidden = order[:, :L - n], order[:, L - n:]
    fused = model.fuse(classes.masked_fill(draws.null, model.config.classes), codes)
    x = encoder_rows(model, fused.prefix, rows_at(latents, visible), visible)
    for block in model.encoder_blocks:
        x = block(x, fused.context)
    x = decoder_rows(model, model.encoder_norm(x), fused.mask_codes, order)
    for block in model.decoder_blocks:
        x = block(x, fused.context)
    z = model.decoder_norm(x[:, P + L - n:]) + rows_at(model.output_positions, hidden)                # [B, n, D]
    each = hidden.expand(M, B, n).flatten(0, 1)                                      # [M*B, n]
    t = rows_at(draws.t.flatten(0, 1)[..., None], each).view(M, -1)                  # [M, B*n]
    noise = rows_at(draws.noise.flatten(0, 1), each).view(M, -1, C)                  # [M, B*n, C]
    return model.head.loss(rows_at(latents, hidden).flatten(0, 1), z.flatten(0, 1), t, noise).mean()
