/**
 * Speaks the control protocol to a router, as an honest client or otherwise. As a program, for tests that need it inside
 * a network namespace:
 *   node speaker.ts <router> <keyid:secret> <command>...
 * Commands: `lease=ADDR:PORT[,suggested[,lifetime]]`, `release=ADDR:PORT`, `hello`, `ping`, `raw=HEX`. One JSON line each.
 * Tunnels are asked for by tests that import it.
 */
import { fileURLToPath } from 'node:url';
import type { Datagrams } from '../../appliance/kernel/datagrams.ts';
import { udpDatagrams } from '../../appliance/kernel/datagrams.ts';
import { type Endpoint, formatEndpoint, parseEndpoint } from '../../appliance/protocol/address.ts';
import {
  decodeAnswer,
  deriveKeys,
  encodeRequest,
  FLAG_PEER,
  type Keys,
  PROTOCOL_TCP,
  type Request,
  type Response,
  resultName,
  type TunnelGrant,
  type TunnelResponse,
  TYPE,
} from '../../appliance/protocol/control.ts';
import { inVm } from './netns.ts';

/** The VM's processor is emulated. */
const SILENCE_MS = inVm ? 10_000 : 500;

/** What became of a question about tunnels. */
export type TunnelAnswer = { readonly result: string; readonly lifetime?: number; readonly tunnel?: TunnelGrant };

/** One session with one router. */
export class Speaker {
  readonly keys: Keys;
  readonly session: bigint;
  #sequence = 0n;
  #cookie: Uint8Array = new Uint8Array(16);
  readonly #send: (bytes: Uint8Array) => void;
  readonly #waiting = new Set<(bytes: Uint8Array) => void>();
  readonly #silence: () => Promise<void>;
  readonly close: () => void;

  private constructor(
    keys: Keys,
    session: bigint,
    send: (bytes: Uint8Array) => void,
    close: () => void,
    silence: () => Promise<void>,
  ) {
    this.keys = keys;
    this.session = session;
    this.#send = send;
    this.close = close;
    this.#silence = silence;
  }

  /** `silence` resolves when an answer is not to be expected any more. */
  static async open(
    datagrams: Datagrams,
    router: Endpoint,
    key: { readonly id: number; readonly secret: Uint8Array },
    options: { readonly session?: bigint; readonly silence?: () => Promise<void> } = {},
  ): Promise<Speaker> {
    let speaker: Speaker | null = null;
    const socket = await datagrams.connect(
      router,
      (bytes) => {
        for (const heard of speaker?.listeners() ?? []) heard(bytes);
      },
      () => undefined,
    );
    speaker = new Speaker(
      deriveKeys(key.id, key.secret),
      options.session ?? BigInt(Math.floor(Math.random() * 2 ** 48)),
      (bytes) => socket.send(bytes),
      () => socket.close(),
      options.silence ?? (() => new Promise((resolve) => setTimeout(resolve, SILENCE_MS))),
    );
    return speaker;
  }

