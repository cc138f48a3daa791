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
