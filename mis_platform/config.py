"""Settings: what decides a result (`Run`) and where it is computed (`Resources`).

`Run()` is the last row of the paper's Table 1; every default is the paper's or, where the paper is silent, the official
code's (docs/FIDELITY.md lists both). `Resources` never enters a fingerprint: the same Run on one laptop core and on a
cluster is the same result. One dotted name for each setting everywhere: `--set train.smooth_weight=5`, the MLflow
parameter, the column of a sweep.
"""

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError, PydanticKnownError

TRAINED = "model"  # the trained click model
CLASSICAL_READS = {  # of Table 1, they need no training; settings of `classical` that change the answers of each
    "graphcut": ("seed_radius", "frame", "gamma"),
    "random_walk": ("seed_radius", "frame", "beta"),
    "geodesic": ("seed_radius", "frame"),
    "gsc": ("seed_radius", "frame", "gamma"),
    "esc": ("seed_radius", "frame", "gamma"),
}
CLASSICAL_METHODS = tuple(CLASSICAL_READS)
# Decimals that people type and JSON does not know: .9, 10., +0.5
_DECIMAL = re.compile(r"[+-]?(\d+\.\d*|\.\d+)([eE][+-]?\d+)?")
_OWN_METHOD = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

WINDOW = 224  # pixels: side of an attention window of SimpleClick, hence of its smallest input

PIN = "sha256:"  # in front of the digest of weights, where a path would name a file


def _path_or_pin(source: str) -> str:
    if source.startswith(PIN) and not re.fullmatch(r"[0-9a-f]{64}", source.removeprefix(PIN)):
        raise PydanticCustomError(
            "pin", "after sha256: come the 64 hexadecimal digits, in small letters, of the hub's file"
        )
    return source


Probability = Annotated[float, Field(ge=0.0, le=1.0)]
# A file, or the hub's file if it has this SHA-256. An identity has the content's digest in its place, either way.
Weights = Annotated[str, AfterValidator(_path_or_pin)]
Precision = Literal["fp32", "bf16"]

NETWORK_EXTRACTORS = (
    "dino_vits8",
    "dino_vits16",
    "dino_vitb8",
    "dino_vitb16",
    "dinov2_vits14",
    "dinov2_vitb14",
    "dinov3_vits16",
    "dinov3_vitb16",
)


