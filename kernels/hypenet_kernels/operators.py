"""Operators that torch.compile can trace, without the cost of torch's dispatcher in eager mode.

For a short sequence the dispatcher takes longer on the host than the kernel takes on the GPU. An `Operator` therefore
calls its function directly, and goes through the dispatcher only where something traces or intercepts operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def needs_dispatcher(x: Tensor) -> bool:
    """Whether torch.compile, fake tensors, a tensor subclass or a dispatch mode has to see operators on x."""
    return torch.compiler.is_compiling() or type(x) is not Tensor or torch._C._len_torch_dispatch_stack() > 0


class Operator:
    """A function of tensors, registered as `torch.ops.hypenet.<name>`.

    A call runs `function` itself in eager mode, and the registered operator where `needs_dispatcher`. Values and
    gradients are the same. Second derivatives do not exist: create_graph=True raises RuntimeError.

    Args:
        name: name of the operator in the `hypenet` namespace.
        function: takes tensors (or None) first, then plain values. Annotated as `torch.library.custom_op` requires.
        shapes: takes the same arguments and returns uninitialised tensors of the shapes and dtypes of the outputs.
        mutates: names of the arguments that `function` writes to.
        backward: takes the gradients of the outputs and all arguments of `function`, and returns the gradients of the
            first of these arguments. Without it the operator is not differentiable.
        tensors: with `backward`, how many arguments of `function` are tensors.
        unused_outputs: whether `backward` accepts None as the gradient of an output that was not used. If not, it
            gets zeros.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        shapes: Callable[..., Any],
        *,
        mutates: Sequence[str] = (),
        backward: Callable[..., Any] | None = None,
        tensors: int = 0,
        unused_outputs: bool = False,
    ):
        self._function, self._tensors = function, tensors
        self._registered = torch.library.custom_op(f"hypenet::{name}", function, mutates_args=mutates)
        self._registered.register_fake(shapes)
        self._differentiable: Callable[..., Any] | None = None
        if backward is not None:
            self._register_gradients(name, backward, unused_outputs)

    def _register_gradients(self, name: str, backward: Callable[..., Any], unused_outputs: bool) -> None:
        function, tensors = self._function, self._tensors

        def save(ctx: Any, leading: Sequence[Tensor | None], values: tuple[Any, ...]) -> None:
            ctx.set_materialize_grads(not unused_outputs)
            ctx.save_for_backward(*leading)
            ctx.values = values

        def gradients(ctx: Any, upstream: tuple[Any, ...], arguments: int) -> tuple[Tensor | None, ...]:
            leading = ctx.saved_tensors  # read once: activation checkpointing refuses a second access
            found = backward(*upstream, *leading, *ctx.values)
            found = found if isinstance(found, tuple) else (found,)
            wanted = [None if x is None else dx for x, dx in zip(leading, found, strict=False)]
            return *wanted, *(None,) * (arguments - len(wanted))

        self._registered.register_autograd(
            lambda ctx, *upstream: gradients(ctx, upstream, tensors + len(ctx.values)),
            setup_context=lambda ctx, inputs, output: save(ctx, inputs[:tensors], inputs[tensors:]),
        )

        class Eager(torch.autograd.Function):
            """Plain values come as one tuple: autograd spends time on every argument."""

            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Any:
                save(ctx, inputs[:-1], inputs[-1])
                return function(*inputs[:-1], *inputs[-1])

            @staticmethod
            def backward(ctx: Any, *upstream: Any) -> Any:
                # Gradients are enabled here for create_graph alone. `once_differentiable` finds that out more slowly.
                if torch.is_grad_enabled():
                    raise RuntimeError(f"{name} has no second derivative; leave out create_graph=True")
                return gradients(ctx, upstream, tensors + 1)

        self._differentiable = Eager.apply

    def __call__(self, x: Tensor, *others: Any) -> Any:
        if needs_dispatcher(x):
            return self._registered(x, *others)
        if self._differentiable is None or not torch.is_grad_enabled():
            return self._function(x, *others)
        split = self._tensors - 1
        return self._differentiable(x, *others[:split], others[split:])
