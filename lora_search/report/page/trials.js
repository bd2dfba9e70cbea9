// What the trials did: the best so far, their curves, and where each lies in the space.

const SPENDING = [
  { label: "time since the start", ...timeUnit("time since the start", data.progress.end[0] ?? 0) },
  { label: "tokens trained", axis: "tokens trained, all trials", scale: 1 },
  { label: "optimiser steps", axis: "optimiser steps, all trials", scale: 1 },
  { label: "trial-seconds", axis: "seconds of training, all trials", scale: 1 },
];

function progressOption(kind) {
  const { reports, best: improvements, end } = data.progress;
  const { scale, axis: name } = SPENDING[kind];
  const line = improvements.map((point) => [point[kind] * scale, point[4]]);
  if (line.length) line.push([end[kind] * scale, line.at(-1)[1]]);
  return base({
    xAxis: axis(name, { min: 0, scale: false }),
    vertical: metricTitle,
    yAxis: axis(null),
    tooltip: { trigger: "item", formatter: (params) => {
      const trial = byNumber.get(params.data.trial);
      return trial ? tip(trial, [["this report", figure(params.data.value[1])]]) : "";
    } },
    series: [
      { id: "reports", type: "scatter", cursor: "pointer", data: reports.map((point) => {
        const trial = byNumber.get(point[5]);
        const look = mark(trial);
        const isChosen = point[5] === chosen.trial;
        return { value: [point[kind] * scale, point[4]], trial: point[5], symbol: SHAPES[trial.state], symbolSize: isChosen ? 10 : 5, itemStyle: { ...look.itemStyle, color: isChosen ? colour("best") : colour(trial.state), opacity: isChosen ? 1 : kept.has(point[5]) ? 0.55 : 0.06 } };
      }) },
      { id: "best", type: "line", step: "end", data: line, symbol: "none", silent: true, z: 4, lineStyle: { color: colour("best"), width: 2.5 } },
    ],
  });
}

function progressTable() {
  return {
    head: ["trial", "seconds since the start", "tokens", "optimiser steps", "trial-seconds", `best ${metric.label}`],
    rows: data.progress.best.map((point) => [point[5], point[0], point[1], point[2], point[3], point[4]]),
  };
}

function progressCharts() {
  const compute = { kind: 1 };
  const menu = element("select", { "aria-label": "Compute, measured in", onchange: () => { compute.kind = Number(menu.value); redraw(); } },
    ...[1, 2, 3].map((kind) => element("option", { value: kind }, SPENDING[kind].label)));
  const shared = { finding: data.findings.progress, table: progressTable, empty: !data.progress.best.length };
  return [
    chart({ ...shared, id: "best-time", title: "Best so far, over time", look: "A line that still falls at its right end says that more trials would help.", option: () => progressOption(0) }),
    chart({ ...shared, id: "best-compute", title: "Best so far, over compute", look: "The same, by what was spent; each mark is a report.", option: () => progressOption(compute.kind), options: [element("label", {}, "measured in ", menu)] }),
  ];
}

const lines = Object.entries(data.curves).map(([number, points]) => ({ trial: byNumber.get(Number(number)), points })).filter((line) => line.trial);

function extent(values) {
  const low = Math.min(...values);
  const high = Math.max(...values);
  const room = (high - low || Math.abs(high) || 1) * 0.04;
  return [low - room, high + room];
}

function curvesOption() {
  const steps = lines.flatMap((line) => line.points.map((point) => point[0]));
  const [low, high] = extent(lines.flatMap((line) => line.points.map((point) => point[1])));
  const stroke = ({ trial }) => {
    const isBest = trial.trial === best;
    const isChosen = trial.trial === chosen.trial;
    return {
      stroke: colour(isBest || isChosen ? "best" : trial.state), fill: "none", lineWidth: isChosen ? 3.5 : isBest ? 2.5 : 1.2,
      opacity: isChosen || isBest && kept.has(trial.trial) ? 1 : kept.has(trial.trial) ? (trial.state === "stopped" ? 0.5 : 0.75) : 0.05,
      lineDash: isChosen && !isBest ? [6, 3] : null,
    };
  };
  return base({
    xAxis: axis("optimiser steps", { min: 0, max: Math.max(...steps) * 1.02, scale: false, axisLabel: { showMaxLabel: false } }),
    vertical: metricTitle,
    yAxis: axis(null, { min: low, max: high, axisLabel: { showMinLabel: false, showMaxLabel: false } }),
    tooltip: { trigger: "item", formatter: pointTip },
    series: [
      {
        id: "curves", type: "custom", clip: true, cursor: "pointer", z: 2,
        data: lines.map((line) => ({ value: line.points.at(-1), trial: line.trial.trial, name: String(line.trial.trial) })),
        renderItem: (params, api) => {
          const line = lines[params.dataIndex];
          return { type: "polyline", shape: { points: line.points.map((point) => api.coord(point)) }, style: stroke(line), z2: line.trial.trial === best ? 5 : line.trial.trial === chosen.trial ? 6 : 1 };
        },
      },
      { id: "ends", ...points(lines.map((line) => ({ value: line.points.at(-1), trial: line.trial }))) },
    ],
  });
}

