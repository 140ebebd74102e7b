"use strict";
// The report's page. All data reaches the document as text nodes or attributes set by name: nothing
// here makes HTML of a string, and the page's Content-Security-Policy would not let it. The state
// (which two runs, which filters, which page, which trajectory) is the fragment of the address, so
// that whatever is seen can be linked to and gone back to.

const PAGE = 50; // rows of the list
const KEPT = 6; // unpacked chunks kept in memory
const data = JSON.parse(document.getElementById("index").textContent);
const main = document.querySelector("main");
const strataKeys = [...new Set(data.items.flatMap((item) => Object.keys(item.strata)))];

// --- the document --------------------------------------------------------------------------------

// Text that a person can see: controls as pictures, what turns the direction of text around and
// lone surrogates by their numbers.
function readable(text) {
  return String(text)
    .replace(/[\0-\x08\x0b-\x1f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
    .replace(/\x7f/g, "\u2421")
    .replace(/[\x80-\x9f\u2028-\u202e\u2066-\u2069]|\p{Surrogate}/gu, (c) =>
      `⟨U+${c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

// An element. Attributes are an object, a class, or null, and always written out in this file: what
// comes from the data is only ever a value of an attribute, or a child.
function h(tag, attributes, ...children) {
  const svg = ["svg", "path", "line", "text", "circle"].includes(tag);
  const element = svg
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  const given = typeof attributes === "string" ? { class: attributes } : (attributes ?? {});
  for (const [name, value] of Object.entries(given)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, name === "title" ? readable(value) : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false || child === "") continue;
    element.append(child instanceof Node ? child : readable(child));
  }
  return element;
}

const quiet = (...children) => h("span", "quiet", ...children);
const note = (...children) => h("p", "note", ...children);
const folded = (kind, title, ...children) =>
  h("details", kind, h("summary", null, title), ...children);
const own = (object, name) => (Object.hasOwn(object ?? {}, name) ? object[name] : undefined);
const clip = (text, length) => (text.length > length ? `${text.slice(0, length)} …` : text);
const isNumber = (value) => typeof value === "number";
const mean = (value) => (isNumber(value) ? value.toFixed(Math.abs(value) < 100 ? 3 : 1) : "–");
function number(value) {
  if (!isNumber(value)) return value === null || value === undefined ? "–" : String(value);
  return String(Number(value.toFixed(3)));
}
const grouped = (count) => (isNumber(count) ? count.toLocaleString("en") : "?");
const plural = (count, word) => `${grouped(count)} ${word}${count === 1 ? "" : "s"}`;
const kinds = (item) => Object.entries(item.strata).map(([key, value]) => `${key} ${value}`);
const texts = (value) => (Array.isArray(value) ? value.map(String) : []);
const show = (value) => (typeof value === "string" ? value : JSON.stringify(value));

// --- the state -----------------------------------------------------------------------------------

const DEFAULTS = {
  a: "0", b: data.sets.length > 1 ? "1" : "", verdict: "", requests: "", stop: "", q: "", sort: "",
  page: "1", metric: "", open: "", sample: "0", view: "",
};
const isFilter = (name) =>
  ["a", "b", "verdict", "requests", "stop", "q", "sort"].includes(name) || name.startsWith("is.");
let state;

function readState() {
  const given = new URLSearchParams(location.hash.slice(1));
  state = new Map(Object.entries(DEFAULTS));
  for (const [name, value] of given) {
    if (state.has(name) || name.startsWith("is.")) state.set(name, value);
  }
  for (const side of ["a", "b"]) {
    const value = state.get(side);
    if (value !== "" && !data.sets[value]) state.set(side, DEFAULTS[side]);
  }
  if (state.get("a") === "") state.set("a", "0");
  if (state.get("a") === state.get("b")) state.set("b", "");
}

function address(changes) {
  const next = new Map([...state, ...Object.entries(changes)]);
  const params = new URLSearchParams();
  for (const [name, value] of next) {
    if (value !== (Object.hasOwn(DEFAULTS, name) ? DEFAULTS[name] : "")) params.set(name, value);
  }
  return `#${params}`;
}

// A changed filter leads to the first page of the list, and makes no entry in the browser's history.
function go(changes, enter = false) {
  if (Object.keys(changes).some(isFilter)) changes = { ...changes, page: "1" };
  const next = address(changes);
  if (next === (location.hash || "#")) return;
  if (enter) location.hash = next;
  else location.replace(next);
}

const chosenSets = () => ["a", "b"].map((s) => state.get(s)).filter((s) => s !== "").map(Number);

// --- choosing trajectories -----------------------------------------------------------------------

const haystacks = new Map();
function haystack(item) {
  if (!haystacks.has(item)) {
    const words = [item.id, item.question, ...item.answers];
    for (const side of item.sides) if (side) words.push(side.prediction);
    haystacks.set(item, words.join("\n").toLowerCase());
  }
  return haystacks.get(item);
}

function fits(verdict, sides) {
  const marks = sides.map((side) => side.correct);
  switch (verdict) {
    case "": return true;
    case "void": return marks.includes(null);
    case "correct": return marks.every((mark) => mark === true);
    case "wrong": return marks.every((mark) => mark === false);
    case "gained": return marks[0] === false && marks[1] === true;
    case "lost": return marks[0] === true && marks[1] === false;
    default: return false;
  }
}

const change = (item, [a, b]) => item.sides[b].reward - item.sides[a].reward;

let chosenFor = null;
let chosen = [];
function choose() {
  const wanted = JSON.stringify([...state].filter(([name]) => isFilter(name)));
  if (wanted === chosenFor) return chosen;
  chosenFor = wanted;
  const sets = chosenSets();
  const text = state.get("q").toLowerCase();
  chosen = data.items.filter((item) => {
    const sides = sets.map((set) => item.sides[set]);
    if (sides.includes(null)) return false;
    for (const key of strataKeys) {
      const value = state.get(`is.${key}`) ?? "";
      if (value !== "" && own(item.strata, key) !== value) return false;
    }
    const requests = state.get("requests");
    if (requests !== "" && !sides.some((side) => String(side.requests) === requests)) return false;
    const stop = state.get("stop");
    if (stop !== "" && !sides.some((side) => side.stop === stop)) return false;
    return fits(state.get("verdict"), sides) && (text === "" || haystack(item).includes(text));
  });
  const sign = { gain: -1, loss: 1 }[state.get("sort")];
  if (sign && sets.length === 2) chosen.sort((x, y) => sign * (change(x, sets) - change(y, sets)));
  return chosen;
}

// --- curves, numbers, settings -------------------------------------------------------------------

function chart(name, lines) {
  const [left, right, top, bottom, width, height] = [34, 10, 8, 20, 320, 150];
  const points = lines.flatMap((line) => line.points);
  let low = Math.min(...points.map((p) => p[1]));
  let high = Math.max(...points.map((p) => p[1]));
  if (low >= 0 && high <= 1) [low, high] = [0, 1]; // a share is read against the whole scale
  else if (low === high) [low, high] = [low - 0.5, high + 0.5];
  const first = Math.min(...points.map((p) => p[0]));
  const last = Math.max(...points.map((p) => p[0]), first + 1);
  const x = (step) => left + ((step - first) / (last - first)) * (width - left - right);
  const y = (value) => height - bottom - ((value - low) / (high - low)) * (height - top - bottom);
  const readout = h("span", "quiet");
  const tell = (step) => {
    const told = lines.map((line) => {
      const off = (point) => Math.abs(point[0] - step);
      const near = line.points.reduce((p, q) => (off(q) < off(p) ? q : p));
      return lines.length > 1 ? number(near[1]) : `step ${near[0]}: ${number(near[1])}`;
    });
    readout.textContent = told.join(" · ");
  };
  const label = readable(name);
  const svg = h("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  const tick = (at, level, anchor, text) =>
    h("text", { class: "tick", x: at, y: level, "text-anchor": anchor }, text);
  for (const level of [low, (low + high) / 2, high]) {
    const digits = high - low >= 50 ? 0 : high - low >= 5 ? 1 : 2;
    svg.append(
      h("line", { class: "grid", x1: left, x2: width - right, y1: y(level), y2: y(level) }),
      tick(left - 5, y(level) + 4, "end", level.toFixed(digits)),
    );
  }
  svg.append(
    tick(left, height - 5, "start", `step ${first}`),
    tick(width - right, height - 5, "end", String(last)),
  );
  for (const line of lines) {
    const place = ([step, value]) => `${x(step).toFixed(1)} ${y(value).toFixed(1)}`;
    const color = `run-${line.run % 6}`;
    svg.append(h("path", { class: color, d: `M${line.points.map(place).join("L")}` }));
    for (const [step, value] of line.points.length <= 40 ? line.points : []) {
      svg.append(h("circle", { class: color, cx: x(step), cy: y(value), r: 2.2 }));
    }
  }
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const across = ((event.clientX - box.left) / box.width) * width;
    tell(first + ((across - left) / (width - left - right)) * (last - first));
  });
  svg.addEventListener("pointerleave", () => tell(last));
  tell(last);
  return h("figure", null, h("figcaption", null, h("strong", null, name), readout), svg);
}

function curves() {
  const rank = (metric) => ["eval/reward", "reward", "eval/em"].indexOf(metric) + 1 || 9;
  const metrics = [...new Set(data.runs.flatMap((run) => Object.keys(run.curves)))];
  metrics.sort((x, y) => rank(x) - rank(y));
  if (metrics.length === 0) return null;
  const figures = metrics.map((metric) =>
    chart(
      metric === "reward" ? "training reward" : metric.replace(/^eval\//, "held-out "),
      data.runs.flatMap((run, n) => {
        const points = own(run.curves, metric);
        return points ? [{ run: n, points }] : [];
      }),
    ));
  const legend = data.runs.map((run, n) => h("span", null, h("i", `run-${n % 6}`), run.name));
  const more = figures.splice(4);
  return h("section", null,
    h("h2", null, "Learning curves"),
    legend.length > 1 && h("p", "legend", legend),
    h("div", "charts", figures),
    more.length > 0 && folded("more", `${more.length} more`, h("div", "charts", more)));
}

function cell(numbers, metric) {
  const interval = own(numbers?.intervals, metric);
  return h("td", "number", mean(own(numbers?.values, metric)),
    Array.isArray(interval) ? h("small", null, ` [${interval.map(mean).join(", ")}]`) : null);
}

const metricNames = () => [...new Set(data.sets.flatMap((set) => Object.keys(set.values)))];
const row = (name) => h("th", { scope: "row" }, name);
const column = (name, attributes) => h("th", { scope: "col", ...attributes }, name);
const setColumns = () =>
  data.sets.map((set) => column(set.name, { class: "number", title: set.path }));
const table = (heads, ...bodies) =>
  h("div", "wide", h("table", null, h("thead", null, h("tr", null, heads)), ...bodies));

function summaries() {
  if (data.sets.length === 0) return null;
  const rows = metricNames().map((metric) =>
    h("tr", null, row(metric), data.sets.map((set) => cell(set, metric))));
  for (const count of ["episodes", "void"]) {
    const counts = data.sets.map((set) => h("td", "number", number(set[count])));
    rows.push(h("tr", "quiet", row(count), counts));
  }
  return h("section", null,
    h("h2", null, "Means"),
    table([column("metric"), setColumns()], h("tbody", null, rows)),
    note("In brackets the 95 % interval."));
}

const strataBox = h("div", null);
function strata() {
  const names = metricNames();
  if (strataKeys.length === 0 || names.length === 0) return null;
  const chooser = select("metric", "metric", names.map((name) => [name, name]));
  return h("section", null,
    h("div", "heading", h("h2", null, "By kind of question"), chooser),
    strataBox);
}

function fillStrata() {
  const names = metricNames();
  const metric = [state.get("metric"), "em", names[0]].find((name) => names.includes(name));
  if (selects.has("metric")) selects.get("metric").value = metric;
  const bodies = strataKeys.map((key) => {
    const parts = data.sets.map((set) => own(set.strata, key) ?? {});
    const values = [...new Set(parts.flatMap((of) => Object.keys(of)))].sort();
    return h("tbody", null, values.map((value, n) => {
      const numbers = parts.map((of) => own(of, value));
      const counts = new Set(numbers.map((of) => (of ? String(of.episodes) : "–")));
      return h("tr", null,
        row(n === 0 ? key : ""), row(value),
        h("td", "number quiet", [...counts].join(" / ")),
        numbers.map((of) => cell(of, metric)));
    }));
  });
  const heads = [h("th", { colspan: 2 }), column("n", { class: "number" }), setColumns()];
  strataBox.replaceChildren(table(heads, ...bodies));
}

function settings() {
  const columns = [...data.runs, ...data.sets].filter((of) => Object.keys(of.settings).length > 0);
  if (columns.length === 0) return null;
  const keys = [...new Set(columns.flatMap((of) => Object.keys(of.settings)))];
  const rows = keys.map((key) => {
    const values = columns.map((of) => show(own(of.settings, key)) ?? "–");
    return h("tr", new Set(values).size > 1 && "differ",
      row(h("code", null, key)),
      values.map((value) => h("td", null, h("code", null, clip(value, 400)))));
  });
  return folded("settings", "Settings and versions",
    table([h("th", null), columns.map((of) => column(of.name))], h("tbody", null, rows)));
}

// --- the list ------------------------------------------------------------------------------------

// The metric that counts requests has the environment's own name.
const requestsName = () => data.sets.map((set) => set.shows.requests).find(Boolean) ?? "requests";

const selects = new Map();
function select(name, label, options) {
  const onchange = (event) => go({ [name]: event.target.value });
  const element = h("select", { id: `f-${name}`, onchange },
    options.map(([value, text]) => h("option", { value }, clip(text, 60))));
  selects.set(name, element);
  return h("label", null, h("span", null, label), element);
}

function distinct(of) {
  const found = new Set(data.items.flatMap((item) => item.sides.filter(Boolean).map(of)));
  return [...found].filter((value) => value !== "" && value !== null && value !== undefined);
}

const wordFilter = h("input", { type: "text", placeholder: "question or prediction" });
let typing;
wordFilter.addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => go({ q: wordFilter.value }), 150);
});

