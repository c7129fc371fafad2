"use strict";

// The viewer: two pictures of an image, one on each side of a divider, which are zoomed and moved together.
const viewer = document.getElementById("viewer");
const stage = document.getElementById("stage");
const divider = document.getElementById("divider");
const sides = ["left", "right"].map((side) => document.getElementById(side));
const pointers = new Map(); // those that are down on the stage, by id
let place = { x: 0, y: 0, zoom: 1 }; // offset of the pictures from the center, in CSS pixels, and magnification
let current = null; // index of the image
let byLink = false; // whether a link of this page opened the viewer, so that closing it goes back
const layers = { left: "image", right: "prediction" }; // those shown if the hash names none

const byId = (id) => document.getElementById(id);
const element = (tag, text, more = {}) => Object.assign(document.createElement(tag), { textContent: text }, more);

function view(index, asked, linked) {
  const image = REPORT.images[index];
  if (!image) return closeViewer();
  if (!viewer.open) {
    viewer.showModal();
    byLink = linked;
  }
  if (index !== current) move({ x: 0, y: 0, zoom: 1 });
  sides.forEach((side) => (side.value = knownLayer(asked.get(side.id), layers[side.id])));
  stage.style.setProperty("--ratio", image.width / image.height);
  sides.forEach((side) => showLayer(side, image, asked.get("box")));
  if (asked.has("box") && index !== current) divideAt(stage.querySelector(".box"));
  current = index;
  describe(index, image);
}

function showLayer(side, image, box) {
  const frame = stage.querySelector(`.${side.id} .frame`);
  const [picture, outline] = frame.children;
  if (picture.getAttribute("src") !== image.pictures[side.value]) picture.src = image.pictures[side.value];
  picture.alt = `${REPORT.layers[side.value]}: ${image.name}`;
  outline.hidden = !box;
  if (!box) return;
  const [top, left, height, width] = box.split(",").map(Number);
  const share = (value, whole) => `${(100 * value) / whole}%`;
  Object.assign(outline.style, { top: share(top, image.height), height: share(height, image.height) });
  Object.assign(outline.style, { left: share(left, image.width), width: share(width, image.width) });
}

function className(index) {
  const { name, color } = REPORT.classes[index];
  const label = element("span", "", { className: "class" });
  const swatch = element("i", "", { className: "swatch" });
  swatch.style.background = `rgb(${color})`;
  label.append(swatch, name);
  return label;
}

function item(...parts) {
  const row = element("li", "");
  row.append(...parts);
  return row;
}

function describe(index, image) {
  const rank = chosen.indexOf(index);
  byId("viewer-title").textContent = image.name;
  byId("position").textContent = rank < 0 ? "" : `${(rank + 1).toLocaleString("en")} of ${chosen.length.toLocaleString("en")}`;
  byId("previous").disabled = rank <= 0;
  byId("next").disabled = rank < 0 || rank === chosen.length - 1;
  const facts = { "Mean IoU": image.mean_iou, "Pixel accuracy": image.pixel_accuracy, Confidence: image.confidence };
  const shown = Object.entries(facts).map(([key, value]) => [key, percent(value)]);
  if (image.difference) shown.splice(1, 0, ["Change of mean IoU", signed(image.difference)]);
  byId("facts").replaceChildren(...shown.flatMap(([key, value]) => [element("dt", key), element("dd", value)]));
  const classes = [...new Set([...image.truth, ...image.predicted])].sort((a, b) => a - b);
  const where = (k) => (image.predicted.includes(k) ? (image.truth.includes(k) ? "" : "only predicted") : "only in the truth");
  byId("legend").replaceChildren(...classes.map((k) => item(className(k), element("small", where(k)))));
  const errors = image.errors.map(([truth, predicted, pixels]) => {
    const link = element("a", "", { href: hashWith({ truth, predicted }, new URLSearchParams()) });
    link.append(className(truth), " → ", className(predicted));
    return item(link, element("small", `${pixels.toLocaleString("en")} pixels`));
  });
  byId("errors").replaceChildren(...errors);
}

function closeViewer() {
  current = null;
  if (viewer.open) viewer.close();
}

function showOn(side, layer) {
  layers[side] = layer;
  go({ [side]: layer }, "replaceState");
}

function step(by) {
  const next = chosen[chosen.indexOf(current) + by];
  if (next !== undefined) go({ image: next, box: null }, "replaceState");
}

