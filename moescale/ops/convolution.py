"""Causal convolution by FFT, within the documents of each sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moescale.ops.permute import permute, unpermute


def causal_convolution(u: Tensor, kernel: Tensor, restarts: Tensor | None = None) -> Tensor:
    """Convolve each channel with its kernels, as if each document were a sequence of its own.

    y_t = sum over s <= t, in the document of t, of kernel_(t-s) u_s, by FFT of at least twice a document's length.
    Documents of similar length are padded to one width and transformed together, so that time and memory grow with
    seq log(seq) whatever lengths there are. Products and sums are in at least float32.

    u: [batch, seq, channels]. kernel: [channels or 1, outputs, taps], taps at least the longest document.
    restarts: [batch, seq] bool, where a document begins; None if none begins behind the first position.
    Returns [batch, seq, channels, outputs] in the dtype of u.
    """
    batch, seq, channels = u.shape
    documents = None if restarts is None else _documents(restarts)
    if documents is None or len(documents[0]) == batch:  # each sequence is one document
        assert kernel.shape[-1] >= seq, "the kernel is shorter than a document"
        return _convolve(u, kernel)
    assert kernel.shape[-1] >= max(documents[1]), "the kernel is shorter than a document"
    rows = u.reshape(batch * seq, channels)
    token, row, sizes = _padded(*documents, batch * seq)
    token, row = token.to(u.device), row.to(u.device)
    padding = (token < 0).unsqueeze(1)
    token = token.clamp(min=0)
    padded = permute(rows, token, row).masked_fill(padding, 0)
    blocks = padded.split([count * width for count, width in sizes])
    outs = [_convolve(block.view(count, width, channels), kernel).flatten(0, 1)
            for block, (count, width) in zip(blocks, sizes, strict=True)]
    out = torch.cat(outs).flatten(1).masked_fill(padding, 0)
    return unpermute(out, None, token, row).view(batch, seq, channels, -1)


def causal_convolution_reference(u: Tensor, kernel: Tensor, restarts: Tensor | None = None) -> Tensor:
    """Compute the same as a sum over all earlier positions, by autograd alone."""
    seq = u.shape[1]
    dtype = torch.promote_types(u.dtype, torch.float32)
    age = torch.arange(seq, device=u.device).unsqueeze(1) - torch.arange(seq, device=u.device)
    seen = (age >= 0).unsqueeze(0)
    if restarts is not None:
        document = restarts.cumsum(1)
        seen = seen & (document.unsqueeze(2) == document.unsqueeze(1))
    taps = kernel.to(dtype)[..., age.clamp(0, kernel.shape[-1] - 1)]  # [channels, outputs, seq, seq]
    taps = taps.expand(u.shape[2], -1, -1, -1)
    return torch.einsum("homs,bms,bsh->bmho", taps, seen.to(dtype), u.to(dtype)).to(u.dtype)


def _convolve(u: Tensor, kernel: Tensor) -> Tensor:
    """Convolve whole rows. u: [rows, width, channels]. Returns [rows, width, channels, outputs]."""
    width = u.shape[1]
    dtype = torch.promote_types(u.dtype, torch.float32)
    out = _ByFft.apply(u.to(dtype).transpose(1, 2), kernel.to(dtype)[..., :width])
    return out.permute(0, 3, 1, 2).to(u.dtype)


class _ByFft(torch.autograd.Function):
    """Convolve by real transforms, in backward too, where autograd would make complex ones of all frequencies.

    signal: [rows, channels, width]. kernel: [channels or 1, outputs, taps]. Returns [rows, channels, outputs, width].
    """

    @staticmethod
    def forward(ctx: Any, signal: Tensor, kernel: Tensor) -> Tensor:
        width = signal.shape[-1]
        ctx.size, ctx.width, ctx.kernel_shape = 2 * fast_length(width), width, kernel.shape
        spectrum = _transform(signal, ctx.size).unsqueeze(2)
        response = torch.fft.rfft(kernel, n=ctx.size)
        ctx.save_for_backward(spectrum, response)
        return torch.fft.irfft(spectrum * response, n=ctx.size)[..., :width]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        # A product's gradient is the product with the other factor's conjugate: sums over later positions.
        spectrum, response = ctx.saved_tensors
        above = _transform(grad, ctx.size)
        grad_signal = grad_kernel = None
        if ctx.needs_input_grad[0]:
            products = (above * response.conj()).sum(2)
            grad_signal = torch.fft.irfft(products, n=ctx.size)[..., : ctx.width]
        if ctx.needs_input_grad[1]:
            products = (above.conj_physical_() * spectrum).sum(0).conj()
            products = products.sum_to_size(*ctx.kernel_shape[:2], products.shape[-1])  # one kernel may serve them all
            grad_kernel = torch.fft.irfft(products, n=ctx.size)[..., : ctx.kernel_shape[-1]]
        return grad_signal, grad_kernel


def _transform(x: Tensor, size: int) -> Tensor:
    """Transform the last dim with zeros behind it, which are the only ones that are written."""
    padded = x.new_empty(*x.shape[:-1], size)
    padded[..., : x.shape[-1]], padded[..., x.shape[-1] :] = x, 0
    return torch.fft.rfft(padded)


def fast_length(length: int) -> int:
    """Round up to 2^n or 3 * 2^n, of which transforms are fast."""
    power = 1 << max(length - 1, 0).bit_length()
    return power * 3 // 4 if length <= power * 3 // 4 and power >= 4 else power


def _documents(restarts: Tensor) -> tuple[list[int], list[int]]:
    """List where documents begin among all positions of the batch, and how long they are."""
    begins = restarts.clone()
    begins[:, 0] = True
    first: list[int] = begins.flatten().nonzero().flatten().tolist()
    ends = [*first[1:], restarts.numel()]
    return first, [end - begin for begin, end in zip(first, ends, strict=True)]


def _padded(first: list[int], lengths: list[int], tokens: int) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Lay documents out in rows of few widths.

    Returns the token of each padded position (-1 = padding), the padded position of each token [tokens, 1], and how
    many rows of which width follow each other.
    """
    by_width: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        by_width.setdefault(fast_length(length), []).append(number)
    blocks, sizes = [], []
    for width, numbers in sorted(by_width.items()):
        begin = torch.tensor([first[number] for number in numbers]).unsqueeze(1)
        tokens_of_each = torch.tensor([lengths[number] for number in numbers]).unsqueeze(1)
        offset = torch.arange(width)
        blocks.append(torch.where(offset < tokens_of_each, begin + offset, -1).flatten())
        sizes.append((len(numbers), width))
    token = torch.cat(blocks)
    row = torch.empty(tokens, dtype=torch.int64)
    filled = (token >= 0).nonzero().flatten()
    row[token[filled]] = filled
    return token, row.unsqueeze(1), sizes
