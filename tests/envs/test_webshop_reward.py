"""Parts of WebShop's reward, worked out by hand. Whole purchases are in test_webshop.py."""

from __future__ import annotations

import pytest

from steppo.envs.webshop.goods import Product
from steppo.envs.webshop.reward import alike, same_option, type_factor
from tests.webshop_goods import category, product


def named(name: str, query: str = "x", category: str = "garden") -> Product:
    return Product.of(product("B0", name, "$1.00", category, query), {}, None)


@pytest.mark.parametrize(
    ("bought", "wanted", "factor"),
    [
        (named("Cup and Lid"), named("Lid with a Cup"), 1.0),
        (named("Cup", "a"), named("Cup Pan Pot Jar Jug", "b", "fashion"), 0.5),  # a fifth is too little
        (named("Cup Pan", "a"), named("Cup Pan Pot Jar Jug", "b", "fashion"), 1.0),
        (named("Cup", "a"), named("Cup Pan Pot Jar Jug", "a", "fashion"), 1.0),  # the same query
        (named("Cup", "a"), named("Cup Pan Pot Jar Jug", "b"), 1.0),  # the same category
        (named("Cup"), named("Cup Pan Pot Jar Jug Rug Bed Lid Rod Fan Net"), 0.1),  # an eleventh, whatever the query
        (named("Cup for it"), named("Rug for it"), 0.0),
        (named("Cup"), named("4 x 4", "y", "fashion"), 0.5),  # no noun: a fifth
    ],
)
def test_kinds_of_products(bought: Product, wanted: Product, factor: float) -> None:
    assert type_factor(bought, wanted) == factor


def test_two_levels_of_a_category_make_a_kind() -> None:
    def at(levels: str, name: str = "Cup") -> Product:
        record = product("B0", name, "$1.00", "garden", name) | {"product_category": category(levels)}
        return Product.of(record, {}, None)

    wanted = at("A > B > C", "Cup Pan Pot Jar Jug")
    assert type_factor(at("B > X > A"), wanted) == 1.0
    assert type_factor(at("A > A > X"), wanted) == 0.5


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("essential oil", "essential oils", True),  # 26 of 27 letters
        ("Tea-Tree!", "tree tea", True),
        ("black", "black coffee", True),  # all words of one are in the other
        ("black coffee", "black", True),
        ("naïve mug", "nave mug", True),  # other letters than ASCII's do not count
        ("12 oz", "16 oz", False),
        ("xl", "xxl", False),  # 80 points
        ("easy clean", "easy use", False),
        ("", "", False),
    ],
)
def test_what_is_alike(one: str, other: str, same: bool) -> None:
    assert alike(one, other) is same


@pytest.mark.parametrize(
    ("chosen", "wanted", "same"),
    [
        ("moss green", "bottle green", True),  # both green
        ("dark red", "dark blue", False),  # blue stands before dark
        ("dark red", "dark plum", True),  # both dark
        ("slate", "ash slate", False),
        ("10 inch", "12 inch", True),  # 12 of 14 letters
    ],
)
def test_colours_stand_for_options(chosen: str, wanted: str, same: bool) -> None:
    assert same_option(chosen, wanted) is same
