import { expect, test } from 'vitest';
import { readFlow } from '../../../appliance/kernel/conntrack.ts';
import { formatEndpoint } from '../../../appliance/protocol/address.ts';

const shown = (line: string): string | null => {
  const flow = readFlow(line);
  return flow && `${formatEndpoint(flow.client)} ${flow.port} ${formatEndpoint(flow.destination)} ${flow.state}`;
};

test('reads a translated connection as /proc/net/nf_conntrack prints it', () => {
  expect(
    shown(
      'ipv4     2 tcp      6 7431 ESTABLISHED src=10.1.0.2 dst=10.1.0.1 sport=33001 dport=20007 src=10.2.0.9 dst=10.2.0.1 sport=443 dport=33001 [ASSURED] mark=3607101440 use=1',
    ),
  ).toBe('10.1.0.2:33001 20007 10.2.0.9:443 ESTABLISHED');
});

test('reads it as conntrack -L prints it, with counters and IPv6', () => {
  expect(
    shown(
      'tcp      6 19 SYN_SENT src=fd01::2 dst=fd01::1 sport=1025 dport=29999 packets=1 bytes=80 [UNREPLIED] src=fd02::9 dst=fd02::1 sport=8443 dport=1025 packets=0 bytes=0 mark=3607101440 use=2',
    ),
  ).toBe('[fd01::2]:1025 29999 [fd02::9]:8443 SYN_SENT');
});

test('other lines are no flow', () => {
  for (const line of [
    '',
    'udp 17 29 src=1.2.3.4 dst=1.2.3.5 sport=1 dport=2 mark=1',
    'conntrack v1.4.7: 0 flow entries',
  ])
    expect(readFlow(line)).toBeNull();
});
