"""DiDi-Instruct in plain torch, written from its description: the networks, the samplers, a tiny checkpoint of them.

The modules are named so that their state dicts are checkpoints of the published format. The samplers follow the text
position by position and differentiate by autograd; their noise is the engine's, so that results can be compared.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from linocut.kernels.philox import gumbel_noise

LETTERS, END, MASK, VOCAB = 256, 256, 257, 258


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class Embed(nn.Module):
    """Ids, or logits whose softmax weighs the embeddings."""

    def __init__(self, vocab: int, size: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab, size))

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding[x] if x.dtype == torch.int64 else x.softmax(-1) @ self.embedding


class Times(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, sigma: Tensor) -> Tensor:
        angles = [[float(s) * 10000 ** (-i / 128) for i in range(128)] for s in sigma]
        waves = [[math.cos(a) for a in row] + [math.sin(a) for a in row] for row in angles]
        return nn.functional.silu(self.mlp(torch.tensor(waves)))


class Layer(nn.Module):
    def __init__(self, size: int, heads: int, cond: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = Norm(size), Norm(size)
        self.attn_qkv = nn.Linear(size, 3 * size, bias=False)
        self.attn_out = nn.Linear(size, size, bias=False)
        self.mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(approximate="tanh"), nn.Linear(4 * size, size))
        self.adaLN_modulation = nn.Linear(cond, 6 * size)

    def attention(self, x: Tensor) -> Tensor:
        size = x.shape[-1] // self.heads
        out = []
        for head in range(self.heads):
            at = slice(head * size, (head + 1) * size)
            q, k, v = (part[..., at] for part in self.attn_qkv(x).chunk(3, dim=-1))
            weights = (turn(q) @ turn(k).transpose(-1, -2) / math.sqrt(size)).softmax(-1)
            out.append(weights @ v)
        return self.attn_out(torch.cat(out, dim=-1))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        a, b, c, d, e, f = (part[:, None] for part in self.adaLN_modulation(cond).chunk(6, dim=-1))
        x = x + c * self.attention(self.norm1(x) * (1 + b) + a)
        return x + f * self.mlp(self.norm2(x) * (1 + e) + d)


def turn(x: Tensor) -> Tensor:
    """Rotary embedding: channel i and i + half are a complex number that turns by position * 10000^(-i / half)."""
    half = x.shape[-1] // 2
    speed = 10000.0 ** (-torch.arange(half).double() / half)
    angle = torch.arange(x.shape[-2]).double()[:, None] * speed
    number = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([number.real, number.imag], dim=-1).to(x.dtype)


class Output(nn.Module):
    def __init__(self, size: int, vocab: int, cond: int) -> None:
        super().__init__()
        self.norm_final = Norm(size)
        self.linear = nn.Linear(size, vocab)
        self.adaLN_modulation = nn.Linear(cond, 2 * size)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        shift, scale = (part[:, None] for part in self.adaLN_modulation(cond).chunk(2, dim=-1))
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class Judge(nn.Module):
    """The discriminator's head."""

    def __init__(self, size: int) -> None:
        super().__init__()
        normed = torch.nn.utils.spectral_norm
        self.main = nn.Sequential(normed(nn.Linear(size, size)), nn.SiLU(), normed(nn.Linear(size, 1)))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        return self.main(x)


class Network(nn.Module):
    def __init__(self, size: int, heads: int, layers: int, cond: int, vocab: int, judge: bool, seed: int) -> None:
        super().__init__()
        self.vocab_embed = Embed(vocab, size)
        self.sigma_map = Times(cond)
        self.blocks = nn.ModuleList(Layer(size, heads, cond) for _ in range(layers))
        self.output_layer = Judge(size) if judge else Output(size, vocab, cond)
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            # Wide enough that every part shows in the result, time conditioning and modulation included.
            for name, weight in self.named_parameters():
                scale = 1.0 if "embed" in name else 0.5 if weight.dim() == 1 else 1.5 / math.sqrt(weight.shape[-1])
                weight.copy_(torch.randn(weight.shape, generator=noise) * scale + (1.0 if "norm" in name else 0.0))
            if judge:  # training is what brings the vectors of the spectral norm near the weight's singular ones
                for _ in range(20):
                    self.output_layer(torch.zeros(1, size), None)
        self.eval()

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        cond = self.sigma_map(sigma)
        x = self.vocab_embed(x)
        for block in self.blocks:
            x = block(x, cond)
        return self.output_layer(x, cond)


