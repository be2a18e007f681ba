"""The page of an evaluation: its numbers are the report's, it is safe, and it stands in a browser."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chromium
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from report_pages import (
    HOSTILE,
    Reader,
    figure,
    make_pictures,
    make_report,
)

from dbadapter.adapter_file import AdapterDescription, write_adapter
from dbadapter.base import load_base
from dbadapter.cli import main
from dbadapter.encoders import Encoder
from dbadapter.errors import DataError
from dbadapter.evaluation_report import ReportPictures, read_report, report_page
from dbadapter.export.parity import synthetic_adapter
from dbadapter.report_figures import FIGURES
from dbadapter.report_html import bytes_text, element, number, signed
from dbadapter.report_pictures import encode_picture
from dbadapter.svg import axis_of, mark_style


def test_who_is_left_out_and_how_near_photographs_are_is_shown() -> None:
    report = make_report(("dog", "hat"))
    report |= {
        "left_out": {"<cat>": "the model gave values that are not finite"},
        "photographs_nearest": 0.91234,
        "words_for_the_subject": {"dog": "sks dog", "hat": "sks dog", "<cat>": "wxv dog"},
    }
    page = Reader(report_page(report, make_pictures(report)))
    assert "<cat>: the model gave values that are not finite" in [text for _, text in page.all("li")]
    assert repr(0.91234) in [attributes["value"] for attributes, _ in page.all("data")]
    assert not any("wxv" in text for _, text in page.all("td"))


@pytest.mark.parametrize("names", [("dog",), ("dog", "hat", "cat"), tuple(f"n{i}" for i in range(12))])
def test_the_numbers_are_the_reports(names: tuple[str, ...]) -> None:
    report = make_report(names)
    page = Reader(report_page(report, make_pictures(report)))
    shown = [attributes["value"] for attributes, _ in page.all("data")]
    for of in report["figures"].values():
        for key, value in of.items():
            if isinstance(value, dict) and "value" in value:
                assert {repr(value[end]) for end in ("value", "low", "high")} <= set(shown), key
        assert repr(of["nearest_photograph"]) in shown
        assert {repr(value) for value in of["per_prompt"]["subject_fidelity"]} <= set(shown)
    assert {repr(entry["value"]) for entry in report["differences"]} <= set(shown)
    assert repr(report["subject_ceiling"]) in shown
    assert {str(460_080 + i) for i in range(len(names))} <= set(shown)
    for attributes, text in page.all("data"):
        exact = attributes["value"]
        assert exact is not None
        if not text.endswith(("B", "bytes")):
            assert float(text.replace("\N{MINUS SIGN}", "-")) == pytest.approx(float(exact), abs=5.1e-4)


def test_the_summary_has_a_row_for_each_and_says_what_is_not_measured() -> None:
    report = make_report()
    section = report_page(report, make_pictures(report)).split('id="summary"')[1].split("</section>")[0]
    rows = re.findall(r"<tr.*?</tr>", section)
    assert len(rows) == 1 + 4 + 1  # heads; base and three; the photographs themselves
    assert all(row.count("not measured") == 1 for row in rows[1:5])
    assert all(len(re.findall(r"<t[hd][ >]", row)) == len(re.findall(r"<t[hd][ >]", rows[0])) for row in rows)
    assert "0.877" in rows[5]


def test_every_figure_is_explained() -> None:
    report = make_report()
    report["figures"]["hat"]["sharpness"] = figure(0.5)  # one that the page has never heard of
    page = Reader(report_page(report, ReportPictures()))
    headings = [text for _, text in page.all("h3")]
    said = "".join(text for _, text in page.all("main"))
    for key in report["figures"]["dog"].keys() - {"bytes", "nearest", "per_prompt"}:
        assert FIGURES[key].label in headings
        assert FIGURES[key].meaning in said
    assert "Sharpness" in headings


def test_a_plot_says_unknown_where_the_table_does() -> None:
    report = make_report(("dog",))
    figure = report["figures"]["dog"]["subject_fidelity"]
    figure |= {"low": figure["value"] - 2, "high": figure["value"] + 2}
    page = report_page(report, ReportPictures())
    assert f"dog: {figure['value']:.3f}, interval unknown" in page
    assert f"{figure['value']:.3f}, interval from {figure['value']:.3f}" not in page


def test_differences_are_marked_where_zero_lies_outside() -> None:
    report = make_report(("dog", "hat"))
    page = Reader(report_page(report, ReportPictures()))
    assert [text for _, text in page.all("span") if _.get("class", "").startswith("verdict")] == [
        "\u25b2 better",
        "\u25bc worse",
        "no difference shown",
    ]
    assert len(page.all("tr", **{"class": "shown"})) == 2
    alone = report_page(make_report(("dog",)), ReportPictures())
    assert "one candidate only" in alone


def test_the_report_can_be_read_back(tmp_path: Path) -> None:
    report = make_report(("dog", HOSTILE, "\udcff broken name"))
    path = tmp_path / "out.html"
    path.write_text(report_page(report, make_pictures(report)), encoding="utf-8")
    assert read_report(path) == report
    endless = copy.deepcopy(report)
    endless["figures"]["dog"]["drift"]["low"] = math.nan
    path.write_text(report_page(endless, ReportPictures()), encoding="utf-8")
    assert read_report(path)["figures"]["dog"]["drift"]["low"] is None


@pytest.mark.parametrize("text", ["", "<p>nothing", '<script id="report">[1]</script>', "\xff"])
def test_what_holds_no_report_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.html").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"x\.html holds no report") as caught:
        read_report(tmp_path / "x.html")
    assert "\n" not in str(caught.value)


def test_hostile_words_stay_words() -> None:
    names = ("dog", HOSTILE, "\u202etxt.exe", "a\x00b\x1bc\udcff")
    report = make_report(names)
    report["class_noun"] = report["image_encoder"] = report["base"] = HOSTILE
    text = report_page(report, make_pictures(report))
    page = Reader(text)
    assert [attributes for attributes, _ in page.all("script")] == [
        {"type": "application/json", "id": "report"}
    ]
    assert not [1 for _, attributes, _ in page.elements if any(key.startswith("on") for key in attributes)]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\ud800-\udfff]", text)
    text.encode("utf-8")
    # Written out as it was given, at each place where a candidate is named; directions end with the name.
    named = [words for _, words in page.all("bdi")]
    assert named.count(HOSTILE) > 5
    assert "\u202etxt.exe" in named


def test_nothing_comes_from_outside() -> None:
    report = make_report(("dog", HOSTILE))
    page = Reader(report_page(report, make_pictures(report)))
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0][0]["content"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")
    addresses = [
        (tag, key, value or "")
        for tag, attributes, _ in page.elements
        for key, value in attributes.items()
        if key in ("src", "href", "srcset", "action", "data", "xlink:href", "poster", "style", "background")
    ]
    assert addresses
    for tag, _, value in addresses:
        assert value.startswith("data:image/" if tag == "img" else "#"), (tag, value[:80])
    styles = "".join(text for _, text in page.all("style"))
    assert "url(" not in styles
    assert "@import" not in styles
    assert "//" not in styles
    ids = {attributes["id"] for _, attributes, _ in page.elements if attributes.get("id")}
    assert {value[1:] for tag, _, value in addresses if tag == "a"} <= ids


def test_pictures_are_beside_their_words() -> None:
    report = make_report(("dog", "hat"))
    pictures = make_pictures(report)
    page = Reader(report_page(report, pictures))
    images = [attributes for attributes, _ in page.all("img")]
    assert all(image["alt"] for image in images)
    of_dog = pictures.of("dog", "subject")
    alts = {image["src"]: image["alt"] for image in images}
    assert alts[of_dog[0].address] == "a photo of dog on grass, dog, seed 1000"
    assert alts[of_dog[1].address] == "a photo of dog on grass, dog, seed 1001"
    assert {tile.address for part in pictures.drawn["hat"].values() for tile in part} <= alts.keys()
    # 2 candidates x 6 pairs, the nearest first.
    pairs = page.all("figure", **{"class": "pair"})
    assert len(pairs) == 12
    cosines = [float(text[:5]) for _, text in pairs[:6]]
    assert cosines == sorted(cosines, reverse=True)


def test_tables_tell_what_their_heads_belong_to() -> None:
    report = make_report()
    page = Reader(report_page(report, make_pictures(report)))
    assert all(attributes.get("scope") in ("row", "col") for attributes, _ in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(attributes.get("aria-label") for attributes, _ in page.all("svg", role="img"))
    assert len(page.all("h1")) == 1


def test_a_page_without_pictures_says_so() -> None:
    report = make_report(("dog", "hat"))
    for name in report["figures"]:
        del report["figures"][name]["nearest"], report["figures"][name]["per_prompt"]
    del report["settings"]["unrelated_prompts"], report["versions"], report["date"], report["base"]
    text = report_page(report, ReportPictures())
    assert Reader(text).all("img") == []
    assert text.count("No pictures were kept.") > 4
    fewer = make_pictures(make_report(("dog", "hat")))
    del fewer.drawn["hat"]
    fewer.drawn["dog"]["subject"] = fewer.drawn["dog"]["subject"][:3]
    assert Reader(report_page(make_report(("dog", "hat")), fewer)).all("img")


def test_pictures_are_small(tmp_path: Path) -> None:
    large = encode_picture(Image.linear_gradient("L").resize((1024, 512)))
    assert (large.width, large.height) == (256, 128)
    assert large.address.startswith("data:image/jpeg;base64,")
    assert len(large.address) < 20_000
    small = encode_picture(Image.new("RGBA", (64, 48), (1, 2, 3, 4)))
    assert (small.width, small.height) == (64, 48)
    assert small.address.startswith("data:image/png;base64,")


def test_numbers_and_markup() -> None:
    assert element("a", "<&>", title='"', hidden=True, off=None) == (
        '<a title="&quot;" hidden>&lt;&amp;&gt;</a>'
    )
    assert number(-1e-16) == '<data value="-1e-16">0.000</data>'
    assert ">+0.250<" in signed(0.25)
    assert ">\N{MINUS SIGN}0.250<" in signed(-0.25)
    assert ">0.000<" in signed(1e-9)
    assert [re.sub("<.*?>", "", bytes_text(n)) for n in (0, 999, 460_080, 3_438_000_000)] == [
        "0 bytes",
        "999 bytes",
        "460 kB",
        "3.44 GB",
    ]


@pytest.mark.parametrize("values", [[], [0.3], [0.0, 1.0], [-0.07, 0.97], [0.3123, 0.3124], [-3.0, 250.0]])
def test_axes_hold_their_values_at_round_ticks(values: list[float]) -> None:
    axis = axis_of([*values, math.nan])
    assert all(0 < axis.share(value) < 1 for value in values)
    assert 2 <= len(axis.ticks) <= 7
    assert all(0 <= axis.share(tick) <= 1 for tick in axis.ticks)


def test_candidates_look_different() -> None:
    assert len({mark_style(index) for index in range(32)}) == 32


def test_outputs_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "out.html").write_text("mine")
    words = [
        "evaluate",
        "--class-noun",
        "dog",
        "--adapter",
        "none.safetensors",
        "--instance-data-dir",
        "none",
    ]
    for given, said in (
        (["--report", str(tmp_path / "out.html")], "exists already"),
        (["--report", str(tmp_path)], "is a folder"),
        (["--report", str(tmp_path / "out.html" / "x.html")], "cannot be written"),
        (["--report", str(tmp_path / "x"), "--json", str(tmp_path / "x")], "are both"),
        (["--report", str(tmp_path / "x"), "--json", str(tmp_path / "x" / "y")], "one lies in the other"),
        (["--report", str(tmp_path / ("x" * 251))], "cannot be written (File name too long)"),
    ):
        done = CliRunner().invoke(main, [*words, *given])
        assert done.exit_code in (1, 2)
        assert said in done.stderr
    assert (tmp_path / "out.html").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out.html"]


def test_the_command_writes_one_page(
    tiny_base_folder: Path, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An encoder that hides nothing, and takes no time.
    def pixels(pictures: Any) -> torch.Tensor:
        small = [np.asarray(picture.resize((8, 8)), dtype=np.float32) for picture in pictures]
        return torch.from_numpy(np.stack(small)).flatten(1) - 128

    monkeypatch.setattr("dbadapter.encoders.load_encoder", lambda *_: Encoder("pixels", pixels))
    write_adapter(
        tmp_path / "dog.safetensors",
        synthetic_adapter(load_base(str(tiny_base_folder), device="cpu")),
        description=AdapterDescription(trigger="sks dog"),
    )
    (tmp_path / "prompts.txt").write_text("a {} on grass\n<script> {}\n")
    out = tmp_path / "new" / "folder" / "out.html"
    words: list[Any] = ["evaluate", "--base", tiny_base_folder, "--adapter", tmp_path / "dog.safetensors"]
    words += ["--instance-data-dir", photographs, "--class-noun", "dog", "--num-inference-steps", 1]
    words += ["--prompts", tmp_path / "prompts.txt", "--num-images-per-prompt", 2, "--num-class-images", 2]
    words += ["--report", out, "--json", tmp_path / "out.json"]
    done = CliRunner().invoke(main, list(map(str, words)))
    assert done.exit_code == 0, done.output
    report = read_report(out)
    assert report == json.loads((tmp_path / "out.json").read_text())
    assert {"dbadapter", "torch", "diffusers"} <= report["versions"].keys()
    assert [path.name for path in out.parent.iterdir()] == ["out.html"]
    shown = Reader(out.read_text(encoding="utf-8"))
    # 3 photographs; base and adapter: 4 of the subject, 2 of the class, 8 x 2 of others; 4 pairs.
    assert len(shown.all("img")) == 3 + 2 * (4 + 2 + 16) + 4 * 2
    assert CliRunner().invoke(main, list(map(str, words))).exit_code == 1


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    if chromium.chromium_path() is None:
        pytest.skip("no chromium here (apt-get install chromium, or set CHROMIUM)")
    with chromium.chromium(tmp_path_factory.mktemp("chromium")) as shown:
        yield shown


@pytest.mark.parametrize("names", [("dog",), ("dog", HOSTILE, "n" * 90)])
def test_in_a_browser(page: chromium.Page, names: tuple[str, ...], tmp_path: Path) -> None:
    report = make_report(names)
    path = tmp_path / "out.html"
    path.write_text(report_page(report, make_pictures(report)), encoding="utf-8")
    for width, dark in ((1280, False), (400, True)):
        page.open(path, width=width, dark=dark)
        assert page.complaints() == []
        assert page.requests() == [path.as_uri()]
        assert page.value("document.documentElement.scrollWidth") == width
        assert page.value("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        assert page.value("getComputedStyle(document.body).colorScheme") == "light dark"
        light = page.value("getComputedStyle(document.body).backgroundColor") == "rgb(247, 247, 245)"
        assert light is not dark
    read = page.value("document.getElementById('report').textContent")
    assert json.loads(read) == report


def test_the_browser_test_sees_faults(page: chromium.Page, tmp_path: Path) -> None:
    """A page that asks for something, is refused it, and is too wide."""
    path = tmp_path / "bad.html"
    path.write_text(
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'\">"
        "<script>alert(1)</script><img src=http://localhost:9/x.png><pre>" + "x" * 400
    )
    page.open(path, width=400)
    assert len(page.complaints()) >= 2
    assert page.value("document.documentElement.scrollWidth") > 400