const filters = h("form", { class: "filters", onsubmit: (event) => event.preventDefault() });
const told = h("p", { class: "note", role: "status" });
const list = h("ol", "list");
const pager = h("nav", { class: "pager", "aria-label": "pages" });

const ALL = ["", "all"];
const ONE = [ALL, ["correct", "correct"], ["wrong", "wrong"], ["void", "void"]];
const TWO = [
  ALL, ["gained", "wrong → correct"], ["lost", "correct → wrong"],
  ["correct", "both correct"], ["wrong", "both wrong"], ["void", "void"],
];
const ORDERS = [["", "as played"], ["gain", "greatest gain"], ["loss", "greatest loss"]];

let filtersFor = null;
function fillFilters() {
  const compared = chosenSets().length === 2;
  if (filtersFor === compared) return;
  filtersFor = compared;
  const names = data.sets.map((set, n) => [String(n), set.name]);
  const choice = (name, label, values) =>
    values.length > 1 && select(name, label, [ALL, ...values.map((v) => [String(v), number(v)])]);
  filters.replaceChildren(...[
    data.sets.length > 1 && select("a", "run", names),
    data.sets.length > 1 && select("b", "beside", [["", "none"], ...names]),
    select("verdict", "verdict", compared ? TWO : ONE),
    ...strataKeys.map((key) => {
      const values = data.items.map((item) => own(item.strata, key));
      return choice(`is.${key}`, key, [...new Set(values)].filter((v) => v !== undefined).sort());
    }),
    choice("requests", requestsName(), distinct((side) => side.requests).sort((x, y) => x - y)),
    choice("stop", "stop reason", distinct((side) => side.stop).sort()),
    compared && select("sort", "order", ORDERS),
    h("label", "words", h("span", null, "words"), wordFilter),
  ].filter(Boolean));
}

