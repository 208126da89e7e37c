"""The smoothness loss (Equation 7) as one Triton kernel, for float32 on a GPU; `losses` defines it and has the rest.

Beyond the frame the border pixel repeats, with its coordinates, colour and prediction. So a pair of a pixel and a
neighbour beyond the frame is a pair of two pixels of the image, and the loss is a sum over those,

    sum over p, r of n(p, r) w(p, r) (x_p - x_r)^2,

where w is the affinity and n(p, r) counts the offsets that lead from p to r: a product of a count along the rows and
one along the columns. Each pixel gathers both directions of its own pairs, n(p, r) + n(r, p), so nothing is scattered:
no atomics, the same bits every time, every plane read from memory once.

Shape suffixes: B images, H W pixels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS, BLOCK_COLUMNS = 4, 64  # pixels of a program; rows of 256 bytes, two pixels for each thread of four warps


def fused_smoothness(
    prediction_BHW: Tensor,
    image_B3HW: Tensor,
    *,
    spacing: int,
    margin: int,
    var_xy: float,
    scaled_rows: tuple[tuple[float, float, float], ...],
    needs_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """(values [B], gradient [B, H, W] of their sum in the prediction), float32; no gradient unless it is needed.

    prediction and image: float32 on one GPU, the image RGB in [0, 1]. spacing, margin: of the neighbours, in pixels;
    var_xy in pixels squared; scaled_rows: 3x3, what makes l, u, v of RGB, such that their squared differences add up
    in the exponent of the affinity. With TRITON_INTERPRET=1 the tensors may be on the CPU.
    """
    prediction, image = prediction_BHW.contiguous(), image_B3HW.contiguous()
    batch, height, width = prediction.shape
    blocks = triton.cdiv(height, BLOCK_ROWS) * triton.cdiv(width, BLOCK_COLUMNS)
    sums = prediction.new_empty(batch, blocks)
    gradient = torch.empty_like(prediction) if needs_gradient else prediction
    num_neighbours = (2 * margin // spacing + 1) ** 2 - 1
    with torch.cuda.device_of(prediction):  # a kernel starts on the current device, which may be another
        _kernel[(batch * blocks,)](
            prediction,
            image,
            gradient,
            sums,
            height,
            width,
            1 / (height * width * num_neighbours),
            to_luv=sum(scaled_rows, ()),
            inverse_two_var_xy=1 / (2 * var_xy),
            spacing=spacing,
            margin=margin,
            needs_gradient=needs_gradient,
            block_rows=BLOCK_ROWS,
            block_columns=BLOCK_COLUMNS,
        )
    return sums.sum(dim=1), gradient


@triton.jit(do_not_specialize=["height", "width"])  # or images of other sizes would be compiled for anew
def _kernel(
    prediction: tl.tensor,  # float32 [B, H, W]
    image: tl.tensor,  # float32 [B, 3, H, W]
    gradient: tl.tensor,  # float32 [B, H, W], written if needed
    sums: tl.tensor,  # float32 [B, blocks], written: the part of an image's value that comes from each block
    height: tl.tensor,
    width: tl.tensor,
    scale: tl.tensor,  # 1 / pairs of an image
    to_luv: tl.constexpr,  # nine floats, row by row
    inverse_two_var_xy: tl.constexpr,
    spacing: tl.constexpr,
    margin: tl.constexpr,
    needs_gradient: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
) -> None:
    """One block of pixels p of one image, with all their neighbours r = p + (dy, dx)."""
    column_blocks = tl.cdiv(width, block_columns)
    blocks = tl.cdiv(height, block_rows) * column_blocks
    program = tl.program_id(0)
    block = program % blocks
    plane = (program // blocks).to(tl.int64) * height * width  # a large batch has more than 2^31 values
    first_row, first_column = block // column_blocks * block_rows, block % column_blocks * block_columns
    rows = first_row + tl.arange(0, block_rows)[:, None]
    columns = first_column + tl.arange(0, block_columns)[None, :]
    here = rows * width + columns
    valid = (rows < height) & (columns < width)
    # Only near the border can a distance that is no multiple of the spacing lead to a neighbour.
    rows_at_border = (first_row < margin) | (first_row + block_rows > height - margin)
    columns_at_border = (first_column < margin) | (first_column + block_columns > width - margin)

    prediction += plane
    red = image + 3 * plane
    green = red + height * width
    blue = green + height * width
    x = tl.load(prediction + here, mask=valid, other=0.0)
    r = tl.load(red + here, mask=valid, other=0.0)
    g = tl.load(green + here, mask=valid, other=0.0)
    b = tl.load(blue + here, mask=valid, other=0.0)
    total = tl.zeros([block_rows, block_columns], tl.float32)
    pull = tl.zeros([block_rows, block_columns], tl.float32)
    for dy in range(-margin, margin + 1):  # not unrolled: the code would outgrow the instruction cache
        if (dy % spacing == 0) | rows_at_border:
            forth_y = _count(rows, height, dy, spacing, margin)
            back_y = _count(rows + dy, height, -dy, spacing, margin)
            inside_y = valid & (rows + dy >= 0) & (rows + dy < height)
            for dx in tl.static_range(-margin, margin + 1):
                if (dx % spacing == 0) | columns_at_border:
                    forth_x = _count(columns, width, dx, spacing, margin)
                    back_x = _count(columns + dx, width, -dx, spacing, margin)
                    inside = inside_y & (columns + dx >= 0) & (columns + dx < width)
                    count = tl.where(inside, forth_y * forth_x + back_y * back_x, 0)
                    there = here + dy * width + dx
                    dr = r - tl.load(red + there, mask=count > 0, other=0.0)
                    dg = g - tl.load(green + there, mask=count > 0, other=0.0)
                    db = b - tl.load(blue + there, mask=count > 0, other=0.0)
                    difference = x - tl.load(prediction + there, mask=count > 0, other=0.0)
                    luma = to_luv[0] * dr + to_luv[1] * dg + to_luv[2] * db
                    u = to_luv[3] * dr + to_luv[4] * dg + to_luv[5] * db
                    v = to_luv[6] * dr + to_luv[7] * dg + to_luv[8] * db
                    distance = (dy * dy + dx * dx) * inverse_two_var_xy + luma * luma + u * u + v * v
                    weighted = count * tl.exp(-distance) * difference
                    pull += weighted
                    total += weighted * difference

    tl.store(sums + program, tl.sum(total) * (scale / 2))  # each pair has been counted from both of its ends
    if needs_gradient:
        tl.store(gradient + plane + here, pull * (2 * scale), mask=valid)


@triton.jit
def _count(
    position: tl.tensor, size: tl.tensor, step: tl.tensor, spacing: tl.constexpr, margin: tl.constexpr
) -> tl.tensor:
    """How many offsets lead from a position to position + step along one axis, both within [0, size).

    One if the step is an offset; the border position also gets the offsets that lead further out.
    """
    shorter = (margin + step + spacing - 1) // spacing  # offsets from -margin to below the step
    longer = (margin - step + spacing - 1) // spacing  # offsets from above the step to the margin
    same = 2 * margin // spacing + 1 - shorter - longer
    goal = position + step
    return same + tl.where(goal == 0, shorter, 0) + tl.where(goal == size - 1, longer, 0)
