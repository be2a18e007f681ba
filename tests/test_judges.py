"""toybox's judges: what comes with the package tells its renders apart as well as it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from dbadapter import toybox
from dbadapter.encoders import TOYBOX_JUDGES, load_encoder, load_prompt_judge
from dbadapter.toybox import names
from dbadapter.toybox.judges import Judges, load_judges, named, save_judges, tensor_of


@pytest.fixture(scope="module")
def renders() -> list[Image.Image]:
    """Five views of one mug, in the contexts of `subjects.TRAIN_CONTEXTS`."""
    return [Image.open(path) for path in sorted(toybox.example_subject().folder.glob("*.png"))]


def test_they_see_noun_and_context_of_the_example(renders: list[Image.Image]) -> None:
    judges = load_judges()
    found = judges.classify(tensor_of(renders))
    assert [names.NOUNS[i] for i in found["noun"]] == ["mug"] * 5
    assert [names.CONTEXTS[i] for i in found["context"]] == [
        "", "on grass", "on a wooden floor", "on bricks", "in the snow"
    ]  # fmt: skip
    shares = judges.nouns(tensor_of(renders))
    assert shares.sum(1).tolist() == pytest.approx([1.0] * 5)
    assert shares[:, names.NOUNS.index("mug")].min() > 0.5
    assert set(judges.accuracy) == {"noun", "context", "color", "instance"}
    assert judges.accuracy["noun"] > 0.98


def test_one_instance_is_nearer_to_itself_than_noise_is(renders: list[Image.Image]) -> None:
    encoder = load_encoder(TOYBOX_JUDGES)
    own = encoder.embed(renders)
    assert own.norm(dim=1).tolist() == pytest.approx([1.0] * 5, abs=1e-5)
    noise = encoder.embed([Image.effect_noise((64, 64), 80).convert("RGB")])
    assert (own @ own.T).min() > (own @ noise.T).max() + 0.3
    known = load_judges().accuracy
    assert encoder.accuracy == {"instance": known["instance"]}
    assert load_prompt_judge(TOYBOX_JUDGES).accuracy == {name: known[name] for name in ("noun", "context")}


def test_agreement_counts_what_the_prompt_names(renders: list[Image.Image]) -> None:
    judge = load_prompt_judge(TOYBOX_JUDGES)
    prompts = [
        "a photo of a mug",
        "a photo of a mug on grass",
        "a photo of a mug on the beach",
        "a photo of a teapot on bricks",
        "nothing that it knows",
    ]
    found = judge.score(renders, prompts)
    assert found["prompt_fidelity"][:4].tolist() == [1, 1, 0, 0]
    assert found["noun_agreement"][:4].tolist() == [1, 1, 1, 0]
    assert found["context_agreement"][1:4].tolist() == [1, 0, 1]
    assert found["context_agreement"][0].isnan()
    assert all(values[4].isnan() for values in found.values())


def test_what_a_prompt_names() -> None:
    assert named("a photo of a Mug, on the beach") == ("mug", "on the beach")
    assert named("A mug on grass.") == ("mug", "on grass")
    assert named("a photo of a robot") == ("robot", None)
    assert named("a carpet") == (None, None)
    assert named("a photo of a robot in front of a house") == ("robot", None)  # the first is what it is of
    assert named("a dog on watermelon") == ("dog", None)


def test_pictures_of_any_size_are_judged(renders: list[Image.Image]) -> None:
    big = renders[0].resize((200, 200)).convert("RGBA")
    assert tensor_of([big, renders[0]]).shape == (2, 3, 64, 64)


def test_weights_survive_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dbadapter.toybox import judges as module

    one = load_judges()
    save_judges(Judges(one.classifier, one.encoder, {"noun": 0.5}), tmp_path / "judges.safetensors")
    monkeypatch.setattr(module, "_WEIGHTS", tmp_path / "judges.safetensors")
    again = load_judges()
    assert again.accuracy == {"noun": 0.5}
    pictures = torch.rand(2, 3, 64, 64) * 2 - 1
    assert torch.equal(again.embed(pictures), one.embed(pictures))
