"""Which dtype a device multiplies in, and what NF4 makes of a weight."""

from __future__ import annotations

import torch
from torch import nn

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the matrix products; `auto` is bfloat16 where the device multiplies it natively, else float32.

    Emulated, a bfloat16 product on a CPU is 10 to 50 times slower than a float32 one.
    """
    if name != "auto":
        return DTYPES[name]
    native = _cuda_has_bf16(device) if device.type == "cuda" else device.type == "cpu" and _cpu_has_bf16()
    return torch.bfloat16 if native else torch.float32


def _cuda_has_bf16(device: torch.device) -> bool:
    # is_bf16_supported() counts emulation as support; tensor cores have bf16 from compute capability 8.0 on.
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _cpu_has_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


@torch.no_grad()
def round_trip_nf4(weight: torch.Tensor) -> torch.Tensor:
    """What NF4 with double quantisation keeps of a weight: the same shape and dtype, de-quantised."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True)
    restored: torch.Tensor = functional.dequantize_4bit(packed, state)
    return restored.to(weight.dtype)


def quantised_linears(model: nn.Module) -> list[str]:
    """The names of the modules that hold 4-bit weights."""
    from bitsandbytes.nn import Linear4bit

    return [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
