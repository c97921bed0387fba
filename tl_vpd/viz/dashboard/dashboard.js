"use strict";
// Everything that is shown is set as text, never as markup: tokens and labels may hold anything.
window.tlVpd = (function () {
  const PAGE = 200, stored = {}, waiting = {};

  function put(name, value) { stored[name] = value; }

  // The files are scripts, since pages opened from a disk may not fetch.
  function load(name) {
    if (name in stored) return Promise.resolve(stored[name]);
    return waiting[name] = waiting[name] || new Promise(function (resolve, reject) {
      const script = document.createElement("script");
      script.src = "data/" + name + ".js";
      script.onload = () => name in stored ? resolve(stored[name]) : reject(new Error("data/" + name + ".js is damaged."));
      script.onerror = () => reject(new Error("data/" + name + ".js is missing: keep the folder together."));
      document.head.append(script);
    });
  }

  function h(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes || {})) {
      if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value);
    }
    for (const child of children.flat()) if (child !== null && child !== undefined) element.append(child);
    return element;
  }

  function number(value) {
    if (value === null || value === undefined) return "–";
    if (Number.isInteger(value)) return value.toLocaleString("en");
    return Number(value.toPrecision(3)).toString().replace("-", "−");
  }

  const percent = value => number(100 * value) + "%";
  const visible = text => text.replace(/ +/g, run => run.length < 4 ? "·".repeat(run.length) : `·×${run.length}`);
  const counted = text => text.replace(/ {2,}/g, run => `·×${run.length}`);  // a browser shows several spaces as one

  // ------------------------------------------------------------------------------------------------ what there is
  let data = null, byAddress = null;

  const address = i => data.sites[data.site[i]] + ":" + data.index[i];
  const alive = i => data.mean[i] > data.alive;
  const label = i => counted(data.labels[i] || "");
  const labelOf = k => counted(data.components[k].label);
  const breakable = text => text.split(/(?<=\.)/).flatMap((part, n) => n ? [h("wbr"), part] : [part]);
  const toSubcomponent = (i, text) => h("a", { href: "subcomponent.html#" + encodeURIComponent(address(i)) }, text || breakable(address(i)));
  const toComponent = k => h("a", { href: "component.html#" + k }, "component " + k);

  const toPrompts = () => data.prompts.length ? h("a", { href: "prompts.html#prompt=0", id: "prompts" }, "Prompts") : null;

  async function record(i) {
    const shard = await load(data.files[data.site[i]] + "-" + Math.floor(data.index[i] / data.shard));
    return shard[data.index[i]];
  }

  // ------------------------------------------------------------------------------------------------ tables
  function table(columns, rows, options) {
    const { sorted, onsort } = options || {};
    const head = columns.map(c => h("th", {
      class: [c.words ? "words" : "", c.minor ? "minor" : ""].join(" ").trim() || null, scope: "col",
      "aria-sort": sorted && sorted.key === c.key ? (sorted.down ? "descending" : "ascending") : null,
    }, onsort ? h("button", { onclick: () => onsort(c), "data-key": c.key }, c.name) : c.name));
    const cell = (c, row) => h("td", {
      class: [c.words ? "words" : "", c.free ? "free" : "", c.minor ? "minor" : ""].join(" ").trim() || null,
    }, c.show(row));
    return h("div", { class: "wide" }, h("table", {}, h("thead", {}, h("tr", {}, head)),
      h("tbody", {}, rows.map(row => h("tr", {}, columns.map(c => cell(c, row)))))));
  }

  // ------------------------------------------------------------------------------------------------ the index
  const STATE = { q: "", site: "", sort: "mean", up: "", all: "", show: "" };

  function readState() {
    const query = new URLSearchParams(location.hash.slice(1));
    return Object.fromEntries(Object.entries(STATE).map(([key, value]) => [key, query.get(key) ?? value]));
  }

  function writeState(state) {
    const query = new URLSearchParams(Object.entries(state).filter(([key, value]) => value !== STATE[key]));
    history.replaceState(null, "", "#" + query);
  }

  function indexPage(main) {
    const state = readState();
    let limit = PAGE;
    const count = h("span", { class: "soft", role: "status" }), place = h("div", {});
    const texts = data.index.map((_, i) => (address(i) + " " + label(i)).toLowerCase());

    const columns = [
      { key: "address", name: "subcomponent", words: true, value: i => i, show: i => toSubcomponent(i) },
      { key: "label", name: "label", words: true, free: true, value: label, show: label },
      { key: "mean", name: "mean importance", value: i => data.mean[i], show: i => number(data.mean[i]) },
      { key: "density", name: "density", value: i => data.density[i], show: i => percent(data.density[i]) },
      { key: "firings", name: "firings", minor: true, value: i => data.firings[i], show: i => number(data.firings[i]) },
      ...Object.entries(data.scores).map(([name, values]) => ({
        key: "score." + name, name: name, value: i => values[i], show: i => number(values[i]) })),
      { key: "component", name: "component", minor: true, value: i => data.component[i],
        show: i => data.component[i] === null ? "" : toComponent(data.component[i]) },
    ].filter(c => (c.key !== "component" || data.components.length) && (c.key !== "label" || Object.keys(data.labels).length));

    const groups = [
      { key: "address", name: "component", words: true, value: k => k, show: toComponent },
      { key: "label", name: "label", words: true, free: true, value: labelOf, show: labelOf },
      { key: "members", name: "members", value: k => data.components[k].members.length,
        show: k => number(data.components[k].members.length) },
      { key: "density", name: "density", value: k => data.components[k].density, show: k => percent(data.components[k].density) },
      { key: "first", name: "first members", words: true, free: true, minor: true, value: k => data.components[k].members[0],
        show: k => data.components[k].members.slice(0, 3).map(address).join(", ") },
    ];

    const sortedBy = shown => shown.find(c => c.key === state.sort) || shown.find(c => c.key === "density");

    function ordered(rows, shown) {
      const column = sortedBy(shown), sign = state.up ? 1 : -1;
      const missing = value => value === null || value === undefined || value === "";
      return rows.map(row => [column.value(row), row]).sort(function ([a, i], [b, j]) {
        if (missing(a) || missing(b)) return missing(a) - missing(b) || i - j;  // at the end both ways
        return (a < b ? -sign : a > b ? sign : 0) || i - j;
      }).map(([_, row]) => row);
    }

    function draw() {
      writeState(state);
      const words = state.q.toLowerCase().split(/\s+/).filter(Boolean), site = data.sites.indexOf(state.site);
      const components = state.show === "components", shown = components ? groups : columns;
      let rows = components ? data.components.map((_, k) => k) : data.index.map((_, i) => i);
      rows = rows.filter(components
        ? k => words.every(w => (labelOf(k).toLowerCase() + " component " + k).includes(w) ||
                                data.components[k].members.some(i => texts[i].includes(w)))
        : i => (state.all || alive(i)) && (site < 0 || data.site[i] === site) && words.every(w => texts[i].includes(w)));
      count.textContent = number(rows.length) + (components ? " components" : " subcomponents");
      const order = ordered(rows, shown);
      const more = order.length > limit
        ? h("button", { id: "more", onclick: () => { limit += PAGE; draw(); } }, "Show " + PAGE + " more") : null;
      place.replaceChildren(table(shown, order.slice(0, limit), {
        sorted: { key: sortedBy(shown).key, down: !state.up },
        onsort: function (c) {
          state.up = sortedBy(shown).key === c.key ? (state.up ? "" : "1") : (c.words || c.key === "address" ? "1" : "");
          state.sort = c.key;
          limit = PAGE;
          draw();
        },
      }), more || "");
    }

    function change(key, value) { state[key] = value; limit = PAGE; draw(); }
    const options = ["", ...data.sites].map(s => h("option", { value: s, selected: s === state.site ? "" : null }, s || "all sites"));
    main.append(
      h("h1", {}, data.title),
      h("p", { class: "soft" }, data.about),
      h("div", { class: "controls" },
        h("input", { type: "search", id: "search", placeholder: "Search addresses and labels", value: state.q,
                     "aria-label": "Search", oninput: e => change("q", e.target.value) }),
        h("select", { id: "site", "aria-label": "Site", onchange: e => change("site", e.target.value) }, options),
        h("label", { class: "check" }, h("input", { type: "checkbox", id: "all", checked: state.all ? "" : null,
          onchange: e => change("all", e.target.checked ? "1" : "") }), "with dead ones"),
        data.components.length ? h("label", { class: "check" }, h("input", { type: "checkbox", id: "components",
          checked: state.show ? "" : null, onchange: e => change("show", e.target.checked ? "components" : "") }), "components") : null,
        toPrompts(), count),
      h("section", { class: "card" }, place));
    draw();
  }

  // ------------------------------------------------------------------------------------------------ windows and tables
  function readout(text) { document.getElementById("readout").textContent = text; }

  function windowOf([row, pos, peak, tokens, g, a], scale) {
    const spans = tokens.map(function (t, k) {
      const importance = g[k] / 100, activation = a[k] / 100;
      const about = visible(data.tokens[t]) + "   importance " + number(importance) + "   activation " + number(activation * scale);
      const span = h("span", { title: about, onclick: () => readout(about) }, data.tokens[t]);
      if (importance > 0) span.style.backgroundColor = "rgb(var(--amber) / " + importance + ")";
      if (Math.abs(activation) >= .05)
        span.style.boxShadow = "inset 0 -3px rgb(var(--" + (activation > 0 ? "positive" : "negative") + ") / " + Math.abs(activation) + ")";
      if (importance > .5) span.classList.add("strong");
      if (k === peak) span.classList.add("peak");
      return span;
    });
    return h("div", { class: "window" }, h("div", { class: "where" }, "row " + row + ", token " + pos, h("br"),
      "importance " + number(g[peak] / 100)), h("div", { class: "text" }, spans));
  }

  function windows(title, list, scale, note) {
    if (!list.length) return null;
    return h("section", { class: "card" }, h("h2", {}, title), h("p", { class: "soft" }, note), list.map(w => windowOf(w, scale)));
  }

  function card(title, note, ...children) {
    return h("section", { class: "card" }, h("h2", {}, title), note ? h("p", { class: "soft" }, note) : null, children);
  }

  const token = { name: "token", words: true, show: row => h("span", { class: "tok" }, visible(data.tokens[row[0]])) };

  function tokenTable(title, rows) {
    if (!rows.length) return null;
    return card(title, null, table([token, { name: "count", show: r => number(r[1]) }, { name: "recall", show: r => percent(r[2] / 1000) },
      { name: "PMI", show: r => number(r[3] / 100) }], rows));
  }

  function neighbourTable(rows) {
    if (!rows.length) return null;
    const columns = [
      { name: "subcomponent", words: true, show: r => toSubcomponent(r[0]) },
      { name: "tokens later", show: r => r[1] === 0 ? "0" : (r[1] > 0 ? "+" : "−") + Math.abs(r[1]) },
      { name: "together", minor: true, show: r => number(r[2]) }, { name: "Jaccard", show: r => number(r[3] / 1000) }];
    if (rows.some(r => label(r[0]))) columns.push({ name: "label", words: true, free: true, show: r => label(r[0]) });
    return broad(card("Neighbours", "They fire at the same tokens, or some tokens later (negative: earlier).", table(columns, rows)));
  }

  // Edges of the dataset graph: [place, weight], of subcomponents or, with ``link`` and ``name``, of components.
  function edgeTables(r, link, name) {
    const make = function (title, edges) {
      if (!edges.length) return null;
      const columns = [{ name: "from" === title ? "leads to" : "comes from", words: true, show: e => e[0] < 0 ? "embeddings" : link(e[0]) },
        { name: "weight", show: e => number(e[1]) }];
      if (edges.some(e => e[0] >= 0 && name(e[0])))
        columns.push({ name: "label", words: true, free: true, show: e => e[0] < 0 ? "" : name(e[0]) });
      return table(columns, edges);
    };
    const shown = [make("into", r.into), make("from", r.from)].filter(Boolean);
    return shown.length ? broad(card("Edges", "Direct effects over many prompts, by gradients: from what it reads, and to what reads it.", ...shown)) : null;
  }

  function broad(element) {
    element.classList.add("broad");
    return element;
  }

  function passedTable(i, heads) {
    if (!heads.length) return null;
    const writes = /W_O$|W_out$/.test(data.sites[data.site[i]]);
    return card("Heads", (writes ? "Heads of later blocks whose values read what it writes" : "Heads of earlier blocks that write what it reads") +
      ", by the weights alone; 1: as a random direction.", table([{ name: "head", words: true, show: r => "block " + r[0] + ", head " + r[1] },
      { name: "alignment", show: r => number(r[2]) }], heads));
  }

  function bars(title, note, values, names, low, high) {
    if (!values.length || !Math.max(...values)) return null;
    const most = Math.max(...values), place = h("div", { class: "bars" });
    values.forEach(function (value, k) {
      const bar = h("i", { title: names(k) + ": " + number(value) });
      bar.style.height = 100 * value / most + "%";
      place.append(bar);
    });
    return card(title, note + " The highest: " + number(most) + ".", place, h("div", { class: "ends soft" }, h("span", {}, low), h("span", {}, high)));
  }

  function facts(pairs) {
    return h("div", { class: "facts" }, pairs.filter(p => p[1] !== null && p[1] !== "").map(([name, value]) =>
      h("span", {}, name + " ", h("b", {}, value))));
  }

  // ------------------------------------------------------------------------------------------------ one subcomponent
  function beside(i, step) {
    for (let j = i + step; j >= 0 && j < data.index.length; j += step) if (alive(j)) return j;
    return null;
  }

  function steps(previous, next) {
    return h("nav", {}, h("a", { href: "index.html", id: "index" }, "All subcomponents"), toPrompts(),
      previous ? h("a", { href: previous, id: "previous", rel: "prev" }, "‹ previous") : null,
      next ? h("a", { href: next, id: "next", rel: "next" }, "next ›") : null);
  }

  const pageOf = i => i === null ? null : "subcomponent.html#" + encodeURIComponent(address(i));

  async function subcomponentPage(main) {
    const name = decodeURIComponent(location.hash.slice(1)), i = byAddress.get(name);
    document.title = name || data.title;
    if (i === undefined) {
      main.append(steps(null, null), h("h1", {}, "There is no subcomponent " + (name || "in this address")));
      return;
    }
    const r = await record(i);
    if (decodeURIComponent(location.hash.slice(1)) !== name) return;
    const scores = Object.entries(data.scores).map(([key, values]) => [key, number(values[i])]);
    const k = data.component[i];
    const content = [
      steps(pageOf(beside(i, -1)), pageOf(beside(i, 1))),
      h("h1", {}, h("code", {}, name)),
      label(i) ? h("p", { class: "label" }, label(i)) : null,
      facts([["mean importance", number(data.mean[i])], ["importance above 0 at", percent(data.density[i]) + " of the tokens"],
        ["fires (above " + data.threshold + ")", number(data.firings[i]) + " times"], ["mean activation", number(r.mean)],
        ["norm", number(r.norm)], ...scores, ["in", k === null ? "" : toComponent(k)]]),
      h("div", { class: "pair" }, windows("Where its importance is largest", r.windows, r.scale, "Background: importance. Underline: activation. Framed: the token " +
        "that the window is around. No two windows are of one row. These are the strongest cases, not typical ones."),
      windows("Where it fires, at random", r.samples, r.scale, "Random firings, the most important ones first.")),
      r.windows.length ? null : card("It does not fire", "Its importance exceeds " + data.threshold + " at none of these tokens."),
      h("div", { class: "grid" },
        tokenTable("Fires at", r.inputs), tokenTable("Followed by", r.outputs),
        r.logits.length ? card("Logits it raises and lowers", "Of its write direction alone, without the final norm, per unit of activation.",
          table([token, { name: "logit", show: row => number(row[1]) }], r.logits)) : null,
        neighbourTable(r.neighbours), edgeTables(r, toSubcomponent, label), passedTable(i, r.passed),
        bars("Importances above 0", "How many lie in each bin: log10 of 1 + count.", r.histogram.map(n => Math.log10(1 + n)),
          n => "bin " + (n + 1) + ", log10 of 1 + count", "0", "1"),
        bars("Its heads", "Norm by head.", r.heads, n => "head " + n, "head 0", "head " + (r.heads.length - 1))),
    ];
    main.replaceChildren(...content.filter(Boolean));
  }

  // ------------------------------------------------------------------------------------------------ one component
  async function componentPage(main) {
    const text = decodeURIComponent(location.hash.slice(1)), k = /^\d+$/.test(text) ? Number(text) : -1, c = data.components[k];
    document.title = "Component " + text;
    if (!c) {
      main.append(steps(null, null), h("h1", {}, "There is no component " + text));
      return;
    }
    const strongest = c.members.slice().sort((i, j) => data.mean[j] - data.mean[i]).slice(0, 5);
    const records = await Promise.all(strongest.map(record));
    if (decodeURIComponent(location.hash.slice(1)) !== text) return;
    const link = n => n >= 0 && n < data.components.length ? "component.html#" + n : null;
    main.replaceChildren(...[
      steps(link(k - 1), link(k + 1)),
      h("h1", {}, "Component " + k),
      c.label ? h("p", { class: "label" }, counted(c.label)) : null,
      facts([["members", number(c.members.length)], ["a member is important at", percent(c.density) + " of the tokens"]]),
      card("Members", null, table([{ name: "subcomponent", words: true, show: i => toSubcomponent(i) },
        ...(c.members.some(label) ? [{ name: "label", words: true, free: true, show: label }] : []),
        { name: "mean importance", show: i => number(data.mean[i]) },
        { name: "density", show: i => percent(data.density[i]) }], c.members)),
      edgeTables(c, toComponent, labelOf),
      ...strongest.map((i, n) => windows(address(i), records[n].windows.slice(0, 3), records[n].scale, label(i))),
    ].filter(Boolean));
  }

  // ------------------------------------------------------------------------------------------------ prompts
  const ROWS = 40;

  async function promptsPage(main) {
    const hash = location.hash, query = new URLSearchParams(hash.slice(1) || "prompt=0");
    const whole = (name, end) => /^\d+$/.test(query.get(name) || "") && Number(query.get(name)) < end ? Number(query.get(name)) : null;
    const k = whole("prompt", data.prompts.length), site = data.sites.indexOf(query.get("site"));
    document.title = "Prompts";
    if (k === null) {
      main.append(steps(null, null), h("h1", {}, "There is no such prompt"));
      return;
    }
    const prompt = await load("prompt-" + k);
    if (location.hash !== hash) return;
    const token = whole("token", prompt.tokens.length);
    const to = (changes) => "prompts.html#" + new URLSearchParams(Object.entries({ prompt: k, token: token, site: query.get("site"), ...changes })
      .filter(([_, value]) => value !== null && value !== "" && value !== undefined));
    const link = n => n >= 0 && n < data.prompts.length ? to({ prompt: n, token: null }) : null;
    const go = changes => { location.hash = to(changes).split("#")[1]; };
    const at = prompt.at.map(list => list.filter(([i]) => site < 0 || data.site[i] === site));
    const text = t => data.tokens[prompt.tokens[t]];

    const most = Math.max(1, ...at.map(list => list.length));
    const words = prompt.tokens.map(function (_, t) {
      const span = h("a", { href: to({ token: t }), class: t === token ? "peak" : null, "aria-label": "token " + t + ": " + visible(text(t)),
        title: at[t].length + " important" }, text(t));
      const share = .7 * at[t].length / most;
      span.style.backgroundColor = "rgb(var(--amber) / " + share + ")";
      if (share > .5) span.classList.add("strong");
      return span;
    });
    const names = data.prompts.map((title, n) => h("option", { value: n, selected: n === k ? "" : null }, n + ": " + visible(title)));
    const sites = ["", ...data.sites].map(s => h("option", { value: s, selected: s === (query.get("site") || "") ? "" : null }, s || "all sites"));
    main.replaceChildren(...[
      steps(link(k - 1), link(k + 1)),
      h("h1", {}, "Prompt " + k),
      h("div", { class: "controls" },
        h("select", { id: "prompt", "aria-label": "Prompt", onchange: e => go({ prompt: e.target.value, token: null }) }, names),
        h("select", { id: "site", "aria-label": "Site", onchange: e => go({ site: e.target.value }) }, sites)),
      card("Tokens", "The darker, the more subcomponents are important there. Choose a token to see which.", h("div", { class: "text" }, words)),
      token === null ? null : tokenCard(prompt, token, at[token], text(token)),
      heatmap(at, token, t => to({ token: t }), t => visible(text(t))),
    ].filter(Boolean));
  }

  function tokenCard(prompt, t, list, text) {
    const columns = [{ name: "subcomponent", words: true, show: r => toSubcomponent(r[0]) }, { name: "importance", show: r => number(r[1] / 100) },
      { name: "activation", minor: true, show: r => number(r[2]) }];
    if (list.some(r => label(r[0]))) columns.push({ name: "label", words: true, free: true, show: r => label(r[0]) });
    const element = h("section", { class: "card" }, h("h2", {}, "At token " + t + " ", h("span", { class: "tok" }, visible(text))),
      h("p", { class: "soft" }, "The model thinks most probable after it: ", h("span", { class: "tok" }, visible(data.tokens[prompt.next[t][0]])),
        " (" + percent(prompt.next[t][1] / 100) + "). ", list.length > ROWS ? "The first " + ROWS + " of " + list.length + " subcomponents:" : ""),
      list.length ? table(columns, list.slice(0, ROWS)) : "No subcomponent is important here.");
    element.id = "token";
    return element;
  }

  function heatmap(at, token, link, text) {
    const sums = new Map();
    at.forEach(list => list.forEach(([i, g]) => sums.set(i, (sums.get(i) || 0) + g)));
    const rows = [...sums].sort((a, b) => b[1] - a[1] || a[0] - b[0]).slice(0, ROWS).map(([i]) => i);
    if (!rows.length) return null;
    const values = at.map(list => new Map(list.map(r => [r[0], r])));
    const cell = function (i, t) {
      const r = values[t].get(i);
      const about = address(i) + ", token " + t + " " + text(t) + ": " + (r ? "importance " + number(r[1] / 100) + ", activation " + number(r[2]) : "not important");
      const element = h("td", { title: about, onclick: () => readout(about) });
      if (r) element.style.backgroundColor = "rgb(var(--amber) / " + r[1] / 100 + ")";
      return element;
    };
    const head = at.map((_, t) => h("th", { scope: "col", class: t === token ? "chosen" : null }, h("a", { href: link(t) }, text(t))));
    return card("The strongest subcomponents", "Importance of the " + rows.length + " with the largest sum over this prompt, token by token.",
      h("div", { class: "wide" }, h("table", { class: "heat" }, h("thead", {}, h("tr", {}, h("th", {}), head)), h("tbody", {}, rows.map(i =>
        h("tr", {}, h("th", { scope: "row", title: label(i) || null }, toSubcomponent(i, address(i).replace(/^blocks\./, ""))), at.map((_, t) => cell(i, t))))))));
  }

  // ------------------------------------------------------------------------------------------------ start
  const PAGES = { index: indexPage, subcomponent: subcomponentPage, component: componentPage, prompts: promptsPage };

  async function show() {
    const main = document.querySelector("main"), page = document.body.dataset.page;
    try {
      if (!data) {
        data = await load("index");
        byAddress = new Map(data.index.map((_, i) => [address(i), i]));
      }
      main.replaceChildren();
      readout("");
      await PAGES[page](main);
      scrollTo(0, 0);
    } catch (error) {
      main.replaceChildren(h("h1", {}, "This page cannot be shown"), h("p", {}, error.message));
    }
    document.body.dataset.ready = location.hash || "#";
  }

  addEventListener("hashchange", show);
  addEventListener("keydown", function (event) {
    const link = { ArrowLeft: "previous", ArrowRight: "next" }[event.key];
    const element = link && !event.altKey && !event.ctrlKey && !event.metaKey && document.getElementById(link);
    if (element) element.click();
  });
  addEventListener("DOMContentLoaded", show);
  return { put: put };
})();
