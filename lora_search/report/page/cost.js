// What it cost: size and memory, what was stopped, how full the hosts were.

const COSTS = {
  trainable_parameters: { label: "trainable parameters", show: brief },
  trial_memory_bytes: { label: "memory of the trial", show: bytes },
};

function frontOption(cost) {
  const rows = data.trials.filter((trial) => trial.value !== null && trial[cost] !== null && trial.state !== "failed");
  const front = data.fronts[cost].map((number) => byNumber.get(number));
  const spread = rows.map((trial) => trial[cost]);
  const isLog = Math.min(...spread) > 0 && Math.max(...spread) / Math.min(...spread) > 8;
  return base({
    xAxis: axis(COSTS[cost].label, { type: isLog ? "log" : "value", axisLabel: { formatter: COSTS[cost].show }, splitNumber: 4 }),
    vertical: metricTitle,
    yAxis: axis(null),
    tooltip: { trigger: "item", formatter: (params) => {
      const trial = params.data && byNumber.get(params.data.trial);
      return trial ? tip(trial, [["trainable parameters", figure(trial.trainable_parameters)], ["memory of the trial", trial.trial_memory_bytes === null ? "–" : bytes(trial.trial_memory_bytes)], ["on the front", data.fronts[cost].includes(trial.trial) ? "yes" : "no"]]) : "";
    } },
    series: [
      { id: "trials", ...points(rows.map((trial) => ({ value: [trial[cost], trial.value], trial }))) },
      { id: "front", type: "line", step: "end", silent: true, symbol: "none", z: 1, data: front.map((trial) => [trial[cost], trial.value]), lineStyle: { color: colour("best"), width: 2, type: "dashed" } },
    ],
  });
}

function frontChart() {
  const made = element("figure", { class: "card wide", id: "front" }, element("h3", {}, "Quality against size and memory"),
    element("p", { class: "look" }, "The dashed line is the Pareto front: where it is flat, a smaller adapter does as well."));
  const costs = Object.keys(COSTS).filter((cost) => data.fronts[cost].length);
  if (!costs.length) made.append(element("p", { class: "nothing" }, "Nothing to draw yet."));
  else made.append(element("div", { class: "panels" }, ...costs.map((cost) => picture(`front-${cost}`, `${metric.label} against ${COSTS[cost].label}. ${data.findings.front}`, () => frontOption(cost)))));
  made.append(element("figcaption", {}, data.findings.front));
  if (costs.length) made.append(tableBelow(() => ({ head: ["trial", metricTitle, "trainable parameters", "memory of the trial, bytes", "on the front"], rows: data.trials.filter((trial) => trial.value !== null).map((trial) => [trial.trial, trial.value, trial.trainable_parameters, trial.trial_memory_bytes, costs.filter((cost) => data.fronts[cost].includes(trial.trial)).map((cost) => COSTS[cost].label).join(", ") || "no"]) }), "Quality against size and memory"));
  return made;
}

function savingsOption() {
  const { rungs } = data.savings;
  const bar = (id, name, tone) => ({ id, name, type: "bar", stack: "trials", barMaxWidth: 48, data: rungs.map((rung) => rung[id]), itemStyle: { color: colour(tone) }, label: { show: true, color: colour("surface"), fontWeight: 600, formatter: (params) => (params.value ? params.value : "") } });
  return base({
    legend: { top: 0, right: 0, textStyle: { color: colour("muted") }, itemWidth: 12, itemHeight: 12, selectedMode: false },
    xAxis: { type: "category", data: rungs.map((rung) => `step ${rung.step}`), axisTick: { show: false }, axisLine: { lineStyle: { color: colour("line") } }, axisLabel: { color: colour("muted") } },
    vertical: "trials that came so far",
    yAxis: axis(null, { scale: false, minInterval: 1 }),
    tooltip: { trigger: "axis", axisPointer: { type: "none" }, formatter: (params) => element("div", { class: "tip" }, element("b", {}, params[0].axisValue), params.map((one) => `${one.value} ${one.seriesName}`).join(", ")) },
    series: [bar("went_on", "went on", "completed"), bar("stopped", "stopped", "stopped")],
  });
}

function savingsChart() {
  return chart({
    id: "savings", title: "What the scheduler stopped", empty: !data.savings.rungs.length,
    look: "Each bar is a step at which trials were stopped.", finding: `${data.findings.savings} ${data.findings.early}`.trim(), option: savingsOption,
    table: () => ({ head: ["step", "went on", "stopped"], rows: data.savings.rungs.map((rung) => [rung.step, rung.went_on, rung.stopped]) }),
  });
}

const MOST_HOSTS = 8;
const HOST_TONES = ["#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#76b7b2", "#edc948", "#9c755f", "#e15759"];

function occupancyOption() {
  const { times, hosts, capacity } = data.occupancy;
  const total = { name: `${hosts.length} hosts`, resident: times.map((_, index) => hosts.reduce((sum, host) => sum + host.resident[index], 0)) };
  const shown = hosts.length > MOST_HOSTS ? [total] : hosts;
  const last = times.at(-1);
  const { axis: name, scale } = timeUnit("time since the first trial began", last);
  return base({
    legend: { top: 0, right: 0, type: "scroll", width: "70%", textStyle: { color: colour("muted") }, itemWidth: 12, itemHeight: 12, icon: "roundRect", formatter: (name) => short(name, 24) },
    xAxis: axis(name, { min: 0, max: last * scale, scale: false, axisLabel: { showMaxLabel: false } }),
    vertical: "trials",
    yAxis: axis(null, { scale: false, minInterval: 1, max: capacity === null ? null : (extremes) => Math.ceil(Math.max(extremes.max, capacity) * 1.1) }),
    tooltip: { trigger: "axis", formatter: (params) => element("div", { class: "tip" }, element("b", {}, seconds(params[0].value[0] / scale)), ...params.map((one) => element("div", {}, `${short(one.seriesName, 40)}: ${figure(one.value[1])} trials`))) },
    series: shown.map((host, index) => ({
      id: `host-${index}`, name: host.name, type: "line", step: "end", stack: "hosts", symbol: "none",
      lineStyle: { width: 0 }, itemStyle: { color: HOST_TONES[index] }, areaStyle: { color: HOST_TONES[index], opacity: 0.75 },
      data: times.map((time, point) => [time * scale, host.resident[point]]),
      markLine: index === 0 && capacity !== null ? { silent: true, symbol: "none", data: [{ yAxis: capacity }], lineStyle: { color: colour("ink"), type: "dashed" }, label: { formatter: `${capacity} places`, position: "insideEndTop", color: colour("muted") } } : undefined,
    })),
  });
}

function occupancyChart() {
  return chart({
    id: "occupancy", title: "GPU occupancy: how full the hosts were", empty: !data.occupancy.times.length,
    look: "Trials resident on each host (a GPU, or a share of the cores); gaps under the dashed line are idle places.",
    finding: `${data.findings.occupancy} A trial's time begins with its start, before its first step.`, option: occupancyOption,
    table: () => ({ head: ["host", "places", "trials on average"], rows: data.occupancy.hosts.map((host) => [host.name, host.capacity, host.mean]) }),
  });
}
