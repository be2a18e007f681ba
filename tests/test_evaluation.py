"""`evaluation.evaluate` on a tiny base: what is drawn, what is paired, what is told."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluated import draw_photographs, write_adapters
from pictures import PIXELS, pixels
from PIL import Image

from dbadapter import evaluation
from dbadapter.adapter_file import AdapterDescription, write_adapter
from dbadapter.base import Base, load_base
from dbadapter.candidates import load_candidate
from dbadapter.errors import BaseError, DataError, UsageError, is_out_of_memory
from dbadapter.evaluation import NOT_REACHED, Settings, evaluate, find_references, load_references
from dbadapter.evaluation_prompts import Prompts, choose_prompts
from dbadapter.export.parity import synthetic_adapter
from dbadapter.model_folder import write_model_folder

PROMPTS = Prompts(("a {} on grass", "a red {}"), "a photo of a dog", ("a lake",))
FEW = Settings(num_images_per_prompt=2, num_class_images=3, num_inference_steps=2)


@pytest.fixture(scope="module")
def base(tiny_base_folder: Path) -> Base:
    return load_base(str(tiny_base_folder), device="cpu")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_photographs(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="module")
def files(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapters(base, tmp_path_factory.mktemp("adapters"))


def test_every_candidate_meets_the_same_prompts_and_seeds(base: Base, photographs: Path, files: Path) -> None:
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    candidates = [load_candidate(files / f"{name}.safetensors", "dog") for name in ("dog", "hat")]
    seen: list[tuple[str, int, int]] = []
    shown = load_references(find_references(photographs), 32)
    drawn: dict[str, Any] = {}
    report = evaluate(
        base,
        candidates,
        shown,
        PROMPTS,
        class_noun="dog",
        encoder=PIXELS,
        settings=FEW,
        progress=lambda *parts: seen.append(parts),
        on_pictures=drawn.__setitem__,
    )
    assert {name: {part: len(of) for part, of in parts.items()} for name, parts in drawn.items()} == {
        key: {"subject": 4, "class": 3, "unrelated": 2} for key in ("base", "dog", "hat")
    }
    figures = report["figures"]["dog"]
    means = figures["per_prompt"]["subject_fidelity"]
    assert sum(means) / 2 == pytest.approx(figures["subject_fidelity"]["value"])
    assert [entry["picture"] for entry in figures["nearest"]] == [0, 1, 2, 3]
    assert max(entry["cosine"] for entry in figures["nearest"]) == figures["nearest_photograph"]
    assert list(report["figures"]) == ["base", "dog", "hat"]
    assert report["figures"]["base"]["drift"]["value"] == pytest.approx(0, abs=1e-6)
    assert report["figures"]["dog"]["drift"]["value"] > 1e-3
    assert report["figures"]["dog"]["subject_fidelity"]["count"] == 4
    assert report["figures"]["dog"]["diversity"]["count"] == 3
    assert report["figures"]["dog"]["prompt_fidelity"] == report["text_image_encoder"] == "not measured"
    assert report["figures"]["dog"]["bytes"] == (files / "dog.safetensors").stat().st_size
    assert {entry["figure"] for entry in report["differences"]} == {
        "subject_fidelity",
        "drift",
        "prior_preservation",
        "diversity",
    }
    assert all(entry["of"] == "hat" and entry["minus"] == "dog" for entry in report["differences"])
    assert seen[-1] == ("drawing, hat", 9, 9)
    of_base = [done for stage, done, _ in seen if stage == "drawing, base"]
    assert of_base == sorted(of_base)
    assert len(of_base) >= 3 * FEW.num_inference_steps
    assert all(torch.equal(value, before[name]) for name, value in base.unet.state_dict().items())


def test_figures_are_those_of_what_the_adapter_draws(base: Base, photographs: Path, files: Path) -> None:
    from dbadapter import lora, metrics
    from dbadapter.sampling import generate_pictures

    candidate = load_candidate(files / "dog.safetensors", "dog")
    shown = load_references(find_references(photographs), 32)
    report = evaluate(base, [candidate], shown, PROMPTS, class_noun="dog", encoder=PIXELS, settings=FEW)
    lora.apply(base.pipeline, {files / "dog.safetensors": 1.0})
    drawn = generate_pictures(
        base.pipeline,
        ["a sks dog on grass", "a red sks dog"],
        num_images_per_prompt=2,
        seeds=[1000, 1001, 1000, 1001],
        num_inference_steps=2,
    )
    lora.apply(base.pipeline, {})
    values = metrics.similarity(pixels([each.image for each in drawn]), pixels(shown))
    assert report["figures"]["dog"]["subject_fidelity"]["value"] == pytest.approx(
        float(values.mean()), abs=1e-3
    )
    assert report["subject_ceiling"] == pytest.approx(metrics.subject_ceiling(pixels(shown)))


def test_a_copy_scores_the_ceiling_and_is_seen_as_one(
    base: Base, photographs: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = load_references(find_references(photographs), 32)

    def copies(*_: Any) -> dict[str, list[Image.Image]]:
        return {"subject": [shown[0]] * 4, "class": shown, "unrelated": [shown[0]] * 2}

    monkeypatch.setattr(evaluation.Evaluator, "_draw", copies)
    report = evaluate(base, [], shown, PROMPTS, class_noun="dog", encoder=PIXELS, settings=FEW)
    assert report["figures"]["base"]["nearest_photograph"] == pytest.approx(1)
    # One of the three is the photograph itself.
    others = report["figures"]["base"]["subject_fidelity"]["value"] * 3 - 1
    assert others / 2 == pytest.approx(report["subject_ceiling"], abs=0.2)


def test_a_misfit_is_named_before_anything_is_drawn(
    base: Base, photographs: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dbadapter.errors import AdapterError

    foreign = synthetic_adapter(load_base("toybox"))
    write_adapter(tmp_path / "toy.safetensors", foreign, description=AdapterDescription(trigger="sks dog"))
    candidates = [
        load_candidate(path, "dog") for path in (files / "dog.safetensors", tmp_path / "toy.safetensors")
    ]
    monkeypatch.setattr(evaluation.Evaluator, "_draw", lambda *_: pytest.fail("drawn too early"))
    with pytest.raises(AdapterError, match=r"toy\.safetensors: "):
        evaluate(
            base,
            candidates,
            load_references(find_references(photographs), 32),
            PROMPTS,
            class_noun="dog",
            encoder=PIXELS,
        )


def test_a_tuned_model_needs_its_word(base: Base, photographs: Path, tmp_path: Path) -> None:
    write_model_folder(base.pipeline, tmp_path / "tuned")
    with pytest.raises(UsageError, match="pass --identifier"):
        load_candidate(tmp_path / "tuned", "dog")
    (tmp_path / "config.toml").write_text('identifier = "wxv"\n')  # of the run that left it
    assert load_candidate(tmp_path / "tuned", "dog").subject == "wxv dog"
    with pytest.warns(UserWarning, match="says 'wxv' and is asked for 'sks'"):
        candidate = load_candidate(tmp_path / "tuned", "dog", "sks")
    (tmp_path / "config.toml").write_text('identifier = "sks"\nclass_noun = "mug"\n')
    with pytest.warns(UserWarning, match="trained with --class-noun mug, and is asked for 'dog'"):
        candidate = load_candidate(tmp_path / "tuned", "dog")
    report = evaluate(
        base,
        [candidate],
        load_references(find_references(photographs), 32),
        PROMPTS,
        class_noun="dog",
        encoder=PIXELS,
        settings=FEW,
    )
    assert report["figures"]["tuned"]["drift"]["value"] == pytest.approx(0, abs=1e-5)


def test_a_tuned_model_is_drawn_with_the_bases_guidance(photographs: Path, tmp_path: Path) -> None:
    """An SD1 of its own folder would be drawn with 7.5, the base of a family with 3 beside it."""
    toybox = load_base("toybox", device="cpu")
    write_model_folder(toybox.pipeline, tmp_path / "tuned")
    shown, candidate = (
        load_references(find_references(photographs), 64),
        load_candidate(tmp_path / "tuned", "dog", "sks"),
    )
    few = Settings(num_images_per_prompt=1, num_class_images=2, num_inference_steps=2)
    judge = evaluation.Evaluator(shown, PROMPTS, "dog", PIXELS, settings=few)
    judge.score_base(toybox.pipeline)
    assert judge.settings.guidance_scale == 3
    tuned = load_base(str(candidate.path), device="cpu").pipeline
    tuned.family = "sd1"
    assert judge.score(tuned, candidate.subject).figures["drift"]["value"] == pytest.approx(0, abs=1e-5)


def test_a_prompt_too_long_for_one_of_them_is_told_before_anything_is_drawn(
    base: Base, photographs: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation.Evaluator, "_draw", lambda *_: pytest.fail("drawn too early"))
    one, other = (load_candidate(files / f"{name}.safetensors", "dog") for name in ("dog", "hat"))
    room = base.tokenizer.model_max_length - len(base.tokenizer("a photo of a dog").input_ids)
    prompts = choose_prompts("dog", ["a photo of a {}" + " dog" * room])
    words = {"class_noun": "dog", "encoder": PIXELS}
    shown = load_references(find_references(photographs), 32)
    with pytest.raises(DataError, match=r"tokens long, this base reads at most .*; shorten it"):
        evaluate(base, [one, other], shown, prompts, **words)


def test_a_broken_candidate_takes_the_others_not_with_it(
    base: Base, photographs: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, other = (load_candidate(files / f"{name}.safetensors", "dog") for name in ("dog", "hat"))
    draw = evaluation.Evaluator.score

    def score(self: Any, pipeline: Any, subject: str, progress: Any = None) -> Any:
        if subject == other.subject:
            raise BaseError("the model gave values that are not finite (NaN)")
        return draw(self, pipeline, subject, progress)

    monkeypatch.setattr(evaluation.Evaluator, "score", score)
    shown = load_references(find_references(photographs), 32)
    words = {"class_noun": "dog", "encoder": PIXELS, "settings": FEW}
    other = replace(other, subject="hat dog")
    with pytest.warns(UserWarning, match=r"hat.safetensors is left out: the model gave values"):
        report = evaluate(base, [good, other], shown, PROMPTS, **words)
    assert report["figures"].keys() == {"base", "dog"}
    assert report["left_out"] == {"hat": "the model gave values that are not finite (NaN)"}
    with (
        pytest.warns(UserWarning, match="is left out"),
        pytest.raises(BaseError, match="hat: the model gave values that are not finite"),
    ):
        evaluate(base, [other], shown, PROMPTS, **words)


def test_what_ends_one_candidate_takes_no_other_with_it(
    base: Base, photographs: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dog, hat = (load_candidate(files / f"{name}.safetensors", "dog") for name in ("dog", "hat"))
    last = replace(dog, name="last", subject="last dog")
    draw, told = evaluation.Evaluator.score, []
    ends: list[BaseException] = [RuntimeError("DefaultCPUAllocator: can't allocate memory: 4 bytes")]

    def score(self: Any, pipeline: Any, subject: str, progress: Any = None) -> Any:
        if subject == "last dog":
            raise ends[0]
        return draw(self, pipeline, subject, progress)

    monkeypatch.setattr(evaluation.Evaluator, "score", score)
    shown = load_references(find_references(photographs), 32)
    words = {"class_noun": "dog", "encoder": PIXELS, "settings": FEW, "on_report": told.append}
    with pytest.warns(UserWarning, match="is left out: out of memory: close other programs"):
        report = evaluate(base, [dog, hat, last], shown, PROMPTS, **words)
    assert report["figures"].keys() == {"base", "dog", "hat"}
    assert [list(each["figures"]) for each in told] == [["base", "dog"], ["base", "dog", "hat"]]
    assert told[0]["left_out"].keys() == {"hat", "last"}
    assert told[0]["differences"] == []
    assert told[1]["left_out"] == {"last": NOT_REACHED}
    assert (told[0]["complete"], report["complete"]) == (False, True)
    assert told[1]["figures"] == report["figures"]
    told.clear()
    with pytest.warns(UserWarning, match="is left out: out of memory"):
        evaluate(base, [last, dog, hat], shown, PROMPTS, **words)
    assert [list(each["figures"]) for each in told] == [["base", "dog"]]
    assert told[0]["left_out"].keys() == {"last", "hat"}
    for error in (RuntimeError("a fault"), KeyboardInterrupt()):
        ends[:] = [error]
        told.clear()
        with pytest.raises(type(error)):
            evaluate(base, [dog, last], shown, PROMPTS, **words)
        assert [list(each["figures"]) for each in told] == [["base", "dog"]]


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (BaseError("out of memory"), False),
    ],
)
def test_lack_of_memory_is_known_by_its_words(error: Exception, is_memory: bool) -> None:
    assert is_out_of_memory(error) == is_memory


def test_one_model_is_in_memory_at_a_time(
    base: Base, photographs: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Model:
        pass

    models: list[weakref.ref[Model]] = []
    alive: list[int] = []

    @contextmanager
    def pipeline_of(base: Base, candidate: Any) -> Iterator[Model]:
        alive.append(sum(model() is not None for model in models))
        model = Model()
        models.append(weakref.ref(model))
        yield model

    draw = evaluation.Evaluator.score
    monkeypatch.setattr(evaluation, "pipeline_of", pipeline_of)
    monkeypatch.setattr(
        evaluation.Evaluator, "score", lambda self, _, *rest: draw(self, base.pipeline, *rest)
    )
    one = load_candidate(files / "dog.safetensors", "dog")
    three = [replace(one, name=f"{number}") for number in range(3)]
    words = {"class_noun": "dog", "encoder": PIXELS, "settings": FEW}
    report = evaluate(base, three, load_references(find_references(photographs), 32), PROMPTS, **words)
    assert report["figures"].keys() == {"base", "0", "1", "2"}
    assert alive == [0, 0, 0]


def test_the_same_photograph_twice_is_told(base: Base, photographs: Path, files: Path) -> None:
    shown = load_references(find_references(photographs), 32)
    with pytest.warns(UserWarning, match="two of the photographs are the same picture"):
        evaluation._warn_of_twins([*shown, shown[0]])


def test_one_photograph_is_not_enough(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "0.png")
    with pytest.raises(DataError, match=r"holds one photograph.*add another"):
        find_references(tmp_path)
