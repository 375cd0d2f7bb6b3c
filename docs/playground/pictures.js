// What is drawn: a plane with its decisions, digits as they are read, curves and bars.
"use strict";

const CLASSES = [[86, 180, 233], [240, 200, 50], [0, 158, 115]]; // of the points; colour-blind safe
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`); // of a method, by style.css
const WIDE = 1.4, GRID = 36; // the picture shows the plane from -1.4 to 1.4
const SIDE = 6; // digits in a row

const GRID_POINTS = sense(Array.from({ length: GRID * GRID }, (_, i) => {
  const at = (k) => (2 * WIDE * (k + 0.5)) / GRID - WIDE;
  return [at(i % GRID), -at(Math.floor(i / GRID))];
}));
const small = Object.assign(document.createElement("canvas"), { width: GRID, height: GRID });

// Each place of the plane in the colours that a network gives it, and held-out points with their own.
function drawPlane(canvas, network, { points, labels }) {
  const logits = network.forward(GRID_POINTS), image = new ImageData(GRID, GRID), size = canvas.width;
  for (let i = 0; i < GRID * GRID; i++) {
    const row = logits.row(i), top = Math.max(...row), powers = row.map((value) => Math.exp(value - top));
    const sum = powers[0] + powers[1] + powers[2];
    for (let c = 0; c < 3; c++)
      image.data[4 * i + c] = CLASSES.reduce((mixed, colour, k) => mixed + (powers[k] / sum) * (97 + 0.62 * colour[c]), 0);
    image.data[4 * i + 3] = 255;
  }
  small.getContext("2d").putImageData(image, 0, 0);
  const context = canvas.getContext("2d");
  context.drawImage(small, 0, 0, size, size);
  context.strokeStyle = "#fff";
  points.slice(0, 180).forEach(([x, y], i) => {
    context.beginPath();
    context.arc(((x + WIDE) / 2 / WIDE) * size, ((WIDE - y) / 2 / WIDE) * size, 4, 0, 7);
    context.fillStyle = `rgb(${CLASSES[labels[i]].map((value) => 0.8 * value)})`;
    context.fill();
    context.stroke();
  });
}

// Held-out digits, and what a network reads: a wrong one is red, and has a cross.
function drawDigits(canvas, network, { x, labels }) {
  const count = SIDE * SIDE, step = canvas.width / SIDE, dot = (step - 14) / 8, context = canvas.getContext("2d");
  const logits = network.forward(new Matrix(count, 64, x.values.subarray(0, 64 * count)));
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  for (let k = 0; k < count; k++) {
    const row = logits.row(k), read = row.indexOf(Math.max(...row)), right = read === labels[k];
    const left = (k % SIDE) * step, top = Math.floor(k / SIDE) * step;
    context.fillStyle = right ? "#cfe8dc" : "#f6c1b0";
    context.fillRect(left + 1, top + 1, step - 2, step - 2);
    x.row(k).forEach((ink, i) => {
      context.fillStyle = `rgba(20, 20, 20, ${Math.min(1, ink)})`;
      context.fillRect(left + 3 + (i % 8) * dot, top + 11 + Math.floor(i / 8) * dot, dot, dot);
    });
    context.fillStyle = right ? "#00543c" : "#a02000";
    context.font = "bold 15px system-ui, sans-serif";
    context.textAlign = "right";
    context.fillText(right ? read : `✗ ${read}`, left + step - 3, top + 15);
  }
}

function fresh(canvas) {
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.font = "13px system-ui, sans-serif";
  context.fillStyle = getComputedStyle(canvas).color;
  context.textAlign = "left";
  return context;
}

// Held-out losses by the number of steps, on a logarithmic scale; each line is named where it ends.
function drawCurves(canvas, { steps, full, lora }) {
  const context = fresh(canvas), { width, height } = canvas, last = Math.max(100, steps.at(-1));
  const all = [...full, ...lora].map(Math.log10), low = Math.min(-1, Math.floor(Math.min(...all))), high = Math.max(0.5, ...all);
  const at = (step, loss) => [46 + ((width - 150) * step) / last, 8 + ((height - 40) * (high - Math.log10(loss))) / (high - low)];
  const ink = context.fillStyle;
  for (let power = low; power <= high; power++) {
    const [left, y] = at(0, 10 ** power);
    context.fillStyle = ink;
    context.fillText(String(Number((10 ** power).toPrecision(1))), 2, y + 4);
    context.fillStyle = "#8884";
    context.fillRect(left, y, width - 150, 1);
  }
  context.fillStyle = ink;
  for (const step of [0, last / 2, last]) context.fillText(step ? `${step} steps` : "0", at(step, 1)[0] - (step ? 26 : 3), height - 8);
  const ends = [];
  for (const [name, losses, label] of [["full", full, "full fine-tuning"], ["lora", lora, "LoRA"]]) {
    context.strokeStyle = context.fillStyle = colour(name);
    context.lineWidth = 2.5;
    context.setLineDash(name === "full" ? [7, 4] : []);
    context.beginPath();
    losses.forEach((loss, i) => context.lineTo(...at(steps[i], loss)));
    context.stroke();
    if (steps.length < 2) continue; // there is no line yet
    let [x, y] = at(steps.at(-1), losses.at(-1));
    if (ends.length && Math.abs(y - ends[0]) < 15) y = ends[0] + (y < ends[0] ? -15 : 15);
    ends.push(y);
    context.fillText(label, x + 5, y + 4);
  }
  context.setLineDash([]);
  canvas.setAttribute("aria-label", `Loss after ${steps.at(-1)} steps: full fine-tuning ${full.at(-1).toPrecision(2)}, LoRA ${lora.at(-1).toPrecision(2)} nats`);
}

// The 16 largest singular values of both updates, side by side.
function drawBars(canvas, bars) {
  const context = fresh(canvas), { width, height } = canvas, count = 16, slot = (width - 50) / count, ink = context.fillStyle;
  const top = Math.max(1e-12, ...bars.full, ...bars.lora);
  for (let k = 0; k < count; k++) {
    context.fillStyle = ink;
    context.fillText(String(k + 1), 46 + k * slot + slot * 0.3, height - 8);
    ["full", "lora"].forEach((name, i) => {
      const share = (bars[name][k] ?? 0) / top, tall = share < 1e-9 ? 0 : Math.max(1, share * (height - 40));
      context.fillStyle = colour(name);
      context.fillRect(46 + k * slot + i * slot * 0.42, height - 24 - tall, slot * 0.4, tall);
    });
  }
  context.fillStyle = ink;
  context.fillText(top < 1e-9 ? "0" : top.toPrecision(2), 2, 20);
  context.fillStyle = colour("full");
  context.fillText("■ full fine-tuning", width - 210, 20);
  context.fillStyle = colour("lora");
  context.fillText("■ LoRA", width - 80, 20);
  const words = (values) => values.slice(0, 6).map((value) => value.toPrecision(2)).join(", ");
  canvas.setAttribute("aria-label", `Singular values, full fine-tuning: ${words(bars.full)}; LoRA: ${words(bars.lora)}`);
}

// The lens: what is stained, and where the keyboard's cursor is.
function drawLens(canvas, pixels, cursor) {
  const context = canvas.getContext("2d"), step = canvas.width / 8;
  [...pixels].forEach((ink, i) => {
    context.fillStyle = ink === "1" ? "#222" : "#e8e8e8";
    context.fillRect((i % 8) * step + 1, Math.floor(i / 8) * step + 1, step - 2, step - 2);
  });
  if (cursor === null) return;
  context.strokeStyle = colour("lora");
  context.lineWidth = 3;
  context.strokeRect((cursor % 8) * step + 2, Math.floor(cursor / 8) * step + 2, step - 4, step - 4);
}
