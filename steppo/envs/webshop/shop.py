"""A visit to the shop: its pages, and what can be clicked on each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from steppo.envs.webshop.catalogue import Catalogue
from steppo.envs.webshop.goods import Goal, Product
from steppo.envs.webshop.reward import same_option

SEARCH, RESULTS, PRODUCT, BOUGHT = "search", "results", "product", "bought"
_ABOUT = ("description", "features", "reviews")
_BACK, _NEXT, _PREVIOUS, _BUY = "back to search", "next >", "< prev", "buy now"
_ON_A_PAGE = 10


class Visit:
    """Where one is in the shop, and what is chosen there.

    Args:
        goods: What is sold.
        find: Rows of products by a query, best first.
        text_chars: Characters that are shown of a title, a description or the features; all if ``None``.

    Attributes:
        page: ``SEARCH``, ``RESULTS``, ``PRODUCT``, one of ``_ABOUT``, or ``BOUGHT``.
        row: The product that is looked at.
        chosen: Its options, value by name.
    """

    def __init__(self, goods: Catalogue, find: Callable[[str], Sequence[int]], text_chars: int | None) -> None:
        self._goods = goods
        self._find = find
        self._text_chars = text_chars
        self._rows: Sequence[int] = ()
        self._to_search()

    @property
    def product(self) -> Product:
        return self._goods.product(self.row)

    # ---- ways ----

    def search(self, query: str) -> None:
        self._rows = self._find(query)
        self._to_results(0)

    def links(self) -> dict[str, Callable[[], None]]:
        """What can be clicked, with what that does. Of two with the same words the last counts, as with the publishers."""
        if self.page in (SEARCH, BOUGHT):
            return {}
        links: dict[str, Callable[[], None]] = {_BACK: self._to_search}
        if self.page == RESULTS:
            if self._number:
                links[_PREVIOUS] = partial(self._to_results, self._number - 1)
            if (self._number + 1) * _ON_A_PAGE < len(self._rows):
                links[_NEXT] = partial(self._to_results, self._number + 1)
            return links | {self._goods.product(row).asin.lower(): partial(self._to_product, row) for row in self._shown()}
        if self.page in _ABOUT:
            return links | {_PREVIOUS: partial(self._to, PRODUCT)}
        links[_PREVIOUS] = partial(self._to_results, self._number)
        links |= {page: partial(self._to, page) for page in _ABOUT} | {_BUY: partial(self._to, BOUGHT)}
        return links | {value: partial(self._choose, name, value) for value, name in self._owners().items()}

    def _owners(self) -> dict[str, str]:
        """The name of the option that a click on a value chooses."""
        return {value: name for name, values in self.product.options.items() for value in values}

    def _shown(self) -> Sequence[int]:
        return self._rows[self._number * _ON_A_PAGE : (self._number + 1) * _ON_A_PAGE]

    def _to(self, page: str) -> None:
        self.page = page

    def _to_search(self) -> None:
        self._rows = ()
        self._to_results(0)
        self.page = SEARCH

    def _to_results(self, number: int) -> None:
        self._number = number
        self.row, self.chosen = -1, dict[str, str]()
        self.page = RESULTS

    def _to_product(self, row: int) -> None:
        self.row = row
        self.page = PRODUCT

    def _choose(self, name: str, value: str) -> None:
        self.chosen[name] = value

    # ---- what is seen ----

    def text(self) -> str:
        """The page without what can be clicked."""
        if self.page == SEARCH:
            return "The shop's search page."
        if self.page == RESULTS:
            found = [self._goods.product(row) for row in self._shown()]
            lines = [f"{product.asin}: {self._cut(product.name)}, {product.price_tag}" for product in found]
            return "\n".join([f"Page {self._number + 1} of the results ({len(self._rows)} in all)", *lines])
        product = self.product
        if self.page == "description":
            return self._cut(product.description) or "No description."
        if self.page == "features":
            return self._cut("\n".join(map(str.strip, product.features))) or "No features."
        if self.page == "reviews":
            return "No reviews."
        if self.page == BOUGHT:
            return "Thank you for shopping with us!"
        lines = [self._cut(product.name), f"Price: {product.price_tag}"]
        for name, values in product.options.items():
            chosen = f" (chosen: {self.chosen[name]})" if name in self.chosen else ""
            lines.append(f"{name}{chosen}: {', '.join(values)}")
        return "\n".join(lines)

    def _cut(self, text: str) -> str:
        short = text[: self._text_chars]
        return short if len(short) == len(text) else f"{short}..."

    # ---- the expert ----

    def advice(self, goal: Goal, row: int, queries: Iterable[str]) -> str | None:
        """What leads to the goal, whose product is in ``row``, from wherever one is: by the first query that finds it."""
        if self.page == SEARCH:
            return next((f"search[{query}]" for query in queries if row in self._find(query)), None)
        if self.page in _ABOUT:
            return f"click[{_PREVIOUS}]"
        if self.page == RESULTS and row in self._rows:
            ahead = list(self._rows).index(row) // _ON_A_PAGE - self._number
            there = goal.product.asin.lower()
            return f"click[{there if ahead == 0 else _NEXT if ahead > 0 else _PREVIOUS}]"
        if self.page == RESULTS or self.row != row:
            return f"click[{_PREVIOUS if row in self._rows else _BACK}]"
        owners = self._owners()
        for name, value in _picks(goal).items():
            if self.chosen.get(name) != value and owners[value] == name:
                return f"click[{value}]"
        return f"click[{_BUY}]"


def _picks(goal: Goal) -> dict[str, str]:
    """The values of its product that meet its options: those that are the same, or else alike."""
    picks: dict[str, str] = {}
    options = sorted(goal.product.options.items())
    for wanted in goal.options:
        left = [(name, value) for name, values in options if name not in picks for value in values]
        picks.update([pair for pair in left if pair[1] == wanted][:1] or [p for p in left if same_option(p[1], wanted)][:1])
    return picks
