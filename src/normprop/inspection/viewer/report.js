"use strict";
// The page of a report: groups rows by their modules, colours them, and shows one in detail.

const data = JSON.parse(document.getElementById("data").textContent);
const rows = data.rows, byName = Object.fromEntries(rows.map((row) => [row.name, row]));
const MOST_SHOWN = 40;
const byId = (id) => document.getElementById(id);
const short = (x) => (x === null || x === undefined ? "–" : !Number.isFinite(x) ? String(x)
  : Math.abs(x) >= 1e5 || (x !== 0 && Math.abs(x) < 1e-3) ? x.toExponential(2) : String(+x.toPrecision(3)));
const RANK = { error: 3, warning: 2, note: 1 };
const findings = {};
for (const finding of data.findings) (findings[finding.name] ||= []).push(finding);
const worst = (names) => names.flatMap((n) => findings[n] || []).reduce(
  (a, f) => (a && RANK[a.severity] >= RANK[f.severity] ? a : f), null);

// Groups: prefixes of module paths that hold several modules.

const groups = new Map();
for (const row of rows) {
  const parts = row.path.split(".");
  for (let depth = 1; depth <= parts.length; depth++) {
    const path = parts.slice(0, depth).join(".");
    if (path) (groups.get(path) || groups.set(path, []).get(path)).push(row.name);
  }
}
for (const [path, names] of [...groups]) {
  const calls = names.every((name) => byName[name].path === path);  // one module, called several times
  if (names.length < 2 || calls || names.length >= rows.length - 1) groups.delete(path);
}
const ancestry = (row) => {
  const parts = row.path.split(".");
  return parts.map((_, i) => parts.slice(0, i + 1).join(".")).filter((path) => groups.has(path));
};
const depthOf = (path) => path.split(".").filter((_, i, all) => groups.has(all.slice(0, i + 1).join("."))).length;
const opened = new Set();

const shownAs = (row) => ancestry(row).find((path) => !opened.has(path)) || null;
const shownCount = () => new Set(rows.map((row) => shownAs(row) || ":" + row.name)).size;

function openSome() {
  opened.clear();
  for (let depth = 1; depth < 12; depth++) {
    const level = [...groups.keys()].filter((path) => depthOf(path) === depth);
    if (!level.length) return;
    for (const path of level) opened.add(path);
    if (shownCount() <= MOST_SHOWN) continue;
    for (const path of level) opened.delete(path);
    if (depth === 1) for (const path of level) {  // stages: those that fit
      opened.add(path);
      if (shownCount() > MOST_SHOWN) opened.delete(path);
    }
    return;
  }
}

// What is known of a row, at the chosen step of training.

let step = null;
const past = data.history;

function state(row) {
  const then = step !== null && past.rows[row.path];
  if (then) {
    const at = (key) => (then[key] ? then[key][step] : null);
    return { mean: at("mean"), std: at("std"), drift: at("drift") };
  }
  const moments = row.measured || row.predicted;
  return { mean: moments.mean, std: moments.std, drift: row.drift };
}

function stateOf(names) {
  const all = names.map((name) => state(byName[name]));
  const last = all[all.length - 1];
  const most = (key) => all.reduce((a, s) => (s[key] !== null && Math.abs(s[key]) > Math.abs(a) ? s[key] : a), 0);
  return { mean: most("mean"), std: last.std, drift: all.some((s) => s.drift !== null) ? most("drift") : null };
}

// Colours

const channels = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
function blend(a, b, share) {
  const [x, y] = [channels(a), channels(b)];
  return "#" + x.map((v, i) => Math.round(v + share * (y[i] - v)).toString(16).padStart(2, "0")).join("");
}
const between = (value, end) => blend(colour("node"), colour(value < 0 ? "low" : "high"), Math.min(Math.abs(value) / end, 1));

function fill(names) {
  const mode = byId("colour").value, now = stateOf(names);
  if (mode === "finding") {
    const finding = worst(names);
    return colour(finding ? finding.severity : "node");
  }
  if (mode === "drift") return now.drift === null ? colour("node") : between(now.drift, 2);
  if (mode === "std") return now.std > 0 ? between(Math.log2(now.std), 4) : colour("low");
  return between(now.mean / (now.std || 1), 3);
}

function ink(background) {
  const [r, g, b] = channels(background);
  return 0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#111418" : "#ffffff";
}

