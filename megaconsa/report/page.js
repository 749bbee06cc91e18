// Hover, zoom and legends of the figures. The figures are complete without this script.
//
// data-chart of a chart holds an entry for each axes of its SVG: `box` is where it lies, `x` and `y`
// are the values of its edges and the scale, `curves` says what each curve is. A view is the part of
// the box that is shown, in the coordinates of the SVG as it was drawn.
"use strict";
(() => {
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  document.body.append(tip);

  const make = (name, attributes, parent) => {
    const element = document.createElementNS(parent.namespaceURI, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    parent.append(element);
    return element;
  };

  // The value at a place between two edges, and the place of a value.
  const valueAt = (place, from, to, [low, high, scale]) => {
    const share = (place - from) / (to - from);
    if (scale === "log") return low * (high / low) ** share;
    return low + (high - low) * share;
  };
  const placeOf = (value, from, to, [low, high, scale]) => {
    const share = scale === "log"
      ? Math.log(value / low) / Math.log(high / low)
      : (value - low) / (high - low);
    return from + (to - from) * share;
  };

  const shown = (value) => {
    if (Math.abs(value) >= 1e4) {
      return new Intl.NumberFormat("en", {notation: "compact", maximumFractionDigits: 2}).format(value);
    }
    return String(Number(value.toPrecision(4)));
  };

  // About `count` round numbers, and two at least.
  const roundTicks = (low, high, count) => {
    const rough = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((digit) => digit * power >= rough);
    const ticks = [];
    for (let tick = Math.ceil(low / step); tick * step <= high; tick += 1) ticks.push(tick * step);
    return ticks.length < 2 ? roundTicks(low, high, 2 * count) : ticks;
  };

  class Plot {
    constructor(svg, group, info) {
      this.svg = svg;
      this.group = group;
      this.info = info;
      this.curves = [...group.querySelectorAll(".curve")].map((element) => {
        const known = info.curves[element.dataset.curve];
        const uses = [...element.querySelectorAll("use")];
        return {
          element,
          ...known,
          // A band is a path that a <use> moves down to its place. Other uses are markers.
          down: known.band ? Number(uses[0].getAttribute("y")) : 0,
          paths: [...element.querySelectorAll(known.band ? "path" : "path[clip-path]")].map(
            (path) => ({path, drawn: path.getAttribute("d")})),
          markers: (known.band ? [] : uses).map((use) => ({
            use,
            x: Number(use.getAttribute("x")),
            y: Number(use.getAttribute("y")),
          })),
        };
      });
      for (const curve of this.curves) curve.points = this.pointsOf(curve);
      const kinds = [info.x[2], info.y[2]];
      this.canZoom = this.curves.some((curve) => curve.hover)
        && kinds.every((kind) => kind === "linear" || kind === "log");
      this.reset();
    }

    pointsOf(curve) {
      const points = curve.markers.map(({x, y}) => [x, y]);
      for (const {drawn} of curve.paths) {
        const numbers = drawn.match(/-?[\d.]+(?:e-?\d+)?/g) || [];
        for (let place = 0; place + 1 < numbers.length; place += 2) {
          points.push([Number(numbers[place]), Number(numbers[place + 1])]);
        }
      }
      return points;
    }

    reset() {
      const [left, top, right, bottom] = this.info.box;
      this.view = [left, top, right, bottom];
      this.draw();
      if (this.ticks) this.ticks.remove();
      this.ticks = null;
      for (const tick of this.group.querySelectorAll(".xtick, .ytick")) tick.style.display = "";
    }

    // From a place as drawn to the place in the present view, and back.
    toView([x, y]) {
      const [left, top, right, bottom] = this.info.box;
      const [x0, y0, x1, y1] = this.view;
      return [
        left + ((x - x0) / (x1 - x0)) * (right - left),
        top + ((y - y0) / (y1 - y0)) * (bottom - top),
      ];
    }
    fromView([x, y]) {
      const [left, top, right, bottom] = this.info.box;
      const [x0, y0, x1, y1] = this.view;
      return [
        x0 + ((x - left) / (right - left)) * (x1 - x0),
        y0 + ((y - top) / (bottom - top)) * (y1 - y0),
      ];
    }

    value([x, y]) {
      const [left, top, right, bottom] = this.info.box;
      return [valueAt(x, left, right, this.info.x), valueAt(y, bottom, top, this.info.y)];
    }

    draw() {
      for (const {paths, markers, down} of this.curves) {
        for (const {path, drawn} of paths) {
          path.setAttribute("d", drawn.replace(/(-?[\d.]+) (-?[\d.]+)/g, (_, x, y) => {
            const place = this.toView([Number(x), Number(y) + down]);
            return `${place[0].toFixed(3)} ${(place[1] - down).toFixed(3)}`;
          }));
        }
        for (const {use, x, y} of markers) {
          const place = this.toView([x, y]);
          use.setAttribute("x", place[0]);
          use.setAttribute("y", place[1]);
          const [left, top, right, bottom] = this.info.box;
          const inside = place[0] >= left - 1 && place[0] <= right + 1
            && place[1] >= top - 1 && place[1] <= bottom + 1;
          use.style.display = inside ? "" : "none";
        }
      }
    }

    // Shows the part between two places of the present view, with the y axis fitted to the curves.
    zoom(from, to) {
      const [, top, , bottom] = this.info.box;
      const x0 = this.fromView([Math.min(from, to), top])[0];
      const x1 = this.fromView([Math.max(from, to), top])[0];
      const heights = this.curves
        .filter(({element, hover}) => hover && element.style.display !== "none")
        .flatMap(({points}) => points.filter(([x]) => x >= x0 && x <= x1).map(([, y]) => y));
      if (heights.length < 2) return;
      let y0 = Math.min(...heights);
      let y1 = Math.max(...heights);
      const margin = Math.max(0.06 * (y1 - y0), 0.002 * (bottom - top));
      y0 -= margin;
      y1 += margin;
      this.view = [x0, y0, x1, y1];
      this.draw();
      this.drawTicks();
    }

    drawTicks() {
      const [left, top, right, bottom] = this.info.box;
      for (const tick of this.group.querySelectorAll(".xtick, .ytick")) tick.style.display = "none";
      if (this.ticks) this.ticks.remove();
      this.ticks = make("g", {class: "ticks"}, this.svg);
      const low = this.value(this.fromView([left, bottom]));
      const high = this.value(this.fromView([right, top]));
      for (const tick of roundTicks(low[0], high[0], Math.max(3, (right - left) / 70))) {
        const drawn = placeOf(tick, left, right, this.info.x);
        const [x] = this.toView([drawn, top]);
        make("line", {x1: x, x2: x, y1: top, y2: bottom}, this.ticks);
        make("text", {x, y: bottom + 13, "text-anchor": "middle"}, this.ticks).textContent = shown(tick);
      }
      for (const tick of roundTicks(low[1], high[1], Math.max(3, (bottom - top) / 40))) {
        const drawn = placeOf(tick, bottom, top, this.info.y);
        const [, y] = this.toView([left, drawn]);
        make("line", {x1: left, x2: right, y1: y, y2: y}, this.ticks);
        make("text", {x: left - 5, y: y + 3, "text-anchor": "end"}, this.ticks).textContent = shown(tick);
      }
    }

    contains([x, y]) {
      const [left, top, right, bottom] = this.info.box;
      return x >= left && x <= right && y >= top && y <= bottom;
    }

    // The lines of the tip for a place, and where the cross-hair stands.
    read(place) {
      if (this.info.cells) return this.readCell(place);
      const drawn = this.fromView(place);
      const lines = [];
      let nearest = null;
      for (const curve of this.curves) {
        if (!curve.hover || curve.element.style.display === "none" || !curve.points.length) continue;
        const point = curve.points.reduce((best, next) =>
          Math.abs(next[0] - drawn[0]) < Math.abs(best[0] - drawn[0]) ? next : best);
        const distance = Math.abs(point[0] - drawn[0]);
        const slack = 0.02 * (this.view[2] - this.view[0]);
        // Another run may end before this place, or begin after it.
        const places = curve.points.map(([x]) => x);
        if (drawn[0] < Math.min(...places) - slack) continue;
        if (drawn[0] > Math.max(...places) + slack) continue;
        if (nearest === null || distance < nearest.distance) nearest = {distance, point};
        lines.push([curve.colour, curve.label, shown(this.value(point)[1])]);
      }
      if (nearest === null) return null;
      const x = shown(this.value(nearest.point)[0]);
      return {head: `${this.info.xname} ${x}`, lines, x: this.toView(nearest.point)[0]};
    }

    readCell(place) {
      const {x, y, values, names} = this.info.cells;
      const [left, top, right, bottom] = this.info.box;
      const atX = valueAt(place[0], left, right, this.info.x);
      const atY = valueAt(place[1], bottom, top, this.info.y);
      const row = Math.floor(((atY - y[0]) / (y[1] - y[0])) * values.length);
      const column = Math.floor(((atX - x[0]) / (x[1] - x[0])) * values[0].length);
      const value = (values[row] || [])[column];
      if (value === undefined || value === null) return null;
      const across = this.info.xname === "step" ? shown(Math.round(atX)) : column;
      const text = names ? names[Math.round(value)] : shown(value);
      return {head: `${this.info.yname || "layer"} ${row}, ${this.info.xname} ${across}`, lines: [["", "", text]]};
    }
  }

  const showTip = (event, found) => {
    tip.replaceChildren();
    const head = document.createElement("b");
    head.textContent = found.head;
    tip.append(head);
    for (const [colour, label, value] of found.lines) {
      const line = document.createElement("div");
      const swatch = document.createElement("i");
      swatch.style.background = colour;
      if (colour) line.append(swatch);
      line.append(label ? `${label}: ${value}` : value);
      tip.append(line);
    }
    tip.hidden = false;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, room)) + scrollX}px`;
    tip.style.top = `${event.clientY + 16 + scrollY}px`;
  };

  for (const chart of document.querySelectorAll(".chart")) {
    const svg = chart.querySelector("svg");
    const groups = [...svg.querySelectorAll("g.axes")];
    const plots = JSON.parse(chart.dataset.chart)
      .map((info, number) => info && new Plot(svg, groups[number], info))
      .filter(Boolean);
    const hair = make("line", {class: "hair", visibility: "hidden"}, svg);
    const area = make("rect", {class: "area", visibility: "hidden"}, svg);
    const placeIn = (event) => {
      const point = new DOMPoint(event.clientX, event.clientY);
      const place = point.matrixTransform(svg.getScreenCTM().inverse());
      return [place.x, place.y];
    };
    let drag = null;
    const hide = () => {
      tip.hidden = true;
      hair.setAttribute("visibility", "hidden");
    };
    const look = (event) => {
      const place = placeIn(event);
      if (drag) {
        const [left, top, right, bottom] = drag.plot.info.box;
        drag.to = Math.max(left, Math.min(right, place[0]));
        area.setAttribute("x", Math.min(drag.from, drag.to));
        area.setAttribute("width", Math.abs(drag.to - drag.from));
        area.setAttribute("y", top);
        area.setAttribute("height", bottom - top);
        area.setAttribute("visibility", "visible");
        return;
      }
      const plot = plots.find((each) => each.contains(place));
      const found = plot && plot.read(place);
      if (!found) return hide();
      showTip(event, found);
      if (found.x === undefined) return hair.setAttribute("visibility", "hidden");
      const [, top, , bottom] = plot.info.box;
      for (const [key, value] of Object.entries({x1: found.x, x2: found.x, y1: top, y2: bottom})) {
        hair.setAttribute(key, value);
      }
      hair.setAttribute("visibility", "visible");
    };
    svg.addEventListener("pointermove", look);
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("pointerdown", (event) => {
      const place = placeIn(event);
      const plot = plots.find((each) => each.canZoom && each.contains(place));
      // A finger that moves scrolls the page.
      if (event.pointerType === "touch") return look(event);
      if (!plot || event.button) return;
      event.preventDefault();
      svg.setPointerCapture(event.pointerId);
      drag = {plot, from: place[0], to: place[0]};
      hide();
    });
    svg.addEventListener("pointerup", () => {
      if (drag && Math.abs(drag.to - drag.from) > 6) drag.plot.zoom(drag.from, drag.to);
      drag = null;
      area.setAttribute("visibility", "hidden");
    });
    svg.addEventListener("dblclick", () => plots.forEach((plot) => plot.reset()));
    if (plots.some((plot) => plot.canZoom)) chart.classList.add("zooms");
    chart.plots = plots;
  }

  for (const entry of document.querySelectorAll(".legend li")) {
    entry.tabIndex = 0;
    entry.setAttribute("role", "button");
    const toggle = () => {
      const off = entry.classList.toggle("off");
      for (const chart of entry.closest("figure").querySelectorAll(".chart")) {
        for (const {element, label} of chart.plots.flatMap((plot) => plot.curves)) {
          if (label === entry.textContent.trim()) element.style.display = off ? "none" : "";
        }
      }
    };
    entry.addEventListener("click", toggle);
    entry.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        toggle();
      }
    });
  }

  for (const figure of document.querySelectorAll("figure")) {
    const button = document.createElement("button");
    button.className = "enlarge";
    button.textContent = "⤢";
    button.title = "Enlarge, or back (Esc)";
    button.setAttribute("aria-label", "Enlarge the figure, or back");
    button.addEventListener("click", () => figure.classList.toggle("enlarged"));
    figure.append(button);
  }
  // Paper cannot be unfolded.
  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) details.open = true;
  });
  addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    for (const figure of document.querySelectorAll(".enlarged")) figure.classList.remove("enlarged");
  });
})();
