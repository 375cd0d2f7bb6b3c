"""The playground in a browser: it computes what torch computes, and each sentence holds for 8 seeds.

Runs where playwright and Chromium are, which LORA_LAB_BROWSER = "required" demands. Screenshots are left in the folder
that LORA_LAB_SCREENSHOTS names. Training is driven by the number of steps, never by time.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from lora_lab.course import playground
from lora_lab.lora import LoRALinear
from tests import lab
from tests.helpers import ROOT

try:
    from playwright.sync_api import sync_playwright
except ImportError:
    sync_playwright = None

REQUIRED = os.environ.get("LORA_LAB_BROWSER") == "required"
missing = [name for name, there in (("playwright", sync_playwright), ("Chromium", lab.CHROMIUM)) if not there]
in_a_browser = pytest.mark.skipif(bool(missing) and not REQUIRED, reason=f"needs {' and '.join(missing)}")
SOURCES = ROOT / "docs" / "playground"
SCENARIOS = re.findall(r"^  (\w+): \{ title", (SOURCES / "scenarios.js").read_text(encoding="utf-8"), re.MULTILINE)
READY = "page.experiment !== null && !document.querySelector('#answer').textContent.includes('learns')"
DONE = "!/^(Let us see|$)/.test(document.querySelector('#answer').textContent)"
# A network that knows the old world, for each world and seed; then an experiment's runs without the page.
HELPERS = """
globalThis.known = new Map();
globalThis.begin = (settings, seed) => {
  const whole = {...START, ...settings}, world = WORLDS[whole.world], key = whole.world + seed;
  const change = Object.keys(world.changes)[0], stain = pixelsOf(START.stain);
  if (!known.has(key))
    for (const network of pretrain(world, world.make({...START, change, stain}), seed)) known.set(key, network);
  return new Experiment(whole, known.get(key), seed);
};
globalThis.numbersOf = network => network.layers.map(({W, b, adapter}) => ({
  W: [...W.values], b: [...b.values], A: adapter && [...adapter.A.values], B: adapter && [...adapter.B.values],
}));
undefined  // else playwright would call the last function
"""


def test_the_page_is_one_file_that_asks_for_nothing():
    page = playground.build()
    assert len(page.encode()) <= 250_000
    assert re.findall(r'(?:src|href)="(?!data:)[^"]*"|https?://|@import|fetch\(|import\(', page) == []
    assert page.count("<script>") == page.count("</script>") == 7
    assert "CC BY 4.0" in page


def test_the_command_writes_it(tmp_path):
    target = tmp_path / "new" / "page.html"
    command = [sys.executable, "-m", "lora_lab", "playground", str(target), "--write"]
    subprocess.run(command, check=True, capture_output=True)
    assert target.read_text(encoding="utf-8") == playground.build()
    subprocess.run(command, check=True, capture_output=True)  # its own page it may replace
    target.write_text("mine", encoding="utf-8")
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 1
    assert str(target) in refused.stderr
    assert target.read_text(encoding="utf-8") == "mine"


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=lab.CHROMIUM, args=lab.FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("playground") / playground.NAME
    path.write_text(playground.build(), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def visit(browser, file):
    """Open the page at an address; a message on the console or a request to anywhere is an error."""
    heard = []

    def go(address="", width=1280, height=900, **options):
        page = browser.new_page(viewport={"width": width, "height": height}, **options)
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on(
            "request", lambda request: heard.append(request.url) if request.url[:5] not in ("file:", "data:") else 0
        )
        page.goto(f"{file.as_uri()}{address}")
        page.wait_for_function(READY)
        page.evaluate(HELPERS)
        return page

    yield go
    assert [message for message in heard if not message.startswith(("file:", "data:"))] == []


@pytest.fixture(scope="module")
def laboratory(visit):
    """One page for all that only computes: its networks learn their old worlds once."""
    return visit()


def look(page, name):
    if folder := os.environ.get("LORA_LAB_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"playground-{name}.png", full_page=True)


# The network


class Twin(torch.nn.Module):
    """The page's network in torch, from its numbers."""

    def __init__(self, layers, sizes, settings, chosen):
        super().__init__()
        self.layers = torch.nn.ModuleList()
        for i, (layer, inputs, outputs) in enumerate(zip(layers, sizes[:-1], sizes[1:], strict=True)):
            plain = torch.nn.Linear(inputs, outputs, dtype=torch.float64)
            plain.weight.data = torch.tensor(layer["W"], dtype=torch.float64).view(outputs, inputs)
            plain.bias.data = torch.tensor(layer["b"], dtype=torch.float64)
            if chosen is not None:
                plain.requires_grad_(False)
                if i in chosen:
                    plain = LoRALinear(plain, settings["rank"], settings["alpha"])
                    plain.lora_A.data = torch.tensor(layer["A"], dtype=torch.float64).view(settings["rank"], inputs)
            self.layers.append(plain)

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x.relu() if i else x)
        return x


