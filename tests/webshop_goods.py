"""A small shop, invented, in the layout of WebShop's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def category(levels: str) -> str:
    """``Home > Kitchen`` with the publishers' sign."""
    return levels.replace(">", "\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}")


KITCHEN, WEAR = "Home & Kitchen > Kitchen & Dining > Drinkware", "Clothing > Women > Socks"


def product(asin: str, name: str, pricing: str | None, kind: str, query: str, **more: Any) -> dict[str, Any]:
    """One entry of ``items_shuffle``. ``options`` are values by name; other keys as they stand."""
    options = more.pop("options", "")
    if options:
        options = {key: values and [{"value": value, "image": None} for value in values] for key, values in options.items()}
    record = {
        "name": name,
        "full_description": "",
        "images": ["https://example.org/1.jpg"],
        "product_category": category({"garden": KITCHEN, "fashion": WEAR}[kind]),
        "small_description": ["Kind to hands. ", "Made in small numbers. "],
        "customization_options": options,
        "asin": asin,
        "category": kind,
        "query": query,
        "pricing": pricing,
    }
    return record | more


PRODUCTS = [
    product(
        "B0MUG00001",
        "Fernhill Stoneware Coffee Mug with Cork Lid for Home",
        "$14.50",
        "garden",
        " Coffee Mugs",
        options={"Size": ["12 oz", "16 oz"], "Color": ["Moss Green", "Slate/Ash", "Tall Standard"], "Style": None},
        full_description="A mug that keeps tea hot for an hour.",
        small_description=["Lead free glaze. ", "Dishwasher safe. "],
    ),
    product("B0MUG00002", "Quarry Enamel Camping Mug for Home", "$8.00 - $12.00", "garden", "coffee mugs"),
    product(
        "B0MUG00003", "Lark Porcelain Espresso Cup Set for Home", "", "garden", "espresso cups", options={"Color": None}
    ),
    product(
        "B0SOCK0001", "Tarn Wool Hiking Socks for Home", "$1,249.00", "fashion", "socks", options={"Size": ["S/M", "L"]}
    ),
    product("B0SOCK0002", "Brook Cotton Ankle Socks for Home", "$985.00", "fashion", "socks"),
    product(
        "B0PACK0001",
        "Pine Lunch Box for Home",
        "$20.00",
        "garden",
        "lunch boxes",
        options={"count": ["1", "2"], "box": ["1"]},
    ),
    product("B0LAMP0001", "Heron Desk Lamp for Home", "$31.00", "garden", "lamps", small_description="Warm light."),
    product("B0LAMP0002", "Wren Night Lamp for Home", "$19.99", "garden", "lamps", small_description=[]),
    product("B0BOWL0001", "Otter Oak Salad Bowl for Home", "$45.00", "garden", "bowls"),
    product("B0BOWL0002", "Vole Glass Mixing Bowl for Home", "$12.00", "garden", "bowls"),
    product("B0MAT00001", "Badger Jute Door Mat for Home", "$18.00", "garden", "mats"),
    product("B0TRAY0001", "Stoat Bamboo Tray for Home", "$22.00", "garden", "trays"),
    # Left out, as the publishers do.
    product("B0MUG00001", "The same again", "$1.00", "garden", "coffee mugs"),
    product("nan", "No number", "$1.00", "garden", "coffee mugs"),
    product("B0TOOLONG001", "Too long a number", "$1.00", "garden", "coffee mugs"),
]

ABOUT: dict[str, dict[str, Any]] = {
    "B0MUG00001": {
        "attributes": ["lead free", "dishwasher safe", "easy clean"],
        "instruction": "Find me lead free, dishwasher safe coffee mugs",
        "instruction_attributes": ["lead free", "dishwasher safe"],
    },
    "B0MUG00002": {
        "attributes": ["easy clean"],
        "instruction": "Find me easy clean coffee mugs",
        "instruction_attributes": ["easy clean"],
    },
    "B0MUG00003": {"attributes": []},
    "B0SOCK0001": {
        "attributes": ["merino wool", "quick drying"],
        "instruction": "Find me quick drying socks",
        "instruction_attributes": ["quick drying"],
    },
    "B0SOCK0002": {"attributes": ["soft"], "instruction": "Find me soft socks", "instruction_attributes": ["soft"]},
    "B0PACK0001": {
        "attributes": ["bpa free"],
        "instruction": "Find me bpa free boxes",
        "instruction_attributes": ["bpa free"],
    },
    "B0LAMP0001": {"attributes": ["warm light"], "instruction": "Find me a lamp", "instruction_attributes": ["warm light"]},
    "B0BOWL0001": {"attributes": ["solid wood"], "instruction": "xyzzy", "instruction_attributes": ["solid wood"]},
}

HUMAN: dict[str, list[dict[str, Any]]] = {
    "B0MUG00001": [
        {
            "asin": "B0MUG00001",
            "instruction": "i want a small mossy mug without lead.",
            "instruction_attributes": ["lead free"],
            "instruction_options": ["green moss", "12 oz"],
            "worker_id": "w1",
        },
        {"instruction": "a mug", "instruction_attributes": [], "instruction_options": []},
        {"instruction": "i want a mug.", "instruction_attributes": ["easy clean"], "instruction_options": []},
    ],
    "B0LAMP0001": [{"instruction": "a lamp", "instruction_attributes": ["warm light"], "instruction_options": ["blue"]}],
    "B0ELSEWHER": [{"instruction": "no product", "instruction_attributes": ["none"], "instruction_options": []}],
}

# Goals that this makes are enough for the publishers' splits.
PEN = product(
    "B0PEN00001",
    "Shrew Felt Pen",
    "$3.00",
    "garden",
    "pens",
    options={name: [f"{name} {n}" for n in range(12)] for name in ("tip", "ink", "cap")},
)
PEN_ABOUT = {"attributes": ["water proof"], "instruction": "Find me pens", "instruction_attributes": ["water proof"]}


def write_goods(folder: Path, pen: bool = False) -> Path:
    """Writes the 1,000-product files with these few, and the goals of people."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "items_shuffle_1000.json").write_text(json.dumps([*PRODUCTS, *([PEN] if pen else [])]))
    (folder / "items_ins_v2_1000.json").write_text(json.dumps(ABOUT | ({"B0PEN00001": PEN_ABOUT} if pen else {})))
    (folder / "items_human_ins.json").write_text(json.dumps(HUMAN))
    return folder