# ---------------------------------------------------------------------------------------------------- samplers


def alpha(t: float) -> float:
    return 1 - (1 - 1e-3) * t


class PlainSampler:
    """One canvas at a time. transitions: what each step drew from, [length, vocab] unnormalised weights."""

    def __init__(self, student: Network, judge: Network | None, length: int, mask: int = MASK) -> None:
        self.student, self.judge, self.length, self.mask = student, judge, length, mask

    def gumbel(self, seed: int, choice: int, position: int, step: int, first: int, count: int) -> Tensor:
        words = [torch.tensor([value]) for value in (seed, choice, position, step)]
        return gumbel_noise(*words, first, count)[0]

    def draw(self, x: Tensor, weights: Tensor, seed: int, choice: int, step: int) -> Tensor:
        """The next canvas: each mask becomes v with a chance proportional to weights[position, v]."""
        x = x.clone()
        for position in (x == self.mask).nonzero()[:, 0].tolist():
            row = weights[position].double()
            tokens = row.clone()
            tokens[self.mask] = 0
            uniform = torch.exp(-torch.exp(-self.gumbel(seed, choice, position, step, self.mask, 1).double()))
            if uniform <= tokens.sum() / row.sum():
                exponential = torch.exp(-self.gumbel(seed, choice, position, step, 0, len(row)).double())
                x[position] = (tokens / exponential).argmax()
        return x

    def prediction(self, x: Tensor, sigma: float = 0.0) -> Tensor:
        """SUBS: the mask has no probability."""
        with torch.no_grad():
            logits = self.student(x[None], torch.tensor([sigma]))[0]
        logits[:, self.mask] = -math.inf
        return logits.softmax(-1)

    def tilted_logits(self, x: Tensor, sigma: float, scale: float) -> Tensor:
        with torch.no_grad():
            logits = self.student(x[None], torch.tensor([sigma]))[0]
        leaf = logits.clone().requires_grad_()
        masked = x == self.mask
        known = nn.functional.one_hot(x, logits.shape[-1]).float() * 1e9
        scores = self.judge(torch.where(masked[:, None], leaf, known)[None], torch.tensor([sigma]))[0, :, 0]
        (scores * masked).sum().backward()
        slope = torch.where(masked[:, None], leaf.grad, torch.zeros(())).clamp(-1, 1)
        return logits + scale * slope

    def weights(self, prediction: Tensor, t: float, s: float) -> Tensor:
        weights = prediction * (alpha(s) - alpha(t))
        weights[:, self.mask] = 1 - alpha(s)
        return weights

    def sample(self, prompt: list[int], seed: int, choice: int, steps: int, **guided: Any) -> list[int]:
        """guided: guidance_scale_start, guidance_scale_end, num_candidates, rerank_steps_ratio; none of them: plain."""
        x = torch.tensor(prompt + [self.mask] * (self.length - len(prompt)))
        grid = [1 - (1 - 1e-5) * i / steps for i in range(steps + 1)]
        rerank = int(steps * (1 - guided["rerank_steps_ratio"])) if guided else 0
        for i in range(steps):
            t, s = grid[i], grid[i + 1]
            if not guided:
                x = self.draw(x, self.weights(self.prediction(x), t, s), seed, choice, i)
            elif i < rerank:
                low, high = guided["guidance_scale_start"], guided["guidance_scale_end"]
                scale = low + (high - low) * i / max(1, rerank - 1)
                tilted = self.tilted_logits(x, -math.log(alpha(t)), scale)
                x = self.draw(x, self.weights(tilted.softmax(-1), t, s), seed, choice, i)
            else:
                with torch.no_grad():
                    logits = self.student(x[None], torch.tensor([-math.log(alpha(t))]))[0]
                weights = self.weights(logits.softmax(-1), t, s)
                drawn = [self.draw(x, weights, seed, choice, i + (m << 16)) for m in range(guided["num_candidates"])]
                with torch.no_grad():
                    rewards = [self.judge(c[None], torch.tensor([-math.log(alpha(s))])).sum() for c in drawn]
                noise = self.gumbel(seed, choice, self.length, i, 0, len(drawn))
                x = drawn[int((torch.stack(rewards) + noise).argmax())]
        last = self.prediction(x)
        return self.draw(x, last, seed, choice, steps).tolist()


