import { pino } from 'pino';
import type { CommonSettings } from './settings.ts';

/** Structured facts of one log line. Peer-controlled text never gets in, only validated values. */
export type LogFields = Readonly<Record<string, string | number | boolean | null | undefined>>;

/** One line per state change. `event` is a stable, hyphenated name; `message` is for people. */
export type Log = {
  debug(event: string, fields: LogFields, message: string): void;
  info(event: string, fields: LogFields, message: string): void;
  warn(event: string, fields: LogFields, message: string): void;
  error(event: string, fields: LogFields, message: string): void;
};

/** The same log, with facts of their own on every line of it. */
export function logWith(log: Log, facts: LogFields): Log {
  const at =
    (level: keyof Log): Log['info'] =>
    (event, fields, message) =>
      log[level](event, { ...facts, ...fields }, message);
  return { debug: at('debug'), info: at('info'), warn: at('warn'), error: at('error') };
}

/** Where lines go: each with its newline, at once. */
export type LogSink = { write(line: string): void };

export type LogOptions = Pick<CommonSettings, 'logLevel' | 'logFormat'> & {
  /** `router`, `client` or a command. */
  readonly component: string;
};

/** Field names that can hold nothing but a secret. */
const SECRET_FIELD = /^(secret|secrets|cookie|password|authorization|c2s|s2c)$/i;
/** A key as `detour genkey` prints it, wherever it slipped in: the id may stay, the secret not. */
const SECRET_TEXT = /\b([0-9a-f]{8}):[A-Za-z0-9_-]{43}(?![A-Za-z0-9_-])/gi;
/** Longest text of one field: a line stays a line that every collector takes. */
const LONGEST_TEXT = 4096;

const clean = (text: string): string => text.replace(SECRET_TEXT, '$1:***').slice(0, LONGEST_TEXT);

function cleanFields(fields: LogFields): LogFields {
  const out: Record<string, LogFields[string]> = {};
  for (const [name, value] of Object.entries(fields)) {
    out[name] = SECRET_FIELD.test(name) ? '***' : typeof value === 'string' ? clean(value) : value;
  }
  return out;
}

/**
 * A log on stdout, each line written before the call returns, so that the last words of a dying process are kept.
 * Names of fields and of events are stable; secrets are masked even when they were passed by mistake.
 */
export function createLog(options: LogOptions, sink?: LogSink): Log {
  const target = sink ?? standardOutput();
  const lines = options.logFormat === 'pretty' ? prettySink(target) : target;
  const logger = pino(
    {
      level: options.logLevel,
      base: { component: options.component },
      timestamp: pino.stdTimeFunctions.isoTime,
      formatters: { level: (label) => ({ level: label }) },
    },
    lines,
  );
  const at =
    (level: keyof Log): Log['info'] =>
    (event, fields, message) => {
      // Cleaning costs; a line that nobody will see must not.
      if (logger.isLevelEnabled(level)) logger[level]({ event, ...cleanFields(fields) }, clean(message));
    };
  return { debug: at('debug'), info: at('info'), warn: at('warn'), error: at('error') };
}

function standardOutput(): LogSink {
  const output = pino.destination({ fd: 1, sync: true });
  // The disk is full, say: a daemon that stops for that would do more harm than silence. (Pino forgives a closed pipe itself.)
  output.on('error', () => {});
  return output;
}

const COLOURS: Readonly<Record<string, string>> = { debug: '90', info: '36', warn: '33', error: '31' };

/** Turns JSON lines into ones for people: local time (`TZ` counts), level, message, then the facts. */
function prettySink(target: LogSink): LogSink {
  const colour = process.stdout.isTTY === true;
  const paint = (code: string, text: string): string => (colour ? `\x1b[${code}m${text}\x1b[0m` : text);
  return {
    write(line) {
      const { level, time, component, event, msg, ...rest }: Record<string, unknown> = JSON.parse(line);
      const facts = Object.entries(rest)
        .map(
          ([name, value]) =>
            `${name}=${typeof value === 'string' && /[\s"=]/.test(value) ? JSON.stringify(value) : value}`,
        )
        .join(' ');
      const clock = new Date(String(time)).toLocaleTimeString('sv-SE', { hour12: false });
      const head = `${clock} ${paint(COLOURS[String(level)] ?? '0', String(level).toUpperCase().padEnd(5))}`;
      const tail = paint('90', `[${component} ${event}]${facts === '' ? '' : ` ${facts}`}`);
      // A message may hold newlines (errors with a remedy on the next line); they stay readable here.
      target.write(`${head} ${msg}  ${tail}\n`);
    },
  };
}
