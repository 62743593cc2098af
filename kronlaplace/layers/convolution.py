"""Convolutions: the output pixels are the positions, and the input patches are ``a``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kronlaplace.layers.base import Layer, Sums

__all__ = ["ConvolutionLayer"]

_SMALL = 2**16
"""Size, in numbers, that a temporary may always have, however small the layer."""

_CHUNK = 2**18
"""Size, in numbers, that a chunk of image columns may always have: smaller ones make too many small products."""

_COPY = 60
"""Cost of copying one number into a matrix of patches, in multiplications."""


class ConvolutionLayer(Layer):
    """`nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`, with stride, every padding mode, dilation and groups.

    ``p = C_in/groups · k_h · k_w`` (+ 1 with a bias), and the groups of the convolution are the groups of rows of ``W̄``.
    """

    shares_weights_over_space: ClassVar[bool] = True

    def __init__(
        self,
        name: str,
        module: nn.Module,
        weight: Mapping[str, nn.Parameter],
        bias: Mapping[str, nn.Parameter],
        tied_modules: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__(name, module, {**weight, **bias}, tied_modules)
        self.bias = bool(bias)

    @property
    def shape(self) -> tuple[int, int]:
        return self.module.out_channels, self.module.weight[0].numel() + self.bias

    @property
    def groups(self) -> int:
        return cast(int, self.module.groups)

    @property
    def _n_dims(self) -> int:
        return len(self.module.kernel_size)

    def assemble(self, values: Mapping[str, Tensor]) -> Tensor:
        return torch.cat(
            [
                values[name].flatten(1) if i == 0 else values[name].unsqueeze(1)
                for i, name in enumerate(self.parameters)
            ],
            dim=1,
        )

    def split_directions(self, matrices: Tensor) -> dict[str, Tensor]:
        shape = self.module.weight.shape[1:]
        if not self.bias:
            return {self.parameter_names[0]: matrices.unflatten(-1, shape)}
        weight_name, bias_name = self.parameter_names
        return {weight_name: matrices[..., :-1].unflatten(-1, shape), bias_name: matrices[..., -1]}

    def input_shape(self) -> str:
        size = ", ".join(("depth", "height", "width")[-self._n_dims :])
        return f"(examples, {self.module.in_channels}, {size})"

    def is_input(self, x: Tensor) -> bool:
        return x.ndim == self._n_dims + 2

    def positions(self, x: Tensor, grad: Tensor) -> int | Tensor:
        return grad[0, 0].numel()

    def input_positions(self, x: Tensor) -> int:
        return math.prod(self._output_size(self.padded_size(x.shape[2:])))

    def activations(self, x: Tensor) -> Tensor:
        view = self.windows(self.padded(x))  # (N, C, *kernel, *out)
        dims = self._n_dims
        n, channels = view.shape[:2]
        kernel, out = view.shape[2 : 2 + dims], view.shape[2 + dims :]
        groups = self.groups
        p = self.shape[1]
        a = torch.empty(groups, n, math.prod(out), p, dtype=self.dtype, device=x.device)
        target = a[..., : p - self.bias].unflatten(-1, (channels // groups, *kernel)).unflatten(2, out)
        source = view.unflatten(1, (groups, channels // groups))
        # (N, K, C/K, *kernel, *out) -> (K, N, *out, C/K, *kernel)
        order = [1, 0, *range(3 + dims, 3 + 2 * dims), *range(2, 3 + dims)]
        target.copy_(source.permute(order))
        if self.bias:
            a[..., -1] = 1
        return a

    def gradients(self, grad: Tensor) -> Tensor:
        return grad.flatten(2).unflatten(1, (self.groups, -1)).permute(1, 0, 3, 2).to(self.dtype)

    def project(self, x: Tensor, basis: Tensor) -> Tensor:
        kernels = basis.mT.to(self.dtype)  # (K, k, p)
        weight = kernels[..., : self.shape[1] - self.bias].flatten(0, 1).unflatten(-1, self.module.weight.shape[1:])
        offset = kernels[..., -1].flatten() if self.bias else None
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self._n_dims - 1]
        out = convolve(
            self.padded(x).to(self.dtype), weight, offset, self.module.stride, 0, self.module.dilation, self.groups
        )
        return out.flatten(2).unflatten(1, (self.groups, -1)).permute(1, 0, 3, 2)

    @property
    def _unfolds_rows_only(self) -> bool:
        """Whether `weight_gradients` can avoid forming whole patches."""
        return (
            self._n_dims == 2 and self.groups == 1 and self.module.stride[0] == 1 and self.module.kernel_size != (1, 1)
        )

    def temporaries(self, x: Tensor, grad: Tensor, activations: bool) -> int:
        q, p = self.shape
        if activations or not self._unfolds_rows_only or grad[0, 0].numel() <= q:  # few positions: use patches anyway
            return super().temporaries(x, grad, activations)
        height = self.padded_size(x.shape[2:])[0]
        return len(x) * (x.shape[1] * self.module.kernel_size[1] * height * grad.shape[3] + q * p)

    def weight_gradients(self, x: Tensor, grad: Tensor) -> Tensor:
        stride, dilation, kernel = self.module.stride, self.module.dilation, self.module.kernel_size
        if not self._unfolds_rows_only:
            return self.gradients(grad).mT @ self.activations(x)
        # Unfolding only along rows makes k_w copies of the input instead of k_h·k_w, and each kernel row sees a contiguous
        # part of them. The summed axis is last in both operands, which is faster and avoids most copies.
        padded = self.padded(x).to(self.dtype)
        n, channels, height, _ = padded.shape
        rows, columns = grad.shape[2:]
        windows = padded.unfold(3, dilation[1] * (kernel[1] - 1) + 1, stride[1])[..., :: dilation[1]]
        unfolded = windows.permute(0, 1, 4, 2, 3).reshape(n, channels * kernel[1], height * columns)
        g = grad.flatten(2).to(self.dtype)
        q, p = self.shape
        result = torch.empty(n, q, p, dtype=self.dtype, device=x.device)
        taps = result[..., : p - self.bias].unflatten(2, (channels, *kernel))
        for i in range(kernel[0]):
            seen = unfolded[..., i * dilation[0] * columns : (i * dilation[0] + rows) * columns]
            taps[:, :, :, i] = torch.bmm(g, seen.mT).unflatten(2, (channels, kernel[1]))
        if self.bias:
            result[..., -1] = g.sum(2)
        return result.unsqueeze(0)

    def add_gradient_moment(self, grad: Tensor, out: Tensor, positions: int | Tensor) -> None:
        assert isinstance(positions, int)
        n = len(grad)
        g = grad.flatten(2).unflatten(1, (self.groups, -1)).to(out.dtype)  # (n, K, q/K, T)
        if g.shape[2] <= g.shape[3]:  # per-example products take no more memory than the gradient, and no copy of it
            out.add_((g @ g.mT).sum(0), alpha=1 / positions)
            return
        # One matrix product of shape (q, n·T) covers many examples; an eighth of the batch at a time keeps the copy small.
        for part in grad.flatten(2).split(max(1, n // 8)):
            g = part.transpose(0, 1).reshape(self.groups, -1, len(part) * part.shape[2]).to(out.dtype)
            out.baddbmm_(g, g.mT, alpha=1 / positions)

    def add_activation_moment(self, x: Tensor, sums: Sums) -> None:
        if self._rows_pay(x):
            self._add_row_moments(x, sums)
            return
        if self._columns_pay():
            self._add_column_moments(x, sums)
            return
        for patches in self._patches(x):
            self.sum_of(sums, "activation").baddbmm_(patches, patches.mT)

    def activation_moment(self, sums: Sums) -> Tensor:
        p = self.shape[1]
        total = sums.pop("activation", None)
        for size in [key.removeprefix("rows ") for key in sums if key.startswith("rows ")]:
            parts = (sums.pop(f"{key} {size}") for key in ("rows", "pixels", "count"))
            moment = self._from_row_moments(tuple(map(int, size.split("x"))), *parts)
            total = moment if total is None else total + moment
        assert total is not None and total.shape[-1] == p
        return total

    # The second moment of patches depends only on the second moments of pairs of pixels that one kernel window can see.
    # Summing those over examples alone, pixel by pixel, takes a handful of matrix products over the batch axis: on small
    # images, k_w·k_h times fewer multiplications than with patches, and no patches are formed. Which pair belongs to which
    # window is resolved once, at the end.

    def _rows_pay(self, x: Tensor) -> bool:
        """Return whether second moments of image rows cost less than patches and take no more memory than the input."""
        if self._n_dims != 2 or self.groups > 1 or self.module.padding_mode != "zeros":
            return False
        _, channels, height, width = x.shape
        pairs = height * self._reach(height)
        p = self.shape[1]
        out = self._output_size(self.padded_size((height, width)))
        by_rows = pairs * (channels * width) ** 2
        by_patches = math.prod(out) * p * (p + _COPY)
        return by_rows < by_patches and pairs * (channels * width) ** 2 <= 4 * max(x.numel(), _SMALL)

    def _add_row_moments(self, x: Tensor, sums: Sums) -> None:
        n, channels, height, width = x.shape
        size = f"{channels}x{height}x{width}"
        rows = x.permute(2, 0, 1, 3).reshape(height, n, channels * width).to(self.dtype)
        reach, dilation = self._reach(height), self.module.dilation[0]
        key = f"rows {size}"
        if key not in sums:
            sums[key] = rows.new_zeros(reach, height, channels * width, channels * width)
            sums[f"pixels {size}"] = rows.new_zeros(height, channels * width)
            sums[f"count {size}"] = rows.new_zeros(())
        moments = sums[key]
        for gap in range(reach):  # rows i and i + gap·dilation share a window, gap taps apart
            count = height - gap * dilation
            moments[gap, :count].baddbmm_(rows[:count].mT, rows[gap * dilation :])
        sums[f"pixels {size}"] += rows.sum(1)
        sums[f"count {size}"] += n

    def _reach(self, height: int) -> int:
        """Return one more than the largest distance, in taps, between two image rows within one window."""
        return min(self.module.kernel_size[0], (height - 1) // self.module.dilation[0] + 1)

    def _from_row_moments(self, size: tuple[int, ...], moments: Tensor, pixels: Tensor, count: Tensor) -> Tensor:
        """Sum pixel moments over the windows: ``A[(c,δ), (c',δ')] = Σ_t M[(c, t+δ), (c', t+δ')]``."""
        channels, height, width = size
        (k_h, k_w), (d_h, d_w), (s_h, s_w) = self.module.kernel_size, self.module.dilation, self.module.stride
        (top, _), (left, _) = self._padding()
        out_h, out_w = self._output_size(self.padded_size((height, width)))
        p = self.shape[1]
        total = moments.new_zeros(p, p)
        full = moments.new_zeros(channels, k_h, k_w, channels, k_h, k_w)
        by_row = moments.unflatten(3, (channels, width)).unflatten(2, (channels, width))  # (reach, H, C, W, C, W)
        # Padded columns are zero and contribute nothing, so a window's columns are clipped to the image, tap by tap.
        for i in range(k_h):
            for j in range(i, k_h):
                # The output rows t whose taps i and j both fall inside the image.
                first = max(0, -(-(top - i * d_h) // s_h))
                last = min(out_h - 1, (height - 1 + top - j * d_h) // s_h)
                if j - i >= len(by_row) or first > last:
                    continue
                start = first * s_h + i * d_h - top
                block = by_row[j - i, start : start + (last - first) * s_h + 1 : s_h].sum(0)  # (C, W, C, W)
                padded = F.pad(block, (left, left + d_w * k_w + s_w, 0, 0, left, left + d_w * k_w + s_w))
                # A diagonal through both column axes: column t·s_w + u·d_w against t·s_w + v·d_w, summed over t.
                s = padded.stride()
                view = padded.as_strided(
                    (channels, k_w, channels, k_w, out_w),
                    (s[0], d_w * s[1], s[2], d_w * s[3], s_w * (s[1] + s[3])),
                )
                taps = view.sum(-1)
                full[:, i, :, :, j] = taps
                full[:, j, :, :, i] = taps.permute(2, 3, 0, 1)
        flat = p - self.bias
        total[:flat, :flat] = full.reshape(flat, flat)
        if self.bias:
            image = F.pad(
                pixels.unflatten(1, (channels, width)).transpose(0, 1),
                [w for pair in reversed(self._padding()) for w in pair],
            )
            sums = self.windows(image.unsqueeze(0)).flatten(4).sum(-1).flatten()
            total[:flat, -1] = sums
            total[-1, :flat] = sums
            total[-1, -1] = count * (out_h * out_w)
        return total.unsqueeze(0)

    # Except at the image's border, only the distance between two kernel columns matters. So patches are unfolded only along
    # image columns, with k_h copies instead of k_h·k_w, and one matrix product per distance replaces one per pair of kernel
    # columns; the border adds a few thin products.

    def _columns_pay(self) -> bool:
        """Return whether moments by distance between kernel columns cost less than patches."""
        if self._n_dims != 2 or self.groups > 1 or self.module.stride[1] > 1:
            return False
        height, width = self.module.kernel_size
        return width > 1 and self.module.in_channels * height >= 16

    def _add_column_moments(self, x: Tensor, sums: Sums) -> None:
        height, width = self.module.kernel_size
        dilation = self.module.dilation[1]
        p, rows = self.shape[1], self.module.in_channels * height
        total = self.sum_of(sums, "activation")[0]
        flat = p - self.bias
        full = total.new_zeros(rows, width, rows, width)
        ones = total.new_zeros(rows, width)
        padded = self.padded(x)
        out_h, out_w = self._output_size(padded.shape[2:])
        copies = rows * padded.shape[3] * out_h
        for part in padded.split(max(1, max(x.numel(), _CHUNK) // copies)):
            windows = part.unfold(2, self.module.dilation[0] * (height - 1) + 1, self.module.stride[0])
            windows = windows[..., :: self.module.dilation[0]]  # (n, C, out_h, W, k_h)
            columns = torch.empty(rows, part.shape[3], len(part) * out_h, dtype=self.dtype, device=x.device)
            columns.view(-1, height, part.shape[3], len(part), out_h).copy_(windows.permute(1, 4, 3, 0, 2))

            def moment(start: int, stop: int, shift: int, columns: Tensor = columns) -> Tensor:
                """Return the second moment between columns ``start:stop`` and the columns ``shift`` to their right."""
                return columns[:, start:stop].flatten(1) @ columns[:, start + shift : stop + shift].flatten(1).T

            for gap in range(width):
                shift = gap * dilation
                last = (width - 1 - gap) * dilation  # the last kernel column's window starts here, the first one's at 0
                if last < out_w:
                    inside = moment(last, out_w, shift)
                for i in range(width - gap):
                    start = i * dilation
                    if last < out_w:
                        block = inside
                        if start < last:
                            block = block + moment(start, last, shift)
                        if start:
                            block = block + moment(out_w, out_w + start, shift)
                    else:
                        block = moment(start, start + out_w, shift)
                    full[:, i, :, i + gap] += block
                    if gap:
                        full[:, i + gap, :, i] += block.T
            if self.bias:
                by_column = columns.sum(2)
                for i in range(width):
                    ones[:, i] += by_column[:, i * dilation : i * dilation + out_w].sum(1)
        total[:flat, :flat] += full.reshape(flat, flat)
        if self.bias:
            total[:flat, -1] += ones.flatten()
            total[-1, :flat] += ones.flatten()
            total[-1, -1] += len(x) * out_h * out_w

    def _patches(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the transposed patches ``a``, shape ``(K, p, n·T)``, for a few examples at a time.

        This layout needs one copy and makes the second moment a single matrix product. The number of examples is chosen so
        that a matrix is no larger than the layer's input and output together; unfolding a whole batch would take ``k_h·k_w``
        times the memory of its input.
        """
        padded = self.padded(x)
        groups = self.groups
        out = self._output_size(padded.shape[2:])
        positions = math.prod(out)
        p = self.shape[1]
        n = len(x)
        budget = max(x.numel() + n * self.module.out_channels * positions, _SMALL)
        chunk = max(1, min(n, budget // (groups * p * positions)))
        for part in padded.split(chunk):
            view = self.windows(part)
            view = view.movedim(0, 1 + self._n_dims).unflatten(0, (groups, -1))  # (K, C/K, *kernel, n, *out)
            patches = torch.empty(groups, p, len(part) * positions, dtype=self.dtype, device=x.device)
            patches[:, : p - self.bias].view(view.shape).copy_(view)
            if self.bias:
                patches[:, -1] = 1
            yield patches

    def windows(self, padded: Tensor) -> Tensor:
        """Return all windows of a padded input, as a view of shape ``(N, C, *kernel, *out)``."""
        kernel, stride, dilation = self.module.kernel_size, self.module.stride, self.module.dilation
        out = self._output_size(padded.shape[2:])
        n_stride, c_stride, *strides = padded.stride()
        return padded.as_strided(
            (*padded.shape[:2], *kernel, *out),
            (
                n_stride,
                c_stride,
                *(st * d for st, d in zip(strides, dilation, strict=True)),
                *(st * s for st, s in zip(strides, stride, strict=True)),
            ),
            padded.storage_offset(),
        )

    def _output_size(self, padded_size: Sequence[int]) -> list[int]:
        module = self.module
        return [
            (length - d * (k - 1) - 1) // s + 1
            for length, k, s, d in zip(padded_size, module.kernel_size, module.stride, module.dilation, strict=True)
        ]

    def _padding(self) -> list[tuple[int, int]]:
        """Return the padding before and after, for each axis."""
        module = self.module
        if module.padding == "valid":
            return [(0, 0)] * self._n_dims
        if module.padding == "same":
            totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
            return [(total // 2, total - total // 2) for total in totals]
        return [(w, w) for w in module.padding]

    def padded_size(self, size: Sequence[int]) -> list[int]:
        """Return the spatial size of an input after padding."""
        return [length + sum(pair) for length, pair in zip(size, self._padding(), strict=True)]

    def padded(self, x: Tensor) -> Tensor:
        """Return the input with the layer's padding applied, so that the convolution itself needs none."""
        widths = self._padding()
        if not any(map(any, widths)):
            return x
        flat = [w for pair in reversed(widths) for w in pair]
        mode = self.module.padding_mode
        return F.pad(x, flat, mode="constant" if mode == "zeros" else mode)
