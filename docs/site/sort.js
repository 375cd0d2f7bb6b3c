// Tables of the class "sortable" are sorted by a column when its heading is clicked, or pressed with Enter or Space.
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = heading.textContent.trim();
      heading.replaceChildren(button);
      button.addEventListener("click", () => {
        const descending = heading.getAttribute("aria-sort") === "ascending";
        headings.forEach((other) => other.removeAttribute("aria-sort"));
        heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
        body.append(...sorted([...body.rows], column, descending));
      });
    });
  }
});

// Cells that all begin with a number are sorted by it, others by the alphabet. Empty cells come last.
function sorted(rows, column, descending) {
  const text = (row) => row.cells[column].textContent.trim();
  const number = (row) => parseFloat(text(row).match(/^[+-]?[\d,]*\.?\d+(?=\s|$)/)?.[0].replaceAll(",", ""));
  const filled = rows.filter((row) => text(row) !== "");
  const compare = filled.some((row) => Number.isNaN(number(row)))
    ? (a, b) => text(a).localeCompare(text(b), "en")
    : (a, b) => number(a) - number(b);
  filled.sort((a, b) => (descending ? compare(b, a) : compare(a, b)));
  return [...filled, ...rows.filter((row) => text(row) === "")];
}
