"""The configuration: presets, faults, TOML there and back."""

from __future__ import annotations

import dataclasses
import tempfile
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbadapter.config import PRESETS, PRIORS, TARGETS, Preset, TrainConfig, indefinite, read_toml
from dbadapter.errors import ConfigError


def config(**values: typing.Any) -> TrainConfig:
    given_values = {"instance_data_dir": Path("photos"), "class_noun": "dog", "output_dir": Path("out")}
    return TrainConfig(**{**given_values, **values})


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
paths = text.filter(lambda value: "\0" not in value).map(Path)
numbers = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
whole = st.integers(min_value=1, max_value=2**31)


@st.composite
def configs(draw: st.DrawFn) -> TrainConfig:
    """Any configuration that TOML can hold, whether or not it makes sense."""
    by_type = {
        Path: paths,
        str: text,
        int: whole,
        float: numbers,
        bool: st.booleans(),
        tuple[str, ...]: st.lists(text).map(tuple),
    }
    values: dict[str, typing.Any] = {}
    for name, hint in typing.get_type_hints(TrainConfig).items():
        if name in ("resume", "overwrite"):
            continue
        options = typing.get_args(hint) if type(None) in typing.get_args(hint) else (hint,)
        values[name] = draw(st.one_of([by_type.get(option, st.none()) for option in options]))
    return TrainConfig(**values)


@settings(deadline=None, max_examples=50)
@given(configs())
def test_toml_there_and_back(original: TrainConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        path.write_text(original.to_toml(), encoding="utf-8", newline="")
        assert TrainConfig.from_toml(path) == original


def test_toml_leaves_out_how_to_run(tmp_path: Path) -> None:
    """A stored overwrite would destroy the very run that its config.toml is meant to repeat."""
    path = tmp_path / "config.toml"
    path.write_text(config(overwrite=True).to_toml(), encoding="utf-8")
    assert TrainConfig.from_toml(path) == config()


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(sorted(PRESETS)), st.integers(1, 64), st.sampled_from(PRIORS), st.none() | text)
def test_resolved_fills_and_stays(family: str, rank: int, prior: str, name: str | None) -> None:
    try:
        resolved = config(rank=rank, prior=prior, name=name).resolved(family, 512, "sks")
    except ConfigError:
        assert name is not None  # not every text is a file name
        return
    left = {f.name for f in dataclasses.fields(resolved) if getattr(resolved, f.name) is None}
    assert left == {
        "prediction_type", "class_data_dir", "snr_gamma",
        "class_noun_classifier", "class_nouns", "class_noun_vote",
        "image_encoder", "text_image_encoder",
    }  # fmt: skip
    assert resolved.resolved(family, 512) == resolved
    assert resolved.alpha == rank == resolved.text_encoder_rank
    assert resolved.instance_prompt == "a photo of sks dog"
    assert resolved.class_prompt == "a photo of a dog"


def test_presets_by_family() -> None:
    toybox = config().resolved("toybox", 64)
    assert (toybox.max_train_steps, toybox.learning_rate, toybox.train_batch_size) == (300, 2e-3, 4)
    assert (toybox.photo_tokens, toybox.lr_scheduler) == (True, "linear")
    assert toybox.targets == ("attention", "feed-forward")
    assert config().resolved("sd1", 512).resolution == 512
    assert config(learning_rate=3e-4).resolved("sd1", 512).learning_rate == 3e-4
    sdxl = config().resolved("sdxl", 1024)
    assert (sdxl.train_text_encoder, sdxl.gradient_accumulation_steps) == (False, 4)
    assert (sdxl.rank, sdxl.alpha, sdxl.prior_source) == (8, 8.0, "instance")
    with pytest.raises(ConfigError, match="sd1, sd2, sdxl, got 'sd9'"):
        config().resolved("sd9", 512)


def test_every_value_of_a_preset_has_its_source() -> None:
    values = {field.name for field in dataclasses.fields(Preset)} - {"sources"}
    for name, preset in PRESETS.items():
        assert set(preset.sources) == values, name
    for name in ("sd1", "sd2", "sdxl"):
        assert "not measured here" in PRESETS[name].sources["learning_rate"]


def test_full_has_rates_of_its_own_and_nothing_of_an_adapter() -> None:
    full = config(full=True).resolved("sd1", 512)
    assert (full.learning_rate, full.rank, full.alpha, full.targets) == (2e-6, None, None, None)
    assert full.resolved("sd1", 512) == full
    assert config(full=True, learning_rate=1e-5).resolved("sd1", 512).learning_rate == 1e-5
    with pytest.raises(ConfigError, match="rank is an adapter's, and full trains the models whole"):
        config(full=True, rank=4).validate()


def test_prodigy_sets_its_own_rate() -> None:
    resolved = config(optimizer="prodigy").resolved("sd1", 512)
    assert (resolved.learning_rate, resolved.text_encoder_learning_rate) == (1.0, 1.0)


def test_prompts_fill_placeholders_and_leave_other_braces() -> None:
    resolved = config(
        instance_prompt="{style} {identifier} the {class_noun}", validation_prompt=("{identifier} {0}",)
    ).resolved("toybox", 64, "sks")
    assert resolved.instance_prompt == "{style} sks the dog"
    assert resolved.validation_prompt == ("sks {0}",)


