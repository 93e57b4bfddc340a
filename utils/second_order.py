"""Second derivatives at the cost of what they need: the speed of LFR, apart from its mathematics.

`utils/lfr.py` states the method with plain ``torch.autograd.grad``. Run under :class:`Kernels`, the
same lines cost about half, and the numbers are the same. Nothing in a network has to change: the
mode sees its calls of convolution, ReLU and BatchNorm and gives them derivatives of their own.

Let z(x) be the logits, J their Jacobian, u = dL/dz and v the sign (or direction) of g = J^T u. Both
of LFR's second derivatives contain H v, H the Hessian of the loss in x. Where the network is
piecewise linear in x (ReLU, max-pooling, BatchNorm by given statistics) the curvature sits in the
loss alone and ``H v = J^T (diag(p) - p p^T) J v`` exactly (Gauss-Newton; Schraudolph 2002): four
passes, forward, J^T u, J v, J^T w. That is what double backward itself comes to once it is spared

- the gradients of the weights, in the search, where nobody wants them, and in the first of the two
  differentiations of the penalty;
- the second derivatives of ReLU and max-pooling, which PyTorch carries as tensors of zeros;
- BatchNorm by given statistics, which folds into the convolution before it;
- the second derivative of BatchNorm by its own batch, which PyTorch composes of some fifty passes
  over the activations and which comes to two and a few;
- the second derivative of a convolution by its weights, which PyTorch computes as a convolution
  with kernels as large as the image, and the layouts that its CPU kernels like less.

Smooth activations need no second path: autograd adds their second derivative by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from models.layers import conv_norm


class Geometry(NamedTuple):
    """How a convolution strides; what every one of its derivatives has to know."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


class Wanted:
    """Which gradients are asked for at the moment.

    All that the graph knows of the :class:`Kernels` that built it. If its nodes held those, which
    hold tensors of the graph, each step would leave a circle of references behind, and with it all
    its activations until Python's collector comes by: gigabytes.
    """

    def __init__(self) -> None:
        self.input_only = False


def _gradient_of_input(grad: Tensor, weight: Tensor, shape: torch.Size, geo: Geometry) -> Tensor:
    if geo.stride == geo.dilation == (1, 1) and geo.groups == 1 and grad.device.type == "cpu":
        if weight.shape[1] == 1 and weight[0].numel() <= 25:
            return _gradient_of_grey_input(grad, weight, geo)
        # As a convolution with the flipped kernel: oneDNN's forward kernels are never slower than
        # its backward ones, and three times faster on some shapes.
        rows, columns = weight.shape[2:]
        flipped = weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
        pad = (rows - 1 - geo.padding[0], columns - 1 - geo.padding[1])
        if min(pad) >= 0:
            return F.conv2d(grad, flipped, padding=pad)
    stride, padding, dilation, groups = geo
    # What the stride left over at the end of each side.
    over = [
        shape[2 + i]
        - ((grad.shape[2 + i] - 1) * stride[i] - 2 * padding[i])
        - (dilation[i] * (weight.shape[2 + i] - 1) + 1)
        for i in (0, 1)
    ]
    return F.conv_transpose2d(grad, weight, None, stride, padding, over, groups, dilation)


def _gradient_of_grey_input(grad: Tensor, weight: Tensor, geo: Geometry) -> Tensor:
    """The same for images of one channel, where a convolution would compute one row of a tile.

    One product gives what each output pixel sends to each pixel of its window; shifted sums
    collect it. Two to five times faster than oneDNN, in the layer of the largest images.
    """
    count, _, height, width = grad.shape
    rows, columns = weight.shape[2:]
    pixels = grad.permute(0, 2, 3, 1).reshape(-1, grad.shape[1])
    sent = (weight.flatten(1).t() @ pixels.t()).view(rows, columns, count, height, width)
    total = grad.new_zeros(count, 1, height + rows - 1, width + columns - 1)
    for i in range(rows):
        for j in range(columns):
            total[:, 0, i : i + height, j : j + width] += sent[i, j]
    (top, left), (bottom, right) = geo.padding, total.shape[2:]
    return total[:, :, top : bottom - top, left : right - left]


