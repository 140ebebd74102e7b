// Put the page together, and redraw it when the address changes.

const overview = h("div", "overview");
let last = null; // the item that is open
let scrolled = 0; // where the list was when it was opened

function render() {
  readState();
  const wanted = state.get("open");
  const item = wanted === "" ? null
    : data.items.find((one) => one.id === wanted && String(one.sample) === state.get("sample"));
  if (item && !last) scrolled = window.scrollY;
  overview.hidden = Boolean(item);
  trajectory.hidden = !item;
  if (item) {
    showTrajectory(item);
    if (item !== last) window.scrollTo(0, 0);
  } else {
    latest += 1;
    fillFilters();
    for (const [name, element] of selects) element.value = state.get(name) ?? "";
    if (document.activeElement !== wordFilter) wordFilter.value = state.get("q");
    fillStrata();
    showList();
    if (wanted) told.textContent = readable(`There is no trajectory ${wanted} in this report.`);
    main.setAttribute("aria-busy", "false");
    if (last) {
      window.scrollTo(0, scrolled);
      const there = address(opened(last));
      const link = [...list.querySelectorAll("a")].find((a) => a.getAttribute("href") === there);
      link?.focus({ preventScroll: true });
    }
  }
  last = item;
}

function press(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input, select, textarea")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (last) {
    const found = choose();
    const at = found.indexOf(last);
    const next = at < 0 ? undefined : found[at + { j: 1, k: -1 }[event.key]];
    if (next) go(opened(next));
    else if (event.key === "t") go({ view: state.get("view") === "tokens" ? "" : "tokens" });
    else if (event.key === "Escape") go(CLOSED, true);
    return;
  }
  const rows = [...list.querySelectorAll("a")];
  const at = rows.indexOf(document.activeElement);
  if (event.key === "j") rows[Math.min(at + 1, rows.length - 1)]?.focus();
  else if (event.key === "k") rows[Math.max(at - 1, 0)]?.focus();
  else if (event.key === "/") wordFilter.focus();
  else return;
  event.preventDefault();
}

const browser = data.items.length === 0 ? null : h("section", "browser",
  h("h2", null, "Trajectories"), filters, told, list, pager,
  note("Correct: an exact match above 0.5, or else the first metric, or else the reward. ",
    "Keys: j and k go on and back, Enter opens, Escape closes, t shows tokens, / filters by words."));
overview.append(...[
  h("h1", null, data.title),
  data.notes.map((words) => h("p", "warning", words)),
  curves(),
  h("div", "tables", summaries(), strata()),
  browser,
  settings(),
].flat().filter(Boolean));
main.append(overview, trajectory);
addEventListener("hashchange", render);
addEventListener("keydown", press);
render();