function curvesChart() {
  return chart({
    id: "curves", title: `${metric.label[0].toUpperCase()}${metric.label.slice(1)} of each trial`, wide: true, size: "tall", empty: !lines.length,
    look: "Look for lines that cross: a trial that was stopped early might have won later. A line ends with its trial's mark.",
    finding: data.findings.curves, option: curvesOption,
    table: () => ({ head: ["trial", "state", "step", metricTitle], rows: lines.flatMap((line) => line.points.map((point) => [line.trial.trial, line.trial.state, point[0], point[1]])) }),
  });
}

const dimensions = data.parameters.filter((parameter) => parameter.searched);
const passing = data.trials.filter((trial) => trial.value !== null);

function parallelOption() {
  const values = passing.map((trial) => trial.value);
  const axes = [
    ...dimensions.map((parameter) => ({
      name: short(parameter.label), type: parameter.scale === "category" ? "category" : parameter.scale === "log" ? "log" : "value",
      data: parameter.scale === "category" ? parameter.categories : undefined, scale: true,
    })),
    { name: "steps", type: "value", scale: true },
    { name: metric.label, type: "value", scale: true, inverse: metric.mode === "min" },
  ];
  const at = (trial) => [...dimensions.map((parameter) => { const value = trial.parameters[parameter.name]; return parameter.scale === "category" ? figure(value) : value; }), trial.steps, trial.value];
  const place = (value) => (Math.max(...values) - value) / (Math.max(...values) - Math.min(...values) || 1);
  const share = (trial) => (metric.mode === "min" ? place(trial.value) : 1 - place(trial.value));
  const wide = document.getElementById("parallel-chart").clientWidth > 620;
  return base({
    tooltip: { trigger: "item", formatter: pointTip },
    parallel: wide ? { left: 60, right: 90, top: 40, bottom: 24 } : { left: 26, right: 84, top: 16, bottom: 22, layout: "vertical" },
    parallelAxis: axes.map((one, dim) => ({
      ...one, dim, nameGap: wide ? 14 : 8, nameLocation: one.inverse ? "start" : "end", nameTextStyle: { color: colour("ink"), fontSize: wide ? 13 : 11, width: wide ? undefined : 76, overflow: "break" },
      axisLine: { lineStyle: { color: colour("muted") } }, axisTick: { show: false }, minorTick: { show: false },
      axisLabel: { color: colour("ink"), fontSize: 11, hideOverlap: true, textBorderColor: colour("surface"), textBorderWidth: 3, formatter: (value) => (typeof value === "number" ? figure(value) : short(value, 14)) },
      areaSelectStyle: { width: 18, borderColor: colour("accent"), color: colour("accent"), opacity: 0.25 },
    })),
    series: [{
      id: "parallel", type: "parallel", smooth: false, inactiveOpacity: 0.06, activeOpacity: 0.9, emphasis: { disabled: passing.length > 200, lineStyle: { width: 3 } },
      data: passing.map((trial) => ({
        value: at(trial), trial: trial.trial, name: String(trial.trial),
        lineStyle: {
          color: trial.trial === best || trial.trial === chosen.trial ? colour("best") : colour(trial.state), width: trial.trial === chosen.trial ? 4 : trial.trial === best ? 2.5 : 1.2,
          type: trial.state === "stopped" ? [5, 3] : "solid",
          opacity: trial.trial === chosen.trial ? 1 : kept.has(trial.trial) ? 0.25 + 0.7 * share(trial) : 0.04,
        },
      })),
    }],
  });
}

/** A brush on an axis is a filter, as if it were typed. */
function followBrushes(instance) {
  instance.on("axisareaselected", () => {
    const model = instance.getModel();
    const brushes = model.queryComponents({ mainType: "parallelAxis" }).some((one) => one.activeIntervals.length);
    const series = model.getSeriesByIndex(0);
    const inside = brushes ? new Set(series.getRawIndicesByActiveState("active").map((index) => passing[index].trial)) : null;
    choose({ brushed: inside });
  });
}

function parallelChart() {
  return chart({
    id: "parallel", title: "Every trial through the space", wide: true, size: "tall", empty: passing.length < 2 || !dimensions.length,
    look: "Good trials run to the top of the last axis, in the stronger lines; look for the values that they share. Stopped ones are dashed.",
    finding: data.findings.parallel, option: parallelOption, after: followBrushes,
    table: () => ({ head: ["trial", ...dimensions.map((parameter) => parameter.label), "steps", metric.label], rows: passing.map((trial) => [trial.trial, ...dimensions.map((parameter) => trial.parameters[parameter.name]), trial.steps, trial.value]) }),
  });
}
