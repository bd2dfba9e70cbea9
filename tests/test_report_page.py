"""The report's page in a real browser: Chromium, as the system has it, without a screen."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import require_accessible, wait_until
from searched_run import CONCLUSION, write_searched

from lora_search import open_run
from lora_search.report import write_report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

TRIALS = 24

EVIL = '</script><script>owned=1</script><img src=x onerror="owned=1">\'"`${owned=1}&lt;\u2028\x1b[31m'

DRAWN = """id => {
  const model = echarts.getInstanceByDom(document.getElementById(id + '-chart')).getModel();
  return Object.fromEntries(model.getSeries().map(series => {
    const data = series.getData();
    let drawn = 0;
    for (let i = 0; i < data.count(); i++) if (data.getItemGraphicEl(i)) drawn++;
    return [series.id, drawn];
  }));
}"""
"""How many marks a chart has drawn, by the name of its series."""


NOTE_ALL_IT_SAYS = """button => {
  button.said = [];
  new MutationObserver(() => button.said.push(button.textContent)).observe(button, { childList: true });
}"""
"""What it says for a moment may be over before it is looked at."""

OPEN_ALL = "for (const details of document.querySelectorAll('details')) details.open = true"


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens a page from disk; whatever the page complains of, or fetches, fails the test."""
    complaints: list[str] = []
    opened: list[Page] = []

    def visit(file: Path, **settings: Any) -> Page:
        page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}} | settings)
        opened.append(page)
        page.on("console", lambda message: complaints.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: complaints.append(request.url) if request.url != file.as_uri() else None)
        page.goto(file.as_uri())
        page.wait_for_selector("#trials table", state="attached")
        return page

    yield visit
    for page in opened:
        page.close()
    assert not complaints


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run with a conclusion."""
    folder = write_searched(tmp_path_factory.mktemp("searched") / "run", TRIALS)
    run = open_run(folder)
    assert run.best is not None
    facts = run.provenance | {"conclusion": CONCLUSION | {"trial": int(run.best["trial"])}}
    (folder / "provenance.json").write_text(json.dumps(facts))
    write_report(open_run(folder))
    return folder / "report.html"


@pytest.fixture(scope="module")
def told(searched: Path) -> dict[str, Any]:
    """What the page should show."""
    run = open_run(searched.parent)
    trials = run.trials
    return {
        "best": int(run.best["trial"]),  # type: ignore[index]
        "reports": len(run.reports),
        "ended": len(trials),
        "at_30": int((run.reports["step"] == 30).sum()),
        "rungs": trials.loc[trials["state"] == "stopped", "steps"].nunique(),
        "rows": run.rows,
    }


def drawn(page: Page, name: str) -> dict[str, int]:
    page.locator(f"#{name}-chart").scroll_into_view_if_needed()
    page.wait_for_selector(f"#{name}-chart svg")
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))")
    found: dict[str, int] = page.evaluate(DRAWN, name)
    return found


def shown(page: Page) -> list[int]:
    """The trials in the table, from its top."""
    numbers: list[int] = page.evaluate("[...document.querySelectorAll('#trials tbody tr')].map(r => +r.dataset.trial)")
    return numbers


def test_charts_have_a_mark_for_each_trial_and_report(visit: Callable[..., Page], searched: Path, told: Any) -> None:
    page = visit(searched)
    assert drawn(page, "best-time")["reports"] == told["reports"]
    assert drawn(page, "best-compute")["reports"] == told["reports"]
    assert drawn(page, "curves") == {"curves": TRIALS, "ends": TRIALS}
    assert drawn(page, "parallel") == {"parallel": TRIALS}
    assert drawn(page, "importance") == {"share": 5, "interval": 5}
    assert drawn(page, "savings") == {"went_on": told["rungs"], "stopped": told["rungs"]}
    assert drawn(page, "front-trainable_parameters")["trials"] == TRIALS
    assert drawn(page, "front-trial_memory_bytes")["trials"] == TRIALS
    drawn(page, "occupancy")
    assert page.locator("#slices .chart").count() == 6  # the five that were searched, and alpha
    page.select_option("#slice-step", "30")
    assert [drawn(page, f"slice-{i}")["trials"] for i in range(6)] == [told["at_30"]] * 6


def test_top_says_what_was_found_and_what_to_do_with_it(visit: Callable[..., Page], searched: Path, told: Any) -> None:
    page = visit(searched)
    assert f"Trial {told['best']} is the best of {TRIALS}" in page.inner_text("#headline")
    assert "95 % interval 0.7512 to 0.8633" in page.inner_text(".figures")
    command = page.locator(".command", has_text="Merge it")
    assert f"lora-search merge {searched.parent} --trial {told['best']}" in command.locator("code").inner_text()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    button = command.locator("button")
    button.evaluate(NOTE_ALL_IT_SAYS)
    button.click()
    # Not Playwright's wait_for_function: it evaluates again from within the page, which the page's policy forbids.
    wait_until(lambda: "Copied" in button.evaluate("button => button.said"))
    assert page.evaluate("navigator.clipboard.readText()") == command.locator("code").inner_text()


def test_table_is_sorted_by_a_click_and_by_the_keyboard(visit: Callable[..., Page], searched: Path, told: Any) -> None:
    page = visit(searched)
    by_loss = sorted(told["rows"], key=lambda row: row["eval_loss"])
    assert shown(page) == [row["trial"] for row in by_loss]
    head = page.locator("#trials th", has_text="learning rate")
    by_rate = [row["trial"] for row in sorted(told["rows"], key=lambda row: row["learning_rate"])]
    head.get_by_role("button").click()
    assert (shown(page), head.get_attribute("aria-sort")) == (by_rate, "ascending")
    head.get_by_role("button").press("Enter")
    assert (shown(page), head.get_attribute("aria-sort")) == (by_rate[::-1], "descending")


def test_filter_keeps_what_it_names_here_and_in_the_charts(
    visit: Callable[..., Page], searched: Path, told: Any
) -> None:
    page = visit(searched)
    page.fill("#filter", "rank>=16, all-linear")
    kept = [row for row in told["rows"] if row["rank"] >= 16 and row["target_modules"] == "all-linear"]
    assert 0 < len(kept) < TRIALS
    assert sorted(shown(page)) == [row["trial"] for row in kept]
    assert page.inner_text("#shown") == f"{len(kept)} of {TRIALS} trials"
    drawn(page, "curves")
    faint = page.evaluate(
        """() => echarts.getInstanceByDom(document.getElementById('curves-chart')).getOption()
            .series.find(s => s.id === 'ends').data.filter(d => d.itemStyle.opacity < 0.1).length"""
    )
    assert faint == TRIALS - len(kept)
    page.get_by_role("button", name="Clear", exact=True).first.click()
    page.locator("#trials label", has_text="stopped").locator("input").uncheck()
    assert sorted(shown(page)) == [row["trial"] for row in told["rows"] if row["state"] == "completed"]


def test_brushed_axis_filters_the_table(visit: Callable[..., Page], searched: Path, told: Any) -> None:
    page = visit(searched)
    drawn(page, "parallel")
    box = page.locator("#parallel-chart").bounding_box()
    assert box is not None
    x = box["x"] + 60  # the first axis, rank, whose highest values lie at its top
    page.mouse.move(x, box["y"] + 42)
    page.mouse.down()
    page.mouse.move(x, box["y"] + 70, steps=3)
    page.mouse.move(x, box["y"] + 40 + 0.55 * (box["height"] - 64), steps=3)
    page.mouse.up()
    wait_until(lambda: page.evaluate(f"document.querySelectorAll('#trials tbody tr').length < {TRIALS}"))
    assert sorted(shown(page)) == [row["trial"] for row in told["rows"] if row["rank"] >= 16]


def test_trial_is_highlighted_from_the_table_and_with_the_arrow_keys(
    visit: Callable[..., Page], searched: Path, told: Any
) -> None:
    page = visit(searched)
    last = sorted(told["rows"], key=lambda row: row["eval_loss"])[-1]["trial"]
    page.get_by_role("button", name=f"Trial {last}: highlight in the charts").press("Enter")
    assert page.inner_text(".chosen span").startswith(f"Trial {last}: ")
    assert page.evaluate("document.activeElement.textContent") == str(last)  # the keyboard stays where it was
    drawn(page, "curves")
    chart = page.locator("#curves-chart")
    chart.press("Escape")
    assert page.locator(".chosen").is_hidden()
    chart.press("ArrowRight")
    assert page.inner_text("#live").startswith(f"Trial {told['best']}, the best: completed")
    chart.press("ArrowRight")
    assert page.locator("#trials tr.selected").get_attribute("data-trial") != str(told["best"])


def test_hovering_a_trial_tells_of_it(visit: Callable[..., Page], searched: Path, told: Any) -> None:
    page = visit(searched)
    drawn(page, "curves")
    x, y = page.evaluate(
        """best => {
          const chart = echarts.getInstanceByDom(document.getElementById('curves-chart'));
          const ends = chart.getModel().getSeries().find(series => series.id === 'ends').getData();
          for (let i = 0; i < ends.count(); i++) if (ends.getName(i) === String(best)) {
            const box = document.getElementById('curves-chart').getBoundingClientRect();
            const [x, y] = ends.getItemLayout(i);
            return [box.x + x, box.y + y];
          }
        }""",
        told["best"],
    )
    page.mouse.move(x - 40, y - 60)
    page.mouse.move(x, y, steps=4)
    page.wait_for_selector("#curves-chart .tip b")
    assert "Trial " in page.inner_text("#curves-chart .tip b")
    assert "validation loss" in page.inner_text("#curves-chart .tip")


def test_every_chart_has_a_name_and_a_table(visit: Callable[..., Page], searched: Path, told: Any) -> None:
    page = visit(searched)
    charts = page.locator(".chart")
    labels = [charts.nth(i).get_attribute("aria-label") or "" for i in range(charts.count())]
    assert len(labels) == 15
    assert all(len(label) > 60 for label in labels)
    assert all(charts.nth(i).get_attribute("tabindex") == "0" for i in range(charts.count()))
    page.locator("#best-time summary").press("Enter")
    page.locator("#best-time tbody").wait_for()
    page.evaluate(OPEN_ALL)
    wait_until(
        lambda: page.evaluate(
            "document.querySelectorAll('figure tbody').length === document.querySelectorAll('figure').length"
        )
    )
    assert all(figure.locator("tbody tr").count() > 0 for figure in page.locator("figure").all())
    assert page.locator("#curves tbody tr").count() == told["reports"]
    assert page.locator("#slices tbody tr").count() == TRIALS


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_keeps_nobody_out(visit: Callable[..., Page], searched: Path, scheme: str) -> None:
    page = visit(searched, color_scheme=scheme)
    page.evaluate(OPEN_ALL)
    wait_until(
        lambda: page.evaluate(
            "document.querySelectorAll('figure tbody').length === document.querySelectorAll('figure').length"
        )
    )
    require_accessible(page)


def test_colours_follow_the_system_and_the_button(visit: Callable[..., Page], searched: Path) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    page = visit(searched, color_scheme="dark")
    assert page.evaluate(ground) == "rgb(16, 19, 23)"
    page.click("#theme")
    assert page.evaluate(ground) == "rgb(246, 247, 249)"
    page.click("#theme")
    drawn(page, "occupancy")
    assert page.pdf()[:5] == b"%PDF-"
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"  # light on paper alone
    assert page.locator(".chart svg").count() == 15


def test_page_fits_a_telephone(visit: Callable[..., Page], searched: Path) -> None:
    page = visit(searched, viewport={"width": 360, "height": 740})
    for name in ("best-time", "parallel", "slice-0", "occupancy"):
        drawn(page, name)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def hostile(folder: Path) -> Path:
    """A run in which every text that may be anybody's is hostile."""
    write_searched(folder, 4)
    lines = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    for line in lines:
        if "parameters" in line:
            line["parameters"] |= {"target_modules": f"{line['trial']}{EVIL}", EVIL: EVIL, "rank": EVIL}
        if "host" in line:
            line["host"] = EVIL
    lines.append({"event": "start", "trial": 9, "time": 1.0, "parameters": {"target_modules": [EVIL, EVIL]}})
    lines.append({"event": "end", "trial": 9, "time": 2.0, "state": "failed", "reason": EVIL})
    (folder / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = {"hosts": [{"name": EVIL, "capacity": 3}], EVIL: {EVIL: EVIL}, "__proto__": {"x": 1}}
    facts["conclusion"] = {"trial": 0, "merged_onto": EVIL, "test_loss": 0.5, "merged_loss": 0.5}
    (folder / "provenance.json").write_text(json.dumps(facts))
    return folder


def test_hostile_run_is_shown_and_runs_nothing(visit: Callable[..., Page], tmp_path: Path) -> None:
    folder = hostile(tmp_path / "<img src=x onerror=owned=1>")
    write_report(open_run(folder), tmp_path / "page.html")
    page = visit(tmp_path / "page.html")
    for chart in page.locator(".chart").all():
        chart.scroll_into_view_if_needed()
        chart.press("ArrowRight")
        box = chart.bounding_box()
        assert box is not None
        for share in (0.3, 0.8):
            page.mouse.move(box["x"] + share * box["width"], box["y"] + box["height"] / 2)
    page.evaluate(OPEN_ALL)
    page.locator("#curves tbody").wait_for(state="attached")
    assert page.evaluate("typeof owned") == "undefined"
    assert page.locator("img, main script, header script").count() == 0
    assert page.inner_text("h1") == "<img src=x onerror=owned=1>"
    assert "onerror" in page.inner_text("#trials tbody")
    page.fill("#filter", EVIL[:9])
    assert set(shown(page)) == {0, 1, 2, 3, 9}


def test_script_that_is_not_the_pages_own_does_not_run(browser: Browser, searched: Path) -> None:
    changed = searched.with_name("changed.html")
    changed.write_text(searched.read_text().replace("</main>", "</main><script>window.owned = 1</script>"))
    page, said = browser.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.goto(changed.as_uri())
    assert page.evaluate("typeof owned") == "undefined"
    assert [line for line in said if "Content Security Policy" in line]
    page.close()


@pytest.mark.parametrize("trials", [0, 1])
def test_run_that_has_just_begun_has_a_page(visit: Callable[..., Page], tmp_path: Path, trials: int) -> None:
    folder = write_searched(tmp_path / "run", trials)
    lines = (folder / "trials.jsonl").read_text().splitlines(keepends=True)
    (folder / "trials.jsonl").write_text("".join(lines[:trials]))  # begun, and nothing more
    write_report(open_run(folder))
    page = visit(folder / "report.html")
    assert shown(page) == list(range(trials))
    assert page.locator(".nothing").count() >= 6


def test_500_trials_are_there_within_seconds(visit: Callable[..., Page], tmp_path: Path) -> None:
    write_report(open_run(write_searched(tmp_path / "run", 500, points=10)))
    file = tmp_path / "run" / "report.html"
    assert file.stat().st_size < 5_000_000
    began = time.monotonic()
    page = visit(file)
    assert drawn(page, "best-time")["reports"] > 1000
    assert time.monotonic() - began < 15  # about 2 s on 2 idle cores
    assert drawn(page, "curves") == {"curves": 500, "ends": 500}
    assert len(shown(page)) == 500
