"use strict";
// Elements of the page, and how values are written. page.py joins the scripts to one, in the order
// elements, state, overview, list, trajectory, main.
//
// All data reaches the document as text nodes or as attributes. No script turns a string into HTML,
// and the page's Content-Security-Policy forbids it.

const data = JSON.parse(document.getElementById("index").textContent);
const main = document.querySelector("main");
const strataKeys = [...new Set(data.items.flatMap((item) => Object.keys(item.strata)))];

// Make characters visible: control characters as pictures; characters that change the direction of
// text, and lone surrogates, as code points.
function readable(text) {
  return String(text)
    .replace(/[\0-\x08\x0b-\x1f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
    .replace(/\x7f/g, "\u2421")
    .replace(/[\x80-\x9f\u2028-\u202e\u2066-\u2069]|\p{Surrogate}/gu, (c) =>
      `⟨U+${c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

// Make an element. Attributes are an object, a class name, or null. Tags and attribute names are
// literals of these scripts; data is only a value of an attribute, or a child.
function h(tag, attributes, ...children) {
  const svg = ["svg", "path", "line", "text", "circle"].includes(tag);
  const element = svg
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  const named = typeof attributes === "string" ? { class: attributes } : (attributes ?? {});
  for (const [name, value] of Object.entries(named)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, name === "title" ? readable(value) : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false || child === "") continue;
    element.append(child instanceof Node ? child : readable(child));
  }
  return element;
}

const quiet = (...children) => h("span", "quiet", ...children);
const note = (...children) => h("p", "note", ...children);
const folded = (kind, title, ...children) =>
  h("details", kind, h("summary", null, title), ...children);
// A property of the object itself: names in the data can be "constructor".
const own = (object, name) => (Object.hasOwn(object ?? {}, name) ? object[name] : undefined);
const clip = (text, length) => (text.length > length ? `${text.slice(0, length)} …` : text);
const isNumber = (value) => typeof value === "number";
const mean = (value) => (isNumber(value) ? value.toFixed(Math.abs(value) < 100 ? 3 : 1) : "–");
function number(value) {
  if (!isNumber(value)) return value === null || value === undefined ? "–" : String(value);
  return String(Number(value.toFixed(3)));
}
const grouped = (count) => (isNumber(count) ? count.toLocaleString("en") : "?");
const plural = (count, word) => `${grouped(count)} ${word}${count === 1 ? "" : "s"}`;
const kinds = (item) => Object.entries(item.strata).map(([key, value]) => `${key} ${value}`);
const texts = (value) => (Array.isArray(value) ? value.map(String) : []);
const show = (value) => (typeof value === "string" ? value : JSON.stringify(value));
