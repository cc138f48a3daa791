"use strict";
// Before the script of every page. Token text comes from the web: it only ever goes through textContent.

const $ = (id) => document.getElementById(id);
const make = (tag, className, text) => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};
const number = (x, digits = 3) => !Number.isFinite(x) ? "–" : Math.abs(x) >= 1000 ? Math.round(x).toLocaleString("en") : String(Number(x.toPrecision(digits)));
const INVISIBLE = /[\p{Cf}\p{Cc}\p{Zl}\p{Zp}\u00a0]/gu; // format and control characters, by their code points
const named = (text) => text.replace(INVISIBLE, (c) => "‹" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") + "›");
const spaces = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/\r/g, "␍").replace(/^ +| +$/g, (s) => "␣".repeat(s.length));
// The theme that was chosen on a page of ours, else the system's; #theme changes it.
function themed() {
  const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  const show = () => { root.dataset.theme = chosen || (dark.matches ? "dark" : "light"); };
  try { chosen = localStorage.getItem("theme"); } catch { /* storage can be forbidden for files */ }
  show();
  dark.addEventListener("change", show);
  $("theme").onclick = () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    show();
    try { localStorage.setItem("theme", chosen); } catch { /* as above */ }
  };
}