function move(next) {
  place = next;
  stage.style.setProperty("--x", `${place.x}px`);
  stage.style.setProperty("--y", `${place.y}px`);
  stage.style.setProperty("--zoom", place.zoom);
}

// Zooms by a factor around a point that is given from the center of the stage, and then moves.
function zoomAt(x, y, factor, dx = 0, dy = 0) {
  const zoom = Math.min(32, Math.max(1, place.zoom * factor));
  const by = zoom / place.zoom;
  const [right, down] = [(stage.clientWidth * (zoom - 1)) / 2, (stage.clientHeight * (zoom - 1)) / 2];
  const within = (value, limit) => Math.min(limit, Math.max(-limit, value));
  move({ x: within(x - (x - place.x) * by + dx, right), y: within(y - (y - place.y) * by + dy, down), zoom });
}

function fromCenter(event) {
  const { left, top, width, height } = stage.getBoundingClientRect();
  return [event.clientX - left - width / 2, event.clientY - top - height / 2];
}

// The center of the pointers and their mean distance from it.
function gesture() {
  const points = [...pointers.values()];
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const [x, y] = [0, 1].map((axis) => mean(points.map((point) => point[axis])));
  return { x, y, spread: mean(points.map((point) => Math.hypot(point[0] - x, point[1] - y))) };
}

stage.addEventListener("pointerdown", (event) => {
  event.preventDefault();
  stage.setPointerCapture(event.pointerId);
  stage.classList.toggle("dividing", event.target.id === "line");
  pointers.set(event.pointerId, fromCenter(event));
});
stage.addEventListener("pointermove", (event) => {
  if (!pointers.has(event.pointerId)) return;
  const before = gesture();
  pointers.set(event.pointerId, fromCenter(event));
  const after = gesture();
  if (stage.classList.contains("dividing")) return divide(50 + (100 * after.x) / stage.clientWidth);
  zoomAt(before.x, before.y, before.spread ? after.spread / before.spread : 1, after.x - before.x, after.y - before.y);
});
for (const end of ["pointerup", "pointercancel"]) stage.addEventListener(end, (event) => pointers.delete(event.pointerId));
stage.addEventListener(
  "wheel",
  (event) => {
    event.preventDefault();
    zoomAt(...fromCenter(event), Math.exp(-event.deltaY / 400));
  },
  { passive: false },
);

function divide(percentage) {
  divider.value = percentage;
  stage.style.setProperty("--divider", divider.value / 100);
}

function divideAt(shown) {
  const [box, whole] = [shown, stage].map((one) => one.getBoundingClientRect());
  divide((100 * (box.left + box.width / 2 - whole.left)) / whole.width);
}

const KEYBOARD = {
  ArrowLeft: () => step(-1),
  ArrowRight: () => step(1),
  "+": () => zoomAt(0, 0, 1.5),
  "=": () => zoomAt(0, 0, 1.5),
  "-": () => zoomAt(0, 0, 1 / 1.5),
  0: () => move({ x: 0, y: 0, zoom: 1 }),
};
const SHIFTED = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] };

addEventListener("keydown", (event) => {
  if (!viewer.open || event.ctrlKey || event.altKey || event.metaKey) return;
  const layer = Object.keys(REPORT.layers)[event.key - 1];
  const ofControl = event.target.matches("select, input") && event.key.startsWith("Arrow");
  let action = KEYBOARD[event.key];
  if (layer) action = () => showOn("right", layer);
  if (event.shiftKey && SHIFTED[event.key]) action = () => zoomAt(0, 0, 1, ...SHIFTED[event.key]);
  if (!action || ofControl) return;
  event.preventDefault();
  action();
});
viewer.addEventListener("close", () => {
  if (viewer.open || !query().has("image")) return; // opened again since, or closed by the hash
  byLink ? history.back() : go({ image: null, box: null }, "replaceState");
});
divider.addEventListener("input", () => divide(divider.value));
sides.forEach((side) => side.addEventListener("change", () => showOn(side.id, side.value)));
for (const [id, key] of Object.entries({ previous: "ArrowLeft", next: "ArrowRight", in: "+", out: "-", fit: 0 })) {
  byId(id).addEventListener("click", KEYBOARD[key]);
}
byId("close").addEventListener("click", () => viewer.close());
divide(50);
