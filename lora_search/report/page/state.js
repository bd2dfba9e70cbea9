// What the reader has chosen: one trial, and a filter. Every chart and the table follow.

const chosen = { trial: null, text: "", states: new Set(["completed", "stopped", "failed", "running"]), brushed: null };
const followers = [];
let kept = new Set(byNumber.keys());

/** Call `follow` whenever the choice changes. */
function onChoice(follow) {
  followers.push(follow);
}

function choose(changes) {
  Object.assign(chosen, changes);
  kept = new Set(data.trials.filter(passes).map((trial) => trial.trial));
  if (chosen.trial !== null && !byNumber.has(chosen.trial)) chosen.trial = null;
  for (const follow of followers) follow();
}

function select(number, { again = false } = {}) {
  choose({ trial: chosen.trial === number && again ? null : number });
}

/** Step through the trials that the filter keeps, best first. */
function stepSelection(by) {
  const placed = new Set(data.standing);
  const order = [...data.standing, ...data.trials.map((trial) => trial.trial).filter((trial) => !placed.has(trial))].filter((trial) => kept.has(trial));
  if (!order.length) return;
  const now = order.indexOf(chosen.trial);
  select(order[now < 0 ? (by > 0 ? 0 : order.length - 1) : (now + by + order.length) % order.length]);
}

const COMPARISON = /^([\w ./]+?)\s*(<=|>=|!=|=|<|>)\s*(.+)$/;

function passes(trial) {
  if (!chosen.states.has(trial.state)) return false;
  if (chosen.brushed && !chosen.brushed.has(trial.trial)) return false;
  return chosen.text.split(/[,;]/).every((term) => matches(trial, term.trim()));
}

/** `all-linear` is looked for in every cell; `rank>=16` compares a column. */
function matches(trial, term) {
  if (!term) return true;
  const found = COMPARISON.exec(term);
  const column = found && COLUMNS.find((known) => [known.name, known.label].some((name) => name.toLowerCase() === found[1].toLowerCase()));
  if (!column) return COLUMNS.some((known) => String(known.get(trial) ?? "").toLowerCase().includes(term.toLowerCase()));
  const value = column.get(trial);
  const wanted = found[3].trim();
  if (value === null || value === undefined) return false;
  const numbers = typeof value === "number" && wanted !== "" && !Number.isNaN(Number(wanted));
  const [a, b] = numbers ? [value, Number(wanted)] : [String(value).toLowerCase(), wanted.toLowerCase()];
  return { "<": a < b, ">": a > b, "<=": a <= b, ">=": a >= b, "=": a === b, "!=": a !== b }[found[2]];
}

/** Columns of the table of trials, which the filter knows by name. */
const COLUMNS = [
  { name: "trial", label: "trial", get: (trial) => trial.trial },
  { name: "state", label: "state", text: true, get: (trial) => trial.state },
  { name: "steps", label: "steps", get: (trial) => trial.steps },
  { name: metric.name, label: metric.label, get: (trial) => trial.value },
  ...data.columns.map(({ name, label }) => ({ name, label, text: data.trials.some((trial) => typeof trial.parameters[name] === "string"), get: (trial) => trial.parameters[name] })),
  { name: "trainable_parameters", label: "trainable parameters", get: (trial) => trial.trainable_parameters },
  { name: "tokens", label: "tokens", get: (trial) => trial.tokens },
  { name: "seconds", label: "trial-seconds", get: (trial) => trial.seconds },
  { name: "host", label: "host", text: true, get: (trial) => trial.host },
  ...(data.trials.some((trial) => trial.reason) ? [{ name: "reason", label: "reason", text: true, get: (trial) => trial.reason }] : []),
];
