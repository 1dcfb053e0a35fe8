// A MicroStream client over the real socket.io-client, with the wire behaviour of the library: requests, responses, heartbeats.

import { randomBytes } from "node:crypto";
import { io } from "socket.io-client";
import { until } from "./weir.mjs";

const QUICK = { reconnectionDelay: 20, reconnectionDelayMax: 100 };

export class MicroStream {
  /** `handlers` by event; the return value is the response. `options` are those of socket.io-client. */
  constructor(t, url, serviceName, handlers = {}, { heartbeat = 1_000, timeout = 15_000, ...options } = {}) {
    this.name = serviceName;
    this.timeout = timeout;
    this.pending = new Map();
    this.requests = [];
    this.late = [];
    this.errors = [];
    this.disconnects = [];
    const query = serviceName === undefined ? {} : { serviceName };
    this.socket = io(url, { query, forceNew: true, ...QUICK, ...options });
    this.socket.on("request", request => {
      this.requests.push(request);
      const { id, event } = request;
      let response;
      if (!handlers[event]) {
        response = { error: { code: "EVENT_NOT_FOUND", message: `Event "${event}" not found`, errorData: { event, requestID: id, serviceName } } };
      } else {
        try {
          response = handlers[event](request.data, request);
        } catch (error) {
          response = { error: { code: "INTERNAL_SERVER_ERROR", message: "Internal server error", errorData: { event, requestID: id, error: error.message } } };
        }
      }
      if (response !== MicroStream.SILENCE) this.socket.emit("response", { id, response });
    });
    this.socket.on("response", ({ id, response }) => {
      const waiting = this.pending.get(id);
      if (!waiting) return void this.late.push({ id, response });
      this.pending.delete(id);
      if (response.error) waiting.reject(response.error);
      else waiting.resolve(response);
    });
    this.socket.on("connect", () => {
      clearInterval(this.beating);
      if (heartbeat) this.beating = setInterval(() => this.socket.emit("heartbeat", { serviceName }), heartbeat);
    });
    this.socket.on("connect_error", error => this.errors.push(error));
    this.socket.on("disconnect", reason => this.disconnects.push(reason));
    t?.after(() => this.close());
  }

  static async connect(...args) {
    const client = new MicroStream(...args);
    await client.connected();
    return client;
  }

  connected() {
    return until(`${this.name} to be connected`, () => this.socket.connected);
  }

  get transport() {
    return this.socket.io.engine.transport.name;
  }

  /** As `client.sendRequest` of the library. Rejects with the error object, or after the timeout of the client. */
  request(targetService, event, data, id = randomBytes(16).toString("base64url").slice(0, 21)) {
    const answer = new Promise((resolve, reject) => this.pending.set(id, { resolve, reject }));
    const payload = data === undefined ? { id, event } : { id, event, data };
    this.socket.emit("request", { targetService, payload });
    const timer = setTimeout(() => this.pending.get(id)?.reject({ code: "REQUEST_TIMEOUT" }), this.timeout);
    return answer.finally(() => {
      clearTimeout(timer);
      this.pending.delete(id);
    });
  }

  /** Resolves with the received requests when there are `count`. */
  got(count = 1) {
    return until(`${count} requests to ${this.name}`, () => this.requests.length >= count && this.requests);
  }

  refused() {
    return until(`${this.name} to be rejected`, () => this.errors[0]);
  }

  close() {
    clearInterval(this.beating);
    this.socket.disconnect();
  }
}

/** A handler returns this to send no response. */
MicroStream.SILENCE = Symbol("silence");
