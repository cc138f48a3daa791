// The page of a text, after elements.js.

const fill = (parent, children) => { // not as arguments, of which there may be 100,000
  const all = document.createDocumentFragment();
  for (const child of children) all.append(child);
  parent.replaceChildren(all);
};
const percent = (p) => number(100 * p) + " %";
const probability = (p) => p < 5e-4 ? "<0.1 %" : (100 * p).toFixed(1) + " %";
const fixed = (x, digits) => !Number.isFinite(x) ? "–" : (x < 0 ? "−" : "") + Math.abs(x).toFixed(digits);
const signed = (x) => !Number.isFinite(x) ? "–" : (x < 0 ? "−" : "+") + number(Math.abs(x), 2);
const direction = (x) => x < 0 ? "down" : "up";
function changed(x, digits) { // [class, text]: no direction where nothing of it shows
  const shown = Number(x.toFixed(digits));
  return [shown ? direction(shown) : "", (shown < 0 ? "" : "+") + fixed(shown, digits)];
}
const visible = (text) => named(spaces(text)) || "·";
const ROWS = 200; // of the table at a time

const { prompt, reports } = JSON.parse($("data").textContent);
const layers = prompt.layers.map((layer, l) => ({ ...layer, number: l, shown: true }));
const rowOf = []; // number of each token's row, -1 without one
prompt.tokens.reduce((n, token, i) => { rowOf[i] = token.row ? n : -1; return n + (token.row ? 1 : 0); }, 0);
const withRow = prompt.tokens.map((_, i) => i).filter((i) => rowOf[i] >= 0);
let chosen = null; // [layer's place, latent]
let page = 0;

// ---- characters that are split over tokens ----

const partOf = prompt.tokens.map(() => null); // [first token, last token] of the character that a token is a part of
for (let i = 0, first = -1; i < prompt.tokens.length; i++) {
  if (prompt.tokens[i].text === "" && i + 1 < prompt.tokens.length) { if (first < 0) first = i; continue; }
  if (first >= 0) for (let each = first; each <= i; each++) partOf[each] = [first, i];
  first = -1;
}
function wordCell(i) {
  const part = partOf[i], cell = make("th", "word"), token = prompt.tokens[i];
  const text = part ? prompt.tokens[part[1]].text : token.text;
  cell.append(make("span", "at", i), make("bdi", "", visible(text)));
  if (part) cell.append(make("span", "part", ` ${i - part[0] + 1}/${part[1] - part[0] + 1}`));
  cell.title = part ? `part ${i - part[0] + 1} of ${part[1] - part[0] + 1} of ${text}` : token.text;
  return cell;
}
function tokenElement(text) { return make("bdi", "token", visible(text)); }

// ---- latents ----

const label = (layer, latent) => { // a person's, then the automatic one
  const { note, label: words } = layer.latents[latent];
  return [...(note ? [named(note) + (words ? ":" : "")] : []), ...(words ?? []).slice(0, 3).map((word) => visible(word))].join(" ");
};
const ofPrefix = (values) => values[Math.min(Number($("prefix").value), values.length - 1)];

function shownLatents(layer, n) {
  const limit = Number($("limit").value), end = ofPrefix(layer.prefix_ends);
  const kept = layer.active[n].filter(({ latent }) => latent < end && !((layer.latents[latent].density ?? 0) > limit));
  if ($("order").value === "effect") kept.sort((a, b) => Math.abs(b.effect ?? 0) - Math.abs(a.effect ?? 0));
  return kept.slice(0, Math.max(1, Math.floor(Number($("most").value)) || 1));
}

function button(layer, { latent, value, effect }) {
  const known = layer.latents[latent], own = chosen !== null && chosen[0] === layer.number && chosen[1] === latent;
  const element = make("button", "latent g" + (known.group % 6));
  element.type = "button";
  element.setAttribute("aria-pressed", String(own));
  element.title = `layer ${layer.layer}, latent ${latent}, group ${known.group}` + (known.density === undefined ? "" : `, fires on ${percent(known.density)} of the rows`) +
    `\nactivation ${number(value)}` + (effect === undefined ? "" : `, direct effect on the next token ${signed(effect)}`) + `\n${label(layer, latent)}`;
  element.append(make("b", "", latent), make("bdi", "", label(layer, latent)), make("span", "", number(value)));
  if (effect !== undefined) element.append(make("span", direction(effect), signed(effect)));
  element.onclick = () => { chosen = own ? null : [layer.number, latent]; draw(); };
  return element;
}

