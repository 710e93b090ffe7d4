"""AdamW in one pass over a flat buffer, in Triton: gradients are clipped as they are read, bf16 weights written beside.

34 bytes of traffic a parameter with bf16 gradients, where clipping, torch's fused AdamW and a cast take 46. It differs
from torch's in the order of roundings alone (tests/gpu/test_train.py).
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = {"BLOCK": 1024, "num_warps": 4}


def adam(
    master: Tensor,
    mean: Tensor,
    square: Tensor,
    gradient: Tensor,
    weights: Tensor,
    step: int,
    clipping: float,
    rate: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
) -> None:
    """One step of AdamW (Loshchilov & Hutter 2019, algorithm 2, decay scaled by the rate as torch does), in place.

    Args:
        master, mean, square: [N] fp32, changed; weights: [N], the new master weights in their own type.
        gradient: [N] fp32 or bf16.
        step: from 1.
        clipping: what the gradients are multiplied with.
        rate, decay: learning rate and weight decay.
    """
    size = len(master)
    _adam[(triton.cdiv(size, BLOCK["BLOCK"]),)](
        *(master, mean, square, gradient, weights, size, clipping, 1 - rate * decay),
        *(rate / (1 - betas[0] ** step), (1 - betas[1] ** step) ** 0.5, 1 - betas[0], betas[1], 1 - betas[1], eps),
        **BLOCK,
    )


@triton.jit
def _adam(
    master,
    mean,
    square,
    gradient,
    weights,
    size,
    clipping,
    kept,
    rate,
    root,
    rest1,
    beta2,
    rest2,
    eps,
    BLOCK: tl.constexpr,  # noqa: N803
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    slope = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32) * clipping
    first = tl.load(mean + at, mask=inside, other=0.0)
    first += (slope - first) * rest1
    second = tl.load(square + at, mask=inside, other=0.0) * beta2 + slope * slope * rest2
    value = tl.load(master + at, mask=inside, other=0.0) * kept - rate * first / (tl.sqrt(second) / root + eps)
    tl.store(mean + at, first, mask=inside)
    tl.store(square + at, second, mask=inside)
    tl.store(master + at, value, mask=inside)
    tl.store(weights + at, value.to(weights.dtype.element_ty), mask=inside)
