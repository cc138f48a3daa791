// The page's own script, after elements.js.

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
let strings, c, F, G, ends;
function loadData() {
  const data = JSON.parse($("data").textContent);
  strings = data.strings; F = data.latents; ends = data.prefix_ends; G = ends.length; c = {};
  for (const name in data.columns) c[name] = unpack(data.columns[name]);
  children = Array.from({ length: F }, () => null);
  for (let f = 0; f < F; f++) {
    const parent = c.parents[f * c.parents.width];
    if (parent >= 0 && c.parentScores[f * c.parents.width] > 0.5) (children[parent] ??= []).push(f);
  }
}
let children;
let prefix, order = [], chosen = -1, descending = true;
const density = (f, g = prefix) => c.density[g * F + f];
const percent = (x) => !Number.isFinite(x) ? "–" : x === 0 ? "0 %" : 100 * x < 0.01 ? "<0.01 %" : number(100 * x, 3) + " %";
const visible = (text) => named(spaces(text));
const words = (f, n = 3) => {
  const made = make("span", "words");
  for (let i = 0; i < n; i++) {
    const t = c.tokens[f * c.tokens.width + i];
    if (t < 0) break;
    made.append(make("bdi", "token", visible(strings[t])));
  }
  if (!made.childNodes.length) made.append(make("small", "", "never fired"));
  return made;
};
const chip = (f) => { const made = make("span", "chip g" + (c.group[f] % 6), c.group[f]); made.title = "group " + c.group[f]; return made; };

// ---- list: only the rows in view exist ----

const ROW = 46;
const SORTS = {
  "energy (what it writes)": (f) => c.energy[f],
  "how often it fires": (f) => density(f),
  "largest activation": (f) => c.largest[f],
  "mean activation": (f) => c.mean[f],
  "token entropy (general first)": (f) => c.entropy[f],
  "share of its top token": (f) => c.topShare[f],
  "nearest decoder cosine": (f) => c.near.width ? c.nearCosine[f * c.near.width] : 0,
  "overlap with its twin": (f) => c.twinScores[f * c.twins.width],
  "children": (f) => (children[f] || []).length,
  "number": (f) => -f,
};
const SHOWN = {
  "how often it fires": (f) => percent(density(f)), "energy (what it writes)": (f) => percent(c.energy[f]),
  "share of its top token": (f) => percent(c.topShare[f]), "token entropy (general first)": (f) => number(c.entropy[f]) + " bit",
  "number": (f) => percent(density(f)),
};
let sortName = Object.keys(SORTS)[0];

function find() {
  const query = $("search").value;
  const asked = query.trim().toLowerCase(), exact = /^#?(\d+)$/.exec(asked);
  const groups = new Set([...document.querySelectorAll("#groups input:checked")].map((box) => +box.value));
  const dead = $("dead").checked, end = ends[prefix];
  order = [];
  for (let f = 0; f < end; f++) {
    if (!groups.has(c.group[f]) || (density(f) === 0) !== dead) continue;
    if (asked && !(exact && String(f).startsWith(exact[1])) && !says(f, asked)) continue;
    order.push(f);
  }
  const key = SORTS[sortName], sign = descending ? -1 : 1;
  const keys = new Float64Array(F);
  for (const f of order) { const v = key(f); keys[f] = Number.isFinite(v) ? v : -Infinity; }
  order.sort((a, b) => sign * (keys[a] - keys[b]) || a - b);
  if (exact && +exact[1] < end && order.includes(+exact[1])) order = [+exact[1], ...order.filter((f) => f !== +exact[1])];
  $("count").textContent = `${order.length.toLocaleString("en")} of ${end.toLocaleString("en")} latents of prefix ${prefix}`;
  $("spacer").style.height = order.length * ROW + "px";
  $("list").scrollTop = 0;
  drawList(true);
}
function says(f, asked) {
  for (let i = 0; i < c.tokens.width; i++) {
    const t = c.tokens[f * c.tokens.width + i];
    if (t >= 0 && lower(t).includes(asked)) return true;
  }
  for (let s = c.sampleBounds[f]; s < c.sampleBounds[f + 1]; s++)
    if (lower(c.pool[c.sampleAt[s] + c.sampleFocus[s]]).includes(asked)) return true;
  return false;
}
const lowered = [];
const lower = (t) => (lowered[t] ??= strings[t].toLowerCase());

