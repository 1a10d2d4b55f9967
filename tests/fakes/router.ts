import type { Clock } from '../../appliance/kernel/clock.ts';
import type { Datagram, DatagramServer, Datagrams } from '../../appliance/kernel/datagrams.ts';
import { type Endpoint, formatAddress, formatEndpoint } from '../../appliance/protocol/address.ts';
import {
  decodeRequest,
  defaultRetryAfter,
  encodeResponse,
  type Keys,
  RESULT,
  type Refusal,
  type Request,
  type Response,
  requestIsAuthentic,
  TYPE,
} from '../../appliance/protocol/control.ts';
import { CookieJar } from '../../appliance/protocol/cookie.ts';

export type FakeLease = { readonly owner: string; readonly server: string; readonly port: number };

/**
 * A router without a kernel: speaks the control protocol and keeps leases in memory. Tests make it misbehave through
 * `answer`, and restart it to make it lose what it knew.
 */
export class FakeRouter {
  readonly leases = new Map<string, FakeLease>();
  /** Authentic requests in order, retransmissions too. */
  readonly requests: Request[] = [];
  epoch = 0xe0000001n;
  lifetime = 600;
  firstPort = 20_000;
  /** Says something else than OK to a LEASE for this server. */
  refuse: (server: Endpoint, request: Request) => { result: Refusal; retryAfter?: number } | null = () => null;
  /** Last word on every answer: may change it, hold it back (null), or send something else altogether. */
  answer: (bytes: Uint8Array, response: Response, request: Request) => Uint8Array | null = (bytes) => bytes;
  /** Silent as if it were not there. */
  dead = false;
  readonly #clock: Clock;
  readonly #keys: Keys;
  #jar: CookieJar;
  #server: DatagramServer | null = null;
  #startedAt: number;

  constructor(clock: Clock, keys: Keys) {
    this.#clock = clock;
    this.#keys = keys;
    this.#jar = new CookieJar((bytes) => clock.random(bytes), clock.now());
    this.#startedAt = clock.now();
  }

  /** A new process: the cookie key is gone; leases and epoch too, unless the kernel kept them. */
  restart(options: { readonly leasesSurvive: boolean }): void {
    this.#jar = new CookieJar((bytes) => this.#clock.random(bytes), this.#clock.now());
    this.#startedAt = this.#clock.now();
    if (options.leasesSurvive) return;
    this.epoch += 1n;
    this.leases.clear();
  }

  async listen(datagrams: Datagrams, at: Endpoint): Promise<readonly Endpoint[]> {
    this.#server = await datagrams.serve(at, (datagram) => this.#receive(datagram));
    return this.#server.local();
  }

  async close(): Promise<void> {
    await this.#server?.close();
  }

  #receive(datagram: Datagram): void {
    if (this.dead) return;
    const request = decodeRequest(datagram.bytes);
    if (typeof request === 'string' || request.keyId !== this.#keys.id) return;
    if (!requestIsAuthentic(datagram.bytes, this.#keys)) return;
    this.requests.push(request);
    const subject = {
      address: datagram.from.address,
      port: datagram.from.port,
      keyId: request.keyId,
      session: request.session,
    };
    const { result, port, lifetime } = this.#decide(request, subject);
    const response: Response = {
      type: request.type,
      result,
      keyId: request.keyId,
      session: request.session,
      sequence: request.sequence,
      epoch: this.epoch,
      uptime: Math.floor((this.#clock.now() - this.#startedAt) / 1000),
      lifetime,
      observed: datagram.from,
      port,
      capabilityPort: 0,
      flags: 0,
      cookie: this.#jar.issue(subject, this.#clock.now()),
    };
    const bytes = this.answer(encodeResponse(response, this.#keys, datagram.bytes), response, request);
    if (bytes) this.#server?.reply(datagram, bytes);
  }

  #decide(
    request: Request,
    subject: Parameters<CookieJar['accepts']>[1],
  ): { result: number; port: number; lifetime: number } {
    if (request.type === TYPE.HELLO) return { result: RESULT.OK, port: 0, lifetime: 120 };
    if (!this.#jar.accepts(request.cookie, subject, this.#clock.now())) {
      return { result: RESULT.CHALLENGE, port: 0, lifetime: 0 };
    }
    if (request.type === TYPE.PING) return { result: RESULT.OK, port: 0, lifetime: 120 };
    if (!request.destination) return { result: RESULT.MALFORMED, port: 0, lifetime: 1800 };
    const owner = `${request.keyId}/${formatAddress(subject.address)}`;
    const server = formatEndpoint(request.destination);
    const key = `${owner}/${server}`;
    if (request.type === TYPE.RELEASE) {
      this.leases.delete(key);
      return { result: RESULT.OK, port: 0, lifetime: 0 };
    }
    const refusal = this.refuse(request.destination, request);
    if (refusal) {
      return { result: refusal.result, port: 0, lifetime: refusal.retryAfter ?? defaultRetryAfter(refusal.result) };
    }
    const known = this.leases.get(key);
    if (known) return { result: RESULT.OK, port: known.port, lifetime: this.lifetime };
    const taken = new Set([...this.leases.values()].filter((one) => one.owner === owner).map((one) => one.port));
    let port = request.suggestedPort || this.firstPort;
    while (taken.has(port)) port++;
    this.leases.set(key, { owner, server, port });
    return { result: RESULT.OK, port, lifetime: this.lifetime };
  }
}
