"""What the tests of losses ask autograd."""

from collections.abc import Callable

from torch import Tensor


def gradient(loss: Callable[[Tensor], Tensor], z_NC: Tensor) -> Tensor:
    """Returns the gradient of the sum of a loss by the logits."""
    z_NC = z_NC.clone().requires_grad_()
    loss(z_NC).sum().backward()
    return z_NC.grad
