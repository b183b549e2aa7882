// Keys for the buttons, and one label a pair: nothing is taken while an answer is under way, nor in the first moment of
// a new pair, which a second press of the same key would otherwise label unseen.
(() => {
  const BUTTONS = {
    a: "left", 1: "left", arrowleft: "left", b: "right", 2: "right", arrowright: "right", t: "tie", 0: "tie", x: "bad",
    u: "undo", backspace: "undo",
  };
  const SETTLE_MS = 250, GIVE_UP_MS = 5000;
  let turn = null, since = 0, timer = null;

  function setBusy(busy) {
    document.body.classList.toggle("busy", busy);
    clearTimeout(timer);
    if (busy) timer = setTimeout(() => setBusy(false), GIVE_UP_MS);
  }

  function look() {
    const now = document.querySelector("[data-turn]")?.dataset.turn ?? null;
    if (now === turn) return;
    turn = now;
    since = performance.now();
    setBusy(false);
    window.scrollTo(0, 0);
  }

  function isTyping(target) {
    return target instanceof HTMLElement && (target.isContentEditable || target.closest("input, textarea, select"));
  }

  document.addEventListener("keydown", (event) => {
    const name = BUTTONS[event.key.toLowerCase()];
    if (!name || event.ctrlKey || event.metaKey || event.altKey || isTyping(event.target)) return;
    const button = document.getElementById(`${name}-button`);
    if (!button || button.offsetParent === null) return;
    event.preventDefault();
    if (!event.repeat) button.click();
  });

  document.addEventListener("click", (event) => {
    if (!(event.target instanceof Element) || !event.target.closest("#choices button")) return;
    if (document.body.classList.contains("busy") || performance.now() - since < SETTLE_MS) {
      event.stopImmediatePropagation();
      event.preventDefault();
    } else {
      setBusy(true);
    }
  }, true);

  new MutationObserver(look).observe(document, { childList: true, subtree: true, attributes: true,
    attributeFilter: ["data-turn"] });
})();
