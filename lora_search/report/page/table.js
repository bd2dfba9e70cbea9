// All trials: sorted by any column, filtered by words and comparisons.

const MOST_ROWS = 500;

function trialTable() {
  const sorting = { column: COLUMNS.findIndex((column) => column.name === metric.name), down: metric.mode === "max", all: false };
  const head = element("tr");
  const body = element("tbody");
  const told = element("span", { id: "shown", role: "status" });
  const more = element("button", { type: "button", hidden: true, onclick: () => { sorting.all = true; fill(); } }, "Show all");

  function ordered() {
    const { get } = COLUMNS[sorting.column];
    const sign = sorting.down ? -1 : 1;
    return data.trials.filter((trial) => kept.has(trial.trial)).sort((a, b) => {
      const [x, y] = [get(a) ?? null, get(b) ?? null];
      if (x === null || y === null) return (x === null) - (y === null) || a.trial - b.trial;
      const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
      return sign * order || a.trial - b.trial;
    });
  }

  function row(trial) {
    const classes = [trial.trial === best && "best", trial.trial === chosen.trial && "selected"].filter(Boolean).join(" ");
    return element("tr", { class: classes || null, "data-trial": trial.trial, onclick: () => select(trial.trial, { again: true }) }, ...COLUMNS.map((column) => {
      const value = column.get(trial);
      if (column.name === "trial") {
        return element("td", {}, element("button", { type: "button", "aria-pressed": String(trial.trial === chosen.trial), "aria-label": `Trial ${trial.trial}: highlight in the charts`, onclick: (event) => { event.stopPropagation(); select(trial.trial, { again: true }); } }, String(trial.trial)));
      }
      if (column.name === "state") return element("td", { class: "text" }, element("span", { class: `state ${trial.state}` }, trial.state));
      return element("td", { class: column.text ? "text" : null, title: column.text && value ? value : null }, figure(value));
    }));
  }

  function fill() {
    const rows = ordered();
    const shown = sorting.all ? rows : rows.slice(0, MOST_ROWS);
    const focused = document.activeElement?.closest?.("#trials tbody tr")?.dataset.trial;
    body.replaceChildren(...shown.map(row));
    if (focused !== undefined) body.querySelector(`tr[data-trial="${focused}"] button`)?.focus({ preventScroll: true });
    told.textContent = `${rows.length} of ${data.trials.length} trials${shown.length < rows.length ? `, the first ${shown.length} shown` : ""}`;
    more.hidden = shown.length === rows.length;
    for (const [index, cell] of [...head.children].entries()) {
      cell.setAttribute("aria-sort", index === sorting.column ? (sorting.down ? "descending" : "ascending") : "none");
    }
  }

  COLUMNS.forEach((column, index) => head.append(element("th", { scope: "col", class: column.text ? "text" : null }, element("button", { type: "button", onclick: () => {
    sorting.down = sorting.column === index ? !sorting.down : false;
    sorting.column = index;
    fill();
  } }, short(column.label, 28)))));
  onChoice(fill);
  return element("section", { id: "trials", "aria-labelledby": "trials-title" }, element("h2", { id: "trials-title" }, "All trials"), element("div", { class: "card" }, filters(told, more),
    element("div", { class: "scroll trials", tabindex: "0", role: "region", "aria-label": "Table of all trials" }, element("table", {}, element("thead", {}, head), body))));
}

function filters(told, more) {
  const search = element("input", { type: "search", id: "filter", placeholder: "all-linear, rank>=16", "aria-label": "Filter: words, or comparisons such as rank>=16; commas between them", oninput: () => choose({ text: search.value }) });
  const boxes = ["completed", "stopped", "failed", "running"].filter((state) => data.counts[state]).map((state) => {
    const box = element("input", { type: "checkbox", checked: true, onchange: () => {
      const states = new Set(chosen.states);
      if (box.checked) states.add(state); else states.delete(state);
      choose({ states });
    } });
    return element("label", {}, box, `${state} (${data.counts[state]})`);
  });
  const clear = element("button", { type: "button", onclick: () => {
    search.value = "";
    for (const box of document.querySelectorAll('#trials input[type="checkbox"]')) box.checked = true;
    for (const one of charts) if (one.id === "parallel" && one.instance) { one.instance.clear(); one.instance.setOption(one.option()); }
    choose({ text: "", brushed: null, trial: null, states: new Set(["completed", "stopped", "failed", "running"]) });
  } }, "Clear");
  return element("div", { class: "filters" }, element("label", { class: "wide" }, "Filter ", search), ...boxes, clear, told, more);
}
