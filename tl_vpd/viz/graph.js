/* Draws an attribution graph with Plotly. `g` has nodes (x, y, labels, names, about, size, color, token), edges as
   [source, target, weight] from the largest, and the layout. The view (node, edges, search, ranges) is kept in the address of a page. */
window.tlVpdGraph = function (id, g) {
  const part = name => document.getElementById(id + "-" + name);
  const place = document.getElementById(id), slider = part("weight"), search = part("search"), caption = part("caption");
  const onPage = document.documentElement.dataset.page === "tlvpd", key = id + "=";
  const height = Math.max(380, Math.min(g.layout.height, Math.round(0.6 * window.innerHeight)));
  const full = { x: [-0.7, g.columns.length - 0.2], y: [-0.7, g.rows.length + 0.2] };
  const order = g.size.map((_, i) => i).sort((a, b) => g.size[b] - g.size[a]);
  const most = g.edges.length ? Math.abs(g.edges[0][2]) : 1;
  let view = { node: null, edges: Number(slider.value), search: "", x: full.x, y: full.y }, ready = false;

  function restore() {
    const at = onPage ? location.hash.indexOf(key) : -1;
    if (at < 0) return;
    try {
      const old = JSON.parse(decodeURIComponent(location.hash.slice(at + key.length).split("&")[0]));
      const range = (r, or) => Array.isArray(r) && r.length === 2 && r.every(Number.isFinite) ? r : or;
      if (Number.isInteger(old.node) && old.node >= 0 && old.node < g.x.length) view.node = old.node;
      if (Number.isInteger(old.edges)) view.edges = Math.max(1, Math.min(g.edges.length, old.edges));
      view.search = typeof old.search === "string" ? old.search.slice(0, 80) : "";
      view.x = range(old.x, full.x); view.y = range(old.y, full.y);
    } catch (error) { /* an address that is not ours */ }
    slider.value = view.edges; search.value = view.search;
  }
  function remember() {
    if (onPage) history.replaceState(null, "", "#" + key + encodeURIComponent(JSON.stringify(view)));
  }

  function reach(edges, from, start, end) {
    const visited = new Set([from]), waiting = [from], next = new Map();
    for (const e of edges) {
      const s = g.edges[e][start];
      if (!next.has(s)) next.set(s, []);
      next.get(s).push(g.edges[e][end]);
    }
    while (waiting.length) for (const t of next.get(waiting.pop()) || []) if (!visited.has(t)) { visited.add(t); waiting.push(t); }
    return visited;
  }
  function matches() {
    const words = view.search.toLowerCase().split(/\s+/).filter(Boolean);
    if (!words.length) return null;
    return new Set(order.filter(i => words.every(w => (g.labels[i] + " " + g.token[i]).toLowerCase().includes(w))));
  }
  /* The ticks that fit: every k-th, so that each has `room` pixels. */
  function ticks(texts, range, pixels, room) {
    const step = Math.max(1, Math.ceil((range[1] - range[0]) * room / pixels)), values = [];
    for (let i = 0; i < texts.length; i += step) values.push(i);
    return { tickvals: values, ticktext: values.map(i => texts[i]) };
  }
  /* Names of the strongest nodes in view, as many as stand beside each other. */
  function names(lit) {
    const width = Math.max(place.clientWidth - 100, 200), boxes = [], chosen = [];
    const px = i => (g.x[i] - view.x[0]) / (view.x[1] - view.x[0]) * width;
    const py = i => (g.y[i] - view.y[0]) / (view.y[1] - view.y[0]) * (height - 80);
    const first = view.node === null ? order : [view.node, ...order];
    for (const i of first) {
      if (chosen.length >= 60) break;
      const [x, y] = [px(i), py(i)], w = 3.4 * g.names[i].length + 4;
      if (!g.names[i] || x < 0 || x > width || y < 0 || y > height || (lit && !lit.has(i))) continue;
      if (boxes.some(b => Math.abs(b[0] - x) < b[2] + w && Math.abs(b[1] - y) < 15)) continue;
      boxes.push([x, y, w]); chosen.push(i);
    }
    return chosen;
  }

  function draw() {
    let edges = [...Array(view.edges).keys()], lit = matches();
    if (view.node !== null) {
      const up = reach(edges, view.node, 1, 0), down = reach(edges, view.node, 0, 1);
      edges = edges.filter(e => (up.has(g.edges[e][0]) && up.has(g.edges[e][1])) ||
                                (down.has(g.edges[e][0]) && down.has(g.edges[e][1])));
      lit = new Set([...up, ...down]);
    }
    const traces = [], classes = [[0, .05, .6, .3], [.05, .25, 1.2, .5], [.25, 2, 2.4, .8]];
    for (const sign of [1, -1]) for (const [low, high, width, opacity] of classes) {
      const x = [], y = [];
      for (const e of edges) {
        const [s, t, w] = g.edges[e], share = Math.abs(w) / most;
        if (Math.sign(w) === sign && share >= low && share < high) { x.push(g.x[s], g.x[t], null); y.push(g.y[s], g.y[t], null); }
      }
      traces.push({ x: x, y: y, mode: "lines", hoverinfo: "skip", showlegend: false, opacity: opacity,
                    line: { width: width, color: sign > 0 ? g.positive : g.negative } });
    }
    const strong = i => i === view.node || (view.search && view.node === null && lit && lit.has(i));
    traces.push({ x: g.x, y: g.y, mode: "markers", type: "scatter", text: g.about, hoverinfo: "text", showlegend: false,
      marker: { size: g.size, color: g.color, line: { width: g.x.map((_, i) => strong(i) ? 3 : 1), color: "#1d2430" },
                opacity: g.x.map((_, i) => lit === null || lit.has(i) ? 1 : .12) } });
    const annotations = names(lit).map(i => ({ x: g.x[i], y: g.y[i], yshift: g.size[i] / 2 + 8, text: g.names[i], showarrow: false,
      font: { size: 11, color: "#1d2430" }, bgcolor: "rgba(255, 255, 255, .8)", borderpad: 0 }));
    const layout = { ...g.layout, height: height, annotations: annotations,
      xaxis: { ...g.layout.xaxis, range: view.x, ...ticks(g.columns, view.x, place.clientWidth - 100, 34) },
      yaxis: { ...g.layout.yaxis, range: view.y, ...ticks(g.rows, view.y, height - 80, 15) } };
    const save = (format, title) => ({ name: format, title: title, icon: Plotly.Icons.camera,
      click: p => Plotly.downloadImage(p, { format: format, filename: "attribution-graph", width: 1400, height: 1000, scale: 2 }) });
    Plotly.react(place, traces, layout, { displaylogo: false, responsive: true, scrollZoom: true, typesetMath: false,
      modeBarButtons: [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d"], [save("svg", "Save as SVG"), save("png", "Save as PNG")]] });
    const least = edges.length ? Math.abs(g.edges[edges[edges.length - 1]][2]) : 0;
    caption.textContent = edges.length + " edges" + (edges.length ? ", the weakest " + least.toPrecision(2) : "") +
      (view.node === null ? (view.search ? "; " + lit.size + " nodes match" : "") : "; traced from " + g.labels[view.node]);
    if (ready) remember();
    ready = true;
  }
  function look(x, y) { view.x = x; view.y = y; draw(); }
  function zoom(factor) {
    const scale = r => { const m = (r[0] + r[1]) / 2, h = (r[1] - r[0]) / 2 * factor; return [m - h, m + h]; };
    look(scale(view.x), scale(view.y));
  }
  function move(dx, dy) {
    const [w, h] = [view.x[1] - view.x[0], view.y[1] - view.y[0]];
    look(view.x.map(v => v + dx * w), view.y.map(v => v + dy * h));
  }
  /* The next or previous node by influence, among those that match, in the middle of the view if it is outside. */
  function step(by) {
    const found = matches(), among = order.filter(i => !found || found.has(i));
    if (!among.length) return;
    const at = among.indexOf(view.node), i = among[((at < 0 ? (by > 0 ? -1 : 0) : at) + by + among.length) % among.length];
    const centred = (v, r) => v > r[0] && v < r[1] ? r : [v - (r[1] - r[0]) / 2, v + (r[1] - r[0]) / 2];
    view.node = i; look(centred(g.x[i], view.x), centred(g.y[i], view.y));
  }

  restore();
  draw();
  slider.addEventListener("input", () => { view.edges = Math.round(slider.value); draw(); });
  search.addEventListener("input", () => { view.search = search.value; view.node = null; draw(); });
  search.addEventListener("keydown", event => { if (event.key === "Enter") step(event.shiftKey ? -1 : 1); event.stopPropagation(); });
  const keys = { "+": () => zoom(.7), "=": () => zoom(.7), "-": () => zoom(1 / .7), "0": () => look(full.x, full.y),
    n: () => step(1), p: () => step(-1), Escape: () => { view.node = null; view.search = search.value = ""; draw(); },
    ArrowLeft: () => move(-.15, 0), ArrowRight: () => move(.15, 0), ArrowUp: () => move(0, .15), ArrowDown: () => move(0, -.15) };
  place.tabIndex = 0;
  place.addEventListener("keydown", event => { if (keys[event.key]) { keys[event.key](); event.preventDefault(); } });
  let onNode = false;
  place.on("plotly_click", event => {
    const point = event.points.find(p => p.data.mode === "markers");
    if (point) { onNode = true; view.node = point.pointIndex === view.node ? null : point.pointIndex; draw(); }
  });
  place.addEventListener("click", () => { if (!onNode && view.node !== null) { view.node = null; draw(); } onNode = false; });
  place.on("plotly_relayout", change => {
    const x = [change["xaxis.range[0]"], change["xaxis.range[1]"]], y = [change["yaxis.range[0]"], change["yaxis.range[1]"]];
    if (x[0] !== undefined || y[0] !== undefined) look(x[0] === undefined ? view.x : x, y[0] === undefined ? view.y : y);
  });
};