function mark(side) {
  if (!side) return h("span", { class: "mark", title: "not in this run" }, "–");
  if (side.correct === null) return h("span", { class: "mark void", title: "void" }, "∅");
  return side.correct
    ? h("span", { class: "mark correct", title: "correct" }, "✓")
    : h("span", { class: "mark wrong", title: "wrong" }, "✗");
}

const opened = (item) => ({ open: item.id, sample: String(item.sample) });
const numbered = (item) => (item.sample > 0 ? [`sample ${item.sample}`] : []);

function entry(item, sets) {
  const sides = sets.map((set) => item.sides[set]);
  const both = (of) => [...new Set(sides.map((side) => number(of(side))))].join(" → ");
  const predictions = sides.map((side) =>
    h("bdi", "prediction", clip(side.prediction.trim(), 80) || "no answer"));
  const details = [
    sides.some((side) => isNumber(side.requests))
      && `${requestsName()} ${both((side) => side.requests)}`,
    both((side) => side.stop), ...kinds(item), ...numbered(item),
  ];
  return h("li", null, h("a", { href: address(opened(item)) },
    h("span", "marks", sides.map(mark)),
    h("span", "asked",
      h("span", { class: "question", dir: "auto" }, clip(item.question, 240)),
      h("span", "said", predictions,
        item.answers.length > 0 && h("bdi", "gold-answer", clip(item.answers[0], 80)))),
    h("span", "numbers",
      h("span", null, `reward ${both((side) => side.reward)}`),
      quiet(details.filter(Boolean).join(" · ")))));
}