def close(ours, theirs):
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), theirs, rtol=0, atol=1e-10)


RUNS = {  # the settings, and the layers with an adapter
    "points, full": ({"rank": 2}, None),
    "points, LoRA on layer 1": ({"rank": 2, "alpha": 8}, [0]),
    "points, LoRA on layers 1 and 3": ({"rank": 4, "alpha": 4, "layers": "13"}, [0, 2]),
    "digits, LoRA": ({"world": "digits", "change": "turned", "rank": 4, "alpha": 8, "layers": "123"}, [0, 1, 2]),
    "digits, full, gradient descent": (
        {"world": "digits", "change": "moved", "optimiser": "gradient descent", "fullRate": 0.1},
        None,
    ),
}


@in_a_browser
@pytest.mark.parametrize("name", RUNS)
def test_losses_updates_and_singular_values_are_torchs(laboratory, name):
    settings, chosen = RUNS[name]
    method, rate = ("full", settings.get("fullRate", 0.01)) if chosen is None else ("lora", 0.01)
    ours = laboratory.evaluate(
        """([settings, method, rate]) => {
          const experiment = begin(settings, 0), network = experiment[method], before = numbersOf(network);
          const batches = [], losses = [];
          for (let i = 0; i < 100; i++) {
            const batch = drawBatch(experiment.training, experiment.draw);
            batches.push([[...batch.x.values], batch.labels]);
            losses.push(network.step(batch, rate, experiment.settings.optimiser));
          }
          const base = experiment.base.layers;
          return {
            before, batches, losses, sizes: experiment.world.sizes, count: network.size(),
            updates: network.layers.map((layer, i) => [...layer.update(base[i]).values]),
            spectra: base.map((_, i) => experiment.singularValues(method, i)),
          };
        }""",
        [settings, method, rate],
    )
    sizes = ours["sizes"]
    twin = Twin(ours["before"], sizes, settings, chosen)
    trained = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    assert ours["count"] == sum(parameter.numel() for parameter in trained)
    start = [layer.weight.detach().clone() for layer in twin.layers]
    kind = torch.optim.SGD if "optimiser" in settings else torch.optim.Adam
    optimiser, losses = kind(trained, lr=rate), []
    for x, labels in ours["batches"]:
        inputs = torch.tensor(x, dtype=torch.float64).view(32, 64)
        loss = F.cross_entropy(twin(inputs), torch.tensor(labels))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    close(ours["losses"], torch.tensor(losses, dtype=torch.float64))
    for i, layer in enumerate(twin.layers):
        update = layer.delta() if isinstance(layer, LoRALinear) else (layer.weight - start[i]).detach()
        close(ours["updates"][i], update.flatten())
        close(ours["spectra"][i], torch.linalg.svdvals(update))


@in_a_browser
def test_at_strength_0_it_is_the_base_bit_for_bit_and_merged_it_computes_the_same(laboratory):
    found = laboratory.evaluate("""() => {
      const experiment = begin({layers: "123", alpha: 8}, 0), {base, lora} = experiment;
      experiment.train(50);
      const x = experiment.data.afterHeldOut.x, out = network => [...network.forward(x).values];
      const at = strength => { lora.dial = strength; return out(lora); };
      const before = out(base), off = at(0), half = at(0.5), halfMerged = out(lora.merged()), on = at(1);
      const apart = (a, b) => Math.max(...a.map((value, i) => Math.abs(value - b[i])));
      return {
        off: off.every((value, i) => Object.is(value, before[i])), half: apart(half, halfMerged),
        merged: experiment.merge(), onAndBase: apart(on, before), onAndHalf: apart(on, half),
      };
    }""")
    assert found["off"]
    assert max(found["merged"], found["half"]) < 1e-9
    assert min(found["onAndBase"], found["onAndHalf"]) > 0.1


# The sentences


