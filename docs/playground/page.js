// The page: what is set, what runs, what is shown. The network is in lora.js, the worlds in worlds.js.
"use strict";

const $ = (id) => document.getElementById(id);
const SPEED = 60; // steps a second, where the machine can
const LENGTH = 400; // steps of an experiment, if it does not say
const still = matchMedia("(prefers-reduced-motion: reduce)");
const bytes = (count) => (count * 4 < 1000 ? `${count * 4}\u00a0bytes` : `${((count * 4) / 1000).toFixed(1)}\u00a0kB`);
const share = (part, all) => `${((100 * part) / all).toFixed(part < all / 10 ? 1 : 0)} %`;
const frame = () => new Promise((done) => requestAnimationFrame(done));

const page = { settings: { ...START }, scenario: null, act: 0, experiment: null, answered: null, predicted: null, run: 0, bases: new Map(), kept: [] };
const act = () => page.scenario && SCENARIOS[page.scenario].acts[page.act];

// What runs

// The network that knows the old world; the first time it is seen to learn it.
function baseOf(name) {
  if (!page.bases.has(name)) page.bases.set(name, learn(WORLDS[name])); // the promise, so that nobody gets it half-trained
  return page.bases.get(name);
}

async function learn(world) {
  const change = Object.keys(world.changes)[0], data = world.make({ ...START, change, stain: pixelsOf(START.stain) });
  let known;
  document.querySelector("main").inert = true;
  for (known of pretrain(world, data)) {
    say("The network learns the old world …");
    draw("before", known, data.beforeHeldOut);
    await frame();
  }
  document.querySelector("main").inert = false;
  say("");
  return known;
}

// Begin an experiment with what is set.
async function restart() {
  const run = ++page.run, base = await baseOf(page.settings.world);
  if (run !== page.run) return; // another was begun meanwhile
  $("train").textContent = "▶ Train";
  page.experiment = new Experiment(page.settings, base);
  page.answered = null;
  $("dial").value = 1;
  note("");
  showSettings();
  show();
}

// Train so many steps, as fast as they can be watched; true if nothing stopped it.
async function train(steps) {
  if (page.experiment.merged) merge();
  if (page.experiment.lora.layers[0].dial !== 1) turnDial(1); // training is at full strength
  const run = ++page.run;
  $("train").textContent = "❚❚ Pause";
  for (let left = steps, last = performance.now(), frames = 0; left > 0; frames++) {
    const now = await frame(), due = still.matches ? 20 : Math.round(((now - last) * SPEED) / 1000);
    if (run !== page.run) return false;
    last = now;
    const count = Math.min(left, Math.max(1, Math.min(12, due)));
    page.experiment.train(count);
    left -= count;
    if (!still.matches || frames % 5 === 0) showStep(frames);
  }
  pause();
  return true;
}

function pause() {
  page.run++;
  $("train").textContent = "▶ Train";
  show();
}

function turnDial(strength) {
  if (page.experiment.merged) merge();
  $("dial").value = strength;
  page.experiment.turn(Number(strength), $("follow").checked && !$("follows").hidden);
  show();
}

function merge() {
  const { experiment } = page;
  if (experiment.merged) {
    experiment.merged = experiment.measured = null;
    note("Taken out again: W was never changed.");
  } else {
    const apart = experiment.merge();
    note(`W + s B A is one table now, and the network as fast as before. The outputs differ by rounding, at most ${apart.toExponential(0)}.`);
  }
  show();
}

// The shelf: adapters on one base

const copyOf = (adapter) => adapter && { ...adapter, A: adapter.A.copy(), B: adapter.B.copy() };

function keep() {
  const { settings, experiment } = page, { name } = WORLDS[settings.world].changes[settings.change];
  const turned = settings.world === "points" && settings.change === "turned" ? ` by ${settings.amount}°` : "";
  const adapters = experiment.lora.layers.map(({ adapter }) => copyOf(adapter));
  page.kept.push({ name: `${name}${turned}, rank ${settings.rank}, ${experiment.lora.steps} steps`, settings: { ...settings }, adapters, size: experiment.lora.size() });
  note("Kept: it is on the shelf below.");
  showShelf();
}

async function take(kept) {
  page.settings = { ...kept.settings };
  await restart();
  page.experiment.lora.layers.forEach((layer, i) => { layer.adapter = copyOf(kept.adapters[i]); });
  page.experiment.measured = null;
  page.experiment.spectra.clear();
  note(`The old numbers stay; the adapter is now “${kept.name}”, ${bytes(kept.size)}. Full fine-tuning would need another ${bytes(page.experiment.full.size())}.`);
  show();
}

