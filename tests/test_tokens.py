"""Identifiers: rare, short, single, and without a meaning."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from dbadapter.errors import DataError
from dbadapter.tokens import photo_tokens, pick_identifier, rare_tokens


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """CLIP's own vocabulary, as toybox and SD1.x have it."""
    from transformers import CLIPTokenizer

    from dbadapter import toybox

    return CLIPTokenizer.from_pretrained(toybox.folder() / "tokenizer")


def test_sks_comes_first(tokenizer: Any) -> None:
    first = rare_tokens(tokenizer)[0]
    assert first == ("sks", 48136)


def test_every_candidate_is_one_rare_token(tokenizer: Any) -> None:
    found = rare_tokens(tokenizer, count=1000)
    assert len(found) > 30
    assert len({token for token, _ in found}) == len(found)
    for token, index in found:
        assert 3 <= len(token) <= 4
        assert token.isascii()
        assert token.isalpha()
        assert tokenizer(token, add_special_tokens=False).input_ids == [index]
        assert index > 44000
    ids = [index for _, index in found[1:]]
    assert ids == sorted(ids, reverse=True)


@pytest.mark.parametrize("word", ["ssh", "tbd", "keel", "oily", "dog", "hpv", "gmbh"])
def test_words_and_abbreviations_are_no_candidates(tokenizer: Any, word: str) -> None:
    assert word not in {token for token, _ in rare_tokens(tokenizer, count=1000)}


def test_count(tokenizer: Any) -> None:
    assert len(rare_tokens(tokenizer)) == 20
    assert len(rare_tokens(tokenizer, 3)) == 3
    assert rare_tokens(tokenizer, 0) == []


def test_each_photograph_gets_a_token_of_its_own(tokenizer: Any) -> None:
    found = photo_tokens(tokenizer, 6, "dog", "sks")
    assert len(set(found)) == 6
    assert "sks" not in found
    assert photo_tokens(tokenizer, 4, "dog", "sks") == found[:4]  # of a run that got more photographs
    assert found[0] not in photo_tokens(tokenizer, 6, "dog", found[0])
    prompt = f"a {found[0]} photo of {found[1].upper()} dog"  # CLIP reads both cases as one
    assert photo_tokens(tokenizer, 2, "dog", prompt) == ["sks", found[2]]


def test_more_photographs_than_rare_tokens(tokenizer: Any) -> None:
    found = photo_tokens(tokenizer, 2000, "dog", "sks")
    assert len(found) == 2000
    assert len(set(found)) > 30


def test_no_part_of_the_class_noun(tokenizer: Any) -> None:
    assert rare_tokens(tokenizer, class_noun="SKS plush")[0].token != "sks"
    assert pick_identifier(tokenizer, "dog") == "sks"


def test_a_rare_wish_is_taken_without_a_word(tokenizer: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pick_identifier(tokenizer, "dog", "ohwx") == "ohwx"


@pytest.mark.parametrize(
    ("wish", "message"), [("dog", "'dog' is common"), ("mycorgirex", r"'mycorgirex' is \d tokens")]
)
def test_a_poor_wish_is_kept_with_a_warning(tokenizer: Any, wish: str, message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        assert pick_identifier(tokenizer, "cat", wish) == wish


def test_a_vocabulary_without_candidates_asks_for_a_word() -> None:
    class Letters:
        def get_vocab(self) -> dict[str, int]:
            return {"a</w>": 0, "b</w>": 1}

        def __call__(self, text: str, **_: object) -> SimpleNamespace:
            return SimpleNamespace(input_ids=[0] * len(text))

    with pytest.raises(DataError, match="--identifier"):
        pick_identifier(Letters(), "dog")
    with pytest.raises(DataError, match="--no-photo-tokens"):
        photo_tokens(Letters(), 3, "dog", "sks")
