"""Sweeps in bfloat16: convolutions of sweeps.py again, as products of short numbers.

Processors and GPUs that multiply bfloat16 matrices do it several times faster than float32, and
half as many bytes travel. Activations lie channels last, and every product that differs between
lanes is one batched product with the unfolded input, [l, b p, k]: k counts a kernel's places, then
channels. Sums over positions, distances and directions are float32. The layers know any type:
in float64 they are as exact as those of sweeps.py.

BatchNorm in eval mode after a convolution is part of it: y = s conv(x, W) + shift with
s = gamma r, so that a direction (vW, vgamma, vbeta) is one of the weights s W, s vW + r vgamma W,
and one of the shift, vbeta - r mean vgamma.

Where maps have few positions, the observed gradient of one undefended batch has as small a rank,
and its products are taken with two factors (Halko, Martinsson and Tropp 2011, algorithm 4.1).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsec import sweeps
from fedsec.models import BatchNorm2d
from fedsec.sweeps import Joining, Layer, Sweep, Unsupported

aten = torch.ops.aten
LAST = torch.channels_last
MORE = 8  # columns of a range finder beyond the rank that is expected


class Conv(Layer):
    """Convolution with one weight for all lanes, and BatchNorm in eval mode if it follows."""

    fresh = True

    def __init__(self, module: nn.Conv2d, name: str, dtype: torch.dtype):
        if module.groups != 1 or isinstance(module.padding, str) or module.padding_mode != "zeros":
            raise Unsupported(f"{name} has groups, or padding other than a number of zeros")
        if module.dilation != (1, 1):
            raise Unsupported(f"{name} is dilated")
        self.name, self.normed, self.dtype = name, "", dtype
        self.own = module.weight.detach()
        self.stride, self.padding, self.kernel = module.stride, module.padding, module.kernel_size
        self.offset = None if module.bias is None else module.bias.detach()
        self._use(self.own, self.offset)
        self.factors: tuple[Tensor, Tensor] | None = None  # of what was observed; see `_factored`
        self.full = torch.empty(0)  # where it has none

    def followed_by(self, norm: nn.BatchNorm2d, name: str) -> None:
        """Take BatchNorm in eval mode into the convolution. Raises Unsupported."""
        if norm.running_mean is None or norm.running_var is None or norm.weight is None:
            raise Unsupported(f"{name} has no running statistics, or no weights")
        self.normed = name
        self.r = (norm.running_var + norm.eps).rsqrt()
        self.s = norm.weight.detach() * self.r
        self.squares = self.s * self.s
        self.low_s, self.mean = self.s.to(self.dtype), norm.running_mean
        if self.offset is not None:
            self.mean = self.mean - self.offset
        self._use(self.own * self.s[:, None, None, None], norm.bias.detach() - self.mean * self.s)

    def _use(self, weight: Tensor, bias: Tensor | None) -> None:
        weight = weight.to(self.dtype)
        self.weight = weight.contiguous(memory_format=LAST)
        self.bias = None if bias is None else bias.to(self.dtype)
        self.flat = self.own.to(self.dtype).permute(0, 2, 3, 1).flatten(1)  # without the norm
        self.turned = None
        if self.stride == (1, 1):
            turned = weight.flip(2, 3).transpose(0, 1)
            self.turned = turned.contiguous(memory_format=LAST)
            pairs = zip(self.kernel, self.padding, strict=True)
            self.reach = tuple(k - 1 - p for k, p in pairs)

    # ---- maps and columns

    def columns(self, s: Sweep, x: Tensor, stride: tuple, padding: tuple) -> Tensor:
        """[b l, c, ...] -> [l, b p, k]"""
        (down, across), (top, left), (high, wide) = stride, padding, self.kernel
        x = x.permute(0, 2, 3, 1)
        if top or left:
            x = F.pad(x, (0, 0, left, left, top, top))
        x = x.unfold(1, high, down).unfold(2, wide, across)
        x = x.unflatten(0, (s.b, s.l)).permute(1, 0, 2, 3, 5, 6, 4)
        return x.reshape(s.l, s.b * x.shape[2] * x.shape[3], -1)

    def folded(self, s: Sweep, columns: Tensor) -> Tensor:
        """The adjoint of `columns` of the input."""
        (down, across), (top, left), (high, wide) = self.stride, self.padding, self.kernel
        _, channels, height, width = self.shape
        y, x = self.size
        columns = columns.view(s.l, s.b, y, x, high, wide, channels).transpose(0, 1).flatten(0, 1)
        out = columns.new_zeros(len(columns), height + 2 * top, width + 2 * left, channels)
        for i in range(high):
            for j in range(wide):
                to = out[:, i : i + down * y : down, j : j + across * x : across]
                to += columns[:, :, :, i, j]
        return out[:, top : top + height, left : left + width].permute(0, 3, 1, 2)

    def rows(self, s: Sweep, x: Tensor) -> Tensor:
        """[b l, c, ...] -> [l, b p, c]"""
        x = x.unflatten(0, (s.b, s.l)).permute(1, 0, 3, 4, 2)
        return x.reshape(s.l, -1, x.shape[-1])

    def maps(self, s: Sweep, rows: Tensor, size: torch.Size) -> Tensor:
        """The inverse of `rows`."""
        x = rows.view(s.l, s.b, *size, -1).transpose(0, 1)
        return x.reshape(s.b * s.l, *size, -1).permute(0, 3, 1, 2)

    def conv(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x, self.weight, bias, self.stride, self.padding)

    def back(self, G: Tensor) -> Tensor:
        if self.turned is not None:
            return F.conv2d(G, self.turned, None, 1, self.reach)
        like = G.new_empty(()).expand(self.shape)
        how = (list(self.stride), list(self.padding), [1, 1], False, [0, 0], 1)
        only = [True, False, False]
        back = aten.convolution_backward(G, like, self.weight, None, *how, only)[0]
        return back.contiguous(memory_format=LAST)

    # ---- the four sweeps

    def forward(self, s, x):
        self.shape = x.shape
        x = x.to(self.dtype, memory_format=LAST)
        edges = zip(x.shape[2:], self.kernel, self.stride, self.padding, strict=True)
        self.size = torch.Size((n + 2 * p - k) // t + 1 for n, k, t, p in edges)
        self.U = self.columns(s, x, self.stride, self.padding)
        out, fan = self.flat.shape
        self.gram = s.grams and self.U.shape[1] * (out + fan) * 2.5 < out * fan
        if not self.gram:
            return self.conv(x, self.bias)
        self.z = F.linear(self.U, self.flat)
        y = self.z * self.low_s if self.normed else self.z
        return self.maps(s, y if self.bias is None else y + self.bias, self.size)

    def backward(self, s, G):
        D = self.rows(s, G)
        total = D.sum(1, dtype=s.wide)
        if self.gram:
            along = (D * self.z).sum(1, dtype=s.wide) if self.normed else None
            self.G, self.D = D, D * self.low_s if self.normed else D
            self._grams(s)
        else:
            self.G, self.g = G, D.mT @ self.U
            along = (self.g * self.flat).sum(2, dtype=s.wide) if self.normed else None
            self._told(s)
        if along is not None:
            s.g[self.normed + ".weight"] = self.r * (along - self.mean * total)
            s.g[self.normed + ".bias"] = total
        if self.offset is not None:
            s.g[self.name + ".bias"] = total * self.s if self.normed else total
        if not self.wanted:
            return None
        return self.folded(s, self.D @ self.flat) if self.gram else self.back(G)

    def tangent(self, s, t):
        shift = s.v[self.name + ".bias"] if self.offset is not None else None
        if self.normed:
            self.k = self.r * s.v[self.normed + ".weight"]  # [l, out]
            moved = s.v[self.normed + ".bias"] - self.k * self.mean
            shift = moved if shift is None else moved + self.s * shift
        shift = None if shift is None else shift[:, None].to(self.dtype)
        if self.gram:
            y = self._gram_tangent(s, t)
            if self.normed:
                y = (y * self.low_s).addcmul_(self.z, self.k[:, None].to(self.dtype))
            return self.maps(s, y if shift is None else y.add_(shift), self.size)
        self.v, U = self._direction(s), self.U
        y = U @ self.v.mT if shift is None else torch.baddbmm(shift, U, self.v.mT)
        y = self.maps(s, y, self.size)
        return y if t is None else y.add_(self.conv(t))

    def adjoint(self, s, A):
        if self.gram:
            rows = self.rows(s, A)
            if self.normed:
                rows = (rows * self.low_s).addcmul_(self.G, self.k[:, None].to(self.dtype))
            return self._gram_adjoint(s, rows)
        if self.turned is None:
            return self.back(A).add_(self.folded(s, self.rows(s, self.G) @ self.v))
        v = self.v.view(s.l, -1, *self.kernel, self.shape[1]).flip(2, 3)
        v = v.permute(0, 2, 3, 1, 4).flatten(1, 3)  # [l, places and outputs, c]
        direct = self.columns(s, self.G, (1, 1), self.reach) @ v
        return self.back(A).add_(self.maps(s, direct, self.shape[2:]))

    # ---- otherwise: the gradient [l, out, k] is that of the weights s W

    def _told(self, s):
        """The gradient's inner products; or itself, where they are not enough."""
        if not s.grams:
            g = self.g.to(s.wide).view(s.l, -1, *self.kernel, self.shape[1]).permute(0, 1, 4, 2, 3)
            s.g[self.name + ".weight"] = g * self.s[:, None, None, None] if self.normed else g
            return
        if not len(self.full):
            observed = s.observed[self.name + ".weight"]
            self.full = observed.permute(0, 1, 3, 4, 2).flatten(2).to(self.dtype)
        dot = (self.g * self._seen(s)).sum(2, dtype=s.wide)
        norm = (self.g * self.g).sum(2, dtype=s.wide)
        if self.normed:
            dot, norm = dot * self.s, norm * self.squares
        s.dot, s.norm = s.dot + dot.sum(1), s.norm + norm.sum(1)

    def _seen(self, s) -> Tensor:
        """What each lane's victim sent, [l or 1, out, k]"""
        if s.victims[0] == s.victims[-1]:
            return self.full[s.victims[:1]]
        return self.full if s.victims == list(range(len(self.full))) else self.full[s.told]

    def _direction(self, s):
        """Of the weights s W, [l, out, k]"""
        if s.grams:
            own, observed = s.a[:, None], s.o[:, None]
            if self.normed:
                own, observed = own * self.squares, observed * self.s
            v = self.g.mul_(own[..., None].to(self.dtype))
            v.addcmul_(self._seen(s), observed[..., None].to(self.dtype))
        else:
            v = s.v[self.name + ".weight"].permute(0, 1, 3, 4, 2).flatten(2)
            v = (v * self.s[:, None] if self.normed else v).to(self.dtype)
        return v.addcmul_(self.flat, self.k[..., None].to(self.dtype)) if self.normed else v

    # ---- maps of few positions: the weight gradient is never formed

    def _grams(self, s):
        self.UU, self.DD = self.U @ self.U.mT, self.D @ self.D.mT  # [l, b p, b p]
        s.norm = s.norm + (self.UU.to(s.wide) * self.DD).sum((1, 2))
        self.along = self._observed(s, self.U)
        s.dot = s.dot + (self.along.to(s.wide) * self.D).sum((1, 2))

    def _gram_tangent(self, s, t):
        y = (self.UU @ self.D) * s.a[:, None, None].to(self.dtype)
        y.addcmul_(self.along, s.o[:, None, None].to(self.dtype))
        if t is None:
            return y
        return y.add_(F.linear(self.columns(s, t, self.stride, self.padding), self.flat))

    def _gram_adjoint(self, s, rows):
        columns = rows @ self.flat
        columns.addcmul_(self.DD @ self.U, s.a[:, None, None].to(self.dtype))
        observed = self._observed(s, self.D, back=True)
        return self.folded(s, columns.addcmul_(observed, s.o[:, None, None].to(self.dtype)))

    def _observed(self, s, rows: Tensor, back: bool = False) -> Tensor:
        """Inputs [l, b p, k] -> outputs by each lane's observed gradient; or `back`."""
        if self.factors is None and not len(self.full):
            self._factored(s.observed[self.name + ".weight"], rows.shape[1])
        if self.factors is not None:
            left, right = (f[s.told] for f in self.factors)  # [l, out, rank], [l, k, rank]
            return (rows @ left) @ right.mT if back else (rows @ right) @ left.mT
        parts = [rows[run] @ (self.full[v] if back else self.full[v].T) for v, run in s.runs()]
        return torch.cat(parts)

    def _factored(self, observed: Tensor, rank: int) -> None:
        """Look for two factors of each victim's gradient [v, out, c, ...] of that rank."""
        flat = observed.permute(0, 1, 3, 4, 2).flatten(2)
        draws = torch.Generator().manual_seed(0)
        probe = torch.randn(flat.shape[2], rank + MORE, generator=draws).to(flat)
        left = torch.linalg.qr(flat @ probe)[0]
        right = flat.mT @ left
        test = torch.randn(flat.shape[2], 1, generator=draws).to(flat)
        there = flat @ test
        missed = (there - left @ (right.mT @ test)).flatten(1).norm(dim=1)
        if bool((missed <= 1e-5 * there.flatten(1).norm(dim=1)).all()):
            self.factors = left.to(self.dtype), right.to(self.dtype)
        else:
            self.full = flat.to(self.dtype)