class Settings(BaseModel):
    """Frozen settings: an unknown name, NaN or an infinity is refused, and a value of another kind than is wanted."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    # Settings younger than the first artifacts: at their default they are no part of an identity, so addresses stay.
    younger: ClassVar[frozenset[str]] = frozenset()
    prefix: ClassVar[str] = ""  # of every name, as people type it

    @field_validator("*", mode="before")
    @classmethod
    def _is_of_its_kind(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would take true for 1, 1 for true and "10", in quotes, for 10: typing errors that go unseen."""
        assert info.field_name is not None
        kinds = _kinds(cls.model_fields[info.field_name].annotation)
        is_number = bool(kinds & {int, float})
        for item in value if isinstance(value, list | tuple) else [value]:
            if is_number and isinstance(item, bool | str):
                raise PydanticKnownError("float_type" if float in kinds else "int_type")
            if bool in kinds and isinstance(item, int | float) and not isinstance(item, bool):
                raise PydanticKnownError("bool_type")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The types of the values that an annotation allows, at any depth."""
    parts = get_args(annotation)
    if get_origin(annotation) is Literal:
        return set(map(type, parts))
    if get_origin(annotation) is Annotated:
        parts = parts[:1]
    return set().union(*map(_kinds, parts)) if parts else {annotation}


class DataConfig(Settings):
    """What counts as a usable photo."""

    max_megapixels: float = Field(50.0, gt=0)  # refused from the header, before any decoding
    min_side: int = Field(8, ge=1)  # pixels; one 8-pixel patch


class FeaturesConfig(Settings):
    """Patch features (paper section 3.1, "Implementation Details")."""

    extractor: Literal[
        "dino_vits8",
        "dino_vits16",
        "dino_vitb8",
        "dino_vitb16",
        "dinov2_vits14",
        "dinov2_vitb14",
        "dinov3_vits16",
        "dinov3_vitb16",
        "color_texture",
    ] = "dino_vits8"
    # A .safetensors or .pth file, or a folder with them; None: timm's from the hub; sha256:HEX: that one and no other.
    weights: Weights | None = None
    position_resize: Literal["bicubic", "bilinear"] = "bicubic"  # official code | paper
    layer: Literal["final_norm", "last_block"] = "final_norm"  # official code | paper
    precision: Precision = "fp32"
    # Photos of one network size that are described at once. A batch changes the last bits of features, so this is no
    # matter of resources: every forward pass has exactly that many photos, an incomplete one is filled up with copies
    # (fewer where the photos are large: features.BATCH_PATCHES). color_texture takes photos one at a time anyway.
    batch_size: int = Field(1, ge=1)

    younger: ClassVar[frozenset[str]] = frozenset({"batch_size"})


class SamplingConfig(Settings):
    """Which node of a merge tree becomes the target (Algorithm 2; Tables 4 and 5)."""

    strategy: Literal["top_down", "uniform"] = "top_down"
    alpha: float = 0.9  # decay of the chance to go deeper
    min_area: float = 0.05  # share of the patches; a proposal must cover more
    max_redraws: int = Field(100, ge=1)  # official code: then the last draw is kept whatever its size

    @model_validator(mode="after")
    def _terminates(self) -> "SamplingConfig":
        if not 0 <= self.alpha < 1:
            raise ValueError("sampling.alpha must lie in [0, 1): at 1 every walk ends in a single patch")
        if not 0 <= self.min_area <= 0.5:
            raise ValueError("sampling.min_area must lie in [0, 0.5]: one child of the root covers half the image")
        return self


class TargetConfig(Settings):
    """What a training learns to segment (the label fractions of Table 2; supervised SimpleClick)."""

    # Proposals of a merge tree (MIS), of another unsupervised method (Table 1's baselines), or objects of the masks.
    source: Literal["tree", "tokencut", "dsm", "freemask", "labels"] = "tree"
    fraction: float = Field(1.0, gt=0, le=1)  # share of the images whose labels may be seen, rounded down
    subset: Literal["first", "random"] = "first"  # of the images: first in the list (official code) | drawn by seed
    subset_seed: int = Field(0, ge=0)  # of subset=random; smaller fractions of one seed lie inside larger ones

    @model_validator(mode="after")
    def _subset_is_of_labels(self) -> "TargetConfig":
        if self.source != "labels" and (self.fraction < 1 or self.subset != "first"):
            raise ValueError(
                "target.fraction and target.subset choose the images whose labels are seen: "
                "they need target.source=labels"
            )
        return self


class TokenCutConfig(Settings):
    """TokenCut (Wang et al., CVPR 2022), saliency with the bilateral solver; the authors' values."""

    # Patches of a larger cosine similarity are joined. Features of color_texture are all alike at 0.2; 0.9 suits them.
    tau: float = Field(0.2, ge=-1, lt=1)
    sigma_spatial: float = Field(16.0, ge=1)  # pixels: cells of the bilateral grid
    sigma_luma: float = Field(16.0, ge=1)  # levels of 255
    sigma_chroma: float = Field(8.0, ge=1)  # levels of 255
    solver_lambda: float = Field(256.0, ge=0)  # weight of smoothness against the coarse mask
    confidence: float = Field(0.999, gt=0, le=1)  # in every pixel of the coarse mask


class DeepSpectralConfig(Settings):
    """Deep Spectral Methods (Melas-Kyriazi et al., CVPR 2022), multi-region; the authors' values."""

    clusters: int = Field(4, ge=2)  # one of them is the background
    eigenvectors: int = Field(5, ge=2)  # the constant first one included
    color_weight: float = Field(0.0, ge=0)  # of the colour neighbours: 0 their command line, 10 their code inside