function showShelf() {
  const here = page.kept.filter(({ settings }) => settings.world === page.settings.world);
  $("shelf").replaceChildren(...here.map((kept) => button(`${kept.name} (${bytes(kept.size)})`, () => take(kept))));
}

// Experiments with a question

async function open(scenario, number = 0) {
  Object.assign(page, { scenario, act: number });
  const { settings, goesOn } = act();
  if (!goesOn) {
    page.settings = { ...START, ...settings };
    $("follow").checked = false;
    $("shown").value = 0;
    page.predicted = null;
    await restart();
  } else if (page.answered !== scenario) return open(scenario, number - 1); // what it goes on from was not run
  ask();
}

function ask() {
  const { question, options } = act();
  pose(`${page.act + 1} of ${SCENARIOS[page.scenario].acts.length}`, question, options, "");
  $("question").focus({ preventScroll: true }); // so that it is read out
}

function pose(place, question, options, said) {
  $("place").textContent = place;
  $("question").textContent = question;
  $("options").replaceChildren(...options.map((option, i) => button(option, () => predict(i))));
  $("train").disabled = options.length > 0; // first the prediction
  $("next").hidden = true;
  say(said);
  for (const each of $("scenarios").children) each.setAttribute("aria-pressed", each.value === page.scenario);
  writeAddress();
}

// A prediction was made: run, and show what is so.
function predict(chosen) {
  [...$("options").children].forEach((option, i) => {
    option.disabled = true;
    option.setAttribute("aria-pressed", i === chosen);
  });
  $("train").disabled = false;
  page.predicted = chosen;
  return answer();
}

async function answer() {
  const asked = act(), chosen = page.predicted;
  say("Let us see …");
  if (!asked.goesOn && !(await train((asked.steps ?? LENGTH) - page.experiment.full.steps))) {
    if (asked === act()) say("Paused.");
    return;
  }
  if ("dial" in asked) await turnDown(asked.dial, !asked.goesOn);
  if (asked !== act()) return;
  Object.assign(page, { predicted: null, answered: page.scenario });
  if (asked.bars !== undefined) $("shown").value = asked.bars;
  show();
  const measured = page.experiment.measure(), bars = barsOf(page.experiment, Number($("shown").value));
  $("options").children[asked.right].classList.add("right");
  const mark = chosen === asked.right ? "✓ As you said:" : "✗ Not so:";
  say(asked.holds(measured, bars) ? `${mark} ${asked.shows(measured, bars)}` : "It came out otherwise here: look at the numbers below.");
  const { acts } = SCENARIOS[page.scenario], names = Object.keys(SCENARIOS), after = names[names.indexOf(page.scenario) + 1];
  $("next").hidden = page.act + 1 === acts.length && !after;
  $("next").textContent = page.act + 1 < acts.length ? "Next question" : `Next: ${after && SCENARIOS[after].title}`;
  $("next").focus({ preventScroll: true });
  $("next").onclick = () => (page.act + 1 < acts.length ? open(page.scenario, page.act + 1) : open(after));
}

// Turn the dial down before one's eyes, and perhaps the world with it.
async function turnDown(end, follow) {
  const { run } = page;
  $("follow").checked = follow;
  for (let strength = 1; strength > end && !still.matches; strength -= 0.02) {
    turnDial(strength.toFixed(2));
    await frame();
    if (run !== page.run) return; // another experiment was begun
  }
  turnDial(end);
}

const barsOf = (experiment, layer) => ({ full: experiment.singularValues("full", layer), lora: experiment.singularValues("lora", layer) });

// What is shown

const say = (text) => { $("answer").textContent = text; };
const note = (text) => { $("note").textContent = text; };
const percent = (part) => `${Math.round(100 * part)} %`;

function button(text, onclick) {
  return Object.assign(document.createElement("button"), { textContent: text, onclick });
}

function draw(id, network, data) {
  (data.points ? drawPlane : drawDigits)($(id).querySelector("canvas"), network, data);
}

// While it trains, one picture a frame, and the rest now and then.
function showStep(frames) {
  const { experiment } = page, id = frames % 2 ? "full" : "lora";
  draw(id, experiment[id], experiment.data.afterHeldOut);
  $("steps").textContent = experiment.full.steps;
  for (const name of ["full", "lora"]) $(name).querySelector(".right").textContent = percent(experiment.curves[`${name}Right`].at(-1));
  if (frames % 10 === 0) drawCurves($("curves"), experiment.curves);
  if (frames % 20 === 0) showNumbers();
  if (frames % 100 === 99) drawBars($("bars"), barsOf(experiment, Number($("shown").value)));
}