# -------------------------------------------------------------------------------------------------- checkpoint

SIZES: dict[str, Any] = {"hidden_size": 32, "n_heads": 2, "n_blocks": 2, "cond_dim": 16, "length": 48}


def networks(vocab: int = VOCAB, seed: int = 0) -> tuple[Network, Network]:
    """Denoiser and discriminator of `SIZES`."""
    sizes = (SIZES["hidden_size"], SIZES["n_heads"], SIZES["n_blocks"], SIZES["cond_dim"], vocab)
    return Network(*sizes, judge=False, seed=seed), Network(*sizes, judge=True, seed=seed + 1)


def write_canvas(
    folder: Path,
    *,
    reward: bool = True,
    layout: str = "didi",
    tokenizer: bool = True,
    ends: bool = True,
    vocab: int = VOCAB,
    seed: int = 0,
    **changes: Any,
) -> tuple[Network, Network]:
    """A checkpoint as on the hub. layout: "didi", "didi-flat" or "mdlm". ends: name begin and end ids.

    changes: of `SIZES`, or of config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    student, judge = networks(vocab, seed)
    model = {**SIZES, "scale_by_sigma": True, "tie_word_embeddings": False}
    model |= {name: changes.pop(name) for name in list(changes) if name in model}
    algo = {"backbone": "dit", "parameterization": "subs", "time_conditioning": False, "causal_attention": False}
    algo |= {name: changes.pop(name) for name in list(changes) if name in algo}
    config: dict[str, Any] = {"vocab_size": vocab}
    if layout == "mdlm":
        names = {"hidden_size": "hidden_dim", "length": "model_length"}
        config |= {"model_type": "mdlm", "time_conditioning": algo["time_conditioning"]}
        config |= {names.get(name, name): model[name] for name in SIZES}
    elif layout == "didi":
        config |= {"config": {"model": model, "algo": algo}}
    else:
        config |= {"model": model, "algo": algo}
    if ends:
        config |= {"bos_token_id": END, "eos_token_id": END}
    (folder / "config.json").write_text(json.dumps(config | changes))
    prefix = "backbone." if layout == "mdlm" else ""
    state = {prefix + name: tensor.contiguous() for name, tensor in student.state_dict().items()}
    save_file(state | {f"{prefix}rotary_emb.inv_freq": torch.ones(8)}, str(folder / "model.safetensors"))
    if reward:
        state = {name: tensor.contiguous() for name, tensor in judge.state_dict().items()}
        save_file(state, str(folder / "discriminator.safetensors"))
    if tokenizer:
        write_tokenizer(folder)
    return student, judge


def write_tokenizer(folder: Path) -> None:
    """GPT-2's kind: bytes, and <|endoftext|> as the last id; the mask is not in it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|endoftext|>", normalized=False, special=True)])
    assert backend.token_to_id("<|endoftext|>") == END
    backend.save(str(folder / "tokenizer.json"))
