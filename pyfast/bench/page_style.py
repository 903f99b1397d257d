"""How the report page looks and behaves: one style sheet, one small script, both put into the page itself."""

from __future__ import annotations

COLOURS = """
:root {
  color-scheme: light dark;
  --paper: #fbfbf9; --card: #ffffff; --ink: #1a1d21; --muted: #5a636d; --grid: #e2e5e8; --line: #d5d9dd;
  --dense: #9aa2ab; --c1: #1668a8; --c2: #c0571a; --c3: #24805a; --c4: #7d4cb0; --loss: #b3261e; --gain: #1c7545;
  --wash: #eef3f7;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #121517; --card: #191d20; --ink: #e7e9eb; --muted: #a0a9b2; --grid: #2a3035; --line: #353c42;
    --dense: #7b848d; --c1: #6cb2ee; --c2: #f0a05c; --c3: #5cc596; --c4: #b99af2; --loss: #f0877e; --gain: #6fce9b;
    --wash: #1d252b;
  }
}
"""

STYLE = (
    COLOURS
    + """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
  font-variant-numeric: tabular-nums;
}
main, header, footer { max-width: 76rem; margin: 0 auto; padding: 0 1.5rem; }
header { padding-top: 3rem; }
h1 { font-size: clamp(1.7rem, 4vw, 2.5rem); line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 .4rem;
  text-wrap: balance; }
h2 { font-size: 1.4rem; letter-spacing: -0.01em; margin: 3.2rem 0 .5rem; padding-top: .6rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .4rem; }
p { max-width: 70ch; margin: .5rem 0; }
.lead { color: var(--muted); font-size: 1.05rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: 1.2rem 0 0; font-size: .93rem; }
a { color: var(--c1); text-underline-offset: .18em; }
a:focus-visible, button:focus-visible, summary:focus-visible, input:focus-visible, .scroll:focus-visible {
  outline: 2px solid var(--c1); outline-offset: 2px; }
.findings { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); gap: 1rem;
  margin: 1.6rem 0 0; padding: 0; list-style: none; }
.findings li { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem 1.1rem; }
.findings .question { color: var(--muted); font-size: .88rem; margin: 0; }
.findings .figure { font-size: 1.75rem; font-weight: 650; letter-spacing: -0.02em; line-height: 1.2;
  margin: .15rem 0 .35rem; }
.findings .sentence { font-size: .88rem; margin: 0; overflow-wrap: anywhere; }
.gain .figure, td.gain { color: var(--gain); }
.loss .figure, td.loss { color: var(--loss); }
dl.machine { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.4rem; font-size: .93rem;
  margin: .8rem 0; }
dl.machine dt { color: var(--muted); }
dl.machine dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 1.2rem 0 1.8rem; }
figcaption { font-weight: 600; margin-bottom: .2rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(30rem, 100%), 1fr)); gap: 0 2rem;
  align-items: start; }
.plots.wide { grid-template-columns: 1fr; }
svg { display: block; width: 100%; height: auto; font-family: inherit; }
.key { color: var(--muted); font-size: .9rem; max-width: none; }
.key .swatch:first-child { margin-left: 0; }
.swatch { display: inline-block; width: .75em; height: .75em; border-radius: .15em; margin: 0 .3em 0 .8em;
  vertical-align: baseline; }
.scroll { overflow: auto; max-height: 34rem; border: 1px solid var(--line); border-radius: .5rem;
  background: var(--card); }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .84rem; line-height: 1.35; }
th, td { padding: .35rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--grid); }
td.n, th.n { text-align: right; white-space: nowrap; }
td.note { min-width: 14rem; color: var(--muted); }
td.w { white-space: nowrap; }
thead th { position: sticky; top: 0; background: var(--card); z-index: 1; white-space: nowrap; color: var(--muted);
  font-weight: 600; border-bottom: 1px solid var(--line); }
thead button { all: unset; cursor: pointer; }
thead button:focus-visible { outline: 2px solid var(--c1); outline-offset: 2px; }
thead th[aria-sort] button { color: var(--ink); }
thead th[aria-sort="ascending"] button::after { content: " \\2191"; }
thead th[aria-sort="descending"] button::after { content: " \\2193"; }
tbody tr.ours { font-weight: 600; }
tbody tr.ours td.note { font-weight: 400; }
tbody tr:hover { background: var(--wash); }
tbody tr:last-child td { border-bottom: 0; }
input[type=search] { font: inherit; font-size: .9rem; color: inherit; background: var(--card); padding: .3rem .6rem;
  border: 1px solid var(--line); border-radius: .4rem; width: min(24rem, 100%); margin: .3rem 0 .6rem; }
summary { cursor: pointer; font-weight: 600; margin: 1.2rem 0 .6rem; }
.empty { color: var(--muted); border: 1px dashed var(--line); border-radius: .5rem; padding: 1rem 1.2rem; }
footer { color: var(--muted); font-size: .88rem; margin-top: 3.5rem; padding-bottom: 3rem; }
@media print { .scroll { max-height: none; overflow: visible; } input[type=search], nav { display: none; } }
"""
)

SCRIPT = """
"use strict";
const value = (row, column) => {
  const cell = row.cells[column];
  return cell.dataset.v === undefined ? cell.textContent.trim().toLowerCase() : Number(cell.dataset.v);
};
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  table.querySelectorAll("thead th").forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      table.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...body.rows].map((row) => [value(row, column), row]);
      const known = (x) => typeof x === "string" || !Number.isNaN(x);
      rows.sort(([a], [b]) => {
        if (!known(a) || !known(b)) return known(b) - known(a);
        return (a < b ? -1 : a > b ? 1 : 0) * (up ? 1 : -1);
      });
      body.append(...rows.map(([, row]) => row));
    });
  });
}
for (const field of document.querySelectorAll("input[type=search]")) {
  field.hidden = false;
  const rows = [...document.getElementById(field.getAttribute("aria-controls")).tBodies[0].rows];
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\\s+/);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  });
}
"""
