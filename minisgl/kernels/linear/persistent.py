"""A batch-invariant product: the same tiles and the same order of additions for every batch.

cuBLAS chooses tiles and splits of K by the number of rows, so a row's bits depend on its batch.
Here they do not: there is one tile size per architecture, and one program goes over K front to
back. There are as many programs as processors; each computes many output tiles, column blocks in
groups, so that a group's weights stay in L2 for all rows. `forced({"linear": "persistent"})`
chooses it. Source: He, "Defeating Nondeterminism in LLM Inference", 2025.
"""

import torch
import triton
import triton.language as tl

from minisgl.kernels.config import architecture, product_tile

GROUP = 8  # row blocks per group


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [N, K]
    bias_ptr,  # [N]
    out_ptr,  # [M, N]
    M,
    x_stride,
    weight_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
):
    COLUMNS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    row_blocks = tl.cdiv(M, BLOCK_M)
    for tile in range(tl.program_id(0), row_blocks * COLUMNS, tl.num_programs(0)):
        group = tile // (GROUP * COLUMNS)
        height = tl.minimum(row_blocks - group * GROUP, GROUP)
        within = tile % (GROUP * COLUMNS)
        m = (group * GROUP + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = within // height * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        x_at = x_ptr + m.to(tl.int64)[:, None] * x_stride + k[None, :]
        weight_at = weight_ptr + n.to(tl.int64)[:, None] * weight_stride + k[None, :]
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, K, BLOCK_K):
            if K % BLOCK_K == 0:
                x = tl.load(x_at + start, mask=(m < M)[:, None], other=0.0)
                weight = tl.load(weight_at + start, mask=(n < N)[:, None], other=0.0)
            else:
                inside = (k + start < K)[None, :]
                x = tl.load(x_at + start, mask=(m < M)[:, None] & inside, other=0.0)
                weight = tl.load(weight_at + start, mask=(n < N)[:, None] & inside, other=0.0)
            acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")
        if BIAS:
            acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        to = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
        ok = (m < M)[:, None] & (n < N)[None, :]
        tl.store(to, acc.to(out_ptr.dtype.element_ty), mask=ok)


def linear_persistent(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, wide: bool = False
) -> torch.Tensor:
    """`linear_reference` on a GPU. Raises ValueError for shapes that do not fit."""
    outputs, inputs = weight.shape
    if x.shape[-1] != inputs or (bias is not None and bias.shape != (outputs,)):
        raise ValueError(
            f"x must be [..., {inputs}] and bias [{outputs}], got {list(x.shape)} and "
            f"{None if bias is None else list(bias.shape)}"
        )
    rows = x.reshape(-1, inputs)
    if rows.stride(1) != 1 or weight.stride(1) != 1:
        raise ValueError("x and weight must be dense in their last dimension")
    dtype = torch.float32 if wide else x.dtype
    out = torch.empty((*x.shape[:-1], outputs), dtype=dtype, device=x.device)
    if rows.shape[0] == 0:
        return out
    arch = architecture(x.device)
    tile = product_tile(arch.matmul, x.dtype)
    tiles = triton.cdiv(rows.shape[0], tile.rows) * triton.cdiv(outputs, tile.cols)
    linear_kernel[(min(arch.processors, tiles),)](
        rows,
        weight,
        weight if bias is None else bias,
        out,
        rows.shape[0],
        rows.stride(0),
        weight.stride(0),
        N=outputs,
        K=inputs,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.cols,
        BLOCK_K=tile.depth,
        GROUP=GROUP,
        BIAS=bias is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out
