// llama.cpp on a CPU, asked over standard input as `cpu_engines.py` says, for `benchmarks.cpu`:
//
//     node benchmarks/cpu_llamacpp.mjs FOLDER MODEL.gguf
//
// FOLDER is where `npm install --ignore-scripts node-llama-cpp` was run. That package brings llama.cpp
// built for each kind of CPU, and computes the sequences of a context as one batch.

import os from "node:os";
import path from "node:path";
import readline from "node:readline";
import {pathToFileURL} from "node:url";
import {readFileSync} from "node:fs";

const [folder, modelPath] = process.argv.slice(2);
const home = path.join(folder, "node_modules", "node-llama-cpp");
const {getLlama} = await import(pathToFileURL(path.join(home, "dist", "index.js")));
const answer = (fields) => process.stdout.write(JSON.stringify(fields) + "\n");

const threads = os.cpus().length;
const llama = await getLlama({
    gpu: false, build: "never", skipDownload: true, progressLogs: false, maxThreads: threads,
    logger: (level, message) => process.stderr.write(`${level}: ${message}\n`),
});
const model = await llama.loadModel({modelPath});

let context, many = 0, each = 0;
async function makeRoom(sequences, tokens) {  // the longest of them decides for all
    if (sequences <= many && tokens <= each) return;
    await context?.dispose();
    [many, each] = [Math.max(many, sequences), Math.max(each, tokens)];
    context = await model.createContext({
        sequences: many, contextSize: each, batchSize: 2048, threads: {ideal: threads, min: threads},
        flashAttention: true, swaFullCache: true, ignoreMemorySafetyChecks: true,
    });
}

async function complete(prompt, count) {
    const sequence = context.getSequence();
    let made = 0;
    try {
        for await (const _ of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true}))
            if (++made === count) break;
    } finally {
        await sequence.clearHistory();
        sequence.dispose();
    }
    return made;
}

const {version} = JSON.parse(readFileSync(path.join(home, "package.json"), "utf8"));
answer({release: `node-llama-cpp ${version}`});
for await (const line of readline.createInterface({input: process.stdin})) {
    const {prompts, outputs} = JSON.parse(line);
    const longest = Math.max(...prompts.map((prompt, i) => prompt.length + outputs[i]));
    await makeRoom(prompts.length, longest + 8);
    const began = performance.now();
    const lengths = await Promise.all(prompts.map((prompt, i) => complete(prompt, outputs[i])));
    const seconds = (performance.now() - began) / 1000;
    if (JSON.stringify(lengths) !== JSON.stringify(outputs))
        throw new Error(`llama.cpp gave outputs of ${lengths}, not of ${outputs}`);
    answer({seconds});
}