function drawStrip() {
  const layer = chosen && layers[chosen[0]];
  const found = prompt.tokens.map((_, i) => layer && rowOf[i] >= 0 ? layer.active[rowOf[i]].find(({ latent }) => latent === chosen[1]) : undefined);
  const largest = found.reduce((most, each) => Math.max(most, each ? each.value : 0), 1e-30);
  fill($("strip"), prompt.tokens.flatMap((token, i) => {
    if (partOf[i] && i < partOf[i][1]) return []; // shown with the token that completes the character
    const own = partOf[i] ? found.slice(partOf[i][0], i + 1) : [found[i]];
    const element = make("span", token.row ? "t" : "t none", token.text.split("\n").map((line) => named(line.replace(/\t/g, "⇥").replace(/\r/g, "␍"))).join("⏎\n"));
    const value = own.reduce((most, each) => Math.max(most, each ? each.value : 0), 0);
    if (value) {
      element.style.background = `rgba(var(--heat), ${0.15 + 0.75 * value / largest})`;
      element.title = own.filter(Boolean).map((each) => `activation ${number(each.value)}` + (each.effect === undefined ? "" : `, effect on the next token ${signed(each.effect)}`)).join("\n");
    }
    return [element];
  }));
  if (!chosen) { $("chosen").textContent = "No latent is chosen."; return; }
  const known = layer.latents[chosen[1]], fires = found.filter(Boolean).length;
  $("chosen").replaceChildren(`Latent ${chosen[1]} of layer ${layer.layer}, group ${known.group}` + (known.density === undefined ? "" : `, fires on ${percent(known.density)} of the evaluated rows`) + ": ",
    make("bdi", "", label(layer, chosen[1]) || "no label, because this layer was not evaluated"),
    `. It fires on ${fires} of these tokens; its largest activation is ${number(largest)}. `);
  if (reports[layer.layer]) {
    const link = make("a", "", "This latent in the layer's report");
    link.href = `${reports[layer.layer]}#latents/${chosen[1]}/prefix-${layer.prefix_ends.length - 1}`;
    $("chosen").append(link);
  }
}

function tableRow(i, shown) {
  const line = make("tr"), token = prompt.tokens[i], follows = make("td", "left follows"), n = rowOf[i];
  follows.append(tokenElement(token.next), ` ${probability(token.next_probability)}${token.next_given ? "" : " ?"}`);
  follows.title = token.next_given ? "the next token, and the probability that the model gives it" : "the text ends here: the token that the model finds likeliest";
  line.append(wordCell(i), follows);
  for (const layer of shown) {
    const share = ofPrefix(layer.error_share)[n], error = make("td", "bar-cell", fixed(share ?? NaN, 2)), cell = make("td", "latents left");
    error.style.setProperty("--v", Math.min(share ?? 0, 1));
    const latents = shownLatents(layer, n), left = layer.active[n].length - latents.length;
    cell.append(...latents.map((each) => button(layer, each)));
    if (left > 0) cell.append(make("small", "", `+${left}`));
    line.append(error);
    if (layer.output_effect.length) line.append(make("td", ...changed(layer.output_effect[n], 2)));
    line.append(cell);
  }
  return line;
}

function pager(place, count, at, go) {
  const pages = Math.ceil(count / ROWS);
  if (pages < 2) return;
  const step = (text, to) => { const element = make("button", "", text); element.type = "button"; element.disabled = to < 0 || to >= pages; element.onclick = () => go(to); return element; };
  $(place).replaceChildren(step("‹ earlier", at - 1), make("span", "", `tokens ${at * ROWS + 1} to ${Math.min(count, (at + 1) * ROWS)} of ${number(count)}`), step("later ›", at + 1));
}

function drawRows() {
  const shown = layers.filter((layer) => layer.shown);
  const titles = [make("th", "word", "token"), make("th", "left", "next, probability")];
  for (const layer of shown) {
    titles.push(make("th", "", `error, layer ${layer.layer}`));
    if (layer.output_effect.length) { const whole = make("th", "", "MLP's effect"); whole.title = "direct effect of the MLP's whole output on the next token"; titles.push(whole); }
    titles.push(make("th", "left", `latents of layer ${layer.layer}: number, label, activation${layer.output_effect.length ? ", effect on the next token" : ""}`));
  }
  fill($("titles"), titles);
  fill($("rows"), withRow.slice(page * ROWS, (page + 1) * ROWS).map((i) => tableRow(i, shown)));
  pager("pager", withRow.length, page, (to) => { page = to; drawRows(); });
}

function draw() { drawStrip(); drawRows(); }

// ---- before and after ----

