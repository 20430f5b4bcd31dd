// The page is complete without this script; it only brings the budget slider to life.
(() => {
  "use strict";
  const { frontier, uniform, unit, perplexity } = JSON.parse(document.getElementById("data").textContent);
  const box = document.getElementById("budget");
  if (!box || frontier.length < 2) return;
  const input = box.querySelector("input");
  const output = box.querySelector("output");
  const number = (x, digits) => (x >= 1e-4 || x === 0 ? String(Number(x.toPrecision(digits))) : x.toExponential(1));
  const size = (bytes) => (bytes >= 1e6 ? (bytes / 1e6).toFixed(2) + " MB" : (bytes / 1e3).toFixed(0) + " kB");
  const show = () => {
    const [bpw, bytes, kl, error] = frontier[input.valueAsNumber];
    const fits = uniform.filter((u) => u[2] <= bytes);
    const best = fits.reduce((a, b) => (a && a[3] <= b[3] ? a : b), null);
    const line = `${bpw.toFixed(2)} bits per weight, ${size(bytes)}: predicted loss ${number(Math.max(kl, 0), 3)}` +
      (error === null ? "" : ` ± ${number(error, 2)}`) + ` nats per ${unit}` +
      (perplexity ? ` (perplexity × ${Math.exp(kl).toFixed(3)}).` : ".");
    const rest = best ? ` Best uniform scheme of at most this size: ${best[0]}, measured ${number(best[3], 3)}.`
      : " No uniform scheme is this small.";
    output.textContent = line + rest;
    input.setAttribute("aria-valuetext", line);
  };
  input.max = String(frontier.length - 1);
  input.value = String(box.dataset.start);
  input.addEventListener("input", show);
  show();
  box.hidden = false;
})();