const LEGENDS = {
  finding: [["error", "error"], ["warning", "warning"], ["note", "note"], ["node", "nothing to remark"]],
  drift: [["node", "as predicted"], ["high", "2 octaves off or more"]],
  std: [["low", "std 1/16 or less"], ["node", "std 1"], ["high", "std 16 or more"]],
  mean: [["low", "mean −3 std"], ["node", "0"], ["high", "mean +3 std"]],
};
function legend() {
  byId("legend").replaceChildren(...LEGENDS[byId("colour").value].flatMap(([name, text]) => {
    const box = element("i", {});
    box.style.background = colour(name);
    return [box, text];
  }));
}

// The graph

function label(row) {
  const path = row.path || row.name, now = state(row);
  return `${path.length > 30 ? "…" + path.slice(-29) : path}\n${row.operation.split(".").pop()} · std ${short(now.std)}`;
}

function nodesAndEdges() {
  const nodes = new Map(), edges = new Map(), at = {};
  for (const row of rows) {
    const group = shownAs(row), id = group ? "g:" + group : "r:" + row.name;
    at[row.name] = id;
    if (nodes.has(id)) continue;
    const above = ancestry(row).filter((path) => opened.has(path)).filter((path) => !group || group.startsWith(path + "."));
    const names = group ? groups.get(group) : [row.name];
    const parent = above.length ? "b:" + above[above.length - 1] : undefined;
    above.forEach((path, i) => {
      if (!nodes.has("b:" + path)) nodes.set("b:" + path, {
        id: "b:" + path, box: path, label: path, parent: i ? "b:" + above[i - 1] : undefined, names: groups.get(path) });
    });
    const last = byName[names[names.length - 1]];
    const text = group ? `${group}\n${names.length} operations · std ${short(state(last).std)}` : label(row);
    nodes.set(id, { id, group, names, parent, label: text, ...look(names) });
  }
  for (const row of rows) for (const source of row.inputs) {
    const [from, to] = [at[source], at[row.name]];
    if (from && to && from !== to) edges.set(from + ">" + to, { id: from + ">" + to, source: from, target: to });
  }
  return [[...nodes.values()], [...edges.values()]];
}

function look(names) {
  const background = fill(names), finding = worst(names);
  return { fill: background, ink: ink(background), ...(finding ? { mark: colour(finding.severity) } : {}) };
}

function told(item) {
  const names = item.names, now = stateOf(names), row = byName[names[names.length - 1]];
  const lines = [item.box || item.group || row.path || row.name];
  if (names.length > 1) lines[0] += `: ${names.length} operations`;
  else lines.push(row.operation);
  lines.push(`predicted mean ${short(row.predicted.mean)}, std ${short(row.predicted.std)}`);
  if (row.measured) lines.push(`measured mean ${short(row.measured.mean)}, std ${short(row.measured.std)}`);
  if (step !== null) lines.push(`step ${past.steps[step]}: mean ${short(now.mean)}, std ${short(now.std)}`);
  const finding = worst(names);
  if (finding) lines.push(finding.sentence);
  return lines.join("\n");
}

const view = new GraphView(byId("stage"), {
  tooltip: told,
  select: (item) => (item ? showDetails(item) : hideDetails()),
  toggle: (item) => toggle(item.group || item.box),
  recolour: () => recolour(),
  layout: () => ({ name: "dagre", rankDir: "TB", nodeSep: 24, rankSep: 28 }),
});

function draw(keep) {
  view.show(...nodesAndEdges(), keep);
  find();
}

function recolour() {
  legend();
  view.cy.batch(() => view.cy.nodes().filter((n) => !n.isParent()).forEach((n) => {
    n.data(look(n.data("names")));
    const row = byName[n.data("names")[0]];
    if (!n.data("group")) n.data("label", label(row));
  }));
}

function toggle(path) {
  if (!path) return;
  if (opened.has(path)) for (const inner of [...opened]) { if (inner === path || inner.startsWith(path + ".")) opened.delete(inner); }
  else opened.add(path);
  draw(true);
  view.reach(opened.has(path) ? "b:" + path : "g:" + path);
}

// Show a row, in a block that is opened for it.
function reveal(name) {
  asTable(false);
  for (const path of ancestry(byName[name])) opened.add(path);
  draw(true);
  view.reach("r:" + name);
}

function find() {
  const wanted = byId("search").value.trim().toLowerCase();
  const has = (row) => (row.path + " " + row.name + " " + row.operation).toLowerCase().includes(wanted);
  view.search(wanted ? (item) => item.names.some((name) => has(byName[name])) : null);
  let count = 0;
  for (const line of byId("table").querySelectorAll("tbody tr")) {
    line.hidden = wanted !== "" && !has(byName[line.dataset.name]);
    count += !line.hidden;
  }
  byId("hits").textContent = wanted ? `${count} of ${rows.length}` : "";
}

