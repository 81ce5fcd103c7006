/* The form for SQL without the mouse: Ctrl + Enter, or Cmd + Enter, runs the query. */

const form = document.getElementById("question");

form.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  form.requestSubmit();
});