def test_identifier_may_come_later() -> None:
    early = config().resolved("toybox", 64)
    assert early.identifier == "auto"
    assert early.instance_prompt == "a photo of {identifier} dog"
    assert early.resolved("toybox", 64, "sks").instance_prompt == "a photo of sks dog"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"class_noun": " "}, "class_noun must say what the subject is"),
        ({"rank": 0}, "rank must be from 1 to 1024, got 0"),
        ({"alpha": -1.0}, "alpha must be greater than 0, got -1.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be greater than 0, got nan"),
        ({"learning_rate": float("inf")}, "learning_rate must be greater than 0, got inf"),
        ({"prior_loss_weight": -0.5}, "prior_loss_weight must be 0 or more, got -0.5"),
        ({"max_train_steps": 0}, "max_train_steps must be from 1 to"),
        ({"train_batch_size": 0}, "train_batch_size must be from 1 to 4096, got 0"),
        ({"resolution": 100}, "resolution must be a multiple of 8, got 100"),
        ({"resolution": 0}, "resolution must be from 16 to 4096, got 0"),
        ({"seed": -1}, "seed must be from 0 to"),
        ({"prior": "magic"}, "prior must be one of distill, generated, none, got 'magic'"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be one of"),
        ({"lr_scheduler": "step"}, "lr_scheduler must be one of constant, linear, cosine, got 'step'"),
        ({"targets": ()}, "targets must name at least one"),
        ({"targets": ("attention", "mind")}, "targets must be among .* got 'mind'"),
        ({"targets": ("conv", "conv")}, "targets must not repeat"),
        ({"identifier": ""}, "identifier must not be empty"),
        ({"identifier": "Dog"}, "identifier must differ from the class noun"),
        ({"instance_prompt": "a photo of sks dog"}, r"instance_prompt must hold \{identifier\}"),
        ({"instance_prompt": "a risks dog", "identifier": "sks"}, "instance_prompt must hold"),
        ({"class_prompt": "a photo of sks dog", "identifier": "sks"}, "class_prompt must not hold"),
        ({"name": "a/b"}, "name must be a plain file name"),
        ({"name": "x" * 101}, "name must have at most 100 characters, got 101"),
        ({"class_noun": "dog\ncat"}, "class_noun must be one line"),
        ({"class_noun": "dog\x1b[31m"}, "class_noun must be one line"),
        ({"class_noun": None}, "class_noun must be a string, got None"),
        ({"class_noun": 3, "rank": "8"}, "class_noun must be a string, got 3; rank must be a whole number"),
        ({"rank": 8.5}, "rank must be a whole number, got 8.5"),
        ({"alpha": 10**400}, "alpha must be a number that is finite"),
        ({"output_dir": ""}, "output_dir must be a path, got ''"),
        ({"instance_data_dir": None}, "instance_data_dir must be a path, got None"),
        ({"name": ".."}, "name must be a plain file name"),
        ({"prior": "none", "class_data_dir": Path("class")}, "class_data_dir needs a prior"),
        ({"resume": True, "overwrite": True}, "exclude each other"),
        ({"output_dir": Path("\udcff")}, "output_dir must be valid Unicode"),
    ],
)
def test_faults(values: dict[str, typing.Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        config(**values).validate()
    assert "\n" not in str(caught.value)


def test_all_faults_at_once() -> None:
    with pytest.raises(ConfigError, match=r"^3 faults: prior .*; rank .*; seed .*"):
        config(prior="magic", rank=0, seed=-1).validate()


def test_given_identifier_may_stand_in_the_prompt() -> None:
    config(identifier="sks", instance_prompt="a photo of sks dog").validate()


def test_strings_for_paths_and_lists_for_tuples() -> None:
    loose = TrainConfig("photos", "dog", "out", targets=["attention"], validation_prompt="a dog")  # type: ignore[arg-type]
    assert loose == config(targets=("attention",), validation_prompt=("a dog",))


def test_words_of_prompts_have_no_spaces_around() -> None:
    assert config(class_noun=" dog\n", identifier="\tsks ") == config(class_noun="dog", identifier="sks")
    assert config(class_nouns=(" dog", "cat\n")).class_nouns == ("dog", "cat")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("rank = ", "is no TOML"),
        ("rnak = 4", "unknown key 'rnak', did you mean 'rank'"),
        ("rank = true", "rank must be a whole number, got True"),
        (f"alpha = 1{'0' * 400}", "alpha must be a number that is finite"),
        (f"alpha = 1{'0' * 5000}", "is no TOML"),
        ("output_dir = ''", "output_dir must be a path"),
        ("rank = 1.5", "rank must be a whole number, got 1.5"),
        ('alpha = "big"', "alpha must be a number, got 'big'"),
        ("targets = 'conv'", "targets must be a list of strings"),
        ("resume = 1", "resume must be true or false"),
        ("base = 5\nname = 6", "2 faults: .* base must be a string, got 5; .* name must be a string"),
    ],
)
def test_toml_faults(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        read_toml(path)
    assert "\n" not in str(caught.value)


def test_toml_missing_or_incomplete(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read configuration"):
        read_toml(tmp_path / "none.toml")
    (tmp_path / "some.toml").write_text("class_noun = 'dog'\nalpha = 4", encoding="utf-8")
    assert read_toml(tmp_path / "some.toml") == {"class_noun": "dog", "alpha": 4.0}
    with pytest.raises(ConfigError, match=r"lacks instance_data_dir; .* lacks output_dir"):
        TrainConfig.from_toml(tmp_path / "some.toml")


@pytest.mark.parametrize(
    ("noun", "phrase"),
    [
        ("dog", "a dog"),
        ("owl", "an owl"),
        ("unicorn", "a unicorn"),
        ("umbrella", "an umbrella"),
        ("uninteresting rock", "an uninteresting rock"),
        ("hourglass", "an hourglass"),
        ("house", "a house"),
        ("Ewe", "a Ewe"),
    ],
)
def test_indefinite(noun: str, phrase: str) -> None:
    assert indefinite(noun) == phrase


def test_targets_are_named_alike() -> None:
    from dbadapter import lora

    assert set(lora.TARGETS) == set(TARGETS)