@in_a_browser
@pytest.mark.parametrize("name", SCENARIOS)
def test_each_sentence_holds_for_eight_seeds(laboratory, name):
    acts = laboratory.evaluate(
        """name => SCENARIOS[name].acts.map((act, k) => [...Array(8).keys()].map(seed => {
          globalThis.running ??= {};
          if (!act.goesOn) {
            running[seed] = begin(act.settings, seed);
            running[seed].train(act.steps ?? LENGTH);
          }
          if ("dial" in act) running[seed].turn(act.dial, !act.goesOn);
          const experiment = running[seed], measured = experiment.measure(), bars = barsOf(experiment, act.bars ?? 0);
          return [act.holds(measured, bars), act.shows(measured, bars)];
        }))""",
        name,
    )
    failures = [text for of_seeds in acts for holds, text in of_seeds if not holds]
    assert failures == []
    assert all("NaN" not in text and "undefined" not in text for of_seeds in acts for _, text in of_seeds)


@in_a_browser
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_person_predicts_and_sees_by_keyboard(visit, name):
    page = visit(f"#scenario={name}")
    for act in range(page.evaluate("name => SCENARIOS[name].acts.length", name)):
        page.wait_for_function(READY)
        assert page.locator("#train").is_disabled()  # first the prediction
        page.locator("#options button").first.focus()
        page.keyboard.press("Enter")
        page.wait_for_function(DONE, timeout=120_000)
        said = page.locator("#answer").inner_text()
        assert re.match(r"(✓ As you said|✗ Not so): ", said), said
        assert page.locator("#options .right").count() == 1
        look(page, f"{name}-{act + 1}")
        if page.locator("#next").is_visible():
            page.locator("#next").focus()
            page.keyboard.press("Enter")
    assert name == SCENARIOS[-1] or page.evaluate("page.scenario") == SCENARIOS[SCENARIOS.index(name) + 1]


# The page


@in_a_browser
def test_a_setting_is_in_the_address_and_comes_back(visit):
    page = visit("#world=digits&change=stained&stain=00000000000000ff&rank=4&alpha=8&layers=13&loraRate=0.03")
    settings = page.evaluate("page.settings")
    expected = {"world": "digits", "change": "stained", "stain": "00000000000000ff", "rank": 4, "alpha": 8}
    assert expected.items() <= settings.items()
    assert (settings["layers"], settings["loraRate"], settings["optimiser"]) == ("13", 0.03, "Adam")
    assert visit(page.evaluate("location.hash")).evaluate("page.settings") == settings
    assert visit("#scenario=rank&act=3").evaluate("[page.scenario, page.act]") == ["rank", 2]


STRANGE = ["#rank=0", "#rank=1e9&layers=9", "#world=toString", "#change=constructor", "#stain=zz", "#amount=-5"]
STRANGE += ["#amount=x", "#scenario=few&act=2", "#scenario=__proto__", "#scenario=few&act=-3", "#loraRate=NaN", "#%"]


@in_a_browser
@pytest.mark.parametrize("address", STRANGE)
def test_an_address_with_other_values_leaves_them_out(visit, address):
    assert visit(address).evaluate("page.settings") == visit().evaluate("START")


ADDRESSES = [
    address
    for lesson in sorted((ROOT / "notebooks").glob("*.ipynb"))
    for address in re.findall(r"\(playground\.html(#[^)]+)\)", lesson.read_text(encoding="utf-8"))
]


@in_a_browser
def test_every_address_in_a_lesson_is_taken_as_it_is_written(visit):
    assert len(ADDRESSES) >= 7
    for address in ADDRESSES:
        assert visit(address).evaluate("decodeURIComponent(location.hash)") == address


