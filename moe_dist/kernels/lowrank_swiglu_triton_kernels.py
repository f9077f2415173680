"""Triton kernels of low-rank SwiGLU, forward and backward; `lowrank_swiglu_triton.py` launches them.

A program computes a block of tokens and a run of columns. It keeps its tile of `pre` in registers while it loops over
the experts that any of its tokens chose; `order` groups tokens with the same experts, so that these are few.

    g = pre_gate[t] + z_gate[t, e] Vg[e] + bias_gate[e]         u = likewise with pre_up, z_up, Vu
    h = silu(g) * u * scale[e]
    hidden[t]   += p * h                                        thin[t, e] = p * (h Uo[e])

Operands of products are rounded to the dtype of `pre`; everything else is float32. Results are deterministic: a program
adds atomically only to its own partial sums, in a fixed order, and torch sums the programs' partial sums.

Shapes: T tokens, K slots, N experts, R rank, F hidden width, H = 2 F (gate | up), C = 2 R; W runs of columns, S splits
of the tokens; within a program: B tokens, L columns, J the rank and P the slots, padded to sizes that Triton supports.
"""

import os

import triton
import triton.language as tl

_VARYING = ("tokens", "experts", "slots")  # a new value of these must not trigger a recompilation
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _round(x, dtype: tl.constexpr):
    """Round to nearest even; a GPU does so when it casts, but the interpreter truncates to bfloat16."""
    if _INTERPRETED and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _dot(a, b, dtype: tl.constexpr, precision: tl.constexpr):
    a, b = _round(a, dtype), _round(b, dtype)
    if _INTERPRETED:  # the interpreter multiplies the bit patterns of bfloat16 (triton-lang/triton#11584)
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=precision)