function show() {
  const { experiment } = page;
  if (!experiment) return;
  for (const [id, network] of [["before", experiment.base], ["full", experiment.full], ["lora", experiment.merged ?? experiment.lora]])
    draw(id, network, experiment.data.afterHeldOut);
  showNumbers();
  drawCurves($("curves"), experiment.curves);
  drawBars($("bars"), barsOf(experiment, Number($("shown").value)));
}

function showNumbers() {
  const { experiment } = page, { amount } = experiment, measured = experiment.measure(), all = measured.full.size;
  $("steps").textContent = experiment.full.steps;
  for (const id of ["before", "full", "lora"]) {
    const { right, old, size } = measured[id], at = (name) => $(id).querySelector(name);
    at(".right").textContent = percent(right);
    at(".where").textContent = amount === page.settings.amount ? "in the new world" : `turned by ${Math.round(amount)}°`;
    at(".old").textContent = percent(old);
    const trained = id === "lora" ? ` (${share(size, all)})` : "";
    at(".size").textContent = id === "before" ? `${numbers(all)} numbers` : `${numbers(size)} trained numbers${trained}, ${bytes(size)}`;
    at("canvas").setAttribute("aria-label", `${percent(right)} of the new world right, ${percent(old)} of the old`);
  }
  $("merge").textContent = experiment.merged ? "take out" : "merge";
  $("off").setAttribute("aria-pressed", $("dial").value === "0");
  $("on").setAttribute("aria-pressed", $("dial").value === "1");
  $("rank-shown").textContent = page.settings.rank;
  $("layers-shown").textContent = `layer${page.settings.layers.length > 1 ? "s" : ""} ${[...page.settings.layers].join(", ")}`;
  $("dial-shown").textContent = Number($("dial").value).toFixed(2);
}

// Controls

const SLIDERS = ["rank", "alpha", "loraRate", "fullRate"];

function showSettings() {
  const { settings } = page, world = WORLDS[settings.world];
  $("learned").textContent = world.learned;
  $("legend").textContent = world.legend;
  $("world").value = settings.world;
  $("change").replaceChildren(...Object.entries(world.changes).map(([key, { name }]) => new Option(name, key)));
  $("change").value = settings.change;
  const turns = settings.world === "points" && settings.change === "turned";
  $("amount-row").hidden = $("follows").hidden = !turns;
  $("amount").value = settings.amount;
  $("amount-shown").textContent = `${settings.amount}°`;
  $("optimiser").value = settings.optimiser;
  $("how").textContent = `of ${settings.optimiser}, learning rate ${settings.fullRate} in full, ${settings.loraRate} for LoRA`;
  for (const name of SLIDERS) {
    $(name).value = CHOICES[name].indexOf(settings[name]);
    $(name).setAttribute("aria-valuetext", settings[name]);
    $(`${name}-out`).textContent = settings[name];
  }
  for (const box of document.querySelectorAll(".layers input")) box.checked = settings.layers.includes(box.value);
  $("lens").hidden = settings.change !== "stained";
  showLens();
  showShelf();
}

// Something was set by hand: the question is over, and the experiment begins anew.
function set(change) {
  Object.assign(page, { settings: { ...page.settings, ...change }, scenario: null });
  pose("", "An experiment of your own", [], "Press Train.");
  return restart();
}

function setWorld(world) {
  const change = Object.keys(WORLDS[world].changes)[0];
  return set(world === "digits" ? { ...START, ...digit, change } : { ...START, change });
}

// The lens

let cursor = null, ink = null;
const showLens = () => drawLens($("pad"), pixelsOf(page.settings.stain), cursor);

function dab(i, value) {
  const pixels = pixelsOf(page.settings.stain);
  page.settings.stain = stainOf(pixels.slice(0, i) + value + pixels.slice(i + 1));
  showLens();
}

function under({ clientX, clientY }) {
  const box = $("pad").getBoundingClientRect(), place = (v, length) => Math.min(7, Math.max(0, Math.floor((8 * v) / length)));
  return 8 * place(clientY - box.top, box.height) + place(clientX - box.left, box.width);
}

