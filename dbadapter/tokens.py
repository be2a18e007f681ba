"""Rare tokens of a base's own tokenizer: names for a subject that are tied to nothing yet."""

from __future__ import annotations

import re
import warnings
from typing import Any, NamedTuple

from dbadapter.errors import DataError

__all__ = ["RareToken", "photo_tokens", "pick_identifier", "rare_tokens"]

WORD_END = "</w>"  # CLIP's BPE marks the last token of a word with it

# Ids follow the order of the merges, hence frequency: the last tenth is seldom seen in training captions.
RARE_SHARE = 0.1

# Without a vowel it is hardly a word: sure enough without a dictionary, and enough candidates remain.
_CANDIDATE = re.compile(r"[bcdfghjklmnpqrstvwxz]{3,4}")

# Rare in CLIP's captions, but with a meaning of their own: words, units, computing, brands, places, people.
_MEANINGFUL = frozenset(
    """
    appt bgs bln blr bnp bpd btn cbp ccd cfd chk clg cmdr cns csg cwgc dbz ddc dds dmx dprk dsp dts dwp
    fbs fck ffxv fnc gmbh grl gsp hgtv hmv hns hpv hrs hsv httr kgs khz kkkk kprc lbj lpg mbps mds mgs
    mgt mlg mnd mph mss mth mtr ncds nhc nlwx nmwx npt nrc nrg nwsl pcm pff pgs pkg pln psst psv ptc pvp
    qtr rcb rdr rmb rps rsc scp shld sht smg sqm ssh stg svc swfl szn tbd tbr thn tls tms tsb tvc tvn
    wftv wrs wwdc wwf wwx
    """.split()  # noqa: SIM905 (a list of a hundred strings would read worse)
)

# Most DreamBooth guides use this one, so their prompts work unchanged. Not spotless: SKS is a rifle too,
# which a class noun beside it overrules.
_CUSTOMARY = "sks"


class RareToken(NamedTuple):
    """A candidate for the identifier, and its id in the vocabulary."""

    token: str
    id: int


def rare_tokens(tokenizer: Any, count: int = 20, class_noun: str = "") -> list[RareToken]:
    """Return up to `count` identifiers, the most advisable first.

    As Ruiz et al. 2022, section 3.2: short, one token of the vocabulary, of its rarest, so that the model has
    no strong prior for it. Here: 3 or 4 letters a-z without a vowel, among the last tenth of the ids, no
    known abbreviation, and encoded as exactly its one id. "sks" is first where it qualifies; then by rarity.

    Args:
        tokenizer: a CLIPTokenizer, or another with a BPE vocabulary that marks word ends with `</w>`.
        class_noun: no candidate is part of it, nor it of a candidate.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    noun = class_noun.lower()
    candidates = [
        RareToken(entry.removesuffix(WORD_END), index)
        for entry, index in vocabulary.items()
        if entry.endswith(WORD_END) and index >= _rare_from(vocabulary)
    ]
    candidates.sort(key=lambda candidate: (candidate.token != _CUSTOMARY, -candidate.id))
    found: list[RareToken] = []
    for candidate in candidates:
        if len(found) == count:
            break
        if _is_meaningless(candidate.token, noun) and _ids(tokenizer, candidate.token) == [candidate.id]:
            found.append(candidate)
    return found


def pick_identifier(tokenizer: Any, class_noun: str, wish: str = "auto") -> str:
    """Return the word that stands for the subject: the best rare token, or the wish as it is.

    A wish that is no single token, or a common one, is kept with a warning: some people want it so.

    Raises:
        DataError: the vocabulary has no rare token that qualifies; the cure is to name one.
    """
    if wish == "auto":
        if not (tokens := rare_tokens(tokenizer, 1, class_noun)):
            raise DataError("this base's vocabulary has no rare token to pick; pass --identifier WORD")
        return tokens[0].token
    ids, vocabulary = _ids(tokenizer, wish), tokenizer.get_vocab()
    better = ", ".join(token.token for token in rare_tokens(tokenizer, 3, class_noun)) or "a rare token"
    if len(ids) != 1:
        message = f"identifier {wish!r} is {len(ids)} tokens, whose meanings mix; one rare token is better"
    elif ids[0] < _rare_from(vocabulary):
        message = f"identifier {wish!r} is common (id {ids[0]} of {len(vocabulary)}) and has a meaning"
    else:
        return wish
    warnings.warn(f"{message}, e.g. {better}", UserWarning, stacklevel=2)
    return wish


def photo_tokens(tokenizer: Any, count: int, class_noun: str, prompt: str) -> list[str]:
    """Return a rare token for each of `count` photographs, none of them a word of the prompt.

    Where a vocabulary has fewer, several photographs share one.

    Raises:
        DataError: it has none.
    """
    taken = set(re.findall(r"\w+", prompt.lower()))
    candidates = rare_tokens(tokenizer, count + len(taken), class_noun)
    names = [token for token, _ in candidates if token not in taken]
    if not names:
        raise DataError("this base's vocabulary has no rare tokens for photographs; pass --no-photo-tokens")
    return [names[index % len(names)] for index in range(count)]


def _rare_from(vocabulary: dict[str, int]) -> int:
    return int(len(vocabulary) * (1 - RARE_SHARE))


def _is_meaningless(token: str, noun: str) -> bool:
    if not _CANDIDATE.fullmatch(token) or token in _MEANINGFUL:
        return False
    return not noun or (token not in noun and noun not in token)


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids
