/* The panel beside the picture: what the selected node is, its connections, and what is known about its feature. */

import { make, makeSvg, number, percent, signed } from "./dom.js";

const FIRST = 60; // rows of a list before the reader asks for all
const EXAMPLES = 12;
const KIND_NAMES = { feature: "features", error: "errors", token: "tokens", logit: "outputs" };

/* Replaces what the panel holds; `go` is called with the node that a connection leads to. */
export function showNode(panel, details, go) {
  panel.dataset.node = details.node;
  panel.replaceChildren(
    make("h2", { tabindex: -1 }, title(details)),
    facts(details),
    make(
      "div",
      { class: "connections" },
      connections("Incoming", "incoming", details.incoming, go, inputNote(details)),
      connections("Outgoing", "outgoing", details.outgoing, go, null),
    ),
    ...feature(details),
  );
}

export function showHint(panel, text) {
  delete panel.dataset.node;
  panel.replaceChildren(make("p", { class: "quiet" }, text));
}

function title(details) {
  return details.kind === "feature" ? details.label || details.record?.label || details.text : details.text;
}

function facts(details) {
  const explained = details.layer === "output" ? "Output" : "Explained feature";
  const where = { token: "Token", logit: explained, error: "Error", feature: "Feature" }[details.kind];
  const rows = [
    ["Kind", details.kind === "feature" ? `${where} ${details.feature} of layer ${details.layer.slice(1)}` : where],
    ["At", details.position < 0 ? "–" : `“${details.place}”, position ${details.position}`],
    ["Activation", details.activation],
    ["Pre-activation", details.pre_activation],
    ["Probability", details.probability === null ? null : percent(details.probability)],
    ["Influence", details.influence],
  ].filter(([, value]) => value !== null);
  return make(
    "dl",
    { class: "facts" },
    ...rows.map(([name, value]) =>
      make("div", {}, make("dt", {}, name), make("dd", {}, typeof value === "number" ? number(value) : value)),
    ),
  );
}

function inputNote(details) {
  const shares = Object.entries(details.input_by_kind);
  const parts = shares.map(([kind, part]) => `${KIND_NAMES[kind]} ${percent(part)}`);
  const rest = 1 - shares.reduce((sum, [, part]) => sum + part, 0);
  if (parts.length && rest > 0.005) parts.push(`not in this graph ${percent(rest)}`);
  return parts.length ? parts.join(", ") : null;
}

function connections(name, id, entries, go, note) {
  const list = make("ul", { id });
  const show = (some) => list.replaceChildren(...some.map((entry) => make("li", {}, connection(entry, go))));
  show(entries.slice(0, FIRST));
  const section = make(
    "section",
    { "aria-label": name },
    make("h3", {}, name, " ", make("span", { class: "quiet" }, String(entries.length))),
    note && make("p", { class: "quiet" }, note),
    entries.length ? list : make("p", { class: "quiet" }, "none"),
  );
  if (entries.length > FIRST) {
    const more = make("button", { type: "button" }, `Show all ${entries.length}`);
    more.addEventListener("click", () => {
      show(entries);
      more.remove();
      list.children[FIRST].firstChild.focus();
    });
    section.append(more);
  }
  return section;
}

function connection(entry, go) {
  const sign = entry.weight >= 0 ? "positive" : "negative";
  const button = make(
    "button",
    { type: "button", class: `connection ${sign}`, "data-node": entry.node, title: entry.text },
    make("i", { class: `mark ${entry.kind}` }),
    make("span", { class: "text" }, entry.text),
    make("span", { class: "quiet" }, `${entry.layer} · ${entry.place}`),
    make("span", { class: "value" }, `${signed(entry.weight)} · ${percent(entry.share)}`),
  );
  button.style.setProperty("--share", `${100 * entry.share}%`);
  button.addEventListener("click", () => go(entry.node));
  return button;
}

function feature(details) {
  const record = details.record;
  if (details.kind !== "feature") return [];
  if (!record) {
    const hint = "Nothing more is known about this feature: the store has no table of this transcoder's features.";
    return [make("p", { class: "quiet" }, hint)];
  }
  return [
    make("h3", {}, "Feature"),
    make("p", { class: "label" }, ...labelWithSource(record)),
    make(
      "div",
      { class: "logits" },
      logits("Promotes", "promoted", record.top_logits ?? []),
      logits("Suppresses", "suppressed", record.bottom_logits ?? []),
    ),
    make("h3", {}, "Top examples"),
    make("ol", { class: "examples" }, ...(record.examples ?? []).slice(0, EXAMPLES).map((one) => example(one, record))),
    ...histogram(record, details.activation),
  ];
}

function labelWithSource(record) {
  const quality = [
    record.label_source,
    record.label_precision === null ? null : `precision ${percent(record.label_precision)}`,
    record.label_recall === null ? null : `recall ${percent(record.label_recall)}`,
  ].filter((part) => part);
  return [
    make("strong", {}, record.label || "no label"),
    make("span", { class: "quiet" }, quality.length ? ` (${quality.join(", ")})` : ""),
  ];
}

function logits(name, id, entries) {
  const rows = entries.map((entry) =>
    make(
      "li",
      {},
      make("span", { class: "word" }, shown(entry.token)),
      make("span", { class: "value" }, signed(entry.value)),
    ),
  );
  return make("section", {}, make("h3", {}, name), make("ul", { id }, ...rows));
}

function example(one, record) {
  const activations = one.activations ?? [];
  const strongest = record.max_activation || Math.max(...activations, 1e-9);
  const words = (one.tokens ?? []).map((token, index) => {
    const activation = activations[index] ?? 0;
    const word = make("span", { class: "word" }, token.replaceAll("\n", "↵"));
    if (activation > 0) {
      word.classList.add("hot");
      word.title = number(activation);
      word.style.setProperty("--heat", `${Math.round(15 + 75 * Math.min(1, activation / strongest))}%`);
    }
    if (index === one.position) word.classList.add("peak");
    return word;
  });
  return make("li", {}, ...words);
}

/* Counts on a logarithmic scale, or the rare strong activations could not be seen. */
function histogram(record, activation) {
  const counts = record.histogram ?? [];
  if (!counts.length || !record.max_activation) return [];
  const width = 400;
  const height = 70;
  const step = width / counts.length;
  const largest = Math.log1p(Math.max(...counts)) || 1;
  const bars = counts.map((count, index) => {
    const tall = (height * Math.log1p(count)) / largest;
    return makeSvg("rect", { x: index * step + 1, y: height - tall, width: step - 2, height: tall });
  });
  const at = Math.min(1, (activation ?? 0) / record.max_activation) * width;
  const caption = `Activations up to ${number(record.max_activation)} (logarithmic counts); fires on ${percent(
    record.density,
  )} of tokens; the line is here, at ${number(activation)}.`;
  return [
    make("h3", {}, "Activations"),
    make(
      "figure",
      {},
      makeSvg(
        "svg",
        { class: "histogram", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": caption },
        ...bars,
        makeSvg("line", { x1: at, x2: at, y1: 0, y2: height }),
      ),
      make("figcaption", { class: "quiet" }, caption),
    ),
  ];
}

function shown(token) {
  return token.replaceAll("\n", "↵").trim() || "␣";
}
