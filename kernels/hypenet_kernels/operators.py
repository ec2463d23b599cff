"""Functions of tensors that torch.compile sees as operators, and that everybody else calls as they are.

torch's dispatcher takes longer than a kernel that works on a short sequence, so only those who watch operators go by
are sent through it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

KeepInputs = Callable[[Any, tuple[Any, ...], Any], None]
Gradients = Callable[..., Any]


def operators_are_watched(x: Tensor) -> bool:
    """Whether anybody watches operators of x go by: torch.compile, fake tensors, subclasses, dispatch modes."""
    return torch.compiler.is_compiling() or type(x) is not Tensor or torch._C._len_torch_dispatch_stack() > 0


def refuse_second_derivative(name: str) -> None:
    """To be called in a backward pass, where gradients are enabled for create_graph alone.

    torch's `once_differentiable` finds that out too, in more time.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} has no second derivative; leave out create_graph=True")


class Operator:
    """`torch.ops.hypenet.<name>` for those who watch, and `function` itself, with the same gradients, for the others.

    Args:
        function: annotated as `torch.library.custom_op` wants it; the first argument is a tensor. Changes no input.
        shapes: takes the same arguments and gives empty tensors like those of `function`.
    """

    def __init__(self, name: str, function: Callable[..., Any], shapes: Callable[..., Any]):
        self._name, self._function = name, function
        self._registered = torch.library.custom_op(f"hypenet::{name}", function, mutates_args=())
        self._registered.register_fake(shapes)
        self._differentiable: Callable[..., Any] = function

    def register_gradients(self, keep_inputs: KeepInputs, gradients: Gradients) -> None:
        """keep_inputs(ctx, inputs, output) before gradients(ctx, *gradients of the outputs), one per input or None."""
        self._registered.register_autograd(gradients, setup_context=keep_inputs)
        self._differentiable = _autograd_function(self._name, self._function, keep_inputs, gradients).apply

    def __call__(self, x: Tensor, *others: Any) -> Any:
        if operators_are_watched(x):
            return self._registered(x, *others)
        return (self._differentiable if torch.is_grad_enabled() else self._function)(x, *others)


def _autograd_function(
    name: str, function: Callable[..., Any], keep_inputs: KeepInputs, gradients: Gradients
) -> type[torch.autograd.Function]:
    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = function(*inputs)
            keep_inputs(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            refuse_second_derivative(name)
            return gradients(ctx, *upstream)

    return Eager
