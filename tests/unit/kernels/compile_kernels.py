"""Compiles the Triton kernels for GPUs, none of which has to be here: `python compile_kernels.py sm_80 ...`.

Prints a line for each. In a process of its own, since Triton decides at its import whether it interprets.
"""

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe_dist.kernels import lowrank_swiglu_triton as hidden_triton
from moe_dist.kernels import lowrank_swiglu_triton_kernels as hidden_kernels

RANK, SLOTS = 8, 2
FLOATS = ("gate", "scale", "bias", "thin", "d_z", "d_gate", "d_in_v", "d_out_u", "d_scale", "d_bias", "d_thin")
INTEGERS = ("tokens", "experts", "slots", "width", "run")
PACKED = ("*u8", "*bf16", "*u8")


def compiled(name: str, target: GPUTarget, wide: str, bits: int = 0) -> Any:
    """Triton's kernel for one target; `wide`: the type of `pre`."""
    factor = PACKED if bits else (f"*{wide}", "constexpr", "constexpr")
    constants = hidden_triton.constants(RANK, SLOTS)
    warps = constants.pop("num_warps")
    if name == "forward":
        constants |= {"bits": bits, "group": 64 if bits else 1}
    known: dict[str, object] = {"slot": "*i64", "order": "*i64", "in_v": factor, "out_u": factor}
    known |= dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(constants, "constexpr")
    kernel = getattr(hidden_kernels, name)
    signature = {argument: known.get(argument, f"*{wide}") for argument in kernel.arg_names}
    at = kernel.arg_names.index
    values = {(at(argument),): value for argument, value in constants.items()}
    if not bits:
        values |= {(at(argument), part): None for argument in ("in_v", "out_u") for part in (1, 2)}
    return triton.compile(ASTSource(kernel, signature, values), target=target, options={"num_warps": warps})


if __name__ == "__main__":
    for word in sys.argv[1:]:
        cuda = word.startswith("sm_")
        target = GPUTarget("cuda", int(word[3:]), 32) if cuda else GPUTarget("hip", word, 64)
        for name, wide, bits in (("forward", "bf16", 0), ("forward", "fp32", 4), ("backward", "bf16", 0)):
            kernel = compiled(name, target, wide, bits)
            print(name, wide, bits, word, len(kernel.asm["cubin" if cuda else "hsaco"]), "bytes")
