"""CIFAR-10 convnets in JAX/Flax: five published PyTorch systems, re-implemented faithfully."""


class InputError(ValueError):
    """Bad input or usage: the message is one clear sentence; main.py prints it and exits with 2."""