// Details

function hideDetails() {
  byId("details").hidden = true;
}

function showDetails(item) {
  const panel = byId("details"), several = item.names.length > 1, row = byName[item.names[0]];
  const close = element("button", { type: "button", class: "close", "aria-label": "Close details", onclick: () => view.select(null) }, "×");
  const path = item.box || item.group;
  panel.replaceChildren(close, element("h2", {}, path || row.path || row.name),
    ...item.names.flatMap((name) => findings[name] || []).slice(0, 5).map((f) => element("p", {},
      element("span", { class: "badge " + f.severity }, f.severity), f.sentence)),
    ...(several || path ? groupDetails(item, path) : rowDetails(row)));
  panel.hidden = false;
}

function groupDetails(item, path) {
  const open = opened.has(path);
  return [
    element("button", { type: "button", onclick: () => toggle(path) }, open ? "Collapse this block" : "Expand this block"),
    element("h3", {}, `${item.names.length} operations`),
    element("ul", {}, ...item.names.slice(0, 200).map((name) => element("li", {}, element("a", {
      href: "#", onclick: (event) => { event.preventDefault(); reveal(name); } },
      `${byName[name].path || name} (${byName[name].operation})`)))),
  ];
}

function facts(pairs) {
  return element("dl", {}, ...pairs.filter((p) => p[1] !== null && p[1] !== "").flatMap(
    ([key, value]) => [element("dt", {}, key), element("dd", {}, value)]));
}

function rowDetails(row) {
  const pair = (moments) => moments && `mean ${short(moments.mean)}, std ${short(moments.std)}`;
  const [rule, ...text] = data.rules[row.rule].split("\n");
  return [
    facts([["operation", row.operation], ["shape", row.shape.join(" × ")], ["predicted", pair(row.predicted)],
      ["measured", pair(row.measured)], ["drift", row.drift === null ? null : `${short(row.drift)} octaves`],
      ["slope", row.slope === null ? null : short(row.slope)], ["growth", short(Math.sqrt(Math.max(0, row.sensitivity)))],
      ["standing", row.standing + (row.reason ? ": " + row.reason : "")]]),
    ...perChannel(row), ...histogram(row), ...overSteps(row),
    ...(row.source ? [element("h3", {}, "Code"), element("pre", {}, row.source + (row.code ? "\n" + row.code : ""))] : []),
    ...(rule ? [element("h3", {}, "Rule"), element("pre", { class: "rule" }, rule + "\n" + text.join("\n"))] : []),
  ];
}

// Figures

