// An HTTP server, a client of it that keeps its connections, and worker threads
// that count in shared memory.
const fs = require("fs");
const http = require("http");
const { Worker, isMainThread, workerData } = require("worker_threads");

const SHARED = "/shared";

function end(verdict) {
  fs.writeFileSync(`${SHARED}/verdict.new`, verdict);
  fs.renameSync(`${SHARED}/verdict.new`, `${SHARED}/verdict`);
  process.exit(0);
}

if (!isMainThread) {
  const words = new Int32Array(workerData);
  const { createHash } = require("crypto");
  const digest = () => {
    let text = "seed";
    for (let i = 0; i < 500; i++) text = createHash("sha256").update(text).digest("hex");
    return text;
  };
  const expected = digest();
  for (;;) {
    if (digest() !== expected) throw new Error("a worker computes something else");
    Atomics.add(words, 0, 1);
    Atomics.add(words, 1, -1);
    Atomics.notify(words, 0);
  }
}

process.on("uncaughtException", (error) => end(error.stack));
process.on("unhandledRejection", (error) => end(error.stack));

const shared = new SharedArrayBuffer(8);
const words = new Int32Array(shared);
const workers = [0, 1].map(() => new Worker(__filename, { workerData: shared }));
workers.forEach((worker) => worker.on("error", (error) => end(error.stack)));

const server = http.createServer((request, response) => {
  const parts = [];
  request.on("data", (part) => parts.push(part));
  request.on("end", () => response.end(Buffer.concat(parts)));
  // A connection that ends with a move is asked for again.
  request.on("error", () => {});
});

const agent = new http.Agent({ keepAlive: true, maxSockets: 4 });
const port = 8080;

function post(text) {
  return new Promise((resolve, reject) => {
    const request = http.request({ port, host: "127.0.0.1", method: "POST", agent }, (response) => {
      const parts = [];
      response.on("data", (part) => parts.push(part));
      response.on("end", () => resolve(Buffer.concat(parts).toString()));
      response.on("error", reject);
    });
    request.on("error", reject);
    request.end(text);
  });
}

async function ask(text) {
  const closed = ["ECONNRESET", "EPIPE", "ECONNABORTED"];
  for (;;) {
    try {
      return await post(text);
    } catch (error) {
      if (!closed.includes(error.code)) throw error;
    }
  }
}

async function main() {
  await new Promise((resolve) => server.listen(port, "127.0.0.1", resolve));
  for (let n = 0; !fs.existsSync(`${SHARED}/stop`); n++) {
    const texts = [0, 1, 2, 3].map((i) => `${n} ${i} `.repeat(200));
    const answers = await Promise.all(texts.map(ask));
    answers.forEach((answer, i) => {
      if (answer !== texts[i]) throw new Error(`${answer.length} bytes of another answer`);
    });
    const before = Atomics.load(words, 0);
    while (Atomics.load(words, 0) === before) await new Promise((go) => setTimeout(go, 1));
    fs.appendFileSync(`${SHARED}/rounds`, ".");
  }
  await Promise.all(workers.map((worker) => worker.terminate()));
  if (words[0] + words[1] > 2) throw new Error(`counted ${words[0]} up and ${-words[1]} down`);
  end("ok");
}

main();
