"""A decoder Transformer over bytes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

HEAD = 32  # width of an attention head


class Block(nn.Module):
    """A layer of a decoder: causal self-attention, then a perceptron."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention_in, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.attention_in(self.norm1(x)).unflatten(2, (3, -1, HEAD))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each: batch x heads x context x HEAD
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.dropout(self.attention_out(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class LanguageModel(nn.Module):
    """Maps bytes (batch x context) to logits of the byte that follows each (batch * context x 256)."""

    def __init__(self, layers: int, width: int, context: int, dropout: float = 0.0):
        super().__init__()
        self.bytes, self.positions = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(layers))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bytes(x) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x).flatten(0, 1))
