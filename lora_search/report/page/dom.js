// The document, elements, and numbers as people read them. Text of a run goes into the page as text alone.

const data = JSON.parse(document.getElementById("document").textContent);
const metric = data.metric;
const metricTitle = metric.unit ? `${metric.label}, ${metric.unit}` : metric.label;
const byNumber = new Map(data.trials.map((trial) => [trial.trial, trial]));
const best = data.best ? data.best.trial : null;

/** An element with attributes and children; strings become text. */
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Text cut to a length that an axis has room for. */
function short(text, length = 18) {
  const whole = String(text);
  return whole.length > length ? `${whole.slice(0, length - 1)}…` : whole;
}

function figure(value) {
  if (value === null || value === undefined || value === "") return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  return size >= 1e-4 && size < 1e6 ? String(Number(value.toPrecision(4))) : value.toExponential(2).replace(/\.?0+e/, "e");
}

/** 40960 as 41k, for axes. */
function brief(value) {
  const size = Math.abs(value);
  for (const [unit, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= unit) return `${Number((value / unit).toPrecision(3))}${letter}`;
  }
  return String(Number(value.toPrecision(3)));
}

/** The unit in which a stretch of time is drawn. */
function timeUnit(what, length) {
  const [unit, scale] = length > 7200 ? ["hours", 1 / 3600] : length > 180 ? ["minutes", 1 / 60] : ["seconds", 1];
  return { axis: `${what}, ${unit}`, scale };
}

function seconds(value) {
  if (value < 120) return `${Math.round(value)} s`;
  const minutes = Math.round(value / 60);
  return minutes < 120 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function bytes(value) {
  return value >= 1e9 ? `${(value / 1e9).toFixed(2)} GB` : `${(value / 1e6).toFixed(0)} MB`;
}

function percent(value) {
  return `${Math.round(100 * value)} %`;
}

/** A trial in one line, for the status bar and for screen readers. */
function sentence(trial) {
  const settings = data.parameters.map((parameter) => `${parameter.label} ${figure(trial.parameters[parameter.name])}`);
  const value = trial.value === null ? "no value" : `${metric.label} ${figure(trial.value)}`;
  return [`Trial ${trial.trial}${trial.trial === best ? ", the best" : ""}: ${trial.state} at step ${figure(trial.steps)}`, value, ...settings].join(", ");
}

/** What a chart shows beside the pointer. */
function tip(trial, rows = []) {
  const list = element("dl");
  const all = [...rows, ["state", `${trial.state}, step ${figure(trial.steps)}`], [metric.label, figure(trial.value)]];
  for (const parameter of data.parameters) all.push([parameter.label, figure(trial.parameters[parameter.name])]);
  if (trial.reason) all.push(["reason", trial.reason]);
  for (const [label, value] of all) list.append(element("dt", {}, short(label, 40)), element("dd", {}, short(value, 120)));
  return element("div", { class: "tip" }, element("b", {}, `Trial ${trial.trial}${trial.trial === best ? " (best)" : ""}`), list);
}
