// What llama.cpp makes of GGUF files, for tests/guards/test_llama_cpp.py:
//
//     node llama_cpp.mjs NODE_MODULES REQUEST.json
//
// The request is a list of runs: {model, adapter, scale, texts, prompt, forced, logits}. Printed as JSON is, for each run:
// the token ids of each text, and the text of these; as many tokens after the prompt as there are logits to compare, each
// the one of the largest logit; and the file's chat template. The logits after the prompt and after each forced token go
// to the file `logits`, as float32. With more than one thread, llama.cpp is many times slower on a busy machine.

import fs from "node:fs";
import path from "node:path";
import {pathToFileURL} from "node:url";

const [folder, request] = process.argv.slice(2);
const {getLlama} = await import(pathToFileURL(path.join(folder, "node-llama-cpp", "dist", "index.js")));
const llama = await getLlama({build: "never", gpu: false, maxThreads: 1, logLevel: "error"});
const runs = [];
for (const run of JSON.parse(fs.readFileSync(request, "utf-8"))) {
    const model = await llama.loadModel({modelPath: run.model, ignoreMemorySafetyChecks: true});
    const context = await model.createContext({
        contextSize: run.prompt.length + run.forced.length + 8,
        flashAttention: false,
        experimentalKvCacheKeyType: "F32",
        experimentalKvCacheValueType: "F32",
        ignoreMemorySafetyChecks: true,
        lora: run.adapter ? {adapters: [{filePath: run.adapter, scale: run.scale}]} : undefined
    });
    const sequence = context.getSequence();
    const greedy = [];
    for await (const token of sequence.evaluate(run.prompt, {temperature: 0, yieldEogToken: true})) {
        greedy.push(token);
        if (greedy.length > run.forced.length)
            break;
    }
    await sequence.clearHistory();
    const inputs = [...run.prompt, ...run.forced].map(
        (token, i) => i < run.prompt.length - 1 ? token : [token, {generateNext: {logits: true, options: {temperature: 0}}}]
    );
    const results = (await sequence.controlledEvaluate(inputs)).filter((result) => result?.next?.logits);
    const rows = new Float32Array(results.length * model.fileInfo.metadata.tokenizer.ggml.tokens.length);
    results.forEach((result, row) => {
        for (const [token, logit] of result.next.logits)
            rows[row * rows.length / results.length + token] = logit;
    });
    fs.writeFileSync(run.logits, Buffer.from(rows.buffer));
    runs.push({
        ids: run.texts.map((text) => model.tokenize(text, true)),
        texts: run.texts.map((text) => model.detokenize(model.tokenize(text, true), true)),
        greedy,
        template: model.fileInfo.metadata.tokenizer.chat_template ?? null
    });
    await model.dispose();
}
process.stdout.write(JSON.stringify(runs));
await llama.dispose();
