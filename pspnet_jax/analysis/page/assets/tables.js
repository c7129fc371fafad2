"use strict";

// Sorts a table by the column whose heading is pressed: numbers descending first, text ascending; undefined values stay last.
function sortTable(heading) {
  const table = heading.closest("table");
  const numbers = heading.classList.contains("number");
  const first = numbers ? "descending" : "ascending";
  const order = heading.ariaSort === first ? (numbers ? "ascending" : "descending") : first;
  const sign = order === "ascending" ? 1 : -1;
  const value = (row) => {
    const cell = row.cells[heading.cellIndex];
    return numbers ? parseFloat(cell.dataset.value) : cell.textContent.trim();
  };
  const compare = numbers ? (a, b) => a - b : (a, b) => a.localeCompare(b);
  const rows = [...table.tBodies[0].rows].map((row) => [value(row), row]);
  rows.sort(([a], [b]) => Number.isNaN(a) - Number.isNaN(b) || sign * compare(a, b));
  table.querySelectorAll("th[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
  heading.ariaSort = order;
  table.tBodies[0].append(...rows.map(([, row]) => row));
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-sort]");
  if (button) sortTable(button.closest("th"));
});
