// The page's own script, after elements.js.

const draw = (tag, attributes, text) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const name in attributes) made.setAttribute(name, attributes[name]);
  if (text !== undefined) made.textContent = text;
  return made;
};
const percent = (x) => 100 * Math.abs(x) < 0.01 ? "<0.01 %" : number(100 * x, 3) + " %";
const visible = (text) => text === "" ? "·" : named(spaces(text));
const shortened = (text, n) => [...text].length > n ? [...text].slice(0, n - 1).join("") + "…" : text;

// ---- data ----

const KINDS = ["latent", "error", "embedding", "logit"], LATENT = 0, ERROR = 1, TOKEN = 2, LOGIT = 3;
const data = JSON.parse($("data").textContent);
const nodes = data.nodes.map(([kind, layer, position, latent, value, share, text, word, fires, promotes, likeRandom], index) => ({ index, kind, layer, position, latent, value, share, text, word, fires, promotes, likeRandom, into: [], out: [] }));
const edges = data.edges.map(([source, target, effect, weight]) => ({ source: nodes[source], target: nodes[target], effect, weight, flow: weight * nodes[target].share }));
edges.sort((a, b) => b.flow - a.flow);
for (const edge of edges) { edge.source.out.push(edge); edge.target.into.push(edge); }
for (const node of nodes) { node.into.sort((a, b) => b.weight - a.weight); node.out.sort((a, b) => b.flow - a.flow); }
const place = (node) => node.kind === LATENT ? `${node.layer}/${node.latent}@${node.position}` : node.kind === ERROR ? `${node.layer}/error@${node.position}` : `${KINDS[node.kind]}@${node.position}`;
const piece = (position) => visible(data.tokens[position]);

// ---- layout: a column for each token, a row for each layer ----

const LISTED = 40; // links of one node, in each direction
const MOST_LINKS = 2000; // drawn at once; more cannot be told apart
const STEP = 13, LEFT = 46, GOAL = 30, BOTTOM = 44;
const said = (node) => `${shortened(visible(node.word), 12)} ${percent(node.value)}`; // a next token, written upwards beside its square
const LONGEST = 8 * Math.max(0, ...nodes.filter((node) => node.kind === LOGIT).map((node) => [...said(node)].length)); // pixels
const TOP = 34 + Math.ceil(0.75 * LONGEST), RIGHT = Math.max(20, Math.ceil(0.67 * LONGEST) - GOAL); // it leans by 48 degrees
const ROW = Math.max(13, Math.min(19, (innerHeight - $("canvas").getBoundingClientRect().top - TOP - BOTTOM - 12) / (data.layers + 1))); // the text in view, if it can be
const rowOf = (node) => data.layers - node.layer; // logits 0, layer 0: layers, tokens: layers + 1
const stepOf = (cell, most) => cell[0].kind === LOGIT ? GOAL : Math.min(STEP, most / cell.length); // crowded ones overlap
const cells = new Map();
for (const node of nodes) {
  const key = node.position + " " + rowOf(node);
  if (!cells.has(key)) cells.set(key, []);
  cells.get(key).push(node);
}
function columns(most) { // widths of the columns, whose rows of dots take as many pixels at most
  const widths = data.tokens.map((token) => Math.max(46, 9 * Math.min(14, [...visible(token)].length) + 14));
  for (const cell of cells.values()) widths[cell[0].position] = Math.max(widths[cell[0].position], cell.length * stepOf(cell, most) + 14);
  return widths;
}
const total = (widths) => LEFT + RIGHT + widths.reduce((sum, width) => sum + width, 0);
let most = 300; // as wide as fits into the frame
while (most > 40 && total(columns(most)) > $("canvas").clientWidth) most -= 10;
const widths = columns(most);
const starts = widths.map(((at) => (width) => (at += width) - width)(LEFT));
const WIDTH = total(widths), HEIGHT = TOP + (data.layers + 1) * ROW + BOTTOM;
for (const cell of cells.values()) {
  const step = stepOf(cell, widths[cell[0].position] - 14), position = cell[0].position;
  if (cell[0].kind === LOGIT) cell.sort((a, b) => b.value - a.value);
  cell.forEach((node, i) => {
    node.x = starts[position] + widths[position] / 2 + (i - (cell.length - 1) / 2) * step;
    node.y = TOP + rowOf(node) * ROW;
  });
}

// ---- drawing ----

const svg = draw("svg", { width: WIDTH, height: HEIGHT, viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "group", "aria-label": "Circuit: tokens from left to right, layers from bottom to top" });
const axis = draw("svg", { class: "axis", width: LEFT, height: HEIGHT, "aria-hidden": true }); // stays in view
const background = draw("g", {}), links = draw("g", {}), dots = draw("g", {});
svg.append(background, links, dots);
$("canvas").append(svg, axis);

