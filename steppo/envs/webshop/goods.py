"""Products and goals, as read from the publishers' records."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

_NO_PRICE = 100.0  # of a product without one, as the publishers have it
_NO_LIMIT = 1_000_000.0
_LIMITS = [10.0 * tens for tens in range(1, 100)]
_NO_DIGIT = re.compile(r"[^\d.]")


@dataclass(frozen=True)
class Product:
    """One product, with what is asked for by instructions that it fulfils.

    Attributes:
        options: Values by the option's name, in lower case.
        price: In dollars; of a range one price in it, which follows from the asin.
        price_tag: What is shown.
        attributes: What the reward takes for the product's own.
        wishes: Instruction, attributes and options of each. Without options (``None``) it stands for all combinations.
    """

    asin: str
    name: str
    description: str
    features: list[str]
    options: dict[str, list[str]]
    price: float
    price_tag: str
    category: str
    query: str
    product_category: str
    attributes: list[str]
    wishes: list[tuple[str, list[str], list[str] | None]]

    @classmethod
    def of(cls, record: Mapping[str, Any], about: Mapping[str, Any], human: Sequence[Mapping[str, Any]] | None) -> Product:
        """Of an entry of ``items_shuffle``, one of ``items_ins_v2`` and, for their goals, some of ``items_human_ins``.

        Raises whatever a record that is not as it should be leads to.
        """
        features = record["small_description"]
        options = {
            name.lower(): [each["value"].strip().replace("/", " | ").lower() for each in values]
            for name, values in (record["customization_options"] or {}).items()
            if values is not None
        }
        price, tag = _price(record["asin"], record.get("pricing"))
        wishes: list[tuple[str, list[str], list[str] | None]] = []
        if human is not None:
            wishes = [
                (wish["instruction"].strip("."), list(wish["instruction_attributes"]), list(wish["instruction_options"]))
                for wish in human
                if wish["instruction_attributes"]
            ]
        elif about.get("instruction") and about.get("instruction_attributes"):
            wishes = [(about["instruction"], list(about["instruction_attributes"]), None)]
        return cls(
            asin=record["asin"],
            name=record["name"],
            description=record["full_description"] or "",
            features=[each for each in (features if isinstance(features, list) else [features]) if each],
            options=options,
            price=price,
            price_tag=tag,
            category=record["category"],
            query=record["query"].lower().strip(),
            product_category=record["product_category"],
            attributes=list(about.get("attributes") or []),
            wishes=wishes,
        )

    @classmethod
    def read(cls, text: str) -> Product:
        """What ``written`` gave."""
        return cls(**json.loads(text))

    def written(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @property
    def searched(self) -> str:
        """The text that a search goes through: title, description, first feature, options."""
        options = ", and ".join(f"{name}: {', '.join(values)}" for name, values in self.options.items())
        return " ".join([self.name, self.description, *self.features[:1], options]).lower()

    @property
    def num_goals(self) -> int:
        return sum(1 if options is not None else self._combinations for _, _, options in self.wishes)

    @property
    def _combinations(self) -> int:
        return math.prod(map(len, self.options.values()))

    def goal(self, number: int) -> Goal:
        """Its ``number``-th goal. Of combinations the last option, by name, changes first."""
        text, attributes, options = self.wishes[0 if self.wishes[0][2] is None else number]
        upper = _price_upper(self.asin, self.price, text)
        if options is None:
            chosen: dict[str, str] = {}
            for name in sorted(self.options, reverse=True):
                number, place = divmod(number, len(self.options[name]))
                chosen[name] = self.options[name][place]
            chosen = dict(sorted(chosen.items()))
            options = list(chosen.values())
            if chosen:
                text += " with " + ", and ".join(f"{name}: {value}" for name, value in chosen.items())
        return Goal(self, text, tuple(attributes), tuple(options), upper)


@dataclass(frozen=True)
class Goal:
    """What is wanted.

    Attributes:
        product: One that fulfils it.
        wish: The instruction without the price.
        options: Values.
        price_upper: Most dollars that it may cost.
    """

    product: Product
    wish: str
    attributes: tuple[str, ...]
    options: tuple[str, ...]
    price_upper: float

    @property
    def instruction(self) -> str:
        limit = f", and price lower than {self.price_upper:.2f} dollars" if self.price_upper < _NO_LIMIT else ""
        return self.wish + limit


def _price(asin: str, pricing: str | None) -> tuple[float, str]:
    """The price, and how it is shown. Where the publishers draw anew in each process, ours follows from the product."""
    if not pricing:
        return _NO_PRICE, f"${_NO_PRICE}"
    try:
        prices = [float(_NO_DIGIT.sub("", part)) for part in pricing.split("$")[1:3]]
        low, high = prices[0], prices[-1]
    except (ValueError, IndexError, AttributeError):
        raise ValueError(f"its price {pricing!r} is none in dollars") from None
    if len(prices) == 1:
        return low, f"${low}"
    return random.Random(asin).uniform(low, high), f"${low} to ${high}"


def _price_upper(asin: str, price: float, instruction: str) -> float:
    """The larger of two of the next four multiples of ten dollars, which follow from product and instruction."""
    above = [limit for limit in _LIMITS if limit > price][:4]
    if len(above) < 2:
        return _NO_LIMIT
    return max(random.Random(f"{asin} {price} {instruction}").sample(above, 2))