class FreeMaskConfig(Settings):
    """Free Mask, the proposals of FreeSOLO (Wang et al., CVPR 2022); the authors' values."""

    scales: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field((1.0, 0.5, 0.25), min_length=1)  # of the queries
    mask_threshold: float = Field(0.5, gt=0, lt=1)
    nms_sigma: float = Field(2.0, gt=0)
    keep: int = Field(20, ge=1)  # proposals after non-maximum suppression
    min_maskness: Probability = 0.7  # after its decay
    min_center_row: Probability = 0.2  # share of the height: masks with a higher mean of the rows with a pixel are sky
    max_box_width: float = Field(0.95, gt=0)  # share of the width; wider ones are background


class SourcesConfig(Settings):
    """Other unsupervised proposals than merge trees: those that target.source names (Table 1's baselines)."""

    tokencut: TokenCutConfig = TokenCutConfig()
    dsm: DeepSpectralConfig = DeepSpectralConfig()
    freemask: FreeMaskConfig = FreeMaskConfig()


class ClassicalConfig(Settings):
    """The methods of Table 1 that are not deep. What their authors did not publish is shared by all and not tuned."""

    seed_radius: float = Field(5.0, ge=0, le=1000)  # pixels around a click that count as clicked; chosen on GrabCut
    frame: bool = True  # the outermost pixels are background until the first negative click; chosen on GrabCut
    gamma: float = Field(150.0, ge=0, le=1e6)  # smoothness of GraphCut, GSC and ESC (Gulshan et al.)
    beta: float = Field(1000.0, gt=0, le=1e6)  # contrast of Random Walk's edges, on scikit-image's scale


class ClickConfig(Settings):
    """Simulated clicks of training (RITM; SimpleClick's settings)."""

    max_clicks: int = Field(24, ge=1)  # per sign
    gamma: float = Field(0.8, gt=0, lt=1)  # P(k clicks) ~ gamma^k
    erosion_probability: Probability = 0.9
    background_probability: Probability = 0.1  # where a negative click comes from; the three sum to 1
    other_probability: Probability = 0.4
    border_probability: Probability = 0.5
    expand_ratio: float = Field(0.1, gt=0)  # width of the border zone over the square root of the object's area
    iterative_clicks: int = Field(3, ge=0)  # at most this many clicks on the model's own errors

    @model_validator(mode="after")
    def _regions_sum_to_one(self) -> "ClickConfig":
        total = self.background_probability + self.other_probability + self.border_probability
        if abs(total - 1) > 1e-9:
            raise ValueError(
                "clicks.background_probability + clicks.other_probability + clicks.border_probability "
                f"must be 1, they are {total:g}"
            )
        if self.iterative_clicks > self.max_clicks:
            raise ValueError("clicks.iterative_clicks cannot exceed clicks.max_clicks")
        return self


class AugmentConfig(Settings):
    """Augmentation of photo and mask (SimpleClick's SBD settings)."""

    scale_min: float = Field(0.75, gt=0)
    scale_max: float = Field(1.25, gt=0, le=10)
    flip_probability: Probability = 0.5
    rotate90_probability: Probability = 0.5
    shift_rotate_probability: Probability = 0.75
    shift_limit: float = Field(0.03, ge=0, le=1)  # share of the image side
    rotate_limit: float = Field(3.0, ge=0, le=180)  # degrees
    brightness_contrast_probability: Probability = 0.75
    brightness_limit: float = Field(0.25, ge=0, le=1)  # share of 255 that is added or taken
    contrast_min: float = Field(-0.15, ge=-1)  # levels are multiplied by 1 + contrast
    contrast_max: float = Field(0.40, le=10)
    rgb_shift_probability: Probability = 0.75
    rgb_shift_limit: float = Field(10.0, ge=0, le=255)  # levels of 255
    min_object_area: int = Field(80, ge=1)  # pixels after augmentation
    keep_background_probability: Probability = 0.01
    color_augmentation: bool = True  # jitter, grey, blur inside the model (official code)

    @model_validator(mode="after")
    def _ordered(self) -> "AugmentConfig":
        if self.scale_min > self.scale_max:
            raise ValueError("augment.scale_min must not exceed augment.scale_max")
        if self.contrast_min > self.contrast_max:
            raise ValueError("augment.contrast_min must not exceed augment.contrast_max")
        return self


