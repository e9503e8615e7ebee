/* Search in pages that are opened from a folder: browsers start no worker there, so its script runs in
   a hidden frame instead. The theme looks for the name IFrameWorker to find its own files. */
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const inside = frame.contentWindow;
      const load = (address) =>
        new Promise((resolve, reject) => {
          const script = inside.document.createElement("script");
          script.src = address;
          script.onload = resolve;
          script.onerror = () => reject(new Error(`${address} did not load`));
          inside.document.head.append(script);
        });
      inside.importScripts = (...urls) =>
        urls.reduce((before, address) => before.then(() => load(address)), Promise.resolve());
      inside.postMessage = (data) => this.deliver(this, MessageEvent, data);
      this.ready = load(url);
      this.frame = frame;
    }
    deliver(target, Event, data) {
      const event = new Event("message", { data });
      target.dispatchEvent(event);
      if (target === this && this.onmessage) this.onmessage(event);
    }
    postMessage(data) {
      const inside = this.frame.contentWindow;
      this.ready.then(() => this.deliver(inside, inside.MessageEvent, data));
    }
    terminate() {
      this.frame.remove();
    }
  };
}
