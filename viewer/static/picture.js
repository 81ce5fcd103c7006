/* The picture: Cytoscape with positions from the server, and the axes around it as HTML that follows the viewport. */

import { make } from "./dom.js";

const FONT = 11; // screen pixels at any zoom
const CHARACTER = 6.1; // mean width of one in that font
const SMALLEST_ZOOM = { finger: 0.55, mouse: 0.3 }; // at first; below it nodes are too small to be seen or touched
const LINE = 14; // screen pixels from the name of a layer to the next
const NARROWEST_WORD = 48; // a word is cut to its column, but not to less

export function createPicture(container, graph) {
  const cy = globalThis.cytoscape({
    container,
    elements: { nodes: graph.nodes, edges: graph.edges },
    layout: { name: "preset", fit: false },
    style: style(),
    minZoom: 0.02,
    maxZoom: 4,
    autoungrabify: true,
    boxSelectionEnabled: false,
    selectionType: "single",
    pixelRatio: graph.nodes.length > 1500 ? 1 : "auto",
  });
  globalThis.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    cy.style(style());
    label(cy);
  });
  const follow = createAxes(cy, graph);
  let waiting = 0;
  cy.on("viewport", () => {
    follow();
    clearTimeout(waiting);
    waiting = setTimeout(() => label(cy), 60);
  });
  cy.on("mouseover mouseout", "node", (event) => {
    event.target.toggleClass("hovered", event.type === "mouseover");
    label(cy);
  });
  cy.on("resize", follow);
  open(cy);
  return cy;
}

export function fit(cy) {
  cy.fit(shownNodes(cy), 36);
}

/* All nodes if they are large enough then; else the end of the prompt, where the answer is. */
function open(cy) {
  fit(cy);
  const zoom = cy.width() > 700 ? SMALLEST_ZOOM.mouse : SMALLEST_ZOOM.finger;
  if (cy.zoom() >= zoom) return;
  const box = shownNodes(cy).boundingBox({ includeLabels: false });
  const top = Math.max(30, (cy.height() - box.h * zoom) / 2);
  cy.viewport({ zoom, pan: { x: cy.width() - 24 - box.x2 * zoom, y: top - box.y1 * zoom } });
}

/* By class: Cytoscape's own ":visible" tells the state of the last frame. */
function shownNodes(cy) {
  return cy.nodes().not(".pruned").union(cy.nodes(".picked"));
}

/* Labels that do not cover each other, the most telling first; more of them as the reader comes closer. */
export function label(cy) {
  const zoom = cy.zoom();
  const picked = cy.nodes(".picked, .near");
  const candidates = picked.length ? shownNodes(cy).filter(".picked, .near, .hovered") : shownNodes(cy);
  const taken = [];
  const named = [];
  for (const node of candidates.sort((a, b) => rank(b) - rank(a)).toArray()) {
    if (!node.is(".hovered, .picked, .near.error") && speaksForItself(node)) continue;
    const { x, y } = node.renderedPosition();
    const radius = (node.data("size") * zoom) / 2;
    const width = node.data("label").length * CHARACTER + 6;
    const box = node.is(".logit")
      ? { left: x - radius - width, right: x, top: y - FONT / 2, bottom: y + FONT / 2 }
      : { left: x - width / 2, right: x + width / 2, top: y + radius, bottom: y + radius + FONT + 5 };
    if (!node.is(".hovered, .picked") && taken.some((other) => overlap(box, other))) continue;
    taken.push(box);
    named.push(node);
  }
  cy.batch(() => {
    cy.nodes(".named").removeClass("named");
    for (const node of named) node.data({ font: FONT / zoom, halo: 2.5 / zoom }).addClass("named");
  });
}

/* Words stand below the tokens, and what an error misses has no name. */
function speaksForItself(node) {
  return node.is(".token, .error");
}

function rank(node) {
  const first = node.hasClass("hovered") ? 8 : node.hasClass("picked") ? 4 : node.data("kind") === "logit" ? 2 : 0;
  return first + (node.data("strength") ?? node.data("importance"));
}

function overlap(one, other) {
  return one.left < other.right && other.left < one.right && one.top < other.bottom && other.top < one.bottom;
}

