"""The page's own script, run by Node.js where there is one: what an environment says is on the page, as text."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import steppo
from callbacks.transcript import as_text

# As much of a document as the page needs. What would read text as markup is not there, or raises.
DOCUMENT = """
class Node {
  constructor(tag) { Object.assign(this, {tag, children: [], dataset: {}, style: {}, own: ""}); }
  append(...nodes) { this.children.push(...nodes); }
  after(text) { this.next = text; }
  set textContent(text) { this.own = String(text); }
  get textContent() { return this.own + this.children.map(node => node.textContent ?? node).join("") + (this.next ?? ""); }
  set innerHTML(text) { throw new Error("markup"); }
}
const nothing = {addEventListener() {}};
globalThis.document = {createElement: tag => new Node(tag), getElementById: () => nothing};
globalThis.addEventListener = () => {};
"""
SHOW = """
const parsed = JSON.parse(require("fs").readFileSync(0, "utf8"));
const page = new Node("article");
if (parsed.observation === undefined) showInfo(page, parsed.info);
else showStep(page, parsed, 4, {value: 1, advantage: 1, reward: 1});
const seen = node => node.children ? [node.tag, node.className ?? "", node.own, node.dataset.number ?? "",
  ...node.children.map(seen)] : node;
console.log(JSON.stringify(seen(page)));
"""


def shown(record: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Elements in their order: tag, class, text, number."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no Node.js")
    page = Path(steppo.__file__).with_name("transcript_page.html").read_text(encoding="utf-8")
    [script] = re.findall("<script>(.*?)</script>", page, re.DOTALL)
    code = DOCUMENT + script.replace('"use strict";', "", 1) + SHOW
    run = subprocess.run([node, "-e", code], input=json.dumps(record), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found: list[tuple[str, str, str, str]] = []

    def walk(element: list[Any]) -> None:
        tag, kind, text, number, *children = element
        found.append((tag, kind, text, str(number)))
        for child in children:
            if isinstance(child, list):
                walk(child)

    walk(json.loads(run.stdout))
    return found


HOSTILE = "</script><img src=x onerror='window.broken = 1'><!-- \u2028"
INFO = {
    "f1": 1 / 3,
    "coins": 1234567.0,
    "tiny": 1.5e-7,
    "zero": 0.0,
    "solved": True,
    "left": False,
    "empty": "",
    "two\nlines": "a\nb",
    HOSTILE: HOSTILE,
    "__proto__": "name",
}
TEXTS = ["0.333333", "1234567", "1.5e-7", "0", "true", "false", "", "a\nb", HOSTILE, "name"]
STEP: dict[str, Any] = {
    "prompt": None,
    "observation": f'{{"hits": ["<b>"]}}\n{HOSTILE}\nHurry up.',
    "text": "<tool_call>",
    "action": 'search({"query": "<i>a\\n"}); fetch({"id": 3})',
    "action_valid": True,
    "reward": 1.0,
    "value": None,
    "advantage": None,
    "ratio": None,
    "clipped": None,
    "finish_reason": "stop",
    "prompt_tokens": 3,
    "action_tokens": 1,
}


def test_what_is_said_stands_at_its_step() -> None:
    found = shown(STEP | {"info": INFO})
    said = [(tag, text) for tag, kind, text, _ in found if tag in ("span", "b")]
    first = said.index(("span", "f1"))
    expected = [pair for name, text in zip(INFO, TEXTS, strict=True) for pair in (("span", name), ("b", text))]
    assert [pair for pair in said[first:] if pair != ("span", "")] == expected
    assert ("pre", "", STEP["observation"], "4") in found
    assert ("b", "", STEP["action"], "") in found


@pytest.mark.parametrize("info", [None, {}])
def test_where_nothing_is_said_nothing_stands(info: dict[str, Any] | None) -> None:
    found = shown(STEP if info is None else STEP | {"info": info})
    assert not [kind for _, kind, _, _ in found if "said" in kind]
    assert ("b", "", STEP["action"], "") in found


def test_an_episode_has_the_last_and_a_step_its_agent() -> None:
    assert [text for tag, _, text, _ in shown({"info": INFO}) if tag == "b"] == TEXTS
    assert shown(STEP | {"agent": HOSTILE})[2][3] == f"{HOSTILE} 4"


def test_texts_of_tensorboard_have_it() -> None:
    headline = {"task": "t", "iteration": 1, "success": None, "return": 1.0, "stop_reason": "terminated", "error": ""}
    steps = [STEP | {"info": {"f1": 1 / 3, "label": "a\n# b", "on": True}}, STEP]
    lines = as_text(headline | {"steps": steps}).splitlines()
    told = [line for line in lines if "f1" in line]
    assert told == ["    f1=0.333333  label=a # b  on=true"], "once: the other step says nothing"
    assert all(line.startswith("    ") for line in lines)
