// Search through the text of the contexts: one string of all of it, made when it is first asked for.

const lowered = [];
const plain = (text) => text.toLowerCase().replace(/\s/g, " ");
const lower = (t) => (lowered[t] ??= plain(strings[t]));

let poolText = null, poolStart; // first character of each token
function makePoolText() {
  const n = c.pool.length, parts = new Array(n);
  poolStart = new Uint32Array(n + 1);
  for (let i = 0; i < n; i++) { parts[i] = lower(c.pool[i]); poolStart[i + 1] = poolStart[i] + parts[i].length; }
  poolText = parts.join("");
}

const INSIDE = 1, BEGINS = 2; // what is asked for stands inside of a word (Paris: comparison), or where one begins
const begins = (text, at) => !/[\p{L}\p{N}\p{M}]$/u.test(text.slice(Math.max(0, at - 2), at)) || !/^[\p{L}\p{N}]/u.test(text.slice(at, at + 2));
function says(text, asked) { // 0: not at all
  let found = 0;
  for (let at = text.indexOf(asked); at >= 0 && found < BEGINS; at = text.indexOf(asked, at + 1)) found = begins(text, at) ? BEGINS : INSIDE;
  return found;
}

let matches = { asked: "", first: [], last: [], how: [] }; // tokens of the pool that each occurrence begins and ends with
function search(asked) {
  if (asked === matches.asked) return;
  const first = [], last = [], how = [];
  if (asked && poolText === null) makePoolText();
  for (let at = asked ? poolText.indexOf(asked) : -1, p = 0; at >= 0; at = poolText.indexOf(asked, at + 1)) {
    while (poolStart[p + 1] <= at) p++;
    let q = p;
    while (poolStart[q + 1] < at + asked.length) q++;
    first.push(p); last.push(q); how.push(begins(poolText, at) ? BEGINS : INSIDE);
  }
  matches = { asked, first, last, how };
}
function matchFrom(token) { // number of the first occurrence that begins there or later
  let low = 0, high = matches.first.length;
  while (low < high) { const middle = (low + high) >> 1; if (matches.first[middle] < token) low = middle + 1; else high = middle; }
  return low;
}
function hasMatch(s) { // as `says`; neighbouring stretches of the pool are of different texts: an occurrence counts inside a sample
  let found = 0;
  const end = c.sampleAt[s] + c.sampleLength[s];
  for (let i = matchFrom(c.sampleAt[s]); found < BEGINS && i < matches.first.length && matches.last[i] < end; i++) found = Math.max(found, matches.how[i]);
  return found;
}
function matched(s) { // tokens of a sample that belong to an occurrence
  const tokens = new Set(), at = c.sampleAt[s], end = at + c.sampleLength[s];
  for (let i = matchFrom(at); i < matches.first.length && matches.last[i] < end; i++)
    for (let t = matches.first[i]; t <= matches.last[i]; t++) tokens.add(t - at);
  return tokens;
}
function activationAt(f, s, tokens) { // the largest on these tokens of a sample, 0 where it does not fire on them
  let largest = tokens.has(c.sampleFocus[s]) ? c.sampleValue[s] : 0;
  for (let k = c.shadeBounds[s]; k < c.shadeBounds[s + 1]; k++) if (tokens.has(c.shadeAt[k]) && c.shadeAt[k] !== c.sampleFocus[s]) largest = Math.max(largest, c.shadeLevel[k] / 255 * c.largest[f]);
  return largest;
}
const labelSays = (f, asked) => Math.max(says(plain(noteOf(f)?.label ?? ""), asked), says(plain(explained.get(f)?.label ?? ""), asked), ...part("tokens", f).map((t) => t < 0 ? 0 : says(lower(t), asked)));
function contextSays(f) {
  let found = 0;
  for (let s = c.sampleBounds[f]; found < BEGINS && s < c.sampleBounds[f + 1]; s++) found = Math.max(found, hasMatch(s));
  return found;
}

// ---- how sure a label is ----

const WEAK_RECALL = +run.weak; // docs/labels.md
const weak = (f) => c.labelRecall[f] < WEAK_RECALL; // not one that was not measured
function lowest(share, n) { // lower end of Wilson's 95 % interval of a share of n rows
  const z = 1.96, centre = share + z * z / (2 * n), spread = z * Math.sqrt(share * (1 - share) / n + z * z / (4 * n * n));
  return (centre - spread) / (1 + z * z / n); // NaN of no rows
}
const measured = (f) => Number.isFinite(c.labelRecall[f])
  ? `its label's precision ${percent(c.labelPrecision[f])} of ${number(c.labelRows[f])} rows, recall ${percent(c.labelRecall[f])} of ${number(c.labelFired[f])} firings` : "";
