"""Make the pictures of docs/serving.md, of a page that runs over a real model:

fathom serve runs/demo &  fathom client &
python tests/client/pictures.py http://127.0.0.1:7860 docs
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from chromium import browser, opened
from PIL import Image
from playwright.sync_api import Browser, Page, expect

PROMPT = "The state of the Union"
QUESTION = "What is the state of the Union?"


def save(page: Page, path: Path, top: float, height: float) -> None:
    """A part of the page, as wide as it is. A palette holds the page's colours, at a third of the bytes."""
    shot = page.screenshot(full_page=True, clip={"x": 0, "y": top, "width": 1280, "height": height})
    picture = Image.open(io.BytesIO(shot)).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE)
    picture.save(path, optimize=True)
    print(f"{path}: {picture.width} x {picture.height}, {path.stat().st_size:,} bytes")


def bottom(page: Page, selector: str, margin: float = 28) -> float:
    """Where an element ends, from the top of the page."""
    box = page.locator(selector).first.bounding_box()
    assert box is not None, selector
    return box["y"] + box["height"] + margin + float(page.evaluate("window.scrollY"))


def completed(launched: Browser, url: str, scheme: str) -> Page:
    """The page after a completion with a seed, so that the picture can be made again."""
    page, _ = opened(launched, url, color_scheme=scheme, device_scale_factor=1.5)
    page.get_by_label("Prompt").fill(PROMPT)
    page.get_by_label("Seed").fill("7")
    page.get_by_label("number input for Max length").fill("72")
    page.get_by_role("button", name="Continue the text").click()
    expect(page.locator(".fx-facts").first).to_contain_text("seed 7", timeout=60_000)
    expect(page.get_by_role("button", name="Continue the text")).to_be_visible(timeout=60_000)
    expect(page.locator(".fx-maps")).to_be_visible()
    page.wait_for_timeout(500)
    return page


def completion(launched: Browser, url: str, folder: Path) -> None:
    """Prompt, answer, controls and card; below them the experts, with the pointer on a token."""
    page = completed(launched, url, "light")
    cut = bottom(page, ".fx-card")
    page.mouse.move(5, 5)
    save(page, folder / "client-completion.png", 0, cut)
    page.locator(".fx-maps").scroll_into_view_if_needed()
    page.locator(".fx-maps").evaluate("maps => { maps.scrollLeft = 0; }")
    place = page.locator(".fx-map").bounding_box()
    assert place is not None
    page.mouse.move(place["x"] + 15 * 15 + 7, place["y"] + 60)
    expect(page.locator(".fx-tip")).to_be_visible()
    save(page, folder / "client-experts.png", cut - 20, bottom(page, ".fx-maps") - cut + 20)


def chat(launched: Browser, url: str, folder: Path) -> None:
    """A conversation, in the dark."""
    page, _ = opened(launched, url, color_scheme="dark", device_scale_factor=1.5)
    page.get_by_label("Seed").fill("7")
    page.get_by_label("number input for Max length").fill("48")
    page.get_by_role("tab", name="Chat").click()
    page.get_by_label("Your turn").fill(QUESTION)
    page.get_by_label("Your turn").press("Enter")
    expect(page.locator(".fx-facts").last).to_contain_text("seed 7", timeout=60_000)
    expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=60_000)
    page.wait_for_timeout(500)
    save(page, folder / "client-chat.png", 0, bottom(page, ".fx-card"))


if __name__ == "__main__":
    address, target = sys.argv[1].rstrip("/"), Path(sys.argv[2])
    with browser() as found:
        completion(found, address, target)
        chat(found, address, target)