function drawBackground() {
  axis.append(draw("rect", { y: TOP - 32, width: LEFT, height: HEIGHT - TOP })); // over what is scrolled under it
  data.tokens.forEach((token, i) => {
    if (i % 2) background.append(draw("rect", { class: "band", x: starts[i], y: TOP - 10, width: widths[i], height: HEIGHT - TOP - 20 }));
    const label = draw("text", { class: "piece", x: starts[i] + widths[i] / 2, y: HEIGHT - 14, "text-anchor": "middle" }, shortened(piece(i), 14));
    label.append(draw("title", {}, piece(i)));
    background.append(label);
  });
  for (let layer = 0; layer < data.layers; layer++) {
    const y = TOP + (data.layers - layer) * ROW;
    if (layer % 5 === 0 || layer === data.layers - 1) axis.append(draw("text", { x: LEFT - 10, y: y + 4, "text-anchor": "end" }, layer));
  }
  axis.append(draw("text", { x: LEFT - 10, y: TOP - 16, "text-anchor": "end" }, "layer"));
}
function radius(node) { return node.kind === LOGIT || node.kind === TOKEN ? 6 : 2.6 + 5 * Math.min(1, Math.sqrt(node.share / largest)); }
const largest = Math.max(1e-9, ...nodes.filter((node) => node.kind === LATENT).map((node) => node.share));
function drawDots() {
  for (const node of nodes) {
    const r = radius(node);
    const dot = draw("g", { class: "dot " + KINDS[node.kind], role: "button", tabindex: -1, "aria-label": `${place(node)}, ${node.text}`, "data-node": node.index, transform: `translate(${node.x} ${node.y})` });
    dot.append(node.kind === LATENT ? draw("circle", { r }) : node.kind === ERROR ? draw("path", { d: `M0 ${-r}L${r} 0L0 ${r}L${-r} 0Z` }) : draw("rect", { x: -r, y: -r, width: 2 * r, height: 2 * r, rx: 1.5 }));
    dot.append(draw("title", {}, `${place(node)}\n${node.text}`));
    node.dot = dot;
    dots.append(dot);
    if (node.kind === LOGIT) background.append(draw("text", { class: "said", x: node.x - 3, y: node.y - 12, transform: `rotate(-48 ${node.x - 3} ${node.y - 12})` }, said(node)));
  }
  nodes.at(-1).dot.setAttribute("tabindex", 0);
}
function line(edge, own) {
  const { source, target } = edge, bend = Math.max(12, (source.y - target.y) * 0.45);
  const strength = Math.min(1, edge.flow / edges[0].flow);
  const made = draw("path", { class: "link" + (edge.effect < 0 ? " negative" : "") + (own ? " own" : ""), d: `M${source.x} ${source.y}C${source.x} ${source.y - bend} ${target.x} ${target.y + bend} ${target.x} ${target.y}`, "stroke-width": own ? 0.8 + 4 * edge.weight : 0.6 + 4 * Math.sqrt(strength), opacity: 0.12 + 0.6 * Math.sqrt(strength) });
  made.append(draw("title", {}, `${place(source)} → ${place(target)}: ${number(edge.effect)}`));
  return made;
}
let chosen = null;
function drawLinks() {
  const n = Math.round(Math.min(edges.length, MOST_LINKS) * ($("links").value / 100) ** 2);
  $("drawn").textContent = `${n.toLocaleString("en")} of ${edges.length.toLocaleString("en")}`;
  const own = chosen ? [...chosen.into.slice(0, LISTED), ...chosen.out.slice(0, LISTED)] : [];
  links.replaceChildren(...edges.slice(0, n).map((edge) => line(edge, false)), ...own.map((edge) => line(edge, true)));
  svg.classList.toggle("chosen-one", Boolean(chosen));
  const near = new Set(own.flatMap((edge) => [edge.source, edge.target]));
  for (const node of nodes) {
    node.dot.classList.toggle("near", near.has(node) || node === chosen);
    node.dot.classList.toggle("chosen", node === chosen);
  }
}

// ---- one node ----

