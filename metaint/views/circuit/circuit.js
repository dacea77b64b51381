// Makes circuits answer: every element of class "metaint-circuit" on the page that does not yet.
// In: SVG of circuit.py, in which parts (data-name) and paths (data-from, data-to) carry a <title>: a heading, and lines
// "what it is: value". Out: these as a panel beside what the pointer or the focus is on, with its neighbours brought out;
// a click or Enter on a head (data-head) sends "metaint-head" to the attention patterns of its own view, and the head
// that these enlarge is marked ("metaint-chosen").
(() => {
  "use strict";
  const done = Symbol.for("metaint.circuit.done"), ATTENTION = ".metaint-attention", AWAY = 14;

  function make(tag, className, ...children) {
    const element = Object.assign(document.createElement(tag), { className });
    element.append(...children);
    return element;
  }

  function panel(host) {
    const element = make("div", "panel");
    element.hidden = true;
    host.append(element);
    return element;
  }

  function fill(panel, text) {
    const [heading, ...lines] = text.split("\n"), list = make("dl", "");
    for (const line of lines) {
      const at = line.indexOf(": ");
      list.append(make("dt", "", line.slice(0, at)), make("dd", "", line.slice(at + 2)));
    }
    panel.replaceChildren(make("strong", "", heading), list);
  }

  // Light on dark where the page writes so; a page may do that without a color-scheme.
  function recolour(host) {
    const context = document.createElement("canvas").getContext("2d");
    context.fillStyle = getComputedStyle(host).color;
    context.fillRect(0, 0, 1, 1);
    const [r, g, b] = context.getImageData(0, 0, 1, 1).data;
    host.classList.toggle("dark", 0.299 * r + 0.587 * g + 0.114 * b > 140);
  }

  // Right of the picture where there is room, else beside a point; as far as that goes, within the window.
  function place(host, svg, panel, x, y) {
    const box = host.getBoundingClientRect(), { offsetWidth: width, offsetHeight: height } = panel;
    const right = Math.min(box.right, innerWidth), bottom = Math.min(box.bottom, innerHeight);
    const beside = svg.getBoundingClientRect().right + AWAY;
    const left = beside + width <= right ? beside : x + AWAY + width <= right ? x + AWAY : x - AWAY - width;
    const top = Math.min(y + AWAY, bottom - height);
    panel.style.left = `${Math.max(0, left - box.left)}px`;
    panel.style.top = `${Math.max(0, -box.top, top - box.top)}px`;
  }

  function start(host) {
    // Listeners are the area's: with them an SVG would take the focus itself.
    const area = host.querySelector(".scroll"), svg = area.querySelector("svg"), told = new Map(), shown = panel(host);
    const parts = [...svg.querySelectorAll(".part")], paths = [...svg.querySelectorAll(".path")];
    const attention = host.querySelector(ATTENTION);
    for (const item of [...parts, ...paths]) {
      const title = item.querySelector("title");
      told.set(item, title.textContent);
      item.setAttribute("aria-label", title.textContent.replaceAll("\n", "; "));
      title.remove(); // or the browser would show it too
      if (attention && "head" in item.dataset) item.setAttribute("role", "button");
    }

    function bringOut(item) {
      const { name, from, to } = item.dataset;
      const touched = paths.filter((path) => path === item || path.dataset.from === name || path.dataset.to === name);
      const names = new Set([name, from, to, ...touched.flatMap((path) => [path.dataset.from, path.dataset.to])]);
      paths.forEach((path) => path.classList.toggle("on", touched.includes(path)));
      parts.forEach((part) => part.classList.toggle("on", names.has(part.dataset.name)));
      svg.classList.add("lit");
    }

    function show(item, x, y) {
      fill(shown, told.get(item));
      shown.hidden = false;
      place(host, svg, shown, x, y);
      bringOut(item);
    }

    function hide() {
      shown.hidden = true;
      svg.classList.remove("lit");
    }

    function choose(item) {
      if (item.getAttribute("role") !== "button") return;
      attention.dispatchEvent(new CustomEvent("metaint-head", { detail: item.dataset.head }));
      attention.scrollIntoView({ block: "nearest" });
    }

    recolour(host);
    host.addEventListener("pointerenter", () => recolour(host));
    const under = (event) => event.target.closest(".part, .path");
    let last = null;
    area.addEventListener("pointermove", (event) => {
      const item = under(event);
      if (!item) hide();
      else if (item !== last || shown.hidden) show(item, event.clientX, event.clientY);
      else place(host, svg, shown, event.clientX, event.clientY);
      last = item;
    });
    area.addEventListener("pointerleave", hide);
    area.addEventListener("focusin", (event) => {
      const item = under(event);
      if (!item || !item.matches(":focus-visible")) return;
      const box = item.getBoundingClientRect();
      show(item, box.right - AWAY, box.top);
    });
    area.addEventListener("focusout", hide);
    area.addEventListener("click", (event) => {
      const item = under(event);
      if (!item) return;
      show(item, event.clientX, event.clientY); // which a finger could not do by moving
      choose(item);
    });
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") hide();
      const item = under(event);
      if (item?.getAttribute("role") !== "button" || (event.key !== "Enter" && event.key !== " ")) return;
      event.preventDefault();
      choose(item);
    });
    host.addEventListener("metaint-chosen", (event) => {
      for (const part of parts) {
        if ("head" in part.dataset) part.setAttribute("aria-pressed", String(part.dataset.head === event.detail));
      }
    });
  }

  window[Symbol.for("metaint.circuit")] = () => {
    for (const host of document.querySelectorAll(".metaint-circuit")) {
      if (host[done]) continue;
      host[done] = true;
      start(host);
    }
  };
})();