class ModelConfig(Settings):
    """The click model (SimpleClick)."""

    younger: ClassVar[frozenset[str]] = frozenset({"previous_mask"})

    variant: Literal["vit_b", "vit_l", "vit_h", "vit_xt"] = "vit_b"
    image_size: int = Field(448, ge=WINDOW, multiple_of=WINDOW)  # pixels, square training crop
    init: Literal["mae", "random"] = "mae"
    init_weights: Weights | None = None  # local MAE file; None: timm's from the hub; sha256:HEX: that and no other
    # How it is given its answer to the clicks before: as probabilities (the official code) or as a mask (the paper).
    previous_mask: Literal["soft", "binary"] = "soft"

    @model_validator(mode="after")
    def _mae_exists(self) -> "ModelConfig":
        if self.variant == "vit_xt" and self.init == "mae":
            raise ValueError("model.init=mae has no weights for model.variant=vit_xt; use model.init=random")
        if self.init == "random" and self.init_weights is not None:
            raise ValueError("model.init_weights is only read with model.init=mae")
        return self


class TrainConfig(Settings):
    """The schedule (paper section 4, "Implementation Details"; official code where the paper is silent)."""

    epochs: int = Field(55, ge=1)
    learning_rate: float = Field(5e-5, gt=0)
    # The rate is multiplied by decay_factor after each. One that lies at or beyond `epochs` has no effect: that is what
    # becomes of the paper's in a shorter training (`override` refuses it of those who set it).
    decay_epochs: tuple[Annotated[int, Field(ge=1)], ...] = (50,)
    decay_factor: float = Field(0.1, gt=0, le=1)
    batch_size: int = Field(32, ge=1)  # images per step over all workers
    loss: Literal["bce", "normalized_focal"] = "bce"  # Equation 6 | supervised SimpleClick
    smooth_weight: float = Field(10.0, ge=0)  # lambda in Equation 8; Table 3
    smooth_form: Literal["official", "paper"] = "official"  # docs/FIDELITY.md
    precision: Precision = "fp32"
    seed: int = Field(0, ge=0)
    max_steps: int | None = Field(None, ge=1)  # stop early; the schedule stays that of `epochs`

    @model_validator(mode="after")
    def _decays_rise(self) -> "TrainConfig":
        if any(later <= earlier for earlier, later in itertools.pairwise(self.decay_epochs)):
            raise ValueError(f"train.decay_epochs must rise, they are {list(self.decay_epochs)}")
        return self


class EvalConfig(Settings):
    """The click protocol (paper section 4, "Evaluation"; RITM's robot with SimpleClick's zoom-in)."""

    threshold: float = Field(0.5, gt=0, lt=1)  # SimpleClick and RITM: 0.49
    target_iou: float = Field(0.9, gt=0, le=1)  # a session stops here
    max_clicks: int = Field(20, ge=1)
    min_clicks: int = Field(1, ge=1)
    fixed_clicks: bool = False  # never stop: what IoU-click curves need (Figure 6)
    flip: bool = True
    zoom_size: int = Field(448, ge=1)  # pixels; not every model takes every size: see `check_simpleclick`
    davis_zoom_size: int = Field(672, ge=1)  # pixels
    zoom_skip_clicks: Literal[-1, 1] = -1  # SimpleClick and MIS | RITM
    zoom_expansion: float = Field(1.4, ge=1)
    zoom_min_crop: int = Field(200, ge=1)  # pixels
    zoom_recompute_iou: float = Field(0.5, ge=0, le=1)
    # Of the network on a GPU; "tf32" rounds the factors of products to 11 bits, and means fp32 on a CPU.
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"

    younger: ClassVar[frozenset[str]] = frozenset({"precision"})

    @model_validator(mode="after")
    def _clicks_are_ordered(self) -> "EvalConfig":
        if self.min_clicks > self.max_clicks:
            raise ValueError(f"eval.min_clicks={self.min_clicks} must not exceed eval.max_clicks={self.max_clicks}")
        return self


