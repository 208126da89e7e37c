"""The smoothness loss against its unfold formulation: time and peak memory of forward plus backward.

    python benchmarks/smoothness.py       # 8 x 448 x 448 on the CPU; 32 x 448 x 448 on the GPU, if there is one
    python benchmarks/smoothness.py --batch 2 --size 224 --repeats 3

Each formulation runs in a process of its own, so that its peak memory (resident set; on a GPU the allocator's) is its
own; it is counted from the moment the inputs exist. The processes take turns; times are medians over all turns.
Targets: 5x faster, 10x smaller.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mis_platform.model.losses import FORMS, smoothness_loss


def unfold_smoothness(logits_B1HW: Tensor, image_B3HW: Tensor, form_name: str) -> Tensor:
    """Equation 7 as one writes it down in PyTorch: unfold every neighbourhood, let autograd do the rest."""
    form = FORMS[form_name]
    height, width = logits_B1HW.shape[-2:]
    prediction = logits_B1HW.sigmoid() if form.on_probabilities else logits_B1HW
    luv = torch.einsum("lc,bchw->blhw", image_B3HW.new_tensor(form.to_luv), image_B3HW * 255)
    y, x = torch.meshgrid(
        *(torch.arange(size, dtype=luv.dtype, device=luv.device) for size in (height, width)), indexing="ij"
    )
    position = torch.stack([y, x])[None].expand(len(luv), -1, -1, -1)

    def squared_differences(planes_BCHW: Tensor) -> Tensor:
        side = 2 * form.radius + 1
        padded = F.pad(planes_BCHW, (form.margin,) * 4, mode="replicate")
        unfolded = F.unfold(padded, side, dilation=form.spacing).unflatten(1, (-1, side * side))
        centre = side * side // 2
        others = torch.cat([unfolded[:, :, :centre], unfolded[:, :, centre + 1 :]], dim=2)
        return (others - planes_BCHW.flatten(2)[:, :, None]) ** 2

    d_xy = squared_differences(position).sum(dim=1)
    d_luv = squared_differences(luv)
    affinity = torch.exp(
        -d_xy / (2 * form.var_xy) - d_luv[:, 0] / (2 * form.var_l) - d_luv[:, 1:].sum(dim=1) / (2 * form.var_uv)
    )
    return (affinity * squared_differences(prediction)[:, 0]).mean()


FORMULATIONS: dict[str, Callable[..., Tensor]] = {"ours": smoothness_loss, "unfold": unfold_smoothness}


def measure(formulation: str, form: str, device: str, batch: int, size: int, repeats: int) -> dict[str, Any]:
    """Seconds (one per repeat), peak bytes over the inputs, and the loss and gradient norm as a check."""
    generator = torch.Generator().manual_seed(0)
    # Smooth colours, as photos have: on white noise all affinities vanish.
    coarse = torch.rand(batch, 3, size // 16, size // 16, generator=generator)
    image = F.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1).to(device)
    logits = (3 * torch.randn(batch, 1, size, size, generator=generator)).to(device).requires_grad_()
    loss_of = FORMULATIONS[formulation]

    def step() -> tuple[float, float]:
        logits.grad = None
        start = time.perf_counter()
        loss = loss_of(logits, image, form)
        loss.backward()
        value = loss.item()  # waits for a GPU
        return time.perf_counter() - start, value

    small = torch.zeros(1, 1, 32, 32, device=device, requires_grad=True)
    loss_of(small, torch.zeros(1, 3, 32, 32, device=device), form).backward()  # loads the kernels, touches no memory
    before = _memory(device)
    _, value = step()
    peak = _memory(device) - before
    seconds = [step()[0] for _ in range(repeats)]
    assert logits.grad is not None
    return {"seconds": seconds, "peak": peak, "loss": value, "gradient": logits.grad.norm().item()}


def _memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _in_a_process(formulation: str, form: str, device: str, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", formulation, "--form", form, "--device", device]
    command += ["--batch", str(arguments.batch), "--size", str(arguments.size), "--repeats", str(arguments.repeats)]
    # Large blocks must come from the kernel and return to it, or the first peak hides the others.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def compare(form: str, device: str, arguments: argparse.Namespace) -> str:
    """One line of the table: both formulations, `arguments.rounds` turns each."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in FORMULATIONS}
    for _ in range(arguments.rounds):
        for name in FORMULATIONS:
            runs[name].append(_in_a_process(name, form, device, arguments))
    seconds = {name: statistics.median(s for run in runs[name] for s in run["seconds"]) for name in runs}
    peak = {name: statistics.median(run["peak"] for run in runs[name]) for name in runs}
    for quantity in ("loss", "gradient"):
        ours, peer = runs["ours"][0][quantity], runs["unfold"][0][quantity]
        assert abs(ours - peer) <= 1e-4 * abs(peer), f"{quantity}: {ours} against {peer}"
    label = f"{form} ({FORMS[form].num_neighbours} neighbours), {device}, {arguments.batch}x{arguments.size}^2"
    return (
        f"{label:<46} {seconds['ours'] * 1e3:>9.1f} {seconds['unfold'] * 1e3:>9.1f} "
        f"{seconds['unfold'] / seconds['ours']:>6.1f}x {peak['ours'] / 2**20:>9.1f} {peak['unfold'] / 2**20:>9.1f} "
        f"{peak['unfold'] / peak['ours']:>6.1f}x"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, help="images (default: 8 on a CPU, 32 on a GPU)")
    parser.add_argument("--size", type=int, default=448, help="pixels")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps per process")
    parser.add_argument("--rounds", type=int, default=3, help="processes per formulation")
    parser.add_argument("--child", choices=list(FORMULATIONS), help=argparse.SUPPRESS)
    parser.add_argument("--form", choices=list(FORMS), default="official", help=argparse.SUPPRESS)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind = (arguments.child, arguments.form, arguments.device)
        print(json.dumps(measure(*kind, arguments.batch, arguments.size, arguments.repeats)))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; forward + backward, medians")
    print(f"{'':<46} {'ours ms':>9} {'unfold ms':>9} {'ratio':>7} {'ours MiB':>9} {'unfold':>9} {'ratio':>7}")
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        for form in FORMS:
            settings = argparse.Namespace(**vars(arguments))
            settings.batch = arguments.batch or {"cpu": 8, "cuda": 32}[device]
            print(compare(form, device, settings), flush=True)


if __name__ == "__main__":
    main()
