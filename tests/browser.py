"""Opens pages in headless Chromium, for tests: a screenshot, and faults that a look would find.

A script appended to a copy of the page looks for text outside the window, overlapping text in
pictures, and characters that no font has; Chromium's log tells of errors on the console.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from html import unescape
from pathlib import Path

import numpy
import pytest

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--enable-logging=stderr", "--log-level=0"),
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium, which is not installed"
)

_LOOK = """
<script>
addEventListener("load", () => {
  const faults = [];
  if (document.documentElement.scrollWidth > innerWidth + 1)
    faults.push("the page is wider than its window: " + document.documentElement.scrollWidth);
  for (const picture of document.querySelectorAll("svg")) {
    const inside = picture.getBoundingClientRect();
    const texts = [...picture.querySelectorAll("text")].map(t => [t, t.getBoundingClientRect()]);
    texts.forEach(([t, a], n) => {
      if (a.left < inside.left - 1 || a.right > inside.right + 1 || a.bottom > inside.bottom + 1)
        faults.push("outside its picture: " + t.textContent);
      for (const [u, b] of texts.slice(n + 1))
        if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 5
            && b.top < a.bottom - 5)
          faults.push("overlap: " + t.textContent + " | " + u.textContent);
    });
  }
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 40;
  const context = canvas.getContext("2d", {willReadFrequently: true});
  const drawn = (c, font) => {
    context.clearRect(0, 0, 40, 40);
    context.font = font;
    context.fillText(c, 8, 28);
    return context.getImageData(0, 0, 40, 40).data.join();
  };
  const font = "20px " + getComputedStyle(document.body).fontFamily;
  const missing = drawn("\\u{10FFFE}", font);
  const title = [...document.querySelectorAll("svg title")].map(t => t.textContent).join("");
  for (const c of new Set(document.body.innerText + title))
    if (c.trim() && drawn(c, font) === missing) faults.push("no font has " + c);
  const result = document.createElement("pre");
  result.id = "faults";
  result.textContent = JSON.stringify(faults);
  document.body.append(result);
});
</script>
"""


@dataclass(frozen=True, slots=True)
class Look:
    """A screenshot as rows of pixels [height,width,3] in 0 to 1, and the faults of the page."""

    pixels: numpy.ndarray
    faults: list[str]

    @property
    def background(self) -> float:
        """The brightness of the corner, 0 to 1."""
        return float(self.pixels[2, 2].mean())

    @property
    def ink(self) -> float:
        """The share of pixels that differ from the background."""
        differs = numpy.abs(self.pixels - self.pixels[2, 2]).max(axis=-1) > 0.1
        return float(differs.mean())


def look(page: Path, width: int = 1050, height: int = 3000, *, dark: bool = False) -> Look:
    """Open a page of HTML or a picture; the screenshot is also written beside it, as .png."""
    from matplotlib.image import imread

    text = page.read_text(encoding="utf-8")
    if page.suffix == ".svg":
        text = f"<!DOCTYPE html><meta charset='utf-8'><body>{text}</body>"
    watched = page.with_name(f"{page.stem}.watched.html")
    end = text.rindex("</body>")
    watched.write_text(text[:end] + _LOOK + text[end:], encoding="utf-8")
    picture = page.with_suffix(".dark.png" if dark else ".png")
    # the numbers of blink's own enumeration: dark is 0, light is 1
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    size = f"--window-size={width},{height}"
    log = _chromium(size, scheme, f"--screenshot={picture}", page.as_uri()).stderr
    done = _chromium(size, scheme, "--dump-dom", watched.as_uri())
    found = re.search(r'<pre id="faults">(.*?)</pre>', done.stdout, re.S)
    assert found is not None, done.stdout[-2000:]
    faults = [str(x) for x in json.loads(unescape(found[1]))]
    consoles = (line for line in (log + done.stderr).splitlines() if "CONSOLE" in line)
    return Look(imread(picture)[..., :3], [*faults, *consoles])


def _chromium(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
