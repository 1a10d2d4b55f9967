import koffi from 'koffi';

/** struct bpf_map_info and bpf_prog_info of linux/bpf.h: where their names are, 16 bytes each. */
const NAME = { map: 24, prog: 64 } as const;
const NAME_BYTES = 16;
const INFO_BYTES = 256;

/** Names of all BPF programs and maps in this kernel, whoever holds them. Needs root, and libbpf. */
export function bpfObjects(): string[] {
  const libbpf = koffi.load('libbpf.so.1');
  const close = koffi.load(null).func('int close(int fd)');
  const info = libbpf.func('int bpf_obj_get_info_by_fd(int fd, _Out_ uint8_t *info, _Inout_ uint32_t *length)');
  return (['prog', 'map'] as const).flatMap((kind) => {
    const next = libbpf.func(`int bpf_${kind}_get_next_id(uint32_t after, _Out_ uint32_t *id)`);
    const open = libbpf.func(`int bpf_${kind}_get_fd_by_id(uint32_t id)`);
    const names: string[] = [];
    for (let id = [0]; next(id[0], id) === 0; ) {
      const fd: number = open(id[0]);
      // Gone meanwhile.
      if (fd < 0) continue;
      const bytes = Buffer.alloc(INFO_BYTES);
      info(fd, bytes, [bytes.length]);
      close(fd);
      names.push(bytes.toString('latin1', NAME[kind], NAME[kind] + NAME_BYTES).replace(/\0.*$/, ''));
    }
    return names;
  });
}
