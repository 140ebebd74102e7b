// The overview above the list: learning curves, means, means by strata, and settings.

// A chart of lines {run, points: [[step, value], ...]}, with a readout of the pointed step.
function chart(name, lines) {
  const [left, right, top, bottom, width, height] = [34, 10, 8, 20, 320, 150];
  const points = lines.flatMap((line) => line.points);
  let low = Math.min(...points.map((p) => p[1]));
  let high = Math.max(...points.map((p) => p[1]));
  if (low >= 0 && high <= 1) [low, high] = [0, 1]; // fractions get the whole scale
  else if (low === high) [low, high] = [low - 0.5, high + 0.5];
  const first = Math.min(...points.map((p) => p[0]));
  const last = Math.max(...points.map((p) => p[0]), first + 1);
  const x = (step) => left + ((step - first) / (last - first)) * (width - left - right);
  const y = (value) => height - bottom - ((value - low) / (high - low)) * (height - top - bottom);
  const readout = h("span", "quiet");
  const showValues = (step) => {
    const values = lines.map((line) => {
      const off = (point) => Math.abs(point[0] - step);
      const near = line.points.reduce((p, q) => (off(q) < off(p) ? q : p));
      return lines.length > 1 ? number(near[1]) : `step ${near[0]}: ${number(near[1])}`;
    });
    readout.textContent = values.join(" · ");
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
    showValues(first + ((across - left) / (width - left - right)) * (last - first));
  });
  svg.addEventListener("pointerleave", () => showValues(last));
  showValues(last);
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
