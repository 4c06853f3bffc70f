// Functions that all HTML reports share. A page must define `DIMENSIONS`, which maps the names of its filters to labels.
window.addEventListener("error", (event) => { document.documentElement.dataset.errors += event.message + "\n"; });

// Objects in the data have no prototype, so that a name such as `constructor` is found only if the data contains it.
const data = JSON.parse(document.getElementById("data").textContent, (_, value) =>
  value !== null && typeof value === "object" && !Array.isArray(value) ? Object.assign(Object.create(null), value) : value);

// ---- elements; text is never parsed as HTML

function element(namespace, name, attributes, children) {
  const node = namespace ? document.createElementNS(namespace, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}
const h = (name, attributes, ...children) => element(null, name, attributes, children);
const s = (name, attributes, ...children) => element("http://www.w3.org/2000/svg", name, attributes, children);

const percent = (x) => Number.isFinite(x) ? (100 * x).toFixed(1) + " %" : "–";
const count = (x) => Math.round(x).toLocaleString("en-US");
const fixed = (x, digits = 3) => Number.isFinite(x) ? x.toFixed(digits) : "–";
const seconds = (x) => fixed(x) + " s";
const hours = (sec) => sec >= 3600 ? (sec / 3600).toFixed(1) + " h" : sec >= 60 ? (sec / 60).toFixed(1) + " min" : sec.toFixed(1) + " s";
function bytes(x) {
  const units = ["B", "kB", "MB", "GB"];
  let unit = 0;
  while (x >= 1000 && unit < units.length - 1) { x /= 1000; unit += 1; }
  return x.toFixed(unit ? 1 : 0) + " " + units[unit];
}
// A table cell that shows `text`; the attributes `key` and `value` identify it and give its exact value.
const cell = (key, value, text, ...more) =>
  h("td", { class: "number", "data-key": key, "data-value": value }, more, h("span", { class: "value" }, text));
const bar = (share, colour) => h("span", { class: "bar" }, h("i", { style: `width:${100 * Math.min(1, share || 0)}%;background:${colour}` }));
const heading = (...titles) => h("thead", {}, h("tr", {}, titles.map((t, i) => h("th", { class: i && "number", scope: "col" }, t))));
const section = (id, title, note, ...content) =>
  h("section", { id, "aria-labelledby": `${id}-title` }, h("h2", { id: `${id}-title` }, title), note && h("p", { class: "note" }, note), content);
// A table that scrolls in its card if it is too wide. `label` describes its content for screen readers.
const scroll = (label, table) => [h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, table),
  h("p", { class: "hint", "aria-hidden": "true" }, "← scroll for more columns →")];
const nothing = (what) => h("p", { class: "empty" }, `No ${what} matches the filter. `, h("a", { href: "#" }, "Show all"));
// The width of a chart in pixels, at most `most`. It depends on the width of the card, so that text keeps its size.
const chartWidth = (most) => Math.max(260, Math.min(most, (document.getElementById("main").clientWidth || most) - 44));
// Mark the tables that are wider than their cards. A page calls this after rendering.
function markOverflow() {
  for (const box of document.querySelectorAll(".scroll")) box.toggleAttribute("data-overflow", box.scrollWidth > box.clientWidth + 1);
}
// Call `render` now, whenever the filter changes, and when the width of the window has changed.
function start(render) {
  let width = innerWidth, timer;
  const draw = () => { render(); markOverflow(); document.documentElement.dataset.state = "ready"; };
  addEventListener("hashchange", draw);
  addEventListener("resize", () => { clearTimeout(timer); if (innerWidth !== width) timer = setTimeout(() => { width = innerWidth; draw(); }, 150); });
  draw();
}
const tile = (text, label, bad) => h("div", { class: bad ? "tile bad" : "tile" }, h("b", {}, text), h("span", { class: "faint" }, label));

// ---- the filter is stored in the address, as in #task=asr&language=en

function chosen() {
  const found = new URLSearchParams(location.hash.slice(1));
  return Object.fromEntries(Object.keys(DIMENSIONS).map((name) => [name, found.get(name) || "all"]));
}
function hashWith(changes) {
  const wanted = Object.entries({ ...chosen(), ...changes }).filter(([, value]) => value !== "all");
  return "#" + new URLSearchParams(wanted);
}
// Return links that set the filter `name` to each of its values; `texts` gives the labels of some values.
const pills = (name, values, filter, texts = {}) => h("div", { class: "pills", role: "group", "aria-label": DIMENSIONS[name] }, ["all", ...values].map((v) =>
  h("a", { href: hashWith({ [name]: v }), "aria-current": v === filter[name] && "true" }, Object.hasOwn(texts, v) ? texts[v] : v)));
// Return a drop-down list of the values of the filter `name`.
function choice(name, label, values, filter) {
  const select = h("select", { name }, ["all", ...values].map((v) => h("option", { value: v, selected: v === filter[name] }, v)));
  select.addEventListener("change", () => { location.hash = hashWith({ [name]: select.value }); });
  return h("label", {}, label + " ", select);
}
const PALETTE = ["#4c83c3", "#ef8a2f", "#4ca35a", "#d9534f", "#8d6cc0", "#2fa5a5", "#c9a227", "#b0668f"];
const colour = (i) => PALETTE[i % PALETTE.length];