def check_simpleclick(protocol: EvalConfig) -> None:
    """ValueError for a click protocol that SimpleClick cannot follow, and so no model that is trained here.

    Its input is a square of whole windows at every click; imported models of other families take more.
    """
    for name in ("zoom_size", "davis_zoom_size"):
        size = getattr(protocol, name)
        if size % WINDOW:
            allowed = ", ".join(str(k * WINDOW) for k in (1, 2, 3))
            raise ValueError(f"eval.{name}={size}: SimpleClick takes multiples of {WINDOW} pixels ({allowed}, ...)")
    if protocol.zoom_skip_clicks != -1:
        raise ValueError(
            f"eval.zoom_skip_clicks={protocol.zoom_skip_clicks}: SimpleClick takes squares from the first click on, -1"
        )


def check_fbrs(protocol: EvalConfig) -> None:
    """ValueError for an arithmetic in which f-BRS, an optimisation at every click, cannot work."""
    if protocol.precision != "fp32":
        raise ValueError(f"eval.precision={protocol.precision} is not for f-BRS, which needs fp32")


ROBOT_SETTINGS = ("target_iou", "max_clicks", "min_clicks", "fixed_clicks")  # the other eval.* say how to ask a model


class Run(Settings):
    """Everything that decides a result. `Run()` is MIS as published."""

    dataset: str = "sbd"  # training photos
    eval_datasets: tuple[str, ...] = ("grabcut",)
    method: str = TRAINED  # what answers the clicks: this model, a classical method, or module:class of a ClickModel
    data: DataConfig = DataConfig()
    features: FeaturesConfig = FeaturesConfig()
    sampling: SamplingConfig = SamplingConfig()
    target: TargetConfig = TargetConfig()
    classical: ClassicalConfig = ClassicalConfig()
    sources: SourcesConfig = SourcesConfig()
    clicks: ClickConfig = ClickConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _method_is_known(self) -> "Run":
        if self.method not in (TRAINED, *CLASSICAL_METHODS) and not _OWN_METHOD.fullmatch(self.method):
            raise ValueError(
                f"method={self.method!r} is none of: {TRAINED}, {', '.join(CLASSICAL_METHODS)}, "
                "nor the module:class of a ClickModel"
            )
        return self


class Resources(Settings):
    """Where and how wide things run. Deliberately not part of Run."""

    prefix: ClassVar[str] = "resources."

    num_workers: int = Field(1, ge=1)  # training processes
    use_gpu: bool | None = None  # None: if the cluster has one
    # Images per forward of training, which never changes the effective batch; None: 16 on a GPU (8 or 4, if its memory
    # does not hold them), 8 on a CPU.
    batch_per_device: int | None = Field(None, ge=1)
    extractors: int | None = Field(None, ge=1)  # processes that describe photos; None: 4 for each GPU, else 1 a CPU
    chunk_images: int = Field(16, ge=1)  # photos that travel together through precompute; batches are formed in them
    loaders: int | None = Field(None, ge=1)  # tasks that make training examples; None: from the free CPUs
    eval_workers: int | None = Field(None, ge=1)  # processes that score; None: 4 for each GPU, else 1 for each CPU
    eval_batch: int = Field(8, ge=1)  # objects per forward on a GPU; a CPU takes one at a time
    checkpoint_every: int = Field(200, ge=1)  # steps
    log_every: int = Field(10, ge=1)  # steps
    max_failures: int = Field(2, ge=0)  # restarts of a training before it counts as failed
    worker_silence: float = Field(100.0, gt=0)  # seconds without a sign of life: a training worker that hangs
    # Rows of a sweep at once; None: as many as there are GPUs for, one without any. More share GPUs (one worker each).
    trials: int | None = Field(None, ge=1)
    trial_silence: float = Field(1800.0, gt=0)  # seconds without a training step or a click: a row that hangs
    untrusted: bool = False  # decode photos and masks in a child process with limits on memory and time


# What people type for a setting after the paper's symbols.
ALIASES = {"lambda": "train.smooth_weight", "lamda": "train.smooth_weight", "lr": "train.learning_rate"}


# -- dotted names ----------------------------------------------------------------------------------------------------


