"use strict";
// A graph that can be hovered, clicked, dragged, zoomed, searched and walked by keyboard. It knows nothing of what its nodes mean.

const READABLE = 0.8;

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
}

function element(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key === "class") node.className = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

class GraphView {
  // options: tooltip(node data) -> text, select(node data or null), toggle(node data), layout() -> cytoscape layout options
  constructor(stage, options) {
    this.stage = stage;
    this.options = options;
    this.canvas = stage.querySelector(".canvas");
    this.tooltip = stage.querySelector(".tooltip");
    this.cy = cytoscape({
      container: this.canvas, style: this.style(), minZoom: 0.05, maxZoom: 4, boxSelectionEnabled: false,
    });
    this.listen();
    this.addControls();
    const scheme = window.matchMedia("(prefers-color-scheme: dark)");
    scheme.addEventListener("change", () => this.restyle());
  }

  style() {
    const ink = colour("ink"), line = colour("line"), accent = colour("accent"), surface = colour("surface");
    return [
      { selector: "node", style: {
        label: "data(label)", "font-size": 13, "font-family": "system-ui, sans-serif", color: "data(ink)", "text-wrap": "wrap",
        "text-valign": "center", "text-max-width": 235, "background-color": "data(fill)", "border-width": 1,
        "border-color": line, shape: "round-rectangle", width: 245, height: 44 } },
      { selector: "node[shape]", style: { shape: "data(shape)", width: "data(size)", height: "data(size)" } },
      { selector: "node[?group]", style: { "border-width": 3, "border-style": "double", "border-color": ink } },
      { selector: "node:parent", style: {
        label: "data(label)", color: ink, "text-valign": "top", "text-margin-y": -2, "background-color": surface, "background-opacity": 0.5,
        "border-style": "dashed", "border-width": 1, "border-color": line, padding: 14, shape: "round-rectangle" } },
      { selector: "node[mark]", style: { "border-width": 3, "border-color": "data(mark)" } },
      { selector: "edge", style: {
        width: 1.4, "line-color": line, "target-arrow-color": line, "target-arrow-shape": "triangle", "arrow-scale": 0.8,
        "curve-style": "bezier" } },
      { selector: ".dim", style: { opacity: 0.15 } },
      { selector: ".hit", style: { "border-width": 4, "border-color": accent } },
      { selector: "node:selected", style: { "border-width": 4, "border-color": accent } },
    ];
  }

  restyle() {
    this.cy.style(this.style());
    if (this.options.recolour) this.options.recolour();
  }

  listen() {
    const cy = this.cy;
    cy.on("mouseover", "node", (event) => this.showTooltip(event.target));
    cy.on("mouseout", "node", () => this.hideTooltip());
    cy.on("pan zoom drag", () => this.hideTooltip());
    cy.on("tap", (event) => {
      if (event.target === cy) this.select(null);
      else if (event.target.isNode()) this.select(event.target);
    });
    cy.on("dbltap", "node", (event) => this.options.toggle && this.options.toggle(event.target.data()));
    this.canvas.addEventListener("mouseleave", () => this.hideTooltip());
    this.canvas.addEventListener("keydown", (event) => this.key(event));
  }

  showTooltip(node) {
    const box = node.renderedBoundingBox();
    this.tooltip.textContent = this.options.tooltip(node.data());
    this.tooltip.hidden = false;
    const width = this.tooltip.offsetWidth, space = this.stage.clientWidth;
    this.tooltip.style.left = Math.max(4, Math.min((box.x1 + box.x2 - width) / 2, space - width - 4)) + "px";
    const below = box.y2 + 6, fits = below + this.tooltip.offsetHeight < this.stage.clientHeight;
    this.tooltip.style.top = (fits ? below : Math.max(4, box.y1 - this.tooltip.offsetHeight - 6)) + "px";
  }

  hideTooltip() {
    this.tooltip.hidden = true;
  }

