/* Elements from text, never from markup: what is shown comes from files that anyone may have written. */

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  setAttributes(element, attributes);
  element.append(...children.filter((child) => child !== null));
  return element;
}

export function makeSvg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  setAttributes(element, attributes);
  element.append(...children);
  return element;
}

function setAttributes(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
}

export function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  const text = size >= 1000 ? value.toFixed(0) : size && size < 1e-4 ? value.toExponential(1) : value.toPrecision(digits);
  return text.replaceAll("-", "−");
}

export function signed(value) {
  return (value > 0 ? "+" : "") + number(value);
}

export function percent(part) {
  if (part === null || part === undefined) return "–";
  return `${(100 * part).toFixed(part > 0 && part < 0.0995 ? 1 : 0)} %`;
}
