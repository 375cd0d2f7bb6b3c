// The experiments: a prediction, a run, and what it shows. Each sentence holds for 8 seeds of network, adapter and batches;
// `holds` says with what margin. What an act does not set is as in START, 400 steps long;
// `goesOn` keeps what the act before it has trained.
"use strict";

const hundred = (share) => `${Math.round(100 * share)} of 100`;
const numbers = (count) => count.toLocaleString("en");
const digit = { world: "digits", layers: "123", rank: 1, alpha: 1, fullRate: 3e-3 };

const SCENARIOS = {
  few: { title: "Three percent", acts: [{
    question: "The map was turned by a quarter. Full fine-tuning may change all 8,515 numbers of the network; LoRA keeps those, and trains 256 new ones. How many of 100 places will LoRA get right?",
    options: ["about 50", "about 75", "nearly all"], right: 2,
    shows: ({ full, lora }) => `LoRA gets ${hundred(lora.right)}, full fine-tuning ${hundred(full.right)}. LoRA's file has ${bytes(lora.size)}, the other ${bytes(full.size)}. But fewer numbers are not fewer steps: at this learning rate LoRA took ${lora.enough} until 97 of 100 stayed right, full fine-tuning ${full.enough}.`,
    holds: ({ full, lora }) => lora.right > 0.97 && full.right > 0.97 && lora.size / full.size < 0.031 && lora.enough > full.enough,
  }, {
    goesOn: true, dial: 0,
    question: "The cards say it: both now read about a third of the old, upright world, and a third is guessing. Which of the two can go back?",
    options: ["LoRA", "full fine-tuning", "neither"], right: 0,
    shows: ({ full, lora }) => `LoRA: the adapter is off, and ${hundred(lora.old)} of the old world are right, as before, bit for bit. Full fine-tuning stays at ${hundred(full.old)}, unless somebody kept a copy of all its numbers. While the adapter is on, LoRA forgets too: the two worlds contradict each other.`,
    holds: ({ before, full, lora }) => lora.old === before.old && lora.old > 0.95 && full.old < 0.6,
  }] },
  dial: { title: "The dial", acts: [{
    dial: 0.5,
    question: "LoRA learns a world turned by 90°. Then we put its strength at one half, and turn the world by 45°, which no network has ever seen. How many of 100 will be right?",
    options: ["about 33, by chance", "about 50", "more than 80"], right: 2,
    shows: ({ before, full, lora }) => `${hundred(lora.right)}. Without the adapter it is ${hundred(before.right)}; full fine-tuning, whose change is not halved, gets ${hundred(full.right)}. Half-way between a point and the same point turned by 90° lies one turned by 45° (and nearer to the middle). Move the dial, and the world turns with it.`,
    holds: ({ before, lora }) => lora.right > 0.8 && before.right < 0.65,
  }, {
    settings: { amount: 180 }, dial: 0.5,
    question: "Now an adapter for a turn by 180°, at half strength, in a world turned by 90°. How many of 100 will be right?",
    options: ["more than 80", "about 33, by chance", "fewer than 20"], right: 2,
    shows: ({ lora }) => `${hundred(lora.right)}. Half-way between a point and the opposite one lies the middle, so little of the map is left, and what is left gives wrong colours. A dial blends numbers: try out what comes of it.`,
    holds: ({ lora }) => lora.right < 0.2,
  }] },
  rank: { title: "Which rank?", acts: [{
    settings: { rank: 1, alpha: 1 },
    question: "The map is turned by a quarter again. Now LoRA has rank 1: it may change the first layer in one direction only. What will it do?",
    options: ["get stuck", "learn it, slowly", "learn nothing"], right: 0,
    shows: ({ full, lora }) => `It gets stuck at ${hundred(lora.right)}, where full fine-tuning gets ${hundred(full.right)}. Undoing a turn moves points left and right, and up and down: two directions (R − I has rank 2). Rank 1 has one.`,
    holds: ({ full, lora }) => lora.right < 0.93 && lora.right > 0.6 && full.right > 0.97,
  }, {
    settings: { rank: 2, alpha: 2 },
    question: "And with rank 2, two directions?",
    options: ["still stuck", "right, as full fine-tuning"], right: 1,
    shows: ({ lora }) => `${hundred(lora.right)}. The turn is a change of rank 2, and rank 2 is enough. (Full fine-tuning wrote more, the blue bars: it used Adam.)`,
    holds: ({ lora }) => lora.right > 0.97,
  }, {
    settings: { rank: 1, alpha: 1, layers: "123" }, steps: 600,
    question: "Rank 1 once more, but on all three layers. Still stuck?",
    options: ["yes", "no: nearly all are right"], right: 1,
    shows: ({ lora }) => `${hundred(lora.right)}, with ${numbers(lora.size)} numbers. More layers did here what more rank did: the later ones make up for what the first one lacks.`,
    holds: ({ lora }) => lora.right > 0.95,
  }, {
    settings: { rank: 1, alpha: 1, change: "mirrored" },
    question: "Now the map is mirrored: left and right change places, up and down stay. Which rank is enough?",
    options: ["1", "2", "64"], right: 0,
    shows: ({ lora }) => `Rank 1, with ${numbers(lora.size)} numbers: ${hundred(lora.right)}. Undoing a mirror moves points left and right only: one direction (M − I has rank 1).`,
    holds: ({ lora }) => lora.right > 0.95,
  }, {
    settings: { optimiser: "gradient descent", fullRate: 0.1, loraRate: 0.1 },
    question: "Full fine-tuning may change the 4,096 numbers of layer 1 as it likes: its update could have rank 64. With plain gradient descent, how many of its 64 singular values will not be zero?",
    options: ["2", "about 20", "all 64"], right: 0, bars: 0,
    shows: (_, bars) => `Two. The third is ${bars.full[2].toExponential(0)}. A gradient is made of the inputs, and these span two directions: in this layer gradient descent can write no more, whatever the task. (Adam gives each number a step of its own, and so writes more.)`,
    holds: ({ full }, bars) => full.right > 0.9 && bars.full[1] > 0.05 * bars.full[0] && bars.full[2] < 1e-9 * bars.full[0],
  }] },
  stain: { title: "The stained lens", acts: [{
    settings: { ...digit, change: "stained" }, steps: 200,
    question: "The network reads handwritten digits. Somebody has smeared the lens, and it misreads half of them. Will an adapter of rank 1, with 330 numbers, repair that?",
    options: ["no", "partly: 70 of 100", "yes: more than 85 of 100"], right: 2,
    shows: ({ before, lora }) => `${hundred(lora.right)} are right, ${hundred(before.right)} before. The same stain lies on every picture, and one direction on each layer is enough for it. The pictures are not cleaned: the network takes the stain for granted, and reads ${hundred(lora.old)} through a clean lens. Draw a stain of your own, and train again.`,
    holds: ({ before, lora }) => lora.right > 0.87 && before.right < lora.right - 0.2,
  }] },
  rate: { title: "Which rate?", acts: [{
    settings: { layers: "123", fullRate: 1e-3, loraRate: 1e-3 }, steps: 100,
    question: "Both get the learning rate 0.001 and 100 steps. Full fine-tuning then gets 9 of 10 right. And LoRA, on all layers?",
    options: ["about the same", "two thirds", "less than half"], right: 2,
    shows: ({ full, lora }) => `Full fine-tuning ${hundred(full.right)}, LoRA ${hundred(lora.right)}. Judged at this rate alone, LoRA would seem not to work.`,
    holds: ({ full, lora }) => full.right > 0.88 && lora.right < 0.45,
  }, {
    settings: { layers: "123" }, steps: 100,
    question: "The same 100 steps, at ten times the rate for both, 0.01?",
    options: ["both fall apart", "LoRA is hardly better", "both get nine of ten or more"], right: 2,
    shows: ({ full, lora }) => `LoRA ${hundred(lora.right)}, full fine-tuning ${hundred(full.right)}. B starts at zero and A is small, so at a small rate LoRA hardly starts. Here the larger one suits both. On a language model LoRA's best rate was 9 to 14 times full fine-tuning's (lesson 12). So try several rates for each method before you compare.`,
    holds: ({ full, lora }) => lora.right > 0.9 && full.right > 0.9,
  }] },
  graded: { title: "Real pictures", acts: [{
    settings: { ...digit, change: "turned" },
    question: "Pictures of digits are turned by a quarter. Every pixel moves: a change of far higher rank than 2. How far does rank 1 get?",
    options: ["nowhere", "half of the way or more", "all of the way"], right: 1,
    shows: ({ before, full, lora }) => `From ${hundred(before.right)} to ${hundred(lora.right)}, where full fine-tuning gets ${hundred(full.right)}.`,
    holds: ({ before, full, lora }) => lora.right < full.right - 0.1 && lora.right > before.right + 0.3,
  }, {
    settings: { ...digit, change: "turned", rank: 16, alpha: 16 },
    question: "And rank 16?",
    options: ["the same", "nearly as far as full fine-tuning"], right: 1,
    shows: ({ full, lora }) => `${hundred(lora.right)}, full fine-tuning ${hundred(full.right)}. More directions bring it nearer. (On a network this small rank 16 trains 59 % of its numbers. On SmolLM2 it is 3.6 %.)`,
    holds: ({ full, lora }) => lora.right > full.right - 0.06,
  }] },
};
