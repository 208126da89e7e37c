"""Settings: the paper's defaults, overrides with helpful refusals, and identities that do not move."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mis_platform.config import (
    EvalConfig,
    Resources,
    Run,
    canonical,
    check_simpleclick,
    differences,
    fingerprint,
    flatten,
    override,
    plain,
)


def test_defaults_are_the_paper():
    run = Run()
    assert (run.train.epochs, run.train.learning_rate, run.train.decay_epochs) == (55, 5e-5, (50,))
    assert (run.sampling.alpha, run.sampling.min_area, run.train.smooth_weight) == (0.9, 0.05, 10.0)
    assert (run.train.batch_size, run.features.extractor, run.model.variant) == (32, "dino_vits8", "vit_b")
    assert (run.eval.threshold, run.eval.max_clicks, run.eval.zoom_size) == (0.5, 20, 448)


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("train.epoch=1", "unknown setting 'train.epoch'; did you mean train.epochs?"),
        ("train.lambda=3", "did you mean train.smooth_weight?"),
        ("alpha=0.8", "did you mean sampling.alpha?"),
        ("sampling.alpha=1", "sampling.alpha must lie in [0, 1)"),
        ("sampling.alpha=1.5", "sampling.alpha must lie in [0, 1)"),
        ("sampling.min_area=0.6", "sampling.min_area must lie in [0, 0.5]"),
        ("classical.seed_radius=1e200", "less than or equal to 1000"),
        ("classical.gamma=1e308", "less than or equal to 1000000"),
        ("classical.beta=1e308", "less than or equal to 1000000"),
        ("eval.threshold=nan", "eval.threshold='nan': Input should be a valid number"),
        ("eval.threshold=NaN", "finite"),
        ("train.learning_rate=1e400", "finite"),
        ("train.epochs=many", "valid integer"),
        ("train.epochs=0", "greater than or equal to 1"),
        ("train.epochs=true", "train.epochs=True: Input should be a valid integer"),
        ("train.max_steps=false", "train.max_steps=False: Input should be a valid integer"),
        ('train.smooth_weight="10"', "train.smooth_weight='10': Input should be a valid number"),
        ('sources.freemask.scales=[1,"0.5"]', "scales=[1, '0.5']: Input should be a valid number"),
        ("sampling.alpha=true", "sampling.alpha=True: Input should be a valid number"),
        ("eval.zoom_skip_clicks=true", "eval.zoom_skip_clicks=True: Input should be a valid integer"),
        ("eval.flip=1", "eval.flip=1: Input should be a valid boolean"),
        ("augment.color_augmentation=0.0", "augment.color_augmentation=0.0: Input should be a valid boolean"),
        ("train.decay_epochs=[-3]", "train.decay_epochs.0=-3: Input should be greater than or equal to 1"),
        ("train.decay_epochs=[0]", "train.decay_epochs.0=0: Input should be greater than or equal to 1"),
        ("train.decay_epochs=[true]", "train.decay_epochs=[True]: Input should be a valid integer"),
        ("train.decay_epochs=[40,20]", "train.decay_epochs must rise, they are [40, 20]"),
        ("train.decay_epochs=[20,20]", "train.decay_epochs must rise, they are [20, 20]"),
        ("train.decay_epochs=[80]", "train.decay_epochs=[80]: they must not exceed train.epochs, which is 55"),
        ("eval.min_clicks=30", "eval.min_clicks=30 must not exceed eval.max_clicks=20"),
        ("augment.contrast_max=1e9", "less than or equal to 10"),
        ("augment.brightness_limit=1e9", "less than or equal to 1"),
        ("augment.scale_max=1e6", "less than or equal to 10"),
        ("model.variant=vit_g", "'vit_b', 'vit_l', 'vit_h' or 'vit_xt'"),
        ("model.image_size=300", "multiple of 224"),
        ("eval.zoom_size=0", "eval.zoom_size=0: Input should be greater than or equal to 1"),
        ("eval.davis_zoom_size=400.5", "eval.davis_zoom_size=400.5: Input should be a valid integer"),
        ("eval.zoom_skip_clicks=0", "-1 or 1"),
        ("clicks.border_probability=0.9", "must be 1"),
        ("target.fraction=0.1", "they need target.source=labels"),
        ("target.subset=random", "they need target.source=labels"),
        ("target.fraction=0", "greater than 0"),
        ("train.epochs", "expected dotted.name=value"),
        ("=3", "expected dotted.name=value"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(assignment, expected):
    with pytest.raises(ValueError) as refusal:
        override(Run(), [assignment])
    assert expected in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("eval.zoom_size=400", r"eval.zoom_size=400: SimpleClick takes multiples of 224 pixels (224, 448, 672, ...)"),
        ("eval.davis_zoom_size=1", "eval.davis_zoom_size=1: SimpleClick takes multiples of 224 pixels"),
        ("eval.zoom_skip_clicks=1", "eval.zoom_skip_clicks=1: SimpleClick takes squares from the first click on, -1"),
    ],
)
def test_what_only_other_models_can_follow(assignment, expected):
    protocol = override(Run(), [assignment]).eval
    with pytest.raises(ValueError) as refusal:
        check_simpleclick(protocol)
    assert expected in str(refusal.value)


def test_simpleclick_takes_whole_windows():
    for size in (224, 448, 672, 896):
        check_simpleclick(EvalConfig(zoom_size=size, davis_zoom_size=size))


def test_a_deeply_nested_value_is_refused():
    with pytest.raises(ValueError):
        override(Run(), ["dataset=" + "[" * 100_000])


def test_overrides_apply_and_leave_the_rest():
    run = override(Run(), ["sampling.alpha=0.8", "train.decay_epochs=[10,20]", "dataset=folder:../photos"])
    assert run.sampling.alpha == 0.8
    assert run.train.decay_epochs == (10, 20)
    assert run.dataset == "folder:../photos"
    changed = {name for name, value in flatten(run).items() if flatten(Run())[name] != value}
    assert changed == {"sampling.alpha", "train.decay_epochs", "dataset"}


def test_every_setting_can_be_set_to_its_own_default():
    for name, value in flatten(Run()).items():
        assert override(Run(), [f"{name}={json.dumps(value)}"]) == Run(), name


def test_none_is_what_mis_show_prints_for_nothing():
    for text in ("none", "null"):
        assert override(Run(), ["train.max_steps=5", f"train.max_steps={text}"]) == Run()
    with pytest.raises(ValueError, match=r"train\.epochs=None: Input should be a valid integer"):
        override(Run(), ["train.epochs=none"])


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        (["train.epochs=8", "train.decay_epochs=[10]"], "must not exceed train.epochs, which is 8"),
        (["train.decay_epochs=[10]", "train.epochs=8"], "must not exceed train.epochs, which is 8"),
        (["train.epochs=8"], None),  # the paper's decay at 50 never comes
        (["train.decay_epochs=[50,55]"], None),  # supervised SimpleClick's: the last has no effect
        (["train.decay_epochs=[]"], None),
        (["train.epochs=100", "train.decay_epochs=[80]"], None),
    ],
)
def test_decays_that_never_come_are_refused_of_those_who_set_them(assignments, expected):
    if expected is None:
        override(Run(), assignments)
    else:
        with pytest.raises(ValueError, match=expected):
            override(Run(), assignments)


def test_a_schedule_that_was_chosen_can_be_shortened_alone():
    chosen = override(Run(), ["train.epochs=24", "train.decay_epochs=[20]"])
    assert override(chosen, ["train.epochs=3"]).train.decay_epochs == (20,)


@pytest.mark.parametrize(("text", "value"), [(".5", 0.5), ("10.", 10.0), ("+1.5", 1.5), ("1.e1", 10.0), ("3", 3.0)])
def test_decimals_as_people_type_them(text, value):
    assert override(Run(), [f"train.smooth_weight={text}"]).train.smooth_weight == value


def test_words_for_yes_and_no():
    assert not override(Run(), ["eval.flip=False"]).eval.flip  # as `mis show` prints it
    assert override(Run(), ["eval.flip=False", "eval.flip=yes"]).eval.flip


def test_labels_take_a_fraction():
    run = override(Run(), ["target.source=labels", "target.fraction=0.05", "target.subset=random"])
    assert (run.target.source, run.target.fraction, run.target.subset) == ("labels", 0.05, "random")


def test_equal_settings_have_equal_fingerprints_however_they_are_written():
    assert fingerprint(override(Run(), ["sampling.alpha=0.90", "train.smooth_weight=10"])) == fingerprint(Run())


def test_each_setting_changes_the_fingerprint():
    changes = ["sampling.alpha=0.8", "train.seed=1", "eval.flip=false", "data.min_side=9", "features.precision=bf16"]
    assert len({fingerprint(Run()), *(fingerprint(override(Run(), [change])) for change in changes)}) == 6


def test_the_fingerprint_of_the_paper_is_kept():
    """Changing this value re-addresses everybody's artifacts: do it on purpose or not at all."""
    assert fingerprint(Run()) == "3a7492ec4f91169a"


