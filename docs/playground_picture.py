"""The moving picture of the README: the playground learns a turned world, and its dial turns the world back.

python docs/playground_picture.py    # needs the extra browser and Chromium; writes docs/playground.gif
"""

import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from lora_lab.course import playground

TARGET = Path(__file__).with_name("playground.gif")
WIDTH, COLOURS = 720, 64


def shoot(page: Page) -> Image.Image:
    """Return the three networks as they are now."""
    page.evaluate("show()")
    picture = Image.open(io.BytesIO(page.locator(".panels").screenshot())).convert("RGB")
    return picture.resize((WIDTH, round(WIDTH * picture.height / picture.width)), Image.Resampling.LANCZOS)


def main() -> None:
    """Train for 250 steps, then turn the dial down to nothing and up again."""
    frames, times = [], []
    with sync_playwright() as play, tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / playground.NAME
        file.write_text(playground.build(), encoding="utf-8")
        chromium = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1240, "height": 900})
        page.goto(file.as_uri())
        page.wait_for_function("page.experiment")
        page.check("#follow")
        for steps in (0, *[4] * 10, *[10] * 9, *[30] * 4):
            page.evaluate(f"page.experiment.train({steps})")
            frames.append(shoot(page))
            times.append(120)
        times[0] = times[-1] = 1200
        for strength in [*range(95, -1, -5), *range(5, 101, 5)]:
            page.evaluate(f"turnDial({strength / 100})")
            frames.append(shoot(page))
            times.append(1000 if strength in (0, 50, 100) else 110)
        chromium.close()
    start, end = frames[0], frames[30]
    both = Image.new("RGB", (WIDTH, 2 * start.height))
    both.paste(start)
    both.paste(end, (0, start.height))
    palette = both.quantize(COLOURS)
    small = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    small[0].save(TARGET, save_all=True, append_images=small[1:], duration=times, loop=0, optimize=True)
    print(f"{TARGET}: {TARGET.stat().st_size / 1e6:.2f} MB, {len(frames)} frames")


if __name__ == "__main__":
    main()