// How many are shown of how many, and how many there are that cannot be compared.
function counted(found, sets) {
  const present = data.items.filter((item) => sets.every((set) => item.sides[set])).length;
  const [one, many] = sets.length === 2 ? ["pair", "pairs"] : ["trajectory", "trajectories"];
  const words = [`${grouped(found)} of ${grouped(present)} ${present === 1 ? one : many}`];
  for (const [here, there] of sets.length === 2 ? [sets, [...sets].reverse()] : []) {
    const alone = data.items.filter((item) => item.sides[here] && !item.sides[there]).length;
    const [name, other] = [data.sets[here].name, data.sets[there].name];
    if (alone > 0) words.push(`${plural(alone, "question")} of ${name} not in ${other}: left out`);
  }
  return words.join(" · ");
}

function showList() {
  const sets = chosenSets();
  const found = choose();
  const pages = Math.max(1, Math.ceil(found.length / PAGE));
  const page = Math.min(pages, Math.max(1, Math.trunc(Number(state.get("page"))) || 1));
  const shown = found.slice((page - 1) * PAGE, page * PAGE);
  list.replaceChildren(...shown.map((item) => entry(item, sets)));
  told.textContent = readable(counted(found.length, sets));
  const link = (to, text) => to >= 1 && to <= pages
    ? h("a", { href: address({ page: String(to) }) }, text)
    : quiet(text);
  const here = h("span", null, `page ${page} of ${pages}`);
  pager.replaceChildren(link(page - 1, "← previous"), here, link(page + 1, "next →"));
  pager.hidden = pages === 1;
}

