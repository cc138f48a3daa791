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

let matches = { asked: "", first: [], last: [] }; // tokens of the pool that each occurrence begins and ends with
function search(asked) {
  if (asked === matches.asked) return;
  const first = [], last = [];
  if (asked && poolText === null) makePoolText();
  for (let at = asked ? poolText.indexOf(asked) : -1, p = 0; at >= 0; at = poolText.indexOf(asked, at + 1)) {
    while (poolStart[p + 1] <= at) p++;
    let q = p;
    while (poolStart[q + 1] < at + asked.length) q++;
    first.push(p); last.push(q);
  }
  matches = { asked, first, last };
}
function matchFrom(token) { // number of the first occurrence that begins there or later
  let low = 0, high = matches.first.length;
  while (low < high) { const middle = (low + high) >> 1; if (matches.first[middle] < token) low = middle + 1; else high = middle; }
  return low;
}
function hasMatch(s) { // neighbouring stretches of the pool are of different texts: an occurrence counts inside a sample
  const i = matchFrom(c.sampleAt[s]);
  return i < matches.first.length && matches.last[i] < c.sampleAt[s] + c.sampleLength[s];
}
function matched(s) { // tokens of a sample that belong to an occurrence
  const tokens = new Set(), at = c.sampleAt[s], end = at + c.sampleLength[s];
  for (let i = matchFrom(at); i < matches.first.length && matches.last[i] < end; i++)
    for (let t = matches.first[i]; t <= matches.last[i]; t++) tokens.add(t - at);
  return tokens;
}