const live = new Map();
let pending = false;
function drawList(anew) {
  const list = $("list"), height = list.clientHeight || 600;
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 4), last = Math.min(order.length, Math.ceil((list.scrollTop + height) / ROW) + 4);
  for (const [i, row] of live) if (anew || i < first || i >= last) { row.remove(); live.delete(i); }
  for (let i = first; i < last; i++) if (!live.has(i)) {
    const f = order[i], row = make("div", "row");
    row.id = "row-" + f; row.dataset.f = f;
    row.setAttribute("role", "option"); row.setAttribute("aria-selected", f === chosen);
    row.setAttribute("aria-posinset", i + 1); row.setAttribute("aria-setsize", order.length);
    row.style.transform = `translateY(${i * ROW}px)`;
    const show = SHOWN[sortName] || ((g) => number(SORTS[sortName](g)));
    row.append(chip(f), make("span", "id", "#" + f), words(f), make("span", "value", show(f)));
    live.set(i, row); list.append(row);
  }
}
function choose(f, open = true) {
  chosen = f;
  for (const row of live.values()) row.setAttribute("aria-selected", +row.dataset.f === f);
  $("list").setAttribute("aria-activedescendant", "row-" + f);
  const i = order.indexOf(f), list = $("list");
  if (i >= 0) {
    if (i * ROW < list.scrollTop) list.scrollTop = i * ROW;
    else if ((i + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (i + 1) * ROW - list.clientHeight;
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

function drawDetail(f) {
  const detail = $("detail"), g = c.group[f];
  detail.replaceChildren();
  const head = make("div", "head"), back = make("button", "back", "← list");
  back.type = "button"; back.onclick = closeDetail;
  const previous = make("button", "", "‹"), next = make("button", "", "›");
  previous.setAttribute("aria-label", "Previous latent"); next.setAttribute("aria-label", "Next latent");
  previous.onclick = () => step(-1); next.onclick = () => step(1);
  head.append(back, make("h2", "", "Latent " + f), chip(f), make("small", "", g === G - 1 ? `group ${g}, the finest` : g ? `group ${g}, in prefixes ${g} to ${G - 1}` : "group 0, in every prefix"), make("span", "space"), previous, next);
  detail.append(head);
  const facts = make("div", "facts");
  const fact = (value, name, title) => { const box = make("div"); if (title) box.title = title; box.append(make("b", "", value), make("span", "", name)); facts.append(box); };
  fact(percent(density(f)), `of rows, prefix ${prefix}`, ends.map((_, h) => h >= g ? `prefix ${h}: ${percent(density(f, h))}` : "").filter(Boolean).join("\n"));
  fact(c.firings[f].toLocaleString("en"), "firings");
  fact(number(c.largest[f]), "largest activation"); fact(number(c.mean[f]), "mean when active");
  fact(percent(c.energy[f]), "of the energy", "share of the summed squared activations of all latents");
  fact(number(c.entropy[f]) + " bit", "token entropy", "0: always the same token");
  detail.append(facts);
  if (!c.firings[f]) { detail.append(make("p", "note", "This latent never fired on the evaluated rows."), kin(f)); return; }
  const pair = make("div", "pair"), left = make("div"), right = make("div"), width = c.promoted.width;
  left.append(make("h3", "", "Words that say where it fires"), wordTable(f)); right.append(make("h3", "", "Activations when active"), histogram(f));
  if (width) {
    const line = make("p", "promotes");
    const tokens = (at, from, by) => { for (let i = 0; i < width; i++) { const t = make("bdi", "token", visible(strings[from[f * width + i]])); t.title = number(by[f * width + i]); at.append(t, " "); } };
    tokens(line, c.promoted, c.promotedBy);
    line.title = "what the latent's decoder row alone adds to the logits above their mean; ranked by that over what random directions do";
    const less = make("p", "promotes"); tokens(less, c.suppressed, c.suppressedBy);
    right.append(make("h3", "", "Next tokens it promotes" + (c.likeRandom[f] ? " (no more than a random direction)" : "")), line, make("h3", "", "and suppresses"), less);
  }
  pair.append(left, right);
  const strongest = [], even = [];
  for (let s = c.sampleBounds[f]; s < c.sampleBounds[f + 1]; s++) (c.sampleQuantile[s] === 255 ? strongest : even).push(s);
  detail.append(pair, make("h3", "", "Strongest contexts"), lines(f, strongest), make("h3", "", "Across its range"), lines(f, even), kin(f));
  detail.scrollTop = 0;
}
function wordTable(f) {
  const table = make("div", "words-table"), n = c.tokens.width;
  for (let i = 0; i < n && c.tokens[f * n + i] >= 0; i++) {
    const share = c.tokenShares[f * n + i], bar = make("i");
    bar.style.width = 100 * share / c.tokenShares[f * n] + "%";
    table.append(make("bdi", "token", visible(strings[c.tokens[f * n + i]])), bar, make("span", "value", percent(share)));
  }
  table.title = "share of the latent's activation";
  const p = c.labelPrecision[f], r = c.labelRecall[f];
  const note = make("small", "", `chosen on ${c.labelFirings[f]} firings; ` + (Number.isFinite(r) ? `on other rows precision ${percent(p)}, recall ${percent(r)}` : "too few to measure it on others"));
  note.style.gridColumn = "1 / -1"; table.append(note);
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
function lines(f, samples) {
  const list = make("ol", "lines");
  for (const s of samples) {
    const item = make("li"), text = make("p"), value = make("span", "value", number(c.sampleValue[s]));
    text.dir = "ltr";
    if (c.sampleQuantile[s] !== 255) value.append(" ", make("small", "", "p" + Math.round(c.sampleQuantile[s] / 2.54)));
    const shades = new Map();
    for (let k = c.shadeBounds[s]; k < c.shadeBounds[s + 1]; k++) shades.set(c.shadeAt[k], c.shadeLevel[k] / 255);
    for (let i = 0; i < c.sampleLength[s]; i++) {
      const token = make("span", "t"), string = strings[c.pool[c.sampleAt[s] + i]];
      write(token, string);
      const level = shades.get(i);
      if (level) { token.dataset.a = ""; token.style.backgroundColor = `rgba(var(--heat), ${0.12 + 0.58 * level})`; token.title = number(level * c.largest[f]); }
      if (i === c.sampleFocus[s]) token.classList.add("focus");
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
      button.append(chip(other), make("span", "id", "#" + other), words(other), make("span", "score", scores ? number(scores[i], 2) : ""));
      button.onclick = () => visit(other);
      item.append(button); items.append(item);
    });
    if (!items.childNodes.length) items.append(make("li", "note", "none"));
    box.append(make("h3", "", title), items); pair.append(box);
  };
  const part = (name) => Array.from(c[name].subarray(f * c[name].width, (f + 1) * c[name].width));
  list("Parents: coarser latents that fire with it", part("parents"), part("parentScores"), "P(parent | this) − P(parent)");
  const kids = (children[f] || []).slice().sort((a, b) => c.parentScores[b * c.parents.width] - c.parentScores[a * c.parents.width]).slice(0, 8);
  list(`Children: finer latents${(children[f] || []).length > 8 ? `, 8 of ${children[f].length}` : ""}`, kids, kids.map((k) => c.parentScores[k * c.parents.width]), "P(this | child) − P(this)");
  list("Twins: firings overlap most", part("twins"), part("twinScores"), "Jaccard overlap of firings");
  if (c.near.width) list("Nearest decoder rows", part("near").slice(0, 4), part("nearCosine"), "cosine of decoder rows");
  return pair;
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
    line.append(chip(f), " #" + f, words(f), make("small", "", kids.length ? `${kids.length} children, ${size[f]} descendants ` : ""), open);
    made.append(line);
    if (kids.length) made.addEventListener("toggle", () => { if (made.open && made.childNodes.length === 1) made.append(...kids.slice().sort((a, b) => c.energy[b] - c.energy[a]).slice(0, 60).map(branch)); });
    return made;
  };
  $("families").replaceChildren(...roots.map(branch));
  if (!roots.length) $("families").append(make("p", "note", "No latent has a parent in a coarser group."));
}

// ---- tabs, prefix, theme, keys ----

const tabs = [...document.querySelectorAll('[role="tab"]')];
function show(name, focus = false) {
  for (const tab of tabs) {
    const own = tab.getAttribute("aria-controls") === name;
    tab.setAttribute("aria-selected", own); tab.tabIndex = own ? 0 : -1;
    $(tab.getAttribute("aria-controls")).hidden = !own;
    if (own && focus) tab.focus();
  }
  if (name === "latents") { drawList(true); if (chosen < 0 && order.length) choose(order[0], false); }
  if (name === "nesting" && !$("families").childNodes.length) drawFamilies();
  remember();
}
const current = () => tabs.find((tab) => tab.getAttribute("aria-selected") === "true").getAttribute("aria-controls");
function remember() {
  const place = current() === "latents" && chosen >= 0 ? "latents/" + chosen : current();
  history.replaceState(null, "", `#${place}/prefix-${prefix}`); // no element's id: the browser would scroll to it when the page has loaded
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
function setTheme(name) {
  document.documentElement.dataset.theme = name;
  try { localStorage.setItem("theme", name); } catch { /* storage can be forbidden for files */ }
}
function startTheme() {
  let saved = null;
  try { saved = localStorage.getItem("theme"); } catch { /* as above */ }
  const dark = matchMedia("(prefers-color-scheme: dark)");
  document.documentElement.dataset.theme = saved || (dark.matches ? "dark" : "light");
  dark.addEventListener("change", (event) => { if (!saved) document.documentElement.dataset.theme = event.matches ? "dark" : "light"; });
  $("theme").onclick = () => { saved = document.documentElement.dataset.theme === "dark" ? "light" : "dark"; setTheme(saved); };
}
function startControls() {
  for (const tab of tabs) tab.onclick = () => show(tab.getAttribute("aria-controls"));
  document.querySelector('[role="tablist"]').addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (by) show(tabs[(tabs.findIndex((tab) => tab.tabIndex === 0) + by + tabs.length) % tabs.length].getAttribute("aria-controls"), true);
  });
  for (const radio of document.querySelectorAll("#prefix input")) radio.onchange = () => setPrefix(+radio.value);
  for (const row of document.querySelectorAll("#prefixes tbody tr")) row.onclick = () => setPrefix(+row.dataset.prefix);
  for (const name in SORTS) $("sort").append(make("option", "", name));
  for (let g = 0; g < G; g++) {
    const label = make("label"), box = make("input"); box.type = "checkbox"; box.value = g; box.checked = true; box.onchange = find;
    label.append(box, make("span", "g" + (g % 6), g)); $("groups").append(label);
  }
  $("sort").onchange = () => { sortName = $("sort").value; find(); };
  $("direction").onclick = () => { descending = !descending; $("direction").textContent = descending ? "↓" : "↑"; find(); };
  $("dead").onchange = find;
  let timer; $("search").oninput = () => { clearTimeout(timer); timer = setTimeout(find, 80); };
  document.querySelector(".filters").onsubmit = (event) => { event.preventDefault(); if (order.length) choose(order[0]); };
  $("list").onscroll = () => { if (!pending) { pending = true; requestAnimationFrame(() => { pending = false; drawList(false); }); } };
  $("list").onclick = (event) => { const row = event.target.closest(".row"); if (row) choose(+row.dataset.f); };
  addEventListener("resize", () => drawList(false));
  addEventListener("keydown", keys);
}
function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.matches('input[type="search"], select');
  if (event.key === "Escape") { if (typing) $("list").focus(); closeDetail(); return; }
  if (typing || event.target.matches('[role="tab"], #prefix input')) { if (event.key === "ArrowDown" && event.target.id === "search") { event.preventDefault(); $("list").focus(); } return; }
  if (event.key === "/") { event.preventDefault(); show("latents"); $("search").focus(); return; }
  if (/^[1-9]$/.test(event.key) && +event.key <= G) { setPrefix(+event.key - 1); return; }
  if (current() !== "latents") return;
  const page = Math.floor($("list").clientHeight / ROW) - 1;
  const by = { ArrowDown: 1, ArrowUp: -1, j: 1, k: -1, PageDown: page, PageUp: -page, Home: -F, End: F }[event.key];
  if (event.key === "Enter" && document.activeElement === $("list")) $("detail").classList.add("open");
  else if (by && (event.key.length === 1 || document.activeElement === $("list"))) { event.preventDefault(); step(by); }
}
function start() {
  startTheme();
  loadData();
  prefix = G - 1;
  startControls();
  const asked = /^#(\w+)(?:\/(\d+))?(?:\/prefix-(\d+))?$/.exec(location.hash) || [];
  setPrefix(asked[3] !== undefined && +asked[3] < G ? +asked[3] : G - 1);
  if (asked[2] !== undefined && +asked[2] < F) visit(+asked[2]);
  else if (tabs.some((tab) => tab.getAttribute("aria-controls") === asked[1])) show(asked[1]);
}
start();
