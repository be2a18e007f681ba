"""What `evaluate` asks for: DreamBooth's prompts, toybox's, those of a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from dbadapter.errors import DataError
from dbadapter.evaluation_prompts import LIVE, OBJECT, choose_prompts, default_prompts, read_prompts


def test_the_paper_has_25_prompts_of_each_kind() -> None:
    assert len(OBJECT) == len(LIVE) == len(set(OBJECT)) == len(set(LIVE)) == 25
    assert all(template.count("{}") == 1 for template in (*OBJECT, *LIVE))
    assert choose_prompts("owl", LIVE).subject == LIVE
    assert choose_prompts("owl").class_prompt == "a photo of an owl"
    assert choose_prompts("unicorn").class_prompt == "a photo of a unicorn"


def test_toybox_is_asked_for_what_it_can_draw() -> None:
    prompts = default_prompts("toybox", "mug")
    assert "a photo of {} on the beach" in prompts.subject
    assert not any("mug" in text for text in prompts.unrelated)
    assert default_prompts("sd1", "mug", "live").subject == LIVE


def test_a_file_of_prompts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# mine\n\na {} in a boat\n{subject} asleep\n")
    assert read_prompts(file) == ("a {} in a boat", "{} asleep")
    file.write_text("a {} in a boat\na dog\n")
    with pytest.raises(DataError, match=r"line 2: a prompt must hold \{\} once"):
        read_prompts(file)
    file.write_text("a {}} x")
    with pytest.raises(DataError, match="line 1"):
        read_prompts(file)
    file.write_bytes(b"\xef\xbb\xbf# a note\na {} in a boat\n")
    assert read_prompts(file) == ("a {} in a boat",)
    file.write_text("a {} x\n\na {subject} x\n")
    with pytest.raises(DataError, match="line 3: the prompt of line 1 again: drop one"):
        read_prompts(file)
    file.write_text("a {} x\nA {}  X\n")  # the same tokens
    with pytest.raises(DataError, match="line 2: the prompt of line 1 again: drop one"):
        read_prompts(file)
    file.write_text("a {} on\u2028grass {}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"line 1: a prompt must hold \{\} once"):
        read_prompts(file)
    file.write_text("a {} \0 x\n")
    with pytest.raises(DataError, match="line 1: a prompt must hold no control characters"):
        read_prompts(file)
    file.write_text("\n")
    with pytest.raises(DataError, match="1 to 500 prompts"):
        read_prompts(file)
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")


def test_unrelated_prompts_do_not_name_the_class() -> None:
    assert any("sports car" in prompt for prompt in default_prompts("sd1", "dog").unrelated)
    assert not any("car" in prompt.split() for prompt in default_prompts("sd1", "Car").unrelated)
