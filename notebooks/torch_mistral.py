"""Mistral in PyTorch, on any device: the third voice of the notebooks.

What the reference's `one_file_ref.py` computes, but for two things: nothing is moved to a
GPU, and the window is `sliding_window` keys in prefill as in decoding, as in Mistral's
production code and in transformers. The tests hold it to transformers.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    turned = pairs * angles[:, None, :]
    return torch.view_as_real(turned).reshape(x.shape).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.n_heads, self.n_kv_heads = config["n_heads"], config["n_kv_heads"]
        self.head_dim, self.window = config["head_dim"], config["sliding_window"]
        dim, head_dim = config["dim"], config["head_dim"]
        self.wq = nn.Linear(dim, self.n_heads * head_dim, bias=False)
        self.wk = nn.Linear(dim, self.n_kv_heads * head_dim, bias=False)
        self.wv = nn.Linear(dim, self.n_kv_heads * head_dim, bias=False)
        self.wo = nn.Linear(self.n_heads * head_dim, dim, bias=False)

    def forward(self, x, positions, angles, cache=None):
        batch, seq, _ = x.shape
        queries = self.wq(x).view(batch, seq, self.n_heads, self.head_dim)
        keys = self.wk(x).view(batch, seq, self.n_kv_heads, self.head_dim)
        values = self.wv(x).view(batch, seq, self.n_kv_heads, self.head_dim)
        queries, keys = rotate(queries, angles), rotate(keys, angles)
        if cache is not None:
            last = positions[-self.window :]
            cache[0][:, last % self.window] = keys[:, -self.window :]
            cache[1][:, last % self.window] = values[:, -self.window :]
        if cache is not None and seq == 1:
            keys, values = cache
            visible = torch.arange(self.window)[None, :] <= positions[:, None]
        else:
            distance = positions[:, None] - positions[None, :]
            visible = (distance >= 0) & (distance < self.window)
        groups = self.n_heads // self.n_kv_heads
        keys = keys.repeat_interleave(groups, dim=2)
        values = values.repeat_interleave(groups, dim=2)
        scores = torch.einsum("bthd,bshd->bhts", queries, keys) * self.head_dim**-0.5
        scores = scores.float().masked_fill(~visible, float("-inf"))
        weights = scores.softmax(dim=-1).to(x.dtype)
        out = torch.einsum("bhts,bshd->bthd", weights, values)
        return self.wo(out.reshape(batch, seq, -1))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.float()
        mean_square = x32.pow(2).mean(-1, keepdim=True)
        normalised = x32 * torch.rsqrt(mean_square + self.eps)
        return normalised.to(x.dtype) * self.weight


class TransformerBlock(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config["dim"], config["hidden_dim"])
        self.attention_norm = RMSNorm(config["dim"], config["norm_eps"])
        self.ffn_norm = RMSNorm(config["dim"], config["norm_eps"])

    def forward(self, x, positions, angles, cache=None):
        x = x + self.attention(self.attention_norm(x), positions, angles, cache)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config["vocab_size"], config["dim"])
        self.layers = nn.ModuleList(
            TransformerBlock(config) for _ in range(config["n_layers"])
        )
        self.norm = RMSNorm(config["dim"], config["norm_eps"])
        self.output = nn.Linear(config["dim"], config["vocab_size"], bias=False)

    def empty_cache(self, batch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        config = self.config
        slots = config["sliding_window"]
        shape = (batch, slots, config["n_kv_heads"], config["head_dim"])
        dtype = self.output.weight.dtype
        return [
            (torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))
            for _ in self.layers
        ]

    def forward(self, tokens: torch.Tensor, start: int = 0, cache=None) -> torch.Tensor:
        """Logits `[batch, seq, vocab]` of what follows each token. `start` tokens came
        before; the cache is written in place."""
        positions = torch.arange(start, start + tokens.shape[1])
        head_dim, theta = self.config["head_dim"], self.config["rope_theta"]
        frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
        angles = torch.outer(positions.float(), frequencies)
        angles = torch.polar(torch.ones_like(angles), angles)
        x = self.tok_embeddings(tokens)
        for i, layer in enumerate(self.layers):
            x = layer(x, positions, angles, None if cache is None else cache[i])
        return self.output(self.norm(x)).float()


def load(folder: Path, dtype: str = "float32") -> Transformer:
    """A model with the weights of a folder in Mistral's format."""
    with torch.device("meta"):
        model = Transformer(json.loads((folder / "params.json").read_text()))
    weights = load_file(folder / "consolidated.safetensors")
    weights = {name: w.to(getattr(torch, dtype)) for name, w in weights.items()}
    model.load_state_dict(weights, assign=True)
    return model.eval()


def greedy(model: Transformer, prompts: list[list[int]], n_tokens: int) -> list[list[int]]:
    """The most probable continuations of prompts of one length."""
    cache = model.empty_cache(len(prompts))
    with torch.no_grad():
        logits = model(torch.tensor(prompts), 0, cache)
        made = [logits[:, -1].argmax(-1)]
        for step in range(n_tokens - 1):
            logits = model(made[-1][:, None], len(prompts[0]) + step, cache)
            made.append(logits[:, -1].argmax(-1))
    return torch.stack(made, dim=1).tolist()