def _gradient_of_weight(x: Tensor, grad: Tensor, weight: Tensor, geo: Geometry) -> Tensor:
    stride, padding, dilation, groups = geo
    only_weight = (False, True, False)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, (0, 0), groups, only_weight
    )[1]


def _rectified(grad: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """grad where y > 0, else 0; in the place of ``out`` or in memory of its own."""
    if out is None:
        return torch.ops.aten.threshold_backward(grad, y, 0)
    return torch.ops.aten.threshold_backward.grad_input(grad, y, 0, grad_input=out)


# ReLU's mask is a pass through memory over two images into a third, and takes a sixth of a step
# where each is made by itself. So a convolution's derivatives look at the node that takes their
# product next. If that node masks what it gets (the mask is the last tensor that it saved), and
# gets it from nobody else (``ctx.readers``: how many read what the node gave, as far as is known),
# they do so in place, while the product is new and theirs, and leave it there as ``masked``. A node
# that then receives this very tensor passes it on. If it receives another one after all, a sum with
# what came from elsewhere, it masks that as ever: to mask a part of it twice is to mask it once.


def _count_reader(value: Any) -> None:
    node = value.grad_fn if isinstance(value, Tensor) else None
    if hasattr(node, "readers"):
        node.readers += 1


def _mask_of(node: Any) -> Tensor | None:
    return node.saved_tensors[-1] if getattr(node, "readers", 0) == 1 else None


def _is_masked(ctx: Any, grad: Tensor) -> bool:
    """Whether ``grad`` came masked. The reference is given up, lest the graph hold itself."""
    masked, ctx.masked = ctx.masked, None
    return grad is masked


# A convolution is bilinear in (x, weight), so <conv(x, weight), grad> is trilinear and each of its
# derivatives is again one of the three functions below, with arguments swapped. That closes the
# family under differentiation to any order. ``mask`` is that of the node which takes the product.


class _Convolution(Function):
    """(x, weight) -> conv(x, weight)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geo: Geometry,
        wanted: Wanted,
        mask: Tensor | None = None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mask)
        ctx.geo, ctx.wanted, ctx.readers, ctx.masked = geo, wanted, int(mask is not None), None
        product = torch.conv2d(x, weight, bias, *geo)
        return product if mask is None else _rectified(product, mask, out=product)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        if ctx.wanted.input_only:
            need_weight = need_bias = False
        if mask is not None and not _is_masked(ctx, grad):
            grad = _ReLUMask.apply(grad, mask)
        return (
            _pass_on(_GradientOfInput, ctx, grad, weight, x.shape) if need_x else None,
            _GradientOfWeight.apply(x, grad, weight, ctx.geo, ctx.wanted) if need_weight else None,
            grad.sum((0, 2, 3)) if need_bias else None,
            None,
            None,
            None,
        )


class _GradientOfInput(Function):
    """(grad, weight) -> the gradient by x."""

    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        weight: Tensor,
        shape: torch.Size,
        geo: Geometry,
        wanted: Wanted,
        mask: Tensor | None = None,
    ) -> Tensor:
        ctx.save_for_backward(grad, weight, mask)
        ctx.geo, ctx.wanted, ctx.readers, ctx.masked = geo, wanted, int(mask is not None), None
        product = _gradient_of_input(grad, weight, shape, geo)
        return product if mask is None else _rectified(product, mask, out=product)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        grad, weight, mask = ctx.saved_tensors
        need_grad, need_weight = ctx.needs_input_grad[:2]
        if ctx.wanted.input_only:
            need_weight = False
        if mask is not None and not _is_masked(ctx, v):
            v = _ReLUMask.apply(v, mask)
        return (
            _pass_on(_Convolution, ctx, v, weight, None) if need_grad else None,
            _GradientOfWeight.apply(v, grad, weight, ctx.geo, ctx.wanted) if need_weight else None,
            None,
            None,
            None,
            None,
        )


def _pass_on(function: type[Function], ctx: Any, given: Tensor, weight: Tensor, last: Any) -> Any:
    """``function`` of what came in, masked for the node behind ``ctx``'s first argument."""
    node = ctx.next_functions[0][0]
    mask = _mask_of(node)
    product = function.apply(given, weight, last, ctx.geo, ctx.wanted, mask)
    if mask is not None:
        node.masked = product
    return product


class _GradientOfWeight(Function):
    """(x, grad) -> the gradient by weight; ``weight`` itself only lends its shape."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, grad: Tensor, weight: Tensor, geo: Geometry, wanted: Wanted
    ) -> Tensor:
        ctx.save_for_backward(x, grad)
        ctx.geo, ctx.wanted = geo, wanted
        return _gradient_of_weight(x, grad, weight, geo)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        x, grad = ctx.saved_tensors
        need_x, need_grad = ctx.needs_input_grad[:2]
        return (
            _GradientOfInput.apply(grad, v, x.shape, ctx.geo, ctx.wanted) if need_x else None,
            _Convolution.apply(x, v, None, ctx.geo, ctx.wanted) if need_grad else None,
            None,
            None,
            None,
        )


class _ReLU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        if inplace:
            ctx.mark_dirty(x)
        y = x.clamp_min_(0) if inplace else x.clamp_min(0)
        ctx.save_for_backward(y)
        ctx.readers, ctx.masked = 0, None
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if _is_masked(ctx, grad):
            return grad, None
        return _ReLUMask.apply(grad, *ctx.saved_tensors), None


class _ReLUMask(Function):
    """grad where y > 0, else 0: linear in grad, and constant in y almost everywhere."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return _rectified(grad, y)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None]:
        return _ReLUMask.apply(v, *ctx.saved_tensors), None


class _MaxPool(Function):
    """Max-pooling; PyTorch's own second derivative carries zeros for the part that has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: Sequence[Any]) -> Tensor:
        y, where = torch.ops.aten.max_pool2d_with_indices(x, *window)
        ctx.save_for_backward(x, where)
        ctx.window = window
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Scatter.apply(grad, *ctx.saved_tensors, ctx.window), None


class _Scatter(Function):
    """grad, sent to where the maxima were; linear in grad."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor, where: Tensor, window: Sequence[Any]) -> Tensor:
        ctx.save_for_backward(x, where)
        ctx.window = window
        return torch.ops.aten.max_pool2d_with_indices_backward(grad, x, *window, where)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None, None, None]:
        return _Gather.apply(v, *ctx.saved_tensors, ctx.window), None, None, None