const toggled = (i) => (pixelsOf(page.settings.stain)[i] === "1" ? "0" : "1");
$("pad").onpointerdown = (event) => {
  $("pad").setPointerCapture(event.pointerId);
  ink = toggled(under(event));
  dab(under(event), ink);
};
$("pad").onpointermove = (event) => { if (ink !== null) dab(under(event), ink); };
$("pad").onpointerup = () => { ink = null; set({}); };
$("pad").onkeydown = (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -8, ArrowDown: 8 }[event.key];
  if (step) cursor = Math.min(63, Math.max(0, (cursor ?? 0) + step));
  else if (event.key === " ") { dab(cursor ?? 0, toggled(cursor ?? 0)); set({}); }
  else return;
  event.preventDefault();
  showLens();
};
$("pad").onblur = () => { cursor = null; showLens(); };

// The address: an experiment by name, or what differs from the start

function writeAddress() {
  const { settings, scenario } = page, different = Object.entries(settings).filter(([name, value]) => value !== START[name]);
  const parts = scenario ? { scenario, ...(page.act && { act: page.act + 1 }) } : Object.fromEntries(different);
  history.replaceState(null, "", `#${new URLSearchParams(parts)}`);
}

// What an address holds; of a value that no control offers nothing is taken.
function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1)), settings = { ...START };
  if (Object.hasOwn(SCENARIOS, given.get("scenario"))) {
    const act = Math.min(SCENARIOS[given.get("scenario")].acts.length, Math.max(1, parseInt(given.get("act")) || 1));
    return open(given.get("scenario"), act - 1);
  }
  if (![...given.keys()].some((name) => name in START)) return open("few");
  for (const [name, choices] of Object.entries(CHOICES))
    settings[name] = choices.find((choice) => String(choice) === given.get(name)) ?? settings[name];
  const { changes } = WORLDS[settings.world], change = given.get("change") ?? START.change;
  settings.change = Object.hasOwn(changes, change) ? change : Object.keys(changes)[0];
  const amount = Number(given.get("amount") ?? START.amount);
  if (amount >= 0 && amount <= 180) settings.amount = amount;
  if (/^[0-9a-f]{16}$/.test(given.get("stain"))) settings.stain = given.get("stain");
  return set(settings);
}

// Everything is wired once.

for (const [name, { title }] of Object.entries(SCENARIOS))
  $("scenarios").append(Object.assign(button(title, () => open(name)), { value: name }));
$("train").onclick = async () => {
  if (!$("train").textContent.startsWith("▶")) return pause();
  if (typeof page.predicted === "number") return answer(); // it was paused
  if (!page.scenario) say("");
  if (!(await train(LENGTH)) || page.scenario) return;
  const { full, lora } = page.experiment.measure();
  say(`After ${page.experiment.full.steps} steps: LoRA ${hundred(lora.right)}, full fine-tuning ${hundred(full.right)}.`);
};
$("restart").onclick = () => { pause(); (page.scenario ? open(page.scenario, page.act) : restart()); };
$("dial").oninput = (event) => { if ($("train").textContent.startsWith("❚")) pause(); turnDial(event.target.value); };
$("follow").onchange = () => turnDial($("dial").value);
$("off").onclick = () => turnDial(0);
$("on").onclick = () => turnDial(1);
$("merge").onclick = merge;
$("keep").onclick = keep;
$("shown").onchange = show;
$("wipe").onclick = () => set({ stain: "0".repeat(16) });
$("world").onchange = (event) => setWorld(event.target.value);
$("change").onchange = (event) => set({ change: event.target.value });
$("amount").onchange = (event) => set({ amount: Number(event.target.value) });
$("optimiser").onchange = (event) => set(event.target.value === "Adam" ? { optimiser: "Adam", loraRate: 0.01, fullRate: 0.01 } : { optimiser: event.target.value, loraRate: 0.1, fullRate: 0.1 });
for (const name of SLIDERS) {
  Object.assign($(name), { min: 0, max: CHOICES[name].length - 1 });
  $(name).onchange = (event) => {
    const value = CHOICES[name][event.target.value];
    set(name === "rank" ? { rank: value, alpha: value } : { [name]: value }); // the scaling stays 1
  };
}
for (const box of document.querySelectorAll(".layers input"))
  box.onchange = () => set({ layers: [..."123"].filter((layer) => document.querySelector(`.layers [value="${layer}"]`).checked).join("") || box.value });
addEventListener("hashchange", readAddress);
matchMedia("(prefers-color-scheme: dark)").onchange = show;
readAddress();
