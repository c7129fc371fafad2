"use strict";

// The list of images. Its filter and order, and the image in the viewer, are the hash of the URL, such as
// "#images&class=3&order=worst&image=17": links and the back button restore them.
const KEYS = ["name", "class", "truth", "predicted", "either", "smallest", "order", "show", "image", "box", "left", "right"];
const WITHOUT_VIEWER = { image: null, box: null, left: null, right: null };
const PAGE = 48;
const filter = document.getElementById("filter");
const gallery = document.getElementById("gallery");
const card = document.getElementById("card").content.firstElementChild;
const more = document.getElementById("more");
let chosen = []; // indices of the images that match the filter, in order
let listed = null; // the filter that the list shows

const query = () => new URLSearchParams(location.hash.slice(1));

function hashWith(changes, from = query()) {
  const next = new URLSearchParams();
  for (const key of KEYS) {
    const value = key in changes ? changes[key] : from.get(key);
    if (value !== null && value !== "") next.set(key, value);
  }
  return ["#images", next.toString().replaceAll("%2C", ",")].filter(Boolean).join("&");
}

function go(changes, method = "pushState") {
  history[method](null, "", hashWith(changes));
  render();
}

// Pixels of a class that were predicted as another; either class may be any.
function confused(image, asked) {
  const [truth, predicted, either] = ["truth", "predicted", "either"].map((key) => asked.get(key));
  const is = (class_, wanted) => wanted === null || class_ === Number(wanted);
  return image.errors
    .filter(([t, p]) => (is(t, truth) && is(p, predicted)) || (either && is(t, predicted) && is(p, truth)))
    .reduce((sum, [, , pixels]) => sum + pixels, 0);
}

function matches(image, asked) {
  const [class_, smallest] = ["class", "smallest"].map((key) => asked.get(key));
  const pair = asked.has("truth") || asked.has("predicted");
  return (
    image.name.toLowerCase().includes((asked.get("name") ?? "").toLowerCase()) &&
    (class_ === null || image.truth.includes(Number(class_)) || image.predicted.includes(Number(class_))) &&
    (smallest === null || (image.smallest !== null && image.smallest < Number(smallest))) &&
    (!pair || confused(image, asked) > 0)
  );
}

// What each order sorts by, ascending; images without the value come last.
const negative = (value) => (value === null ? null : -value);
const ORDERS = {
  worst: (image) => image.mean_iou,
  best: (image) => negative(image.mean_iou),
  median: (image, asked, median) => (image.mean_iou === null ? null : Math.abs(image.mean_iou - median)),
  uncertain: (image) => image.confidence,
  confused: (image, asked) => -confused(image, asked),
  better: (image) => negative(image.difference),
  worse: (image) => image.difference,
  name: (image) => image.name,
};

function choose(asked) {
  const found = [...REPORT.images.keys()].filter((index) => matches(REPORT.images[index], asked));
  const scores = found.map((index) => REPORT.images[index].mean_iou).filter((value) => value !== null).sort((a, b) => a - b);
  const median = scores[Math.floor(scores.length / 2)];
  const order = asked.get("order") ?? (asked.has("truth") || asked.has("predicted") ? "confused" : "worst");
  const key = Object.hasOwn(ORDERS, order) ? ORDERS[order] : ORDERS.worst;
  const keys = new Map(found.map((index) => [index, key(REPORT.images[index], asked, median)]));
  return found.sort((i, j) => {
    const [a, b] = [keys.get(i), keys.get(j)];
    return (a === null) - (b === null) || (a < b ? -1 : Number(a > b));
  });
}

const percent = (value) => (value === null ? "–" : `${(100 * value).toFixed(1)}%`);
const knownLayer = (layer, otherwise) => (Object.hasOwn(REPORT.layers, layer) ? layer : otherwise);
const signed = (value) => (value > 0 ? "+" : "−") + (100 * Math.abs(value)).toFixed(1);

function makeCard(index, layer) {
  const image = REPORT.images[index];
  const item = card.cloneNode(true);
  const picture = item.querySelector("img");
  item.querySelector("a").href = hashWith({ image: index, box: null });
  picture.src = image.pictures[layer];
  picture.alt = `${REPORT.layers[layer]}: ${image.name}`;
  picture.style.aspectRatio = `${image.width} / ${image.height}`;
  item.querySelector(".name").textContent = image.name;
  const change = image.difference ? ` (${signed(image.difference)})` : "";
  item.querySelector(".iou").textContent = `IoU ${percent(image.mean_iou)}${change}`;
  item.querySelector(".confidence").textContent = `confidence ${percent(image.confidence)}`;
  return item;
}

function extend() {
  const start = gallery.childElementCount;
  const layer = knownLayer(query().get("show"), "image");
  gallery.append(...chosen.slice(start, start + PAGE).map((index) => makeCard(index, layer)));
  more.hidden = gallery.childElementCount === chosen.length;
  return gallery.children[start];
}

function list(asked) {
  listed = hashWith(WITHOUT_VIEWER);
  for (const control of filter.elements) {
    const value = asked.get(control.name) ?? "";
    control.type === "checkbox" ? (control.checked = value === "1") : (control.value = value);
  }
  chosen = choose(asked);
  gallery.replaceChildren();
  extend();
  const [some, all] = [chosen.length, REPORT.images.length].map((number) => number.toLocaleString("en"));
  document.getElementById("found").textContent = `${some} of ${all} images`;
}

function render(event) {
  const asked = query();
  const own = hashWith(WITHOUT_VIEWER);
  document.getElementById("clear").hidden = own === "#images";
  if (own !== listed) list(asked);
  asked.has("image") ? view(Number(asked.get("image")), asked, Boolean(event)) : closeViewer();
}

filter.addEventListener("input", ({ target }) => {
  const value = target.type === "checkbox" && !target.checked ? null : target.value;
  go({ [target.name]: value }, target.type === "search" ? "replaceState" : "pushState");
});
filter.addEventListener("submit", (event) => event.preventDefault());
more.addEventListener("click", () => extend().querySelector("a").focus());
addEventListener("hashchange", render);
document.addEventListener("click", (event) => {
  const link = event.target.closest('a[href^="#images"]');
  if (link && !new URLSearchParams(link.hash).has("image")) document.getElementById("images").scrollIntoView();
});
addEventListener("keydown", (event) => {
  if (event.key !== "/" || viewer.open || event.target.matches("input")) return;
  event.preventDefault();
  filter.elements.name.focus();
});
render();
if (query().has("images") && !query().has("image")) document.getElementById("images").scrollIntoView();
