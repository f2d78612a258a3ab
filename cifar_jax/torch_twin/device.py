"""What PyTorch keeps for the whole process: precision, seed, the device's queue and memory."""

import torch


def set_float32(fast):
    """On a GPU: float32 products as TF32, JAX's default there, or in full if not `fast`; cuDNN
    times its algorithms, as XLA does. On a CPU nothing changes."""
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high" if fast else "highest")
        torch.backends.cudnn.allow_tf32 = fast
        torch.backends.cudnn.benchmark = True


def move(twin, device):
    """Put the twin on 'cpu' or 'cuda' in channels_last, PyTorch's fast layout on both."""
    twin.to(device, memory_format=torch.channels_last)


def seed(value):
    """Seed dropout."""
    torch.manual_seed(value)


def synchronize(device):
    """Wait until the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory(run):
    """Bytes that PyTorch has allocated on the GPU at the peak of run(); what cuDNN took before, to
    time its algorithms, does not count."""
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated()
