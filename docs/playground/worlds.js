// Two worlds, each as it was when the network learned it, and changed: points in a plane, and handwritten digits.
"use strict";

const LETTERS = "0123456789abcdefg"; // a pixel is one letter, from no ink to 16 sixteenths
const BATCH = 32;

function normal(draw) {
  return Math.sqrt(-2 * Math.log(1 - draw())) * Math.cos(2 * Math.PI * draw());
}

// A batch of examples, drawn with replacement.
function drawBatch({ x, labels }, draw) {
  const rows = Array.from({ length: BATCH }, () => Math.floor(draw() * labels.length));
  const batch = new Matrix(BATCH, x.columns);
  rows.forEach((row, i) => batch.row(i).set(x.row(row)));
  return { x: batch, labels: rows.map((row) => labels[row]) };
}

// The network never sees x and y of a point, but what 64 sensors measure, each along a direction of its own.
const SENSORS = Array.from({ length: 64 }, (_, k) => [Math.cos((Math.PI * k) / 32), Math.sin((Math.PI * k) / 32)]);

function sense(points) {
  const x = new Matrix(points.length, 64);
  points.forEach(([left, up], i) => SENSORS.forEach(([cos, sin], k) => (x.row(i)[k] = cos * left + sin * up)));
  return x;
}

function turn([x, y], degrees) {
  const cos = Math.cos((degrees * Math.PI) / 180), sin = Math.sin((degrees * Math.PI) / 180);
  return [cos * x - sin * y, sin * x + cos * y];
}

// Each change takes what is seen and its label to what is seen and its label in the new world.
const POINTS = {
  sizes: [64, 64, 64, 3],
  pretraining: 600,
  learned: "the colour of each place on a map",
  legend: "Each dot has the colour that is right; the background has the colour that the network answers.",
  changes: {
    turned: { name: "turned", to: (point, label, { amount }) => [turn(point, amount), label] },
    mirrored: { name: "mirrored", to: ([x, y], label) => [[-x, y], label] },
    moved: { name: "moved to the right", to: ([x, y], label) => [[x + 0.5, y], label] },
    recoloured: { name: "given other colours", to: (point, label) => [point, (label + 1) % 3] },
  },

  // A pinwheel of three bent arms.
  sample(count, seed, change) {
    const draw = random(seed), points = [], labels = [];
    for (let i = 0; i < count; i++) {
      const t = Math.sqrt(draw()), angle = (2 * Math.PI * (i % 3)) / 3 + 2.6 * t + (0.24 * normal(draw)) / (1 + 2 * t);
      const [point, label] = change([t * Math.cos(angle), t * Math.sin(angle)], i % 3);
      points.push(point);
      labels.push(label);
    }
    return { points, labels, x: sense(points) };
  },

  make(settings) {
    const same = (point, label) => [point, label];
    const change = (point, label) => this.changes[settings.change].to(point, label, settings);
    return {
      before: this.sample(600, 1, same), beforeHeldOut: this.sample(300, 2, same),
      after: this.sample(200, 5, change), afterHeldOut: this.sample(300, 6, change),
    };
  },
};

const DIGITS = {
  sizes: [64, 64, 64, 10],
  pretraining: 500,
  learned: "to read handwritten digits",
  legend: "What each network reads is written above each digit; green is right.",
  changes: {
    stained: { name: "seen through a stained lens", to: (ink, i, { stain }) => ink[i] + Number(stain[i]) },
    moved: { name: "moved down by a pixel", to: (ink, i) => (i < 8 ? 0 : ink[i - 8]) },
    mirrored: { name: "mirrored", to: (ink, i) => ink[i - (i % 8) + 7 - (i % 8)] },
    turned: { name: "turned by 90°", to: (ink, i) => ink[(7 - (i % 8)) * 8 + Math.floor(i / 8)] },
  },

  make(settings) {
    const draw = random(1), order = [...LABELS].map((_, i) => [draw(), i]).sort((a, b) => a[0] - b[0]);
    const pictures = order.map(([, i]) => Float64Array.from(PIXELS.slice(64 * i, 64 * i + 64), (c) => LETTERS.indexOf(c) / 16));
    const labels = order.map(([, i]) => Number(LABELS[i]));
    const { to } = this.changes[settings.change];
    const pick = (from, until, change) => {
      const x = new Matrix(until - from, 64);
      for (let i = from; i < until; i++) x.row(i - from).set(change(pictures[i]));
      return { x, labels: labels.slice(from, until) };
    };
    const same = (ink) => ink, changed = (ink) => ink.map((_, i) => to(ink, i, settings));
    return {
      before: pick(0, 900, same), beforeHeldOut: pick(1400, 1700, same),
      after: pick(900, 1400, changed), afterHeldOut: pick(1400, 1700, changed),
    };
  },
};

const WORLDS = { points: POINTS, digits: DIGITS };

// What a network knows of the old world; `each` is called now and then, so that it can be watched.
function* pretrain(world, data, seed = 0) {
  const network = Network.fresh(world.sizes, seed), draw = random(3 + seed);
  for (let step = 0; step < world.pretraining; step++) {
    network.step(drawBatch(data.before, draw), 3e-3 * (1 - step / world.pretraining));
    if (step % 60 === 0) yield network;
  }
  yield new Network(network.layers);
}
