"use strict";
// The map of the literature: papers by year, and what is known of each.

const papers = JSON.parse(document.getElementById("data").textContent).papers;
const byId = (id) => document.getElementById(id);
const COLUMN = 185, LINE = 46;

// A column a year, those without one at the end; the root stands in the middle of its own.
function places() {
  const years = [...new Set(papers.map((paper) => paper.year || 9999))].sort((a, b) => a - b);
  const columns = years.map((year) => papers.filter((paper) => (paper.year || 9999) === year));
  const found = {};
  columns.forEach((column, i) => {
    const ordered = column.filter((p) => p.relation !== "root"), root = column.find((p) => p.relation === "root");
    if (root) ordered.splice(Math.floor(ordered.length / 2), 0, root);
    ordered.forEach((paper, j) => { found[paper.id] = { x: i * COLUMN, y: (j - (ordered.length - 1) / 2) * LINE }; });
  });
  return found;
}

function short(paper) {
  const name = (paper.authors[0] || "unknown").split(" ").pop();
  return `${name}${paper.authors.length > 1 ? " et al." : ""} ${paper.year || ""}`;
}

const look = (paper) => ({ fill: colour(paper.relation), ink: "#ffffff", ...(paper.api ? { mark: colour("accent") } : {}) });

function showPaper(paper) {
  const panel = byId("details");
  panel.hidden = !paper;
  if (!paper) return;
  const told = { root: "the paper itself", cites: "cites Normalization Propagation", cited: "is cited by Normalization Propagation" };
  const facts = [["authors", paper.authors.join(", ") || "unknown"], ["year", paper.year || "unknown"], ["relation", told[paper.relation]]];
  const link = (url, text) => element("a", { href: url, rel: "noopener" }, text);
  panel.replaceChildren(
    element("button", { type: "button", class: "close", "aria-label": "Close details", onclick: () => view.select(null) }, "×"),
    element("h2", {}, paper.title),
    element("dl", {}, ...facts.flatMap(([key, value]) => [element("dt", {}, key), element("dd", {}, String(value))])),
    ...(paper.adds ? [element("p", { class: "adds" }, paper.adds)] : []),
    element("p", {}, paper.arxiv ? link(`https://arxiv.org/abs/${paper.arxiv}`, `arXiv ${paper.arxiv}`)
      : link(`https://www.semanticscholar.org/search?q=${encodeURIComponent(paper.title)}`, "Search for it")),
    ...(paper.api ? [element("p", {}, "In normprop: ", link(paper.page, paper.api))] : []));
}

const view = new GraphView(byId("stage"), {
  tooltip: (paper) => paper.title,
  select: showPaper,
  recolour: () => view.cy.nodes().forEach((node) => { node.data(look(node.data())); }),
  layout: () => ({ name: "preset" }),
});

function find() {
  const wanted = byId("search").value.trim().toLowerCase(), ours = byId("ours").checked;
  const has = (paper) => (!ours || paper.api) && `${paper.title} ${paper.authors.join(" ")} ${paper.year}`.toLowerCase().includes(wanted);
  const count = view.search(wanted || ours ? has : null);
  for (const line of byId("table").querySelectorAll("li")) line.hidden = !has(papers[line.dataset.place]);
  byId("hits").textContent = wanted || ours ? `${count} of ${papers.length}` : "";
}

function asList(yes) {
  byId("table").hidden = !yes;
  byId("stage").hidden = yes;
  byId("as-table").setAttribute("aria-pressed", yes);
  byId("as-graph").setAttribute("aria-pressed", !yes);
  if (!yes) view.cy.resize();
}

byId("search").addEventListener("input", find);
byId("ours").addEventListener("change", find);
byId("as-graph").addEventListener("click", () => asList(false));
byId("as-table").addEventListener("click", () => asList(true));

const where = places(), root = papers.find((paper) => paper.relation === "root");
view.show(
  papers.map((paper) => ({ ...paper, label: short(paper), position: where[paper.id], ...look(paper) })),
  papers.filter((paper) => paper !== root).map((paper) => (paper.relation === "cites"
    ? { id: "e" + paper.id, source: paper.id, target: root.id } : { id: "e" + paper.id, source: root.id, target: paper.id })));
view.cy.style().selector("node").style({ width: 160, height: 34, "font-size": 12 })
  .selector("node[relation = 'root']").style({ width: 160, height: 48, "font-weight": "bold" })
  .selector("edge").style({ opacity: 0.25, "curve-style": "straight" }).update();
view.fit();
document.documentElement.dataset.ready = "true";
