"use strict";
const root = document.documentElement, button = document.getElementById("theme");
const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
const show = () => { button.textContent = dark() ? "Light theme" : "Dark theme"; };
button.hidden = false;
button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; show(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
show();

for (const map of document.querySelectorAll("svg.heatmap")) {
  const values = map.dataset.values.split(" "), rows = map.dataset.rows.split("|"), columns = map.dataset.columns.split(" ");
  const [left, top, width, height] = map.dataset.grid.split(" ").map(Number);
  const out = map.closest("figure").querySelector("output");
  let row = 0, column = 0;
  const read = () => {
    row = Math.max(0, Math.min(rows.length - 1, row));
    column = Math.max(0, Math.min(columns.length - 1, column));
    out.textContent = `layer ${columns[column]}, ${rows[row]}: ${values[row * columns.length + column]} ${map.closest("figure").dataset.unit}`;
  };
  map.addEventListener("pointermove", event => {
    const box = map.getBoundingClientRect();
    row = Math.floor((event.clientY - box.top - top) / height);
    column = Math.floor((event.clientX - box.left - left) / width);
    read();
  });
  map.addEventListener("keydown", event => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    row += step[0];
    column += step[1];
    read();
  });
  map.addEventListener("focus", read);
}

const reveal = () => {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let node = target; node; node = node.parentElement) if (node.tagName === "DETAILS") node.open = true;
  if (target) target.scrollIntoView();
};
addEventListener("hashchange", reveal);
reveal();
