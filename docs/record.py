"""Makes terminal.txt and images/report.png anew: python docs/record.py, on a machine that is idle.

Runs the search that terminal.txt shows, in a terminal of tmux. Needs tmux, chromium, chromedriver
and the development tools. The README's excerpt is then copied from terminal.txt by hand.
"""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUN = ROOT / "runs" / "first"
COMMAND = "python -m tune_app.search --out runs/first"
COLUMNS, LINES = 96, 50
WIDTH = 1152  # pixels of the screenshot
SESSION = "tune_app-recording"
HALFWAY = re.compile(r"([6-9]|1\d) of 16")


def tmux(*arguments: str) -> str:
    """What a tmux server of our own answers."""
    command = ["tmux", "-L", SESSION, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def record() -> str:
    """The live display once halfway, and what is on the screen when the search has ended."""
    path = f"export PATH={Path(sys.executable).parent}:$PATH; cd {ROOT}; clear; "
    size = ("-x", str(COLUMNS), "-y", str(LINES))
    tmux("new-session", "-d", "-s", SESSION, *size, f"{path}{COMMAND}; echo ENDED; sleep 60")
    halfway = ""
    try:
        while "ENDED" not in (screen := tmux("capture-pane", "-p", "-S", "-", "-t", SESSION)):
            if not halfway and HALFWAY.search(screen):
                halfway = screen
            time.sleep(0.5)
    finally:
        tmux("kill-server")
    head, table = halfway.strip(), screen.partition("\ntrial  status")[2].partition("ENDED")[0]
    between = "[the display above is replaced by the result when the search ends]"
    text = f"$ {COMMAND}\n{head}\n\n{between}\n\ntrial  status{table.rstrip()}\n"
    # Of this machine: where the run is, and where `ray` is.
    text = re.sub(r"\S+(?=ray\s+get-auth-token)", "", text.replace("\nuth-token", "uth-token"))
    return text.replace(f"{ROOT}/", "")


def screenshot(page: Path, image: Path) -> None:
    """The report in a wide window, from its answer to where the good configs lie."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for flag in ("--headless", "--no-sandbox", "--disable-gpu"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        window = {"width": WIDTH, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", window)
        browser.get(page.as_uri())
        browser.execute_script("document.getElementById('plot-over-lr').scrollIntoView()")
        time.sleep(3)  # plots are drawn as they come near
        browser.execute_script("scrollTo({top: 0, behavior: 'instant'})")
        figure = "document.getElementById('plot-over-lr').parentElement"
        height = browser.execute_script(f"return {figure}.getBoundingClientRect().bottom")
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": height}
        options = {"captureBeyondViewport": True, "clip": {**clip, "scale": 1}}
        png = browser.execute_cdp_cmd("Page.captureScreenshot", options)["data"]
        image.write_bytes(base64.b64decode(png))
    finally:
        browser.quit()


if __name__ == "__main__":
    if RUN.exists():
        sys.exit(f"{RUN} is there already; move it away first")
    (ROOT / "docs" / "terminal.txt").write_text(record())
    screenshot(RUN / "report.html", ROOT / "docs" / "images" / "report.png")
