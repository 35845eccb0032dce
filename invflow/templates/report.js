"use strict";
(() => {
  const all = (selector, root = document) => Array.from(root.querySelectorAll(selector));
  document.documentElement.classList.add("js");

  // sorting: rows without a value stay last, equal ones keep their order
  for (const table of all("table.sortable")) {
    const body = table.tBodies[0];
    all("thead tr:last-child > th", table).forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const before = head.getAttribute("aria-sort");
        const first = head.dataset.first || "ascending";
        const order = before === null ? first : before === "ascending" ? "descending" : "ascending";
        for (const other of all("thead tr:last-child > th", table)) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", order);
        const key = row => row.cells[column].dataset.value;
        const numeric = Array.from(body.rows).every(row => key(row) === undefined || !Number.isNaN(Number(key(row))));
        const compare = (a, b) => numeric ? Number(a) - Number(b) : a.localeCompare(b);
        const rows = Array.from(body.rows).sort((a, b) => {
          const [x, y] = [key(a), key(b)];
          if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
          return order === "ascending" ? compare(x, y) : compare(y, x);
        });
        body.append(...rows);
      });
    });
  }

  // paired differences to the reference of the reader's choice
  const withError = (value, error) => {
    if (!(Number.isFinite(error) && error > 0)) return String(Number(value.toPrecision(4)));
    if (error >= 1e4) return `${value.toExponential(1)} ±\u00a0${error.toExponential(1)}`.replaceAll("e+", "e");
    const digits = Math.min(6, Math.max(0, 1 - Math.floor(Math.log10(error))));
    return `${value.toFixed(digits)} ±\u00a0${error.toFixed(digits)}`;
  };
  const showDifferences = (table, choice) => {
    const errors = JSON.parse(table.closest("section").querySelector("script.pairs").textContent);
    const rows = Array.from(table.tBodies[0].rows);
    const index = row => Number(row.cells[0].dataset.solver);
    const bySolver = new Map(rows.map(row => [index(row), row]));
    const count = rows.length;
    all("thead tr:last-child > th", table).forEach((head, column) => {
      const {metric, better, best} = head.dataset;
      if (!(metric in errors)) return;
      const reference = Number(choice === "default" ? head.dataset.default
        : choice === "best" ? best ?? head.dataset.default : choice);
      const base = bySolver.get(reference)?.cells[column].dataset;
      for (const row of rows) {
        const cell = row.cells[column], text = cell.querySelector("small");
        if (text === null) continue;
        delete cell.dataset.difference;
        delete cell.dataset.differenceError;
        text.className = "";
        text.textContent = "";
        if (index(row) === reference) {
          text.className = "own";
          text.textContent = "reference";
          continue;
        }
        if (base === undefined || base.paired === undefined) continue;
        const [i, j] = [Math.min(index(row), reference), Math.max(index(row), reference)];
        const error = errors[metric][i * count - i * (i + 1) / 2 + j - i - 1] ?? NaN;
        const difference = Number(cell.dataset.value) - Number(base.value);
        cell.dataset.difference = difference;
        cell.dataset.differenceError = error;
        if (Number.isNaN(difference)) {
          text.textContent = "—";
          continue;
        }
        text.textContent = (difference < 0 ? "−" : "+") + withError(Math.abs(difference), error);
        if ((better === "low" || better === "high") && error > 0 && Math.abs(difference) > 2 * error) {
          text.className = (difference < 0) === (better === "low") ? "better" : "worse";
        }
      }
    });
  };
  const choice = document.getElementById("reference");
  choice.addEventListener("change", () => {
    for (const table of all("table[data-problem]")) showDifferences(table, choice.value);
  });

  // galleries: one observation at a time, one sample of it, or all
  for (const gallery of all(".gallery")) {
    const slider = gallery.querySelector(".slider"), shown = gallery.querySelector("output");
    const chosen = gallery.querySelector(".chosen"), together = gallery.querySelector(".together");
    const update = () => {
      for (const part of all(".observation", gallery)) {
        part.classList.toggle("current", part.dataset.observation === chosen.value);
      }
      if (slider === null) return;  // drawings show all samples
      for (const samples of all(".samples", gallery)) {
        const own = all("[data-sample]", samples);
        own.forEach((sample, k) => sample.classList.toggle("now", k === Math.min(slider.value, own.length) - 1));
      }
      shown.textContent = `${slider.value} of ${slider.max}`;
      gallery.classList.toggle("all", together.checked);
      slider.disabled = together.checked;
    };
    for (const control of [slider, chosen, together]) control?.addEventListener("input", update);
    update();
  }

  // parts that fold; what they hide is printed all the same
  for (const fold of all(".fold")) {
    const button = fold.querySelector("button");
    const toggle = () => {
      const closed = fold.classList.toggle("closed");
      button.setAttribute("aria-expanded", String(!closed));
    };
    button.addEventListener("click", toggle);
    if (fold.dataset.closed !== undefined) toggle();
  }
})();
