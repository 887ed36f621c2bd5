"""What a purchase is worth: the reward of Yao et al. (2022), with a tagger's nouns taken for a title's words."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache

from steppo.envs.webshop.goods import Goal, Product

_ALIKE = 85  # points of 100 that two texts must exceed

_WORD = re.compile(r"[^\W\d_]\w+")
_NO_WORD = re.compile(r"\W")

# An option counts as the alphabetically first of these that it contains. They are the publishers'.
_COLORS = _WORD.findall(
    """alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown burgundy camel
    camo caramel champagne charcoal cheetah chestnut chocolate christmas coffee cognac copper coral cranberry cream
    crystal dark denim eggplant elephant espresso fuchsia gold granite grape graphite grass gray green grey heather
    indigo ivory ivy khaki lavender lemon leopard light lilac lime magenta maroon mauve merlot midnight mint mocha
    multicolor mushroom mustard natural navy nude olive orange peach pewter pink plum purple rainbow red rose royal
    rust sand sapphire seashell silver skull slate steel stone stonewash sunflower tan taupe teal tiger turquoise
    violet walnut wheat white wine yellow"""
)
_NO_NOUNS = _WORD.findall(
    """an the and or but nor for with without of in on at by to from up out off over under into as is are be it its
    you your our his her my this that these those not no all any each more most so than then when where who which
    while can will has have"""
)
_LEVELS = "\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}"  # between those of a category


@dataclass(frozen=True)
class Worth:
    """Of a purchase: each part, and ``score``, from 0 to 1.

    Attributes:
        type: Factor for the kind of product: 1, 0.5, 0.1 or 0.
        attributes: Share of the goal's attributes that the product has.
        options: Share of the goal's options that were chosen; 1 if it has none.
        price: 1 if it is not too dear, else 0.
    """

    score: float
    type: float
    attributes: float
    options: float
    price: float


def worth(product: Product, chosen: Collection[str], goal: Goal) -> Worth:
    """Of buying ``product`` with the chosen options' values."""
    attributes = sum(_has(product, attribute) for attribute in goal.attributes)
    options = sum(any(same_option(value, wanted) for value in chosen) for wanted in goal.options)
    price = product.price <= goal.price_upper
    kind = type_factor(product, goal.product)
    score = kind * (attributes + options + price) / (len(goal.attributes) + len(goal.options) + 1)
    share = options / len(goal.options) if goal.options else 1.0
    return Worth(score, kind, attributes / len(goal.attributes), share, float(price))


def type_factor(bought: Product, wanted: Product) -> float:
    """How far one product is of the other's kind, by query, category and title."""
    nouns = _nouns(wanted.name)
    shared = len(set(nouns) & set(_nouns(bought.name))) / len(nouns) if nouns else 0.2
    if shared == 0:
        return 0.0
    if shared < 0.1:
        return 0.1
    categories = [{part.strip() for part in product.product_category.split(_LEVELS)} for product in (bought, wanted)]
    same = bought.query == wanted.query or len(categories[0] & categories[1]) >= 2 or shared > 0.2
    return 1.0 if same else 0.5


@lru_cache(maxsize=4096)
def _nouns(title: str) -> list[str]:
    """Words of two letters or more but function words: in titles nearly all are nouns to a tagger."""
    return [word for word in _WORD.findall(title.lower()) if word not in _NO_NOUNS]


def _has(product: Product, attribute: str) -> bool:
    """By its attributes, or word for word in its texts."""
    if any(alike(own, attribute) for own in product.attributes):
        return True
    texts = (product.name, " ".join(product.features), product.description)
    return any(attribute in text.lower() for text in texts)


def same_option(chosen: str, wanted: str) -> bool:
    """Of the same colour, or else alike."""
    return alike(_color_or_all(chosen), _color_or_all(wanted))


def _color_or_all(option: str) -> str:
    return next((color for color in _COLORS if color in option), option)


@lru_cache(maxsize=1 << 16)
def alike(one: str, other: str) -> bool:
    """Whether the words of two texts are the same up to a few letters, or those of one are all in the other.

    As thefuzz 0.19's ``token_set_ratio(one, other) > 85``.
    """
    left, right = _tokens(one), _tokens(other)
    if not left or not right:
        return False
    both = left & right
    if both and both in (left, right):
        return True
    shared = " ".join(sorted(both))
    ours = f"{shared} {' '.join(sorted(left - right))}".strip()
    theirs = f"{shared} {' '.join(sorted(right - left))}".strip()
    pairs = [(ours, theirs), *([(shared, ours), (shared, theirs)] if shared else [])]
    return any(_ratio(*pair) > _ALIKE for pair in pairs)


def _ratio(one: str, other: str) -> int:
    """Points of 100."""
    match = SequenceMatcher(None, one, other)
    if round(100 * match.real_quick_ratio()) <= _ALIKE or round(100 * match.quick_ratio()) <= _ALIKE:
        return 0  # which are never less
    return round(100 * match.ratio())


def _tokens(text: str) -> frozenset[str]:
    plain = text.encode("ascii", "ignore").decode()
    return frozenset(_NO_WORD.sub(" ", plain).lower().split())
