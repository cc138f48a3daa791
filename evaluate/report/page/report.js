// The page's own script, after elements.js, report_notes.js and report_text.js.

// ---- data ----

const ARRAYS = { u8: Uint8Array, u16: Uint16Array, u32: Uint32Array, i32: Int32Array, f32: Float32Array };
function unpack({ type, width, data }) {
  const text = atob(data);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const values = new ARRAYS[type](bytes.buffer);
  values.width = width;
  return values;
}
let strings, c, F, G, ends, children;
function loadData() {
  const data = JSON.parse($("data").textContent);
  strings = data.strings; F = data.latents; ends = data.prefix_ends; G = ends.length; c = {};
  for (const name in data.columns) // each is unpacked when it is first read
    Object.defineProperty(c, name, { configurable: true, get() { const value = unpack(data.columns[name]); Object.defineProperty(c, name, { value }); return value; } });
  children = Array.from({ length: F }, () => null);
  for (let f = 0; f < F; f++) {
    const parent = c.parents[f * c.parents.width];
    if (parent >= 0 && c.parentScores[f * c.parents.width] > 0.5) (children[parent] ??= []).push(f);
  }
}
let prefix, order = [], chosen = -1, descending = true;
const density = (f, g = prefix) => c.density[g * F + f];
const percent = (x) => !Number.isFinite(x) ? "–" : x === 0 ? "0 %" : 100 * x < 0.01 ? "<0.01 %" : number(100 * x, 3) + " %";
const decimals = (largest) => Number.isFinite(largest) && largest > 0 ? Math.min(6, Math.max(0, 2 - Math.floor(Math.log10(largest)))) : 0;
const fixed = (x, n) => !Number.isFinite(x) ? "–" : Math.abs(x) >= 1000 ? x.toLocaleString("en", { minimumFractionDigits: n, maximumFractionDigits: n }) : x.toFixed(n); // for columns: decimals under each other
const hundredth = (x) => !Number.isFinite(x) ? "–" : x > 0 && x < 5e-5 ? "<0.01 %" : (100 * x).toFixed(2) + " %";
const part = (name, f) => Array.from(c[name].subarray(f * c[name].width, (f + 1) * c[name].width));
const visible = (text) => named(spaces(text));
const words = (f, n = 3) => {
  const made = make("span", "words");
  for (let i = 0; i < n; i++) {
    const t = c.tokens[f * c.tokens.width + i];
    if (t < 0) break;
    made.append(make("bdi", "token", visible(strings[t])));
  }
  if (!made.childNodes.length) made.append(make("small", "", "never fired"));
  if (weak(f)) { made.classList.add("weak"); made.title = measured(f); }
  return made;
};
const chip = (f) => { if (G === 1) return ""; const made = make("span", "chip g" + (c.group[f] % 6), c.group[f]); made.title = "group " + c.group[f]; return made; };

// ---- list: only the rows in view exist ----

const phone = matchMedia("(max-width: 820px)");
const rowHeight = () => phone.matches ? 62 : 46;
const SORTS = { // value; text of a latent, where it is not a plain number of as many decimals as the column has; on how many
  "energy (what it writes)": [(f) => c.energy[f], hundredth],
  "how often it fires": [(f) => density(f), hundredth],
  "largest activation": [(f) => c.largest[f]],
  "mean activation": [(f) => c.mean[f]],
  "token entropy (general first)": [(f) => c.entropy[f], (x) => fixed(x, 2) + " bit"],
  "share of its top token": [(f) => c.topShare[f], hundredth],
  "precision of its label": [(f) => lowest(c.labelPrecision[f], c.labelRows[f]), (_, f) => hundredth(c.labelPrecision[f]), (f) => `of ${number(c.labelRows[f])} rows`],
  "recall of its label": [(f) => lowest(c.labelRecall[f], c.labelFired[f]), (_, f) => hundredth(c.labelRecall[f]), (f) => `of ${number(c.labelFired[f])} firings`],
  "nearest decoder cosine": [(f) => c.near.width ? c.nearCosine[f * c.near.width] : 0, (x) => fixed(x, 3)],
  "overlap with its twin": [(f) => c.twinScores[f * c.twins.width], (x) => fixed(x, 3)],
  "children": [(f) => (children[f] || []).length, (x) => String(x)],
  "number": [(f) => -f],
};
let sortName = Object.keys(SORTS)[0];

