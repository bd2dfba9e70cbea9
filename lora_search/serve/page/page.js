// Two models' answers to one prompt. All text of models and runs goes through textContent: it may be anybody's.

const at = (id) => document.getElementById(id);
const sides = ["left", "right"];
let about = null;
let running = null;

const forms = {
  trained: "a prompt, as in training",
  chat: "a message of a chat",
  plain: "text, as it stands",
};

async function load() {
  const answer = await fetch("v1/models");
  if (!answer.ok) throw new Error(await faultOf(answer));
  const list = await answer.json();
  about = { models: new Map(list.data.map((model) => [model.id, model])), ...list.lora_search };
  at("about").textContent = `${about.run}: one base, ${about.models.size - 1} names of adapters. A chat is written by ${about.chat}.`;
  for (const [value, text] of Object.entries(forms)) {
    if (value === "trained" && about.format !== "prompt-completion") continue;
    at("form").append(new Option(text, value));
  }
  for (const side of sides) {
    for (const name of about.models.keys()) at(`model-${side}`).append(new Option(name, name));
    at(`model-${side}`).addEventListener("change", () => tellFacts(side));
  }
  const wanted = new URLSearchParams(location.search);
  choose("left", wanted.get("left") ?? "base");
  choose("right", wanted.get("right") ?? "best");
  if (wanted.has("prompt")) at("prompt").value = wanted.get("prompt");
}

function choose(side, name) {
  if (about.models.has(name)) at(`model-${side}`).value = name;
  tellFacts(side);
}

function tellFacts(side) {
  const facts = about.models.get(at(`model-${side}`).value).lora_search;
  const shown = facts.trial === undefined ? { base: facts.base } : facts;
  at(`facts-${side}`).textContent = Object.entries(shown)
    .filter(([name, value]) => value !== null && (name !== "base" || facts.trial === undefined))
    .map(([name, value]) => `${name.replaceAll("_", " ")} ${typeof value === "number" ? Number(value.toPrecision(4)) : value}`)
    .join(", ");
}

function requestFor(model) {
  const number = (id) => (at(id).value === "" ? undefined : Number(at(id).value));
  const shared = {
    model,
    temperature: number("temperature"),
    top_p: number("top_p"),
    max_tokens: number("max_tokens"),
    seed: number("seed"),
    stream: true,
    stream_options: { include_usage: true },
  };
  const text = at("prompt").value;
  if (at("form").value === "chat") {
    return ["v1/chat/completions", { ...shared, messages: [{ role: "user", content: text }] }];
  }
  const prompt = at("form").value === "trained" ? about.template.replaceAll("{prompt}", () => text) : text;
  return ["v1/completions", { ...shared, prompt }];
}

async function ask(side, signal) {
  const [path, body] = requestFor(at(`model-${side}`).value);
  const out = at(`answer-${side}`);
  const started = performance.now();
  try {
    const answer = await fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal,
    });
    if (!answer.ok) throw new Error(await faultOf(answer));
    let reason = null;
    let usage = null;
    for await (const piece of events(answer.body)) {
      if (piece.error) throw new Error(piece.error.message);
      usage = piece.usage ?? usage;
      for (const choice of piece.choices) {
        out.textContent += choice.text ?? choice.delta?.content ?? "";
        reason = choice.finish_reason ?? reason;
      }
    }
    const seconds = (performance.now() - started) / 1000;
    const ended = reason === "length" ? "cut off at the longest answer" : "ended by itself";
    at(`usage-${side}`).textContent =
      `${usage.prompt_tokens} tokens read, ${usage.completion_tokens} written, ${ended}, ${seconds.toFixed(1)} s with waiting`;
    return out.textContent;
  } catch (error) {
    if (error.name === "AbortError") {
      at(`usage-${side}`).textContent = "stopped";
    } else {
      out.classList.add("fault");
      out.textContent = error.message;
    }
    return null;
  }
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    for (let end = held.indexOf("\n\n"); end >= 0; end = held.indexOf("\n\n")) {
      const data = held.slice(0, end).replace(/^data: /, "");
      held = held.slice(end + 2);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function faultOf(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `the server answered ${answer.status}`;
  }
}

async function askBoth() {
  running?.abort();
  const mine = (running = new AbortController());
  for (const side of sides) {
    at(`answer-${side}`).textContent = "";
    at(`answer-${side}`).classList.remove("fault");
    at(`usage-${side}`).textContent = "waiting";
  }
  at("verdict").textContent = "";
  at("stop").disabled = false;
  const [left, right] = await Promise.all(sides.map((side) => ask(side, mine.signal)));
  if (running !== mine) return;
  running = null;
  at("stop").disabled = true;
  if (left !== null && right !== null) {
    at("verdict").textContent = left === right ? "Both answers are the same." : "The answers differ.";
  }
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (about) askBoth();
});
at("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});

load().catch((error) => {
  at("about").textContent = `The models could not be loaded: ${error.message}`;
});