class Norm(Joining):
    """BatchNorm in eval mode, which a convolution takes in."""

    def __init__(self, module: nn.BatchNorm2d, name: str):
        if module.training:
            raise Unsupported(f"{name} has statistics of the batch")
        self.module, self.name = module, name

    def join(self, before):
        if not isinstance(before, Conv) or before.normed:
            raise Unsupported(f"{self.name} does not follow a convolution")
        before.followed_by(self.module, self.name)


class Linear(sweeps.Linear):
    """Fully connected, in the type of its weights: it is small."""

    def forward(self, s, x):
        self.dtype = x.dtype
        return super().forward(s, x.to(self.weight.dtype))

    def backward(self, s, G):
        out = super().backward(s, G.to(self.weight.dtype))
        return None if out is None else out.to(self.dtype)

    def tangent(self, s, t):
        return super().tangent(s, None if t is None else t.to(self.weight.dtype))

    def adjoint(self, s, A):
        return super().adjoint(s, A).to(self.dtype)


def kinds(dtype: torch.dtype) -> sweeps.Kinds:
    """The layers of a program whose convolutions are computed in that type."""
    return {
        nn.Conv2d: partial(Conv, dtype=dtype),
        nn.Linear: Linear,
        nn.BatchNorm2d: Norm,
        BatchNorm2d: Norm,
    }
