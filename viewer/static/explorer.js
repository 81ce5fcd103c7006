/* The explorer: the address holds what is selected and shown, and everything on the page follows the address. */

import { make, number, percent } from "./dom.js";
import { showHint, showNode } from "./panel.js";
import { createPicture, fit, label } from "./picture.js";

const HINT = "Select a node in the picture or the list to see what it reads, what it acts on and what it means.";
const MOST_EDGES = 300; // drawn of a node; the lists have all

const container = document.getElementById("graph");
const panel = document.getElementById("panel");
const slider = document.getElementById("threshold");
const status = document.getElementById("status");
const address = `/api/graphs/${encodeURIComponent(container.dataset.graph)}`;

let cy;
let everything = 0; // nodes of the graph, drawn or not
let asked = 0; // number of the last selection; answers to earlier ones come too late

async function start() {
  const graph = await ask(address);
  everything = graph.n_nodes;
  cy = createPicture(container, graph);
  globalThis.__trace = { cy };
  slider.max = Math.ceil(100 * graph.largest_cumulative) / 100 || 1;
  fillList(graph.nodes);
  cy.on("tap", (event) => {
    if (event.target === cy) select(null);
    else if (event.target.isNode()) select(event.target.data("node"));
  });
  slider.addEventListener("input", () => prune());
  slider.addEventListener("change", () => remember("replaceState", { thr: atMost() ? null : slider.value }));
  document.getElementById("fit").addEventListener("click", () => fit(cy));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") select(null);
  });
  globalThis.addEventListener("popstate", restore);
  await restore();
  container.dataset.ready = "1";
}

async function ask(path) {
  const response = await fetch(path);
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

/* Takes over what the address says; after a load and when the reader goes back. */
async function restore() {
  const given = new URLSearchParams(location.search);
  const threshold = Number.parseFloat(given.get("thr"));
  slider.value = Number.isFinite(threshold) ? threshold : slider.max;
  prune();
  const node = Number.parseInt(given.get("n"), 10);
  await (Number.isInteger(node) ? show(node) : clear());
}

function select(node) {
  const before = new URLSearchParams(location.search).get("n");
  if (String(node ?? "") === (before ?? "")) return;
  remember("pushState", { n: node });
  if (node === null) clear();
  else show(node);
}

function remember(method, changes) {
  const query = new URLSearchParams(location.search);
  for (const [name, value] of Object.entries(changes)) {
    if (value === null) query.delete(name);
    else query.set(name, value);
  }
  history[method](null, "", query.size ? `?${query}` : location.pathname);
}

async function show(node) {
  const turn = ++asked;
  const moveFocus = panel.contains(document.activeElement);
  let details;
  try {
    details = await ask(`${address}/nodes/${node}`);
  } catch (error) {
    if (turn === asked) {
      unmark();
      showHint(panel, error.message);
      status.textContent = error.message;
    }
    return;
  }
  if (turn !== asked) return;
  mark(details);
  showNode(panel, details, select);
  panel.scrollTop = 0;
  if (moveFocus) panel.querySelector("h2").focus();
  status.textContent = `${details.text}: ${details.n_incoming} incoming, ${details.n_outgoing} outgoing.`;
}

function clear() {
  asked += 1;
  unmark();
  showHint(panel, HINT);
  status.textContent = "Nothing selected.";
}

function mark(details) {
  const entries = [...details.incoming, ...details.outgoing];
  const drawn = [...entries].sort((one, other) => other.share - one.share).slice(0, MOST_EDGES);
  unmark();
  const picked = cy.getElementById(`n${details.node}`);
  cy.batch(() => {
    cy.elements().addClass("dim");
    picked.removeClass("dim").addClass("picked");
    for (const entry of entries) {
      const end = cy.getElementById(`n${entry.node}`);
      end.removeClass("dim").addClass("near").data("strength", Math.max(entry.share, end.data("strength") ?? 0));
    }
    for (const { element, node } of drawn) {
      if (!picked.length || !cy.getElementById(`n${node}`).length) continue; // too many nodes to draw them all
      const known = cy.getElementById(element.data.id);
      const edge = known.length ? known : cy.add({ group: "edges", ...element }).addClass("added");
      edge.removeClass("dim").addClass("lit");
    }
  });
  const { x, y } = picked.renderedPosition() ?? { x: 0, y: 0 };
  if (x < 0 || y < 0 || x > cy.width() || y > cy.height()) cy.center(picked);
  document.querySelector(`#nodes button[data-node="${details.node}"]`)?.setAttribute("aria-current", "true");
  label(cy);
}

function unmark() {
  cy.batch(() => {
    cy.edges(".added").remove();
    cy.nodes(".near").removeData("strength");
    cy.elements().removeClass("dim picked near lit");
  });
  document.querySelector("#nodes button[aria-current]")?.removeAttribute("aria-current");
  label(cy);
}

function atMost() {
  return slider.value === slider.max;
}

/* Tokens and outputs stay: without them the picture has neither beginning nor end. */
function prune() {
  const threshold = Number(slider.value);
  const goes = (node) => {
    const { kind, cumulative } = node.data();
    return !atMost() && (kind === "feature" || kind === "error") && !(cumulative !== null && cumulative <= threshold);
  };
  cy.batch(() => cy.nodes().forEach((node) => void node.toggleClass("pruned", goes(node))));
  const pruned = cy.nodes(".pruned");
  const hidden = new Set(pruned.map((node) => String(node.data("node"))));
  for (const row of document.querySelectorAll("#nodes tr")) row.hidden = hidden.has(row.dataset.node);
  const all = cy.nodes().length;
  const left = everything > all ? `, the most important of ${everything}` : "";
  const share = percent(threshold);
  document.getElementById("shown").textContent = `${share} of influence: ${all - pruned.length} of ${all} nodes shown${left}`;
  label(cy);
}

function fillList(nodes) {
  const sorted = [...nodes].sort((one, other) => other.data.importance - one.data.importance);
  const rows = sorted.map(({ data }) => {
    const button = make("button", { type: "button", "data-node": data.node }, data.text);
    button.addEventListener("click", () => select(data.node));
    const cells = [data.kind, data.layer, data.place].map((text) => make("td", {}, text));
    const influence = make("td", { class: "number" }, number(data.influence));
    return make("tr", { "data-node": data.node }, make("th", { scope: "row" }, button), ...cells, influence);
  });
  document.getElementById("nodes").replaceChildren(...rows);
}

start().catch((error) => {
  status.textContent = `The graph could not be shown: ${error.message}`;
});