const percentIn = (id, otherwise) => ($(id).value === "" || !Number.isFinite(+$(id).value) ? otherwise : +$(id).value / 100);
function filters() { // what a latent must pass, apart from the search
  const groups = new Set([...document.querySelectorAll("#groups input:checked")].map((box) => +box.value));
  const least = percentIn("least", 0), most = percentIn("most", 1), dead = $("dead").checked;
  const asked = $("parent")?.value ?? "", family = asked === "" ? null : new Set(children[+asked] || []);
  const star = $("starred").checked, note = $("noted").checked;
  const set = [$("least").value !== "" || $("most").value !== "", family, star, note, dead].filter(Boolean).length;
  $("active").textContent = set ? ` (${set} set)` : "";
  return (f) => groups.has(c.group[f]) && (density(f) === 0) === dead && (dead || (density(f) >= least && density(f) <= most)) &&
    (!family || family.has(f)) && (!star || starred(noteOf(f))) && (!note || (noteOf(f)?.label ?? "") !== "" || explained.has(f));
}
function find() {
  const asked = plain($("search").value.trim()), exact = /^#?(\d+)$/.exec(asked), end = ends[prefix], passes = filters();
  search(asked);
  order = [];
  const rank = new Uint8Array(F), alone = $("labels").checked; // a word begins so: 1 in a label or note, 2 in a context; inside of a word: 3, 4
  const INSIDE_LABEL = 3, NOWHERE = 5;
  for (let f = 0; f < end; f++) {
    if (!passes(f)) continue;
    if (asked) {
      const label = labelSays(f, asked), context = label === BEGINS || alone ? 0 : contextSays(f);
      rank[f] = exact && f === +exact[1] ? 0 : (exact && String(f).startsWith(exact[1])) || label === BEGINS ? 1 : context === BEGINS ? 2 : label ? INSIDE_LABEL : context ? 4 : NOWHERE;
      if (rank[f] === NOWHERE) continue;
    }
    order.push(f);
  }
  const key = SORTS[sortName][0], sign = descending ? -1 : 1;
  const keys = new Float64Array(F);
  for (const f of order) { const v = key(f); keys[f] = Number.isFinite(v) ? v : -Infinity; }
  order.sort((a, b) => rank[a] - rank[b] || sign * (keys[a] - keys[b]) || a - b);
  columnDecimals = decimals(order.reduce((most, f) => Math.max(most, Math.abs(keys[f]) === Infinity ? 0 : Math.abs(keys[f])), 0));
  const times = [0, 0, 0, 0, 0];
  for (const f of order) times[rank[f]]++;
  const kinds = [[times[0] + times[1], "by label, note or number"], [times[2], "by their contexts"], [times[3] + times[4], "inside of other words"]].filter(([n]) => n).map(([n, how]) => `${n.toLocaleString("en")} ${how}`);
  const of = ` of ${end.toLocaleString("en")} latents` + (G > 1 ? ` of prefix ${prefix}` : "");
  $("count").textContent = order.length.toLocaleString("en") + of + (asked && order.length ? `: ${kinds.join(", then ")}` : "");
  $("spacer").style.height = order.length * rowHeight() + "px";
  $("list").scrollTop = 0;
  drawList(true);
}
function follow() { // what is shown goes with what is listed
  find();
  if (current() !== "latents") return;
  if (!order.length) { chosen = -1; $("detail").replaceChildren(make("p", "note", "No latent of this prefix matches.")); return; }
  if (chosen < 0 || order.indexOf(chosen) < 0 || matches.asked) choose(chosen >= 0 && order.indexOf(chosen) >= 0 && !matches.asked ? chosen : order[0], false);
  else drawDetail(chosen);
}
let columnDecimals = 0;