  addControls() {
    const button = (text, name, act) => element("button", { type: "button", title: name, "aria-label": name, onclick: act }, text);
    this.stage.append(element("div", { class: "controls", role: "group", "aria-label": "Zoom" },
      button("+", "Zoom in", () => this.zoom(1.3)), button("−", "Zoom out", () => this.zoom(1 / 1.3)),
      button("⤢", "Fit the whole graph", () => this.fit())));
  }

  zoom(factor) {
    const centre = { x: this.cy.width() / 2, y: this.cy.height() / 2 };
    this.cy.zoom({ level: this.cy.zoom() * factor, renderedPosition: centre });
  }

  fit() {
    this.cy.fit(undefined, 48); // the legend lies over the lower edge
  }

  // The top of the graph at a size that can be read.
  begin() {
    this.fit();
    if (this.cy.zoom() > 1.2) this.cy.zoom(1.2);
    this.cy.center();
    if (this.cy.zoom() < READABLE) {
      const box = this.cy.elements().boundingBox(), start = this.cy.nodes().filter((n) => !n.isParent())[0].position();
      this.cy.zoom(READABLE);
      this.cy.pan({ x: this.cy.width() / 2 - READABLE * start.x, y: 16 - READABLE * box.y1 });
    }
  }

  show(nodes, edges, keep) {
    const places = keep ? Object.fromEntries(this.cy.nodes().map((n) => [n.id(), { ...n.position() }])) : {};
    this.cy.batch(() => {
      this.cy.elements().remove();
      this.cy.add([...nodes.map((data) => ({ group: "nodes", data, position: data.position })),
        ...edges.map((data) => ({ group: "edges", data }))]);
    });
    this.cy.layout({ ...this.options.layout(), animate: false, fit: false }).run();
    const kept = this.cy.nodes().filter((n) => !n.isParent() && places[n.id()]);
    if (kept.length) {
      const first = kept[0], old = places[first.id()], now = first.position(), zoom = this.cy.zoom();
      this.cy.panBy({ x: zoom * (old.x - now.x), y: zoom * (old.y - now.y) });
    }
  }

  select(node) {
    this.cy.nodes().unselect();
    if (node) node.select();
    this.options.select(node ? node.data() : null);
  }

  // Select a node and bring it into view.
  reach(id) {
    const node = this.cy.getElementById(id);
    if (!node.length) return;
    this.select(node);
    this.cy.resize();
    this.cy.center(node);
    if (this.cy.zoom() < READABLE) this.cy.zoom({ level: READABLE, position: node.position() });
  }

  search(matches) {
    this.cy.elements().removeClass("dim hit");
    if (!matches) return 0;
    const hits = this.cy.nodes().filter((node) => !node.isParent() && matches(node.data()));
    this.cy.elements().not(hits.union(hits.ancestors())).addClass("dim");
    hits.addClass("hit");
    if (hits.length) this.cy.center(hits);
    return hits.length;
  }

  key(event) {
    const chosen = this.cy.nodes(":selected");
    const first = () => this.cy.nodes().filter((n) => !n.isParent())[0];
    const step = (next) => {
      const node = chosen.length ? next(chosen[0]) : first();
      if (node && node.length) this.reach(node.id());
    };
    const actions = {
      ArrowDown: () => step((n) => n.outgoers("node")), ArrowUp: () => step((n) => n.incomers("node")),
      ArrowRight: () => step((n) => this.beside(n, 1)), ArrowLeft: () => step((n) => this.beside(n, -1)),
      Home: () => first() && this.reach(first().id()), Escape: () => this.select(null),
      "+": () => this.zoom(1.3), "-": () => this.zoom(1 / 1.3), 0: () => this.fit(),
      Enter: () => chosen.length && this.options.toggle && this.options.toggle(chosen[0].data()),
    };
    if (!actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  }

  // The neighbour in the order of the drawing.
  beside(node, way) {
    const nodes = this.cy.nodes().filter((n) => !n.isParent());
    const place = nodes.indexOf ? nodes.toArray().indexOf(node) : 0;
    return nodes[place + way];
  }
}
