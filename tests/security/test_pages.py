"""A prompt with markup stays a text: in the report, in the cards, and in a browser that would run it."""

from __future__ import annotations

import json
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from stages.core.export.cards import dataset_card, model_card
from stages.core.export.markdown import Code, plain, read_front_matter, table
from stages.core.export.preferences import Counts
from stages.core.report.advice import Advice, JudgeTrend
from stages.core.report.figures import Series, series_panel
from stages.core.report.looks import Look, Shown
from stages.core.report.page import PICTURES, render
from stages.core.report.run_facts import Fact
from stages.core.report.thumbnails import thumbnail
from tests.browsers import CHROMIUM
from tests.builders import CAPTIONS, encoded, picture
from tests.security.hostile import MARKDOWN, PAGE, PROMPTS, PWNED

ELEMENTS = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "header",
    "h1",
    "h2",
    "h3",
    "h4",
    "p",
    "nav",
    "ul",
    "li",
    "a",
    "main",
    "section",
    "strong",
    "span",
    "div",
    "figure",
    "figcaption",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "abbr",
    "sub",
    "code",
    "details",
    "summary",
    "pre",
    "img",
    "dl",
    "dt",
    "dd",
    "footer",
    "svg",
    "g",
    "path",
    "defs",
    "clippath",
    "rect",
    "use",
    "text",
    "tspan",
    "label",
    "input",
}
"""What our pages consist of; a script is none of it."""


class Page(HTMLParser):
    """A page as a browser reads it: elements, attributes, and the texts of elements and attributes."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._open.append(tag)
        self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.texts.append("")

    def handle_data(self, data: str) -> None:
        if self.texts:
            self.texts[-1] += data

    def check(self) -> None:
        """Nothing on the page runs, loads or leads elsewhere."""
        assert self.elements <= ELEMENTS, self.elements - ELEMENTS
        for tag, name, value in self.attributes:
            assert not name.startswith("on"), (tag, name, value)
            if name in ("src", "href", "xlink:href", "action", "data", "srcdoc", "formaction"):
                assert value.startswith(
                    ("data:image/png;base64,", "data:image/jpeg;base64,", "#")
                ), value
        policy = [
            value for tag, name, value in self.attributes if tag == "meta" and name == "content"
        ]
        assert any("default-src 'none'" in value and "script-src" not in value for value in policy)


def shown(text: str) -> str:
    """How a page shows a text: what it cannot hold as a picture of it."""
    return text.translate(PICTURES)


def report_context(texts: list[str]) -> dict[str, Any]:
    """What the report's template is given, with these texts wherever one of a prompt, name, path or
    config goes."""
    image = thumbnail(encoded(picture(CAPTIONS[0])), "a test")
    text = texts[0]

    def look(prompt: str) -> Look:
        return Look(
            prompt=prompt,
            pictures=[Shown(label=name, image=image, note=text) for name in ("winner", "loser")],
            notes=[text],
            mark=text,
            name=text,
        )

    figure = {
        "title": text,
        "caption": text,
        "svg": series_panel(Series(name=text, labels=["base", "iter00"], values=[0.0, 1.0])),
    }
    delta = {"direction": "higher", "difference": text, "low": text, "high": text}
    row = {
        "policy": text,
        "mean": text,
        "base": delta,
        "previous": delta,
        "wins": {"share": text, "interval": text},
        "effect_size": text,
        "p": text,
    }
    verdict = {"direction": "higher", "sentence": text}
    return {
        "run": text,
        "primary_set": text,
        "primary_metric": text,
        "facts": [Fact(name=text, value=text), Fact(name=text, value=text, is_of_time=True)],
        "advice": Advice(policy=text, reason=text),
        "curve": figure,
        "judge_curve": figure,
        "judge_trend": JudgeTrend(direction="lower", label=text, sentence=text),
        "headline": {"overall": verdict, "steps": [verdict], "sentences": [text, text]},
        "warnings": [text],
        "metric_groups": [
            {
                "prompt_set": text,
                "curves": [figure],
                "metrics": [
                    {"metric": text, "meaning": text, "num_prompts": text, "policies": [row]}
                ],
            }
        ]
        * 2,
        "others": [
            {
                "prompt_set": text,
                "metric": text,
                "policy": text,
                "other": text,
                "difference": delta,
                "wins": None,
                "p": text,
            }
        ],
        "breakdown": [
            {
                "prompt_set": text,
                "axis": text,
                "metric": text,
                "policy": text,
                "rows": [
                    dict.fromkeys(
                        (
                            "group",
                            "num_prompts",
                            "base",
                            "last",
                            "difference",
                            "interval",
                            "win_rate",
                        ),
                        text,
                    )
                ],
            }
        ],
        "paper_tables": [
            {"table": 1, "columns": [text], "rows": [{"name": text, "cells": [text]}]}
        ],
        "guard_iterations": [(0, text)],
        "guards": [
            {
                "title": text,
                "unit": text,
                "meaning": text,
                "svg": figure["svg"],
                "line": {"text": text, "label": text},
                "cells": [{"text": text, "note": text, "turned": True}],
            }
        ],
        "reliability_panels": [figure],
        "judge_panels": [figure],
        "training_panels": [figure],
        "leakage": [
            {
                "prompt_set": text,
                "source": text,
                "num_shared": 1,
                "num_prompts": 2,
                "is_shared": True,
                "examples": texts,
            }
        ],
        "strip": [look(t) for t in texts],
        "more_prompts": [look(t) for t in texts],
        "shown_policy": text,
        "gained": [look(t) for t in texts],
        "lost": [look(t) for t in texts],
        "human": [look(t) for t in texts],
        "wrong": {
            "policy": text,
            "num_wrong": 1,
            "num_pairs": 2,
            "looks": [look(t) for t in texts],
        },
        "iteration_pairs": [
            {
                "iteration": 1,
                "num_pairs": len(texts),
                "sentence": text,
                "histogram": figure,
                "looks": [look(t) for t in texts],
            }
        ],
        "gates": {"on_collapse": text, "is_stopped": True, "sentences": texts, "last_good": text},
        "import_sentences": [text],
        "files": [{"path": Path("x") / "y", "holds": text, "stage": text, "code": text}],
        "commands": text,
        "config": json.dumps({"run": texts}),
        "code": text,
    }


def report(texts: list[str]) -> str:
    """The report's page with these texts."""
    return render(report_context(texts))


