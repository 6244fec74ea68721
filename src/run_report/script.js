
"use strict";
// Shows the values under the pointer beside each chart. Everything is written as text.
for (const chart of document.querySelectorAll("svg.chart")) {
  const [low, high, left, right] = chart.dataset.x.split(" ").map(Number);
  const lines = [...chart.querySelectorAll("polyline")]
    .map((line) => ({
      name: line.dataset.name,
      colour: line.classList[1],
      points: line.dataset.values.split(" ").map((pair) => pair.split(",").map(Number)),
    }));
  const cursor = chart.querySelector(".cursor");
  const box = chart.parentElement.querySelector(".values");
  const shown = (value) => {
    if (chart.dataset.unit === "bytes") {
      return value >= 2 ** 30 ? (value / 2 ** 30).toFixed(2) + " GiB" : (value / 2 ** 20).toFixed(0) + " MiB";
    }
    return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(5)));
  };
  const nearest = (points, x) => points.reduce((best, point) => Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best);
  const move = (event) => {
    const area = chart.getBoundingClientRect();
    const at = (event.clientX - area.left) / area.width * chart.viewBox.baseVal.width;
    const wanted = low + (at - left) / (right - left) * (high - low);
    const step = nearest(lines.flatMap((line) => line.points), wanted)[0];
    const place = left + (step - low) / (high - low) * (right - left);
    cursor.setAttribute("x1", place);
    cursor.setAttribute("x2", place);
    box.replaceChildren(Object.assign(document.createElement("span"), { textContent: "step " + step }));
    for (const line of lines) {
      const point = nearest(line.points, step);
      if (line.points.length > 2 && Math.abs(point[0] - step) > (high - low) / 20) { continue; }
      const item = document.createElement("span");
      const key = document.createElement("i");
      key.className = line.colour;
      item.append(key, line.name + " " + shown(point[1]));
      box.append(item);
    }
  };
  const leave = () => {
    cursor.setAttribute("x1", -9);
    cursor.setAttribute("x2", -9);
    box.replaceChildren();
  };
  chart.addEventListener("pointermove", move);
  chart.addEventListener("pointerdown", move);
  chart.addEventListener("pointerleave", leave);
}
