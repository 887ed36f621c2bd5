"""PaperService against a real server on loopback, which misbehaves on demand."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from steppo.envs import PaperSearchEnv
from steppo.envs.paper_search import Paper, PaperService
from steppo.envs.paper_search import service as module
from steppo.errors import ConfigError, RunError
from steppo.types import Action, ToolCall
from tests.cli_helpers import run
from tests.paper_files import BEES, PAPERS, write_data

pytest.importorskip("bm25s", reason="needs the extra search")

_FOUND = {"papers": [{"id": f"{paper}v1", "title": PAPERS[paper], "abstract": None} for paper in BEES]}
_WHOLE = json.dumps(_FOUND).encode()


class Service(ThreadingHTTPServer):
    """Answers what ``behaviour`` says; the last one from then on. ``asked``: paths and bodies."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behaviour: list[str] = ["well"]
        self.asked: list[tuple[str, Any]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are meant to."""


class _Handler(BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body))
        behaviour = self.server.behaviour
        how = behaviour.pop(0) if len(behaviour) > 1 else behaviour[0]
        if "Odd" in body.get("query", ""):
            how = "nonsense"
        if how == "silent":
            time.sleep(1.0)
            return
        text = _TEXTS.get(how, _WHOLE)
        self.send_response(int(how) if how.isdigit() else 200)
        if how == "chunks":
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if how == "chunks":
            self.wfile.write(b"400\r\n" + text)  # less than so many bytes, and no end
        elif how == "slow":
            for start in range(0, len(text), 100):
                self.wfile.write(text[start : start + 100])
                time.sleep(0.15)
        else:
            self.wfile.write(text[: len(text) // 2] if how == "half" else text)

    def log_message(self, *args: Any) -> None:
        pass


_TEXTS = {
    "nonsense": b"<html>Welcome!</html>",
    "bytes": b"\xff\xfe\x00",
    "cut": _WHOLE[:-40],
    "list": b"[]",
    "no list": b'{"papers": {"id": "1"}}',
    "no title": b'{"papers": [{"id": "1", "title": " "}]}',
    "number": b'{"papers": [{"id": 1, "title": "x"}]}',
    "surrogate": b'{"papers": [{"id": "1", "title": "\\ud800"}]}',
    "deep": b"[" * 100_000,
    "empty": b'{"papers": []}',
    "lines": b'{"papers": [{"id": "1\\n2", "title": " A\\ntitle", "abstract": "of\\nlines"}]}',
    "long": b"x" * 5000,
}
_IMPATIENT: dict[str, dict[str, float]] = {how: {"timeout": 0.3} for how in ("silent", "slow")}


@pytest.fixture
def server() -> Iterator[Service]:
    with Service() as service:
        thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield service
        service.shutdown()
        thread.join()


@pytest.fixture
def papers(server: Service, tmp_path: Path) -> PaperService:
    return opened(server.url, tmp_path)


def opened(url: str, folder: Path, **settings: Any) -> PaperService:
    return PaperService(url, **{"backoff": 0.01, "cache_dir": str(folder / "cache"), **settings})


def no_progress(done: int, total: int) -> None:
    pass


def test_the_protocol(server: Service, papers: PaperService) -> None:
    assert papers.search("bees", 2) == [Paper(paper, PAPERS[paper]) for paper in BEES[:2]], "no more than were asked for"
    assert len(papers.expand(BEES[0])) == 5
    assert server.asked == [("/search", {"query": "bees", "limit": 2}), ("/expand", {"id": BEES[0]})]
    server.behaviour = ["empty", "lines"]
    assert papers.search("stones", 2) == []
    assert papers.search("lines", 2) == [Paper("1 2", "A title", "of lines")]


@pytest.mark.parametrize("how", ["500", "503", "429", "silent", "slow", "half", "chunks", "cut", "nonsense"])
def test_what_may_pass_is_tried_again(server: Service, tmp_path: Path, how: str) -> None:
    papers = opened(server.url, tmp_path, **_IMPATIENT.get(how, {}))
    server.behaviour = [how, how, "well"]
    assert len(papers.search("bees", 10)) == 5
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("500", "failed, 3 times: it answers status 500"),
        ("302", "failed, 3 times: it answers status 302"),
        ("404", "failed: it answers status 404"),
        ("silent", "failed, 3 times: TimeoutError: timed out"),
        ("slow", "failed, 3 times: its answer takes longer than 0.3 s"),
        ("half", "failed, 3 times: its answer is not of the right form"),
        ("chunks", "failed, 3 times: IncompleteRead"),
        ("cut", "its answer is not of the right form: "),
        ("nonsense", "its answer is not of the right form: Expecting value"),
        ("bytes", "its answer is not of the right form: "),
        ("list", 'its answer is not of the right form: there is no list "papers"'),
        ("no list", 'there is no list "papers"'),
        ("no title", "a paper has no id or no title"),
        ("number", "of a paper, id must be a string, not 1"),
        ("surrogate", "title must be text that UTF-8 can hold"),
        ("deep", "it is nested too deeply"),
    ],
)
def test_what_does_not_pass_is_said_on_one_line(server: Service, tmp_path: Path, how: str, message: str) -> None:
    papers = opened(server.url, tmp_path, **_IMPATIENT.get(how, {}))
    server.behaviour = [how]
    with pytest.raises(RunError) as error:
        papers.search("bees", 10)
    assert f"PaperService: {server.url}/search failed" in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(server.asked) == (1 if how == "404" else 3)
    server.behaviour = ["empty"]
    assert papers.search("bees", 10) == [], "nothing of it is kept"


def test_an_answer_that_is_too_long(server: Service, papers: PaperService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LARGEST", 1000)
    server.behaviour = ["long"]
    with pytest.raises(RunError, match="failed: its answer is longer than 1,000 bytes"):
        papers.search("bees", 10)


def test_answers_are_kept(server: Service, papers: PaperService, tmp_path: Path) -> None:
    first = papers.search("bees", 10)
    [kept] = (tmp_path / "cache").rglob("*.json.z")
    server.behaviour = ["500"]
    assert opened(server.url + "/", tmp_path).search("bees", 10) == first
    assert len(server.asked) == 1
    for url, settings in ((server.url, {"version": "2"}), (server.url + "/v2", {})):
        with pytest.raises(RunError):
            opened(url, tmp_path, **settings).search("bees", 10)
    with pytest.raises(RunError):
        papers.search("bees", 9)
    server.behaviour = ["well"]
    for damage in (b"", kept.read_bytes()[:-5], b"x" + kept.read_bytes()):
        kept.write_bytes(damage)
        asked = len(server.asked)
        assert papers.search("bees", 10) == first
        assert len(server.asked) == asked + 1, "one that is damaged is asked for again"
    assert [path.suffix for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [".z"]


def test_no_room_for_answers(server: Service, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    papers = opened(server.url, tmp_path)
    assert papers.search("bees", 10) == papers.search("bees", 10)
    assert len(server.asked) == 2


def test_waits_grow(server: Service, papers: PaperService, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    server.behaviour = ["500"]
    papers.retries = 4
    with pytest.raises(RunError):
        papers.search("bees", 1)
    assert [wait for wait in waits if wait] == [0.01, 0.02, 0.04, 0.08]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "localhost:8000"}, "url must be such as http://127.0.0.1:8000"),
        ({"url": "http://"}, "url must be"),
        ({"url": "http://[::1"}, "url must be"),
        ({"url": "http://here:port"}, "url must be"),
        ({"timeout": 0.0}, "timeout must be above 0 seconds"),
        ({"retries": -1}, "retries must be at least 0"),
        ({"backoff": float("inf")}, "backoff must be at least 0 and finite"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"PaperService: {message}"):
        PaperService(**{"url": "http://127.0.0.1", **settings})


# ---- in an environment ----


def test_a_service_that_is_down_is_one_line_at_the_start(tmp_path: Path, server: Service) -> None:
    server.server_close()
    env = PaperSearchEnv(str(write_data(tmp_path)), PaperService(server.url, backoff=0.01, cache_dir=str(tmp_path / "c")))
    with pytest.raises(RunError, match=r"search failed, 3 times: ConnectionRefusedError: "):
        env.prepare(env.tasks("train"), no_progress)


def test_a_service_that_was_asked_before_need_not_be_there(tmp_path: Path, server: Service) -> None:
    env = PaperSearchEnv(str(write_data(tmp_path)), PaperService(server.url, cache_dir=str(tmp_path / "c")))
    query = Action(tool_calls=(ToolCall("search", {"query": "bees"}, "call_0"),))
    turns = []
    for _ in range(2):
        env.prepare([], no_progress)
        env.start()
        env.reset(env.tasks("train")[0])
        turns.append(env.step(query))
        server.shutdown()
        server.server_close()
    assert turns[0] == turns[1]
    assert [tool.name for tool in env.tools] == ["search", "expand"]


def options(folder: Path, url: str) -> list[str]:
    papers = [f"url={url}", "backoff=0.01", f"cache_dir={folder}/cache"]
    env = [f"data={folder}", "papers=PaperService", *(f"papers.{setting}" for setting in papers)]
    return ["--data.source.env=PaperSearchEnv", *(f"--data.source.env.{setting}" for setting in env)]


def test_a_failing_answer_costs_one_episode(tmp_path: Path, server: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """The service answers nonsense to one of two questions; then it is gone, and the run says so."""
    folder = write_data(tmp_path)
    path = folder / "AutoScholarQuery/dev.jsonl"
    path.write_text(path.read_text().replace("Automatic Keepers", "Odd Keepers"))
    run(tmp_path / "run", *options(folder, server.url), "--evaluation.player=expert", command="validate")
    result = json.loads((tmp_path / "run/validate.json").read_text())
    [failed] = [episode for episode in result["episodes"] if episode["stop_reason"] == "env_error"]
    assert failed["task"] == "paper_search/AutoScholarQuery_dev_0"
    assert f"PaperService: {server.url}/search failed, 3 times: its answer is not of the right form" in failed["error"]
    assert (result["figures"]["errors"], result["figures"]["episodes"]) == (1, 1)

    server.shutdown()
    server.server_close()
    capsys.readouterr()
    new = f"--data.source.env.papers.cache_dir={folder}/new"
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "down", *options(folder, server.url), new, "--evaluation.player=expert", command="validate")
    assert stopped.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"PaperService: {server.url}/search failed, 3 times: ConnectionRefusedError" in line
