// One chart: its title, what to look for, the picture, what was found, and the same as a table.

const charts = [];

/**
 * A figure whose picture `option()` describes, in ECharts' terms, whenever the choice or the theme changes.
 * `table` gives {head, rows}, the text alternative; `options` are controls above the picture.
 */
function chart({ id, title, look, finding, option, table, size = "", wide = false, options = [], empty = false, after = () => {} }) {
  const made = element("figure", { class: `card${wide ? " wide" : ""}`, id }, element("h3", { id: `${id}-title` }, title), element("p", { class: "look" }, look));
  if (empty) {
    made.append(element("p", { class: "nothing" }, "Nothing to draw yet."), element("figcaption", {}, finding));
    return made;
  }
  if (options.length) made.append(element("div", { class: "options" }, ...options));
  made.append(picture(id, `${title}. ${finding}`, option, size, after), element("figcaption", {}, finding), tableBelow(table, title));
  return made;
}

/** The picture alone, which arrow keys step through. */
function picture(id, label, option, size = "", after = () => {}) {
  const place = element("div", {
    class: `chart ${size}`, id: `${id}-chart`, role: "img", tabindex: "0",
    "aria-label": `${label} Left and right arrow keys step through the trials, Escape ends.`,
    onkeydown: (event) => {
      if (event.key === "ArrowRight" || event.key === "ArrowLeft") stepSelection(event.key === "ArrowRight" ? 1 : -1);
      else if (event.key === "Escape") select(null);
      else return;
      event.preventDefault();
    },
  });
  charts.push({ id, place, option, after, instance: null });
  return place;
}

function tableBelow(table, title) {
  const details = element("details", {}, element("summary", {}, "As a table"));
  details.addEventListener("toggle", () => {
    if (!details.open || details.children.length > 1) return;
    const { head, rows } = table();
    details.append(element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": title }, element("table", {},
      element("thead", {}, element("tr", {}, ...head.map((cell) => element("th", { scope: "col" }, cell)))),
      element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map((cell) => element("td", {}, figure(cell)))))))));
  });
  return details;
}

const GRID = { left: 12, right: 26, top: 28, bottom: 30, containLabel: true };

/** What every chart has; `vertical` says what its vertical axis shows. */
function base({ vertical, ...extra }) {
  return {
    title: vertical ? { text: vertical, left: 2, top: 3, padding: 0, textStyle: { fontSize: 12, fontWeight: "normal", color: colour("muted") } } : undefined,
    animation: false,
    textStyle: { fontFamily: getComputedStyle(document.body).fontFamily, color: colour("ink") },
    grid: GRID,
    ...extra,
    tooltip: {
      confine: true, transitionDuration: still ? 0 : 0.15, backgroundColor: colour("surface"), borderColor: colour("line"),
      textStyle: { color: colour("ink"), fontSize: 13 }, ...extra.tooltip,
    },
  };
}

/** An axis of numbers; a vertical one has no name, which `base` writes over it. */
function axis(name, extra = {}) {
  return {
    type: "value", name: name ?? "", nameLocation: "middle", nameGap: 28, scale: true,
    nameTextStyle: { color: colour("muted"), fontSize: 12 },
    axisLine: { onZero: false, lineStyle: { color: colour("line") } }, axisTick: { show: false },
    splitLine: { lineStyle: { color: colour("grid") } },
    ...extra,
    axisLabel: { color: colour("muted"), fontSize: 12, hideOverlap: true, formatter: name ? brief : (value) => figure(value), ...extra.axisLabel },
  };
}

/** Scatter of trials; each point's data is {value, trial}. */
function points(rows, extra = {}) {
  return {
    type: "scatter", cursor: "pointer", z: 3, ...extra,
    data: rows.map(({ value, trial }) => ({ value, name: String(trial.trial), trial: trial.trial, ...mark(trial) })),
  };
}

function pointTip(params) {
  const trial = params.data && byNumber.get(params.data.trial);
  return trial ? tip(trial) : "";
}

function draw(one) {
  if (!one.instance) {
    one.instance = echarts.init(one.place, null, { renderer: "svg" });
    one.instance.on("click", (params) => { if (params.data && params.data.trial !== undefined) select(params.data.trial, { again: true }); });
    one.after(one.instance);
  }
  one.instance.setOption(one.option(), { notMerge: false, replaceMerge: ["series"], lazyUpdate: false });
}

let seen = null;

/** Charts are drawn when they come near the window: the page is there at once, however many trials it has. */
function startDrawing() {
  seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const one = charts.find((known) => known.place === entry.target);
      one.near = entry.isIntersecting;
      if (one.near && one.stale !== false) { one.stale = false; draw(one); }
    }
  }, { rootMargin: "300px" });
  for (const one of charts) seen.observe(one.place);
  new ResizeObserver(() => { for (const one of charts) if (one.instance) one.instance.resize(); }).observe(document.getElementById("main"));
}

function redraw() {
  for (const one of charts) {
    if (one.near || printing) { one.stale = false; draw(one); } else one.stale = true;
  }
}

/** On paper: light, one column, and every chart drawn for that width. */
function print(begins) {
  printing = begins;
  document.documentElement.classList.toggle("printing", begins);
  applyTheme();
  for (const one of charts) if (one.instance) one.instance.resize();
}
addEventListener("beforeprint", () => print(true));
addEventListener("afterprint", () => print(false));
