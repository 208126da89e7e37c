"""Official checkpoints: read to the bit, refused by name, and never run, whatever they say."""

import io
import json
import pickle
import pickletools
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from mis_platform import cli
from mis_platform.config import EvalConfig, Run, plain
from mis_platform.model import checkpoints
from mis_platform.model.checkpoints import LEGACY_MAGIC, LEGACY_PROTOCOL, import_checkpoint
from mis_platform.model.ritm import Ritm
from mis_platform.model.simpleclick import SimpleClick
from mis_platform.model.weights import FAMILIES, empty_model, eval_config, load_model, read_config
from mis_platform.storage import Storage

State = dict[str, Tensor]
BOTH = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


@pytest.fixture(scope="module")
def vit() -> State:
    torch.manual_seed(0)
    return dict(SimpleClick("vit_xt", 448).state_dict())


@pytest.fixture(scope="module")
def hrnet() -> State:
    torch.manual_seed(0)
    state = dict(Ritm("hrnet18s").state_dict())
    return {name: tensor + 7 if name.endswith("num_batches_tracked") else tensor for name, tensor in state.items()}


@pytest.fixture
def isegm(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The package of the official code, as far as its checkpoints need it."""
    losses = types.ModuleType("isegm.model.losses")

    class CrossEntropyLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cls_criterion = losses.cross_entropy
            self.loss_weight = 1.0

    def cross_entropy() -> None:
        raise AssertionError("a function of the checkpoint was called")

    for part in (CrossEntropyLoss, cross_entropy):
        part.__module__, part.__qualname__ = "isegm.model.losses", part.__name__
        setattr(losses, part.__name__, part)
    monkeypatch.setitem(sys.modules, "isegm", types.ModuleType("isegm"))
    monkeypatch.setitem(sys.modules, "isegm.model", types.ModuleType("isegm.model"))
    monkeypatch.setitem(sys.modules, "isegm.model.losses", losses)
    return losses


def official(state: State, class_name: str, value: Any = None) -> dict[str, Any]:
    """A checkpoint as the three projects save it: state_dict with its metadata, class and parameters beside it."""
    ordered = OrderedDict(state)
    ordered._metadata = OrderedDict([("", {"version": 1})])  # type: ignore[attr-defined]
    parameter = {"type": "builtin", "value": value, "specified": True}
    other = {"type": "class", "value": "torch.nn.modules.batchnorm.BatchNorm2d", "specified": False}
    return {"state_dict": ordered, "config": {"class": class_name, "params": {"head": parameter, "norm_layer": other}}}


def save(path: Path, content: Any, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


VIT, MIS = "isegm.model.is_plainvit_model.PlainVitModel", "mis.model.is_model.MISModel"
HRNET = "isegm.model.is_hrnet_model.HRNetModel"


# -- what is imported ------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(("class_name", "threshold"), [(VIT, 0.49), (MIS, 0.5)])
def test_simpleclick_and_mis(
    zipped: bool, class_name: str, threshold: float, vit: State, isegm: types.ModuleType, tmp_path: Path
) -> None:
    content = official(vit, class_name, {"in_channels": [96, 192], "loss_decode": isegm.CrossEntropyLoss()})
    path = save(tmp_path / "official.pth", content, zipped)
    config = import_checkpoint(path, tmp_path / "model")
    assert (config["family"], config["variant"], config["image_size"]) == ("simpleclick", "vit_xt", 448)
    model = load_model(tmp_path / "model")
    assert isinstance(model, SimpleClick)
    assert model.state_dict().keys() == vit.keys()
    assert all(torch.equal(tensor, vit[name]) for name, tensor in model.state_dict().items())
    assert eval_config(read_config(tmp_path / "model")) == EvalConfig(threshold=threshold)


@BOTH
def test_ritm(zipped: bool, hrnet: State, tmp_path: Path) -> None:
    path = save(tmp_path / "h18s.pth", official(hrnet, HRNET), zipped)
    import_checkpoint(path, tmp_path / "model")
    model = load_model(tmp_path / "model")
    assert isinstance(model, Ritm)
    assert model.variant == "hrnet18s"
    assert not model.training
    assert all(torch.equal(tensor, hrnet[name]) for name, tensor in model.state_dict().items())
    config = read_config(tmp_path / "model")
    assert config["source"] == {"file": "h18s.pth", "class": HRNET}
    protocol = eval_config(config)
    changed = {name: value for name, value in plain(protocol).items() if plain(EvalConfig())[name] != value}
    assert changed == {"threshold": 0.49, "zoom_size": 400, "davis_zoom_size": 600, "zoom_skip_clicks": 1}


@pytest.mark.parametrize("variant", ["hrnet18", "hrnet18_baseline"])
def test_the_variant_is_told_from_the_shapes(variant: str, tmp_path: Path) -> None:
    state = dict(Ritm(variant).state_dict())
    assert import_checkpoint(save(tmp_path / "x.pth", official(state, HRNET)), tmp_path / "m")["variant"] == variant


@pytest.mark.parametrize(
    ("family", "variant"), [(family, variant) for family, variants in FAMILIES.items() for variant in variants]
)
def test_every_variant_is_told_from_its_layout(family: str, variant: str) -> None:
    size = 448 if family == "simpleclick" else 400
    layout = empty_model(family, variant, size).state_dict()
    assert checkpoints._recognise(layout, Path("x.pth")) == (family, variant, size)


def test_another_size_and_the_names_of_multi_gpu_training(tmp_path: Path) -> None:
    state = {f"module.{name}": tensor for name, tensor in SimpleClick("vit_xt", 224).state_dict().items()}
    config = import_checkpoint(save(tmp_path / "x.pth", {"state_dict": state}), tmp_path / "m")
    assert config["image_size"] == 224
    assert load_model(tmp_path / "m").image_size == (224, 224)


def test_transposed_and_shared_tensors(hrnet: State, tmp_path: Path) -> None:
    """Strides and offsets count, and two tensors may lie in one storage."""
    name, other = "feature_extractor.conv1.weight", "feature_extractor.conv2.weight"
    state = dict(hrnet)
    state[name] = hrnet[name].to(memory_format=torch.channels_last)
    both = torch.cat([hrnet[other].flatten(), hrnet["feature_extractor.bn1.weight"]])
    state[other], state["feature_extractor.bn1.weight"] = both[:-64].view(64, 64, 3, 3), both[-64:]
    assert not state[name].is_contiguous()
    import_checkpoint(save(tmp_path / "x.pth", official(state, HRNET)), tmp_path / "m")
    found = load_model(tmp_path / "m").state_dict()
    assert all(torch.equal(found[each], hrnet[each]) for each in hrnet)


def test_refinement_is_part_of_the_weights_file(hrnet: State, vit: State, tmp_path: Path) -> None:
    path = save(tmp_path / "x.pth", official(hrnet, HRNET))
    import_checkpoint(path, tmp_path / "plain")
    import_checkpoint(path, tmp_path / "refined", refine="fbrs")
    first, second = ((tmp_path / each / "model.safetensors").read_bytes() for each in ("plain", "refined"))
    assert first != second
    assert read_config(tmp_path / "refined")["refine"] == "fbrs"
    config = json.loads((tmp_path / "refined" / "config.json").read_text())
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="import the checkpoint again"):
        load_model(tmp_path / "plain")
    with pytest.raises(ValueError, match="refine must be one of: fbrs, got 'brs'"):
        import_checkpoint(path, tmp_path / "other", refine="brs")
    with pytest.raises(ValueError, match="refine=fbrs needs a model of family ritm, this is simpleclick"):
        import_checkpoint(save(tmp_path / "v.pth", official(vit, VIT)), tmp_path / "other", refine="fbrs")
    assert not (tmp_path / "other").exists()


def test_a_model_is_not_overwritten(hrnet: State, tmp_path: Path) -> None:
    path = save(tmp_path / "x.pth", official(hrnet, HRNET))
    import_checkpoint(path, tmp_path / "m")
    with pytest.raises(ValueError, match="already holds a model"):
        import_checkpoint(path, tmp_path / "m")


@pytest.mark.parametrize("below", ["", "deeper/m"])
def test_a_file_is_no_folder_for_a_model(below: str, hrnet: State, tmp_path: Path) -> None:
    path = save(tmp_path / "x.pth", official(hrnet, HRNET))
    content = path.read_bytes()
    with pytest.raises(ValueError, match=r"x\.pth is a file; a model is a folder of files"):
        import_checkpoint(path, path / below)
    assert path.read_bytes() == content


def test_a_place_where_no_folder_can_be_made(hrnet: State, tmp_path: Path) -> None:
    path = save(tmp_path / "x.pth", official(hrnet, HRNET))
    with pytest.raises(ValueError, match=r"/proc/no-such-model: no folder can be made there \(No such file"):
        import_checkpoint(path, "/proc/no-such-model")


# -- settings --------------------------------------------------------------------------------------------------------


def test_what_is_given_stays() -> None:
    own = {"eval": {"threshold": 0.49, "zoom_size": 400}}
    base = EvalConfig(threshold=0.6, max_clicks=3)
    assert eval_config(own, base, ["threshold"]).threshold == 0.6
    assert eval_config(own, base).threshold == 0.49
    assert eval_config(own, base).max_clicks == 3
    assert eval_config(own, base).zoom_size == 400
    assert eval_config({}, base) is base


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"treshold": 0.4}, "treshold"),
        ({"threshold": 2}, "threshold"),
        ({"zoom_size": 0.5}, "zoom_size"),
        ({"zoom_size": 0}, "greater than or equal to 1"),
        ({"davis_zoom_size": "wide"}, "valid integer"),
        (3, "object"),
    ],
)
def test_wrong_settings(own: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        eval_config({"eval": own})


# -- what does not fit -----------------------------------------------------------------------------------------------


def _without(state: State) -> None:
    del state["feature_extractor.cls_head.bias"], state["feature_extractor.conv1.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without, r"missing feature_extractor\.cls_head\.bias and 1 more"),
        (lambda state: state.update(extra=torch.zeros(1)), "unexpected extra"),
        (
            lambda state: state.update({"feature_extractor.cls_head.weight": torch.zeros(1, 95, 1, 1)}),
            r"feature_extractor\.cls_head\.weight has shape \(1, 95, 1, 1\), hrnet18s needs \(1, 96, 1, 1\)",
        ),
        (lambda state: state.update({"feature_extractor.cls_head.bias": torch.zeros(1).double()}), "is float64"),
        (lambda state: state.update({"feature_extractor.cls_head.bias": torch.full((1,), torch.nan)}), "holds NaN"),
        (lambda state: state.update({"feature_extractor.cls_head.bias": 3}), "is no tensor"),
        (lambda state: state.pop("maps_transform.0.weight"), "no checkpoint that can be imported: SimpleClick and MIS"),
    ],
)
def test_the_first_wrong_tensor_is_named(
    change: Callable[[State], None], message: str, hrnet: State, tmp_path: Path
) -> None:
    state = dict(hrnet)
    change(state)
    with pytest.raises(ValueError, match=message):
        import_checkpoint(save(tmp_path / "x.pth", official(state, HRNET)), tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02.", b"garbage" * 99, b"\x80\x02K\x01."])
def test_other_files(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged or no torch checkpoint"):
        import_checkpoint(path, tmp_path / "m")
    with pytest.raises(ValueError, match="no checkpoint file"):
        import_checkpoint(tmp_path / "nowhere", tmp_path / "m")


@BOTH
@pytest.mark.parametrize("share", [0.02, 0.3, 0.99])
def test_a_torn_file(share: float, zipped: bool, hrnet: State, tmp_path: Path) -> None:
    path = save(tmp_path / "x.pth", official(hrnet, HRNET), zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="damaged"):
        import_checkpoint(path, tmp_path / "m")


def test_a_compressed_archive(hrnet: State, tmp_path: Path) -> None:
    """Torch never compresses; a small archive that grows without end is no checkpoint."""
    path = save(tmp_path / "x.pth", official(hrnet, HRNET))
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in archive.namelist():
            bomb.writestr(name, archive.read(name))
    with pytest.raises(ValueError, match="is compressed or larger"):
        import_checkpoint(tmp_path / "bomb.pth", tmp_path / "m")


def test_a_tensor_larger_than_its_storage(tmp_path: Path) -> None:
    """Strides of 0 would make any size from one number."""
    state = {"a": torch.zeros(1).expand(10**12)}
    with pytest.raises(ValueError, match=r"a tensor of shape \(1000000000000,\) in a storage of 1 numbers"):
        import_checkpoint(save(tmp_path / "x.pth", {"state_dict": state}), tmp_path / "m")


# -- code ------------------------------------------------------------------------------------------------------------


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def _canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def traps(canary: Path) -> dict[str, Any]:
    import os

    command, source = f"touch {canary}", f"open({str(canary)!r}, 'w')"
    return {
        "posix.system": Calls(os.system, command),
        "builtins.eval": Calls(eval, source),
        "builtins.exec": Calls(exec, source),
        "builtins.getattr": Calls(getattr, Path, "touch"),
        "torch.load": Calls(torch.load, str(canary)),
        "pathlib.Path.touch": Calls(Path.touch, canary),
        "numpy.load": Calls(np.load, str(canary)),
        "builtins.open": Calls(open, str(canary), "w"),
    }


NAMES = ["posix.system", "builtins.eval", "builtins.getattr", "torch.load", "pathlib.Path.touch", "numpy.load"]


@BOTH
@pytest.mark.parametrize("place", ["state_dict", "config", "deep", "key"])
@pytest.mark.parametrize("name", NAMES)
def test_a_trap_leaves_no_trace(name: str, place: str, zipped: bool, tmp_path: Path) -> None:
    canary = _canary(tmp_path)
    trap = traps(canary)[name]
    content = official({"a": torch.zeros(2)}, HRNET, {"deep": [{"er": (1, trap)}]} if place == "deep" else None)
    if place == "state_dict":
        content["state_dict"]["trap"] = trap
    elif place == "config":
        content["config"] = trap
    elif place == "key":
        content["config"]["params"][trap] = 1
    path = save(tmp_path / "evil.pth", content, zipped)
    with pytest.raises(ValueError, match=r"evil\.pth was refused, and nothing in it was run: it names "):
        import_checkpoint(path, tmp_path / "m")
    assert not canary.exists()
    assert not (tmp_path / "m").exists()


def test_the_traps_work(tmp_path: Path) -> None:
    canary = _canary(tmp_path)
    for name in ("posix.system", "builtins.eval", "builtins.exec", "pathlib.Path.touch", "builtins.open"):
        pickle.loads(pickle.dumps(traps(canary)[name]))  # noqa: S301
        assert canary.exists(), name
        canary.unlink()


def raw(path: Path, program: bytes) -> Path:
    """A legacy checkpoint whose structure is this pickle program."""
    head = b"".join(pickle.dumps(each, 2) for each in (LEGACY_MAGIC, LEGACY_PROTOCOL, {"little_endian": True}))
    path.write_bytes(head + program + pickle.dumps([], 2))
    return path


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"cos\nsystem\n(S'touch CANARY'\ntR.", r"'os\.system'"),
        (b"(S'touch CANARY'\nios\nsystem\n.", r"'os\.system'"),
        (b"(cos\nsystem\nS'touch CANARY'\no.", r"'os\.system'"),
        (b"\x80\x04" + text("os") + text("path.os.system") + b"\x93" + text("touch CANARY") + b"\x85R.", "os.path"),
        (b"\x80\x04" + text("isegmx") + text("os.system") + b"\x93.", "isegmx"),
        (b"\x80\x04" + text("mis_platform.cli") + text("os.system") + b"\x93.", "mis_platform"),
        (b"\x80\x04" + text("builtins") + text("object.__subclasses__") + b"\x93)R.", "__subclasses__"),
        (b"c__builtin__\ngetattr\n(cos\nsystem\nS'x'\ntR.", "getattr"),
        (b"ctorch.storage\n_load_from_bytes\n(S'x'\ntR.", "_load_from_bytes"),
        (b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n.", "__globals__"),
        (b"\x80\x02\x82\x01.", "instruction EXT1"),
        (b"\x80\x05\x97.", "instruction NEXT_BUFFER"),
        (b"Vx\nQ.", "damaged"),
        (b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".", "an integer of"),
        (b"0.", "damaged"),
        (b"R.", "damaged"),
        (b"ccollections\nOrderedDict\n(cisegm.x\ny\ntR.", "damaged"),
    ],
)
def test_programs(program: bytes, message: str, tmp_path: Path) -> None:
    canary = _canary(tmp_path)
    path = raw(tmp_path / "evil.pth", program.replace(b"CANARY", str(canary).encode()))
    with pytest.raises(ValueError, match=message):
        import_checkpoint(path, tmp_path / "m")
    assert not canary.exists()


def test_a_name_of_the_projects_is_never_looked_up(isegm: types.ModuleType, tmp_path: Path) -> None:
    """isegm.model.losses is there, and what hangs on it could be reached by a dotted name; nobody does."""
    import os

    canary = _canary(tmp_path)
    isegm.os = os  # type: ignore[attr-defined]
    call = text("isegm.model.losses") + text("os.system") + b"\x93" + text(f"touch {canary}") + b"\x85R"
    with pytest.raises(ValueError, match="holds no state_dict"):
        import_checkpoint(raw(tmp_path / "evil.pth", b"\x80\x04" + call + b"."), tmp_path / "m")
    assert not canary.exists()


def test_nested_tuples_as_keys_end_at_once(tmp_path: Path) -> None:
    """Hashing this key takes 2^200 steps."""
    program = b"\x80\x02})" + b"2\x86" * 200 + b"K\x01s."
    with pytest.raises(ValueError, match="neither text nor numbers"):
        import_checkpoint(raw(tmp_path / "evil.pth", program), tmp_path / "m")


def opcodes() -> Iterator[bytes]:
    for each in pickletools.opcodes:
        yield each.code.encode("latin-1")


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(list(opcodes())), st.binary(max_size=4)), max_size=40))
def test_any_program_is_read_or_refused(parts: list[bytes]) -> None:
    machine = checkpoints.Machine()
    try:
        machine.run(io.BytesIO(b"".join(parts) + b"."))
    except (checkpoints.Refused, checkpoints._Damaged):
        return
    assert not any(callable(value) and not isinstance(value, tuple) for value in machine.stack)


def test_plain_values_are_read_as_pickle_reads_them() -> None:
    values = {"a": [1, -3, 2**40, 1.5, None, True], "b": (b"x", "ä", ()), "c": {"d": {1: [[]]}}}
    for protocol in range(6):
        assert checkpoints.Machine().run(io.BytesIO(pickle.dumps(values, protocol))) == values or protocol < 3


def test_the_written_weights_are_safetensors(hrnet: State, tmp_path: Path) -> None:
    import_checkpoint(save(tmp_path / "x.pth", official(hrnet, HRNET)), tmp_path / "m")
    content = (tmp_path / "m" / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    assert json.loads(content[8 : 8 + length]).keys() == hrnet.keys()
    assert safetensors.torch.load(content).keys() == hrnet.keys()


# -- command line ----------------------------------------------------------------------------------------------------


def mis(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["mis", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_the_command(
    hrnet: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = save(tmp_path / "x.pth", official(hrnet, HRNET)), tmp_path / "m"
    assert mis(monkeypatch, "import", str(path), "--out", str(out), "--refine", "fbrs") == 0
    assert "ritm hrnet18s; threshold=0.49, zoom_size=400" in capsys.readouterr().out
    assert load_model(out).variant == "hrnet18s"
    assert mis(monkeypatch, "import", str(path), "--out", str(out)) == 2
    assert "already holds a model" in capsys.readouterr().err


def test_each_family_is_scored_at_the_sizes_that_it_takes(
    hrnet: State, vit: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong ones are refused while the work is only described; other sizes are other evaluations."""
    for name, content in (("ritm", official(hrnet, HRNET)), ("vit", official(vit, VIT))):
        import_checkpoint(save(tmp_path / f"{name}.pth", content), tmp_path / name)
    for folder in ("images", "masks"):
        (tmp_path / "benchmark" / folder).mkdir(parents=True)
        Image.fromarray(np.eye(40, dtype=np.uint8) * 255).save(tmp_path / "benchmark" / folder / "0.png")

    def plan(model: str, *settings: str) -> tuple[int, str, str]:
        words = ["eval", "--model", str(tmp_path / model), "--dataset", f"folder:{tmp_path / 'benchmark'}"]
        words += [
            "--root",
            str(tmp_path / "root"),
            "--dry-run",
            *(word for text in settings for word in ("--set", text)),
        ]
        return mis(monkeypatch, *words), *capsys.readouterr()

    addresses = [plan("ritm"), *(plan("ritm", f"eval.zoom_size={size}") for size in (400, 224, 333, 1))]
    assert [code for code, _, _ in addresses] == [0] * 5
    assert addresses[0] == addresses[1]  # 400 is its own
    assert len({out for _, out, _ in addresses}) == 4
    assert plan("vit", "eval.zoom_size=672")[0] == plan("vit")[0] == 0
    for setting in ("eval.zoom_size=400", "eval.davis_zoom_size=600", "eval.zoom_skip_clicks=1"):
        code, _, message = plan("vit", setting)
        assert code == 2
        assert f"{setting}: SimpleClick takes" in message
    for model in ("ritm", "vit"):
        assert plan(model, "eval.zoom_size=0")[0] == 2
    (tmp_path / "vit" / "config.json").unlink()
    code, _, message = plan("vit")
    assert code == 3
    assert "vit holds no model: config.json is missing" in message


def test_evaluation_takes_the_settings_of_the_model(hrnet: State, tmp_path: Path) -> None:
    """--set wins over the model, the model over the defaults; what was trained here is asked as ever."""
    path = save(tmp_path / "h18s.pth", official(hrnet, HRNET))
    import_checkpoint(path, tmp_path / "m", refine="fbrs")
    run = Run(eval=EvalConfig(threshold=0.3, max_clicks=5))
    assignments = ["eval.threshold=0.3", "eval.max_clicks=5", "train.epochs=2"]
    found = cli._as_imported(run, Storage(str(tmp_path / "m")), assignments)
    assert (found.eval.threshold, found.eval.max_clicks, found.eval.zoom_size) == (0.3, 5, 400)
    assert found.eval.davis_zoom_size == 600
    config = tmp_path / "m" / "config.json"
    trained = {"variant": "vit_xt", "image_size": 448, "run": {}}
    config.write_text(json.dumps(trained))
    assert cli._as_imported(run, Storage(str(tmp_path / "m")), assignments) == run