// --- one trajectory ------------------------------------------------------------------------------

const unpacked = new Map();
function chunk(n) {
  if (!unpacked.has(n)) {
    unpacked.set(n, unpack(JSON.parse(document.getElementById(`chunk-${n}`).textContent)));
    if (unpacked.size > KEPT) unpacked.delete(unpacked.keys().next().value);
  }
  return unpacked.get(n);
}

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

// A text with its tags in quiet, and the last occurrence of a request or an answer marked.
function highlighted(text, target) {
  const words = String(target ?? "").trim();
  const at = words ? text.lastIndexOf(words) : -1;
  if (at < 0) return tagged(text);
  return [tagged(text.slice(0, at)), h("mark", null, words), tagged(text.slice(at + words.length))];
}

function tagged(text) {
  return text.split(/(<\/?[^<>\s][^<>\n]{0,39}>)/).map((piece, n) =>
    n % 2 ? h("span", "tag", piece) : piece);
}

// Thoughts and the rest of an action, in order. An action may go on with a thought that the prompt
// or an earlier action began, and begin one that it does not end.
function thoughts(text, inside) {
  const open = inside && !text.trimStart().startsWith("<think>") ? "(^[^]*?(?:</think>|$))|" : "";
  return text.split(new RegExp(`${open}(<think>[^]*?(?:</think>|$))`))
    .map((piece, n) => [n % (open ? 3 : 2) !== 0, (piece ?? "").trim()])
    .filter(([, piece]) => piece);
}

