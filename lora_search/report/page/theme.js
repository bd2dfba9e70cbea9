// Light and dark: the system's, until the button is pressed.

const dark = matchMedia("(prefers-color-scheme: dark)");
const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
let asked = null;
let printing = false;

function themeName() {
  return printing ? "light" : asked ?? (dark.matches ? "dark" : "light");
}

function applyTheme() {
  document.documentElement.setAttribute("data-theme", themeName());
  redraw();
}

/** A colour of the style sheet. */
function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function themeButton() {
  const label = () => (themeName() === "dark" ? "Light colours" : "Dark colours");
  const button = element("button", { type: "button", id: "theme", onclick: () => {
    asked = themeName() === "dark" ? "light" : "dark";
    applyTheme();
    button.textContent = label();
  } }, label());
  dark.addEventListener("change", () => { applyTheme(); button.textContent = label(); });
  return button;
}

const SHAPES = { completed: "circle", stopped: "rect", failed: "triangle", running: "diamond" };

/** A mark's look: shape by state, the best one larger and in its own colour. */
function mark(trial) {
  const isBest = trial.trial === best;
  const isChosen = trial.trial === chosen.trial;
  return {
    symbol: isBest ? "pin" : SHAPES[trial.state],
    symbolSize: isBest ? 20 : isChosen ? 14 : 9,
    itemStyle: {
      color: colour(isBest ? "best" : trial.state),
      opacity: kept.has(trial.trial) ? (trial.state === "stopped" && !isChosen ? 0.75 : 1) : 0.07,
      borderColor: isChosen ? colour("ink") : colour("surface"),
      borderWidth: isChosen ? 2 : 0.5,
    },
  };
}

/** The legend of the marks, drawn by the page itself: the same for all charts. */
function legend() {
  const paths = { completed: "M7 2a5 5 0 1 0 .01 0z", stopped: "M2.5 2.5h9v9h-9z", failed: "M7 2l5.5 10h-11z", running: "M7 1l6 6-6 6-6-6z", best: "M7 13C2 7 3 1.5 7 1.5S12 7 7 13z" };
  const present = Object.keys(paths).filter((state) => (state === "best" ? best !== null : data.counts[state]));
  const namespace = "http://www.w3.org/2000/svg";
  return element("ul", { class: "legend", "aria-label": "Marks" }, ...present.map((state) => {
    const svg = document.createElementNS(namespace, "svg");
    const path = document.createElementNS(namespace, "path");
    svg.setAttribute("viewBox", "0 0 14 14");
    svg.setAttribute("aria-hidden", "true");
    path.setAttribute("d", paths[state]);
    path.setAttribute("fill", `var(--${state})`);
    svg.append(path);
    return element("li", {}, svg, state === "stopped" ? "stopped by the scheduler" : state);
  }));
}
