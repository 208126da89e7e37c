"""The Triton kernel of the smoothness loss, run by Triton's interpreter on the CPU; tests/test_gpu.py compiles it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mis_platform.model import losses
from mis_platform.model.losses import FORMS

# [B, H, W]. Of the last one some blocks (4 x 64 pixels) lie away from the border, some end one pixel before it.
SHAPES = [(1, 1, 1), (1, 1, 9), (1, 6, 1), (1, 2, 2), (3, 3, 3), (2, 5, 7), (1, 13, 193)]
SMALL = (2, 4, 7)

# Whether a kernel is compiled or interpreted is settled when Triton is imported, so this is a process of its own.
INTERPRET = """
import sys, torch
from mis_platform.model.losses import FORMS, _fused
cases = torch.load(sys.argv[1])
results = {key: _fused(*tensors, FORMS[key[0]], key[2] != "no gradient") for key, tensors in cases.items()}
torch.save(results, sys.argv[2])
"""

Case = tuple[Tensor, Tensor]
Key = tuple[str, tuple[int, ...], str]


def cases() -> dict[Key, Case]:
    """(prediction [B, H, W], image [B, 3, H, W]), float32; colours of a few levels around grey, so that pairs count."""
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Case:
        batch, height, width = shape
        image = 0.5 + 0.03 * torch.randn(batch, 3, height, width, generator=rng)
        return torch.randn(shape, generator=rng), image

    found: dict[Key, Case] = {(form, shape, "random"): draw(*shape) for form in FORMS for shape in SHAPES}
    for form in FORMS:
        prediction, image = draw(*SMALL)
        found[form, SMALL, "one colour"] = prediction, torch.full_like(image, 0.7)
        found[form, SMALL, "one prediction"] = torch.full_like(prediction, 0.7), image
        found[form, SMALL, "no gradient"] = prediction, image
        strided = torch.stack([prediction, prediction], dim=-1)[..., 0]
        found[form, SMALL, "strided"] = strided, image.to(memory_format=torch.channels_last)
        prediction = prediction.clone()
        prediction[1, 2, 3] = torch.nan
        found[form, SMALL, "not a number"] = prediction, image
    return found


CASES = cases()


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[Key, Case]:
    """(values [B], gradient [B, H, W]) of every case."""
    pytest.importorskip("triton")
    folder: Path = tmp_path_factory.mktemp("interpreted")
    torch.save(CASES, folder / "cases.pt")
    command = [sys.executable, "-c", INTERPRET, str(folder / "cases.pt"), str(folder / "results.pt")]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    results: dict[Key, Case] = torch.load(folder / "results.pt")
    return results


@pytest.mark.parametrize("key", CASES, ids=str)
def test_the_kernel_computes_what_float64_does(key: Key, interpreted: dict[Key, Case]) -> None:
    prediction, image = CASES[key]
    values, gradient = interpreted[key]
    assert values.dtype == gradient.dtype == torch.float32
    expected_values, expected = losses._pair_by_pair(prediction.double(), image.double(), FORMS[key[0]], True)
    torch.testing.assert_close(values.double(), expected_values, rtol=1e-6, atol=0, equal_nan=True)
    if key[2] == "not a number":
        assert values.isfinite().tolist() == [True, False]
    elif key[2] != "no gradient":
        tolerance = 1e-6 * expected.abs().max().item()
        torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_the_kernel_compiles_for_a_gpu(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes Python that the compiler refuses. Compute capability 9.0 is an H100's; none is needed."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mis_platform.model.smoothness_kernel import _kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    spec = FORMS[form]
    constants = {"to_luv": sum(spec.scaled_rows, ()), "inverse_two_var_xy": 0.5 / spec.var_xy, "needs_gradient": True}
    constants |= {"spacing": spec.spacing, "margin": spec.margin, "block_rows": 4, "block_columns": 64}
    types = dict.fromkeys(("prediction", "image", "gradient", "sums"), "*fp32")
    types |= {"height": "i32", "width": "i32", "scale": "fp32"} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(_kernel, types, constants)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


def test_where_the_kernel_cannot_run_it_says_so_and_the_loss_goes_without(caplog: pytest.LogCaptureFixture) -> None:
    """Not interpreted, a kernel refuses the CPU's memory, if there is a GPU or a Triton at all."""
    assert not losses._kernel_works.__wrapped__(torch.device("cpu"), FORMS["official"])
    (record,) = caplog.records
    assert record.getMessage().startswith("the smoothness loss goes without its fast kernel: ")