const live = new Map();
let pending = false;
function drawList(anew) {
  const list = $("list"), height = list.clientHeight || 600, tall = rowHeight(), [key, text, on] = SORTS[sortName];
  const first = Math.max(0, Math.floor(list.scrollTop / tall) - 4), last = Math.min(order.length, Math.ceil((list.scrollTop + height) / tall) + 4);
  for (const [i, row] of live) if (anew || i < first || i >= last) { row.remove(); live.delete(i); }
  for (let i = first; i < last; i++) if (!live.has(i)) {
    const f = order[i], row = make("div", "row"), value = sortName === "number" ? hundredth(density(f)) : (text || ((x) => fixed(x, columnDecimals)))(key(f), f);
    row.id = "row-" + f; row.dataset.f = f;
    row.title = [noteOf(f)?.label, explained.get(f)?.label, ...part("tokens", f).filter((t) => t >= 0).map((t) => visible(strings[t])), measured(f)].filter(Boolean).join("  ");
    row.setAttribute("role", "option"); row.setAttribute("aria-selected", f === chosen);
    row.setAttribute("aria-posinset", i + 1); row.setAttribute("aria-setsize", order.length);
    row.style.transform = `translateY(${i * tall}px)`;
    row.append(chip(f), make("span", "id", "#" + f), labelled(f), make("span", "value", value));
    if (on && Number.isFinite(key(f))) row.lastChild.append(" ", make("small", "", on(f)));
    live.set(i, row); list.append(row);
  }
}
function labelled(f) { // a person's label and star, a language model's, then the automatic one
  const note = noteOf(f), made = words(f);
  if (explained.has(f)) made.prepend(make("bdi", "explained", named(explained.get(f).label)), " ");
  if (note) made.prepend(make("b", "own-label", (starred(note) ? "★ " : "") + note.label), " ");
  return made;
}
function choose(f, open = true) {
  chosen = f;
  for (const row of live.values()) row.setAttribute("aria-selected", +row.dataset.f === f);
  $("list").setAttribute("aria-activedescendant", "row-" + f);
  const i = order.indexOf(f), list = $("list");
  if (i >= 0) {
    const tall = rowHeight();
    if (i * tall < list.scrollTop) list.scrollTop = i * tall;
    else if ((i + 1) * tall > list.scrollTop + list.clientHeight) list.scrollTop = (i + 1) * tall - list.clientHeight;
  }
  drawDetail(f);
  if (open) $("detail").classList.add("open");
  remember();
}
function step(by) {
  if (!order.length) return;
  const i = order.indexOf(chosen);
  choose(order[Math.max(0, Math.min(order.length - 1, i < 0 ? 0 : i + by))], $("detail").classList.contains("open"));
}

// ---- one latent ----

