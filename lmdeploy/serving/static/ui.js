// The chosen colours are kept in this browser; on a narrow screen the settings begin closed, so that the conversation is seen first.
(() => {
  const kept = localStorage.getItem("lm-dark");
  const paint = () => { if (kept !== null) document.body.classList.toggle("dark", kept === "1"); };
  document.addEventListener("click", (event) => {
    if (event.target.closest("#lm-dark")) {
      localStorage.setItem("lm-dark", document.body.classList.toggle("dark") ? "1" : "0");
    }
  });
  const ready = () => {
    const toggle = document.querySelector("#lm-side .toggle-button, .sidebar .toggle-button");
    if (!toggle) return setTimeout(ready, 30);
    paint();
    if (window.innerWidth < 768 && toggle.closest(".sidebar").classList.contains("open")) toggle.click();
  };
  window.addEventListener("DOMContentLoaded", ready);
})();

// The copy button hands out what was said: not the line of figures under it, and tags as they were written.
if (navigator.clipboard) {
  const write = navigator.clipboard.writeText.bind(navigator.clipboard);
  navigator.clipboard.writeText = (text) =>
    write(text.replace(/\n*<div class="lm-(note|error)">[\s\S]*?<\/div>/g, "").replace(/&lt;(?=[a-zA-Z/!?])/g, "<"));
}
