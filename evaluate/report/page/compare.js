// The table of compare.html: sorted by a click on a heading, within its groups or across them.

const table = $("lines"), bodies = [...table.tBodies], headings = [...table.querySelectorAll("th[data-key]")];
const homes = bodies.map((body) => [...body.rows].filter((row) => !row.classList.contains("group")));
let by = null, sign = 1;

const compare = (a, b) => {
  const [x, y] = [a, b].map((row) => row.cells[by].dataset.v);
  if (x === "" || y === "") return (x === "") - (y === ""); // no number: last, both ways
  return sign * (by ? x - y : x.localeCompare(y));
};
const sorted = (rows) => by === null ? rows : [...rows].sort(compare);

function lay() {
  const grouped = $("grouped").checked;
  for (const body of bodies) body.querySelector(".group").hidden = !grouped;
  if (grouped) bodies.forEach((body, i) => body.append(...sorted(homes[i])));
  else bodies[0].append(...sorted(homes.flat()));
  headings.forEach((heading, i) => heading.setAttribute("aria-sort", i !== by ? "none" : sign > 0 ? "ascending" : "descending"));
}

headings.forEach((heading, i) => {
  heading.onclick = () => { [by, sign] = by === i ? [i, -sign] : [i, 1]; lay(); };
});
$("grouped").onchange = lay;
themed();
lay();
