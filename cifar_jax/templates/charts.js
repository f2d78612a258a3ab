// Line charts, tooltips and the filter of the mistakes; the numbers are in the page's own JSON.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const HEIGHT = 240, LEFT = 52, RIGHT = 14, TOP = 8, BOTTOM = 40;
  const tip = document.getElementById("tip");
  let clock = false; // the x axis: epochs, or minutes

  function make(name, attributes = {}, parent = null, text = "") {
    const svg = ["svg", "path", "line", "text", "circle", "rect", "g"].includes(name);
    const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text) node.textContent = text;
    if (parent) parent.append(node);
    return node;
  }

  function format(value) {
    const size = Math.abs(value);
    if (size >= 1000) return Math.round(value).toLocaleString("en-US");
    if (size > 0 && size < 1e-3) return value.toExponential(1).replace(".0e", "e");
    return String(Number(value.toPrecision(4)));
  }

  function ticks(low, high, count) {
    const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
    return found;
  }

  function logTicks(low, high) {
    const decades = Math.log10(high / low), found = [];
    const parts = decades > 2 ? [1] : decades > 0.7 ? [1, 2, 5] : null;
    if (!parts) return ticks(low, high, 5).filter((v) => v > 0);
    const every = Math.ceil(decades / 7);
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e += every)
      for (const m of parts) if (m * 10 ** e >= low * 0.999 && m * 10 ** e <= high * 1.001) found.push(m * 10 ** e);
    return found;
  }

  function showTip(x, y, fill) {
    tip.replaceChildren();
    fill(tip);
    tip.hidden = false;
    const box = tip.getBoundingClientRect(), width = document.documentElement.clientWidth;
    const left = x + 14 + box.width > width ? x - 14 - box.width : x + 14;
    tip.style.left = `${Math.max(4, Math.min(left, width - box.width - 4))}px`;
    tip.style.top = `${Math.max(4, y - box.height - 12)}px`;
  }
  const hideTip = () => { tip.hidden = true; };

  // A chart is {unit, x, log, zero, series: [{name, color, dash, thin, x, t, y}]}: `x` epochs, `t`
  // minutes; series of one name share a place in legend and tooltip (their mean and range).
  function chart(figure) {
    const spec = data.charts[figure.dataset.chart];
    const names = [...new Set(spec.series.map((s) => s.name))];
    const hidden = new Set(spec.hidden || []);
    const timed = spec.series.every((s) => s.t);
    const plot = figure.querySelector(".plot"), legend = figure.querySelector(".legend");
    let log = false, points = [], at = null, view = null;

    const toggle = figure.querySelector("button.log");
    if (toggle) toggle.addEventListener("click", () => {
      log = !log;
      toggle.setAttribute("aria-pressed", log);
      draw();
    });
    for (const name of names) {
      const first = spec.series.find((s) => s.name === name);
      const button = make("button", { type: "button", "aria-pressed": !hidden.has(name), class: `c${first.color}` }, legend);
      make("path", { d: "M1 4H17", class: `d${first.dash || 0}` }, make("svg", { viewBox: "0 0 18 8" }, button));
      make("span", {}, button, name);
      button.addEventListener("click", () => {
        hidden[hidden.has(name) ? "delete" : "add"](name);
        button.setAttribute("aria-pressed", !hidden.has(name));
        draw();
      });
    }

    function draw() {
      const byTime = clock && timed, width = Math.max(240, plot.clientWidth);
      const shown = spec.series.filter((s) => !hidden.has(s.name));
      points = shown.map((s) => s.y.map((y, i) => ({ x: (byTime ? s.t : s.x)[i], y }))
        .filter((p) => p.x !== null && (p.y === null || !log || p.y > 0)));
      const all = points.flat().filter((p) => p.y !== null);
      let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
      for (const { x, y } of all) {
        x0 = Math.min(x0, x); x1 = Math.max(x1, x); y0 = Math.min(y0, y); y1 = Math.max(y1, y);
      }
      plot.replaceChildren();
      const svg = make("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, tabindex: 0, role: "img", "aria-label": spec.label }, plot);
      if (!all.length) {
        make("text", { x: width / 2, y: HEIGHT / 2, "text-anchor": "middle" }, svg, !shown.length ? "every line is hidden" : log ? "no positive values" : "no finite values");
        view = null;
        return;
      }
      if (x0 === x1) [x0, x1] = [x0 - 0.5, x1 + 0.5];
      if (spec.zero && !log) y0 = Math.min(0, y0);
      if (y0 === y1) { const r = Math.abs(y0) * 0.1 || 1; y0 = log ? y0 / 1.1 : y0 - (spec.zero ? 0 : r); y1 = log ? y1 * 1.1 : y1 + r; }
      const pad = log ? (y1 / y0) ** 0.05 : (y1 - y0) * 0.05;
      const low = log ? y0 / pad : spec.zero ? y0 : y0 - pad;
      let high = log ? y1 * pad : y1 + pad;
      if (spec.top !== undefined && !log) high = Math.min(high, spec.top);
      const unit = (v) => (log ? Math.log(v / low) / Math.log(high / low) : (v - low) / (high - low));
      view = {
        svg, x: (v) => LEFT + ((v - x0) / (x1 - x0)) * (width - LEFT - RIGHT),
        y: (v) => HEIGHT - BOTTOM - unit(v) * (HEIGHT - TOP - BOTTOM), shown, byTime,
      };
      for (const value of log ? logTicks(low, high) : ticks(low, high, 5)) {
        const y = view.y(value);
        make("line", { x1: LEFT, x2: width - RIGHT, y1: y, y2: y, class: "grid" }, svg);
        make("text", { x: LEFT - 8, y: y + 4, "text-anchor": "end" }, svg, format(value));
      }
      const bottom = HEIGHT - BOTTOM;
      make("line", { x1: LEFT, x2: width - RIGHT, y1: bottom, y2: bottom, class: "axis" }, svg);
      const xTicks = ticks(x0, x1, Math.max(2, Math.min(8, width / 70)));
      const whole = xTicks.filter((v) => byTime || Number.isInteger(+v.toFixed(9)));
      const places = [...new Set(all.map((p) => p.x))];
      const few = whole.length > 1 ? whole : places.length < 3 ? places : xTicks;
      for (const value of few) {
        make("line", { x1: view.x(value), x2: view.x(value), y1: bottom, y2: bottom + 4, class: "axis" }, svg);
        make("text", { x: view.x(value), y: bottom + 17, "text-anchor": "middle" }, svg, format(value));
      }
      make("text", { x: (LEFT + width - RIGHT) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, svg, byTime ? "minutes" : "epoch");
      shown.forEach((s, k) => {
        let path = "", open = false;
        for (const p of points[k]) {
          if (p.y === null) { open = false; continue; }
          path += `${open ? "L" : "M"}${view.x(p.x).toFixed(1)} ${view.y(p.y).toFixed(1)}`;
          open = true;
        }
        make("path", { d: path, class: `c${s.color} d${s.dash || 0}${s.thin ? " thin" : ""}` }, svg);
        if (points[k].length <= (s.thin ? 1 : 16))
          for (const p of points[k])
            if (p.y !== null) make("circle", { cx: view.x(p.x), cy: view.y(p.y), r: 3.2, class: `c${s.color}` }, svg);
      });
      view.cursor = make("g", {}, svg);
    }

    function point(x, clientX, clientY) {
      at = x;
      view.cursor.replaceChildren();
      const px = view.x(x), rows = new Map();
      make("line", { x1: px, x2: px, y1: TOP, y2: HEIGHT - BOTTOM, class: "cursor" }, view.cursor);
      view.shown.forEach((s, k) => {
        if (s.mean) return;
        const near = points[k].reduce((a, p) => (!a || Math.abs(p.x - x) < Math.abs(a.x - x) ? p : a), null);
        if (!near || Math.abs(view.x(near.x) - px) > 12) return;
        if (!rows.has(s.name)) rows.set(s.name, []);
        if (near.y === null) return;
        rows.get(s.name).push(near.y);
        make("circle", { cx: view.x(near.x), cy: view.y(near.y), r: 3.8, class: `c${s.color}` }, view.cursor);
      });
      showTip(clientX, clientY, (box) => {
        make("div", {}, box, view.byTime ? `${format(x)} minutes` : `epoch ${format(x)}`);
        const table = make("table", {}, box);
        for (const [name, values] of rows) {
          const row = make("tr", {}, table);
          make("td", {}, row, name);
          const mean = values.reduce((a, v) => a + v, 0) / values.length;
          const range = values.length > 1 ? ` (${format(Math.min(...values))} to ${format(Math.max(...values))})` : "";
          make("td", {}, row, values.length ? `${format(mean)}${range}` : "not finite");
        }
      });
    }
    const places = () => [...new Set(points.flat().map((p) => p.x))].sort((a, b) => a - b);
    plot.addEventListener("pointermove", (event) => {
      if (!view) return;
      const left = view.svg.getBoundingClientRect().left, all = places();
      const best = all.reduce((a, x) => (Math.abs(view.x(x) + left - event.clientX) < Math.abs(view.x(a) + left - event.clientX) ? x : a), all[0]);
      point(best, event.clientX, event.clientY);
    });
    const leave = () => { hideTip(); at = null; if (view) view.cursor.replaceChildren(); };
    plot.addEventListener("pointerleave", leave);
    plot.addEventListener("focusout", leave);
    plot.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!view || !step) return;
      event.preventDefault();
      const all = places(), i = all.indexOf(at);
      const x = all[i < 0 ? all.length - 1 : Math.max(0, Math.min(all.length - 1, i + step))];
      const box = view.svg.getBoundingClientRect();
      point(x, box.left + view.x(x), box.top + HEIGHT / 2);
    });
    let width = 0;
    new ResizeObserver(() => { if (plot.clientWidth !== width) { width = plot.clientWidth; draw(); } }).observe(plot);
    draw();
    return draw;
  }

  const draws = [...document.querySelectorAll("[data-chart]")].map(chart);
  for (const button of document.querySelectorAll("[data-clock]"))
    button.addEventListener("click", () => {
      clock = button.dataset.clock === "time";
      for (const other of document.querySelectorAll("[data-clock]"))
        other.setAttribute("aria-pressed", other === button);
      for (const draw of draws) draw();
    });

  // any element with data-tip
  document.addEventListener("pointerover", (event) => {
    const found = event.target.closest("[data-tip]");
    if (found) showTip(event.clientX, event.clientY, (box) => box.append(found.dataset.tip));
    else if (!event.target.closest(".plot")) hideTip();
  });
  document.addEventListener("scroll", hideTip, { passive: true });

  // the mistakes: by true and by predicted class, or by a click on the confusion matrix
  const gallery = document.querySelector(".gallery");
  if (gallery) {
    const items = [...gallery.children], told = document.getElementById("told");
    const selects = ["true", "predicted"].map((name) => document.getElementById(name));
    const filter = () => {
      const [t, p] = selects.map((s) => s.value);
      const free = !t && !p;
      let count = 0;
      for (const item of items) {
        const fits = (!t || item.dataset.t === t) && (!p || item.dataset.p === p);
        item.hidden = !fits || (free && count >= data.first);
        count += fits && !item.hidden;
      }
      const counts = data.confusion.map((row, i) => row.map((n, j) => (i !== j && (!t || +t === i) && (!p || +p === j) ? n : 0)));
      const unclassed = data.unclassed.map((n, i) => (!p && (!t || +t === i) ? n : 0));
      const total = [...counts.flat(), ...unclassed].reduce((a, n) => a + n, 0);
      told.textContent = `${count} of ${total.toLocaleString("en-US")} shown`;
    };
    for (const select of selects) select.addEventListener("change", filter);
    document.getElementById("reset").addEventListener("click", () => {
      for (const select of selects) select.value = "";
      filter();
    });
    const choose = (t, p) => {
      selects[0].value = t;
      selects[1].value = t === p ? "" : p;
      filter();
      hideTip();
      document.getElementById("mistakes").scrollIntoView({ behavior: "smooth" });
    };
    for (const cell of document.querySelectorAll("[data-pair]"))
      cell.addEventListener("click", () => choose(...cell.dataset.pair.split(" ")));
    filter();
  }
})();
