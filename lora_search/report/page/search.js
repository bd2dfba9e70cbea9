// What the outcome hung on: importance, and a slice for each parameter.

function importanceOption() {
  const entries = [...data.importance].reverse();
  return base({
    grid: { ...GRID, left: 20, top: 8 },
    xAxis: axis("share of the importance", { min: 0, max: 1, scale: false, axisLabel: { formatter: (value) => percent(value) } }),
    yAxis: { type: "category", data: entries.map((entry) => entry.label), axisLine: { lineStyle: { color: colour("line") } }, axisTick: { show: false }, axisLabel: { color: colour("ink"), fontSize: 13, formatter: (value) => short(value, 20) } },
    tooltip: { trigger: "axis", axisPointer: { type: "none" }, formatter: (params) => {
      const entry = entries[params[0].dataIndex];
      return element("div", { class: "tip" }, element("b", {}, entry.label), `${percent(entry.share)}; 90 % interval ${percent(entry.low)} to ${percent(entry.high)}. In ${percent(entry.chance)} of shuffled standings it came to as much.`);
    } },
    series: [
      { id: "share", type: "bar", barMaxWidth: 22, data: entries.map((entry) => ({ value: entry.share, itemStyle: { color: colour("completed"), opacity: entry.chance <= 0.05 ? 1 : 0.35, borderRadius: [0, 3, 3, 0] } })) },
      {
        id: "interval", type: "custom", silent: true, z: 5, data: entries.map((entry, index) => [entry.low, index, entry.high]),
        renderItem: (params, api) => {
          const [x1, y] = api.coord([api.value(0), api.value(1)]);
          const [x2] = api.coord([api.value(2), api.value(1)]);
          const line = (a, b, c, d) => ({ type: "line", shape: { x1: a, y1: b, x2: c, y2: d }, style: { stroke: colour("ink"), lineWidth: 1.6 } });
          return { type: "group", children: [line(x1, y, x2, y), line(x1, y - 5, x1, y + 5), line(x2, y - 5, x2, y + 5)] };
        },
      },
    ],
  });
}

function importanceChart() {
  return chart({
    id: "importance", title: "Which parameters mattered", empty: !data.importance.length,
    look: "The line over a bar is its 90 % interval; a pale bar is no more than chance would give.",
    finding: `${data.findings.importance} By PED-ANOVA: how differently the best third of the trials (a tenth of many) is spread over a parameter's values. ${data.findings.standing}.`,
    option: importanceOption,
    table: () => ({ head: ["parameter", "share", "5 %", "95 %", "chance of as much"], rows: data.importance.map((entry) => [entry.label, entry.share, entry.low, entry.high, entry.chance]) }),
  });
}

const slicing = { step: data.compared.usual };

/** A trial's value at the step that is compared. */
function valueAt(trial) {
  return (data.compared.values[trial.trial] ?? {})[slicing.step];
}

/** The same place for a trial each time, so that marks of one category do not hide each other. */
function shifted(number) {
  const fraction = (Math.imul(number + 1, 2654435761) >>> 0) / 2 ** 32;
  return (fraction - 0.5) * 0.5;
}

function sliceOption(parameter) {
  const rows = data.trials.filter((trial) => valueAt(trial) !== undefined && trial.parameters[parameter.name] !== null && trial.parameters[parameter.name] !== undefined);
  const isCategory = parameter.scale === "category";
  const at = (trial) => (isCategory ? parameter.categories.indexOf(figure(trial.parameters[parameter.name])) + shifted(trial.trial) : trial.parameters[parameter.name]);
  const all = data.trials.flatMap((trial) => (valueAt(trial) === undefined ? [] : [valueAt(trial)]));
  const [low, high] = extent(all);
  const means = isCategory ? parameter.categories.map((_, index) => middle(rows.filter((trial) => figure(trial.parameters[parameter.name]) === parameter.categories[index]).map(valueAt))) : [];
  const horizontal = isCategory
    ? { min: -0.6, max: parameter.categories.length - 0.4, interval: 1, axisLabel: { customValues: parameter.categories.map((_, index) => index), hideOverlap: parameter.categories.length > 6, formatter: (value) => short(parameter.categories[value] ?? "", 14) }, splitLine: { show: false } }
    : { type: parameter.scale === "log" ? "log" : "value", axisLabel: { formatter: figure } };
  return base({
    xAxis: axis(short(parameter.label, 40), horizontal),
    vertical: `${metric.label} at step ${figure(slicing.step)}`,
    yAxis: axis(null, { min: low, max: high, axisLabel: { showMinLabel: false, showMaxLabel: false } }),
    tooltip: { trigger: "item", formatter: (params) => {
      const trial = params.data && byNumber.get(params.data.trial);
      return trial ? tip(trial, [[`at step ${slicing.step}`, figure(params.data.value[1])]]) : "";
    } },
    series: [
      { id: "trials", ...points(rows.map((trial) => ({ value: [at(trial), valueAt(trial)], trial }))) },
      {
        id: "middle", type: "custom", silent: true, z: 1, data: means.map((value, index) => [index, value]).filter((pair) => pair[1] !== null),
        renderItem: (params, api) => {
          const [x1, y] = api.coord([api.value(0) - 0.35, api.value(1)]);
          const [x2] = api.coord([api.value(0) + 0.35, api.value(1)]);
          return { type: "line", shape: { x1, y1: y, x2, y2: y }, style: { stroke: colour("muted"), lineWidth: 2 } };
        },
      },
    ],
  });
}

function middle(values) {
  if (!values.length) return null;
  const sorted = [...values].sort((a, b) => a - b);
  const half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

function slicesChart() {
  const made = element("figure", { class: "card wide", id: "slices" }, element("h3", {}, "Slices: each parameter by itself"),
    element("p", { class: "look" }, "Look for a slope, or for values that only bad trials have. A grey bar is a category's median."));
  if (!data.parameters.length || slicing.step === null) {
    made.append(element("p", { class: "nothing" }, "Nothing to draw yet."), element("figcaption", {}, data.findings.slices));
    return made;
  }
  const menu = element("select", { id: "slice-step", onchange: () => { slicing.step = Number(menu.value); redraw(); } },
    ...data.compared.steps.map(({ step, trials }) => element("option", { value: step, selected: step === slicing.step }, `step ${step} (${trials} trials)`)));
  made.append(element("div", { class: "options" }, element("label", {}, "compared at ", menu)),
    element("div", { class: "panels" }, ...data.parameters.map((parameter, index) => picture(`slice-${index}`, `${metric.label} by ${parameter.label}.`, () => sliceOption(parameter), "short"))));
  const fixed = data.fixed.length ? ` The same in all trials: ${data.fixed.map(([name, value]) => `${name} ${value}`).join(", ")}.` : "";
  made.append(element("figcaption", {}, data.findings.slices + fixed), tableBelow(() => ({
    head: ["trial", ...data.parameters.map((parameter) => parameter.label), ...data.compared.steps.map(({ step }) => `at step ${step}`)],
    rows: data.trials.map((trial) => [trial.trial, ...data.parameters.map((parameter) => trial.parameters[parameter.name]), ...data.compared.steps.map(({ step }) => (data.compared.values[trial.trial] ?? {})[step])]),
  }), "Slices"));
  return made;
}
