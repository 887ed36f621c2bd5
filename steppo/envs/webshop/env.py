"""WebShop (Yao et al., 2022): buy what an instruction asks for, in a shop of search and product pages."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import platformdirs

from steppo.envs.base import TextGameEnv
from steppo.envs.search import Bm25, Retriever
from steppo.envs.webshop.catalogue import Catalogue, opened, order_of_goals
from steppo.envs.webshop.reward import worth
from steppo.envs.webshop.shop import BOUGHT, SEARCH, Visit
from steppo.errors import ConfigError, require_at_least
from steppo.paths import user_path
from steppo.types import Task, Turn

_MOST_FOUND = 50  # by a search
_MOST_SEARCHES = 512  # kept in memory
_OPEN = "search[...]"


class WebshopEnv(TextGameEnv):
    """WebShop's shop of real products: search, look, choose options, buy. ``test`` are the first goals, ``valid`` the next.

    The data are the publishers' (MIT licence), from https://github.com/princeton-nlp/WebShop: ``items_shuffle_1000.json``
    and ``items_ins_v2_1000.json``, or the full set. Plain or packed by xz.

    Args:
        data: Folder of the files. Unless given ``$WEBSHOP_DATA``, or else ``~/.cache/webshop``.
        full: All 1.18 million products (``items_shuffle.json``, ``items_ins_v2.json``) instead of 1,000.
        human_goals: Goals that people wrote (``items_human_ins.json``) instead of those made from products.
        max_steps: Steps that the task allows; when they are used up it is over, unsolved. The StepPO paper's are 15.
        success_reward: Paid for a purchase that is right in all that was asked for. The StepPO paper's is 10.
        score_reward: Times a purchase's score, from 0 to 1, is paid beside it. The publishers' reward is 1 here, 0 above.
        num_test: Goals of the split ``test``; the publishers' number.
        num_valid: Goals of ``valid``.
        num_train: Most goals of ``train``; all others unless given.
        offer_query: Also lists a search for the instruction's own words, so that no action needs words of the agent's own.
        text_chars: Characters that are shown of a title, a description or the features; all unless given.
        retriever: Ranks products; unless given BM25 with the publishers' ``k1`` and ``b``.
        cache_dir: Where products and index are kept, in the user's cache folder unless given.
    """

    splits = ("train", "valid", "test")

    def __init__(
        self,
        data: str | None = None,
        full: bool = False,
        human_goals: bool = False,
        max_steps: int = 15,
        success_reward: float = 10.0,
        score_reward: float = 0.0,
        num_test: int = 500,
        num_valid: int = 1000,
        num_train: int | None = None,
        offer_query: bool = False,
        text_chars: int | None = None,
        retriever: Retriever | None = None,
        cache_dir: str | None = None,
    ) -> None:
        require_at_least(1, self, max_steps=max_steps, text_chars=text_chars)
        require_at_least(0, self, num_test=num_test, num_valid=num_valid, num_train=num_train)
        require_at_least(0, self, success_reward=success_reward, score_reward=score_reward)
        self.folder = user_path(data or os.environ.get("WEBSHOP_DATA") or "~/.cache/webshop")
        if not self.folder.is_dir():
            raise ConfigError(
                f"WebshopEnv: there is no folder {self.folder}; get the data, and set data or $WEBSHOP_DATA to its folder "
                "(docs/webshop.md)"
            )
        self.full = full
        self.human_goals = human_goals
        self.max_steps = max_steps
        self.success_reward = success_reward
        self.score_reward = score_reward
        self.num_test = num_test
        self.num_valid = num_valid
        self.num_train = num_train
        self.offer_query = offer_query
        self.text_chars = text_chars
        self.retriever = retriever or Bm25(k1=0.9, b=0.4)
        self._cache = user_path(cache_dir) if cache_dir else Path(platformdirs.user_cache_dir("steppo")) / "webshop"

    # ---- tasks ----

    @property
    def version(self) -> str:  # type: ignore[override]
        """Products by content, whose goals, and what ranks."""
        goods, _ = self._opened()
        kind = "human" if self.human_goals else "synthetic"
        return f"{len(goods)} products {goods.sha256[:12]}, {kind} goals, {type(self.retriever).__name__}"

    def tasks(self, split: str) -> list[Task]:
        if split not in self.splits:
            raise ConfigError(f"WebshopEnv has no split {split!r}; it has {', '.join(self.splits)}")
        goods, _ = self._opened()
        count = goods.num_goals
        first, most = {
            "test": (0, self.num_test),
            "valid": (self.num_test, self.num_valid),
            "train": (self.num_test + self.num_valid, count if self.num_train is None else self.num_train),
        }[split]
        if most and first >= count:
            raise ConfigError(f"WebshopEnv: no goal is left for {split}: there are {count}; see num_test and num_valid")
        kind = "human" if self.human_goals else "goal"
        return [
            Task(f"webshop/{asin}/{kind}-{number}", {"row": row, "number": number})
            for asin, row, number in goods.goals(order_of_goals(count)[first : first + most])
        ]

    def content(self, task: Task) -> str:
        """The goal, and all that is read of its product."""
        goal = self._opened()[0].product(task.data["row"]).goal(task.data["number"])
        limits = f"{goal.instruction}\n{goal.attributes} {goal.options} {goal.price_upper}"
        return f"{limits}\n{goal.product.written()}"

    def prepare(self, tasks: Sequence[Task], progress: Callable[[int, int], None]) -> None:
        goods, folder = self._opened()
        self.retriever.prepare(goods, folder, progress)

    def start(self) -> None:
        self._goods, folder = self._opened()
        self._retriever = copy.copy(self.retriever)
        self._retriever.start(folder)
        self._find = lru_cache(_MOST_SEARCHES)(self._search)

    # ---- episodes ----

    def reset(self, task: Task) -> Turn:
        self._row = task.data["row"]
        self._goal = self._goods.product(self._row).goal(task.data["number"])
        self._query = " ".join(self._goal.wish.lower().split())
        self._visit = Visit(self._goods, self._find, self.text_chars)
        self._steps = 0
        golden = 3 + len(self._goal.options)  # search, product, options, buy: where it is among the first ten
        return self._turn(info={"task_type": self._goal.product.category, "score": 0.0, "golden_steps": golden})

    def command(self, command: str) -> Turn:
        self._steps += 1
        verb, _, words = command.strip().partition("[")
        words = words.removesuffix("]").strip().lower()
        visit = self._visit
        if verb == "search" and words and visit.page == SEARCH:
            visit.search(words)
        elif verb == "click" and words in (links := visit.links()):
            links[words]()
        else:
            return self._turn(action_valid=False, feedback="That is not possible here.")
        if visit.page != BOUGHT:
            return self._turn()
        found = asdict(worth(visit.product, visit.chosen.values(), self._goal))
        score = found.pop("score")
        reward = self.success_reward * (score == 1) + self.score_reward * score
        return self._turn(reward=reward, terminated=True, success=score == 1, info={"score": 100 * score, **found})

    def expert_action(self) -> str | None:
        """Searches for the instruction's words, or for the product's title where these do not find it."""
        return self._visit.advice(self._goal, self._row, (self._query, self._goal.product.name.lower()))

    def _turn(self, **outcome: Any) -> Turn:
        commands = [f"click[{words}]" for words in self._visit.links()]
        if self._visit.page == SEARCH:
            commands = [_OPEN, *([f"search[{self._query}]"] if self.offer_query else [])]
        given = {"success": False, "terminated": self._steps == self.max_steps, **outcome}
        return Turn(self._visit.text(), f"Instruction: {self._goal.instruction}", tuple(commands), **given)

    # ---- data ----

    def _opened(self) -> tuple[Catalogue, Path]:
        return opened(self.folder, self.full, self.human_goals, self._cache)

    def _search(self, query: str) -> list[int]:
        return [row for row, _ in self._retriever.search(query, _MOST_FOUND)]
