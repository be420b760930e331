"use strict";
// The samples of a step and prompt: every response as tokens, coloured by the gap between trainer and engine.
(() => {
  const { scale, groups } = JSON.parse(document.getElementById("samples-data").textContent);
  const byId = (id) => document.getElementById(id);
  const [steps, prompts, tip] = [byId("pick-step"), byId("pick-prompt"), byId("tip")];
  const [previous, next] = [byId("previous-prompt"), byId("next-prompt")];

  const element = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text; // never markup: users wrote it
    return made;
  };
  const signed = (value, digits = 3) => (value < 0 ? "−" : "+") + Math.abs(value).toPrecision(digits);
  const plain = (value) => (value === null || value === undefined ? "not known" : String(+value.toPrecision(4)).replace("-", "−"));
  const visible = (text) => text.replace(/\n/g, "↵\n").replace(/\t/g, "⇥\t") || "◌";
  const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;

  // What is known of a token, as [name, value] pairs: for the tip, and for screen readers.
  const facts = (response, at) => {
    const gap = response.g?.[at];
    const known = gap !== null && gap !== undefined;
    const differ = response.e?.[at];
    return [
      ["token", JSON.stringify(response.tokens[at])],
      ["engine log-prob", plain(response.r[at])],
      ["trainer log-prob", known ? plain(response.r[at] + gap) : "not scored"],
      ["gap", known ? `${signed(gap)} nats` : "not known"],
      ["ratio trainer / engine", known ? plain(Math.exp(gap)) : "not known"],
      ["MoE layers with other experts", differ ?? "not recorded"],
    ];
  };

  let pointed; // the token that the tip is about
  const placeTip = () => {
    const [box, own] = [pointed.getClientRects()[0], tip.getBoundingClientRect()];
    const below = box.bottom + 6;
    tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - own.width - 8))}px`;
    tip.style.top = `${below + own.height < innerHeight ? below : Math.max(8, box.top - own.height - 6)}px`;
  };
  const showTip = (token, response) => {
    const list = element("dl");
    for (const [name, value] of facts(response, Number(token.dataset.at))) list.append(element("dt", "", name), element("dd", "", value));
    tip.replaceChildren(list);
    tip.hidden = false;
    pointed = token;
    placeTip();
  };
  const hideTip = () => { tip.hidden = true; };

  const token = (response, at) => {
    const made = element("span", "token", visible(response.tokens[at]));
    made.dataset.at = at;
    made.tabIndex = at ? -1 : 0; // one stop for Tab in each response; arrows go on
    made.setAttribute("role", "option");
    made.setAttribute("aria-selected", "false");
    made.setAttribute("aria-label", facts(response, at).map(([name, value]) => `${name} ${value}`).join(", "));
    const gap = response.g?.[at];
    if (gap !== null && gap !== undefined) {
      made.dataset.gap = gap;
      made.style.setProperty("--hue", gap < 0 ? "var(--below)" : "var(--above)");
      made.style.setProperty("--strength", Math.min(1, Math.abs(gap) / scale).toFixed(3));
    }
    if (response.e?.[at] > 0) made.classList.add("differs");
    return made;
  };

  // Which token the arrow keys lead to; undefined: the key is none of ours.
  const target = (key, from, tokens) => {
    const last = tokens.length - 1;
    const line = (way) => { // the nearest token of the line above or below
      const here = tokens[from].getBoundingClientRect();
      for (let at = from + way, best; at >= 0 && at <= last; at += way) {
        const there = tokens[at].getBoundingClientRect();
        if (Math.abs(there.top - here.top) < 4) continue;
        if (best !== undefined && Math.abs(there.top - tokens[best].getBoundingClientRect().top) > 4) return best;
        const off = (place) => Math.abs(tokens[place].getBoundingClientRect().left - here.left);
        if (best === undefined || off(at) < off(best)) best = at;
        if (at === 0 || at === last) return best;
      }
      return from;
    };
    switch (key) {
      case "ArrowRight": return Math.min(last, from + 1);
      case "ArrowLeft": return Math.max(0, from - 1);
      case "ArrowDown": return line(1);
      case "ArrowUp": return line(-1);
      case "Home": return 0;
      case "End": return last;
    }
    return undefined;
  };

  const outcome = (response) => [
    `reward ${plain(response.reward)}`,
    ...Object.entries(response.parts).map(([name, value]) => `${name} ${plain(value)}`),
    `advantage ${response.advantage === null ? "none" : signed(response.advantage)}`,
    `${response.length.toLocaleString("en")} tokens${response.longer ? " and more" : ""}`,
    ...(response.truncated ? ["truncated"] : []),
    ...(response.invalid ? [`left out: ${response.invalid}`] : []),
  ].join(" · ");
  const gaps = (response) => {
    const known = (response.g ?? []).filter((gap) => gap !== null).map(Math.abs);
    if (!known.length) return "Not scored by the trainer.";
    const other = response.e ? ` · tokens with other experts: ${response.e.filter((layers) => layers > 0).length}` : "";
    return `|gap| mean ${plain(mean(known))}, largest ${plain(Math.max(...known))} nats${other}`;
  };

  const card = (response) => {
    const made = element("article", "card");
    const name = `Response ${response.sample}`;
    const tokens = element("div", "tokens");
    tokens.setAttribute("role", "listbox");
    tokens.setAttribute("aria-orientation", "horizontal");
    tokens.setAttribute("aria-label", `${name}, its tokens`);
    tokens.append(...response.tokens.map((_, at) => token(response, at)));
    const of = (event) => event.target.closest?.(".token");
    tokens.addEventListener("pointerover", (event) => { if (of(event)) showTip(of(event), response); });
    tokens.addEventListener("pointerleave", hideTip);
    tokens.addEventListener("click", (event) => { of(event)?.focus(); if (of(event)) showTip(of(event), response); });
    tokens.addEventListener("focusin", (event) => { of(event).setAttribute("aria-selected", "true"); showTip(of(event), response); });
    tokens.addEventListener("focusout", (event) => { of(event).setAttribute("aria-selected", "false"); hideTip(); });
    tokens.addEventListener("keydown", (event) => {
      const all = [...tokens.children];
      const from = all.indexOf(of(event));
      const to = target(event.key, from, all);
      if (event.key === "Escape") hideTip();
      if (to === undefined) return;
      event.preventDefault();
      all[from].tabIndex = -1;
      all[to].tabIndex = 0;
      all[to].focus();
    });
    made.append(element("h4", "", name), element("p", "facts soft", outcome(response)), element("p", "facts soft", gaps(response)), tokens);
    const more = response.length - response.tokens.length;
    if (more) made.append(element("p", "facts soft", `${more.toLocaleString("en")} more tokens are not shown here.`));
    return made;
  };

  const stepName = ({ step, attempt }) => (attempt ? `${step} (attempt ${attempt})` : String(step));
  const names = [...new Set(groups.map(stepName))];
  const ofStep = () => groups.filter((group) => stepName(group) === steps.value);
  const chosen = () => groups.indexOf(ofStep()[prompts.selectedIndex]);

  const showGroup = () => {
    const at = chosen();
    byId("sample-prompt").textContent = groups[at].prompt;
    byId("sample-responses").replaceChildren(...groups[at].responses.map(card));
    hideTip();
    previous.disabled = at === 0;
    next.disabled = at === groups.length - 1;
  };
  const showStep = () => {
    prompts.replaceChildren(...ofStep().map((group) => {
      const start = group.prompt.replace(/\s+/g, " ").trim();
      return element("option", "", `${group.slot}: ${start.length > 60 ? `${start.slice(0, 60)}…` : start}`);
    }));
    showGroup();
  };
  const turn = (by) => {
    const group = groups[chosen() + by];
    steps.value = stepName(group);
    showStep();
    prompts.selectedIndex = ofStep().indexOf(group);
    showGroup();
  };

  steps.append(...names.map((name) => element("option", "", name)));
  steps.value = names.at(-1); // the newest
  showStep();
  steps.addEventListener("change", showStep);
  prompts.addEventListener("change", showGroup);
  previous.addEventListener("click", () => turn(-1));
  next.addEventListener("click", () => turn(1));
  addEventListener("scroll", () => { if (!tip.hidden) placeTip(); }, { passive: true, capture: true });
})();
