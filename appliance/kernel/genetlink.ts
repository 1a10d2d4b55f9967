import { attribute, integer, NetlinkError, type NetlinkSocket, readAttributes } from './netlink.ts';

/** Generic netlink: families by name (linux/genetlink.h, Documentation/userspace-api/netlink/intro.rst). */

export type Family = {
  /** The type of its messages. */
  readonly id: number;
  /** Multicast groups by name. */
  readonly groups: ReadonlyMap<string, number>;
};

/** `GENL_ID_CTRL`, the family that knows the others. */
const CONTROLLER = 16;
const GET_FAMILY = 3;
const ATTRIBUTE = { ID: 1, NAME: 2, GROUPS: 7 } as const;
const GROUP = { NAME: 1, ID: 2 } as const;

/** `struct genlmsghdr`: command, version, two reserved bytes. */
export const GENERIC_HEADER_BYTES = 4;
export const genericHeader = (command: number): Buffer => Buffer.of(command, 1, 0, 0);

/** Looks a family up; the kernel may load its module for that. @throws NetlinkError: ENOENT when there is none */
export async function resolveFamily(socket: NetlinkSocket, name: string): Promise<Family> {
  const what = `looking for the ${name} family`;
  const question = Buffer.concat([genericHeader(GET_FAMILY), attribute(ATTRIBUTE.NAME, Buffer.from(`${name}\0`))]);
  const [answer = Buffer.alloc(0)] = await socket.request(what, CONTROLLER, question);
  const attributes = readAttributes(answer, GENERIC_HEADER_BYTES);
  const id = integer(attributes.get(ATTRIBUTE.ID));
  if (id === null) throw new NetlinkError(what, 'ENOENT');
  const groups = new Map<string, number>();
  for (const nest of readAttributes(attributes.get(ATTRIBUTE.GROUPS) ?? Buffer.alloc(0)).values()) {
    const group = readAttributes(nest);
    const number = integer(group.get(GROUP.ID));
    const text = group.get(GROUP.NAME)?.toString('latin1').replace(/\0+$/, '');
    if (number !== null && text !== undefined) groups.set(text, number);
  }
  return { id, groups };
}