function headOf(f) {
  const g = c.group[f], head = make("div", "head"), back = make("button", "back", "← list");
  back.type = "button"; back.onclick = closeDetail;
  const button = (text, name, onclick) => { const made = make("button", "", text); made.type = "button"; made.setAttribute("aria-label", name); made.title = name; made.onclick = onclick; return made; };
  const link = make("a", "button", "link"), where = make("small", "", g === G - 1 ? `group ${g}, the finest` : g ? `group ${g}, in prefixes ${g} to ${G - 1}` : "group 0, in every prefix");
  link.href = `#latent=${f}`; link.title = "A link to this latent: copy its address";
  const json = button("JSON", "Download what is known of this latent as JSON", () => download(`layer_${run.layer}-latent_${f}.json`, "application/json", JSON.stringify(knownOf(f), null, 1) + "\n"));
  head.append(back, make("h2", "", "Latent " + f), ...(G > 1 ? [chip(f), where] : []), make("span", "space"), link, json, button("‹", "Previous latent", () => step(-1)), button("›", "Next latent", () => step(1)));
  return head;
}
function noteLine(f) {
  const line = make("form", "note-line"), star = make("button", "star"), input = make("input"), note = noteOf(f);
  star.type = "button"; star.id = "star"; input.id = "note"; input.type = "text"; input.maxLength = 1000;
  input.placeholder = "Your note: what is it?"; input.setAttribute("aria-label", "Your label of this latent"); input.value = note?.label ?? "";
  input.autocomplete = "off";
  const draw = () => { const on = starred(noteOf(f)); star.textContent = on ? "★" : "☆"; star.setAttribute("aria-pressed", on); star.setAttribute("aria-label", on ? "Take the star away" : "Give it a star"); };
  const write = (on) => { if (on === starred(noteOf(f)) && input.value.trim() === (noteOf(f)?.label ?? "")) return; setNote(f, input.value, on); draw(); sayKept(); drawList(true); };
  star.onclick = () => write(!starred(noteOf(f)));
  input.onchange = () => write(starred(noteOf(f)));
  line.onsubmit = (event) => { event.preventDefault(); input.blur(); $("list").focus(); };
  draw();
  line.append(star, input);
  if (note && note.source !== "page") line.append(make("small", "", saidBy(note)));
  return line;
}
function explanationLine(f) {
  const said = explained.get(f), line = make("p", "explanation");
  if (said) line.append(make("b", "", "Explanation "), make("bdi", "", named(said.label)), " ", make("small", "", saidBy(said)));
  return said ? [line] : [];
}
function drawDetail(f) {
  const detail = $("detail"), g = c.group[f];
  detail.replaceChildren(headOf(f), noteLine(f), ...explanationLine(f));
  const facts = make("div", "facts");
  const fact = (value, name, title) => { const box = make("div"); if (title) box.title = title; box.append(make("b", "", value), make("span", "", name)); facts.append(box); };
  fact(percent(density(f)), "of rows" + (G > 1 ? `, prefix ${prefix}` : ""), ends.map((_, h) => h >= g ? `prefix ${h}: ${percent(density(f, h))}` : "").filter(Boolean).join("\n"));
  fact(Math.round(density(f) * run.rows).toLocaleString("en"), "firings" + (G > 1 ? `, prefix ${prefix}` : ""), ends.map((_, h) => h >= g ? `prefix ${h}: ${Math.round(density(f, h) * run.rows).toLocaleString("en")}` : "").filter(Boolean).join("\n"));
  fact(number(c.largest[f]), "largest activation"); fact(number(c.mean[f]), "mean when active");
  fact(percent(c.energy[f]), "of the energy", "share of the summed squared activations of all latents");
  fact(number(c.entropy[f]) + " bit", "token entropy", "0: always the same token");
  detail.append(facts);
  if (prefix < G - 1) detail.append(make("p", "note", `Rows and firings by the threshold of prefix ${prefix}; all other numbers by that of the full dictionary.`));
  if (!c.firings[f]) { detail.append(make("p", "note", "This latent never fired on the evaluated rows."), writes(f), kin(f)); return; }
  const pair = make("div", "pair"), left = make("div"), right = make("div");
  left.append(make("h3", "", "Words that say where it fires"), wordTable(f), quality(f)); right.append(make("h3", "", "Activations when active"), histogram(f));
  pair.append(left, right);
  const strongest = [], even = [], found = [];
  for (let s = c.sampleBounds[f]; s < c.sampleBounds[f + 1]; s++) { (c.sampleQuantile[s] === 255 ? strongest : even).push(s); if (matches.asked && hasMatch(s)) found.push(s); }
  if (found.length) detail.append(make("h3", "", `Contexts with “${matches.asked}”`), make("p", "note", "The activation on these words; the small number is that of the bold token."), lines(f, found, true));
  detail.append(pair, writes(f), make("h3", "", "Strongest contexts"), lines(f, strongest), make("h3", "", "Across its range"), lines(f, even), kin(f));
  detail.scrollTop = 0;
}
function writes(f) { // what its decoder row alone does to the logits
  const made = make("div", "pair");
  made.title = "effect of the latent's decoder row alone on the logits, minus the mean over the vocabulary; ranked by the effect over its standard deviation over random directions, among the tokens of the store's text";
  for (const [title, tokens, by] of [["Next tokens it promotes", "promoted", "promotedBy"], ["Next tokens it suppresses", "suppressed", "suppressedBy"]]) {
    if (!c[tokens].width) continue;
    const box = make("div", c.likeRandom[f] ? "weak" : ""), values = part(by, f);
    box.append(make("h3", "", title), bars(part(tokens, f), values, (x) => fixed(x, decimals(Math.max(...values.map(Math.abs))))));
    made.append(box);
  }
  if (c.effectHistogram.width) made.append(effects(f));
  if (made.childNodes.length) made.append(make("p", "note whole", "The values are effects on the logits; the order is that of z, an effect over its standard deviation over random directions."));
  return made;
}
function effects(f) { // its effects on the logits of all tokens, those that are far from the others too
  const made = make("div"), levels = part("effectHistogram", f), [low, high] = part("effectEdges", f), n = levels.length, digits = decimals(Math.max(-low, high));
  const bars = make("div", "bars"), axis = make("div", "axis");
  levels.forEach((level, i) => {
    const bar = make("i");
    bar.style.height = (level ? Math.max(3, 100 * level / 255) : 0) + "%";
    bar.title = `${fixed(low + (high - low) * i / n, digits)} to ${fixed(low + (high - low) * (i + 1) / n, digits)}`;
    bars.append(bar);
  });
  bars.setAttribute("role", "img"); bars.setAttribute("aria-label", `Histogram of its effects on the logits, from ${fixed(low, digits)} to ${fixed(high, digits)}`);
  axis.append(make("span", "", fixed(low, digits)), make("span", "", "logits"), make("span", "", fixed(high, digits)));
  made.append(make("h3", "", "Its effects on the logits"), bars, axis, make("p", "note", "Height: logarithm of the number of tokens."));
  if (c.likeRandom[f]) made.append(make("p", "note", "No more peaked than the effects of a random direction of the same norm: these tokens say little."));
  return made;
}
function quality(f) { // of the label, on rows that it was not chosen on
  const line = make("p", "note"), precision = c.labelPrecision[f], recall = c.labelRecall[f];
  line.textContent = `Chosen on ${c.labelFirings[f].toLocaleString("en")} firings. ` + (Number.isFinite(recall)
    ? `On other rows: ${Number.isFinite(precision) ? `it fires on ${percent(precision)} of the rows of these words (precision), ` : ""}${percent(recall)} of its firings are on them (recall).`
    : "It fires too rarely for the label to be measured on other rows.");
  return line;
}
function bars(tokens, values, text) { // tokens, each with a bar relative to the largest, and its value
  const table = make("div", "words-table"), most = values.reduce((most, value) => Math.max(most, Math.abs(value)), 1e-30);
  tokens.forEach((t, i) => {
    if (t < 0) return;
    const bar = make("i");
    bar.style.width = 100 * Math.abs(values[i]) / most + "%";
    table.append(make("bdi", "token", visible(strings[t])), bar, make("span", "value", text(values[i])));
  });
  return table;
}
function wordTable(f) {
  const table = bars(part("tokens", f), part("tokenShares", f), (x) => (100 * x).toFixed(1) + " %");
  table.title = "share of its activation on rows of this word, without the rows of the words above";
  return table;
}
function histogram(f) {
  const made = make("div"), bars = make("div", "bars"), n = c.histogram.width;
  const counts = c.histogram.subarray(f * n, (f + 1) * n), top = Math.max(...counts);
  counts.forEach((count, i) => { const bar = make("i"); bar.style.height = (count ? Math.max(3, 100 * count / top) : 0) + "%"; bar.title = `${number(c.largest[f] * i / n)} to ${number(c.largest[f] * (i + 1) / n)}: ${count}`; bars.append(bar); });
  const axis = make("div", "axis");
  axis.append(make("span", "", "0"), make("span", "", "activation"), make("span", "", number(c.largest[f])));
  made.append(bars, axis);
  return made;
}
function lines(f, samples, asked = false) { // asked: the samples with what is searched for, by the activation there
  const at = new Map(asked ? samples.map((s) => [s, activationAt(f, s, matched(s))]) : []);
  if (asked) samples.sort((a, b) => hasMatch(b) - hasMatch(a) || at.get(b) - at.get(a));
  const list = make("ol", "lines"), digits = decimals(c.largest[f]);
  for (const s of samples) {
    const item = make("li"), text = make("p"), value = make("span", "value", fixed(at.get(s) ?? c.sampleValue[s], digits)), found = matches.asked ? matched(s) : new Set();
    text.dir = "ltr";
    if (asked) { if (at.get(s) !== c.sampleValue[s]) value.append(" ", make("small", "", fixed(c.sampleValue[s], digits))); }
    else if (c.sampleQuantile[s] !== 255) value.append(" ", make("small", "", "p" + Math.round(c.sampleQuantile[s] / 2.54)));
    const shades = new Map();
    for (let k = c.shadeBounds[s]; k < c.shadeBounds[s + 1]; k++) shades.set(c.shadeAt[k], c.shadeLevel[k] / 255);
    for (let i = 0; i < c.sampleLength[s]; i++) {
      const token = make("span", "t"), string = strings[c.pool[c.sampleAt[s] + i]];
      write(token, string);
      const level = shades.get(i);
      if (level) { token.dataset.a = ""; token.style.backgroundColor = `rgba(var(--heat), ${0.12 + 0.58 * level})`; token.title = number(level * c.largest[f]); }
      if (i === c.sampleFocus[s]) token.classList.add("focus");
      if (found.has(i)) token.classList.add("hit");
      text.append(token);
    }
    item.append(value, text); list.append(item);
  }
  if (!samples.length) list.append(make("li", "", "none"));
  return list;
}
function write(token, string) {
  if (string === "") { token.append(make("span", "mark", "·")); token.title = "part of the character that follows"; return; }
  if (string.replace(INVISIBLE, "").trim() === "" && string.trim() !== "") { token.append(make("span", "mark", named(string))); return; }
  string.split("\n").forEach((part, i) => { if (i) token.append(make("span", "mark", "⏎")); token.append(part); });
}
function kin(f) {
  const pair = make("div", "pair");
  const list = (title, latents, scores, what) => {
    const box = make("div"), items = make("ul", "kin");
    latents.forEach((other, i) => {
      if (other < 0) return;
      const item = make("li"), button = make("button");
      button.type = "button"; button.title = what;
      button.append(chip(other), make("span", "id", "#" + other), labelled(other), make("span", "score", scores ? fixed(scores[i], 2) : ""));
      button.onclick = () => visit(other);
      item.append(button); items.append(item);
    });
    if (!items.childNodes.length) items.append(make("li", "note", "none"));
    box.append(make("h3", "", title), items); pair.append(box);
  };
  if (G > 1) {
    list("Parents: coarser latents that fire with it", part("parents", f), part("parentScores", f), "P(parent | this) − P(parent)");
    const all = children[f] || [], kids = all.slice().sort((a, b) => c.parentScores[b * c.parents.width] - c.parentScores[a * c.parents.width]).slice(0, 8);
    list(`Children: finer latents${all.length > 8 ? `, 8 of ${all.length}` : ""}`, kids, kids.map((k) => c.parentScores[k * c.parents.width]), "P(this | child) − P(this)");
    if (all.length > 8) {
      const every = make("button", "", `list all ${all.length}`);
      every.type = "button"; every.onclick = () => { setPrefix(G - 1); $("more").open = true; $("search").value = ""; $("parent").value = f; follow(); };
      pair.lastChild.append(every);
    }
  }
  list("Twins: firings overlap most", part("twins", f), part("twinScores", f), "Jaccard overlap of firings");
  if (c.near.width) list("Nearest decoder rows", part("near", f).slice(0, 4), part("nearCosine", f), "cosine of decoder rows");
  return pair;
}
function knownOf(f) { // everything that the pane shows, for another program
  const label = (t) => strings[t], real = (x) => Number.isFinite(x) ? Number(x.toPrecision(6)) : null;
  const pairs = (tokens, values) => part(tokens, f).flatMap((t, i) => t < 0 ? [] : [{ token: label(t), value: real(c[values][f * c[values].width + i]) }]);
  const others = (latents, scores) => part(latents, f).flatMap((other, i) => other < 0 ? [] : [{ latent: other, value: real(c[scores][f * c[scores].width + i]) }]);
  const samples = [];
  for (let s = c.sampleBounds[f]; s < c.sampleBounds[f + 1]; s++) {
    const activations = new Array(c.sampleLength[s]).fill(0);
    for (let k = c.shadeBounds[s]; k < c.shadeBounds[s + 1]; k++) activations[c.shadeAt[k]] = real(c.shadeLevel[k] / 255 * c.largest[f]);
    activations[c.sampleFocus[s]] = real(c.sampleValue[s]);
    samples.push({
      tokens: Array.from(c.pool.subarray(c.sampleAt[s], c.sampleAt[s] + c.sampleLength[s]), label), activations, focus: c.sampleFocus[s],
      activation: real(c.sampleValue[s]), quantile: c.sampleQuantile[s] === 255 ? null : real(c.sampleQuantile[s] / 254),
    });
  }
  return {
    model: run.model, layer: +run.layer, run: run.run, weights_sha256: run.weights, latent: f, group: c.group[f], note: noteOf(f), explanation: explained.get(f) ?? null,
    density: ends.map((_, g) => real(density(f, g))), firings: c.firings[f], largest_activation: real(c.largest[f]), mean_activation: real(c.mean[f]),
    energy_share: real(c.energy[f]), token_entropy_bits: real(c.entropy[f]), activation_histogram: part("histogram", f),
    label: pairs("tokens", "tokenShares"), label_precision: real(c.labelPrecision[f]), label_recall: real(c.labelRecall[f]), label_firings: c.labelFirings[f],
    effect_like_random: Boolean(c.likeRandom[f]), promoted: pairs("promoted", "promotedBy"), suppressed: pairs("suppressed", "suppressedBy"),
    parents: others("parents", "parentScores"), children: children[f] || [], twins: others("twins", "twinScores"), nearest: others("near", "nearCosine"),
    contexts: samples,
  };
}
function visit(f) {
  if (c.group[f] > prefix) setPrefix(c.group[f]);
  show("latents");
  choose(f);
}
function closeDetail() { $("detail").classList.remove("open"); $("list").focus(); }

