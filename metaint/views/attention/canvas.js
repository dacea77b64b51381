// Draws attention patterns: every element of class "metaint-attention" on the page that is not drawn yet.
// In: data-view (JSON: heads, labels, start, causal, floor, block, counts) and data-pattern (base64, deflated: gaps and
// codes of the weights that are kept, head after head, then the block averages of the others); canvas.py says what they
// mean. Out: a shadow root with small patterns, one large one, and what the pointer is on. An event "metaint-head" with
// a head's name as its detail enlarges that head, and "metaint-chosen" tells which one is.
(() => {
  "use strict";
  const MOST = 512, TOP = 7, FONT = "11px system-ui, sans-serif", MARK = "#D55E00", LONGEST = 90;
  // The colour goes with the shade to this power, or a head that looks everywhere would be all but invisible.
  const STRETCH = 0.6;
  const LIGHT = ["#eef2f8", "#c6dbef", "#6baed6", "#2171b5", "#08306b"];
  const DARK = ["#1d2530", "#27507c", "#2f86c4", "#7cc4e8", "#f4fbff"];
  const TICKS = [0, 0.001, 0.01, 0.1, 0.3, 1];
  const STYLE = `
    :host { display: block; color: inherit; font: 13px/1.4 system-ui, sans-serif; margin: 12px 0; text-align: left }
    .panels { display: flex; flex-wrap: wrap; gap: 12px 24px; align-items: flex-start }
    .heads { max-width: 100%; overflow: auto; max-height: 640px; padding: 3px }
    .grid { display: grid; gap: 3px; font-size: 10px; line-height: 1; align-items: center; justify-items: center }
    .flow { display: flex; flex-wrap: wrap; gap: 6px; font-size: 10px; line-height: 1.2; max-width: 500px }
    .side { justify-self: end; padding-right: 3px; white-space: nowrap }
    button { font: inherit; color: inherit; background: none; cursor: pointer; border: 0; padding: 0; margin: 0 }
    button canvas { display: block; image-rendering: pixelated; outline: 1px solid #8886 }
    button[aria-pressed=true] canvas, button:focus-visible canvas { outline: 2px solid ${MARK} }
    .reset { border: 1px solid currentColor; border-radius: 3px; padding: 0 6px; margin-left: 8px; font-size: 12px }
    .reset[hidden] { display: none }
    .large { max-width: 100% }
    .large h4 { margin: 0; font-size: 14px; display: inline }
    .large canvas { display: block; max-width: 100%; cursor: crosshair; touch-action: pan-y }
    output { display: block; min-height: 2.8em; max-width: 600px; overflow-wrap: anywhere }
    .notes { max-width: 900px; font-size: 12px; opacity: 0.85; margin: 6px 0 0 }
    .legend { display: block; margin-top: 8px }`;

  function make(tag, attributes = {}, ...children) {
    const element = Object.assign(document.createElement(tag), attributes);
    element.append(...children);
    return element;
  }

  async function unpack(text) {
    const bytes = Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  // Codes [query * tokens + key] and block averages, as shades from 0 to 255, of every head.
  function decode(view, bytes) {
    const n = view.labels.length, across = Math.ceil(n / view.block);
    const entries = view.counts.reduce((sum, count) => sum + count, 0);
    const gaps = bytes.subarray(0, entries), codes = bytes.subarray(entries, 2 * entries);
    let entry = 0;
    return view.heads.map((name, i) => {
      const found = new Uint8Array(n * n);
      let row = 0, begin = 0, end = view.causal ? 1 : n, at = -1;
      for (const last = entry + view.counts[i]; entry < last; entry++) {
        at += gaps[entry];
        while (at >= end) {
          row += 1;
          begin = end;
          end += view.causal ? row + 1 : n;
        }
        found[row * n + at - begin] = codes[entry];
      }
      const start = 2 * entries + i * across * across;
      return { name, codes: found, blocks: bytes.subarray(start, start + across * across) };
    });
  }

  const blockOf = (view, q, k) =>
    Math.floor(q / view.block) * Math.ceil(view.labels.length / view.block) + Math.floor(k / view.block);

  // The strongest shade in each pixel of some rows and columns, as an image; what can't be seen stays clear.
  function image(view, head, [q0, q1, k0, k1], most, colours) {
    const n = view.labels.length, width = Math.min(most, k1 - k0), height = Math.min(most, q1 - q0);
    const shades = new Int16Array(width * height).fill(-1), dim = Math.sqrt(view.floor);
    for (let q = q0; q < q1; q++) {
      const line = Math.floor(((q - q0) * height) / (q1 - q0)) * width;
      for (let k = k0; k < (view.causal ? Math.min(k1, q + 1) : k1); k++) {
        const pixel = line + Math.floor(((k - k0) * width) / (k1 - k0));
        const shade = head.codes[q * n + k] || Math.round(dim * head.blocks[blockOf(view, q, k)]);
        if (shade > shades[pixel]) shades[pixel] = shade;
      }
    }
    const picture = new ImageData(width, height), pixels = new Uint32Array(picture.data.buffer);
    shades.forEach((shade, i) => { if (shade >= 0) pixels[i] = colours[shade]; });
    const canvas = make("canvas", { width, height });
    canvas.getContext("2d").putImageData(picture, 0, 0);
    return canvas;
  }

  function palette(anchors, power) {
    const parts = anchors.map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
    return Uint32Array.from({ length: 256 }, (_, shade) => {
      const place = (shade / 255) ** power * (parts.length - 1), i = Math.min(Math.floor(place), parts.length - 2);
      const [r, g, b] = parts[i].map((low, j) => Math.round(low + (place - i) * (parts[i + 1][j] - low)));
      return new Uint32Array(new Uint8Array([r, g, b, 255]).buffer)[0];
    });
  }

  // What the page writes in, and colours that suit it: dark to bright where it writes in a light colour.
  function theme(host) {
    const ink = getComputedStyle(host).color;
    const context = make("canvas", { width: 1, height: 1 }).getContext("2d");
    context.fillStyle = ink;
    context.fillRect(0, 0, 1, 1);
    const [r, g, b] = context.getImageData(0, 0, 1, 1).data;
    const dark = 0.299 * r + 0.587 * g + 0.114 * b > 140;
    const anchors = dark ? DARK : LIGHT;
    return { ink, dark, colours: palette(anchors, STRETCH), bar: palette(anchors, 1) };
  }

  function weight(view, head, q, k) {
    if (view.causal && k > q) return "comes later, so it can't be seen";
    const code = head.codes[q * view.labels.length + k], floor = Number(view.floor.toPrecision(2));
    if (!code) {
      const mean = (head.blocks[blockOf(view, q, k)] / 255) ** 2 * view.floor;
      return `below ${floor}` + (view.averaged ? ` (near it ${Number(mean.toPrecision(2))} on average)` : "");
    }
    // Half a step of the square root on either side.
    const error = (code + 0.25) / 255 / 255, digits = 1 - Math.floor(Math.log10(error));
    return `${((code / 255) ** 2).toFixed(digits)} ± ${error.toFixed(digits)}`;
  }

  // Small patterns to choose from: layers by heads where that is what they are, else one after another.
  function chooser(view, choose) {
    const layers = new Map();
    for (const head of view.heads) {
      const [layer, index] = head.split(".");
      layers.set(layer, [...(layers.get(layer) ?? []), index]);
    }
    const rows = [...layers.values()], columns = rows[0];
    const square = rows.length > 1 && columns.length > 1 && rows.every((row) => row.join() === columns.join());
    const across = square ? columns.length : view.heads.length;
    const size = across <= 4 ? 110 : across <= 8 ? 60 : across <= 12 ? 32 : across <= 16 ? 28 : square ? 22 : 44;
    const buttons = view.heads.map((name, i) => {
      const button = make("button", { type: "button", title: `head ${name}`, onclick: () => choose(i) });
      if (!square) button.append(name);
      button.append(make("canvas"));
      return button;
    });
    const box = make("div", { className: square ? "grid" : "flow" });
    if (square) {
      box.style.gridTemplateColumns = `auto repeat(${columns.length}, ${size}px)`;
      box.append(make("span", { className: "side" }, "layer \\ head"), ...columns.map((index) => make("span", {}, index)));
      let next = 0;
      for (const [layer, row] of layers) {
        box.append(make("span", { className: "side" }, layer), ...buttons.slice(next, (next += row.length)));
      }
    } else {
      box.append(...buttons);
    }
    return { element: make("div", { className: "heads" }, box), buttons, size };
  }

  function short(context, label) {
    if (context.measureText(label).width <= LONGEST) return label;
    const signs = [...label];
    while (signs.length && context.measureText(signs.join("") + "…").width > LONGEST) signs.pop();
    return signs.join("") + "…";
  }

  // One head, large: axes of tokens, what the pointer is on, and a zoom into what is dragged over.
  function enlarged(view, say) {
    const n = view.labels.length, side = Math.max(220, Math.min(MOST, 28 * n));
    const canvas = make("canvas"), context = canvas.getContext("2d");
    context.font = FONT;
    const room = 8 + Math.max(...view.labels.map((label) => context.measureText(short(context, label)).width));
    const left = room + 18, width = left + side + 1, height = TOP + side + room + 19, ratio = Math.min(2, devicePixelRatio || 1);
    Object.assign(canvas, { width: width * ratio, height: height * ratio });
    canvas.style.width = `${width}px`;
    const state = { head: null, look: null, range: [0, n, 0, n], at: null, from: null, picture: null };
    const reset = make("button", { type: "button", className: "reset", hidden: true, onclick: () => zoom([0, n, 0, n]) });
    reset.append("show all");

    function cell(event) {
      const box = canvas.getBoundingClientRect(), scale = width / box.width, [q0, q1, k0, k1] = state.range;
      const x = (event.clientX - box.left) * scale - left, y = (event.clientY - box.top) * scale - TOP;
      if (x < 0 || y < 0 || x >= side || y >= side) return null;
      return [q0 + Math.floor((y / side) * (q1 - q0)), k0 + Math.floor((x / side) * (k1 - k0))];
    }

    function axis(count, first, place) {
      const step = Math.max(1, Math.ceil((12 * count) / side));
      for (let i = 0; i < count; i += step) place(short(context, view.labels[first + i]), ((i + 0.5) * side) / count);
    }

    function outline(q0, q1, k0, k1) {
      const [top, bottom, begin, end] = state.range, x = side / (end - begin), y = side / (bottom - top);
      context.strokeRect(left + (k0 - begin) * x, TOP + (q0 - top) * y, (k1 - k0) * x, (q1 - q0) * y);
    }

    function paint() {
      const [q0, q1, k0, k1] = state.range, { at, from, look } = state;
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      context.clearRect(0, 0, width, height);
      context.imageSmoothingEnabled = false;
      context.drawImage(state.picture, left, TOP, side, side);
      Object.assign(context, { font: FONT, fillStyle: look.ink, strokeStyle: "#8888", lineWidth: 1 });
      context.strokeRect(left, TOP, side, side);
      Object.assign(context, { textAlign: "right", textBaseline: "middle" });
      axis(q1 - q0, q0, (label, y) => context.fillText(label, left - 4, TOP + y));
      const turned = (x, y, draw) => {
        context.save();
        context.translate(x, y);
        context.rotate(-Math.PI / 2);
        draw();
        context.restore();
      };
      axis(k1 - k0, k0, (label, x) => turned(left + x, TOP + side + 4, () => context.fillText(label, 0, 0)));
      context.textAlign = "center";
      context.fillText("key: token looked at", left + side / 2, height - 8);
      turned(8, TOP + side / 2, () => context.fillText("query: token that looks", 0, 0));
      Object.assign(context, { strokeStyle: MARK, lineWidth: 2 });
      if (from && at) outline(...[0, 1].flatMap((i) => [Math.min(from[i], at[i]), Math.max(from[i], at[i]) + 1]));
      else if (at) outline(at[0], at[0] + 1, at[1], at[1] + 1);
    }

    function render() {
      state.picture = image(view, state.head, state.range, side * ratio, state.look.colours);
      paint();
    }

    function zoom(range) {
      state.range = range;
      reset.hidden = range[1] - range[0] === n && range[3] - range[2] === n;
      render();
    }

    const token = (i) => `${view.start + i} “${view.labels[i]}”`;
    canvas.onpointermove = (event) => {
      state.at = cell(event);
      say(state.at && `query ${token(state.at[0])} → key ${token(state.at[1])}: ${weight(view, state.head, ...state.at)}`);
      paint();
    };
    canvas.onpointerleave = () => { Object.assign(state, { at: null, from: null }); say(null); paint(); };
    canvas.onpointerdown = (event) => { state.from = cell(event); };
    canvas.onpointerup = (event) => {
      const from = state.from, to = cell(event);
      state.from = null;
      if (!from || !to || Math.abs(to[0] - from[0]) < 2 || Math.abs(to[1] - from[1]) < 2) return paint();
      zoom([0, 1].flatMap((i) => [Math.min(from[i], to[i]), Math.max(from[i], to[i]) + 1]));
    };
    canvas.ondblclick = () => zoom([0, n, 0, n]);
    const show = (head, look) => { Object.assign(state, { head, look }); render(); };
    return { canvas, reset, show };
  }

  function legend(look) {
    const canvas = make("canvas", { className: "legend", width: 560, height: 56 }), context = canvas.getContext("2d");
    canvas.style.width = "280px";
    context.scale(2, 2);
    const bar = make("canvas", { width: 256, height: 1 }), picture = new ImageData(256, 1);
    new Uint32Array(picture.data.buffer).set(look.bar);
    bar.getContext("2d").putImageData(picture, 0, 0);
    context.drawImage(bar, 12, 0, 256, 10);
    Object.assign(context, { font: FONT, fillStyle: look.ink, textAlign: "center", textBaseline: "top" });
    for (const tick of TICKS) {
      const x = 12 + 255 * tick ** (STRETCH / 2);
      context.fillRect(x, 10, 1, 3);
      context.fillText(String(tick), x, 15);
    }
    return canvas;
  }

  function notes(view, size) {
    const n = view.labels.length, floor = Number(view.floor.toPrecision(2)), heads = view.heads.length;
    return [
      `${heads} head${heads > 1 ? "s" : ""}, ${n} tokens (positions ${view.start} to ${view.start + n - 1}).`,
      "How to read: a row is a token that looks, a column one looked at; the colours tell small weights apart, and",
      "weights are rounded to 8 bits of their square root.",
      heads > 1 ? "Click a head to enlarge it; its" : "Its",
      "tokens and weights are shown where the pointer is; drag to zoom in, double-click to zoom out.",
      n > (heads > 1 ? size : MOST) ? "Where several tokens share a pixel the largest weight is drawn." : "",
      view.averaged
        ? `To keep the page small, weights below ${floor} are averaged over ${view.block} × ${view.block} tokens.` : "",
      "It misleads about effect: a head may look where it reads nothing of use.",
    ].filter(Boolean).join(" ");
  }

  async function draw(host) {
    const root = host.attachShadow({ mode: "open" });
    const view = JSON.parse(host.dataset.view), heads = decode(view, await unpack(host.dataset.pattern));
    const title = make("h4"), readout = make("output"), key = make("div");
    const say = (words) => { readout.textContent = words ?? "Move the pointer over the pattern to read its weights."; };
    const large = enlarged(view, say), small = chooser(view, choose);
    let look = null, chosen = 0;

    function choose(i) {
      chosen = i;
      title.textContent = `head ${heads[i].name}`;
      small.buttons.forEach((button, j) => button.setAttribute("aria-pressed", String(i === j)));
      large.show(heads[i], look);
      host.dispatchEvent(new CustomEvent("metaint-chosen", { detail: heads[i].name, bubbles: true }));
    }

    function recolour() {
      const found = theme(host);
      if (look && look.dark === found.dark && look.ink === found.ink) return;
      look = found;
      const n = view.labels.length, all = [0, n, 0, n], most = small.size * Math.min(2, Math.ceil(devicePixelRatio || 1));
      if (heads.length > 1) small.buttons.forEach((button, i) => {
        const canvas = image(view, heads[i], all, most, look.colours);
        canvas.style.width = canvas.style.height = `${small.size}px`;
        button.lastChild.replaceWith(canvas);
      });
      key.replaceChildren(legend(look));
      choose(chosen);
    }

    const shown = make("div", { className: "large" }, title, large.reset, readout, large.canvas);
    root.append(
      make("style", {}, STYLE),
      make("div", { className: "panels" }, ...(heads.length > 1 ? [small.element] : []), shown),
      key,
      make("p", { className: "notes" }, notes(view, small.size)),
    );
    say(null);
    recolour();
    host.addEventListener("pointerenter", recolour);
    host.addEventListener("metaint-head", (event) => {
      const i = view.heads.indexOf(event.detail);
      if (i >= 0) choose(i);
    });
  }

  window[Symbol.for("metaint.attention")] = () => {
    for (const host of document.querySelectorAll(".metaint-attention")) {
      if (host.shadowRoot) continue;
      draw(host).catch((error) => { host.shadowRoot.textContent = `These patterns can't be drawn: ${error.message}`; });
    }
  };
})();
