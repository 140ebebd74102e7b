// The state of the page: two evaluations, filters, page of the list, open trajectory. It is kept in
// the fragment of the address, so every view can be linked to and the back button works.

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

// The address of the present state with some changes; defaults are left out.
function address(changes) {
  const next = new Map([...state, ...Object.entries(changes)]);
  const params = new URLSearchParams();
  for (const [name, value] of next) {
    if (value !== (Object.hasOwn(DEFAULTS, name) ? DEFAULTS[name] : "")) params.set(name, value);
  }
  return `#${params}`;
}

// Change the state. A changed filter goes to the first page of the list. With `remember` the change
// becomes an entry of the browser's history.
function go(changes, remember = false) {
  if (Object.keys(changes).some(isFilter)) changes = { ...changes, page: "1" };
  const next = address(changes);
  if (next === (location.hash || "#")) return;
  if (remember) location.hash = next;
  else location.replace(next);
}

const chosenSets = () => ["a", "b"].map((s) => state.get(s)).filter((s) => s !== "").map(Number);

// Everything in an item that the word filter looks at, in lower case.
const itemTexts = new Map();
function itemText(item) {
  if (!itemTexts.has(item)) {
    const words = [item.id, item.question, ...item.answers];
    for (const side of item.sides) if (side) words.push(side.prediction);
    itemTexts.set(item, words.join("\n").toLowerCase());
  }
  return itemTexts.get(item);
}

function hasVerdict(verdict, sides) {
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

const rewardGain = (item, [a, b]) => item.sides[b].reward - item.sides[a].reward;

// The items that pass the filters, sorted. The result is kept until a filter changes.
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
    return hasVerdict(state.get("verdict"), sides)
      && (text === "" || itemText(item).includes(text));
  });
  const sign = { gain: -1, loss: 1 }[state.get("sort")];
  if (sign && sets.length === 2) {
    chosen.sort((x, y) => sign * (rewardGain(x, sets) - rewardGain(y, sets)));
  }
  return chosen;
}
