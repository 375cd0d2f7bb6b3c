// One experiment: a network that knows the old world, a copy that is trained in full, and one with LoRA, on the same batches.
"use strict";

const START = {
  world: "points", change: "turned", amount: 90, stain: "00666600423c0000",
  rank: 2, alpha: 2, layers: "1", loraRate: 0.01, fullRate: 0.01, optimiser: "Adam",
};
const RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1];
const CHOICES = { // what the controls offer, and so what an address may hold
  world: Object.keys(WORLDS),
  rank: [1, 2, 4, 8, 16, 32],
  alpha: [1, 2, 4, 8, 16, 32, 64],
  layers: ["1", "2", "3", "12", "13", "23", "123"],
  loraRate: RATES,
  fullRate: RATES,
  optimiser: ["Adam", "gradient descent"],
};
const EVERY = 10; // steps between two points of a curve

class Experiment {
  constructor(settings, base, seed = 0) {
    Object.assign(this, { settings, base, seed, world: WORLDS[settings.world] });
    this.look(settings.amount);
    this.training = this.data.after;
    const layers = [...settings.layers].map((layer) => layer - 1);
    this.full = base.copy();
    this.lora = base.withLora(settings.rank, settings.alpha, layers, 5 + seed);
    this.draw = random(11 + seed);
    this.curves = { steps: [], full: [], lora: [], fullRight: [], loraRight: [] };
    this.merged = null;
    this.spectra = new Map();
    this.note();
  }

  // See the world changed by another amount; what is trained on stays.
  look(amount) {
    this.amount = amount;
    this.data = this.world.make({ ...this.settings, stain: pixelsOf(this.settings.stain), amount });
    this.measured = null;
  }

  train(steps) {
    const { fullRate, loraRate, optimiser } = this.settings;
    for (let i = 0; i < steps; i++) {
      const batch = drawBatch(this.training, this.draw); // the same for both
      this.full.step(batch, fullRate, optimiser);
      this.lora.step(batch, loraRate, optimiser);
      if (this.full.steps % EVERY === 0) this.note();
    }
    this.measured = null;
    this.spectra.clear();
  }

  // Turn the adapter's strength; `follow` turns the world as far.
  turn(strength, follow) {
    this.lora.dial = strength;
    this.look(follow ? this.settings.amount * strength : this.settings.amount);
  }

  merge() {
    this.merged = this.lora.merged();
    this.measured = null;
    const { x } = this.data.afterHeldOut, ours = this.lora.forward(x).values, theirs = this.merged.forward(x).values;
    return ours.reduce((most, value, i) => Math.max(most, Math.abs(value - theirs[i])), 0);
  }

  note() {
    this.curves.steps.push(this.full.steps);
    for (const name of ["full", "lora"]) {
      const { loss, right } = this[name].judge(this.data.afterHeldOut);
      this.curves[name].push(loss);
      this.curves[`${name}Right`].push(right);
    }
  }

  // What the page shows, and what the texts of an experiment are written from.
  measure() {
    this.measured ??= {
      before: this.score(this.base),
      full: { ...this.score(this.full), enough: this.enough("fullRight") },
      lora: { ...this.score(this.merged ?? this.lora), size: this.lora.size(), enough: this.enough("loraRight") },
    };
    return this.measured;
  }

  score(network) {
    const now = network.judge(this.data.afterHeldOut), old = network.judge(this.data.beforeHeldOut);
    return { right: now.right, old: old.right, loss: now.loss, size: network.size() };
  }

  // The first step from which on 97 of 100 held-out examples were right; Infinity if there is none.
  enough(curve) {
    const last = this.curves[curve].findLastIndex((right) => right < 0.97) + 1;
    return this.curves.steps[last] ?? Infinity;
  }

  singularValues(method, layer) {
    const key = method + layer;
    if (!this.spectra.has(key)) this.spectra.set(key, singularValues(this[method].layers[layer].update(this.base.layers[layer])));
    return this.spectra.get(key);
  }
}

// A stain is 64 bits, written as 16 hexadecimal digits.
function pixelsOf(stain) {
  return [...stain].map((digit) => parseInt(digit, 16).toString(2).padStart(4, "0")).join("");
}

function stainOf(pixels) {
  return pixels.match(/..../g).map((four) => parseInt(four, 2).toString(16)).join("");
}
