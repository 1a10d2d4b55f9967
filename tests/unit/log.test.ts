import { randomBytes } from 'node:crypto';
import { describe, expect, it } from 'vitest';
import { createLog, type LogOptions } from '../../appliance/log.ts';

function capture(options: Partial<LogOptions> = {}) {
  const written: string[] = [];
  const log = createLog(
    { component: 'router', logLevel: 'info', logFormat: 'json', ...options },
    { write: (line) => void written.push(line) },
  );
  return { log, written };
}

describe('log', () => {
  it('writes one JSON line with level, UTC time, component, event, facts and message', () => {
    const { log, written } = capture();
    log.warn('lease-refused', { port: 20000, why: null }, 'No lease');
    expect(written).toHaveLength(1);
    expect(written[0]).toMatch(/\n$/);
    const { time, ...rest } = JSON.parse(written[0] ?? '');
    expect(time).toMatch(/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/);
    expect(rest).toEqual({
      level: 'warn',
      component: 'router',
      event: 'lease-refused',
      port: 20000,
      why: null,
      msg: 'No lease',
    });
  });

  it('leaves out what is below its level', () => {
    const { log, written } = capture({ logLevel: 'warn' });
    log.info('a', {}, 'a');
    log.debug('b', {}, 'b');
    log.error('c', {}, 'c');
    expect(written.map((line) => JSON.parse(line).event)).toEqual(['c']);
  });

  it('masks secrets by name and by shape, in facts and messages', () => {
    const secret = randomBytes(32).toString('base64url');
    const { log, written } = capture();
    log.info('x', { secret: 'abc', c2s: 'def', text: `key 1a2b3c4d:${secret} ok` }, `got 1a2b3c4d:${secret}`);
    expect(written.join()).not.toContain(secret);
    expect(JSON.parse(written[0] ?? '')).toMatchObject({
      secret: '***',
      c2s: '***',
      text: 'key 1a2b3c4d:*** ok',
      msg: 'got 1a2b3c4d:***',
    });
  });

  it('keeps a record on one line whatever is in it', () => {
    const { log, written } = capture();
    log.info('x', { reason: 'a\nb' }, 'c\nd');
    expect(written[0]?.trimEnd().split('\n')).toHaveLength(1);
  });

  it('writes for people when asked', () => {
    const { log, written } = capture({ logFormat: 'pretty' });
    log.error('lease-refused', { client: '192.0.2.1', why: 'no room' }, 'No lease');
    expect(written[0]).toMatch(
      /^\d\d:\d\d:\d\d .*ERROR.* No lease {2}.*\[router lease-refused\] client=192\.0\.2\.1 why="no room"/,
    );
  });
});