// ---- families ----

function drawFamilies() {
  const size = new Int32Array(F);
  for (let f = F - 1; f >= 0; f--) for (const child of children[f] || []) size[f] += 1 + size[child];
  const roots = [...size.keys()].filter((f) => size[f] && !(c.parentScores[f * c.parents.width] > 0.5)).sort((a, b) => size[b] - size[a]).slice(0, 40);
  const branch = (f) => {
    const kids = children[f] || [], made = make(kids.length ? "details" : "div", "family"), line = make(kids.length ? "summary" : "div");
    const open = make("button", "open", "open"); open.type = "button"; open.onclick = (event) => { event.preventDefault(); visit(f); };
    line.append(chip(f), " #" + f, labelled(f), make("small", "", kids.length ? `${kids.length} children, ${size[f]} descendants ` : ""), open);
    made.append(line);
    if (kids.length) made.addEventListener("toggle", () => { if (made.open && made.childNodes.length === 1) made.append(...kids.slice().sort((a, b) => c.energy[b] - c.energy[a]).slice(0, 60).map(branch)); });
    return made;
  };
  $("families").replaceChildren(...roots.map(branch));
  if (!roots.length) $("families").append(make("p", "note", "No latent has a parent in a coarser group."));
}

// ---- tabs, prefix, keys ----

