// What a person says of latents: kept by the browser for these weights, saved as a CSV file, and read from one. The
// columns are those of evaluate/notes.py, which reads the file for the other pages.

const COLUMNS = ["layer", "latent", "label", "score", "source"];
const run = document.querySelector("main").dataset;
const KEY = "notes:" + run.weights;
const filed = new Map(Object.entries(JSON.parse($("notes").textContent)).map(([f, note]) => [+f, note])); // of the run directory
const explained = new Map(); // by a language model, in a file of its own: no note, and not saved as one
for (const [f, { explained: by, ...said }] of filed) {
  if (by) explained.set(f, by === true ? said : by);
  if (by === true) filed.delete(f);
}
let own = new Map(); // of this browser, before those; null: taken away
let refused = ""; // why the browser keeps nothing

const noteOf = (f) => (own.has(f) ? own.get(f) : filed.get(f)) || null;
const starred = (note) => note !== null && note.source === "page" && note.score === 1;
const saidBy = ({ source, score }) => [source, score === null ? "" : "score " + number(score)].filter(Boolean).join(", ");
const noted = () => [...new Set([...filed.keys(), ...own.keys()])].filter(noteOf).sort((a, b) => a - b);

function stored() {
  const text = localStorage.getItem(KEY);
  return text === null ? {} : JSON.parse(text);
}
function readOwn() {
  try { own = new Map(Object.entries(stored()).map(([f, note]) => [+f, note])); } catch (error) { refused = error.name; }
}
function keep(latents) { // these alone: another window may have written others
  try {
    const all = stored();
    for (const f of latents) { if (own.has(f)) all[f] = own.get(f); else delete all[f]; }
    localStorage.setItem(KEY, JSON.stringify(all));
    refused = "";
  } catch (error) { refused = error.name; }
}
function setNote(f, label, star) {
  const before = filed.get(f);
  label = label.split(/\s+/).filter(Boolean).join(" ");
  if (before && before.label === label && starred(before) === star) own.delete(f);
  else if (label || star) own.set(f, { label, score: star ? 1 : null, source: "page" });
  else if (before) own.set(f, null);
  else own.delete(f);
  keep([f]);
}
function sayKept(more = "") {
  const n = noted().length, made = own.size;
  $("save").disabled = !n;
  $("save").textContent = n ? `Save ${n} note${n > 1 ? "s" : ""}` : "Save notes";
  $("kept").textContent = more || (refused
    ? `This browser keeps no notes for this page (${refused}): save them to a file before you close it.`
    : made ? "Kept in this browser." : "");
  $("kept").classList.toggle("poor", Boolean(refused && !more));
}

// ---- files ----

function download(name, type, text) {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
const quoted = (text) => /^\s|[",;\t\r\n]|\s$/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
function notesFile() {
  const lines = noted().map((f) => { const { label, score, source } = noteOf(f); return [run.layer, f, quoted(label), score ?? "", quoted(source)].join(); });
  return [COLUMNS.join(), ...lines, ""].join("\r\n");
}
function fieldsOf(text, delimiter) { // the lines of a CSV file, each with its fields
  const lines = [[]];
  const field = new RegExp(`("(?:[^"]|"")*"|[^${delimiter}\\r\\n"]*)(${delimiter}|\\r\\n|\\n|\\r|$)`, "y");
  while (field.lastIndex < text.length) {
    const found = field.exec(text);
    if (!found) throw new Error(`line ${lines.length}: a quote that does not end`);
    lines.at(-1).push(found[1].startsWith('"') ? found[1].slice(1, -1).replaceAll('""', '"') : found[1]);
    if (found[2] !== delimiter) lines.push([]);
  }
  return lines;
}
const whole = (text) => /^\d{1,9}(\.0)?$/.test(text) ? parseInt(text, 10) : NaN;
function notesIn(text, latents) { // latent -> note; an error of one line, as of evaluate/notes.py
  const delimiter = [",", ";", "\t"].reduce((a, b) => (text.split("\n", 1)[0].split(b).length > text.split("\n", 1)[0].split(a).length ? b : a));
  const [head, ...lines] = fieldsOf(text, delimiter);
  const names = head.map((name) => name.trim().toLowerCase());
  for (const name of COLUMNS.slice(0, 3)) if (!names.includes(name)) throw new Error(`no column ${name}; expected ${COLUMNS.join(", ")}`);
  const notes = new Map();
  lines.forEach((fields, i) => {
    if (!fields.some((field) => field.trim())) return;
    const place = `line ${i + 2}: `, value = (name) => (fields[names.indexOf(name)] ?? "").trim();
    if (fields.slice(names.length).some((field) => field.trim())) throw new Error(`${place}expected ${names.length} values, found ${fields.length}`);
    if (whole(value("layer")) !== +run.layer) throw new Error(`${place}layer: expected ${run.layer}, this page's, found ${value("layer")}`);
    const f = whole(value("latent"));
    if (!(f < latents)) throw new Error(`${place}latent: expected 0 to ${latents - 1}, found ${value("latent")}`);
    if (notes.has(f)) throw new Error(`${place}latent ${f} is there twice`);
    const text = value("score").replace(/^(-?\d+),(\d+)$/, "$1.$2"), score = text === "" ? null : Number(text);
    if (score !== null && !Number.isFinite(score)) throw new Error(`${place}score: expected a number or nothing, found ${text}`);
    const label = value("label").split(/\s+/).filter(Boolean).join(" ");
    if ([...label].length > 1000) throw new Error(`${place}label: expected at most 1,000 characters, found ${[...label].length.toLocaleString("en")}`);
    if (!label && score === null) throw new Error(`${place}no label and no score`);
    notes.set(f, { label, score, source: value("source") });
  });
  return notes;
}
async function loadNotes(file, latents) {
  try {
    let text;
    try { text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer()); } catch (error) { throw error instanceof TypeError ? new Error("not UTF-8; save it as CSV UTF-8") : error; }
    const notes = notesIn(text.replace(/^sep=.\r?\n/, ""), latents);
    for (const [f, note] of notes) own.set(f, note);
    keep(notes.keys());
    return `${notes.size} notes loaded.${refused ? ` This browser does not keep them (${refused}).` : ""}`;
  } catch (error) { return `${file.name}: ${error.message}`; }
}