function tokenList(words) {
  const made = make("p");
  for (const word of words) made.append(make("bdi", "token", visible(word)), " ");
  return made;
}
function ends(title, what, list, other) {
  const box = make("div"), items = make("ul", "ends");
  for (const edge of list.slice(0, LISTED)) {
    const node = other(edge), item = make("li"), button = make("button"), words = make("span", "words");
    button.type = "button";
    button.title = `${node.text}\neffect ${number(edge.effect)}, ${percent(edge.weight)} of the effects on the target`;
    words.append(make("small", "", place(node) + " "), make("bdi", "", visible(node.text)));
    button.append(make("span", "value" + (edge.effect < 0 ? " negative" : ""), (edge.effect < 0 ? "−" : "+") + percent(edge.weight)), words);
    button.onclick = () => choose(node, true);
    item.append(button); items.append(item);
  }
  if (!list.length) items.append(make("li", "note", "none after pruning"));
  box.append(make("h3", "", list.length > LISTED ? `${title}, ${LISTED} of ${list.length}` : title), make("p", "note", what), items);
  return box;
}
function detail() {
  const panel = $("node");
  if (!chosen) {
    panel.replaceChildren(make("h2", "", "Nodes with most influence"), make("p", "note", "% of the influence on the next tokens. Choose a node to see its sources and its targets."));
    const items = make("ul", "ends");
    for (const node of nodes.filter((each) => each.kind !== LOGIT).sort((a, b) => b.share - a.share).slice(0, 25)) {
      const item = make("li"), button = make("button"), words = make("span", "words");
      button.type = "button"; button.title = node.text; button.onclick = () => choose(node, true);
      words.append(make("small", "", place(node) + " "), make("bdi", "", visible(node.text)));
      button.append(make("span", "value", percent(node.share)), words);
      item.append(button); items.append(item);
    }
    panel.append(items);
    return;
  }
  const node = chosen, facts = make("div", "facts");
  const fact = (value, name) => { const box = make("div"); box.append(make("b", "", value), make("span", "", name)); facts.append(box); };
  panel.replaceChildren(make("h2", "", node.kind === LATENT ? `Layer ${node.layer}, latent ${node.latent}` : node.kind === ERROR ? `Error of layer ${node.layer}` : node.kind === TOKEN ? "Token" : "Next token"));
  const at = make("p", "note", "at "); at.append(make("bdi", "token", piece(node.position)), ` (token ${node.position})`); panel.append(at);
  if (node.kind !== LATENT) { const line = make("p"); line.append(make("bdi", "", visible(node.text))); panel.append(line); }
  if (node.kind === LATENT) fact(number(node.value), "activation");
  fact(percent(node.share), node.kind === LOGIT ? "probability" : "of the influence");
  panel.append(facts);
  if (node.kind === LATENT && node.word) panel.append(make("p", "own-label", node.word));
  if (node.fires.length) panel.append(make("h3", "", "Fires on"), tokenList(node.fires));
  if (node.promotes.length) {
    const promoted = tokenList(node.promotes);
    panel.append(make("h3", "", "Promotes"), promoted);
    if (node.likeRandom) { promoted.className = "weak"; panel.append(make("p", "note", "No more than a random direction of the same norm might: these tokens say little.")); }
  }
  const report = node.kind === LATENT && data.reports[node.layer];
  if (report) { const link = make("a", "", "this latent in the layer's report"), box = make("p"); link.href = `${report}#latents/${node.latent}/prefix-${data.prefix}`; box.append(link); panel.append(box); }
  panel.append(ends("Comes from", "% of all effects on this node, by size; − lowers it", node.into, (edge) => edge.source), ends("Leads to", "% of all effects on the node named; − lowers it", node.out, (edge) => edge.target));
  panel.scrollTop = 0;
}
function choose(node, focus) {
  chosen = node;
  drawLinks();
  detail();
  if (!node) return;
  for (const each of nodes) each.dot.setAttribute("tabindex", each === node ? 0 : -1);
  if (focus) node.dot.focus();
}

// ---- keys and clicks ----

function beside(node, key) {
  const row = nodes.filter((each) => each.y === node.y).sort((a, b) => a.x - b.x), at = row.indexOf(node);
  if (key === "ArrowLeft") return row[at - 1];
  if (key === "ArrowRight") return row[at + 1];
  const up = key === "ArrowUp", others = nodes.filter((each) => up ? each.y < node.y : each.y > node.y);
  return others.sort((a, b) => (Math.abs(a.y - node.y) - Math.abs(b.y - node.y)) || (Math.abs(a.x - node.x) - Math.abs(b.x - node.x)))[0];
}
$("canvas").addEventListener("click", (event) => { const dot = event.target.closest(".dot"); choose(dot ? nodes[dot.dataset.node] : null); });
$("canvas").addEventListener("focusin", (event) => { const dot = event.target.closest(".dot"); if (dot && nodes[dot.dataset.node] !== chosen) choose(nodes[dot.dataset.node]); });
$("canvas").addEventListener("keydown", (event) => {
  const dot = event.target.closest(".dot");
  if (!dot || event.ctrlKey || event.metaKey || event.altKey) return;
  const node = nodes[dot.dataset.node];
  const next = event.key === "Enter" ? node.into[0]?.source : event.key.startsWith("Arrow") ? beside(node, event.key) : undefined;
  if (!next) return;
  event.preventDefault();
  choose(next, true);
});
addEventListener("keydown", (event) => { if (event.key === "Escape") choose(null); });
for (const button of document.querySelectorAll(".routes button")) button.onclick = () => { choose(nodes[button.dataset.node], true); $("canvas").scrollIntoView({ block: "nearest" }); };
$("links").oninput = drawLinks;

function start() {
  let saved = null;
  try { saved = localStorage.getItem("theme"); } catch { /* storage can be forbidden for files */ }
  document.documentElement.dataset.theme = saved || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  drawBackground();
  drawDots();
  drawLinks();
  detail();
  $("canvas").scrollLeft = WIDTH;
  $("wide").hidden = WIDTH <= $("canvas").clientWidth;
}
start();
