"""The embedded base and its world: exact labels, seeds, a folder that plain diffusers loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dbadapter import toybox
from dbadapter.toybox import captions, names, subjects, world

render = pytest.importorskip("dbadapter.toybox.render", reason="numba is not installed").render


def _scenes(count: int, seed: int = 3) -> list[world.Scene]:
    return [world.sample_scene(np.random.default_rng((seed, i))) for i in range(count)]


def test_the_world_is_large_enough() -> None:
    assert len(names.NOUNS) >= 12
    assert len([context for context in names.CONTEXTS if context]) >= 10


def test_a_scene_gives_the_same_picture_alone_and_among_others() -> None:
    scenes = _scenes(5)
    together, masks = render(scenes)
    alone, mask = render(scenes[3:4])
    assert np.array_equal(together[3], alone[0])
    assert np.array_equal(masks[3], mask[0])
    assert together.dtype == np.uint8
    assert together.shape == (5, 64, 64, 3)


@pytest.mark.parametrize("noun", names.NOUNS)
def test_the_object_fills_the_frame_and_the_mask_says_where_it_is(noun: str) -> None:
    rng = np.random.default_rng(7)
    _, masks = render([world.sample_scene(rng, noun) for _ in range(8)])
    for mask in masks > 127:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        reach = max(rows[-1] - rows[0], columns[-1] - columns[0])
        assert reach >= 38, f"a {noun} {reach} pixels long"
        assert mask.mean() >= 0.05


def test_a_vector_is_one_instance_whatever_the_view() -> None:
    one = subjects.SUBJECTS[0].instance
    assert np.array_equal(world.bodies(one), world.bodies(subjects.SUBJECTS[0].instance))
    other = world.sample_instance(np.random.default_rng(8), one.noun)
    assert not np.array_equal(world.bodies(one), world.bodies(other))


def test_accent_and_second_colour_differ_from_the_body() -> None:
    for scene in _scenes(300):
        assert scene.instance.color not in (scene.instance.accent, scene.instance.second_color)


def test_captions_say_what_their_labels_say() -> None:
    rng = np.random.default_rng(0)
    rare = ["sks", "zwx"]
    colored = patterned = named = 0
    scenes = _scenes(2000)
    for scene in scenes:
        made = captions.caption(scene, rng, rare)
        noun, context, color, pattern = world.labels(scene)
        assert names.NOUNS[noun] in made.text.split()
        assert made.noun == noun
        if made.context != captions.UNSAID:
            assert made.context == context
            assert (names.CONTEXTS[context] or captions.PLAIN_CONTEXT) in made.text
        if made.color != captions.UNSAID:
            assert made.color == color
            assert list(names.COLORS)[color] in made.text
        if made.pattern != captions.UNSAID:
            assert made.pattern == pattern
            assert names.PATTERNS[pattern] in made.text
        colored += made.color != captions.UNSAID
        patterned += made.pattern != captions.UNSAID
        named += any(word in made.text.split() for word in rare)
    assert 0.6 < colored / len(scenes) < 0.8
    assert patterned / len(scenes) > 0.2
    assert 0.1 < named / len(scenes) < 0.15


def test_held_out_subjects_are_absent_from_pretraining() -> None:
    from dbadapter.toybox.pretrain_scenes import scene

    held = np.stack([subject.instance.vector for subject in subjects.SUBJECTS])
    drawn = np.stack([scene(i).instance.vector for i in range(0, 40_000, 40)])
    assert np.abs(held[:, None] - drawn[None]).max(-1).min() > 0.05


def test_subjects_are_scored_in_contexts_they_were_not_shown_in() -> None:
    assert not set(subjects.TRAIN_CONTEXTS) & set(subjects.TEST_CONTEXTS)
    assert len({subject.noun for subject in subjects.SUBJECTS}) >= 4
    assert len(subjects.SUBJECTS) >= 6


def test_the_example_subject_is_five_renders() -> None:
    example = toybox.example_subject()
    pictures = sorted(example.folder.glob("*.png"))
    assert len(pictures) == 5
    assert all(Image.open(path).size == (64, 64) for path in pictures)
    assert example.class_noun in names.NOUNS
    assert set(example.contexts) <= set(names.CONTEXTS)
    expected, _ = render(subjects.views(subjects.EXAMPLE, subjects.TRAIN_CONTEXTS), samples=4)
    shown = np.stack([np.asarray(Image.open(path)) for path in pictures]).astype(int)
    assert np.abs(shown - expected).mean() < 1  # another processor may round an edge otherwise


def test_plain_diffusers_loads_the_folder() -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(toybox.folder(), local_files_only=True)
    assert pipeline.tokenizer("sks").input_ids[1:-1] == [48136]
    picture = pipeline("a photo of a mug", num_inference_steps=2, generator=torch.manual_seed(0)).images[0]
    assert picture.size == (64, 64)


def test_the_weights_are_small_and_readable_by_older_transformers() -> None:
    from safetensors import safe_open

    files = list(toybox.folder().glob("*/*.safetensors"))
    assert sum(path.stat().st_size for path in files) <= 40e6
    with safe_open(toybox.folder() / "text_encoder" / "model.safetensors", "pt") as file:
        assert all(key.startswith("text_model.") for key in file.keys())  # noqa: SIM118
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        assert (toybox.folder() / "tokenizer" / name).exists()


def test_vocabulary_is_clips() -> None:
    vocabulary = json.loads((toybox.folder() / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    assert len(vocabulary) == 49408
    assert vocabulary["sks</w>"] == 48136
    assert vocabulary["<|endoftext|>"] == 49407


def test_pretraining_batches_depend_on_seed_and_step_alone() -> None:
    from dbadapter.toybox.pretrain_scenes import batches

    def take(first: int, count: int) -> list[tuple[int, list[int]]]:
        stream = batches(10, 3, seed=1, first_step=first)
        return [(step, indices.tolist()) for step, indices in (next(stream) for _ in range(count))]

    assert take(0, 9)[4:] == take(4, 5)
    epoch = [index for _, indices in take(3, 3) for index in indices]
    assert len(set(epoch)) == len(epoch)


def test_folding_the_latents_scale_leaves_reconstruction_alone() -> None:
    import torch

    from dbadapter.toybox.architecture import build_vae
    from dbadapter.toybox.pretrain import equalize_latents

    torch.manual_seed(0)
    vae = build_vae().eval()
    pictures = torch.rand(8, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = vae.decode(vae.encode(pictures).latent_dist.mode()).sample
        std_before = vae.encode(pictures).latent_dist.std
        equalize_latents(vae, pictures)
        posterior = vae.encode(pictures).latent_dist
        after = vae.decode(posterior.mode()).sample
    assert torch.allclose(before, after, atol=1e-4)
    scaled = posterior.mean * vae.config.scaling_factor
    assert torch.allclose(scaled.mean((0, 2, 3)), torch.zeros(4), atol=1e-3)
    assert torch.allclose(scaled.std((0, 2, 3)), torch.ones(4), atol=1e-2)
    ratio = posterior.std / std_before
    assert torch.allclose(ratio, ratio[:1, :, :1, :1].expand_as(ratio), rtol=1e-3)


@pytest.mark.slow
def test_pretraining_runs_resumes_and_writes_a_folder(tmp_path: Path) -> None:
    import shutil

    out = tmp_path / "model"
    shutil.copytree(toybox.folder() / "tokenizer", out / "tokenizer")
    command = [sys.executable, "-m", "dbadapter.toybox.pretrain", "--work-dir", str(tmp_path / "work")]
    command += ["--output-dir", str(out), "--pictures", "600", "--text-steps", "3", "--vae-steps", "2"]
    for steps in ("2", "4"):
        subprocess.run([*command, "--unet-steps", steps, "--batch-size", "4"], check=True)
    log = [json.loads(line) for line in (tmp_path / "work" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if line["stage"] == "unet"] == [2, 4]
    from diffusers import StableDiffusionPipeline

    StableDiffusionPipeline.from_pretrained(out, local_files_only=True)