@pytest.mark.parametrize(
    ("name", "default", "other"),
    [("features.batch_size", 1, 8), ("eval.precision", "fp32", "bf16"), ("model.previous_mask", "soft", "binary")],
)
def test_settings_younger_than_artifacts_leave_their_addresses(name, default, other):
    group, leaf = name.split(".")
    assert leaf not in plain(Run())[group]
    assert fingerprint(override(Run(), [f"{name}={default}"])) == fingerprint(Run())
    changed = override(Run(), [f"{name}={other}"])
    assert fingerprint(changed) != fingerprint(Run())
    assert plain(changed)[group][leaf] == other
    assert Run.model_validate(plain(changed)) == changed
    assert flatten(Run())[name] == default


def test_resources_are_not_part_of_a_run():
    assert not set(flatten(Run())) & set(flatten(Resources()))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_canonical_is_json_and_stable(value):
    assert json.loads(canonical(value)) == plain(value)
    assert canonical(json.loads(canonical(value))) == canonical(value)


def test_what_has_no_stable_spelling_is_refused():
    with pytest.raises(TypeError, match="no canonical spelling"):
        canonical({"path": object()})
    with pytest.raises(ValueError):
        canonical(math.nan)


def test_differences_name_the_setting():
    after = override(Run(), ["train.smooth_weight=3"])
    assert list(differences(plain(Run()), plain(after))) == ["train.smooth_weight: 10.0 -> 3.0"]
