// One trajectory, or two side by side: as it reads, or token by token.

const KEPT = 6; // unpacked chunks kept in memory

// The records of the n-th chunk (a promise).
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

// A text with its tags dimmed, and the last occurrence of a request or an answer marked.
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

// Split an action into [is a thought, text] pairs, in order. With `inside` the action begins inside
// a thought that the prompt or an earlier action opened. The last thought need not be closed.
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

// The texts of an observation's items. An item begins where its title stands between the same two
// characters as the first title. Null if a title is not found.
function bodiesOf(text, titles) {
  if (titles.length === 0 || titles.some((title) => !title)) return null;
  const start = text.indexOf(titles[0]);
  if (start < 0) return null;
  const line = text.lastIndexOf("\n", start) + 1;
  const before = text.slice(Math.max(line, start - 2), start);
  const after = text.slice(start + titles[0].length).slice(0, 2);
  const cuts = []; // per item: where it begins, where its text begins
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

// An observation. `shows` gives the environment's names, in an observation's info, for the request
// and for the items' ids, titles and scores.
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

// The segments of a record as a person reads them.
function reading(record, shows) {
  const marked = new Set(texts(record.info[shows.marked]));
  const segments = record.segments;
  const last = segments.findLastIndex((segment) => segment.provenance === "action");
  let inside = false; // inside a thought
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

// Every segment as it was sampled or read, with its loss mask, and with the sampler's
// log-probability of each token if it was recorded.
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

// How many of the marked items the episode found.
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

// Entries of an info that the page shows in other places.
const ELSEWHERE = [
  "question_id", "question", "prediction", "answers", "strata", "stop_reason", "void",
];
const isEmpty = (value) => value === null || value === ""
  || (typeof value === "object" && Object.keys(value).length === 0);

function sidePanel(record, set, side) {
  const { name, shows } = data.sets[set];
  if (!record) {
    return h("section", "side", h("h3", null, name), note("This run has no such question."));
  }
  const prediction = clip(String(record.info.prediction ?? "").trim(), 2000);
  const stop = [record.stop_reason, record.void && "(void)"].filter(Boolean).join(" ");
  const numbers = [["reward", record.reward], ...Object.entries(record.metrics), ["stop", stop]];
  const others = Object.entries(record.info)
    .filter(([key, value]) => !ELSEWHERE.includes(key) && key !== shows.marked && !isEmpty(value))
    .map(([key, value]) => [h("dt", null, key), h("dd", { dir: "auto" }, clip(show(value), 2000))]);
  return h("section", "side",
    h("h3", null, mark(side), " ", name),
    h("p", { class: "prediction", dir: "auto" }, prediction || quiet("no answer")),
    h("dl", "metrics", numbers.map(([metric, value]) =>
      h("div", null, h("dt", null, metric), h("dd", null, number(value) || "–")))),
    markedFound(record, shows),
    state.get("view") === "tokens" ? tokens(record) : reading(record, shows),
    others.length > 0 && folded("words", "what else the environment said", h("dl", null, others)));
}

const trajectory = h("article", "trajectory");
let latest = 0; // number of the latest view that was asked for

async function showTrajectory(item) {
  const mine = ++latest;
  main.setAttribute("aria-busy", "true");
  const sets = chosenSets();
  const sides = sets.map((set) => item.sides[set]);
  const take = async (side) => side && (await chunk(side.at[0]))[side.at[1]];
  let shown;
  try {
    const records = await Promise.all(sides.map(take));
    shown = h("div", sets.length > 1 ? "sides two" : "sides",
      sets.map((set, n) => sidePanel(records[n], set, sides[n])));
  } catch (error) {
    const old = typeof DecompressionStream === "undefined";
    const why = old ? "this browser is too old; any of 2023 or later will do" : error.message;
    shown = h("p", "warning", `This cannot be shown: ${why}.`);
  }
  if (mine !== latest) return; // something else was opened meanwhile
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
    quiet(at >= 0 ? `${grouped(at + 1)} of ${grouped(found.length)}` : "not in the filtered list"),
    h("span", "views", view("", "reading"), view("tokens", "tokens")));
}