const change = prompt.intervention;
let at = prompt.tokens.length - 1, shiftPage = Math.floor(at / ROWS);
const likeliest = (shift, when) => shift.likeliest.reduce((a, b) => b.probability[when] > a.probability[when] ? b : a);

function drawShifts() {
  const largest = change.tokens.reduce((most, { kl }) => Math.max(most, kl), 1e-30);
  fill($("shifts"), change.tokens.slice(shiftPage * ROWS, (shiftPage + 1) * ROWS).map((shift, k) => {
    const i = shiftPage * ROWS + k, line = make("tr", i === at ? "chosen" : ""), head = wordCell(i), pick = make("button", "", i);
    pick.type = "button"; pick.setAttribute("aria-label", `show what follows token ${i}`); head.firstChild.replaceChildren(pick);
    const kl = make("td", "bar-cell", fixed(shift.kl, 4)), next = make("td", "left");
    kl.style.setProperty("--v", shift.kl / largest);
    next.append(tokenElement(shift.next.token));
    const words = [0, 1].map((when) => { const cell = make("td", "left"); cell.append(tokenElement(likeliest(shift, when).token)); return cell; });
    line.append(head, kl, ...words, next, ...shift.next.probability.map((p) => make("td", "", probability(p))));
    line.onclick = () => { at = i; drawShifts(); };
    return line;
  }));
  pager("shift-pager", change.tokens.length, shiftPage, (to) => { shiftPage = to; drawShifts(); });
  const heading = prompt.tokens[partOf[at] ? partOf[at][1] : at].text;
  $("at").replaceChildren(`After token ${at}, `, tokenElement(heading));
  fill($("candidates"), change.tokens[at].likeliest.map(({ token, logit, probability: both }) => {
    const line = make("tr"), word = make("td", "left"), difference = logit[1] - logit[0];
    word.append(tokenElement(token));
    line.append(word, ...logit.map((x) => make("td", "", fixed(x, 2))), make("td", ...changed(difference, 2)), ...both.map((p) => make("td", "", probability(p))));
    return line;
  }));
}

function drawChange() {
  fill($("asked"), change.changes.map((each) => {
    const what = each.how === "set" ? `set to ${number(each.value)}` : each.how === "scale" ? `multiplied by ${number(each.value)}` : "ablated (set to 0)";
    const where = each.token === null ? "at every token" : `at token ${each.token}`;
    const came = each.rows === 0 ? "its activation is the same already, so this changes nothing" :
      each.token === null ? `its activation changes on ${each.rows} of them, by up to ${signed(each.largest)}` : `its activation changes by ${signed(each.largest)}`;
    return make("li", "", `Latent ${each.latent} of layer ${each.layer} is ${what} ${where}; ${came}.`);
  }));
  if (change.continuation.some(Boolean)) {
    fill($("continuations"), change.continuation.map((text, when) => {
      const box = make("div"), strip = make("div", "strip");
      strip.append(make("span", "none", "… "), make("bdi", "", named(text.replace(/\n/g, "⏎"))));
      box.append(make("h3", "", when ? "Continuation after the change" : "Continuation before the change"), strip);
      return box;
    }));
  }
  drawShifts();
}

// ---- controls ----

function start() {
  themed();
  const most = layers.reduce((a, b) => b.prefix_ends.length > a.prefix_ends.length ? b : a);
  most.prefix_ends.forEach((end, g) => {
    const option = make("option", "", `${g} (${number(end)} latents)`);
    option.value = g; option.selected = g === most.prefix_ends.length - 1;
    $("prefix").append(option);
  });
  if (most.prefix_ends.length < 2) $("prefix").parentElement.hidden = true;
  if (prompt.effects_skipped !== null) $("order").parentElement.hidden = true;
  const unknown = layers.filter((layer) => Object.values(layer.latents).some(({ density }) => density === undefined));
  if (unknown.length) $("unknown").textContent = `Layer${unknown.length > 1 ? "s" : ""} ${unknown.map(({ layer }) => layer).join(", ")}: this run was not evaluated, so its latents have neither labels nor densities, and none is hidden.`;
  if (unknown.length === layers.length) $("limit").parentElement.hidden = true;
  if (layers.length < 2) $("layers").hidden = true;
  for (const layer of layers) {
    const box = make("input"), line = make("label");
    box.type = "checkbox"; box.checked = true; box.onchange = () => { layer.shown = box.checked; drawRows(); };
    line.append(box, String(layer.layer)); $("layers").append(line);
  }
  for (const id of ["prefix", "most", "limit", "order"]) $(id).oninput = drawRows;
  if (change) drawChange();
  draw();
}
start();