const tabs = [...document.querySelectorAll('[role="tab"]')];
function show(name, focus = false) {
  for (const tab of tabs) {
    const own = tab.getAttribute("aria-controls") === name;
    tab.setAttribute("aria-selected", own); tab.tabIndex = own ? 0 : -1;
    $(tab.getAttribute("aria-controls")).hidden = !own;
    if (own && focus) tab.focus();
  }
  if (!c) return; // the data come after the first paint
  if (name === "latents") { drawList(true); if (chosen < 0 && order.length) choose(order[0], false); }
  if (name === "nesting" && !$("families").childNodes.length) drawFamilies();
  remember();
}
const current = () => tabs.find((tab) => tab.getAttribute("aria-selected") === "true").getAttribute("aria-controls");
function remember() {
  const place = current() === "latents" && chosen >= 0 ? "#latent=" + chosen : `#tab=${current()}`;
  history.replaceState(null, "", place + (G > 1 ? `&prefix=${prefix}` : "")); // no element's id: the browser would scroll to it when the page has loaded
}
function setPrefix(g) {
  prefix = g;
  document.querySelector(`#prefix input[value="${g}"]`).checked = true;
  for (const list of document.querySelectorAll(".verdicts")) list.hidden = +list.dataset.prefix !== g;
  for (const row of document.querySelectorAll("#prefixes tbody tr")) row.classList.toggle("chosen", +row.dataset.prefix === g);
  document.querySelectorAll("#groups label").forEach((label, h) => (label.hidden = h > g));
  find();
  if (chosen >= ends[g]) { chosen = -1; if (order.length && current() === "latents") choose(order[0], false); }
  else if (chosen >= 0) drawDetail(chosen);
  remember();
}
function go() { // where the address leads: #latent=7&prefix=1, #tab=error; #latents/7/prefix-1 of older pages
  const old = /^#(\w+)(?:\/(\d+))?(?:\/prefix-(\d+))?$/.exec(location.hash) || [], asked = new URLSearchParams(location.hash.slice(1));
  const f = asked.get("latent") ?? old[2], g = asked.get("prefix") ?? old[3], name = asked.get("tab") ?? old[1];
  const number = (text, limit) => /^\d+$/.test(text ?? "") && +text < limit ? +text : -1;
  setPrefix(number(g, G) >= 0 ? +g : G - 1);
  if (number(f, F) >= 0) visit(+f);
  else if (tabs.some((tab) => tab.getAttribute("aria-controls") === name)) show(name);
}
function sortable(table) { // a click on a column's title: largest first, then smallest
  const body = table.tBodies[0], value = (row, i) => { const x = parseFloat(row.cells[i].textContent.replaceAll(",", "")); return Number.isNaN(x) ? -Infinity : x; };
  [...table.tHead.rows[0].cells].forEach((head, i) => {
    const button = make("button", "", head.textContent);
    button.type = "button"; head.replaceChildren(button);
    button.onclick = () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      for (const each of table.tHead.rows[0].cells) each.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const less = (a, b) => i ? value(a, i) - value(b, i) : b.cells[0].textContent.localeCompare(a.cells[0].textContent);
      body.append(...[...body.rows].sort((a, b) => (down ? -1 : 1) * less(a, b)));
    };
  });
}
function startControls() {
  for (const table of document.querySelectorAll("table.sortable")) sortable(table);
  for (const tab of tabs) tab.onclick = () => show(tab.getAttribute("aria-controls"));
  document.querySelector('[role="tablist"]').addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (by) show(tabs[(tabs.findIndex((tab) => tab.tabIndex === 0) + by + tabs.length) % tabs.length].getAttribute("aria-controls"), true);
  });
}
function startLatents() { // what needs the data
  for (const radio of document.querySelectorAll("#prefix input")) radio.onchange = () => setPrefix(+radio.value);
  for (const row of document.querySelectorAll("#prefixes tbody tr")) row.onclick = () => setPrefix(+row.dataset.prefix);
  if (G === 1) delete SORTS.children;
  for (const name in SORTS) $("sort").append(make("option", "", name));
  for (let g = 0; g < G; g++) {
    const label = make("label"), box = make("input"); box.type = "checkbox"; box.value = g; box.checked = true; box.onchange = follow;
    label.append(box, make("span", "g" + (g % 6), g)); $("groups").append(label);
  }
  $("sort").onchange = () => { sortName = $("sort").value; find(); };
  $("direction").onclick = () => { descending = !descending; $("direction").textContent = descending ? "↓" : "↑"; find(); };
  let timer;
  const soon = () => { clearTimeout(timer); timer = setTimeout(follow, 80); };
  for (const input of document.querySelectorAll("#search, #labels, #more input")) { if (input.type === "checkbox") input.onchange = follow; else input.oninput = soon; }
  $("clear").onclick = () => { for (const input of document.querySelectorAll("#more input")) { input.value = input.type === "checkbox" ? input.value : ""; input.checked = false; } follow(); };
  document.querySelector(".filters").onsubmit = (event) => { event.preventDefault(); if (order.length) choose(order[0]); };
  $("list").onscroll = () => { if (!pending) { pending = true; requestAnimationFrame(() => { pending = false; drawList(false); }); } };
  $("list").onclick = (event) => { const row = event.target.closest(".row"); if (row) choose(+row.dataset.f); };
  $("save").onclick = () => download("notes.csv", "text/csv;charset=utf-8", notesFile());
  $("load").onchange = async () => { const [file] = $("load").files; if (file) { sayKept(await loadNotes(file, F)); $("load").value = ""; follow(); } };
  addEventListener("storage", (event) => { if (event.key === KEY) { readOwn(); sayKept(); follow(); } });
  addEventListener("hashchange", go);
  addEventListener("resize", () => { $("spacer").style.height = order.length * rowHeight() + "px"; drawList(false); });
  phone.addEventListener("change", () => drawList(true));
  addEventListener("keydown", keys);
}
function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.matches('input:not([type="checkbox"]):not([type="radio"])') || (event.target.matches("select") && !"jk".includes(event.key)); // no choice begins with j or k
  if (event.key === "Escape") { if (event.target.id === "note") { $("list").focus(); return; } if (typing) $("list").focus(); closeDetail(); return; }
  if (typing) { if (event.key === "ArrowDown" && event.target.id === "search") { event.preventDefault(); $("list").focus(); } return; }
  if (event.key === "/") { event.preventDefault(); show("latents"); $("search").focus(); return; }
  if (/^[1-9]$/.test(event.key) && +event.key <= G) { setPrefix(+event.key - 1); return; }
  if (current() !== "latents") return;
  if (chosen >= 0 && event.key === "s") { $("star").click(); return; }
  if (chosen >= 0 && event.key === "n") { event.preventDefault(); $("note").focus(); return; }
  const page = Math.floor($("list").clientHeight / rowHeight()) - 1;
  const by = { ArrowDown: 1, ArrowUp: -1, j: 1, k: -1, PageDown: page, PageUp: -page, Home: -F, End: F }[event.key];
  if (event.key === "Enter" && document.activeElement === $("list")) $("detail").classList.add("open");
  else if (by && (event.key.length === 1 || document.activeElement === $("list"))) { event.preventDefault(); step(by); }
}
function start() {
  themed();
  startControls();
  requestAnimationFrame(() => setTimeout(() => { // the numbers are painted before the latents are read
    loadData();
    prefix = G - 1;
    readOwn();
    startLatents();
    go();
    sayKept();
    document.documentElement.dataset.ready = "";
  }));
}
start();
