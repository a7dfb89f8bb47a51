"""The CTC Transformer of `fedasr.models.transformer` in PyTorch: as many parameters and frames."""

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    def __init__(self, dim: int, mlp: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.up = nn.Linear(dim, mlp, bias=False)
        self.down = nn.Linear(mlp, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(b, t, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        context = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(context.transpose(1, 2).reshape(b, t, d))
        return x + self.down(functional.relu(self.up(self.mlp_norm(x))))


class Recogniser(nn.Module):
    """Takes features [b, frames, 80], all of full length, to the CTC loss of labels [b, n]."""

    def __init__(self, dim: int, mlp: int, blocks: int, heads: int, vocab: int = 30) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.bias = nn.Parameter(torch.zeros(()))
        self.front_end = nn.Linear(7 * 80, 2 * dim)
        self.blocks = nn.ModuleList(Block(dim, mlp, heads) for _ in range(blocks))
        self.final_norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, vocab)
        self.dim = dim

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [b, ceil(frames / 3), vocab]."""
        mean = features.mean(dim=(1, 2), keepdim=True)
        std = features.std(dim=(1, 2), keepdim=True)
        x = (features - mean) / std * self.scale + self.bias
        x = functional.pad(x, (0, 0, 3, 3)).unfold(1, 7, 3).flatten(2)
        x = functional.glu(self.front_end(x))
        half = self.dim // 2
        turns = torch.exp(-torch.log(torch.tensor(1e4)) * torch.arange(half) / half)
        angles = 0.9 * torch.arange(x.shape[1])[:, None] * turns
        x = x + torch.cat([angles.sin(), angles.cos()], dim=-1)
        for block in self.blocks:
            x = block(x)
        return functional.log_softmax(self.output(self.final_norm(x)), dim=-1)

    def loss(
        self, features: torch.Tensor, labels: torch.Tensor, eval: bool = False
    ) -> torch.Tensor:
        """Mean CTC loss of the batch."""
        del eval
        scores = self(features).transpose(0, 1)
        frames = torch.full((scores.shape[1],), scores.shape[0], dtype=torch.int32)
        lengths = torch.full((scores.shape[1],), labels.shape[1], dtype=torch.int32)
        values = functional.ctc_loss(scores, labels, frames, lengths, reduction="none")
        return values.mean()

    def metrics(self, features: torch.Tensor, labels: torch.Tensor) -> dict:
        """pfl wants to have it."""
        del features, labels
        return {}