@triton.jit
def _unpack(codes, row_J, at_L, length, mask_JL, bits: tl.constexpr):
    """Load packed integers [J, L] of `bits` bits, `length` per row; the first of a byte is in its lowest bits."""
    per_byte: tl.constexpr = 8 // bits
    byte_at_JL = row_J[:, None] * tl.cdiv(length, per_byte) + (at_L // per_byte)[None, :]
    byte_JL = tl.load(codes + byte_at_JL, mask=mask_JL, other=0).to(tl.int32)
    return (byte_JL >> (at_L % per_byte * bits)[None, :]) & ((1 << bits) - 1)


@triton.jit
def _load_factor(
    factor, row, f_L, width, rank: tl.constexpr, J: tl.constexpr, bits: tl.constexpr,
    group: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Load one expert's low-rank factor [J, L] from its first row on: plain (bits 0) or packed (`QuantizedFactor`)."""
    values, scales, zeros = factor
    row_J = row + tl.arange(0, J)
    mask_JL = (tl.arange(0, J) < rank)[:, None] & (f_L < width)[None, :]
    if bits == 0:
        value_JL = tl.load(values + row_J[:, None] * width + f_L[None, :], mask=mask_JL, other=0.0)
    else:
        groups = tl.cdiv(width, group)
        code_JL = _unpack(values, row_J, f_L, width, mask_JL, bits)
        scale_at_JL = row_J[:, None] * groups + (f_L // group)[None, :]
        scale_JL = tl.load(scales + scale_at_JL, mask=mask_JL, other=0.0).to(tl.float32)
        if zeros is None:
            zero_JL = tl.full((J, f_L.shape[0]), 1 << (bits - 1), tl.int32)
        else:
            zero_JL = _unpack(zeros, row_J, f_L // group, groups, mask_JL, bits)
        value_JL = (code_JL - zero_JL).to(tl.float32) * scale_JL
    return _round(value_JL, dtype)


@triton.jit
def _load_lowrank_rows(thin, row_B, chosen_B, stride: tl.constexpr, rank: tl.constexpr, J: tl.constexpr):
    """Load the low-rank row of each token that chose the expert [B, J]; zeros for the others."""
    j_J = tl.arange(0, J)
    mask_BJ = chosen_B[:, None] & (j_J < rank)[None, :]
    return tl.load(thin + row_B[:, None] * stride + j_J[None, :], mask=mask_BJ, other=0.0)


@triton.jit
def _load_columns(vector, row, f_L, width):
    return tl.load(vector + row * width + f_L, mask=f_L < width, other=0.0)[None, :]


@triton.jit
def _project(
    pre_BL, z, in_v, bias, half, row_B, chosen_B, f_L, width,
    rank: tl.constexpr, J: tl.constexpr, bits: tl.constexpr, group: tl.constexpr, dtype: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """Return g or u of one expert [B, L], and its operands z [B, J] and V [J, L]; half: 2 e for g, 2 e + 1 for u."""
    z_BJ = _load_lowrank_rows(z, row_B, chosen_B, 2 * rank, rank, J)
    v_JL = _load_factor(in_v, half * rank, f_L, width, rank, J, bits, group, dtype)
    value_BL = pre_BL + _dot(z_BJ, v_JL, dtype, precision)
    if bias is not None:
        value_BL += _load_columns(bias, half, f_L, width)
    return value_BL, z_BJ, v_JL


@triton.jit
def _load_slots(slot, gate, t_B, real_B, slots, P: tl.constexpr):
    """Load a block's slots and gates [B, P]; padding is -1."""
    at_BP = t_B[:, None] * slots + tl.arange(0, P)[None, :]
    real_BP = real_B[:, None] & (tl.arange(0, P) < slots)[None, :]
    return tl.load(slot + at_BP, mask=real_BP, other=-1).to(tl.int32), tl.load(gate + at_BP, mask=real_BP, other=0.0)


@triton.jit
def _find_slot(slot_BP, gate_BP, e, P: tl.constexpr):
    """Return the slot of each token that holds expert e, -1 if none [B], and its gate [B]."""
    hit_BP = slot_BP == e
    place_B = tl.max(tl.where(hit_BP, tl.arange(0, P)[None, :], -1), axis=1)
    return place_B, tl.sum(tl.where(hit_BP, gate_BP, 0.0), axis=1)


@triton.jit(do_not_specialize=_VARYING)
def forward(
    pre, slot, z, gate, order, in_v, out_u, scale, bias, hidden, thin, tokens, experts, slots, width, run,
    rank: tl.constexpr, J: tl.constexpr, P: tl.constexpr, B: tl.constexpr, L: tl.constexpr,
    bits: tl.constexpr, group: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Write hidden [T, F]; add to thin [W, T, K, R] (float32, zeroed by the caller).

    Grid: token blocks, W runs of columns.
    """
    dtype: tl.constexpr = pre.dtype.element_ty
    row_B, j_J = tl.program_id(0) * B + tl.arange(0, B), tl.arange(0, J)
    t_B = tl.load(order + row_B, mask=row_B < tokens, other=0)
    slot_BP, gate_BP = _load_slots(slot, gate, t_B, row_B < tokens, slots, P)
    own_B = tl.program_id(1) * tokens + t_B
    for first in range(tl.program_id(1) * run, tl.minimum(tl.program_id(1) * run + run, width), L):
        f_L = first + tl.arange(0, L)
        real_BL = (row_B < tokens)[:, None] & (f_L < width)[None, :]
        pre_g_BL = tl.load(pre + t_B[:, None] * (2 * width) + f_L[None, :], mask=real_BL, other=0.0).to(tl.float32)
        pre_u_BL = tl.load(pre + (2 * t_B + 1)[:, None] * width + f_L[None, :], mask=real_BL, other=0.0).to(tl.float32)
        sum_BL = tl.zeros((B, L), dtype=tl.float32)
        for e in range(experts):
            place_B, p_B = _find_slot(slot_BP, gate_BP, e, P)
            if tl.max(place_B, axis=0) >= 0:
                chosen_B = place_B >= 0
                g_BL, _, _ = _project(
                    pre_g_BL, z, in_v, bias, 2 * e, t_B * experts + e, chosen_B, f_L, width,
                    rank, J, bits, group, dtype, precision,
                )  # fmt: skip
                u_BL, _, _ = _project(
                    pre_u_BL, z + rank, in_v, bias, 2 * e + 1, t_B * experts + e, chosen_B, f_L, width,
                    rank, J, bits, group, dtype, precision,
                )  # fmt: skip
                uo_JL = _load_factor(out_u, e * rank, f_L, width, rank, J, bits, group, dtype)
                h_BL = g_BL * tl.sigmoid(g_BL) * u_BL * p_B[:, None]
                if scale is not None:
                    h_BL *= _load_columns(scale, e, f_L, width)
                h_BL = tl.where(chosen_B[:, None], h_BL, 0.0)
                sum_BL += h_BL
                thin_BJ = _dot(h_BL, tl.trans(uo_JL), dtype, precision)
                at_BJ = (own_B * slots + place_B)[:, None] * rank + j_J[None, :]
                tl.atomic_add(thin + at_BJ, thin_BJ, mask=chosen_B[:, None] & (j_J < rank)[None, :], sem="relaxed")
        tl.store(hidden + t_B[:, None] * width + f_L[None, :], _round(sum_BL, dtype), mask=real_BL)


@triton.jit(do_not_specialize=_VARYING)
def backward(
    pre, slot, z, gate, order, in_v, out_u, scale, bias, d_hidden, d_thin, d_pre, d_z, d_gate, d_in_v, d_out_u,
    d_scale, d_bias, tokens, experts, slots, width, run,
    rank: tl.constexpr, J: tl.constexpr, P: tl.constexpr, B: tl.constexpr, L: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """Write d_pre [T, H]; add to the other gradients (float32, zeroed by the caller).

    d_z [W, T, K, C], d_gate [W, T, K], d_in_v [S, N, 2, R, F], d_out_u [S, N, R, F], d_scale [S, N, F], d_bias
    [S, N, H]. Grid: S splits of the token blocks, W runs of columns.
    """
    dtype: tl.constexpr = pre.dtype.element_ty
    j_J = tl.arange(0, J)
    blocks = tl.cdiv(tokens, B)
    each = tl.cdiv(blocks, tl.num_programs(0))
    for first in range(tl.program_id(1) * run, tl.minimum(tl.program_id(1) * run + run, width), L):
        f_L = first + tl.arange(0, L)
        real_L, real_JL = f_L < width, (j_J < rank)[:, None] & (f_L < width)[None, :]
        at_JL = j_J[:, None] * width + f_L[None, :]
        for block in range(tl.program_id(0) * each, tl.minimum(tl.program_id(0) * each + each, blocks)):
            row_B = block * B + tl.arange(0, B)
            t_B = tl.load(order + row_B, mask=row_B < tokens, other=0)
            slot_BP, gate_BP = _load_slots(slot, gate, t_B, row_B < tokens, slots, P)
            real_BL = (row_B < tokens)[:, None] & real_L[None, :]
            at_BL = t_B[:, None] * (2 * width) + f_L[None, :]
            pre_g_BL = tl.load(pre + at_BL, mask=real_BL, other=0.0).to(tl.float32)
            pre_u_BL = tl.load(pre + at_BL + width, mask=real_BL, other=0.0).to(tl.float32)
            d_hidden_at_BL = d_hidden + t_B[:, None] * width + f_L[None, :]
            d_hidden_BL = tl.load(d_hidden_at_BL, mask=real_BL, other=0.0).to(tl.float32)
            d_pre_g_BL, d_pre_u_BL = tl.zeros((B, L), dtype=tl.float32), tl.zeros((B, L), dtype=tl.float32)
            for e in range(experts):
                place_B, p_B = _find_slot(slot_BP, gate_BP, e, P)
                if tl.max(place_B, axis=0) >= 0:
                    chosen_B = place_B >= 0
                    g_BL, zg_BJ, vg_JL = _project(
                        pre_g_BL, z, in_v, bias, 2 * e, t_B * experts + e, chosen_B, f_L, width,
                        rank, J, 0, 1, dtype, precision,
                    )  # fmt: skip
                    u_BL, zu_BJ, vu_JL = _project(
                        pre_u_BL, z + rank, in_v, bias, 2 * e + 1, t_B * experts + e, chosen_B, f_L, width,
                        rank, J, 0, 1, dtype, precision,
                    )  # fmt: skip
                    uo_JL = _load_factor(out_u, e * rank, f_L, width, rank, J, 0, 1, dtype)
                    d_thin_BJ = _load_lowrank_rows(d_thin, t_B * experts + e, chosen_B, rank, rank, J)
                    q_BL = d_hidden_BL + _dot(d_thin_BJ, uo_JL, dtype, precision)  # gradient of p * h
                    s_BL = tl.sigmoid(g_BL)
                    silu_BL = g_BL * s_BL
                    h_BL = tl.where(chosen_B[:, None], silu_BL * u_BL, 0.0)
                    d_h_BL = tl.where(chosen_B[:, None], q_BL * p_B[:, None], 0.0)
                    own = tl.program_id(0).to(tl.int64) * experts + e  # this program's partial sum for this expert
                    if scale is not None:
                        scale_L = _load_columns(scale, e, f_L, width)
                        d_scale_L = tl.sum(d_h_BL * h_BL, axis=0)
                        tl.atomic_add(d_scale + own * width + f_L, d_scale_L, mask=real_L, sem="relaxed")
                        h_BL *= scale_L
                        d_h_BL *= scale_L
                    d_u_BL = d_h_BL * silu_BL
                    d_g_BL = d_h_BL * u_BL * s_BL * (1.0 + g_BL - silu_BL)
                    d_pre_g_BL += d_g_BL
                    d_pre_u_BL += d_u_BL
                    if bias is not None:
                        at_L = d_bias + own * 2 * width + f_L
                        tl.atomic_add(at_L, tl.sum(d_g_BL, axis=0), mask=real_L, sem="relaxed")
                        tl.atomic_add(at_L + width, tl.sum(d_u_BL, axis=0), mask=real_L, sem="relaxed")
                    slot_at_B = (tl.program_id(1) * tokens + t_B) * slots + place_B
                    tl.atomic_add(d_gate + slot_at_B, tl.sum(q_BL * h_BL, axis=1), mask=chosen_B, sem="relaxed")
                    z_at_BJ = d_z + slot_at_B[:, None] * (2 * rank) + j_J[None, :]
                    z_BJ = chosen_B[:, None] & (j_J < rank)[None, :]
                    d_zg_BJ = _dot(d_g_BL, tl.trans(vg_JL), dtype, precision)
                    d_zu_BJ = _dot(d_u_BL, tl.trans(vu_JL), dtype, precision)
                    tl.atomic_add(z_at_BJ, d_zg_BJ, mask=z_BJ, sem="relaxed")
                    tl.atomic_add(z_at_BJ + rank, d_zu_BJ, mask=z_BJ, sem="relaxed")
                    d_vg_JL = _dot(tl.trans(zg_BJ), d_g_BL, dtype, precision)
                    d_vu_JL = _dot(tl.trans(zu_BJ), d_u_BL, dtype, precision)
                    d_uo_JL = _dot(tl.trans(d_thin_BJ), h_BL * p_B[:, None], dtype, precision)
                    in_v_at_JL = d_in_v + own * 2 * rank * width + at_JL
                    tl.atomic_add(in_v_at_JL, d_vg_JL, mask=real_JL, sem="relaxed")
                    tl.atomic_add(in_v_at_JL + rank * width, d_vu_JL, mask=real_JL, sem="relaxed")
                    tl.atomic_add(d_out_u + own * rank * width + at_JL, d_uo_JL, mask=real_JL, sem="relaxed")
            tl.store(d_pre + at_BL, _round(d_pre_g_BL, dtype), mask=real_BL)
            tl.store(d_pre + at_BL + width, _round(d_pre_u_BL, dtype), mask=real_BL)
