"""Small receipts and tables drawn with Debian's fonts in four languages, read as text, as JSON and as HTML.

A document has three to five lines, so that it is legible in 112 × 112 pixels, which a tiny model sees at once.
"""

import html
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .registries import Package
from .task import READING, Asked, AskedImage, Split, Task, encode_png

DOCUMENTS: Mapping[Split, int] = {"train": 6000, "test": 400}
_SEEDS: Mapping[Split, int] = {"train": 1, "test": 2}
_WIDTH, _MARGIN, _LINE, _TEXT_SIZE = 112, 3, 15, 10
_TEXT, _JSON, _HTML = "Read the text.", "Read it as JSON.", "Read the table as HTML."
_DEJAVU = "usr/share/fonts/truetype/dejavu"
_LATIN = tuple(
    ("latin", f"{_DEJAVU}/{name}.ttf") for name in ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "DejaVuSans-Bold")
)
_CHINESE = (("chinese", "usr/share/fonts/truetype/wqy/wqy-microhei.ttc"),)


@dataclass(frozen=True)
class Language:
    """What documents in a language say.

    Attributes:
        fonts: Fonts, each with the package that has it.
        shops: Names of shops.
        items: Names of things to buy.
        total: The word for the sum.
        columns: Column titles of a table: thing, amount, price.
        price: Function that writes a number of cents.
    """

    fonts: Sequence[tuple[str, str]]
    shops: Sequence[str]
    items: Sequence[str]
    total: str
    columns: tuple[str, str, str]
    price: Callable[[int], str]


def _with_comma(cents: int) -> str:
    return f"{cents // 100},{cents % 100:02d}"


def _with_point(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02d}"


LANGUAGES: Mapping[str, Language] = {
    "en": Language(
        _LATIN,
        ("Corner Shop", "Green Market", "City Bakery"),
        ("Bread", "Milk", "Apples", "Coffee", "Butter", "Rice", "Soap", "Honey"),
        "Total",
        ("Item", "Qty", "Price"),
        _with_point,
    ),
    "de": Language(
        _LATIN,
        ("Bäckerei Süß", "Markthalle", "Hofladen"),
        ("Brot", "Milch", "Äpfel", "Kaffee", "Butter", "Käse", "Öl", "Nüsse"),
        "Summe",
        ("Ware", "Anz.", "Preis"),
        _with_comma,
    ),
    "fr": Language(
        _LATIN,
        ("Épicerie", "Chez Hélène", "Marché Vert"),
        ("Pain", "Lait", "Pommes", "Café", "Beurre", "Pâtes", "Thé", "Crème"),
        "Total",
        ("Article", "Qté", "Prix"),
        _with_comma,
    ),
    "zh": Language(
        _CHINESE,
        ("东方超市", "便利店", "老面包房"),
        ("面包", "牛奶", "苹果", "咖啡", "黄油", "大米", "茶叶", "鸡蛋"),
        "合计",
        ("商品", "数量", "价格"),
        _with_point,
    ),
}


def images(split: Split, packages: Mapping[str, Path]) -> Iterator[AskedImage]:
    """Receipts and tables in turn, in each language; the seed is fixed."""
    chance = random.Random(_SEEDS[split])  # noqa: S311
    for number in range(DOCUMENTS[split]):
        code = list(LANGUAGES)[number % len(LANGUAGES)]
        language = LANGUAGES[code]
        package, file = chance.choice(language.fonts)
        draw = _table if number // len(LANGUAGES) % 2 else _receipt
        yield draw(code, language, _font(packages[package] / file), chance)


def _receipt(code: str, language: Language, font: ImageFont.FreeTypeFont, chance: random.Random) -> AskedImage:
    shop = chance.choice(language.shops)
    prices = {item: chance.randint(20, 1999) for item in chance.sample(language.items, chance.randint(1, 3))}
    total = sum(prices.values())
    lines = [(shop, ""), *((item, language.price(price)) for item, price in prices.items())]
    lines.append((language.total, language.price(total)))
    image = _draw(lines, (0.0, 0.65), font, ruled=False)
    read = {
        "shop": shop,
        "items": [{"name": item, "price": language.price(price)} for item, price in prices.items()],
        "total": language.price(total),
    }
    text = "\n".join(" ".join(filter(None, line)) for line in lines)
    return AskedImage(
        encode_png(image),
        (
            Asked(_TEXT, text, f"receipt, {code}", "cer"),
            Asked(_JSON, json.dumps(read, ensure_ascii=False), f"receipt, {code}", "json_fields"),
        ),
    )


def _table(code: str, language: Language, font: ImageFont.FreeTypeFont, chance: random.Random) -> AskedImage:
    items = chance.sample(language.items, chance.randint(1, 3))
    lines = [
        language.columns,
        *((item, str(chance.randint(1, 20)), language.price(chance.randint(20, 1999))) for item in items),
    ]
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
    return AskedImage(
        encode_png(_draw(lines, (0.0, 0.47, 0.68), font, ruled=True)),
        (
            Asked(_TEXT, "\n".join(" ".join(line) for line in lines), f"table, {code}", "cer"),
            Asked(_HTML, f"<table>{rows}</table>", f"table, {code}", "teds"),
        ),
    )


def _draw(
    lines: Sequence[Sequence[str]], columns: Sequence[float], font: ImageFont.FreeTypeFont, ruled: bool
) -> Image.Image:
    """Draw lines of cells; `columns` are the left edges as shares of the width."""
    image = Image.new("RGB", (_WIDTH, _WIDTH), "white")
    canvas = ImageDraw.Draw(image)
    inner = _WIDTH - 2 * _MARGIN
    for number, line in enumerate(lines):
        top = _MARGIN + number * (_LINE + 2 * ruled)
        for left, cell in zip(columns, line, strict=True):
            canvas.text((_MARGIN + 2 + left * inner, top + 2 * ruled), cell, "black", font)
        if ruled:
            canvas.rectangle((_MARGIN, top, _WIDTH - _MARGIN, top + _LINE + 2), outline="black")
    return image


@cache
def _font(file: Path) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(file), _TEXT_SIZE)


TASK = Task(
    name="documents",
    title="drawn receipts and tables in four languages",
    packages={
        "latin": Package("Debian", "fonts-dejavu-core", "Bitstream-Vera"),
        "chinese": Package("Debian", "fonts-wqy-microhei", "Apache-2.0"),
    },
    images=images,
    inputs={
        **READING,
        "max_slice_nums": 1,
        "evaluation_options": {"max_new_tokens": 128, "batch_size": 64},
    },
    fine=True,
)
