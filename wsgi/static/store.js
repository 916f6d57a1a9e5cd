// What the browser keeps: each value twice, for this tab (it survives a reload) and for the next visit. Storage that is
// full or switched off costs the keeping and nothing else.

const PREFIX = "worker-orcd.";

/**
 * @param {string} name
 * @returns {any} null where nothing of use is kept
 */
export function read(name) {
  try {
    return JSON.parse(sessionStorage.getItem(PREFIX + name) ?? localStorage.getItem(PREFIX + name) ?? "null");
  } catch {
    return null;
  }
}

/**
 * @param {string} name
 * @param {unknown} value null forgets it
 */
export function write(name, value) {
  try {
    for (const storage of [sessionStorage, localStorage]) {
      if (value === null) storage.removeItem(PREFIX + name);
      else storage.setItem(PREFIX + name, JSON.stringify(value));
    }
  } catch {
    // the conversation goes on in this tab
  }
}
