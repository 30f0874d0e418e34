"""Which number formats a device has instructions for.

Without them PyTorch computes bfloat16 and float16 by converting back and forth, or one number after another. On a CPU a
step can then take a hundred times as long as in float32.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

# of a CPU, as torch.cpu.get_capabilities() names them: products of matrices on x86 (AVX-512, AMX) and ARM (NEON, SVE)
CPU_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}


def is_native(dtype: torch.dtype, device: str, instructions: Collection[str] | None = None) -> bool:
    """Whether a kind of device multiplies matrices of this type by its own instructions.

    Types of 32 and more bits are taken for native. Of the others False means that it is not known: for bfloat16 on
    Apple's GPUs, of which the older ones emulate it, and on further kinds of devices.

    >>> is_native(torch.bfloat16, "cpu", {"avx2", "avx512_f"}), is_native(torch.float32, "cpu", {"avx2"})
    (False, True)

    Args:
        device: its kind: `cpu`, `cuda` (also of AMD), `mps`, ...
        instructions: what the CPU has; default: what this one has.
    """
    if dtype not in CPU_INSTRUCTIONS:
        return True
    if device == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "mps":
        return dtype == torch.float16
    onednn = torch.backends.mkldnn  # by its older name; no other kernels of PyTorch use the instructions
    if device != "cpu" or not (onednn.is_available() and onednn.enabled):
        return False
    if instructions is None:
        instructions = [name for name, has in torch.cpu.get_capabilities().items() if has]
    return not {*instructions}.isdisjoint(CPU_INSTRUCTIONS[dtype])


def slow_note(dtype: torch.dtype, device: str, instructions: Collection[str] | None = None) -> str | None:
    """In words that a type is not native to a device, see `is_native`; None if it is.

    >>> slow_note(torch.bfloat16, "cpu", {"avx2"})
    'This CPU has no known instructions for bfloat16, which can make it very slow'
    """
    if is_native(dtype, device, instructions):
        return None
    return f"This {name_of(device)} has no known instructions for {str(dtype)[6:]}, which can make it very slow"


def name_of(device: str) -> str:
    """A kind of device in words: CPU, GPU, or as it is."""
    return {"cpu": "CPU", "cuda": "GPU", "mps": "GPU"}.get(device, device)