const SVG = "http://www.w3.org/2000/svg";
function svg(tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

const W = 340, H = 130, LEFT = 42, BOTTOM = 16;
function frame(name, low, high, ends) {
  const figure = svg("svg", { viewBox: `0 0 ${W} ${H + BOTTOM}`, role: "img", "aria-label": name });
  const y = (v) => 6 + (H - 12) * (1 - (v - low) / (high - low || 1));
  figure.append(svg("text", { x: 0, y: y(high) + 8 }, short(high)), svg("text", { x: 0, y: y(low) }, short(low)),
    svg("line", { x1: LEFT, x2: W, y1: y(low), y2: y(low), stroke: "var(--line)" }),
    svg("text", { x: LEFT, y: H + 12 }, ends[0]), svg("text", { x: W, y: H + 12, "text-anchor": "end" }, ends[1]));
  return [figure, y];
}
const along = (i, count) => LEFT + (W - LEFT) * (count > 1 ? i / (count - 1) : 0.5);
const finite = (values) => values.filter((v) => v !== null && Number.isFinite(v));

function lines(name, sets, ends) {
  const all = finite(sets.flatMap(([values]) => values)), low = Math.min(0, ...all), high = Math.max(...all, low + 1e-9);
  const [figure, y] = frame(name, low, high, ends);
  for (const [values, tone, kind] of sets) {
    const points = values.map((v, i) => [v, i]).filter(([v]) => v !== null && Number.isFinite(v));
    if (kind === "dots") for (const [v, i] of points) figure.append(
      svg("circle", { cx: along(i, values.length), cy: y(v), r: values.length > 80 ? 1.3 : 2.4, fill: `var(--${tone})` }));
    else figure.append(svg("polyline", { points: points.map(([v, i]) => along(i, values.length) + "," + y(v)).join(" "),
      fill: "none", stroke: `var(--${tone})`, "stroke-width": 1.5 }));
  }
  return figure;
}

function perChannel(row) {
  const c = row.channels;
  if (!c) return [];
  const last = `channel ${row.channel_count - 1}`;
  const sets = (key) => [[c["predicted_" + key], "predicted"], ...(c["measured_" + key] ? [[c["measured_" + key], "measured", "dots"]] : [])];
  const shown = c.predicted_std.length < row.channel_count ? `, ${c.predicted_std.length} of ${row.channel_count}` : "";
  return ["std", "mean"].flatMap((key) => [
    element("h3", {}, `${key === "std" ? "Standard deviation" : "Mean"} per channel${shown}: line predicted${c.measured_std ? ", dots measured" : ""}`),
    lines(`${key} per channel`, sets(key), ["channel 0", last])]);
}

function histogram(row) {
  if (!row.histogram) return [];
  const shares = row.histogram.shares, bell = data.gaussian, [figure, y] = frame(
    "Histogram of measured values beside a Gaussian", 0, Math.max(...shares, ...bell), ["−4 std", "+4 std"]);
  const width = (W - LEFT) / shares.length;
  shares.forEach((share, i) => figure.append(svg("rect", {
    x: LEFT + i * width, width: width - 0.6, y: y(share), height: Math.max(0, y(0) - y(share)), fill: "var(--measured)", opacity: 0.65 })));
  figure.append(svg("polyline", { fill: "none", stroke: "var(--predicted)", "stroke-width": 1.8,
    points: bell.map((share, i) => `${LEFT + (i + 0.5) * width},${y(share)}`).join(" ") }));
  return [element("h3", {}, `Values beside the Gaussian: ${Math.round(100 * row.histogram.distance)} % apart`), figure];
}

function overSteps(row) {
  const then = past && past.rows[row.path];
  if (!then || !then.std) return [];
  const ends = [`step ${past.steps[0]}`, `step ${past.steps[past.steps.length - 1]}`];
  return [element("h3", {}, "Standard deviation over training"), lines("std over training", [[then.std, "measured"]], ends)];
}

// The table

function asTable(yes) {
  byId("table").hidden = !yes;
  byId("stage").hidden = yes;
  byId("as-table").setAttribute("aria-pressed", yes);
  byId("as-graph").setAttribute("aria-pressed", !yes);
  if (!yes) view.cy.resize();
}

function sortBy(place, button) {
  const body = byId("table").querySelector("tbody"), way = button.dataset.way === "up" ? -1 : 1;
  const key = (line) => line.cells[place].dataset.value ?? line.cells[place].textContent;
  const numeric = button.parentElement.classList.contains("number");
  const lines = [...body.rows].sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (!numeric) return way * x.localeCompare(y, undefined, { numeric: true });
    return way * ((x === "" ? -Infinity : +x) - (y === "" ? -Infinity : +y));
  });
  for (const other of byId("table").querySelectorAll("th")) {
    other.removeAttribute("aria-sort");
    if (other !== button.parentElement) delete other.firstElementChild.dataset.way;
  }
  button.dataset.way = way === 1 ? "up" : "down";
  button.parentElement.setAttribute("aria-sort", way === 1 ? "ascending" : "descending");
  body.append(...lines);
}

byId("table").querySelectorAll("th button").forEach((button, place) => button.addEventListener("click", () => sortBy(place, button)));
for (const line of byId("table").querySelectorAll("tbody tr")) {
  const open = () => reveal(line.dataset.name);
  line.addEventListener("click", open);
  line.addEventListener("keydown", (event) => event.key === "Enter" && open());
}

// Tools

byId("as-graph").addEventListener("click", () => asTable(false));
byId("as-table").addEventListener("click", () => asTable(true));
byId("search").addEventListener("input", find);
byId("colour").addEventListener("change", recolour);
byId("collapse").addEventListener("click", () => { opened.clear(); draw(); view.begin(); });
byId("expand").addEventListener("click", () => { for (const path of groups.keys()) opened.add(path); draw(); view.begin(); });
for (const button of document.querySelectorAll(".findings button")) button.addEventListener("click", () => reveal(button.dataset.name));
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && document.activeElement.tagName !== "INPUT") { event.preventDefault(); byId("search").focus(); }
});
if (!groups.size) byId("collapse").parentElement.hidden = true;
if (past && past.steps.length) {
  const slider = byId("step");
  byId("steps").hidden = false;
  slider.max = past.steps.length - 1;
  slider.addEventListener("input", () => {
    step = +slider.value;
    byId("step-shown").textContent = past.steps[step];
    recolour();
  });
}

openSome();
draw();
view.begin();
legend();
document.documentElement.dataset.ready = "true";
