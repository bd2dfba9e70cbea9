// The page from top to bottom.

/** With the digits that the command line shows. */
function loss(value) {
  return value.toFixed(4);
}

function figures() {
  const found = data.tested;
  const list = [];
  const add = (label, value, note) => list.push(element("div", {}, element("dt", {}, label), element("dd", {}, value, note ? element("small", {}, note) : null)));
  if (data.best) add(`Best ${metric.label}`, loss(data.best.value), `trial ${data.best.trial}${found && found.untrained_validation !== null && metric.name === "eval_loss" ? `; untrained base ${loss(found.untrained_validation)}` : ""}`);
  if (found && found.test !== null) {
    const interval = found.interval ? `95 % interval ${loss(found.interval[0])} to ${loss(found.interval[1])}` : "no interval recorded";
    add("Test loss, touched once", loss(found.test), `${found.trial === best ? "" : `of trial ${found.trial}; `}${interval}${found.untrained_test !== null ? `; untrained base ${loss(found.untrained_test)}` : ""}`);
  }
  if (found && found.merged !== null) add("Merged model", loss(found.merged), `validation loss${found.merged_onto ? `, merged onto the ${found.merged_onto} weights` : ""}`);
  const states = ["completed", "stopped", "failed", "running"].filter((state) => data.counts[state]).map((state) => `${data.counts[state]} ${state}`);
  add("Trials", `${data.trials.length} of ${data.planned}`, states.join(", "));
  if (data.savings.stopped) add("Steps saved", percent(data.savings.spared / (data.savings.spared + data.savings.done)), `${figure(data.savings.spared)} steps of stopped trials`);
  if (data.occupancy.times.length) add("Time", seconds(data.occupancy.times.at(-1)), data.occupancy.capacity === null ? "first start to last end" : `places taken: ${percent(Math.min(1, data.occupancy.mean / data.occupancy.capacity))}`);
  return element("dl", { class: "figures" }, ...list);
}

function bestCards() {
  if (!data.best) return null;
  const settings = element("dl", { class: "settings" });
  for (const [name, value] of data.best.settings) settings.append(element("dt", {}, name), element("dd", {}, value));
  return element("div", { class: "two" },
    element("section", { class: "card", "aria-labelledby": "best-title" }, element("h3", { id: "best-title" }, `Best configuration: trial ${data.best.trial}`), settings,
      element("button", { type: "button", onclick: () => select(data.best.trial, { again: true }) }, "Highlight in the charts")),
    element("section", { class: "card", "aria-labelledby": "next-title" }, element("h3", { id: "next-title" }, "What to do with it"), ...data.best.commands.map(command)));
}

function command({ what, command: line }) {
  const code = element("code", { tabindex: "0" }, line);
  const button = element("button", { type: "button", "aria-label": `Copy: ${what}`, onclick: async () => {
    const copied = await copy(line, code);
    button.textContent = copied ? "Copied" : "Press Ctrl+C";
    say(copied ? "Copied" : "Selected: press Ctrl+C");
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  } }, "Copy");
  return element("div", { class: "command" }, element("span", {}, what), element("div", {}, code, button));
}

/** Browsers keep the clipboard from some pages that were opened from disk: then the text is selected. */
async function copy(text, shown) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    getSelection().selectAllChildren(shown);
    return document.execCommand("copy");
  }
}

function advice() {
  if (!data.advice.length) return null;
  return element("section", { class: "card advice", "aria-labelledby": "advice-title" }, element("h3", { id: "advice-title" }, "What to try next"), element("ul", {}, ...data.advice.map((line) => element("li", {}, line))));
}

function provenance() {
  const open = (title, content) => element("details", {}, element("summary", {}, title), element("pre", { tabindex: "0" }, JSON.stringify(content, null, 2)));
  return element("section", { "aria-labelledby": "provenance-title" }, element("h2", { id: "provenance-title" }, "Where this is from"), element("div", { class: "card" },
    open("Provenance: versions, seeds, hosts, data", data.provenance), open("The resolved sweep file", data.sweep)));
}

function say(text) {
  document.getElementById("live").textContent = text;
}

function statusBar() {
  const text = element("span");
  const bar = element("div", { class: "chosen", hidden: true }, text, element("button", { type: "button", onclick: () => select(null) }, "Clear"));
  let before = null;
  onChoice(() => {
    const trial = chosen.trial === null ? null : byNumber.get(chosen.trial);
    bar.hidden = trial === null;
    text.textContent = trial === null ? "" : sentence(trial);
    if (chosen.trial !== before) say(trial === null ? "No trial is highlighted" : sentence(trial));
    before = chosen.trial;
  });
  return bar;
}

document.title = `${data.name}: lora-search report`;
document.documentElement.setAttribute("data-theme", themeName());
document.getElementById("top").append(
  element("div", { class: "bar" }, element("h1", {}, data.name), element("span", { class: `badge ${data.state}` }, data.state), themeButton()),
  element("p", { class: "headline", id: "headline" }, data.headline),
);
const section = (title, ...figuresOfIt) => [element("h2", {}, title), element("div", { class: "grid" }, ...figuresOfIt)];
document.getElementById("main").append(...[
  figures(),
  element("h2", {}, "The result"), bestCards(), data.best ? null : element("p", {}, "There is no best trial yet."), advice(),
  element("h2", {}, "The search"), legend(),
  element("div", { class: "grid" }, ...progressCharts(), curvesChart(), parallelChart()),
  ...section("What mattered", importanceChart(), savingsChart(), slicesChart()),
  ...section("What it cost", frontChart(), element("div", { class: "wide" }, occupancyChart())),
  trialTable(), provenance(),
  element("footer", {}, `Written ${data.made} by lora-search ${data.version}. Charts: Apache ECharts. This page fetches nothing.`),
].filter((part) => part !== null));
document.body.append(statusBar());
onChoice(redraw);
choose({});
startDrawing();