def flatten(settings: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value, in the order of declaration."""
    flat: dict[str, Any] = {}
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def override(settings: Any, assignments: Iterable[str]) -> Any:
    """`settings` with each `dotted.name=value` applied; values are JSON or plain text, "none" is null.

    Names of Resources begin with `resources.`. Raises ValueError that names the nearest right setting, or the allowed
    values; also for train.decay_epochs beyond train.epochs, unless those were made fewer or more before.
    """
    values: dict[str, Any] = {}
    for name, value in map(_parse_assignment, assignments):
        if name not in (known := flatten(settings, settings.prefix)):
            raise ValueError(f"--set {name}: unknown setting {name!r}{nearest(name, known)}")
        values[name.removeprefix(settings.prefix)] = value
    changed = with_values(settings, values)
    if "train.decay_epochs" in values and ("train.epochs" in values or settings.train.epochs == TrainConfig().epochs):
        _check_decays(changed.train)
    return changed


def _check_decays(train: TrainConfig) -> None:
    """ValueError for decays that never come; one at the last epoch (supervised SimpleClick's) is let through."""
    if max(train.decay_epochs, default=0) > train.epochs:
        raise ValueError(
            f"train.decay_epochs={list(train.decay_epochs)}: they must not exceed train.epochs, which is {train.epochs}"
        )


def split_resources(assignments: Iterable[str]) -> tuple[list[str], list[str]]:
    """(assignments of a Run, assignments of Resources)."""
    given = list(assignments)
    wide = [text for text in given if text.startswith(Resources.prefix)]
    return [text for text in given if not text.startswith(Resources.prefix)], wide


def with_values(settings: Any, values: Mapping[str, Any]) -> Any:
    """`settings` with dotted names set to other values, validated. Raises ValueError as `override` does."""
    tree, known = settings.model_dump(), flatten(settings)
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"unknown setting {name!r}{nearest(name, known)}")
        *parents, leaf = name.split(".")
        branch = tree
        for parent in parents:
            branch = branch[parent]
        branch[leaf] = value
    return build(type(settings), tree)


def build(kind: type[Any], tree: dict[str, Any]) -> Any:
    """Validate `tree` as `kind`; pydantic's report becomes one line per fault."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ValueError("; ".join(_explain(fault, kind.prefix) for fault in error.errors())) from None


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: "; did you mean X?" for a typo, or what there is."""
    names = sorted(known)
    leaf = name.rsplit(".", 1)[-1]
    close = [ALIASES[leaf]] if ALIASES.get(leaf) in names else difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if not close:  # the right name under another group
        leaves = {other.rsplit(".", 1)[-1]: other for other in names}
        close = [leaves[match] for match in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)]
    return f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(names)}"


def _parse_assignment(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator or not name.strip():
        raise ValueError(f"--set {text}: expected dotted.name=value, e.g. sampling.alpha=0.8")
    try:
        return name.strip(), json.loads(value)
    except json.JSONDecodeError:
        text = value.strip()
        if _DECIMAL.fullmatch(text):
            return name.strip(), float(text)
        return name.strip(), None if text == "none" else text  # as `mis show` prints it
    except RecursionError:
        raise ValueError(f"--set {name.strip()}: the value is nested too deeply") from None


def _explain(fault: Any, prefix: str) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error" or not where:
        return message
    return f"{prefix}{where}={fault['input']!r}: {message}"


# -- identity --------------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """`value` as JSON types. Anything without one stable spelling is refused (TypeError)."""
    if isinstance(value, Settings):
        return {name: plain(getattr(value, name)) for name in type(value).model_fields if _decides(value, name)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} has no canonical spelling: {value!r}")


def _decides(settings: Settings, name: str) -> bool:
    return name not in settings.younger or getattr(settings, name) != type(settings).model_fields[name].default


def canonical(value: Any) -> str:
    """The one JSON spelling of settings: sorted keys, no spaces, no NaN."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint(value: Any) -> str:
    """Sixteen hexadecimal digits that name `value`: equal settings, equal fingerprint."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:16]


def differences(before: Any, after: Any) -> Iterator[str]:
    """`name: old -> new` for each setting that differs between two plain trees."""
    old, new = _leaves(before), _leaves(after)
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            yield f"{name}: {old.get(name)!r} -> {new.get(name)!r}"


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree}
    return {name: leaf for key, item in tree.items() for name, leaf in _leaves(item, f"{prefix}{key}.").items()}
