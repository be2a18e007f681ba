"""`evaluate` on a tiny base: what is drawn, what is paired, what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from pictures import PIXELS, pixels
from PIL import Image

from dbadapter import evaluation
from dbadapter.adapter import Adapter
from dbadapter.adapter_file import AdapterDescription, write_adapter
from dbadapter.base import Base, load_base
from dbadapter.candidates import load_candidate, pipeline_of, told_apart
from dbadapter.cli import main
from dbadapter.errors import BaseError, DataError, UsageError
from dbadapter.evaluation import Settings, evaluate, load_photographs
from dbadapter.evaluation_prompts import Prompts, choose_prompts
from dbadapter.export.parity import synthetic_adapter
from dbadapter.model_folder import write_model_folder
from dbadapter.sampling import MOST_IMAGES

PROMPTS = Prompts(("a {} on grass", "a red {}"), "a photo of a dog", ("a lake",))
FEW = Settings(num_images_per_prompt=2, num_class_images=3, num_inference_steps=2)


@pytest.fixture(scope="module")
def base(tiny_base_folder: Path) -> Base:
    return load_base(str(tiny_base_folder), device="cpu")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    drawn = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(drawn.integers(0, 256, (48, 40, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def files(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("dog", "hat")):
        adapter = synthetic_adapter(base, seed=seed)
        write_adapter(
            folder / f"{name}.safetensors", adapter, description=AdapterDescription(trigger="sks dog")
        )
    return folder


def test_every_candidate_meets_the_same_prompts_and_seeds(base: Base, photographs: Path, files: Path) -> None:
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    candidates = [load_candidate(files / f"{name}.safetensors", "dog") for name in ("dog", "hat")]
    seen: list[tuple[str, int, int]] = []
    shown = load_photographs(photographs, 32)
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
    assert all(torch.equal(value, before[name]) for name, value in base.unet.state_dict().items())


def test_figures_are_those_of_what_the_adapter_draws(base: Base, photographs: Path, files: Path) -> None:
    from dbadapter import lora, metrics
    from dbadapter.sampling import generate_pictures

    candidate = load_candidate(files / "dog.safetensors", "dog")
    shown = load_photographs(photographs, 32)
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
    shown = load_photographs(photographs, 32)

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
            base, candidates, load_photographs(photographs, 32), PROMPTS, class_noun="dog", encoder=PIXELS
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
        load_photographs(photographs, 32),
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
    shown, candidate = load_photographs(photographs, 64), load_candidate(tmp_path / "tuned", "dog", "sks")
    few = Settings(num_images_per_prompt=1, num_class_images=2, num_inference_steps=2)
    judge = evaluation.Evaluator(shown, PROMPTS, "dog", PIXELS, settings=few)
    judge.score_base(toybox.pipeline)
    assert judge.settings.guidance_scale == 3
    tuned = load_base(str(candidate.path), device="cpu").pipeline
    tuned.family = "sd1"
    assert judge.score(tuned, candidate.subject).figures["drift"]["value"] == pytest.approx(0, abs=1e-5)


def test_a_tuned_model_keeps_the_noise_schedule_that_it_was_trained_with(base: Base, tmp_path: Path) -> None:
    write_model_folder(base.pipeline, tmp_path / "tuned")
    path = tmp_path / "tuned/scheduler/scheduler_config.json"
    config = json.loads(path.read_text())
    trained = {"beta_end": 0.02, "prediction_type": "v_prediction", "set_alpha_to_one": True}
    path.write_text(json.dumps({**config, **trained}))
    with pipeline_of(base, load_candidate(tmp_path / "tuned", "dog", "sks")) as pipeline:
        told = pipeline.scheduler.config
    assert (told.beta_end, told.prediction_type) == (0.02, "v_prediction")
    ours = base.pipeline.scheduler.config
    assert told.set_alpha_to_one == ours.set_alpha_to_one
    assert told.timestep_spacing == ours.timestep_spacing


def run(*words: str) -> Any:
    return CliRunner().invoke(main, ["evaluate", "--class-noun", "dog", *words])


def test_the_command(tiny_base_folder: Path, photographs: Path, files: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    (tmp_path / "prompts.txt").write_text("a {} on grass\n")
    out = tmp_path / "report.json"
    words = ["--base", str(tiny_base_folder), "--prediction-type", "epsilon", "--json", str(out)]
    words += ["--instance-data-dir", str(photographs)]
    words += ["--prompts", str(tmp_path / "prompts.txt"), "--num-inference-steps", "1"]
    words += ["--num-images-per-prompt", "1", "--num-class-images", "2"]
    both = [str(files / "dog.safetensors"), str(files / "hat.safetensors")]
    done = run(*words, "--compare", *both)
    assert done.exit_code == 0, done.output
    assert "encoder efficientnet-lite2" in done.output
    assert "hat minus dog, drift" in done.output
    assert "[unknown: too few]" in done.output
    assert json.loads(out.read_text())["figures"].keys() == {"base", "dog", "hat"}
    again = run(*words, "--compare", *both)
    assert again.exit_code == 1
    assert "--overwrite" in again.output


def test_a_reader_who_goes_away_leaves_the_files(
    photographs: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `dbadapter evaluate ... | head -2` does."""
    command = sys.modules["dbadapter.cli.evaluate"]

    def gone(_: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(command, "_show", gone)
    monkeypatch.setattr(command, "_report", lambda *_, **__: {"figures": {}})
    monkeypatch.setattr("dbadapter.evaluation_report.report_page", lambda *_: "a page")
    words = ["--instance-data-dir", str(photographs), "--adapter", str(files / "dog.safetensors")]
    run(*words, "--json", str(tmp_path / "out.json"), "--report", str(tmp_path / "out.html"))
    assert json.loads((tmp_path / "out.json").read_text()) == {"figures": {}}
    assert (tmp_path / "out.html").read_text() == "a page"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "give what is scored"),
        (("x.safetensors",), "paths follow --compare"),
        (("--adapter", "none.safetensors"), "does not exist"),
        (
            ("--adapter", "dog.safetensors", "--compare", "dog.safetensors"),
            "dog': the report tells them apart by name and folder",
        ),
        (("--adapter", "dog.safetensors", "--image-encoder", "."), "cannot be loaded"),
        (("--adapter", "peft"), "is a PEFT folder: make a file of it with dbadapter convert"),
        (("--tuned", "peft"), "is a PEFT folder: make a file of it with dbadapter convert"),
        (("--compare", "peft"), "is a PEFT folder: make a file of it with dbadapter convert"),
        (("--adapter", "dog.safetensors", "--image-encoder", "toybox-judge"), "did you mean toybox-judges?"),
        (("--adapter", "."), "is a folder: pass a fully tuned model's with --tuned"),
        (("--tuned", "dog.safetensors"), "is a folder in diffusers' layout; pass an adapter's file"),
        (("--tuned", "nope"), "--tuned nope does not exist: give a tuned model's folder"),
        (("--tuned", "empty"), "empty holds no model: there is no model_index.json in it"),
        (("--tuned", "run"), "run is the folder of a run: pass run/model"),
        (("--adapter", "base.safetensors"), "a candidate is called 'base'"),
        (("--adapter", "dog.safetensors", "--class-noun", " "), "--class-noun must say what the subject is"),
        (
            ("--adapter", "dog.safetensors", "--class-noun", "{}"),
            "--class-noun must be a word without braces",
        ),
        (("--adapter", "dog.safetensors", "--class-noun", " Auto"), "--class-noun auto is for train"),
        (("--adapter", "dog.safetensors", "--identifier", "s\nks"), "--identifier must be one line"),
        (("--adapter", "dog.safetensors", "--image-encoder", ""), "--image-encoder is empty: leave it out"),
        (("--adapter", "dog.safetensors", "--kind", "live", "--prompts", "x"), "leave one out"),
        (("--compare", "adapter-run"), "pass adapter-run/mine.safetensors"),
        (
            ("--adapter", "dog.safetensors", "--json", "/dev/null", "--overwrite"),
            "is a device or a broken link",
        ),
        (("--adapter", "dog.safetensors", "--json", "broken", "--overwrite"), "is a device or a broken link"),
        (
            ("--adapter", "dog.safetensors", "--json", "dog.safetensors", "--overwrite"),
            "dog.safetensors is an input of this command",
        ),
    ],
)
def test_refusals_are_one_line(
    words: tuple[str, ...], said: str, photographs: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    for folder in ("peft", "empty", "run/model"):
        (files / folder).mkdir(parents=True, exist_ok=True)
    (files / "run/model/model_index.json").write_text("{}")
    (files / "peft" / "adapter_config.json").write_text("{}")
    (files / "adapter-run").mkdir(exist_ok=True)
    (files / "adapter-run/mine.safetensors").touch()
    with suppress(FileExistsError):
        (files / "broken").symlink_to("nowhere")
    before = (files / "dog.safetensors").read_bytes()
    (files / "base.safetensors").write_bytes((files / "dog.safetensors").read_bytes())
    done = run("--instance-data-dir", str(photographs), *words)
    assert done.exit_code in (1, 2)
    assert done.stderr.startswith("Error: ")
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert (files / "dog.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["photograph", "prompts.txt"])
def test_overwrite_spares_what_is_read(name: str, photographs: Path, files: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(photographs, tmp_path / "photographs")
    (tmp_path / "prompts.txt").write_text("a {} on grass\n")
    path = next(folder.iterdir()) if name == "photograph" else tmp_path / name
    before = path.read_bytes()
    words = ["--instance-data-dir", str(folder), "--prompts", str(tmp_path / "prompts.txt")]
    done = run(*words, "--adapter", str(files / "dog.safetensors"), "--report", str(path), "--overwrite")
    assert f"{path} is an input of this command" in done.stderr
    assert path.read_bytes() == before


def test_more_pictures_than_fit_are_refused_at_once() -> None:
    assert sys.modules["dbadapter.cli.evaluate"]._MOST_IMAGES == MOST_IMAGES
    with pytest.raises(UsageError, match="num_class_images must be from 1 to 1000, got 1001"):
        Settings(num_class_images=1001)
    assert "1<=x<=1000" in run("--instance-data-dir", "x", "--num-images-per-prompt", "1001").output


def test_a_prompt_too_long_for_one_of_them_is_told_before_anything_is_drawn(
    base: Base, photographs: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation.Evaluator, "_draw", lambda *_: pytest.fail("drawn too early"))
    one, other = (load_candidate(files / f"{name}.safetensors", "dog") for name in ("dog", "hat"))
    room = base.tokenizer.model_max_length - len(base.tokenizer("a photo of a dog").input_ids)
    prompts = choose_prompts("dog", ["a photo of a {}" + " dog" * room])
    words = {"class_noun": "dog", "encoder": PIXELS}
    shown = load_photographs(photographs, 32)
    with pytest.raises(DataError, match=r"tokens long, this base reads at most .*; shorten it"):
        evaluate(base, [one, other], shown, prompts, **words)


def test_the_trigger_may_stand_for_the_identifier(files: Path, recwarn: pytest.WarningsRecorder) -> None:
    told = load_candidate(files / "dog.safetensors", "dog").subject
    assert load_candidate(files / "dog.safetensors", "dog", told).subject == told
    assert not recwarn.list


def test_what_cannot_be_written_takes_nothing_else_with_it(
    photographs: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full at the end, after hours of drawing."""
    command, write = sys.modules["dbadapter.cli.evaluate"], Path.write_text

    def full(path: Path, text: str, **options: Any) -> int:
        if ".json." in path.name:
            write(path, text[:5], **options)
            raise OSError(28, "No space left on device")
        return write(path, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr(command, "_show", lambda _: print("the table"))
    monkeypatch.setattr(command, "_report", lambda *_, **__: {"figures": {}})
    monkeypatch.setattr("dbadapter.evaluation_report.report_page", lambda *_: "a page")
    words = ["--instance-data-dir", str(photographs), "--adapter", str(files / "dog.safetensors")]
    done = run(*words, "--json", str(tmp_path / "out.json"), "--report", str(tmp_path / "out.html"))
    assert done.exit_code == 1
    assert "out.json cannot be written (No space left on device): pass another --json" in done.stderr
    assert "the table" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["out.html"]


def test_two_of_one_name_are_told_apart_by_their_folder(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dog.safetensors").write_bytes((files / "dog.safetensors").read_bytes())
    paths = [tmp_path / "a/dog.safetensors", tmp_path / "b/dog.safetensors", files / "hat.safetensors"]
    names = [each.name for each in told_apart([load_candidate(path, "dog") for path in paths])]
    assert names == ["a/dog", "b/dog", "hat"]
    for name in ("x", "y"):
        (tmp_path / name / "run").mkdir(parents=True)
        (tmp_path / name / "run/dog.safetensors").write_bytes((files / "dog.safetensors").read_bytes())
    paths = [tmp_path / "x/run/dog.safetensors", tmp_path / "y/run/dog.safetensors", paths[0]]
    names = [each.name for each in told_apart([load_candidate(path, "dog") for path in paths])]
    assert names == ["x/run/dog", "y/run/dog", "a/dog"]
    monkeypatch.chdir(tmp_path / "x")
    (tmp_path / "x/model_index.json").write_text("{}")
    assert load_candidate(".", "dog", "sks").name == "x"
    (tmp_path / "x/run/dog").mkdir()
    (tmp_path / "x/run/dog/model_index.json").write_text("{}")
    alike = told_apart(
        [load_candidate(Path("run", name), "dog", "sks") for name in ("dog", "dog.safetensors")]
    )
    assert {each.name for each in alike} == {str(tmp_path / "x/run/dog")}  # which the command refuses


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
    shown = load_photographs(photographs, 32)
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


def test_the_same_photograph_twice_is_told(base: Base, photographs: Path, files: Path) -> None:
    shown = load_photographs(photographs, 32)
    with pytest.warns(UserWarning, match="two of the photographs are the same picture"):
        evaluation._warn_of_twins([*shown, shown[0]])


def test_one_photograph_is_not_enough(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "0.png")
    with pytest.raises(DataError, match=r"holds one photograph.*add another"):
        load_photographs(tmp_path, 32)


def test_an_adapter_of_another_noun_is_told(files: Path) -> None:
    with pytest.warns(UserWarning, match="has no cat in it: was it trained with another --class-noun"):
        assert load_candidate(files / "dog.safetensors", "cat").subject.endswith("dog")


def test_another_word_than_the_adapters_own_is_told(files: Path) -> None:
    with pytest.warns(UserWarning, match="and is asked for 'zzz dog': leave --identifier out if that is not"):
        assert load_candidate(files / "dog.safetensors", "dog", "zzz").subject == "zzz dog"


def test_an_adapter_without_words_asks_for_them(base: Base, tmp_path: Path) -> None:
    adapter = synthetic_adapter(base)
    write_adapter(tmp_path / "mute.safetensors", Adapter(adapter.family, adapter.modules, {}))
    with pytest.raises(UsageError, match="pass --identifier"):
        load_candidate(tmp_path / "mute.safetensors", "dog")
    assert load_candidate(tmp_path / "mute.safetensors", "dog", "wxv").subject == "wxv dog"