  listeners(): Iterable<(bytes: Uint8Array) => void> {
    return [...this.#waiting];
  }

  /** A request with everything filled in; `over` replaces what a test wants different. */
  request(type: number, over: Partial<Request> = {}): Request {
    this.#sequence += 1n;
    return {
      type,
      flags: 0,
      keyId: this.keys.id,
      session: this.session,
      sequence: this.#sequence,
      cookie: type === TYPE.HELLO ? new Uint8Array(16) : this.#cookie,
      lifetime: 0,
      vmin: 2,
      vmax: 2,
      destination: null,
      suggestedPort: 0,
      protocol: 0,
      ...over,
    };
  }

  /** Sends bytes and hands back the first authentic answer to them; null when nothing came, or it grants a tunnel. */
  async exchange(bytes: Uint8Array): Promise<Response | null> {
    const answer = await this.#converse(bytes);
    return answer && 'tunnel' in answer ? null : answer;
  }

  async #converse(bytes: Uint8Array): Promise<Response | TunnelResponse | null> {
    const { promise, resolve } = Promise.withResolvers<Response | TunnelResponse>();
    const heard = (answer: Uint8Array): void => {
      const response = decodeAnswer(answer, this.keys, bytes);
      if (response) resolve(response);
    };
    this.#waiting.add(heard);
    this.#send(bytes);
    const response = await Promise.race([promise, this.#silence().then(() => null)]);
    this.#waiting.delete(heard);
    if (response && 'cookie' in response) this.#cookie = response.cookie;
    return response;
  }

  async #tunnel(over: Partial<Request>): Promise<TunnelAnswer> {
    const bytes = encodeRequest(this.request(TYPE.TUNNEL, over), this.keys);
    const answer = await this.#converse(bytes);
    if (!answer) return { result: 'silence' };
    const { result, lifetime } = answer;
    return { result: resultName(result), lifetime, ...('tunnel' in answer ? { tunnel: answer.tunnel } : {}) };
  }

  /** Asks for the router's end of the tunnels. */
  router(): Promise<TunnelAnswer> {
    return this.#tunnel({});
  }

  /** Asks for addresses inside a tunnel. */
  enrol(publicKey: Uint8Array, choice = 0, lifetime = 600): Promise<TunnelAnswer> {
    return this.#tunnel({ flags: FLAG_PEER, lifetime, peer: { publicKey, choice } });
  }

  /** Gives a tunnel up. */
  leave(publicKey: Uint8Array): Promise<Response | null> {
    return this.ask(TYPE.RELEASE, { flags: FLAG_PEER, peer: { publicKey, choice: 0 } });
  }

  /** Sends bytes and hands back whatever comes first, authentic or not. */
  async provoke(bytes: Uint8Array): Promise<Uint8Array | null> {
    const { promise, resolve } = Promise.withResolvers<Uint8Array>();
    this.#waiting.add(resolve);
    this.#send(bytes);
    const answer = await Promise.race([promise, this.#silence().then(() => null)]);
    this.#waiting.delete(resolve);
    return answer;
  }

  ask(type: number, over: Partial<Request> = {}): Promise<Response | null> {
    return this.exchange(encodeRequest(this.request(type, over), this.keys));
  }

  hello(): Promise<Response | null> {
    return this.ask(TYPE.HELLO);
  }

  lease(destination: Endpoint, over: Partial<Request> = {}): Promise<Response | null> {
    return this.ask(TYPE.LEASE, { destination, protocol: PROTOCOL_TCP, lifetime: 600, ...over });
  }

  release(destination: Endpoint): Promise<Response | null> {
    return this.ask(TYPE.RELEASE, { destination, protocol: PROTOCOL_TCP });
  }
}

function endpoint(text: string): Endpoint {
  const parsed = parseEndpoint(text);
  if (!parsed) throw new Error(`no endpoint: ${text}`);
  return parsed;
}

/** A key as the settings write it. */
export function readKey(text: string): { readonly id: number; readonly secret: Uint8Array } {
  const [id = '', secret = ''] = text.split(':');
  return { id: Number.parseInt(id, 16), secret: Buffer.from(secret, 'base64url') };
}

async function main([router = '', key = '', ...commands]: string[]): Promise<void> {
  const speaker = await Speaker.open(udpDatagrams(), endpoint(router), readKey(key));
  for (const command of commands) {
    const [verb = '', argument = ''] = command.split('=');
    const [where = '', port = '0', lifetime = '600'] = argument.split(',');
    let response: Response | null;
    if (verb === 'hello') response = await speaker.hello();
    else if (verb === 'ping') response = await speaker.ask(TYPE.PING);
    else if (verb === 'lease') {
      const over = { suggestedPort: Number(port), lifetime: Number(lifetime) };
      response = await speaker.lease(endpoint(where), over);
    } else if (verb === 'release') response = await speaker.release(endpoint(where));
    else response = await speaker.exchange(Buffer.from(argument, 'hex'));
    process.stdout.write(
      `${JSON.stringify(
        response && {
          result: resultName(response.result),
          port: response.port,
          capabilityPort: response.capabilityPort,
          lifetime: response.lifetime,
          epoch: response.epoch.toString(16),
          observed: formatEndpoint(response.observed),
        },
      )}\n`,
    );
  }
  speaker.close();
}

if (process.argv[1] === fileURLToPath(import.meta.url)) await main(process.argv.slice(2));
