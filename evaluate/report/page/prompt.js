// The page of a text, after elements.js.

const fill = (parent, children) => { // not as arguments, of which there may be 100,000
  const all = document.createDocumentFragment();
  for (const child of children) all.append(child);
  parent.replaceChildren(all);
};
const short = (x) => x === null ? "–" : Number(x.toPrecision(3)).toString();

const prompt = JSON.parse($("data").textContent);
const row = []; // number of each token's row, -1 without one
prompt.tokens.reduce((n, token, i) => { row[i] = token.row ? n : -1; return n + (token.row ? 1 : 0); }, 0);
let chosen = null; // [layer, latent]

function shownLatents(layer, n) {
  const g = Number($("prefix").value), limit = Number($("limit").value), most = Math.max(1, Number($("most").value) || 1);
  const end = layer.prefix_ends[Math.min(g, layer.prefix_ends.length - 1)];
  return layer.active[n].filter(({ latent }) => latent < end && !((layer.latents[latent].density ?? 0) > limit)).slice(0, most);
}

function label(layer, latent) {
  const words = layer.latents[latent].label ?? [];
  return words.slice(0, 3).map(spaces).join(" ");
}

function button(l, { latent, value }) {
  const layer = prompt.layers[l], known = layer.latents[latent];
  const element = make("button", "latent g" + (known.group % 6));
  element.type = "button";
  element.setAttribute("aria-pressed", String(chosen !== null && chosen[0] === l && chosen[1] === latent));
  element.title = `group ${known.group}` + (known.density === undefined ? "" : `, fires on ${short(100 * known.density)} % of the rows`);
  element.append(make("b", "", latent), make("bdi", "", label(layer, latent)), make("span", "", short(value)));
  element.onclick = () => { chosen = chosen && chosen[0] === l && chosen[1] === latent ? null : [l, latent]; draw(); };
  return element;
}

function drawStrip() {
  const values = prompt.tokens.map((_, i) => {
    if (!chosen || row[i] < 0) return 0;
    const found = prompt.layers[chosen[0]].active[row[i]].find(({ latent }) => latent === chosen[1]);
    return found ? found.value : 0;
  });
  const largest = values.reduce((most, value) => Math.max(most, value), 1e-30);
  fill($("strip"), prompt.tokens.map((token, i) => {
    const element = make("span", token.row ? "t" : "t none", token.text);
    if (values[i]) {
      element.style.background = `rgba(var(--heat), ${0.15 + 0.75 * values[i] / largest})`;
      element.title = short(values[i]);
    }
    return element;
  }));
  if (!chosen) { $("chosen").textContent = "No latent is chosen."; return; }
  const layer = prompt.layers[chosen[0]], known = layer.latents[chosen[1]];
  $("chosen").textContent = `Latent ${chosen[1]} of layer ${layer.layer}, group ${known.group}: ` +
    `${label(layer, chosen[1]) || "no label, because this layer was not evaluated"}. It fires on ${values.filter(Boolean).length} of these tokens; its largest activation is ${short(largest)}.`;
}

function drawRows() {
  const g = Number($("prefix").value);
  fill($("rows"), prompt.tokens.flatMap((token, i) => {
    if (row[i] < 0) return [];
    const line = make("tr");
    line.append(make("td", "word token", spaces(token.text) || "·"));
    prompt.layers.forEach((layer, l) => {
      const share = layer.error_share[Math.min(g, layer.error_share.length - 1)][row[i]];
      const error = make("td", "bar-cell", short(share));
      error.style.setProperty("--v", Math.min(share ?? 0, 1));
      const cell = make("td", "latents");
      const latents = shownLatents(layer, row[i]);
      cell.append(...latents.map((each) => button(l, each)));
      const left = layer.active[row[i]].length - latents.length;
      if (left > 0) cell.append(make("small", "", `+${left}`));
      line.append(error, cell);
    });
    return [line];
  }));
}

function draw() { drawStrip(); drawRows(); }

const prefixes = Math.max(...prompt.layers.map((layer) => layer.prefix_ends.length));
for (let g = 0; g < prefixes; g++) {
  const option = make("option", "", `${g} (${prompt.layers[0].prefix_ends[g] ?? "-"} latents)`);
  option.value = g; option.selected = g === prefixes - 1;
  $("prefix").append(option);
}
$("titles").append(make("th", "", "token"));
for (const layer of prompt.layers) $("titles").append(make("th", "", `error, layer ${layer.layer}`), make("th", "latents", `latents of layer ${layer.layer}: number, label, activation`));
for (const id of ["prefix", "most", "limit"]) $(id).oninput = draw;
draw();
