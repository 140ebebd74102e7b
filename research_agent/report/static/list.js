// The list of trajectories with its filters and pages.

const PAGE = 50; // rows per page

// The environment names the metric that counts requests.
const requestsName = () => data.sets.map((set) => set.shows.requests).find(Boolean) ?? "requests";

const selects = new Map();
function select(name, label, options) {
  const onchange = (event) => go({ [name]: event.target.value });
  const element = h("select", { id: `f-${name}`, onchange },
    options.map(([value, text]) => h("option", { value }, clip(text, 60))));
  selects.set(name, element);
  return h("label", null, h("span", null, label), element);
}

function distinct(valueOf) {
  const values = new Set(data.items.flatMap((item) => item.sides.filter(Boolean).map(valueOf)));
  return [...values].filter((value) => value !== "" && value !== null && value !== undefined);
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

// Make the filters anew when one evaluation or two are chosen instead of two or one.
let filtersAreFor = null;
function fillFilters() {
  const compared = chosenSets().length === 2;
  if (filtersAreFor === compared) return;
  filtersAreFor = compared;
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
  const both = (valueOf) => [...new Set(sides.map((side) => number(valueOf(side))))].join(" → ");
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

// How many trajectories pass the filters, and how many cannot be compared.
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