const endsInside = (text, inside) => {
  const [open, close] = [text.lastIndexOf("<think>"), text.lastIndexOf("</think>")];
  return open < 0 && close < 0 ? inside : open > close;
};

const block = (...children) => h("div", { class: "text", dir: "auto" }, ...children);
const step = (kind, label, ...children) =>
  h("div", `step ${kind}`, h("div", "label", label), block(...children));

// The items of an observation, cut where each title stands between the characters that the first
// one stands between; null where that cannot be done.
function bodiesOf(text, titles) {
  if (titles.length === 0 || titles.some((title) => !title)) return null;
  const start = text.indexOf(titles[0]);
  if (start < 0) return null;
  const line = text.lastIndexOf("\n", start) + 1;
  const before = text.slice(Math.max(line, start - 2), start);
  const after = text.slice(start + titles[0].length).slice(0, 2);
  const cuts = []; // where an item begins, and where its text does
  let from = 0;
  for (const title of titles) {
    const at = text.indexOf(before + title + after, from) + before.length;
    if (at < before.length) return null;
    const begin = at > 0 ? text.lastIndexOf("\n", at - 1) + 1 : 0;
    cuts.push([Math.max(from, begin), at + title.length]);
    from = at + title.length;
  }
  return cuts.map(([, body], n) => {
    const piece = text.slice(body, cuts[n + 1]?.[0] ?? text.length);
    const whole = n === cuts.length - 1 ? piece.replace(/\s*<[^<>\n]{1,40}>\s*$/, "") : piece;
    return whole.replace(/^["')\s]+/, "").trimEnd();
  });
}

// What an observation shows: the environment's `shows` says under which names its info has the
// items' ids, titles and scores, and what was asked for.
function observation(segment, shows, marked) {
  const info = segment.info ?? {};
  const ids = texts(info[shows.ids]);
  if (ids.length === 0) return step("observed", "Reads", tagged(segment.text.trim()));
  const titles = texts(info[shows.titles]);
  const bodies = titles.length === ids.length ? bodiesOf(segment.text, titles) : null;
  const rows = ids.map((id, n) => {
    const score = info[shows.scores]?.[n];
    const kind = marked.has(id) ? "item marked" : "item";
    const head = [
      h("span", "rank", String(n + 1)),
      h("span", { class: "title", title: id }, titles[n] || id),
      marked.has(id) && h("span", "badge", shows.mark ?? "marked"),
      bodies && h("span", "preview", clip(bodies[n], 160)),
      isNumber(score) && h("span", { class: "score", title: "score" }, score.toFixed(2)),
    ];
    return bodies
      ? folded(kind, head, h("div", { class: "body", dir: "auto" }, bodies[n]))
      : h("div", kind, h("div", "head", head));
  });
  const raw = () => h("div", { class: "body", dir: "auto" }, tagged(segment.text));
  const request = info[shows.request];
  return step("observation", "Reads",
    request && h("p", "request", "for ", h("mark", null, clip(String(request), 1000))),
    rows,
    !bodies && folded("raw", "the text that was read", raw()));
}

function reading(record, shows) {
  const marked = new Set(texts(record.info[shows.marked]));
  const segments = record.segments;
  const last = segments.findLastIndex((segment) => segment.provenance === "action");
  let inside = false; // of a thought
  return segments.map((segment, n) => {
    if (segment.provenance === "prompt") {
      inside = endsInside(segment.text, false);
      const size = plural(segment.tokens, "token");
      return folded("prompt", `Prompt, ${size}`, block(tagged(segment.text)));
    }
    if (segment.provenance !== "action") return observation(segment, shows, marked);
    const request = segments[n + 1]?.info?.[shows.request];
    const target = request || (n === last ? record.info.prediction : "");
    const label = request ? "Asks" : n === last ? "Answers" : "Writes";
    const pieces = thoughts(segment.text, inside);
    inside = endsInside(segment.text, inside);
    return pieces.map(([isThought, piece]) => isThought
      ? step("thought", "Thinks", highlighted(piece, request))
      : step("action", label, highlighted(piece, target)));
  });
}

// Every segment as it was, with what is learned from (1) and what is masked out (0), and the
// sampler's log-probability of each token where it was recorded.
function tokens(record) {
  const blocks = record.segments.map((segment) => {
    const isAction = segment.provenance === "action";
    const learned = isAction && !record.void;
    const pieces = isAction && Array.isArray(segment.pieces) ? segment.pieces : null;
    const label = h("div", "label",
      h("span", "who", segment.provenance),
      ` ${plural(segment.tokens, "token")} · mask ${learned ? 1 : 0}`,
      isAction && !pieces && " · log-probabilities: not recorded");
    const body = pieces
      ? pieces.map((piece, n) => token(String(piece), n, segment.logprobs?.[n]))
      : segment.text;
    return h("div", `segment ${learned ? "learned" : "masked"}`, label, block(body));
  });
  const any = record.segments.some((segment) => Array.isArray(segment.pieces));
  return [
    note(record.void
      ? "Void: nothing of this episode is learned from."
      : "Mask 1: the policy sampled it, and learns from it. Mask 0: given to it.",
    any && " The redder a token, the less likely it was; point at it for its log-probability."),
    blocks,
  ];
}

function token(piece, n, logprob) {
  const known = isNumber(logprob);
  const percent = (100 * Math.exp(logprob)).toFixed(1);
  const words = known ? `${logprob}, probability ${percent} %` : "not recorded";
  const title = `token ${n + 1}: ${JSON.stringify(piece)}, log-probability ${words}`;
  const element = h("span", { class: "token", title }, piece);
  if (known) element.style.setProperty("--doubt", `${Math.min(100, -logprob * 20).toFixed(0)}%`);
  return element;
}

function markedFound(record, shows) {
  const wanted = texts(record.info[shows.marked]);
  if (wanted.length === 0) return null;
  const things = `${shows.mark ?? "marked"} ${shows.item ?? "item"}s found`;
  const found = new Set(record.segments.flatMap((segment) => texts(segment.info?.[shows.ids])));
  const observed = record.segments.some((segment) => segment.provenance === "observation");
  if (observed && found.size === 0) return note(`Number of ${things}: not recorded.`);
  const missed = wanted.filter((id) => !found.has(id));
  return note(`${things[0].toUpperCase()}${things.slice(1)}: `,
    `${wanted.length - missed.length} of ${wanted.length}`,
    missed.length > 0 && `. Not found: ${clip(missed.join(", "), 200)}`);
}

const ELSEWHERE = [
  "question_id", "question", "prediction", "answers", "strata", "stop_reason", "void",
];
const isEmpty = (value) => value === null || value === ""
  || (typeof value === "object" && Object.keys(value).length === 0);

function half(record, set, place) {
  const { name, shows } = data.sets[set];
  if (!record) {
    return h("section", "side", h("h3", null, name), note("This run has no such question."));
  }
  const prediction = clip(String(record.info.prediction ?? "").trim(), 2000);
  const stop = [record.stop_reason, record.void && "(void)"].filter(Boolean).join(" ");
  const numbers = [["reward", record.reward], ...Object.entries(record.metrics), ["stop", stop]];
  const words = Object.entries(record.info)
    .filter(([key, value]) => !ELSEWHERE.includes(key) && key !== shows.marked && !isEmpty(value))
    .map(([key, value]) => [h("dt", null, key), h("dd", { dir: "auto" }, clip(show(value), 2000))]);
  return h("section", "side",
    h("h3", null, mark(place), " ", name),
    h("p", { class: "prediction", dir: "auto" }, prediction || quiet("no answer")),
    h("dl", "metrics", numbers.map(([metric, value]) =>
      h("div", null, h("dt", null, metric), h("dd", null, number(value) || "–")))),
    markedFound(record, shows),
    state.get("view") === "tokens" ? tokens(record) : reading(record, shows),
    words.length > 0 && folded("words", "what else the environment said", h("dl", null, words)));
}

const trajectory = h("article", "trajectory");
let turn = 0;

async function showTrajectory(item) {
  const mine = ++turn;
  main.setAttribute("aria-busy", "true");
  const sets = chosenSets();
  const places = sets.map((set) => item.sides[set]);
  const take = async (place) => place && (await chunk(place.at[0]))[place.at[1]];
  let shown;
  try {
    const records = await Promise.all(places.map(take));
    shown = h("div", sets.length > 1 ? "sides two" : "sides",
      sets.map((set, n) => half(records[n], set, places[n])));
  } catch (error) {
    const old = typeof DecompressionStream === "undefined";
    const why = old ? "this browser is too old; any of 2023 or later will do" : error.message;
    shown = h("p", "warning", `This cannot be shown: ${why}.`);
  }
  if (mine !== turn) return; // another was opened meanwhile
  trajectory.replaceChildren(
    bar(item),
    h("h2", { dir: "auto" }, clip(item.question, 4000)),
    h("p", "facts",
      item.answers.length > 0 && h("span", null,
        quiet("gold answer "), h("bdi", "gold-answer", clip(item.answers.join(" / "), 1000))),
      quiet([item.id, ...kinds(item), ...numbered(item)].join(" · "))),
    shown);
  main.setAttribute("aria-busy", "false");
}

const CLOSED = { open: "", sample: "0", view: "" };

function bar(item) {
  const found = choose();
  const at = found.indexOf(item);
  const to = (n, text, key) => at >= 0 && found[n]
    ? h("a", { href: address(opened(found[n])), title: `key ${key}` }, text)
    : quiet(text);
  const view = (name, text) => h("a", {
    href: address({ view: name }),
    title: "key t",
    "aria-current": state.get("view") === name && "true",
  }, text);
  return h("nav", "bar",
    h("a", { href: address(CLOSED), title: "key Escape" }, "← list"),
    to(at - 1, "previous", "k"), to(at + 1, "next", "j"),
    quiet(at >= 0 ? `${grouped(at + 1)} of ${grouped(found.length)}` : "not among those chosen"),
    h("span", "views", view("", "reading"), view("tokens", "tokens")));
}

// --- together ------------------------------------------------------------------------------------

const overview = h("div", "overview");
let last = null;
let scrolled = 0;

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
    turn += 1;
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
  note("Right is an exact match above 0.5; where there is none, the first metric, or the reward. ",
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
