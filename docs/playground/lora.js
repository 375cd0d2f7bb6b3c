// A small network, trained in full or with LoRA beside it. Every product, gradient and optimiser is in this file.
//
//     h = W x + b + s B A x        s = dial * alpha / rank; W and b are frozen while A and B are trained
//
// Shapes in the comments follow one example: a batch of 32, layers from 64 to 64, rank 2.
"use strict";

// Matrices

class Matrix {
  constructor(rows, columns, values = new Float64Array(rows * columns)) {
    Object.assign(this, { rows, columns, values }); // row by row
  }

  copy() {
    return new Matrix(this.rows, this.columns, this.values.slice());
  }

  row(i) {
    return this.values.subarray(i * this.columns, (i + 1) * this.columns);
  }

  // this (n, k) times other (m, k) transposed -> (n, m), added to `sum`
  timesTransposed(other, scale = 1, sum = new Matrix(this.rows, other.rows)) {
    const { rows: n, columns: k, values: x } = this, { rows: m, values: w } = other, out = sum.values;
    for (let i = 0; i < n; i++)
      for (let j = 0; j < m; j++) {
        let dot = 0;
        for (let l = 0, a = i * k, b = j * k; l < k; l++) dot += x[a++] * w[b++];
        out[i * m + j] += scale * dot;
      }
    return sum;
  }

  // this (n, m) times other (m, k) -> (n, k), added to `sum`
  times(other, scale = 1, sum = new Matrix(this.rows, other.columns)) {
    const { rows: n, columns: m, values: g } = this, { columns: k, values: w } = other, out = sum.values;
    for (let i = 0; i < n; i++)
      for (let j = 0; j < m; j++) {
        const factor = scale * g[i * m + j];
        if (factor !== 0) for (let l = 0, a = i * k, b = j * k; l < k; l++) out[a++] += factor * w[b++];
      }
    return sum;
  }

  // this (n, m) transposed times other (n, k) -> (m, k): a weight's gradient
  transposedTimes(other, scale = 1) {
    const { rows: n, columns: m, values: g } = this, { columns: k, values: x } = other, out = new Float64Array(m * k);
    for (let i = 0; i < n; i++)
      for (let j = 0; j < m; j++) {
        const factor = scale * g[i * m + j];
        if (factor !== 0) for (let l = 0, a = j * k, b = i * k; l < k; l++) out[a++] += factor * x[b++];
      }
    return new Matrix(m, k, out);
  }
}

// Seeded random numbers in [0, 1): mulberry32, which is in the public domain.
function random(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}

// Uniform in +-1 / sqrt(inputs), as torch starts the weights of a linear layer.
function uniform(rows, columns, inputs, draw) {
  const bound = 1 / Math.sqrt(inputs);
  return new Matrix(rows, columns, Float64Array.from({ length: rows * columns }, () => bound * (2 * draw() - 1)));
}

// A layer

class Layer {
  constructor(W, b) {
    Object.assign(this, { W, b, adapter: null, dial: 1, trained: true }); // (64, 64), (1, 64)
  }

  static fresh(inputs, outputs, draw) {
    return new Layer(uniform(outputs, inputs, inputs, draw), uniform(1, outputs, inputs, draw));
  }

  copy() {
    return Object.assign(new Layer(this.W.copy(), this.b.copy()), { adapter: this.adapter });
  }

  // A is random and B zero, so the layer computes what it did before, bit for bit.
  adapt(rank, alpha, draw) {
    const A = uniform(rank, this.W.columns, this.W.columns, draw); // (2, 64)
    const B = new Matrix(this.W.rows, rank); // (64, 2)
    this.adapter = { A, B, scaling: alpha / rank };
  }

  forward(x) {
    this.x = x; // (32, 64)
    const h = new Matrix(x.rows, this.W.rows);
    for (let i = 0; i < h.rows; i++) h.row(i).set(this.b.values);
    x.timesTransposed(this.W, 1, h); // (32, 64)
    if (!this.adapter || this.dial === 0) return h; // the old layer
    const { A, B, scaling } = this.adapter;
    this.narrow = x.timesTransposed(A); // (32, 2)
    return this.narrow.timesTransposed(B, this.dial * scaling, h); // (32, 64)
  }

  // From the gradient of h, those of what is trained, each beside its parameter.
  gradients(g) {
    if (!this.adapter) {
      const ones = new Matrix(g.rows, 1, new Float64Array(g.rows).fill(1));
      return [[this.W, g.transposedTimes(this.x)], [this.b, ones.transposedTimes(g)]];
    }
    const { A, B, scaling } = this.adapter;
    const narrow = g.times(B, scaling); // (32, 2)
    return [[B, g.transposedTimes(this.narrow, scaling)], [A, narrow.transposedTimes(this.x)]];
  }

  // And that of x, for the layer before.
  inputGradient(g) {
    const frozen = g.times(this.W); // (32, 64)
    return this.adapter ? g.times(this.adapter.B, this.adapter.scaling).times(this.adapter.A, 1, frozen) : frozen;
  }

  parameters() {
    if (!this.trained) return [];
    return this.adapter ? [this.adapter.A, this.adapter.B] : [this.W, this.b];
  }

  // What training wrote into the weight: s B A, or the difference from the weight before.
  update(before) {
    const { W, adapter } = this;
    if (adapter) return adapter.B.times(adapter.A, adapter.scaling); // (64, 64)
    return new Matrix(W.rows, W.columns, W.values.map((value, i) => value - before.W.values[i]));
  }

