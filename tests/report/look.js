// Looks at a report as a person would, and writes what is wrong into an element called seen.
"use strict";
(() => {
  const wrong = [];
  const visible = (element) => element.getClientRects().length > 0;
  const box = (element) => element.getBoundingClientRect();
  const titleOf = (chart) => chart.closest("figure").querySelector("h3").textContent;
  const charts = [...document.querySelectorAll(".chart")].filter(visible);

  const lookAt = (chart) => {
    const title = titleOf(chart);
    const svg = chart.querySelector("svg");
    const around = box(chart.closest("figure"));
    const groups = [...svg.querySelectorAll("g.axes")];
    JSON.parse(chart.dataset.chart).forEach((info, number) => {
      if (!info) return;
      for (const kind of ["xtick", "ytick"]) {
        const texts = [...groups[number].querySelectorAll(`.${kind} text`)];
        const names = texts.filter((text) => visible(text) && text.textContent.trim());
        // A single task has a single name.
        const least = kind === "xtick" && title === "Tasks" ? 1 : 2;
        if (names.length < least) wrong.push(`${title}: ${names.length} names on ${kind}`);
      }
      const drawn = groups[number].querySelectorAll(".curve path, .curve use, image, path[clip-path]");
      const inside = [...drawn].some((element) => {
        const {width, height} = box(element);
        return width + height > 3;
      });
      if (!inside) wrong.push(`${title}: empty axes`);
    });
    const texts = [...svg.querySelectorAll("text")].filter(
      (text) => visible(text) && text.textContent.trim());
    texts.forEach((text, number) => {
      const one = box(text);
      const size = parseFloat(getComputedStyle(text).fontSize) * svg.getScreenCTM().a;
      if (size < 8.5) wrong.push(`${title}: "${text.textContent.trim()}" is ${size.toFixed(1)} px`);
      if (one.left < around.left - 1 || one.right > around.right + 1) {
        wrong.push(`${title}: "${text.textContent.trim()}" leaves the figure`);
      }
      for (const next of texts.slice(number + 1)) {
        const other = box(next);
        const across = Math.min(one.right, other.right) - Math.max(one.left, other.left);
        const down = Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top);
        // The box of a text is higher than its letters.
        if (across > 1 && down > 4) {
          wrong.push(`${title}: "${text.textContent.trim()}" on "${next.textContent.trim()}"`);
        }
      }
    });
  };

  const tryOut = (chart) => {
    const svg = chart.querySelector("svg");
    const plot = chart.plots.find((each) => each.canZoom);
    const [left, top, right, bottom] = plot.info.box;
    const send = (kind, share) => {
      const place = new DOMPoint(left + share * (right - left), (top + bottom) / 2);
      const {x, y} = place.matrixTransform(svg.getScreenCTM());
      const options = {clientX: x, clientY: y, bubbles: true, pointerType: "mouse", pointerId: 1};
      svg.dispatchEvent(new PointerEvent(kind, options));
    };
    // Made-up pointers cannot be captured.
    svg.setPointerCapture = () => {};
    const tip = document.querySelector(".tip");
    send("pointermove", 0.5);
    const said = tip.hidden ? "" : tip.textContent;
    if (!/\d/.test(said)) wrong.push(`${titleOf(chart)}: hovering says nothing`);
    const before = chart.querySelector(".curve path").getAttribute("d");
    send("pointerdown", 0.5);
    send("pointermove", 0.9);
    send("pointerup", 0.9);
    if (chart.querySelector(".curve path").getAttribute("d") === before) {
      wrong.push(`${titleOf(chart)}: dragging does not zoom`);
    }
    const ticks = svg.querySelectorAll(".ticks text").length;
    if (ticks < 4) wrong.push(`${titleOf(chart)}: ${ticks} ticks after zooming`);
    lookAtTicks(chart);
    svg.dispatchEvent(new MouseEvent("dblclick"));
    if (svg.querySelector(".ticks")) wrong.push(`${titleOf(chart)}: zooming cannot be undone`);
    return said;
  };

  const lookAtTicks = (chart) => {
    const texts = [...chart.querySelectorAll(".ticks text")];
    texts.forEach((text, number) => {
      for (const next of texts.slice(number + 1)) {
        const one = box(text);
        const other = box(next);
        const across = Math.min(one.right, other.right) - Math.max(one.left, other.left);
        const down = Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top);
        if (across > 1 && down > 4) wrong.push(`${titleOf(chart)}: ticks overlap after zooming`);
      }
    });
  };

  const seen = {charts: charts.length, width: innerWidth, said: []};
  addEventListener("error", (event) => wrong.push(event.message));
  try {
    if (document.documentElement.scrollWidth > innerWidth) {
      wrong.push(`the page is ${document.documentElement.scrollWidth} wide`);
    }
    charts.forEach(lookAt);
    seen.said = charts.filter((chart) => chart.plots.some((plot) => plot.canZoom)).map(tryOut);
    const entry = document.querySelector(".legend li");
    entry.click();
    const hidden = [...document.querySelectorAll(".curve")].filter((curve) => !visible(curve)
      && curve.style.display === "none");
    if (!hidden.length) wrong.push("a click on the legend hides nothing");
  } catch (error) {
    wrong.push(String(error.stack));
  }
  const result = document.createElement("pre");
  result.id = "seen";
  result.textContent = JSON.stringify({...seen, wrong});
  document.body.append(result);
})();