@pytest.mark.parametrize("text", [*PAGE, PROMPTS[0]])
def test_a_text_is_only_a_text_wherever_it_stands_in_the_report(text: str) -> None:
    source = report([text])
    page = Page(source)
    page.check()
    alone = [found.strip() for found in page.texts]
    assert alone.count(text) > 20
    assert ("img", "alt", f"winner: {text}") in page.attributes


def test_every_prompt_is_read_from_the_report_as_it_was_written() -> None:
    page = Page(report(PROMPTS))
    page.check()
    texts = set(page.texts)
    alts = {value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")}
    for prompt in PROMPTS:
        assert shown(prompt) in texts, prompt
        assert f"loser: {shown(prompt)}" in alts
    assert shown("NUL \x00 inside") == "NUL ␀ inside"


def in_chromium(page: Path, tmp_path: Path) -> str:
    """The page's elements after a browser has read it and waited."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=2000",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")
def test_no_payload_runs_in_a_browser_even_without_the_pages_own_policy(tmp_path: Path) -> None:
    source = report([*PAGE, *MARKDOWN])
    bare = re.sub(r"<meta http-equiv=.Content-Security-Policy[^>]*>", "", source)
    assert bare != source
    for name, text in (("page", source), ("bare", bare)):
        (tmp_path / f"{name}.html").write_text(text, encoding="utf-8")
        dom = in_chromium(tmp_path / f"{name}.html", tmp_path)
        title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
        assert title is not None
        assert title[1].startswith("SAIL report: "), title[1]
    (tmp_path / "attack.html").write_text(f"<title>x</title>{PAGE[1]}")  # the payload does work
    assert f"<title>{PWNED}</title>" in in_chromium(tmp_path / "attack.html", tmp_path)


# Cards: Markdown, whose markup a hub renders.

MD = MarkdownIt("commonmark", {"html": True}).enable("table")


def rendered(card: str) -> Page:
    return Page(MD.render(re.sub(r"\A---\n.*?^---\n", "", card, flags=re.DOTALL | re.MULTILINE)))


def hostile_facts(text: str) -> dict[str, Any]:
    return {
        "title": text,
        "file": "mine.safetensors",
        "format": "single-file",
        "policy": "0" * 16,
        "pipeline": "StableDiffusionPipeline",
        "family": "stable-diffusion",
        "base_model": text,
        "license": {"license": text, "license_name": text, "license_link": text},
        "lineage": [
            {
                "name": text,
                "stage": text,
                "policy": text,
                "human": 1,
                "generated": 1,
                "prompts": 1,
                "steps": 1,
            }
        ],
        "settings": {text: text},
    }


ELEMENTS_OF_CARDS = {
    "h1",
    "h2",
    "p",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "code",
    "em",
    "pre",
    "a",
    "strong",
}


@pytest.mark.parametrize(
    "text", [*PAGE, *MARKDOWN, 'x"); import os; os.system("touch pwned")', "a`b`c"]
)
def test_a_text_is_only_a_text_in_a_model_card(text: str) -> None:
    row = {
        "prompt_set": text,
        "metric": text,
        "mean": 1.0,
        "baseline": text,
        "difference": 0.1,
        "ci_low": 0.0,
        "ci_high": 0.2,
        "win_rate": 0.5,
    }
    for kind in ("single-file", "diffusers", "lora-diffusers", "lora-kohya"):
        card = model_card({**hostile_facts(text), "format": kind}, [row])
        page = rendered(card)
        assert page.elements <= ELEMENTS_OF_CARDS, page.elements - ELEMENTS_OF_CARDS
        assert not [value for _, name, value in page.attributes if name not in ("style",)]
        words = " ".join(text.split())
        assert any(words in found for found in page.texts), words
        plain_card = model_card(hostile_facts("plain"), [row | {"metric": "m"}])
        assert card.count("\n# ") == plain_card.count("\n# ")


@pytest.mark.parametrize("text", [*PAGE, *MARKDOWN, "a: b\nlicense: mine", "'\"{}[]"])
def test_the_head_of_a_card_is_data_whatever_is_in_it(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(model_card(hostile_facts(text), []), encoding="utf-8")
    head = read_front_matter(tmp_path / "README.md")
    assert (head["license"], head["license_name"], head["base_model"]) == (text, text, text)
    assert set(head) == {
        "base_model",
        "base_model_relation",
        "library_name",
        "pipeline_tag",
        "license",
        "license_name",
        "license_link",
        "tags",
    }


@pytest.mark.parametrize("text", [*PAGE, *MARKDOWN])
def test_a_text_is_only_a_text_in_a_dataset_card(text: str) -> None:
    counts = Counts()
    counts.by_origin[text, 1] = 3
    counts.policies[1] = text
    page = rendered(dataset_card("pickapic", counts, [(text, text, {text: text})]))
    assert page.elements <= ELEMENTS_OF_CARDS, page.elements - ELEMENTS_OF_CARDS
    assert not [value for _, name, value in page.attributes if name not in ("style",)]


def test_a_table_keeps_its_cells_by_hand() -> None:
    assert table(["a|b", "c"], [["x\ny", Code("`|`")]]) == (
        "| a\\|b | c |\n| --- | --- |\n| x y | `'\\|'` |\n"
    )
    assert plain("<b> & [x](y) `z` a_b *c*") == "&lt;b&gt; &amp; [x]\\(y) \\`z\\` a_b *c*"