class _Gather(Function):
    """v, taken from where the maxima were: the transpose of :class:`_Scatter`."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, x: Tensor, where: Tensor, window: Sequence[Any]) -> Tensor:
        ctx.save_for_backward(x, where)
        ctx.window = window
        # As rows of channels, which is how channels_last images lie in memory.
        rows, index = v.permute(0, 2, 3, 1).flatten(1, 2), where.permute(0, 2, 3, 1)
        taken = rows.gather(1, index.flatten(1, 2))
        return taken.view(index.shape).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Scatter.apply(grad, *ctx.saved_tensors, ctx.window), None, None, None


class _BatchNormWithStatistics(Function):
    """Train-mode BatchNorm that also returns its mean and 1 / deviation, both differentiable."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, inverse = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.eps = eps
        return y, mean, inverse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor, grad_mean: Tensor, grad_inverse: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        mask = [True, weight is not None, weight is not None]
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, inverse, True, ctx.eps, mask
        )
        # d mean / dx = 1/M and d inverse / dx = -inverse^3 (x - mean) / M: an affine map of x.
        slope = -grad_inverse * inverse**3 / (x.numel() // x.shape[1])
        offset = grad_mean / (x.numel() // x.shape[1]) - slope * mean
        dx = torch.addcmul(dx + _channels(offset, x), x, _channels(slope, x))
        return dx, dweight, dbias, None


class _BatchNorm(Function):
    """Train-mode BatchNorm, y = w z + b with z = (x - mean) r; the running statistics move."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running: tuple[Tensor | None, Tensor | None],
        momentum: float,
        eps: float,
        wanted: Wanted,
    ) -> Tensor:
        y, mean, inverse = torch.native_batch_norm(x, weight, bias, *running, True, momentum, eps)
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.eps, ctx.wanted = eps, wanted
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        if ctx.wanted.input_only:
            dx = _BatchNormGradient.apply(grad, x, weight, mean, inverse, ctx.eps)
            return dx, None, None, None, None, None, None
        # PyTorch's own, which knows its derivative too, at three times the cost of ours.
        mask = [True, weight is not None, weight is not None]
        gradients = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, inverse, True, ctx.eps, mask
        )
        return *gradients, None, None, None, None


class _BatchNormGradient(Function):
    """(grad, x, weight) -> the gradient of BatchNorm by x, dx = w r P grad.

    P takes away the mean and the part along z: P u = u - mean(u) - z mean(u z), self-adjoint.
    ``mean`` and ``inverse`` (r) are functions of x, and differentiated as such.
    """

    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        inverse: Tensor,
        eps: float,
    ) -> Tensor:
        dx, along, total = _batch_norm_backward(grad, x, weight, mean, inverse, eps)
        ctx.save_for_backward(grad, x, weight, mean, inverse, dx, along, total)
        ctx.eps = eps
        return dx

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        grad, x, weight, mean, inverse, dx, along, total = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        by_grad, v_along, v_total = _batch_norm_backward(v, x, weight, mean, inverse, ctx.eps)
        # <v, dx> = w r A with A = <v, P grad>. It depends on x by z in A (whose gradient, seen
        # through z, gives the first two terms) and by r.
        product = (v * grad).sum((0, 2, 3), dtype=mean.dtype)
        a = product - (v_total * total + v_along * along) / count
        scale = inverse if weight is None else inverse * weight
        slope = -scale * a * inverse**2 / count
        by_x = torch.addcmul(_channels(-slope * mean, x), x, _channels(slope, x))
        by_x = by_x.addcmul_(by_grad, _channels(-inverse * along / count, x))
        by_x = by_x.addcmul_(dx, _channels(-inverse * v_along / count, x))
        by_weight = None if weight is None else inverse * a
        return by_grad, by_x.to(x.dtype), by_weight, None, None, None


def _batch_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, inverse: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """w r P grad like x, and the sums of grad z and of grad, both [C]."""
    weight = torch.ones_like(mean) if weight is None else weight
    return torch.ops.aten.native_batch_norm_backward(
        grad, x, weight, None, None, mean, inverse, True, eps, [True, True, True]
    )


def _channels(values: Tensor, like: Tensor) -> Tensor:
    """[C] -> [1, C, 1, ..., 1], to be broadcast over ``like``, [N, C, ...]."""
    return values.view(1, -1, *([1] * (like.dim() - 2)))


Statistics = dict[int, tuple[Tensor, Tensor]]


class Kernels(TorchFunctionMode):
    """While entered, networks compute with the kernels of this file.

    Args:
        record: BatchNorm layers in train mode enter the statistics of the batch they see here,
            (mean [C], 1 / deviation [C]) by layer, differentiable in the weights.
        replay: BatchNorm layers with an entry in here normalise by that, not by their own.
        frozen: treat all parameters as constants. For searches in the space of images.
    """

    def __init__(
        self,
        *,
        record: Statistics | None = None,
        replay: Statistics | None = None,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.record, self.replay, self.frozen = record, replay, frozen
        self.wanted = Wanted()
        self._folded: dict[int, tuple[Tensor, Tensor]] = {}

    @contextmanager
    def first_derivative(self) -> Iterator[None]:
        """Inside, differentiation is by the images only; convolutions skip their weights."""
        self.wanted.input_only = True
        try:
            yield
        finally:
            self.wanted.input_only = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        handler = _HANDLERS.get(func)
        kwargs = kwargs or {}
        if handler is not None:
            return handler(self, *args, **kwargs)
        for value in args:
            _count_reader(value)
        return func(*args, **kwargs)

    def _constant(self, parameter: Tensor | None) -> Tensor | None:
        return parameter.detach() if self.frozen and parameter is not None else parameter

    # The handlers' arguments are named as PyTorch names them: a network may pass them by name.

    def _conv2d(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        x, weight, bias = input, self._constant(weight), self._constant(bias)
        if isinstance(padding, str) or x.dim() != 4:
            return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        device = x.device.type
        if torch.is_autocast_enabled(device):
            # Cast outside: autocast is no longer active when the backward functions run.
            dtype = torch.get_autocast_dtype(device)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        geo = Geometry(_pair(stride), _pair(padding), _pair(dilation), groups)
        _count_reader(x)
        return _Convolution.apply(x, weight, bias, geo, self.wanted)

    def _relu(self, input: Tensor, inplace: bool = False) -> Tensor:
        return _ReLU.apply(input, inplace)

    def _max_pool2d(
        self,
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Tensor:
        if return_indices or input.dim() != 4:
            return F.max_pool2d(
                input, kernel_size, stride, padding, dilation, ceil_mode, return_indices
            )
        size = _pair(kernel_size)
        window = (size, _pair(stride or size), _pair(padding), _pair(dilation), ceil_mode)
        return _MaxPool.apply(input, window)

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        x, weight, bias = input, self._constant(weight), self._constant(bias)
        given = (self.replay or {}).get(id(running_mean))
        if given is not None:
            mean, inverse = given
            scale = inverse if weight is None else inverse * weight
            shift = -mean * scale if bias is None else bias - mean * scale
            return x * _channels(scale, x) + _channels(shift, x)
        if training and running_mean is not None and self.record is not None:
            y, mean, inverse = _BatchNormWithStatistics.apply(x, weight, bias, eps)
            self.record[id(running_mean)] = mean, inverse
            _update_running(running_mean, running_var, mean, inverse, x, momentum, eps)
            return y
        if training and x.dim() == 4:
            running = running_mean, running_var
            return _BatchNorm.apply(x, weight, bias, running, momentum, eps, self.wanted)
        if not training:
            running_mean, running_var = _kept(running_mean), _kept(running_var)
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)

    def _conv_norm(self, x: Tensor, conv: nn.Conv2d, norm: nn.Module) -> Tensor:
        given = isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats and not norm.training
        if not given or conv.padding_mode != "zeros":
            with self:
                return norm(conv(x))
        if id(conv) not in self._folded:
            self._folded[id(conv)] = self._fold(conv, norm)
        weight, bias = self._folded[id(conv)]
        return self._conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    def _fold(self, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
        given = (self.replay or {}).get(id(norm.running_mean))
        if given is None:
            given = _kept(norm.running_mean), torch.rsqrt(norm.running_var + norm.eps)
        mean, inverse = given
        scale = inverse if norm.weight is None else inverse * norm.weight
        shift = -mean * scale if norm.bias is None else norm.bias - mean * scale
        if conv.bias is not None:
            shift = shift + conv.bias * scale
        weight = conv.weight * scale.view(-1, 1, 1, 1)
        return self._constant(weight), self._constant(shift)


_HANDLERS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    torch.conv2d: Kernels._conv2d,
    F.conv2d: Kernels._conv2d,
    F.relu: Kernels._relu,
    F.max_pool2d: Kernels._max_pool2d,
    F.batch_norm: Kernels._batch_norm,
    conv_norm: Kernels._conv_norm,
}


def _kept(statistics: Tensor) -> Tensor:
    """A copy for the graph to save: a later train-mode forward changes the buffers in place, before
    the backward pass reads them, and PyTorch's BatchNorm does so unnoticed by autograd."""
    return statistics.clone()


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


@torch.no_grad()
def _update_running(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    inverse: Tensor,
    x: Tensor,
    momentum: float,
    eps: float,
) -> None:
    """What train-mode BatchNorm does to its buffers; the variance enters unbiased."""
    count = x.numel() // x.shape[1]
    variance = (inverse.double() ** -2 - eps).to(mean.dtype) * (count / max(1, count - 1))
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(variance, momentum)