function createAxes(cy, graph) {
  const layers = document.getElementById("layers");
  const words = document.getElementById("words");
  const underlay = document.getElementById("underlay");
  const columns = graph.columns.filter((column) => column.extent > 0);
  const stripes = graph.bands.map((band, index) => make("div", { class: index % 2 ? "band odd" : "band" }));
  const lines = columns.map(() => make("div", { class: "column" }));
  const names = graph.bands.map((band) => make("span", {}, band.text));
  const texts = columns.map((column) => make("span", { title: column.text }, column.text));
  underlay.append(...stripes, ...lines);
  layers.append(...names);
  words.append(...texts);
  return () => {
    const { x, y } = cy.pan();
    const bands = spans(graph.bands, cy.zoom(), y);
    const places = spans(columns, cy.zoom(), x);
    for (const [index, band] of bands.entries()) place(stripes[index], "top", "height", band);
    for (const [index, column] of places.entries()) place(lines[index], "left", "width", column);
    name(names, "top", "height", bands, () => LINE);
    name(texts, "left", "width", places, (text) => Math.min(NARROWEST_WORD, text.length * CHARACTER + 6));
  };
}

/* Columns or bands in pixels of the screen. */
function spans(all, zoom, pan) {
  return all.map(({ text, middle, extent }) => ({ text, middle: middle * zoom + pan, extent: extent * zoom }));
}

/* Names that do not cover each other, from the last on, which is the output or the token that predicts it. */
function name(elements, side, size, all, needed) {
  let after = null;
  for (const [index, span] of [...all.entries()].reverse()) {
    const box = { middle: span.middle, extent: Math.max(span.extent, needed(span.text)) };
    const covers = after && Math.abs(box.middle - after.middle) + 0.5 < (box.extent + after.extent) / 2;
    elements[index].hidden = Boolean(covers);
    if (covers) continue;
    place(elements[index], side, size, box);
    after = box;
  }
}

function place(element, side, size, { middle, extent }) {
  element.style.setProperty(side, `${middle - extent / 2}px`);
  element.style.setProperty(size, `${extent}px`);
}

function style() {
  const css = getComputedStyle(document.documentElement);
  const colour = (name) => css.getPropertyValue(`--${name}`).trim();
  const rule = (selector, values) => ({ selector, style: values });
  return [
    rule("node", {
      width: "data(size)",
      height: "data(size)",
      "background-color": colour("feature"),
      "border-width": 1,
      "border-color": colour("paper"),
      "overlay-opacity": 0,
    }),
    rule("node.token", { shape: "round-rectangle", "background-color": colour("token") }),
    rule("node.logit", { shape: "round-rectangle", "background-color": colour("logit") }),
    rule("node.error", { shape: "diamond", "background-color": colour("error") }),
    rule("edge", {
      "curve-style": "haystack",
      "haystack-radius": 0,
      width: "data(width)",
      opacity: 0.3,
      events: "no",
      "overlay-opacity": 0,
    }),
    rule("edge.positive", { "line-color": colour("positive") }),
    rule("edge.negative", { "line-color": colour("negative"), "line-style": "dashed", "line-dash-pattern": [5, 4] }),
    rule("node.dim", { opacity: 0.22 }),
    rule("edge.dim", { opacity: 0.04 }),
    rule("edge.lit", { opacity: 0.85, "z-index": 5 }),
    rule("node.near", { opacity: 1, "z-index": 10 }),
    rule("node.picked", { "border-width": 3, "border-color": colour("ink"), opacity: 1, "z-index": 20 }),
    rule("node.hovered", { "border-width": 2, "border-color": colour("ink"), opacity: 1, "z-index": 30 }),
    rule("node.named", {
      label: "data(label)",
      color: colour("ink"),
      "font-family": css.fontFamily,
      "font-size": "data(font)",
      "text-valign": "bottom",
      "text-margin-y": 2,
      "text-outline-width": "data(halo)",
      "text-outline-color": colour("paper"),
      "text-outline-opacity": 0.9,
    }),
    rule("node.logit.named", { "text-halign": "left", "text-valign": "center", "text-margin-x": -4, "text-margin-y": 0 }),
    rule("node.pruned", { display: "none" }),
    rule("node.pruned.picked", { display: "element" }),
  ];
}