@in_a_browser
@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 900), (1920, 1080)])
def test_nothing_is_wider_than_the_screen_and_the_dial_is_beside_its_picture(visit, width, height):
    page = visit(width=width, height=height)
    page.evaluate("document.querySelector('#settings').open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    picture, dial = (page.locator(name).bounding_box() for name in ("#lora canvas", "#dial"))
    assert picture["y"] <= dial["y"] <= picture["y"] + picture["height"]
    assert dial["x"] >= picture["x"] + picture["width"]
    look(page, f"{width}")


@in_a_browser
def test_every_control_has_a_name_and_is_reached_by_tab(visit):
    page = visit("#world=digits&change=stained")
    page.evaluate("document.querySelector('#settings').open = true")
    for control in page.locator("button:visible, input:visible, select:visible, canvas:visible").all():
        named = control.evaluate("""each => each.textContent.trim() || each.ariaLabel
          || (each.labels && [...each.labels].map(label => label.textContent.trim()).join(''))""")
        assert named, control.evaluate("each => each.outerHTML")
    wanted = (
        "[...document.querySelectorAll('button, input, select, summary, #pad')].filter(each => each.checkVisibility())"
    )
    seen = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.add(page.evaluate(f"{wanted}.indexOf(document.activeElement)"))
    assert set(range(page.evaluate(f"{wanted}.length"))) <= seen


@in_a_browser
def test_a_stain_is_drawn_by_keyboard_and_by_pointer(visit):
    page = visit("#world=digits&change=stained&stain=0000000000000000")
    page.locator("#pad").focus()
    for key in ("ArrowRight", "ArrowDown", " "):
        page.keyboard.press(key)
    page.wait_for_function(READY)
    assert page.evaluate("page.settings.stain") == "0040000000000000"
    box = page.locator("#pad").bounding_box()
    page.mouse.move(box["x"] + 5, box["y"] + 5)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 5, box["y"] + 5, steps=20)
    page.mouse.up()
    page.wait_for_function(READY)
    assert page.evaluate("page.settings.stain") == "ff40000000000000"
    page.click("#wipe")
    assert page.evaluate("page.settings.stain") == "0" * 16


@in_a_browser
def test_adapters_are_kept_on_one_base_and_switched(visit):
    page = visit("#change=mirrored&rank=1&alpha=1")
    for change in ("mirrored", "turned"):
        page.evaluate("document.querySelector('#settings').open = true")
        page.select_option("#change", change)
        page.wait_for_function(READY)
        page.evaluate("page.experiment.train(200)")
        page.click("#keep")
    assert page.locator("#shelf button").count() == 2
    page.click("#shelf button >> nth=0")
    page.wait_for_function("document.querySelector('#note').textContent.includes('The old numbers stay')")
    assert page.evaluate("[page.settings.change, page.experiment.measure().lora.right > 0.9]") == ["mirrored", True]
    kept = page.evaluate("[...page.kept[0].adapters[0].B.values]")
    before, after = page.evaluate("""() => {
      const first = barsOf(page.experiment, 0).lora[0];
      page.experiment.train(20);
      return [first, barsOf(page.experiment, 0).lora[0]];
    }""")
    assert before != after  # it was trained further, and the bars follow
    assert page.evaluate("[...page.kept[0].adapters[0].B.values]") == kept


@in_a_browser
def test_who_chooses_while_the_network_still_learns_gets_one_that_has_learned(visit):
    page = visit()
    page.reload()
    page.click("#scenarios button >> nth=1")
    page.click("#scenarios button >> nth=2")
    page.wait_for_function(READY)
    assert page.evaluate("[page.scenario, page.experiment.settings.rank]") == ["rank", 1]
    assert page.evaluate("page.experiment.measure().before.old") > 0.95


@in_a_browser
def test_a_run_that_was_paused_goes_on_to_its_answer_and_another_choice_ends_it(visit):
    page = visit("#scenario=stain")
    page.click("#options button >> nth=0")
    page.wait_for_function("page.experiment.full.steps > 10")
    page.click("#train")
    assert page.locator("#answer").inner_text() == "Paused."
    page.click("#train")
    page.wait_for_function("!document.querySelector('#next').hidden", timeout=120_000)
    assert page.evaluate("page.experiment.full.steps") == 200
    page.click("#scenarios button >> nth=1")
    page.wait_for_function(READY)
    page.click("#options button >> nth=0")
    page.wait_for_function("page.experiment.lora.layers[0].dial < 0.95", timeout=120_000)  # the dial is turned down
    page.click("#scenarios button >> nth=2")
    page.wait_for_function("page.experiment.settings.rank === 1")
    page.wait_for_timeout(500)
    assert page.evaluate("[page.experiment.full.steps, page.experiment.lora.layers[0].dial]") == [0, 1]
    assert page.locator("#answer").inner_text() == ""


@in_a_browser
def test_with_reduced_motion_it_jumps(visit):
    page = visit("#scenario=dial", reduced_motion="reduce")
    page.click("#options button >> nth=2")
    page.wait_for_function(DONE, timeout=60_000)
    assert page.evaluate("[page.experiment.full.steps, page.experiment.lora.layers[0].dial]") == [400, 0.5]