  // One plain matrix that computes the same: W + s B A.
  merged() {
    if (!this.adapter) return this.copy();
    const { A, B, scaling } = this.adapter;
    return new Layer(B.times(A, this.dial * scaling, this.W.copy()), this.b.copy());
  }
}

function relu(x) {
  const out = x.copy();
  for (let i = 0; i < out.values.length; i++) if (out.values[i] < 0) out.values[i] = 0;
  return out;
}

// The network: layers with ReLU between them, then softmax and cross-entropy

class Network {
  constructor(layers) {
    Object.assign(this, { layers, steps: 0, memory: new Map() });
  }

  static fresh(sizes, seed) {
    const draw = random(seed);
    return new Network(sizes.slice(1).map((outputs, i) => Layer.fresh(sizes[i], outputs, draw)));
  }

  copy() {
    return new Network(this.layers.map((layer) => layer.copy()));
  }

  // A copy with adapters on the chosen layers; all else is frozen.
  withLora(rank, alpha, chosen, seed) {
    const copy = this.copy(), draw = random(seed);
    copy.layers.forEach((layer, i) => {
      layer.trained = chosen.includes(i);
      if (layer.trained) layer.adapt(rank, alpha, draw);
    });
    return copy;
  }

  forward(x) {
    return this.layers.reduce((input, layer, i) => layer.forward(i ? relu(input) : input), x); // (32, 64) -> (32, 3)
  }

  // The mean loss of examples in nats, the share that is right, and the gradient of the logits.
  judge({ x, labels }) {
    const logits = this.forward(x), g = new Matrix(logits.rows, logits.columns), n = logits.rows;
    let loss = 0, right = 0;
    for (let i = 0; i < n; i++) {
      const row = logits.row(i), p = g.row(i), label = labels[i], top = Math.max(...row);
      let sum = 0;
      for (let j = 0; j < row.length; j++) sum += p[j] = Math.exp(row[j] - top);
      for (let j = 0; j < row.length; j++) p[j] = (p[j] / sum - (j === label)) / n;
      loss += (Math.log(sum) + top - row[label]) / n;
      right += (row[label] === top) / n;
    }
    return { loss, right, gradient: g };
  }

  // One step: forward, backward, update. Returns the loss before it.
  step(batch, rate, optimiser = "Adam") {
    const { loss, gradient } = this.judge(batch);
    const first = this.layers.findIndex((layer) => layer.trained), pairs = [];
    for (let i = this.layers.length - 1, g = gradient; i >= first; i--) {
      const layer = this.layers[i], x = layer.x.values;
      if (layer.trained) pairs.push(...layer.gradients(g));
      if (i === first) break; // nothing before it is trained
      g = layer.inputGradient(g);
      for (let j = 0; j < x.length; j++) if (x[j] <= 0) g.values[j] = 0; // of ReLU
    }
    this.steps++;
    for (const [parameter, d] of pairs) this.move(parameter.values, d.values, rate, optimiser);
    return loss;
  }

  move(p, d, rate, optimiser) {
    if (optimiser !== "Adam") return p.forEach((_, i) => { p[i] -= rate * d[i]; }); // gradient descent
    if (!this.memory.has(p)) this.memory.set(p, [new Float64Array(p.length), new Float64Array(p.length)]);
    const [m, v] = this.memory.get(p), size = rate / (1 - 0.9 ** this.steps), root = Math.sqrt(1 - 0.999 ** this.steps);
    for (let i = 0; i < p.length; i++) {
      m[i] += 0.1 * (d[i] - m[i]);
      v[i] += 0.001 * (d[i] * d[i] - v[i]);
      p[i] -= (size * m[i]) / (Math.sqrt(v[i]) / root + 1e-8);
    }
  }

  // How many numbers are trained, and so how many a file must keep.
  size() {
    return this.layers.flatMap((layer) => layer.parameters()).reduce((sum, { values }) => sum + values.length, 0);
  }

  set dial(strength) {
    for (const layer of this.layers) layer.dial = strength;
  }

  merged() {
    return new Network(this.layers.map((layer) => layer.merged()));
  }
}

// Singular values of a matrix, largest first: Jacobi's method turns pairs of rows until all are at right angles.
function singularValues(M) {
  const tall = M.rows > M.columns, count = tall ? M.columns : M.rows, length = tall ? M.rows : M.columns;
  const entry = (i, j) => M.values[tall ? j * M.columns + i : i * M.columns + j];
  const rows = Array.from({ length: count }, (_, i) => Float64Array.from({ length }, (_, j) => entry(i, j)));
  const dot = (u, v) => u.reduce((sum, value, i) => sum + value * v[i], 0);
  for (let sweep = 0, turned = true; turned && sweep < 30; sweep++) {
    turned = false;
    for (let p = 0; p < count; p++)
      for (let q = p + 1; q < count; q++) {
        const u = rows[p], v = rows[q], a = dot(u, u), b = dot(v, v), c = dot(u, v);
        if (Math.abs(c) <= 1e-12 * Math.sqrt(a * b) || a * b < 1e-60) continue;
        turned = true;
        const zeta = (b - a) / (2 * c), t = Math.sign(zeta || 1) / (Math.abs(zeta) + Math.hypot(1, zeta));
        const cos = 1 / Math.hypot(1, t), sin = cos * t;
        for (let i = 0; i < length; i++) [u[i], v[i]] = [cos * u[i] - sin * v[i], sin * u[i] + cos * v[i]];
      }
  }
  return rows.map((row) => Math.sqrt(dot(row, row))).sort((a, b) => b - a);
}
