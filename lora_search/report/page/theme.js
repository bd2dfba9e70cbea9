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

const STAR = "M7 0.8L8.8 5 13.3 5.4 9.9 8.4 10.9 12.8 7 10.5 3.1 12.8 4.1 8.4 0.7 5.4 5.2 5Z";
const SHAPES = { completed: "circle", stopped: "rect", failed: "triangle", running: "diamond" };

/** A mark's look: shape by state, the best one larger and in its own colour. */
function mark(trial) {
  const isBest = trial.trial === best;
  const isChosen = trial.trial === chosen.trial;
  return {
    symbol: isBest ? `path://${STAR}` : SHAPES[trial.state],
    symbolSize: isBest ? 18 : isChosen ? 14 : 9,
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
  const paths = { completed: "M7 2a5 5 0 1 0 .01 0z", stopped: "M2.5 2.5h9v9h-9z", failed: "M7 2l5.5 10h-11z", running: "M7 1l6 6-6 6-6-6z", best: STAR };
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
