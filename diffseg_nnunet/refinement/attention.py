"""The cross transformer: discriminative and generative features exchange what they know, at the coarsest scale.

methods.md 3.3. Tokens are the voxels of the coarsest grid, in any grid: nothing here takes it to be square.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from diffseg_nnunet.refinement.binary import BinaryLinear, binary_activation
from diffseg_nnunet.refinement.blocks import FromTime, ShiftedPReLU, along_channels

_FFN_RATIO = 4
_POOL_SIZES = (3, 5)


class TokenMap(nn.Module):
    """A linear map of tokens and a layer norm: (B, N, in) -> (B, N, out).

    Binary: ``norm(binary linear(sign(x + b)))``, b a function of time, so that the thresholds are each time step's own.
    """

    def __init__(self, in_channels: int, out_channels: int, embedding_dim: int, binary: bool):
        super().__init__()
        self.bias = FromTime(embedding_dim, in_channels) if binary else None
        self.linear = (BinaryLinear if binary else nn.Linear)(in_channels, out_channels)
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, tokens: Tensor, embedding: Tensor) -> Tensor:
        if self.bias is not None:
            tokens = tokens + self.bias(embedding)[:, None]
        return self.norm(self.linear(tokens))


class CrossAttention(nn.Module):
    """``RPReLU(norm(attention(q, k, v)) + q + k + v)``: (B, N, C), (B, N, C) -> (B, N, C).

    Binary: q, k and v enter the attention by their signs. The map itself stays a softmax, where the paper's is cut at
    0.35 of each row's largest score: it is no weight, and only so it need never lie in memory as a whole.
    """

    def __init__(self, channels: int, heads: int, embedding_dim: int, binary: bool):
        super().__init__()
        self.heads, self.binary = heads, binary
        self.to_query, self.to_key, self.to_value = (
            TokenMap(channels, channels, embedding_dim, binary) for _ in range(3)
        )
        self.norm = nn.LayerNorm(channels)
        self.activation = ShiftedPReLU(channels, embedding_dim, axis=-1)

    def forward(self, queries: Tensor, context: Tensor, embedding: Tensor) -> Tensor:
        q, k, v = (
            project(tokens, embedding)
            for project, tokens in ((self.to_query, queries), (self.to_key, context), (self.to_value, context))
        )
        attended = functional.scaled_dot_product_attention(self._split(q), self._split(k), self._split(v))
        return self.activation(self.norm(attended.transpose(1, 2).flatten(2)) + q + k + v, embedding)

    def _split(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, heads, N, C / heads)."""
        tokens = binary_activation(tokens) if self.binary else tokens
        return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """Two token maps of ratio 4, an RPReLU after each (methods.md 3.3)."""

    def __init__(self, channels: int, embedding_dim: int, binary: bool):
        super().__init__()
        hidden = _FFN_RATIO * channels
        self.widen = TokenMap(channels, hidden, embedding_dim, binary)
        self.inner = ShiftedPReLU(hidden, embedding_dim, axis=-1)
        self.narrow = TokenMap(hidden, channels, embedding_dim, binary)
        self.outer = ShiftedPReLU(channels, embedding_dim, axis=-1)

    def forward(self, tokens: Tensor, embedding: Tensor) -> Tensor:
        hidden = self.inner(self.widen(tokens, embedding), embedding)
        return self.outer(self.narrow(hidden, embedding), embedding)


class DirectionalPools(nn.Module):
    """Means over 3 and over 5 voxels along each axis, each with its own time-dependent scale, summed; 0 at first.

    In 2D these are HiDiff's four branches (1×3, 3×1, 1×5, 5×1), in 3D six.
    """

    def __init__(self, channels: int, dimensions: int, embedding_dim: int):
        super().__init__()
        self.windows = [(axis, size) for size in _POOL_SIZES for axis in range(dimensions)]
        self.scales = FromTime(embedding_dim, len(self.windows) * channels)

    def forward(self, features: Tensor, embedding: Tensor) -> Tensor:
        scales = along_channels(self.scales(embedding), features.ndim - 2).chunk(len(self.windows), dim=1)
        return sum(
            scale * axis_means(features, axis, size) for scale, (axis, size) in zip(scales, self.windows, strict=True)
        )


def axis_means(features: Tensor, axis: int, size: int) -> Tensor:
    """Mean of each voxel and its neighbours along a spatial axis, `size` in all, fewer at the ends: same shape."""
    lines = features.movedim(2 + axis, -1)
    # padded by hand, since pooling refuses grids that are shorter than the window, as coarsest ones often are
    flat = functional.pad(lines.reshape(1, -1, lines.shape[-1]), (size // 2, size // 2))
    inside = functional.pad(flat.new_ones(1, 1, lines.shape[-1]), (size // 2, size // 2))
    means = functional.avg_pool1d(flat, size, 1) / functional.avg_pool1d(inside, size, 1)
    return means.reshape(lines.shape).movedim(-1, 2 + axis)


class Exchange(nn.Module):
    """One pass: a stream is updated by what another one asks of it. Its update is 0 at first.

    Queries come from the other stream, keys and values from the stream itself, to which the attention's output is
    added; then feed-forward and directional pools. Every addend passes a time-dependent scale.
    """

    def __init__(self, channels: int, dimensions: int, heads: int, embedding_dim: int, binary: bool):
        super().__init__()
        self.attention = CrossAttention(channels, heads, embedding_dim, binary)
        self.feed_forward = FeedForward(channels, embedding_dim, binary)
        self.pools = DirectionalPools(channels, dimensions, embedding_dim)
        self.scales = FromTime(embedding_dim, 2 * channels)

    def forward(self, stream: Tensor, other: Tensor, embedding: Tensor) -> Tensor:
        """(B, C, ...), (B, C, ...) -> (B, C, ...)."""
        attended, fed = self.scales(embedding)[:, None].chunk(2, dim=2)
        tokens, others = (features.flatten(2).transpose(1, 2) for features in (stream, other))
        tokens = tokens + attended * self.attention(others, tokens, embedding)
        pooled = self.pools(_map_of(tokens, stream), embedding)
        tokens = tokens + fed * self.feed_forward(tokens, embedding)
        return _map_of(tokens, stream) + pooled


def _map_of(tokens: Tensor, like: Tensor) -> Tensor:
    return tokens.transpose(1, 2).reshape(like.shape)


class CrossTransformer(nn.Module):
    """First the diffusion stream asks the segmentor's, then the segmentor's, so updated, asks the diffusion stream.

    Only the diffusion stream is returned; at first it is returned as it came.

    Args:
        channels: of both streams; a multiple of `heads`.
        dimensions: 2 or 3.
    """

    def __init__(self, channels: int, dimensions: int, heads: int, embedding_dim: int, binary: bool):
        super().__init__()
        self.to_segmentor, self.to_diffusion = (
            Exchange(channels, dimensions, heads, embedding_dim, binary) for _ in range(2)
        )

    def forward(self, diffusion: Tensor, segmentor: Tensor, embedding: Tensor) -> Tensor:
        """Both (B, C, ...) on one grid -> (B, C, ...)."""
        segmentor = self.to_segmentor(segmentor, diffusion, embedding)
        return self.to_diffusion(diffusion, segmentor, embedding)
