"""CIFAR-10 convnets in JAX/Flax: five published PyTorch systems, re-implemented faithfully."""


class InputError(ValueError):
    """Bad input or usage: the message is one clear sentence; main.py prints it and exits with 2.

    Whatever a file's content put into it, it is one line of printable characters, 2,000 at most.
    """

    def __init__(self, message):
        line = " ".join(str(message).split())
        super().__init__("".join(c if c.isprintable() else "?" for c in line[:2000]))
