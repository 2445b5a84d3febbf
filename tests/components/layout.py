"""Whether a report can be read in windows of a telephone, a laptop and a large screen."""

from playwright.sync_api import Page

WIDTHS = (400, 1280, 1920)  # pixels

# Text that is broken into many lines, because its column is narrow. Line breaks of the text itself do not count.
_NARROW_TEXTS = """() => {
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.data.trim();
    if (text.length < 5) continue;
    const range = document.createRange();
    range.selectNodeContents(walker.currentNode);
    const tops = [...range.getClientRects()].filter((box) => box.width > 0).map((box) => Math.round(box.top));
    const broken = new Set(tops).size - (text.match(/\\n/g) || []).length;
    if (broken > 3 && range.getBoundingClientRect().width < 110) found.push(text.slice(0, 60));
  }
  return found;
}"""


def layout_faults(page: Page) -> list[str]:
    """What is wrong with the layout of the open page in each of the windows; empty if nothing is."""
    faults = []
    # The first cards stand for all: Chromium takes long to lay out hundreds of them three times.
    page.evaluate("document.querySelectorAll('.card:nth-child(n+20)').forEach((card) => card.remove())")
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 860})
        if (needed := page.evaluate("document.documentElement.scrollWidth")) > width:
            faults.append(f"at {width} pixels the page is {needed} wide")
        faults += [f"at {width} pixels in a narrow column: {text}" for text in page.evaluate(_NARROW_TEXTS)]
    return faults
