/* Draws an attribution graph as SVG. `g` has nodes (x, y, label, name, token, radius, importance, about, into, from), edges as
   [source, target, weight] from the largest, and the texts of the axes. The view (node, edges, search, ranges) is kept in the
   address of a page. */
window.tlVpdGraph = function (id, g) {
  const part = name => document.getElementById(id + "-" + name);
  const place = document.getElementById(id), slider = part("weight"), search = part("search"), caption = part("caption");
  const tip = part("tip"), onPage = document.documentElement.dataset.page === "tlvpd", key = id + "=";
  const night = window.matchMedia("(prefers-color-scheme: dark)");
  const LIGHT = { paper: "#ffffff", ink: "#1d2430", soft: "#566072", line: "#eef0f4", fixed: "#dfe3ea", low: [255, 255, 255],
    positive: "#1f5fd0", negative: "#c2185b" };
  const DARK = { paper: "#1c2027", ink: "#e6e9ef", soft: "#a3adbd", line: "#2a303a", fixed: "#4a5464", low: [42, 48, 58],
    positive: "#78aaff", negative: "#ff78aa" };
  const STRENGTHS = [[0, .05, .7, .35], [.05, .25, 1.3, .55], [.25, 2, 2.6, .85]];
  const n = g.x.length, full = { x: [-0.7, g.columns.length - 0.3], y: [-0.7, g.rows.length - 0.3] };
  const order = g.radius.map((_, i) => i).sort((a, b) => g.radius[b] - g.radius[a]);
  const most = g.edges.length ? Math.abs(g.edges[0][2]) : 1;
  let view = { node: null, edges: Number(slider.value), search: "", x: full.x, y: full.y }, box = null, waiting = 0;

  function restore() {
    const at = onPage ? location.hash.indexOf(key) : -1;
    if (at < 0) return;
    try {
      const old = JSON.parse(decodeURIComponent(location.hash.slice(at + key.length).split("&")[0]));
      const range = (r, or) => Array.isArray(r) && r.length === 2 && r.every(Number.isFinite) && r[0] < r[1] ? r : or;
      if (Number.isInteger(old.node) && old.node >= 0 && old.node < n) view.node = old.node;
      if (Number.isInteger(old.edges)) view.edges = Math.max(1, Math.min(g.edges.length, old.edges));
      view.search = typeof old.search === "string" ? old.search.slice(0, 80) : "";
      view.x = range(old.x, full.x); view.y = range(old.y, full.y);
    } catch (error) { /* an address that is not ours */ }
    slider.value = view.edges; search.value = view.search;
  }
  function remember() {
    clearTimeout(waiting);
    if (onPage) waiting = setTimeout(() => history.replaceState(null, "", "#" + key + encodeURIComponent(JSON.stringify(view))), 150);
  }

  function element(name, attributes, parent) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
    if (parent) parent.append(made);
    return made;
  }
  const svg = element("svg", { role: "application", tabindex: 0, width: "100%", "aria-describedby": id + "-caption",
    "aria-label": "Attribution graph: n and p go from node to node, + and - zoom, arrows move, Escape ends",
    "font-family": "system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif", "font-size": 11 }, place);
  const paper = element("rect", { width: "100%", height: "100%" }, svg);
  const window_ = element("rect", {}, element("clipPath", { id: id + "-clip" }, svg));
  const axes = element("g", {}, svg), inside = element("g", { "clip-path": `url(#${id}-clip)` }, svg);
  const lines = [1, -1].flatMap(sign => STRENGTHS.map(([low, high, width, opacity]) => ({ sign, low, high,
    path: element("path", { fill: "none", "stroke-width": width, opacity: opacity, ...(sign < 0 ? { "stroke-dasharray": "5 3" } : {}) },
      inside) })));
  const circles = [];
  for (const i of [...order].reverse()) circles[i] = element("circle", { "data-node": i }, inside);
  const words = element("g", { "text-anchor": "middle" }, inside);

  function reach(edges, from, start, end) {
    const visited = new Set([from]), left = [from], next = new Map();
    for (const e of edges) {
      const s = g.edges[e][start];
      if (!next.has(s)) next.set(s, []);
      next.get(s).push(g.edges[e][end]);
    }
    while (left.length) for (const t of next.get(left.pop()) || []) if (!visited.has(t)) { visited.add(t); left.push(t); }
    return visited;
  }
  function matches() {
    const wanted = view.search.toLowerCase().split(/\s+/).filter(Boolean);
    if (!wanted.length) return null;
    return new Set(order.filter(i => wanted.every(w => (g.label[i] + " " + g.token[i]).toLowerCase().includes(w))));
  }
  const px = x => box.left + (x - view.x[0]) / (view.x[1] - view.x[0]) * box.width;
  const py = y => box.top + (view.y[1] - y) / (view.y[1] - view.y[0]) * box.height;

  /* The numbers of an axis that have `room` pixels each: all of `among`, or every k-th. */
  function ticks(among, range, pixels, room) {
    const gap = among.length > 1 ? (among[among.length - 1] - among[0]) / (among.length - 1) * pixels / (range[1] - range[0]) : room;
    const step = Math.max(1, Math.ceil(room / gap));
    return among.filter((i, k) => k % step === 0 && i > range[0] && i < range[1]);
  }
  function drawAxes(row, column, colours) {
    axes.replaceChildren();
    const grid = { stroke: colours.line }, bottom = box.top + box.height, right = box.left + box.width;
    const lengths = g.columns.map(text => text.length).sort((a, b) => a - b);  // room for three tokens in four
    const room = Math.min(Math.max(20, 6.4 * lengths[Math.floor(.75 * (lengths.length - 1))] + 4), 44);
    const columns = ticks(g.columns.map((_, i) => i), view.x, box.width, room);
    const fits = Math.max(3, Math.floor(column * (columns.length > 1 ? columns[1] - columns[0] : 9) / 6.4));
    for (const i of columns) {
      element("line", { x1: px(i), x2: px(i), y1: box.top, y2: bottom, ...grid }, axes);
      const middle = { x: px(i), "text-anchor": "middle" }, text = g.columns[i];
      element("text", { ...middle, y: bottom + 15, fill: colours.ink }, axes).textContent =
        text.length > fits ? text.slice(0, fits - 1) + "…" : text;
      element("text", { ...middle, y: bottom + 29, fill: colours.soft, "font-size": 10 }, axes).textContent = i;
    }
    /* Every site, or, where they do not fit, the first of every layer. */
    const layer = i => g.rows[i].match(/^\d*/)[0], all = g.rows.map((_, i) => i), each = row >= 15;
    for (const i of ticks(each ? all : all.filter(i => layer(i) && (!i || layer(i) !== layer(i - 1))), view.y, box.height, 15)) {
      element("line", { x1: box.left, x2: right, y1: py(i), y2: py(i), ...grid }, axes);
      element("text", { x: box.left - 7, y: py(i) + 4, "text-anchor": "end", fill: colours.ink }, axes).textContent =
        each ? g.rows[i] : "block " + layer(i);
    }
    element("text", { x: right, y: bottom + 42, "text-anchor": "end", fill: colours.soft, "font-size": 10 }, axes).textContent =
      "token and its position →";
  }
  /* Names of the strongest nodes in view, as many as stand beside each other. */
  function drawNames(lit, scale, colours) {
    words.replaceChildren();
    const boxes = [];
    for (const i of view.node === null ? order : [view.node, ...order]) {
      if (boxes.length >= 60) break;
      const w = 3.2 * g.name[i].length + 3, r = g.radius[i] * scale, middle = py(g.y[i]);
      const above = middle < box.top || middle - r > box.top + 15;  // else beside the node, on the side that has room
      const side = px(g.x[i]) + r + 2 * w > box.left + box.width ? -1 : 1;
      const x = px(g.x[i]) + (above ? 0 : side * (r + w)), y = above ? middle - r - 4 : Math.max(middle + 4, box.top + 11);
      if (!g.name[i] || x < box.left || x > box.left + box.width || y < box.top + 6 || y > box.top + box.height) continue;
      if ((lit && !lit.has(i)) || boxes.some(b => Math.abs(b[0] - x) < b[2] + w && Math.abs(b[1] - y) < 13)) continue;
      boxes.push([x, y, w]);
      const at = Math.max(box.left + w, Math.min(box.left + box.width - w, x));
      element("text", { x: at, y: y, fill: colours.ink, stroke: colours.paper, "stroke-width": 3, "paint-order": "stroke",
        "pointer-events": "none" }, words).textContent = g.name[i];
    }
  }
  function drawNodes(lit, scale, colours) {
    const full = [255, 190, 70];
    const fill = v => v === null ? colours.fixed : `rgb(${full.map((c, k) => Math.round(colours.low[k] + (c - colours.low[k]) * v))})`;
    for (let i = 0; i < n; i++) {
      const x = px(g.x[i]), y = py(g.y[i]), r = Math.max(1.2, g.radius[i] * scale), c = circles[i];
      const out = x < box.left - r || x > box.left + box.width + r || y < box.top - r || y > box.top + box.height + r;
      c.setAttribute("display", out ? "none" : "inline");
      if (out) continue;
      const strong = i === view.node || (view.search && view.node === null && lit && lit.has(i));
      const look = { cx: x.toFixed(1), cy: y.toFixed(1), r: r.toFixed(1), fill: fill(g.importance[i]), stroke: colours.ink,
        "stroke-width": strong ? 3 : r < 3 ? .4 : 1, opacity: lit === null || lit.has(i) ? 1 : .12 };
      for (const name in look) c.setAttribute(name, look[name]);
    }
  }
  function drawEdges(edges, colours) {
    for (const line of lines) {
      const path = [];
      for (const e of edges) {
        const [s, t, w] = g.edges[e], size = Math.abs(w) / most;
        if (Math.sign(w) === line.sign && size >= line.low && size < line.high)
          path.push(`M${px(g.x[s]).toFixed(1)} ${py(g.y[s]).toFixed(1)}L${px(g.x[t]).toFixed(1)} ${py(g.y[t]).toFixed(1)}`);
      }
      line.path.setAttribute("d", path.join(""));
      line.path.setAttribute("stroke", line.sign > 0 ? colours.positive : colours.negative);
    }
  }
  function draw() {
    const colours = onPage && night.matches ? DARK : LIGHT, width = place.clientWidth || 800;
    const height = Math.max(300, Math.min(90 + 46 * g.rows.length, window.innerHeight - 285, 760)), left = width < 560 ? 62 : 78;
    box = { left: left, top: 18, width: Math.max(width - left - 12, 80), height: height - 66 };
    svg.setAttribute("height", height);
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    paper.setAttribute("fill", colours.paper);
    for (const [name, value] of [["x", box.left], ["y", box.top], ["width", box.width], ["height", box.height]]) window_.setAttribute(name, value);
    let edges = [...Array(Math.min(view.edges, g.edges.length)).keys()], lit = matches();
    if (view.node !== null) {
      const up = reach(edges, view.node, 1, 0), down = reach(edges, view.node, 0, 1);
      edges = edges.filter(e => (up.has(g.edges[e][0]) && up.has(g.edges[e][1])) || (down.has(g.edges[e][0]) && down.has(g.edges[e][1])));
      lit = new Set([...up, ...down]);
    }
    const row = box.height / (view.y[1] - view.y[0]), column = box.width / (view.x[1] - view.x[0]);
    const scale = Math.max(.3, Math.min(1.5, Math.sqrt(row / 32), Math.sqrt(column / 40)));
    drawAxes(row, column, colours); drawEdges(edges, colours); drawNodes(lit, scale, colours); drawNames(lit, scale, colours);
    const least = edges.length ? Math.abs(g.edges[edges[edges.length - 1]][2]) : 0;
    caption.textContent = edges.length + " edges" + (edges.length ? ", the weakest " + least.toPrecision(2) : "") +
      (view.node === null ? (lit ? "; " + lit.size + (lit.size === 1 ? " node matches" : " nodes match") : "") : "; traced from " + g.label[view.node]);
  }
  let frame = 0;
  function change(what) {
    Object.assign(view, what);
    cancelAnimationFrame(frame);
    frame = requestAnimationFrame(draw);
    remember();
  }
  function zoom(factor, cx = .5, cy = .5) {
    const scale = (r, at) => { const m = r[0] + at * (r[1] - r[0]); return [m - (m - r[0]) * factor, m + (r[1] - m) * factor]; };
    change({ x: scale(view.x, cx), y: scale(view.y, cy) });
  }
  function move(dx, dy) {
    const w = view.x[1] - view.x[0], h = view.y[1] - view.y[0];
    change({ x: view.x.map(v => v + dx * w), y: view.y.map(v => v + dy * h) });
  }
  /* The next or previous node by influence, among those that match, in the middle of the view if it is outside. */
  function step(by) {
    const found = matches(), among = order.filter(i => !found || found.has(i));
    if (!among.length) return;
    const at = among.indexOf(view.node), i = among[((at < 0 ? (by > 0 ? -1 : 0) : at) + by + among.length) % among.length];
    const centred = (v, r) => v > r[0] && v < r[1] ? r : [v - (r[1] - r[0]) / 2, v + (r[1] - r[0]) / 2];
    change({ node: i, x: centred(g.x[i], view.x), y: centred(g.y[i], view.y) });
    requestAnimationFrame(() => hover(i));  // after the picture has moved
  }
  const number = v => v.toPrecision(3).replace("-", "−");
  function about(i) {
    return [...g.about[i], ...g.into[i].map(([s, w]) => `${number(w)} ← ${g.label[s]}`),
            ...g.from[i].map(([t, w]) => `${number(w)} → ${g.label[t]}`)].join("\n");
  }
  function hover(i) {
    tip.hidden = i === null;
    if (i === null) return;
    tip.textContent = about(i);
    const x = px(g.x[i]), wide = tip.offsetWidth, y = py(g.y[i]);
    tip.style.left = Math.max(0, Math.min(x + 14, place.clientWidth - wide)) + "px";
    tip.style.top = (y > box.height / 2 ? Math.max(0, y - tip.offsetHeight - 12) : y + 14) + "px";
  }
  function download(url, extension) {
    const link = document.createElement("a");
    link.href = url; link.download = "attribution-graph." + extension;
    link.click();
  }
  function picture() {
    const copy = svg.cloneNode(true);
    copy.querySelectorAll("[display=none]").forEach(c => c.remove());
    for (const name of ["width", "height"]) copy.setAttribute(name, svg.viewBox.baseVal[name]);
    return new XMLSerializer().serializeToString(copy);
  }
  function savePng() {
    const image = new Image(), canvas = document.createElement("canvas"), size = svg.viewBox.baseVal;
    canvas.width = 2 * size.width; canvas.height = 2 * size.height;
    image.onload = () => {
      canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
      download(canvas.toDataURL("image/png"), "png");
    };
    image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(picture());
  }

  restore();
  draw();
  slider.addEventListener("input", () => change({ edges: Math.round(slider.value) }));
  search.addEventListener("input", () => change({ search: search.value, node: null }));
  search.addEventListener("keydown", event => { if (event.key === "Enter") step(event.shiftKey ? -1 : 1); event.stopPropagation(); });
  part("svg").addEventListener("click", () => download(URL.createObjectURL(new Blob([picture()], { type: "image/svg+xml" })), "svg"));
  part("png").addEventListener("click", savePng);
  part("in").addEventListener("click", () => zoom(.7));
  part("out").addEventListener("click", () => zoom(1 / .7));
  part("all").addEventListener("click", () => change({ ...full }));
  const keys = { "+": () => zoom(.7), "=": () => zoom(.7), "-": () => zoom(1 / .7), "0": () => change({ ...full }), n: () => step(1),
    p: () => step(-1), Escape: () => { search.value = ""; hover(null); change({ node: null, search: "" }); }, ArrowLeft: () => move(-.15, 0),
    ArrowRight: () => move(.15, 0), ArrowUp: () => move(0, .15), ArrowDown: () => move(0, -.15) };
  svg.addEventListener("keydown", event => {
    if (keys[event.key] && !event.ctrlKey && !event.metaKey && !event.altKey) { keys[event.key](); event.preventDefault(); event.stopPropagation(); }
  });
  svg.addEventListener("wheel", event => {
    if (document.activeElement !== svg && !event.ctrlKey) return;
    const at = svg.getBoundingClientRect();
    event.preventDefault();
    zoom(Math.exp(event.deltaY / 500), (event.clientX - at.left - box.left) / box.width,
         1 - (event.clientY - at.top - box.top) / box.height);
  }, { passive: false });
  let from = null, moved = false;
  svg.addEventListener("pointerdown", event => { from = { x: event.clientX, y: event.clientY, view: { ...view } }; moved = false; });
  svg.addEventListener("pointermove", event => {
    if (!from || !event.buttons) return;
    const dx = event.clientX - from.x, dy = event.clientY - from.y;
    if (!moved && Math.hypot(dx, dy) < 4) return;
    moved = true;
    svg.setPointerCapture(event.pointerId);
    const w = (from.view.x[1] - from.view.x[0]) / box.width, h = (from.view.y[1] - from.view.y[0]) / box.height;
    change({ x: from.view.x.map(v => v - dx * w), y: from.view.y.map(v => v + dy * h) });
  });
  svg.addEventListener("pointerup", () => { from = null; });
  svg.addEventListener("click", event => {
    if (moved) return;
    const i = event.target.dataset.node === undefined ? null : Number(event.target.dataset.node);
    change({ node: i === view.node ? null : i });
  });
  svg.addEventListener("pointerover", event => hover(event.target.dataset.node === undefined ? null : Number(event.target.dataset.node)));
  svg.addEventListener("pointerleave", () => hover(null));
  new ResizeObserver(draw).observe(place);
  night.addEventListener("change", draw);
};
